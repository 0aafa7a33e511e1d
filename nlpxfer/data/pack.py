"""Checked rows as `datasets.Dataset` in memory, and their fingerprint."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nlpxfer.data.rows import Rows
from nlpxfer.data.schema import LabelSchema
from nlpxfer.problem import MULTI_LABEL, REGRESSION, SINGLE_LABEL

if TYPE_CHECKING:
    from datasets import Dataset


def to_dataset(rows: Rows, schema: LabelSchema) -> Dataset:
    """Pack rows: `text`, `text_pair` (only for pairs), `label` (only if labelled), `row`.

    A label is an index into the schema, a list of such indices for multi-label, or a number for regression.
    """
    from datasets import Dataset, Features, List, Value

    columns: dict[str, list[Any]] = {"text": list(rows.texts)}
    kinds: dict[str, Any] = {"text": Value("string")}
    if rows.pairs is not None:
        columns["text_pair"], kinds["text_pair"] = list(rows.pairs), Value("string")
    if rows.labels is not None and schema.problem_type == REGRESSION:
        columns["label"], kinds["label"] = list(rows.labels), Value("float64")
    elif rows.labels is not None and schema.problem_type == MULTI_LABEL:
        columns["label"] = [[schema.encode(name) for name in names] for names in rows.labels]
        kinds["label"] = List(Value("int64"))
    elif rows.labels is not None:
        columns["label"], kinds["label"] = [schema.encode(name) for name in rows.labels], Value("int64")
    columns["row"], kinds["row"] = list(rows.numbers), Value("int64")
    return Dataset.from_dict(columns, features=Features(kinds))


def fingerprint(schema: LabelSchema, splits: Mapping[str, Rows | None]) -> str:
    """A sha256 over the schema and the texts, pairs and labels of every split, in order.

    Files, line numbers and formats do not count: the same rows from csv and from parquet have the same fingerprint.
    """
    state = hashlib.sha256(b"nlpxfer data 1")

    def add(*values: str) -> None:
        for value in values:
            content = value.encode("utf-8")
            state.update(len(content).to_bytes(8, "little"))
            state.update(content)

    add(str(len(schema)), *schema.names)
    for split, rows in splits.items():
        if rows is None:
            continue
        add(split, str(len(rows)), str(rows.pairs is not None), str(rows.labels is not None))
        add(*rows.texts)
        add(*(rows.pairs or ()))
        if schema.problem_type == SINGLE_LABEL:
            add(*(rows.labels or ()))
        else:
            add(schema.problem_type, *map(repr, rows.labels or ()))
    return state.hexdigest()
