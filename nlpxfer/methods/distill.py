"""Knowledge distillation: a student learns the softened predictions of a teacher, and the labels where there are any.

The teacher's logits come with the batch (`teacher_logits`, computed once and cached), so the teacher is no part of the
student's module tree and is never trained, saved or put into train mode. Terms on what the teacher computes before its
logits are in `nlpxfer.methods.states`. With `ema_decay` the teacher is the moving average of the student itself, and
its logits are computed in each step (`nlpxfer.train.moving_average`).

Sources: Hinton, Vinyals and Dean 2015, arXiv:1503.02531; Kim et al. 2021, arXiv:2105.08919 (squared error);
Tarvainen and Valpola 2017, arXiv:1703.01780 (moving average).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn

from nlpxfer.checkpoint.load import label_names
from nlpxfer.errors import ConfigError, LabelError
from nlpxfer.losses.classification import KdLoss, gold_loss, labelled, teacher_loss
from nlpxfer.methods.base import Batch, LossTerm, Method, is_sharded, row_logits, smoothing_faults
from nlpxfer.methods.states import StatesGuide, detach_states_, states_of, states_terms
from nlpxfer.problem import REGRESSION, SINGLE_LABEL, ProblemType

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from nlpxfer.config import RunOptions


@final
@dataclass(frozen=True, kw_only=True)
class Distill(Method):
    """(1 - kd_weight) * label loss + kd_weight * T^2 * KL(teacher || student) + the terms on states.

    In a multi-label task the divergence is that of each label's yes or no; in a regression both losses are half the
    squared error.

    The label loss is a mean over the labelled rows of a step, the distillation loss one over the rows that the teacher
    says something about (`teacher_logits` is not NaN), the losses on states over all rows. `teacher_weights` multiply
    the distillation loss of each row; the sum is divided by the number of these rows, not by the sum of the weights:
    less weight for some rows then means less teaching in all, and does not make the other rows count more.

    Args:
        problem_type: What labels and logits are.
        temperature: T, above 0 and finite; nothing in a regression or with "mse".
        kd_weight: Share of the distillation term, in [0, 1].
        label_smoothing: Of the label loss, in [0, 1).
        kd_loss: "kl" as above, or "mse" for the squared error of the logits; a regression has one loss only.
        teacher_labels: Names of the columns of `teacher_logits`; empty if they are not known.
        states: Teacher and plan of the terms on states; None for none.
        ema_decay: Decay of the moving average that teaches the student in place of another model, in [0, 1).

    Raises:
        ConfigError: A value is outside its range, or two do not go together; all such values are listed.
    """

    has_preflight = True

    problem_type: ProblemType = SINGLE_LABEL
    temperature: float = 2.0
    kd_weight: float = 0.9
    label_smoothing: float = 0.0
    kd_loss: KdLoss = "kl"
    teacher_labels: tuple[str, ...] = ()
    states: StatesGuide | None = None
    ema_decay: float | None = None

    def __post_init__(self) -> None:
        faults = []
        if not 0 < self.temperature < math.inf:
            faults.append(f"temperature: {self.temperature} is not above 0 and finite")
        if not 0 <= self.kd_weight <= 1:
            why = "it is the share of the distillation loss"
            faults.append(f"kd_weight: {self.kd_weight} is not between 0 and 1; {why}")
        if self.kd_loss not in ("kl", "mse"):
            faults.append(f"kd_loss: {self.kd_loss!r} is not one of kl, mse")
        if self.kd_loss == "mse" and self.problem_type == REGRESSION:
            faults.append("kd_loss: means nothing for a regression, whose loss is the squared error")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            faults.append(f"ema_decay: {self.ema_decay} is not in [0, 1)")
        if self.ema_decay is not None and self.states is not None:
            faults.append("states: the moving average of the student has nothing to teach about its states")
        faults += smoothing_faults(self.label_smoothing, self.problem_type)
        if faults:
            raise ConfigError.from_faults(faults)

    @property
    def compares_sizes(self) -> bool:  # type: ignore[override]
        """Whether logits are compared as they are."""
        return self.kd_loss == "mse"

    def check(self, options: RunOptions) -> None:
        """Refuse what goes round the hooks that states are read by, or shards the weights that are averaged."""
        sharded = is_sharded(options)
        faults = []
        if self.ema_decay is not None and sharded:
            faults.append("self_distillation: does not work with FSDP, which shards the weights to be averaged")
        if self.states is not None:
            losses = "hidden_weight, relation_weight and similarity_weight"
            asked = {
                "fsdp": sharded,
                "activation_checkpointing": options.activation_checkpointing or options.gradient_checkpointing,
                "torch_compile": options.torch_compile,
            }
            faults += [f"{name}: does not go together with {losses}" for name, on in asked.items() if on]
        if faults:
            raise ConfigError.from_faults(faults)

    def adapt(self, model: PreTrainedModel, fresh: Sequence[str]) -> PreTrainedModel:
        """The student; with terms on states it gets the projections that learn with it."""
        if self.states is not None:
            self.states.attach_(model)
        return model

    def release_(self, model: PreTrainedModel) -> None:
        """Take the projections off: what is saved is a plain classifier."""
        detach_states_(model)

    def describe(self, model: PreTrainedModel) -> dict[str, Any]:
        """Temperature, label names and the layers that are compared.

        Raises:
            LabelError: The teacher's columns have other names, or another order, than the student's.
        """
        facts: dict[str, Any] = {"kd_loss": self.kd_loss}
        if self.kd_loss == "kl" and self.problem_type != REGRESSION:
            facts["temperature"] = self.temperature
        if self.teacher_labels:
            names = label_names(model)
            if names != self.teacher_labels:
                raise LabelError(
                    f"The teacher's columns are {', '.join(self.teacher_labels)}, the student's {', '.join(names)}.",
                    why="their labels stand in another order, so each would be taught as another",
                )
            facts["labels"] = list(names)
        states = states_of(model)
        return facts | ({} if states is None else states.describe())

    def loss_terms(self, model: nn.Module, batch: Batch) -> dict[str, LossTerm]:
        """Label loss of the labelled rows, distillation loss of the taught ones, and the terms on states."""
        terms: dict[str, LossTerm] = {}
        if self.states is None:
            logits_BC = row_logits(model, batch)
        else:
            logits_BC, terms = states_terms(self.states, model, batch)
        label_B = gold_loss(self.problem_type, logits_BC, batch["labels"], label_smoothing=self.label_smoothing)
        known_B, taught_BC = taught_rows(batch)
        soft_B = known_B * teacher_loss(
            self.problem_type, logits_BC, taught_BC, temperature=self.temperature, kd_loss=self.kd_loss
        )
        shared = {"label": LossTerm(label_B, 1 - self.kd_weight), "soft_target": LossTerm(soft_B, self.kd_weight)}
        return shared | terms

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Labelled rows, taught rows (with a moving average as teacher: all), and all rows for the terms on states."""
        labels_B = batch["labels"]
        rows = torch.tensor(len(labels_B), device=labels_B.device)
        taught = rows if self.ema_decay is not None else labelled(batch["teacher_logits"]).sum()
        known = {"label": labelled(labels_B).sum(), "soft_target": taught}
        if self.states is None:
            return known
        weights = vars(self.states.plan)
        return known | {name: rows for name in ("hidden", "relation", "similarity") if weights[f"{name}_weight"]}


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
