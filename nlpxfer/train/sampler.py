"""Batches of rows of like length, in an order that depends only on the seed and the epoch.

Stock `LengthGroupedSampler` draws from the global random state, so its order changes with whatever else drew a number
before, and a resumed run sees other rows than the interrupted one.

"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from nlpxfer.train.balanced import BalancedDraws

WINDOW_BATCHES = 50
"""Batches that are sorted together: more is less padding, fewer is more random."""


class LengthGroupedSampler(torch.utils.data.Sampler[int]):
    """Shuffles rows, then sorts windows of `WINDOW_BATCHES` batches by length and shuffles the batches.

    Every row comes once an epoch, or as often as `draws` says. The short last batch comes last.

    Args:
        lengths: Tokens of each row, of all its windows; N of them.
        batch_size: Rows that are consumed together: over all micro-batches and processes of a step.
        seed: With the epoch, the only thing the order depends on.
        grouped: False for plain shuffling.
        draws: Chooses the N rows of each epoch, some more than once. Default: all rows.
    """

    def __init__(
        self,
        lengths: np.ndarray[Any, Any],
        batch_size: int,
        *,
        seed: int,
        grouped: bool = True,
        draws: BalancedDraws | None = None,
    ) -> None:
        self.lengths = np.asarray(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.grouped = grouped
        self.draws = draws
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order is next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        random = np.random.default_rng([self.seed, self.epoch])
        order = random.permutation(len(self.lengths) if self.draws is None else self.draws.of_epoch(self.epoch))
        if not self.grouped:
            return iter(order.tolist())
        whole = len(order) - len(order) % self.batch_size
        window = WINDOW_BATCHES * self.batch_size
        windows = [order[i : min(i + window, whole)] for i in range(0, whole, window)]
        ordered = [part[np.argsort(-self.lengths[part], kind="stable")] for part in windows]
        batches = np.concatenate(ordered).reshape(-1, self.batch_size) if ordered else np.zeros((0, 1), dtype=int)
        random.shuffle(batches)
        return iter([*batches.reshape(-1).tolist(), *order[whole:].tolist()])
