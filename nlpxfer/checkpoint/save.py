"""Save a classifier so that `pipeline("text-classification", folder)` loads it, and never half of it.

All files are written to a hidden folder inside the target and then renamed into place, `config.json` last: a folder
without `config.json` does not load, so an interruption leaves nothing that looks complete. When an older model is
replaced, its `config.json` goes first for the same reason.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from nlpxfer.checkpoint.own_files import (
    STAGING_PREFIX,
    entries_of,
    foreign_paths,
    is_bare,
    is_of_nlpxfer,
    is_unfinished,
    remove_own,
)
from nlpxfer.checkpoint.quiet import quiet_transformers
from nlpxfer.checkpoint.tokenizer import save_tokenizer
from nlpxfer.errors import CheckpointError, LabelError, NoSpaceError, NotFiniteError, OutputExistsError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from nlpxfer.data.schema import LabelSchema

logger = logging.getLogger(__name__)


def save_classifier(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, schema: LabelSchema, folder: str | Path
) -> Path:
    """Write config, weights (safetensors), tokenizer and labels.json to `folder`, all of it or nothing.

    The config gets `id2label`, `label2id` and `problem_type`. `folder` may exist and hold other files (checkpoints/,
    reports); they stay.

    Raises:
        NotFiniteError: A weight is NaN or infinite.
        LabelError: The model has another number of outputs than the schema has names.
        CheckpointError: An adapter or a wrapped model is passed instead of a plain transformers model.
    """
    folder = Path(folder)
    _check_savable(model, schema)
    model.config.id2label = dict(enumerate(schema.names))
    model.config.label2id = {label: index for index, label in enumerate(schema.names)}
    model.config.problem_type = schema.problem_type
    folder.mkdir(parents=True, exist_ok=True)
    _remove_old_staging(folder)
    staging = Path(tempfile.mkdtemp(prefix=STAGING_PREFIX, dir=folder))
    try:
        with quiet_transformers():
            model.save_pretrained(staging)
        save_description(model.config, tokenizer, schema, staging)
        move_staged(staging, folder, last="config.json")
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    logger.info("Saved %s with %d labels.", type(model).__name__, len(schema.names))
    return folder


def save_description(
    config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, schema: LabelSchema, folder: str | Path
) -> None:
    """Write all of a classifier's folder but its weights: config.json, tokenizer files and labels.json."""
    with quiet_transformers():
        config.save_pretrained(folder)
        save_tokenizer(tokenizer, folder)
    schema.save(folder)
    _drop_origin(Path(folder) / "config.json")


def _check_savable(model: PreTrainedModel, schema: LabelSchema) -> None:
    from transformers import PreTrainedModel as PlainModel

    if not isinstance(model, PlainModel):
        raise CheckpointError(
            f"{type(model).__name__} is no plain transformers model.",
            why="It is wrapped (DDP, PEFT, torch.compile).",
            fix="unwrap it, and merge adapters, before saving",
        )
    refuse_not_finite(model)
    outputs = model.config.num_labels
    if outputs != len(schema.names):
        raise LabelError(
            f"The model has {outputs} outputs, the schema {len(schema.names)} names.", available=schema.names
        )


def refuse_not_finite(model: nn.Module) -> None:
    """Raise NotFiniteError, naming the weights, if any is NaN or infinite."""
    bad = [
        name
        for name, value in model.state_dict().items()
        if value.is_floating_point() and not bool(torch.isfinite(value).all())
    ]
    if bad:
        raise NotFiniteError(
            f"{len(bad)} weights are NaN or infinite, so the model is not saved: {', '.join(bad[:5])}.",
            why="The training diverged.",
            fix="lower learning_rate, or train in float32",
        )


def _drop_origin(config_file: Path) -> None:
    """Remove `_name_or_path`, which holds a path of this machine when the parent was a folder."""
    content = json.loads(config_file.read_text(encoding="utf-8"))
    if content.pop("_name_or_path", None) is not None:
        config_file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def move_staged(staging: Path, folder: Path, *, last: str) -> None:
    """Rename the staged files into `folder`: the old file `last` away first, the new one last."""
    config = folder / last
    if config.exists():
        config.unlink()
    for stale in ("model.safetensors.index.json", *(path.name for path in folder.glob("model-*-of-*.safetensors"))):
        if not (staging / stale).exists():
            (folder / stale).unlink(missing_ok=True)
    mode = (staging / last).stat().st_mode  # safetensors' own files can only be read by their owner
    for path in sorted(staging.iterdir(), key=lambda path: (path.name == last, path.name)):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        path.chmod(mode)
        path.replace(folder / path.name)


def _remove_old_staging(folder: Path) -> None:
    for path in folder.glob(STAGING_PREFIX + "*"):
        shutil.rmtree(path, ignore_errors=True)


def check_output_folder(
    folder: str | Path, *, overwrite: bool = False, resume: bool = False, resumable: bool = True
) -> None:
    """Refuse an output folder that may not be used; nothing is made or removed.

    An absent or empty folder may be used, a filled one only with `resume` if it holds an unfinished run, or with
    `overwrite` if nlpxfer wrote all that lies there, in its folders too (`nlpxfer.checkpoint.own_files`), and it is
    not reached through a symbolic link: it may be a home folder or a model's, given by mistake.

    Args:
        folder: The output folder.
        overwrite: Whether what an earlier run wrote may be removed.
        resume: Whether to go on with an unfinished run.
        resumable: Whether runs of this recipe can be resumed, for the message.

    Raises:
        OutputExistsError: The folder is not empty and neither option allows to use it, or it holds foreign files.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise OutputExistsError(f"The output folder {folder} is a file.", fix="choose another --output_dir")
    entries = _entries(folder)
    if not entries or (resume and is_unfinished(folder)):
        return
    if resume:
        raise OutputExistsError(
            f"The output folder {folder} is not empty and holds no unfinished run.",
            why="It is a folder of something else, and a run would write over it.",
            fix="another --output_dir, or an empty one",
            available=[entry.name for entry in entries],
        )
    if not overwrite:
        raise OutputExistsError(
            f"The output folder {folder} is not empty.",
            why="An earlier run wrote to it.",
            fix="another --output_dir, "
            + ("--resume_from_checkpoint true if it was interrupted, " if resumable else "")
            + "or --overwrite",
            available=[entry.name for entry in entries],
        )
    fault, fix = _not_overwritten(folder)
    if fault:
        raise OutputExistsError(f"The output folder {folder} is not overwritten: {fault}.", fix=fix)


def _not_overwritten(folder: Path) -> tuple[str, str]:
    """Why a filled folder may not be emptied, and what helps; two empty strings if it may be."""
    foreign = foreign_paths(folder)
    if folder.is_symlink():
        return "it is a link", "choose another --output_dir"
    if foreign:
        listed = f"it holds {', '.join(foreign[:10])}, which nlpxfer did not write"
        return listed, "move these away, or choose another --output_dir"
    if any(entry.is_file() for entry in folder.rglob("*")) and not is_of_nlpxfer(folder):
        return (
            "nothing in it shows that a run of nlpxfer wrote it",
            "empty it yourself, or choose another --output_dir",
        )
    return "", ""


def ensure_output_folder(folder: str | Path, *, overwrite: bool = False, resume: bool = False) -> Path:
    """Make the output folder ready for a run: make it, or with `overwrite` remove what an earlier run wrote.

    Raises:
        OutputExistsError: See `check_output_folder`.
    """
    folder = Path(folder)
    check_output_folder(folder, overwrite=overwrite, resume=resume)
    folder.mkdir(parents=True, exist_ok=True)
    _remove_old_staging(folder)
    if not resume:
        left = [path for entry in _entries(folder) for path in remove_own(folder, entry.name)]
        if left:
            raise OutputExistsError(f"These files of {folder} could not be removed: {', '.join(left[:10])}.")
    return folder


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep an output folder for this process, until the block or the process ends; no file is left by it.

    Where the file system or the platform knows no locks of folders, nothing is kept.

    Raises:
        OutputExistsError: Another process keeps it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    opened = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(opened)
        raise OutputExistsError(
            f"Another run is writing to the output folder {folder}.", fix="wait for it, or choose another --output_dir"
        ) from error
    except OSError as error:
        logger.debug("%s cannot be locked: %s", folder, error)
    try:
        yield
    finally:
        os.close(opened)


def refuse_inputs_below(folder: Path, inputs: Mapping[str, Sequence[str]]) -> None:
    """Refuse an output folder that holds what the run reads.

    Args:
        folder: The output folder; it need not exist.
        inputs: Option -> paths, or names that are no paths.

    Raises:
        OutputExistsError: Names the options.
    """
    place = folder.expanduser().resolve()

    def is_inside(value: str) -> bool:
        path = Path(value).expanduser()
        return path.exists() and path.resolve().is_relative_to(place)

    inside = [f"--{name}" for name, values in inputs.items() if any(map(is_inside, values))]
    if inside:
        raise OutputExistsError(
            f"The output folder {folder} holds what the run reads: {', '.join(inside)}.",
            why="The run would write over its own input.",
            fix="choose another --output_dir",
        )


def _entries(folder: Path) -> list[Path]:
    """What lies in an output folder, without what a run left that ended before it had written anything else."""
    found = entries_of(folder) if folder.is_dir() else []
    skipped = "checkpoints" if is_bare(folder) else None
    return [entry for entry in found if entry.name != skipped]


def check_free_space(folder: str | Path, needed_bytes: int, *, fix: str = "") -> None:
    """Raise NoSpaceError if the disk of `folder` (or of its nearest existing parent) has less than `needed_bytes`."""
    existing = next(path for path in (Path(folder).absolute(), *Path(folder).absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise NoSpaceError(
            f"The disk of {folder} has {free / 1e9:.2f} GB free; this run writes about {needed_bytes / 1e9:.2f} GB.",
            fix=fix or "free some space, choose another --output_dir, or lower save_total_limit",
        )
