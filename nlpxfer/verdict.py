"""The end of a distillation: what the student keeps of its teacher, how quickly it answers, and whether that will do.

The gate looks at the test rows. It is a check and no choice: nothing of the run depends on it, and a run that fails it
has written all the same. Whoever tries students until one passes chooses by the test rows; `recipes/distill.py` leaves
that to validation scores.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from nlpxfer.checkpoint.load import Checkpoint
from nlpxfer.config.student import INT8
from nlpxfer.config.targets import TargetOptions
from nlpxfer.errors import ConfigError
from nlpxfer.evaluate.arms import TrainedArm
from nlpxfer.evaluate.latency import Stages, latency_facts
from nlpxfer.evaluate.mixture import answered
from nlpxfer.evaluate.retention import (
    Answers,
    Gold,
    calibration_facts,
    check_gate,
    fitted_temperature,
    gate_faults,
    retained,
)
from nlpxfer.problem import BEST, LOWER_IS_BETTER, REGRESSION
from nlpxfer.report.disagreements import TwoAnswers, disagreements, write_disagreements
from nlpxfer.report.report import Arm
from nlpxfer.report.retention import size_facts
from nlpxfer.run import Run
from nlpxfer.train.launch import is_main_process, on_main

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What `judge` found.

    Attributes:
        arms: The table, with the time that an answer takes.
        retention: Share of the teacher's test score; None where the teacher has none.
        missed: Targets that the student falls short of, one sentence each, for `nlpxfer.result.finish`.
    """

    arms: list[Arm]
    retention: float | None
    missed: list[str]


def check_targets(run: Run, plan: TargetOptions) -> None:
    """Refuse targets that could not be judged, before anything is trained.

    Raises:
        ConfigError: See `check_gate`; or the smallest student is looked for beside another search, or by a score of
            which there is no share.
    """
    check_gate(_gold(run), plan.min_class_retention)
    if not plan.search:
        return
    options, faults = run.options, []
    if options.ranges:
        faults.append(
            f"search: cannot be combined with ranges ({', '.join(options.ranges)}): one search after the other"
        )
    if options.metric_for_best_model in LOWER_IS_BETTER:
        other = "spearman" if run.problem_type == REGRESSION else BEST[run.problem_type]
        faults.append(
            f"search: needs a score of which a share can be kept: --metric_for_best_model {other}, "
            f"not {options.metric_for_best_model}"
        )
    if faults:
        raise ConfigError.from_faults(faults)


def check_scored(plan: TargetOptions, *, scored: bool) -> None:
    """Refuse targets that are shares of a score which the teacher has not, before a student is trained.

    Args:
        plan: The targets.
        scored: Whether the teacher answers all validation and test rows, as a file need not.

    Raises:
        ConfigError: Lists the targets.
    """
    asked = [name for name in ("search", "min_retention", "min_class_retention") if getattr(plan, name)]
    if asked and not scored:
        faults = [f"{name}: needs a teacher that answers all validation and test rows" for name in asked]
        raise ConfigError.from_faults(faults, fix="a teacher_file that holds these texts too")


def judge(
    run: Run,
    plan: TargetOptions,
    arms: Sequence[Arm],
    models: Mapping[str, TrainedArm | Checkpoint],
    student: TrainedArm,
    teacher_logits: Mapping[str, Array],
    *,
    teacher: str = "teacher",
) -> Judged:
    """Hold the student, and its control arm, against the teacher; fills `checks.retention` of the report.

    Args:
        run: The run; its `answers` hold the logits of the arms. Without those of the teacher no score is compared, and
            a target is missed.
        plan: Targets, and whether disagreements are written.
        arms: The table, with speeds.
        models: Name of an arm -> its model.
        student: The result.
        teacher_logits: Split -> the teacher's logits of it, NaN in rows that it says nothing about; of validation and
            test rows they may be left out where `run.answers` has them.
        teacher: Name of the teacher's arm.
    """
    timed = with_latency(run, arms, models)
    if plan.disagreements:
        _write_disagreements(run, student, _answers_of(run, teacher) | dict(teacher_logits))
    if teacher not in run.answers:
        asked = plan.min_retention is not None or plan.min_class_retention is not None
        return Judged(arms=timed, retention=None, missed=["the teacher has no test score to keep"] if asked else [])
    small = student.name + INT8
    names = [student.name, *(name for name in (small, "control") if name in run.answers)]
    found = run.checks["retention"] = _retention(run, teacher, names, timed)
    kept = found["students"][student.name]
    missed = gate_faults(kept, plan.min_retention, plan.min_class_retention)
    if small in found["students"]:
        faults = gate_faults(found["students"][small], plan.min_retention, plan.min_class_retention)
        missed += [f"in int8 {fault}" for fault in faults]
    return Judged(arms=timed, retention=kept["score"]["value"], missed=missed)


def with_latency(run: Run, arms: Sequence[Arm], models: Mapping[str, TrainedArm | Checkpoint]) -> list[Arm]:
    """The arms with the time that an answer takes on the CPU in float32, on texts of the test rows."""
    if not is_main_process() or not models:
        return list(arms)
    found = latency_facts({name: stages_of(run, model) for name, model in models.items()}, *run.texts("test"))
    return [replace(arm, latency=found.get(arm.name)) for arm in arms]


def stages_of(run: Run, model: TrainedArm | Checkpoint) -> Stages:
    """A copy of a model on the CPU that reads texts as the run does."""
    on_cpu = copy.deepcopy(model.model).cpu()
    return Stages.of(on_cpu, model.tokenizer, max_length=run.data_options.max_length, long_texts=run.long_texts)


def _gold(run: Run) -> Gold:
    return Gold(run.problem_type, run.data.schema.names, run.labels("validation"), run.labels("test"))


def _retention(run: Run, teacher: str, students: Sequence[str], arms: Sequence[Arm]) -> dict[str, Any]:
    gold, asked, by_name = _gold(run), run.answers[teacher][0], {arm.name: arm for arm in arms}
    kept = {
        name: retained(run.answers[name], asked, gold) | {"size": size_facts(by_name[name], by_name[teacher])}
        for name in students
    }
    return {"teacher_arm": teacher, "teacher": calibration_facts(asked, gold), "students": kept}


def _answers_of(run: Run, arm: str) -> dict[str, Array]:
    """What an arm says of the validation and test rows; nothing if it has not been asked about all of them."""
    return {split: getattr(found, split) for found in run.answers.get(arm, [])[:1] for split in ("validation", "test")}


def _write_disagreements(run: Run, student: TrainedArm, theirs: Mapping[str, Array]) -> None:
    """Rows of all splits that the teacher has answered.

    Args:
        run: Its rows, and its folder.
        student: The student.
        theirs: Split -> the teacher's logits, NaN in rows that it says nothing about; validation and test among them.
    """
    gold, ours = _gold(run), {"validation": student.validation_logits, "test": student.test_logits}
    asked = []
    for split, teacher_NC in theirs.items():
        rows = np.flatnonzero(answered(teacher_NC))
        if len(rows):
            student_NC = ours[split] if split in ours else run.predict(student.model, student.tokenizer, split)
            asked.append(_two_answers(run, split, rows, teacher_NC, student_NC))

    def write() -> None:
        both = Answers(theirs["validation"], theirs["test"]), Answers(ours["validation"], ours["test"])
        temperatures = fitted_temperature(both[0], gold), fitted_temperature(both[1], gold)
        write_disagreements(run.folder, disagreements(asked, gold.names, gold.problem_type, temperatures))

    on_main(write)


def _two_answers(run: Run, split: str, rows: Array, teacher_NC: Array, student_NC: Array) -> TwoAnswers:
    """What both say of some rows of a split."""
    table, (texts, pairs) = getattr(run.data, split), run.texts(split)
    numbers = table["row"][:]
    return TwoAnswers(
        split,
        [numbers[row] for row in rows],
        [texts[row] for row in rows],
        None if pairs is None else [pairs[row] for row in rows],
        run.labels(split)[rows] if "label" in table.column_names else None,
        teacher_NC[rows],
        student_NC[rows],
    )
