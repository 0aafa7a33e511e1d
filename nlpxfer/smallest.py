"""`--search`: the smallest student that keeps enough of its teacher and is quick enough on this machine.

Latency comes first, on untrained students: a slice answers as quickly before its training as after it. Then
`nlpxfer.train.ladder` spreads a budget of steps over those that are quick enough, scored on the validation rows; no
test row is read. The recipe then trains the chosen student in full, and its report holds it against the teacher on the
test rows as any other student.

A candidate is a set of option values of the recipe, so whatever the recipe can build can stand on the ladder. A
student and its int8 form are two candidates: the second is smaller, with layers also quicker, and answers nearly as
well. They differ in nothing that is trained, so one training gives the scores of both.

A finished search lies in `checkpoints/ladder/search` too, sealed with what it was made for, as a training checkpoint
is. A resumed run takes it if that is what is asked for now; if not, it searches anew, since nothing is lost but time.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar, cast

import numpy as np

from nlpxfer.checkpoint.load import Checkpoint
from nlpxfer.checkpoint.narrow import narrow_widths
from nlpxfer.checkpoint.pooling import has_mean_layer, with_pooling
from nlpxfer.config.ranges import with_values
from nlpxfer.config.student import INT8, STATIC, StudentOptions
from nlpxfer.config.targets import TargetOptions
from nlpxfer.errors import CheckpointError, ConfigError, ExportError, NotFiniteError, ResumeError
from nlpxfer.evaluate.arms import topology
from nlpxfer.evaluate.cost import stored_bytes
from nlpxfer.evaluate.latency import latency_facts
from nlpxfer.evaluate.trials import short_run
from nlpxfer.report.ladder import LADDER_FILE, Measured, ladder_facts, ladder_table, write_ladder
from nlpxfer.run import Run
from nlpxfer.strict_json import write_json_whole
from nlpxfer.students import refuse_unused, whole_training
from nlpxfer.train.checkpoints import RunIdentity, damage, require_same_run, seal
from nlpxfer.train.ladder import Candidate, LadderResult, Target, climb, least_steps, rung_count
from nlpxfer.train.launch import on_main
from nlpxfer.verdict import stages_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

KEEP: Final = 0.98
BUDGET: Final = 3.0
MOST_SLICES: Final = 6
Array = np.ndarray[Any, Any]
TEACHER: Final = "teacher"
Plan = TypeVar("Plan", bound=TargetOptions)
ArmOf = Callable[[Plan], Mapping[str, Any]]
Scores = tuple[float, float | None]
"""Validation scores of a student, and of its int8 form."""


class MakesInt8(Protocol):
    """How int8 forms are made: `nlpxfer.int8.Int8Maker`."""

    def alone(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Any:  # noqa: ANN401
        """By this process for itself; a model with `file_bytes`."""

    def together(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Any:  # noqa: ANN401
        """By the first process for all."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A student on the ladder: its name, and the values of the recipe's options that make it."""

    name: str
    values: Mapping[str, Any]

    @property
    def trained_as(self) -> str:
        """The name of what is trained: an int8 form is that of another student."""
        return self.name.removesuffix(INT8)

    @property
    def is_int8(self) -> bool:
        """Whether it is the int8 form of another one."""
        return self.trained_as != self.name


def slices(teacher: PreTrainedModel) -> list[Choice]:
    """Students of fewer layers than the teacher, evenly chosen; up to `MOST_SLICES` different numbers of them."""
    total = int(teacher.config.get_text_config().num_hidden_layers) - has_mean_layer(teacher)
    counts = sorted({round(float(count)) for count in np.linspace(1, total - 1, MOST_SLICES)}) if total > 1 else []
    return [
        Choice(name=f"{count} layer{'s' if count > 1 else ''}", values={"student_num_layers": count})
        for count in counts
    ]


def rungs(run: Run, plan: Plan, teacher: PreTrainedModel, *, int8: bool = False) -> list[Choice]:
    """The ladder: slices of the teacher, the middle one at half its width, and a static student.

    What the family, the task or the other options rule out is left out, and said.

    Args:
        run: Its task and options.
        plan: The recipe's own options.
        teacher: What slices are cut from.
        int8: Also the int8 form of each student.
    """
    found = slices(teacher)
    if not plan.search or not found:
        return []
    middle = found[len(found) // 2]
    half = {"student_hidden_size": int(teacher.config.get_text_config().hidden_size) // 2}
    if not (run.options.pooling == "own" and has_mean_layer(teacher)):  # a narrowed mean would be none
        found.append(Choice(name=f"{middle.name}, half as wide", values={**middle.values, **half}))
    found.append(Choice(name=STATIC, values={"student": STATIC}))
    fits = []
    for choice in found:
        try:
            planned = _planned(run, plan, choice.values)
            if choice.values.get("student") == STATIC:
                refuse_unused(run, cast("StudentOptions", planned), teacher_given=False)
            elif "student_hidden_size" in choice.values:
                narrow_widths(teacher, choice.values["student_hidden_size"])
        except (ConfigError, CheckpointError) as error:
            logger.info("not on the ladder: %s (%s)", choice.name, str(error).splitlines()[0])
        else:
            fits.append(choice)
            if int8:
                fits.append(Choice(name=choice.name + INT8, values={**choice.values, "student_int8": True}))
    return fits


def check_search(run: Run, plan: TargetOptions, choices: Sequence[Choice], rows: int | None = None) -> None:
    """Refuse a search that could not begin; for the time before anything is trained or built.

    The budget must do for all students, whatever `max_latency_ms` may rule out: how quick they are is not known yet.
    Nor is it known, without `rows`, how many rows a partial teacher file leaves out.

    Raises:
        ConfigError: There is no student to choose from, or the budget is too small; says which would do.
    """
    if not plan.search:
        return
    if not choices:
        raise ConfigError("search: a teacher of one layer, or of none, has no smaller student of its layers.")
    whole = whole_training(run, rows)
    budget = _budget(plan, whole)
    least = least_steps(len(choices), len({choice.trained_as for choice in choices}))
    if budget < least:
        raise ConfigError(
            f"search_budget: {budget} steps are not enough for {len(choices)} students in "
            f"{rung_count(len(choices))} rungs.",
            why=f"a training of one student has {whole} steps, and each is trained in the first rung",
            fix=f"--search_budget {math.ceil(10 * least / whole) / 10:g} ({least} steps); "
            "a useful search takes some hundred steps for each",
        )


def find_smallest(
    run: Run,
    plan: Plan,
    choices: Sequence[Choice],
    arm_of: ArmOf[Plan],
    teacher: Checkpoint | None,
    maker: MakesInt8 | None = None,
    rows: int | None = None,
) -> Plan:
    """With `--search`: the plan of the smallest student that reaches the target. Else the plan as it is.

    Writes `ladder.json`, `ladder.md` and `pareto.png` into the output folder, whether or not there is one. A resumed
    run takes what a finished search of the same target, teacher, data, students and options has found.

    Args:
        run: The run; its `answers` hold the teacher's logits.
        plan: The recipe's own options.
        choices: The students.
        arm_of: From the recipe's own options to the arguments of `Run.train`.
        teacher: The classifier that is the teacher, to be timed; None if the teacher is not one classifier.
        maker: Makes int8 forms, if there are any among the students.
        rows: That a student learns from. Default: as for `whole_training`.

    Raises:
        TargetMissedError: No student reaches the target; names the nearest.
        ConfigError: See `check_search`; or the teacher's score is not above 0.
        Interrupted: A signal asked to stop; the search starts anew when the run is resumed.
    """
    if not plan.search:
        return plan
    check_search(run, plan, choices, rows)
    identity = _identity(run, plan, choices, arm_of)
    chosen = _found_before(run, identity)
    if chosen is None:
        result, measured = _search(run, plan, choices, arm_of, teacher, maker, rows)
        _tell(run, result, measured, identity)
        chosen = result.require().name
    values = next(choice.values for choice in choices if choice.name == chosen)
    run.config.update(values)
    return _planned(run, plan, values)


def _planned(run: Run, plan: Plan, values: Mapping[str, Any]) -> Plan:
    """The plan of one student, which is not searched for."""
    settled = {"search": False, "keep": None, "max_latency_ms": None, "search_budget": None}
    return with_values(run.options, plan, {**values, **settled})[1]


def _budget(plan: TargetOptions, whole: int) -> int:
    """Optimizer steps of all tries together."""
    return math.ceil((plan.search_budget or BUDGET) * whole)


def _identity(run: Run, plan: Plan, choices: Sequence[Choice], arm_of: ArmOf[Plan]) -> RunIdentity:
    """What a search must share with an earlier one whose result it takes over."""
    taught = arm_of(_planned(run, plan, choices[0].values)).get("facts") or {}
    asked: dict[str, Any] = {"keep": plan.keep or KEEP, "max_latency_ms": plan.max_latency_ms}
    asked |= {"search_budget": plan.search_budget or BUDGET, "students": [choice.name for choice in choices]}
    return RunIdentity({**run.facts(), **taught, **asked}, topology(run.options))


def _kept(run: Run) -> Path:
    """Where a finished search lies until the run is finished."""
    return run.folder / "checkpoints" / "ladder" / "search"


def _found_before(run: Run, identity: RunIdentity) -> str | None:
    """The student that a finished search of this identity chose; None if there is none, and why where there is one."""
    folder = _kept(run)
    if not run.options.resume or not folder.is_dir():
        return None
    fault = damage(folder)
    if not fault:
        try:
            require_same_run(folder, identity, run.options.allow_topology_change)
        except ResumeError as error:
            fault = error.what
    if fault:
        logger.warning("the smallest student is looked for anew: %s", fault)
        return None
    found = json.loads((folder / LADDER_FILE).read_text(encoding="utf-8"))
    run.checks["search"] = found
    chosen: str = found["chosen"]
    return chosen


def _search(
    run: Run,
    plan: Plan,
    choices: Sequence[Choice],
    arm_of: ArmOf[Plan],
    teacher: Checkpoint | None,
    maker: MakesInt8 | None,
    rows: int | None,
) -> tuple[LadderResult, Mapping[str, Measured | None]]:
    target = Target(
        reference=_score_of(run, run.answers[TEACHER][0].validation),
        keep=plan.keep or KEEP,
        max_latency_ms=plan.max_latency_ms,
    )
    plans = {choice.name: _planned(run, plan, choice.values) for choice in choices}
    bases = dict.fromkeys(choice.trained_as for choice in choices)
    measured = _measured(run, choices, {name: arm_of(plans[name]) for name in bases}, teacher, maker)
    students = {name: found for name, found in measured.items() if name != TEACHER and found is not None}
    choices = [choice for choice in choices if choice.name in students]
    scored: dict[tuple[str, int], Scores | NotFiniteError] = {}

    def score(choice: Choice, steps: int) -> float:
        base = choice.trained_as
        if (base, steps) not in scored:
            twin = maker if any(other.is_int8 and other.trained_as == base for other in choices) else None
            try:
                scored[base, steps] = _scores(run, base, arm_of(plans[base]), steps, twin)
            except NotFiniteError as error:
                scored[base, steps] = error
        found = scored[base, steps]
        if isinstance(found, NotFiniteError):
            raise found
        plain, small = found
        return plain if small is None or not choice.is_int8 else small

    candidates = [
        Candidate(
            name=choice.name,
            train=partial(score, choice),
            latency_ms=students[choice.name].ms,
            bytes=students[choice.name].bytes,
            trained_as=choice.trained_as,
        )
        for choice in choices
    ]
    with run.trials():
        whole = whole_training(run, rows)
        return climb(candidates, target, total_steps=_budget(plan, whole), max_steps=whole), measured


def _tell(run: Run, result: LadderResult, measured: Mapping[str, Measured | None], identity: RunIdentity) -> None:
    """Write and print the ladder, and keep it for a resumed run if a student was chosen."""
    run.checks["search"] = ladder_facts(result, measured)

    def tell() -> None:
        write_ladder(run.folder, result, measured, teacher=TEACHER)
        sys.stdout.write(f"\n{ladder_table(result, measured, teacher=TEACHER)}\n")
        sys.stdout.flush()
        shutil.rmtree(_kept(run), ignore_errors=True)
        if result.chosen is not None:
            write_json_whole(_kept(run) / LADDER_FILE, run.checks["search"])
            seal(_kept(run), identity, result.steps)

    on_main(tell)


def _measured(
    run: Run,
    choices: Sequence[Choice],
    arms: Mapping[str, Mapping[str, Any]],
    teacher: Checkpoint | None,
    maker: MakesInt8 | None,
) -> dict[str, Measured | None]:
    """How quick and large the students are, and the teacher; None for a teacher that is not one classifier.

    Measured by the first process alone; all get the same. Int8 forms that the family cannot have are missing.
    """
    # by all processes: what students are built from is computed together
    students = {name: _as_trained(run, arm["build"](run.seeds[0])) for name, arm in arms.items()}

    def measure() -> dict[str, Measured | None]:
        models: dict[str, Checkpoint] = {} if teacher is None else {TEACHER: teacher}
        for choice in choices:
            student = students[choice.trained_as]
            if choice.is_int8 and maker is not None:
                try:
                    student = replace(student, model=maker.alone(student.model, student.tokenizer))
                except ExportError as error:
                    logger.info("not on the ladder: %s (%s)", choice.name, error.what)
                    continue
            models[choice.name] = student
        times = latency_facts(
            {name: stages_of(run, model) for name, model in models.items()}, *run.texts("validation")
        )
        measured: dict[str, Measured | None] = {TEACHER: None}
        for name, model in models.items():
            size = int(getattr(model.model, "file_bytes", None) or stored_bytes(model.model))
            measured[name] = Measured(latency=times[name], bytes=size)
        return measured

    return on_main(measure)


def _as_trained(run: Run, student: Checkpoint) -> Checkpoint:
    """An untrained student with the layer that computes the mean, if its head will read that."""
    return replace(student, model=with_pooling(student, run.options.pooling))


def _score_of(run: Run, logits: Array) -> float:
    """The validation score that logits get."""
    return run.scores(logits, "validation")[str(run.options.metric_for_best_model)]


def _scores(
    run: Run,
    name: str,
    arm: Mapping[str, Any],
    steps: int,
    maker: MakesInt8 | None,
) -> Scores:
    """The validation score of a student after so many steps, and that of its int8 form; test rows are not read."""
    folder = Path(run.folder) / "checkpoints" / "ladder" / name.replace(" ", "-")
    trial, small = run.trial_arm(arm), list[float]()

    def look(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        if maker is not None:
            small.append(_score_of(run, run.predict(maker.together(model, tokenizer), tokenizer, "validation")))

    return short_run(trial, folder, steps=steps, look=look), small[0] if small else None
