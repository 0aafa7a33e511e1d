"""Texts made of pieces of two training texts, for a teacher to label: a transfer set where there are no other texts.

A mixture is a span of one text and a span of another, each of a share of its words that is drawn evenly from `SPANS`,
in either order. It has no label of its own: what it is worth says the teacher. Of a pair both texts are mixed, with
those of the same other row. Words are what stands between white space; of a text without any the span is all of it.

Sources: Liang et al. 2021 (MixKD), arXiv:2011.00593: a student learns what its teacher says of mixtures of rows, there
of their embeddings; Yoon et al. 2021 (SSMix), arXiv:2106.08062: mixtures of texts themselves, by spans.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Final

from nlpxfer.data.rows import Rows, normalise_text
from nlpxfer.errors import DataError

SPANS: Final = (0.3, 0.7)
"""Least and greatest share of a text's words that a mixture takes."""


def mix(train: Rows, others: Iterable[Rows], *, count: int, seed: int) -> tuple[Rows, int]:
    """Unlabelled rows, each a mixture of a training row and another one drawn by lot.

    No mixture reads like another one, or like a training row or one of `others`.

    Args:
        train: N rows.
        others: Rows that no mixture may repeat: validation, test, unlabelled and edited ones.
        count: Mixtures that start from each row.
        seed: Draws the other rows and the spans.

    Returns:
        Up to N x count rows with the numbers of the rows that they start from, and how many could not be made.

    Raises:
        DataError: There is one training row, or no mixture could be made.
    """
    if len(train) < 2:
        raise DataError(f"{train.source}: mixed_texts needs two training rows, and there is one.")
    taken = {key for rows in (train, *others) for key in rows.keys()}
    sources: list[int] = []
    texts: list[str] = []
    pairs: list[str] = []
    sides = [train.texts] if train.pairs is None else [train.texts, train.pairs]
    chooser = random.Random(f"mixed {seed}")  # seeds alike in every process
    for index in list(range(len(train))) * count:
        other = chooser.randrange(len(train) - 1)
        other += other >= index  # another row than this one
        rows = [index, other] if chooser.random() < 0.5 else [other, index]
        made = [" ".join(_span(side[row], chooser) for row in rows) for side in sides]
        key = normalise_text(*made)
        if key not in taken:
            taken.add(key)
            sources.append(index)
            texts.append(made[0])
            pairs += made[1:]
    if not texts:
        raise DataError(f"{train.source}: no mixture of its training texts differs from the texts that are there.")
    mixed = replace(train.take(sources), labels=None, texts=texts, pairs=None if train.pairs is None else pairs)
    return mixed, count * len(train) - len(texts)


def _span(text: str, chooser: random.Random) -> str:
    """Some of the words of a text, one after the other; at least one."""
    words: Sequence[str] = text.split()
    length = max(1, round(chooser.uniform(*SPANS) * len(words)))
    start = chooser.randint(0, max(0, len(words) - length))
    return " ".join(words[start : start + length])
