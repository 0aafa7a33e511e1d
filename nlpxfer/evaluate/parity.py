"""How far a rewritten classifier (another format, fewer bits) answers as the one it was made from.

Shapes: N rows, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nlpxfer.errors import NotFiniteError
from nlpxfer.problem import MULTI_LABEL, REGRESSION, SINGLE_LABEL, ProblemType

Array = NDArray[Any]

TOLERANCE: Final = 1e-3
"""Largest difference of a logit that rounding in float32 explains, as a share of the largest logit, or of 1 where that
is smaller: a head that was fitted on a state that hardly varies has large weights. A choice as close is a tie."""


@dataclass(frozen=True, kw_only=True)
class Parity:
    """Differences between two sets of logits for the same rows.

    Attributes:
        rows: N.
        max_difference: Largest absolute difference of a logit.
        mean_difference: Mean absolute difference over all logits.
        changed: Rows with another prediction.
        changed_share: The same as a share of N.
        changed_ties: Those of them whose choice the reference makes by no more than `allowed`.
        largest: Largest absolute logit of the reference.
    """

    rows: int
    max_difference: float
    mean_difference: float
    changed: int
    changed_share: float
    changed_ties: int
    largest: float

    @property
    def allowed(self) -> float:
        """Largest difference that rounding explains."""
        return TOLERANCE * max(1.0, self.largest)

    @property
    def holds(self) -> bool:
        """Whether both are the same but for rounding in float32."""
        return self.max_difference <= self.allowed and self.changed == self.changed_ties

    def joined(self, other: Parity) -> Parity:
        """The differences over the rows of both."""
        rows, changed = self.rows + other.rows, self.changed + other.changed
        total = self.mean_difference * self.rows + other.mean_difference * other.rows
        return Parity(
            rows=rows,
            max_difference=max(self.max_difference, other.max_difference),
            mean_difference=total / rows,
            changed=changed,
            changed_share=changed / rows,
            changed_ties=self.changed_ties + other.changed_ties,
            largest=max(self.largest, other.largest),
        )


def parity(
    reference_NC: ArrayLike,
    logits_NC: ArrayLike,
    problem_type: ProblemType = SINGLE_LABEL,
    cuts_C: ArrayLike = 0.0,
) -> Parity:
    """Compare logits with those of the reference; N of at least 1.

    >>> parity([[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.5], [1.0, 0.0]])
    Parity(rows=2, max_difference=1.0, mean_difference=0.625, changed=1, changed_share=0.5, changed_ties=0,
           largest=1.0)

    Args:
        reference_NC: Logits, shape (N, C).
        logits_NC: The logits to compare, shape (N, C).
        problem_type: Kind of task: what a prediction is. A regression has none that could change.
        cuts_C: Multi-label: the logit above which a label is given.

    Raises:
        NotFiniteError: A logit of either is NaN or infinite.
    """
    expected_NC, found_NC = np.asarray(reference_NC, dtype=np.float64), np.asarray(logits_NC, dtype=np.float64)
    for name, values in (("the reference", expected_NC), ("the rewritten model", found_NC)):
        if not np.isfinite(values).all():
            raise NotFiniteError(f"{name} gives logits that are NaN or infinite.")
    differences_NC = np.abs(expected_NC - found_NC)
    distance_N = _distances(expected_NC, found_NC, problem_type, np.asarray(cuts_C, dtype=np.float64))
    changed_N = distance_N >= 0
    largest = float(np.abs(expected_NC).max())
    return Parity(
        rows=len(expected_NC),
        max_difference=float(differences_NC.max()),
        mean_difference=float(differences_NC.mean()),
        changed=int(changed_N.sum()),
        changed_share=float(changed_N.mean()),
        changed_ties=int((changed_N & (distance_N <= TOLERANCE * max(1.0, largest))).sum()),
        largest=largest,
    )


def _distances(expected_NC: Array, found_NC: Array, problem_type: ProblemType, cuts_C: Array) -> Array:
    """How far the reference is from giving the other prediction, per row; -1 where the predictions are the same."""
    if problem_type == REGRESSION:
        return np.full(len(expected_NC), -1.0)
    if problem_type == MULTI_LABEL:
        changed_NC = (expected_NC > cuts_C) != (found_NC > cuts_C)
        return np.asarray(np.where(changed_NC, np.abs(expected_NC - cuts_C), -1.0).max(axis=1))
    rows_N, expected_N, found_N = np.arange(len(expected_NC)), expected_NC.argmax(axis=1), found_NC.argmax(axis=1)
    gap_N = expected_NC[rows_N, expected_N] - expected_NC[rows_N, found_N]
    return np.where(expected_N != found_N, gap_N, -1.0)
