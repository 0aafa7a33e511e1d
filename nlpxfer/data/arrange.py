"""What happens to checked rows between reading and training: schema, missing splits, leaks, sample.

In this order: the schema is frozen from all training rows; missing splits are carved out; unlabelled texts that
stand in validation or test go; leaks go, if asked for; the sample is drawn from what is left.
"""

from __future__ import annotations

import logging
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final

import numpy as np

from nlpxfer.data.formats import SHOWN_FAULTS
from nlpxfer.data.leaks import find_leaks
from nlpxfer.data.rows import Rows
from nlpxfer.data.schema import LabelSchema, natural_order, written_otherwise
from nlpxfer.data.splits import (
    iterative_sample,
    iterative_split,
    quantile_bins,
    stratified_sample,
    stratified_split,
)
from nlpxfer.errors import ConfigError, DataError, LabelError, nearest
from nlpxfer.problem import MULTI_LABEL, REGRESSION, SINGLE_LABEL

LOGGER = logging.getLogger(__name__)
COMPARED: Final = (("train", "validation"), ("train", "test"), ("validation", "test"))


def freeze_schema(train: Rows, *, carved: Sequence[str], warnings: list[str]) -> LabelSchema:
    """The classes of the training rows, in the order that the file gives, or else in natural order.

    Args:
        train: All training rows.
        carved: The splits that are yet to be carved out: each class needs one row more for each of them.
        warnings: Gets a line for each thing that a reader should know.

    Raises:
        DataError: There is one class only, or a class has too few rows.
    """
    counts = Counter(train.labels or ())
    if len(counts) < 2:
        raise DataError(
            f"{train.source}: all {len(train)} rows have one label, {next(iter(counts))!r}; nothing to tell apart.",
            fix="--label_column names the column of labels",
        )
    _check_class_sizes(train, counts, carved, warnings)
    if train.class_names is None:
        names = natural_order(counts)
    else:
        names = tuple(name for name in train.class_names if name in counts)
        if len(names) < len(train.class_names):
            unused = [name for name in train.class_names if name not in counts]
            warnings.append(f"{train.name}: classes without a training row are left out: {', '.join(unused)}")
    if all(name.lstrip("-").isdigit() for name in names):
        LOGGER.info("%s: the label names are numbers: %s", train.name, ", ".join(names[:SHOWN_FAULTS]))
    if alike := _alike(names, str.casefold):
        warnings.append(f"{train.name}: labels that differ by case only are kept apart: {', '.join(alike)}")
    if alike := _alike(names, partial(unicodedata.normalize, "NFC")):
        told = ", ".join(map(ascii, alike))
        warnings.append(f"{train.name}: labels that differ by their form of Unicode only are kept apart: {told}")
    return LabelSchema(names)


def _alike(names: Sequence[str], form: Callable[[str], str]) -> list[str]:
    """The names that share their form with another one."""
    forms = Counter(form(name) for name in names)
    return [name for name in names if forms[form(name)] > 1]


def freeze_label_set(train: Rows, *, min_rows: int, warnings: list[str]) -> LabelSchema:
    """The labels of a multi-label task that have enough training rows, in the order of the file, or else natural.

    Args:
        train: All training rows.
        min_rows: Training rows that a label needs.
        warnings: Gets a line for the labels left out.

    Raises:
        DataError: No label has that many rows.
    """
    counts = Counter(name for names in train.names_by_row() for name in names)
    kept = {name for name, count in counts.items() if count >= min_rows}
    if not kept:
        most = max(counts.values(), default=0)
        raise DataError(
            f"{train.source}: no label has {min_rows} training rows; the most frequent has {most}.",
            fix="--label_column names the column of labels; --min_label_rows asks for fewer rows",
        )
    if len(kept) < len(counts):
        warnings.append(f"{train.name}: {len(counts) - len(kept)} labels with fewer than {min_rows} rows are left out")
    listed = train.class_names or natural_order(kept)
    return LabelSchema(tuple(name for name in listed if name in kept), MULTI_LABEL)


def drop_rare_labels(rows: Rows, schema: LabelSchema) -> Rows:
    """The rows of a multi-label task without the labels that the schema does not have."""
    kept = [tuple(name for name in names if name in schema) for names in rows.names_by_row()]
    return replace(rows, labels=kept)


def freeze_number(train: Rows, *, label_column: str) -> LabelSchema:
    """The schema of a regression: the name of its column.

    Raises:
        DataError: All training rows have the same number.
    """
    if len(set(train.labels or ())) < 2:
        raise DataError(f"{train.source}: all {len(train)} rows have the same number; there is nothing to learn.")
    return LabelSchema((label_column,), REGRESSION)


def _check_class_sizes(train: Rows, counts: Counter[str], carved: Sequence[str], warnings: list[str]) -> None:
    labels = list(train.labels or ())
    needed = 1 + len(carved)
    small = [name for name in natural_order(counts) if counts[name] < max(needed, 2)]
    if not small:
        return
    listed = [
        f"{name!r} has {counts[name]}, {', '.join(train.place(i) for i, label in enumerate(labels) if label == name)}"
        for name in small[:SHOWN_FAULTS]
    ]
    more = f"; and {len(small) - SHOWN_FAULTS} more" if len(small) > SHOWN_FAULTS else ""
    message = f"{train.source}: classes with too few rows: {'; '.join(listed)}{more}"
    if carved:
        raise DataError(
            f"{message}.",
            why=f"{' and '.join(carved)} must be carved out of the training rows: each class needs {needed} rows",
            fix="add rows, join or remove these classes, or give the validation and test files",
        )
    warnings.append(message.replace(train.source, train.name))


def check_labels(splits: Mapping[str, Rows], schema: LabelSchema) -> None:
    """Refuse labels that the training rows do not have.

    Raises:
        LabelError: Lists them with file and rows, for all splits at once.
    """
    faults: list[str] = []
    unknown: list[str] = []
    for rows in splits.values():
        places: dict[str, list[str]] = {}
        for index, names in enumerate(rows.names_by_row()):
            for name in names:
                if name not in schema:
                    places.setdefault(name, []).append(rows.place(index))
        for name, found in places.items():
            more = f" and {len(found) - SHOWN_FAULTS} more" if len(found) > SHOWN_FAULTS else ""
            faults.append(f"{rows.source}, {', '.join(found[:SHOWN_FAULTS])}{more}: {name!r}")
            unknown.append(name)
    if faults:
        hints = [
            f"{near!r} in place of {name!r}"
            for name in unknown[:SHOWN_FAULTS]
            if (near := nearest(name, schema.names))
        ]
        listed = "\n  - ".join(["Labels that no training row has:", *faults])
        rare = "--min_label_rows 2 leaves rare labels out" if schema.problem_type == MULTI_LABEL else ""
        raise LabelError(
            listed,
            why=written_otherwise(unknown, schema.names),
            fix=", ".join(dict.fromkeys(hints)) or rare,
            available=schema.names,
        )


def carve(
    splits: dict[str, Rows], shares: Mapping[str, float], seed: int, *, problem_type: str = SINGLE_LABEL
) -> dict[str, str]:
    """Carve the missing splits out of the training rows, in place.

    Args:
        splits: Has 'train'; gets the other two.
        shares: Which part of all training rows a missing split becomes.
        problem_type: What keeps its share: each class, each of several labels, or each tenth of the numbers.
        seed: Draws the rows.

    Returns:
        Split to where its rows come from.

    Raises:
        DataError: A class does not have enough different texts.
    """
    sources = {split: rows.name for split, rows in splits.items()}
    left = 1.0
    for split in ("test", "validation"):
        if split in splits:
            continue
        train = splits["train"]
        try:
            share = shares[split] / left
            if problem_type == MULTI_LABEL:
                kept, taken = iterative_split(list(train.names_by_row()), train.keys(), share=share, seed=seed)
            else:
                kept, taken = stratified_split(_strata(train, problem_type), train.keys(), share=share, seed=seed)
        except DataError as error:
            raise DataError(
                f"{train.source}: no {split} split can be carved out. {error.what}", fix=error.fix
            ) from error
        left -= shares[split]
        splits["train"], splits[split] = train.take(kept), train.take(taken)
        sources[split] = f"carved from {train.name}"
        LOGGER.info("%s: %d of %d rows of %s", split, len(taken), len(train), train.name)
    return sources


def _strata(rows: Rows, problem_type: str, *, most: int = 10) -> Sequence[Any]:
    """The class of each row, or the tenth that its number lies in; of numbers `most` such parts."""
    labels = rows.labels or ()
    return quantile_bins(labels, bins=min(10, most)) if problem_type == REGRESSION else labels


def keep_apart(unlabelled: Rows, splits: Mapping[str, Rows]) -> Rows:
    """Take out the unlabelled texts that stand exactly in a split.

    Those of training rows are taught with their labels already; a second time, they would be taught by a teacher that
    has learnt them by heart, whatever answers the training rows themselves get.

    Raises:
        DataError: None is left.
    """
    labelled = {key for rows in splits.values() for key in rows.keys()}
    left = [index for index, key in enumerate(unlabelled.keys()) if key not in labelled]
    return _left(unlabelled, left, "train, validation or test")


def drop_leaks(rows: Rows, splits: Mapping[str, Rows]) -> Rows:
    """Take out the rows that stand, exactly or nearly, in validation or test.

    Raises:
        DataError: None is left.
    """
    evaluated = [*splits["validation"].keys(), *splits["test"].keys()]
    leaking = set(find_leaks(rows.keys(), evaluated).reference_rows)
    return _left(rows, [index for index in range(len(rows)) if index not in leaking], "validation or test")


def _left(rows: Rows, indices: Sequence[int], where: str) -> Rows:
    if not indices:
        raise DataError(f"{rows.source}: all {len(rows)} rows also stand in {where}; none is left.")
    return rows.take(indices)


def check_classes_left(train: Rows, schema: LabelSchema) -> None:
    """Refuse training rows that lost a whole class to `drop_leaks`.

    Raises:
        DataError: Names the classes.
    """
    found = {name for names in train.names_by_row() for name in names}
    lost = [name for name in schema.names if name not in found]
    if lost:
        raise DataError(
            f"{train.source}: every training row of {', '.join(map(repr, lost))} also stands in validation or test; "
            "without them the class cannot be learnt.",
            fix="--drop_leaks false, or other training rows",
        )


def sample(train: Rows, count: int, seed: int, *, problem_type: str = SINGLE_LABEL) -> Rows:
    """Draw training rows so that each class, label or tenth of the numbers keeps its share.

    Raises:
        DataError: Fewer rows than classes are asked for.
    """
    if problem_type == MULTI_LABEL:
        return train.take(iterative_sample(list(train.names_by_row()), train.keys(), count=count, seed=seed))
    strata = _strata(train, problem_type, most=count)
    return train.take(stratified_sample(strata, train.keys(), count=count, seed=seed))


def draw_texts(unlabelled: Rows, count: int, seed: int) -> Rows:
    """Some of the unlabelled texts, in their order.

    Raises:
        ConfigError: There are not so many.
    """
    if count > len(unlabelled):
        raise ConfigError(
            f"unlabelled_rows: {count} is more than the {len(unlabelled)} unlabelled texts that can be used.",
            fix=f"--unlabelled_rows {len(unlabelled)}, or leave it out",
        )
    drawn = np.random.default_rng(seed).permutation(len(unlabelled))[:count]
    return unlabelled.take(sorted(drawn.tolist()))


def compare(splits: Mapping[str, Rows], unlabelled: Rows | None) -> dict[str, dict[str, Any]]:
    """Per pair of splits, the rows of the second that stand in the first."""
    keys = {split: rows.keys() for split, rows in splits.items()}
    pairs = list(COMPARED)
    if unlabelled is not None:
        keys["unlabelled"] = unlabelled.keys()
        pairs += [("unlabelled", "validation"), ("unlabelled", "test")]
    leaks = {f"{first}_{second}": find_leaks(keys[first], keys[second]).as_dict() for first, second in pairs}
    for pair, found in leaks.items():
        if found["rows"]:
            LOGGER.warning("leak %s: %d exact and %d near", pair, found["exact"], found["near"])
    return leaks


def count_contradictions(train: Rows) -> int:
    """How many distinct texts stand in the training rows with more than one label."""
    labels: dict[str, set[Any]] = {}
    for key, label in zip(train.keys(), train.labels or (), strict=True):
        labels.setdefault(key, set()).add(label)
    return sum(len(found) > 1 for found in labels.values())


def absent_classes(splits: Mapping[str, Rows], schema: LabelSchema) -> list[str]:
    """A line for each split in which a class has no row; of training rows, a sample of several labels per row may."""
    lines = []
    for split in ("train", "validation", "test"):
        found = {name for names in splits[split].names_by_row() for name in names}
        absent = [name for name in schema.names if name not in found]
        if absent:
            lines.append(f"{split} has no row of {len(absent)} classes: {', '.join(absent)}")
    return lines
