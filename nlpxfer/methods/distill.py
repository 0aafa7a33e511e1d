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

    The label loss is a mean over the labelled rows of a step, the distillation loss one over the rows that the teacher
    says something about (`teacher_logits` is not NaN). `teacher_weights` multiply the distillation loss of each row;
    the sum is divided by the number of these rows, not by the sum of the weights: less weight for some rows then
    means less teaching in all, and does not make the other rows count more.

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
        """Label loss of the labelled rows and distillation loss of the taught ones."""
        logits_BC = row_logits(model, batch)
        label_B = gold_loss(self.problem_type, logits_BC, batch["labels"], label_smoothing=self.label_smoothing)
        known_B, taught_BC = taught_rows(batch)
        soft_B = teacher_loss(self.problem_type, logits_BC, taught_BC, temperature=self.temperature) * known_B
        return {"label": LossTerm(label_B, 1 - self.kd_weight), "soft_target": LossTerm(soft_B, self.kd_weight)}

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Labelled rows, and taught rows."""
        return {"label": labelled(batch["labels"]).sum(), "soft_target": labelled(batch["teacher_logits"]).sum()}


def taught_rows(batch: Batch) -> tuple[Tensor, Tensor]:
    """How much of a teacher's loss each row counts, shape B, and the teacher's logits, 0 where it says nothing.

    Args:
        batch: Holds `teacher_logits` (B, C), NaN in rows that the teacher says nothing about, and perhaps
            `teacher_weights` (B).
    """
    teacher_BC = batch["teacher_logits"]
    known_B = labelled(teacher_BC)
    weights_B = known_B.to(teacher_BC.dtype) * batch.get("teacher_weights", torch.ones_like(teacher_BC[:, 0]))
    return weights_B, torch.where(known_B[:, None], teacher_BC, 0.0)
