"""Which layers of a teacher its student keeps, found by probes: layers are removed one by one, the most useless first.

Without training a student that lacks a layer, a probe on what its head would read says how much the layer is missed:
each remaining layer is left out in turn, a linear probe is fitted on a sample of training rows, and the layer whose
absence gives the lowest loss on held-out training rows goes. Chosen over a probe at each depth, which says where a
task can be read off but not what the layers above do with a state that they were not trained on. Validation rows take
no part, so the student's validation score is not made to look better, and test rows are not seen.

Source: greedy layer pruning, Peer et al. 2021, arXiv:2105.14839 (there with fine-tuning in place of the probe).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, cast

import numpy as np
import torch
from tqdm.auto import tqdm

from nlpxfer.checkpoint.head import pooled_states
from nlpxfer.checkpoint.load import Checkpoint
from nlpxfer.checkpoint.pooling import has_mean_layer, use_mean_pooling
from nlpxfer.checkpoint.student import model_layers, slice_layers
from nlpxfer.data.tokenise import Collator, TokenisedRows
from nlpxfer.errors import CheckpointError, ConfigError, DataError
from nlpxfer.losses.classification import labelled
from nlpxfer.problem import SINGLE_LABEL, ProblemType
from nlpxfer.train.launch import is_main_process
from nlpxfer.train.linear_probe import fit_probe
from nlpxfer.train.predict import predict

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

Array = np.ndarray[Any, Any]
FIT_ROWS: Final = 512
HELD_OUT_ROWS: Final = 256
"""Training rows that probes are fitted on, and that they are compared on."""


@dataclass(frozen=True, kw_only=True)
class LayerChoice:
    """The layers that are kept, and how they were found.

    Attributes:
        layers: Ascending indices.
        loss: Held-out loss of the probe with these layers.
        rows: Training rows that probes were fitted on, and held-out ones.
        removed: For each removal the layer, and the losses by layer left out.
    """

    layers: tuple[int, ...]
    loss: float
    rows: tuple[int, int]
    removed: Sequence[Mapping[str, Any]] = field(default_factory=list)

    def facts(self) -> dict[str, Any]:
        """For the report."""
        return {
            "layers": list(self.layers),
            "probe_loss": self.loss,
            "fit_rows": self.rows[0],
            "held_out_rows": self.rows[1],
            "removed": [dict(step) for step in self.removed],
        }


def probe_layers(
    source: Checkpoint,
    rows: TokenisedRows,
    count: int,
    *,
    problem_type: ProblemType = SINGLE_LABEL,
    mean_pooling: bool = False,
    batch_size: int = 64,
    bf16: bool = False,
    seed: int = 0,
    quiet: bool = True,
) -> LayerChoice:
    """The `count` layers of `source` that a probe misses most.

    Args:
        source: A classifier; it is not changed.
        rows: Training rows with `labels`, some of which may have none.
        count: Layers to keep.
        problem_type: What the labels are.
        mean_pooling: Whether the student's head will read the mean of its states.
        batch_size: As for `predict`.
        bf16: Compute states in bfloat16.
        seed: Of the sample of rows.
        quiet: No progress bar.

    Raises:
        ConfigError: `count` is not in 1..layers, or no layer can be left out in this family.
        DataError: Fewer than eight rows have a label, or those that probes are fitted on have all the same.
    """
    total = len(model_layers(source.model)[1])
    if mean_pooling and has_mean_layer(source.model):
        total -= 1  # the student gets a layer of its own that computes the mean
    if not 1 <= count <= total:
        raise ConfigError(
            f"student_num_layers: {count} layers cannot be picked from {total}.", fix=f"1 to {total} layers"
        )
    probes = _Probes(source, *_sample(rows, seed), problem_type, mean_pooling, batch_size, bf16)
    kept, removed = list(range(total)), []
    steps = sum(range(count + 1, total + 1))
    loss = probes.loss(kept) if count == total else 0.0
    with tqdm(total=steps, desc="layer probes", disable=quiet or not is_main_process(), leave=False) as bar:
        while len(kept) > count:
            losses = {}
            for layer in kept:
                found = probes.loss([other for other in kept if other != layer])
                bar.update()
                if found is not None:
                    losses[layer] = found
            if not losses:
                raise ConfigError(
                    f"student_layers: {source.name} can lose none of the layers {kept}.", fix="--student_layers even"
                )
            least = min(losses, key=lambda layer: (losses[layer], layer))
            kept.remove(least)
            loss = losses[least]
            removed.append({"layer": least, "loss_without": {str(layer): value for layer, value in losses.items()}})
            logger.info("layer probes: without layer %d, %d left, loss %.4f", least, len(kept), loss)
    return LayerChoice(layers=tuple(kept), loss=float(loss or 0.0), rows=probes.sizes, removed=removed)


def _sample(rows: TokenisedRows, seed: int) -> tuple[TokenisedRows, TokenisedRows]:
    """Labelled rows to fit probes on, and others to compare them on: at most a third of them."""
    known = np.flatnonzero(labelled(torch.from_numpy(rows.columns["labels"])).numpy())
    if len(known) < 8:
        raise DataError(
            f"student_layers: probes need 8 labelled training rows, and there are {len(known)}.",
            fix="--student_layers even",
        )
    chosen = np.random.default_rng(seed).permutation(known)
    held_out = min(HELD_OUT_ROWS, len(chosen) // 3)
    return rows.select(chosen[held_out : held_out + FIT_ROWS]), rows.select(chosen[:held_out])


class _Probes:
    """Probes of students that keep some of the layers."""

    def __init__(
        self,
        source: Checkpoint,
        fit: TokenisedRows,
        held_out: TokenisedRows,
        problem_type: ProblemType,
        mean_pooling: bool,
        batch_size: int,
        bf16: bool,
    ) -> None:
        self.source, self.fit, self.held_out = source, fit, held_out
        self.problem_type, self.mean_pooling = problem_type, mean_pooling
        self.batch_size, self.bf16 = batch_size, bf16
        self.collator = Collator.for_tokenizer(source.tokenizer)
        self.sizes = len(fit), len(held_out)
        if len(np.unique(fit.columns["labels"], axis=0)) < 2:
            raise DataError(
                "student_layers: the rows that probes are fitted on have all the same label.",
                fix="--student_layers even",
            )

    def loss(self, keep: Sequence[int]) -> float | None:
        """Held-out loss of a probe on a student of these layers; None if the family has no such student."""
        try:
            model = slice_layers(self.source.model, keep)
        except CheckpointError:
            return None
        model = use_mean_pooling(model) if self.mean_pooling else model
        states = [
            predict(model, part, self.collator, batch_size=self.batch_size, bf16=self.bf16, output=_pooled)
            for part in (self.fit, self.held_out)
        ]
        labels = [part.columns["labels"] for part in (self.fit, self.held_out)]
        classes = int(model.config.num_labels or 0)
        fitted = fit_probe(
            states[0], labels[0], states[1], labels[1], classes=classes, intercept=True, problem_type=self.problem_type
        )
        return fitted.loss


def _pooled(model: torch.nn.Module, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return pooled_states(cast("PreTrainedModel", model), inputs)
