"""Frozen features: the state that a classifier's head reads, computed once per text and kept on disk.

A row is found by the sha256 of its token ids, not of its text: whatever changes them (tokenizer, cut length) gives
other keys, and rows that a longer cut leaves alone are found again. A folder belongs to one body (weights and config
outside of the head) and one precision, and lies under a name made from both: one `--feature_cache` serves all models.
So seeds, labels, classifiers and penalties share the rows, and only new texts go through the model.

Of a text in several windows the features are the mean of theirs; who needs each gives them as rows of their own.

A damaged part is removed and its rows are computed anew, chosen over refusing it as the teacher's cache does: the
body is at hand, and the folder is named by what is in it.

Shapes: N rows, H hidden.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import nn

from nlpxfer.checkpoint.depth import depth_of, states_by_depth
from nlpxfer.checkpoint.fingerprint import body_fingerprint
from nlpxfer.checkpoint.head import head_of, pooled_states
from nlpxfer.data.tokenise import Collator, TokenisedRows
from nlpxfer.train.launch import world
from nlpxfer.train.predict import predict
from nlpxfer.train.row_cache import RowCache, cache_root

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

Array = np.ndarray[Any, Any]
FORMAT_VERSION = 1
PART_ROWS = 1024
"""Rows per part and process: what an interruption can lose."""


@dataclass(frozen=True, eq=False)
class Features:
    """Pooled states of N rows and what they cost.

    Attributes:
        states_NH: float32, in the order of the rows.
        computed: Rows that went through the model: one for each distinct text that was not in the cache.
        tokens: Tokens of these, without padding.
        seconds: Wall-clock time, reading the cache included.
        key: Name of the cache's folder.
    """

    states_NH: Array
    computed: int
    tokens: int
    seconds: float
    key: str

    def facts(self) -> dict[str, Any]:
        """For the report: rows, how many of them were computed, bytes, seconds, key."""
        rows, size = len(self.states_NH), int(self.states_NH.nbytes)
        return {"rows": rows, "computed": self.computed, "bytes": size, "seconds": self.seconds, "key": self.key}


def row_keys(rows: TokenisedRows) -> list[bytes]:
    """sha256 of each row's token ids, of the segments of a pair, and of the lengths of several windows; 32 bytes.

    Labels and other columns do not count.
    """
    keys = []
    ends = rows.each_window().starts
    for begin, end in zip(rows.starts[:-1], rows.starts[1:], strict=True):
        digest = hashlib.sha256(rows.tokens[begin:end].astype("<i4").tobytes())
        if rows.token_types is not None:
            digest.update(b"types" + rows.token_types[begin:end].tobytes())
        first, last = np.searchsorted(ends, (begin, end))
        if last - first > 1:
            digest.update(b"windows" + np.diff(ends[first : last + 1]).astype("<i4").tobytes())
        keys.append(digest.digest())
    return keys


def pooled_features(
    model: PreTrainedModel,
    rows: TokenisedRows,
    collator: Collator,
    *,
    by_depth: bool = False,
    batch_size: int = 64,
    bf16: bool = False,
    folder: str | Path | None = None,
    description: str = "features",
    quiet: bool = True,
) -> Features:
    """What the head of `model` reads for each row, from the cache as far as it is there.

    With several processes each computes its share, all get the whole, and the first one writes.

    Args:
        model: A sequence classifier on its device; its head takes no part.
        rows: N tokenised rows.
        collator: Pads a batch.
        by_depth: What it would read above each layer, one after the other, shape (N, K * H): `states_by_depth`.
        batch_size: Rows of the longest length per batch.
        bf16: Compute in bfloat16; the features are kept in float32.
        folder: Folder of caches; default `$NLPXFER_CACHE/features`, else `~/.cache/nlpxfer/features`.
        description: Shown beside the progress bar and in the log.
        quiet: No progress bar.

    Raises:
        StaleCacheError: The folder of this body's cache holds something else.
        NotFiniteError: The model gives NaN or infinite states.
        NoSpaceError: The disk has no room for the missing rows.
        CheckpointError: The family has no list of layers to tell depths apart by.
    """
    start = time.perf_counter()
    head = head_of(model)
    width = next(iter(head.transforms.values()), head.final).in_features
    manifest: dict[str, str | int] = {
        "version": FORMAT_VERSION,
        "body": body_fingerprint(model),
        "precision": "bfloat16" if bf16 else "float32",
        "width": width,
    }
    if by_depth:
        manifest["width"] = width = width * depth_of(model)
        manifest["depths"] = depth_of(model)
    identity = json.dumps(manifest, sort_keys=True).encode()
    key = hashlib.sha256(identity).hexdigest()[:20]
    cache = RowCache(
        folder=(Path(folder) if folder else cache_root("features")) / key,
        manifest=manifest,
        width=width,
        values="features",
        owner="feature",
        option="--feature_cache",
        part_rows=PART_ROWS * world()[1],
        salt=identity,
        mends=True,
    )

    def compute(indices: Array) -> Array:
        chosen, output = rows.select(indices), _by_depth if by_depth else _pooled
        return predict(model, chosen, collator, batch_size=batch_size, bf16=bf16, output=output, quiet=True)

    states_NH, computed = cache.rows(
        row_keys(rows), compute, lengths=rows.lengths, description=description, quiet=quiet
    )
    seconds = time.perf_counter() - start
    logger.info(
        "%s: %d rows of %d numbers (%.1f MB), %d computed in %s, %.1f s",
        description,
        *states_NH.shape,
        states_NH.nbytes / 1e6,
        len(computed),
        manifest["precision"],
        seconds,
    )
    return Features(states_NH, len(computed), int(rows.lengths[computed].sum()), round(seconds, 2), key)


def _pooled(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return pooled_states(cast("PreTrainedModel", model), inputs)


def _by_depth(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return states_by_depth(cast("PreTrainedModel", model), inputs).flatten(1)
