"""Teacher logits, computed once and kept on disk, keyed by content.

A row is found by the sha256 of its text, so shuffling, subsets and further rows cannot misalign the cache. A folder
belongs to one teacher: weights, tokenizer, label order, cut length, how longer texts are read, precision, and for an
entailment model its hypotheses. It is named after these, so that the caches of any number of teachers lie side by
side; with anything else it is refused, and each part is bound to it by its name.

How the folder is laid out stands in `row_cache`. A damaged part is refused.

Shapes: N rows, C classes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nlpxfer.config.long_texts import LongTexts
from nlpxfer.data.tokenise import Collator, tokenise
from nlpxfer.train.predict import predict
from nlpxfer.train.row_cache import RowCache, cache_root

if TYPE_CHECKING:
    from nlpxfer.checkpoint.load import Checkpoint

logger = logging.getLogger(__name__)

Array = np.ndarray[Any, Any]
FORMAT_VERSION = 4
PART_ROWS = 1024
"""Rows per part: what an interruption can lose."""


@dataclass(frozen=True)
class TeacherIdentity:
    """All that the logits of a text depend on.

    Attributes:
        weights: sha256 over the teacher's weights and its config.
        tokenizer: sha256 over its tokenizer.
        labels: Label names in the order of the logits' columns.
        max_length: Tokens after which a text is cut.
        precision: "float32" or "bfloat16".
        long_texts: How longer texts are read: `LongTexts.describe`.
        hypotheses: What an entailment model is asked of each text, in the order of the labels; empty for a classifier.
        columns: The columns of an entailment model that say yes and no, as numbers; empty for a classifier.
    """

    weights: str
    tokenizer: str
    labels: tuple[str, ...]
    max_length: int
    precision: str
    long_texts: str = "head"
    hypotheses: tuple[str, ...] = ()
    columns: tuple[int | None, ...] = ()

    def as_manifest(self) -> dict[str, Any]:
        """What manifest.json holds."""
        facts = {"weights": self.weights, "tokenizer": self.tokenizer, "labels": list(self.labels)}
        reading = {"max_length": self.max_length, "long_texts": self.long_texts, "precision": self.precision}
        asked = {"hypotheses": list(self.hypotheses), "columns": list(self.columns)} if self.hypotheses else {}
        return {"version": FORMAT_VERSION, **facts, **reading, **asked}

    @property
    def key(self) -> str:
        """A short name that changes with any part of the identity."""
        text = json.dumps(self.as_manifest(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:20]


def default_cache_folder(identity: TeacherIdentity) -> Path:
    """`$NLPXFER_CACHE` (default `~/.cache/nlpxfer`)/teacher/<key>."""
    return cache_root("teacher") / identity.key


def cache_folder(identity: TeacherIdentity, folder: str | Path | None = None) -> Path:
    """Where the logits of one teacher lie among those of others: `<folder>/<key>`, else `default_cache_folder`."""
    return Path(folder) / identity.key if folder else default_cache_folder(identity)


def text_keys(texts: Sequence[str], pairs: Sequence[str] | None = None) -> list[bytes]:
    """sha256 of each text (and its pair), 32 bytes; equal texts have equal keys, whatever row they stand in."""
    return list(_each_key(texts, pairs))


def _each_key(texts: Sequence[str], pairs: Sequence[str] | None) -> Iterator[bytes]:
    if pairs is None:
        for text in texts:
            yield hashlib.sha256(f"text {text}".encode()).digest()
        return
    for first, second in zip(texts, pairs, strict=True):
        yield hashlib.sha256(f"pair {len(first)} {first}{second}".encode()).digest()


def text_key_array(texts: Sequence[str], pairs: Sequence[str] | None = None) -> Array:
    """`text_keys` as one array of N, a third of the memory."""
    found = np.empty((len(texts), 32), dtype=np.uint8)
    for row, key in zip(found, _each_key(texts, pairs), strict=True):
        row[:] = memoryview(key)
    return found


def teacher_logits(
    teacher: Checkpoint,
    texts: Sequence[str],
    pairs: Sequence[str] | None = None,
    *,
    labels: Sequence[str],
    max_length: int,
    long_texts: LongTexts | None = None,
    batch_size: int = 64,
    bf16: bool = False,
    folder: str | Path | None = None,
    quiet: bool = True,
) -> tuple[Array, dict[str, Any]]:
    """Logits of a frozen teacher for N texts, from the cache as far as they are there.

    Args:
        teacher: Its model's columns are in the order of `labels`.
        texts: N texts.
        pairs: N second texts, if the task is on pairs.
        labels: Label names.
        max_length: Tokens after which a text is cut.
        long_texts: How longer texts are read; default: their beginning.
        batch_size: Rows of the longest length per batch.
        bf16: Compute in bfloat16.
        folder: Folder of caches; see `cache_folder`.
        quiet: No progress bar.

    Returns:
        Logits (N, C) float32, and facts for the report: rows, how many were computed, seconds, key.

    Raises:
        StaleCacheError: The cache was made from something else, or is damaged.
    """
    start = time.perf_counter()
    plan = long_texts or LongTexts()
    identity = TeacherIdentity(
        weights=teacher.model_sha256,
        tokenizer=teacher.tokenizer_sha256,
        labels=tuple(labels),
        max_length=max_length,
        precision="bfloat16" if bf16 else "float32",
        long_texts=plan.describe(max_length),
    )
    collator = Collator.for_tokenizer(teacher.tokenizer)

    def compute(rows: Array) -> Array:
        chosen = [texts[int(row)] for row in rows]
        second = None if pairs is None else [pairs[int(row)] for row in rows]
        tokens = tokenise(teacher.tokenizer, chosen, second, max_length=max_length, long_texts=plan)
        return predict(
            teacher.model,
            tokens,
            collator,
            batch_size=batch_size,
            bf16=bf16,
            description="teacher logits",
            quiet=quiet,
        )

    logits, computed = cached_logits(cache_folder(identity, folder), identity, text_key_array(texts, pairs), compute)
    seconds = round(time.perf_counter() - start, 2)
    logger.info("teacher logits: %d rows, %d computed, %.1f s", len(texts), computed, seconds)
    return logits, {"rows": len(texts), "computed": computed, "seconds": seconds, "key": identity.key}


def cached_logits(
    folder: Path,
    identity: TeacherIdentity,
    keys: Sequence[bytes] | Array,
    compute: Callable[[Array], Array],
    *,
    part_rows: int | None = None,
) -> tuple[Array, int]:
    """Logits of N rows, from the cache where they are there, else computed and added to it; see `RowCache.rows`.

    Args:
        folder: Folder of the cache; made if it does not exist.
        identity: The teacher.
        keys: `text_keys` or `text_key_array` of the rows.
        compute: From indices of rows to their logits, shape (rows, C).
        part_rows: Rows per part; default `PART_ROWS`.

    Returns:
        Logits (N, C) float32 in the order of `keys`, and the number of distinct texts that had to be computed.

    Raises:
        StaleCacheError: The folder was made from something else, or is damaged; says what differs.
        NotFiniteError: The teacher gives NaN or infinite logits.
        NoSpaceError: The disk has no room for the missing rows.
        ValueError: `compute` gives logits of another shape.
    """
    cache = RowCache(
        folder=folder,
        manifest=identity.as_manifest(),
        width=len(identity.labels),
        values="logits",
        owner="teacher",
        option="--teacher_cache",
        part_rows=part_rows or PART_ROWS,
        salt=json.dumps(identity.as_manifest(), sort_keys=True).encode(),
    )
    logits, computed = cache.rows(keys, compute)
    return logits, len(computed)
