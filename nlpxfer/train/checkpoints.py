"""Training checkpoints that are verified before a run is resumed from them.

The stock Trainer writes in place and resumes from whatever it finds: with a damaged weight file, a missing optimizer
or another number of processes it trains on, silently different. Here the last file written is a manifest with the size
and sha256 of every other file and with what the run is; a folder without it does not count as a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nlpxfer.errors import ResumeError
from nlpxfer.strict_json import write_json_whole

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
TRAINED_WEIGHTS = "trained.safetensors"
TOPOLOGY = ("processes", "per_device_train_batch_size", "gradient_accumulation_steps")


@dataclass(frozen=True)
class RunIdentity:
    """What makes two runs the same run.

    Attributes:
        facts: Flat values that must be equal: options, data and model fingerprints.
        topology: Processes and batch sizes, which decide which rows a step sees.
    """

    facts: Mapping[str, Any]
    topology: Mapping[str, int]


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file, read in pieces of 4 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def seal(folder: Path, identity: RunIdentity, step: int) -> None:
    """Write the manifest of a finished checkpoint, as its last file."""
    files = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / MANIFEST
    }
    manifest = {"step": step, "facts": dict(identity.facts), "topology": dict(identity.topology), "files": files}
    write_json_whole(folder / MANIFEST, manifest)


def damage(folder: Path) -> str:
    """What is wrong with a checkpoint, or an empty string."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = {name: (found["bytes"], found["sha256"]) for name, found in manifest["files"].items()}
    except FileNotFoundError:
        return "it has no manifest: it was not written to the end"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "its manifest cannot be read"
    for name, (size, digest) in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size or sha256_of(path) != digest:
            return f"{name} was changed after it was written"
    return ""


def newest_verified(folder: Path, identity: RunIdentity, *, allow_topology_change: bool = False) -> Path | None:
    """The newest undamaged checkpoint under `folder`; None if there is no checkpoint at all.

    Damaged ones are skipped, and a warning says which and why; so are those that were not written to the end, which
    are no checkpoints yet.

    Raises:
        ResumeError: All checkpoints are damaged, or the newest belongs to another run or topology.
    """
    found = [path for path in folder.glob("checkpoint-*") if path.is_dir() and path.name[11:].isdecimal()]
    candidates = sorted(found, key=lambda path: int(path.name[11:]), reverse=True)
    for candidate in candidates:
        fault = damage(candidate) or _not_resumable(candidate)
        if not fault:
            require_same_run(candidate, identity, allow_topology_change)
            return candidate
        logger.warning("skipping %s: %s", candidate.name, fault)
    whole = [candidate for candidate in candidates if (candidate / MANIFEST).exists()]
    if whole:
        raise ResumeError(
            f"None of the {len(whole)} checkpoints in {folder.name} can be trusted.",
            fix="start anew: --overwrite",
        )
    return None


def _not_resumable(folder: Path) -> str:
    has_optimizer = any(path.name.startswith("optimizer") for path in folder.iterdir())
    return "" if has_optimizer else "it holds no optimizer state (save_only_model)"


def require_same_run(folder: Path, identity: RunIdentity, allow_topology_change: bool) -> None:
    """Refuse a sealed folder that belongs to another run.

    Raises:
        ResumeError: Lists what differs.
    """
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    facts = json.loads(json.dumps(dict(identity.facts)))
    changed = [
        f"{key}: was {manifest['facts'].get(key)!r}, is {facts.get(key)!r}"
        for key in sorted({*facts, *manifest["facts"]})
        if facts.get(key) != manifest["facts"].get(key)
    ]
    if changed:
        raise ResumeError(
            f"{folder.name} belongs to another run:\n  - " + "\n  - ".join(changed),
            fix="repeat the options of the interrupted run, or start anew: --overwrite",
        )
    moved = [
        f"{key}: was {manifest['topology'].get(key)}, is {identity.topology.get(key)}"
        for key in TOPOLOGY
        if manifest["topology"].get(key) != identity.topology.get(key)
    ]
    if moved and not allow_topology_change:
        raise ResumeError(
            f"{folder.name} was trained with other processes or batches, so rows would be seen twice or never:\n  - "
            + "\n  - ".join(moved),
            fix="start as before, or accept it with --allow_topology_change",
        )


def save_trained(model: nn.Module, folder: Path) -> None:
    """Write the weights that learn, by name: all that a checkpoint needs of a model whose other weights are frozen.

    Not in peft's format, which keeps of a learnt prompt only what its encoder made of it: no run can go on from that.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    trained = {name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}
    save_file(trained, folder / TRAINED_WEIGHTS)


@torch.no_grad()
def load_trained_(model: nn.Module, folder: Path) -> None:
    """Read back what `save_trained` wrote.

    Raises:
        ResumeError: The file holds other weights than those that learn.
    """
    from safetensors.torch import load_file

    stored = load_file(folder / TRAINED_WEIGHTS)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    differing = sorted(stored.keys() ^ trained.keys())
    if differing:
        raise ResumeError(f"{folder.name} holds other weights than those that learn: {', '.join(differing[:4])}.")
    for name, parameter in trained.items():
        parameter.copy_(stored[name])
