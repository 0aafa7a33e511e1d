"""What a transfer method gives to the one Trainer: its loss, row by row.

A method returns losses per row and how many rows of a batch each loss counts; the Trainer divides by the count over
the whole optimizer step, all micro-batches and processes together. So the same rows give the same gradient however
they are split, also where only some rows have a label. (Batch means, the usual contract, cannot do that.)

A long row may be several windows, each a row of the model's inputs. Only `row_logits` and `mean_by_row` know that.

Shapes: B batch rows, W windows of all of them (W = B where no row has several), C classes, D numbers per window.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nlpxfer.data.tokenise import WINDOWS_PER_ROW
from nlpxfer.problem import REGRESSION, ProblemType

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from nlpxfer.config import RunOptions

Batch = Mapping[str, Tensor]

MODEL_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
"""Names in a batch that go to the model; all else is for the loss."""


@dataclass(frozen=True)
class LossTerm:
    """One weighted part of the loss.

    Attributes:
        rows_B: Loss of each row, in nats; 0 where the row does not count.
        weight: Share of this term in the sum.
    """

    rows_B: Tensor
    weight: float


class Method(ABC):
    """A transfer method: what is minimised, given a model and a batch, and which weights learn."""

    adapter: str = ""
    """Kind of adapter that learns in place of the weights; empty for none."""
    ema_decay: float | None = None
    """Decay of a moving average of the weights that teaches the model (`teacher_logits` of each batch); None: none."""
    compares_sizes: bool = False
    """Whether the loss depends on the size of the logits, so that a head must not start small."""
    has_preflight: bool = False
    """Whether the terms of the loss are looked at before the first step."""

    def check(self, options: RunOptions) -> None:  # noqa: B027 - most methods follow all options
        """Raise ConfigError for options of the run that this method cannot follow."""

    def adapt(self, model: PreTrainedModel, fresh: Sequence[str]) -> PreTrainedModel:
        """The model to train, made from a plain classifier; by default that itself.

        Args:
            model: The classifier, which may be changed in place.
            fresh: Names of its newly initialised parameters, which must learn.
        """
        return model

    def release_(self, model: PreTrainedModel) -> None:  # noqa: B027 - most methods add nothing
        """Take off what `adapt` gave the model for the time of training alone."""

    def describe(self, model: PreTrainedModel) -> dict[str, Any]:
        """Facts about the loss for the report.

        Raises:
            LabelError: The outputs of the model are not those that the loss takes them for.
        """
        return {}

    @abstractmethod
    def loss_terms(self, model: nn.Module, batch: Batch) -> dict[str, LossTerm]:
        """The terms of the loss by name; the same names in every batch."""

    @abstractmethod
    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """How many rows each term counts in this batch: scalar int64 tensors, keyed as `loss_terms`."""


def is_sharded(options: RunOptions) -> bool:
    """Whether FSDP shards the weights, by the options or by the launcher's configuration."""
    return bool(options.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true")


def smoothing_faults(label_smoothing: float, problem_type: ProblemType) -> list[str]:
    """What is wrong with a share of label smoothing, one sentence each."""
    faults = []
    if not 0 <= label_smoothing < 1:
        faults.append(f"label_smoothing_factor: {label_smoothing} is not in [0, 1)")
    if label_smoothing and problem_type == REGRESSION:
        faults.append("label_smoothing_factor: means nothing for a regression")
    return faults


def model_inputs(batch: Batch) -> dict[str, Tensor]:
    """What of a batch goes to the model; never the labels, so that no model computes a loss of its own."""
    return {name: batch[name] for name in MODEL_INPUTS if name in batch}


def row_logits(model: nn.Module, batch: Batch) -> Tensor:
    """The class logits of each row, the mean over its windows; shape (B, C).

    Every method reads logits through this, so that all of them work on long texts, with a gradient through the mean.
    """
    logits_WC: Tensor = model(**model_inputs(batch)).logits
    windows_B = batch.get(WINDOWS_PER_ROW)
    return logits_WC if windows_B is None else mean_by_row(logits_WC, windows_B)


def mean_by_row(values_WD: Tensor, windows_B: Tensor) -> Tensor:
    """Means over the windows of each row; shape (B, D).

    Args:
        values_WD: Numbers of all windows, those of a row one after the other.
        windows_B: Windows of each row, at least one; W in all.

    >>> mean_by_row(torch.tensor([[1.0], [3.0], [5.0]]), torch.tensor([2, 1]))
    tensor([[2.],
            [5.]])
    """
    rows = torch.arange(len(windows_B), device=values_WD.device)
    row_of_window_W = rows.repeat_interleave(windows_B, output_size=len(values_WD))
    sums_BD = values_WD.new_zeros(len(windows_B), *values_WD.shape[1:]).index_add(0, row_of_window_W, values_WD)
    return sums_BD / windows_B[:, None]


def twice(batch: Batch) -> dict[str, Tensor]:
    """What the model reads of a batch, two times over: 2B rows, which get their own dropout masks in one pass.

    One pass rather than two, because a model in DDP or FSDP is made for one pass per backward pass.
    """
    return {name: torch.cat([batch[name]] * 2) for name in (*MODEL_INPUTS, WINDOWS_PER_ROW) if name in batch}
