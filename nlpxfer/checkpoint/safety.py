"""Check a checkpoint folder before anything in it is loaded: complete, safetensors only, no remote code, no way out.

Nothing is unpickled and no code of a checkpoint is ever run; weights are opened only as far as their header.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, Final

from nlpxfer.checkpoint.adapter_kinds import PEFT_TYPES
from nlpxfer.errors import CheckpointError, CheckpointNotFoundError, UnsafeCheckpointError

logger = logging.getLogger(__name__)

WEIGHTS: Final = "model.safetensors"
WEIGHTS_INDEX: Final = "model.safetensors.index.json"
ADAPTER_CONFIG: Final = "adapter_config.json"
ADAPTER_WEIGHTS: Final = "adapter_model.safetensors"
_PICKLED: Final = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5", "*.msgpack")
# Fields with which peft would import a module, read a tokenizer, or repeat layers of the base.
_LEADING_AWAY: Final = ("megatron_config", "layer_replication", "tokenizer_name_or_path", "tokenizer_kwargs")
_TOKENIZER_FILES: Final = ("vocab_file", "merges_file", "tokenizer_file", "spm_file")


def check_folder(folder: Path, *, weights: bool = True) -> None:
    """Refuse a checkpoint folder that is incomplete, damaged or unsafe.

    Args:
        folder: The folder.
        weights: Whether it must hold safetensors; a folder of `nlpxfer export` does not.

    Raises:
        CheckpointNotFoundError: The folder does not exist.
        CheckpointError: No config.json, no weights, missing shards, a truncated or damaged file, or an adapter.
        UnsafeCheckpointError: Only pickled weights, a family that needs remote code, or files outside the folder.
    """
    if not folder.is_dir():
        raise CheckpointNotFoundError(f"The folder {folder} does not exist.")
    _check_links(folder)
    if (folder / ADAPTER_CONFIG).is_file():
        raise CheckpointError(
            f"{folder} holds an adapter, and a whole model is needed here.",
            fix=f"nlpxfer merge {folder} OUT, and use OUT",
        )
    if not (folder / "config.json").is_file() and (folder / "adapter" / ADAPTER_CONFIG).is_file():
        raise CheckpointError(
            f"{folder} holds no model, only an adapter: the run trained one that cannot be merged.",
            fix="use it with nlpxfer predict, or train with --adapter lora",
        )
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder} is no checkpoint: it has no config.json.",
            why="The path is one level too high or low, or saving was interrupted.",
            available=sorted(entry.name for entry in folder.iterdir()),
        )
    config = _read_json(folder / "config.json")
    _check_remote_code(folder, config)
    _check_tokenizer_paths(folder)
    for file in _weight_files(folder, config) if weights else ():
        check_safetensors(file)


def check_adapter_folder(folder: Path) -> None:
    """Refuse an adapter folder that is incomplete, damaged or unsafe.

    Raises:
        CheckpointError: A file is missing, truncated or damaged, or the adapter is for no classifier.
        UnsafeCheckpointError: Only pickled weights, files outside the folder, or a type that loads or imports more.
    """
    _check_links(folder)
    config = _read_json(folder / ADAPTER_CONFIG)
    if config.get("peft_type") not in PEFT_TYPES:
        raise UnsafeCheckpointError(
            f"{folder} holds an adapter of the type {config.get('peft_type')!r}, which is not loaded here.",
            why="Some types load further files or models that their config names.",
            available=sorted(PEFT_TYPES),
        )
    leading_away = [key for key in _LEADING_AWAY if config.get(key)]
    if leading_away:
        raise UnsafeCheckpointError(
            f"{folder / ADAPTER_CONFIG} sets {', '.join(leading_away)}, which would load or import other things.",
            fix="use an adapter without it",
        )
    if config.get("task_type") != "SEQ_CLS":
        raise CheckpointError(f"{folder} holds an adapter for {config.get('task_type')!r}, not for classification.")
    _check_tokenizer_paths(folder)
    weights = folder / ADAPTER_WEIGHTS
    if not weights.is_file():
        raise _no_weights(folder, ADAPTER_WEIGHTS)
    check_safetensors(weights)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(
            f"{file} is no readable JSON: {error}", why="The file is damaged or truncated."
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds no JSON object.", why="The file is damaged.")
    return content


def _check_remote_code(folder: Path, config: dict[str, Any]) -> None:
    """Refuse `auto_map` for families that transformers does not have; for its own, the stock code is used."""
    from transformers import CONFIG_MAPPING

    tokenizer_file = folder / "tokenizer_config.json"
    tokenizer_config = _read_json(tokenizer_file) if tokenizer_file.is_file() else {}
    asking = [name for name, content in (("config.json", config), (tokenizer_file.name, tokenizer_config))
              if content.get("auto_map")]  # fmt: skip
    if not asking:
        return
    family = config.get("model_type")
    if family not in CONFIG_MAPPING:
        raise UnsafeCheckpointError(
            f"{folder} asks to run its own code (auto_map in {', '.join(asking)}) for the family {family!r}.",
            why="transformers has no such family; code from checkpoints is never run here.",
            fix="use a checkpoint of a family that transformers has",
        )
    logger.warning(
        "%s asks for its own code (auto_map in %s): ignored, the %s code of transformers is used.",
        folder,
        ", ".join(asking),
        family,
    )


def _check_links(folder: Path) -> None:
    """Refuse symbolic links that leave the folder, save those of a Hub snapshot into its own blobs."""
    allowed = [folder.resolve()]
    if folder.resolve().parent.name == "snapshots":
        allowed.append(folder.resolve().parent.parent / "blobs")
    for path in folder.rglob("*"):
        if path.is_symlink() and not any(path.resolve().is_relative_to(root) for root in allowed):
            raise UnsafeCheckpointError(
                f"{path} is a link to {path.resolve()}, outside of the checkpoint.",
                why="A checkpoint must not read other files of this machine.",
                fix="replace the link by the file, if you made it yourself",
            )


def _leaves(folder: Path, name: str) -> bool:
    """Whether `name`, taken from a file of the checkpoint, leads out of the folder."""
    path = Path(name.replace("\\", "/"))
    return path.is_absolute() or ".." in path.parts or ":" in name


def _check_tokenizer_paths(folder: Path) -> None:
    """Refuse file names in tokenizer_config.json that lead elsewhere and would be read.

    Many published configs hold such a path of their author's machine; where nothing exists there, it is harmless.
    """
    file = folder / "tokenizer_config.json"
    content = _read_json(file) if file.is_file() else {}
    for key in _TOKENIZER_FILES:
        value = content.get(key)
        if isinstance(value, str) and _leaves(folder, value) and (folder / value).exists():
            raise UnsafeCheckpointError(
                f"{file}: {key} is {value!r}, outside of the checkpoint.",
                why="A checkpoint must not read other files of this machine.",
                fix=f"remove {key} from tokenizer_config.json",
            )


def _weight_files(folder: Path, config: dict[str, Any]) -> list[Path]:
    named = config.get("transformers_weights")
    if isinstance(named, str):
        if _leaves(folder, named):
            raise UnsafeCheckpointError(f"config.json names weights outside of the checkpoint: {named!r}.")
        if not named.endswith((".safetensors", ".safetensors.index.json")):
            raise UnsafeCheckpointError(f"config.json names weights that are no safetensors: {named!r}.")
    single = folder / WEIGHTS
    if single.is_file() and not isinstance(named, str):
        return [single]
    index = folder / (named if isinstance(named, str) else WEIGHTS_INDEX)
    if index.is_file() and index.suffix == ".safetensors":
        return [index]
    if index.is_file():
        return _shards(index)
    raise _no_weights(folder)


def _no_weights(folder: Path, wanted: str = f"{WEIGHTS} or {WEIGHTS_INDEX}") -> CheckpointError:
    pickled = sorted(path.name for pattern in _PICKLED for path in folder.glob(pattern))
    weights = [name for name in pickled if name not in ("training_args.bin", "optimizer.pt", "scheduler.pt")]
    if weights:
        return UnsafeCheckpointError(
            f"{folder} holds no safetensors weights, only {', '.join(weights)}.",
            why="Pickled weights can run code when they are opened, so they are never opened here.",
            fix="if you trust their origin, convert them once, in a process that you can afford to lose: "
            "AutoModel.from_pretrained(folder, use_safetensors=False).save_pretrained(new_folder)",
        )
    return CheckpointError(
        f"{folder} holds no weights ({wanted}).",
        why="The download or the saving was interrupted.",
        available=sorted(entry.name for entry in folder.iterdir()),
    )


def _shards(index: Path) -> list[Path]:
    """The weight files that an index names, all inside its folder and present."""
    folder, weight_map = index.parent, _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{index} has no weight_map.", why="The file is damaged.")
    names = sorted(set(weight_map.values()))
    outside = [name for name in names if _leaves(folder, name)]
    if outside:
        raise UnsafeCheckpointError(
            f"{index} names weights outside of the checkpoint: {', '.join(map(repr, outside))}.",
            why="transformers would read them from there.",
        )
    pickled = [name for name in names if not name.endswith(".safetensors")]
    if pickled:
        raise UnsafeCheckpointError(f"{index} names weights that are no safetensors: {', '.join(pickled)}.")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of {len(names)} weight files: {', '.join(missing[:10])}.",
            why="The download or the copy was interrupted.",
        )
    return [folder / name for name in names]


def check_safetensors(file: Path) -> None:
    """Compare the header of a safetensors file with the size of the file.

    Raises:
        CheckpointError: The file is truncated, too long, or no safetensors file.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = stream.read(length) if 8 + length <= size else b""
    try:
        entries = json.loads(header)
        ends = [entry["data_offsets"][1] for key, entry in entries.items() if key != "__metadata__"]
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise CheckpointError(
            f"{file} is no readable safetensors file ({size} bytes).",
            why="It is truncated or damaged, or a Git LFS pointer instead of the file.",
            fix="download or copy it again",
        ) from error
    wanted = 8 + length + max(ends, default=0)
    if size != wanted:
        raise CheckpointError(
            f"{file} has {size} bytes, but its header promises {wanted}.",
            why="The download or the copy was interrupted." if size < wanted else "Something was appended to it.",
            fix="download or copy it again",
        )
    _open_with_safetensors(file)


def _open_with_safetensors(file: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            opened.keys()
    except SafetensorError as error:
        raise CheckpointError(f"{file} is damaged: {error}", fix="download or copy it again") from error
