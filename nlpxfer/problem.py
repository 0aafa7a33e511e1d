"""The kinds of task, by transformers' names (`config.problem_type`): labels, logits and measures.

| problem type               | label of a row               | logits                  |
|----------------------------|------------------------------|-------------------------|
| single_label_classification | one name                     | softmax over the classes |
| multi_label_classification | any number of names, or none | a sigmoid per label     |
| regression                 | a number                     | one output, that number |

Ordinal labels are numbers on a scale: a regression.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal, get_args

ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]

SINGLE_LABEL: Final = "single_label_classification"
MULTI_LABEL: Final = "multi_label_classification"
REGRESSION: Final = "regression"
PROBLEM_TYPES: Final[tuple[ProblemType, ...]] = get_args(ProblemType)

METRICS: Final[Mapping[ProblemType, tuple[str, ...]]] = {
    SINGLE_LABEL: ("accuracy", "macro_f1", "loss"),
    MULTI_LABEL: ("accuracy", "micro_f1", "macro_f1", "sample_f1", "loss"),
    REGRESSION: ("mean_absolute_error", "mean_squared_error", "pearson", "spearman", "loss"),
}
"""Metrics that a split always has."""

LOWER_IS_BETTER: Final = frozenset({"loss", "mean_absolute_error", "mean_squared_error"})

BEST: Final[Mapping[ProblemType, str]] = {SINGLE_LABEL: "accuracy", MULTI_LABEL: "micro_f1", REGRESSION: "loss"}
"""The validation score that chooses among weights, if none is named."""

GAIN: Final[Mapping[ProblemType, Literal["accuracy", "sample_f1", "mean_absolute_error"]]] = {
    SINGLE_LABEL: "accuracy",
    MULTI_LABEL: "sample_f1",
    REGRESSION: "mean_absolute_error",
}
"""What two arms are compared by: a mean over rows, so that a paired bootstrap can draw them."""
