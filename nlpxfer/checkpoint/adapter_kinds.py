"""The kinds of adapters, one row each: which class of peft, which options it reads, and what can be done with it.

The list is closed: a bundle that names another type of peft is not opened. Some types load further files, run a
tokenizer or import modules that their config names, and none of the others was tried on classifiers here.

BitFit is no type of peft. It is peft's LoRA without a single target and with all biases trained, which peft saves and
loads by itself: chosen over a tuner of our own, whose folder nobody else could read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

RANK: Final = "adapter_rank"
ALPHA: Final = "adapter_alpha"
DROPOUT: Final = "adapter_dropout"
TARGETS: Final = "adapter_target_modules"
VIRTUAL_TOKENS: Final = "num_virtual_tokens"
WIDE: Final = 768
NO_TARGETS: Final = "dummy-target-modules"
"""What peft calls a LoRA that targets nothing."""


@dataclass(frozen=True, kw_only=True)
class AdapterKind:
    """One kind of adapter.

    Attributes:
        name: What `--adapter` says.
        config: Class of peft that configures it.
        peft_type: What adapter_config.json calls it.
        options: Option -> the field of `config` that it sets.
        fixed: Further fields of `config`.
        defaults: Option -> its default.
        alpha_per_rank: Default of alpha over the rank.
        learning_rate: Default of the peak learning rate up to a hidden size of 768; see `learning_rate_for`.
        wraps_conv1d: Whether it can wrap the `Conv1D` layers that GPT-2 has in place of linear ones.
        transposes: Whether `config` must be told of `Conv1D`, whose weight is stored transposed.
        merges: Whether it can be folded into the weights of its base.
        quantised: Whether it trains on a base in 8 or 4 bits.
        source: Paper.
    """

    name: str
    config: str
    peft_type: str
    options: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, int | float] = field(default_factory=dict)
    alpha_per_rank: float = 2.0
    learning_rate: float = 1e-3
    wraps_conv1d: bool = True
    transposes: bool = True
    merges: bool = True
    quantised: bool = False
    source: str = ""

    def learning_rate_for(self, hidden_size: int, *, gently: bool) -> float:
        """Default of the peak learning rate.

        Args:
            hidden_size: Numbers per token between the layers; beyond 768 the rate is 0.3 times as high.
            gently: Whether the head is large from the start, so that a small step changes the answers: 0.3 times too.
        """
        share = (0.3 if hidden_size > WIDE else 1.0) * (0.3 if gently else 1.0)
        return float(f"{self.learning_rate * share:.3g}")


_LORA_OPTIONS = {RANK: "r", ALPHA: "lora_alpha", DROPOUT: "lora_dropout", TARGETS: "target_modules"}
_LORA_DEFAULTS = {RANK: 8, DROPOUT: 0.0}
_LINEAR_ONLY: dict[str, Any] = {"wraps_conv1d": False, "transposes": False}
_PROMPT: dict[str, Any] = {
    "options": {VIRTUAL_TOKENS: "num_virtual_tokens"},
    "defaults": {VIRTUAL_TOKENS: 20},
    "transposes": False,
    "merges": False,
}

_ROWS: Final = (
    AdapterKind(
        name="lora",
        config="LoraConfig",
        peft_type="LORA",
        options=_LORA_OPTIONS,
        defaults=_LORA_DEFAULTS,
        quantised=True,
        source="Hu et al. 2021, arXiv:2106.09685",
    ),
    AdapterKind(
        name="rslora",
        config="LoraConfig",
        peft_type="LORA",
        options=_LORA_OPTIONS,
        fixed={"use_rslora": True},
        defaults=_LORA_DEFAULTS,
        alpha_per_rank=1.0,  # times rank / sqrt(rank): about the size of LoRA's default at rank 8
        quantised=True,
        source="Kalajdzievski 2023, arXiv:2312.03732",
    ),
    AdapterKind(
        name="dora",
        config="LoraConfig",
        peft_type="LORA",
        options=_LORA_OPTIONS,
        fixed={"use_dora": True},
        defaults=_LORA_DEFAULTS,
        quantised=True,
        source="Liu et al. 2024, arXiv:2402.09353",
    ),
    AdapterKind(
        name="ia3",
        config="IA3Config",
        peft_type="IA3",
        options={TARGETS: "target_modules"},
        learning_rate=5e-3,
        quantised=True,
        source="Liu et al. 2022, arXiv:2205.05638",
    ),
    AdapterKind(
        name="prefix",
        config="PrefixTuningConfig",
        peft_type="PREFIX_TUNING",
        source="Li and Liang 2021, arXiv:2101.00190",
        **_PROMPT,
    ),
    AdapterKind(
        name="prompt",
        config="PromptTuningConfig",
        peft_type="PROMPT_TUNING",
        source="Lester et al. 2021, arXiv:2104.08691",
        **_PROMPT,
    ),
    AdapterKind(
        name="p_tuning",
        config="PromptEncoderConfig",
        peft_type="P_TUNING",
        source="Liu et al. 2021, arXiv:2103.10385",
        **_PROMPT,
    ),
    AdapterKind(
        name="layernorm",
        config="LNTuningConfig",
        peft_type="LN_TUNING",
        transposes=False,
        source="Zhao et al. 2023, arXiv:2312.11420",
    ),
    AdapterKind(
        name="bitfit",
        config="LoraConfig",
        peft_type="LORA",
        fixed={"target_modules": NO_TARGETS, "bias": "all"},
        transposes=False,
        source="Ben Zaken et al. 2021, arXiv:2106.10199",
    ),
    AdapterKind(
        name="vera",
        config="VeraConfig",
        peft_type="VERA",
        options={RANK: "r", DROPOUT: "vera_dropout", TARGETS: "target_modules"},
        defaults={RANK: 256, DROPOUT: 0.0},
        learning_rate=5e-3,
        source="Kopiczko et al. 2023, arXiv:2310.11454",
    ),
    AdapterKind(
        name="randlora",
        config="RandLoraConfig",
        peft_type="RANDLORA",
        options={RANK: "r", ALPHA: "randlora_alpha", DROPOUT: "randlora_dropout", TARGETS: "target_modules"},
        defaults={RANK: 32, DROPOUT: 0.0},
        alpha_per_rank=20.0,
        source="Albert et al. 2025, arXiv:2502.00987",
    ),
    AdapterKind(
        name="loha",
        config="LoHaConfig",
        peft_type="LOHA",
        options={RANK: "r", ALPHA: "alpha", TARGETS: "target_modules"},
        defaults={RANK: 8},
        alpha_per_rank=1.0,
        source="Hyeon-Woo et al. 2021, arXiv:2108.06098",
        **_LINEAR_ONLY,
    ),
    AdapterKind(
        name="lokr",
        config="LoKrConfig",
        peft_type="LOKR",
        options={RANK: "r", ALPHA: "alpha", TARGETS: "target_modules"},
        defaults={RANK: 8},
        alpha_per_rank=1.0,
        source="Yeh et al. 2023, arXiv:2309.14859",
        **_LINEAR_ONLY,
    ),
    AdapterKind(
        name="hra",
        config="HRAConfig",
        peft_type="HRA",
        options={RANK: "r", TARGETS: "target_modules"},
        defaults={RANK: 8},
        source="Yuan et al. 2024, arXiv:2405.17484",
        **_LINEAR_ONLY,
    ),
    AdapterKind(
        name="miss",
        config="MissConfig",
        peft_type="MISS",
        options={RANK: "r", DROPOUT: "miss_dropout", TARGETS: "target_modules"},
        defaults={RANK: 16, DROPOUT: 0.0},
        source="Kang and Yin 2024, arXiv:2409.15371",
        **_LINEAR_ONLY,
    ),
)

KINDS: Final[dict[str, AdapterKind]] = {kind.name: kind for kind in _ROWS}
PEFT_TYPES: Final = frozenset(kind.peft_type for kind in _ROWS)
OPTIONS: Final = (RANK, ALPHA, DROPOUT, TARGETS, VIRTUAL_TOKENS)
