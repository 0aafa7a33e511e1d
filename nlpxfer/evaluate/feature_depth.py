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
from nlpxfer.train.feature_cache import pooled_features
from nlpxfer.train.launch import from_main, is_main_process

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

Array = np.ndarray[Any, Any]
SAMPLE_ROWS: Final = 1024
"""Training rows at most that layers are compared on."""


@dataclass(frozen=True, kw_only=True)
class DepthChoice:
    """The layer that was chosen, and how the layers compare.

    Attributes:
        layer: From 1.
        logme: Of each layer; empty where there was nothing to compare.
        rows: Training rows that they were compared on.
        tokens: Tokens that went through the model for it.
        seconds: Wall-clock time.
    """

    layer: int
    logme: Sequence[float] = ()
    rows: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def facts(self) -> dict[str, Any]:
        """For the report."""
        scores = {str(layer): score for layer, score in enumerate(self.logme, start=1)}
        return {"chosen": self.layer, "rows": self.rows, "seconds": round(self.seconds, 2), "logme": scores}


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

    The model itself is returned if its last layer is the best; with None if there is nothing to compare: one layer, a
    family without a list of layers (ALBERT), or fewer than two kinds of labels. Depths that the family cannot be cut
    to do not count. All processes call this together and get the same choice.

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
    try:
        total = depth_of(model)
    except CheckpointError:
        return model, None
    sample = _sample(rows)
    targets_NC = _targets(sample, problem_type)
    if total == 1 or len(sample) < 2 or not np.ptp(targets_NC, axis=0).any():
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
    scores: list[float] = []
    if is_main_process():
        scores = [logme(states_NH, targets_NC) for states_NH in np.split(found.states_NH, total, axis=1)]
    scores = from_main(scores)
    cut, layer = _cut(model, sorted(range(1, total + 1), key=lambda layer: (-scores[layer - 1], layer)))
    seconds = time.perf_counter() - start
    shown = ", ".join(f"{score:.3f}" for score in scores)
    logger.info("features are read at layer %d of %d (LogME %s; %d rows)", layer, total, shown, len(sample))
    return cut, DepthChoice(layer=layer, logme=scores, rows=len(sample), tokens=found.tokens, seconds=seconds)


def _cut(model: PreTrainedModel, layers: Sequence[int]) -> tuple[PreTrainedModel, int]:
    """The model cut to the first of these depths that its family can hold; its own is one of them."""
    for layer in layers[: layers.index(depth_of(model))]:
        try:
            return cut_to_depth(model, layer), layer
        except CheckpointError as error:
            logger.info("not read at layer %d: %s", layer, error.what)
    return model, depth_of(model)


def _sample(rows: TokenisedRows) -> TokenisedRows:
    """Labelled rows, the same ones for all seeds, so that these share what is cached."""
    known = np.flatnonzero(labelled(torch.from_numpy(rows.columns["labels"])).numpy())
    return rows.select(np.sort(np.random.default_rng(0).permutation(known)[:SAMPLE_ROWS]))


def _targets(rows: TokenisedRows, problem_type: ProblemType) -> Array:
    """Labels as numbers, shape (N, C): one column per class that occurs, per label, or for the number."""
    labels = rows.columns["labels"]
    if problem_type == SINGLE_LABEL:
        return np.asarray(labels[:, None] == np.unique(labels)[None, :], dtype=np.float64)
    return np.asarray(labels, dtype=np.float64).reshape(len(labels), -1)
