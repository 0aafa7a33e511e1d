"""JSON files that any parser reads: plain types only, no NaN, written whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from nlpxfer.errors import ConfigError, NotFiniteError


def plain(value: object, where: str = "report") -> Any:  # noqa: ANN401 - any JSON value
    """`value` in JSON's own types: dataclasses become objects, tuples and arrays lists, NumPy scalars numbers.

    Args:
        value: What to convert.
        where: Name of the place, for errors: `report.metrics.test.loss`.

    Raises:
        NotFiniteError: A number is NaN or infinite; JSON has no word for it.
        ConfigError: A value has no counterpart in JSON.
    """
    if value is None or isinstance(value, (bool, str, int)):
        return value
    if isinstance(value, (np.generic, np.ndarray)):
        return plain(value.tolist(), where)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise NotFiniteError(
                f"{where} is {value}", why="the training diverged; such a score is no result and is not written"
            )
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {_key(key, where): plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    raise ConfigError(f"{where} is a {type(value).__name__}, which JSON cannot hold")


def write_text_whole(path: str | Path, text: str, *, new: bool = False) -> Path:
    """Write UTF-8 text so that a reader finds the old file or the whole new one, never a part.

    Args:
        path: The file; its folder is made if missing.
        text: Its content, with plain newlines.
        new: Never replace a file.

    Raises:
        ConfigError: `new`, and there is one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, new=new) as temporary, temporary.open("x", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    return path


@contextmanager
def replacing(path: Path, *, new: bool = False) -> Iterator[Path]:
    """A temporary name beside `path`, with the same suffix, that takes its place when the block ends well.

    If the block raises, the temporary file is removed and `path` stays as it was.

    Args:
        path: The file.
        new: Never replace a file, also none that appears during the block.

    Raises:
        ConfigError: `new`, and there is one.
    """
    if new:
        require_new(path)
    temporary = path.with_name(f".{secrets.token_hex(6)}.{path.name}")
    try:
        yield temporary
        if new:
            _rename_to_free(temporary, path)
        else:
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def require_new(path: str | Path, option: str = "output_file") -> None:
    """Refuse a file that exists, or a link of its name that leads nowhere.

    Args:
        path: The file.
        option: What names it.

    Raises:
        ConfigError: It exists.
    """
    if os.path.lexists(Path(path).expanduser()):
        raise ConfigError(f"{option}: {path} exists.", fix=f"choose another --{option}, or remove it")


def _rename_to_free(temporary: Path, path: Path) -> None:
    """`os.rename` that replaces nothing: a link to a name that is taken fails, wherever there are hard links."""
    try:
        os.link(temporary, path)
    except OSError:
        require_new(path)
        os.rename(temporary, path)
    else:
        temporary.unlink()


def write_json_whole(path: str | Path, value: object, *, new: bool = False) -> Path:
    """Write plain values as strict, indented JSON in UTF-8, whole or not at all; `new`: as in `write_text_whole`."""
    return write_text_whole(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", new=new)


def write_json_lines_whole(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write one strict JSON object per line in UTF-8, whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, temporary.open("x", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    return path


def _key(key: object, where: str) -> str:
    if isinstance(key, (str, int, float)):
        return str(key)
    raise ConfigError(f"{where} has the key {key!r}, which JSON cannot hold")
