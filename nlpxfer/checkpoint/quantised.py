"""Load the frozen base of an adapter in 8 or 4 bits, to save memory while training (QLoRA).

Quantised is the base in training alone. Scores, bundle and merged model are those of the adapter on the float32 base,
so that whoever loads them needs neither a GPU nor bitsandbytes, and sees the logits that were measured.

Sources: Dettmers et al. 2022, arXiv:2208.07339 (8 bits); Dettmers et al. 2023, arXiv:2305.14314 (4 bits, NF4).
"""

from __future__ import annotations

import importlib.util
import logging
import re
from typing import TYPE_CHECKING, Any, Literal

import torch

from nlpxfer.checkpoint.linear_layers import other_linear_layers
from nlpxfer.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Bits = Literal["8bit", "4bit"]


def check_quantised(bits: Bits, *, device: torch.device | None = None) -> None:
    """Raise ConfigError unless this machine can load a model in 8 or 4 bits; all that is missing is listed.

    Args:
        bits: How many.
        device: Where the model is to be trained; None: on the GPU.
    """
    option, gpu = f"load_in_{bits}", _gpu()
    faults = []
    if gpu is None:
        faults.append(f"{option}: needs an NVIDIA GPU, and torch sees none here; leave it out")
    elif device is not None and device.type != torch.device(gpu).type:
        faults.append(f"{option}: needs the GPU, and use_cpu leaves it out; leave out one of the two")
    if importlib.util.find_spec("bitsandbytes") is None:
        faults.append(f"{option}: needs bitsandbytes; pip install 'nlpxfer[bits]'")
    if faults:
        raise ConfigError.from_faults(faults)


def quantised_loading(bits: Bits, plain: PreTrainedModel) -> dict[str, Any]:
    """What `from_pretrained` needs to load a model in 8 or 4 bits on the current GPU; see `check_quantised` first.

    The layers outside of the blocks stay as they are: heads are trained, a new final layer takes the place of the old
    one, and BERT's pooler (`bert.pooler.dense`) is new where a language model is the start.

    Args:
        bits: How many.
        plain: The same model in float32; its layers are looked up, nothing is changed.

    Raises:
        CheckpointError: See `linear_layers`.
    """
    from transformers import BitsAndBytesConfig

    logging.getLogger("bitsandbytes.autograd._functions").addFilter(_is_news)
    outside = [f"{re.escape(name)}$" for name in other_linear_layers(plain)]
    if bits == "8bit":
        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=outside)  # type: ignore[no-untyped-call]
    else:
        config = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16
            if torch.cuda.is_bf16_supported(including_emulation=False)
            else torch.float16,
            llm_int8_skip_modules=outside,
        )
    return {"quantization_config": config, "device_map": {"": _gpu()}}


def _is_news(record: logging.LogRecord) -> bool:
    """Not that 8 bits compute in float16, which bitsandbytes says of each layer in each step (2026-11, 0.50)."""
    return "inputs will be cast" not in str(record.msg)


def _gpu() -> int | None:
    """The GPU of this process, or None."""
    return torch.cuda.current_device() if torch.cuda.is_available() else None
