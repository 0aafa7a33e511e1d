"""Equal shares for all processes without a row that counts more often than it was drawn.

Several processes must make the same number of passes, so accelerate fills the last round of an epoch with rows from
its beginning, which then weigh double. Here the order is filled up with empty places instead: they are left out of the
batches, and a batch of nothing but empty places counts as no row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from nlpxfer.data.tokenise import TokenisedRows
from nlpxfer.train.sampler import LengthGroupedSampler

EMPTY: Final = -1
"""Index of an empty place."""
COUNTS: Final = "rows_count"
"""Key of a batch: 1, or 0 if it only stands in for a batch of empty places."""


class EvenSampler(torch.utils.data.Sampler[int]):
    """The order of another sampler, filled up with `EMPTY` to a multiple of `together`.

    Args:
        sampler: Orders the rows.
        together: Rows that all processes consume in one round of micro-batches.
    """

    def __init__(self, sampler: LengthGroupedSampler, together: int) -> None:
        self.sampler = sampler
        self.together = together

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order is next."""
        self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return -(-len(self.sampler) // self.together) * self.together

    def __iter__(self) -> Iterator[int]:
        yield from self.sampler
        yield from [EMPTY] * (len(self) - len(self.sampler))


class RowsWithGaps(torch.utils.data.Dataset[Mapping[str, Any] | None]):
    """Rows by index; nothing at `EMPTY`."""

    def __init__(self, rows: TokenisedRows) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Mapping[str, Any] | None:
        return None if index == EMPTY else self.rows[index]


Collate = Callable[[Sequence[Mapping[str, Any]]], dict[str, Tensor]]


class GapCollator:
    """Leaves empty places out; a batch of nothing else holds one row and counts none.

    Args:
        collator: Pads the rows.
        stand_in: The row of a batch that would be empty.
    """

    def __init__(self, collator: Collate, stand_in: Mapping[str, Any]) -> None:
        self.collator = collator
        self.stand_in = stand_in

    def __call__(self, rows: Sequence[Mapping[str, Any] | None]) -> dict[str, Tensor]:
        """The padded batch, with `COUNTS`."""
        present = [row for row in rows if row is not None]
        return {**self.collator(present or [self.stand_in]), COUNTS: torch.tensor(int(bool(present)))}
