"""R-Drop: two passes with dropout, drawn together."""

import contextlib
import math

import pytest
import torch
from recipe_runs import finished, refused, tiny_words
from tiny import make_rows, write_csv

from nlpxfer.checkpoint import load_classifier
from nlpxfer.config import RunOptions
from nlpxfer.config.label_loss import LabelLossOptions
from nlpxfer.data.schema import LabelSchema
from nlpxfer.errors import ConfigError
from nlpxfer.losses import agreement_loss, binary_r_drop_loss, label_loss, r_drop_loss
from nlpxfer.methods.finetune import FineTune
from nlpxfer.problem import MULTI_LABEL, REGRESSION, SINGLE_LABEL
from nlpxfer.train.regime import check_r_drop, set_dropout_, trained_dropout

SCHEMA = LabelSchema(("food", "music", "sport", "travel"))


def test_by_hand():
    """p = (3/4, 1/4), q = (1/2, 1/2): KL(p||q) = 3/4 ln 3/2 + 1/4 ln 1/2, KL(q||p) = 1/2 ln 2/3 + 1/2 ln 2."""
    first, second = torch.tensor([[math.log(3), 0.0], [1.0, 1.0]]), torch.tensor([[5.0, 5.0], [-2.0, -2.0]])
    forward = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    backward = 0.5 * math.log(2 / 3) + 0.5 * math.log(2)
    found = r_drop_loss(first, second)
    assert found.tolist() == pytest.approx([(forward + backward) / 2, 0.0])
    torch.testing.assert_close(r_drop_loss(second, first), found, rtol=0, atol=0)


def test_identities():
    first, second = torch.randn(2, 6, 5, dtype=torch.float64)
    assert r_drop_loss(first, first + 3.0).abs().max() < 1e-15, "logits are known up to a constant"
    assert r_drop_loss(first, first).tolist() == [0.0] * 6
    assert (r_drop_loss(first, second) > 0).all()
    log_p, log_q = first.log_softmax(-1), second.log_softmax(-1)
    slow = [
        (
            sum(p.exp() * (p - q) for p, q in zip(a, b, strict=True))
            + sum(q.exp() * (q - p) for p, q in zip(a, b, strict=True))
        )
        / 2
        for a, b in zip(log_p, log_q, strict=True)
    ]
    torch.testing.assert_close(r_drop_loss(first, second), torch.stack(slow))
    assert r_drop_loss(first.bfloat16(), second.bfloat16()).dtype == torch.float32
    assert torch.isfinite(r_drop_loss(torch.tensor([[1e4, 0.0]]), torch.tensor([[0.0, 1e4]]))).all()
    with pytest.raises(ValueError, match="differ in shape"):
        r_drop_loss(first, second[:3])


def test_by_hand_for_labels_of_their_own():
    """p = (3/4, 1/2), q = (1/2, 1/2), each beside its 1 - p: the first label is that of the two classes above."""
    first, second = torch.tensor([[math.log(3), 2.0]]), torch.tensor([[0.0, 2.0]])
    two_classes = r_drop_loss(torch.tensor([[math.log(3), 0.0]]), torch.tensor([[0.0, 0.0]]))
    torch.testing.assert_close(binary_r_drop_loss(first, second), two_classes / 2)
    random = torch.randn(2, 5, 1, dtype=torch.float64)
    as_classes = [torch.cat([torch.zeros_like(logits), logits], dim=1) for logits in random]
    torch.testing.assert_close(binary_r_drop_loss(*random), r_drop_loss(*as_classes))
    assert binary_r_drop_loss(random[0], random[0]).tolist() == [0.0] * 5
    with pytest.raises(ValueError, match="differ in shape"):
        binary_r_drop_loss(random[0], random[1][:3])
    torch.testing.assert_close(agreement_loss(MULTI_LABEL, *as_classes), binary_r_drop_loss(*as_classes))
    torch.testing.assert_close(agreement_loss(SINGLE_LABEL, *as_classes), r_drop_loss(*as_classes))


def test_both_sides_get_the_gradient():
    first, second = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(r_drop_loss, (first, second))


@pytest.fixture
def model(tiny_checkpoint):
    return load_classifier(str(tiny_checkpoint("bert", "classifier")), schema=SCHEMA)


@pytest.fixture
def batch(model):
    encoded = model.tokenizer([row["text"] for row in make_rows(6)], padding=True, return_tensors="pt")
    return {**encoded, "labels": torch.tensor([0, 3, -100, 2, -100, 1])}


def test_terms_of_two_passes(model, batch):
    set_dropout_(model.model, 0.3)
    model.model.train()
    method = FineTune(r_drop_weight=4.0, label_smoothing=0.1)
    seen = []
    handle = model.model.register_forward_hook(lambda module, inputs, output: seen.append(output.logits))
    terms = method.loss_terms(model.model, batch)
    handle.remove()
    assert len(seen) == 1, "one pass of a batch twice as large: DDP is made for one"
    first, second = seen[0].chunk(2)
    assert (first - second).abs().max() > 1e-3, "the two answers come from different masks"
    losses = [label_loss(logits, batch["labels"], label_smoothing=0.1) for logits in (first, second)]
    torch.testing.assert_close(terms["label"].rows_B, (losses[0] + losses[1]) / 2)
    torch.testing.assert_close(terms["r_drop"].rows_B, r_drop_loss(first, second))
    assert {name: term.weight for name, term in terms.items()} == {"label": 1.0, "r_drop": 4.0}
    assert {name: int(count) for name, count in method.counts(batch).items()} == {"label": 4, "r_drop": 6}


def test_without_dropout_it_is_plain_fine_tuning(model, batch):
    plain = FineTune().loss_terms(model.model, batch)["label"].rows_B
    terms = FineTune(r_drop_weight=1.0).loss_terms(model.model, batch)
    torch.testing.assert_close(terms["label"].rows_B, plain)
    assert terms["r_drop"].rows_B.abs().max() < 1e-6
    assert set(FineTune().loss_terms(model.model, batch)) == set(FineTune().counts(batch)) == {"label"}


@pytest.mark.parametrize("weight", [-1.0, math.inf, math.nan])
def test_weights_out_of_range(weight):
    with pytest.raises(ConfigError, match="r_drop_weight: .* is not a finite number of at least 0"):
        FineTune(r_drop_weight=weight)


def test_it_means_nothing_for_numbers():
    with pytest.raises(ConfigError, match="r_drop_weight: means nothing for a regression"):
        FineTune(problem_type=REGRESSION, r_drop_weight=1.0)


@pytest.mark.parametrize(
    ("family", "own", "share", "expected"),
    [("bert", 0.2, None, 0.2), ("bert", 0.0, None, 0.0), ("bert", 0.0, 0.1, 0.1), ("llama", 0.3, None, 0.3),
     ("gpt2", 0.2, 0.0, 0.0)],
)  # fmt: skip
def test_the_dropout_that_a_model_trains_with(family, own, share, expected, tiny_checkpoint):
    model = load_classifier(str(tiny_checkpoint(family, dropout=own)), schema=SCHEMA).model
    assert trained_dropout(model, share) == pytest.approx(expected)
    assert trained_dropout(torch.nn.Linear(2, 2), 0.5) == 0.0


def test_it_needs_dropout(tiny_data, tiny_checkpoint, tmp_path):
    words = [*tiny_words(tiny_data, tiny_checkpoint("bert")), "--r_drop_weight", "1"]
    told = refused("finetune", tmp_path / "out", *words)
    assert "r_drop_weight: 1 does nothing where" in told
    assert "--dropout is 0 by default" in told
    assert "Try: --dropout 0.1" in told


def test_it_needs_dropout_also_where_the_model_has_its_own(tiny_checkpoint, tmp_path):
    options = RunOptions(output_dir=str(tmp_path), dropout=None, use_cpu=True, bf16=False)
    for own, fault in ((0.2, None), (0.0, "its own dropout is 0")):
        start = load_classifier(str(tiny_checkpoint("bert", dropout=own)), schema=SCHEMA)
        with pytest.raises(ConfigError, match=fault) if fault else contextlib.nullcontext():
            check_r_drop(start, LabelLossOptions(r_drop_weight=1.0), options)
            check_r_drop(start, LabelLossOptions(r_drop_weight=0.0), options)


def test_with_an_adapter_dropout_of_either_serves(tiny_data, tiny_checkpoint, tmp_path):
    words = [*tiny_words(tiny_data, tiny_checkpoint("bert")), "--control_arm", "false", "--r_drop_weight", "1"]
    assert "r_drop_weight: 1 does nothing where" in refused("adapters", tmp_path / "none", *words)
    run = finished("adapters", tmp_path / "out", *words, "--adapter_dropout", "0.2")
    assert run.run["config"]["r_drop_weight"] == 1.0


def test_it_trains(tiny_data, tiny_checkpoint, tmp_path):
    words = [*tiny_words(tiny_data, tiny_checkpoint("bert"), epochs=2), "--control_arm", "false", "--dropout", "0.1"]
    plain = finished("finetune", tmp_path / "plain", *words)
    drawn = finished("finetune", tmp_path / "drawn", *words, "--r_drop_weight", "2")
    assert drawn.run["config"]["r_drop_weight"] == 2.0
    assert drawn.report["cost"]["tokens"] == plain.report["cost"]["tokens"], "rows count once"
    losses = [
        next(line["train_loss"] for line in run.arm("fine-tuned")["details"]["history"] if "train_loss" in line)
        for run in (plain, drawn)
    ]
    assert losses[0] != losses[1]


def test_several_labels_windows_and_copies_go_together(tiny_checkpoint, tmp_path):
    """A multi-label task: balanced draws are for one class per row, all else of this works."""
    rows = [{**row, "label": row["label"] + "|x" * (i % 3 == 0)} for i, row in enumerate(make_rows(120, seed=6))]
    words = ["--train_file", str(write_csv(tmp_path / "train.csv", rows)), "--label_separator", "|"]
    words += "--bf16 false --num_threads 1 --use_cpu true --max_length 8 --long_texts sliding_window".split()
    words += "--augmentation swap --r_drop_weight 1 --dropout 0.1 --control_arm false --num_train_epochs 1".split()
    words += ["--model_name_or_path", str(tiny_checkpoint("bert"))]
    run = finished("finetune", tmp_path / "out", *words)
    assert run.report["data"]["augmented"]["added"] > 80
    assert run.report["data"]["long_texts"]["train"]["windows_per_row"] > 1
    assert "micro_f1" in run.report["metrics"]["test"]
    told = refused("finetune", tmp_path / "no", *words, "--sampling", "balanced")
    assert "sampling: balanced is for tasks with one class per row" in told
