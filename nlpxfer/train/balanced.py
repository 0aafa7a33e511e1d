"""Epochs in which all classes are drawn equally often, however rare some of them are.

The rows of each class stand in a circle, in an order drawn once, and each epoch takes the next ones: of a rare class
all rows come several times an epoch, of a frequent one some, and others the next time. So within an epoch as over all
of them the rows of a class are drawn equally often, within one. Chosen over independent draws with replacement, as
torch's `WeightedRandomSampler` makes them: those leave a third of the rows of a class of average size out of every
epoch, draw others three times, and the classes unevenly.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from nlpxfer.errors import DataError

Array = np.ndarray[Any, Any]


class BalancedDraws:
    """Draws N rows an epoch, N / C of each of the C classes that have rows; what is left over goes to the first ones.

    Args:
        labels: Class index of each of the N rows.
        seed: With the epoch, the only thing that the draws depend on.

    Raises:
        DataError: A row has no label.
    """

    def __init__(self, labels: Array, *, seed: int) -> None:
        labels_N = np.asarray(labels)
        if (labels_N < 0).any():
            raise DataError(
                "Balanced sampling needs a label for each training row.", why="unlabelled rows belong to no class"
            )
        rows_of_class = [np.flatnonzero(labels_N == label) for label in np.unique(labels_N)]
        # the 1 keeps these orders apart from those of whole epochs, which are made from [seed, epoch]
        self.circles = [np.random.default_rng([seed, i, 1]).permutation(rows) for i, rows in enumerate(rows_of_class)]
        share, rest = divmod(len(labels_N), max(1, len(self.circles)))
        self.draws_of_class = [share + (number < rest) for number in range(len(self.circles))]

    def of_epoch(self, epoch: int) -> Array:
        """Indices of the rows of an epoch, class after class.

        >>> BalancedDraws(np.array([0, 0, 0, 0, 1, 1]), seed=1).of_epoch(0).tolist()[3:]  # both, and one again
        [5, 4, 5]
        """
        parts = [
            circle.take(np.arange(epoch * draws, (epoch + 1) * draws), mode="wrap")
            for circle, draws in zip(self.circles, self.draws_of_class, strict=True)
        ]
        return np.concatenate([np.zeros(0, dtype=np.int64), *parts])
