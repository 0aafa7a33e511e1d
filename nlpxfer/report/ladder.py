"""The files of a search for the smallest student: ladder.json, ladder.md, and pareto.png with score against speed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from nlpxfer.report.markdown import escape_markdown, short_count
from nlpxfer.report.plots import SpeedPoint, pareto_plot
from nlpxfer.strict_json import plain, write_json_whole, write_text_whole
from nlpxfer.train.ladder import LadderResult

LADDER_FILE: Final = "ladder.json"
TABLE_FILE: Final = "ladder.md"
PARETO_FILE: Final = "pareto.png"


_COLUMNS: Final = (
    "student",
    "one row, ms: p50",
    "p95",
    "in batches, ms a row: p50",
    "p95",
    "rows/s",
    "size",
    "steps",
    "validation score",
    "of the teacher's",
    "outcome",
)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What was measured of a model before any student was trained.

    Attributes:
        latency: As `nlpxfer.evaluate.latency.latency_facts` gives it.
        bytes: Of its weights.
    """

    latency: Mapping[str, Any]
    bytes: int

    @property
    def ms(self) -> float:
        """Milliseconds for one row: the median, tokenising included."""
        return float(self.latency["one_row"]["total_p50_ms"])

    @property
    def rows_per_second(self) -> float:
        """In batches, by the median, tokenising included."""
        return 1000 / float(self.latency["batched"]["total_p50_ms"])


def ladder_facts(result: LadderResult, measured: Mapping[str, Measured | None]) -> dict[str, Any]:
    """The content of ladder.json: the search, and by name `latency` and `rows_per_second`, None if not measured."""
    speeds = {
        "latency": {name: None if found is None else found.latency for name, found in measured.items()},
        "rows_per_second": {
            name: None if found is None else found.rows_per_second for name, found in measured.items()
        },
    }
    facts: dict[str, Any] = plain({**result.to_plain(), **speeds}, "ladder")
    return facts


def ladder_table(result: LadderResult, measured: Mapping[str, Measured | None], *, teacher: str = "teacher") -> str:
    """A Markdown table of all candidates, the smallest first, and of the teacher.

    Args:
        result: Of the search.
        measured: By name; of the teacher too.
        teacher: Its name there.
    """
    lines = [f"| {' | '.join(_COLUMNS)} |", "|---|" + "---:|" * (len(_COLUMNS) - 2) + "---|"]
    for each in result.tried:
        steps, score = ("-", None) if each.best is None else (f"{each.best[0]:,}", each.best[1])
        lines.append(_line(each.name, measured.get(each.name), steps, score, result.target.reference, each.outcome))
    reference = result.target.reference
    lines.append(_line(teacher, measured.get(teacher), "-", reference, reference, "-"))
    return "\n".join(lines) + "\n"


def _line(
    name: str, measured: Measured | None, steps: str, score: float | None, reference: float, outcome: str
) -> str:
    """A row of the table; a dash for what is not known."""
    cells = [escape_markdown(name), *(["-"] * 6 if measured is None else _speeds(measured)), steps]
    cells += ["-", "-"] if score is None else [f"{score:.4f}", f"{100 * score / reference:.1f} %"]
    return f"| {' | '.join([*cells, escape_markdown(outcome)])} |"


def _speeds(measured: Measured) -> list[str]:
    """Its cells from the time for one row to its size."""
    times = [
        f"{measured.latency[requests][f'total_{share}_ms']:.3g}"
        for requests in ("one_row", "batched")
        for share in ("p50", "p95")
    ]
    return [*times, f"{measured.rows_per_second:,.0f}", f"{short_count(measured.bytes)}B"]


def write_ladder(
    folder: str | Path, result: LadderResult, measured: Mapping[str, Measured | None], *, teacher: str = "teacher"
) -> None:
    """Write the three files, each whole or not at all; also of a search that found nothing.

    Args:
        folder: The output folder.
        result: Of the search.
        measured: By name; of the teacher too, None if it is no model of its own: it is not in the picture then.
        teacher: Its name there.
    """
    folder = Path(folder)
    write_json_whole(folder / LADDER_FILE, ladder_facts(result, measured))
    write_text_whole(folder / TABLE_FILE, ladder_table(result, measured, teacher=teacher))
    scores = {each.name: each.best[1] for each in result.tried if each.best} | {teacher: result.target.reference}
    points = [
        SpeedPoint(name=name, accuracy=score, rows_per_second=found.rows_per_second)
        for name, score in scores.items()
        if (found := measured.get(name)) is not None
    ]
    if points:
        pareto_plot(points, folder / PARETO_FILE, least=result.target.score)
