"""Outputs of a frozen model, one row of numbers per text, kept on disk and found by content.

What a row is found by is the caller's affair: 32 bytes that change with everything in it. So shuffling, subsets and
further rows cannot misalign the cache. A folder belongs to one manifest: what else the numbers depend on.

    <folder>/manifest.json           what the values were made from
    <folder>/part-*.safetensors      keys (N, 32) uint8 and values (N, D) float32; named by a sha256 over both

Parts are written whole (temporary name, then rename), so an interrupted run leaves finished parts and the next one
computes only what is missing. A part whose content does not give its name is damaged.

Shapes: N rows, D values per row.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from tqdm.auto import tqdm

from nlpxfer.checkpoint.save import check_free_space
from nlpxfer.errors import NotFiniteError, StaleCacheError
from nlpxfer.strict_json import write_json_whole
from nlpxfer.train.launch import is_main_process, wait_for_everyone, world

logger = logging.getLogger(__name__)

Array = np.ndarray[Any, Any]
MANIFEST = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class RowCache:
    """A folder of cached rows.

    Attributes:
        folder: Where it lies; made when the first rows are written.
        manifest: Flat JSON values that the rows were made from.
        width: D.
        values: What the rows are, and their name in a part: "logits" or "features".
        owner: Whose they are, for messages: "teacher" or "feature".
        option: How the user names a folder: "--teacher_cache".
        part_rows: Rows per part: what an interruption can lose.
        salt: Goes into the names of the parts: with the manifest in it, a part is of this cache or counts as damaged.
        mends: Damaged parts are removed with a warning and computed anew; else they are refused.
    """

    folder: Path
    manifest: Mapping[str, Any]
    width: int
    values: str
    owner: str
    option: str
    part_rows: int
    salt: bytes = b""
    mends: bool = False

    def rows(
        self,
        keys: Sequence[bytes],
        compute: Callable[[Array], Array],
        *,
        lengths: Array | None = None,
        description: str = "",
        quiet: bool = True,
    ) -> tuple[Array, Array]:
        """Values of N rows, from the cache where they are there, else computed and added to it.

        All processes call this together; `compute` must return the same array in all of them. The first one writes.

        Args:
            keys: What each row is found by.
            compute: From indices of rows to their values, shape (rows, D).
            lengths: Tokens of each row; the longest are computed first, so that a part holds rows of like length.
            description: Shown beside the progress bar.
            quiet: No progress bar.

        Returns:
            Values (N, D) float32 in the order of `keys`, and the indices of the rows that were computed: one for each
            distinct key.

        Raises:
            StaleCacheError: The folder was made from something else, or is damaged; says what differs.
            NotFiniteError: The model gives NaN or infinite values.
            NoSpaceError: The disk has no room for the missing rows.
            ValueError: `compute` gives values of another shape.
        """
        places: dict[bytes, list[int]] = {}
        for index, key in enumerate(keys):
            places.setdefault(key, []).append(index)
        found = np.empty((len(keys), self.width), dtype=np.float32)
        known, damaged = self._read(places, found)
        mine = [indices[0] for key, indices in places.items() if key not in known]
        missing = np.array(_of_all_processes(mine), dtype=np.int64)
        if lengths is not None:
            missing = missing[np.argsort(-lengths[missing], kind="stable")]
        if is_main_process():
            self._begin(damaged, len(mine))
        bar = tqdm(total=len(missing), desc=description, disable=quiet or not is_main_process(), leave=False)
        with bar:
            for start in range(0, len(missing), self.part_rows):
                rows = missing[start : start + self.part_rows]
                values = compute(rows)
                self._require_sound(values, len(rows))
                part_keys = [keys[int(row)] for row in rows]
                if is_main_process():
                    self._write_part(part_keys, values)
                for key, row_values in zip(part_keys, values, strict=True):
                    found[places[key]] = row_values
                bar.update(len(rows))
        wait_for_everyone()
        return found, missing

    def _begin(self, damaged: Sequence[Path], missing: int) -> None:
        """Remove what is damaged, and write the manifest if it is not there."""
        for path in damaged:
            path.unlink(missing_ok=True)
        if missing:
            room = "free some space, or give another folder: " + self.option
            check_free_space(self.folder, missing * (4 * self.width + 32), fix=room)
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / MANIFEST).is_file():
            write_json_whole(self.folder / MANIFEST, dict(self.manifest))

    def _require_sound(self, values: Array, rows: int) -> None:
        if values.shape != (rows, self.width):
            raise ValueError(f"got {self.values} of shape {values.shape} for {rows} rows of {self.width}")
        if not np.isfinite(values).all():
            whose = "The teacher" if self.owner == "teacher" else "The model"
            raise NotFiniteError(
                f"{whose} gives {self.values} that are NaN or infinite.",
                why="its weights are damaged, or it was trained until it diverged",
            )

    def _read(self, places: Mapping[bytes, Sequence[int]], found: Array) -> tuple[set[bytes], list[Path]]:
        """Copy the rows that are there to their places; the keys of these, and the files that are to be removed."""
        known: set[bytes] = set()
        damaged: list[Path] = []
        if not self.folder.exists():
            return known, damaged
        if not self.folder.is_dir():
            raise StaleCacheError(f"{self.folder.name} is no folder.", fix=f"give another {self.option} folder")
        fault = self._manifest_fault()
        if fault is not None:
            damaged.append(self._damage(self.folder / MANIFEST, fault))
        for path in sorted(self.folder.glob("part-*.safetensors")):
            try:
                part = load_file(path)
                keys, values = part["keys"], part[self.values]
            except (SafetensorError, KeyError, OSError) as error:
                why = f"The {self.owner} cache is damaged: {path.name} cannot be read ({error})."
                damaged.append(self._damage(path, StaleCacheError(why, fix=f"delete {path.name}")))
                continue
            if path.name != self._part_name(keys, values) or values.shape != (len(keys), self.width):
                why = f"The {self.owner} cache is damaged: {path.name} was changed after it was written."
                damaged.append(self._damage(path, StaleCacheError(why, fix=f"delete {path.name}")))
                continue
            for key, row in zip((key.tobytes() for key in keys), values, strict=True):
                if key in places:
                    found[places[key]] = row
                    known.add(key)
        return known, damaged

    def _damage(self, path: Path, fault: StaleCacheError) -> Path:
        """The path of a damaged file, to be removed; or its fault is raised."""
        if not self.mends:
            raise fault
        logger.warning("%s Its rows are computed anew.", fault.what)
        return path

    def _manifest_fault(self) -> StaleCacheError | None:
        """What speaks against the manifest; a folder of something else is refused, whatever `mends` says.

        Raises:
            StaleCacheError: The folder holds files, but no manifest.
        """
        path = self.folder / MANIFEST
        if not path.is_file():
            others = [entry.name for entry in self.folder.iterdir() if not entry.name.startswith(".")]
            if [name for name in others if not (self.mends and _is_part(name))]:  # dots: left by an interruption
                raise StaleCacheError(
                    f"{self.folder.name} holds files, but is no {self.owner} cache.", fix="give another folder"
                )
            return None
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(found, dict):
                raise ValueError("no object")
        except ValueError:
            return StaleCacheError(
                f"The {self.owner} cache is damaged: its manifest.json cannot be read.", fix="delete the folder"
            )
        differing = [
            f"{key}: cached {found.get(key)!r}, now {value!r}"
            for key, value in self.manifest.items()
            if found.get(key) != value
        ]
        if not differing:
            return None
        return StaleCacheError(
            f"The {self.owner} cache was made from something else:\n  - " + "\n  - ".join(differing),
            fix=f"give another {self.option} folder, or delete this one",
        )

    def _write_part(self, keys: Sequence[bytes], values: Array) -> None:
        stacked = np.stack([np.frombuffer(key, dtype=np.uint8) for key in keys])
        exact = np.ascontiguousarray(values, dtype=np.float32)
        name = self._part_name(stacked, exact)
        temporary = self.folder / f".{name}.{os.getpid()}.tmp"
        save_file({"keys": stacked, self.values: exact}, temporary)
        temporary.replace(self.folder / name)

    def _part_name(self, keys: Array, values: Array) -> str:
        digest = hashlib.sha256(self.salt + keys.tobytes() + values.tobytes()).hexdigest()
        return f"part-{digest[:32]}.safetensors"


def cache_root(kind: str) -> Path:
    """`$NLPXFER_CACHE` (default `~/.cache/nlpxfer`)/<kind>."""
    return Path(os.environ.get("NLPXFER_CACHE") or str(Path.home() / ".cache" / "nlpxfer")) / kind


def _is_part(name: str) -> bool:
    return name.startswith("part-") and name.endswith(".safetensors")


def _of_all_processes(indices: list[int]) -> list[int]:
    """The indices that any process names, ascending; folders of several machines may hold different parts."""
    everyone = [indices]
    if world()[1] > 1:
        everyone = [[] for _ in range(world()[1])]
        torch.distributed.all_gather_object(everyone, indices)
    return sorted({index for some in everyone for index in some})
