"""Accuracy, macro-F1 and loss against hand-computed numbers; the metrics work offline and leave nothing behind."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from sklearn.metrics import precision_recall_fscore_support

from nlpxfer.errors import DataError, LabelError, NotFiniteError
from nlpxfer.evaluate import Accuracy, MacroF1, PerClass, classification_metrics, cross_entropy, per_class_table
from nlpxfer.evaluate.metrics import per_label_table

# Four rows, four classes; class 3 occurs nowhere. Predictions 0, 1, 1, 0 for the labels 0, 1, 2, 0.
LOGITS = np.log(
    [[0.7, 0.1, 0.1, 0.1], [0.2, 0.5, 0.2, 0.1], [0.1, 0.6, 0.25, 0.05], [0.4, 0.3, 0.2, 0.1]], dtype=np.float64
)
LABELS = np.array([0, 1, 2, 0])


def test_hand_computed_numbers():
    metrics = classification_metrics(LOGITS, LABELS)
    # F1: class 0 two hits of two and two = 1; class 1 one hit, 2*1/(1+2) = 2/3; class 2 none = 0; class 3 left out.
    assert metrics["accuracy"] == 0.75
    assert metrics["macro_f1"] == pytest.approx((1 + 2 / 3 + 0) / 3, abs=1e-15)
    assert metrics["loss"] == pytest.approx(-math.log(0.7 * 0.5 * 0.25 * 0.4) / 4, abs=1e-15)
    assert list(metrics) == ["accuracy", "macro_f1", "loss"]
    assert all(type(value) is float for value in metrics.values())


def test_a_predicted_class_without_rows_counts_as_zero_in_macro_f1():
    logits = np.eye(3)[[0, 2]]
    # Label 0 twice, predicted 0 and 2: F1 of class 0 = 2*1/(2+1), of class 2 = 0, class 1 left out.
    assert classification_metrics(logits, [0, 0])["macro_f1"] == pytest.approx((2 / 3 + 0) / 2)


def test_loss_equals_torch_in_float64_and_survives_large_logits():
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(50, 7)) * 100
    labels = generator.integers(0, 7, size=50)
    expected = torch.nn.functional.cross_entropy(torch.tensor(logits), torch.tensor(labels)).item()
    assert cross_entropy(logits, labels) == pytest.approx(expected, rel=1e-12)
    assert cross_entropy([[1e6, 0.0]], [1]) == 1e6
    assert classification_metrics(logits + 1e4, labels)["loss"] == pytest.approx(expected, rel=1e-9)


def test_order_of_rows_does_not_matter():
    order = np.array([2, 0, 3, 1])
    assert classification_metrics(LOGITS[order], LABELS[order]) == pytest.approx(
        classification_metrics(LOGITS, LABELS), abs=1e-15
    )


def test_per_class_table():
    table = per_class_table(LOGITS, LABELS, ["a", "b", "c", "d"])
    assert table == [
        {"label": "a", "precision": 1.0, "recall": 1.0, "f1": 1.0, "rows": 2},
        {"label": "b", "precision": 0.5, "recall": 1.0, "f1": pytest.approx(2 / 3), "rows": 1},
        {"label": "c", "precision": 0.0, "recall": 0.0, "f1": 0.0, "rows": 1},
        {"label": "d", "precision": 0.0, "recall": 0.0, "f1": 0.0, "rows": 0},
    ]
    with pytest.raises(LabelError, match="2 label names for logits of 4 classes"):
        per_class_table(LOGITS, LABELS, ["a", "b"])


def test_scores_of_labels_against_scikit_learn():
    random = np.random.default_rng(0)
    given, gold = random.random((2, 40, 6)) < np.array([0.5, 0.3, 0.1, 0.9, 0.0, 0.5])
    expected = precision_recall_fscore_support(gold, given, average=None, zero_division=0)
    found = per_label_table(given, gold, "abcdef")
    assert [[row[key] for row in found] for key in ("precision", "recall", "f1", "rows")] == [
        column.tolist() for column in expected
    ]
    one = per_label_table(given[:, :1], gold[:, :1], "a")
    assert one == found[:1], "one label alone is no choice between two classes"
    assert one == per_class_table(np.eye(2)[given[:, 0] * 1], gold[:, 0] * 1, ["not", "a"])[1:]


def test_add_and_add_batch_and_compute_agree():
    predictions = LOGITS.argmax(axis=1)
    whole = Accuracy().compute(predictions=predictions, references=LABELS)
    metric = Accuracy()
    metric.add(prediction=int(predictions[0]), reference=int(LABELS[0]))
    metric.add_batch(predictions=predictions[1:], references=LABELS[1:])
    assert metric.compute() == whole == {"accuracy": 0.75}
    # A second use of the same object starts afresh.
    assert metric.compute(predictions=[1], references=[1]) == {"accuracy": 1.0}


def test_combine():
    both = evaluate.combine([Accuracy(), MacroF1(), PerClass(4)])
    for prediction, label in zip(LOGITS.argmax(axis=1), LABELS, strict=True):
        both.add(prediction=int(prediction), reference=int(label))
    result = both.compute()
    assert result["accuracy"] == 0.75
    assert result["macro_f1"] == pytest.approx(5 / 9)
    assert [row["rows"] for row in result["per_class"]] == [2, 1, 1, 0]


def test_leaves_nothing_in_the_home_folder(tmp_path: Path):
    home, temporary = tmp_path / "home", tmp_path / "temporary"
    home.mkdir()
    temporary.mkdir()
    code = (
        "from nlpxfer.evaluate import classification_metrics\n"
        "assert classification_metrics([[1.0, 0.0]], [0])['accuracy'] == 1\n"
    )
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "XDG_"))}
    environment = {
        **kept,
        "HOME": str(home),
        "USERPROFILE": str(home),
        "TMPDIR": str(temporary),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    subprocess.run([sys.executable, "-W", "error", "-c", code], env=environment, check=True, cwd=tmp_path)
    assert list(home.rglob("*")) == []
    assert list(temporary.rglob("*")) == []


def test_is_fast_enough_for_every_evaluation():
    generator = np.random.default_rng(0)
    logits, labels = generator.normal(size=(3000, 77)), generator.integers(0, 77, size=3000)
    classification_metrics(logits, labels)
    seconds = []
    for _ in range(5):
        start = time.process_time()
        classification_metrics(logits, labels)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.2  # 0.04 when the machine is quiet


@pytest.mark.parametrize(
    ("logits", "labels", "error", "message"),
    [
        ([[0.0, 1.0]], [2], LabelError, "Row 0 has label 2, but the logits have classes 0 to 1"),
        ([[0.0, 1.0]], [-100], LabelError, "Row 0 has label -100"),
        ([[0.0, 1.0]], [0.5], LabelError, "must be class indices"),
        ([[0.0, math.nan]], [0], NotFiniteError, "1 of 1 rows have logits that are NaN or infinite"),
        ([[0.0, 1.0]], [0, 1], DataError, r"shape \(1, 2\) and labels of shape \(2,\)"),
        (np.zeros((0, 2)), np.zeros(0, dtype=int), DataError, "at least one row"),
        ([0.0, 1.0], [0, 1], DataError, "cannot be scored"),
    ],
)
def test_bad_input_is_refused(logits, labels, error, message):
    with pytest.raises(error, match=message):
        classification_metrics(logits, labels)
