"""Fingerprints of weights and tokenizers: equal when, and only when, they compute the same from the same text."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import nn

from nlpxfer.checkpoint.head import head_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_NOT_DECIDING: Final = frozenset(
    "_name_or_path architectures auto_map bos_token_id chunk_size_feed_forward cls_token_id decoder_start_token_id "
    "dtype eos_token_id finetuning_task gradient_checkpointing id2label initializer_range label2id mask_token_id "
    "num_labels output_attentions output_hidden_states problem_type quantization_config return_dict sep_token_id "
    "task_specific_params tokenizer_class torch_dtype torchscript transformers_version use_cache".split()
)


_NOT_READING: Final = frozenset(
    "backend is_local local_files_only model_max_length name_or_path padding_side processor_class tokenizer_class "
    "truncation_side use_fast".split()
)
"""Options of a tokenizer that say where it comes from or how it is called, or that are looked at otherwise."""


def deciding_config(model: PreTrainedModel) -> dict[str, Any]:
    """The values of a model's config that what it computes depends on, beside its weights, as JSON has them.

    Names of labels, where the checkpoint came from, dropout, and how it is stored or run do not count. The values and
    not their hash, so that two can be compared that were written by versions of transformers with other keys.
    """
    config = {
        key: value
        for key, value in model.config.to_dict().items()
        if key not in _NOT_DECIDING and "drop" not in key and not key.startswith("_")
    }
    text = json.dumps(config, sort_keys=True, default=str)
    found: dict[str, Any] = json.loads(text, parse_constant=str)  # infinity has no word in JSON
    return found


def weights_fingerprint(model: nn.Module, *, without: Collection[str] = ()) -> str:
    """sha256 (hex) over the state dict, less `without`: names in sorted order, types, shapes and bytes."""
    return _sha256_of({name: value for name, value in model.state_dict().items() if name not in set(without)})


def body_fingerprint(model: PreTrainedModel) -> str:
    """sha256 (hex) over all that the state which a classifier's head reads depends on, once its tokens are given.

    These are the weights outside of the head and the config, which decides about pooling, activations and the like;
    names of labels, where the checkpoint came from and dropout do not count.
    """
    head = head_parameters(model)
    weights = {name: value for name, value in model.state_dict().items() if name not in head}
    return _sha256_of(weights, _config_facts(model))


def model_fingerprint(model: PreTrainedModel) -> str:
    """sha256 (hex) over all that the logits of given tokens depend on: `body_fingerprint` and the head."""
    return _sha256_of(model.state_dict(), _config_facts(model))


def _config_facts(model: PreTrainedModel) -> bytes:
    return json.dumps(deciding_config(model), sort_keys=True).encode()


def _sha256_of(state: Mapping[str, Any], facts: bytes = b"") -> str:
    digest = hashlib.sha256(facts)
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase, *, inputs: bool = True) -> str:
    """sha256 (hex) over the serialised tokenizer, its special tokens and its sides, and which `inputs` it gives.

    Padding and truncation of the backend are left out: they are set by each call, so the fingerprint would depend on
    what was tokenised last.
    """
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        content = json.loads(backend.to_str())
        content.pop("padding", None)
        content.pop("truncation", None)
    else:
        content = _python_facts(tokenizer)
    content["special"] = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    content["sides"] = [tokenizer.padding_side, tokenizer.truncation_side]
    if inputs:
        content["inputs"] = list(tokenizer.model_input_names)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _python_facts(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What a tokenizer in Python depends on: its class, vocabulary, options and the files that it would save.

    The names of files and folders do not count.
    """
    options = {
        name: value
        for name, value in tokenizer.init_kwargs.items()
        if isinstance(value, (bool, int, float, str))
        and not name.endswith(("_file", "_token"))
        and name not in _NOT_READING
    }
    with tempfile.TemporaryDirectory() as folder:
        with suppress(AttributeError, NotImplementedError):  # a class without such files
            tokenizer.save_vocabulary(folder)
        files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in Path(folder).iterdir()}
    return {
        "class": type(tokenizer).__name__,
        "vocabulary": tokenizer.get_vocab(),
        "options": options,
        "files": files,
    }
