"""The folds of the training rows for cross-validation, and what cannot be learnt in them.

A class with fewer different texts than there are folds is not refused: some folds then hold none of its rows. A class
whose rows all stand in one fold is not refused either, but the model of that fold has never seen it: its rows get
probabilities like all others, and are left out where these would accuse a label. The same holds for each label of a
multi-label task; numbers are spread by tenths of the rows.

Shapes: N rows, C labels.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nlpxfer.data.formats import SHOWN_FAULTS
from nlpxfer.data.rows import normalise_text
from nlpxfer.data.splits import iterative_folds, quantile_bins, stratified_folds
from nlpxfer.errors import ConfigError
from nlpxfer.problem import MULTI_LABEL, REGRESSION, SINGLE_LABEL, ProblemType

LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Folds:
    """Which fold holds each of N rows.

    Attributes:
        count: K, the number of folds.
        fold_N: The fold of each row, 0 to K - 1.
        unlearnt_N: Rows with a class or label that no row outside of their fold has.
        warnings: What a reader of the scores should know, one sentence each.
    """

    count: int
    fold_N: NDArray[np.int64]
    unlearnt_N: NDArray[np.bool_]
    warnings: tuple[str, ...]

    @property
    def fewest_learnt(self) -> int:
        """Rows that the model without the largest fold learns from."""
        return len(self.fold_N) - int(np.bincount(self.fold_N).max())


def make_folds(
    texts: Sequence[str],
    pairs: Sequence[str] | None,
    labels: NDArray[Any],
    names: Sequence[str],
    *,
    count: int,
    seed: int,
    problem_type: ProblemType = SINGLE_LABEL,
    option: str = "num_folds",
) -> Folds:
    """Stratified folds of rows; rows with the same normalised text (and pair) share one.

    Args:
        texts: N texts.
        pairs: N second texts, for tasks on pairs.
        labels: Class indices (N), zeros and ones (N, C), or numbers (N).
        names: Label names in schema order.
        count: K, the number of folds.
        seed: Deals the rows out.
        problem_type: What the labels are.
        option: What the user calls `count`.

    Raises:
        ConfigError: There are fewer different texts than folds, or a fold leaves one class only to learn from.
    """
    second: Sequence[str | None] = [None] * len(texts) if pairs is None else pairs
    keys = [normalise_text(text, pair) for text, pair in zip(texts, second, strict=True)]
    different = len(set(keys))
    if count > different:
        raise ConfigError(
            f"{option}: {count} is more than the {different} different training texts.",
            fix=f"--{option} {min(5, different)}" if different >= 2 else "",
        )
    fold_N = _dealt(labels, keys, count, seed, problem_type)
    unlearnt_N = np.zeros(len(labels), dtype=bool)
    few, alone = [], []
    for label, of_class in _rows_by_class(labels, problem_type):
        if len({keys[index] for index in np.flatnonzero(of_class)}) < count:
            few.append(names[label])
        if len(np.unique(fold_N[of_class])) == 1:
            unlearnt_N |= of_class
            alone.append(names[label])
    if problem_type == SINGLE_LABEL:
        _refuse_one_class(fold_N, labels, count, option)
    warnings = []
    if few:
        warnings.append(f"classes with fewer different texts than the {count} folds, missing in some: {_listed(few)}")
    if alone:
        warnings.append(
            f"classes whose rows all stand in one fold, so that its model has not learnt them: {_listed(alone)}"
        )
    for line in warnings:
        LOGGER.warning("%s: %s", option, line)
    return Folds(count, fold_N, unlearnt_N, tuple(warnings))


def _dealt(
    labels: NDArray[Any], keys: Sequence[str], count: int, seed: int, problem_type: ProblemType
) -> NDArray[np.int64]:
    """The fold of each row, so that each class, label or tenth of the numbers is spread evenly."""
    if problem_type == MULTI_LABEL:
        sets = [np.flatnonzero(row_C > 0.5).tolist() for row_C in labels]
        return np.asarray(iterative_folds(sets, keys, folds=count, seed=seed))
    strata = quantile_bins(labels.tolist()) if problem_type == REGRESSION else labels.tolist()
    return np.asarray(stratified_folds(strata, keys, folds=count, seed=seed))


def _rows_by_class(labels: NDArray[Any], problem_type: ProblemType) -> Iterator[tuple[int, NDArray[np.bool_]]]:
    """Each class or label that occurs, and which rows have it."""
    if problem_type == SINGLE_LABEL:
        yield from ((int(label), labels == label) for label in np.unique(labels))
    if problem_type == MULTI_LABEL:
        yield from ((label, rows_N) for label, rows_N in enumerate(labels.T > 0.5) if rows_N.any())


def _refuse_one_class(fold_N: NDArray[np.int64], labels_N: NDArray[Any], count: int, option: str) -> None:
    for fold in range(count):
        if len(np.unique(labels_N[fold_N != fold])) < 2:
            raise ConfigError(
                f"{option}: without fold {fold + 1} the training rows have one class only.",
                why="the other classes have too few different texts",
                fix=f"add rows of these classes, or leave {option} out",
            )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN_FAULTS} more" if len(names) > SHOWN_FAULTS else ""
    return ", ".join(names[:SHOWN_FAULTS]) + more
