"""Edited copies of training texts: neighbours that a classifier should answer alike.

Two of the four edits of EDA that need no dictionary, and slips of the keyboard:

    swap        n times two words change places
    deletion    n words are left out
    typo        in n words two letters change places, or one is left out, or doubled

with n a share of the text's words, at least 1. The copies are made before any tokenising, so that a teacher labels the
copies themselves and its cache stays keyed by content. A copy that reads like any training, validation or test text is
not added; neither is one that the edit could not change: a single word cannot be swapped.

Source: Wei and Zou 2019, arXiv:1901.11196, section 2.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from nlpxfer.config.augmentation import Augmentation
from nlpxfer.data.rows import Rows, normalise_text

_TWO_LETTERS = re.compile(r"[^\W\d_](?=[^\W\d_])")


def augment(train: Rows, others: Iterable[Rows], plan: Augmentation) -> tuple[Rows, int]:
    """The training rows, and after them edited copies with the same labels and row numbers.

    Of a pair one text is edited, drawn by lot; the other one if that does not change it.

    Args:
        train: Labelled rows.
        others: Rows whose texts no copy may have: validation and test.
        plan: Which copies.

    Returns:
        All rows, and how many copies could not be made.
    """
    taken = {key for rows in (train, *others) for key in rows.keys()}
    sources: list[int] = []
    texts: list[str] = []
    pairs: list[str] = []
    for index, text in enumerate(train.texts):
        pair = None if train.pairs is None else train.pairs[index]
        for copy in range(plan.copies):
            made = _copy(text, pair, copy, plan, taken)
            if made is not None:
                sources.append(index)
                texts.append(made[0])
                pairs.append(made[1] or "")
    copies = train.take(sources)
    joined = replace(
        train,
        texts=[*train.texts, *texts],
        pairs=None if train.pairs is None else [*train.pairs, *pairs],
        labels=None if train.labels is None else [*train.labels, *(copies.labels or ())],
        numbers=[*train.numbers, *copies.numbers],
        lines=None if train.lines is None else [*train.lines, *(copies.lines or ())],
    )
    return joined, plan.copies * len(train) - len(texts)


def _copy(
    text: str, pair: str | None, copy: int, plan: Augmentation, taken: set[str]
) -> tuple[str, str | None] | None:
    """A copy that is not `taken` yet, and is then; None if no edit gives one."""
    chooser = random.Random(f"{plan.seed} {copy} {text} {pair}")  # a text seeds alike in every process
    for edit in chooser.sample(plan.edits, len(plan.edits)):
        sides = [0] if pair is None else chooser.sample([0, 1], 2)
        for side in sides:
            made = [text, pair]
            made[side] = edit_text(str(made[side]), edit, plan.share, chooser)
            key = normalise_text(str(made[0]), made[1])
            if key not in taken:
                taken.add(key)
                return str(made[0]), made[1]
    return None


def edit_text(text: str, edit: str, share: float, chooser: random.Random) -> str:
    """The text with a share of its words edited, at least one; as it was if the edit cannot change it.

    Args:
        text: Words with white space between them, which stays.
        edit: One of `EDITS`.
        share: Share of the words, in (0, 1].
        chooser: Draws the words.

    >>> edit_text("one two", "swap", 0.1, random.Random(0))
    'two one'
    """
    pieces = re.split(r"(\s+)", text)
    words = [index for index, piece in enumerate(pieces) if piece and not piece.isspace()]
    _EDITS[edit](pieces, words, max(1, round(share * len(words))), chooser)
    return "".join(pieces).strip()


def _swap(pieces: list[str], words: Sequence[int], count: int, chooser: random.Random) -> None:
    if len(words) < 2:
        return
    for _ in range(count):
        one, other = chooser.sample(words, 2)
        pieces[one], pieces[other] = pieces[other], pieces[one]


def _delete(pieces: list[str], words: Sequence[int], count: int, chooser: random.Random) -> None:
    """One word is always left."""
    for index in chooser.sample(words, max(0, min(count, len(words) - 1))):
        pieces[index] = ""
        if index + 1 < len(pieces):
            pieces[index + 1] = ""  # the white space after it


def _mistype(pieces: list[str], words: Sequence[int], count: int, chooser: random.Random) -> None:
    """Between two letters only: numbers keep their meaning, and no word is emptied."""
    places = {index: [found.start() for found in _TWO_LETTERS.finditer(pieces[index])] for index in words}
    typable = [index for index in words if places[index]]
    for index in chooser.sample(typable, min(count, len(typable))):
        word, at = pieces[index], chooser.choice(places[index])
        slips = (word[at + 1] + word[at], word[at + 1], word[at] * 2 + word[at + 1])
        pieces[index] = word[:at] + chooser.choice(slips) + word[at + 2 :]


_EDITS: dict[str, Callable[[list[str], Sequence[int], int, random.Random], None]] = {
    "swap": _swap,
    "deletion": _delete,
    "typo": _mistype,
}
