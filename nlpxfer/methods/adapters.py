"""Adapters: a small number of added or chosen weights and the head learn, the pretrained weights stay.

Where the adapter goes, unless the user says: all linear layers of attention and feed-forward network. Chosen over
query and value alone, peft's default, because adapting all of them is what comes up to full fine-tuning (Dettmers et
al. 2023, arXiv:2305.14314, figure 2), and over peft's `all-linear`, which raises for DistilBERT and wraps the pooler,
a part of the head. (IA)3 scales keys, values and the input of the last feed-forward layer, as in its paper (section
3.3); where keys and values are one layer with the queries, all three.

Sources: see `nlpxfer.checkpoint.adapter_kinds`.
"""

from __future__ import annotations

import inspect
import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, cast, final

from torch import Tensor, nn

from nlpxfer.checkpoint.adapter_kinds import (
    ALPHA,
    BLOCK,
    DROPOUT,
    IA3_FEEDFORWARD,
    KINDS,
    NUM_WEIGHTS,
    OPTIONS,
    RANK,
    TARGETS,
    VIRTUAL_TOKENS,
    AdapterKind,
)
from nlpxfer.checkpoint.adapters import head_modules, refuse_frozen_fresh, trained_names, wrap
from nlpxfer.checkpoint.linear_layers import is_transposed, linear_layers, names_in_blocks
from nlpxfer.errors import ConfigError, nearest
from nlpxfer.methods.base import Batch, LossTerm, Method, is_sharded
from nlpxfer.methods.finetune import FineTune

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel

    from nlpxfer.config import RunOptions

logger = logging.getLogger(__name__)

FIRST_RANKS: Final = 1.5
"""Ranks that AdaLoRA starts with over those that it keeps: the paper's, section 4.1."""
UNFIT_OPTIONS: Final[dict[str, Any]] = {
    "freeze_embeddings": True,
    "num_trained_layers": None,
    "layer_decay": 1.0,
    "gradual_unfreezing": 0.0,
    "l2_sp_weight": 0.0,
    "l2_sp_head_weight": 0.0,
}
"""Options that choose among pretrained weights, of which none learns here, with the value that leaves them out."""


@final
@dataclass(frozen=True, kw_only=True)
class Adapters(Method):
    """The loss with the gold labels; an adapter and the head learn.

    Args:
        adapter: A key of `KINDS`.
        adapter_rank: r, the inner size of the adapter; at least 1. None: the default of the kind.
        adapter_alpha: alpha, the adapter's output times alpha / r; above 0.
        adapter_dropout: Share of the adapter's inputs that is dropped while training, in [0, 1).
        adapter_block_size: Size of the blocks into which some kinds cut a layer; at least 2.
        adapter_num_weights: How many numbers some kinds learn: of each layer, or in all; at least 1.
        adapter_target_modules: Names, or ends of names, of the linear layers to adapt; empty: see the module.
        num_virtual_tokens: Length of a learnt prompt or prefix; at least 1.
        label_loss: The loss with the gold labels.

    Raises:
        ConfigError: An unknown kind, values outside their range, options that the kind does not use: all are listed.
    """

    adapter: str = "lora"
    adapter_rank: int | None = None
    adapter_alpha: float | None = None
    adapter_dropout: float | None = None
    adapter_block_size: int | None = None
    adapter_num_weights: int | None = None
    adapter_target_modules: tuple[str, ...] = ()
    num_virtual_tokens: int | None = None
    label_loss: FineTune = field(default_factory=FineTune)

    def __post_init__(self) -> None:
        faults = [] if self.adapter in KINDS else [_unknown(self.adapter)]
        if self.adapter in KINDS:
            unused = [
                name for name in OPTIONS if getattr(self, name) not in (None, ()) and name not in self.kind.options
            ]
            used = ", ".join(self.kind.options) or "no option of its own"
            faults += [f"{name}: the adapter {self.adapter} has no use for it; it has {used}" for name in unused]
        for name, least in {RANK: 1, BLOCK: 2, NUM_WEIGHTS: 1, VIRTUAL_TOKENS: 1}.items():
            value = getattr(self, name)
            if value is not None and value < least:
                faults.append(f"{name}: {value} is below {least}")
        if self.adapter_alpha is not None and not 0 < self.adapter_alpha < math.inf:
            faults.append(f"{ALPHA}: {self.adapter_alpha} is not a finite number above 0")
        if self.adapter_dropout is not None and not 0 <= self.adapter_dropout < 1:
            faults.append(f"{DROPOUT}: {self.adapter_dropout} is not in [0, 1)")
        if any(not name.strip() for name in self.adapter_target_modules):
            faults.append(f"{TARGETS}: a name is empty")
        if faults:
            raise ConfigError.from_faults(faults)

    @property
    def kind(self) -> AdapterKind:
        """The row of this kind of adapter."""
        return KINDS[self.adapter]

    @property
    def defaults(self) -> dict[str, int | float]:
        """What the options of this kind are where nobody says; alpha goes with the rank."""
        found = dict(self.kind.defaults)
        if ALPHA in self.kind.options:
            found[ALPHA] = self.kind.alpha_per_rank * (self.adapter_rank or found[RANK])
        return found

    def loss_terms(self, model: nn.Module, batch: Batch) -> dict[str, LossTerm]:
        """Those of the label loss."""
        return self.label_loss.loss_terms(model, batch)

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Those of the label loss."""
        return self.label_loss.counts(batch)

    def check(self, options: RunOptions) -> None:
        """Refuse options that choose among pretrained weights, and FSDP, whose shards mix frozen and trained ones."""
        faults = [
            f"{name}: does not fit an adapter, which leaves all pretrained weights as they are"
            for name, neutral in UNFIT_OPTIONS.items()
            if getattr(options, name) != neutral
        ]
        if self.adapter == "adalora" and options.fp16:
            faults.append("fp16: adalora scores ranks by their gradients, which fp16 scales; use bf16")
        if self.adapter == "prefix" and (options.activation_checkpointing or options.gradient_checkpointing):
            faults.append("activation_checkpointing: drops the keys and values that prefix puts before a text")
        if is_sharded(options):
            faults.append("fsdp: adapters train with DDP; the frozen weights need no optimizer state anyway")
        if faults:
            raise ConfigError.from_faults(faults)

    def adapt(self, model: PreTrainedModel, fresh: Sequence[str]) -> PreTrainedModel:
        """The classifier with the adapter; adapter and head learn, all else is frozen.

        Raises:
            ConfigError: The kind cannot work in this family, or a target does not exist.
            CheckpointError: A newly initialised parameter would stay frozen.
        """
        config = self._config(model, fresh)
        try:
            adapted = wrap(model, config)
        except (ValueError, TypeError, AttributeError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(
                f"adapter: {self.adapter} cannot be put into {type(model).__name__}: {reason}"
            ) from error
        refuse_frozen_fresh(adapted, fresh)
        if fresh:
            logger.info("newly initialised, trained and saved with the adapter: %s", ", ".join(fresh))
        if self.adapter == "bitfit" and not _body_biases(model, adapted):
            raise ConfigError(
                f"adapter: bitfit trains biases, and the body of {type(model).__name__} has none.",
                fix="--adapter lora",
            )
        trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        logger.info("adapter %s: %d trained parameters, the head among them", self.adapter, trained)
        return cast("PreTrainedModel", adapted)

    def _config(self, model: PreTrainedModel, fresh: Sequence[str]) -> PeftConfig:
        import peft

        kind = self.kind
        values: dict[str, Any] = {"task_type": "SEQ_CLS", "modules_to_save": head_modules(model, fresh), **kind.fixed}
        for option, name in kind.options.items():
            given = getattr(self, option)
            values[name] = self.defaults.get(option) if given in (None, ()) else given
        if self.adapter == "adalora":
            values["init_r"] = math.ceil(FIRST_RANKS * values["target_r"])
        if TARGETS in kind.options:
            linear = self._targets(model)
            values["target_modules"] = _short(linear, model)
            if BLOCK in kind.options:
                values[kind.options[BLOCK]] = self._block_size(linear)
            if self.adapter == "ia3":
                feedforward = {name: module for name, module in linear.items() if re.search(IA3_FEEDFORWARD, name)}
                values["feedforward_modules"] = _short(feedforward, model)
            if kind.transposes:
                values["fan_in_fan_out"] = any(is_transposed(module) for module in linear.values())
        if self.adapter == "layernorm":
            values["target_modules"] = _norms(model)
        if VIRTUAL_TOKENS in kind.options:
            values |= self._prompt(model)
        return cast("PeftConfig", getattr(peft, kind.config)(**values))

    def _targets(self, model: PreTrainedModel) -> dict[str, nn.Module]:
        """The layers to adapt by name.

        Raises:
            ConfigError: Names that no linear layer of the body has; or the kind cannot wrap these layers.
        """
        linear = linear_layers(model)
        chosen = linear
        if self.adapter_target_modules:
            endings = {name: [full for full in linear if f".{full}".endswith(f".{name}")]
                       for name in self.adapter_target_modules}  # fmt: skip
            unknown = [name for name, found in endings.items() if not found]
            if unknown:
                raise ConfigError(
                    f"{TARGETS}: no linear layer of the body is named {', '.join(unknown)}.",
                    available=names_in_blocks(linear),
                )
            chosen = {full: linear[full] for full in linear if any(full in found for found in endings.values())}
        elif self.kind.default_targets:
            chosen = {name: linear[name] for name in linear if re.search(self.kind.default_targets, name)}
        if not chosen:
            raise ConfigError(
                f"adapter: it is not known which layers of {type(model).__name__} the adapter {self.adapter} is for.",
                fix=f"--{TARGETS} NAME ...",
                available=names_in_blocks(linear),
            )
        if not self.kind.wraps_conv1d and any(is_transposed(module) for module in chosen.values()):
            raise ConfigError(
                f"adapter: {self.adapter} wraps nn.Linear, and {type(model).__name__} has Conv1D layers instead.",
                available=[name for name, kind in KINDS.items() if kind.wraps_conv1d],
            )
        if self.kind.needs_bias and any(getattr(module, "bias", None) is None for module in chosen.values()):
            raise ConfigError(
                f"adapter: {self.adapter} trains biases, and layers of {type(model).__name__} have none.",
                fix="--adapter lora",
            )
        return chosen

    def _block_size(self, linear: dict[str, nn.Module]) -> int:
        """The block size: as given, else the default or the largest part of it that fits.

        Raises:
            ConfigError: It does not divide the layers.
        """
        sides = self.kind.block_divides
        shapes = [cast("Tensor", module.weight).shape for module in linear.values()]  # `Conv1D`: only where both count
        sizes = sorted({size for shape in shapes for side, size in zip(("outputs", "inputs"), shape, strict=True)
                        if side in sides})  # fmt: skip
        fitting = math.gcd(*sizes)
        block = self.adapter_block_size or math.gcd(int(self.kind.defaults[BLOCK]), fitting)
        if block < 2 or fitting % block:
            raise ConfigError(
                f"{BLOCK}: {self.adapter} cuts layers into blocks of {block}, and here they have "
                f"{', '.join(map(str, sizes))} {' and '.join(sides)}.",
                fix=f"a divisor of {fitting}" if fitting > 1 else "--adapter lora",
            )
        return block

    def _prompt(self, model: PreTrainedModel) -> dict[str, Any]:
        """Sizes of a prompt or prefix, for families where peft does not find them itself."""
        config = model.config.get_text_config()
        hidden = int(config.hidden_size)
        width = cast("nn.Embedding", model.get_input_embeddings()).embedding_dim
        sizes = {"num_layers": int(config.num_hidden_layers), "num_attention_heads": int(config.num_attention_heads)}
        if self.adapter != "prefix":
            return {
                **sizes,
                "token_dim": width,
                **({"encoder_hidden_size": hidden} if self.adapter == "p_tuning" else {}),
            }
        body = getattr(model, model.base_model_prefix)
        if not any("past_key_values" in inspect.signature(part.forward).parameters for part in (model, body)):
            raise ConfigError(
                f"adapter: prefix puts keys and values before the text's own, and {type(model).__name__} takes none.",
                available=[name for name in KINDS if name != "prefix"],
            )
        return sizes | {"token_dim": hidden}


def _unknown(name: str) -> str:
    close = nearest(name, KINDS)
    return f"adapter: {name!r} is not one of {', '.join(KINDS)}" + (f"; did you mean {close}?" if close else "")


def _short(chosen: dict[str, nn.Module], model: PreTrainedModel) -> list[str]:
    """The layers by the ends of their names where these mean the same layers, else by their whole names."""
    ends = names_in_blocks(chosen)
    meant = {n for n, m in model.named_modules() if any(f".{n}".endswith(f".{end}") for end in ends)}
    return ends if meant == set(chosen) else sorted(chosen)


def _norms(model: PreTrainedModel) -> list[str]:
    """Names of the normalisation layers of the body, of whatever class."""
    prefix = f"{model.base_model_prefix}."
    return [
        name
        for name, module in model.named_modules()
        if name.startswith(prefix) and "Norm" in type(module).__name__ and not list(module.children())
    ]


def _body_biases(model: PreTrainedModel, adapted: nn.Module) -> set[str]:
    """Trained biases outside of the head."""
    saved = tuple(f"{name}." for name in cast("Any", adapted).active_peft_config.modules_to_save)
    return {name for name in trained_names(adapted) if name.endswith("bias") and not name.startswith(saved)}
