"""A student that teaches itself: the moving average of its weights gives the targets (mean teacher).

After each step a <- d a + (1 - d) w, with d the smaller of `decay` and 1 - 1 / (t + 1), so that the first steps do not
hang on to the start. In each batch the average, in eval mode and without gradients, gives the logits that the student
is drawn to. Of labelled and unlabelled rows alike.

The average is what validation scores and what the run ends with, as in the paper: it is the more accurate of the two.
The Trainer owns it, chosen over the method, because it lives by steps, checkpoints and best weights, which the Trainer
knows, and because a method then sees `teacher_logits` in its batch as from any other teacher.

Source: Tarvainen and Valpola 2017, arXiv:1703.01780, section 2; the growing decay is that of the authors' code.

Shapes: B batch rows, C classes.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor, nn

from nlpxfer.errors import ResumeError
from nlpxfer.methods.base import Batch, row_logits
from nlpxfer.train.launch import is_main_process

if TYPE_CHECKING:
    from transformers import PreTrainedModel

AVERAGE_WEIGHTS: Final = "average.safetensors"


class MovingAverage:
    """The moving average of the weights of a model that trains.

    Args:
        model: The model as it is before its first step, not yet wrapped; it is copied.
        decay: d, in [0, 1).
        autocast: Type that matrix products compute in, as the model's; None: float32.
    """

    def __init__(self, model: PreTrainedModel, *, decay: float, autocast: torch.dtype | None) -> None:
        self.decay, self.autocast = decay, autocast
        self.trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        self.model = copy.deepcopy(model)
        self.model.requires_grad_(False)
        self.model.eval()  # type: ignore[no-untyped-call]

    def decay_at(self, step: int) -> float:
        """D of the update after step `step`, counted from 1."""
        return min(self.decay, 1 - 1 / (step + 1))

    @torch.no_grad()
    def update_(self, model: nn.Module, step: int) -> None:
        """Take in the weights of `model` after step `step`."""
        now, mean = dict(model.named_parameters()), dict(self.model.named_parameters())
        for name in self.trained:
            mean[name].lerp_(now[name], 1 - self.decay_at(step))

    def logits(self, batch: Batch) -> Tensor:
        """What the average answers to a batch; (B, C), float32."""
        device = batch["input_ids"].device.type
        with torch.no_grad(), torch.autocast(device, dtype=self.autocast, enabled=self.autocast is not None):
            return row_logits(self.model, batch).float()

    @torch.no_grad()
    def copy_to_(self, model: nn.Module) -> None:
        """Give `model` the weights of the average."""
        now, mean = dict(model.named_parameters()), dict(self.model.named_parameters())
        for name in self.trained:
            now[name].copy_(mean[name])

    def save(self, folder: Path) -> None:
        """Write the averaged weights into a checkpoint."""
        from safetensors.torch import save_file

        if is_main_process():
            mean = dict(self.model.named_parameters())
            save_file({name: mean[name].contiguous() for name in self.trained}, folder / AVERAGE_WEIGHTS)

    @torch.no_grad()
    def load_(self, folder: Path) -> None:
        """Read back what `save` wrote.

        Raises:
            ResumeError: The file is not there, or holds other weights than those that are averaged.
        """
        from safetensors.torch import load_file

        if not (folder / AVERAGE_WEIGHTS).is_file():
            raise ResumeError(f"{folder.name} holds no moving average.", fix="start anew: --overwrite")
        stored = load_file(folder / AVERAGE_WEIGHTS)
        if stored.keys() != set(self.trained):
            raise ResumeError(f"{folder.name} holds the average of other weights.", fix="start anew: --overwrite")
        mean = dict(self.model.named_parameters())
        for name in self.trained:
            mean[name].copy_(stored[name])
