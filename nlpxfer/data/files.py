"""One data file or split as a table of columns: found, of a known format, with rows and the columns asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nlpxfer.data.formats import READERS, Raw, other_separator, read_txt, repeated_names
from nlpxfer.errors import DataError, DataNotFoundError, nearest


@dataclass(frozen=True, kw_only=True)
class Table:
    """Some columns of one file or of one split of a Hub dataset.

    Args:
        source: How errors name it (the path as it was given).
        name: How reports name it (no folder).
        columns: Column name to values, all of one length.
        lines: The line on which each row starts, where known.
        class_names: For columns that hold class numbers with names (`ClassLabel`), the names in their order.
    """

    source: str
    name: str
    columns: Mapping[str, list[Any]]
    lines: Sequence[int] | None = None
    class_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def place(self, index: int) -> str:
        """Name row `index` (from 0) as people count: 'row 3 (line 4)'."""
        return f"row {index + 1}" + (f" (line {self.lines[index]})" if self.lines is not None else "")


def read_table(path: str | Path, columns: Sequence[str], *, texts_only: bool = False) -> Table:
    """Read the named columns of a data file.

    Args:
        path: The file; its extension gives the format.
        columns: The columns to read. A .txt file has one, which takes the first of these names.
        texts_only: Whether .txt (one text per line, blank lines left out) is accepted.

    Raises:
        DataNotFoundError: No such file; names the nearest one in its folder.
        DataError: Unknown extension, no rows, NUL bytes, broken UTF-8, rows that do not parse, duplicate or missing
            columns.
    """
    path = Path(path)
    raw = read_some_columns(path, columns, needed=columns, texts_only=texts_only)
    wanted = {name: raw.columns[name] for name in columns}
    named = {name: raw.class_names[name] for name in columns if name in raw.class_names}
    return Table(source=str(path), name=path.name, columns=wanted, lines=raw.lines, class_names=named)


def read_some_columns(
    path: Path,
    columns: Sequence[str],
    *,
    needed: Sequence[str],
    texts_only: bool = False,
    fix: str = "--text_column and --label_column name the columns",
) -> Raw:
    """Read those of the named columns that a data file has; it must have the needed ones, else `fix` is advised.

    See `read_table`.
    """
    _check_exists(path)
    raw = _reader_for(path, texts_only=texts_only)(path, columns)
    _check_columns(path, raw, needed, fix)
    if not raw.columns[needed[0]]:
        raise DataError(f"{path} has no rows.", why="only the header was written")
    return raw


def _reader_for(path: Path, *, texts_only: bool) -> Callable[[Path, Sequence[str]], Raw]:
    readers = {**READERS, ".txt": read_txt} if texts_only else READERS
    extension = path.suffix.lower()
    if extension not in readers:
        why = "a .txt file holds no labels: only unlabelled texts may stand in one" if extension == ".txt" else ""
        raise DataError(
            f"{path} has the extension {extension!r}, which is not a known format."
            if extension
            else f"{path} has no extension, so that its format is not known.",
            why=why,
            fix="rename or convert the file",
            available=sorted(readers),
        )
    return readers[extension]


def _check_exists(path: Path) -> None:
    if path.is_file():
        return
    if path.is_dir():
        raise DataNotFoundError(f"{path} is a folder, not a file.", fix=f"--dataset_name {path}")
    if not path.parent.is_dir():
        raise DataNotFoundError(f"{path} does not exist: there is no folder {path.parent}.")
    names = sorted(item.name for item in path.parent.iterdir() if item.is_file())
    close = nearest(path.name, names)
    raise DataNotFoundError(
        f"{path} does not exist.",
        fix=str(path.with_name(close)) if close else "",
        available=[name for name in names if Path(name).suffix.lower() in {*READERS, ".txt"}],
    )


def _check_columns(path: Path, raw: Raw, wanted: Sequence[str], fix: str) -> None:
    repeated = repeated_names(raw.names)
    if repeated:
        raise DataError(f"{path} has {repeated}.", fix="name each column otherwise, or remove it")
    missing = [name for name in wanted if name not in raw.columns]
    if not missing:
        return
    close = {name: nearest(name, raw.names) for name in missing}
    hints = [f"{close[name]!r} in place of {name!r}" for name in missing if close[name]]
    raise DataError(
        f"{path} has no column {', '.join(map(repr, missing))}.",
        why=other_separator(raw.names),
        fix=", ".join(hints) or fix,
        available=raw.names,
    )
