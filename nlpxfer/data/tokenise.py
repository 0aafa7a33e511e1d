"""Rows as token ids, packed in flat arrays, and the collator that pads a batch to its own longest row.

A row costs its token ids (4 bytes each; 1 more where the tokenizer gives segment ids) and nothing else, so a million
rows of 30 tokens are 120 MB.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from nlpxfer.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, eq=False)
class TokenisedRows(torch.utils.data.Dataset[dict[str, Any]]):
    """Token ids of N rows, with per-row columns such as labels and teacher logits.

    Attributes:
        tokens: Flat token ids of all rows, int32.
        token_types: Flat segment ids, uint8, or None if the tokenizer gives none.
        starts: N + 1 offsets into `tokens`.
        columns: Arrays with N rows each: `labels` (int64, -100 for none; or float32, NaN for none),
            `teacher_logits` (float32), …
    """

    tokens: Array
    token_types: Array | None
    starts: Array
    columns: Mapping[str, Array] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> Array:
        """Tokens of each row, special tokens counted."""
        return np.diff(self.starts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]
        span = slice(self.starts[index], self.starts[index + 1])
        row: dict[str, Any] = {"input_ids": self.tokens[span]}
        if self.token_types is not None:
            row["token_type_ids"] = self.token_types[span]
        return row | {name: values[index] for name, values in self.columns.items()}

    def with_columns(self, **columns: Array) -> TokenisedRows:
        """The same rows with further columns.

        Raises:
            DataError: A column has another number of rows.
        """
        for name, values in columns.items():
            if len(values) != len(self):
                raise DataError(f"Column {name} has {len(values)} rows, the texts have {len(self)}.")
        return replace(self, columns={**self.columns, **columns})

    def select(self, indices: Sequence[int] | Array) -> TokenisedRows:
        """Some of the rows, in the order given; a mask of N booleans keeps the order of the rows."""
        asked = np.asarray(indices)
        chosen = np.arange(len(self))[asked if asked.size else asked.astype(np.int64)]
        lengths = self.lengths[chosen]
        starts = np.concatenate([[0], np.cumsum(lengths)])
        flat = np.repeat(self.starts[chosen] - starts[:-1], lengths) + np.arange(starts[-1])
        return TokenisedRows(
            self.tokens[flat],
            None if self.token_types is None else self.token_types[flat],
            starts,
            {name: values[chosen] for name, values in self.columns.items()},
        )

    @staticmethod
    def join(first: TokenisedRows, second: TokenisedRows) -> TokenisedRows:
        """The rows of both, one after the other; both need the same columns.

        Raises:
            DataError: The columns differ, or only one of the two has token types.
        """
        if set(first.columns) != set(second.columns):
            raise DataError(f"Columns differ: {sorted(first.columns)} and {sorted(second.columns)}.")
        types = None
        if first.token_types is not None and second.token_types is not None:
            types = np.concatenate([first.token_types, second.token_types])
        elif first.token_types is not second.token_types:
            raise DataError("Only one of the two has token types.", why="They come from different tokenizers.")
        return TokenisedRows(
            np.concatenate([first.tokens, second.tokens]),
            types,
            np.concatenate([first.starts, second.starts[1:] + first.starts[-1]]),
            {name: np.concatenate([first.columns[name], second.columns[name]]) for name in first.columns},
        )


def tokenise(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    pairs: Sequence[str] | None = None,
    *,
    max_length: int,
    labels: Sequence[int] | Array | None = None,
) -> TokenisedRows:
    """Turn texts into token ids, cut at `max_length` tokens with special tokens counted.

    Args:
        tokenizer: Tokenizer of the model.
        texts: N texts.
        pairs: N second texts, if the task is on pairs; the longer of the two is cut first.
        max_length: Longest row, in tokens.
        labels: Of N rows: class indices, or what `LabelSchema.array` and `unlabelled` give. Without it all rows get
            -100.

    Raises:
        DataError: A text has no tokens, or there are other numbers of texts, second texts and labels.
    """
    if pairs is not None and len(pairs) != len(texts):
        raise DataError(f"There are {len(pairs)} second texts for {len(texts)} texts.")
    starts, chunks, type_chunks = [0], [], []
    for begin in range(0, len(texts), 4096):
        end = begin + 4096
        encoded = tokenizer(
            list(texts[begin:end]),
            None if pairs is None else list(pairs[begin:end]),
            truncation=True,
            max_length=max_length,
            padding=False,
            return_attention_mask=False,
        )
        for ids in encoded["input_ids"]:
            starts.append(starts[-1] + len(ids))
        chunks.append(_flat(encoded["input_ids"], np.int32))
        if "token_type_ids" in encoded:
            type_chunks.append(_flat(encoded["token_type_ids"], np.uint8))
    _refuse_empty(np.diff(starts))
    gold = np.full(len(texts), -100) if labels is None else np.asarray(labels)
    typed = "token_type_ids" in tokenizer.model_input_names
    return TokenisedRows(
        np.concatenate([np.zeros(0, dtype=np.int32), *chunks]),
        np.concatenate([np.zeros(0, dtype=np.uint8), *type_chunks]) if typed else None,
        np.asarray(starts, dtype=np.int64),
    ).with_columns(labels=gold if gold.dtype.kind == "f" else gold.astype(np.int64))


def _refuse_empty(lengths: Array) -> None:
    """A row of padding alone has no state to read: a model gives NaN for it, or what its neighbours happen to be."""
    if len(lengths) and not lengths.all():
        raise DataError(
            f"Row {int(np.argmin(lengths))} has no tokens.",
            why="the tokenizer drops every character of its text",
            fix="drop the row, or use a checkpoint whose tokenizer knows its characters",
        )


def _flat(rows: Sequence[Sequence[int]], dtype: type[np.integer[Any]]) -> Array:
    return np.fromiter((token for row in rows for token in row), dtype=dtype)


@dataclass(frozen=True)
class Collator:
    """Pads a batch to its own longest row and turns all columns into tensors.

    Attributes:
        pad_token_id: Token that fills the shorter rows.
        padding_side: "right" or "left".
        multiple_of: Round the padded length up to a multiple of this: see `padding_multiple`.
        rounded_to: Rounding up stops here: a model may have no position for more.
    """

    pad_token_id: int
    padding_side: str = "right"
    multiple_of: int = 1
    rounded_to: int | None = None

    @classmethod
    def for_tokenizer(
        cls, tokenizer: PreTrainedTokenizerBase, *, multiple_of: int = 1, rounded_to: int | None = None
    ) -> Collator:
        """The collator that fits a tokenizer: it pads on the right, whatever side the tokenizer pads.

        Left padding, which many decoders' tokenizers ask for, serves generation. In a classifier it moves the first
        token, which encoders read, and all absolute positions, so that a row's logits depend on the rows beside it.

        Raises:
            DataError: The tokenizer has no padding token.
        """
        if tokenizer.pad_token_id is None:
            raise DataError("The tokenizer has no padding token.", fix="tokenizer.pad_token = tokenizer.eos_token")
        return cls(int(tokenizer.pad_token_id), "right", multiple_of, rounded_to)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """The batch of B rows: ids, mask and segment ids of shape (B, longest row), and all columns."""
        longest = max(len(row["input_ids"]) for row in rows)
        width = -(-longest // self.multiple_of) * self.multiple_of
        if self.rounded_to is not None:
            width = max(longest, min(width, self.rounded_to))
        ids = np.full((len(rows), width), self.pad_token_id, dtype=np.int64)
        mask = np.zeros((len(rows), width), dtype=np.int64)
        types = np.zeros((len(rows), width), dtype=np.int64) if "token_type_ids" in rows[0] else None
        for i, row in enumerate(rows):
            length = len(row["input_ids"])
            span = slice(width - length, width) if self.padding_side == "left" else slice(0, length)
            ids[i, span], mask[i, span] = row["input_ids"], 1
            if types is not None:
                types[i, span] = row["token_type_ids"]
        batch = {"input_ids": ids, "attention_mask": mask} | ({} if types is None else {"token_type_ids": types})
        others = [name for name in rows[0] if name not in ("input_ids", "token_type_ids")]
        columns = {name: np.stack([row[name] for row in rows]) for name in others}
        return {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in (batch | columns).items()}
