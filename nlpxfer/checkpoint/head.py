"""The classification head of any family: its final layer, what stands before it, and a start from a linear probe.

A classifier is `logits = final(norm(act(dense(pooled))))`; some families lack `dense`, `act` and `norm`:

| family                  | dense (`transforms`)    | act                   | norm      | final               |
|-------------------------|-------------------------|-----------------------|-----------|---------------------|
| BERT, ERNIE             | <base>.pooler.dense     | tanh                  | -         | classifier          |
| ALBERT                  | albert.pooler           | tanh                  | -         | classifier          |
| RoBERTa, XLM-R, MPNet   | classifier.dense        | tanh                  | -         | classifier.out_proj |
| ELECTRA                 | classifier.dense        | gelu                  | -         | classifier.out_proj |
| BigBird, ConvBERT, ..   | classifier.dense        | hidden_act            | -         | classifier.out_proj |
| DistilBERT              | pre_classifier          | relu                  | -         | classifier          |
| DeBERTa                 | pooler.dense            | pooler_hidden_act     | -         | classifier          |
| ModernBERT              | head.dense (no bias)    | classifier_activation | head.norm | classifier          |
| GPT-2, Llama, Qwen2, .. | -                       | -                     | -         | score (no bias)     |

Shapes: B batch, L tokens, H hidden, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import nn

from nlpxfer.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel

_FINAL_NAMES: Final = (
    "classifier.out_proj",
    "classifier",
    "score",
    "classification_head.out_proj",
    "logits_proj",
    "sequence_summary.summary",
)
_TRANSFORM_NAMES: Final = (
    "{base}.pooler.dense",
    "{base}.pooler",
    "pooler.dense",
    "classifier.dense",
    "classification_head.dense",
    "pre_classifier",
    "head.dense",
)
_HIDDEN_ACT_HEADS: Final = frozenset(("big_bird", "convbert", "nystromformer", "roformer", "yoso"))
"""Families whose heads have the activation of their layers."""
# gelu''(z) = pdf(z) * (2 - z^2) is zero here: around this point gelu is a straight line up to third order.
_GELU_INFLECTION: Final = math.sqrt(2.0)
_RELU_SIGMAS: Final = 6.0


@dataclass(frozen=True, kw_only=True, eq=False)
class HeadParts:
    """Where a classifier's head lies.

    Attributes:
        final: The linear layer that gives the logits.
        final_name: Its qualified name in the model.
        transforms: Name -> trainable linear layer between the pooled token state and `final`, in order.
        activation: What follows the last transform ("tanh", "gelu", ...); empty without transforms or if unknown.
        norm: The LayerNorm between activation and `final` (ModernBERT), or None.
    """

    final: nn.Linear
    final_name: str
    transforms: dict[str, nn.Linear]
    activation: str = ""
    norm: nn.LayerNorm | None = None

    @property
    def has_bias(self) -> bool:
        """Whether `final` has a bias (decoders' `score` has none)."""
        return self.final.bias is not None


def head_of(model: PreTrainedModel) -> HeadParts:
    """Find the head of a `*ForSequenceClassification` model.

    Raises:
        CheckpointError: No linear layer with `config.num_labels` outputs stands at a known place.
    """
    model = without_adapter(model)
    modules = _trained_modules(model)
    labels = int(model.config.num_labels or 0)
    final_name = next(
        (name for name in _FINAL_NAMES if isinstance(modules.get(name), nn.Linear)), _only_outside_base(model, labels)
    )
    final = modules.get(final_name)
    if not isinstance(final, nn.Linear) or final.out_features != labels:
        raise CheckpointError(
            f"{type(model).__name__} has no classification layer with {labels} outputs at a known place.",
            why="It is no sequence classifier, or its labels were changed without replacing the layer.",
            available=[name for name, module in modules.items() if isinstance(module, nn.Linear)][-8:],
        )
    transforms = {}
    unread = 2 if "classifier.dense" in modules else 0  # BigBird has a pooler that its head does not read
    for pattern in _TRANSFORM_NAMES[unread:]:
        name = pattern.format(base=model.base_model_prefix)
        module = modules.get(name)
        if isinstance(module, nn.Linear) and name != final_name:
            transforms[name] = module
    norm = modules.get("head.norm")
    return HeadParts(
        final=final,
        final_name=final_name,
        transforms=transforms,
        activation=_activation_of(model, transforms),
        norm=norm if isinstance(norm, nn.LayerNorm) else None,
    )


def without_adapter(model: PreTrainedModel) -> PreTrainedModel:
    """The transformers model inside of an adapter model of peft, its layers still wrapped; any other model itself."""
    inner = getattr(model, "get_base_model", None)
    return model if inner is None else inner()


def _trained_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Modules by name; where peft keeps a module beside the copy that it trains, the copy under the plain name."""
    return {
        name.replace(".modules_to_save.default", ""): module
        for name, module in model.named_modules()
        if ".original_module" not in name
    }


def _only_outside_base(model: PreTrainedModel, labels: int) -> str:
    """Name of the one linear layer with `labels` outputs outside of the base model, else an empty string."""
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module.out_features == labels
        and not name.startswith(model.base_model_prefix + ".")
    ]
    return found[0] if len(found) == 1 else ""


def _activation_of(model: PreTrainedModel, transforms: Mapping[str, nn.Linear]) -> str:
    if not transforms:
        return ""
    name, config = next(iter(transforms)), model.config
    if name == "pre_classifier":
        return "relu"
    if name == "head.dense":
        return str(config.classifier_activation)
    if name == "pooler.dense":
        return str(config.pooler_hidden_act)
    if name == "classifier.dense" and config.model_type == "electra":
        return "gelu"
    if name == "classifier.dense" and config.model_type in _HIDDEN_ACT_HEADS:
        return str(config.hidden_act)
    return "tanh"


def replace_final_(model: PreTrainedModel, count: int) -> None:
    """Put a new final layer with `count` outputs in place: weights normal(0, initializer_range), bias 0."""
    parts = head_of(model)
    old = parts.final
    new = nn.Linear(old.in_features, count, bias=parts.has_bias, device=old.weight.device, dtype=old.weight.dtype)
    with torch.no_grad():
        values = torch.randn(count, old.in_features) * getattr(model.config, "initializer_range", 0.02)
        new.weight.copy_(values.to(new.weight))
        if new.bias is not None:
            new.bias.zero_()
    parent, _, child = parts.final_name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)
    setattr(model, "num_labels", count)  # noqa: B010 - read by the loss; nn.Module's types allow no int
    model.config.num_labels = count


def features(model: PreTrainedModel, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """What the final layer reads for the token that decides: `head_of(model).final(features_BH)` is the logits.

    Decoders apply their final layer to each token and use the last one that is not the pad id, wherever the padding
    stands; the same token is picked here. Gradients and the model's mode are left as the caller set them.

    Args:
        model: A sequence classifier.
        batch: Its inputs (B, L); labels are not needed and are left out.

    Returns:
        features_BH.
    """
    return _input_of(head_of(model).final, model, batch)


def pooled_states(model: PreTrainedModel, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """What the head reads: the input of the first transform, or `features` where there is none.

    It depends on the body alone. `head_logits(model, pooled_BH)` is the logits, dropout left out.

    Args:
        model: A sequence classifier.
        batch: Its inputs (B, L); labels are not needed and are left out.

    Returns:
        pooled_BH.
    """
    parts = head_of(model)
    return _input_of(next(iter(parts.transforms.values()), parts.final), model, batch)


def _input_of(layer: nn.Linear, model: PreTrainedModel, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """What a layer of the head reads for each row."""
    captured: list[torch.Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, inputs: captured.append(inputs[0]))
    try:
        model(**{key: value for key, value in batch.items() if key != "labels"})
    finally:
        handle.remove()
    states = captured[-1]
    if states.dim() == 2:
        return states
    pad = model.config.get_text_config().pad_token_id
    if states.shape[1] == 1 or "input_ids" not in batch or pad is None:
        return states[:, -1]
    rows = torch.arange(states.shape[0], device=states.device)
    return states[rows, deciding_token(batch["input_ids"], pad).to(states.device)]


def deciding_token(input_ids_BL: torch.Tensor, pad: int) -> torch.Tensor:
    """Index of the rightmost token that is not the pad id, as transformers' decoders pick it; shape B."""
    real_BL = (input_ids_BL != pad).to(torch.int32)
    positions_L = torch.arange(real_BL.shape[1], device=real_BL.device, dtype=torch.int32)
    last_B: torch.Tensor = (positions_L * real_BL).argmax(-1)
    return last_B


def head_features(model: PreTrainedModel, pooled_BH: torch.Tensor) -> torch.Tensor:
    """What the final layer makes of pooled states: norm(act(dense(pooled))) without dropout, with gradients.

    Args:
        model: A sequence classifier; its body takes no part.
        pooled_BH: See `pooled_states`.

    Raises:
        CheckpointError: The head has several transforms, or an activation that transformers does not know.
    """
    from transformers.activations import ACT2FN

    parts = head_of(model)
    if not parts.transforms:
        return pooled_BH
    if len(parts.transforms) > 1 or parts.activation not in ACT2FN:
        raise CheckpointError(
            f"The head of {type(model).__name__} is not known: {list(parts.transforms)}, then {parts.activation!r}."
        )
    dense = next(iter(parts.transforms.values()))
    hidden_BH: torch.Tensor = ACT2FN[parts.activation](dense(pooled_BH))
    return hidden_BH if parts.norm is None else parts.norm(hidden_BH)


def head_logits(model: PreTrainedModel, pooled_BH: torch.Tensor) -> torch.Tensor:
    """Logits (B, C) of pooled states, without dropout, with gradients; see `head_features`."""
    logits_BC: torch.Tensor = head_of(model).final(head_features(model, pooled_BH))
    return logits_BC


def head_parameters(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """The parameters of transforms, norm and final layer, by their names in the model."""
    parts = head_of(model)
    layers = {id(layer) for layer in (*parts.transforms.values(), parts.norm, parts.final) if layer is not None}
    return {
        f"{name}.{key}": parameter
        for name, module in model.named_modules()
        if id(module) in layers
        for key, parameter in module.named_parameters()
    }


@dataclass(frozen=True, eq=False)
class PooledMoments:
    """Mean and standard deviation of each entry of the pooled state over some rows; both of shape H."""

    mean_H: torch.Tensor
    deviation_H: torch.Tensor


def pooled_moments(model: PreTrainedModel, batches: Iterable[Mapping[str, torch.Tensor]]) -> PooledMoments:
    """Moments of the pooled states: the input of the first transform, or of `final` where there is none.

    Runs without gradients and dropout; the model's mode is restored.

    Raises:
        ConfigError: `batches` holds fewer than two rows.
    """
    with _evaluating(model), torch.no_grad():
        states = [pooled_states(model, batch).double() for batch in batches]
    if sum(map(len, states)) < 2:
        raise ConfigError("The moments of pooled states need two rows or more.")
    states_NH = torch.cat(states)
    return PooledMoments(states_NH.mean(dim=0).float(), states_NH.std(dim=0).float())


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def make_transparent_(model: PreTrainedModel, moments: PooledMoments, *, size: float = 0.5) -> None:
    """Turn the layer before `final` into a standardisation, so that a probe on the pooled state starts the classifier.

    With x the pooled state, m and s the mean and standard deviation of each entry over some rows, the dense layer
    becomes z = size * (x - m) / s + b: a diagonal, and every entry has standard deviation `size` around b. A plain
    scaled identity would do for the probe, but not for the training after it: the CLS state of a lower layer hardly
    varies, so the probe's weights grow by 1/s and the first steps throw the model off. What `final` then reads, and
    how far from a straight line at one standard deviation:

    - tanh, b = 0: tanh z = z - z^3/3, relative error size^2/3 (8 % at 0.5).
    - relu, b = 6 size: equal to z as long as no entry is below -6 standard deviations.
    - gelu, b = sqrt(2), where gelu'' = 0: 1.303 + 1.129 (z - b) - 0.069 (z - b)^3, relative error 0.06 size^2.
    - gelu without a bias (ModernBERT, where m cannot be taken off either): z/2 + 0.4 z^2.
    - a LayerNorm after that (ModernBERT; set to weight 1, bias 0) rescales each row, which a probe takes part in.

    The rest of the body is not touched, and nothing happens for decoders, which have no such layer. Fit the probe on
    `features(model, batch)` afterwards, not on x: then the fold by `set_final_` is exact whatever the activation does.

    Args:
        model: A sequence classifier.
        moments: Of its pooled states, see `pooled_moments`.
        size: Standard deviation of z; small is more linear, but makes the final layer's weights larger.

    Raises:
        ConfigError: `size` is not positive, or the moments are not finite.
        CheckpointError: The head has several transforms, one that is not square, or another activation.
    """
    finite = bool(torch.isfinite(moments.mean_H).all() and torch.isfinite(moments.deviation_H).all())
    if not (size > 0 and finite):
        raise ConfigError(f"make_transparent_ needs a positive size and finite moments, not size={size}.")
    parts = head_of(model)
    if not parts.transforms:
        return
    dense = next(iter(parts.transforms.values()))
    if len(parts.transforms) > 1 or dense.in_features != dense.out_features:
        raise CheckpointError(
            f"The head of {type(model).__name__} cannot be made transparent: {list(parts.transforms)}.",
            why="A linear probe's weights can start a head of one square layer before the final one, or of none.",
            fix="--linear_probe false",
        )
    # an entry that never varies tells the classes apart no better for being blown up
    floor = 0.1 * float(moments.deviation_H.median()) + 1e-6
    scale_H = (size / moments.deviation_H.clamp(min=floor)).to(dense.weight.device)
    offset = 0.0 if dense.bias is None else _offset_of(parts.activation, size, type(model).__name__)
    with torch.no_grad():
        dense.weight.copy_(torch.diag(scale_H))
        if dense.bias is not None:
            dense.bias.copy_(offset - scale_H * moments.mean_H.to(scale_H.device))
        if parts.norm is not None:
            parts.norm.weight.fill_(1.0)
            if parts.norm.bias is not None:
                parts.norm.bias.zero_()


def _offset_of(activation: str, size: float, name: str) -> float:
    if activation == "tanh":
        return 0.0
    if activation == "relu":
        return _RELU_SIGMAS * size
    if activation in ("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh"):
        return _GELU_INFLECTION
    raise CheckpointError(
        f"The head of {name} uses the activation {activation!r}, for which no near identity is known.",
        fix="--linear_probe false",
        available=("tanh", "relu", "gelu"),
    )


def set_final_(model: PreTrainedModel, weight_CH: torch.Tensor, bias_C: torch.Tensor | None) -> None:
    """Write a probe's solution into the final layer: afterwards logits = features weight^T + bias.

    Args:
        model: A sequence classifier.
        weight_CH: The probe's weights.
        bias_C: Its intercepts; None sets the bias to 0, and is required where the layer has no bias.

    Raises:
        CheckpointError: Shapes do not fit, or a bias is given and the layer has none.
    """
    final = head_of(model).final
    wanted = tuple(final.weight.shape)
    if tuple(weight_CH.shape) != wanted or (bias_C is not None and tuple(bias_C.shape) != wanted[:1]):
        raise CheckpointError(
            f"The probe's weights have the shape {tuple(weight_CH.shape)}, the final layer has {wanted}."
        )
    if bias_C is not None and final.bias is None:
        raise CheckpointError(
            f"The final layer of {type(model).__name__} has no bias, so the probe's intercepts cannot be kept.",
            fix="fit the probe without intercepts and pass bias_C=None",
        )
    with torch.no_grad():
        final.weight.copy_(weight_CH)
        if final.bias is not None:
            final.bias.zero_() if bias_C is None else final.bias.copy_(bias_C)


def embedding_parameters(model: PreTrainedModel) -> list[tuple[str, nn.Parameter]]:
    """Token, position and type embeddings by name, without LayerNorms and projections.

    Tables inside the encoder (DeBERTa's `rel_embeddings`, read by every layer) do not count.
    """
    inside = (".encoder.", ".layers.", ".layer.", ".h.", ".block.")
    found: list[tuple[str, nn.Parameter]] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and not any(part in f".{name}." for part in inside):
            weight: Any = module.weight
            found.append((f"{name}.weight", weight))
    return found
