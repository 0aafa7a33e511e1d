"""What a transfer method gives to the one Trainer: its loss, row by row.

A method returns losses per row and how many rows of a batch each loss counts; the Trainer divides by the count over
the whole optimizer step, all micro-batches and processes together. So the same rows give the same gradient however
they are split, also where only some rows have a label. (Batch means, the usual contract, cannot do that.)

Shapes: B batch rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

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

    def check(self, options: RunOptions) -> None:  # noqa: B027 - most methods follow all options
        """Raise ConfigError for options of the run that this method cannot follow."""

    def adapt(self, model: PreTrainedModel, fresh: Sequence[str]) -> PreTrainedModel:
        """The model to train, made from a plain classifier; by default that itself.

        Args:
            model: The classifier, which may be changed in place.
            fresh: Names of its newly initialised parameters, which must learn.
        """
        return model

    @abstractmethod
    def loss_terms(self, model: nn.Module, batch: Batch) -> dict[str, LossTerm]:
        """The terms of the loss by name; the same names in every batch."""

    @abstractmethod
    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """How many rows each term counts in this batch: scalar int64 tensors, keyed as `loss_terms`."""


def model_inputs(batch: Batch) -> dict[str, Tensor]:
    """What of a batch goes to the model; never the labels, so that no model computes a loss of its own."""
    return {name: batch[name] for name in MODEL_INPUTS if name in batch}
