"""The kinds of adapters, one row each: which class of peft, which options it reads, and what can be done with it.

The list is closed: a bundle that names another type of peft is not opened. Some types load further files, run a
tokenizer or import modules that their config names; docs/adapters.md says why each of the others is left out.

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
BLOCK: Final = "adapter_block_size"
NUM_WEIGHTS: Final = "adapter_num_weights"
VIRTUAL_TOKENS: Final = "num_virtual_tokens"
NARROW: Final = 512
WIDE: Final = 768
NO_TARGETS: Final = "dummy-target-modules"
"""What peft calls a LoRA that targets nothing."""
IA3_FEEDFORWARD: Final = (
    r"(^|\.)(ffn\.lin2|ffn_output|mlp\.(Wo|c_proj|dense_4h_to_h|down_proj)|(?<!attention\.)output\.dense)$"
)
_VALUES: Final = r"(^|\.)(value|v_lin|v_proj|value_proj)$"
_IA3_SCALED: Final = (
    r"(^|\.)(key|value|k_lin|v_lin|k_proj|v_proj|key_proj|value_proj|c_attn|query_key_value|Wqkv|qkv_proj)$"
)


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
        learning_rate: Default of the peak learning rate for a hidden size of 768; see `learning_rate_for`.
        narrow_rate: The same up to 512; None: `learning_rate` too.
        default_targets: Pattern of the linear layers that it is for where none is named; None: all.
        block_divides: Which sizes of a layer the block size must divide, of "inputs" and "outputs".
        needs_bias: Whether the layers must have a bias.
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
    narrow_rate: float | None = None
    default_targets: str | None = None
    block_divides: tuple[str, ...] = ()
    needs_bias: bool = False
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
        rate = self.narrow_rate if self.narrow_rate and hidden_size <= NARROW else self.learning_rate
        share = (0.3 if hidden_size > WIDE else 1.0) * (0.3 if gently else 1.0)
        return float(f"{rate * share:.3g}")


_LORA_OPTIONS = {RANK: "r", ALPHA: "lora_alpha", DROPOUT: "lora_dropout", TARGETS: "target_modules"}
_LORA_DEFAULTS = {RANK: 8, DROPOUT: 0.0}
_LORA_NARROW_RATE = 2e-3
"""Chosen on validation rows of banking77, clinc150, scicite, unfair_tos and debian-sections with MiniLM, 384 wide."""
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
        narrow_rate=_LORA_NARROW_RATE,
        defaults=_LORA_DEFAULTS,
        quantised=True,
        source="Hu et al. 2021, arXiv:2106.09685",
    ),
    AdapterKind(
        name="rslora",
        config="LoraConfig",
        peft_type="LORA",
        options=_LORA_OPTIONS,
        narrow_rate=_LORA_NARROW_RATE,
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
        narrow_rate=_LORA_NARROW_RATE,
        fixed={"use_dora": True},
        defaults=_LORA_DEFAULTS,
        quantised=True,
        source="Liu et al. 2024, arXiv:2402.09353",
    ),
    AdapterKind(
        name="adalora",
        config="AdaLoraConfig",
        peft_type="ADALORA",
        options={RANK: "target_r", ALPHA: "lora_alpha", DROPOUT: "lora_dropout", TARGETS: "target_modules"},
        fixed={"total_step": 1},  # until the training knows how many there are
        defaults=_LORA_DEFAULTS,
        source="Zhang et al. 2023, arXiv:2303.10512",
    ),
    AdapterKind(
        name="ia3",
        config="IA3Config",
        peft_type="IA3",
        options={TARGETS: "target_modules"},
        default_targets=f"{_IA3_SCALED}|{IA3_FEEDFORWARD}",
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
    AdapterKind(
        name="oft",
        config="OFTConfig",
        peft_type="OFT",
        options={BLOCK: "oft_block_size", TARGETS: "target_modules"},
        defaults={BLOCK: 32},
        block_divides=("inputs",),
        source="Qiu et al. 2023, arXiv:2306.07280",
        **_LINEAR_ONLY,
    ),
    AdapterKind(
        name="c3a",
        config="C3AConfig",
        peft_type="C3A",
        options={BLOCK: "block_size", TARGETS: "target_modules"},
        fixed={"init_weights": True},
        defaults={BLOCK: 128},
        block_divides=("inputs", "outputs"),
        learning_rate=1e-2,  # the paper gives 0.1 and more, and the head a rate of its own
        source="Chen et al. 2024, arXiv:2407.19342",
        **_LINEAR_ONLY,
    ),
    AdapterKind(
        name="road",
        config="RoadConfig",
        peft_type="ROAD",
        options={BLOCK: "group_size", TARGETS: "target_modules"},
        defaults={BLOCK: 64},
        block_divides=("outputs",),
        learning_rate=5e-3,
        source="Liao and Monz 2024, arXiv:2409.00119",
        **_LINEAR_ONLY,
    ),
    AdapterKind(
        name="fourierft",
        config="FourierFTConfig",
        peft_type="FOURIERFT",
        options={NUM_WEIGHTS: "n_frequency", TARGETS: "target_modules"},
        fixed={"scaling": 1500.0, "init_weights": True},  # at 5e-3 as the paper's 150 at 5e-2, which no head bears
        defaults={NUM_WEIGHTS: 1000},
        learning_rate=5e-3,
        source="Gao et al. 2024, arXiv:2405.03003",
    ),
    AdapterKind(
        name="waveft",
        config="WaveFTConfig",
        peft_type="WAVEFT",
        options={NUM_WEIGHTS: "n_frequency", TARGETS: "target_modules"},
        defaults={NUM_WEIGHTS: 1000},
        source="Bilican et al. 2025, arXiv:2505.12532",
    ),
    AdapterKind(
        name="vblora",
        config="VBLoRAConfig",
        peft_type="VBLORA",
        options={RANK: "r", DROPOUT: "vblora_dropout", BLOCK: "vector_length", TARGETS: "target_modules"},
        defaults={RANK: 4, DROPOUT: 0.0, BLOCK: 256},
        block_divides=("inputs", "outputs"),
        learning_rate=5e-3,
        source="Li et al. 2024, arXiv:2405.15179",
    ),
    AdapterKind(
        name="unilora",
        config="UniLoraConfig",
        peft_type="UNILORA",
        options={RANK: "r", DROPOUT: "unilora_dropout", NUM_WEIGHTS: "theta_d_length", TARGETS: "target_modules"},
        defaults={RANK: 4, DROPOUT: 0.0, NUM_WEIGHTS: 23040},
        learning_rate=5e-3,
        source="Li et al. 2025, arXiv:2506.00799",
    ),
    AdapterKind(
        name="tinylora",
        config="TinyLoraConfig",
        peft_type="TINYLORA",
        options={RANK: "r", DROPOUT: "tinylora_dropout", NUM_WEIGHTS: "u", TARGETS: "target_modules"},
        defaults={RANK: 2, DROPOUT: 0.0, NUM_WEIGHTS: 64},
        learning_rate=5e-3,
        source="Learning to Reason in 13 Parameters, 2026, arXiv:2602.04118",
    ),
    AdapterKind(
        name="hira",
        config="HiraConfig",
        peft_type="HIRA",
        options={RANK: "r", DROPOUT: "hira_dropout", TARGETS: "target_modules"},
        defaults={RANK: 32, DROPOUT: 0.0},
        learning_rate=5e-3,
        source="Huang et al. 2025, openreview.net/forum?id=TwJrTz9cRS",
    ),
    AdapterKind(
        name="delora",
        config="DeloraConfig",
        peft_type="DELORA",
        options={RANK: "r", ALPHA: "delora_lambda", TARGETS: "target_modules"},
        defaults={RANK: 8},
        alpha_per_rank=0.25,  # the change is as large from the first step: peft's 15 is too much
        source="Bini et al. 2025, arXiv:2503.18225",
        **_LINEAR_ONLY,
    ),
    AdapterKind(
        name="gralora",
        config="GraloraConfig",
        peft_type="GRALORA",
        options={RANK: "r", ALPHA: "alpha", DROPOUT: "gralora_dropout", TARGETS: "target_modules"},
        defaults={RANK: 32, DROPOUT: 0.0},
        source="Jung et al. 2025, arXiv:2505.20355",
    ),
    AdapterKind(
        name="glora",
        config="GloraConfig",
        peft_type="GLORA",
        options={RANK: "r", TARGETS: "target_modules"},
        defaults={RANK: 8},
        source="Chavan et al. 2023, arXiv:2306.07967",
        **_LINEAR_ONLY,
    ),
    AdapterKind(
        name="deft",
        config="DeftConfig",
        peft_type="DEFT",
        options={RANK: "r", ALPHA: "alpha", DROPOUT: "deft_dropout", TARGETS: "target_modules"},
        defaults={RANK: 8, DROPOUT: 0.0},
        alpha_per_rank=1.0,
        source="Kumar et al. 2025, NeurIPS, Decompositional Efficient Fine-Tuning",
    ),
    AdapterKind(
        name="peanut",
        config="PeanutConfig",
        peft_type="PEANUT",
        options={RANK: "r", TARGETS: "target_modules"},
        defaults={RANK: 8},
        source="Zhong et al. 2024, arXiv:2410.01870",
        **_LINEAR_ONLY,
    ),
    AdapterKind(
        name="pvera",
        config="PveraConfig",
        peft_type="PVERA",
        options={RANK: "r", DROPOUT: "pvera_dropout", TARGETS: "target_modules"},
        defaults={RANK: 256, DROPOUT: 0.0},
        learning_rate=5e-3,
        source="Fillioux et al. 2025, arXiv:2512.07703",
    ),
    AdapterKind(
        name="frod",
        config="FrodConfig",
        peft_type="FROD",
        options={DROPOUT: "frod_dropout", TARGETS: "target_modules"},
        fixed={"progressbar": False},
        defaults={DROPOUT: 0.0},
        source="FRoD, AAAI 2026, doi:10.1609/aaai.v40i31.39813",
    ),
    AdapterKind(
        name="shira",
        config="ShiraConfig",
        peft_type="SHIRA",
        options={RANK: "r", TARGETS: "target_modules"},
        fixed={"random_seed": 0},
        defaults={RANK: 8},
        learning_rate=5e-3,
        source="Bhardwaj et al. 2024, arXiv:2406.13175",
        **_LINEAR_ONLY,
    ),
    AdapterKind(
        name="supertuning",
        config="SupertuningConfig",
        peft_type="SUPERTUNING",
        options={TARGETS: "target_modules"},
        learning_rate=5e-3,
        source="Super-Tuning, 2026, arXiv:2607.09287",
        **_LINEAR_ONLY,
    ),
    AdapterKind(
        name="beft",
        config="BeftConfig",
        peft_type="BEFT",
        options={TARGETS: "target_modules"},
        default_targets=_VALUES,
        needs_bias=True,
        source="Huang et al. 2025, arXiv:2509.15974",
        **_LINEAR_ONLY,
    ),
    AdapterKind(
        name="osf",
        config="OSFConfig",
        peft_type="OSF",
        options={TARGETS: "target_modules"},
        learning_rate=3e-4,
        source="Nayak et al. 2025, arXiv:2504.07097",
        **_LINEAR_ONLY,
    ),
)

KINDS: Final[dict[str, AdapterKind]] = {kind.name: kind for kind in _ROWS}
PEFT_TYPES: Final = frozenset(kind.peft_type for kind in _ROWS)
OPTIONS: Final = (RANK, ALPHA, DROPOUT, BLOCK, NUM_WEIGHTS, TARGETS, VIRTUAL_TOKENS)
