"""Accuracy, macro-F1 and cross-entropy of a classifier, from all of its logits at once.

Shapes: B rows, C classes.

The metrics subclass `evaluate.Metric`, so `compute`, `add`, `add_batch` and `evaluate.combine` work as anywhere else,
but nothing is fetched from the Hub and nothing stays on the disk: the rows are kept in memory, and the cache folder
which the base class insists on is a temporary one that is gone when the constructor returns. Gather the rows of all
processes first, then compute: an F1 of parts does not average to the F1 of the whole.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any, TypedDict

import evaluate
import numpy as np
from datasets import Features, Value
from numpy.typing import ArrayLike, NDArray

from nlpxfer.errors import DataError, LabelError, NotFiniteError

_CITATION = "Pedregosa et al. Scikit-learn: Machine Learning in Python. JMLR 12, 2825-2830, 2011."


class ClassScores(TypedDict):
    """One row of the per-class table; shares from 0 to 1, `rows` is the support."""

    label: str
    precision: float
    recall: float
    f1: float
    rows: int


class _LabelMetric(evaluate.Metric):  # type: ignore[misc]  # evaluate is untyped
    """A metric of predicted and true class indices that leaves nothing on the disk."""

    _description = ""

    def __init__(self, config_name: str | None = None, *, experiment_id: str | None = None) -> None:
        with tempfile.TemporaryDirectory(prefix="nlpxfer-metric-") as folder:
            super().__init__(config_name, keep_in_memory=True, cache_dir=folder, experiment_id=experiment_id)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self._description,
            citation=_CITATION,
            inputs_description="\nArgs:\n    predictions: predicted class indices.\n    references: true ones.\n",
            features=Features({"predictions": Value("int64"), "references": Value("int64")}),
            format="numpy",
        )


class Accuracy(_LabelMetric):
    """Share of rows whose predicted class is the true one; result key `accuracy`."""

    _description = "Share of rows whose predicted class is the true one."

    def _compute(self, predictions: NDArray[np.int64], references: NDArray[np.int64]) -> dict[str, float]:
        from sklearn.metrics import accuracy_score

        return {"accuracy": float(accuracy_score(references, predictions))}


class MacroF1(_LabelMetric):
    """Unweighted mean of the F1 of each class that occurs in the labels or predictions; result key `macro_f1`.

    A class of the schema that is neither in the labels nor predicted has no F1 and does not count; a class with rows
    but no hit counts as 0.
    """

    _description = "Unweighted mean of the F1 of each class that occurs in the labels or predictions."

    def _compute(self, predictions: NDArray[np.int64], references: NDArray[np.int64]) -> dict[str, float]:
        from sklearn.metrics import f1_score

        return {"macro_f1": float(f1_score(references, predictions, average="macro", zero_division=0))}


class PerClass(_LabelMetric):
    """Precision, recall, F1 and rows of each class 0..C-1; result key `per_class`, a list of dicts in class order.

    Args:
        classes: C, the number of classes of the schema; each gets an entry, with zeros where it does not occur.
        experiment_id: As for `evaluate.Metric`.
    """

    _description = "Precision, recall, F1 and number of rows of each class."

    def __init__(self, classes: int, *, experiment_id: str | None = None) -> None:
        """See the class."""
        self.classes = classes
        super().__init__(experiment_id=experiment_id)

    def _compute(
        self, predictions: NDArray[np.int64], references: NDArray[np.int64]
    ) -> dict[str, list[dict[str, float | int]]]:
        from sklearn.metrics import precision_recall_fscore_support

        columns = precision_recall_fscore_support(
            references, predictions, labels=list(range(self.classes)), zero_division=0
        )
        rows = [
            {"precision": float(precision), "recall": float(recall), "f1": float(f1), "rows": int(support)}
            for precision, recall, f1, support in zip(*columns, strict=True)
        ]
        return {"per_class": rows}


def classification_metrics(logits_BC: ArrayLike, labels_B: ArrayLike) -> dict[str, float]:
    """Accuracy, macro-F1 and mean cross-entropy of one split.

    Args:
        logits_BC: Unnormalised class scores in schema order (log-probabilities will do), shape (rows, classes).
        labels_B: True class indices, shape (rows,).

    Returns:
        `accuracy` and `macro_f1` (shares from 0 to 1; see `MacroF1` for the classes that count; the first of equal
        logits is predicted) and `loss` (mean cross-entropy in nats, in float64).

    Raises:
        DataError: No rows, or shapes that do not fit.
        LabelError: A label outside 0..C-1.
        NotFiniteError: A logit is NaN or infinite.
    """
    logits_BC, labels_B = _checked(logits_BC, labels_B)
    both = evaluate.combine([Accuracy(), MacroF1()])
    metrics: dict[str, Any] = both.compute(predictions=logits_BC.argmax(axis=1), references=labels_B)
    return {**metrics, "loss": cross_entropy(logits_BC, labels_B)}


def cross_entropy(logits_BC: ArrayLike, labels_B: ArrayLike) -> float:
    """Mean cross-entropy in nats, computed in float64.

    Args:
        logits_BC: Unnormalised class scores, shape (rows, classes).
        labels_B: True class indices, shape (rows,).

    Raises:
        DataError: No rows, or shapes that do not fit.
        LabelError: A label outside 0..C-1.
        NotFiniteError: A logit is NaN or infinite.
    """
    logits_BC, labels_B = _checked(logits_BC, labels_B)
    shifted_BC = logits_BC - logits_BC.max(axis=1, keepdims=True)
    log_total_B = np.log(np.exp(shifted_BC).sum(axis=1))
    return float((log_total_B - shifted_BC[np.arange(len(labels_B)), labels_B]).mean())


def per_class_table(logits_BC: ArrayLike, labels_B: ArrayLike, names: Sequence[str]) -> list[ClassScores]:
    """Precision, recall, F1 and number of rows of each class, in schema order.

    Args:
        logits_BC: Unnormalised class scores in schema order, shape (rows, classes).
        labels_B: True class indices, shape (rows,).
        names: The C label names in schema order.

    Raises:
        DataError: No rows, or shapes that do not fit.
        LabelError: A label outside 0..C-1, or another number of names than of classes.
        NotFiniteError: A logit is NaN or infinite.
    """
    logits_BC, labels_B = _checked(logits_BC, labels_B)
    classes = logits_BC.shape[1]
    if len(names) != classes:
        raise LabelError(
            f"{len(names)} label names for logits of {classes} classes",
            why="the logits come from a model with another label schema",
            available=names,
        )
    result = PerClass(classes).compute(predictions=logits_BC.argmax(axis=1), references=labels_B)
    return [
        ClassScores(label=name, precision=each["precision"], recall=each["recall"], f1=each["f1"], rows=each["rows"])
        for name, each in zip(names, result["per_class"], strict=True)
    ]


def per_label_table(predicted_NC: ArrayLike, gold_NC: ArrayLike, names: Sequence[str]) -> list[ClassScores]:
    """Precision, recall, F1 and number of rows of each label of a multi-label task, in schema order.

    Args:
        predicted_NC: Which labels each row was given, bool, shape (rows, labels).
        gold_NC: Which labels it has.
        names: The label names in schema order.

    >>> per_label_table([[True], [True]], [[True], [False]], ["cat"])
    [{'label': 'cat', 'precision': 0.5, 'recall': 1.0, 'f1': 0.6666666666666666, 'rows': 1}]
    """
    predicted, gold = np.asarray(predicted_NC, dtype=bool), np.asarray(gold_NC, dtype=bool)
    hits_C, given_C, having_C = (each.sum(axis=0) for each in (predicted & gold, predicted, gold))
    columns = zip(names, hits_C.tolist(), given_C.tolist(), having_C.tolist(), strict=True)
    return [
        ClassScores(
            label=name,
            precision=hits / given if given else 0.0,
            recall=hits / having if having else 0.0,
            f1=2 * hits / (given + having) if given + having else 0.0,
            rows=having,
        )
        for name, hits, given, having in columns
    ]


def _checked(logits_BC: ArrayLike, labels_B: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Both as arrays of float64 and int64, or the error that says what is wrong with them."""
    logits, labels = np.asarray(logits_BC, dtype=np.float64), np.asarray(labels_B)
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or logits.size == 0:
        raise DataError(
            f"Logits of shape {logits.shape} and labels of shape {labels.shape} cannot be scored",
            why="logits must have shape (rows, classes) and labels (rows,), with at least one row",
        )
    if not np.issubdtype(labels.dtype, np.integer):
        raise LabelError(f"Labels must be class indices (integers), not {labels.dtype}")
    outside = np.flatnonzero((labels < 0) | (labels >= logits.shape[1]))
    if outside.size:
        raise LabelError(
            f"Row {outside[0]} has label {labels[outside[0]]}, but the logits have classes 0 to {logits.shape[1] - 1}",
            why="the labels come from another schema than the model's",
        )
    require_finite(logits)
    return logits, labels.astype(np.int64)


def require_finite(logits_NC: NDArray[Any]) -> None:
    """Raise NotFiniteError, naming the first row, if a logit is NaN or infinite."""
    bad = np.flatnonzero(~np.isfinite(logits_NC).all(axis=1))
    if bad.size:
        raise NotFiniteError(
            f"{bad.size} of {len(logits_NC)} rows have logits that are NaN or infinite, the first is row {bad[0]}",
            why="training diverged, or half precision overflowed",
            fix="a lower learning_rate, or bf16 instead of fp16",
        )
