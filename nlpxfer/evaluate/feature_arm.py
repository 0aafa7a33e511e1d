"""An arm of a comparison whose body is frozen: features once, a classifier on them, scores from them.

`train_arm` is not taken: there are no steps of the whole model, so no checkpoints to resume (the cache is what an
interrupted run leaves), and the scores need no second pass. Training rows are computed in the precision of the run;
validation and test rows in float32, so that the scores are those of the model as it is saved.

Shapes: N rows, C classes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from nlpxfer.checkpoint.head import head_parameters
from nlpxfer.checkpoint.load import Checkpoint
from nlpxfer.checkpoint.save import refuse_not_finite
from nlpxfer.config import RunOptions
from nlpxfer.data.tokenise import Collator, TokenisedRows
from nlpxfer.errors import CheckpointError
from nlpxfer.evaluate.arms import Splits, TrainedArm
from nlpxfer.evaluate.feature_depth import read_at_best_depth
from nlpxfer.evaluate.task import task_metrics
from nlpxfer.methods.features import FeatureBased
from nlpxfer.problem import REGRESSION
from nlpxfer.train.feature_cache import Features, pooled_features
from nlpxfer.train.feature_head import MlpPlan, fit_logistic_head_, fit_mlp_head_, logits_of_features
from nlpxfer.train.launch import on_main, seed_everything, world
from nlpxfer.train.linear_probe import Probe
from nlpxfer.train.predict import mean_of_windows, predict

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Array = np.ndarray[Any, Any]
CHECKED_ROWS: Final = 16
"""Test rows that the whole model is asked about, to compare with its head on cached features."""
TOLERANCE: Final = 0.01
"""Largest difference of their logits, as a share of the largest logit (or of 1): rounding stays far below it, also
with TF32, and a head that computes something else far above it."""


@dataclass(frozen=True, kw_only=True)
class FeatureArm(TrainedArm):
    """A trained arm, and what is known about its features and its classifier.

    Attributes:
        details: Classifier, penalty or weight decay, the layer that is read, and what each split's features cost.
        logits_difference: Largest difference between the scored logits and those of the whole model.
    """

    details: Mapping[str, Any] = field(default_factory=dict)
    logits_difference: float


def feature_arm(
    name: str,
    *,
    build: Callable[[], Checkpoint],
    method: FeatureBased,
    split: Callable[[PreTrainedTokenizerBase], Splits],
    options: RunOptions,
    seed: int,
    choose_layer: bool = False,
    folder: str | Path | None = None,
    plan: MlpPlan | None = None,
) -> FeatureArm:
    """Build a model, fit its head on frozen features and score it.

    All processes call this together: each computes its share of the features, the first one fits the head.

    Args:
        name: Name of the arm.
        build: Makes the model with the pooling it shall have; called after seeding.
        method: The classifier.
        split: Tokenises the rows with the model's tokenizer.
        options: Batch size, precision, device and progress; `linear_probe` starts an mlp from logistic regression.
        seed: Seed of this repetition.
        choose_layer: Whether `read_at_best_depth` chooses the layer that is read; else it is the last one.
        folder: Folder of the feature caches.
        plan: How an mlp is trained; its seed is replaced by `seed`.

    Raises:
        ConfigError: The classifier is an mlp, and the head has no hidden layer.
        DataError: The training rows have fewer than two classes.
        NotFiniteError: Features or the loss are NaN or infinite.
        CheckpointError: The head of this family computes something else than is known of it.
        StaleCacheError, NoSpaceError: See `pooled_features`.
    """
    seed_everything(seed)
    checkpoint = build()
    model = checkpoint.model
    model.to(options.device)  # type: ignore[arg-type]  # its decorator hides self
    splits = split(checkpoint.tokenizer)
    collator = Collator.for_tokenizer(checkpoint.tokenizer)
    size, quiet = options.per_device_eval_batch_size, bool(options.disable_tqdm)

    def features_of(split: str, bf16: bool) -> Features:
        rows: TokenisedRows = getattr(splits, split).each_window()
        what = f"{name}: {split} features"
        return pooled_features(
            model, rows, collator, batch_size=size, bf16=bf16, folder=folder, description=what, quiet=quiet
        )

    start = time.perf_counter()
    depth = None
    if choose_layer:
        model, depth = read_at_best_depth(
            model,
            splits.train,
            collator,
            problem_type=method.problem_type,
            batch_size=size,
            bf16=bool(options.bf16),
            folder=folder,
            description=f"{name}: states of each layer",
            quiet=quiet,
        )
        checkpoint = replace(checkpoint, model=model)  # nothing holds the whole one from here on
    found = {"train": features_of("train", bool(options.bf16)), "validation": features_of("validation", False)}
    labels = {part: getattr(splits, part).columns["labels"] for part in ("train", "validation")}
    plan = replace(plan or MlpPlan(), seed=seed)
    labelled_rows = [splits.train, splits.validation]
    windows = labelled_rows if any(rows.windows is not None for rows in labelled_rows) else None
    fitted = _fit_(model, method, found, labels, plan, linear_probe=options.linear_probe, windows=windows, quiet=quiet)
    seconds = time.perf_counter() - start
    found["test"] = features_of("test", False)
    logits = {
        part: mean_of_windows(logits_of_features(model, found[part].states_NH), getattr(splits, part))
        for part in ("validation", "test")
    }
    difference = _difference(model, splits.test, collator, logits["test"], size)
    model.requires_grad_(True)
    model.eval()  # type: ignore[no-untyped-call]
    scores = task_metrics(method.problem_type, logits["validation"], labels["validation"])
    shown = ", ".join(f"{metric} {value:.4f}" for metric, value in scores.items())
    logger.info("%s, seed %d: validation %s; %.1f s", name, seed, shown, seconds)
    return FeatureArm(
        name=name,
        seed=seed,
        model=model,
        tokenizer=checkpoint.tokenizer,
        validation_logits=logits["validation"],
        test_logits=logits["test"],
        train_seconds=seconds,
        tokens=found["train"].tokens + (depth.tokens if depth else 0),
        trained_parameters=sum(p.numel() for p in method.trained_parameters(model).values()),
        steps=fitted.steps,
        planned_steps=fitted.steps,
        probe=fitted.probe,
        history=fitted.history,
        details={
            "classifier": method.classifier,
            **fitted.choice,
            **({"layers": depth.facts()} if depth else {}),
            "features": {part: features.facts() for part, features in found.items()},
        },
        logits_difference=difference,
    )


@dataclass(frozen=True, kw_only=True)
class _Fitted:
    """What fitting a head gave: see `TrainedArm`, and for the report what was chosen."""

    steps: int
    probe: Probe | None
    history: list[dict[str, float]]
    choice: dict[str, Any]


def _fit_(
    model: PreTrainedModel,
    method: FeatureBased,
    found: Mapping[str, Features],
    labels: Mapping[str, Array],
    plan: MlpPlan,
    *,
    linear_probe: bool,
    windows: Sequence[TokenisedRows] | None,
    quiet: bool,
) -> _Fitted:
    """Fit the head on the first process, and give its weights to all."""
    arrays = [values for part in ("train", "validation") for values in (found[part].states_NH, labels[part])]
    fit = partial(_fit_here_, model, method, arrays, plan, linear_probe=linear_probe, windows=windows, quiet=quiet)
    fitted = on_main(fit)
    if world()[1] > 1:
        for parameter in head_parameters(model).values():
            torch.distributed.broadcast(parameter.data, src=0)
    refuse_not_finite(model)
    return fitted


def _fit_here_(
    model: PreTrainedModel,
    method: FeatureBased,
    arrays: Sequence[Array],
    plan: MlpPlan,
    *,
    linear_probe: bool,
    windows: Sequence[TokenisedRows] | None,
    quiet: bool,
) -> _Fitted:
    probe = None
    if method.classifier == "logistic" or linear_probe:
        probe = fit_logistic_head_(model, *arrays, problem_type=method.problem_type, windows=windows)
        logger.info(
            "%s: %s", "ridge regression" if method.problem_type == REGRESSION else "logistic regression", probe
        )
    if method.classifier == "logistic":
        return _Fitted(steps=0, probe=probe, history=[], choice={"penalty": probe.penalty if probe else None})
    fit = fit_mlp_head_(model, method, *arrays, plan=plan, windows=windows, quiet=quiet)
    choice = {"weight_decay": fit.weight_decay, "epochs": fit.epochs, "validation_loss": fit.validation_loss}
    logger.info("mlp: validation loss %.4f after %d passes", fit.validation_loss, fit.epochs)
    if not fit.epochs:
        logger.warning(
            "mlp: no pass lowered the validation loss of its start, which is kept: try a lower learning_rate"
        )
    return _Fitted(steps=fit.steps, probe=probe, history=fit.history, choice=choice)


def _difference(
    model: PreTrainedModel, rows: TokenisedRows, collator: Collator, logits_NC: Array, batch_size: int
) -> float:
    """Largest difference between the given logits and those of the whole model, for some rows.

    Raises:
        CheckpointError: It is no matter of rounding.
    """
    sample = np.unique(np.linspace(0, len(rows) - 1, min(CHECKED_ROWS, len(rows))).astype(int))
    whole = predict(model, rows.select(sample), collator, batch_size=batch_size)
    difference = float(np.abs(whole - logits_NC[sample]).max())
    if difference > TOLERANCE * max(1.0, float(np.abs(whole).max())):
        raise CheckpointError(
            f"The head of {type(model).__name__} gives other logits than the whole model ({difference:.2g} apart).",
            why="its head computes something that nlpxfer does not know",
            fix="recipes/finetune.py with this checkpoint, or another checkpoint",
        )
    return difference
