"""Read and write rows of any number in windows: constant memory, order and other columns kept.

Unlike the readers for training (`nlpxfer.data.formats`), which look at the whole file before anything starts, a fault
is found when its row is reached; the error names it, and no output is left.

Columns of parquet stay Arrow data on their way to parquet, so that nothing about them changes.
"""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final, Protocol

from nlpxfer.data.formats import class_names, csv_rows, other_separator, repeated_names, unique_keys
from nlpxfer.data.rows import HALF_CHARACTER, encodable
from nlpxfer.errors import ConfigError, DataError, DataNotFoundError
from nlpxfer.strict_json import replacing

if TYPE_CHECKING:
    import pyarrow as pa

Row = dict[str, Any]
STREAMED: Final = (".csv", ".tsv", ".jsonl", ".parquet")
FIRST_ROWS: Final = 1024
"""Rows of a jsonl file that are asked for the names of their columns."""


@dataclass(frozen=True, eq=False)
class Window:
    """Rows that are read together.

    Attributes:
        rows: Their values; those of a parquet file only in the columns that were asked for.
        table: All columns of a parquet file's rows.
    """

    rows: list[Row]
    table: pa.Table | None = None

    def whole_rows(self) -> list[Row]:
        """The rows with all their columns.

        Raises:
            DataError: Python has no object for a value; names its column.
        """
        return self.rows if self.table is None else _rows_of(self.table, self.table.column_names)


class RowReader:
    """Rows of a csv, tsv, jsonl or parquet file.

    Args:
        path: The file.

    Attributes:
        columns: Names of the columns; None for jsonl, where each row has its own.
        arrow_schema: Types of a parquet file's columns, else None.

    Raises:
        DataNotFoundError: There is no such file.
        DataError: The format is none of these, or the header cannot be used.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        if not self.path.is_file():
            raise DataNotFoundError(f"{self.path} is no file.")
        self.kind = self.path.suffix.lower()
        if self.kind not in STREAMED:
            fix = "write one object per line, and name it .jsonl" if self.kind == ".json" else ""
            raise DataError(f"{self.path} cannot be read row by row.", fix=fix, available=STREAMED)
        if not self.path.stat().st_size:
            raise DataError(f"{self.path} is empty.")
        self.columns: list[str] | None = None
        self.arrow_schema: pa.Schema | None = None
        self.bytes_read = 0
        if self.kind == ".parquet":
            self._open_parquet()
        elif self.kind != ".jsonl":
            self.columns = next((fields for _, fields in self._csv_lines()), [])
            self.bytes_read = 0
        repeated = repeated_names(self.columns or ())
        if repeated:
            raise DataError(f"{self.path} has {repeated}.", fix="name each column otherwise, or remove it")

    @property
    def size(self) -> int:
        """What `bytes_read` comes to at the end."""
        return self.path.stat().st_size

    def names(self) -> list[str]:
        """Names of the columns; of jsonl those of the first rows."""
        if self.columns is not None:
            return list(self.columns)
        return list(dict.fromkeys(name for row in islice(self._jsonl_rows(), FIRST_ROWS) for name in row))

    def class_names(self, column: str) -> dict[str, tuple[str, ...]]:
        """The names of a column's classes, under its name, where it is known to hold class numbers (`ClassLabel`)."""
        import pyarrow as pa

        if self.arrow_schema is None or column not in self.arrow_schema.names:
            return {}
        return class_names(pa.schema([self.arrow_schema.field(column)], metadata=self.arrow_schema.metadata))

    def windows(self, count: int, columns: Sequence[str] | None = None) -> Iterator[Window]:
        """Windows of `count` rows, the last of fewer, in the order of the file.

        Args:
            count: Rows in a window.
            columns: Those whose values are needed. Default: all.

        Raises:
            DataError: A row cannot be read, named with its line; or there is no such column.
        """
        if self.columns is not None:
            for name in columns or ():
                if name not in self.columns:
                    why = other_separator(self.columns)
                    raise DataError(f"{self.path}: there is no column {name}.", why=why, available=self.columns)
        if self.kind == ".parquet":
            for table in self._tables(count):
                yield Window(_rows_of(table, columns or table.column_names), table)
            return
        rows = self._jsonl_rows() if self.kind == ".jsonl" else self._csv_rows()
        while taken := list(islice(rows, count)):
            yield Window(taken)

    def _lines(self) -> Iterator[str]:
        """Lines with their line ends, checked one by one; those of jsonl end with LF, others with CR as well."""
        self.bytes_read = 0
        ends = "\n" if self.kind == ".jsonl" else ""
        # one character for each byte, so that a fault is found in its line
        with self.path.open(encoding="latin-1", newline=ends) as file:
            for number, line in enumerate((text.encode("latin-1") for text in file), start=1):
                self.bytes_read += len(line)
                if b"\0" in line:
                    raise DataError(f"{self.path}, line {number}: holds a NUL byte, which no text has.")
                try:
                    yield line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    byte = line[error.start]
                    raise DataError(
                        f"{self.path}, line {number}: byte 0x{byte:02x} is not valid UTF-8.",
                        why="the file was saved in another encoding, such as Latin-1 or Windows-1252",
                        fix="save the file as UTF-8",
                    ) from None

    def _csv_lines(self) -> Iterator[tuple[int, list[str]]]:
        return csv_rows(self.path, self._lines(), "\t" if self.kind == ".tsv" else ",")

    def _csv_rows(self) -> Iterator[Row]:
        header = self.columns or []
        for index, (line, fields) in enumerate(self._csv_lines()):
            if index == 0:
                continue
            if len(fields) != len(header):
                raise DataError(
                    f"{self.path}, row {index} (line {line}): {len(fields)} fields, the header has {len(header)}.",
                    why="a text that holds the separator or a line break is not quoted",
                    fix='write such a field as "...", with quotes inside it doubled',
                )
            yield dict(zip(header, fields, strict=True))

    def _jsonl_rows(self) -> Iterator[Row]:
        number = 0
        for line_number, line in enumerate(self._lines(), start=1):
            if not line.strip():
                continue
            number += 1
            try:
                row = json.loads(line, object_pairs_hook=unique_keys, parse_float=_number)
            except (ValueError, RecursionError) as error:
                message = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
                raise DataError(
                    f"{self.path}, row {number} (line {line_number}): not valid JSON: {message}."
                ) from None
            if not isinstance(row, dict):
                raise DataError(f"{self.path}, row {number} (line {line_number}): an object is needed.")
            yield row

    def _open_parquet(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            self.arrow_schema = pq.read_schema(self.path)
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"{self.path} cannot be read as parquet: {str(error).splitlines()[0]}") from error
        self.columns = list(self.arrow_schema.names)

    def _tables(self, count: int) -> Iterator[pa.Table]:
        """Tables of `count` rows of a parquet file, the last of fewer, however its rows are grouped."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.bytes_read = 0
        try:
            with pq.ParquetFile(self.path) as file:
                total = max(1, file.metadata.num_rows)
                done, held = 0, file.schema_arrow.empty_table()
                for batch in file.iter_batches(batch_size=min(count, 4096)):
                    held = pa.concat_tables([held, pa.Table.from_batches([batch])])
                    done += len(batch)
                    self.bytes_read = self.size * done // total
                    while len(held) >= count:
                        yield held.slice(0, count)
                        held = held.slice(count)
                if len(held):
                    yield held
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"{self.path} cannot be read as parquet: {str(error).splitlines()[0]}") from error


def _rows_of(table: pa.Table, names: Sequence[str]) -> list[Row]:
    """Rows as Python objects, in some columns. Raises DataError where Python has none for a value."""
    columns = [_values(name, table.column(name)) for name in names]
    return [dict(zip(names, values, strict=True)) for _, *values in zip(range(len(table)), *columns, strict=True)]


def _values(name: str, column: pa.ChunkedArray) -> list[Any]:
    """Python objects; text for times that Python has none for: in nanoseconds, or beyond the year 9999."""
    import pyarrow as pa

    if column.type == pa.time64("ns"):
        column = column.cast(pa.string())
    try:
        return column.to_pylist()  # type: ignore[no-any-return]
    except OverflowError:
        return [_value(name, scalar) for scalar in column]


def _value(name: str, scalar: pa.Scalar) -> Any:  # noqa: ANN401 - any value of a row
    import pyarrow as pa

    try:
        return scalar.as_py()
    except OverflowError:
        with suppress(pa.ArrowNotImplementedError):  # of a list of times
            text: str = scalar.cast(pa.string()).as_py()
            if not text.startswith("<value out of range"):
                return text
        raise DataError(
            f"The column {name} holds a time that only parquet can hold: {scalar.type}, far from our years.",
            fix="--output_file out.parquet",
        ) from None


def _number(text: str) -> float:
    """A JSON number as a double, which is what most programs read it as.

    Raises:
        ValueError: It is beyond all doubles.
    """
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"the number {text} is beyond 1.8e308")
    return number


class RowWriter(Protocol):
    """Takes rows in order."""

    def write(self, window: Window, new: Sequence[Row]) -> None:
        """Append rows, and the new columns of each."""


class _JsonLines:
    def __init__(self, path: Path, source: Path) -> None:
        self.file = path.open("x", encoding="utf-8", newline="\n")
        self.source, self.rows = source, 0

    def write(self, window: Window, new: Sequence[Row]) -> None:
        for row, more in zip(window.whole_rows(), new, strict=True):
            self.rows += 1
            try:
                self.file.write(_json(row | more) + "\n")
            except UnicodeEncodeError:
                where = next(name for name, value in row.items() if not encodable(_json({name: value})))
                shown = repr(where) if encodable(where) else "the name of a column"
                raise DataError(f"{self.source}, row {self.rows}: {shown} {HALF_CHARACTER}.") from None

    def close(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()


def _json(row: Row) -> str:
    try:
        return json.dumps(row, ensure_ascii=False, allow_nan=False, default=str)
    except ValueError:
        return json.dumps(_finite(row), ensure_ascii=False, default=str)


def _finite(value: Any) -> Any:  # noqa: ANN401 - any value of a row
    """The value with null in place of NaN and infinite numbers, which JSON lacks."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


class _LineFeeds:
    """Takes rows of a csv writer that end in CR LF, and ends them in LF.

    The writer of Python before 3.13 quotes a field for a CR or LF in it only if its own line ends hold that.
    """

    def __init__(self, file: IO[str]) -> None:
        self.file = file

    def write(self, row: str) -> None:
        self.file.write(row[:-2] + "\n")


class _Csv(_JsonLines):
    def __init__(self, path: Path, columns: Sequence[str], delimiter: str) -> None:
        self.file = path.open("x", encoding="utf-8", newline="")
        lines = _LineFeeds(self.file)
        self.writer = csv.DictWriter(lines, list(columns), delimiter=delimiter, lineterminator="\r\n")
        self.writer.writeheader()

    def write(self, window: Window, new: Sequence[Row]) -> None:
        self.writer.writerows(row | more for row, more in zip(window.whole_rows(), new, strict=True))


class _Parquet:
    def __init__(self, path: Path, old: pa.Schema, new: Sequence[pa.Field]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.old, self.new = old, new
        self.writer = pq.ParquetWriter(path, pa.schema([*old, *new], metadata=old.metadata))

    def write(self, window: Window, new: Sequence[Row]) -> None:
        import pyarrow as pa

        table = pa.Table.from_pylist(window.rows, schema=self.old) if window.table is None else window.table
        for field in self.new:
            table = table.append_column(field, pa.array([row[field.name] for row in new], field.type))
        self.writer.write_table(table)

    def close(self) -> None:
        self.writer.close()


@contextmanager
def row_writer(path: str | Path, reader: RowReader, new: Mapping[str, type]) -> Iterator[RowWriter]:
    """Write rows to a csv, tsv, jsonl or parquet file, which appears whole at the end or not at all.

    Args:
        path: The file; its ending names the format.
        reader: Where the rows come from; its columns are kept.
        new: Further columns and their types: str, float or bool.

    Raises:
        ConfigError: The format cannot hold the rows, or a new column has the name of an old one; or the file exists,
            perhaps only since the writing began.
    """
    path = Path(path).expanduser()
    kind = path.suffix.lower()
    if kind not in STREAMED:
        raise ConfigError(f"output_file: {path} has no known ending.", available=STREAMED)
    refuse_taken(str(reader.path), reader.columns or (), new)
    if kind != ".jsonl" and reader.columns is None:
        raise ConfigError(
            f"output_file: {path.name} needs the same columns in all rows; {reader.path.name} promises none.",
            fix=f"--output_file {path.with_suffix('.jsonl').name}",
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, new=True) as temporary:
        writer = _writer(temporary, kind, reader, new)
        try:
            yield writer
        finally:
            writer.close()


def refuse_taken(where: str, columns: Iterable[str], new: Iterable[str]) -> None:
    """Refuse new columns whose names are taken.

    Raises:
        ConfigError: Names them, and where they stand.
    """
    if taken := sorted({*new} & {*columns}):
        raise ConfigError(
            f"{where} already has {', '.join(taken)}.", why="the file may be the result of an earlier prediction"
        )


def _writer(path: Path, kind: str, reader: RowReader, new: Mapping[str, type]) -> _JsonLines | _Parquet:
    if kind == ".jsonl":
        return _JsonLines(path, reader.path)
    columns = [*(reader.columns or ()), *new]
    if kind != ".parquet":
        return _Csv(path, columns, "\t" if kind == ".tsv" else ",")
    import pyarrow as pa

    old = reader.arrow_schema or pa.schema([(name, pa.string()) for name in reader.columns or ()])
    types = {str: pa.string(), float: pa.float64(), bool: pa.bool_()}
    return _Parquet(path, old, [pa.field(name, types[kind_of]) for name, kind_of in new.items()])
