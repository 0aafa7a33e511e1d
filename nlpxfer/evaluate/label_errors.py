"""Which training labels are probably wrong, from probabilities by models that have not seen the rows.

Confident learning: a row counts as class j if the probability of j reaches what rows labelled j get on average. Rows
that count as another class than their label are the off-diagonal of the confident joint, and the errors. Each class
has a threshold of its own, so a class of which models are never sure accuses no one and is not accused as a whole.

Two rules beside the paper's: a row is no error unless the suggested class is more probable than the given one (the
published code drops rows whose given label is the most probable); and probabilities may miss a threshold by 1e-6, as
there, so that rounding does not decide about a class whose rows are all alike.

Shapes: N rows, C classes, E errors.

Source: Northcutt, Jiang and Chuang 2021, arXiv:1911.00068 (thresholds and confident joint: section 3.1; off-diagonal
and normalised margin: section 3.2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nlpxfer.errors import DataError

SLACK: Final = 1e-6


@dataclass(frozen=True, eq=False)
class LabelErrors:
    """Likely label errors, the most likely first.

    Attributes:
        rows_E: Index of each.
        suggested_E: The class it seems to be.
        thresholds_C: Probability from which a row counts as a class; infinite for a class without rows.
        joint_CC: The confident joint: rows labelled i that count as class j.
        share: Estimated share of wrong labels, from the joint scaled to the rows of each label.
    """

    rows_E: NDArray[np.int64]
    suggested_E: NDArray[np.int64]
    thresholds_C: NDArray[np.float64]
    joint_CC: NDArray[np.int64]
    share: float

    def __len__(self) -> int:
        """How many there are."""
        return len(self.rows_E)


def find_label_errors(
    shares_NC: ArrayLike, labels_N: ArrayLike, *, left_out_N: NDArray[np.bool_] | None = None
) -> LabelErrors:
    """Rows in the off-diagonal of the confident joint, by normalised margin: p(given) - max p(other), lowest first.

    Args:
        shares_NC: Out-of-sample probabilities; each row sums to 1.
        labels_N: Given class indices.
        left_out_N: Rows that are neither counted nor accused, because their class was not learnt.

    Raises:
        DataError: No rows, or shapes that do not fit.
    """
    shares, labels = np.asarray(shares_NC, dtype=np.float64), np.asarray(labels_N)
    if shares.ndim != 2 or labels.shape != shares.shape[:1] or not shares.size:
        raise DataError(f"Probabilities of shape {shares.shape} and labels of shape {labels.shape} do not fit")
    rows, classes = np.arange(len(labels)), shares.shape[1]
    counted_N = np.ones(len(labels), dtype=bool) if left_out_N is None else ~left_out_N
    given_N = shares[rows, labels]
    thresholds_C = confidence_thresholds(given_N[counted_N], labels[counted_N], classes)
    confident_NC = shares >= thresholds_C - SLACK
    seems_N = np.where(confident_NC, shares, -1.0).argmax(axis=1)
    sure_N = confident_NC.any(axis=1) & counted_N
    joint_CC = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(joint_CC, (labels[sure_N], seems_N[sure_N]), 1)
    errors = np.flatnonzero(sure_N & (shares[rows, seems_N] > given_N))
    others = shares.copy()
    others[rows, labels] = -1.0
    margin_E = given_N[errors] - others[errors].max(axis=1)
    ranked = errors[np.argsort(margin_E, kind="stable")]
    share = estimated_share(joint_CC, np.bincount(labels[counted_N], minlength=classes))
    return LabelErrors(ranked, seems_N[ranked], thresholds_C, joint_CC, share)


@dataclass(frozen=True, eq=False)
class LabelSetErrors:
    """Likely errors among the labels of rows that may have several, the most likely first.

    Attributes:
        rows_E: Row of each.
        labels_E: The label that it has and seems not to have, or the other way round.
        share: Estimated share of wrong decisions among all, one for each row and label.
    """

    rows_E: NDArray[np.int64]
    labels_E: NDArray[np.int64]
    share: float

    def __len__(self) -> int:
        """How many there are."""
        return len(self.rows_E)


def find_label_set_errors(
    shares_NC: ArrayLike, gold_NC: ArrayLike, *, left_out_N: NDArray[np.bool_] | None = None
) -> LabelSetErrors:
    """`find_label_errors` for each label by itself, as two classes: given or not; all ranked together.

    Args:
        shares_NC: Out-of-sample probability of each label.
        gold_NC: Given labels as zeros and ones.
        left_out_N: See `find_label_errors`.

    Raises:
        DataError: No rows, or shapes that do not fit.

    Source: Thyagarajan, Snorrason, Mueller and Northcutt 2022, arXiv:2211.13895 (section 3: one against the rest).
    """
    shares, gold = np.asarray(shares_NC, dtype=np.float64), np.asarray(gold_NC)
    if shares.ndim != 2 or gold.shape != shares.shape or not shares.size:
        raise DataError(f"Probabilities of shape {shares.shape} and labels of shape {gold.shape} do not fit")
    each = [
        find_label_errors(np.stack([1 - share_N, share_N], axis=1), (given_N > 0.5).astype(int), left_out_N=left_out_N)
        for share_N, given_N in zip(shares.T, gold.T, strict=True)
    ]
    rows_E = np.concatenate([found.rows_E for found in each])
    labels_E = np.repeat(np.arange(len(each)), [len(found) for found in each])
    given_E = np.where(gold > 0.5, shares, 1 - shares)[rows_E, labels_E]
    order = np.argsort(given_E, kind="stable")
    return LabelSetErrors(rows_E[order], labels_E[order], float(np.mean([found.share for found in each])))


def confidence_thresholds(given_N: NDArray[np.float64], labels_N: ArrayLike, classes: int) -> NDArray[np.float64]:
    """Mean self-confidence of each class, t_j = mean of p(j) over the rows labelled j; infinite without rows.

    >>> confidence_thresholds(np.array([0.5, 0.7, 0.9]), [0, 0, 2], 3).tolist()
    [0.6, inf, 0.9]
    """
    counts_C = np.bincount(np.asarray(labels_N), minlength=classes)
    sums_C = np.bincount(np.asarray(labels_N), weights=given_N, minlength=classes)
    return np.asarray(np.divide(sums_C, counts_C, out=np.full(classes, np.inf), where=counts_C > 0))


def estimated_share(joint_CC: NDArray[np.int64], rows_C: NDArray[np.int64]) -> float:
    """Share of wrong labels: each row of the joint scaled to the rows of its label, then what is off the diagonal.

    >>> estimated_share(np.array([[6, 2], [0, 4]]), np.array([12, 4]))
    0.1875
    """
    totals_C = joint_CC.sum(axis=1)
    off_C = totals_C - np.diag(joint_CC)
    wrong_C = np.divide(off_C, totals_C, out=np.zeros(len(totals_C)), where=totals_C > 0)
    return float((wrong_C * rows_C).sum() / rows_C.sum()) if rows_C.sum() else 0.0
