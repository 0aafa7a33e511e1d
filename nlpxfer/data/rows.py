"""Checked rows: texts that hold something, and labels as names, tuples of names (multi-label) or numbers (regression).

A label is named by its value: `str(value)` for texts, whole numbers and booleans, with leading and trailing blanks of
texts taken off, and the class's name where the column says so (`ClassLabel`). Several labels of a row are a list, or
one text that `label_separator` splits; both may be empty. Texts stay as they are written.
"""

from __future__ import annotations

import json
import logging
import math
import unicodedata
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any, Final

import numpy as np

from nlpxfer.data.files import Table
from nlpxfer.data.formats import SHOWN_FAULTS, list_faults
from nlpxfer.errors import DataError
from nlpxfer.problem import MULTI_LABEL, REGRESSION, SINGLE_LABEL, ProblemType

LOGGER = logging.getLogger(__name__)
PAIR_MARK: Final = "\x1f"  # counts as white space, so that no normalised text holds it
HALF_CHARACTER: Final = "holds half of a character (a lone surrogate)"
LARGEST: Final = float(np.finfo(np.float32).max)
NO_LABEL: Final = -1  # the Hub's mark for rows whose label is kept secret


def normalise_text(text: str, pair: str | None = None) -> str:
    r"""The form in which two texts count as the same: lower case, runs of white space folded to one blank.

    Characters that can be written in two ways are brought to the composed one (NFC).

    >>> normalise_text(" Lost\tCARD ")
    'lost card'
    """
    folded = " ".join(unicodedata.normalize("NFC", text).lower().split())
    return folded if pair is None else folded + PAIR_MARK + normalise_text(pair)


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The checked rows of one split.

    Args:
        source: How errors name the file.
        name: How reports name it.
        texts: One text per row.
        pairs: The second texts, if asked for.
        labels: Label names, sorted tuples of them for multi-label, numbers for regression; None for unlabelled rows.
        numbers: Which row of its file each is, from 1.
        lines: On which line of its file each starts, where known.
        class_names: The order of the names, if the file gives one.
    """

    source: str
    name: str
    texts: Sequence[str]
    pairs: Sequence[str] | None
    labels: Sequence[Any] | None
    numbers: Sequence[int]
    lines: Sequence[int] | None
    class_names: tuple[str, ...] | None = None

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.texts)

    def take(self, indices: Sequence[int]) -> Rows:
        """The rows at these indices, in their order."""

        def picked(values: Sequence[Any]) -> list[Any]:
            return [values[index] for index in indices]

        return replace(
            self,
            texts=picked(self.texts),
            pairs=None if self.pairs is None else picked(self.pairs),
            labels=None if self.labels is None else picked(self.labels),
            numbers=picked(self.numbers),
            lines=None if self.lines is None else picked(self.lines),
        )

    def keys(self) -> list[str]:
        """Each row's text (and pair), normalised."""
        if self.pairs is None:
            return [normalise_text(text) for text in self.texts]
        return [normalise_text(text, pair) for text, pair in zip(self.texts, self.pairs, strict=True)]

    def names_by_row(self) -> Iterator[tuple[str, ...]]:
        """The label names of each row: one, or for multi-label any number."""
        for label in self.labels or ():
            yield label if isinstance(label, tuple) else (label,)

    def place(self, index: int) -> str:
        """Name a row as people count: 'row 3 (line 4)'."""
        return f"row {self.numbers[index]}" + (f" (line {self.lines[index]})" if self.lines is not None else "")


def problem_type_of(table: Table, label: str, *, separator: str | None) -> ProblemType:
    """The kind of task that a label column tells of: multi-label if its values are lists, or texts to be split."""
    lists = any(isinstance(value, list | tuple) for value in table.columns[label])
    return MULTI_LABEL if lists or separator is not None else SINGLE_LABEL


def check_rows(
    table: Table,
    *,
    text: str,
    pair: str | None,
    label: str | None,
    problem_type: ProblemType = SINGLE_LABEL,
    separator: str | None = None,
    known: Container[str] = (),
) -> Rows:
    """Check every row of a table and name its labels.

    Args:
        table: Holds the columns named next.
        text: The column of texts.
        pair: The column of second texts, or None.
        label: The column of labels, or None for unlabelled rows.
        problem_type: What a label is.
        separator: Between the labels of a row, where they are one text; for multi-label only.
        known: See `read_labels`.

    Raises:
        DataError: Texts or labels that are missing, blank or of a wrong kind: one error for all of them.
    """
    faults: list[tuple[int, str]] = []
    for column in (text, pair):
        if column is not None:
            faults += _text_faults(table.columns[column], column)
    labels = None
    if label is not None:
        labels, found = read_labels(table, label, problem_type, separator, known)
        faults += found
    if faults:
        raise _faulty(table, faults)
    return Rows(
        source=table.source,
        name=table.name,
        texts=table.columns[text],
        pairs=None if pair is None else table.columns[pair],
        labels=labels,
        numbers=range(1, len(table.columns[text]) + 1),
        lines=table.lines,
        class_names=None if label is None else table.class_names.get(label),
    )


def _faulty(table: Table, faults: list[tuple[int, str]]) -> DataError:
    """One error: per kind of fault its count and its first five rows."""
    kinds: dict[str, list[int]] = {}
    for index, kind in faults:
        kinds.setdefault(kind, []).append(index)
    messages = []
    for kind, indices in kinds.items():
        places = ", ".join(table.place(index) for index in indices[:SHOWN_FAULTS])
        more = f" and {len(indices) - SHOWN_FAULTS} more" if len(indices) > SHOWN_FAULTS else ""
        messages.append(f"{places}{more}: {kind}" + (f" ({len(indices)} rows)" if len(indices) > 1 else ""))
    return DataError(list_faults(table.source, messages), fix="mend or remove these rows")


def _text_faults(values: Sequence[Any], column: str) -> list[tuple[int, str]]:
    faults = []
    for index, value in enumerate(values):
        if value is None:
            faults.append((index, f"{column!r} is missing"))
        elif not isinstance(value, str):
            faults.append((index, f"{column!r} is of type {type(value).__name__}, a text is needed"))
        elif not value.strip():
            faults.append((index, f"{column!r} is empty or holds white space only"))
        elif "\0" in value:
            faults.append((index, f"{column!r} holds a NUL character"))
        elif not encodable(value):
            faults.append((index, f"{column!r} {HALF_CHARACTER}"))
    return faults


def encodable(value: str) -> bool:
    """Whether UTF-8 can hold a text: it has no lone surrogates, halves of characters that JSON can write."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def read_labels(
    table: Table, column: str, problem_type: ProblemType, separator: str | None, known: Container[str] = ()
) -> tuple[list[Any], list[tuple[int, str]]]:
    """The label of each row of a table, and what is wrong with them: (index of the row, fault).

    Args:
        table: Holds the column.
        column: The column of labels.
        problem_type: What a label is.
        separator: Between the labels of a row, where they are one text; for multi-label only.
        known: Names that are classes, whatever they look like: a column of such texts holds no numbers.

    Raises:
        DataError: Lists or fractions where each row has one class, vectors of zeros and ones where it has several.
    """
    names = table.class_names.get(column)
    if problem_type == SINGLE_LABEL:
        _refuse_other_tasks(table, column, known)
    labels: list[Any] = []
    faults: list[tuple[int, str]] = []
    read: dict[ProblemType, Callable[[object], tuple[Any, str]]] = {
        SINGLE_LABEL: lambda value: label_name(value, names),
        MULTI_LABEL: lambda value: label_names(value, names, separator),
        REGRESSION: _number_of,
    }
    if problem_type == MULTI_LABEL:
        _refuse_vectors(table, column, separator)
    for index, value in enumerate(table.columns[column]):
        label, fault = read[problem_type](value)
        labels.append(label)
        if fault:
            faults.append((index, f"{column!r} {fault}"))
    return labels, faults


def label_names(value: object, names: tuple[str, ...] | None, separator: str | None) -> tuple[tuple[str, ...], str]:
    """The names of a row's labels, sorted, and what is wrong with them.

    Args:
        value: As the file has it.
        names: Those of class numbers, where the column says so.
        separator: Between labels that are one text.
    """
    if isinstance(value, str) and separator is not None:
        value = [part for part in value.split(separator) if part.strip()]
    if isinstance(value, str):
        return (), "is a text, a list of labels is needed (or --label_separator, which splits a text)"
    if not isinstance(value, list | tuple):
        return (), "is missing" if value is None else f"is of type {type(value).__name__}, a list of labels is needed"
    found = [label_name(item, names) for item in value]
    return tuple(sorted({name for name, _ in found})), next((f"holds a label that {f}" for _, f in found if f), "")


def _number_of(value: object) -> tuple[float, str]:
    """A regression target, and what is wrong with it."""
    if value is None or value == "":
        return 0.0, "is missing"
    number = _as_number(value) if isinstance(value, str) else value
    if isinstance(number, bool) or not isinstance(number, int | float | Decimal):
        return 0.0, "is no number"
    try:
        number = float(number)
    except (OverflowError, ValueError):  # beyond all doubles; a Decimal that signals NaN
        number = math.inf
    if math.isfinite(number) and abs(number) > LARGEST:
        return 0.0, f"is {number:g}, which is beyond the numbers of a model (float32)"
    return number, "" if math.isfinite(number) else "is NaN or infinite"


def label_name(value: object, names: tuple[str, ...] | None) -> tuple[str, str]:
    """The name of one label value, and what is wrong with it; `names` are those of class numbers, if it is one.

    >>> label_name(" food ", None), label_name(2.0, None), label_name(1, ("ham", "spam"))
    (('food', ''), ('2', ''), ('spam', ''))
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "", "is missing"
    if isinstance(value, str):
        name = value.strip()
        if not name:
            return "", "is blank"
        return name, "" if encodable(name) else HALF_CHARACTER
    if isinstance(value, float):
        if not value.is_integer():
            return "", f"is the number {value}, not a class"
        value = int(value)
    if isinstance(value, int) and names is not None:
        if value == NO_LABEL:
            return "", f"is {NO_LABEL}, the mark for 'no label'"
        if not 0 <= value < len(names):
            return "", f"is {value}, but there are only {len(names)} classes"
        return names[value], ""
    if isinstance(value, int):
        return str(value), ""
    return "", f"is of type {type(value).__name__}, a name or a whole number is needed"


def _refuse_other_tasks(table: Table, column: str, known: Container[str]) -> None:
    """Refuse lists of labels and numbers that are not whole where each row has one class."""
    values = table.columns[column]
    for index, value in enumerate(values):
        if isinstance(value, list | tuple):
            raise DataError(
                f"{table.source}, {table.place(index)}: {column!r} holds a list of labels.",
                fix="one label per row, or --problem_type multi_label_classification",
            )
    fraction = _first_fraction(values, known)
    if fraction is not None:
        raise DataError(
            f"{table.source}, {table.place(fraction)}: {column!r} is the number {values[fraction]}, not a class.",
            fix="--problem_type regression, or name the classes with words, such as 'low' and 'high'",
        )


def _refuse_vectors(table: Table, column: str, separator: str | None) -> None:
    """Refuse lists that have a zero or a one for each label: as names, nearly every row would have the same two."""
    values = [
        value.split(separator) if separator and isinstance(value, str) else value for value in table.columns[column]
    ]
    lengths = {len(value) if isinstance(value, list | tuple) else 0 for value in values}
    if len(lengths) != 1 or max(lengths) < 2:
        return
    if any(each not in (0, 1) and str(each).strip() not in ("0", "1") for value in values for each in value):
        return
    index = next((index for index, value in enumerate(values) if len(set(value)) < len(value)), None)
    if index is not None:
        raise DataError(
            f"{table.source}, {table.place(index)}: {column!r} holds a vector of zeros and ones, a list of the names "
            "of the row's labels is needed.",
            fix=f"of {json.dumps([int(each) for each in values[index]])}, write the names that the ones stand for",
        )


def _first_fraction(values: Sequence[Any], known: Container[str]) -> int | None:
    """Where the first number that is not whole stands; texts count when every one is a number and none is known."""
    texts = [value.strip() for value in values if isinstance(value, str) and value.strip()]
    numeric = bool(texts) and all(text not in known and _as_number(text) is not None for text in texts)
    for index, value in enumerate(values):
        number = _as_number(value) if numeric and isinstance(value, str) else value
        if isinstance(number, float) and not math.isnan(number) and not number.is_integer():
            return index
    return None


def _as_number(value: str) -> float | None:
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
