"""Verified push of a finished output folder to the Hugging Face Hub.

Chosen over `Trainer.push_to_hub` because that one uploads `training_args.bin` with the token in clear, pushes in the
background where a failure is silent, and cannot be told what to leave at home. Here nothing is sent before the folder
has passed every check; one blocking call uploads a list of exact names; and the push only counts once the files
at the new commit have been read back and equal the local ones.

Exact names, because in an upload pattern `*` matches `/` too: `*.safetensors` would take along `checkpoints/…`.

Each try of the upload first compares the repository with the folder and pins the commit to the head that it saw, so a
commit whose answer was lost is found and not made twice.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, RepoFile, get_token
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented, not re-exported

from nlpxfer.checkpoint.safety import ADAPTER_CONFIG
from nlpxfer.errors import PushError
from nlpxfer.hub.folder import (
    SHARD,
    UPLOADED_FILES,
    WEIGHT_FILES,
    LocalFile,
    digest,
    finished_files,
    pushed_folder,
)
from nlpxfer.hub.patience import LOGIN, Backoff, listed, patiently

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Pushed:
    """A push that was read back: `files` are the names at `commit` that equal the local files byte for byte."""

    repo_id: str
    commit: str
    url: str
    files: tuple[str, ...]


def check_push_request(repo_id: str, *, private: bool = True, api: HfApi | None = None) -> str:
    """Find out before a long run whether its push can work: name, token, namespace, visibility. Writes nothing.

    Args:
        repo_id: `namespace/name`, or `name` alone for the own namespace.
        private: Whether the repository is to be private. An existing public one is then refused.
        api: The client; by default one with the token of `HF_TOKEN` or of `hf auth login`.

    Returns:
        The full id `namespace/name`.

    Raises:
        PushError: The push would fail; says what to type.
    """
    return _check_request(repo_id, private, api or _default_api(), Backoff())


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = True,
    commit_message: str = "Upload model with nlpxfer",
    api: HfApi | None = None,
    backoff: Backoff | None = None,
) -> Pushed:
    """Check a finished output folder, upload it in one commit, and read the commit back.

    Files of an earlier push that this folder no longer has (old shards, say) are deleted in the same commit, so that
    they cannot be loaded in place of the new ones; other files of the repository stay. A folder that the repository
    already holds makes no commit.

    Args:
        folder: An output folder of a recipe, or the adapter in one. A run that left no whole model sends its adapter.
        repo_id: `namespace/name`, or `name` alone for the own namespace. Created when it does not exist.
        private: Whether the repository is to be private. An existing public one is then refused.
        commit_message: First line of the commit.
        api: The client; by default one with the token of `HF_TOKEN` or of `hf auth login`.
        backoff: Tries and pauses when the Hub is busy or the connection drops.

    Raises:
        PushError: The folder may not be sent, the Hub refused, or what it holds afterwards is not what was sent.
    """
    folder = pushed_folder(folder)
    files = finished_files(folder)
    local = {name: digest(path) for name, path in files.items()}
    client = api or _default_api()
    backoff = backoff or Backoff()
    full_id = _check_request(repo_id, private, client, backoff)
    patiently(
        lambda: client.create_repo(full_id, private=private, exist_ok=True), f"Creating {full_id}", full_id, backoff
    )
    commit = patiently(
        lambda: _upload(client, full_id, Path(folder), local, commit_message),
        f"Uploading to {full_id}",
        full_id,
        backoff,
    )
    tree = patiently(lambda: _tree(client, full_id, commit), f"Reading {full_id} back", full_id, backoff)
    differences = _differences(local, tree)
    if differences:
        raise PushError(
            listed(f"{full_id} at commit {commit} does not hold what was sent:", differences),
            why="a file changed while it was sent, a .gitignore in the repository hides it, or storage damaged it",
            fix="push again; files that are already right are not sent twice",
        )
    logger.info("Pushed %d files to %s at commit %s; read back and equal.", len(files), full_id, commit)
    return Pushed(repo_id=full_id, commit=commit, url=f"{client.endpoint}/{full_id}", files=tuple(files))


def _default_api() -> HfApi:
    return HfApi(token=get_token(), library_name="nlpxfer")


def _check_request(repo_id: str, private: bool, api: HfApi, backoff: Backoff) -> str:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise PushError(
            f"{repo_id!r} cannot be the name of a repository on the Hub.",
            why=str(error).split("\n")[0],
            fix="--hub_model_id your-name/your-model",
        ) from error
    token = get_token() if api.token in (None, True) else api.token
    if not token:
        raise PushError("There is no access token for the Hub.", fix=LOGIN)
    user = patiently(lambda: api.whoami(token), "Asking the Hub who the token belongs to", repo_id, backoff)
    full_id = repo_id if "/" in repo_id else f"{user['name']}/{repo_id}"
    _check_rights(full_id, user)
    patiently(lambda: _check_visibility(api, full_id, private), f"Looking for {full_id}", full_id, backoff)
    return full_id


def _check_rights(full_id: str, user: Mapping[str, Any]) -> None:
    """A fine-grained token names its rights and organisations in full only to the Hub: left to the push itself."""
    namespace, name = full_id.split("/")
    role = user.get("auth", {}).get("accessToken", {}).get("role")
    own = [user["name"], *(org["name"] for org in user.get("orgs", []))]
    if role == "read":
        raise PushError(f"The access token of {user['name']} may only read.", fix=LOGIN)
    if role != "fineGrained" and namespace not in own:
        raise PushError(
            f"{user['name']} may not write to {full_id}.",
            why=f"{namespace} is neither that user nor one of its organisations",
            available=own,
            fix=f"--hub_model_id {user['name']}/{name}",
        )


def _check_visibility(api: HfApi, full_id: str, private: bool) -> None:
    """Creating an existing repository again ignores `private`: refuse rather than publish a model by surprise."""
    try:
        is_private = api.model_info(full_id).private
    except RepositoryNotFoundError:
        return
    if private and is_private is False:
        raise PushError(
            f"{full_id} is public, and a private push was asked for.",
            fix="if everybody may see this model, nlpxfer push --public, or of a recipe --hub_private_repo false; "
            "else another --hub_model_id",
        )


def _tree(api: HfApi, full_id: str, revision: str) -> dict[str, RepoFile]:
    entries = api.list_repo_tree(full_id, revision=revision, recursive=True)
    return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}


def _differences(local: Mapping[str, LocalFile], tree: Mapping[str, RepoFile]) -> list[str]:
    """One line for each local file that the tree lacks or holds with another size or content."""
    lines = []
    for name, file in local.items():
        entry = tree.get(name)
        if entry is None:
            lines.append(f"{name} is missing")
        elif entry.size != file.size:
            lines.append(f"{name} has {entry.size} bytes instead of {file.size}")
        elif entry.lfs is not None and entry.lfs.sha256 != file.sha256:
            lines.append(f"{name} has sha256 {entry.lfs.sha256} instead of {file.sha256}")
        elif entry.lfs is None and entry.blob_id != file.blob_sha1:
            lines.append(f"{name} has git id {entry.blob_id} instead of {file.blob_sha1}")
    return lines


def _upload(api: HfApi, full_id: str, folder: Path, local: Mapping[str, LocalFile], message: str) -> str:
    """One try: compare with the head, commit on top of it if they differ, return the commit that holds the files."""
    head = api.model_info(full_id).sha
    tree = _tree(api, full_id, head) if head else {}
    is_adapter = ADAPTER_CONFIG in local
    if tree.keys() & {ADAPTER_CONFIG, "config.json"} - {ADAPTER_CONFIG if is_adapter else "config.json"}:
        other = "a whole model" if is_adapter else "an adapter"
        raise PushError(
            f"{full_id} holds {other}; `from_pretrained` would mix the two up.",
            fix="another --hub_model_id: one repository for each variant",
        )
    ours = {name for name in tree if name in UPLOADED_FILES or name in WEIGHT_FILES or SHARD.fullmatch(name)}
    stale = sorted(ours - local.keys())
    if head and not stale and not _differences(local, tree):
        logger.info("%s already holds these files at commit %s.", full_id, head)
        return head
    if stale:
        logger.info("Deleting files of an earlier push from %s: %s", full_id, ", ".join(stale))
    commit = api.upload_folder(
        repo_id=full_id,
        folder_path=folder,
        allow_patterns=list(local),
        delete_patterns=stale or None,
        commit_message=message,
        parent_commit=head,
    )
    return commit.oid
