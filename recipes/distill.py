"""Distil a teacher into a smaller student, and measure what the teacher was worth.

    accelerate launch recipes/distill.py
    accelerate launch recipes/distill.py recipes/configs/distill.yaml --teacher_name_or_path runs/finetune

Without a teacher (`--teacher_name_or_path`, `--teacher_file`, `--zero_shot_teacher`; several are mixed) one is
fine-tuned first: docs/teachers.md. The student is a part of the teacher, static (token
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
from pathlib import Path
from typing import Any, ClassVar, Literal

from nlpxfer.checkpoint.load import Checkpoint, load_classifier
from nlpxfer.checkpoint.resolve import resolve_checkpoint
from nlpxfer.cli import run_main
from nlpxfer.config import DataOptions, RunOptions, option, parse
from nlpxfer.config.self_distillation import SelfDistillation
from nlpxfer.config.states import WEIGHTS, StatesPlan
from nlpxfer.config.student import CUTS, LAYERS, STATIC, TRIAL, StudentOptions
from nlpxfer.config.targets import TargetOptions
from nlpxfer.config.teachers import TeacherOptions
from nlpxfer.errors import ConfigError
from nlpxfer.int8 import Int8Maker, check_int8, has_onnx, int8_student
from nlpxfer.layer_trial import check_trial, try_layers
from nlpxfer.methods.base import is_sharded
from nlpxfer.methods.distill import Distill
from nlpxfer.methods.finetune import FineTune
from nlpxfer.problem import REGRESSION
from nlpxfer.report.privacy import scrub_text
from nlpxfer.report.report import Report, Verdict
from nlpxfer.result import finish
from nlpxfer.run import Planned, Run
from nlpxfer.searched import refuse_ends
from nlpxfer.smallest import Choice, check_search, find_smallest, rungs
from nlpxfer.start import start_run
from nlpxfer.students import (
    Build,
    defaults_of,
    kind_of,
    layer_count,
    note_layers,
    outline,
    refuse_unused,
    searched_shapes,
    student_of,
    taught_rows,
    training_of,
)
from nlpxfer.teachers import (
    ModelTeacher,
    Panel,
    TransferRows,
    answers_all,
    check_assistants,
    check_contradiction_weight,
    check_curve,
    folds_of_teacher,
    measure_panel,
    open_teachers,
    start_of,
    taught_by_each_other,
    train_on_folds,
    transfer_curve,
    with_unlabelled,
)
from nlpxfer.train.teacher_states import TeacherStates, check_states
from nlpxfer.verdict import check_scored, check_targets, judge, with_latency

DEFAULT_MODEL = "all-MiniLM-L6-v2"
STATIC_KD_WEIGHT = 0.5


@dataclass(frozen=True, kw_only=True)
class DistillOptions(TeacherOptions, StudentOptions, TargetOptions, StatesPlan, SelfDistillation):
    """Teacher, student and how the one learns from the other."""

    NOT_SEARCHED: ClassVar[Mapping[str, str]] = {
        "student": "each kind has options of its own",
        "student_int8": "it does not change what is learnt",
        "self_distillation": "it decides which arms there are",
        **TeacherOptions.TEACHERS_NOT_SEARCHED,
        **TargetOptions.TARGETS_NOT_SEARCHED,
    }
    needed_switches: ClassVar[Mapping[str, tuple[str, object]]] = {
        **TeacherOptions.needed_switches,
        **StudentOptions.needed_switches,
    }
    overruled_by: ClassVar[Mapping[str, str]] = {**TeacherOptions.overruled_by, **StudentOptions.overruled_by}

    model_name_or_path: str | None = option(
        None,
        "Pretrained checkpoint the teacher starts, or started, from. Default for the first: all-MiniLM-L6-v2.",
    )
    temperature: float = option(2.0, "T: softens the distributions of teacher and student.")
    kd_weight: float | None = option(
        None, "Share of the distillation loss; the rest is the label loss. Default: 0.9, for a static student 0.5."
    )
    kd_loss: Literal["kl", "mse"] = option("kl", "Compare logits by T^2 KL, or by their squared error.")

    def __post_init__(self) -> None:
        if names := self.teacher_names:  # each by itself in what is recorded, without commas and blanks
            object.__setattr__(self, "teacher_name_or_path", names[0] if len(names) == 1 else list(names))
        faults = self.teacher_faults() + self.student_faults() + self.target_faults()
        own = {"student": LAYERS, "student_name_or_path": None, "hidden_layers": "auto", **CUTS}
        own |= {"assistant_num_layers": None, "generations": 1, "student_int8": False}
        given = [name for name, default in own.items() if self.search and getattr(self, name) != default]
        faults += [f"{name}: search tries students of several kinds; leave it out" for name in given]
        if self.student == STATIC:
            no_layers = [name for name in ("hidden_weight", "relation_weight") if getattr(self, name)]
            faults += [f"{name}: a static student has no layers" for name in no_layers]
        if self.student_layers == TRIAL and (self.generations > 1 or self.teaches_itself):
            why = "self_distillation" if self.teaches_itself else "generations, which all have one shape"
            faults.append(f"student_layers: trial cannot be combined with {why}")
        if self.model_name_or_path and not self.trains_teacher and self.student_name_or_path:
            shown = "teacher_name_or_path" if self.teacher_names else "the teacher that was given"
            faults.append(f"model_name_or_path: does nothing beside {shown} and student_name_or_path")
        try:
            values = {"temperature": self.temperature, "kd_weight": self.share_of_teacher, "kd_loss": self.kd_loss}
            Distill(**values, ema_decay=self.ema_decay)
        except ConfigError as error:
            faults += error.faults
        if self.kd_loss == "mse" and self.temperature != DistillOptions.temperature:
            faults.append("temperature: means nothing for the squared error of kd_loss mse")
        faults += self.states_faults() + self.self_distillation_faults()
        if self.teaches_itself and self.student_int8:
            faults.append("student_int8: needs another teacher; nlpxfer export --int8 writes the finished model")
        if faults:
            raise ConfigError.from_faults(faults)

    @property
    def share_of_teacher(self) -> float:
        """`kd_weight`, or its default: a static student, which cannot follow all of it, hears more of labels."""
        default = STATIC_KD_WEIGHT if self.student == STATIC else Distill.kd_weight
        return default if self.kd_weight is None else self.kd_weight

    @property
    def one_classifier_teaches(self) -> bool:
        """Whether the student's only teacher is a classifier, of which more than its answers can be read."""
        others = self.teacher_file or self.zero_shot_teacher or self.assistant_num_layers or self.generations > 1
        return not others and (self.trains_teacher or len(self.teacher_names) == 1)

    @property
    def pretrained(self) -> str | None:
        """The checkpoint that the teacher starts or started from; None if a teacher is given and it is not known."""
        return self.model_name_or_path or (None if self.teacher_names else DEFAULT_MODEL)


@dataclass(kw_only=True)
class StudentRunOptions(RunOptions):
    """What of a training run's options applies."""

    without_effect: ClassVar = {
        "num_folds": "the teacher has seen the rows held out; recipes/finetune.py finds labels that look wrong"
    }


def main(argv: Sequence[str] | None = None) -> Report:
    """Run the recipe; see `--help` for its options."""
    data_options, plan, options = parse((DataOptions, DistillOptions, StudentRunOptions), argv)

    with start_run("distill", data_options, options, plan, searches=True) as run:
        if run.problem_type == REGRESSION and (
            plan.temperature != DistillOptions.temperature or "temperature" in options.ranges
        ):
            raise ConfigError("temperature: means nothing for a regression.")
        refuse_ends(run, plan, partial(methods_for, run))
        refuse_unused(run, plan, teacher_given=not plan.trains_teacher)
        if plan.teaches_itself:
            return distil_itself(run, plan)
        if plan.asked(options.ranges).reads_anything and not plan.one_classifier_teaches:
            raise ConfigError(f"{', '.join(WEIGHTS)}: need one teacher, a classifier, with nobody beside or between.")
        check_targets(run, plan)
        check_contradiction_weight(run, plan)
        check_curve(run, plan)
        _, alone = methods_for(run, plan)
        base = resolve_checkpoint(str(plan.student_name_or_path or next(iter(plan.teacher_names), plan.pretrained)))
        panel, source, pretrained = get_teachers(run, plan, alone)

        def untaught(plan: DistillOptions, source: Checkpoint) -> dict[str, Any]:
            build, (method, _) = student_of(run, plan, source), methods_for(run, plan)
            return {"build": build, "method": method} | training_of(run, plan, source)

        first = TransferRows(run, panel)
        asked, labelled = plan.asked(options.ranges), len(run.data.train)
        states = TeacherStates(asked, source, run.options, first.tokenise, labelled, plan.teacher_cache)
        first.columns |= states.columns
        last, rows, between = taught_by_each_other(
            run,
            plan,
            panel,
            first,
            assistant=lambda layers: untaught(assistant_plan(plan, layers), source),
            student=untaught(plan, source),
        )

        def arm(plan: DistillOptions) -> dict[str, Any]:
            given = {"split": rows.split(plan), "facts": {"teacher": last.identity(run)}}
            made = untaught(plan, source) | given
            method = replace(made["method"], teacher_labels=run.data.schema.names, states=states.guide(plan))
            return made | {"method": method}

        plan, defaults = try_layers(run, plan, source, arm, rows.taught), defaults_of(run, source)
        plan = run.search("distilled", arm, plan, defaults={"kd_weight": plan.share_of_teacher, **defaults})
        alone_there = panel.models.get("teacher")  # of several teachers none is the teacher alone
        plan = find_smallest(run, plan, ladder_of(run, plan, source), arm, alone_there, Int8Maker(run), rows.taught)
        note_layers(run, plan, source)
        student = run.train("distilled", **arm(plan))
        distilled = run.arm(student, f"the student, taught by {last.name}")
        curve = transfer_curve(run, plan, rows, arm(plan), student, distilled)
        arms = [*between, distilled, *curve, run.majority_arm()]
        models = {**panel.models, "distilled": student[0]}
        folders: Mapping[str, Path] = {}
        if plan.student_int8:
            small, row, folders = int8_student(run, student[0])
            arms.insert(arms.index(distilled) + 1, row)
            models[small.name] = small
        verdict = Verdict.unmeasured("the control arm was switched off")
        if options.control_arm:
            build, (_, alone) = student_of(run, plan, pretrained, like=source), methods_for(run, plan)
            training = training_of(run, plan, source) | {"max_steps": student[0].planned_steps}
            control = run.train("control", build, alone, **training)
            taught = pretrained is source and plan.teacher_names and not plan.student_name_or_path
            start = scrub_text(plan.student_name_or_path or pretrained.name)
            start = f"the teacher's own weights ({start})" if taught else start
            description = f"the same student and {run.as_many_steps}, without a teacher; from {start}"
            arms.insert(0, run.arm(control, description))
            models["control"] = control[0]
            verdict = run.gain(student, [arm.test_logits for arm in control], versus="control")
        arms = run.with_speed([*panel.arms, *arms], models)
        judged = judge(run, plan, arms, models, student[0], {**panel.asked, **first.by_split()})
        run.checks["teacher"] = first.facts | {"retention": judged.retention}
        if rows is not first:
            run.checks["last_teacher"] = rows.facts
        run.checks["preflight"] = student[0].preflight
        run.config["learning_rate"] = training_of(run, plan, source)["learning_rate"]
        run.config["kd_weight"] = plan.share_of_teacher
        return finish(
            run,
            student,
            judged.arms,
            verdict,
            description=f"A {kind_of(student[0])}, distilled from {panel.name}.",
            base_model=base,
            parents=panel.parents(run),
            tags=["knowledge-distillation"],
            missed=judged.missed,
            folders=folders,
        )


def methods_for(run: Run, plan: DistillOptions) -> tuple[Distill, FineTune]:
    """What the student minimises, and what the teacher and the control student do."""
    kind, smoothing = run.problem_type, run.options.label_smoothing_factor
    taught = Distill(
        problem_type=kind,
        temperature=plan.temperature,
        kd_weight=plan.share_of_teacher,
        kd_loss=plan.kd_loss,
        label_smoothing=smoothing,
        ema_decay=plan.ema_decay if plan.teaches_itself else None,
    )
    return taught, FineTune(problem_type=kind, label_smoothing=smoothing)


def get_teachers(run: Run, plan: DistillOptions, method: FineTune) -> tuple[Panel, Checkpoint, Checkpoint]:
    """Who teaches, what the student's layers are cut from, and where those of the control student come from.

    Teachers are those that were given, or one is fine-tuned on the spot and saved in `teacher/` of the output folder.
    The student is cut from the first that is a classifier, or else from the pretrained checkpoint; the control student
    from the pretrained checkpoint (`start_of`).
    """
    given = open_teachers(run, plan)
    if not given:
        return teacher_on_the_spot(run, plan, method)
    source = next((teacher.checkpoint for teacher in given if teacher.checkpoint), None)
    if source is None:
        source = base = load_classifier(str(plan.pretrained), schema=run.data.schema, seed=run.seeds[0])
    else:
        named, needless = plan.model_name_or_path, plan.student_name_or_path or not run.options.control_arm
        base = source if needless and not named else start_of(source, named, run.data.schema)
    models = [teacher.model for teacher in given if teacher.model]
    files = None if models else measure_panel(run, plan, given)
    check_scored(plan, scored=answers_all(run, [teacher for teacher in given if not teacher.model]))
    begin(run, plan, source, arms=2, asked=models)
    for model in models:
        model.model.to(run.options.device)
    return files or measure_panel(run, plan, given), source, base


def teacher_on_the_spot(run: Run, plan: DistillOptions, method: FineTune) -> tuple[Panel, Checkpoint, Checkpoint]:
    """A teacher that is fine-tuned first, also on folds if asked for."""
    pretrained = str(plan.pretrained)

    def build(seed: int) -> Checkpoint:
        return load_classifier(pretrained, schema=run.data.schema, seed=seed)

    base, folds = build(run.seeds[0]), folds_of_teacher(run, plan)
    training = {"num_train_epochs": plan.teacher_num_train_epochs or run.options.num_train_epochs}
    on_folds = [Planned(base, training, folds.fewest_learnt)] if folds else []
    begin(run, plan, base, Planned(base, training), *on_folds, arms=3 + plan.teacher_folds)
    training |= run.start_of_training(base, **training)
    training["learning_rate"] = plan.teacher_learning_rate or training["learning_rate"]
    trained = run.train("teacher", build, method, seeds=run.seeds[:1], **training)
    held_out = train_on_folds(run, folds, build, method, **training)
    name = f"{scrub_text(pretrained)} fine-tuned"
    started = {"model_name_or_path": pretrained, **training}
    teacher = run.keep_beside("teacher", trained[0], as_name=name, parent=base, recipe="finetune", options=started)
    panel = Panel(
        [ModelTeacher(teacher, plan.teacher_cache, held_out)],
        [run.arm(trained, f"{name}, all layers")],
        models={"teacher": teacher},
    )
    return panel, teacher, base


def begin(
    run: Run,
    plan: DistillOptions,
    source: Checkpoint,
    *before: Planned,
    arms: int,
    asked: Sequence[Checkpoint] = (),
) -> None:
    """The last that refuses what cannot work; then start to write."""
    check_search(run, plan, ladder_of(run, plan, source))
    check_trial(run, plan)
    student = student_of(run, outline(plan), source)(run.seeds[0])
    pairs = run.data_options.text_pair_column is not None
    check_states(plan.asked(run.options.ranges), student, source, run.options, run.long_texts, pairs=pairs)
    cut = plan.student == LAYERS and not plan.student_name_or_path
    layers = int(student.model.config.num_hidden_layers) if cut else None
    shapes = searched_shapes(run)
    if plan.generations > 1 and shapes:
        raise ConfigError.from_faults(
            [f"{name}: cannot be searched beside generations, which all have one shape" for name in shapes]
        )
    if layers is not None and (searched := run.options.ranges.get("student_num_layers")):
        layers = max(searched.ends)
    check_assistants(plan, layer_count(run, source), layers)
    if plan.student_int8:
        check_int8(student)
        arms += 3  # the room of its ONNX files, and of the copy that they are made from
    arms += len(plan.assistants) + plan.generations - 1 + len(plan.curve)
    run.begin(*before, *with_control(run, student, training_of(run, plan, source)), arms=arms, asked=asked)


def with_control(run: Run, student: Checkpoint, training: Mapping[str, Any]) -> list[Planned]:
    """The training of a student, and that of its control if it has one: as many steps of the rows with labels.

    As these are no more rows, the evaluations of the control come in time if those of the student do.
    """
    control = [Planned(student, {**training, "eval_delay": 0})] if run.options.control_arm else []
    return [Planned(student, training, taught_rows(run)), *control]


def ladder_of(run: Run, plan: DistillOptions, source: Checkpoint) -> list[Choice]:
    """With `--search`: the students to choose from, found once; a teacher has the shape of what it starts from."""

    def found() -> list[Choice]:
        int8 = plan.search and not is_sharded(run.options) and has_onnx()
        return rungs(run, plan, source.model, int8=int8)

    return run.once(("ladder",), found)


def assistant_plan(plan: DistillOptions, layers: int) -> DistillOptions:
    """The plan of a student that is an assistant of so many layers, spread over the teacher."""
    whole = {**CUTS, "student_num_layers": layers, "student": LAYERS, "student_name_or_path": None}
    return replace(plan, **whole)


def distil_itself(run: Run, plan: DistillOptions) -> Report:
    """A student whose teacher is the moving average of its own weights, and the same student without that."""
    name = str(plan.student_name_or_path or plan.pretrained)
    source, shown = load_classifier(name, schema=run.data.schema), scrub_text(name)

    def is_whole(plan: DistillOptions) -> bool:
        return all(getattr(plan, name) == default for name, default in CUTS.items())

    def build_of(plan: DistillOptions) -> Build:
        if is_whole(plan):
            return lambda seed: load_classifier(name, schema=run.data.schema, seed=seed)
        return student_of(run, plan, source)

    def training(plan: DistillOptions) -> dict[str, Any]:
        if not is_whole(plan):
            return training_of(run, plan, source)
        whole_head = {"linear_probe_size": 0.0} if methods_for(run, plan)[0].compares_sizes else {}
        return run.start_of_training(source, **whole_head)

    def arm(plan: DistillOptions) -> dict[str, Any]:
        made = {"build": build_of(plan), "method": methods_for(run, plan)[0], "split": partial(with_unlabelled, run)}
        return made | training(plan)

    methods_for(run, plan)[0].check(run.options)
    run.begin(*with_control(run, build_of(plan)(run.seeds[0]), training(plan)), arms=2)
    whole = {"student_num_layers": layer_count(run, source), "kd_weight": plan.share_of_teacher}
    plan = run.search("distilled", arm, plan, defaults=whole)
    run.settle(**training(plan))
    student = run.train("distilled", **arm(plan))
    arms = [run.arm(student, f"{shown}, taught by the moving average of its weights"), run.majority_arm()]
    models = {"distilled": student[0]}
    verdict = Verdict.unmeasured("the control arm was switched off")
    if run.options.control_arm:
        control = run.train("control", build_of(plan), methods_for(run, plan)[1], max_steps=student[0].planned_steps)
        arms.insert(0, run.arm(control, f"the same student and {run.as_many_steps}, from labels alone"))
        models["control"] = control[0]
        verdict = run.gain(student, [one.test_logits for one in control], versus="control")
    run.checks["preflight"] = student[0].preflight
    run.config["kd_weight"] = plan.share_of_teacher
    return finish(
        run,
        student,
        with_latency(run, run.with_speed(arms, models), models),
        verdict,
        description=f"{shown}, taught by the moving average of its own weights (mean teacher).",
        base_model=resolve_checkpoint(name),
        parents={"model": run.parent_facts(source)},
        tags=["knowledge-distillation"],
    )


if __name__ == "__main__":
    run_main(main)
