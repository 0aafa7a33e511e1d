"""Take machine paths and tokens out of whatever is about to be published.

A path under the working folder becomes relative to it; any other absolute path keeps its last part only. Tokens go in
any case, wherever they stand.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Final

REMOVED: Final = "<removed>"
_TOKEN: Final = re.compile(r"\b(?:hf|api_org|oauth)_[A-Za-z0-9]{12,}|\bhf_jwt_[\w.-]+|\beyJ[\w-]+\.[\w-]+\.[\w-]+")
_LOGIN: Final = re.compile(r"(?<=://)[^/\s@]+@")
_SECRET_KEY: Final = re.compile(
    r"(?:(?:hub|hf|auth|access|use_auth)_)?token|.*(?:password|secret|api_key)", re.IGNORECASE
)
_REST: Final = r"[^\s'\"<>|,;:)\]}`]*"


def scrub(value: Any, *, known_folders_only: bool = False) -> Any:  # noqa: ANN401 - any JSON value
    """A copy of plain JSON values (keys too) without machine paths and tokens.

    A text under a key such as `hub_token` is removed whole.

    Args:
        value: Any JSON value.
        known_folders_only: See `scrub_text`.

    >>> scrub({"hub_token": "abc", "train_file": "/some/where/train.csv", "note": "with hf_abcdefghijklmnop"})
    {'hub_token': '<removed>', 'train_file': 'train.csv', 'note': 'with <removed>'}
    """
    if isinstance(value, str):
        return scrub_text(value, known_folders_only=known_folders_only)
    if isinstance(value, Mapping):
        cleaned = {}
        for key, item in value.items():
            secret = isinstance(item, str) and _SECRET_KEY.fullmatch(str(key))
            name = scrub_text(str(key), known_folders_only=known_folders_only)
            cleaned[name] = REMOVED if secret else scrub(item, known_folders_only=known_folders_only)
        return cleaned
    if isinstance(value, (list, tuple)):
        return [scrub(item, known_folders_only=known_folders_only) for item in value]
    return value


def scrub_text(text: str, *, known_folders_only: bool = False) -> str:
    """`text` without machine paths and tokens.

    A text that is nothing but an absolute path is cut whatever folder it names, unless `known_folders_only` is set
    (for values that may be label names, such as `/r/books`). Inside a longer text, paths are known by the working
    folder, the home folder and the folder of temporary files.
    """
    text = _LOGIN.sub("", _TOKEN.sub(REMOVED, text))
    if "/" not in text and "\\" not in text:
        return text
    if not known_folders_only and _is_absolute(text):
        return _shortened(text)
    for root in _roots():
        pattern = rf"(?:file://)?(?<![\w.-]){re.escape(root)}(?![\w.-]){_REST}"
        text = re.sub(pattern, lambda match: _shortened(match.group()), text)
    return re.sub(rf"(?<![\w/.~-])~[\w.-]*/{_REST}", lambda match: _shortened(match.group()), text)


def _is_absolute(text: str) -> bool:
    if "\n" in text or len(text) > 4096:
        return False
    if re.match(r"[A-Za-z]:[\\/]|\\\\\w", text):
        return True
    return bool(re.match(r"(?:file://)?/[^\s/]+/|~[\w.-]*/", text)) or text in _roots()


def _shortened(path: str) -> str:
    """Relative to the working folder if it lies there, else its last part."""
    path = path.removeprefix("file://")
    if re.match(r"[A-Za-z]:|\\\\", path):
        return PureWindowsPath(path).name or REMOVED
    for folder in _both_names(Path.cwd()):
        if path == folder:
            return "."
        if path.startswith(f"{folder}/") and ".." not in PurePosixPath(path).parts:
            return str(PurePosixPath(path).relative_to(folder))
    if path.rstrip("/") in _roots() or path in ("~", "~/"):
        return REMOVED
    return PurePosixPath(path).name


def _roots() -> list[str]:
    """Folders that name the machine, the deepest first."""
    known = (Path.cwd(), Path.home(), Path(tempfile.gettempdir()))
    folders = {name for folder in known for name in _both_names(folder)}
    return sorted((folder for folder in folders if len(Path(folder).parts) > 1), key=len, reverse=True)


def _both_names(folder: Path) -> list[str]:
    """As it was given, and with links followed."""
    return list(dict.fromkeys([str(folder), str(folder.resolve())]))
