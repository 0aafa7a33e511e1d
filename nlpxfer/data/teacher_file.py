"""Probabilities of the labels that somebody else has written down for texts: a language model's, say.

In columns (csv, tsv, parquet): the text, and one column for each label, named as it is. As objects (jsonl, json):
`{"text": ..., "probabilities": {"name": 0.9, ...}}`, or `{"text": ..., "label": "name"}` for a teacher that only names
its choice (a list of names for multi-label). "text" and "label" stand for the names that these have in the data. A row
of the data is found by its text (and second text), never by its place, and the text must be the same to the letter: a
text that was tidied up is one that the teacher did not see.

Probabilities become logits, since that is what students learn: log p, for multi-label log p - log (1 - p), with p kept
`FLOOR` away from 0 and 1. So a teacher that only names its choice is sure to one in a million.

Shapes: N rows, C classes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from nlpxfer.data.files import Table, read_some_columns
from nlpxfer.data.formats import list_faults
from nlpxfer.data.rows import label_name, label_names
from nlpxfer.data.schema import LabelSchema, written_otherwise
from nlpxfer.errors import ConfigError, DataError, LabelError, nearest
from nlpxfer.problem import MULTI_LABEL, REGRESSION

FLOOR: Final = 1e-6
"""Least probability."""
ROUNDING: Final = 1e-3
"""How far from 1 the probabilities of a row may sum, however many digits they have."""
MOST_ROUNDING: Final = 0.25
"""How far at most, however few digits: what is further off are no probabilities."""
FEWEST_DIGITS: Final = 2
"""A row is read as written with at least so many: JSON and others drop a 0 at the end."""
PROBABILITIES: Final = "probabilities"

Array = NDArray[Any]
Key = str | tuple[str, str]


@dataclass(frozen=True, eq=False)
class TeacherFile:
    """What a file says about texts.

    Attributes:
        name: Its name without the folder.
        sha256: Of its bytes.
        logits_NC: float32, columns in the order of the schema.
        places: Text, or text and second text -> row.
    """

    name: str
    sha256: str
    logits_NC: Array
    places: Mapping[Key, int]

    def logits(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> Array:
        """The logits of some texts, float32 (N, C); NaN where the file says nothing."""
        keys: Sequence[Key] = texts if pairs is None else list(zip(texts, pairs, strict=True))
        found = np.array([self.places.get(key, -1) for key in keys], dtype=np.int64)
        answers_NC = np.full((len(keys), self.logits_NC.shape[1]), np.nan, dtype=np.float32)
        answers_NC[found >= 0] = self.logits_NC[found[found >= 0]]
        return answers_NC

    def require_all(self, source: str, texts: Sequence[str], pairs: Sequence[str] | None, *, split: str) -> None:
        """See that the file knows all texts of a split.

        Raises:
            DataError: It does not; says how many are missing, and the first of them.
        """
        keys: Sequence[Key] = texts if pairs is None else list(zip(texts, pairs, strict=True))
        missing = [(row, key) for row, key in enumerate(keys, start=1) if key not in self.places]
        if missing:
            shown = [f"row {row}: {_shortened(key)!r}" for row, key in missing[:5]]
            more = [f"and {len(missing) - 5} more"] if len(missing) > 5 else []
            listed = "\n  - ".join([*shown, *more])
            raise DataError(
                f"{source} says nothing about {len(missing)} of the {len(keys)} texts of {split}:\n  - {listed}",
                why="texts are compared to the letter",
                fix="add them, or --teacher_file_partial true to teach only the others",
            )


def read_teacher_file(
    path: str | Path,
    schema: LabelSchema,
    *,
    text: str = "text",
    pair: str | None = None,
    label: str = "label",
    separator: str | None = None,
) -> TeacherFile:
    """Read what a teacher has written down.

    Args:
        path: The file: csv, tsv, parquet, jsonl or json.
        schema: The labels.
        text: Name of the column of texts: that of the data.
        pair: Name of that of second texts, for tasks on pairs; likewise.
        label: Name of the key of hard labels; likewise. They are read as those of the data.
        separator: Between the labels of a row that are one text; likewise.

    Raises:
        ConfigError: The task is a regression.
        DataNotFoundError: No such file.
        LabelError: Names of labels that are unknown or missing; names file and row.
        DataError: Numbers that are no probabilities, rows that do not sum to 1, or that contradict each other; names
            file and row.
    """
    if schema.problem_type == REGRESSION:
        raise ConfigError("teacher_file: holds probabilities of labels; a regression has none.")
    path = Path(path)
    columns = [text] if pair is None else [text, pair]
    of_texts = f"column{'s' if pair else ''} of texts as in the data: {' and '.join(map(repr, columns))}"
    raw = read_some_columns(
        path, [*columns, *schema.names, PROBABILITIES, label], needed=columns, fix=f"name the {of_texts}"
    )
    table = Table(source=str(path), name=path.name, columns=raw.columns, lines=raw.lines, class_names=raw.class_names)
    by_column = not ({PROBABILITIES, label} & set(raw.names)) or set(schema.names) <= set(raw.names)
    if by_column:
        _check_names(path, [name for name in raw.names if name not in columns], schema, columns, label)
        shares_NC, faults = _numbers_of_columns(table, schema)
    else:
        shares_NC, faults = _numbers_of_objects(table, schema, label, separator)
    for name in columns:
        values = table.columns[name]
        faults += [
            f"{table.place(row)}: has no {name}" for row, found in enumerate(values) if not isinstance(found, str)
        ]
    if not faults:
        faults = _share_faults(table, shares_NC, schema, by_column=by_column)
    if faults:
        raise DataError(list_faults(str(path), faults))
    if schema.problem_type != MULTI_LABEL:
        shares_NC = shares_NC / shares_NC.sum(axis=1, keepdims=True)
    texts = table.columns[text]
    keys: list[Key] = texts if pair is None else list(zip(texts, table.columns[pair], strict=True))
    places = _places(table, keys, shares_NC)
    return TeacherFile(path.name, _sha256(path), to_logits(shares_NC, schema.problem_type), places)


def to_logits(shares_NC: Array, problem_type: str) -> Array:
    """Logits whose softmax, for multi-label whose sigmoid, gives these probabilities; float32, p at least `FLOOR`.

    >>> to_logits(np.array([[0.5, 0.5]]), "multi_label_classification").tolist()
    [[0.0, 0.0]]
    """
    if problem_type == MULTI_LABEL:
        shares_NC = np.clip(shares_NC, FLOOR, 1 - FLOOR)
        return np.asarray(np.log(shares_NC) - np.log1p(-shares_NC), dtype=np.float32)
    return np.asarray(np.log(np.maximum(shares_NC, FLOOR)), dtype=np.float32)


def _check_names(path: Path, found: Sequence[str], schema: LabelSchema, texts: Sequence[str], label: str) -> None:
    unknown, missing = _unlike(found, schema)
    if unknown or missing:
        lines = [f"  - not a label: {', '.join(unknown)}"] if unknown else []
        lines += [f"  - no column for: {', '.join(missing)}"] if missing else []
        raise LabelError(
            f"The columns of {path} are not the labels of the data:\n" + "\n".join(lines),
            fix=f"one column for each label, named as it is, or, of each row, {PROBABILITIES!r} or {label!r}; "
            f"and {' and '.join(map(repr, texts))}; nothing else",
            available=schema.names,
        )


def _unlike(found: Sequence[str], schema: LabelSchema) -> tuple[list[str], list[str]]:
    """Names that are no labels, each with the nearest label, and labels that are not named."""
    unknown = []
    for name in [name for name in found if name not in schema]:
        close, alike = nearest(name, schema.names), written_otherwise([name], schema.names)
        unknown.append(f"{name!r}" + (f" ({alike})" if alike else f" (did you mean {close!r}?)" if close else ""))
    return unknown, [name for name in schema.names if name not in found]


def _numbers_of_columns(table: Table, schema: LabelSchema) -> tuple[Array, list[str]]:
    faults: list[str] = []
    shares_NC = np.full((len(table.columns[schema.names[0]]), len(schema)), np.nan)
    for column, name in enumerate(schema.names):
        values = table.columns[name]
        try:
            shares_NC[:, column] = np.array(values, dtype=np.float64)
        except (ValueError, TypeError):
            for row, value in enumerate(values):
                number = _number(value)
                if number is None:
                    faults.append(f"{table.place(row)}: {value!r} for {name!r} is no number")
                else:
                    shares_NC[row, column] = number
    return shares_NC, faults


def _number(value: object) -> float | None:
    if isinstance(value, bool) or value is None:
        return None
    try:
        return float(value)  # type: ignore[arg-type]  # what is no number is refused here
    except (ValueError, TypeError):
        return None


def _numbers_of_objects(
    table: Table, schema: LabelSchema, label: str, separator: str | None
) -> tuple[Array, list[str]]:
    rows = len(next(iter(table.columns.values())))
    names = table.class_names.get(label)
    given = table.columns.get(PROBABILITIES, [None] * rows)
    chosen = table.columns.get(label, [None] * rows)
    shares_NC, faults = np.full((rows, len(schema)), np.nan), []
    for row, (shares, choice) in enumerate(zip(given, chosen, strict=True)):
        if (shares is None) == (choice is None):
            which = "both" if shares is not None else "neither"
            fault = f"has {which} of {PROBABILITIES!r} and {label!r}, one is needed"
        elif shares is not None:
            fault = _put_shares(shares_NC[row], shares, schema)
        else:
            found, fault = _choice(choice, schema, names, separator)
            fault = f"{label!r} {fault}" if fault else _put_choice(shares_NC[row], found, schema)
        if fault:
            faults.append(f"{table.place(row)}: {fault}")
    return shares_NC, faults


def _put_shares(row_C: Array, shares: object, schema: LabelSchema) -> str:
    """Fill a row with probabilities by name; what is wrong with them."""
    if not isinstance(shares, dict):
        return f"{PROBABILITIES!r} is no object of label names and numbers"
    unknown, missing = _unlike(list(shares), schema)
    if unknown:
        return f"not a label: {', '.join(unknown)}"
    if missing:
        return f"no probability for {', '.join(map(repr, missing))}"
    for name, value in shares.items():
        number = _number(value)
        if number is None:
            return f"{value!r} for {name!r} is no number"
        row_C[schema.encode(name)] = number
    return ""


def _choice(
    value: object, schema: LabelSchema, names: tuple[str, ...] | None, separator: str | None
) -> tuple[tuple[str, ...], str]:
    """The names of the label, or labels, that were chosen, read as those of the data; what is wrong with them."""
    if schema.problem_type == MULTI_LABEL:
        return label_names(value, names, separator)
    if isinstance(value, list):
        return (), "is a list, one label is needed"
    name, fault = label_name(value, names)
    return (name,), fault


def _put_choice(row_C: Array, names: Sequence[str], schema: LabelSchema) -> str:
    """Fill a row with 1 for the label, or labels, that were chosen, else 0; what is wrong with them."""
    unknown, _ = _unlike(names, schema)
    if unknown:
        return f"not a label: {', '.join(unknown)}"
    row_C[:] = 0
    row_C[[schema.encode(name) for name in names]] = 1
    return ""


def _share_faults(table: Table, shares_NC: Array, schema: LabelSchema, *, by_column: bool) -> list[str]:
    """Rows that are no probabilities."""
    faults: dict[int, str] = {}
    wrong_NC = ~((shares_NC >= 0) & (shares_NC <= 1 + ROUNDING))  # also what is no number at all
    for row, column in np.argwhere(wrong_NC):
        value = shares_NC[row, column]
        what = "is negative" if value < 0 else "is above 1" if value > 1 else "is not finite"
        faults.setdefault(int(row), f"{value:g} for {schema.names[column]!r} {what}")
    if schema.problem_type != MULTI_LABEL:
        sums_N = shares_NC.sum(axis=1)
        for row in np.flatnonzero(~(np.abs(sums_N - 1) <= ROUNDING) & ~wrong_NC.any(axis=1)):
            tolerance = rounding_of(_written(table, int(row), schema, by_column=by_column))
            if abs(sums_N[row] - 1) > tolerance + 1e-9:  # sums of binary fractions are off by a little
                told = f"the probabilities sum to {sums_N[row]:g}, not to 1 ({tolerance:g} off could be rounding)"
                faults[int(row)] = told
    return [f"{table.place(row)}: {faults[row]}" for row in sorted(faults)]


def _written(table: Table, row: int, schema: LabelSchema, *, by_column: bool) -> list[object]:
    """The probabilities of a row as the file has them."""
    if by_column:
        return [table.columns[name][row] for name in schema.names]
    return list(table.columns[PROBABILITIES][row].values())


def rounding_of(written: Sequence[object]) -> float:
    """How far from 1 rounding may have brought the sum of a row: half a unit of its last digit for each class.

    Never less than `ROUNDING`, nor more than `MOST_ROUNDING`.

    Args:
        written: The probabilities as the file has them: numbers, or texts that are numbers.

    >>> round(rounding_of(["0.33", "0.33", "0.33"]), 4)
    0.015
    """
    digits = max(FEWEST_DIGITS, *(_decimals(value) for value in written))
    return min(MOST_ROUNDING, max(ROUNDING, 0.5 * 10.0**-digits * len(written)))


def _decimals(value: object) -> int:
    """Digits behind the point of a finite number; of a float32 those that tell it from other float32 numbers."""
    if not isinstance(value, str):
        number = float(value)  # type: ignore[arg-type]  # what is no number has been refused
        single = np.float32(number)
        value = str(single) if float(single) == number else repr(number)
    return max(0, -int(Decimal(value).as_tuple().exponent))


def _places(table: Table, keys: Sequence[Key], shares_NC: Array) -> dict[Key, int]:
    """The first row of each text.

    Raises:
        DataError: A later one says something else.
    """
    places: dict[Key, int] = {}
    faults = []
    for row, key in enumerate(keys):
        first = places.setdefault(key, row)
        if first != row and not np.array_equal(shares_NC[first], shares_NC[row]):
            faults.append(f"{table.place(row)}: says something else than {table.place(first)} about the same text")
    if faults:
        raise DataError(list_faults(table.source, faults), fix="keep one of the rows")
    return places


def _shortened(key: Key) -> str:
    text = key if isinstance(key, str) else " / ".join(key)
    return text if len(text) <= 80 else text[:79] + "…"


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
