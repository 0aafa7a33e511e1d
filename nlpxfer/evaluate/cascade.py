"""Two models in a row: the small one answers where it is sure, the large one all else; where to draw the line.

The line is a calibrated probability of the small model, fitted on labelled rows that neither learnt from. Two rules:
the smallest share of rows sent on whose score is within a tolerance of the large model's (the default: the cheapest
that is as good), or the highest score (two models together can beat both). Each threshold between two rows is
looked at, so on few rows the best one is partly luck: `nlpxfer cascade evaluate` on other rows says what it is worth.

Maximum probability over entropy or a learnt router, because it needs no further model, is what `predict` shows, and
with a fitted temperature is as good a signal as these where the classes are few hundred at most.

Shapes: N rows, C classes.

Sources: Viola and Jones 2001 (cascades); Wang et al. 2018, IDK Cascades, arXiv:1706.00885 (a threshold on the
confidence of the fast model, chosen on validation rows); Guo et al. 2017, arXiv:1706.04599 (temperature).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nlpxfer.errors import DataError


@dataclass(frozen=True, kw_only=True)
class CascadePoint:
    """A threshold and what it does.

    Attributes:
        min_probability: Rows of whose answer the small model is less sure than this are sent on; None: all are.
        sent: Share of the rows sent on.
        score: Of the two together, a mean over rows.
    """

    min_probability: float | None
    sent: float
    score: float


def certainty(shares_NC: ArrayLike, given_NC: ArrayLike | None = None) -> NDArray[np.float64]:
    """How sure a model is of its answers, shape (N,), between 0 and 1.

    Args:
        shares_NC: Calibrated probabilities.
        given_NC: Multi-label: the labels that it gives. None: the most probable class.

    Returns:
        The best class's probability; of sets of labels the geometric mean over labels of the probabilities of giving,
        or not giving, each. The product would be the probability that the whole set is right if labels were
        independent; its root orders rows alike, and does not vanish with many labels.

    >>> certainty([[0.7, 0.3], [0.1, 0.9]])
    array([0.7, 0.9])
    >>> certainty([[0.9, 0.4]], [[True, False]]).round(3)
    array([0.735])
    """
    shares = np.asarray(shares_NC, float)
    if given_NC is None:
        return np.asarray(shares.max(axis=1))
    decided_NC = np.where(given_NC, shares, 1 - shares)
    return np.asarray(np.exp(np.log(np.maximum(decided_NC, np.finfo(float).tiny)).mean(axis=1)))


def cascade_curve(sure_N: ArrayLike, small_N: ArrayLike, large_N: ArrayLike) -> list[CascadePoint]:
    """All thresholds that tell rows apart, from no row sent on to all of them.

    Args:
        sure_N: How sure the small model is of its answer (`certainty`).
        small_N: What its answer scores: right or wrong, or a number.
        large_N: What the large model's scores.

    >>> for point in cascade_curve([0.9, 0.5, 0.7], [True, False, True], [True, True, False]):
    ...     print(point.min_probability, round(point.sent, 2), round(point.score, 2))
    0.0 0.0 0.67
    0.6 0.33 1.0
    0.8 0.67 0.67
    None 1.0 0.67

    Raises:
        DataError: No rows, or different numbers of them.
    """
    sure, small, large = (np.asarray(column, float) for column in (sure_N, small_N, large_N))
    if not len(sure) or not len(sure) == len(small) == len(large):
        raise DataError(f"A cascade cannot be judged on {len(sure)}, {len(small)} and {len(large)} rows.")
    order = np.argsort(sure, kind="stable")
    sorted_N, rows = sure[order], len(sure)
    total_N1 = np.concatenate([[0], np.cumsum(large[order])]) + np.concatenate(
        [np.cumsum(small[order][::-1])[::-1], [0]]
    )
    cuts = [0, *(np.flatnonzero(np.diff(sorted_N) > 0) + 1).tolist(), rows]
    return [
        CascadePoint(min_probability=_threshold(sorted_N, cut), sent=cut / rows, score=float(total_N1[cut] / rows))
        for cut in cuts
    ]


def _threshold(sorted_N: NDArray[np.float64], cut: int) -> float | None:
    """A number above the first `cut` probabilities and not above the next one."""
    if cut in (0, len(sorted_N)):
        return None if cut else 0.0
    below, above = float(sorted_N[cut - 1]), float(sorted_N[cut])
    middle = (below + above) / 2
    return middle if below < middle else above


def choose_point(curve: Sequence[CascadePoint], tolerance: float | None) -> CascadePoint:
    """The threshold by one of two rules; of equally good ones that which sends fewest rows on.

    Args:
        curve: From `cascade_curve`; its last point is the large model alone.
        tolerance: The smallest share of rows sent on with a score of at least the large model's less this; None: the
            highest score.
    """
    least = max(point.score for point in curve) if tolerance is None else curve[-1].score - tolerance
    return next(point for point in curve if point.score >= least - 1e-12)


def thinned(curve: Sequence[CascadePoint], most: int = 101) -> list[CascadePoint]:
    """At most so many points of a curve, evenly spread over the shares of rows sent on, both ends among them."""
    if len(curve) <= most:
        return list(curve)
    sent = np.array([point.sent for point in curve])
    chosen = sorted({int(np.abs(sent - share).argmin()) for share in np.linspace(0, 1, most)})
    return [curve[index] for index in chosen]
