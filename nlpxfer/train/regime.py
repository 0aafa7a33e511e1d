"""How a model computes while it trains: its attention kernel and its dropout; what it is stays the same."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ATTENTION_DROPOUTS = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")


def set_dropout_(model: nn.Module, share: float) -> None:
    """Set every dropout of a model, in layers and in attention, to `share`; its config stays as it was.

    Args:
        model: Any transformers model.
        share: Probability that a value is dropped, in [0, 1).
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = share
        for name in _ATTENTION_DROPOUTS:
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, share)


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
