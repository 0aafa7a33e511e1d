"""Fingerprints of weights and tokenizers: equal when, and only when, they compute the same from the same text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def weights_fingerprint(model: nn.Module, *, without: Collection[str] = ()) -> str:
    """sha256 (hex) over the state dict, less `without`: names in sorted order, types, shapes and bytes."""
    digest = hashlib.sha256()
    state = model.state_dict()
    for name in sorted(state.keys() - set(without)):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 (hex) over the serialised tokenizer, its special tokens and its sides.

    Padding and truncation of the backend are left out: they are set by each call, so the fingerprint would depend on
    what was tokenised last.
    """
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        content = json.loads(backend.to_str())
        content.pop("padding", None)
        content.pop("truncation", None)
    else:
        content = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    content["special"] = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    content["sides"] = [tokenizer.padding_side, tokenizer.truncation_side]
    content["inputs"] = list(tokenizer.model_input_names)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
