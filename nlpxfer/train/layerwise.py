"""Training that depends on how deep a weight lies: top layers only, decaying rates, gradual unfreezing, and L2-SP.

A model of L blocks has the depths 0 (embeddings), 1 to L (its blocks), and L + 1 (what comes after them: final norm,
pooler, head). A block that was added to compute the mean (`nlpxfer.checkpoint.pooling`) counts as a pooler.

Sources: gradual unfreezing and rates per layer, Howard and Ruder 2018, arXiv:1801.06146 (sections 3.2 and 3.3);
penalty on the way from the start (L2-SP), Li, Grandvalet and Davoine 2018, arXiv:1802.01483 (equation 2).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from nlpxfer.checkpoint.head import head_of
from nlpxfer.checkpoint.pooling import has_mean_layer
from nlpxfer.checkpoint.student import model_layers
from nlpxfer.errors import ConfigError
from nlpxfer.methods.states import STUDENT_STATES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from nlpxfer.config import RunOptions

DEPTH = "depth"
"""Key of an optimizer's parameter group: the depth of its weights."""


def is_layerwise(options: RunOptions) -> bool:
    """Whether weights of different depths are trained differently."""
    return options.layer_decay != 1 or options.gradual_unfreezing > 0


def parameter_depths(model: PreTrainedModel) -> dict[str, int]:
    """Depth of each parameter by name: 0, the number of its block from 1, or the number of blocks plus 1.

    Raises:
        CheckpointError: The model has no list of blocks (ALBERT repeats a single one).
    """
    prefix, blocks = model_layers(model)
    top = len(blocks) + 1 - has_mean_layer(model)
    block = re.compile(re.escape(prefix) + r"\.(\d+)\.")
    depths = {}
    for name, _ in model.named_parameters():
        if found := block.match(name):
            depths[name] = min(int(found[1]) + 1, top)
        else:
            depths[name] = 0 if re.search(r"embed|\bwte\b|\bwpe\b", name) else top
    return depths


def check_depth(model: PreTrainedModel, count: int) -> int:
    """The number of blocks of a model that has at least `count`. Raises: see `freeze_below_`."""
    total = max(parameter_depths(model).values()) - 1
    if count > total:
        raise ConfigError(
            f"num_trained_layers: {count} is more than the {total} layers that {type(model).__name__} has here.",
            fix=f"--num_trained_layers {total}",
        )
    return total


def freeze_below_(model: PreTrainedModel, count: int) -> None:
    """Leave only the top `count` blocks, and what comes after them, to be trained; with 0 the mean stays a mean.

    Raises:
        ConfigError: The model has fewer blocks.
        CheckpointError: See `parameter_depths`.
    """
    depths = parameter_depths(model)
    total = check_depth(model, count)
    blocks = f"{model_layers(model)[0]}."
    for name, parameter in model.named_parameters():
        if depths[name] <= total - count or (count == 0 and name.startswith(blocks)):
            parameter.requires_grad_(False)


def split_groups_by_depth_(
    optimizer: torch.optim.Optimizer, named: Iterable[tuple[str, Tensor]], depths: Mapping[str, int], *, decay: float
) -> None:
    """Split the parameter groups of an optimizer that has not stepped yet; the rate falls by `decay` per layer down.

    Args:
        optimizer: Its groups keep their settings.
        named: The model's parameters by name.
        depths: See `parameter_depths`.
        decay: Rate of a layer over that of the layer above it; the head has the whole rate.
    """
    top = max(depths.values())
    depth_of = {id(parameter): depths[name] for name, parameter in named}
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        parts: dict[int, list[Tensor]] = {}
        for parameter in group["params"]:
            parts.setdefault(depth_of[id(parameter)], []).append(parameter)
        for depth in sorted(parts, reverse=True):
            rate = group["lr"] * decay ** (top - depth)
            groups.append({**group, "params": parts[depth], "lr": rate, DEPTH: depth})
    optimizer.param_groups[:] = groups


def unfreezing_step(depth: int, top: int, steps: float) -> float:
    """The step at which weights of a depth begin to learn: the head at 0, the embeddings at `steps`.

    >>> [unfreezing_step(depth, top=3, steps=30) for depth in (3, 2, 1, 0)]
    [0.0, 10.0, 20.0, 30.0]
    """
    return steps * (top - depth) / top


def unfreeze_gradually_(scheduler: LRScheduler, *, top: int, steps: float) -> None:
    """Keep the rate of each parameter group at 0 until its depth's turn has come.

    Weights at rate 0 get gradients but do not move, weight decay included. So the work per step stays the same from
    the first step on, and with it what several processes exchange.

    Args:
        scheduler: Of an optimizer whose groups were split by `split_groups_by_depth_`; at its first step.
        top: Depth of the head.
        steps: Step at which the embeddings begin to learn.

    Raises:
        ConfigError: The scheduler is none that multiplies rates by a function of the step.
    """
    if not isinstance(scheduler, LambdaLR):
        raise ConfigError(f"gradual_unfreezing: does not work with the scheduler {type(scheduler).__name__}.")
    for index, group in enumerate(scheduler.optimizer.param_groups):
        begin = unfreezing_step(group[DEPTH], top, steps)
        scheduler.lr_lambdas[index] = _from(begin, scheduler.lr_lambdas[index])
        if begin > 0:
            group["lr"] = 0.0
    scheduler._last_lr = [group["lr"] for group in scheduler.optimizer.param_groups]


def _from(begin: float, share: Callable[[int], float]) -> Callable[[int], float]:
    return lambda step: share(step) if step >= begin else 0.0


class StartPenalty:
    """L2-SP: a/2 |w - w0|^2 + b/2 |w_head|^2, for weights w that started at w0 and a head that is new.

    Args:
        model: As it is before its first step; its trainable weights are copied.
        weight: a, at least 0.
        head_weight: b, at least 0, for the final layer and the one before it.
    """

    def __init__(self, model: PreTrainedModel, *, weight: float, head_weight: float) -> None:
        self.weight, self.head_weight = weight, head_weight
        parts = head_of(model)
        heads = {id(p) for layer in (parts.final, *parts.transforms.values()) for p in layer.parameters()}
        own = model.named_parameters()  # projections of a student start anywhere: they have no way from there
        named = [(name, p) for name, p in own if p.requires_grad and not name.startswith(f"{STUDENT_STATES}.")]
        self.heads = {name for name, p in named if id(p) in heads}
        self.start = {name: p.detach().clone() for name, p in named if name not in self.heads}

    @torch.no_grad()
    def add_gradient_(self, model: PreTrainedModel) -> None:
        """Add the penalty's gradient to that of a whole optimizer step."""
        for name, parameter in model.named_parameters():
            if parameter.grad is None:
                continue
            if name in self.heads:
                parameter.grad.add_(parameter, alpha=self.head_weight)
            elif name in self.start:
                parameter.grad.add_(parameter - self.start[name], alpha=self.weight)
