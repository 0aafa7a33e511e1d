"""The table of arms as text: nothing cut, no escape codes, wherever it is shown."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from nlpxfer.report import Arm, SeedResult, Verdict, arms_table, arms_text


def values(accuracy: float):
    return {"test": {"accuracy": accuracy, "macro_f1": 0.5, "loss": 0.1}}


ARMS = [
    Arm(
        name="student of a teacher with a very long name that would not fit into eighty columns [bold]x[/bold]",
        metrics=values(0.91),
        seconds=1.0,
        parameters=22_700_000,
        bytes=45_400_000,
        rows_per_second=1500.4,
        per_seed=[SeedResult(seed=seed, metrics=values(accuracy)) for seed, accuracy in ((1, 0.9), (2, 0.92))],
    ),
    Arm(name="majority", metrics=values(0.25), seconds=0.0),
]


def test_text_holds_every_value_uncut(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    text = arms_text(ARMS, Verdict.unmeasured("no control arm"), title="Arms")
    assert "\x1b" not in text
    lines = text.splitlines()
    header = next(line for line in lines if "macro-F1" in line)
    assert header.split() == ["arm", "accuracy", "macro-F1", "parameters", "size", "rows/s", "on", "CPU"]
    first = next(line for line in lines if line.startswith("student"))
    assert first.startswith(ARMS[0].name)
    assert first.split(ARMS[0].name)[1].split() == [
        *("0.9100", "±", "0.0141"),
        *("0.5000", "±", "0.0000"),
        *("22.7", "M", "45.4", "MB", "1,500"),
    ]
    assert next(line for line in lines if line.startswith("majority")).split() == (
        ["majority", "0.2500", "0.5000", "-", "-", "-"]
    )
    assert lines[-1] == "transfer: unclear: no control arm"
    assert lines[0].strip() == "Arms"


def test_table_can_be_shown_by_any_console():
    file = io.StringIO()
    Console(file=file, width=200, force_terminal=True, color_system="truecolor").print(arms_table(ARMS))
    assert "\x1b[" in file.getvalue()
    assert "[bold]x[/bold]" in file.getvalue()
