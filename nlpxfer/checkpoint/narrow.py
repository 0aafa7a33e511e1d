"""Build a narrower student from a teacher: one set of entries of the residual stream, whole heads, fewer neurons.

All that reads or writes the residual stream (embeddings, both ends of every layer, LayerNorms, pooler, head) keeps
the same entries of it: an entry means the same at every depth, so a set per layer would mix up what layers tell each
other. Attention keeps whole heads, so that a head's queries and keys still match; a head's size stays as it is.

A linear layer that reads fewer entries than before sums up fewer terms: its weights are multiplied by sqrt(before /
after), which keeps the deviation of what it gives (weight subcloning, section on scaling). LayerNorms compute their
statistics over the entries that are left; with that factor the terms they add up keep their proportions, and training
does the rest. With all entries kept the factor is 1 and the model is the same.

Sources: Samragh et al. 2023, weight subcloning, arXiv:2312.09299; Xu et al. 2024, weight selection, ICLR 2024.

Shapes: H residual entries, A entries of all heads of a layer, F neurons of a feed-forward layer.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from nlpxfer.checkpoint.head import head_of
from nlpxfer.checkpoint.student import check_reload, model_layers
from nlpxfer.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

H, A, F = "residual", "heads", "neurons"
Axes = tuple[str | None, ...]
"""For each dimension of a parameter what its entries are; None: all are kept."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a family names the parts of a layer, below the layer's own name.

    Attributes:
        reads: Linear layers from the residual stream to the heads.
        fused: The same, as one matrix of queries, keys and values side by side.
        mixes: The linear layer from the heads back to the residual stream.
        widens: The linear layer from the residual stream to the neurons.
        narrows: The one back.
        neurons: Name of F in the config.
        transposed: Whether weights are stored as (inputs, outputs).
    """

    reads: tuple[str, ...] = ()
    fused: str = ""
    mixes: str
    widens: str
    narrows: str
    neurons: str = "intermediate_size"
    transposed: bool = False

    def axes(self, name: str, dims: int) -> Axes | None:
        """The axes of a layer's parameter, by its name below the layer; None if it is not known."""
        module, _, kind = name.rpartition(".")
        ends = {
            **dict.fromkeys(self.reads, (A, H)),
            **({self.fused: (A, H)} if self.fused else {}),
            self.mixes: (H, A),
            self.widens: (F, H),
            self.narrows: (H, F),
        }
        if module in ends:
            outputs, inputs = ends[module]
            if kind == "bias":
                return (outputs,)
            return (inputs, outputs) if self.transposed else (outputs, inputs)
        return (H,) if dims == 1 else None  # the LayerNorms


_BERT: Final = Layout(
    reads=("attention.self.query", "attention.self.key", "attention.self.value"),
    mixes="attention.output.dense",
    widens="intermediate.dense",
    narrows="output.dense",
)
LAYOUTS: Final[Mapping[str, Layout]] = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "camembert": _BERT,
    "electra": _BERT,
    "distilbert": Layout(
        reads=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
        mixes="attention.out_lin",
        widens="ffn.lin1",
        narrows="ffn.lin2",
        neurons="hidden_dim",
    ),
    "gpt2": Layout(
        fused="attn.c_attn",
        mixes="attn.c_proj",
        widens="mlp.c_fc",
        narrows="mlp.c_proj",
        neurons="n_inner",
        transposed=True,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What of a model is kept; the order of the indices is the order in the narrower model.

    Attributes:
        residual: Entries of the residual stream.
        heads: For each layer its heads; as many in each, and together as many entries as `residual`.
        neurons: For each layer its neurons; as many in each.
    """

    residual: Sequence[int]
    heads: Sequence[Sequence[int]]
    neurons: Sequence[Sequence[int]]


@dataclass(frozen=True, kw_only=True)
class Widths:
    """Sizes of a model."""

    hidden: int
    heads: int
    neurons: int

    @property
    def head_size(self) -> int:
        """Entries of a head."""
        return self.hidden // self.heads


def layout_of(model: PreTrainedModel) -> Layout:
    """How the family of a model names its parts.

    Raises:
        CheckpointError: It is not known here; lists those that are.
    """
    family = model.config.model_type
    special = getattr(model.config, "is_decoder", False) or getattr(model.config, "add_cross_attention", False)
    if family not in LAYOUTS or special:
        raise CheckpointError(
            f"{type(model).__name__} cannot be made narrower: the parts of the family {family!r} are not known here.",
            fix="fewer layers (--student_num_layers), or a student of its own (--student_name_or_path)",
            available=LAYOUTS,
        )
    return LAYOUTS[family]


def widths_of(model: PreTrainedModel) -> Widths:
    """Sizes of a model of a known family."""
    config, layout = model.config, layout_of(model)
    neurons = getattr(config, layout.neurons)
    return Widths(
        hidden=int(config.hidden_size),
        heads=int(config.num_attention_heads),
        neurons=int(4 * config.hidden_size if neurons is None else neurons),
    )


def narrow_widths(model: PreTrainedModel, hidden: int, neurons: int | None = None) -> Widths:
    """Sizes of a narrower model whose heads have the same size.

    Args:
        model: The wide one.
        hidden: Entries of its residual stream.
        neurons: Default: in the same proportion to `hidden` as in the wide model.

    Raises:
        ConfigError: The sizes are larger than those of the model, or `hidden` is no multiple of the size of a head.
        CheckpointError: See `layout_of`.
    """
    wide, faults = widths_of(model), []
    size = wide.head_size
    if not 1 <= hidden <= wide.hidden or hidden % size:
        sizes = ", ".join(str(size * count) for count in range(1, wide.heads + 1))
        faults.append(f"student_hidden_size: {hidden} is not one of {sizes}: heads of {size} are kept whole")
    elif hidden != wide.hidden and hidden == getattr(model.config, "embedding_size", None):
        why = "the teacher projects them to its hidden size, and the class has no projection where both are the same"
        faults.append(f"student_hidden_size: {hidden} is the size of the embeddings; {why}")
    wanted = max(1, round(wide.neurons * hidden / wide.hidden)) if neurons is None else neurons
    if not 1 <= wanted <= wide.neurons:
        faults.append(f"student_intermediate_size: {wanted} is not between 1 and the {wide.neurons} of the teacher")
    if faults:
        raise ConfigError.from_faults(faults)
    return Widths(hidden=hidden, heads=hidden // size, neurons=wanted)


def narrow_model(model: PreTrainedModel, kept: Kept) -> PreTrainedModel:
    """A new model of the same class with the entries `kept`; the original is untouched.

    Each parameter's shape is that which the new config leads to, and a reload is checked to compute the same.

    Raises:
        ConfigError: The indices do not fit the model or each other.
        CheckpointError: The family is not known, or a parameter of it is not.
    """
    layout, wide = layout_of(model), widths_of(model)
    prefix, layers = model_layers(model)
    _check_kept(kept, wide, len(layers))
    config = copy.deepcopy(model.config)
    config.hidden_size = len(kept.residual)
    config.num_attention_heads = len(kept.heads[0])
    setattr(config, layout.neurons, len(kept.neurons[0]))
    embedding = getattr(model.config, "embedding_size", None)
    if embedding == wide.hidden:
        config.embedding_size = len(kept.residual)
    narrow = type(model)(config)
    state = {}
    for name, value in model.state_dict().items():
        inside = name.startswith(prefix + ".")
        number, _, rest = name[len(prefix) + 1 :].partition(".") if inside else ("", "", "")
        axes = layout.axes(rest, value.dim()) if inside else _outside(model, name, value)
        if axes is None:
            raise CheckpointError(f"{name} of {type(model).__name__} is not known, so it cannot be cut.")
        fused = bool(inside and layout.fused and rest.startswith(layout.fused))
        indices = [_indices(axis, kept, wide, int(number or 0), fused) for axis in axes]
        reads = 0 if inside and layout.transposed else 1
        linear = value.dim() == 2 and not _is_table(model, name)
        state[name] = _cut(value, indices, inputs=reads if linear else None)
    narrow.load_state_dict(state)
    narrow.train(model.training)
    check_reload(narrow, reason=f"keeping {len(kept.residual)} of {wide.hidden} entries")
    logger.info("Kept %d of %d entries: %d parameters.", len(kept.residual), wide.hidden, narrow.num_parameters())
    return narrow


def _check_kept(kept: Kept, wide: Widths, layers: int) -> None:
    faults = []
    for name, lists, limit in (
        ("residual", [kept.residual], wide.hidden),
        ("heads", kept.heads, wide.heads),
        ("neurons", kept.neurons, wide.neurons),
    ):
        if name != "residual" and len(lists) != layers:
            faults.append(f"{name}: {len(lists)} lists for {layers} layers")
        if any(len({*each}) != len(each) or not {*each} <= {*range(limit)} for each in lists):
            faults.append(f"{name}: an index is named twice, or is not in 0 to {limit - 1}")
        if len({len(each) for each in lists}) > 1 or not all(lists):
            faults.append(f"{name}: every layer keeps as many, and at least one")
    if not faults and len(kept.heads[0]) * wide.head_size != len(kept.residual):
        faults.append(f"heads: {len(kept.heads[0])} of {wide.head_size} entries are not {len(kept.residual)}")
    if faults:
        raise ConfigError.from_faults(faults)


def _is_table(model: PreTrainedModel, name: str) -> bool:
    return isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Embedding)


def _outside(model: PreTrainedModel, name: str, value: Tensor) -> Axes:
    """The axes of a parameter of embeddings, final norm, pooler or head: those as long as the residual stream are one.

    An axis of labels, tokens, positions or of ELECTRA's smaller embeddings can be as long by chance: it is told by the
    kind of the module.
    """
    owner = model.get_submodule(name.rpartition(".")[0])
    hidden, embedding = int(model.config.hidden_size), getattr(model.config, "embedding_size", None)
    if isinstance(owner, nn.Embedding):
        return (None, H if owner.embedding_dim == hidden else None)
    if isinstance(owner, nn.Linear):
        last = name.rpartition(".")[0] == head_of(model).final_name
        outputs, inputs = None if last else H, H if owner.in_features == hidden else None
        return (outputs,) if value.dim() == 1 else (outputs, inputs)
    in_embeddings = embedding not in (None, hidden) and value.shape[0] == embedding and ".embeddings." in f".{name}"
    return (None if in_embeddings else H,) if value.dim() == 1 else (None,) * value.dim()


def _indices(axis: str | None, kept: Kept, wide: Widths, layer: int, fused: bool) -> list[int] | None:
    if axis is None:
        return None
    if axis == H:
        return [*kept.residual]
    if axis == F:
        return [*kept.neurons[layer]]
    size = wide.head_size
    entries = [head * size + offset for head in kept.heads[layer] for offset in range(size)]
    return entries if not fused else [part * wide.hidden + entry for part in range(3) for entry in entries]


def _cut(value: Tensor, indices: Sequence[list[int] | None], *, inputs: int | None) -> Tensor:
    """The kept entries of a parameter; weights grow as the inputs get fewer, which stand along the axis `inputs`."""
    found = value
    for dim, chosen in enumerate(indices):
        if chosen is not None:
            found = found.index_select(dim, torch.tensor(chosen, device=value.device))
    if inputs is None:
        return found.clone()
    return found * math.sqrt(value.shape[inputs] / found.shape[inputs])


def most_important(scores: Tensor, count: int) -> list[int]:
    """Indices of the `count` highest scores, in ascending order; of equals the first."""
    order = torch.argsort(scores, descending=True, stable=True)[:count]
    found: list[Any] = sorted(order.tolist())
    return found
