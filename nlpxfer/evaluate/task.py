"""What differs between kinds of task when a model is scored: the metrics, the answers, and how good each row's is.

The names of the metrics stand in `nlpxfer.problem`. In a multi-label task a label counts as predicted where its logit
is above 0; accuracy is the share of rows with all labels right, sample_f1 the mean F1 of the rows. Where numbers are
whole, an ordinal scale, a regression also has `accuracy` and `quadratic_kappa` of the rounded answers.

Shapes: N rows, C classes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nlpxfer.errors import DataError
from nlpxfer.evaluate.metrics import classification_metrics, require_finite
from nlpxfer.problem import MULTI_LABEL, REGRESSION, SINGLE_LABEL, ProblemType

Array = NDArray[Any]


def task_metrics(problem_type: ProblemType, logits_NC: ArrayLike, labels: ArrayLike) -> dict[str, float]:
    """The scores of one split.

    Args:
        problem_type: What the labels are.
        logits_NC: Shape (N, C); a regression's (N, 1).
        labels: Class indices (N), zeros and ones (N, C), or numbers (N).

    Returns:
        At least `METRICS[problem_type]`; the loss is in nats, for a regression half the squared error.

    Raises:
        DataError: No rows, or shapes that do not fit.
        LabelError: A class index out of range.
        NotFiniteError: A logit is NaN or infinite.
    """
    if problem_type == SINGLE_LABEL:
        return classification_metrics(logits_NC, labels)
    logits, gold = _checked(logits_NC, labels, several=problem_type == MULTI_LABEL)
    return _label_set_metrics(logits, gold) if problem_type == MULTI_LABEL else _number_metrics(logits[:, 0], gold)


def answers(problem_type: ProblemType, logits_NC: ArrayLike) -> Array:
    """The class (N), the labels as zeros and ones (N, C), or the number (N) that logits stand for."""
    logits = np.asarray(logits_NC)
    if problem_type == SINGLE_LABEL:
        return np.asarray(logits.argmax(axis=1))
    return logits > 0 if problem_type == MULTI_LABEL else logits[:, 0]


def row_scores(problem_type: ProblemType, logits_NC: ArrayLike, labels: ArrayLike) -> Array:
    """How good each row's answer is, shape N: right or wrong, its F1, or minus its absolute error.

    The mean is the metric `GAIN[problem_type]` (of an error: minus that).
    """
    found, gold = answers(problem_type, logits_NC), np.asarray(labels)
    if problem_type == SINGLE_LABEL:
        return np.asarray(found == gold)
    if problem_type == REGRESSION:
        return np.asarray(-np.abs(found.astype(np.float64) - gold))
    return label_set_f1(found, gold > 0.5)


def label_set_f1(predicted_NC: ArrayLike, gold_NC: ArrayLike) -> Array:
    """F1 of each row's predicted labels, shape N; 1 where none is predicted and none is true.

    >>> label_set_f1([[True, True, False], [False, False, False]], [[True, False, False], [False, False, False]])
    array([0.66666667, 1.        ])
    """
    predicted, gold = np.asarray(predicted_NC, dtype=bool), np.asarray(gold_NC, dtype=bool)
    total_N = predicted.sum(axis=1) + gold.sum(axis=1)
    hits_N = 2.0 * (predicted & gold).sum(axis=1)
    return np.asarray(np.divide(hits_N, total_N, out=np.ones(len(gold)), where=total_N > 0))


def label_f1s(predicted_NC: ArrayLike, gold_NC: ArrayLike) -> tuple[float, float]:
    """Micro-F1 over all labels, and macro-F1 over the labels that are true or predicted somewhere; 0 if none is.

    >>> label_f1s([[1, 0], [1, 0]], [[1, 0], [0, 1]])
    (0.5, 0.3333333333333333)
    """
    predicted, gold = np.asarray(predicted_NC, dtype=bool), np.asarray(gold_NC, dtype=bool)
    hits_C = (predicted & gold).sum(axis=0)
    total_C = predicted.sum(axis=0) + gold.sum(axis=0)
    if not total_C.any():
        return 0.0, 0.0
    seen_C = total_C > 0
    return float(2 * hits_C.sum() / total_C.sum()), float((2 * hits_C[seen_C] / total_C[seen_C]).mean())


def _label_set_metrics(logits_NC: Array, gold_NC: Array) -> dict[str, float]:
    predicted, gold = logits_NC > 0, gold_NC > 0.5
    micro, macro = label_f1s(predicted, gold)
    return {
        "accuracy": float((predicted == gold).all(axis=1).mean()),
        "micro_f1": micro,
        "macro_f1": macro,
        "sample_f1": float(label_set_f1(predicted, gold).mean()),
        "loss": binary_cross_entropy(logits_NC, gold),
    }


def binary_cross_entropy(logits_NC: ArrayLike, gold_NC: ArrayLike) -> float:
    """Mean over rows and labels, in nats, computed in float64.

    >>> round(binary_cross_entropy([[0.0, 0.0]], [[1, 0]]), 4)
    0.6931
    """
    logits, gold = np.asarray(logits_NC, dtype=np.float64), np.asarray(gold_NC, dtype=np.float64)
    return float((np.logaddexp(0, logits) - gold * logits).mean())


def _number_metrics(found_N: Array, gold_N: Array) -> dict[str, float]:
    from scipy.stats import pearsonr, spearmanr

    error_N = found_N - gold_N
    varied = len(found_N) > 1 and np.ptp(found_N) > 0 and np.ptp(gold_N) > 0
    metrics = {
        "mean_absolute_error": float(np.abs(error_N).mean()),
        "mean_squared_error": float((error_N**2).mean()),
        "pearson": float(pearsonr(found_N, gold_N).statistic) if varied else 0.0,
        "spearman": float(spearmanr(found_N, gold_N).statistic) if varied else 0.0,
        "loss": float((error_N**2).mean() / 2),
    }
    if (gold_N == np.rint(gold_N)).all():
        rounded_N = np.rint(found_N)
        metrics["accuracy"] = float((rounded_N == gold_N).mean())
        if np.ptp(gold_N) > 0:
            metrics["quadratic_kappa"] = quadratic_kappa(rounded_N, gold_N)
    return metrics


def quadratic_kappa(found_N: Array, gold_N: Array) -> float:
    """Cohen's kappa weighted by squared distances: 1 minus their mean over that of answers dealt out at random.

    Source: Cohen 1968, Weighted kappa, Psychological Bulletin 70(4).

    >>> quadratic_kappa(np.array([1.0, 2.0]), np.array([2.0, 1.0]))
    -1.0
    """
    by_chance = found_N.var() + gold_N.var() + (found_N.mean() - gold_N.mean()) ** 2
    return float(1 - ((found_N - gold_N) ** 2).mean() / by_chance)


def _checked(logits_NC: ArrayLike, labels: ArrayLike, *, several: bool) -> tuple[Array, Array]:
    logits, gold = np.asarray(logits_NC, dtype=np.float64), np.asarray(labels, dtype=np.float64)
    wanted = logits.shape if several else logits.shape[:1]
    if logits.ndim != 2 or not len(logits) or gold.shape != wanted or not (several or logits.shape[1] == 1):
        raise DataError(
            f"Logits of shape {logits.shape} and labels of shape {gold.shape} cannot be scored",
            why="multi-label needs (rows, labels) of both, a regression (rows, 1) and (rows,), with at least one row",
        )
    require_finite(logits)
    return logits, gold
