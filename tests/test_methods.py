"""The registry of methods, and what each method minimises."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import make_rows

import nlpxfer.methods
from nlpxfer.cli import main
from nlpxfer.errors import ConfigError
from nlpxfer.losses import label_loss, soft_target_loss
from nlpxfer.methods import REGISTRY, Method, MethodRow, available_methods, method_row
from nlpxfer.methods.base import model_inputs
from nlpxfer.methods.distill import Distill
from nlpxfer.methods.finetune import FineTune, balanced_weights, log_shares
from nlpxfer.recipes import recipe_file


class Point:
    """An entry point of another package."""

    def __init__(self, name, value):
        self.name, self.value = name, value

    def load(self):
        if isinstance(self.value, Exception):
            raise self.value
        return self.value


@pytest.fixture
def installed(monkeypatch):
    """Sets the entry points of other packages."""
    points = []

    def entry_points(*, group):
        assert group == "nlpxfer.methods"
        return points

    monkeypatch.setattr(nlpxfer.methods, "entry_points", entry_points)
    return lambda *new: points.extend(Point(name, value) for name, value in new)


def row(key, target="nlpxfer.methods.finetune:FineTune"):
    return MethodRow(key=key, target=target, family="Other", summary="does nothing", source="a paper")


# -- registry


@pytest.mark.parametrize("entry", REGISTRY, ids=lambda entry: entry.key)
def test_rows_of_the_registry(entry):
    method = entry.load()
    assert issubclass(method, Method)
    assert method.__module__ == f"nlpxfer.methods.{entry.key}"
    assert method_row(entry.key) is entry
    assert isinstance(method(), Method)  # all options have defaults
    for text in (entry.family, entry.summary, entry.source):
        assert text.strip() == text != ""
    assert "\n" not in entry.summary


def test_keys_are_unique():
    keys = [entry.key for entry in REGISTRY]
    assert sorted(set(keys)) == sorted(keys)
    assert {"finetune", "distill"} <= set(keys)


def test_unknown_method_names_the_nearest(installed):
    installed(("merge", row("merge")))
    with pytest.raises(ConfigError) as caught:
        method_row("distil")
    assert str(caught.value).splitlines()[0] == "There is no method 'distil'. Did you mean 'distill'?"
    known = sorted([*(entry.key for entry in REGISTRY), "merge"])
    assert f"Available: {', '.join(known)}" in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        method_row("zzz")
    assert caught.value.what == "There is no method 'zzz'."


def test_methods_of_other_packages_come_after_ours(installed):
    other = row("merge")
    installed(("merge", other))
    assert available_methods() == [*REGISTRY, other]
    assert method_row("merge").load() is FineTune


@pytest.mark.parametrize(
    ("points", "fault"),
    [
        ([("merge", "a text")], "nlpxfer.methods:merge is a str, not a MethodRow"),
        ([("distill", row("distill"))], "Two packages declare the method 'distill'"),
        ([("merge", row("merge")), ("merge", row("merge"))], "Two packages declare the method 'merge'"),
        ([("merge", row("murge"))], "nlpxfer.methods:merge declares the method 'murge'"),
        ([("merge", ImportError("No module x"))], "nlpxfer.methods:merge cannot be loaded: No module x"),
    ],
)
def test_faulty_entry_points_are_named(installed, points, fault):
    installed(*points)
    with pytest.raises(ConfigError) as caught:
        available_methods()
    assert fault in str(caught.value)


RECIPE = """
import sys
from nlpxfer.cli import run_main
def main(argv=None):
    sys.stdout.write(f"merging {(sys.argv[1:] if argv is None else argv)}")
if __name__ == "__main__":
    run_main(main)
"""


def test_recipes_of_other_packages_run(installed, tmp_path, monkeypatch, capsys):
    (tmp_path / "a_merging_package.py").write_text(RECIPE)
    monkeypatch.syspath_prepend(tmp_path)
    installed(("merge", replace(row("merge"), recipe="a_merging_package")))
    installed(("silent", row("silent")), ("gone", replace(row("gone"), recipe="no.such_module")))
    with pytest.raises(SystemExit) as ended:
        main(["run", "merge", "--fast", "true"])
    assert (ended.value.code or 0, capsys.readouterr().out) == (0, "merging ['--fast', 'true']")
    assert recipe_file("distill").parent.name == "recipes"
    for name, why in {"silent": "it names no module", "gone": "'no.such_module', which is not there"}.items():
        with pytest.raises(ConfigError, match="of another package has no recipe") as caught:
            recipe_file(name)
        assert why in str(caught.value)
    with pytest.raises(ConfigError, match="There is no recipe 'merg'. Did you mean 'merge'"):
        recipe_file("merg")


# -- methods


@pytest.fixture
def model(tiny_checkpoint):
    from nlpxfer.checkpoint import load_classifier
    from nlpxfer.data.schema import LabelSchema

    schema = LabelSchema(("food", "music", "sport", "travel"))
    return load_classifier(str(tiny_checkpoint("bert", "classifier")), schema=schema)


@pytest.fixture
def batch(model):
    encoded = model.tokenizer([entry["text"] for entry in make_rows(6)], padding=True, return_tensors="pt")
    labels = torch.tensor([0, 3, -100, 2, -100, 1])
    return {**encoded, "labels": labels, "teacher_logits": torch.randn(6, 4)}


def test_only_inputs_go_to_the_model(batch):
    assert set(model_inputs(batch)) == {"input_ids", "attention_mask", "token_type_ids"}
    assert set(model_inputs({"input_ids": 1, "weights": 2})) == {"input_ids"}


def test_finetune(model, batch):
    terms = FineTune(label_smoothing=0.1).loss_terms(model.model, batch)
    logits = model.model(**model_inputs(batch)).logits
    assert set(terms) == {"label"}
    assert terms["label"].weight == 1.0
    torch.testing.assert_close(terms["label"].rows_B, label_loss(logits, batch["labels"], label_smoothing=0.1))
    assert {name: count.item() for name, count in FineTune().counts(batch).items()} == {"label": 4}


def test_finetune_for_rare_classes(model, batch):
    weights, offsets = (1.0, 2.0, 0.5, 1.0), (-1.0, -0.5, -2.0, 0.0)
    method = FineTune(focal_gamma=1.5, class_weights=weights, offsets=offsets)
    logits = model.model(**model_inputs(batch)).logits
    expected = label_loss(
        logits,
        batch["labels"],
        focal_gamma=1.5,
        class_weights_C=torch.tensor(weights),
        offsets_C=torch.tensor(offsets),
    )
    torch.testing.assert_close(method.loss_terms(model.model, batch)["label"].rows_B, expected)


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({"focal_gamma": -1.0}, "focal_gamma: -1.0 is not a finite number"),
        ({"class_weights": (1.0, float("nan"))}, "class_weights: a weight is not a finite number"),
        ({"label_smoothing": 1.0}, "label_smoothing_factor: 1.0 is not in [0, 1)"),
    ],
)
def test_finetune_refuses(values, fault):
    with pytest.raises(ConfigError) as caught:
        FineTune(**values)
    assert fault in str(caught.value)


def test_weights_and_shares_of_classes():
    labels = [0] * 6 + [1] * 3 + [3]
    weights = balanced_weights(labels, classes=4)
    assert weights == pytest.approx((10 / 18, 10 / 9, 1.0, 10 / 3))
    assert np.mean([weights[label] for label in labels]) == pytest.approx(1)
    shares = np.exp(log_shares(labels, classes=4))
    assert shares.sum() == pytest.approx(1)
    assert shares == pytest.approx(np.array([6, 3, 0.5, 1]) / 10.5)


def test_distill(model, batch):
    method = Distill(temperature=3.0, kd_weight=0.7, label_smoothing=0.2)
    terms = method.loss_terms(model.model, batch)
    logits = model.model(**model_inputs(batch)).logits
    assert {name: term.weight for name, term in terms.items()} == pytest.approx({"label": 0.3, "soft_target": 0.7})
    torch.testing.assert_close(terms["label"].rows_B, label_loss(logits, batch["labels"], label_smoothing=0.2))
    expected = soft_target_loss(logits, batch["teacher_logits"], temperature=3.0)
    torch.testing.assert_close(terms["soft_target"].rows_B, expected)
    assert (terms["soft_target"].rows_B > 0).all()
    counts = method.counts(batch)
    assert {name: count.item() for name, count in counts.items()} == {"label": 4, "soft_target": 6}
    assert {count.dtype for count in counts.values()} == {torch.int64}
    assert set(counts) == set(terms)


def test_distill_of_rows_that_are_not_taught_or_weigh_less(model, batch):
    """NaN: no teacher; the loss is 0 there and the row is not counted. A weight scales a row, and it still counts."""
    method = Distill(temperature=3.0, kd_weight=0.7)
    plain = method.loss_terms(model.model, batch)["soft_target"].rows_B.detach()
    logits = batch["teacher_logits"].clone()
    logits[1] = float("nan")
    weights = torch.tensor([1.0, 1.0, 0.25, 0.0, 1.0, 1.0])
    changed = {**batch, "teacher_logits": logits, "teacher_weights": weights}
    terms = method.loss_terms(model.model, changed)
    expected = plain * torch.tensor([1.0, 0.0, 0.25, 0.0, 1.0, 1.0])
    torch.testing.assert_close(terms["soft_target"].rows_B, expected)
    assert method.counts(changed)["soft_target"].item() == 5
    assert method.counts(changed)["label"].item() == method.counts(batch)["label"].item()
    terms["soft_target"].rows_B.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.model.parameters())


def test_distilling_one_weight_alone_is_the_other_method(model, batch):
    labels_only = Distill(kd_weight=0.0).loss_terms(model.model, batch)
    torch.testing.assert_close(
        labels_only["label"].rows_B, FineTune().loss_terms(model.model, batch)["label"].rows_B, rtol=0, atol=0
    )
    assert labels_only["soft_target"].weight == 0.0
    assert Distill(kd_weight=1.0).loss_terms(model.model, batch)["label"].weight == 0.0


def test_teacher_gets_no_gradient(model, batch):
    batch["teacher_logits"].requires_grad_()
    terms = Distill().loss_terms(model.model, {**batch, "teacher_logits": batch["teacher_logits"].detach()})
    terms["soft_target"].rows_B.sum().backward()
    assert batch["teacher_logits"].grad is None
    assert model.model.classifier.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("values", "faults"),
    [
        ({"temperature": 0.0}, ["temperature: 0.0 is not above 0 and finite"]),
        ({"temperature": -2.0}, ["temperature: -2.0 is not above 0 and finite"]),
        ({"temperature": math.inf}, ["temperature: inf is not above 0 and finite"]),
        ({"temperature": math.nan}, ["temperature: nan is not above 0 and finite"]),
        ({"kd_weight": 2.0}, ["kd_weight: 2.0 is not between 0 and 1; it is the share of the distillation loss"]),
        ({"kd_weight": -0.1}, ["kd_weight: -0.1 is not between 0 and 1; it is the share of the distillation loss"]),
        ({"label_smoothing": 1.0}, ["label_smoothing_factor: 1.0 is not in [0, 1)"]),
        (
            {"temperature": 0.0, "kd_weight": 2.0, "label_smoothing": -1.0},
            [
                "temperature: 0.0 is not above 0 and finite",
                "kd_weight: 2.0 is not between 0 and 1; it is the share of the distillation loss",
                "label_smoothing_factor: -1.0 is not in [0, 1)",
            ],
        ),
    ],
)
def test_distill_options_out_of_range(values, faults):
    with pytest.raises(ConfigError) as caught:
        Distill(**values)
    assert list(caught.value.faults) == faults


@pytest.mark.parametrize("smoothing", [-0.1, 1.0, math.nan])
def test_finetune_options_out_of_range(smoothing):
    with pytest.raises(ConfigError, match="label_smoothing_factor"):
        FineTune(label_smoothing=smoothing)
