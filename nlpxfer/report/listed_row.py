"""How a row of the data stands in the files that list rows: its number, its texts and its labels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def listed_row(
    index: int, numbers_N: Sequence[int], texts: Sequence[str], pairs: Sequence[str] | None
) -> dict[str, int | str]:
    """`row`, `text`, and `text_pair` for pairs, of the row at an index.

    >>> listed_row(1, [4, 9], ["a", "b"], None)
    {'row': 9, 'text': 'b'}
    """
    pair = {} if pairs is None else {"text_pair": pairs[index]}
    return {"row": int(numbers_N[index]), "text": texts[index], **pair}


def shown_number(number: float) -> float:
    """A number of a regression with 7 significant digits, as many as float32 has.

    >>> shown_number(0.123456789e-8)
    1.234568e-09
    """
    return float(f"{number:.7g}")


def labels_above(shares_C: Iterable[float], names: Sequence[str]) -> list[str]:
    """The labels whose share is above one half; of gold labels, zeros and ones, those that are given.

    >>> labels_above([0, 1], ["a", "b"])
    ['b']
    """
    return [name for name, share in zip(names, shares_C, strict=True) if share > 0.5]
