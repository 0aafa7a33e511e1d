"""The label schema: the names of the classes in one fixed order, and what kind of task they belong to.

Labels are matched by name everywhere; a position means something only together with a schema.

Shapes: N rows, C classes.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np

from nlpxfer.errors import DataNotFoundError, LabelError, nearest
from nlpxfer.problem import MULTI_LABEL, PROBLEM_TYPES, REGRESSION, SINGLE_LABEL, ProblemType

Array = np.ndarray[Any, Any]

LABELS_FILE: Final = "labels.json"
_INTEGER: Final = re.compile(r"-?[0-9]+")
_DIGITS: Final = re.compile(r"([0-9]+)")


def natural_order(names: Iterable[str]) -> tuple[str, ...]:
    """Sort names plainly, but runs of digits by their number: '2' before '10'.

    >>> natural_order(["10", "2", "b", "a10", "a9"])
    ('2', '10', 'a9', 'a10', 'b')
    >>> natural_order(["1", "-1", "0"])
    ('-1', '0', '1')
    """
    listed = list(names)
    if all(_INTEGER.fullmatch(name) for name in listed):
        return tuple(sorted(listed, key=lambda name: (int(name), name)))
    return tuple(sorted(listed, key=_natural_key))


def _natural_key(name: str) -> tuple[list[str | int], str]:
    # re.split with one group alternates text and digits, so equal positions always hold equal types.
    parts: list[str | int] = [int(part) if position % 2 else part for position, part in enumerate(_DIGITS.split(name))]
    return parts, name


@dataclass(frozen=True)
class LabelSchema:
    """Names of the classes; the position in `names` is the label's index.

    Args:
        names: At least one name; unique, not blank. A regression has one, the name of the number.
        problem_type: What a row's label is.

    Raises:
        LabelError: A name is blank, not a string, or stands twice, there is none, or a regression has several.
    """

    names: tuple[str, ...]
    problem_type: ProblemType = SINGLE_LABEL

    def __post_init__(self) -> None:
        """Freeze and check the names."""
        object.__setattr__(self, "names", tuple(self.names))
        if not self.names:
            raise LabelError("A label schema needs at least one name, there is none.")
        for name in self.names:
            if not isinstance(name, str) or not name.strip():
                raise LabelError(
                    f"{name!r} cannot be a label name.", fix="name each class with a text that is not blank"
                )
        if len(set(self.names)) < len(self.names):
            twice = [name for name in dict.fromkeys(self.names) if self.names.count(name) > 1]
            raise LabelError(f"Label names stand twice in one schema: {', '.join(twice)}.")
        if self.problem_type not in PROBLEM_TYPES:
            raise LabelError(f"{self.problem_type!r} is no problem type.", available=PROBLEM_TYPES)
        if self.problem_type == REGRESSION and len(self.names) > 1:
            raise LabelError(f"A regression has one output, not {len(self.names)}: {_shown(self.names)}.")

    def __len__(self) -> int:
        """Number of classes."""
        return len(self.names)

    def __contains__(self, name: object) -> bool:
        """Whether a class has this name."""
        return name in self._index

    @cached_property
    def _index(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self.names)}

    @property
    def id2label(self) -> dict[int, str]:
        """Index to name, as in a model's config."""
        return dict(enumerate(self.names))

    @property
    def label2id(self) -> dict[str, int]:
        """Name to index, as in a model's config."""
        return dict(self._index)

    def encode(self, name: str) -> int:
        """The index of a name.

        Raises:
            LabelError: No class has this name; lists all that there are.
        """
        try:
            return self._index[name]
        except KeyError:
            close = nearest(name, self.names)
            raise LabelError(
                f"{name!r} is not a label of this schema.",
                why=written_otherwise([name], self.names),
                fix=f"{close!r}" if close else "",
                available=self.names,
            ) from None

    def array(self, labels: Sequence[Any]) -> Array:
        """Labels as a model learns them.

        Args:
            labels: Of N rows, as `data.pack.to_dataset` keeps them: class indices, lists of class indices, or numbers.

        Returns:
            int64 indices (N); for multi-label float32 zeros and ones (N, C); for regression float32 numbers (N).
        """
        if self.problem_type == SINGLE_LABEL:
            return np.asarray(labels, dtype=np.int64)
        if self.problem_type == REGRESSION:
            return np.asarray(labels, dtype=np.float32)
        hot_NC = np.zeros((len(labels), len(self)), dtype=np.float32)
        for row, found in enumerate(labels):
            hot_NC[row, list(found)] = 1
        return hot_NC

    def unlabelled(self, rows: int) -> Array:
        """What stands for the labels of rows without any: -100, or NaN where labels are floats."""
        if self.problem_type == SINGLE_LABEL:
            return np.full(rows, -100, dtype=np.int64)
        shape = (rows, len(self)) if self.problem_type == MULTI_LABEL else (rows,)
        return np.full(shape, np.nan, dtype=np.float32)

    def reorder(self, other: LabelSchema) -> list[int]:
        """Where each of our labels stands in `other`.

        `logits_BC[:, ours.reorder(other)]` brings columns that are in the order of `other` into our order.

        Returns:
            A permutation of length C: entry i is the index in `other` of our name i.

        Raises:
            LabelError: The two sets of names differ; lists both sides.
        """
        if set(self.names) != set(other.names):
            alike = written_otherwise([name for name in self.names if name not in other], other.names)
            raise LabelError(
                "The two sides do not have the same labels:\n"
                f"  - only here: {_shown(name for name in self.names if name not in other)}\n"
                f"  - only there: {_shown(name for name in other.names if name not in self)}\n"
                f"  - here: {_shown(self.names)}\n"
                f"  - there: {_shown(other.names)}",
                why=alike or "the two were made from different data, or one has no names (LABEL_0, LABEL_1, ...)",
            )
        return [other.encode(name) for name in self.names]

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write `labels.json` into an existing folder, atomically, and return its path."""
        target = Path(folder) / LABELS_FILE
        facts = {"schema_version": 1, "problem_type": self.problem_type, "names": list(self.names)}
        content = json.dumps(facts, ensure_ascii=False, indent=2) + "\n"
        handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{LABELS_FILE}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)  # mkstemp makes files that only their owner can read
            os.replace(temporary, target)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        return target

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> LabelSchema:
        """Read `labels.json` from a folder.

        Raises:
            DataNotFoundError: The folder has no such file.
            LabelError: The file is damaged.
        """
        path = Path(folder) / LABELS_FILE
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            names = content["names"]
            if not isinstance(names, list):
                raise TypeError("'names' is no list")
            problem_type = content.get("problem_type", SINGLE_LABEL)  # older folders know no other
        except FileNotFoundError:
            raise DataNotFoundError(f"{path} does not exist.", why="the folder was not written by nlpxfer") from None
        except (ValueError, KeyError, TypeError) as error:
            raise LabelError(f"{path} is damaged: {error}.", fix="restore it, or train again") from error
        return cls(tuple(names), problem_type)


def written_otherwise(unknown: Iterable[str], names: Iterable[str]) -> str:
    """What to say where a name is unknown and yet looks like one of some names; empty where none does.

    Some characters can be written in two ways, as one or as a letter and its accent (NFC and NFD of Unicode).
    """
    forms = {unicodedata.normalize("NFC", name): name for name in names}
    for name in unknown:
        known = forms.get(unicodedata.normalize("NFC", name), name)
        if known != name:
            return (
                f"{name!r} and {known!r} look alike and are written with other characters, {ascii(name)} and "
                f"{ascii(known)}; bring both to one form of Unicode, such as NFC"
            )
    return ""


def _shown(names: Iterable[str]) -> str:
    listed = list(names)
    more = f", and {len(listed) - 40} more" if len(listed) > 40 else ""
    return (", ".join(listed[:40]) or "none") + more
