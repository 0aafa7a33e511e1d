"""Mean pooling for classifiers whose plain class reads the first token.

`BertForSequenceClassification` and its like read the state of the first token, while sentence encoders are trained to
be read as a mean over all tokens. The mean is built into the weights here, so the folder still loads with
`pipeline("text-classification")` and no code of ours: one more transformer layer, of the family's own class, that
computes it.

With states h_i of a text's tokens and m their mean, the layer holds: query = key = 0 (all scores are equal, so the
attention weights are uniform over the tokens that are not padding), value = identity, attention output = s times
identity. Its first LayerNorm then gives LayerNorm(s m + h_i) = LayerNorm(m + h_i / s), and its feed-forward output is
0, so the second LayerNorm changes nothing. s = 2048 leaves 0.05 % of h_i and stays within float16 for |m| < 32.

Any program computes that layer as it stands, for each token. Here it is computed once per text, from the mean: values
are linear, so their mean is the value of the mean, and the head reads the first token alone (`compute_mean_once_`).

Shapes: B batch, L tokens, H hidden.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any, Final, TypeGuard, cast

import torch
from torch import Tensor, nn

from nlpxfer.checkpoint.student import check_reload, model_layers, renumber_
from nlpxfer.config.options import POOLINGS
from nlpxfer.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from nlpxfer.checkpoint.load import Checkpoint

logger = logging.getLogger(__name__)

MEAN_SCALE: Final = 2048.0
_POOLING_FILE: Final = "1_Pooling/config.json"
# Families whose layers apply LayerNorm after each residual sum, by the names of their parts.
_BERT_NAMES: Final = {
    "zero": ("attention.self.query", "attention.self.key", "output.dense"),
    "identity": "attention.self.value",
    "scaled": "attention.output.dense",
    "norms": ("attention.output.LayerNorm", "output.LayerNorm"),
}
_DISTILBERT_NAMES: Final = {
    "zero": ("attention.q_lin", "attention.k_lin", "ffn.lin2"),
    "identity": "attention.v_lin",
    "scaled": "attention.out_lin",
    "norms": ("sa_layer_norm", "output_layer_norm"),
}
_POST_NORM: Final = {
    "bert": _BERT_NAMES,
    "roberta": _BERT_NAMES,
    "xlm-roberta": _BERT_NAMES,
    "camembert": _BERT_NAMES,
    "electra": _BERT_NAMES,
    "distilbert": _DISTILBERT_NAMES,
}


def with_pooling(checkpoint: Checkpoint, pooling: str) -> PreTrainedModel:
    """The model of a checkpoint with the head reading what `pooling` asks for; see `wants_mean`.

    Raises:
        ConfigError, CheckpointError: See `wants_mean` and `use_mean_pooling`.
    """
    return use_mean_pooling(checkpoint.model) if wants_mean(checkpoint, pooling) else checkpoint.model


def wants_mean(checkpoint: Checkpoint, pooling: str) -> bool:
    """Whether `pooling` means the mean for a checkpoint: "mean", or "auto" for one that was made to be read so.

    "auto" takes the mean for a sentence encoder whose folder says so and for a model that `use_mean_pooling` made;
    but the model's own state where the family cannot hold a mean.

    Raises:
        ConfigError: `pooling` is not one of `POOLINGS`.
    """
    if pooling not in POOLINGS:
        raise ConfigError(f"pooling={pooling!r} is not known.", available=POOLINGS)
    if pooling != "auto":
        return pooling == "mean"
    if not can_read_mean(checkpoint.model):
        return False
    made_so = getattr(checkpoint.model.config, "classifier_pooling", None) == "mean"
    return made_so or checkpoint.is_mean_encoder or has_mean_layer(checkpoint.model)


def use_mean_pooling(model: PreTrainedModel) -> PreTrainedModel:
    """A new model of the same plain class whose head reads the mean over the tokens that are not padding.

    ModernBERT: `config.classifier_pooling = "mean"`, no cost. BERT, RoBERTa, XLM-R, CamemBERT, ELECTRA, DistilBERT:
    one more layer, as the module says, which costs the memory of one layer, and its time outside of nlpxfer; its head
    reads LayerNorm(mean). The layer trains like any other, save that its queries and keys get no gradient at 0: it
    stays a mean. Cut layers (`slice_layers`) before, not after. The original is untouched, and nothing is added to a
    model that has such a layer. On a base in 8 or 4 bits the layer is in float32.

    Raises:
        CheckpointError: The family cannot express a mean; lists those that can.
    """
    family = model.config.model_type
    if has_mean_layer(model):
        logger.info("Mean pooling: the last layer computes the mean already.")
        return compute_mean_once_(copy.deepcopy(model))
    if family == "modernbert":
        pooled = copy.deepcopy(model)
        pooled.config.classifier_pooling = "mean"
        return pooled
    if not can_read_mean(model):
        raise CheckpointError(
            f"{type(model).__name__} cannot be read as a mean over its tokens.",
            why="Its class reads one token, and its layers cannot compute a mean exactly.",
            available=("modernbert", *_POST_NORM),
        )
    pooled = copy.deepcopy(model)
    _, layers = model_layers(pooled)
    count = len(layers)
    # with the model's own config: a copy of it would not hear of another attention kernel
    extra = copy.deepcopy(layers[-1], {id(pooled.config): pooled.config})
    renumber_(extra, count - 1, count)
    quantised = _unquantise_(extra)
    _compute_mean_(extra, _POST_NORM[family])
    layers.append(extra)
    pooled.config.num_hidden_layers = count + 1
    if not quantised:  # such a model is never saved
        check_reload(pooled, reason="adding a layer that computes the mean")
    logger.info("Mean pooling: added layer %d, which computes the mean of the token states.", count)
    return compute_mean_once_(pooled)


def compute_mean_once_(model: PreTrainedModel) -> PreTrainedModel:
    """Let the layer that `use_mean_pooling` added, if there is one, compute its mean once per text; returns the model.

    What the head reads is the same up to rounding, and so are the gradients; weights, config and a saved folder stay
    as they are. The layer gives the first token's state for all tokens, from which the others differ by 0.05 % of
    their own. It computes them one by one where that is asked for or matters: with dropout in its attention, with
    prefixes, and with an attention kernel that returns its weights (eager) or has masks of its own.
    """
    if has_mean_layer(model):
        layer = model_layers(model)[1][-1]
        quick = _distilbert_forward if model.config.model_type == "distilbert" else _bert_forward
        layer.forward = MethodType(quick, layer)
    return model


def _bert_forward(
    layer: Any,  # noqa: ANN401 - BertLayer and its like
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    *args: Any,  # noqa: ANN401
    **kwargs: Any,  # noqa: ANN401
) -> Tensor:
    attention = layer.attention.self
    if not _is_plain_mean(attention, attention_mask, kwargs):
        return type(layer).forward(layer, hidden_states, attention_mask, *args, **kwargs)  # type: ignore[no-any-return]
    value_B1H = _mean_value(attention.query, attention.key, attention.value, hidden_states, attention_mask)
    state_B1H = layer.attention.output(value_B1H, hidden_states[:, :1])
    return layer.feed_forward_chunk(state_B1H).expand_as(hidden_states)  # type: ignore[no-any-return]


def _distilbert_forward(
    layer: Any,  # noqa: ANN401 - TransformerBlock
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    **kwargs: Any,  # noqa: ANN401
) -> Tensor:
    attention = layer.attention
    if not _is_plain_mean(attention, attention_mask, kwargs):
        return type(layer).forward(layer, hidden_states, attention_mask, **kwargs)  # type: ignore[no-any-return]
    value_B1H = _mean_value(attention.q_lin, attention.k_lin, attention.v_lin, hidden_states, attention_mask)
    state_B1H = layer.sa_layer_norm(attention.out_lin(value_B1H) + hidden_states[:, :1])
    state_B1H = layer.output_layer_norm(layer.ffn(state_B1H) + state_B1H)
    return state_B1H.expand_as(hidden_states)  # type: ignore[no-any-return]


def _is_plain_mean(attention: Any, mask: Tensor | None, kwargs: Mapping[str, Any]) -> bool:  # noqa: ANN401
    """Whether the attention is a mean over the tokens that `mask` leaves, and nothing else."""
    if attention.config._attn_implementation == "eager" or kwargs.get("past_key_values") is not None:
        return False
    if attention.training and any(isinstance(part, nn.Dropout) and part.p > 0 for part in attention.modules()):
        return False
    return mask is None or mask.dim() == 4


def _mean_value(query: nn.Module, key: nn.Module, value: nn.Module, states_BLH: Tensor, mask: Tensor | None) -> Tensor:
    """The value (B, 1, H) of the mean state; `mask` (B or 1, 1, L or 1, L) is True, or 0, where a token counts."""
    if mask is None:
        mean_B1H = states_BLH.mean(1, keepdim=True)
    else:
        row_B1L = mask[:, 0, :1]
        share_B1L = row_B1L.float() if row_B1L.dtype == torch.bool else torch.softmax(row_B1L.float(), -1)
        share_B1L = share_B1L / share_B1L.sum(-1, keepdim=True)
        mean_B1H = share_B1L.to(states_BLH.dtype) @ states_BLH
    value_B1H: Tensor = value(mean_B1H)
    if value.training:  # several processes wait for gradients of all parameters: those of the zeros are zero
        first_B1H = states_BLH[:, :1]
        value_B1H = value_B1H + 0.0 * (query(first_B1H) + key(first_B1H))
    return value_B1H


def can_read_mean(model: PreTrainedModel) -> bool:
    """Whether `use_mean_pooling` works for a family."""
    family = model.config.model_type
    return family == "modernbert" or (family in _POST_NORM and not getattr(model.config, "is_decoder", False))


def is_mean_encoder(folder: Path) -> bool:
    """Whether a checkpoint's folder says that it is a sentence encoder which is read by the plain mean of its tokens.

    That is sentence-transformers' `1_Pooling/config.json`: `pooling_mode_mean_tokens` alone, or `pooling_mode: mean`.
    """
    try:
        found = json.loads((folder / _POOLING_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    if not isinstance(found, dict):
        return False
    modes = [key for key, value in found.items() if key.startswith("pooling_mode_") and value is True]
    return modes == ["pooling_mode_mean_tokens"] or (not modes and found.get("pooling_mode") in ("mean", ["mean"]))


def has_mean_layer(model: PreTrainedModel) -> bool:
    """Whether the last layer is one that `use_mean_pooling` added: its queries and keys stay 0 in training."""
    names = _POST_NORM.get(model.config.model_type)
    if names is None or getattr(model.config, "is_decoder", False):
        return False
    last = model_layers(model)[1][-1]
    queries_and_keys = [last.get_parameter(f"{name}.weight") for name in names["zero"][:2]]
    return not any(bool(weight.any()) for weight in queries_and_keys)


def _unquantise_(layer: nn.Module) -> bool:
    """Put new linear layers in the place of those in 8 or 4 bits; whether there were any.

    `_compute_mean_` sets their weights, save those of the first of the two feed-forward ones: what it gives goes
    through zeros.
    """
    found = [name for name, module in layer.named_modules() if isinstance(module, nn.Linear) and not _is_plain(module)]
    for name in found:
        old = cast("nn.Linear", layer.get_submodule(name))
        new = nn.Linear(old.in_features, old.out_features, device=old.weight.device, dtype=torch.float32)
        layer.set_submodule(name, new)
    return bool(found)


def _is_plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    return type(module) is nn.Linear


def _compute_mean_(layer: nn.Module, names: Mapping[str, Sequence[str]]) -> None:
    with torch.no_grad():
        for name in names["zero"]:
            _set_(layer, name, scale=0.0)
        _set_(layer, str(names["identity"]), scale=1.0)
        _set_(layer, str(names["scaled"]), scale=MEAN_SCALE)
        for name in names["norms"]:
            norm = layer.get_submodule(name)
            nn.init.ones_(norm.weight)  # type: ignore[arg-type]
            nn.init.zeros_(norm.bias)  # type: ignore[arg-type]


def _set_(layer: nn.Module, name: str, *, scale: float) -> None:
    """Weight = scale times identity (zero for scale 0, whatever its shape), bias = 0."""
    dense = layer.get_submodule(name)
    if not _is_plain(dense):
        raise CheckpointError(f"{name} is a {type(dense).__name__}, not a linear layer.", why="It was wrapped.")
    dense.weight.zero_()
    if scale:
        dense.weight.fill_diagonal_(scale)
    dense.bias.zero_()
