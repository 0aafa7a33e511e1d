"""The moving average of a student's weights: how it moves, what it teaches, and that it is the result of the run."""

import numpy as np
import pytest
import torch
from gradients import step_rows, step_trainer
from transformers import AutoModelForSequenceClassification, TrainerCallback

from nlpxfer.config import RunOptions
from nlpxfer.errors import ConfigError, ResumeError
from nlpxfer.methods.base import model_inputs
from nlpxfer.methods.distill import Distill
from nlpxfer.train.moving_average import MovingAverage
from nlpxfer.train.predict import predict


@pytest.fixture
def model(tiny_checkpoint):
    return AutoModelForSequenceClassification.from_pretrained(tiny_checkpoint("bert", "classifier"))


class KeepWeights(TrainerCallback):
    """The classifier's weights after each step."""

    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.seen.append(model.classifier.weight.detach().numpy().copy())


def trainer_of(model, folder, **changes):
    shared = {
        "per_device_train_batch_size": 4,
        "max_steps": 5,
        "learning_rate": 1e-2,
        "warmup_steps": 0,
        "eval_strategy": "no",
        "save_strategy": "no",
        "load_best_model_at_end": False,
    }
    options = RunOptions(output_dir=str(folder), use_cpu=True, disable_tqdm=True, **{**shared, **changes})
    return step_trainer(model, Distill(kd_weight=0.5, ema_decay=0.6), options, step_rows(labelled="uneven"), "bert")


def test_the_average_moves_by_its_decay_and_is_the_result(model, tmp_path):
    """d is 1/2 in the first step, then 0.6; by hand in numpy."""
    mean = model.classifier.weight.detach().numpy().copy()
    trainer, keep = trainer_of(model, tmp_path), KeepWeights()
    trainer.add_callback(keep)
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert not frozen
    trainer.fit()
    for decay, weight in zip([1 / 2, 0.6, 0.6, 0.6, 0.6], keep.seen, strict=True):
        mean = decay * mean + (1 - decay) * weight
    np.testing.assert_allclose(trainer.average.model.classifier.weight, mean, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(model.classifier.weight.detach(), trainer.average.model.classifier.weight)
    assert np.abs(mean - keep.seen[-1]).max() > 1e-4
    assert not trainer.average.model.training
    assert not any(p.requires_grad for p in trainer.average.model.parameters())


def test_it_is_what_teaches_and_what_is_scored(model, tmp_path):
    trainer = trainer_of(model, tmp_path)
    with torch.no_grad():
        trainer.average.model.classifier.weight.mul_(3)
    batch = dict(next(iter(trainer.get_train_dataloader())))
    del batch["teacher_logits"]
    given = trainer._taught(batch)["teacher_logits"]
    torch.testing.assert_close(given, trainer.average.model(**model_inputs(batch)).logits.detach())
    assert float((given - model(**model_inputs(batch)).logits.detach()).abs().max()) > 0.1
    rows = trainer.rows
    trainer.score = lambda logits, labels: {}  # most of these rows have no label
    scored = trainer.evaluation_loop(trainer.get_eval_dataloader(), "").predictions
    np.testing.assert_array_equal(scored, predict(trainer.average.model, rows, trainer.pad))
    assert np.abs(scored - predict(model, rows, trainer.pad)).max() > 0.1


def test_the_best_average_is_what_is_kept(model, tmp_path):
    """The first of two scores is the better one."""
    often = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer = trainer_of(model, tmp_path, max_steps=4, load_best_model_at_end=True, **often)
    scores, seen = [{"accuracy": 0.9, "loss": 1.0}, {"accuracy": 0.1, "loss": 1.0}], []

    def score(logits, labels):
        seen.append(trainer.average.model.classifier.weight.clone())
        return scores[len(seen) - 1]

    trainer.score = score
    trainer.fit()
    assert len(seen) == 2
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(model.classifier.weight, seen[0])


def test_it_is_saved_and_read_back(model, tmp_path):
    model.bert.embeddings.requires_grad_(False)
    average = MovingAverage(model, decay=0.9, autocast=None)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    average.update_(model, 4)
    average.save(tmp_path)
    other = MovingAverage(model, decay=0.9, autocast=None)
    other.load_(tmp_path)
    for name in average.trained:
        assert torch.equal(average.model.get_parameter(name), other.model.get_parameter(name))
    assert not any("embeddings" in name for name in average.trained)
    with pytest.raises(ResumeError, match="holds no moving average"):
        other.load_(tmp_path / "nothing")
    model.requires_grad_(True)
    with pytest.raises(ResumeError, match="the average of other weights"):
        MovingAverage(model, decay=0.9, autocast=None).load_(tmp_path)


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_decays_that_are_refused(decay):
    with pytest.raises(ConfigError, match=r"ema_decay: .* is not in \[0, 1\)"):
        Distill(ema_decay=decay)
