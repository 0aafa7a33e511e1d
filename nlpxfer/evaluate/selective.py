"""Answer only where the model is sure enough: the threshold that keeps a promised precision, and what it costs.

An answer is the label of a row, or of several labels each one that is given to a row. The threshold is the lowest
probability from which answers are right with the precision asked for, by the one-sided Clopper-Pearson bound on the
validation rows and not by their share: on 20 rows a share of 95 % is luck. Clopper-Pearson over Wilson, because it is
exact: near a precision of 1 Wilson's lower bound is too high.

The labels of one row are right or wrong together more often than those of several rows. They count as if they were
always: n labels of rows with m_i each as n^2 / sum m_i^2 answers (Kish 1965, "Survey Sampling", the effective size of
a sample of unequal weights).

The bound holds for each threshold by itself, and the lowest of many that pass is chosen. Where the probability tells
right from wrong, the promise was broken in at most 6 % of 600 simulated models (80 to 1,000 rows, targets 0.90 and
0.95), against the 5 % of one threshold. A bound for all thresholds at once (Geifman and El-Yaniv 2017,
arXiv:1705.08500) brought that below 1 %, but answered 20 % of the rows instead of 51 % (300 validation rows, accuracy
0.83, target 0.90): too dear. With several labels per row, some of them right or wrong together and their own
thresholds fitted on the same rows, it was broken in at most 4 % of 200 models (8 and 32 labels, 400 rows). Where
probabilities say nothing about right and wrong, a model that is 0.1 points short of its target passed in up to 28 % of
the cases (3,000 rows).

Shapes: N answers, R rows, C labels.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nlpxfer.errors import ConfigError

LOGGER = logging.getLogger(__name__)
CONFIDENCE: Final = 0.95


@dataclass(frozen=True, kw_only=True)
class AbstainRule:
    """When a model answers.

    Attributes:
        precision: Share of the answers that are to be right.
        confidence: Of the bound by which the threshold was chosen.
        min_probability: Answers whose calibrated probability is below it are not given; None: no threshold keeps the
            precision, so none is given.
        coverage: Share of the answers on validation rows that are given.
    """

    precision: float
    confidence: float
    min_probability: float | None
    coverage: float

    def abstains(self, sure_N: ArrayLike) -> NDArray[np.bool_]:
        """Which answers of these probabilities are not given."""
        least = math.inf if self.min_probability is None else self.min_probability
        return np.asarray(sure_N) < least

    @classmethod
    def from_plain(cls, found: Mapping[str, Any]) -> AbstainRule:
        """The rule from JSON values; others beside them are left alone.

        Raises:
            ValueError, KeyError, TypeError: It is no rule.
        """
        least = found["min_probability"]
        least = None if least is None else float(least)
        if least is not None and not 0 < least <= 1:
            raise ValueError(f"min_probability is {least}")
        precision, confidence, coverage = (float(found[name]) for name in ("precision", "confidence", "coverage"))
        return cls(precision=precision, confidence=confidence, min_probability=least, coverage=coverage)


def lower_bound(right: ArrayLike, rows: ArrayLike, confidence: float = CONFIDENCE) -> NDArray[np.float64]:
    """The share that `right` of `rows` shows with this confidence: one-sided Clopper-Pearson.

    All right of n: (1 - confidence)^(1/n).

    >>> round(float(lower_bound(59, 59)), 4), float(lower_bound(0, 5))
    (0.9505, 0.0)
    """
    from scipy.special import betaincinv

    right, rows = np.asarray(right, dtype=np.float64), np.asarray(rows, dtype=np.float64)
    found = betaincinv(np.maximum(right, 1.0), rows - np.maximum(right, 1.0) + 1, 1 - confidence)
    return np.asarray(np.where(right > 0, found, 0.0))


def rows_needed(precision: float, confidence: float = CONFIDENCE) -> int:
    """Fewest rows, all of them right, that show a precision.

    >>> rows_needed(0.95), rows_needed(0.99)
    (59, 299)
    """
    return math.ceil(math.log(1 - confidence) / math.log(precision))


def refuse_unprovable(precision: float, rows: int) -> None:
    """Refuse a precision that so few validation rows cannot show.

    Raises:
        ConfigError: Says how many are needed.
    """
    needed = rows_needed(precision)
    if rows < needed:
        raise ConfigError(
            f"abstain_precision: {rows} validation rows cannot show a precision of {precision:g}: "
            f"{needed} are needed even if all of them are right.",
            fix="more validation rows, or a lower --abstain_precision",
        )


class Answers(NamedTuple):
    """What a model would answer if it always did.

    Attributes:
        sure_N: Calibrated probability of each answer.
        right_N: Whether it is that of the gold labels.
        row_N: Number of the row that it is for.
    """

    sure_N: NDArray[np.float64]
    right_N: NDArray[np.bool_]
    row_N: NDArray[np.int64]


def best_answers(shares_RC: NDArray[np.float64], labels_R: NDArray[np.int64]) -> Answers:
    """Of tasks with one label per row: the most probable one."""
    return Answers(shares_RC.max(axis=1), shares_RC.argmax(axis=1) == labels_R, np.arange(len(labels_R)))


def label_answers(shares_RC: NDArray[np.float64], labels_RC: ArrayLike, thresholds_C: ArrayLike) -> Answers:
    """Of tasks with several labels per row: each label whose probability is above its threshold."""
    row_N, label_N = np.nonzero(shares_RC > np.asarray(thresholds_C))
    return Answers(shares_RC[row_N, label_N], np.asarray(labels_RC, dtype=bool)[row_N, label_N], row_N)


def find_rule(answers: Answers, precision: float, *, confidence: float = CONFIDENCE) -> AbstainRule:
    """The rule with the lowest threshold whose answers reach the precision by their lower bound.

    Args:
        answers: On the validation rows.
        precision: Share of the answers that are to be right.
        confidence: Of the bound.
    """
    order = np.argsort(-answers.sure_N, kind="stable")
    sure, right = answers.sure_N[order], answers.right_N[order]
    given = np.arange(1, len(sure) + 1)
    bounds = _lower_bounds(right, answers.row_N[order], confidence)
    last_of_equal = np.append(sure[1:] < sure[:-1], True)[: len(sure)]
    passing = np.flatnonzero((bounds >= precision) & last_of_equal)
    least = float(sure[passing[-1]]) if len(passing) else None
    coverage = float(given[passing[-1]] / len(sure)) if len(passing) else 0.0
    return AbstainRule(precision=precision, confidence=confidence, min_probability=least, coverage=coverage)


def _lower_bounds(right_N: NDArray[np.bool_], row_N: NDArray[np.int64], confidence: float) -> NDArray[np.float64]:
    """The share that the first 1, 2, ... N answers show; a part of an effective answer shows nothing."""
    given = np.arange(1, len(right_N) + 1)
    effective = given**2 / np.cumsum(2 * _earlier_of_its_row(row_N) + 1)
    return lower_bound(np.floor(np.cumsum(right_N) / given * effective + 1e-9), effective, confidence)


def _earlier_of_its_row(row_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many answers before each one are for the same row.

    With m - 1 before it, the m-th answer of a row adds m^2 - (m - 1)^2 = 2 (m - 1) + 1 to the sum of squares.

    >>> _earlier_of_its_row(np.array([7, 3, 7, 7, 3])).tolist()
    [0, 0, 1, 2, 1]
    """
    order = np.argsort(row_N, kind="stable")
    grouped = row_N[order]
    earlier = np.empty(len(row_N), dtype=np.int64)
    earlier[order] = np.arange(len(row_N)) - np.searchsorted(grouped, grouped)
    return earlier


def abstain_checks(answers: Mapping[str, Answers], precision: float | None) -> dict[str, Any]:
    """For the report: `abstain`, the rule found on the validation rows and what it does on each split; or nothing.

    Args:
        answers: Of `validation` and others.
        precision: Share of the answers that are to be right; None: nothing is asked for.
    """
    if precision is None:
        return {}
    rule = find_rule(answers["validation"], precision)
    if rule.min_probability is None:
        LOGGER.warning(
            "abstain_precision: no threshold gives answers of which %g are right, by a bound of %g %% confidence on "
            "the validation rows: `nlpxfer predict` will abstain from all of them unless --min_probability is given",
            precision,
            100 * rule.confidence,
        )
    scores = {split: answered_scores(rule, found) for split, found in answers.items()}
    for split, found in answers.items():
        if split != "validation" and _is_refuted(rule, found):
            LOGGER.warning(
                "abstain_precision: of %d answers on the %s rows only %.3f are right, too few for the %g that the "
                "validation rows promise: do not rely on the threshold",
                scores[split]["answers"],
                split,
                scores[split]["precision"],
                precision,
            )
    return {"abstain": {**vars(rule), **scores}}


def _is_refuted(rule: AbstainRule, answers: Answers) -> bool:
    """Whether so many of the answers given are wrong that the precision is out of the question, by the same bound."""
    kept_N = ~rule.abstains(answers.sure_N)
    wrong = _lower_bounds(~answers.right_N[kept_N], answers.row_N[kept_N], rule.confidence)
    return len(wrong) > 0 and float(wrong[-1]) > 1 - rule.precision


def answered_scores(rule: AbstainRule, answers: Answers) -> dict[str, float | int | None]:
    """What is left of the answers.

    Returns:
        `answers` that are given, `coverage` (their share; 0 without any) and `precision` (share of them that is right;
        None without any).
    """
    kept_N = ~rule.abstains(answers.sure_N)
    right_K = answers.right_N[kept_N]
    precision = float(right_K.mean()) if len(right_K) else None
    return {"answers": len(right_K), "coverage": len(right_K) / max(len(kept_N), 1), "precision": precision}


def risk_coverage_area(sure_N: ArrayLike, right_N: ArrayLike) -> float:
    """AURC: the error rate among the k surest rows, averaged over k = 1..N; lower is better.

    Rows that are equally sure count as their mean, which is the expectation over their order.

    >>> risk_coverage_area([0.9, 0.8, 0.7, 0.6], [True, True, False, True])
    0.14583333333333331

    Source: Geifman, Uziel and El-Yaniv 2019, arXiv:1805.08206.
    """
    sure, wrong = np.asarray(sure_N, dtype=np.float64), 1.0 - np.asarray(right_N, dtype=np.float64)
    _, group_N, counts_G = np.unique(-sure, return_inverse=True, return_counts=True)
    wrong_G = np.bincount(group_N, weights=wrong) / counts_G
    risks_N = np.cumsum(np.repeat(wrong_G, counts_G)) / np.arange(1, len(sure) + 1)
    return float(risks_N.mean())


def risk_coverage(sure_N: ArrayLike, right_N: ArrayLike) -> dict[str, float]:
    """`aurc`, and `aurc_perfect_order`: what it would be if every wrong row were less sure than every right one."""
    right = np.asarray(right_N, dtype=np.float64)
    return {"aurc": risk_coverage_area(sure_N, right), "aurc_perfect_order": risk_coverage_area(right, right)}
