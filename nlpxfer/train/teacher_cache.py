"""Teacher logits, computed once and kept on disk, keyed by content.

A row is found by the sha256 of its text, so shuffling, subsets and further rows cannot misalign the cache. A folder
belongs to one teacher: weights, tokenizer, label order, cut length, how longer texts are read, and precision. With
anything else it is refused.

    <folder>/manifest.json           what the logits were made from
    <folder>/part-*.safetensors      keys (N, 32) uint8 and logits (N, C) float32; named by the sha256 of both

Parts are written whole (temporary name, then rename), so an interrupted run leaves finished parts and the next one
computes only what is missing. A part whose content does not give its name is damaged, and refused.

Shapes: N rows, C classes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from nlpxfer.config.long_texts import LongTexts
from nlpxfer.data.tokenise import Collator, tokenise
from nlpxfer.errors import NotFiniteError, StaleCacheError
from nlpxfer.strict_json import write_json_whole
from nlpxfer.train.launch import is_main_process, wait_for_everyone
from nlpxfer.train.predict import predict

if TYPE_CHECKING:
    from nlpxfer.checkpoint.load import Checkpoint

logger = logging.getLogger(__name__)

Array = np.ndarray[Any, Any]
FORMAT_VERSION = 3
PART_ROWS = 8192
"""Rows per part: what an interruption can lose."""


@dataclass(frozen=True)
class TeacherIdentity:
    """All that the logits of a text depend on.

    Attributes:
        weights: sha256 over the teacher's weights.
        tokenizer: sha256 over its tokenizer.
        labels: Label names in the order of the logits' columns.
        max_length: Tokens after which a text is cut.
        precision: "float32" or "bfloat16".
        long_texts: How longer texts are read: `LongTexts.describe`.
    """

    weights: str
    tokenizer: str
    labels: tuple[str, ...]
    max_length: int
    precision: str
    long_texts: str = "head"

    def as_manifest(self) -> dict[str, Any]:
        """What manifest.json holds."""
        facts = {"weights": self.weights, "tokenizer": self.tokenizer, "labels": list(self.labels)}
        reading = {"max_length": self.max_length, "long_texts": self.long_texts, "precision": self.precision}
        return {"version": FORMAT_VERSION, **facts, **reading}

    @property
    def key(self) -> str:
        """A short name that changes with any part of the identity."""
        text = json.dumps(self.as_manifest(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:20]


def default_cache_folder(identity: TeacherIdentity) -> Path:
    """`$NLPXFER_CACHE` (default `~/.cache/nlpxfer`)/teacher/<key>."""
    root = os.environ.get("NLPXFER_CACHE") or str(Path.home() / ".cache" / "nlpxfer")
    return Path(root) / "teacher" / identity.key


def text_keys(texts: Sequence[str], pairs: Sequence[str] | None = None) -> list[bytes]:
    """sha256 of each text (and its pair), 32 bytes; equal texts have equal keys, whatever row they stand in."""
    if pairs is None:
        return [hashlib.sha256(f"text {text}".encode()).digest() for text in texts]
    return [hashlib.sha256(f"pair {len(a)} {a}{b}".encode()).digest() for a, b in zip(texts, pairs, strict=True)]


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
        folder: Folder of the cache; default `default_cache_folder`.
        quiet: No progress bar.

    Returns:
        Logits (N, C) float32, and facts for the report: rows, how many were computed, seconds, key.

    Raises:
        StaleCacheError: The cache was made from something else, or is damaged.
    """
    start = time.perf_counter()
    plan = long_texts or LongTexts()
    identity = TeacherIdentity(
        weights=teacher.weights_sha256,
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

    where = Path(folder) if folder else default_cache_folder(identity)
    logits, computed = cached_logits(where, identity, text_keys(texts, pairs), compute)
    seconds = round(time.perf_counter() - start, 2)
    logger.info("teacher logits: %d rows, %d computed, %.1f s", len(texts), computed, seconds)
    return logits, {"rows": len(texts), "computed": computed, "seconds": seconds, "key": identity.key}


def cached_logits(
    folder: Path,
    identity: TeacherIdentity,
    keys: Sequence[bytes],
    compute: Callable[[Array], Array],
) -> tuple[Array, int]:
    """Logits of N rows, from the cache where they are there, else computed and added to it.

    All processes call this together; `compute` must return the same array in all of them. The first one writes.

    Args:
        folder: Folder of the cache; made if it does not exist.
        identity: The teacher.
        keys: `text_keys` of the rows.
        compute: From indices of rows to their logits, shape (rows, C).

    Returns:
        Logits (N, C) float32 in the order of `keys`, and the number of distinct texts that had to be computed.

    Raises:
        StaleCacheError: The folder was made from something else, or is damaged; says what differs.
        NotFiniteError: The teacher gives NaN or infinite logits.
        ValueError: `compute` gives logits of another shape.
    """
    known = _read(folder, identity)
    first_row = {key: index for index, key in reversed(list(enumerate(keys))) if key not in known}
    missing = np.array(sorted(first_row.values()), dtype=np.int64)
    wait_for_everyone()
    if is_main_process():
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "manifest.json").is_file():
            write_json_whole(folder / "manifest.json", identity.as_manifest())
    for start in range(0, len(missing), PART_ROWS):
        rows = missing[start : start + PART_ROWS]
        logits = compute(rows)
        _require_sound(logits, len(rows), len(identity.labels))
        part_keys = [keys[int(row)] for row in rows]
        if is_main_process():
            _write_part(folder, part_keys, logits)
        known.update(zip(part_keys, logits, strict=True))
    wait_for_everyone()
    found = np.empty((len(keys), len(identity.labels)), dtype=np.float32)
    for index, key in enumerate(keys):
        found[index] = known[key]
    return found, len(missing)


def _require_sound(logits: Array, rows: int, classes: int) -> None:
    if logits.shape != (rows, classes):
        raise ValueError(f"the teacher gives logits of shape {logits.shape} for {rows} rows and {classes} labels")
    if not np.isfinite(logits).all():
        raise NotFiniteError(
            "The teacher gives logits that are NaN or infinite.",
            why="its weights are damaged, or it was trained until it diverged",
        )


def _read(folder: Path, identity: TeacherIdentity) -> dict[bytes, Array]:
    if not folder.exists():
        return {}
    if not folder.is_dir():
        raise StaleCacheError(f"{folder.name} is no folder.", fix="give another --teacher_cache folder")
    _require_same_teacher(folder, identity.as_manifest())
    known: dict[bytes, Array] = {}
    for path in sorted(folder.glob("part-*.safetensors")):
        try:
            part = load_file(path)
            keys, logits = part["keys"], part["logits"]
        except (SafetensorError, KeyError, OSError) as error:
            raise StaleCacheError(
                f"The teacher cache is damaged: {path.name} cannot be read ({error}).", fix=f"delete {path.name}"
            ) from error
        if path.name != _part_name(keys, logits) or logits.shape != (len(keys), len(identity.labels)):
            raise StaleCacheError(
                f"The teacher cache is damaged: {path.name} was changed after it was written.",
                fix=f"delete {path.name}",
            )
        known.update(zip((key.tobytes() for key in keys), logits, strict=True))
    return known


def _require_same_teacher(folder: Path, expected: Mapping[str, Any]) -> None:
    path = folder / "manifest.json"
    if not path.is_file():
        if any(not entry.name.startswith(".") for entry in folder.iterdir()):  # dots: what an interruption left
            raise StaleCacheError(f"{folder.name} holds files, but is no teacher cache.", fix="give another folder")
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("no object")
    except ValueError as error:
        raise StaleCacheError(
            "The teacher cache is damaged: its manifest.json cannot be read.", fix="delete the folder"
        ) from error
    differing = [
        f"{key}: cached {found.get(key)!r}, now {value!r}"
        for key, value in expected.items()
        if found.get(key) != value
    ]
    if differing:
        raise StaleCacheError(
            "The teacher cache was made from something else:\n  - " + "\n  - ".join(differing),
            fix="give another --teacher_cache folder, or delete this one",
        )


def _write_part(folder: Path, keys: Sequence[bytes], logits: Array) -> None:
    stacked = np.stack([np.frombuffer(key, dtype=np.uint8) for key in keys])
    exact = np.ascontiguousarray(logits, dtype=np.float32)
    name = _part_name(stacked, exact)
    temporary = folder / f".{name}.{os.getpid()}.tmp"
    save_file({"keys": stacked, "logits": exact}, temporary)
    temporary.replace(folder / name)


def _part_name(keys: Array, logits: Array) -> str:
    return f"part-{hashlib.sha256(keys.tobytes() + logits.tobytes()).hexdigest()[:32]}.safetensors"
