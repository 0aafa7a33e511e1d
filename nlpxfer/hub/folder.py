"""What of an output folder may be sent to the Hub, and whether it is ready to be sent. Nothing here uses the network.

The list of names is closed: `training_args.bin` (a pickle that holds the token), optimizer states and `checkpoints/`
are not on it and stay at home, and so does what holds the data's texts or single rows: `predictions/`, `errors.json`,
`errors.md`, `label_errors.jsonl` and `disagreements.jsonl`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import yaml
from huggingface_hub import metadata_load

from nlpxfer.checkpoint.safety import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from nlpxfer.checkpoint.static import HEAD_FILE, MODULES_FILE
from nlpxfer.checkpoint.tokenizer import TOKENIZER_FILES, VOCABULARY_FILES
from nlpxfer.errors import PushError
from nlpxfer.hub.patience import TOKEN, TOKENS_PAGE, listed

REPORT_FILES: Final = frozenset(
    "README.md report.json run.json labels.json calibration.json confusion.png per_class.png".split()
)
STATIC_FILES: Final = frozenset({HEAD_FILE, MODULES_FILE})
UPLOADED_FILES: Final = TOKENIZER_FILES | REPORT_FILES | STATIC_FILES | {"config.json", ADAPTER_CONFIG, "base.json"}
SINGLE_WEIGHTS: Final = "model.safetensors"
WEIGHTS_INDEX: Final = "model.safetensors.index.json"
WEIGHT_FILES: Final = frozenset({SINGLE_WEIGHTS, WEIGHTS_INDEX, ADAPTER_WEIGHTS})
SHARD: Final = re.compile(r"model-\d+-of-\d+\.safetensors")

HOME_PATH: Final = re.compile(
    rb"(?<![\w.-])(?:/(?:home|Users)/[\w.-]+|/root/[\w.-]+|[A-Za-z]:[\\/]+Users[\\/]+[\w.-]+)", re.IGNORECASE
)
HUB_ID: Final = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


@dataclass(frozen=True)
class LocalFile:
    """Size in bytes and the two digests by which the Hub names a file: sha256 when large, git's id when small."""

    size: int
    sha256: str
    blob_sha1: str


def pushed_folder(folder: str | Path) -> Path:
    """The folder that a push sends: the output folder, or its adapter where the run left no whole model."""
    folder = Path(folder)
    inside = folder / "adapter"
    has_model = any((folder / name).is_file() for name in ("config.json", ADAPTER_CONFIG))
    return inside if not has_model and (inside / ADAPTER_CONFIG).is_file() else folder


def finished_files(folder: str | Path) -> dict[str, Path]:
    """The files of a finished output folder that a push may send, by name; nothing is sent.

    Args:
        folder: An output folder of a recipe.

    Returns:
        Name in the repository -> local file, sorted by name. Everything else in the folder stays at home:
        `training_args.bin`, optimizer states, `checkpoints/`, `predictions/`, `errors.json`, `errors.md`,
        `label_errors.jsonl`, `disagreements.jsonl`.

    Raises:
        PushError: The folder is unfinished or damaged, or a text to be sent holds an access token or a path of
            this machine. All faults are listed together.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise PushError(f"There is no folder {folder} to push.", fix="give the --output_dir of a finished run")
    faults: list[str] = []
    names = {*UPLOADED_FILES, *_weight_names(folder, faults)}
    files = {name: folder / name for name in sorted(names) if (folder / name).is_file()}
    faults += _file_faults(folder, files)
    if faults:
        raise PushError(
            listed(f"{folder} is not a finished output folder; nothing was sent:", faults),
            why="the run was interrupted or is still going on, or files were changed by hand",
            fix="run the recipe to its end (an interrupted run continues with --resume_from_checkpoint true)",
        )
    leaks = [f"{name} {leak}" for name, path in files.items() for leak in _leaks(path, folder)]
    if leaks:
        raise PushError(
            listed("Files to be pushed hold secrets or paths of this machine; nothing was sent:", leaks),
            fix="remove these texts from the files; renew a token that was written to disk at " + TOKENS_PAGE,
        )
    return files


def _weight_names(folder: Path, faults: list[str]) -> list[str]:
    """Names of the weight files; appends what is wrong with them to `faults`."""
    if (folder / ADAPTER_CONFIG).is_file():
        faults += _weight_faults(folder / ADAPTER_WEIGHTS)
        return [ADAPTER_WEIGHTS]
    single, index = folder / SINGLE_WEIGHTS, folder / WEIGHTS_INDEX
    if single.is_file() and index.is_file():
        faults.append(f"{SINGLE_WEIGHTS} and {WEIGHTS_INDEX} both exist: which of them is the model?")
        return []
    if not index.is_file():
        faults += _weight_faults(single)
        return [SINGLE_WEIGHTS]
    weight_map = _read_entry(index, "weight_map", faults)
    shards = sorted({str(name) for name in weight_map.values()}) if isinstance(weight_map, dict) else []
    foreign = [name for name in shards if not SHARD.fullmatch(name)]
    if foreign:
        faults.append(f"{WEIGHTS_INDEX} names {foreign[0]!r}, which is no shard of this folder")
        return []
    for name in shards:
        faults += _weight_faults(folder / name)
    return [*shards, WEIGHTS_INDEX]


def _weight_faults(path: Path) -> list[str]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        return [f"{path.name} is missing"]
    try:
        with safe_open(path, framework="numpy"):
            return []
    except SafetensorError as error:
        return [f"{path.name} is cut off or damaged ({error})"]


def _read_entry(path: Path, key: str, faults: list[str]) -> object:
    """The non-empty entry `key` of a JSON object, else None and a fault."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        faults.append(f"{path.name} is not JSON ({error})")
        return None
    entry: object = content.get(key) if isinstance(content, dict) else None
    if not entry:
        faults.append(f"{path.name} holds no {key}")
    return entry


def _file_faults(folder: Path, files: Mapping[str, Path]) -> list[str]:
    """What is wrong with the files beside the weights."""
    needed = {"report.json": "metrics", "README.md": None}
    if ADAPTER_CONFIG in files:
        needed |= {ADAPTER_CONFIG: "peft_type", "base.json": "weights"}
        faults = ["config.json is there too: is it a model or an adapter?"] if "config.json" in files else []
    else:
        needed, faults = {"config.json": "model_type", **needed}, []
    faults += [f"{name} is missing" for name in needed if name not in files]
    for name, key in needed.items():
        if key is not None and name in files:
            _read_entry(files[name], key, faults)
    if not VOCABULARY_FILES & files.keys():
        faults.append("the tokenizer is missing (tokenizer.json, say)")
    if "README.md" in files:
        faults += _card_faults(files["README.md"])
    inside = folder.resolve()
    faults += [f"{name} links to a place outside the folder" for name, path in files.items()
               if inside not in path.resolve().parents]  # fmt: skip
    return faults


def _card_faults(card: Path) -> list[str]:
    """The Hub refuses a card whose base model or data set is a local path: say so before a repository is made."""
    try:
        metadata = metadata_load(card) or {}
    except (ValueError, yaml.YAMLError) as error:
        return [f"{card.name} has a header that cannot be read ({error})"]
    faults = []
    for key in ("base_model", "datasets"):
        entries = metadata.get(key) or []
        for entry in [entries] if isinstance(entries, str) else entries:
            if not HUB_ID.fullmatch(str(entry)):
                faults.append(f"{card.name} names {entry!r} as {key}, which is not an id on the Hub")
    return faults


def _leaks(path: Path, folder: Path) -> Iterator[str]:
    """Where a file to be sent holds a token or a path of this machine; never repeats the token."""
    if path.suffix in (".safetensors", ".png"):
        return
    places = {str(place).encode() for place in (Path.home(), Path.cwd(), folder.resolve()) if len(place.parts) > 2}
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if TOKEN.search(line):
                yield f"line {number}: an access token (hf_…)"
            found = HOME_PATH.search(line)
            local = found.group().decode(errors="replace") if found else ""
            local = local or next((place.decode() for place in places if place in line), "")
            if local:
                yield f"line {number}: the path {local}…"


def digest(path: Path) -> LocalFile:
    """Size and digests of a file, read once in pieces."""
    size = path.stat().st_size
    sha256, sha1 = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            sha256.update(chunk)
            sha1.update(chunk)
    return LocalFile(size=size, sha256=sha256.hexdigest(), blob_sha1=sha1.hexdigest())
