"""disagreements.jsonl: rows that a teacher and its student answer differently, for whoever looks at labels again.

Where two models that learnt from the same rows contradict each other, one of the two is wrong, or the label is. The
most confident disagreement comes first: that of the row whose less sure model is surest. Probabilities are the
calibrated ones of each model, so that the two can be compared.

The file holds texts of the data, so it is written on request only and is never pushed.

Shapes: N rows, C classes.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from nlpxfer.evaluate.calibration import probabilities
from nlpxfer.problem import MULTI_LABEL, REGRESSION, ProblemType
from nlpxfer.report.listed_row import labels_above, listed_row
from nlpxfer.strict_json import write_json_lines_whole

Array = NDArray[Any]

DISAGREEMENTS_FILE: Final = "disagreements.jsonl"
NUMBERS_LISTED: Final = 0.1
"""Share of the rows that is listed where answers are numbers, which hardly ever are the same: the furthest apart."""
_DIGITS: Final = 6


@dataclass(frozen=True, eq=False)
class TwoAnswers:
    """What two models say of the rows of one split.

    Attributes:
        split: Name of the split.
        numbers_N: The rows' numbers in their file.
        texts: Their texts.
        pairs: Their second texts, for tasks on pairs.
        gold: Their labels as `LabelSchema.array` gives them; None for rows without any.
        teacher_NC: The teacher's logits.
        student_NC: The student's.
    """

    split: str
    numbers_N: Sequence[int]
    texts: Sequence[str]
    pairs: Sequence[str] | None
    gold: Array | None
    teacher_NC: Array
    student_NC: Array


def disagreements(
    asked: Sequence[TwoAnswers],
    names: Sequence[str],
    problem_type: ProblemType,
    temperatures: tuple[float, float] = (1.0, 1.0),
) -> Iterator[dict[str, Any]]:
    """The rows that two models answer differently, the most confident disagreement first.

    Args:
        asked: Splits.
        names: Label names in schema order.
        problem_type: What the logits stand for.
        temperatures: Of the teacher's and the student's probabilities.

    Yields:
        `split`, `row`, `text` (and `text_pair`), `label` (None without one), `teacher`, `student`,
        `teacher_probability`, `student_probability`; of a multi-label task the labels are lists, and the probabilities
        those of the labels that differ, by name; numbers have a `difference` in place of probabilities.
    """
    ranked = [_ranked(two, problem_type, temperatures) for two in asked]
    places = (
        (-float(sure), part, int(index))
        for part, found in enumerate(ranked)
        for index, sure in zip(*found, strict=True)
    )
    if problem_type == REGRESSION:
        count = int(np.ceil(NUMBERS_LISTED * sum(len(two.texts) for two in asked)))
        ordered = heapq.nsmallest(count, places)
    else:
        ordered = sorted(places)
    for _, part, index in ordered:
        yield _line(asked[part], index, names, problem_type, temperatures)


def write_disagreements(folder: str | Path, rows: Iterator[dict[str, Any]]) -> Path:
    """Write `disagreements.jsonl`, whole or not at all; an empty file if there is none.

    Args:
        folder: The output folder.
        rows: From `disagreements`.
    """
    return write_json_lines_whole(Path(folder) / DISAGREEMENTS_FILE, rows)


def _ranked(
    two: TwoAnswers, problem_type: ProblemType, temperatures: tuple[float, float]
) -> tuple[Array, NDArray[np.float64]]:
    """Indices of the rows with different answers, and how sure the less sure model is; of numbers how far apart."""
    if problem_type == REGRESSION:
        apart_N = np.abs(two.teacher_NC[:, 0].astype(np.float64) - two.student_NC[:, 0])
        rows = np.flatnonzero(apart_N > 0)
        return rows, apart_N[rows]
    shares = _shares(two.teacher_NC, two.student_NC, problem_type, temperatures)
    if problem_type == MULTI_LABEL:
        given = [each > 0.5 for each in shares]
        sure_NC = np.minimum(*(np.maximum(each, 1 - each) for each in shares))
        sure_N = np.where(given[0] != given[1], sure_NC, 0.0).max(axis=1)
        rows = np.flatnonzero((given[0] != given[1]).any(axis=1))
    else:
        sure_N = np.minimum(*(each.max(axis=1) for each in shares))
        rows = np.flatnonzero(shares[0].argmax(axis=1) != shares[1].argmax(axis=1))
    return rows, sure_N[rows]


def _shares(
    teacher_NC: Array, student_NC: Array, problem_type: ProblemType, temperatures: tuple[float, float]
) -> list[NDArray[np.float64]]:
    pairs = zip((teacher_NC, student_NC), temperatures, strict=True)
    return [probabilities(logits, temperature, problem_type) for logits, temperature in pairs]


def _line(
    two: TwoAnswers,
    index: int,
    names: Sequence[str],
    problem_type: ProblemType,
    temperatures: tuple[float, float],
) -> dict[str, Any]:
    line: dict[str, Any] = {
        "split": two.split,
        **listed_row(index, two.numbers_N, two.texts, two.pairs),
        "label": None if two.gold is None else _label(two.gold[index], names, problem_type),
    }
    logits = (two.teacher_NC[index], two.student_NC[index])
    if problem_type == REGRESSION:
        teacher, student = (float(each[0]) for each in logits)
        answers = {"teacher": round(teacher, _DIGITS), "student": round(student, _DIGITS)}
        return line | answers | {"difference": round(abs(teacher - student), _DIGITS)}
    shares = [each[0] for each in _shares(logits[0][None], logits[1][None], problem_type, temperatures)]
    if problem_type == MULTI_LABEL:
        differ = [c for c in range(len(names)) if (shares[0][c] > 0.5) != (shares[1][c] > 0.5)]
        for who, each in zip(("teacher", "student"), shares, strict=True):
            line[who] = labels_above(each, names)
            line[f"{who}_probability"] = {names[c]: round(float(each[c]), _DIGITS) for c in differ}
        return line
    for who, each in zip(("teacher", "student"), shares, strict=True):
        line[who] = names[int(each.argmax())]
        line[f"{who}_probability"] = round(float(each.max()), _DIGITS)
    return line


def _label(gold: Any, names: Sequence[str], problem_type: ProblemType) -> Any:  # noqa: ANN401 - a name, names or a number
    if problem_type == REGRESSION:
        return round(float(gold), _DIGITS)
    if problem_type == MULTI_LABEL:
        return labels_above(gold, names)
    return names[int(gold)]
