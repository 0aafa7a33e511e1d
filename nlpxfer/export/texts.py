"""The texts that an exported model is compared on: the user's own, or bundled ones and some that are hard to split."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from nlpxfer.classify import WINDOW, texts_of
from nlpxfer.data.sources import bundled_folder, bundled_names, split_files
from nlpxfer.data.stream import RowReader
from nlpxfer.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BUNDLED_ROWS: Final = 240
VARIED: Final = (
    "a",
    "?",
    "42",
    "no",
    "Where is my card payment of 12.50 EUR, and why was it declined twice?",
    "GROSSE BUCHSTABEN, Straße, Öl, naïve café, coöperate",
    "Привет, мир! Як справи? Καλημέρα κόσμε",
    "今天天气很好，我们去公园吧。 こんにちは世界 안녕하세요",
    "مرحبا بالعالم שלום עולם",
    "emoji 👍🏽 family 👩‍👩‍👧 and cafe\u0301 with a combining accent",
    "tab\tand\nline break   and   spaces",
    "https://example.org/a?b=c&d=%20#e <b>markup</b> {json: [1, 2.5e-3]} C:\\temp\\x",
    "x" * 300,
    "word " * 600,
    "A long text that goes on and on, with commas, numbers like 1,234 and names such as Ada Lovelace. " * 40,
)


@dataclass(frozen=True)
class Texts:
    """Texts to compare on, in windows.

    Attributes:
        source: What they are, without a path.
        windows: Texts, and their second texts in tasks on pairs.
    """

    source: str
    windows: Iterator[tuple[list[str], list[str] | None]]


def texts_to_compare(
    tokenizer: PreTrainedTokenizerBase, file: Path | None, text_column: str, text_pair_column: str | None
) -> Texts:
    """The rows of a file that have a text; without a file, bundled texts and `VARIED`.

    Args:
        tokenizer: Of the model.
        file: csv, tsv, jsonl or parquet.
        text_column: Of the file.
        text_pair_column: Of the file, for a model of text pairs; without a file, each text then gets another one.

    Raises:
        DataError: The file cannot be read.
    """
    if file is None:
        return _default(tokenizer, pairs=text_pair_column is not None)
    return Texts(file.name, _of_file(RowReader(file), text_column, text_pair_column))


def _of_file(
    reader: RowReader, text_column: str, text_pair_column: str | None
) -> Iterator[tuple[list[str], list[str] | None]]:
    """Windows of a file. Raises where no row has a text."""
    seen = found = 0
    columns = [name for name in (text_column, text_pair_column) if name is not None]
    for window in reader.windows(WINDOW, columns):
        texts, pairs, known = texts_of(reader, window.rows, seen, text_column, text_pair_column)
        seen, found = seen + len(known), found + len(texts)
        if texts:
            yield texts, pairs
    if not found:
        raise DataError(f"{reader.path} has no row with a text.")


def _default(tokenizer: PreTrainedTokenizerBase, *, pairs: bool) -> Texts:
    """Bundled texts first, as they are what speed is measured on, then `VARIED`."""
    names = bundled_names()[:1]
    texts = [text for name in names for text in _bundled(name)]
    for text in VARIED:
        if tokenizer(text, truncation=True, max_length=8)["input_ids"]:  # some drop characters that they do not know
            texts.append(text)
    second = [*texts[1:], texts[0]] if pairs else None
    sources = [*(f"test texts of {name}" for name in names), "built-in texts"]
    return Texts(" and ".join(sources), iter([(texts, second)]))


def _bundled(name: str) -> list[str]:
    """Evenly spread rows of a bundled set."""
    files = split_files((bundled_folder() or Path()) / name)
    reader = RowReader(files.get("test") or files["train"])
    texts = [str(row["text"]) for window in reader.windows(WINDOW) for row in window.rows]
    return texts[:: max(1, len(texts) // BUNDLED_ROWS)][:BUNDLED_ROWS]
