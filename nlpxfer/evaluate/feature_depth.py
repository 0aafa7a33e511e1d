"""At which depth a frozen checkpoint is read: the layer whose states have the highest LogME on training rows.

The last layer of a checkpoint is shaped by what it was trained for. A sentence encoder's says what a text is about and
little of how it is put; a task that asks for the latter is read better further down, where also fewer layers run.
LogME was chosen over a probe on held-out rows: it needs no further rows, repeats, and costs a decomposition per layer
whatever the number of classes.

Source: You et al. 2021, LogME, arXiv:2102.11005; Tenney et al. 2019, arXiv:1905.05950 (what is found in which layer).

Shapes: N rows, K layers, C classes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from nlpxfer.checkpoint.depth import cut_to_depth, depth_of
from nlpxfer.data.tokenise import Collator, TokenisedRows
from nlpxfer.errors import CheckpointError
from nlpxfer.evaluate.transferability import logme
from nlpxfer.losses.classification import labelled
from nlpxfer.problem import SINGLE_LABEL, ProblemType
from nlpxfer.train.feature_cache import pooled_features, row_keys
from nlpxfer.train.launch import on_main

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

Array = np.ndarray[Any, Any]
SAMPLE_ROWS: Final = 1024
"""Training rows that layers are compared on; more where there are many classes."""
FEWEST_ROWS, ROWS_PER_TARGET = 8, 4
"""Labelled rows from which on layers are compared: fewer say as much of the noise."""


@dataclass(frozen=True, kw_only=True)
class DepthChoice:
    """The layer that was chosen, and how the layers compare.

    Attributes:
        layer: From 1.
        logme: Of each layer.
        rows: Training rows that they were compared on.
        computed: Those whose states were not in the cache.
        tokens: Tokens of these.
        seconds: Wall-clock time.
    """

    layer: int
    logme: Sequence[float]
    rows: int
    computed: int
    tokens: int
    seconds: float

    def facts(self) -> dict[str, Any]:
        """For the report."""
        scores = {str(layer): score for layer, score in enumerate(self.logme, start=1)}
        return {
            "chosen": self.layer,
            "rows": self.rows,
            "computed": self.computed,
            "seconds": round(self.seconds, 2),
            "logme": scores,
        }


def read_at_best_depth(
    model: PreTrainedModel,
    rows: TokenisedRows,
    collator: Collator,
    *,
    problem_type: ProblemType = SINGLE_LABEL,
    batch_size: int = 64,
    bf16: bool = False,
    folder: str | Path | None = None,
    description: str = "states of each layer",
    quiet: bool = True,
) -> tuple[PreTrainedModel, DepthChoice | None]:
    """The model cut to the layers that suit the rows best, and how they compare.

    The model itself is returned if no layer is better than its last; with None if there is nothing to compare: one
    layer, a family whose layers cannot be told apart (ALBERT), fewer than four labelled rows per class or eight in
    all, or all with the same label. Depths that the family cannot be cut to do not count. All processes call this
    together and get the same choice.

    Args:
        model: A sequence classifier on its device, with the pooling that it shall have.
        rows: Training rows with `labels`; those with -100 or NaN are left out.
        collator: Pads a batch.
        problem_type: What the labels are.
        batch_size: Rows of the longest length per batch.
        bf16: Compute states in bfloat16.
        folder: Folder of the feature caches.
        description: Shown beside the progress bar and in the log.
        quiet: No progress bar.

    Raises:
        StaleCacheError, NotFiniteError, NoSpaceError: See `pooled_features`.
    """
    start = time.perf_counter()
    sample = _sample(rows, problem_type)
    targets_NC = _targets(sample, problem_type)
    few = len(sample) < max(FEWEST_ROWS, ROWS_PER_TARGET * targets_NC.shape[1])
    if few or not np.ptp(targets_NC, axis=0).any():
        return model, None
    try:
        total = depth_of(model)
        if total == 1:
            return model, None
        found = pooled_features(
            model,
            sample,
            collator,
            by_depth=True,
            batch_size=batch_size,
            bf16=bf16,
            folder=folder,
            description=description,
            quiet=quiet,
        )
    except CheckpointError as error:
        logger.info("features are read at the last layer: %s", error.what)
        return model, None
    scores = on_main(lambda: [logme(part_NH, targets_NC) for part_NH in np.split(found.states_NH, total, axis=1)])
    cut, layer = _cut(model, scores)
    seconds = time.perf_counter() - start
    shown = ", ".join(f"{score:.3f}" for score in scores)
    logger.info("features are read at layer %d of %d (LogME %s; %d rows)", layer, total, shown, len(sample))
    return cut, DepthChoice(
        layer=layer, logme=scores, rows=len(sample), computed=found.computed, tokens=found.tokens, seconds=seconds
    )


def _cut(model: PreTrainedModel, scores: Sequence[float]) -> tuple[PreTrainedModel, int]:
    """The model cut to the best depth that its family can hold; its own if no other is better, rounding aside."""
    better = [layer for layer, score in enumerate(scores, start=1) if score > scores[-1] + 1e-6]
    for layer in sorted(better, key=lambda layer: -scores[layer - 1]):
        try:
            return cut_to_depth(model, layer), layer
        except CheckpointError as error:
            logger.info("not read at layer %d: %s", layer, error.what)
    return model, len(scores)


def _sample(rows: TokenisedRows, problem_type: ProblemType) -> TokenisedRows:
    """Labelled rows by the order of their keys: the same ones however rows are ordered, so that states are shared."""
    labels = rows.columns["labels"]
    known = np.flatnonzero(labelled(torch.from_numpy(labels)).numpy())
    targets = len(np.unique(labels[known])) if problem_type == SINGLE_LABEL else labels[:1].size
    keys = row_keys(rows.select(known))
    first = sorted(range(len(known)), key=keys.__getitem__)[: max(SAMPLE_ROWS, ROWS_PER_TARGET * targets)]
    return rows.select(np.sort(known[first]))


def _targets(rows: TokenisedRows, problem_type: ProblemType) -> Array:
    """Labels as numbers, shape (N, C): one column per class that occurs, per label, or for the number."""
    labels = rows.columns["labels"]
    if problem_type == SINGLE_LABEL:
        return np.asarray(labels[:, None] == np.unique(labels)[None, :], dtype=np.float64)
    return np.asarray(labels, dtype=np.float64).reshape(len(labels), -1)
