"""Logits of labels by an entailment model that has never seen them, cached like those of any teacher.

Each text is paired with a hypothesis for each label. One label per row: the logits of entailment, whose softmax over
the labels is the distribution (as the zero-shot pipeline of transformers has it). Multi-label: entailment minus
contradiction for each label, whose sigmoid is its probability. No label of any row takes part.

Source: Yin, Hay and Roth 2019, arXiv:1909.00161.

Shapes: N rows, C classes.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from nlpxfer.checkpoint.entailment import Entailment
from nlpxfer.data.tokenise import Collator, tokenise
from nlpxfer.problem import MULTI_LABEL, ProblemType
from nlpxfer.train.predict import class_logits, predict
from nlpxfer.train.teacher_cache import (
    PART_ROWS,
    TeacherIdentity,
    cache_folder,
    cached_logits,
    text_key_array,
)

Array = np.ndarray[Any, Any]


def zero_shot_identity(
    scorer: Entailment,
    *,
    labels: Sequence[str],
    hypotheses: Sequence[str],
    problem_type: ProblemType,
    max_length: int,
    bf16: bool,
) -> TeacherIdentity:
    """All that the logits depend on."""
    return TeacherIdentity(
        weights=scorer.checkpoint.model_sha256,
        tokenizer=scorer.checkpoint.tokenizer_sha256,
        labels=tuple(labels),
        max_length=max_length,
        precision="bfloat16" if bf16 else "float32",
        long_texts=f"entailment, {problem_type}",
        hypotheses=tuple(hypotheses),
        columns=(scorer.entails, scorer.against),
    )


def zero_shot_logits(
    scorer: Entailment,
    texts: Sequence[str],
    *,
    labels: Sequence[str],
    hypotheses: Sequence[str],
    problem_type: ProblemType,
    max_length: int,
    batch_size: int = 64,
    bf16: bool = False,
    folder: str | Path | None = None,
    quiet: bool = True,
) -> tuple[Array, dict[str, Any]]:
    """Logits of the labels for N texts, from the cache as far as they are there.

    Of a text that is too long the beginning is read.

    Args:
        scorer: The entailment model, on its device.
        texts: N texts.
        labels: Names of the C labels.
        hypotheses: What is asked for each.
        problem_type: Whether labels exclude each other.
        max_length: Tokens of a text and a hypothesis together.
        batch_size: Pairs of the longest length per batch.
        bf16: Compute in bfloat16.
        folder: Folder of caches; see `cache_folder`.
        quiet: No progress bar.

    Returns:
        Logits (N, C) float32, and facts for the report: rows, how many were computed, seconds, key.

    Raises:
        StaleCacheError: The cache was made from something else, or is damaged.
    """
    start = time.perf_counter()
    checkpoint, count = scorer.checkpoint, len(hypotheses)
    identity = zero_shot_identity(
        scorer, labels=labels, hypotheses=hypotheses, problem_type=problem_type, max_length=max_length, bf16=bf16
    )
    collator = Collator.for_tokenizer(checkpoint.tokenizer)

    def score(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        logits_BE = class_logits(model, inputs).float()
        found_B = logits_BE[:, scorer.entails]
        if problem_type == MULTI_LABEL:
            found_B = found_B - logits_BE[:, scorer.against]
        return found_B[:, None]

    def compute(rows: Array) -> Array:
        first = [texts[int(row)] for row in rows for _ in range(count)]
        tokens = tokenise(checkpoint.tokenizer, first, list(hypotheses) * len(rows), max_length=max_length)
        found = predict(
            checkpoint.model,
            tokens,
            collator,
            batch_size=batch_size,
            bf16=bf16,
            output=score,
            description="zero-shot teacher",
            quiet=quiet,
        )
        return found.reshape(len(rows), count)

    where, part_rows = cache_folder(identity, folder), max(64, PART_ROWS // count)
    logits, computed = cached_logits(where, identity, text_key_array(texts), compute, part_rows=part_rows)
    seconds = round(time.perf_counter() - start, 2)
    return logits, {"rows": len(texts), "computed": computed, "seconds": seconds, "key": identity.key}
