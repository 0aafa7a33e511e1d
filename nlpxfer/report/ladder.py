"""The files of a search for the smallest student: ladder.json, ladder.md, and pareto.png with score against speed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from nlpxfer.report.markdown import escape_markdown, short_count
from nlpxfer.report.plots import SpeedPoint, pareto_plot
from nlpxfer.strict_json import plain, write_json_whole, write_text_whole
from nlpxfer.train.ladder import LadderResult

LADDER_FILE: Final = "ladder.json"
TABLE_FILE: Final = "ladder.md"
PARETO_FILE: Final = "pareto.png"


def ladder_table(result: LadderResult, rows_per_second: Mapping[str, float]) -> str:
    """A Markdown table of all candidates, the smallest first.

    Args:
        result: Of the search.
        rows_per_second: Measured in batches, by name.
    """
    lines = [
        "| student | ms for one row | rows/s | size | steps | validation score | of the teacher's | outcome |",
        "|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for each in result.tried:
        steps, score, share = "-", "-", "-"
        if each.best is not None:
            steps, score = f"{each.best[0]:,}", f"{each.best[1]:.4f}"
            share = f"{100 * each.best[1] / result.target.reference:.1f} %"
        speed = rows_per_second.get(each.name)
        cells = [
            escape_markdown(each.name),
            f"{each.latency_ms:.3g}",
            "-" if speed is None else f"{speed:,.0f}",
            f"{short_count(each.bytes)}B",
            steps,
            score,
            share,
            escape_markdown(each.outcome),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def write_ladder(
    folder: str | Path, result: LadderResult, rows_per_second: Mapping[str, float], *, teacher: str = "teacher"
) -> None:
    """Write the three files, each whole or not at all; also of a search that found nothing.

    Args:
        folder: The output folder.
        result: Of the search.
        rows_per_second: Measured in batches, by name; of the teacher too.
        teacher: Its name there, for the picture.
    """
    folder = Path(folder)
    content = {**result.to_plain(), "rows_per_second": dict(rows_per_second)}
    write_json_whole(folder / LADDER_FILE, plain(content, "ladder"))
    write_text_whole(folder / TABLE_FILE, ladder_table(result, rows_per_second))
    scores = {each.name: each.best[1] for each in result.tried if each.best} | {teacher: result.target.reference}
    points = [
        SpeedPoint(name=name, accuracy=score, rows_per_second=rows_per_second[name])
        for name, score in scores.items()
        if name in rows_per_second
    ]
    if points:
        pareto_plot(points, folder / PARETO_FILE, least=result.target.score)
