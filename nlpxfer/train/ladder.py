"""A ladder of students: the smallest one that is fast enough and good enough, under a budget of training steps.

Successive halving: all candidates get a small budget, the better half of them a larger one, and so on; each of the
`rungs` takes about the same share of all steps. Two things differ from the usual search for the best score, since what
is wanted is the *smallest* candidate that reaches a target:

- Who is too slow is never trained: latency is measured, it needs no training.
- Who reaches the target at any rung has passed. It needs no further steps, and all that are slower are out; the rest
  of the budget goes to the smaller ones. Scores alone would throw the small candidates out first.

Every call of a candidate's `train` starts anew and costs all of its steps, so that the learning rate's schedule is
that of a run of this length: a score of a half-finished schedule would mislead. All scores are of validation rows. The
best of several is too good by a little, and the more so the more candidates there are: what is chosen has to be
measured on the test rows once more.

The smallest is the quickest: by the median latency for one row, then by bytes. Successive halving over a plain grid,
because most candidates of a ladder are far from the target on either side; over optuna's pruners, which compare scores
at equal steps but know neither sizes nor a target.

Sources: Jamieson and Talwalkar 2016, arXiv:1502.07943 (successive halving, algorithm 1); Li et al. 2018, Hyperband,
arXiv:1603.06560 (rungs, eta).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from nlpxfer.errors import ConfigError, NotFiniteError, TargetMissedError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A student that could be trained.

    Attributes:
        name: For tables.
        train: From a number of optimizer steps to the validation score; higher is better. Each call starts anew.
        latency_ms: Measured median time for one row.
        bytes: Size of its weights.
        trained_as: Candidates of the same one share their trainings: a number of steps is paid for once. Default: its
            name, which is that of no other.
    """

    name: str
    train: Callable[[int], float]
    latency_ms: float
    bytes: int
    trained_as: str | None = None

    @property
    def training(self) -> str:
        """What its trainings are shared by."""
        return self.trained_as or self.name


@dataclass(frozen=True, kw_only=True)
class Target:
    """What a student has to reach.

    Attributes:
        reference: The teacher's validation score.
        keep: Least share of it that the student keeps.
        max_latency_ms: Most milliseconds for one row; None: any.

    Raises:
        ConfigError: No student could be held against it; all reasons at once.
    """

    reference: float
    keep: float
    max_latency_ms: float | None = None

    def __post_init__(self) -> None:
        faults = []
        if not 0 < self.keep <= 1:
            faults.append(f"keep: {self.keep} is not a share above 0 and up to 1")
        if not self.reference > 0:
            faults.append(
                f"keep: the teacher's validation score is {self.reference:.4f}, so there is no share of it to keep"
            )
        if self.max_latency_ms is not None and not self.max_latency_ms > 0:
            faults.append(f"max_latency_ms: {self.max_latency_ms} is not positive")
        if faults:
            raise ConfigError.from_faults(faults)

    @property
    def score(self) -> float:
        """The least validation score."""
        return self.keep * self.reference


@dataclass(kw_only=True)
class Tried:
    """What became of a candidate.

    Attributes:
        name: Its name.
        latency_ms: Its latency.
        bytes: Its size.
        scores: (steps, validation score) of each rung that it was trained in.
        outcome: In words.
    """

    name: str
    latency_ms: float
    bytes: int
    scores: list[tuple[int, float]] = field(default_factory=list)
    outcome: str = ""

    @property
    def best(self) -> tuple[int, float] | None:
        """(steps, score) of its best rung, the shortest of equal ones; None if it was never trained."""
        return max(self.scores, key=lambda pair: (pair[1], -pair[0])) if self.scores else None


@dataclass(frozen=True, kw_only=True)
class LadderResult:
    """The end of a search.

    Attributes:
        target: What was asked for.
        tried: All candidates, the smallest first.
        chosen: Name of the smallest that passes; None if none does.
        nearest: Name of the one that comes nearest to the target, if none passes.
        steps: Optimizer steps that were spent.
        total_steps: The budget.
    """

    target: Target
    tried: Sequence[Tried]
    chosen: str | None
    nearest: str | None
    steps: int
    total_steps: int

    def named(self, name: str) -> Tried:
        """What became of the candidate of this name."""
        return next(each for each in self.tried if each.name == name)

    def require(self) -> Tried:
        """The chosen candidate.

        Raises:
            TargetMissedError: None passes; names the nearest and what it lacks.
        """
        if self.chosen is not None:
            return self.named(self.chosen)
        target = self.target
        asked = f"a validation score of {target.score:.4f} ({target.keep:g} of the teacher's {target.reference:.4f})"
        if target.max_latency_ms is not None:
            asked += f" in at most {target.max_latency_ms:g} ms a row"
        lacks = ""
        if self.nearest is not None:
            nearest = self.named(self.nearest)
            score = "not trained" if nearest.best is None else f"score {nearest.best[1]:.4f}"
            lacks = f" The nearest is {nearest.name}: {score}, {nearest.latency_ms:.3g} ms a row."
        raise TargetMissedError(
            f"None of {len(self.tried)} students reaches {asked}.{lacks}",
            fix="a lower --keep, a higher --max_latency_ms, or more steps",
        )

    def to_plain(self) -> dict[str, Any]:
        """For the report: plain values."""
        return {
            "target": {**vars(self.target), "score": self.target.score},
            "chosen": self.chosen,
            "nearest": self.nearest,
            "steps": self.steps,
            "total_steps": self.total_steps,
            "tried": [
                {**vars(each), "scores": [{"steps": steps, "score": score} for steps, score in each.scores]}
                for each in self.tried
            ],
        }


def climb(
    candidates: Sequence[Candidate],
    target: Target,
    *,
    total_steps: int,
    max_steps: int,
    eta: int = 2,
) -> LadderResult:
    """The smallest candidate that reaches the target, by successive halving.

    Args:
        candidates: With different names.
        target: What is to be reached.
        total_steps: Optimizer steps for all calls of `train` together.
        max_steps: Most steps of one call: a whole training.
        eta: One in `eta` candidates goes on to the next rung.

    Raises:
        ConfigError: No candidates, equal names, a budget too small for a step of each, or values out of range.
    """
    _check(candidates, total_steps, max_steps, eta)
    ordered = sorted(candidates, key=lambda each: (each.latency_ms, each.bytes))
    tried = {c.name: Tried(name=c.name, latency_ms=c.latency_ms, bytes=c.bytes) for c in ordered}
    alive = []
    for candidate in ordered:
        if target.max_latency_ms is not None and candidate.latency_ms > target.max_latency_ms:
            tried[candidate.name].outcome = "too slow"
        else:
            alive.append(candidate)
    rungs = rung_count(len(alive), eta)
    least = least_steps(len(alive), _trainings(alive), eta)
    if total_steps < least:
        raise ConfigError(
            f"{total_steps} steps are not enough for {len(alive)} students in {rungs} rungs.",
            fix=f"at least {least} steps; a useful search takes some hundred for each",
        )
    chosen, spent, before = None, 0, 0
    for rung in range(rungs):
        steps = min(max_steps, (total_steps - spent) // max(1, _trainings(alive) * (rungs - rung)))
        if not alive or steps <= before:
            break
        spent += _train_all(alive, tried, steps)
        before = steps
        passing = [c for c in alive if _score(tried[c.name]) >= target.score]
        if passing:
            chosen = passing[0].name
            tried[chosen].outcome = "passes"
            for candidate in alive[alive.index(passing[0]) + 1 :]:
                passes = "passes, but is slower than" if candidate in passing else "slower than"
                tried[candidate.name].outcome = f"{passes} {chosen}"
            alive = alive[: alive.index(passing[0])]
        alive = _better_part(alive, tried, eta, rung)
    for candidate in alive:
        tried[candidate.name].outcome = "below the target"
    if chosen is not None:
        for each in tried.values():
            if each.outcome == "passes":
                each.outcome = f"passes, but is slower than {chosen}"
        tried[chosen].outcome = "chosen"
    return LadderResult(
        target=target,
        tried=list(tried.values()),
        chosen=chosen,
        nearest=None if chosen is not None else _nearest(tried),
        steps=spent,
        total_steps=total_steps,
    )


def rung_count(candidates: int, eta: int = 2) -> int:
    """How many rungs it takes until one candidate is left, at least 1.

    >>> [rung_count(count) for count in (0, 1, 2, 3, 8, 9)]
    [1, 1, 1, 2, 3, 4]
    """
    return max(1, math.ceil(math.log(max(1, candidates), eta) - 1e-9))


def least_steps(candidates: int, trainings: int, eta: int = 2) -> int:
    """The fewest steps that `climb` takes: one for each training in each rung.

    Args:
        candidates: How many there are.
        trainings: How many of them are trained, and not another form of one that is.
        eta: As for `climb`.
    """
    return trainings * rung_count(candidates, eta)


def _check(candidates: Sequence[Candidate], total_steps: int, max_steps: int, eta: int) -> None:
    faults = []
    names = [candidate.name for candidate in candidates]
    if not names or len(set(names)) < len(names):
        faults.append(f"candidates: {len(names)} with {len(set(names))} different names")
    faults += [
        f"{name}: {value} is below 1"
        for name, value in (("total_steps", total_steps), ("max_steps", max_steps))
        if value < 1
    ]
    if eta < 2:
        faults.append(f"eta: {eta} is below 2")
    if faults:
        raise ConfigError.from_faults(faults)


def _train_all(alive: list[Candidate], tried: dict[str, Tried], steps: int) -> int:
    """Train each for so many steps; who does not get finite numbers is out. Gives the steps spent."""
    spent = steps * _trainings(alive)
    for candidate in list(alive):
        try:
            score = candidate.train(steps)
            if not math.isfinite(score):
                raise NotFiniteError(f"its score is {score}")
        except NotFiniteError as error:
            tried[candidate.name].outcome = f"failed: {error.what}"
            alive.remove(candidate)
            continue
        tried[candidate.name].scores.append((steps, float(score)))
        logger.info("%s, %d steps: validation score %.4f", candidate.name, steps, score)
    return spent


def _trainings(candidates: Sequence[Candidate]) -> int:
    """How many trainings their scores after a number of steps take."""
    return len({candidate.training for candidate in candidates})


def _better_part(alive: Sequence[Candidate], tried: dict[str, Tried], eta: int, rung: int) -> list[Candidate]:
    """One in `eta` candidates by their score, rounded up, in the order of size; of equal scores the smaller one."""
    ranked = sorted(alive, key=lambda candidate: -_score(tried[candidate.name]))  # stable: the smaller one first
    kept = {candidate.name for candidate in ranked[: math.ceil(len(ranked) / eta)]}
    for candidate in alive:
        if candidate.name not in kept:
            tried[candidate.name].outcome = f"out after rung {rung + 1}"
    return [candidate for candidate in alive if candidate.name in kept]


def _score(tried: Tried) -> float:
    return tried.best[1] if tried.best else -math.inf


def _nearest(tried: dict[str, Tried]) -> str | None:
    """Of those that are fast enough the one with the best score; if none is, the fastest."""
    trained = [each for each in tried.values() if each.best]
    if trained:
        return max(trained, key=_score).name
    slow = [each for each in tried.values() if each.outcome == "too slow"]
    return min(slow, key=lambda each: each.latency_ms).name if slow else None
