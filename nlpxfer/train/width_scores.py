"""Which entries, heads and neurons a narrower student keeps: those with the largest activations on training texts.

The average size of what a part gives is what weight subcloning and Minitron rank by; it needs forward passes alone,
and no labels. A layer's entries are divided by their mean before the layers are added up, since a residual stream
without LayerNorms in it (GPT-2) grows with depth.

Sources: Samragh et al. 2023, arXiv:2312.09299; Muralidharan et al. 2024 (Minitron), arXiv:2407.14679, section 2.2.

Shapes: B rows, L tokens, H residual entries, A entries of all heads of a layer, F neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nlpxfer.checkpoint.narrow import Kept, Widths, layout_of, most_important, widths_of
from nlpxfer.checkpoint.student import model_layers
from nlpxfer.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def parts_by_activation(model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]], widths: Widths) -> Kept:
    """The parts of a model whose activations are largest, so many as `widths` says.

    Args:
        model: A classifier of a family that `layout_of` knows; its mode is restored.
        batches: Its inputs, on its device, for some rows.
        widths: Sizes of the narrower model.

    Raises:
        CheckpointError: The family is not known.
        DataError: There are no batches.
    """
    layout, size = layout_of(model), widths_of(model).head_size
    layers = list(model_layers(model)[1])
    sums = _Sums()
    modes = {module: module.training for module in model.modules()}
    model.eval()  # type: ignore[no-untyped-call]
    with ExitStack() as hooks, torch.no_grad():
        for index, layer in enumerate(layers):
            before = {
                ("residual", index): layer,
                ("heads", index): layer.get_submodule(layout.mixes),
                ("neurons", index): layer.get_submodule(layout.narrows),
            }
            for key, module in before.items():
                hooks.callback(module.register_forward_pre_hook(sums.reading(key), with_kwargs=True).remove)
        hooks.callback(layers[-1].register_forward_hook(sums.giving(("residual", len(layers)))).remove)
        for batch in batches:
            sums.mask_BL = batch["attention_mask"]
            model(**batch)
    for module, mode in modes.items():
        module.training = mode
    if not sums.found:
        raise DataError("There are no rows to measure activations on.")
    streams = [sums.found["residual", index] for index in range(len(layers) + 1)]
    entries_H = torch.stack([stream_H / stream_H.mean().clamp(min=1e-12) for stream_H in streams]).sum(dim=0)
    return Kept(
        residual=most_important(entries_H, widths.hidden),
        heads=[
            most_important(sums.found["heads", index].reshape(-1, size).sum(dim=1), widths.heads)
            for index in range(len(layers))
        ],
        neurons=[most_important(sums.found["neurons", index], widths.neurons) for index in range(len(layers))],
    )


class _Sums:
    """Sums of the sizes of activations over the tokens that are not padding, by part."""

    def __init__(self) -> None:
        self.mask_BL = torch.ones(0)
        self.found: dict[tuple[str, int], Tensor] = {}

    def reading(self, key: tuple[str, int]) -> Callable[..., None]:
        """A hook that adds what a module reads."""

        def hook(module: object, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> None:
            self._add(key, inputs[0] if inputs else named["hidden_states"])

        return hook

    def giving(self, key: tuple[str, int]) -> Callable[..., None]:
        """A hook that adds what a module gives."""

        def hook(module: object, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ANN401 - a tensor, or a tuple
            self._add(key, output[0] if isinstance(output, tuple) else output)

        return hook

    def _add(self, key: tuple[str, int], states_BLD: Tensor) -> None:
        mask_BL1 = self.mask_BL[..., None].to(states_BLD.dtype)
        sizes_D = (states_BLD.abs() * mask_BL1).sum(dim=(0, 1)).double().cpu()
        self.found[key] = self.found.get(key, torch.zeros_like(sizes_D)) + sizes_D
