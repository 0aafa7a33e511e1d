"""Outputs of a frozen model, one row of numbers per text, kept on disk and found by content.

What a row is found by is the caller's affair: 32 bytes that change with everything in it. So shuffling, subsets and
further rows cannot misalign the cache. A folder belongs to one manifest: what else the numbers depend on.

    <folder>/manifest.json           what the values were made from
    <folder>/part-*.safetensors      keys (N, 32) uint8 and values (N, D) float32; named by a sha256 over both
    <folder>/.lock                   held while a job looks at what others wrote, and writes

Parts are written whole (temporary name, then rename), so an interrupted run leaves finished parts and the next one
computes only what is missing. A part whose content does not give its name is damaged.

Several jobs may fill one folder at once. Before a part is computed, and again before it is written, a job reads what
others have written since; whoever wrote a row first is right, and all others take its value. So jobs never disagree,
and each row is kept once. Chosen over one lock for the whole time, which would make the second job wait for hours
while its other processes time out.

Rows are looked up in sorted arrays, not in dictionaries, and values of more than 64 MiB lie in an unnamed file that is
mapped into memory, which the system can drop from memory at any time: a million texts cost about 0.2 GB beside the
texts themselves, however many values each has.

Shapes: N rows, K different keys of them, D values per row.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from tqdm.auto import tqdm

from nlpxfer.checkpoint.save import check_free_space
from nlpxfer.errors import NotFiniteError, StaleCacheError
from nlpxfer.strict_json import write_json_whole
from nlpxfer.train.launch import is_main_process, on_main, wait_for_everyone, world

logger = logging.getLogger(__name__)

Array = np.ndarray[Any, Any]
MANIFEST = "manifest.json"
LOCK = ".lock"
KEY = np.dtype("V32")
IN_MEMORY = 64 * 2**20
"""Bytes of values up to which they are an ordinary array."""


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
        keys: Sequence[bytes] | Array,
        compute: Callable[[Array], Array],
        *,
        lengths: Array | None = None,
        description: str = "",
        quiet: bool = True,
    ) -> tuple[Array, Array]:
        """Values of N rows, from the cache where they are there, else computed and added to it.

        All processes call this together; `compute` must return the same array in all of them. The first one writes.

        Args:
            keys: What each row is found by: 32 bytes each, or an array of N such.
            compute: From indices of rows to their values, shape (rows, D).
            lengths: Tokens of each row; the longest are computed first, so that a part holds rows of like length.
            description: Shown beside the progress bar.
            quiet: No progress bar.

        Returns:
            Values (N, D) float32 in the order of `keys`, and the indices of the rows that were computed here: at most
            one for each distinct key.

        Raises:
            StaleCacheError: The folder was made from something else, or is damaged; says what differs.
            NotFiniteError: The model gives NaN or infinite values.
            NoSpaceError: The disk has no room for the missing rows.
            ValueError: `compute` gives values of another shape.
        """
        damaged = self._check_folder()
        wanted = _Wanted.of(keys, room_for_values(self.folder, len(keys), self.width, fix=self._room))
        damaged += self._read(wanted)
        missing = _of_all_processes(np.sort(wanted.first_K[~wanted.known_K]))
        if lengths is not None:
            missing = missing[np.argsort(-lengths[missing], kind="stable")]
        on_main(lambda: self._begin(damaged, len(missing)))
        computed = [np.zeros(0, dtype=np.int64)]
        told_K = np.zeros_like(wanted.known_K)  # what each process knows from its own folder may differ
        bar = tqdm(total=len(missing), desc=description, disable=quiet or not is_main_process(), leave=False)
        with bar:
            for start in range(0, len(missing), self.part_rows):
                asked = missing[start : start + self.part_rows]
                for others in self._news(wanted):
                    told_K[wanted.put(*others)] = True
                rows = asked[~told_K[wanted.place_N[asked]]]
                if len(rows):
                    values = compute(rows)
                    self._require_sound(values, len(rows))
                    wanted.put(wanted.keys_N[rows], values)
                    for others in self._news(wanted, write=(wanted.keys_N[rows], values)):
                        told_K[wanted.put(*others)] = True
                    computed.append(rows)
                bar.update(len(asked))
        wait_for_everyone()
        return wanted.values_ND, np.concatenate(computed)

    @property
    def _room(self) -> str:
        return "free some space, or give another folder: " + self.option

    def _begin(self, damaged: Sequence[Path], missing: int) -> None:
        """Remove what is damaged, and write the manifest if it is not there."""
        if not missing and not damaged and (self.folder / MANIFEST).is_file():
            return
        check_free_space(self.folder, missing * (4 * self.width + 32), fix=self._room)
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / LOCK):
            for path in damaged:
                path.unlink(missing_ok=True)
            if not (self.folder / MANIFEST).is_file():
                write_json_whole(self.folder / MANIFEST, dict(self.manifest))
            elif fault := self._manifest_fault():  # another job was faster, with something else
                raise fault

    def _news(self, wanted: _Wanted, write: tuple[Array, Array] | None = None) -> list[tuple[Array, Array]]:
        """Keys and values of the parts that other jobs have written since; then write a part of what they lack.

        The first process reads and writes, and tells all others.
        """

        def read_and_write() -> list[tuple[Array, Array]]:
            if write is None:
                return self._new_parts(wanted)
            with FileLock(self.folder / LOCK):
                news = self._new_parts(wanted)
                keys, values = write
                theirs = np.isin(keys, np.concatenate([found for found, _ in news])) if news else False
                own = ~np.broadcast_to(theirs, keys.shape)
                if own.any():
                    wanted.seen.add(self._write_part(keys[own], values[own]))
            return news

        return on_main(read_and_write)

    def _new_parts(self, wanted: _Wanted) -> list[tuple[Array, Array]]:
        """Parts that have not been read yet, as far as they hold wanted rows."""
        found = []
        for path in sorted(self.folder.glob("part-*.safetensors")):
            if path.name not in wanted.seen:
                wanted.seen.add(path.name)
                part = self._read_part(path)
                if not isinstance(part, StaleCacheError):
                    mine = np.isin(part[0], wanted.distinct_K)
                    found.append((part[0][mine], part[1][mine]))
        return [part for part in found if len(part[0])]

    def _require_sound(self, values: Array, rows: int) -> None:
        if values.shape != (rows, self.width):
            raise ValueError(f"got {self.values} of shape {values.shape} for {rows} rows of {self.width}")
        if not np.isfinite(values).all():
            whose = "The teacher" if self.owner == "teacher" else "The model"
            raise NotFiniteError(
                f"{whose} gives {self.values} that are NaN or infinite.",
                why="its weights are damaged, or it was trained until it diverged",
            )

    def _check_folder(self) -> list[Path]:
        """The manifest if it is damaged and may be mended, else nothing.

        Raises:
            StaleCacheError: The folder is of something else, or damaged.
        """
        if not self.folder.exists():
            return []
        if not self.folder.is_dir():
            raise StaleCacheError(f"{self.folder.name} is no folder.", fix=f"give another {self.option} folder")
        fault = self._manifest_fault()
        return [] if fault is None else [self._damage(self.folder / MANIFEST, fault)]

    def _read(self, wanted: _Wanted) -> list[Path]:
        """Put the rows that are there to their places; the files that are to be removed."""
        damaged: list[Path] = []
        for path in sorted(self.folder.glob("part-*.safetensors")):
            part = self._read_part(path)
            if isinstance(part, StaleCacheError):
                damaged.append(self._damage(path, part))
            else:
                wanted.put(*part)
            wanted.seen.add(path.name)
        return damaged

    def _read_part(self, path: Path) -> tuple[Array, Array] | StaleCacheError:
        """Keys and values of a part, or what is wrong with it."""
        try:
            part = load_file(path)
            keys, values = part["keys"], part[self.values]
        except (SafetensorError, KeyError, OSError) as error:
            why = f"The {self.owner} cache is damaged: {path.name} cannot be read ({error})."
            return StaleCacheError(why, fix=f"delete {path.name}")
        if path.name != self._part_name(keys, values) or values.shape != (len(keys), self.width):
            why = f"The {self.owner} cache is damaged: {path.name} was changed after it was written."
            return StaleCacheError(why, fix=f"delete {path.name}")
        return _as_keys(keys), values

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

    def _write_part(self, keys: Array, values: Array) -> str:
        """Write a part and return its name."""
        stacked = keys.view(np.uint8).reshape(len(keys), -1)
        exact = np.ascontiguousarray(values, dtype=np.float32)
        name = self._part_name(stacked, exact)
        temporary = self.folder / f".{name}.{os.getpid()}.tmp"
        save_file({"keys": stacked, self.values: exact}, temporary)
        temporary.replace(self.folder / name)
        return name

    def _part_name(self, keys: Array, values: Array) -> str:
        digest = hashlib.sha256(self.salt + keys.tobytes() + values.tobytes()).hexdigest()
        return f"part-{digest[:32]}.safetensors"


def room_for_values(folder: Path, rows: int, width: int, *, fix: str) -> Array:
    """Room for values, float32 (rows, width): in memory, or if they are many in a file that is mapped into it.

    Args:
        folder: Where the file lies; it has no name and is gone with the array, however the program ends.
        rows: N.
        width: D.
        fix: What to do where the disk is full.

    Raises:
        NoSpaceError: The disk has no room for it.
    """
    size = 4 * rows * width
    if size <= IN_MEMORY:
        return np.empty((rows, width), dtype=np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    check_free_space(folder, size, fix=fix)
    with tempfile.TemporaryFile(dir=folder) as file:
        return np.memmap(file, dtype=np.float32, mode="w+", shape=(rows, width))


def cache_root(kind: str) -> Path:
    """`$NLPXFER_CACHE` (default `~/.cache/nlpxfer`)/<kind>."""
    return Path(os.environ.get("NLPXFER_CACHE") or str(Path.home() / ".cache" / "nlpxfer")) / kind


def _is_part(name: str) -> bool:
    return name.startswith("part-") and name.endswith(".safetensors")


def _of_all_processes(indices: Array) -> Array:
    """The indices that any process names, ascending; folders of several machines may hold different parts."""
    if world()[1] == 1:
        return indices
    everyone: list[Any] = [None] * world()[1]
    torch.distributed.all_gather_object(everyone, indices)
    return np.unique(np.concatenate(everyone))


def _as_keys(keys: Sequence[bytes] | Array) -> Array:
    """Keys of 32 bytes as an array of N opaque values, which numpy sorts byte by byte."""
    if isinstance(keys, np.ndarray):
        return np.ascontiguousarray(keys).view(KEY).reshape(len(keys))
    return np.frombuffer(b"".join(keys), dtype=KEY)


@dataclass(frozen=True, eq=False)
class _Wanted:
    """The rows that are asked for, and what is known of them.

    Attributes:
        keys_N: Their keys.
        distinct_K: The different ones, sorted.
        first_K: The first row with each.
        place_N: Which of the different keys each row has.
        rows_N: All rows, those with the same key one after the other.
        begin_K: Where those of each key begin there; one more entry says where the last end.
        known_K: Whether there is a value.
        values_ND: The values.
        seen: Names of the parts that have been read.
    """

    keys_N: Array
    distinct_K: Array
    first_K: Array
    place_N: Array
    rows_N: Array
    begin_K: Array
    known_K: Array
    values_ND: Array
    seen: set[str]

    @classmethod
    def of(cls, keys: Sequence[bytes] | Array, values_ND: Array) -> _Wanted:
        """Nothing is known yet."""
        keys_N = _as_keys(keys)
        distinct_K, first_K, place_N = np.unique(keys_N, return_index=True, return_inverse=True)
        rows_N = np.argsort(place_N, kind="stable")
        begin_K = np.concatenate([[0], np.cumsum(np.bincount(place_N, minlength=len(distinct_K)))]).astype(np.int64)
        known_K = np.zeros(len(distinct_K), dtype=bool)
        return cls(keys_N, distinct_K, first_K, place_N, rows_N, begin_K, known_K, values_ND, set())

    def put(self, keys: Array, values: Array) -> Array:
        """Keep the values of some keys, each for all rows that have it; keys that are not wanted are left out.

        Returns:
            Which of the different keys they are.
        """
        if not len(self.distinct_K):
            return np.zeros(0, dtype=np.int64)
        place = np.minimum(np.searchsorted(self.distinct_K, keys), len(self.distinct_K) - 1)
        mine = self.distinct_K[place] == keys
        place, values = place[mine], values[mine]
        begin, count = self.begin_K[place], self.begin_K[place + 1] - self.begin_K[place]
        shift = np.cumsum(count) - count
        rows = self.rows_N[np.repeat(begin - shift, count) + np.arange(count.sum())]
        self.values_ND[rows] = np.repeat(values, count, axis=0)
        self.known_K[place] = True
        return np.asarray(place)
