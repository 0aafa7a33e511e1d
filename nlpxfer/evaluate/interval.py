"""Bootstrap intervals: how sure is a score, and did the transfer help?

Shapes: B test rows, C classes, S training seeds, R resamples, K distinct row patterns.

All resampling draws how often each row is taken instead of the rows themselves. Rows that look the same to a metric
(equal label, equal predictions of all models) are drawn together as one pattern, which is the same distribution and
makes 2,000 resamples of thousands of rows a matter of milliseconds.

Source: Efron & Tibshirani, An Introduction to the Bootstrap, 1993 (percentile interval, chapter 13);
Berg-Kirkpatrick, Burkett & Klein, An Empirical Investigation of Statistical Significance in NLP, EMNLP 2012 (paired).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nlpxfer.errors import ConfigError, DataError, NotFiniteError

MetricName: TypeAlias = Literal["accuracy", "macro_f1", "sample_f1", "mean_absolute_error"]
Call: TypeAlias = Literal["positive", "unclear", "negative"]
Scored: TypeAlias = "ArrayLike | tuple[ArrayLike, ArrayLike]"
"""The outcome of one model on the test rows: what each row scores (B,), for accuracy 0 or 1; or (predictions (B,),
labels (B,)). The score of an absolute error is its negative, so that more is better."""
Scoring: TypeAlias = "Callable[[NDArray[Any], NDArray[np.float64]], NDArray[np.float64]]"
"""From K distinct rows of a table and how often each was drawn (R, K) to the scores of M models, shape (R, M)."""

_MEANS = ("sample_f1", "mean_absolute_error")
"""Metrics that are means of any numbers over rows."""

_CHUNK_CELLS = 4_000_000


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A score with its percentile bootstrap interval over the test rows."""

    value: float
    low: float
    high: float
    level: float
    resamples: int


@dataclass(frozen=True, kw_only=True)
class Gain:
    """What the treated arm has over the control arm, with an interval and a verdict.

    `gain`, `low`, `high` are differences of the metric (0.01 is one point). `call` is positive if the whole interval
    lies above 0, negative if it lies below, else unclear; and unclear on too few `differing_rows`. With one seed the
    interval knows the luck of the test rows only, not that of training.

    Attributes:
        differing_rows: Test rows on which the arms score differently with any seed; for macro-F1, are answered so.
        needed_rows: The fewest of these that can decide, see `rows_to_decide`.
    """

    gain: float
    low: float
    high: float
    call: Call
    metric: MetricName
    level: float
    resamples: int
    seeds: int
    differing_rows: int
    needed_rows: int


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Mean and standard deviation (n - 1) over training seeds; no deviation is known from a single value."""

    mean: float
    deviation: float | None
    count: int


def bootstrap_interval(
    scored: Scored,
    *,
    metric: MetricName = "accuracy",
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap of one model's score over the test rows.

    Args:
        scored: Correctness of each row (bool, shape (B,)), for accuracy only; or `(predictions, labels)`, each (B,).
        metric: `accuracy` or `macro_f1`, the latter over the classes that occur in a resample.
        level: Share of the resamples inside the interval.
        resamples: R, the number of resamples.
        seed: Of the resampling.

    Raises:
        DataError: Empty rows, shapes or values that do not fit.
        ConfigError: An unknown metric, a level outside (0, 1), or too few resamples.

    Source: Efron & Tibshirani 1993, chapter 13.
    """
    _check_options(metric, level, resamples)
    scores_RS, observed_S = _resampled_scores(*_tabled([scored], metric), resamples, np.random.default_rng(seed))
    low, high = _percentiles(scores_RS[:, 0], level)
    return Interval(value=float(observed_S[0]), low=low, high=high, level=level, resamples=resamples)


def paired_gain(
    treated: Sequence[Scored],
    control: Sequence[Scored],
    *,
    metric: MetricName = "accuracy",
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Gain:
    """The verdict on the transfer: mean gain of treated over control, with an interval over test rows and seeds.

    Each resample draws the test rows anew, the same for both arms and all seeds (paired), and the training seeds anew.
    Of S seeds, S - 1 are drawn with replacement: S draws would give a variance that is too small by (S - 1)/S, which
    is a third at three seeds. With one seed there is nothing to draw, and the interval covers the test rows alone. In
    simulations with 1,000 rows, a 95 % interval held the truth in 88, 91 and 94 % of the cases for 2, 3 and 5 seeds
    where the luck of training was as large as that of the rows, and in 98 % or more where it was small.

    A bootstrap knows no other rows than these: from a handful that all say the same its interval has no width. So the
    call is unclear where the arms differ on fewer rows than a sign test could decide on, see `rows_to_decide`.

    Args:
        treated: One outcome per training seed: correctness (B,) or `(predictions, labels)`; see `Scored`.
        control: The same for the arm without the transfer; `control[i]` has the seed of `treated[i]`.
        metric: `accuracy` or `macro_f1`.
        level: Share of the resamples inside the interval.
        resamples: R, the number of resamples.
        seed: Of the resampling.

    Raises:
        DataError: The arms have different numbers of seeds or rows, or different labels; or no rows at all.
        ConfigError: An unknown metric, a level outside (0, 1), or too few resamples.

    Source: Berg-Kirkpatrick et al. 2012 (paired over rows); Efron & Tibshirani 1993; S - 1 draws: Rao & Wu,
    Resampling Inference with Complex Survey Data, JASA 1988.
    """
    _check_options(metric, level, resamples)
    seeds = len(treated)
    if seeds == 0 or seeds != len(control):
        raise DataError(
            f"{seeds} treated and {len(control)} control outcomes cannot be paired",
            why="each arm needs one outcome per training seed, in the same order of seeds",
        )
    generator = np.random.default_rng(seed)
    table, score = _tabled([*treated, *control], metric)
    scores_RM, observed_M = _resampled_scores(table, score, resamples, generator)
    gains_RS = scores_RM[:, :seeds] - scores_RM[:, seeds:]
    shares_RS = seed_shares(seeds, resamples, generator)
    low, high = _percentiles((gains_RS * shares_RS).sum(axis=1), level)
    gain = float((observed_M[:seeds] - observed_M[seeds:]).mean())
    outcomes_BM = table[:, -2 * seeds :]  # without the labels that macro-F1 has in front
    differing = int((outcomes_BM[:, :seeds] != outcomes_BM[:, seeds:]).any(axis=1).sum())
    needed = rows_to_decide(level)
    call: Call = "positive" if low > 0 else "negative" if high < 0 else "unclear"
    return Gain(
        gain=gain,
        low=low,
        high=high,
        call=call if differing >= needed else "unclear",
        metric=metric,
        level=level,
        resamples=resamples,
        seeds=seeds,
        differing_rows=differing,
        needed_rows=needed,
    )


def rows_to_decide(level: float) -> int:
    """The fewest rows with a difference on which a two-sided sign test can decide, if all say the same: 2^(1 - n).

    >>> rows_to_decide(0.95)
    6

    Source: Conover, Practical Nonparametric Statistics, 1999, section 3.4.
    """
    return math.ceil(1 - math.log2(1 - level))


def seed_shares(seeds: int, resamples: int, generator: np.random.Generator) -> NDArray[np.float64]:
    """The weight of each of S seeds in each of R resamples, shape (R, S): S - 1 are drawn, see `paired_gain`."""
    draws = max(seeds - 1, 1)
    shares_RS: NDArray[np.float64] = generator.multinomial(draws, np.full(seeds, 1 / seeds), size=resamples) / draws
    return shares_RS


def mean_and_spread(values: Sequence[float]) -> Spread:
    """Mean and sample standard deviation of one number per training seed.

    >>> mean_and_spread([1.0, 2.0, 3.0])
    Spread(mean=2.0, deviation=1.0, count=3)

    Raises:
        DataError: No values.
        NotFiniteError: A value is NaN or infinite.
    """
    if not len(values):
        raise DataError("No values to average")
    numbers = [float(value) for value in values]
    if not all(map(math.isfinite, numbers)):
        raise NotFiniteError(f"Cannot average {numbers}", why="a run ended with a score that is NaN or infinite")
    mean = math.fsum(numbers) / len(numbers)
    if len(numbers) == 1:
        return Spread(mean=mean, deviation=None, count=1)
    squares = math.fsum((number - mean) ** 2 for number in numbers)
    return Spread(mean=mean, deviation=math.sqrt(squares / (len(numbers) - 1)), count=len(numbers))


def _check_options(metric: str, level: float, resamples: int) -> None:
    faults = []
    if metric not in get_args(MetricName):
        faults.append(f"metric {metric!r} is unknown: use one of {', '.join(get_args(MetricName))}")
    if not 0 < level < 1:
        faults.append(f"level is {level}, but must lie between 0 and 1")
    elif resamples * (1 - level) / 2 < 1:
        faults.append(f"{resamples} resamples have no tail at level {level}: use {math.ceil(2 / (1 - level))} or more")
    if faults:
        raise ConfigError.from_faults(faults)


def _percentiles(values_R: NDArray[np.float64], level: float) -> tuple[float, float]:
    low, high = np.quantile(values_R, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _tabled(models: Sequence[Scored], metric: MetricName) -> tuple[NDArray[Any], Scoring]:
    """What each row has of each of M models, shape (B, M), for macro-F1 with the labels before it; and its scoring."""
    if metric in _MEANS:
        return _row_scores(models), _row_means
    if metric == "accuracy":
        return _correctness(models), _row_means
    return _labels_and_predictions(models), _macro_f1s


def _resampled_scores(
    table: NDArray[Any], score: Scoring, resamples: int, generator: np.random.Generator
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Scores of M models on the same resampled rows, shape (R, M), and on the rows as they are, shape (M,)."""
    patterns, counts_K = np.unique(table, axis=0, return_counts=True)
    rows = int(counts_K.sum())
    chunk = max(1, _CHUNK_CELLS // len(counts_K))
    parts = []
    for start in range(0, resamples, chunk):
        drawn_RK = generator.multinomial(rows, counts_K / rows, size=min(chunk, resamples - start))
        parts.append(score(patterns, drawn_RK.astype(np.float64)))
    return np.concatenate(parts), score(patterns, counts_K[None].astype(np.float64))[0]


def _row_means(scores_KM: NDArray[Any], counts_RK: NDArray[np.float64]) -> NDArray[np.float64]:
    means_RM: NDArray[np.float64] = counts_RK @ scores_KM / counts_RK.sum(axis=1, keepdims=True)
    return means_RM


def _macro_f1s(patterns: NDArray[Any], counts_RK: NDArray[np.float64]) -> NDArray[np.float64]:
    """Macro-F1 of each model: F1 = 2 hits / (true + predicted), over the classes where that is not 0 / 0."""
    classes_C = np.unique(patterns)
    labels_KC = patterns[:, :1] == classes_C
    true_RC = counts_RK @ labels_KC
    scores_M = []
    for predictions_K in patterns[:, 1:].T:
        predicted_KC = predictions_K[:, None] == classes_C
        total_RC = true_RC + counts_RK @ predicted_KC
        hits_RC = counts_RK @ (labels_KC & predicted_KC)
        f1_RC = np.divide(2 * hits_RC, total_RC, out=np.zeros_like(total_RC), where=total_RC > 0)
        scores_M.append(f1_RC.sum(axis=1) / (total_RC > 0).sum(axis=1))
    return np.stack(scores_M, axis=1)


def _row_scores(models: Sequence[Scored]) -> NDArray[np.float64]:
    """What each row scores with M models, shape (B, M)."""
    columns = [np.asarray(model, dtype=np.float64) for model in models]
    if any(column.ndim != 1 or not len(column) or not np.isfinite(column).all() for column in columns):
        raise DataError("Scores must be a list of one finite number per test row, with at least one row")
    _same_rows([len(column) for column in columns])
    return np.stack(columns, axis=1)


def _correctness(models: Sequence[Scored]) -> NDArray[np.int64]:
    """Correctness of M models as 0 and 1, shape (B, M)."""
    columns = []
    for model in models:
        if isinstance(model, tuple):
            predictions_B, labels_B = _labelled(model)
            columns.append(predictions_B == labels_B)
            continue
        correct_B = np.asarray(model)
        if correct_B.ndim != 1 or not len(correct_B) or not np.isin(correct_B, (0, 1)).all():
            raise DataError("Correctness must be a list of one true or false per test row, with at least one row")
        columns.append(correct_B.astype(bool))
    tuples = [model for model in models if isinstance(model, tuple)]
    if tuples:
        _same_labels([_labelled(model)[1] for model in tuples])
    _same_rows([len(column) for column in columns])
    return np.stack(columns, axis=1).astype(np.int64)


def _labels_and_predictions(models: Sequence[Scored]) -> NDArray[np.int64]:
    """Labels in the first column, then the predictions of M models, shape (B, 1 + M)."""
    if not all(isinstance(model, tuple) for model in models):
        raise DataError("macro_f1 needs (predictions, labels) of each model: correctness alone does not know classes")
    pairs = [_labelled(model) for model in models]
    _same_rows([len(labels_B) for _, labels_B in pairs])
    _same_labels([labels_B for _, labels_B in pairs])
    return np.stack([pairs[0][1], *(predictions_B for predictions_B, _ in pairs)], axis=1)


def _labelled(model: Scored) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    predictions_B, labels_B = (np.asarray(part) for part in model)  # type: ignore[union-attr]  # a tuple, see callers
    if predictions_B.ndim != 1 or predictions_B.shape != labels_B.shape or not len(labels_B):
        raise DataError(
            f"Predictions of shape {predictions_B.shape} and labels of shape {labels_B.shape} do not fit",
            why="both must have shape (rows,), with at least one row",
        )
    if not (np.issubdtype(predictions_B.dtype, np.integer) and np.issubdtype(labels_B.dtype, np.integer)):
        raise DataError(f"Predictions ({predictions_B.dtype}) and labels ({labels_B.dtype}) must be class indices")
    return predictions_B.astype(np.int64), labels_B.astype(np.int64)


def _same_rows(rows: Sequence[int]) -> None:
    if len(set(rows)) > 1:
        raise DataError(
            f"The outcomes have different numbers of rows: {', '.join(map(str, rows))}",
            why="arms and seeds can only be paired on the same test rows, in the same order",
        )


def _same_labels(labels: Sequence[NDArray[np.int64]]) -> None:
    if any(not np.array_equal(labels[0], other) for other in labels[1:]):
        raise DataError(
            "The outcomes have different labels for the same rows",
            why="arms and seeds can only be paired on the same test rows, in the same order",
        )
