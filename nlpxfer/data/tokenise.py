"""Rows as token ids, packed in flat arrays, and the collator that pads a batch to its own longest row.

A row costs its token ids (4 bytes each; 1 more where the tokenizer gives segment ids) and little else, so a million
rows of 30 tokens are 120 MB. A long row may be several windows, which stand one after the other in the same arrays and
are rows of their own for the model; whatever else belongs to a row stays one per row.

Shapes: B batch rows, W windows of all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from nlpxfer.config.long_texts import LongTexts
from nlpxfer.data.windows import read_positions
from nlpxfer.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Array = np.ndarray[Any, Any]

WINDOWS_PER_ROW: Final = "windows_per_row"
"""Key of a batch: how many rows of `input_ids` belong to each of its B rows; missing where that is one for all."""
PIECE_ROWS: Final = 4096
PIECE_CHARACTERS: Final = 2_000_000
"""Rows and characters that are tokenised together: a token takes a hundred bytes until it is packed."""


@dataclass(frozen=True, eq=False)
class TokenisedRows(torch.utils.data.Dataset[dict[str, Any]]):
    """Token ids of N rows, with per-row columns such as labels and teacher logits.

    Attributes:
        tokens: Flat token ids of all rows, int32.
        token_types: Flat segment ids, uint8, or None if the tokenizer gives none.
        starts: N + 1 offsets into `tokens`.
        columns: Arrays with N rows each: `labels` (int64, -100 for none; or float32, NaN for none),
            `teacher_logits` (float32), …
        windows: W + 1 offsets into `tokens`, those of `starts` among them; None where each row is one window.
        unread: Tokens of each whole text that its row leaves out, int32; None if not known.
    """

    tokens: Array
    token_types: Array | None
    starts: Array
    columns: Mapping[str, Array] = field(default_factory=dict)
    windows: Array | None = None
    unread: Array | None = None

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> Array:
        """Tokens of each row, of all its windows together, special tokens counted."""
        return np.diff(self.starts)

    @property
    def windows_per_row(self) -> Array:
        """How many windows each row has."""
        if self.windows is None:
            return np.ones(len(self), dtype=np.int64)
        return np.diff(np.searchsorted(self.windows, self.starts))

    def each_window(self) -> TokenisedRows:
        """All windows as rows of their own, in order and without columns; the arrays are shared."""
        return TokenisedRows(self.tokens, self.token_types, self.starts if self.windows is None else self.windows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]
        span = slice(self.starts[index], self.starts[index + 1])
        row: dict[str, Any] = {"input_ids": self.tokens[span]}
        if self.token_types is not None:
            row["token_type_ids"] = self.token_types[span]
        if self.windows is not None:
            first, last = np.searchsorted(self.windows, self.starts[index : index + 2])
            row["window_lengths"] = np.diff(self.windows[first : last + 1])
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
        flat = _ranges(self.starts[chosen], lengths)
        windows = None
        if self.windows is not None:
            kept = _ranges(np.searchsorted(self.windows, self.starts[chosen]), self.windows_per_row[chosen])
            windows = _offsets(np.diff(self.windows)[kept])
        return TokenisedRows(
            self.tokens[flat],
            None if self.token_types is None else self.token_types[flat],
            _offsets(lengths),
            {name: values[chosen] for name, values in self.columns.items()},
            windows,
            None if self.unread is None else self.unread[chosen],
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
        windows = None
        if first.windows is not None or second.windows is not None:
            left, right = (rows.each_window().starts for rows in (first, second))
            windows = np.concatenate([left, right[1:] + left[-1]])
        known = first.unread is not None and second.unread is not None
        return TokenisedRows(
            np.concatenate([first.tokens, second.tokens]),
            types,
            np.concatenate([first.starts, second.starts[1:] + first.starts[-1]]),
            {name: np.concatenate([first.columns[name], second.columns[name]]) for name in first.columns},
            windows,
            np.concatenate([first.unread, second.unread]) if known else None,
        )


def _offsets(lengths: Array) -> Array:
    """Where each of some pieces begins and the last one ends, if they stand one after the other."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def _ranges(begins: Array, lengths: Array) -> Array:
    """The indices of some ranges, one range after the other."""
    offsets = _offsets(lengths)
    return np.repeat(begins - offsets[:-1], lengths) + np.arange(offsets[-1])


def tokenise(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    pairs: Sequence[str] | None = None,
    *,
    max_length: int,
    long_texts: LongTexts | None = None,
    labels: Sequence[int] | Array | None = None,
) -> TokenisedRows:
    """Turn texts into token ids, in windows of at most `max_length` tokens with special tokens counted.

    Args:
        tokenizer: Tokenizer of the model.
        texts: N texts.
        pairs: N second texts, if the task is on pairs.
        max_length: Longest window, in tokens.
        long_texts: What of longer rows is read, see `nlpxfer.data.windows`. Default: their beginning; of a pair the
            longer text is then cut first.
        labels: Of N rows: class indices, or what `LabelSchema.array` and `unlabelled` give. Without it all rows get
            -100.

    Raises:
        DataError: A text has no tokens, or there are other numbers of texts, second texts and labels.
        ConfigError: `long_texts` needs more room than there is, or a tokenizer that knows where its tokens come from.
    """
    if pairs is not None and len(pairs) != len(texts):
        raise DataError(f"There are {len(pairs)} second texts for {len(texts)} texts.")
    plan = long_texts or LongTexts()
    check_windows(tokenizer, plan, max_length, pairs=pairs is not None)
    packed = _Packed()
    for begin, end in _pieces(texts, pairs):
        chosen = list(texts[begin:end]), None if pairs is None else list(pairs[begin:end])
        packed.add(_windows_of_rows(tokenizer, *chosen, plan, max_length))
    rows = packed.rows(typed="token_type_ids" in tokenizer.model_input_names)
    _refuse_empty(rows.lengths)
    gold = np.full(len(texts), -100) if labels is None else np.asarray(labels)
    return rows.with_columns(labels=gold if gold.dtype.kind == "f" else gold.astype(np.int64))


def check_windows(tokenizer: PreTrainedTokenizerBase, long_texts: LongTexts, max_length: int, *, pairs: bool) -> None:
    """See that a tokenizer can cut texts as asked for.

    Raises:
        ConfigError: Its special tokens leave no room, or it does not know which token comes from which text.
    """
    if long_texts.policy == "head":
        return
    if not tokenizer.is_fast:
        raise ConfigError(
            f"long_texts: {long_texts.policy} does not work with {type(tokenizer).__name__}, which is not one of the "
            "tokenizers library.",
            fix="--long_texts head",
        )
    long_texts.check_room(max_length, tokenizer.num_special_tokens_to_add(pair=pairs), pairs=pairs)


def _pieces(texts: Sequence[str], pairs: Sequence[str] | None) -> Iterator[tuple[int, int]]:
    """Begin and end of what is tokenised together."""
    begin = characters = 0
    for index, text in enumerate(texts):
        characters += len(text) + (0 if pairs is None else len(pairs[index]))
        if index + 1 - begin == PIECE_ROWS or characters >= PIECE_CHARACTERS:
            yield begin, index + 1
            begin, characters = index + 1, 0
    if begin < len(texts):
        yield begin, len(texts)


Window = tuple[Sequence[int] | Array, Sequence[int] | Array | None]
"""Token ids, and segment ids if there are any."""


def _windows_of_rows(
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    pairs: list[str] | None,
    long_texts: LongTexts,
    max_length: int,
) -> Iterator[tuple[int, list[Window]]]:
    """For each row the tokens that it leaves out, and its windows."""
    shared: dict[str, Any] = {"padding": False, "return_attention_mask": False, "verbose": False}
    whole = tokenizer(texts, pairs, **shared)
    ids, types = whole["input_ids"], whole.get("token_type_ids")
    long = [index for index, tokens in enumerate(ids) if len(tokens) > max_length]
    cut: dict[int, list[Window]] = {}
    plain = pairs is None and tokenizer.is_fast and tokenizer.truncation_side == "right"
    if long and long_texts.policy == "head" and not plain:  # the tokenizer knows best how it cuts a pair
        second = None if pairs is None else [pairs[i] for i in long]
        again = tokenizer([texts[i] for i in long], second, truncation=True, max_length=max_length, **shared)
        cut_types = again.get("token_type_ids") or [None] * len(long)
        cut = {i: [window] for i, window in zip(long, zip(again["input_ids"], cut_types, strict=True), strict=True)}
    for index, tokens in enumerate(ids):
        row_types = None if types is None else types[index]
        if len(tokens) <= max_length:
            yield 0, [(tokens, row_types)]
        elif index in cut:
            yield len(tokens) - len(cut[index][0][0]), cut[index]
        else:
            positions = read_positions(whole.sequence_ids(index), long_texts, max_length)
            row, typed = np.asarray(tokens), None if row_types is None else np.asarray(row_types)
            unread = len(row) - len(np.unique(np.concatenate(positions)))
            yield unread, [(row[chosen], None if typed is None else typed[chosen]) for chosen in positions]


class _Packed:
    """Rows as they are packed into flat arrays, piece by piece."""

    def __init__(self) -> None:
        self.tokens = [np.zeros(0, dtype=np.int32)]
        self.types = [np.zeros(0, dtype=np.uint8)]
        self.window_lengths: list[int] = []
        self.windows_per_row: list[int] = []
        self.unread: list[int] = []

    def add(self, rows: Iterable[tuple[int, list[Window]]]) -> None:
        """Append a piece."""
        tokens, types = [], []
        for unread, windows in rows:
            self.unread.append(unread)
            self.windows_per_row.append(len(windows))
            self.window_lengths += [len(ids) for ids, _ in windows]
            tokens += [np.asarray(ids, dtype=np.int32) for ids, _ in windows]
            types += [np.asarray(each, dtype=np.uint8) for _, each in windows if each is not None]
        self.tokens.append(np.concatenate(tokens))
        self.types += [np.concatenate(types)] if types else []

    def rows(self, *, typed: bool) -> TokenisedRows:
        """All of them."""
        windows = _offsets(np.array(self.window_lengths, dtype=np.int64))
        several = len(self.window_lengths) > len(self.windows_per_row)
        return TokenisedRows(
            np.concatenate(self.tokens),
            np.concatenate(self.types) if typed else None,
            windows[_offsets(np.array(self.windows_per_row, dtype=np.int64))],
            windows=windows if several else None,
            unread=np.array(self.unread, dtype=np.int32),
        )


def _refuse_empty(lengths: Array) -> None:
    """A row of padding alone has no state to read: a model gives NaN for it, or what its neighbours happen to be."""
    if len(lengths) and not lengths.all():
        raise DataError(
            f"Row {int(np.argmin(lengths))} has no tokens.",
            why="the tokenizer drops every character of its text",
            fix="drop the row, or use a checkpoint whose tokenizer knows its characters",
        )


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
        """The batch of B rows: ids, mask and segment ids of shape (W, longest window), and all columns of B rows.

        Where rows have several windows, `WINDOWS_PER_ROW` says how many each has.
        """
        windows = [window for row in rows for window in _windows(row)]
        longest = max(len(window["input_ids"]) for window in windows)
        width = -(-longest // self.multiple_of) * self.multiple_of
        if self.rounded_to is not None:
            width = max(longest, min(width, self.rounded_to))
        ids = np.full((len(windows), width), self.pad_token_id, dtype=np.int64)
        mask = np.zeros((len(windows), width), dtype=np.int64)
        types = np.zeros((len(windows), width), dtype=np.int64) if "token_type_ids" in rows[0] else None
        for i, window in enumerate(windows):
            length = len(window["input_ids"])
            span = slice(width - length, width) if self.padding_side == "left" else slice(0, length)
            ids[i, span], mask[i, span] = window["input_ids"], 1
            if types is not None:
                types[i, span] = window["token_type_ids"]
        batch = {"input_ids": ids, "attention_mask": mask} | ({} if types is None else {"token_type_ids": types})
        if "window_lengths" in rows[0]:
            batch[WINDOWS_PER_ROW] = np.array([len(row["window_lengths"]) for row in rows])
        others = [name for name in rows[0] if name not in ("input_ids", "token_type_ids", "window_lengths")]
        columns = {name: np.stack([row[name] for row in rows]) for name in others}
        return {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in (batch | columns).items()}


def _windows(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The token ids, and segment ids, of each window of a row."""
    if "window_lengths" not in row:
        return [row]
    ends = np.cumsum(row["window_lengths"])[:-1]
    parts = {name: np.split(row[name], ends) for name in ("input_ids", "token_type_ids") if name in row}
    return [dict(zip(parts, values, strict=True)) for values in zip(*parts.values(), strict=True)]
