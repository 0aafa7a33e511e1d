"""Fine-tuning: all weights of a pretrained model learn the task's labels.

Source: Howard and Ruder 2018, arXiv:1801.06146; start from a linear probe: Kumar et al. 2022, arXiv:2202.10054.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn

from nlpxfer.config.label_loss import LabelLossOptions
from nlpxfer.errors import ConfigError
from nlpxfer.losses.classification import agreement_loss, gold_loss, labelled
from nlpxfer.methods.base import Batch, LossTerm, Method, row_logits, smoothing_faults, twice
from nlpxfer.problem import MULTI_LABEL, REGRESSION, SINGLE_LABEL, ProblemType

Array = np.ndarray[Any, Any]


@final
@dataclass(frozen=True, kw_only=True)
class FineTune(Method):
    """The loss with the gold labels, and what helps where some classes are rare.

    Args:
        problem_type: Cross-entropy, binary cross-entropy of each label, or half the squared error.
        label_smoothing: Share of the target spread evenly over the classes, in [0, 1).
        focal_gamma: Rows that are right already count less, by (1 - p)^gamma; at least 0.
        class_weights: Weight of the rows of each class, in schema order; empty for none. In a multi-label task a row
            that does not have the label keeps weight 1.
        offsets: Added to the logits of each class while training; empty for none.
        r_drop_weight: alpha of R-Drop, at least 0: each row goes through the model twice, and the two answers, which
            dropout makes differ, are drawn together: see `agreement_loss`. The offsets take no part in that.

    Raises:
        ConfigError: A value is outside its range, or means nothing for the task; all such values are listed.
    """

    problem_type: ProblemType = SINGLE_LABEL
    label_smoothing: float = 0.0
    focal_gamma: float = 0.0
    class_weights: tuple[float, ...] = ()
    offsets: tuple[float, ...] = ()
    r_drop_weight: float = 0.0

    def __post_init__(self) -> None:
        faults = smoothing_faults(self.label_smoothing, self.problem_type)
        if not 0 <= self.focal_gamma < math.inf:
            faults.append(f"focal_gamma: {self.focal_gamma} is not a finite number of at least 0")
        if not 0 <= self.r_drop_weight < math.inf:
            faults.append(f"r_drop_weight: {self.r_drop_weight} is not a finite number of at least 0")
        if not all(0 <= weight < math.inf for weight in self.class_weights):
            faults.append("class_weights: a weight is not a finite number of at least 0")
        if self.offsets and self.problem_type != SINGLE_LABEL:
            faults.append("logit_adjustment: is for tasks with one class per row")
        if self.problem_type == REGRESSION:
            asked = {
                "focal_gamma": self.focal_gamma,
                "class_weights": self.class_weights,
                "r_drop_weight": self.r_drop_weight,
            }
            faults += [f"{name}: means nothing for a regression" for name, value in asked.items() if value]
        if faults:
            raise ConfigError.from_faults(faults)

    def loss_terms(self, model: nn.Module, batch: Batch) -> dict[str, LossTerm]:
        """Label loss of each row; with R-Drop its mean over two passes, and the divergence between the two."""
        if not self.r_drop_weight:
            return {"label": LossTerm(self._label_loss(row_logits(model, batch), batch["labels"]), 1.0)}
        first_BC, second_BC = row_logits(model, twice(batch)).chunk(2)
        losses = [self._label_loss(logits_BC, batch["labels"]) for logits_BC in (first_BC, second_BC)]
        return {
            "label": LossTerm((losses[0] + losses[1]) / 2, 1.0),
            "r_drop": LossTerm(agreement_loss(self.problem_type, first_BC, second_BC), self.r_drop_weight),
        }

    def _label_loss(self, logits_BC: Tensor, labels: Tensor) -> Tensor:
        return gold_loss(
            self.problem_type,
            logits_BC,
            labels,
            label_smoothing=self.label_smoothing,
            focal_gamma=self.focal_gamma,
            class_weights_C=_tensor(self.class_weights, logits_BC),
            offsets_C=_tensor(self.offsets, logits_BC),
        )

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Rows with a label; and all rows, which R-Drop compares whether they have one or not."""
        labels = batch["labels"]
        counts = {"label": labelled(labels).sum()}
        if self.r_drop_weight:
            counts["r_drop"] = torch.tensor(len(labels), device=labels.device)
        return counts


def finetune_method(
    plan: LabelLossOptions, labels: Array, classes: int, problem_type: ProblemType, label_smoothing: float
) -> FineTune:
    """Fine-tuning with the loss that options describe, with weights and offsets counted on training labels.

    Args:
        plan: The options.
        labels: Of the training rows.
        classes: Outputs of the model.
        problem_type: What the labels are.
        label_smoothing: Share of the target spread evenly over the classes.

    Raises:
        ConfigError: An option means nothing for this kind of task.
    """
    tau, balanced = plan.logit_adjustment, plan.class_weights == "balanced"
    if tau and problem_type != SINGLE_LABEL:
        raise ConfigError("logit_adjustment: is for tasks with one class per row.")
    if plan.sampling == "balanced" and problem_type != SINGLE_LABEL:
        raise ConfigError("sampling: balanced is for tasks with one class per row.")
    if balanced and problem_type == REGRESSION:
        raise ConfigError("class_weights: means nothing for a regression.")
    weights: tuple[float, ...] = ()
    if balanced:
        several = problem_type == MULTI_LABEL
        weights = positive_weights(labels) if several else balanced_weights(labels.tolist(), classes)
    return FineTune(
        problem_type=problem_type,
        label_smoothing=label_smoothing,
        focal_gamma=plan.focal_gamma,
        class_weights=weights,
        offsets=tuple(tau * share for share in log_shares(labels.tolist(), classes)) if tau else (),
        r_drop_weight=plan.r_drop_weight,
    )


def balanced_weights(labels: Sequence[int], classes: int) -> tuple[float, ...]:
    """Weights with which all classes count alike: rows / (classes that occur * rows of the class); 1 for unseen ones.

    Their mean over the rows is 1, so the loss keeps its size.

    >>> balanced_weights([0, 0, 0, 1], classes=2)
    (0.6666666666666666, 2.0)
    """
    counts = np.bincount(np.asarray(labels), minlength=classes)
    seen = int((counts > 0).sum())
    return tuple(float(counts.sum() / (seen * count)) if count else 1.0 for count in counts)


def positive_weights(labels_NC: Array, *, most: float = 100.0) -> tuple[float, ...]:
    """Weights with which the rows that have a label count as much as those that do not, for each of C labels.

    Args:
        labels_NC: Zeros and ones.
        most: Limit of a weight; also that of a label without a row. One that all rows have is not weighted: with
            nothing to balance it against, 0 would be its weight, and it would never be learnt.

    >>> positive_weights(np.array([[1, 0, 1], [0, 0, 1], [0, 0, 1]]))
    (2.0, 100.0, 1.0)
    """
    having_C, rows = np.asarray(labels_NC).sum(axis=0), len(labels_NC)
    return tuple(most if n == 0 else 1.0 if n == rows else float(min(most, (rows - n) / n)) for n in having_C)


def log_shares(labels: Sequence[int], classes: int) -> tuple[float, ...]:
    """Log of the share of each class among the rows; an unseen class counts half a row.

    >>> [round(value, 3) for value in log_shares([0, 0, 0, 1], classes=2)]
    [-0.288, -1.386]
    """
    counts = np.maximum(np.bincount(np.asarray(labels), minlength=classes), 0.5)
    return tuple(np.log(counts / counts.sum()).tolist())


def _tensor(values: Sequence[float], like: Tensor) -> Tensor | None:
    return torch.tensor(values, device=like.device, dtype=torch.float32) if values else None
