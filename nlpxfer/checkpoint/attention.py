"""Where the queries, keys and values of a transformer block are computed, in any family that is known.

They are read from the outputs of the linear layers, before positions are rotated in: so they do not depend on the
attention kernel, and no attention matrix has to be kept. `output_attentions=True`, the usual road, gives an empty
tuple under the default kernel (SDPA).

| families                                    | layers in a block                | how                           |
|---------------------------------------------|----------------------------------|-------------------------------|
| BERT, RoBERTa, XLM-R, CamemBERT, ELECTRA    | attention.self.query, key, value | one each                      |
| DistilBERT                                  | attention.q_lin, k_lin, v_lin    | one each                      |
| DeBERTa-v2                                  | attention.self.query_proj, ...   | one each; the first call     |
| MPNet                                       | attention.attn.q, k, v           | one each                      |
| Llama, Mistral, Qwen2, Qwen3, Gemma, OPT, .. | self_attn.q_proj, k_proj, v_proj | one each                     |
| GPT-2                                       | attn.c_attn                      | thirds                        |
| ModernBERT                                  | attn.Wqkv                        | thirds                        |
| GPT-NeoX                                    | attention.query_key_value        | thirds of each head           |

DeBERTa-v2 calls its layers once more, for positions. Keys and values may be narrower than queries (grouped attention).

Shapes: B batch, L tokens, H width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, cast

from torch import Tensor, nn

from nlpxfer.checkpoint.pooling import has_mean_layer
from nlpxfer.checkpoint.student import model_layers
from nlpxfer.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SEPARATE: Final = (
    ("attention.self.query", "attention.self.key", "attention.self.value"),
    ("attention.q_lin", "attention.k_lin", "attention.v_lin"),
    ("attention.self.query_proj", "attention.self.key_proj", "attention.self.value_proj"),
    ("attention.attn.q", "attention.attn.k", "attention.attn.v"),
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
)
_FUSED: Final[Mapping[str, tuple[str, Literal["thirds", "heads"]]]] = {
    "gpt2": ("attn.c_attn", "thirds"),
    "modernbert": ("attn.Wqkv", "thirds"),
    "gpt_neox": ("attention.query_key_value", "heads"),
}
"""Family -> its one layer, and how that holds queries, keys and values: other families pack them in other ways."""


@dataclass(frozen=True)
class AttentionPlaces:
    """The linear layers that compute the queries, keys and values of one block.

    Attributes:
        names: Their qualified names in the model: three, or one that computes all.
        widths: Numbers per token of queries, keys and values.
        heads: Heads of the layer that computes all three head by head; 0 for any other.
    """

    names: tuple[str, ...]
    widths: tuple[int, int, int]
    heads: int = 0

    def split(self, outputs: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, L, their width) from the outputs of the layers."""
        if len(outputs) == 3:
            return outputs[0], outputs[1], outputs[2]
        fused_BLH = outputs[0]
        if self.heads:
            by_head = fused_BLH.view(*fused_BLH.shape[:2], self.heads, -1)
            query, key, value = (part.flatten(-2) for part in by_head.chunk(3, dim=-1))
        else:
            query, key, value = fused_BLH.chunk(3, dim=-1)
        return query, key, value


def text_layers(model: PreTrainedModel) -> int:
    """How many blocks a model has; without the one that `use_mean_pooling` adds, which only computes a mean.

    Raises:
        CheckpointError: See `model_layers`.
    """
    return len(model_layers(model)[1]) - int(has_mean_layer(model))


def attention_places(model: PreTrainedModel, layer: int) -> AttentionPlaces:
    """The layers that compute the queries, keys and values of block `layer`.

    Raises:
        CheckpointError: It is not known how this family computes them.
    """
    prefix, blocks = model_layers(model)
    block = blocks[layer]
    modules = dict(block.named_modules())
    for names in _SEPARATE:
        if all(name in modules for name in names):
            widths = tuple(_outputs_of(modules[name], f"{prefix}.{layer}.{name}") for name in names)
            full = tuple(f"{prefix}.{layer}.{name}" for name in names)
            return AttentionPlaces(full, cast("tuple[int, int, int]", widths))
    name, how = _FUSED.get(model.config.model_type, ("", ""))
    if name in modules and name:
        whole = _outputs_of(modules[name], f"{prefix}.{layer}.{name}")
        heads = int(model.config.num_attention_heads) if how == "heads" else 0
        return AttentionPlaces((f"{prefix}.{layer}.{name}",), (whole // 3,) * 3, heads)
    raise CheckpointError(
        f"{type(model).__name__}: it is not known which layers compute its queries, keys and values.",
        why=f"The family {model.config.model_type!r} names or packs them in a way of its own.",
        fix="leave relation_weight out; hidden_weight works with any family that has a list of blocks",
        available=[
            *(", ".join(names) for names in _SEPARATE),
            *(f"{n} ({family})" for family, (n, _) in _FUSED.items()),
        ],
    )


def _outputs_of(layer: nn.Module, name: str) -> int:
    """Width of a linear layer's output; GPT-2's keeps its weight the other way round."""
    found = getattr(layer, "out_features", None) or getattr(layer, "nf", None)
    if not isinstance(found, int):
        raise CheckpointError(f"{name} is a {type(layer).__name__}, not a linear layer.")
    return found
