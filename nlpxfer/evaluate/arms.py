"""One arm of a comparison: prepare a model, train it with a method, and score it.

Treatment and control arms go through the same function with the same options, so that they differ in the method and in
nothing else.

Shapes: N rows, C classes.
"""

from __future__ import annotations

import copy
import json
import logging
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache

from nlpxfer.checkpoint.adapters import (
    BUNDLE_FOLDER,
    BaseFacts,
    base_facts,
    is_adapted,
    load_adapter,
    merged,
    save_adapter,
)
from nlpxfer.checkpoint.head import embedding_parameters
from nlpxfer.checkpoint.load import Checkpoint, load_classifier
from nlpxfer.checkpoint.pooling import wants_mean, with_pooling
from nlpxfer.checkpoint.save import refuse_not_finite, save_classifier
from nlpxfer.config import RunOptions
from nlpxfer.data.schema import LabelSchema
from nlpxfer.data.tokenise import Collator, TokenisedRows
from nlpxfer.errors import CheckpointError, ConfigError, Interrupted
from nlpxfer.evaluate.task import task_metrics
from nlpxfer.methods.base import Batch, Method
from nlpxfer.problem import ProblemType
from nlpxfer.strict_json import write_json_whole
from nlpxfer.train.checkpoints import RunIdentity, damage, require_same_run, seal
from nlpxfer.train.launch import on_main, seed_everything, wait_for_everyone, world
from nlpxfer.train.layerwise import freeze_below_
from nlpxfer.train.linear_probe import Probe, start_from_linear_probe_
from nlpxfer.train.precision import fault_of
from nlpxfer.train.predict import predict
from nlpxfer.train.regime import set_dropout_
from nlpxfer.train.reporters import report_to_tensorboard
from nlpxfer.train.trainer import GO_ON, Sampling, TransferTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Array = np.ndarray[Any, Any]
FINISHED = "finished"
ACCELERATE_MARKS = ("_is_accelerate_prepared", "_original_forward", "forward")
"""What accelerate leaves on a model. A slice of the model takes them along, and would then be trained as it is: in
float32 where bfloat16 is meant, and with no gradients from other processes."""


@dataclass(frozen=True)
class Splits:
    """The rows of a task, as one tokenizer sees them; all with `labels`."""

    train: TokenisedRows
    validation: TokenisedRows
    test: TokenisedRows


@dataclass(frozen=True, kw_only=True)
class TrainedArm:
    """A trained model with its predictions and its cost.

    Attributes:
        name: Name of the arm.
        seed: Seed of its head, dropout and row order.
        model: Plain transformers model in float32, in eval mode, all parameters trainable again. After training an
            adapter: with the adapter folded in, or, of a kind that cannot be, on its base and frozen.
        tokenizer: Its tokenizer.
        validation_logits: Shape (N, C), float32 arithmetic.
        test_logits: Likewise.
        train_seconds: Probe and training; validation during training included, final scoring not.
        steps: Optimizer steps.
        planned_steps: Optimizer steps that it would have made without early stopping.
        tokens: Training tokens without padding, over all processes.
        trained_parameters: Parameters that were updated.
        probe: The linear probe it started from, if any.
        adapter: The bundle of a trained adapter, if it is one; gone when the run is finished.
        history: Loss and scores as logged.
        preflight: What was found before the first step; None if the method asks for nothing.
        seconds_before: Those of `train_seconds` that an earlier attempt at the run took.
    """

    name: str
    seed: int
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    validation_logits: Array
    test_logits: Array
    train_seconds: float
    steps: int
    planned_steps: int
    tokens: int
    trained_parameters: int
    probe: Probe | None
    adapter: Path | None = None
    history: list[dict[str, float]] = field(default_factory=list)
    preflight: dict[str, Any] | None = None
    seconds_before: float = 0.0


def train_arm(
    name: str,
    *,
    build: Callable[[], Checkpoint],
    method: Method,
    split: Callable[[PreTrainedTokenizerBase], Splits],
    schema: LabelSchema,
    options: RunOptions,
    seed: int,
    facts: Mapping[str, Any],
    sampling: Sampling = "natural",
) -> TrainedArm:
    """Build, prepare, train and score one model.

    All processes call this together. While it trains, checkpoints lie in `<output_dir>/checkpoints/<name>-<seed>/`; a
    finished arm leaves its model and cost there, so that a resumed run does not train it again.

    Args:
        name: Name of the arm, used in folder names.
        build: Makes the untrained model; called after seeding.
        method: What is minimised.
        split: Tokenises the rows with the model's tokenizer.
        schema: Labels.
        options: How to train.
        seed: Seed of this repetition.
        facts: Flat JSON values that a resumed run must share: options and fingerprints.
        sampling: "balanced" draws all classes equally often.

    Raises:
        Interrupted, NotFiniteError, ResumeError: See `TransferTrainer.fit`; an arm that was trained when it was asked
            to stop is a finished one.
    """
    method.check(options)
    options = copy.copy(options)
    folder = Path(str(options.output_dir)) / "checkpoints" / f"{name}-{seed}"
    options.output_dir, options.seed = str(folder), seed
    options.push_to_hub = False  # `nlpxfer.result.finish` pushes, once; the Trainer would make the repository at once
    identity = RunIdentity({**facts, "arm": name, "seed": seed}, topology(options))
    finished = folder / FINISHED
    if options.resume and finished.is_dir() and not damage(finished):
        return _load_finished(finished, name, seed, build, split, schema, options, identity)
    prepared = prepare_arm(
        build=build,
        method=method,
        split=split,
        schema=schema,
        options=options,
        identity=identity,
        sampling=sampling,
    )
    trainer, checkpoint, base, probe = prepared.trainer, prepared.checkpoint, prepared.base, prepared.probe
    report_to_tensorboard(trainer, folder.parent.parent, folder.name)
    trainer.fit(resume=options.resume)
    method.release_(unwrapped(trainer))
    record = {
        "train_seconds": prepared.seconds + trainer.seconds,
        "steps": trainer.state.global_step,
        "planned_steps": trainer.state.max_steps,
        "tokens": trainer.tokens_seen,
        "trained_parameters": prepared.trained_parameters,
        "probe": vars(probe) if probe else None,
        "history": [_numbers(line) for line in trainer.state.log_history],
        "preflight": trainer.preflight,
    }
    _finish(trainer, finished, record, checkpoint, schema, identity, base)
    if trainer.stop.asked:
        raise Interrupted(
            f"The run was asked to stop when {name}, seed {seed}, was trained; its model is kept.", fix=GO_ON
        )
    tokenizer, source, seconds_before = checkpoint.tokenizer, checkpoint.folder, trainer.seconds_before
    splits, collator = prepared.splits, prepared.collator
    if base is None:
        model = _plain_model(trainer, finished, schema, options)
        _release(trainer)
    else:
        _release(trainer)
        del prepared, trainer, checkpoint  # what was trained makes room for what is scored
        clear_device_cache(garbage_collection=True)
        model = _finished_adapter(finished, source, schema, options)
    scored = _scored(name, seed, model, tokenizer, splits, collator, options, record, finished)
    return replace(scored, seconds_before=seconds_before)


@dataclass(frozen=True, kw_only=True)
class PreparedArm:
    """A model that is ready to be trained.

    Attributes:
        trainer: Holds it.
        checkpoint: Where it comes from.
        base: What an adapter sits on; None for a model without one.
        splits: The rows as its tokenizer sees them.
        collator: Pads its batches.
        probe: The linear probe it starts from, if any.
        seconds: What the preparation took; loading and tokenising do not count.
        trained_parameters: Parameters that will be updated.
    """

    trainer: TransferTrainer
    checkpoint: Checkpoint
    base: BaseFacts | None
    splits: Splits
    collator: Collator
    probe: Probe | None
    seconds: float
    trained_parameters: int


def prepare_arm(
    *,
    build: Callable[[], Checkpoint],
    method: Method,
    split: Callable[[PreTrainedTokenizerBase], Splits],
    schema: LabelSchema,
    options: RunOptions,
    identity: RunIdentity,
    sampling: Sampling,
) -> PreparedArm:
    """Build a model, start its head from a probe, freeze what stays, and make its trainer; see `train_arm`."""
    seed_everything(options.seed)
    checkpoint = build()
    pooling = "mean" if wants_mean(checkpoint, options.pooling) else "own"
    base = base_facts(checkpoint, adapter=method.adapter, pooling=pooling) if method.adapter else None
    model = with_pooling(checkpoint, pooling)
    if options.dropout is not None:
        set_dropout_(model, options.dropout)
    model = method.adapt(model, checkpoint.fresh)
    if not getattr(checkpoint.model, "is_quantized", False):  # which lies on its device already
        model.to(options.device)  # type: ignore[arg-type]  # its decorator hides self
    splits = split(checkpoint.tokenizer)
    collator = Collator.for_tokenizer(checkpoint.tokenizer)
    if method.adapter or options.bf16:
        _check_computes(model, collator([splits.train[0]]), bf16=bool(options.bf16), adapter=method.adapter)
    start = time.perf_counter()
    probe = _prepare_(
        model, checkpoint, splits, collator, options, schema.problem_type, whole_head=method.compares_sizes
    )
    seed_everything(options.seed)
    trainer = TransferTrainer(
        model,
        method,
        options,
        train_rows=splits.train,
        validation_rows=splits.validation,
        tokenizer=checkpoint.tokenizer,
        metrics=partial(task_metrics, schema.problem_type),
        identity=identity,
        sampling=sampling,
    )
    return PreparedArm(
        trainer=trainer,
        checkpoint=checkpoint,
        base=base,
        splits=splits,
        collator=collator,
        probe=probe,
        seconds=time.perf_counter() - start,
        trained_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
    )


def _check_computes(model: PreTrainedModel, batch: Batch, *, bf16: bool, adapter: str | None) -> None:
    """Refuse a model that does not compute in bfloat16, or with its adapter not at all.

    Raises:
        ConfigError: Says so.
    """
    if (fault := fault_of(model, batch, bf16=bf16)) is None:
        return
    what, where = (f"adapter: {adapter}", " in this model") if adapter else (type(model).__name__, "")
    if bf16 and fault_of(model, batch, bf16=False) is None:
        raise ConfigError(f"{what} does not compute in bfloat16{where}: {fault}.", fix="--bf16 false")
    raise ConfigError(
        f"{what} does not compute{where}: {fault}.", fix=f"another {'adapter' if adapter else 'checkpoint'}"
    )


def _prepare_(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    splits: Splits,
    collator: Collator,
    options: RunOptions,
    problem_type: ProblemType,
    *,
    whole_head: bool,
) -> Probe | None:
    """Start the head from a probe and freeze the embeddings, as asked for; nothing new may stay frozen.

    An adapter is in place before the probe, whose features are then those that the head will read: a learnt prompt
    changes them from the start.
    """
    probe = None
    if options.linear_probe and not checkpoint.head_kept:
        probe = start_from_linear_probe_(
            model,
            splits.train,
            splits.validation,
            collator,
            problem_type=problem_type,
            size=0.0 if whole_head else options.probe_size(problem_type, len(splits.train)),
            batch_size=options.per_device_eval_batch_size,
            bf16=bool(options.bf16),
            quiet=bool(options.disable_tqdm),
        )
    if is_adapted(model):
        return probe
    model.requires_grad_(True)
    if options.freeze_embeddings:
        for _, parameter in embedding_parameters(model):
            parameter.requires_grad_(False)
    if options.num_trained_layers is not None:
        freeze_below_(model, options.num_trained_layers)
    frozen = [name for name, p in model.named_parameters() if name in checkpoint.fresh and not p.requires_grad]
    if frozen:
        raise CheckpointError(
            f"These parameters are newly initialised and would stay frozen: {', '.join(frozen)}.",
            fix="--freeze_embeddings false",
        )
    return probe


def topology(options: RunOptions) -> dict[str, int]:
    """Processes and batch sizes of a run, in which its continuation must not differ."""
    return {
        "processes": world()[1],
        "per_device_train_batch_size": options.per_device_train_batch_size,
        "gradient_accumulation_steps": options.gradient_accumulation_steps,
    }


def _numbers(line: Mapping[str, Any]) -> dict[str, float]:
    return {key: float(value) for key, value in line.items() if isinstance(value, (int, float)) and np.isfinite(value)}


def _finish(
    trainer: TransferTrainer,
    folder: Path,
    record: Mapping[str, Any],
    checkpoint: Checkpoint,
    schema: LabelSchema,
    identity: RunIdentity,
    base: BaseFacts | None,
) -> None:
    """Keep the trained model and its cost; with a sharded model all processes take part in gathering it.

    Of an adapter both are kept: the bundle and, where it can be, the model that it is folded into.
    """
    model, tokenizer = unwrapped(trainer), checkpoint.tokenizer

    def save() -> None:
        if base is not None:
            bundle = save_adapter(cast("Any", model), tokenizer, schema, folder / BUNDLE_FOLDER, base=base)
            loaded = load_adapter(bundle, base=str(checkpoint.folder))
            if loaded.merges:
                save_classifier(merged(loaded), tokenizer, schema, folder)
        elif not trainer.is_fsdp_enabled:
            refuse_not_finite(model)
            save_classifier(model, tokenizer, schema, folder)
        write_json_whole(folder / "arm.json", dict(record))
        seal(folder, identity, int(record["steps"]))
        for old in folder.parent.glob("checkpoint-*"):  # three times the model's size each
            shutil.rmtree(old, ignore_errors=True)

    if base is None and trainer.is_fsdp_enabled:
        trainer.save_model(str(folder))
    wait_for_everyone()
    on_main(save)


def unwrapped(trainer: TransferTrainer) -> PreTrainedModel:
    """The model without DDP and without the autocast that accelerate wraps around its `forward`.

    With that wrapper left on, a model would go on computing in bfloat16 where float32 is meant.
    """
    plain: PreTrainedModel = trainer.accelerator.unwrap_model(trainer.network, keep_fp32_wrapper=False)
    return plain


def _plain_model(
    trainer: TransferTrainer, finished: Path, schema: LabelSchema, options: RunOptions
) -> PreTrainedModel:
    if trainer.is_fsdp_enabled:
        model = load_classifier(str(finished), schema=schema).model
        model.to(options.device)  # type: ignore[arg-type]  # its decorator hides self
    else:
        model = unwrapped(trainer)
    for mark in ACCELERATE_MARKS:
        vars(model).pop(mark, None)
    model.requires_grad_(True)
    model.eval()  # type: ignore[no-untyped-call]
    return model


def _release(trainer: TransferTrainer) -> None:
    # a DDP wrapper that outlives the process group can hang at exit
    trainer.model_wrapped = trainer.network
    trainer.accelerator.free_memory()


def _finished_adapter(finished: Path, base: Path | None, schema: LabelSchema, options: RunOptions) -> PreTrainedModel:
    """The model as it was saved, on its float32 base: scores shall be those of what a user will load.

    A base that was trained on in 8 or 4 bits may be too large for the GPU; then the processor scores.
    """
    if (finished / "config.json").is_file():
        model = load_classifier(str(finished), schema=schema).model
    else:
        loaded = load_adapter(finished / BUNDLE_FOLDER, base=str(base))
        model = cast("PreTrainedModel", loaded.model)
    try:
        model.to(options.device)  # type: ignore[arg-type]  # its decorator hides self
    except torch.OutOfMemoryError:
        model.to("cpu")  # type: ignore[arg-type]
        clear_device_cache(garbage_collection=True)
        logger.warning(
            "The float32 model does not fit on %s: the processor scores it, which takes long", options.device
        )
    return model


def _load_finished(
    folder: Path,
    name: str,
    seed: int,
    build: Callable[[], Checkpoint],
    split: Callable[[PreTrainedTokenizerBase], Splits],
    schema: LabelSchema,
    options: RunOptions,
    identity: RunIdentity,
) -> TrainedArm:
    require_same_run(folder, identity, options.allow_topology_change)
    logger.warning("%s, seed %d: already trained", name, seed)
    record = json.loads((folder / "arm.json").read_text(encoding="utf-8"))
    if (folder / BUNDLE_FOLDER).is_dir():
        checkpoint = build()
        tokenizer, base = checkpoint.tokenizer, checkpoint.folder
        del checkpoint
        model = _finished_adapter(folder, base, schema, options)
    else:
        checkpoint = load_classifier(str(folder), schema=schema)
        tokenizer, model = checkpoint.tokenizer, checkpoint.model
        model.to(options.device)  # type: ignore[arg-type]  # its decorator hides self
    splits = split(tokenizer)
    collator = Collator.for_tokenizer(tokenizer)
    scored = _scored(name, seed, model, tokenizer, splits, collator, options, record, folder)
    return replace(scored, seconds_before=record["train_seconds"])


def _scored(
    name: str,
    seed: int,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    splits: Splits,
    collator: Collator,
    options: RunOptions,
    record: Mapping[str, Any],
    finished: Path,
) -> TrainedArm:
    """The arm with its float32 predictions."""
    size, quiet = options.per_device_eval_batch_size, bool(options.disable_tqdm)
    validation, test = (
        predict(model, rows, collator, batch_size=size, description=f"{name}: scoring", quiet=quiet)
        for rows in (splits.validation, splits.test)
    )
    probe = Probe(**record["probe"]) if record["probe"] else None
    bundle = finished / BUNDLE_FOLDER
    return TrainedArm(
        name=name,
        seed=seed,
        model=model,
        tokenizer=tokenizer,
        validation_logits=validation,
        test_logits=test,
        adapter=bundle if bundle.is_dir() else None,
        **{"planned_steps": record["steps"], **record, "probe": probe},  # 0.1 did not write it
    )
