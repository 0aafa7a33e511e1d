"""run.json: what is needed to repeat a run - its options, versions, seeds, and fingerprints of data and parents."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import nlpxfer
from nlpxfer.report.privacy import scrub
from nlpxfer.strict_json import plain, write_json_whole

RUN_FILE: Final = "run.json"
_PACKAGES: Final = (
    "nlpxfer",
    "torch",
    "transformers",
    "datasets",
    "accelerate",
    "peft",
    "evaluate",
    "tokenizers",
    "huggingface_hub",
    "numpy",
    "scikit-learn",
)


def write_run(
    folder: str | Path,
    *,
    recipe: str,
    config: Mapping[str, Any],
    seeds: Sequence[int],
    data_fingerprint: str,
    parents: Mapping[str, Mapping[str, Any]],
    facts: Mapping[str, Any] | None = None,
) -> Path:
    """Write `run.json` into `folder`, whole or not at all, without machine paths and tokens.

    Args:
        folder: The output folder.
        recipe: Name of the method.
        config: All options as they were resolved.
        seeds: Training seeds.
        data_fingerprint: Of the rows, their order and the label schema.
        parents: Role (`model`, `teacher`) -> its name, revision and fingerprint.
        facts: Anything else, such as the number of processes and the device.

    Raises:
        NotFiniteError: A number is NaN or infinite.
        ConfigError: A value has no counterpart in JSON.
    """
    content = {
        "recipe": recipe,
        "config": config,
        "seeds": list(seeds),
        "versions": versions(),
        "data_fingerprint": data_fingerprint,
        "parents": parents,
        "facts": facts or {},
    }
    return write_json_whole(Path(folder) / RUN_FILE, scrub(plain(content, "run")))


def recorded_options(folder: Path | None) -> dict[str, Any]:
    """The options of the training that wrote a model's folder; empty if it does not say."""
    return recorded_run(folder, "config")


def recorded_run(folder: Path | None, *tables: str) -> dict[str, Any]:
    """What `run.json` of a model's folder holds, or a table inside of it; empty if there is none that can be read."""
    try:
        found = {} if folder is None else json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    for name in tables:
        found = found.get(name) if isinstance(found, dict) else None
    return found if isinstance(found, dict) else {}


def versions() -> dict[str, str | None]:
    """Versions of Python, the system and the packages that shape a result; None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "system": platform.system()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = getattr(nlpxfer, "__version__", None) if package == "nlpxfer" else None
    return found
