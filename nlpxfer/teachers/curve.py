"""How much unlabelled text still pays: a student for each of several numbers of unlabelled texts.

All students take as many optimizer steps as the one with all texts, unless they stop early. With the same number of
epochs instead, those with fewer texts would also be trained for less time, and the curve would show that. Draws are
nested: the texts of a smaller number are among those of a larger one.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nlpxfer.config.teachers import TeacherOptions
from nlpxfer.errors import ConfigError
from nlpxfer.evaluate.arms import TrainedArm
from nlpxfer.report.report import Arm
from nlpxfer.report.transfer_curve import TRANSFER_CURVE_FILE, CurvePoint, draw_curve
from nlpxfer.teachers.rows import TransferRows
from nlpxfer.train.launch import on_main

if TYPE_CHECKING:
    from nlpxfer.run import Run


logger = logging.getLogger(__name__)


def check_curve(run: Run, options: TeacherOptions) -> None:
    """Refuse a curve with more texts than there are.

    Raises:
        ConfigError: Says how many there are.
    """
    there = 0 if run.data.unlabelled is None else len(run.data.unlabelled)
    more = [str(size) for size in options.curve if size is not None and size > there]
    if more:
        raise ConfigError(
            f"transfer_curve: {', '.join(more)} is more than the {there} unlabelled texts that can be used.", fix="all"
        )


def transfer_curve(
    run: Run,
    options: TeacherOptions,
    rows: TransferRows,
    arm: Mapping[str, Any],
    distilled: Sequence[TrainedArm],
    whole: Arm,
) -> list[Arm]:
    """Train the students of the curve, draw it, and note it in the report; nothing if none was asked for.

    Args:
        run: Under way.
        options: Which numbers of texts.
        rows: What is taught.
        arm: The arguments of `Run.train` for the student.
        distilled: The student with all texts, which is the last point.
        whole: Its arm.

    Returns:
        The arms of the others.
    """
    if not options.curve:
        return []
    steps = distilled[0].planned_steps
    arms, points = [], []
    more = [str(size) for size in options.curve if size is not None and size > rows.unlabelled]
    if more:  # of a partial teacher file; else `check_curve` has refused them
        told = ", ".join(more), rows.unlabelled
        logger.warning("transfer_curve: no point for %s: the teacher answers for %d unlabelled texts", *told)
    for size in [size for size in options.curve if size is not None and size < rows.unlabelled]:
        settings = {**arm, "split": rows.split(options, unlabelled=size), "max_steps": steps}
        trained = run.train(f"distilled-{size}-texts", **settings)
        about = f"the student with {size} unlabelled texts, {run.as_many_steps}"
        arms.append(run.arm(trained, about, name=f"distilled, {size} unlabelled"))
        points.append(CurvePoint.of(size, trained[0].steps, arms[-1]))
    points.append(CurvePoint.of(rows.unlabelled, distilled[0].steps, whole))
    run.checks["transfer_curve"] = [vars(point) for point in points]
    on_main(lambda: draw_curve(points, run.folder / TRANSFER_CURVE_FILE))
    return arms
