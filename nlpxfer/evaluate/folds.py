"""What the models of K folds say about the rows that they have not seen.

Each fold goes through the ordinary training of an arm, with its held-out rows in the place of the test rows: the same
code scores them, keeps checkpoints and resumes. The run's validation rows choose the best weights, as always; no
held-out row takes part in that.

Shapes: N training rows, C classes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nlpxfer.data.folds import Folds
from nlpxfer.errors import DataError
from nlpxfer.evaluate.arms import Splits, TrainedArm
from nlpxfer.evaluate.calibration import probabilities
from nlpxfer.evaluate.interval import mean_and_spread
from nlpxfer.evaluate.label_errors import LabelErrors, LabelSetErrors, find_label_errors, find_label_set_errors
from nlpxfer.evaluate.task import task_metrics
from nlpxfer.problem import BEST, MULTI_LABEL, REGRESSION, SINGLE_LABEL, ProblemType

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Split = Callable[["PreTrainedTokenizerBase"], Splits]


@dataclass(frozen=True, eq=False)
class OutOfFold:
    """Predictions for all training rows, each by the model of its own fold.

    Attributes:
        folds: Which row was held out when.
        labels: Gold class indices (N), zeros and ones (N, C), or numbers (N).
        logits_NC: float32, in the order of the training rows.
        seconds: Training of all fold models.
        problem_type: What the labels are.
    """

    folds: Folds
    labels: NDArray[Any]
    logits_NC: NDArray[np.float32]
    seconds: float
    problem_type: ProblemType = SINGLE_LABEL

    @cached_property
    def shares_NC(self) -> NDArray[np.float64]:
        """Probabilities without a temperature, since each fold's model would have one of its own; not of numbers."""
        return probabilities(self.logits_NC, problem_type=self.problem_type)

    @cached_property
    def label_errors(self) -> LabelErrors | LabelSetErrors | None:
        """The training labels that look wrong; None for numbers."""
        if self.problem_type == REGRESSION:
            return None
        find = find_label_set_errors if self.problem_type == MULTI_LABEL else find_label_errors
        return find(self.shares_NC, self.labels, left_out_N=self.folds.unlearnt_N)

    def scores(self) -> dict[str, Any]:
        """For the report: mean and standard deviation (n - 1) over folds, all rows pooled, each fold, label errors."""
        per_fold = []
        for fold in range(self.folds.count):
            held_N = self.folds.fold_N == fold
            per_fold.append(self._scores(held_N))
        known = [name for name in per_fold[0] if all(name in found for found in per_fold)]
        spreads = {name: mean_and_spread([found[name] for found in per_fold]) for name in known}
        rows, errors = np.bincount(self.folds.fold_N).tolist(), self.label_errors
        return {
            "folds": self.folds.count,
            "mean": {name: spread.mean for name, spread in spreads.items()},
            "deviation": {name: spread.deviation for name, spread in spreads.items()},
            "pooled": self.pooled(),
            "per_fold": [{"rows": count, **found} for count, found in zip(rows, per_fold, strict=True)],
            **({} if errors is None else {"label_errors": {"rows": len(errors), "estimated_share": errors.share}}),
            "seconds": self.seconds,
            "warnings": list(self.folds.warnings),
        }

    def pooled(self) -> dict[str, float]:
        """Scores of all rows together."""
        return self._scores(slice(None))

    def _scores(self, rows: NDArray[np.bool_] | slice) -> dict[str, float]:
        return task_metrics(self.problem_type, self.logits_NC[rows], self.labels[rows])


def predict_out_of_fold(
    folds: Folds,
    labels: NDArray[Any],
    split: Split,
    train: Callable[[str, Split], TrainedArm],
    problem_type: ProblemType = SINGLE_LABEL,
) -> OutOfFold:
    """Train a model without each fold in turn and let it predict that fold.

    Args:
        folds: Of the training rows.
        labels: Their labels, as in `OutOfFold`.
        split: Tokenises the whole task; its training rows must be those of the folds, in their order.
        train: From a name and the splits of one fold to the trained arm.
        problem_type: What the labels are.

    Raises:
        DataError: The training rows are not those of the folds.
    """
    found: list[tuple[NDArray[np.bool_], NDArray[np.float32]]] = []
    seconds = 0.0
    for fold in range(folds.count):
        held_N = folds.fold_N == fold
        arm = train(f"fold-{fold + 1}-of-{folds.count}", _without(held_N, labels, split))
        found.append((held_N, arm.test_logits))
        seconds += arm.train_seconds
        metric = BEST[problem_type]
        score = task_metrics(problem_type, arm.test_logits, labels[held_N])[metric]
        logger.info("fold %d of %d: %s %.4f on %d rows", fold + 1, folds.count, metric, score, held_N.sum())
    logits_NC = np.empty((len(labels), found[0][1].shape[1]), dtype=np.float32)
    for held_N, logits in found:
        logits_NC[held_N] = logits
    return OutOfFold(folds, labels, logits_NC, seconds, problem_type)


def _without(held_N: NDArray[np.bool_], labels: NDArray[Any], split: Split) -> Split:
    """The task with the held-out rows taken from the training rows and put in the place of the test rows."""

    def part(tokenizer: PreTrainedTokenizerBase) -> Splits:
        whole = split(tokenizer)
        if not np.array_equal(whole.train.columns["labels"], labels):
            raise DataError("The rows to train on are not the training rows of the run: folds cannot be told apart.")
        return Splits(whole.train.select(~held_N), whole.validation, whole.train.select(held_N))

    return part
