"""The pretrained checkpoint that a given teacher started from: there the control student has its layers from."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

from nlpxfer.checkpoint.depth import cut_to_depth, depth_of
from nlpxfer.checkpoint.fingerprint import weights_fingerprint
from nlpxfer.checkpoint.load import load_classifier
from nlpxfer.checkpoint.pooling import has_mean_layer
from nlpxfer.errors import CheckpointError, ConfigError
from nlpxfer.report.run import recorded_options, recorded_run

if TYPE_CHECKING:
    from nlpxfer.checkpoint.load import Checkpoint
    from nlpxfer.data.schema import LabelSchema

LOGGER = logging.getLogger(__name__)


def start_of(teacher: Checkpoint, named: str | None, schema: LabelSchema) -> Checkpoint:
    """The pretrained checkpoint of a given teacher, or the teacher itself if it is not known.

    Args:
        teacher: A classifier that was given.
        named: `model_name_or_path`; None for what the teacher's run.json says.
        schema: The labels.

    Raises:
        ConfigError: The teacher cannot have started from what was named: the weights of its body have other shapes.
        CheckpointError: What was named cannot be loaded.
    """
    if named is not None:
        base = _as_deep(load_classifier(named, schema=schema), teacher)
        if not _may_start_from(teacher, base):
            raise ConfigError(
                f"model_name_or_path: {teacher.name} did not start from {named}: their weights have other shapes."
            )
        return base
    options = recorded_options(teacher.folder)
    recorded = options.get("model_name_or_path")
    why = "no run.json says what it started from"
    if recorded:
        try:
            whole = load_classifier(str(recorded), schema=schema, revision=options.get("model_revision"))
            base = _as_deep(whole, teacher)
            if _may_start_from(teacher, base) and _is_recorded(whole, teacher):
                LOGGER.info("control: its layers come from %s, which %s started from", base.name, teacher.name)
                return base
            why = f"{recorded}, which its run.json names, has other weights here"
        except CheckpointError:
            why = f"{recorded}, which its run.json names, cannot be loaded"
    LOGGER.warning(
        "control: %s, so its layers come from the teacher %s itself and know what that has learnt\n"
        "  Try: --model_name_or_path NAME, the pretrained checkpoint",
        why,
        teacher.name,
    )
    return teacher


def _is_recorded(base: Checkpoint, teacher: Checkpoint) -> bool:
    """Whether run.json has the weights of a checkpoint: a name of a local folder may mean another one here."""
    recorded = recorded_run(teacher.folder, "parents", "model").get("loaded_weights")
    return recorded in (None, weights_fingerprint(base.model, without=base.fresh))


def _as_deep(base: Checkpoint, teacher: Checkpoint) -> Checkpoint:
    """The checkpoint cut to the depth of a teacher that reads it below its last layer (`recipes/features.py`)."""
    if recorded_run(teacher.folder).get("recipe") == "features":
        try:
            depth = depth_of(teacher.model)
            if depth < depth_of(base.model):
                return replace(base, model=cut_to_depth(base.model, depth))
        except CheckpointError:  # no layers to count: it was not cut
            pass
    return base


def _may_start_from(teacher: Checkpoint, base: Checkpoint) -> bool:
    ours, theirs = (
        {name: tuple(weight.shape) for name, weight in checkpoint.model.base_model.named_parameters()}
        for checkpoint in (base, teacher)
    )
    known = {name: shape for name, shape in theirs.items() if name in ours} == ours
    return known and (len(theirs) == len(ours) or has_mean_layer(teacher.model))
