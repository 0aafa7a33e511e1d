"""How a model computes while it trains: its attention kernel, its dropout, its head's precision; what it is stays."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from nlpxfer.checkpoint.head import head_of
from nlpxfer.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from nlpxfer.checkpoint.load import Checkpoint
    from nlpxfer.config import RunOptions
    from nlpxfer.config.label_loss import LabelLossOptions

_ATTENTION_DROPOUTS = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")


def set_dropout_(model: nn.Module, share: float) -> None:
    """Set every dropout of a model, in layers and in attention, to `share`; its config stays as it was.

    Args:
        model: Any transformers model.
        share: Probability that a value is dropped, in [0, 1).
    """
    for module, name in _dropouts(model):
        setattr(module, name, share)


def trained_dropout(model: nn.Module, share: float | None) -> float:
    """The largest dropout with which a model trains: that of `set_dropout_`, or with None its own.

    0 where it has no dropout to set.
    """
    own = [float(getattr(module, name)) for module, name in _dropouts(model)]
    return max(own, default=0.0) if share is None else share * bool(own)


def check_r_drop(start: Checkpoint, plan: LabelLossOptions, options: RunOptions) -> None:
    """See that two passes of R-Drop differ, at least with some of the values that are searched.

    Args:
        start: What is trained.
        plan: Has the weight of R-Drop; 0 for none.
        options: Have the dropout, and the ranges of both.

    Raises:
        ConfigError: The model trains without dropout.
    """
    weight, share = max(options.ends_of("r_drop_weight", plan.r_drop_weight)), options.dropout
    if weight and not any(trained_dropout(start.model, end) for end in options.ends_of("dropout", share)):
        raise ConfigError(
            f"r_drop_weight: {weight:g} does nothing where {start.name} trains without dropout.",
            why="its own dropout is 0" if share is None else "--dropout is 0 by default",
            fix="--dropout 0.1",
        )


def _dropouts(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Each dropout of a model: the module, and the name of its share there."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            yield module, "p"
        for name in _ATTENTION_DROPOUTS:
            if isinstance(getattr(module, name, None), float):
                yield module, name


@contextlib.contextmanager
def training_attention(model: PreTrainedModel, *, bf16: bool, device: torch.device) -> Iterator[None]:
    """Attention as plain matrix products while training in bfloat16 on a CPU.

    There the backward pass of torch's fused kernel takes longer than all matrix products of a small encoder together
    (24 ms of 65 ms a layer at 32 rows of 54 tokens); the plain form computes the same 1.5 times as fast. Elsewhere,
    and for models that do not use the fused kernel, nothing changes.
    """
    before = getattr(model.config, "_attn_implementation", None)
    if not (bf16 and device.type == "cpu" and before == "sdpa"):
        yield
        return
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextlib.contextmanager
def float32_head(model: PreTrainedModel, *, enabled: bool = True) -> Iterator[None]:
    """Under autocast, compute the linear layers of the classification head in the precision of their weights.

    A head that standardises a state which hardly varies (the first token of a lower layer: a deviation of 0.0006)
    multiplies by hundreds, and bfloat16 has eight bits: only rounding would be left. The head costs next to nothing.

    Args:
        model: A sequence classifier.
        enabled: False changes nothing.
    """
    if not enabled:
        yield
        return
    parts = head_of(model)
    before = [(layer, vars(layer).get("forward")) for layer in (*parts.transforms.values(), parts.final)]
    for layer, _ in before:
        layer.forward = _without_autocast(layer)  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        for layer, forward in before:
            vars(layer).pop("forward")
            if forward is not None:  # the context stands inside another one
                vars(layer)["forward"] = forward


def _without_autocast(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    forward = layer.forward

    def in_own_precision(states: Tensor) -> Tensor:
        with torch.autocast(states.device.type, enabled=False):
            return forward(states.to(layer.weight.dtype))

    return in_own_precision
