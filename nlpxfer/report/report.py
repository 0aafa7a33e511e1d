"""report.json: what a run reached, what it cost, and whether the transfer helped.

The shape of the file is a contract that others read: `schema_version`, `recipe`, `metrics` (`validation`, `test`),
`arms`, `verdict`, `cost`, `data`, `checks`, and `search` where options were searched. `validate_report` says what a
file lacks, and nothing is written that it finds fault with. The metrics of an arm have the same shape as those of the
report: `validation` and `test`, each with `accuracy`, `macro_f1` and `loss`, or what `nlpxfer.problem.METRICS` has for
the kind of task in `data.problem_type`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from nlpxfer.errors import ConfigError, DataError
from nlpxfer.evaluate.cost import Cost
from nlpxfer.evaluate.interval import Gain, mean_and_spread
from nlpxfer.problem import LOWER_IS_BETTER, METRICS, SINGLE_LABEL, ProblemType
from nlpxfer.report.privacy import scrub
from nlpxfer.strict_json import plain, write_json_whole

SCHEMA_VERSION: Final = 1
REPORT_FILE: Final = "report.json"
SPLITS: Final = ("validation", "test")
CALLS: Final = ("positive", "unclear", "negative")
_PARTS: Final = ("schema_version", "recipe", "metrics", "arms", "verdict", "cost", "data", "checks")
_COST: Final = ("train_seconds", "total_seconds", "tokens", "tokens_per_second", "peak_memory_bytes")
METRIC_WORDS: Final = {
    "accuracy": "accuracy",
    "macro_f1": "macro-F1",
    "micro_f1": "micro-F1",
    "sample_f1": "F1 per row",
    "mean_absolute_error": "mean absolute error",
    "spearman": "Spearman",
}
"""Metrics as a reader of tables knows them."""

SplitMetrics = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True, kw_only=True)
class SeedResult:
    """What one training seed of an arm reached: split -> metric -> value."""

    seed: int
    metrics: SplitMetrics


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One contestant: the treated model, its control, or a reference such as the teacher.

    Attributes:
        name: As in the verdict's `versus`, for example `distilled` or `control`.
        metrics: Split -> metric -> value; with several seeds the mean over them (`mean_metrics`).
        seconds: Wall-clock time to make it, all seeds and preparation together.
        parameters: Weights of the model, frozen ones included; None where the word means nothing (majority).
        bytes: Size of the weight files; None if nothing was saved.
        rows_per_second: Inference rate on the CPU; None if not measured.
        latency: `one_row` and `batched` on the CPU, see `evaluate.latency`; None if not measured.
        description: One sentence for the card.
        per_seed: One entry per training seed; empty for an arm without randomness.
        details: Anything else worth keeping, such as a searched value.
    """

    name: str
    metrics: SplitMetrics
    seconds: float
    parameters: int | None = None
    bytes: int | None = None
    rows_per_second: float | None = None
    latency: Mapping[str, Any] | None = None
    description: str = ""
    per_seed: Sequence[SeedResult] = ()
    details: Mapping[str, Any] = field(default_factory=dict)

    def deviation(self, metric: str, split: str = "test") -> float | None:
        """Standard deviation (n - 1) of a metric over the seeds; None with fewer than two."""
        if len(self.per_seed) < 2:
            return None
        return mean_and_spread([result.metrics[split][metric] for result in self.per_seed]).deviation


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Did the transfer help?

    `gain`, `low`, `high` are None where nothing was compared; `reason` says why, or why an interval does not decide.
    """

    call: str
    gain: float | None = None
    low: float | None = None
    high: float | None = None
    metric: str | None = None
    treated: str | None = None
    versus: str | None = None
    level: float | None = None
    seeds: int | None = None
    reason: str = ""

    @classmethod
    def of(cls, gain: Gain, *, treated: str, versus: str) -> Verdict:
        """The verdict from a measured gain of the arm `treated` over the arm `versus`."""
        reason = ""
        if gain.differing_rows < gain.needed_rows:
            few, needed = gain.differing_rows, gain.needed_rows
            reason = f"they differ on {few} of the test rows, and fewer than {needed} cannot tell"
        return cls(
            call=gain.call,
            gain=gain.gain,
            low=gain.low,
            high=gain.high,
            metric=gain.metric,
            treated=treated,
            versus=versus,
            level=gain.level,
            seeds=gain.seeds,
            reason=reason,
        )

    @classmethod
    def unmeasured(cls, reason: str) -> Verdict:
        """The verdict of a run without a control arm: unclear, with the reason."""
        return cls(call="unclear", reason=reason)

    def sentence(self) -> str:
        """The verdict for a reader, in points (hundredths).

        >>> Verdict(call="positive", gain=0.012, low=0.004, high=0.02, metric="accuracy", versus="control",
        ...         level=0.95, seeds=3).sentence()
        'positive: +1.2 points of accuracy over control (95 % interval +0.4 to +2.0, 3 seeds)'
        """
        if self.gain is None or self.low is None or self.high is None or self.level is None:
            return f"{self.call}: {self.reason}"
        metric = METRIC_WORDS.get(self.metric or "", self.metric)
        seeds = f"{self.seeds} seed" + ("" if self.seeds == 1 else "s")
        why = f": {self.reason}" if self.reason else ""
        if self.metric in LOWER_IS_BETTER:  # in the unit of the numbers
            word, by, low, high = "smaller", self.gain, self.low, self.high
            if by < 0:
                word, by, low, high = "larger", -by, -high, -low
            return (
                f"{self.call}: {metric} {word} by {by:.4g} than that of {self.versus} "
                f"({100 * self.level:g} % interval {low:.4g} to {high:.4g}, {seeds}){why}"
            )
        return (
            f"{self.call}: {100 * self.gain:+.1f} points of {metric} over {self.versus} "
            f"({100 * self.level:g} % interval {100 * self.low:+.1f} to {100 * self.high:+.1f}, {seeds}){why}"
        )


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything in report.json; see the module for its shape."""

    recipe: str
    metrics: SplitMetrics
    arms: Sequence[Arm]
    verdict: Verdict
    cost: Cost
    data: Mapping[str, Any]
    checks: Mapping[str, Any]
    search: Mapping[str, Any] | None = None
    schema_version: int = SCHEMA_VERSION

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values, without machine paths and tokens.

        Raises:
            NotFiniteError: A number is NaN or infinite.
            ConfigError: A value has no counterpart in JSON.
        """
        converted = plain(self)
        ordered = {name: converted[name] for name in (*_PARTS, *(() if self.search is None else ("search",)))}
        cleaned: dict[str, Any] = scrub(ordered, known_folders_only=True)
        return cleaned


def build_report(
    recipe: str,
    arms: Sequence[Arm],
    *,
    verdict: Verdict,
    cost: Cost,
    data: Mapping[str, Any],
    checks: Mapping[str, Any],
    treated: str | None = None,
    search: Mapping[str, Any] | None = None,
) -> Report:
    """A report whose `metrics` are those of the arm that was saved.

    Args:
        recipe: Name of the method.
        arms: All contestants, the saved one among them.
        verdict: On the transfer; `Verdict.unmeasured` where there was no control arm.
        cost: Of the whole run.
        data: The data's facts: `rows`, `classes`, `leaks` and more.
        checks: Name of a check -> what it found.
        treated: Name of the saved arm; the first if not given.
        search: The trials of a search for options, if there was one.

    Raises:
        ConfigError: No arms, two of one name, or no arm named `treated`.
    """
    names = [arm.name for arm in arms]
    if not names or len(set(names)) < len(names):
        raise ConfigError("A report needs arms with different names", available=names)
    saved = names[0] if treated is None else treated
    if saved not in names:
        raise ConfigError(f"No arm is named {saved}", available=names)
    metrics = arms[names.index(saved)].metrics
    return Report(
        recipe=recipe,
        metrics=metrics,
        arms=arms,
        verdict=verdict,
        cost=cost,
        data=data,
        checks=checks,
        search=search,
    )


def mean_metrics(per_seed: Sequence[SeedResult]) -> dict[str, dict[str, float]]:
    """The mean of each metric of each split over the training seeds.

    Raises:
        DataError: No seeds.
        ConfigError: The seeds have different splits or metrics.
        NotFiniteError: A value is NaN or infinite.
    """
    if not per_seed:
        raise DataError("No seeds to average")
    shapes = {tuple((split, *values) for split, values in result.metrics.items()) for result in per_seed}
    if len(shapes) > 1:
        raise ConfigError(f"The seeds were measured differently: {sorted(shapes)}")
    return {
        split: {name: mean_and_spread([each.metrics[split][name] for each in per_seed]).mean for name in values}
        for split, values in per_seed[0].metrics.items()
    }


def write_report(folder: str | Path, report: Report) -> Path:
    """Write `report.json` into `folder`, whole or not at all.

    Raises:
        NotFiniteError: A number is NaN or infinite.
        ConfigError: The report lacks parts of the contract; all are listed.
    """
    content = report.to_dict()
    faults = validate_report(content)
    if faults:
        raise ConfigError.from_faults(faults)
    return write_json_whole(Path(folder) / REPORT_FILE, content)


def validate_report(report: Mapping[str, Any]) -> list[str]:
    """What a report lacks, one sentence each; an empty list if it keeps the contract.

    Args:
        report: The content of report.json as read.
    """
    faults = _missing(report, _PARTS, "report")
    data = report.get("data")
    found: ProblemType = data.get("problem_type", SINGLE_LABEL) if isinstance(data, Mapping) else SINGLE_LABEL
    metrics = METRICS.get(found, METRICS[SINGLE_LABEL])
    if report.get("schema_version", SCHEMA_VERSION) != SCHEMA_VERSION:
        faults.append(f"schema_version is {report['schema_version']!r}, not {SCHEMA_VERSION}")
    if "metrics" in report:
        faults += _metric_faults(report["metrics"], "metrics", metrics)
    if "arms" in report:
        faults += _arm_faults(report["arms"], metrics)
    if "verdict" in report:
        faults += _verdict_faults(report["verdict"])
    if "cost" in report:
        faults += _missing(report["cost"], _COST, "cost")
    if "data" in report:
        faults += _missing(report["data"], ("rows", "classes", "leaks"), "data")
    return faults


def _missing(part: object, names: Sequence[str], where: str) -> list[str]:
    if not isinstance(part, Mapping):
        return [f"{where} is not an object"]
    return [f"{where}.{name} is missing" for name in names if name not in part]


def _metric_faults(metrics: object, where: str, names: Sequence[str]) -> list[str]:
    faults = _missing(metrics, SPLITS, where)
    if isinstance(metrics, Mapping):
        for split in metrics:
            faults += _missing(metrics[split], names, f"{where}.{split}")
    return faults


def _arm_faults(arms: object, metrics: Sequence[str]) -> list[str]:
    if not isinstance(arms, list) or not arms:
        return ["arms is not a list with at least one arm"]
    faults = []
    for index, arm in enumerate(arms):
        faults += _missing(arm, ("name", "metrics", "seconds", "parameters"), f"arms[{index}]")
        if isinstance(arm, Mapping) and "metrics" in arm:
            faults += _metric_faults(arm["metrics"], f"arms[{index}].metrics", metrics)
    return faults


def _verdict_faults(verdict: object) -> list[str]:
    faults = _missing(verdict, ("gain", "low", "high", "call"), "verdict")
    if faults or not isinstance(verdict, Mapping):
        return faults
    if verdict["call"] not in CALLS:
        faults.append(f"verdict.call is {verdict['call']!r}, not one of {', '.join(CALLS)}")
    if verdict["gain"] is None and not verdict.get("reason"):
        faults.append("verdict has neither a gain nor a reason")
    return faults
