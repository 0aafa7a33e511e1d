"""The search for options: which values a trial gets, when it is stopped early, and what is remembered of it.

Optuna does the searching. Decisions taken here:

- Sampler: TPE, which suits tens of trials over numbers and choices (Bergstra et al. 2011, Algorithms for
  Hyper-Parameter Optimization, section 4). It is seeded anew for each trial, from the run's seed and the trial's
  number, so that a trial depends on nothing but the seed and the trials before it: a resumed search makes the trials
  that an uninterrupted one would have made.
- Pruner: the median rule (Golovin et al. 2017, Google Vizier, section 3.2.2): a trial stops when its best score so far
  is below the median of the complete trials at the same point. Chosen over successive halving and Hyperband because
  these rank a handful of trials at each rung when there are only tens, and drop slow starters.
- Trials may have unlike numbers of steps, and the learning rate falls with the share of steps done. So scores are
  compared at equal shares of each trial's own steps, in twentieths, never at equal steps; a score counts until the
  next evaluation. In the first fifth, where the rate still rises, no trial is stopped.
- Finished trials lie in a journal file; chosen over sqlite because it works on network disks. A trial that was broken
  off is not in it: it is asked for again, gets the same values, and goes on from its checkpoint.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np

from nlpxfer.config import Range, RunOptions
from nlpxfer.config.options import plain_value
from nlpxfer.config.ranges import number_of_values
from nlpxfer.errors import ConfigError, ResumeError, SearchError
from nlpxfer.strict_json import replacing

if TYPE_CHECKING:
    import optuna

STUDY_FILE: Final = "study.log"
STUDY_NAME: Final = "search"
ENDED: Final = "ended"
"""Attribute of a finished trial: `value`, `seconds`, `steps` and `reason` of its outcome."""
SHARES: Final = 20
"""Parts of a trial's steps: scores are compared at the ends of these."""
UNJUDGED: Final = 4
"""Parts in which no trial is stopped."""
ENOUGH_TO_WEIGH: Final = 10
"""Complete trials from which on the importance of options is more than noise."""

_STATES: Final = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}

Curve = Sequence[tuple[float, float]]
"""Share of a trial's own steps, from 0 to 1, and the validation score there."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a trial ended.

    Attributes:
        state: `complete`, `pruned` or `failed`.
        value: Validation score, of a pruned trial the best so far; None of a failed one.
        seconds: Wall-clock time.
        steps: Optimizer steps; None of a failed trial.
        reason: Why it failed.
        curve: Its scores on the way.
    """

    state: str
    value: float | None
    seconds: float
    steps: int | None
    reason: str = ""
    curve: Curve = ()


@dataclass(frozen=True, kw_only=True)
class SearchPlan:
    """What is searched, and how.

    Attributes:
        ranges: Option -> its range.
        start: Option -> value that the first trial gets where it lies in the range.
        num_trials: Trials to make.
        metric: Validation score, without prefix.
        greater_is_better: Its direction.
        seed: Of the sampler.
        timeout: Seconds after which no further trial starts; None: no limit.
    """

    ranges: Mapping[str, Range]
    start: Mapping[str, Any]
    num_trials: int
    metric: str
    greater_is_better: bool
    seed: int
    timeout: float | None = None

    @classmethod
    def of(cls, options: RunOptions, own: object, defaults: Mapping[str, Any]) -> SearchPlan:
        """The search that a run's options ask for.

        The first trial gets `defaults`, and beside these the values of the options and of a recipe's own.
        """
        start = {name: getattr(own if hasattr(own, name) else options, name) for name in options.ranges}
        start |= {name: value for name, value in defaults.items() if name in start}
        return cls(
            ranges=options.ranges,
            start=start,
            num_trials=options.num_trials,
            metric=str(options.metric_for_best_model).removeprefix("eval_"),
            greater_is_better=bool(options.greater_is_better),
            seed=options.seed,
            timeout=options.search_timeout,
        )

    @property
    def direction(self) -> Literal["maximize", "minimize"]:
        """What is done to the score."""
        return "maximize" if self.greater_is_better else "minimize"


def check_search_installed() -> None:
    """Refuse a search where optuna is missing.

    Raises:
        ConfigError: It is.
    """
    if importlib.util.find_spec("optuna") is None:
        raise ConfigError(
            "num_trials: a search needs optuna, which is not installed.", fix="pip install 'nlpxfer[hpo]'"
        )


class Study:
    """A plan and the trials made of it so far, in a folder; for one process.

    Args:
        plan: What is searched.
        folder: Where the trials are written down. What lies there is taken up.

    Raises:
        ResumeError: What lies there cannot be read.
    """

    asked: optuna.Trial

    def __init__(self, plan: SearchPlan, folder: Path) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.plan = plan
        path = folder / STUDY_FILE
        Path(f"{path}.lock").unlink(missing_ok=True)  # of a run that was killed while it wrote
        trials, self.ended_by = _read(path) if path.is_file() else ([], "")
        with replacing(path) as temporary:  # written anew: its last line may be cut off, its last trial unfinished
            fresh = optuna.create_study(storage=_storage(temporary), study_name=STUDY_NAME, direction=plan.direction)
            fresh.add_trials(trials)
            if self.ended_by:
                fresh.set_user_attr("ended_by", self.ended_by)
        enough = max(2, min(5, plan.num_trials // 4))  # complete trials before a median means something
        pruner = optuna.pruners.MedianPruner(n_startup_trials=enough, n_warmup_steps=UNJUDGED)
        self.study = optuna.load_study(study_name=STUDY_NAME, storage=_storage(path), pruner=pruner)

    @property
    def trials(self) -> list[optuna.trial.FrozenTrial]:
        """The finished trials, in order; one that got values which were tried before is none."""
        return [trial for trial in self.study.get_trials(deepcopy=False) if ENDED in trial.user_attrs]

    @property
    def seconds(self) -> float:
        """Time spent in trials, over all runs that this one resumes."""
        return float(sum(trial.user_attrs[ENDED]["seconds"] for trial in self.trials))

    @property
    def best(self) -> tuple[int, float] | None:
        """Number and score of the best complete trial, the earliest of several; None if there is none."""
        sign = 1 if self.plan.greater_is_better else -1
        scores = [
            (number, float(trial.user_attrs[ENDED]["value"]))
            for number, trial in enumerate(self.trials, start=1)
            if trial.state.name == "COMPLETE"
        ]
        return max(scores, key=lambda found: sign * found[1], default=None)

    def wants_more(self) -> bool:
        """Whether another trial is to be made; after the first no it stays at no, also in a resumed run."""
        if not self.ended_by:
            done, timeout = self.trials, self.plan.timeout
            if len(done) >= self.plan.num_trials:
                self.ended_by = "num_trials"
            elif done and timeout is not None and self.seconds >= timeout:
                self.ended_by = "search_timeout"
            if self.ended_by:
                self.study.set_user_attr("ended_by", self.ended_by)
        return not self.ended_by

    def ask(self) -> tuple[int, dict[str, Any]]:
        """Number (from 1) and values of the next trial."""
        import optuna

        plan, tried = self.plan, [trial.params for trial in self.trials]
        seed = int(np.random.SeedSequence([plan.seed, len(tried)]).generate_state(1)[0])
        at_random = max(4, min(10, plan.num_trials // 3))
        self.study.sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=at_random)
        if not tried:
            start = {name: plan.start[name] for name, found in plan.ranges.items() if plan.start[name] in found}
            self.study.enqueue_trial({name: plain_value(value) for name, value in start.items()})
        distributions = {name: _distribution(found) for name, found in plan.ranges.items()}
        self.asked = self.study.ask(distributions)
        if self.asked.params in tried and number_of_values(plan.ranges) < math.inf:  # TPE returns to what was good
            self.study.tell(self.asked, state=optuna.trial.TrialState.FAIL)
            self.study.enqueue_trial(_untried(plan.ranges, tried, seed))
            self.asked = self.study.ask(distributions)
        return len(tried) + 1, self.values(self.asked.params)

    def values(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Values as the options have them, from those that optuna has."""
        values = {}
        for name, found in self.plan.ranges.items():
            kept = {plain_value(choice): choice for choice in found.choices}
            values[name] = kept[params[name]] if found.choices else params[name]
        return values

    def should_stop(self, curve: Curve) -> bool:
        """Whether the trial that was asked for is worse so far than the median of those before it."""
        self._report(curve)
        return self.asked.should_prune()

    def tell(self, outcome: Outcome) -> None:
        """Write down how the trial that was asked for ended."""
        import optuna

        if outcome.state == "complete":
            self._report([*outcome.curve, (1.0, outcome.curve[-1][1])])  # the best so far holds to the end
        self.asked.set_user_attr(
            ENDED, {name: getattr(outcome, name) for name in ("value", "seconds", "steps", "reason")}
        )
        state = next(name for name, word in _STATES.items() if word == outcome.state)
        value = outcome.value if outcome.state == "complete" else None
        self.study.tell(self.asked, value, state=optuna.trial.TrialState[state])

    def _report(self, curve: Curve) -> None:
        """Tell optuna the best score so far in each part of the steps, from the first evaluation on, once per part."""
        better = max if self.plan.greater_is_better else min
        parts = [(int(share * SHARES + 1e-6), value) for share, value in curve]
        told = self.study.get_trials(deepcopy=False)[self.asked.number].intermediate_values
        for part in range(min(part for part, _ in parts), max(part for part, _ in parts) + 1):
            if part not in told:
                self.asked.report(better(value for at, value in parts if at <= part), part)

    def result(self) -> dict[str, Any]:
        """The search as report.json has it.

        Raises:
            SearchError: No trial was completed.
        """
        best, plan, trials = self.best, self.plan, self.trials
        if best is None:
            reasons = sorted({trial.user_attrs[ENDED]["reason"] for trial in trials})
            raise SearchError(
                f"All {len(trials)} trials of the search failed:\n  - " + "\n  - ".join(reasons),
                why="the ranges hold no values that this model can be trained with",
                fix="other ranges, and --overwrite",
            )
        return {
            "metric": plan.metric,
            "direction": plan.direction,
            "sampler": "TPE",
            "pruner": "median",
            "ranges": {name: found.plain() for name, found in plan.ranges.items()},
            "num_trials": plan.num_trials,
            "ended_by": self.ended_by,
            "seconds": self.seconds,
            "best": {"number": best[0], "options": trials[best[0] - 1].params, "value": best[1]},
            "importance": self._importance(),
            "trials": [
                {
                    "number": number,
                    "options": trial.params,
                    "state": _STATES[trial.state.name],
                    **trial.user_attrs[ENDED],
                }
                for number, trial in enumerate(trials, start=1)
            ],
        }

    def _importance(self) -> dict[str, float] | None:
        """Share of each option in the variance of the score (fANOVA, Hutter et al. 2014); None of too few trials."""
        import optuna

        complete = [trial for trial in self.trials if trial.state.name == "COMPLETE"]
        if len(complete) < ENOUGH_TO_WEIGH or len({trial.value for trial in complete}) == 1:
            return None
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=self.plan.seed)
        return dict(optuna.importance.get_param_importances(self.study, evaluator=evaluator))


def _untried(ranges: Mapping[str, Range], tried: Sequence[Mapping[str, Any]], seed: int) -> dict[str, Any]:
    """Values drawn evenly from those that no trial had: a search has no more trials than there are."""
    numbers = np.random.default_rng(seed)
    while True:
        drawn = {
            name: plain_value(found.choices[numbers.integers(len(found.choices))])
            if found.choices
            else int(numbers.integers(int(found.low), int(found.high), endpoint=True))
            for name, found in ranges.items()
        }
        if drawn not in tried:
            return drawn


def _distribution(found: Range) -> optuna.distributions.BaseDistribution:
    import optuna

    if found.choices:
        return optuna.distributions.CategoricalDistribution([plain_value(choice) for choice in found.choices])
    if isinstance(found.low, int):
        return optuna.distributions.IntDistribution(found.low, int(found.high), log=found.log)
    return optuna.distributions.FloatDistribution(found.low, found.high, log=found.log)


def _storage(path: Path) -> optuna.storages.BaseStorage:
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    return JournalStorage(JournalFileBackend(str(path)))


def _read(path: Path) -> tuple[list[optuna.trial.FrozenTrial], str]:
    """The finished trials of a study, and what ended it.

    Raises:
        ResumeError: The file is damaged.
    """
    import optuna

    try:
        study = optuna.load_study(study_name=STUDY_NAME, storage=_storage(path))
        trials = [trial for trial in study.trials if trial.state.is_finished() and ENDED in trial.user_attrs]
    except (ValueError, KeyError, TypeError) as error:
        raise ResumeError(
            f"{path.name}, the record of the search, cannot be read: {error}", fix="start anew: --overwrite"
        ) from error
    return trials, str(study.user_attrs.get("ended_by", ""))
