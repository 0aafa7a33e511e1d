"""Answer only where the model is sure enough: the threshold that keeps a promised precision, and what it costs.

The threshold is the lowest probability from which the rows answered are right with the precision asked for, by the
one-sided Clopper-Pearson bound on the validation rows and not by their share: on 20 rows a share of 95 % is luck.
Clopper-Pearson over Wilson, because it is exact: near a precision of 1 Wilson's lower bound is too high.

The bound holds for each threshold by itself, and the lowest of many that pass is chosen. Where the probability tells
right from wrong, the promise was broken in at most 6 % of 600 simulated models (80 to 1,000 rows, targets 0.90 and
0.95), against the 5 % of one threshold. A bound for all thresholds at once (Geifman and El-Yaniv 2017,
arXiv:1705.08500) brought that below 1 %, but answered 20 % of the rows instead of 51 % (300 validation rows, accuracy
0.83, target 0.90): too dear. Where probabilities say nothing about right and wrong, a model that is 0.1 points short
of its target passed in up to 28 % of the cases (3,000 rows).

Shapes: N rows.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

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
        min_probability: Rows whose best calibrated probability is below it are not answered; None: no threshold keeps
            the precision, so no row is answered.
        coverage: Share of the validation rows that are answered.
    """

    precision: float
    confidence: float
    min_probability: float | None
    coverage: float

    def abstains(self, sure_N: ArrayLike) -> NDArray[np.bool_]:
        """Which rows of these best probabilities are not answered."""
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


def find_rule(
    sure_N: ArrayLike, right_N: ArrayLike, precision: float, *, confidence: float = CONFIDENCE
) -> AbstainRule:
    """The rule with the lowest threshold whose answers reach the precision by their lower bound.

    Args:
        sure_N: Best calibrated probability of each validation row.
        right_N: Whether the label with that probability is the gold one.
        precision: Share of the answers that are to be right.
        confidence: Of the bound.
    """
    sure, right = np.asarray(sure_N, dtype=np.float64), np.asarray(right_N, dtype=bool)
    order = np.argsort(-sure, kind="stable")
    answered = np.arange(1, len(sure) + 1)
    bounds = lower_bound(np.cumsum(right[order]), answered, confidence)
    last_of_equal = np.append(sure[order][1:] < sure[order][:-1], True)
    passing = np.flatnonzero((bounds >= precision) & last_of_equal)
    least = float(sure[order][passing[-1]]) if len(passing) else None
    coverage = float(answered[passing[-1]] / len(sure)) if len(passing) else 0.0
    return AbstainRule(precision=precision, confidence=confidence, min_probability=least, coverage=coverage)


def best_and_right(
    shares_NC: NDArray[np.float64], labels_N: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Each row's best probability, and whether the label that has it is the gold one."""
    return shares_NC.max(axis=1), shares_NC.argmax(axis=1) == labels_N


Answers = tuple[NDArray[np.float64], NDArray[np.bool_]]


def abstain_checks(answers: Mapping[str, Answers], precision: float | None) -> dict[str, Any]:
    """For the report: `abstain`, the rule found on the validation rows and what it does on each split; or nothing.

    Args:
        answers: `validation` and others: see `best_and_right`.
        precision: Share of the answers that are to be right; None: nothing is asked for.
    """
    if precision is None:
        return {}
    rule = find_rule(*answers["validation"], precision)
    if rule.min_probability is None:
        LOGGER.warning(
            "abstain_precision: no threshold gives answers of which %g are right, by a bound of %g %% confidence on "
            "the validation rows: `nlpxfer predict` will abstain from all rows unless --min_probability is given",
            precision,
            100 * rule.confidence,
        )
    scores = {split: answered_scores(rule, *found) for split, found in answers.items()}
    return {"abstain": {**vars(rule), **scores}}


def answered_scores(rule: AbstainRule, sure_N: ArrayLike, right_N: ArrayLike) -> dict[str, float | int | None]:
    """`rows` answered, `coverage` (their share) and `precision` (share of them that is right; None without any)."""
    kept_N = ~rule.abstains(sure_N)
    right_K = np.asarray(right_N, dtype=bool)[kept_N]
    precision = float(right_K.mean()) if len(right_K) else None
    return {"rows": len(right_K), "coverage": float(kept_N.mean()), "precision": precision}


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
