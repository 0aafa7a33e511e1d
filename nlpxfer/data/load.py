"""From a request to checked splits: one label schema, no text on two sides unseen, and a record of what was done.

data = load_data(DataRequest(train_file="train.csv", test_file="test.csv"))
data.schema.names, data.train[0], data.leaks["train_test"]["exact"]
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np

from nlpxfer.config.augmentation import Augmentation
from nlpxfer.data.arrange import (
    absent_classes,
    carve,
    check_classes_left,
    check_labels,
    compare,
    count_contradictions,
    draw_texts,
    drop_leaks,
    drop_rare_labels,
    freeze_label_set,
    freeze_number,
    freeze_schema,
    keep_apart,
    sample,
)
from nlpxfer.data.augment import augment
from nlpxfer.data.files import Table, read_table
from nlpxfer.data.mix import mix
from nlpxfer.data.pack import fingerprint, to_dataset
from nlpxfer.data.rows import Rows, check_rows, problem_type_of
from nlpxfer.data.schema import LabelSchema
from nlpxfer.data.sources import SPLITS, UNLABELLED_FILE, find_folder, read_folder, read_hub
from nlpxfer.errors import ConfigError
from nlpxfer.problem import MULTI_LABEL, PROBLEM_TYPES, REGRESSION, SINGLE_LABEL, ProblemType

if TYPE_CHECKING:
    from datasets import Dataset

LOGGER = logging.getLogger(__name__)
AUTO: Final = "auto"


@dataclass(frozen=True, kw_only=True)
class DataRequest:
    """Which data, and which columns and splits of it.

    Args:
        dataset_name: A local folder with train, validation and test files, a bundled set, or an id on the Hub.
        dataset_config_name: The configuration of a Hub dataset.
        train_file: Training rows, in place of `dataset_name`: csv, tsv, json, jsonl or parquet.
        validation_file: Validation rows; carved out of the training rows if missing.
        test_file: Test rows; carved out of the training rows if missing.
        text_column: The column of texts.
        text_pair_column: The column of second texts, for pairs.
        label_column: The column of labels: one per row, a list of them, or a number.
        problem_type: What a label is; 'auto': multi-label where the column holds lists or `label_separator` is given,
            else one class.
        label_separator: Between the labels of a row that are written as one text.
        min_label_rows: Multi-label: labels with fewer training rows are left out of all splits.
        unlabelled_file: Texts without labels: .txt with one text per line, or another format with the text columns.
            'auto' takes unlabelled.txt of the folder or bundled set that `dataset_name` names.
        unlabelled_rows: Keep this many of the unlabelled texts, drawn by lot.
        mixed_texts: Texts to make of pieces of each training text and another one; they have no labels.
        max_train_samples: Train on this many rows, drawn so that each class keeps its share.
        validation_share: Part of the training rows that becomes the missing validation split.
        test_share: Part of the training rows that becomes the missing test split.
        seed: Draws the carved splits and the sample.
        drop_leaks: Remove training and unlabelled rows that stand, exactly or nearly, in validation or test.
        augmentation: Edited copies of the training rows to add.
    """

    dataset_name: str | None = None
    dataset_config_name: str | None = None
    train_file: str | None = None
    validation_file: str | None = None
    test_file: str | None = None
    text_column: str = "text"
    text_pair_column: str | None = None
    label_column: str = "label"
    problem_type: ProblemType | Literal["auto"] = "auto"
    label_separator: str | None = None
    min_label_rows: int = 1
    unlabelled_file: str | None = None
    unlabelled_rows: int | None = None
    mixed_texts: int = 0
    max_train_samples: int | None = None
    validation_share: float = 0.1
    test_share: float = 0.1
    seed: int = 42
    drop_leaks: bool = False
    augmentation: Augmentation | None = None

    @property
    def text_columns(self) -> list[str]:
        """The columns that hold text."""
        return [self.text_column] if self.text_pair_column is None else [self.text_column, self.text_pair_column]


@dataclass(frozen=True, kw_only=True)
class TextData:
    """Checked rows in memory.

    `train`, `validation` and `test` have the columns `text`, `text_pair` (only for pairs), `label` (index into
    `schema`; a list of them for multi-label; a number for regression) and `row` (the row's number in its file, from 1;
    carved rows keep that of the training file).
    `unlabelled` and `mixed` have no `label`; `row` of a mixture is that of the training row it starts from.

    Args:
        schema: The classes, frozen from the training rows.
        train: Training rows.
        validation: Validation rows.
        test: Test rows.
        unlabelled: Texts without labels, if asked for.
        mixed: Mixtures of training texts, if asked for. Leaks are counted without them.
        leaks: Per pair of splits, such as `train_test`, what `Leaks.as_dict` gives for the second of the two, as the
            splits now are: after `drop_leaks`, if that was asked for. `rows` are indices from 0.
        fingerprint: sha256 over the schema and every row of every split, in order.
        sources: Split to the name of its file, without the folder.
        removed: How many rows were taken out: `train_leaks`, `unlabelled_exact`, `unlabelled_leaks`,
            `unlabelled_sample`, `train_sample`.
        contradictions: Distinct training texts that stand there with more than one label.
        warnings: What a reader of the report should know.
        augmented: Edited copies among the training rows, which stand at their end: the `edits`, rows `added` and
            `not_made`; empty if none were asked for. Leaks and contradictions are counted without them.
        unmixed: How many of the mixtures that were asked for would have been texts that are there already.
    """

    schema: LabelSchema
    train: Dataset
    validation: Dataset
    test: Dataset
    unlabelled: Dataset | None
    mixed: Dataset | None
    leaks: dict[str, dict[str, Any]]
    fingerprint: str
    sources: dict[str, str]
    removed: dict[str, int]
    contradictions: int
    warnings: tuple[str, ...]
    augmented: dict[str, Any]
    unmixed: int

    @property
    def taught(self) -> list[str]:
        """The splits that a teacher labels: the training rows, and texts without labels if there are any."""
        return ["train", *(split for split in ("unlabelled", "mixed") if getattr(self, split) is not None)]

    def facts(self) -> dict[str, Any]:
        """What a report says about the data; the leaks without their rows."""
        splits = {"train": self.train, "validation": self.validation, "test": self.test}
        return {
            "problem_type": self.schema.problem_type,
            "rows": {split: len(rows) for split, rows in splits.items()}
            | {split: len(getattr(self, split)) for split in self.taught[1:]},
            "classes": len(self.schema),
            **self._label_facts(splits),
            "leaks": {pair: {k: v for k, v in found.items() if k != "rows"} for pair, found in self.leaks.items()},
            "contradictions": self.contradictions,
            "removed": dict(self.removed),
            "augmented": dict(self.augmented),
            "mixed": {} if self.mixed is None else {"made": len(self.mixed), "not_made": self.unmixed},
            "warnings": list(self.warnings),
            "sources": dict(self.sources),
            "fingerprint": self.fingerprint,
        }

    def _label_facts(self, splits: Mapping[str, Dataset]) -> dict[str, Any]:
        """How often each class occurs in each split; of numbers, their mean, deviation and range."""
        if self.schema.problem_type == REGRESSION:
            numbers = {split: np.asarray(rows["label"][:]) for split, rows in splits.items()}
            return {
                "numbers": {
                    split: {"mean": found.mean(), "deviation": found.std(), "low": found.min(), "high": found.max()}
                    for split, found in numbers.items()
                }
            }
        counts = {}
        for split, rows in splits.items():
            labels = rows["label"][:]
            several = self.schema.problem_type == MULTI_LABEL
            counts[split] = Counter(chain.from_iterable(labels) if several else labels)
        names = list(enumerate(self.schema.names))
        return {
            "class_rows": {split: {name: found[index] for index, name in names} for split, found in counts.items()}
        }


def load_data(request: DataRequest) -> TextData:
    """Read, check, split and compare the rows that a request names.

    Raises:
        ConfigError: Options that do not go together; all of them at once.
        DataNotFoundError: A file, folder or dataset does not exist.
        DataError: Rows that cannot be used; names file and rows.
        LabelError: Labels in validation or test that training does not have; names file and rows.
    """
    _check_request(request)
    tables, extra = _read(request)
    _refuse_unused_shares(request, tables)
    text, pair, label = request.text_column, request.text_pair_column, request.label_column
    separator = request.label_separator
    kind = request.problem_type
    if kind == "auto":
        kind = problem_type_of(tables["train"], label, separator=separator)
    if request.min_label_rows > 1 and kind != MULTI_LABEL:
        raise ConfigError("min_label_rows: is for multi-label data; here each row has one label.")
    splits: dict[str, Rows] = {}
    known: set[str] = set()
    for split, table in tables.items():  # training rows first
        splits[split] = check_rows(
            table, text=text, pair=pair, label=label, problem_type=kind, separator=separator, known=known
        )
        if kind == SINGLE_LABEL:
            known.update(splits["train"].labels or ())
    unlabelled = None if extra is None else check_rows(extra, text=text, pair=pair, label=None)
    warnings: list[str] = []
    carved = [split for split in ("validation", "test") if split not in splits]
    schema = _freeze(splits, request, kind, carved, warnings)
    shares = {"validation": request.validation_share, "test": request.test_share}
    sources = carve(splits, shares, request.seed, problem_type=kind)
    if unlabelled is not None:
        sources["unlabelled"] = unlabelled.name
    splits["train"], unlabelled, removed = _reduce(splits, unlabelled, request, schema)
    if kind != REGRESSION:
        warnings += absent_classes(splits, schema)
    for line in warnings:
        LOGGER.warning(line)
    leaks, contradictions = compare(splits, unlabelled), count_contradictions(splits["train"])
    written = splits["train"]
    splits["train"], augmented = _augment(splits, request.augmentation)
    mixed, unmixed = _mix(written, [*splits.values(), *([] if unlabelled is None else [unlabelled])], request)
    return TextData(
        schema=schema,
        train=to_dataset(splits["train"], schema),
        validation=to_dataset(splits["validation"], schema),
        test=to_dataset(splits["test"], schema),
        unlabelled=None if unlabelled is None else to_dataset(unlabelled, schema),
        mixed=None if mixed is None else to_dataset(mixed, schema),
        leaks=leaks,
        fingerprint=fingerprint(
            schema, {**{split: splits[split] for split in SPLITS}, "unlabelled": unlabelled, "mixed": mixed}
        ),
        sources=sources,
        removed=removed,
        contradictions=contradictions,
        warnings=tuple(warnings),
        augmented=augmented,
        unmixed=unmixed,
    )


def _freeze(
    splits: dict[str, Rows], request: DataRequest, kind: ProblemType, carved: list[str], warnings: list[str]
) -> LabelSchema:
    """The schema of the training rows, which the labels of all splits must keep to."""
    train = splits["train"]
    if kind == REGRESSION:
        return freeze_number(train, label_column=request.label_column)
    if kind == SINGLE_LABEL:
        schema = freeze_schema(train, carved=carved, warnings=warnings)
    else:
        schema = freeze_label_set(train, min_rows=request.min_label_rows, warnings=warnings)
        if request.min_label_rows > 1:
            splits.update({split: drop_rare_labels(rows, schema) for split, rows in splits.items()})
    check_labels(splits, schema)
    return schema


def _reduce(
    splits: dict[str, Rows], unlabelled: Rows | None, request: DataRequest, schema: LabelSchema
) -> tuple[Rows, Rows | None, dict[str, int]]:
    """Take out what may not be learnt from, and draw the samples; also how many rows each step took out."""
    train, removed = splits["train"], {}
    if request.drop_leaks:
        clean = drop_leaks(train, splits)
        if schema.problem_type == SINGLE_LABEL:
            check_classes_left(clean, schema)
        removed["train_leaks"] = len(train) - len(clean)
        train = clean
    if request.max_train_samples is not None:
        drawn = sample(train, request.max_train_samples, request.seed, problem_type=schema.problem_type)
        removed["train_sample"] = len(train) - len(drawn)
        train = drawn
    if unlabelled is not None:
        rest = keep_apart(unlabelled, {**splits, "train": train})
        removed["unlabelled_exact"] = len(unlabelled) - len(rest)
        unlabelled = rest
        if request.drop_leaks:
            rest = drop_leaks(unlabelled, splits)
            removed["unlabelled_leaks"] = len(unlabelled) - len(rest)
            unlabelled = rest
        if request.unlabelled_rows is not None:
            rest = draw_texts(unlabelled, request.unlabelled_rows, request.seed)
            removed["unlabelled_sample"] = len(unlabelled) - len(rest)
            unlabelled = rest
    LOGGER.info("rows taken out: %s", removed or "none")
    return train, unlabelled, removed


def _augment(splits: Mapping[str, Rows], plan: Augmentation | None) -> tuple[Rows, dict[str, Any]]:
    """The training rows with their edited copies, and what was done."""
    train = splits["train"]
    if plan is None:
        return train, {}
    rows, not_made = augment(train, [splits["validation"], splits["test"]], plan)
    added = len(rows) - len(train)
    LOGGER.info("augmentation: %d edited copies added, %d could not be made", added, not_made)
    return rows, {"edits": list(plan.edits), "added": added, "not_made": not_made}


def _mix(train: Rows, others: Sequence[Rows], request: DataRequest) -> tuple[Rows | None, int]:
    """Mixtures of training texts, if they are asked for, and how many could not be made."""
    if not request.mixed_texts:
        return None, 0
    mixed, not_made = mix(train, others, count=request.mixed_texts, seed=request.seed)
    LOGGER.info("mixed texts: %d made, %d would have been texts that are there", len(mixed), not_made)
    return mixed, not_made


def _check_request(request: DataRequest) -> None:
    faults = []
    files = [name for name in ("train_file", "validation_file", "test_file") if getattr(request, name) is not None]
    if request.dataset_name is not None and files:
        faults.append(f"dataset_name and {', '.join(files)} exclude each other: give one or the other")
    if request.dataset_name is None and request.train_file is None:
        faults.append("no training data: give dataset_name or train_file")
    if request.dataset_name is None and request.dataset_config_name is not None:
        faults.append("dataset_config_name needs dataset_name")
    if request.dataset_name is None and request.unlabelled_file == AUTO:
        faults.append("unlabelled_file 'auto' needs a dataset_name that is a folder or a bundled set")
    columns = [*request.text_columns, request.label_column]
    if len(set(columns)) < len(columns):
        faults.append(f"text, text pair and label need a column each, not {', '.join(map(repr, columns))}")
    for name in ("validation_share", "test_share"):
        if not 0 < getattr(request, name) < 1:
            faults.append(f"{name} must lie between 0 and 1, not {getattr(request, name)}")
    if request.validation_share + request.test_share >= 1:
        faults.append("validation_share and test_share together must be less than 1")
    if request.max_train_samples is not None and request.max_train_samples < 1:
        faults.append(f"max_train_samples must be at least 1, not {request.max_train_samples}")
    kind = request.problem_type
    if kind not in (*PROBLEM_TYPES, "auto"):
        faults.append(f"problem_type: {kind!r} is not one of auto, {', '.join(PROBLEM_TYPES)}")
    if request.label_separator is not None and (kind not in (MULTI_LABEL, "auto") or not request.label_separator):
        faults.append("label_separator: needs multi-label data, and cannot be empty")
    if request.min_label_rows < 1:
        faults.append(f"min_label_rows: {request.min_label_rows} is below 1")
    if faults:
        raise ConfigError.from_faults(faults)


def _refuse_unused_shares(request: DataRequest, tables: Mapping[str, Table]) -> None:
    """Refuse the share of a split that need not be carved out."""
    faults = [
        f"{split}_share: does nothing: {request.dataset_name or table.name} has a {split} split"
        for split, table in tables.items()
        if split != "train" and getattr(request, f"{split}_share") != getattr(DataRequest, f"{split}_share")
    ]
    if faults:
        raise ConfigError.from_faults(faults)


def _read(request: DataRequest) -> tuple[dict[str, Table], Table | None]:
    """The tables of the splits that exist, and the unlabelled one."""
    columns = [*request.text_columns, request.label_column]
    unlabelled = request.unlabelled_file
    if request.dataset_name is None:
        named = {"train": request.train_file, "validation": request.validation_file, "test": request.test_file}
        tables = {split: read_table(path, columns) for split, path in named.items() if path is not None}
    elif (folder := find_folder(request.dataset_name)) is not None:
        if request.dataset_config_name is not None:
            raise ConfigError(
                f"dataset_config_name is for the Hub, but {request.dataset_name} is a folder or bundled set."
            )
        tables = read_folder(folder, columns)
        if unlabelled == AUTO:
            unlabelled = str(folder / UNLABELLED_FILE)
    else:
        if unlabelled == AUTO:
            raise ConfigError(
                f"unlabelled_file 'auto' needs a folder or a bundled set; {request.dataset_name} is neither.",
                fix="name the file",
            )
        tables = read_hub(request.dataset_name, request.dataset_config_name, columns, request.label_column)
    extra = None if unlabelled is None else read_table(unlabelled, request.text_columns, texts_only=True)
    return tables, extra
