"""Knowledge distillation: a student learns the softened predictions of a teacher, and the labels where there are any.

The teacher's logits come with the batch (`teacher_logits`, computed once and cached), so the teacher is no part of the
student's module tree and is never trained, saved or put into train mode.

Source: Hinton, Vinyals and Dean 2015, arXiv:1503.02531.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from nlpxfer.errors import ConfigError
from nlpxfer.losses.classification import gold_loss, labelled, teacher_loss
from nlpxfer.methods.base import Batch, LossTerm, Method, row_logits, smoothing_faults
from nlpxfer.problem import SINGLE_LABEL, ProblemType


@final
@dataclass(frozen=True, kw_only=True)
class Distill(Method):
    """(1 - kd_weight) * label loss + kd_weight * T^2 * KL(teacher || student).

    In a multi-label task the divergence is that of each label's yes or no; in a regression both losses are half the
    squared error.

    The label loss is a mean over the labelled rows of a step, the distillation loss one over all its rows.

    Args:
        problem_type: What labels and logits are.
        temperature: T, above 0 and finite; nothing in a regression.
        kd_weight: Share of the distillation term, in [0, 1].
        label_smoothing: Of the label loss, in [0, 1).

    Raises:
        ConfigError: A value is outside its range; all such values are listed.
    """

    problem_type: ProblemType = SINGLE_LABEL
    temperature: float = 2.0
    kd_weight: float = 0.9
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        faults = []
        if not 0 < self.temperature < math.inf:
            faults.append(f"temperature: {self.temperature} is not above 0 and finite")
        if not 0 <= self.kd_weight <= 1:
            why = "it is the share of the distillation loss"
            faults.append(f"kd_weight: {self.kd_weight} is not between 0 and 1; {why}")
        faults += smoothing_faults(self.label_smoothing, self.problem_type)
        if faults:
            raise ConfigError.from_faults(faults)

    def loss_terms(self, model: nn.Module, batch: Batch) -> dict[str, LossTerm]:
        """Label loss of the labelled rows and distillation loss of all rows."""
        logits_BC = row_logits(model, batch)
        label_B = gold_loss(self.problem_type, logits_BC, batch["labels"], label_smoothing=self.label_smoothing)
        taught_BC = batch["teacher_logits"]
        soft_B = teacher_loss(self.problem_type, logits_BC, taught_BC, temperature=self.temperature)
        return {"label": LossTerm(label_B, 1 - self.kd_weight), "soft_target": LossTerm(soft_B, self.kd_weight)}

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Labelled rows, and all rows."""
        labels_B = batch["labels"]
        return {
            "label": labelled(labels_B).sum(),
            "soft_target": torch.tensor(len(labels_B), device=labels_B.device),
        }
