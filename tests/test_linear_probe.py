"""A model that starts from a linear probe predicts what the probe predicts, and the rest of it is untouched."""

from dataclasses import replace

import numpy as np
import pytest
import sklearn.linear_model
import torch
from recipe_runs import finished, tiny_words
from sklearn.metrics import log_loss
from tiny import LABELS, make_rows
from transformers import AutoModelForSequenceClassification

from nlpxfer.checkpoint import load_classifier
from nlpxfer.checkpoint.head import embedding_parameters, features, head_of
from nlpxfer.data.schema import LabelSchema
from nlpxfer.data.tokenise import Collator, tokenise
from nlpxfer.errors import DataError
from nlpxfer.train import linear_probe
from nlpxfer.train import predict as predict_module
from nlpxfer.train.linear_probe import fit_probe, start_from_linear_probe_
from nlpxfer.train.predict import predict

FAMILIES = ("bert", "distilbert", "modernbert", "roberta", "gpt2")


@pytest.fixture
def task(tiny_checkpoint):
    """Factory: model, training rows, validation rows and collator."""

    def build(family, labels=LABELS, **options):
        checkpoint = load_classifier(str(tiny_checkpoint(family, **options)), schema=LabelSchema(labels))
        parts = []
        for count, seed in ((160, 1), (60, 2)):
            rows = make_rows(count, labels=labels, seed=seed)
            texts, gold = [row["text"] for row in rows], [labels.index(row["label"]) for row in rows]
            parts.append(tokenise(checkpoint.tokenizer, texts, max_length=32, labels=gold))
        return checkpoint.model, *parts, Collator.for_tokenizer(checkpoint.tokenizer)

    return build


@pytest.fixture
def fitted(monkeypatch):
    """Every scikit-learn fit: penalty -> a copy of the estimator."""
    seen = {}

    class Recorder(sklearn.linear_model.LogisticRegression):
        def fit(self, *arguments):
            super().fit(*arguments)
            plain = sklearn.linear_model.LogisticRegression(C=self.C)
            plain.coef_, plain.intercept_, plain.classes_ = self.coef_.copy(), np.copy(self.intercept_), self.classes_
            seen[self.C] = plain
            return self

    monkeypatch.setattr(sklearn.linear_model, "LogisticRegression", Recorder)
    return seen


def standardised(model, rows, collator, *, like, centred):
    """Features as the probe saw them, computed from the model as it is now."""
    train = predict(model, like, collator, output=features).astype(np.float64)
    mean = train.mean(axis=0) if centred else 0.0
    deviation = train.std(axis=0)
    scale = np.maximum(deviation, np.median(deviation) / 10) + 1e-6
    return (predict(model, rows, collator, output=features) - mean) / scale


def centre(logits):
    return logits - logits.mean(axis=1, keepdims=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_first_predictions_are_those_of_scikit_learn(task, fitted, family):
    model, train, validation, collator = task(family)
    probe = start_from_linear_probe_(model, train, validation, collator)
    estimator = fitted[probe.penalty]
    seen = standardised(model, validation, collator, like=train, centred=family != "gpt2")
    expected = estimator.decision_function(seen)
    logits = predict(model, validation, collator, batch_size=7)
    np.testing.assert_allclose(centre(logits), centre(expected), atol=1e-4, rtol=1e-4)
    gold = validation.columns["labels"]
    assert probe.validation_accuracy == pytest.approx(np.mean(estimator.predict(seen) == gold))
    assert np.mean(logits.argmax(axis=1) == gold) == pytest.approx(probe.validation_accuracy)
    assert probe.seconds > 0
    losses = {penalty: log_loss(gold, other.predict_proba(seen), labels=range(4)) for penalty, other in fitted.items()}
    assert losses[probe.penalty] == pytest.approx(min(losses.values()))
    assert len(losses) > 1


@pytest.mark.parametrize("family", FAMILIES)
def test_probe_is_that_of_an_independent_fit(task, monkeypatch, family):
    monkeypatch.setattr(linear_probe, "PENALTIES", (0.3,))
    monkeypatch.setattr(linear_probe, "ITERATIONS", 2000)
    model, train, validation, collator = task(family)
    start_from_linear_probe_(model, train, validation, collator)
    centred = family != "gpt2"
    own = sklearn.linear_model.LogisticRegression(C=0.3, fit_intercept=centred, max_iter=5000, tol=1e-8)
    own.fit(standardised(model, train, collator, like=train, centred=centred), train.columns["labels"])
    expected = own.decision_function(standardised(model, validation, collator, like=train, centred=centred))
    found = predict(model, validation, collator)
    np.testing.assert_allclose(centre(found), centre(expected), atol=1e-2)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_two_classes(task, fitted, family):
    model, train, validation, collator = task(family, labels=("food", "sport"))
    probe = start_from_linear_probe_(model, train, validation, collator)
    seen = standardised(model, validation, collator, like=train, centred=family != "gpt2")
    logits = predict(model, validation, collator)
    assert logits.shape == (60, 2)
    difference = fitted[probe.penalty].decision_function(seen)
    np.testing.assert_allclose(logits[:, 1] - logits[:, 0], difference, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize("missing", [[1], [0, 3]])
def test_a_class_without_training_rows_is_never_predicted(task, fitted, family, missing):
    model, train, validation, collator = task(family)
    train = train.select(~np.isin(train.columns["labels"], missing))
    probe = start_from_linear_probe_(model, train, validation, collator)
    logits = predict(model, validation, collator)
    assert not np.isin(logits.argmax(axis=1), missing).any()
    there = [index for index in range(4) if index not in missing]
    seen = standardised(model, validation, collator, like=train, centred=family != "gpt2")
    expected = fitted[probe.penalty].decision_function(seen)
    if expected.ndim == 1:
        np.testing.assert_allclose(logits[:, there[1]] - logits[:, there[0]], expected, atol=1e-4, rtol=1e-4)
    else:
        np.testing.assert_allclose(centre(logits[:, there]), centre(expected), atol=1e-4, rtol=1e-4)
    assert probe.validation_accuracy == pytest.approx(np.mean(logits.argmax(axis=1) == validation.columns["labels"]))


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_and_body_are_untouched(task, family):
    model, train, validation, collator = task(family, dropout=0.3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    start_from_linear_probe_(model, train, validation, collator)
    assert model.training
    parts = head_of(model)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    allowed = {f"{name}.{kind}" for name in (parts.final_name, *parts.transforms) for kind in ("weight", "bias")}
    assert f"{parts.final_name}.weight" in changed
    assert changed <= allowed | {"head.norm.weight", "head.norm.bias"}
    assert not {name for name, _ in embedding_parameters(model)} & changed
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_probe_that_is_scaled_down_gives_the_same_classes(task, family):
    found = []
    for size in (0.0, 0.02, 1e6):
        model, train, validation, collator = task(family)
        probe = start_from_linear_probe_(model, train, validation, collator, size=size)
        weight = head_of(model).final.weight.detach().double()
        found.append((probe, weight.square().mean().sqrt().item(), predict(model, validation, collator)))
    (whole, large, logits), (scaled, small, fewer), (_, same, _) = found
    assert large == same > 0.02, "a limit above it changes nothing"
    assert small == pytest.approx(0.02, rel=1e-4)
    np.testing.assert_allclose(centre(fewer), centre(logits) * 0.02 / large, rtol=1e-3, atol=1e-5)
    assert replace(whole, seconds=0) == replace(scaled, seconds=0), "what is told is the probe, not the start"


def test_rows_without_a_label_are_left_out(task):
    model, train, validation, collator = task("gpt2")
    half = np.arange(0, 160, 2)
    labels = train.columns["labels"].copy()
    labels[np.arange(1, 160, 2)] = -100
    start_from_linear_probe_(model, train.select(half), validation, collator)
    expected = model.score.weight.clone()
    start_from_linear_probe_(model, train.with_columns(labels=labels), validation, collator)
    torch.testing.assert_close(model.score.weight, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_fewer_than_two_classes_are_refused(task, family):
    model, train, validation, collator = task(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    one = train.select(train.columns["labels"] == 2)
    none = train.with_columns(labels=np.full(len(train), -100))
    for rows in (one, none):
        with pytest.raises(DataError, match="the same label"):
            start_from_linear_probe_(model, rows, validation, collator)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_no_batch_is_larger_than_was_asked_for(tiny_data, tiny_checkpoint, tmp_path, monkeypatch):
    """Of the probe's features, and of the sample that the layers before it are made transparent by."""
    asked, seen = [], []
    batches, moments = predict_module.batches_by_length, linear_probe.pooled_moments
    monkeypatch.setattr(
        predict_module, "batches_by_length", lambda lengths, size: asked.append(size) or batches(lengths, size)
    )

    def pooled_moments(model, sample):
        sample = list(sample)
        seen.extend(len(batch["input_ids"]) for batch in sample)
        return moments(model, sample)

    monkeypatch.setattr(linear_probe, "pooled_moments", pooled_moments)
    words = tiny_words(tiny_data, tiny_checkpoint("bert"), steps=1)
    finished("finetune", tmp_path / "out", *words, "--control_arm", "false", "--per_device_eval_batch_size", "20")
    assert set(asked) == {20}
    assert (max(seen), sum(seen)) == (20, 240)


def test_the_start_survives_saving(task, tmp_path):
    model, train, validation, collator = task("bert")
    start_from_linear_probe_(model, train, validation, collator)
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    np.testing.assert_allclose(predict(again, validation, collator), predict(model, validation, collator), atol=1e-6)


def test_bf16_features(task):
    predicted = []
    for bf16 in (False, True):
        model, train, validation, collator = task("bert")
        start_from_linear_probe_(model, train, validation, collator, bf16=bf16)
        predicted.append(predict(model, validation, collator).argmax(axis=1))
        assert model.classifier.weight.dtype == torch.float32
    assert np.mean(predicted[0] == predicted[1]) > 0.9


def test_probe_learns_separable_rows():
    random = np.random.default_rng(0)
    labels = np.arange(300) % 3
    offsets = np.array([[100.0, 5.0], [103.0, 5.0], [100.0, 5.03]])  # far from zero, and of unlike scales
    rows = (offsets[labels] + random.normal(size=(300, 2)) * [0.3, 0.003]).astype(np.float32)
    found = fit_probe(rows[:200], labels[:200], rows[200:], labels[200:], classes=3, intercept=True)
    weight, bias = found.weight_CH, found.bias_C
    assert weight.shape == (3, 2)
    assert weight.dtype == bias.dtype == np.float32
    logits = rows[200:].astype(np.float64) @ weight.T.astype(np.float64) + bias
    assert found.accuracy == 1.0
    assert np.mean(logits.argmax(axis=1) == labels[200:]) == 1.0
    assert found.penalty in linear_probe.PENALTIES


def test_features_that_never_vary_are_no_trouble():
    rows = np.random.default_rng(0).normal(size=(90, 4)).astype(np.float32)
    rows[:, 2] = 7.0
    labels = (rows[:, 0] > 0).astype(int)
    found = fit_probe(rows[:60], labels[:60], rows[60:], labels[60:], classes=2, intercept=True)
    assert np.isfinite(found.weight_CH).all()
    assert np.isfinite(found.bias_C).all()
    assert found.accuracy > 0.9
