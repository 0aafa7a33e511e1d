"""Where a static student starts: each token of the vocabulary through the teacher alone, as model2vec does it.

A token's vector is the mean over its states in the teacher's last layer, special tokens around it included; PCA keeps
the directions in which tokens differ most, and the weight a / (a + p) of smooth inverse frequency makes frequent
tokens small. p is counted on the texts at hand, chosen over model2vec's estimate from the token's rank in the
vocabulary because the texts are there, and a domain's frequent words are not those of a vocabulary. The table is
scaled so that a rare token's numbers have a deviation of 1: AdamW's steps have one size, whatever the teacher's scale.

Sources: model2vec, https://github.com/MinishLab/model2vec; Arora, Liang and Ma 2017, "A Simple but Tough-to-Beat
Baseline for Sentence Embeddings" (section 3, SIF).

Shapes: V vocabulary, H hidden states of the teacher, D numbers per token.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, cast

import numpy as np
import torch

from nlpxfer.checkpoint.load import Checkpoint
from nlpxfer.checkpoint.static import StaticConfig, StaticForSequenceClassification, is_static
from nlpxfer.checkpoint.student import embedding_rows
from nlpxfer.data.tokenise import Collator, TokenisedRows
from nlpxfer.errors import CheckpointError, ConfigError
from nlpxfer.train.predict import predict

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Array = np.ndarray[Any, Any]
SIF: Final = 1e-2
"""a of the weight a / (a + p) of a token with the share p of all tokens. Arora et al. have 1e-3 to 1e-4 with shares in
general text; here shares are those in the texts at hand, where the words that matter are frequent, and 1e-3 cost three
points of the probe on validation rows of banking77."""


@dataclass(frozen=True, kw_only=True)
class StaticPlan:
    """What a static student looks like.

    Attributes:
        dim: D, at most H.
        hidden_layer: Whether the head has a hidden layer.
        normalize: Whether the mean of the vectors is scaled to length 1.
        max_length: Tokens that are read of a text in training, special tokens included.
    """

    dim: int
    hidden_layer: bool
    normalize: bool
    max_length: int


def static_student(
    source: Checkpoint, states_VH: Array, counts_V: Array, plan: StaticPlan, *, seed: int
) -> Checkpoint:
    """An untrained static student with the tokenizer and labels of `source`.

    Args:
        source: The classifier that the vectors come from.
        states_VH: `token_states` of it.
        counts_V: `token_counts` of the texts at hand.
        plan: Its shape.
        seed: Seed of its head.

    Raises:
        ConfigError: `plan.dim` is more than H.
    """
    refuse_wide(source, plan.dim)
    ignored = ignored_ids(source.tokenizer)
    own = source.model.config
    config = StaticConfig(
        vocab_size=len(states_VH),
        hidden_size=plan.dim,
        hidden_layer=plan.hidden_layer,
        normalize=plan.normalize,
        ignored_token_ids=ignored,
        max_tokens=plan.max_length - source.tokenizer.num_special_tokens_to_add(pair=False),
        pad_token_id=source.tokenizer.pad_token_id,
        id2label=dict(own.id2label or {}),
        label2id=dict(own.label2id or {}),
        problem_type=own.problem_type,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = StaticForSequenceClassification(config)
    table_VD = start_table(states_VH, counts_V, dim=plan.dim, ignored=ignored)
    with torch.no_grad():
        model.embeddings.copy_(torch.from_numpy(table_VD))
    torch.nn.Module.eval(model)
    head = tuple(name for name, _ in model.named_parameters() if "classifier" in name)
    plain = cast("PreTrainedModel", model)
    return replace(source, model=plain, fresh=head, head_kept=False)


def refuse_wide(source: Checkpoint, dim: int) -> None:
    """Raise ConfigError where `source` has fewer numbers for a token than are wanted."""
    width = int(source.model.config.hidden_size)
    if dim > width:
        raise ConfigError(
            f"static_dim: {dim} is more than the {width} numbers that {source.name} has for a token.",
            fix=f"--static_dim {width}",
        )


def start_table(states_VH: Array, counts_V: Array, *, dim: int, ignored: Sequence[int]) -> Array:
    """The table that a static student starts with, shape (V, D), float32.

    Args:
        states_VH: A state for each token.
        counts_V: How often each token occurs in the texts at hand; ignored tokens do not count.
        dim: D.
        ignored: Tokens whose rows are 0, and which PCA does not see.
    """
    kept = np.ones(len(states_VH), dtype=bool)
    kept[list(ignored)] = False
    states = states_VH[kept].astype(np.float64)
    states -= states.mean(axis=0)
    _, vectors_HH = np.linalg.eigh(states.T @ states)
    reduced = states @ vectors_HH[:, ::-1][:, :dim]
    reduced /= max(float(reduced.std()), 1e-12)
    counts = counts_V[kept].astype(np.float64)
    share = counts / max(1.0, counts.sum())
    table_VD = np.zeros((len(states_VH), dim), dtype=np.float32)
    table_VD[kept] = reduced * (SIF / (SIF + share))[:, None]
    return table_VD


def ignored_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Special tokens and the unknown one, in ascending order."""
    return sorted({int(token) for token in tokenizer.all_special_ids})


def token_counts(rows: Iterable[TokenisedRows], vocabulary: int) -> Array:
    """How often each token id occurs, shape V, int64."""
    counts_V = np.zeros(vocabulary, dtype=np.int64)
    for part in rows:
        counts_V += np.bincount(part.tokens, minlength=vocabulary)
    return counts_V


def token_states(source: Checkpoint, *, batch_size: int = 64, bf16: bool = False, quiet: bool = True) -> Array:
    """The mean state of each token of the vocabulary, read alone by the body of `source`; shape (V, H), float32.

    Args:
        source: A classifier of any family whose base model gives `last_hidden_state`.
        batch_size: Texts of a hundred tokens or so per batch, as for any prediction.
        bf16: Compute in bfloat16.
        quiet: No progress bar.

    Raises:
        CheckpointError: `source` is static itself.
    """
    if is_static(source.model):
        raise CheckpointError(
            f"{source.name} is static: no static student is made from it.", fix="a teacher with layers"
        )
    rows = lone_tokens(source.tokenizer, embedding_rows(source.model))
    return predict(
        source.model,
        rows,
        Collator.for_tokenizer(source.tokenizer),
        batch_size=batch_size * 16,  # each is three tokens long
        bf16=bf16,
        output=_mean_state,
        description="token vectors",
        quiet=quiet,
    )


def lone_tokens(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> TokenisedRows:
    """V texts of one token each, with the special tokens that the tokenizer puts around a text."""
    framed = tokenizer("a", return_special_tokens_mask=True)
    special, ids = framed["special_tokens_mask"], framed["input_ids"]
    inner = special.index(0) if 0 in special else len(ids) // 2
    after = next((index for index in range(inner, len(ids)) if special[index]), len(ids))
    before_ids, after_ids = ids[:inner], ids[after:]
    width = len(before_ids) + 1 + len(after_ids)
    tokens = np.empty((vocabulary, width), dtype=np.int32)
    tokens[:, : len(before_ids)], tokens[:, len(before_ids) + 1 :] = before_ids, after_ids
    tokens[:, len(before_ids)] = np.arange(vocabulary)
    types = np.zeros(tokens.size, dtype=np.uint8) if "token_type_ids" in tokenizer.model_input_names else None
    return TokenisedRows(tokens.reshape(-1), types, np.arange(vocabulary + 1, dtype=np.int64) * width)


def _mean_state(model: torch.nn.Module, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    states_BLH = cast("PreTrainedModel", model).base_model(**inputs).last_hidden_state
    mask_BL1 = inputs["attention_mask"][..., None].to(states_BLH.dtype)
    mean_BH: torch.Tensor = (states_BLH * mask_BL1).sum(dim=1) / mask_BL1.sum(dim=1)
    return mean_BH
