"""A checkpoint read at less than its whole depth: what its head would read above each layer, and the cut there.

Shapes: B batch, L tokens, K layers, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nlpxfer.checkpoint.head import pooled_states
from nlpxfer.checkpoint.pooling import has_mean_layer
from nlpxfer.checkpoint.student import model_layers, slice_layers
from nlpxfer.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def depth_of(model: PreTrainedModel) -> int:
    """K, the number of layers; one that `use_mean_pooling` added does not count.

    Raises:
        CheckpointError: The family has no list of layers (`model_layers`).
    """
    return len(model_layers(model)[1]) - has_mean_layer(model)


def states_by_depth(model: PreTrainedModel, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """What the head would read if the model ended after its first, second, ... last layer.

    The layers run once. For each depth the rest of the model (mean layer, last norm, choice of the token) runs again,
    with the layer of this depth giving what it gave, and those above what they get.

    Args:
        model: A sequence classifier, in eval mode.
        batch: Its inputs (B, L); labels are not needed and are left out.

    Returns:
        states_BKH; the last ones are `pooled_states(model, batch)`.

    Raises:
        CheckpointError: See `depth_of`; or the family does not call its layers as modules (SqueezeBERT).
    """
    layers = model_layers(model)[1][: depth_of(model)]
    outputs: list[Any] = []
    handles = [layer.register_forward_hook(lambda _, __, output: outputs.append(output)) for layer in layers]
    try:
        whole_BH = pooled_states(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    if len(outputs) != len(layers):
        raise CheckpointError(f"The layers of {type(model).__name__} cannot be told apart in a pass.")
    states = []
    for depth, output in enumerate(outputs[:-1], start=1):
        with _ending(layers, depth, output):
            states.append(pooled_states(model, batch))
    return torch.stack([*states, whole_BH], dim=1)


@contextmanager
def _ending(layers: nn.ModuleList, depth: int, output: Any) -> Iterator[None]:  # noqa: ANN401 - a tensor or a tuple
    """Inside, the first `depth` layers give `output`, and those above the states that they get; none computes."""

    def passed(hidden_states: torch.Tensor, *_: Any, **__: Any) -> Any:  # noqa: ANN401
        return (hidden_states, *output[1:]) if isinstance(output, tuple) else hidden_states

    own = [vars(layer).get("forward") for layer in layers]
    for index, layer in enumerate(layers):
        layer.forward = passed if index >= depth else lambda *_, **__: output
    try:
        yield
    finally:
        for layer, forward in zip(layers, own, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward


def cut_to_depth(model: PreTrainedModel, depth: int) -> PreTrainedModel:
    """A new model with the first `depth` layers, and the layer that computes the mean if there is one.

    Args:
        model: A classifier; it is not changed.
        depth: In 1..K, or counted from the last layer: -1 keeps all of them.

    Raises:
        ConfigError: There is no such layer.
        CheckpointError: See `slice_layers`.
    """
    total = depth_of(model)
    if depth == 0 or abs(depth) > total:
        fix = f"a number from 1 to {total}, or from -1 to -{total}"
        raise ConfigError(f"feature_layer: there is no layer {depth} among {total}.", fix=fix)
    kept = depth if depth > 0 else total + 1 + depth
    return slice_layers(model, [*range(kept), *range(total, total + has_mean_layer(model))])
