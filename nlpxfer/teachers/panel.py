"""The teachers of one run: asked, scored, calibrated and mixed.

One teacher alone is taken as it is: its logits are what the student learns from, and `temperature` softens both. Of
several, each is calibrated on the validation rows and they are averaged: see `nlpxfer.evaluate.mixture`.

A teacher is scored, and is an arm of the report, if it has an answer to every validation and test row: a file need not
hold those.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from nlpxfer.checkpoint.load import Checkpoint
from nlpxfer.config.teachers import TeacherOptions
from nlpxfer.evaluate.mixture import Mixture, answered, fit_mixture
from nlpxfer.report.report import Arm
from nlpxfer.teachers.teacher import ModelTeacher, Teacher, fingerprint
from nlpxfer.train.row_cache import cache_root, room_for_values

if TYPE_CHECKING:
    from nlpxfer.run import Run

logger = logging.getLogger(__name__)

Array = np.ndarray[Any, Any]
SCORED = ("validation", "test")


@dataclass(frozen=True, eq=False)
class Panel:
    """Those who teach a student.

    Attributes:
        teachers: At least one.
        arms: Of the report; the last one is called "teacher" and is what the student learns from. Without it if that
            cannot be scored.
        mixture: How several make one; None for one.
        models: Name of an arm -> the classifier that it is.
        asked: Validation and test -> the logits of what the student learns from, NaN in rows that nobody says anything
            about; empty for a teacher that was trained in the run, whose answers the run has.
    """

    teachers: Sequence[Teacher]
    arms: Sequence[Arm] = ()
    mixture: Mixture | None = None
    models: dict[str, Checkpoint] = field(default_factory=dict)
    asked: Mapping[str, Array] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """For descriptions."""
        listed = [teacher.name for teacher in self.teachers]
        return listed[0] if len(listed) == 1 else f"{', '.join(listed[:-1])} and {listed[-1]}"

    @property
    def arm(self) -> Arm | None:
        """That of what the student learns from."""
        return next((arm for arm in self.arms if arm.name == "teacher"), None)

    def parents(self, run: Run) -> dict[str, dict[str, Any]]:
        """What run.json says about the teachers."""
        if len(self.teachers) == 1:
            return {"teacher": self.teachers[0].parent(run)}
        return {f"teacher {number}": teacher.parent(run) for number, teacher in enumerate(self.teachers, start=1)}

    def identity(self, run: Run) -> str:
        """What a resumed run must share."""
        only = self.teachers[0]
        if isinstance(only, ModelTeacher) and len(self.teachers) == 1:
            return only.classifier.model_sha256
        weights = () if self.mixture is None else (*self.mixture.weights, *self.mixture.temperatures)
        facts = [
            teacher.parent(run) | ({"model": teacher.model.model_sha256} if teacher.model else {})
            for teacher in self.teachers
        ]
        return fingerprint(facts, [round(weight, 4) for weight in weights])

    def logits(self, run: Run, splits: Sequence[str]) -> tuple[Array, dict[str, Any]]:
        """What the student learns from, for the rows of some splits, one after the other.

        Returns:
            Logits (N, C), NaN in rows that nobody says anything about, and facts: `rows`, `computed`, `seconds`; of
            several teachers also `teachers`, those of each with its name, weight and temperature.
        """
        asked = [teacher.logits(run, splits) for teacher in self.teachers]
        if self.mixture is None:
            return asked[0]
        answers = [logits for logits, _ in asked]
        out = room_for_values(cache_root("teacher"), *answers[0].shape, fix="free some space")
        mixed = self.mixture.logits(answers, out)
        facts = [told for _, told in asked]
        return mixed, {
            "rows": len(mixed),
            "computed": sum(told.get("computed", 0) for told in facts),
            "seconds": round(sum(told.get("seconds", 0.0) for told in facts), 2),
            "weights_from": self.mixture.how,
            "teachers": [
                {"name": teacher.name, "weight": weight, "temperature": temperature, "validation_loss": loss, **told}
                for teacher, weight, temperature, loss, told in zip(
                    self.teachers,
                    self.mixture.weights,
                    self.mixture.temperatures,
                    self.mixture.losses,
                    facts,
                    strict=True,
                )
            ],
        }


def answers_all(run: Run, teachers: Sequence[Teacher]) -> bool:
    """Whether these teachers say something about each validation and test row."""
    return all(answered(teacher.logits(run, [split])[0]).all() for teacher in teachers for split in SCORED)


def measure_panel(run: Run, options: TeacherOptions, teachers: Sequence[Teacher]) -> Panel:
    """Score the teachers that were given, and fit how several are mixed, on validation rows.

    Raises:
        ConfigError: See `fit_mixture`.
    """
    asked: list[dict[str, Array]] = []
    seconds = []
    for teacher in teachers:
        start = time.perf_counter()
        asked.append({split: teacher.logits(run, [split])[0] for split in SCORED})
        seconds.append(time.perf_counter() - start)
    if len(teachers) == 1:
        arms = _arm(run, "teacher", asked[0], seconds[0], teachers[0], f"{teachers[0].name}, as given")
        panel = Panel(teachers, arms, asked=asked[0])
    else:
        mixture = fit_mixture(
            run.problem_type,
            [found["validation"] for found in asked],
            run.labels("validation"),
            options.fixed_weights or options.teacher_weights,
            tau=options.teacher_weight_tau,
        )
        mixed = {split: mixture.logits([found[split] for found in asked]) for split in SCORED}
        panel = Panel(teachers, _arms(run, teachers, asked, seconds, mixture, mixed), mixture, asked=mixed)
    numbered = {"teacher": teachers[0]} if len(teachers) == 1 else {
        f"teacher {number}": teacher for number, teacher in enumerate(teachers, start=1)
    }  # fmt: skip
    models = {name: teacher.checkpoint for name, teacher in numbered.items() if teacher.checkpoint is not None}
    return replace(panel, models=models)


def _arms(
    run: Run,
    teachers: Sequence[Teacher],
    asked: Sequence[dict[str, Array]],
    seconds: Sequence[float],
    mixture: Mixture,
    mixed: dict[str, Array],
) -> list[Arm]:
    arms: list[Arm] = []
    counting = [found for found, weight in zip(asked, mixture.weights, strict=True) if weight > 0]
    told = zip(teachers, asked, seconds, mixture.weights, mixture.temperatures, strict=True)
    for number, (teacher, found, took, weight, temperature) in enumerate(told, start=1):
        about = f"{teacher.name}, as given; weight {weight:.3f}, temperature {temperature:.2f}"
        details = {"weight": weight, "temperature": temperature}
        arms += _arm(run, f"teacher {number}", found, took, teacher, about, details)
        logger.info("teacher %d: %s", number, about)
    about = f"the mixture of {len(teachers)} teachers, weights: {mixture.how.replace('_', ' ')}"
    if not all(answered(found[split]).all() for found in counting for split in SCORED):
        logger.warning("the mixture is not scored: not all of its teachers say something about each row")
        return arms
    return arms + _arm(run, "teacher", mixed, sum(seconds), None, about)


def _arm(
    run: Run,
    name: str,
    found: dict[str, Array],
    seconds: float,
    teacher: Teacher | None,
    description: str,
    details: dict[str, Any] | None = None,
) -> list[Arm]:
    """The arm of a teacher; none if it lacks an answer to a validation or test row."""
    silent = {split: int((~answered(logits)).sum()) for split, logits in found.items()}
    if any(silent.values()):
        lacking = ", ".join(f"{count} {split} rows" for split, count in silent.items() if count)
        logger.warning("%s is not scored: it says nothing about %s", name, lacking)
        return []
    return [
        run.answering_arm(
            name,
            [found[split] for split in SCORED],
            seconds,
            description,
            checkpoint=None if teacher is None else teacher.model,
            details=details or {},
        )
    ]
