"""The arms without a pretrained model."""

from __future__ import annotations

import csv
import math

import numpy as np
import pytest
from tiny import LABELS

from nlpxfer.errors import DataError, LabelError
from nlpxfer.evaluate import classification_metrics, majority, tfidf_arm


def _read(path):
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [row["text"] for row in rows], [LABELS.index(row["label"]) for row in rows]


def test_majority_answers_with_the_training_shares():
    logits = majority([0, 0, 0, 1], classes=3, rows=2)
    # One row is added to each class: 4, 2, 1 of 7.
    assert np.exp(logits) == pytest.approx(np.array([[4 / 7, 2 / 7, 1 / 7]] * 2))
    metrics = classification_metrics(logits, [0, 2])
    assert metrics["accuracy"] == 0.5
    assert metrics["loss"] == pytest.approx(-(math.log(4 / 7) + math.log(1 / 7)) / 2)


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [([], DataError, "need one per row"), ([0, 3], LabelError, "0 to 2"), ([0.0, 1.0], LabelError, "float64")],
)
def test_majority_refuses_bad_labels(labels, error, message):
    with pytest.raises(error, match=message):
        majority(labels, classes=3, rows=1)


def test_tfidf_learns_and_repeats(tiny_data):
    train, labels = _read(tiny_data.train)
    validation, validation_labels = _read(tiny_data.validation)
    test, test_labels = _read(tiny_data.test)

    def run():
        texts = {"validation": validation, "test": test}
        return tfidf_arm(train, labels, texts, validation_labels=validation_labels, classes=4)

    arm = run()
    metrics = classification_metrics(arm.logits["test"], test_labels)
    assert metrics["accuracy"] > 0.8
    assert metrics["loss"] < math.log(4) / 2
    assert np.exp(arm.logits["test"]).sum(axis=1) == pytest.approx(1.0)
    assert set(arm.validation_scores) == {1.0, 10.0, 100.0}
    assert arm.validation_scores[arm.strength] == max(arm.validation_scores.values())
    reached = classification_metrics(arm.logits["validation"], validation_labels)["accuracy"]
    assert reached == arm.validation_scores[arm.strength]
    assert arm.parameters % 4 == 0
    assert arm.converged
    assert np.array_equal(run().logits["test"], arm.logits["test"])


def test_columns_follow_the_schema_where_training_lacks_a_class():
    texts = ["red apple", "blue sea"] * 4
    arm = tfidf_arm(texts, [0, 2] * 4, {"validation": texts, "new": ["?!"]}, validation_labels=[0, 2] * 4, classes=3)
    assert arm.logits["validation"].argmax(axis=1).tolist() == [0, 2] * 4
    assert arm.strength == 100.0  # all strengths are right on every row: the loss decides
    assert np.exp(arm.logits["new"][:, 1]) == pytest.approx([1e-12], rel=1e-6)


def test_texts_of_signs_alone_are_words_too():
    arm = tfidf_arm(["?", "!"] * 3, [0, 1] * 3, {"validation": ["!", "?"]}, validation_labels=[1, 0], classes=2)
    assert arm.logits["validation"].argmax(axis=1).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("texts", "labels", "splits", "message"),
    [
        (["a"], [0, 1], {"validation": ["a"]}, "1 training texts, but 2 labels"),
        (["a", "b"], [1, 1], {"validation": ["a"]}, "at least two classes"),
        (["", " "], [0, 1], {"validation": ["a"]}, "All training texts are empty"),
        (["a", "b"], [0, 1], {"test": ["a"]}, "needs the split `validation`"),
    ],
)
def test_tfidf_refuses(texts, labels, splits, message):
    with pytest.raises(DataError, match=message):
        tfidf_arm(texts, labels, splits, validation_labels=[0], classes=2)
