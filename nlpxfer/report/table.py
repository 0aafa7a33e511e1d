"""The table of arms at the end of a run."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from nlpxfer.report.card import arm_cells, shown_metrics
from nlpxfer.report.report import METRIC_WORDS, Arm, Verdict

if TYPE_CHECKING:
    from rich.table import Table

_COLUMNS: Final = ("parameters", "size", "rows/s on CPU")


def arms_table(arms: Sequence[Arm], *, title: str | None = None) -> Table:
    """A rich table of the arms: scores on the test rows, parameters, size of the weights, rows per second on the CPU.

    Args:
        arms: In the order of the rows.
        title: Above the table.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=None if title is None else Text(title), box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("arm", no_wrap=True)
    scores = [METRIC_WORDS[name] for name in shown_metrics(arms)] if arms else []
    for column in (*scores, *_COLUMNS):
        table.add_column(column, justify="right", no_wrap=True)
    for arm in arms:
        table.add_row(Text(" ".join(arm.name.split())), *map(Text, arm_cells(arm)))
    return table


def arms_text(arms: Sequence[Arm], verdict: Verdict | None = None, *, title: str | None = None) -> str:
    """The table as plain text, and the verdict below it: no escape codes, nothing cut, however narrow the terminal.

    Args:
        arms: In the order of the rows.
        verdict: On the transfer.
        title: Above the table.
    """
    from rich.console import Console
    from rich.measure import Measurement

    table = arms_table(arms, title=title)
    wide = Console(width=10_000, file=io.StringIO(), force_terminal=False, color_system=None, legacy_windows=False)
    width = Measurement.get(wide, wide.options, table).maximum
    console = Console(width=width, file=io.StringIO(), force_terminal=False, color_system=None, legacy_windows=False)
    with console.capture() as capture:
        console.print(table)
    lines = [line.rstrip() for line in capture.get().splitlines()]
    if verdict is not None:
        lines.append("")
        lines.append(f"transfer: {verdict.sentence()}")
    return "\n".join(lines).strip("\n") + "\n"
