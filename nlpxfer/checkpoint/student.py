"""Build a smaller student from a teacher by keeping some of its layers.

Source: Sanh et al. 2019, DistilBERT (every second layer); Sun et al. 2019, Patient Knowledge Distillation (first
layers or every k-th layer).
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from types import MethodType
from typing import TYPE_CHECKING, Any, Final, Literal

import torch
from torch import nn

from nlpxfer.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

_INDEX_NAMES: Final = ("layer_idx", "layer_id", "layer_index")


def model_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The transformer blocks of any encoder or decoder: qualified name and `nn.ModuleList`.

    It is the one list whose length is `config.num_hidden_layers` (under any of its names) and that holds the most
    parameters.

    Raises:
        CheckpointError: There is no such list; ALBERT, for one, repeats a single block.
    """
    total = int(model.config.get_text_config().num_hidden_layers)
    found = [
        (sum(parameter.numel() for parameter in module.parameters()), name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == total
    ]
    if not found or getattr(model.config, "num_hidden_groups", None) is not None:
        raise CheckpointError(
            f"{type(model).__name__} has no list of {total} transformer blocks.",
            why="ALBERT shares one block among all layers."
            if model.config.model_type == "albert"
            else "The family nests its blocks in another way.",
        )
    _, name, module = max(found, key=lambda item: item[0])
    return name, module


def choose_layers(total: int, count: int, how: Literal["bottom", "even"]) -> list[int]:
    """Which `count` of `total` layers a student keeps, in ascending order.

    "bottom" keeps the first ones. "even" spreads them and keeps the first and the last; halves round down. A single
    layer is always the first, since only it reads the embeddings as it was trained to.

    >>> choose_layers(6, 3, "even"), choose_layers(12, 4, "even"), choose_layers(6, 3, "bottom")
    ([0, 2, 5], [0, 4, 7, 11], [0, 1, 2])

    Raises:
        ConfigError: `count` is not in 1..total, or `how` is unknown.
    """
    if not 1 <= count <= total:
        raise ConfigError(
            f"A student of {count} layers cannot be cut from {total}.", fix=f"a number from 1 to {total}"
        )
    if how == "bottom" or (how == "even" and count == 1):
        return list(range(count))
    if how == "even":
        gaps = count - 1
        return [(2 * index * (total - 1) + gaps - 1) // (2 * gaps) for index in range(count)]
    raise ConfigError(f"{how!r} is no way to choose layers.", available=("bottom", "even", "numbers such as 0,2,5"))


def parse_layers(text: str, total: int, count: int | None = None) -> list[int]:
    """Layers named on the command line: "bottom" or "even" (with `count`), or numbers such as "0,2,5".

    Raises:
        ConfigError: The text is none of these, a number is out of range or not ascending, or `count` contradicts it.
    """
    if text in ("bottom", "even"):
        if count is None:
            raise ConfigError(f"{text!r} needs the number of layers.", fix="--student_num_layers 3")
        return choose_layers(total, count, "bottom" if text == "bottom" else "even")
    try:
        keep = [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(
            f"{text!r} is no choice of layers.", available=("bottom", "even", "numbers such as 0,2,5")
        ) from None
    _check_keep(keep, total)
    if count is not None and count != len(keep):
        raise ConfigError(f"{text!r} names {len(keep)} layers, but {count} were asked for.")
    return keep


def _check_keep(keep: Sequence[int], total: int) -> None:
    if not keep or any(not 0 <= index < total for index in keep):
        raise ConfigError(f"Layers {list(keep)} do not exist: the model has 0 to {total - 1}.")
    if any(later <= earlier for earlier, later in zip(keep, keep[1:], strict=False)):
        raise ConfigError(f"Layers {list(keep)} must ascend, each named once.")


def slice_layers(model: PreTrainedModel, keep: Sequence[int]) -> PreTrainedModel:
    """A new model of the same class with only the layers `keep`; the original is untouched.

    The config follows: `num_hidden_layers` and per-layer lists such as `layer_types`, so that each kept layer keeps
    its own kind of attention after a reload. Whether a reload really gives the same model is checked before returning:
    a second model is built from the new config, takes the same weights, and must give the same output.

    Args:
        model: Any single-stack encoder or decoder of transformers.
        keep: Ascending indices of layers.

    Raises:
        ConfigError: `keep` is empty, out of range or not ascending.
        CheckpointError: The family cannot hold such a choice in its config (ALBERT shares its layers; the first layer
            of ModernBERT has another shape and must be kept).
    """
    if getattr(model.config, "is_encoder_decoder", False):
        raise CheckpointError(f"{type(model).__name__} has two stacks of layers; only single-stack models are cut.")
    name, layers = model_layers(model)
    total = len(layers)
    _check_keep(keep, total)
    dropped = [layer for index, layer in enumerate(layers) if index not in keep]
    student = copy.deepcopy(model, {id(layer): layer for layer in dropped})  # those are not copied
    parent, _, child = name.rpartition(".")
    kept = [student.get_submodule(f"{name}.{index}") for index in keep]
    for new, (old, layer) in enumerate(zip(keep, kept, strict=True)):
        renumber_(layer, old, new)
    setattr(student.get_submodule(parent), child, nn.ModuleList(kept))
    _slice_config_(student.config, keep, total)
    check_reload(student, reason=f"keeping the layers {list(keep)} of {total}")
    logger.info("Kept layers %s of %d: %d parameters.", list(keep), total, student.num_parameters())
    return student


def renumber_(layer: nn.Module, old: int, new: int) -> None:
    """Tell a layer its new place (decoders find their part of the key-value cache by it)."""
    for module in layer.modules():
        for attribute in _INDEX_NAMES:
            if getattr(module, attribute, None) == old:
                setattr(module, attribute, new)


def _slice_config_(config: Any, keep: Sequence[int], total: int) -> None:  # noqa: ANN401 - attributes vary by family
    text = config.get_text_config()
    per_layer = {
        key: value
        for key, value in vars(text).items()
        if ("layer" in key or key == "attention_window") and isinstance(value, list | tuple) and len(value) == total
    }
    text.num_hidden_layers = len(keep)
    for key, value in per_layer.items():
        setattr(text, key, [value[index] for index in keep])


def check_reload(model: PreTrainedModel, *, reason: str) -> None:
    """Refuse a model whose config does not lead back to it: same weights and same output after building it anew.

    The second model shares the weights of the first, so this costs one forward pass on a few tokens.

    Raises:
        CheckpointError: Names or shapes of weights differ, or the outputs do.
    """
    state = model.state_dict()
    try:
        with torch.device("meta"):
            rebuilt = type(model)(copy.deepcopy(model.config))
    except Exception as error:
        raise CheckpointError(
            f"{type(model).__name__} cannot be saved after {reason}: its config would be refused.", why=str(error)
        ) from error
    wanted = {key: tuple(value.shape) for key, value in rebuilt.state_dict().items()}
    differing = sorted(key for key in wanted.keys() | state.keys() if wanted.get(key) != _shape(state.get(key)))
    if differing:
        raise CheckpointError(
            f"{type(model).__name__} cannot be saved after {reason}: its config would lead to other weights "
            f"({', '.join(differing[:4])}).",
            why="Some layers of this family are built in another way depending on their place, often the first one.",
            fix="keep layer 0",
        )
    rebuilt.load_state_dict(state, assign=True)
    trained = {name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter.requires_grad}
    for name, parameter in rebuilt.named_parameters(remove_duplicate=False):
        parameter.requires_grad_(name in trained)  # by which torch chooses how to multiply, and so how it rounds
    _copy_buffers_(rebuilt, model)
    _copy_forwards_(rebuilt, model)
    try:
        same = torch.equal(_probe(rebuilt), _probe(model))
    except Exception as error:
        raise CheckpointError(f"{type(model).__name__} does not run after {reason}.", why=str(error)) from error
    if not same:
        raise CheckpointError(
            f"{type(model).__name__} cannot be saved after {reason}: a reload would compute something else.",
            why="What a layer of this family computes depends on its place, and its config cannot say so.",
        )


def _shape(tensor: torch.Tensor | None) -> tuple[int, ...] | None:
    return None if tensor is None else tuple(tensor.shape)


def _copy_forwards_(rebuilt: nn.Module, model: nn.Module) -> None:
    """Take over how modules compute that have a `forward` of their own, as a mean layer has."""
    for name, module in model.named_modules():
        if own := vars(module).get("forward"):
            owner = rebuilt.get_submodule(name)
            owner.forward = MethodType(own.__func__, owner)


def _copy_buffers_(rebuilt: nn.Module, model: nn.Module) -> None:
    """Take over buffers that are not saved (rotary tables, position ids): they do not depend on the layers."""
    for name, value in model.named_buffers():
        owner, _, leaf = name.rpartition(".")
        rebuilt.get_submodule(owner)._buffers[leaf] = value


def embedding_rows(model: PreTrainedModel) -> int:
    """Number of token ids that the model has an embedding for."""
    try:
        weight = model.get_input_embeddings().weight
    except (NotImplementedError, AttributeError):  # CANINE hashes characters
        weight = None
    if not isinstance(weight, torch.Tensor):
        raise CheckpointError(
            f"{type(model).__name__} has no plain token embeddings.", fix="use a checkpoint of another family"
        )
    return int(weight.shape[0])


def _probe(model: PreTrainedModel) -> torch.Tensor:
    """The model's output in eval mode for two short rows; its mode is restored."""
    device = next(model.parameters()).device
    highest = embedding_rows(model)
    ids_BL = (torch.arange(2 * 24).reshape(2, 24) * 7 + 3) % highest
    ids_BL = ids_BL[:1] if getattr(model.config, "pad_token_id", None) is None else ids_BL
    modes = {module: module.training for module in model.modules()}
    model.eval()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        output: torch.Tensor = model(input_ids=ids_BL.to(device), attention_mask=torch.ones_like(ids_BL).to(device))[0]
    for module, mode in modes.items():
        module.training = mode
    return output
