"""The files of a cross-validation: predictions/out_of_fold.jsonl, and label_errors.jsonl for whoever mends the data.

label_errors.jsonl holds texts of the data, and neither file is ever pushed.

Shapes: N training rows, C classes, E errors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from nlpxfer.evaluate.folds import OutOfFold
from nlpxfer.strict_json import write_json_lines_whole

OUT_OF_FOLD_FILE: Final = "predictions/out_of_fold.jsonl"
LABEL_ERRORS_FILE: Final = "label_errors.jsonl"
_DIGITS: Final = 6


def write_out_of_fold(folder: str | Path, found: OutOfFold, names: Sequence[str], numbers_N: Sequence[int]) -> Path:
    """One line per training row: `row`, `label`, `predicted`, `probability`, `fold` (from 1) and `probabilities`.

    Args:
        folder: The output folder.
        found: Predictions by the models that have not seen the rows.
        names: Label names in schema order.
        numbers_N: The rows' numbers in their file.
    """

    def lines() -> Iterator[dict[str, Any]]:
        columns = (numbers_N, found.labels_N, found.folds.fold_N, found.shares_NC)
        for number, gold, fold, shares_C in zip(*columns, strict=True):
            best = int(shares_C.argmax())
            yield {
                "row": int(number),
                "label": names[gold],
                "predicted": names[best],
                "probability": round(float(shares_C[best]), _DIGITS),
                "fold": int(fold) + 1,
                "probabilities": dict(zip(names, np.round(shares_C, _DIGITS).tolist(), strict=True)),
            }

    return write_json_lines_whole(Path(folder) / OUT_OF_FOLD_FILE, lines())


def write_label_errors(
    folder: str | Path,
    found: OutOfFold,
    names: Sequence[str],
    numbers_N: Sequence[int],
    texts: Sequence[str],
    pairs: Sequence[str] | None = None,
) -> Path:
    """One line per likely label error, the likeliest first; an empty file if there is none.

    `rank`, `row`, `text` (and `text_pair`), `label`, `suggested`, `label_probability`, `suggested_probability`.

    Args:
        folder: The output folder.
        found: Predictions by the models that have not seen the rows.
        names: Label names in schema order.
        numbers_N: The rows' numbers in their file.
        texts: Their texts.
        pairs: Their second texts, for tasks on pairs.
    """
    errors = found.label_errors

    def lines() -> Iterator[dict[str, Any]]:
        for rank, (index, suggested) in enumerate(zip(errors.rows_E, errors.suggested_E, strict=True), start=1):
            pair = {} if pairs is None else {"text_pair": pairs[index]}
            shares_C, gold = found.shares_NC[index], found.labels_N[index]
            yield {
                "rank": rank,
                "row": int(numbers_N[index]),
                "text": texts[index],
                **pair,
                "label": names[gold],
                "suggested": names[suggested],
                "label_probability": round(float(shares_C[gold]), _DIGITS),
                "suggested_probability": round(float(shares_C[suggested]), _DIGITS),
            }

    return write_json_lines_whole(Path(folder) / LABEL_ERRORS_FILE, lines())
