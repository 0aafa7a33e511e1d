"""The linear layers of the transformer blocks: what an adapter wraps, and what 8 or 4 bits can hold."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, cast

from torch import Tensor, nn

from nlpxfer.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from transformers import PreTrainedModel

_IN_A_BLOCK: Final = re.compile(r"\.\d+\.")


def linear_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The linear layers of the transformer blocks by name; poolers, heads and projections of embeddings are outside.

    A layer whose weights are all 0 is left out: it is the query or key of the layer that computes a mean, which must
    stay 0 (`nlpxfer.checkpoint.pooling`), and DoRA would divide by its norm.

    Raises:
        CheckpointError: The model has no such layer.
    """
    prefix = f"{model.base_model_prefix}."
    found = {
        name: module
        for name, module in model.named_modules()
        if _is_linear(module)
        and name.startswith(prefix)
        and _IN_A_BLOCK.search(name)
        and bool(cast("Tensor", module.weight).any())
    }
    if not found:
        raise CheckpointError(f"{type(model).__name__} has no linear layers in numbered blocks.")
    return found


def other_linear_layers(model: PreTrainedModel) -> list[str]:
    """Names of all other linear layers: those of the head, of the embeddings, and of the layer that computes a mean.

    Raises:
        CheckpointError: See `linear_layers`.
    """
    inside = linear_layers(model)
    return [name for name, module in model.named_modules() if _is_linear(module) and name not in inside]


def is_transposed(module: nn.Module) -> bool:
    """Whether it is GPT-2's linear layer, whose weight is stored as (inputs, outputs), or was it before quantising."""
    return getattr(module, "source_cls", type(module)).__name__ == "Conv1D"


def names_in_blocks(names: Iterable[str]) -> list[str]:
    """Names below their block: bert.encoder.layer.3.output.dense -> output.dense."""
    return sorted({_IN_A_BLOCK.split(name)[-1] for name in names})


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_transposed(module)
