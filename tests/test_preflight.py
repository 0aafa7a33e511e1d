"""The look at the loss before the first step: what it finds, what it refuses, and that it changes nothing."""

import logging

import numpy as np
import pytest
import torch
from gradients import guided, other_states, state_rows, step_rows, step_tokenizer, step_trainer
from tiny import LABELS
from transformers import AutoModelForSequenceClassification

from nlpxfer.config import RunOptions
from nlpxfer.data.tokenise import Collator
from nlpxfer.errors import CheckpointError, DataError, LabelError, NotFiniteError
from nlpxfer.methods.base import LossTerm, Method
from nlpxfer.methods.distill import Distill
from nlpxfer.methods.finetune import FineTune
from nlpxfer.train import trainer as trainer_module
from nlpxfer.train.preflight import check_mask, preflight


@pytest.fixture
def model(tiny_checkpoint):
    return AutoModelForSequenceClassification.from_pretrained(tiny_checkpoint("bert", "classifier")).train()


@pytest.fixture
def batch():
    rows = step_rows(labelled="uneven")
    return Collator.for_tokenizer(step_tokenizer("bert"))([rows[i] for i in range(8)])


def look(method, model, batch):
    return preflight(method, model, batch, pad_token_id=0)


def test_sizes_and_gradients_of_the_terms(model, batch):
    method = Distill(temperature=3.0, kd_weight=0.75, teacher_labels=tuple(LABELS))
    found = look(method, model, batch)
    assert found["rows"] == 8
    assert found["tokens"] == int(batch["attention_mask"].sum())
    assert found["temperature"] == 3.0
    assert found["labels"] == list(LABELS)
    for name, rows in (("label", 3), ("soft_target", 8)):
        term = method.loss_terms(model, batch)[name]
        model.zero_grad()
        loss = term.weight * term.rows_B.sum() / rows
        loss.backward()
        norm = sum(float(p.grad.norm()) ** 2 for p in model.parameters() if p.grad is not None) ** 0.5
        expected = {"weight": term.weight, "rows": rows, "loss": loss.item(), "gradient_norm": norm}
        assert found["terms"][name] == pytest.approx(expected, rel=1e-5)
    assert look(Distill(kd_weight=1.0), model, batch)["terms"].keys() == {"soft_target"}
    assert "temperature" not in look(Distill(kd_loss="mse"), model, batch)


def test_hooks_and_layers_are_told(model, tiny_checkpoint):
    method = guided(tiny_checkpoint("bert", "classifier", seed=1), other_states())
    rows = state_rows()
    batch = Collator.for_tokenizer(step_tokenizer("bert"))([rows[i] for i in range(8)])
    found = look(method, method.adapt(model, ()), batch)
    assert found["terms"].keys() == {"label", "soft_target", "hidden", "relation", "similarity"}
    assert found["hidden_layers"] == ["0:0", "1:1", "2:2", "3:3"]
    assert found["num_relation_heads"] == 4
    assert len(found["teacher_hooks"]) == len(found["student_hooks"]) == 4 + 3
    attention = method.states.teacher.bert.encoder.layer[3].attention
    attention.forward = lambda states, *rest, **named: (states, None)
    with pytest.raises(CheckpointError, match="did not run"):
        look(method, model, batch)


def test_a_term_that_drowns_another_is_named_with_both_figures(model, batch, caplog):
    found = look(Distill(temperature=3.0, kd_weight=0.999), model, batch)
    terms = found["terms"]
    assert len(found["warnings"]) == 2
    for key, what, warning in zip(
        ("loss", "gradient_norm"), ("loss", "gradient norm"), found["warnings"], strict=True
    ):
        big, small = terms["soft_target"][key], terms["label"][key]
        assert big > 100 * small
        assert (
            f"the {what} of soft_target, {big:.4g}, is {big / small:.0f} times that of label, {small:.4g}" in warning
        )
        assert warning in caplog.text
    assert look(Distill(temperature=3.0, kd_weight=0.5), model, batch)["warnings"] == []


def test_equal_answers_are_told_unless_they_are_expected(model, batch):
    logits = model(**{name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids")}).logits
    same = {**batch, "teacher_logits": logits.detach()}
    assert look(Distill(), model, same)["warnings"] == [
        "soft_target is 0 on the first batch: teacher and student agree"
    ]
    assert look(Distill(ema_decay=0.9), model, same)["warnings"] == []


class Broken(Method):
    """Gives one term that is not as it should be."""

    def __init__(self, rows_of):
        self.rows_of = rows_of

    def loss_terms(self, model, batch):
        return {"odd": LossTerm(self.rows_of(model, batch), 0.5)}

    def counts(self, batch):
        return {"odd": torch.tensor(len(batch["labels"]))}


@pytest.mark.parametrize(
    ("rows_of", "told"),
    [
        (lambda model, batch: torch.ones(8), "odd \\(weight 0.5\\) has no gradient"),
        (lambda model, batch: 1 + 0 * model.classifier.bias.sum().repeat(8), "is 0.5, but its gradient is 0"),
        (lambda model, batch: float("nan") * model.classifier.bias.sum().repeat(8), "the loss term odd is nan"),
        (
            lambda model, batch: (model.classifier.bias * 0).sqrt().sum().repeat(8),
            "the norm of its gradient (nan|inf)",
        ),
    ],
)
def test_terms_that_would_teach_nothing_or_ruin_all_are_errors(rows_of, told, model, batch):
    with pytest.raises(NotFiniteError, match=told):
        look(Broken(rows_of), model, batch)


def test_labels_in_another_order_are_refused(model, batch):
    with pytest.raises(LabelError, match="The teacher's columns are travel, .*the student's food, "):
        look(Distill(teacher_labels=tuple(reversed(LABELS))), model, batch)


def wrong_masks(mask):
    off, late, none, two = mask.clone(), mask.clone(), mask.clone(), mask.clone()
    off[0, int(mask[0].sum()) - 1] = 0
    short = int(mask.sum(dim=1).argmin())
    late[short, -1], late[short, int(mask[short].sum()) : -1] = 1, 0
    none[2] = 0
    two[1, 0] = 2
    return {
        "is 0 where there is a token": off,
        "has a token after padding": late,
        "is 0 for a whole row": none,
        "holds other numbers than 0 and 1": two,
        "has shape": mask[:, :-1],
    }


def test_masks_that_are_wrong_are_refused(batch):
    check_mask(batch, 0)
    for told, mask in wrong_masks(batch["attention_mask"]).items():
        with pytest.raises(DataError, match=told):
            check_mask({**batch, "attention_mask": mask}, 0)
    with pytest.raises(DataError, match="no attention mask"):
        check_mask({"input_ids": batch["input_ids"]}, 0)


def fitted(tiny_checkpoint, folder, method, **changes):
    """A few steps with dropout; the weights at their end and the random state."""
    options = RunOptions(
        output_dir=str(folder),
        use_cpu=True,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=3,
        eval_strategy="no",
        save_strategy="no",
        load_best_model_at_end=False,
        disable_tqdm=True,
        **changes,
    )
    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_checkpoint("bert", "classifier", dropout=0.1))
    trainer = step_trainer(method.adapt(model, ()), method, options, state_rows(), "bert")
    trainer.fit()
    return trainer, {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()


@pytest.mark.parametrize("bf16", [False, True])
def test_a_run_is_bit_for_bit_the_same_with_and_without_it(bf16, tiny_checkpoint, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    method = guided(tiny_checkpoint("bert", "classifier", seed=1), other_states())
    looked, weights, state = fitted(tiny_checkpoint, tmp_path, method, bf16=bf16)
    assert caplog.text.count("before the first step: label") == 1
    assert looked.preflight["terms"].keys() == {"label", "soft_target", "hidden", "relation", "similarity"}
    monkeypatch.setattr(trainer_module, "preflight", lambda *arguments, **named: None)
    without, same, same_state = fitted(tiny_checkpoint, tmp_path, method, bf16=bf16)
    assert without.preflight is None
    assert all(torch.equal(weights[name], value) for name, value in same.items())
    assert torch.equal(state, same_state)


def test_other_methods_have_none(tiny_checkpoint, tmp_path):
    assert fitted(tiny_checkpoint, tmp_path, FineTune())[0].preflight is None


def test_in_bfloat16_the_teacher_computes_in_it_too(tiny_checkpoint):
    """As the student does; without, states of the two would differ by rounding alone."""
    from dataclasses import replace

    method = guided(tiny_checkpoint("bert", "classifier", seed=1), other_states())
    rows = state_rows()
    batch = Collator.for_tokenizer(step_tokenizer("bert"))([rows[i] for i in range(2)])
    model = AutoModelForSequenceClassification.from_pretrained(tiny_checkpoint("bert", "classifier"))
    method.adapt(model, ())
    states = model.student_states
    name = states.teacher_names[-1]
    full = method.states.teacher_outputs(states, batch)[name]
    short = replace(method.states, autocast=torch.bfloat16).teacher_outputs(states, batch)[name]
    assert (full.dtype, short.dtype) == (torch.float32, torch.bfloat16)
    np.testing.assert_allclose(full, short.float(), atol=0.1)
