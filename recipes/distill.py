"""Distil a teacher into a smaller student, and measure what the teacher was worth.

    accelerate launch recipes/distill.py
    accelerate launch recipes/distill.py recipes/configs/distill.yaml --teacher_name_or_path runs/finetune

Without `--teacher_name_or_path` a teacher is fine-tuned first. The student is a part of the teacher, static (token
vectors and no attention), or any checkpoint: docs/students.md. The control arm is the same student with the same
number of steps and no teacher: a part is taken from the pretrained checkpoint that the teacher came from, where that
is known. Options given as ranges are searched for the student: a teacher made on the spot has the defaults of these,
or what `teacher_*` says. With `--self_distillation ema` there is no other model: the moving average of the student's
weights teaches it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np

from nlpxfer.checkpoint.load import Checkpoint, label_names, load_classifier, load_teacher
from nlpxfer.checkpoint.pooling import has_mean_layer
from nlpxfer.checkpoint.resolve import resolve_checkpoint
from nlpxfer.cli import run_main
from nlpxfer.config import DataOptions, RunOptions, option, parse
from nlpxfer.config.self_distillation import SelfDistillation
from nlpxfer.config.states import StatesPlan
from nlpxfer.config.student import CUTS, LAYERS, STATIC, StudentOptions
from nlpxfer.config.targets import TargetOptions
from nlpxfer.data.tokenise import TokenisedRows
from nlpxfer.errors import ConfigError
from nlpxfer.evaluate.arms import Splits
from nlpxfer.methods.distill import Distill
from nlpxfer.methods.finetune import FineTune
from nlpxfer.problem import REGRESSION
from nlpxfer.report.report import Arm, Report, Verdict
from nlpxfer.run import Run
from nlpxfer.smallest import find_smallest, slices
from nlpxfer.start import start_run
from nlpxfer.students import kind_of, outline, refuse_unused, student_of, training_of
from nlpxfer.train.teacher_cache import teacher_logits
from nlpxfer.train.teacher_states import TeacherStates, check_states
from nlpxfer.verdict import check_targets, judge

DEFAULT_MODEL = "all-MiniLM-L6-v2"


@dataclass(frozen=True, kw_only=True)
class DistillOptions(StudentOptions, TargetOptions, StatesPlan, SelfDistillation):
    """Teacher, student and how the one learns from the other."""

    NOT_SEARCHED: ClassVar[Mapping[str, str]] = {
        "teacher_num_train_epochs": "the search is for the student",
        "teacher_learning_rate": "the search is for the student",
        "student": "each kind has options of its own",
        "self_distillation": "it decides which arms there are",
        **TargetOptions.TARGETS_NOT_SEARCHED,
    }

    model_name_or_path: str | None = option(
        None,
        "Pretrained checkpoint the teacher starts, or started, from. Default for the first: all-MiniLM-L6-v2.",
    )
    teacher_name_or_path: str | None = option(None, "A classifier fine-tuned on the same labels: folder or Hub id.")
    teacher_num_train_epochs: float | None = option(
        None, "Passes over the training rows for a teacher made on the spot. Default: num_train_epochs."
    )
    teacher_learning_rate: float | None = option(None, "Its learning rate. Default: learning_rate.")
    teacher_cache: str | None = option(
        None, "Folder of the teacher's outputs. Default: ~/.cache/nlpxfer/teacher/<key>."
    )
    temperature: float = option(2.0, "T: softens the distributions of teacher and student.")
    kd_weight: float = option(0.9, "Share of the distillation loss; the rest is the label loss.")
    kd_loss: Literal["kl", "mse"] = option("kl", "Compare logits by T^2 KL, or by their squared error.")
    unlabelled_file: str | None = option(None, "Unlabelled texts for the teacher to label; auto: the data set's own.")

    def __post_init__(self) -> None:
        faults = self.student_faults() + self.target_faults()
        own = {"student": LAYERS, "student_name_or_path": None, **CUTS}
        if self.search and any(getattr(self, name) != default for name, default in own.items()):
            faults.append(f"search: chooses the student; leave {', '.join(own)} out")
        if self.search and self.hidden_layers != "auto":
            faults.append("hidden_layers: search tries students of several depths; leave it out")
        if self.student == STATIC:
            no_layers = [name for name in ("hidden_weight", "relation_weight") if getattr(self, name)]
            faults += [f"{name}: a static student has no layers" for name in no_layers]
        for name in ("teacher_num_train_epochs", "teacher_learning_rate"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                faults.append(f"{name}: {value} is not positive")
            if value is not None and self.teacher_name_or_path:
                faults.append(f"{name}: does nothing beside teacher_name_or_path")
        if self.model_name_or_path and self.teacher_name_or_path and self.student_name_or_path:
            faults.append("model_name_or_path: does nothing beside teacher_name_or_path and student_name_or_path")
        try:
            values = {"temperature": self.temperature, "kd_weight": self.kd_weight, "kd_loss": self.kd_loss}
            Distill(**values, ema_decay=self.ema_decay)
        except ConfigError as error:
            faults += error.faults
        if self.kd_loss == "mse" and self.temperature != DistillOptions.temperature:
            faults.append("temperature: means nothing for the squared error of kd_loss mse")
        faults += self.states_faults() + self.self_distillation_faults()
        if faults:
            raise ConfigError.from_faults(faults)

    @property
    def pretrained(self) -> str | None:
        """The checkpoint that the teacher starts or started from; None if a teacher is given and it is not known."""
        return self.model_name_or_path or (None if self.teacher_name_or_path else DEFAULT_MODEL)


def main(argv: Sequence[str] | None = None) -> Report:
    """Run the recipe; see `--help` for its options."""
    data_options, plan, options = parse((DataOptions, DistillOptions, RunOptions), argv)

    with start_run("distill", data_options, options, plan, searches=True) as run:
        if run.problem_type == REGRESSION and (
            plan.temperature != DistillOptions.temperature or "temperature" in options.ranges
        ):
            raise ConfigError("temperature: means nothing for a regression.")
        if plan.teaches_itself:
            return distil_itself(run, plan)
        check_targets(run, plan)
        refuse_unused(run, plan, teacher_given=plan.teacher_name_or_path is not None)
        _, alone = methods_for(run, plan)
        base = resolve_checkpoint(str(plan.student_name_or_path or plan.teacher_name_or_path or plan.pretrained))
        teacher, teacher_arm, pretrained = get_teacher(run, plan, alone)
        rows = TransferRows(run, plan, teacher)

        def arm(plan: DistillOptions) -> dict[str, Any]:
            build, (method, _) = student_of(run, plan, teacher), methods_for(run, plan)
            method = replace(method, teacher_labels=label_names(teacher.model), states=rows.states.guide(plan))
            facts = {"teacher": teacher.weights_sha256}
            shared = {"build": build, "method": method, "split": rows.with_teacher, "facts": facts}
            return shared | training_of(run, plan)

        plan = run.search("distilled", arm, plan)
        plan = find_smallest(run, plan, slices(teacher.model), arm, teacher)
        student = run.train("distilled", **arm(plan))
        distilled = run.arm(student, f"the student, taught by {teacher.name}")
        arms = [distilled, run.majority_arm()]
        models = {teacher_arm.name: teacher, "distilled": student[0]}
        verdict = Verdict.unmeasured("the control arm was switched off")
        if options.control_arm:
            untaught, (_, alone) = student_of(run, plan, pretrained, like=teacher), methods_for(run, plan)
            control = run.train("control", untaught, alone, **training_of(run, plan) | {"max_steps": student[0].steps})
            description = f"the same student and number of steps, without a teacher; from {pretrained.name}"
            arms.insert(0, run.arm(control, description))
            models["control"] = control[0]
            verdict = run.gain(student, [arm.test_logits for arm in control], versus="control")
        arms = run.with_speed([teacher_arm, *arms], models)
        judged = judge(run, plan, arms, models, student[0], rows.by_split())
        run.checks["teacher"] = rows.cache | {"retention": judged.retention}
        run.checks["preflight"] = student[0].preflight
        return run.finish(
            student,
            judged.arms,
            verdict,
            description=f"A {kind_of(student[0])}, distilled from {teacher.name}.",
            base_model=base,
            parents={"teacher": run.parent_facts(teacher)},
            tags=["knowledge-distillation"],
            missed=judged.missed,
        )


def methods_for(run: Run, plan: DistillOptions) -> tuple[Distill, FineTune]:
    """What the student minimises, and what the teacher and the control student do."""
    kind, smoothing = run.problem_type, run.options.label_smoothing_factor
    taught = Distill(
        problem_type=kind,
        temperature=plan.temperature,
        kd_weight=plan.kd_weight,
        kd_loss=plan.kd_loss,
        label_smoothing=smoothing,
        ema_decay=plan.ema_decay if plan.teaches_itself else None,
    )
    return taught, FineTune(problem_type=kind, label_smoothing=smoothing)


def get_teacher(run: Run, plan: DistillOptions, method: FineTune) -> tuple[Checkpoint, Arm, Checkpoint]:
    """The teacher, its arm, and where the control student's layers come from.

    The teacher is the one that was given, or is fine-tuned on the spot and saved in `teacher/` of the output folder.
    The control student's layers are those of the pretrained checkpoint, or the teacher's if that is not known.
    """
    if plan.teacher_name_or_path:
        teacher = load_teacher(plan.teacher_name_or_path, schema=run.data.schema)
        base = teacher if plan.pretrained is None else start_of(teacher, plan.pretrained, run)
        run.begin(teacher, untrained(run, plan, teacher), arms=2)
        teacher.model.to(run.options.device)
        return teacher, run.reference_arm("teacher", teacher, f"{teacher.name}, as given"), base
    pretrained = str(plan.pretrained)

    def build(seed: int) -> Checkpoint:
        return load_classifier(pretrained, schema=run.data.schema, seed=seed)

    base = build(run.seeds[0])
    run.begin(base, untrained(run, plan, base), arms=3)
    trained = run.train(
        "teacher",
        build,
        method,
        seeds=run.seeds[:1],
        num_train_epochs=plan.teacher_num_train_epochs or run.options.num_train_epochs,
        learning_rate=plan.teacher_learning_rate or run.options.learning_rate,
    )
    name = f"{pretrained} fine-tuned"
    teacher = run.keep_beside("teacher", trained[0], as_name=name)
    return teacher, run.arm(trained, f"{name}, all layers"), base


def start_of(teacher: Checkpoint, pretrained: str, run: Run) -> Checkpoint:
    """The pretrained checkpoint of a given teacher.

    Raises:
        ConfigError: The teacher cannot have started from it: the weights of its body have other shapes.
    """
    base = load_classifier(pretrained, schema=run.data.schema)
    ours, theirs = (
        {name: tuple(weight.shape) for name, weight in checkpoint.model.base_model.named_parameters()}
        for checkpoint in (base, teacher)
    )
    known = {name: shape for name, shape in theirs.items() if name in ours} == ours
    if not known or (len(theirs) > len(ours) and not has_mean_layer(teacher.model)):
        raise ConfigError(
            f"model_name_or_path: {teacher.name} did not start from {pretrained}: their weights have other shapes."
        )
    return base


def untrained(run: Run, plan: DistillOptions, teacher: Checkpoint) -> Checkpoint:
    """A student, if its states can be compared with the teacher's as asked for; else that is refused."""
    student = student_of(run, outline(plan), teacher)(run.seeds[0])
    check_states(plan.asked(run.options.ranges), student, teacher, run.options, run.long_texts)
    return student


def with_unlabelled(run: Run, tokenizer: object) -> Splits:
    """The splits as a tokenizer sees them; the unlabelled rows, if there are any, after the training rows."""
    splits = run.split(tokenizer)
    if run.data.unlabelled is None:
        return splits
    return replace(splits, train=TokenisedRows.join(splits.train, run.tokenise(tokenizer, "unlabelled")))


class TransferRows:
    """Training rows with the teacher's outputs, and with unlabelled rows if there are any."""

    def __init__(self, run: Run, plan: DistillOptions, teacher: Checkpoint) -> None:
        self.run = run
        self.splits = ["train"] if run.data.unlabelled is None else ["train", "unlabelled"]
        parts = [run.texts(split) for split in self.splits]
        texts = [text for part, _ in parts for text in part]
        pairs = None if parts[0][1] is None else [pair for _, part in parts for pair in part or []]
        self.logits, self.cache = teacher_logits(
            teacher,
            texts,
            pairs,
            labels=run.data.schema.names,
            max_length=run.data_options.max_length,
            long_texts=run.long_texts,
            batch_size=run.options.per_device_eval_batch_size,
            bf16=bool(run.options.bf16),
            folder=plan.teacher_cache,
            quiet=bool(run.options.disable_tqdm),
        )

        self.states = TeacherStates(plan.asked(run.options.ranges), teacher, run.options, self._rows_of)

    def _rows_of(self, tokenizer: object) -> TokenisedRows:
        return with_unlabelled(self.run, tokenizer).train

    def by_split(self) -> dict[str, Any]:
        """The teacher's logits of each split."""
        ends = np.cumsum([len(getattr(self.run.data, split)) for split in self.splits])
        return dict(zip(self.splits, np.split(self.logits, ends[:-1]), strict=True))

    def with_teacher(self, tokenizer: object) -> Splits:
        """The splits as the student's tokenizer sees them; `train` has the column `teacher_logits`."""
        splits = with_unlabelled(self.run, tokenizer)
        train = splits.train.with_columns(teacher_logits=self.logits, **self.states.columns)
        return replace(splits, train=train)


def distil_itself(run: Run, plan: DistillOptions) -> Report:
    """A student whose teacher is the moving average of its own weights, and the same student without that."""
    name = str(plan.student_name_or_path or plan.pretrained)
    source = load_classifier(name, schema=run.data.schema)
    whole = all(getattr(plan, name) == default for name, default in CUTS.items())

    def build(seed: int) -> Checkpoint:
        if whole:
            return load_classifier(name, schema=run.data.schema, seed=seed)
        return student_of(run, plan, source)(seed)

    def arm(plan: DistillOptions) -> dict[str, Any]:
        return {"build": build, "method": methods_for(run, plan)[0], "split": partial(with_unlabelled, run)}

    methods_for(run, plan)[0].check(run.options)
    run.begin(build(run.seeds[0]), arms=2)
    plan = run.search("distilled", arm, plan)
    student = run.train("distilled", **arm(plan))
    arms = [run.arm(student, f"{name}, taught by the moving average of its weights"), run.majority_arm()]
    models = {"distilled": student[0]}
    verdict = Verdict.unmeasured("the control arm was switched off")
    if run.options.control_arm:
        control = run.train("control", build, methods_for(run, plan)[1], max_steps=student[0].steps)
        arms.insert(0, run.arm(control, "the same student and number of steps, from labels alone"))
        models["control"] = control[0]
        verdict = run.gain(student, [one.test_logits for one in control], versus="control")
    run.checks["preflight"] = student[0].preflight
    return run.finish(
        student,
        run.with_speed(arms, models),
        verdict,
        description=f"{name}, taught by the moving average of its own weights (mean teacher).",
        base_model=resolve_checkpoint(name),
        parents={"model": run.parent_facts(source)},
        tags=["knowledge-distillation"],
    )


if __name__ == "__main__":
    run_main(main)
