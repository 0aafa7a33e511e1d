"""What share of another model's score a model reaches, with a paired bootstrap interval over the test rows.

A ratio of two scores, not a difference: "the student keeps 98 % of its teacher". Numerator and denominator are drawn
on the same resampled rows, which is what makes the interval narrow: both models find the same rows hard.

Micro-F1 and Spearman's correlation are no means over rows, so each resample is scored anew, from how often it holds
each row. For Spearman these counts give the ranks of the resample, ties included, without sorting it again.

Shapes: N test rows, C labels, S training seeds, R resamples, G groups of equal numbers.

Source: Efron & Tibshirani, An Introduction to the Bootstrap, 1993 (percentile interval, chapter 13).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nlpxfer.errors import ConfigError, DataError
from nlpxfer.evaluate.interval import seed_shares

Counts = NDArray[np.float64]
Ends = tuple[float, float] | tuple[None, None]
RatioMetric = Literal["accuracy", "micro_f1", "spearman", "mean_absolute_error"]
_CHUNK_CELLS: Final = 2_000_000


@dataclass(frozen=True, kw_only=True)
class Share:
    """A score over the score of another model on the same rows.

    Attributes:
        value: Mean score over the seeds, over the other's score; None if that is not above 0.
        low: Lower end of the interval; None where the other's score is not above 0 in some resample.
        high: Upper end.
        metric: Of both scores; an absolute error is better below 1.
        level: Share of the resamples inside the interval.
        resamples: How many were drawn.
        seeds: Training seeds of the first model.
    """

    value: float | None
    low: float | None
    high: float | None
    metric: RatioMetric
    level: float
    resamples: int
    seeds: int


def paired_ratio(
    treated_S: Sequence[ArrayLike],
    reference: ArrayLike,
    gold: ArrayLike,
    *,
    metric: RatioMetric,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Share:
    """The score of one model over that of another, with an interval over test rows and seeds.

    Args:
        treated_S: Answers of the first model, one array per training seed: classes (N), labels given (N, C), or
            numbers (N).
        reference: Answers of the second one.
        gold: True answers.
        metric: `accuracy` takes classes, `micro_f1` labels, the others numbers.
        level: Share of the resamples inside the interval.
        resamples: R.
        seed: Of the resampling.

    Raises:
        DataError: No rows, no seeds, or shapes that do not fit.
        ConfigError: An unknown metric, a level outside (0, 1), or too few resamples.
    """
    if metric not in get_args(RatioMetric) or not 0 < level < 1 or resamples * (1 - level) / 2 < 1:
        raise ConfigError(
            f"No interval of level {level} for {metric!r} from {resamples} resamples.",
            fix="a level between 0 and 1, and at least 2 / (1 - level) resamples",
            available=get_args(RatioMetric),
        )
    truth = np.asarray(gold)
    shapes = {np.asarray(each).shape for each in (*treated_S, reference, truth)}
    if not treated_S or len(shapes) > 1 or not len(truth):
        raise DataError(f"Answers of shapes {sorted(shapes)} cannot be compared: all need the same rows, at least one")
    models = [_scorer(metric, np.asarray(each), truth) for each in (*treated_S, reference)]
    generator = np.random.default_rng(seed)
    scores_RM = _resampled(models, len(truth), resamples, generator)
    observed_M = np.array([float(score(np.ones((1, len(truth))))[0]) for score in models])
    seeds = len(treated_S)
    treated_R = (scores_RM[:, :seeds] * seed_shares(seeds, resamples, generator)).sum(axis=1)
    low, high = _ends(treated_R, scores_RM[:, -1], level)
    value = float(observed_M[:seeds].mean() / observed_M[-1]) if observed_M[-1] > 0 else None
    return Share(value=value, low=low, high=high, metric=metric, level=level, resamples=resamples, seeds=seeds)


def intervals_by_label(
    treated_S: Sequence[ArrayLike],
    reference: ArrayLike,
    gold: ArrayLike,
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> list[Ends]:
    """Intervals of the share of another model's F1, of each label; all labels on the same resamples.

    Each is that of `paired_ratio` for the label's column alone.

    Args:
        treated_S: Labels given by the first model, (N, C), one array per training seed.
        reference: Those of the second one.
        gold: True labels.
        level: Share of the resamples inside the interval.
        resamples: R.
        seed: Of the resampling.

    Returns:
        Lower and upper end; None where the other's F1 is not above 0 in some resample.
    """
    truth_NC = np.asarray(gold)
    models = [_f1(np.asarray(each), truth_NC, by_label=True) for each in (*treated_S, reference)]
    generator = np.random.default_rng(seed)
    scores_RMC = _resampled(models, len(truth_NC), resamples, generator)
    shares_RS = seed_shares(len(treated_S), resamples, generator)
    treated_RC = np.einsum("rsc,rs->rc", scores_RMC[:, :-1], shares_RS)
    return [_ends(ours_R, theirs_R, level) for ours_R, theirs_R in zip(treated_RC.T, scores_RMC[:, -1].T, strict=True)]


def _ends(treated_R: Counts, reference_R: Counts, level: float) -> Ends:
    """The interval of a ratio from its resamples; None where the reference is not above 0 in all of them."""
    if not (reference_R > 0).all():
        return None, None
    low, high = np.quantile(treated_R / reference_R, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _f1(found_NC: NDArray[Any], gold_NC: NDArray[Any], *, by_label: bool) -> Callable[[Counts], Counts]:
    """From how often each row is drawn, (R, N), to the F1 of each label, (R, C), or of all together, (R,)."""
    given_NC, true_NC = found_NC.astype(bool), gold_NC.astype(bool)
    hits, total = 2.0 * (given_NC & true_NC), given_NC.astype(np.float64) + true_NC
    if not by_label:
        hits, total = hits.sum(axis=1), total.sum(axis=1)

    def scores(counts_RN: Counts) -> Counts:
        drawn = counts_RN @ total
        found: Counts = np.divide(counts_RN @ hits, drawn, out=np.zeros_like(drawn), where=drawn > 0)
        return found

    return scores


def _resampled(
    models: Sequence[Callable[[Counts], Counts]], rows: int, resamples: int, generator: np.random.Generator
) -> Counts:
    """Scores of M models on the same R resamples, shape (R, M), or (R, M, C) of those that give one per label."""
    chunk, parts = max(1, _CHUNK_CELLS // rows), []
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        drawn = generator.integers(rows, size=(size, rows)) + rows * np.arange(size)[:, None]
        counts_RN = np.bincount(drawn.ravel(), minlength=size * rows).reshape(size, rows).astype(np.float64)
        parts.append(np.stack([score(counts_RN) for score in models], axis=1))
    return np.concatenate(parts)


def _scorer(metric: RatioMetric, found: NDArray[Any], gold: NDArray[Any]) -> Callable[[Counts], Counts]:
    """From how often each row is drawn, (R, N), to the score of each resample, (R,)."""
    if metric == "micro_f1":
        return _f1(found, gold, by_label=False)
    if metric == "spearman":
        return lambda counts_RN: _spearman(counts_RN, found, gold)
    exact = metric == "accuracy"
    score_N = (found == gold).astype(np.float64) if exact else np.abs(found.astype(np.float64) - gold)
    return lambda counts_RN: counts_RN @ score_N / counts_RN.sum(axis=1)


def _spearman(counts_RN: Counts, found_N: NDArray[Any], gold_N: NDArray[Any]) -> Counts:
    """Correlation of the ranks in each resample; 0 where one side is constant."""
    centred = []
    rows_R = counts_RN.sum(axis=1, keepdims=True)
    for numbers_N in (found_N, gold_N):
        ranks_RN = _ranks(counts_RN, numbers_N)
        centred.append(ranks_RN - (counts_RN * ranks_RN).sum(axis=1, keepdims=True) / rows_R)
    first_RN, second_RN = centred
    covariance_R = (counts_RN * first_RN * second_RN).sum(axis=1)
    scale_R = np.sqrt((counts_RN * first_RN**2).sum(axis=1) * (counts_RN * second_RN**2).sum(axis=1))
    found_R: Counts = np.divide(covariance_R, scale_R, out=np.zeros_like(scale_R), where=scale_R > 1e-9)
    return found_R


def _ranks(counts_RN: Counts, numbers_N: NDArray[Any]) -> Counts:
    """The rank of each row among the rows of its resample, equal numbers sharing their mean rank.

    >>> _ranks(np.array([[1.0, 1.0, 1.0], [2.0, 0.0, 1.0]]), np.array([5, 1, 5])).tolist()
    [[2.5, 1.0, 2.5], [2.0, 0.5, 2.0]]
    """
    order_N = np.argsort(numbers_N, kind="stable")
    _, first_G, group_N = np.unique(numbers_N[order_N], return_index=True, return_inverse=True)
    sizes_RG = np.add.reduceat(counts_RN[:, order_N], first_G, axis=1)
    means_RG = np.cumsum(sizes_RG, axis=1) - (sizes_RG - 1) / 2
    ranks_RN = np.empty_like(counts_RN)
    ranks_RN[:, order_N] = means_RG[:, group_N]
    return ranks_RN
