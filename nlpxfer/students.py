"""Students of a distillation, from the options to untrained models.

A student is a checkpoint of its own, a static model, or a part of its teacher: some layers, and of these, if asked
for, some entries, heads and neurons. Its control arm is cut from the pretrained checkpoint at the same places: what
was chosen by looking at the teacher (`like`) is the same for both, so that they differ in what they learn from alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Final, TypeVar

from nlpxfer.checkpoint.load import Checkpoint, layer_student, load_classifier, narrow_student, width_and_kind
from nlpxfer.checkpoint.narrow import Kept, narrow_widths, widths_of
from nlpxfer.checkpoint.pooling import has_mean_layer, use_mean_pooling, wants_mean
from nlpxfer.checkpoint.static import is_static
from nlpxfer.checkpoint.student import parse_layers, slice_layers
from nlpxfer.config import RunOptions, default_learning_rate
from nlpxfer.config.student import BOTTOM, CUTS, EVEN, PROBE, STATIC, TRIAL, StudentOptions
from nlpxfer.data.tokenise import Collator
from nlpxfer.errors import ConfigError
from nlpxfer.run import Run
from nlpxfer.train.layer_probe import LayerChoice, probe_layers
from nlpxfer.train.linear_probe import sample_batches
from nlpxfer.train.static_start import StaticPlan, refuse_wide, static_student, token_counts, token_states
from nlpxfer.train.width_scores import parts_by_activation

STATIC_DIM: Final = 256
"""Numbers per token where none are asked for, as in model2vec."""

Build = Callable[[int], Checkpoint]
"""From a seed to an untrained model."""
Plan = TypeVar("Plan", bound=StudentOptions)


def refuse_unused(run: Run, plan: StudentOptions, *, teacher_given: bool) -> None:
    """Refuse options that a static student makes meaningless, given or searched.

    Args:
        run: Its options.
        plan: What the student is.
        teacher_given: Whether the run trains no teacher, so that the student's are the only epochs.

    Raises:
        ConfigError: Lists the options.
    """
    named = plan.student_name_or_path
    static = plan.student == STATIC or (named and run.once(("width", named), lambda: width_and_kind(named))[1])
    if not static:
        return
    options, faults = run.options, []

    def asked(name: str) -> bool:
        return name in options.ranges or getattr(options, name) != getattr(RunOptions, name)

    if plan.student == STATIC and teacher_given and asked("num_train_epochs"):
        faults.append("num_train_epochs: for a static student it is static_num_train_epochs")
    if run.data_options.text_pair_column is not None:
        faults.append("text_pair_column: a mean over tokens cannot tell two texts apart")
    if options.pooling == "mean" or "pooling" in options.ranges:
        faults.append("pooling: does nothing for a static student, which is a mean already")
    for name in ("num_trained_layers", "layer_decay", "gradual_unfreezing"):
        if asked(name):
            faults.append(f"{name}: a static student has no layers")
    if faults:
        raise ConfigError.from_faults(faults)


def training_of(run: Run, plan: StudentOptions, source: Checkpoint) -> dict[str, Any]:
    """Options in which the training of the student and its control differs from that of the run.

    Args:
        run: Its options.
        plan: What the student is.
        source: What it is cut from, if it is.
    """
    if name := plan.student_name_or_path:
        width, static = run.once(("width", name), lambda: width_and_kind(name))
    else:
        width, static = plan.student_hidden_size or source.hidden_size, plan.student == STATIC
    found = {"learning_rate": run.options.learning_rate_or(default_learning_rate(width, static=static))}
    return found | {"num_train_epochs": plan.static_num_train_epochs} if plan.student == STATIC else found


def searched_shapes(run: Run) -> list[str]:
    """The options that are searched and change the shape of a student of layers."""
    return [name for name in (*CUTS, "pooling") if name in run.options.ranges]


def whole_training(run: Run, rows: int | None = None) -> int:
    """Optimizer steps of a training of a student of layers.

    Args:
        run: Its options and data.
        rows: That it learns from. Default: all that may be taught, as if the teachers answered each.
    """
    return run.options.training_steps(taught_rows(run) if rows is None else rows)


def taught_rows(run: Run) -> int:
    """The rows that a student may be taught on, with and without labels."""
    return sum(len(getattr(run.data, split)) for split in run.data.taught)


def outline(plan: Plan) -> Plan:
    """Options that lead to a student of the same size, without looking at a teacher that is not there yet."""
    return replace(plan, student_layers=EVEN) if plan.student_layers in (PROBE, TRIAL) else plan


def kind_of(student: Checkpoint | Any) -> str:  # noqa: ANN401 - whatever holds a model
    """What a student is, in two or three words."""
    if is_static(student.model):
        return "static student"
    mean = has_mean_layer(student.model)
    return f"student of {student.model.config.num_hidden_layers - mean} layers{' and their mean' if mean else ''}"


def student_of(run: Run, plan: StudentOptions, source: Checkpoint, *, like: Checkpoint | None = None) -> Build:
    """How to make an untrained student.

    Args:
        run: Its rows are what parts are chosen by.
        plan: What the student is.
        source: What parts and token vectors are taken from.
        like: What parts are chosen by, if they are chosen by what they do; default `source`.
    """
    if plan.student == STATIC:
        return _static(run, plan, source)

    def build(seed: int) -> Checkpoint:
        if plan.student_name_or_path:
            return load_classifier(plan.student_name_or_path, schema=run.data.schema, seed=seed)
        keep, mean = kept_layers(run, plan, like or source), wants_mean(like or source, run.options.pooling)
        whole = source
        if like is not None and not mean and has_mean_layer(like.model) and not has_mean_layer(source.model):
            whole = replace(source, model=use_mean_pooling(source.model))  # with `--pooling own` a layer like others
        student = replace(layer_student(whole, keep, seed=seed), is_mean_encoder=mean)
        if plan.student_hidden_size is None and plan.student_intermediate_size is None:
            return student
        return narrow_student(student, kept_parts(run, plan, like or source, keep), seed=seed)

    return build


def defaults_of(run: Run, source: Checkpoint) -> dict[str, Any]:
    """What options of a student without a value stand for, of those that a search may vary.

    Args:
        run: Its options.
        source: What the student is cut from, or its token vectors taken.
    """
    return {"student_num_layers": half(layer_count(run, source)), "static_dim": _static_dim(source)}


def half(layers: int) -> int:
    """Of so many layers those that a student keeps where no number is given."""
    return max(1, layers // 2)


def _static_dim(source: Checkpoint) -> int:
    return min(STATIC_DIM, int(source.model.config.hidden_size))


def layer_count(run: Run, source: Checkpoint) -> int:
    """How many layers of `source` a student can keep: not the one that computes a mean, if it gets one of its own."""
    mean = wants_mean(source, run.options.pooling) and has_mean_layer(source.model)
    return int(source.model.config.num_hidden_layers) - mean


def kept_layers(run: Run, plan: StudentOptions, source: Checkpoint) -> Sequence[int]:
    """The layers of `source` that the student keeps; probes are made once, and told in the report."""
    total, mean = layer_count(run, source), wants_mean(source, run.options.pooling)
    count = plan.student_num_layers
    if not total:
        raise ConfigError(
            f"{source.name} has no layers that a student could keep; static models have none.",
            fix="--student_name_or_path with a checkpoint",
        )
    if count is None and plan.student_layers in (BOTTOM, EVEN, PROBE):
        count = half(total)
    if plan.student_layers != PROBE or count is None:
        return parse_layers(plan.student_layers, total, count)
    number = count

    def probe() -> LayerChoice:
        return probe_layers(
            source,
            run.tokenise(source.tokenizer, "train"),
            number,
            problem_type=run.problem_type,
            mean_pooling=mean,
            batch_size=run.options.per_device_eval_batch_size,
            seed=run.data_options.data_split_seed,
            quiet=bool(run.options.disable_tqdm),
        )

    choice = run.once(("layers", source.weights_sha256, str(number), str(mean)), probe)
    run.checks["student_layers"] = choice.facts()
    return choice.layers


def note_layers(run: Run, plan: StudentOptions, source: Checkpoint) -> None:
    """Look for the layers that a probe picks, if one does, so that the report tells them of a resumed run too."""
    if plan.student_layers == PROBE and plan.student != STATIC and not plan.student_name_or_path:
        kept_layers(run, plan, source)


def kept_parts(run: Run, plan: StudentOptions, source: Checkpoint, layers: Sequence[int]) -> Kept:
    """What a narrower student keeps of these layers of `source`, measured once."""

    def measure() -> Kept:
        model = slice_layers(source.model, layers)
        hidden = plan.student_hidden_size or widths_of(model).hidden
        widths = narrow_widths(model, hidden, plan.student_intermediate_size)
        rows, collator = run.tokenise(source.tokenizer, "train"), Collator.for_tokenizer(source.tokenizer)
        sample = sample_batches(model, rows, collator, batch_size=run.options.per_device_eval_batch_size)
        return parts_by_activation(model, sample, widths)

    sizes = str(plan.student_hidden_size), str(plan.student_intermediate_size)
    return run.once(("parts", source.weights_sha256, str([*layers]), *sizes), measure)


def _static(run: Run, plan: StudentOptions, source: Checkpoint) -> Build:
    """How to make an untrained static student from the token states of `source`, computed once."""
    dim = plan.static_dim or _static_dim(source)
    shape = StaticPlan(
        dim=dim,
        hidden_layer=plan.static_hidden_layer,
        normalize=plan.static_normalize,
        max_length=run.data_options.max_length,
    )
    tokenizer, quiet = source.tokenizer, bool(run.options.disable_tqdm)
    size = run.options.per_device_eval_batch_size

    def build(seed: int) -> Checkpoint:
        refuse_wide(source, dim)
        states_VH = run.once(
            ("states", source.weights_sha256), lambda: token_states(source, batch_size=size, quiet=quiet)
        )
        counts_V = run.once(
            ("counts", source.tokenizer_sha256),
            lambda: token_counts((run.tokenise(tokenizer, split) for split in run.data.taught), len(states_VH)),
        )
        return static_student(source, states_VH, counts_V, shape, seed=seed)

    return build
