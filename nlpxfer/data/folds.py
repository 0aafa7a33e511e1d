"""The folds of the training rows for cross-validation, and what cannot be learnt in them.

A class with fewer different texts than there are folds is not refused: some folds then hold none of its rows. A class
whose rows all stand in one fold is not refused either, but the model of that fold has never seen it: its rows get
probabilities like all others, and are left out where these would accuse a label.

Shapes: N rows.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nlpxfer.data.formats import SHOWN_FAULTS
from nlpxfer.data.rows import normalise_text
from nlpxfer.data.splits import stratified_folds
from nlpxfer.errors import ConfigError

LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Folds:
    """Which fold holds each of N rows.

    Attributes:
        count: K, the number of folds.
        fold_N: The fold of each row, 0 to K - 1.
        unlearnt_N: Rows whose class has no row outside of their fold.
        warnings: What a reader of the scores should know, one sentence each.
    """

    count: int
    fold_N: NDArray[np.int64]
    unlearnt_N: NDArray[np.bool_]
    warnings: tuple[str, ...]


def make_folds(
    texts: Sequence[str],
    pairs: Sequence[str] | None,
    labels_N: NDArray[np.int64],
    names: Sequence[str],
    *,
    count: int,
    seed: int,
    option: str = "num_folds",
) -> Folds:
    """Stratified folds of rows; rows with the same normalised text (and pair) share one.

    Args:
        texts: N texts.
        pairs: N second texts, for tasks on pairs.
        labels_N: Class indices.
        names: Label names in schema order.
        count: K, the number of folds.
        seed: Deals the rows out.
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
    fold_N = np.asarray(stratified_folds(labels_N.tolist(), keys, folds=count, seed=seed))
    for fold in range(count):
        if len(np.unique(labels_N[fold_N != fold])) < 2:
            raise ConfigError(
                f"{option}: without fold {fold + 1} the training rows have one class only.",
                why="the other classes have too few different texts",
                fix=f"add rows of these classes, or leave {option} out",
            )
    unlearnt_N = np.zeros(len(labels_N), dtype=bool)
    few, alone = [], []
    for label in np.unique(labels_N):
        of_class = labels_N == label
        if len({keys[index] for index in np.flatnonzero(of_class)}) < count:
            few.append(names[label])
        if len(np.unique(fold_N[of_class])) == 1:
            unlearnt_N |= of_class
            alone.append(names[label])
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


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN_FAULTS} more" if len(names) > SHOWN_FAULTS else ""
    return ", ".join(names[:SHOWN_FAULTS]) + more
