"""The readers of the file formats: csv, tsv, json, jsonl, parquet, and txt for texts without labels.

Values stay as they are written: nothing becomes a null ("N/A", "None") or a number ("007") in csv and tsv. The
standard library's readers are used instead of pandas or `load_dataset`, because they know the line on which a row
starts, refuse rows that do not fit the header, and cache nothing on disk. Quoting in csv and tsv: a field that starts
with `"` ends with `"`, and a quote inside it is doubled. Lines end with LF, CR LF or CR. A blank line is left out, but
between rows of one column it is a row whose field is empty.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from nlpxfer.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

LOGGER = logging.getLogger(__name__)
SHOWN_FAULTS: Final = 5
MAX_FIELD: Final = 2**31 - 1
_FIELD_LIMITS: Final[list[int]] = []
"""csv's limit as each reader found it that is reading now."""
_FIELD_LIMITS_LOCK: Final = threading.RLock()  # a reader may be dropped while another begins


@dataclass
class Raw:
    """What a format's reader hands back: the header, and the values by column."""

    names: list[str]
    columns: dict[str, list[Any]]
    lines: list[int] | None = None
    class_names: dict[str, tuple[str, ...]] = field(default_factory=dict)


def list_faults(source: str, faults: Sequence[str], *, count: int | None = None) -> str:
    """One message for all faults of one file; the first five are spelled out."""
    total = len(faults) if count is None else count
    if total == 1:
        return f"{source}, {faults[0]}."
    more = [f"and {total - SHOWN_FAULTS} more"] if total > SHOWN_FAULTS else []
    return "\n  - ".join([f"{source} has {total} faults:", *faults[:SHOWN_FAULTS], *more])


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error
    if not data.strip():
        raise DataError(f"{path} is empty.")
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(f"{path}, line 1: UTF-16 was found, UTF-8 is needed.", fix="save the file as UTF-8")
    zero = data.find(b"\0")
    if zero >= 0:
        raise DataError(
            f"{path}, line {_line(data, zero)}: holds a NUL byte, which no text has.",
            why="the file is binary, UTF-16, or was cut off while being written",
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        offset = error.start + (3 if data[:3] == b"\xef\xbb\xbf" else 0)
        raise DataError(
            f"{path}, line {_line(data, offset)}: byte 0x{byte:02x} is not valid UTF-8.",
            why="the file was saved in another encoding, such as Latin-1 or Windows-1252",
            fix="save the file as UTF-8",
        ) from None


def _line(data: bytes, offset: int) -> int:
    return len(data[:offset].replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n"))


def _read_csv(path: Path, columns: Sequence[str]) -> Raw:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    rows: list[list[str]] = []
    lines: list[int] = []
    faults: list[str] = []
    header: list[str] = []
    for line, fields in csv_rows(path, io.StringIO(_read_text(path), newline=""), delimiter):
        if not header:
            header = fields
            continue
        rows.append(fields)
        lines.append(line)
        if len(fields) != len(header):
            faults.append(f"row {len(rows)} (line {line}): {len(fields)} fields where the header has {len(header)}")
    if faults:
        raise DataError(
            list_faults(str(path), faults),
            why="a text that holds the separator or a line break is not quoted",
            fix="" if other_separator(header) else 'write such a field as "...", with quotes inside it doubled',
        )
    places = {name: header.index(name) for name in columns if name in header}
    return Raw(header, {name: [row[place] for row in rows] for name, place in places.items()}, lines)


@contextmanager
def _long_fields() -> Iterator[None]:
    """Let csv read fields over 128 KiB: a limit of the process, put back after the last file that is being read."""
    with _FIELD_LIMITS_LOCK:
        _FIELD_LIMITS.append(csv.field_size_limit(MAX_FIELD))
    try:
        yield
    finally:
        with _FIELD_LIMITS_LOCK:
            if len(_FIELD_LIMITS) > 1:
                _FIELD_LIMITS.pop()  # never the first, which is the limit that others know
            else:
                csv.field_size_limit(_FIELD_LIMITS.pop())


def csv_rows(path: Path, lines: Iterable[str], delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yield (line on which it starts, fields) for each row, the header included.

    Blank lines are none, but between rows of one column they are rows with an empty field.

    Args:
        path: For messages.
        lines: Lines with their line ends.
        delimiter: Between fields.

    Raises:
        DataError: A quote is not doubled or not closed; names the row and its line.
    """
    with _long_fields():
        line, row = 1, -1
        one_column, header = False, [""]
        blank_lines: list[int] = []
        try:
            reader = csv.reader(lines, delimiter=delimiter, strict=True)
            for fields in reader:
                if fields:
                    row += 1 + len(blank_lines)
                    yield from ((blank, [""]) for blank in blank_lines)
                    yield line, fields
                    header, blank_lines = (fields if row == 0 else header), []
                    one_column = len(header) == 1
                elif one_column:
                    blank_lines.append(line)
                line = reader.line_num + 1
        except csv.Error as error:
            raise DataError(
                f"{path}, {f'row {row + 1}' if row >= 0 else 'the header'} (line {line}) cannot be read: {error}.",
                why=other_separator(header)
                or "a quote that is part of the text is not doubled, or a quoted field is not closed",
                fix="" if other_separator(header) else 'write such a field as "...", with quotes inside it doubled',
            ) from error


def repeated_names(names: Sequence[str]) -> str:
    """What is wrong with a header in which names stand more than once; empty where none does.

    >>> repeated_names(["a", "", "b", "a", ""])
    "more than one column named 'a', and 2 columns without a name"
    """
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    named = [repr(name) for name in twice if name]
    nameless = [f"{names.count('')} columns without a name"] if "" in twice else []
    return ", and ".join([f"more than one column named {', '.join(named)}"] * bool(named) + nameless)


def other_separator(names: Sequence[str]) -> str:
    """What to say where the fields of a csv or tsv file seem to be separated by something else, else nothing."""
    lone = names[0] if len(names) == 1 else ""
    mark = next((mark for mark in (";", "\t", "|", ",") if mark in lone), "")
    return f"its fields are separated by {mark!r}; .csv needs ',' and .tsv needs a tab" if mark else ""


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, as `json.loads` hands its pairs over; ValueError where a key stands twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise _DuplicateKeyError(next(name for name in names if names.count(name) > 1))
    return found


class _DuplicateKeyError(ValueError):
    """One JSON object holds a key twice."""

    def __init__(self, key: str) -> None:
        super().__init__(f"the key {key!r} stands twice in one object")


def _read_json(path: Path, columns: Sequence[str]) -> Raw:
    try:
        rows = json.loads(_read_text(path), object_pairs_hook=unique_keys)
    except json.JSONDecodeError as error:
        why = "the file holds one object per line" if error.msg == "Extra data" else ""
        fix = f"rename it to {path.with_suffix('.jsonl').name}" if why else ""
        raise DataError(f"{path}, line {error.lineno}: not valid JSON: {error.msg}.", why=why, fix=fix) from None
    except (ValueError, RecursionError) as error:  # a key that stands twice, a number of thousands of digits
        raise DataError(f"{path}: {error}.") from None
    if not isinstance(rows, list):
        raise DataError(f"{path} holds one {_kind(rows)}, an array of objects is needed.", fix='[{"text": ...}, ...]')
    if not rows:
        raise DataError(f"{path} has no rows.")
    return _from_objects(path, rows, None, columns, [])


def _read_jsonl(path: Path, columns: Sequence[str]) -> Raw:
    rows: list[Any] = []
    lines: list[int] = []
    faults: list[str] = []
    # Not splitlines(): a JSON text may hold U+2028 and other marks that it would split at.
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        lines.append(number)
        try:
            rows.append(json.loads(line, object_pairs_hook=unique_keys))
        except (ValueError, RecursionError) as error:
            message = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            faults.append(f"row {len(lines)} (line {number}): not valid JSON: {message}")
            rows.append({})
    return _from_objects(path, rows, lines, columns, faults)


def _from_objects(
    path: Path, rows: list[Any], lines: list[int] | None, columns: Sequence[str], faults: list[str]
) -> Raw:
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            place = f"row {index + 1}" + (f" (line {lines[index]})" if lines else "")
            faults.append(f"{place}: holds one {_kind(row)}, an object is needed")
    if faults:
        fix = "one object per line" if lines else ""
        if lines and len(faults) == len(rows):
            fix = f"rename it to {path.with_suffix('.json').name} if the file is one array"
        raise DataError(list_faults(str(path), faults), fix=fix)
    names = list(dict.fromkeys(name for row in rows for name in row))
    return Raw(names, {name: [row.get(name) for row in rows] for name in columns if name in names}, lines)


def _kind(value: object) -> str:
    return {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}.get(
        type(value), "number"
    )


def _read_parquet(path: Path, columns: Sequence[str]) -> Raw:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.stat().st_size:
        raise DataError(f"{path} is empty.")
    try:
        with pq.ParquetFile(path) as file:
            names = list(file.schema_arrow.names)
            unique = [name for name in columns if names.count(name) == 1]
            table = file.read(columns=unique)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} cannot be read as parquet: {str(error).splitlines()[0]}") from error
    columns_read = {name: table.column(name).to_pylist() for name in unique}
    return Raw(names, columns_read, class_names=class_names(table.schema))


def class_names(schema: pa.Schema) -> dict[str, tuple[str, ...]]:
    """The names of the classes of each column of class numbers (`ClassLabel`), or of lists of them, in their order.

    None where the file says what its columns hold in a way that `datasets` cannot read.
    """
    from datasets import ClassLabel, Features

    try:
        features = Features.from_arrow_schema(schema)
    except (KeyError, TypeError, ValueError) as error:
        if b"huggingface" in (schema.metadata or {}):
            LOGGER.warning("names of class numbers, if there are any, cannot be read: %s", str(error).splitlines()[0])
        return {}
    kinds = {name: getattr(kind, "feature", kind) for name, kind in features.items()}
    return {name: tuple(kind.names) for name, kind in kinds.items() if isinstance(kind, ClassLabel)}


def read_txt(path: Path, columns: Sequence[str]) -> Raw:
    """Read one text per line into the first of the columns; blank lines are left out."""
    texts: list[str] = []
    lines: list[int] = []
    if len(columns) > 1:
        raise DataError(
            f"{path}: a .txt file has one text per line, but text pairs are asked for.", fix="csv or jsonl"
        )
    every = _read_text(path).split("\n")
    for number, line in enumerate(every, start=1):
        if line.strip():
            texts.append(line.rstrip("\r"))
            lines.append(number)
    blank = len(every) - len(texts) - (not every[-1])
    if blank:
        LOGGER.info("%s: %d blank lines left out", path, blank)
    return Raw([columns[0]], {columns[0]: texts}, lines)


READERS: Final[dict[str, Callable[[Path, Sequence[str]], Raw]]] = {
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
