"""Teachers that are made in the run: assistants, earlier generations, and models that have not seen a fold.

Assistants (Mirzadeh et al. 2020, arXiv:1902.03393) stand between a teacher and a much smaller student: each is taught
by the one before. They are cut from the teacher itself, like the student, and not from each other: so a student with
assistants differs from one without in who taught it, and in nothing else.

Generations (Furlanello et al. 2018, arXiv:1805.04770) are students of the same shape and start; each is taught by the
one before, with the same share of the label loss. The last is the result.

Models on folds: a teacher has fitted its training rows, and is surer of them, wrong labels included, than of any text
that it has not seen. With folds each training row is taught by a model that has not seen it; unlabelled rows, and
whatever else, by the teacher trained on all rows, which has not seen them either and is the better model. Rows of a
class that their fold's model has never seen are taught by nobody.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from nlpxfer.checkpoint.load import Checkpoint
from nlpxfer.config.teachers import TeacherOptions
from nlpxfer.data.folds import Folds, make_folds
from nlpxfer.errors import ConfigError
from nlpxfer.evaluate.arms import TrainedArm
from nlpxfer.evaluate.folds import OutOfFold, Split, predict_out_of_fold
from nlpxfer.methods.base import Method
from nlpxfer.report.report import Arm
from nlpxfer.teachers.panel import Panel
from nlpxfer.teachers.rows import TransferRows
from nlpxfer.teachers.teacher import ModelTeacher

if TYPE_CHECKING:
    from nlpxfer.run import Run

logger = logging.getLogger(__name__)

Build = Callable[[int], Checkpoint]


def taught_by_each_other(
    run: Run,
    options: TeacherOptions,
    panel: Panel,
    rows: TransferRows,
    *,
    assistant: Callable[[int], Mapping[str, Any]],
    student: Mapping[str, Any],
) -> tuple[Panel, TransferRows, list[Arm]]:
    """Train assistants and earlier generations, each with the first seed and the method of the student.

    Args:
        run: Under way.
        options: Which there are.
        panel: Who teaches the first of them.
        rows: What these say.
        assistant: From a number of layers to the arguments of `Run.train` for it: `build`, `method`, and options.
        student: The same for the student.

    Returns:
        Who teaches the student, what that one says, and the arms of all that were trained.
    """
    links = [
        (f"assistant-{count}", assistant(count), f"an assistant of {count} layers") for count in options.assistants
    ]
    for number in range(1, options.generations):
        links.append((f"generation-{number}", student, f"generation {number} of the student"))
    arms = []
    for name, training, what in links:
        facts = {"teacher": panel.identity(run)}
        trained = run.train(name, **training, split=rows.split(options), seeds=run.seeds[:1], facts=facts)
        arms.append(run.arm(trained, f"{what}, taught by {panel.name}"))
        teacher = _frozen(trained[0], name)
        panel = Panel([ModelTeacher(teacher, options.teacher_cache)], models={name: teacher})
        rows = TransferRows(run, panel)
    return panel, rows, arms


def check_assistants(options: TeacherOptions, teacher_layers: int, student_layers: int | None) -> None:
    """Refuse assistants that are not between teacher and student.

    Args:
        options: Which there are.
        teacher_layers: Of what they are cut from.
        student_layers: Of the student; None for one that is not cut from the same model.

    Raises:
        ConfigError: An assistant has as many layers as the teacher, or more, or not more than the student.
    """
    faults = [
        f"assistant_num_layers: {count} is not below the {teacher_layers} layers of the teacher"
        for count in options.assistants
        if count >= teacher_layers
    ]
    if student_layers is not None:
        faults += [
            f"assistant_num_layers: {count} is not above the {student_layers} layers of the student"
            for count in options.assistants
            if count <= student_layers
        ]
    if faults:
        raise ConfigError.from_faults(faults)


def folds_of_teacher(run: Run, options: TeacherOptions) -> Folds | None:
    """The folds that a teacher is trained on; None if none were asked for.

    Raises:
        ConfigError: Edited copies of the rows do not allow it; or see `make_folds`.
    """
    if not options.teacher_folds:
        return None
    if run.data_options.augmentation is not None:
        raise ConfigError(
            "teacher_folds: cannot be combined with augmentation.",
            why="a model would learn edited copies of the rows that it must not see",
        )
    texts, pairs = run.texts("train")
    return make_folds(
        texts,
        pairs,
        run.labels("train"),
        run.data.schema.names,
        count=options.teacher_folds,
        seed=run.data_options.data_split_seed,
        problem_type=run.problem_type,
        option="teacher_folds",
    )


def train_on_folds(
    run: Run,
    folds: Folds | None,
    build: Build,
    method: Method,
    **training: Any,  # noqa: ANN401 - as for `Run.train`
) -> OutOfFold | None:
    """Train a teacher without each fold in turn; a resumed run does not train finished ones again.

    Args:
        run: Under way.
        folds: Of the training rows; None for no folds.
        build: From a seed to an untrained teacher.
        method: What it minimises.
        training: Further arguments of `Run.train`.
    """
    if folds is None:
        return None

    def train(name: str, part: Split) -> TrainedArm:
        return run.train(f"teacher-{name}", build, method, split=part, seeds=run.seeds[:1], **training)[0]

    return predict_out_of_fold(folds, run.labels("train"), run.split, train, run.problem_type)


def _frozen(arm: TrainedArm, name: str) -> Checkpoint:
    arm.model.requires_grad_(False)
    return Checkpoint(model=arm.model, tokenizer=arm.tokenizer, name=name, folder=None, fresh=(), head_kept=True)
