"""Checked rows as `datasets.Dataset` in memory, and their fingerprint."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nlpxfer.data.rows import Rows
from nlpxfer.data.schema import LabelSchema

if TYPE_CHECKING:
    from datasets import Dataset


def to_dataset(rows: Rows, schema: LabelSchema) -> Dataset:
    """Pack rows: `text`, `text_pair` (only for pairs), `label` (index into the schema, only if labelled), `row`."""
    from datasets import Dataset, Features, Value

    columns: dict[str, list[Any]] = {"text": list(rows.texts)}
    if rows.pairs is not None:
        columns["text_pair"] = list(rows.pairs)
    if rows.labels is not None:
        columns["label"] = [schema.encode(name) for name in rows.labels]
    columns["row"] = list(rows.numbers)
    kinds = {name: Value("string" if name.startswith("text") else "int64") for name in columns}
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
        add(*(rows.labels or ()))
    return state.hexdigest()
