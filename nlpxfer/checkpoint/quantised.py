"""Load the frozen base of an adapter in 8 or 4 bits, to save memory while training (QLoRA).

Quantised is the base in training alone. Scores, bundle and merged model are those of the adapter on the float32 base,
so that whoever loads them needs neither a GPU nor bitsandbytes, and sees the logits that were measured.

Sources: Dettmers et al. 2022, arXiv:2208.07339 (8 bits); Dettmers et al. 2023, arXiv:2305.14314 (4 bits, NF4).
"""

from __future__ import annotations

import importlib.util
from typing import Any, Final, Literal

import torch

from nlpxfer.errors import ConfigError

Bits = Literal["8bit", "4bit"]

HEAD_MODULES: Final = ("classifier", "score", "pooler", "pre_classifier", "head", "classification_head", "logits_proj")
"""Never quantised: heads are trained, and a new final layer takes the place of the old one."""


def check_quantised(bits: Bits) -> None:
    """Raise ConfigError unless this machine can load a model in 8 or 4 bits; all that is missing is listed."""
    option = f"load_in_{bits}"
    faults = []
    if not torch.cuda.is_available():
        faults.append(f"{option}: needs an NVIDIA GPU, and torch sees none here; leave it out")
    if importlib.util.find_spec("bitsandbytes") is None:
        faults.append(f"{option}: needs the package bitsandbytes; pip install bitsandbytes")
    if faults:
        raise ConfigError.from_faults(faults)


def quantised_loading(bits: Bits) -> dict[str, Any]:
    """What `from_pretrained` needs to load a model in 8 or 4 bits on the current GPU.

    Raises:
        ConfigError: See `check_quantised`.
    """
    from transformers import BitsAndBytesConfig

    check_quantised(bits)
    skipped = list(HEAD_MODULES)
    if bits == "8bit":
        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)  # type: ignore[no-untyped-call]
    else:
        config = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16,
            llm_int8_skip_modules=skipped,
        )
    return {"quantization_config": config, "device_map": {"": torch.cuda.current_device()}}
