"""Which files of an output folder nlpxfer wrote: nothing else in it is ever removed.

A file counts as nlpxfer's where its whole path is one that a run writes, or where the manifest of a checkpoint lists
it; a link never does. Names alone say little (`config.json` and `README.md` lie in every model's folder), so a folder
is emptied only if one of its files shows by its content that nlpxfer wrote there: `is_of_nlpxfer`.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from nlpxfer.checkpoint.tokenizer import TOKENIZER_FILES
from nlpxfer.strict_json import write_json_whole

OWN_FILES: Final = TOKENIZER_FILES | frozenset(
    {
        "config.json",
        "calibration.json",
        "disagreements.jsonl",
        "generation_config.json",
        "head.safetensors",
        "ladder.json",
        "ladder.md",
        "pareto.png",
        "model.safetensors",
        "model.safetensors.index.json",
        "modules.json",
        "labels.json",
        "README.md",
        "report.json",
        "run.json",
        "confusion.png",
        "per_class.png",
        "errors.json",
        "errors.md",
        "label_errors.jsonl",
        "transfer_curve.png",
    }
)
"""What a run writes into its output folder itself; the shards of a large model are further ones."""
OWN_FOLDERS: Final = frozenset({"adapter", "checkpoints", "int8", "onnx", "predictions", "teacher", "tensorboard"})
"""What it makes there; each holds certain files only."""
UNFINISHED_FILE: Final = "checkpoints/unfinished.json"
"""The first file of a run, which says whose `checkpoints` is; it goes with it when the run is finished."""
STAGING_PREFIX: Final = ".nlpxfer-staging-"

_BUNDLE: Final = {"adapter_config.json", "adapter_model.safetensors", "base.json"}
_ONNX: Final = {"export.json", "model.onnx", "model.onnx.data", "model_int8.onnx", "model_int8.onnx.data"}


def _one_of(names: set[str] | frozenset[str]) -> str:
    return "(?:" + "|".join(re.escape(name) for name in sorted(names)) + r"|model-\d+-of-\d+\.safetensors)"


_MODEL: Final = _one_of(OWN_FILES | _BUNDLE | _ONNX)
_TRAINING: Final = (
    r"(?:optimizer\.(?:pt|bin)|scheduler\.pt|scaler\.pt|rng_state(?:_\d+)?\.pth|trainer_state\.json|training_args\.bin"
    r"|trained\.safetensors|average\.safetensors|cost\.json|preflight\.json|arm\.json|manifest\.json"
    r"|\.tmp[0-9A-Za-z]{6}"  # what safetensors writes before it is renamed
    r"|pytorch_model_fsdp\.bin|(?:pytorch_model_fsdp|optimizer)_\d+/(?:\.metadata|__\d+_\d+\.distcp))"
)
_PATHS: Final = re.compile(
    "|".join(
        (
            _one_of(OWN_FILES),
            rf"(?:adapter|int8|onnx|teacher)/{_MODEL}",
            r"predictions/(?:(?:validation|test|out_of_fold)\.jsonl|\.(?:validation|test)\.jsonl\.tmp)",
            r"tensorboard/[^/]+/events\.out\.tfevents\.[^/]+",
            re.escape(UNFINISHED_FILE),
            r"checkpoints/search/(?:manifest\.json|study\.log[^/]*)",
            r"checkpoints/ladder/search/(?:manifest|ladder)\.json",
            rf"checkpoints/int8/(?:[^/]+/)+{_MODEL}",
            r"checkpoints/(?:[^/]+-\d+|search/trial-\d+|ladder/[^/]+)/(?:checkpoint-\d+|finished)/(?:adapter/)?"
            rf"(?:{_MODEL}|{_TRAINING})",
            r"checkpoints/[^/]+-\d+/emissions\.csv",
            rf"(?:.*/)?{re.escape(STAGING_PREFIX)}[^/]+/.*",
        )
    )
)
_TEMPORARY: Final = re.compile(r"(?:(?<=/)|^)\.[0-9a-f]{12}\.(?=[^/]+$)")
"""What the name of a file has while it is written."""

_SEAL: Final = frozenset({"step", "facts", "topology", "files"})
_TELLING: Final = {
    "run.json": {"recipe", "config"},
    "report.json": {"recipe", "arms"},
    "labels.json": {"schema_version", "problem_type", "names"},
    "teacher/labels.json": {"schema_version", "problem_type", "names"},
    "ladder.json": {"target", "chosen", "tried"},
    UNFINISHED_FILE: {"schema_version", "recipe"},
}
"""Files of which nlpxfer's can be told by their keys."""


def foreign_paths(folder: Path) -> list[str]:
    """Paths in an output folder that nlpxfer did not write, sorted; a whole foreign folder is one of them."""
    sealed = _sealed_paths(folder)
    found = []
    for entry in entries_of(folder):
        if entry.is_dir() and not entry.is_symlink() and entry.name not in OWN_FOLDERS:
            found.append(entry.name)
        else:
            found += [path for path in _paths(folder, entry) if not _is_own(folder, path, sealed)]
    return found


def is_of_nlpxfer(folder: Path) -> bool:
    """Whether a file in a folder shows by its content that nlpxfer wrote there."""
    return any(_is_telling(folder, name) for name in _TELLING) or bool(_sealed_paths(folder))


def is_unfinished(folder: Path) -> bool:
    """Whether a folder holds a run that was begun and not finished: the mark of one, or a sealed checkpoint."""
    return _is_telling(folder, UNFINISHED_FILE) or bool(_sealed_paths(folder))


def mark_unfinished(folder: Path, recipe: str) -> None:
    """Write the mark of a run that begins."""
    write_json_whole(folder / UNFINISHED_FILE, {"schema_version": 1, "recipe": recipe})


def unfinished_recipe(folder: Path) -> str | None:
    """The recipe of the mark of a run that was begun; None without a mark."""
    return _content(folder / UNFINISHED_FILE).get("recipe")


def is_bare(folder: Path) -> bool:
    """Whether `checkpoints` of an output folder holds the mark of a run, and no other file or link."""
    place = folder / "checkpoints"
    if place.is_symlink() or not _is_telling(folder, UNFINISHED_FILE):
        return False
    return list(_paths(folder, place)) == [UNFINISHED_FILE]


def remove_own(folder: Path, below: str) -> list[str]:
    """Remove what nlpxfer wrote at or below a place in an output folder, and the folders that are empty then.

    Returns:
        What stays, because it is somebody else's or cannot be removed.
    """
    sealed = _sealed_paths(folder)
    kept = []
    for path in _paths(folder, folder / below):
        if not (_is_own(folder, path, sealed) and _is_removed(folder / path)):
            kept.append(path)
    _remove_empty(folder / below)
    return kept


def _is_removed(file: Path) -> bool:
    """Whether a file could be removed."""
    try:
        file.unlink()
    except OSError:
        return False
    return True


def entries_of(folder: Path) -> list[Path]:
    """What lies in an output folder, sorted, without what was being written when a run was killed."""
    return [entry for entry in sorted(folder.iterdir()) if not entry.name.startswith(STAGING_PREFIX)]


def _paths(folder: Path, place: Path) -> Iterator[str]:
    """The files and links at or below a place in a folder, as paths from that folder; links are not followed."""
    if place.is_dir() and not place.is_symlink():
        for entry in sorted(place.iterdir()):
            yield from _paths(folder, entry)
    elif place.is_symlink() or place.exists():
        yield place.relative_to(folder).as_posix()


def _is_own(folder: Path, path: str, sealed: set[str]) -> bool:
    if (folder / path).is_symlink():
        return False
    return path in sealed or _PATHS.fullmatch(_TEMPORARY.sub("", path)) is not None


def _is_telling(folder: Path, name: str) -> bool:
    return _TELLING[name] <= _content(folder / name).keys()


def _sealed_paths(folder: Path) -> set[str]:
    """The files that manifests of checkpoints list, and these manifests, as paths from the output folder."""
    found = set()
    if not (folder / "checkpoints").is_symlink():
        for manifest in (folder / "checkpoints").glob("**/manifest.json"):
            content = _content(manifest)
            if content.keys() >= _SEAL and isinstance(content["files"], dict):
                place = manifest.parent.relative_to(folder).as_posix()
                found |= {f"{place}/{name}" for name in (*content["files"], manifest.name)}
    return found


def _content(file: Path) -> dict[str, Any]:
    """What a JSON file holds; nothing if it is absent or no JSON object."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _remove_empty(folder: Path) -> None:
    """Remove a folder if no file lies below it, else the folders in it for which that holds."""
    if folder.is_symlink() or not folder.is_dir():
        return
    for entry in folder.iterdir():
        _remove_empty(entry)
    if not any(folder.iterdir()):
        with contextlib.suppress(OSError):
            folder.rmdir()
