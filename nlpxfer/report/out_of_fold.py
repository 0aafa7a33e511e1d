"""The files of a cross-validation: predictions/out_of_fold.jsonl, and label_errors.jsonl for whoever mends the data.

label_errors.jsonl holds texts of the data, and neither file is ever pushed.

Shapes: N training rows, C classes, E errors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from nlpxfer.errors import DataError
from nlpxfer.evaluate.calibration import probabilities
from nlpxfer.evaluate.folds import OutOfFold
from nlpxfer.evaluate.label_errors import LabelSetErrors
from nlpxfer.problem import MULTI_LABEL, REGRESSION, ProblemType
from nlpxfer.report.listed_row import labels_above, listed_row, shown_number
from nlpxfer.strict_json import write_json_lines_whole

OUT_OF_FOLD_FILE: Final = "predictions/out_of_fold.jsonl"
LABEL_ERRORS_FILE: Final = "label_errors.jsonl"
_DIGITS: Final = 6


def prediction(problem_type: ProblemType, names: Sequence[str], gold: Any, logits_C: NDArray[Any]) -> dict[str, Any]:  # noqa: ANN401
    """The gold and the predicted label, labels or number of one row, and the probability; without a temperature."""
    if problem_type == REGRESSION:
        return {"label": shown_number(gold), "predicted": shown_number(logits_C[0])}
    shares_C = probabilities(logits_C[None], problem_type=problem_type)[0]
    if problem_type == MULTI_LABEL:
        given = {name: round(float(p), _DIGITS) for name, p in zip(names, shares_C, strict=True) if p > 0.5}
        return {"label": labels_above(gold, names), "predicted": given}
    best = int(shares_C.argmax())
    return {"label": names[gold], "predicted": names[best], "probability": round(float(shares_C[best]), _DIGITS)}


def write_out_of_fold(folder: str | Path, found: OutOfFold, names: Sequence[str], numbers_N: Sequence[int]) -> Path:
    """One line per training row: `row`, `label`, `predicted`, `probability`, `fold` (from 1) and `probabilities`.

    In a multi-label task `label` is a list and `predicted` has the labels above 0.5 with their probabilities; numbers
    have no probabilities.

    Args:
        folder: The output folder.
        found: Predictions by the models that have not seen the rows.
        names: Label names in schema order.
        numbers_N: The rows' numbers in their file.
    """
    kind = found.problem_type

    def lines() -> Iterator[dict[str, Any]]:
        for index, (number, gold, fold) in enumerate(zip(numbers_N, found.labels, found.folds.fold_N, strict=True)):
            line = {"row": int(number), **prediction(kind, names, gold, found.logits_NC[index]), "fold": int(fold) + 1}
            if kind != REGRESSION:
                shares_C = np.round(found.shares_NC[index], _DIGITS).tolist()
                line["probabilities"] = dict(zip(names, shares_C, strict=True))
            yield line

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

    `rank`, `row`, `text` (and `text_pair`), `label`, `suggested`, `label_probability`, `suggested_probability`. In a
    multi-label task `labels` (all that are given), `label` (the one in doubt), `suggested` ("add" or "remove") and its
    `probability`.

    Args:
        folder: The output folder.
        found: Predictions by the models that have not seen the rows.
        names: Label names in schema order.
        numbers_N: The rows' numbers in their file.
        texts: Their texts.
        pairs: Their second texts, for tasks on pairs.

    Raises:
        DataError: The labels are numbers.
    """
    errors = found.label_errors
    if errors is None:
        raise DataError("Numbers have no label errors.")

    def lines() -> Iterator[dict[str, Any]]:
        for rank, index in enumerate(errors.rows_E, start=1):
            row = {"rank": rank, **listed_row(index, numbers_N, texts, pairs)}
            shares_C, gold = found.shares_NC[index], found.labels[index]
            if isinstance(errors, LabelSetErrors):
                label = int(errors.labels_E[rank - 1])
                yield row | {
                    "labels": labels_above(gold, names),
                    "label": names[label],
                    "suggested": "remove" if gold[label] > 0.5 else "add",
                    "probability": round(float(shares_C[label]), _DIGITS),
                }
            else:
                suggested = int(errors.suggested_E[rank - 1])
                yield row | {
                    "label": names[gold],
                    "suggested": names[suggested],
                    "label_probability": round(float(shares_C[gold]), _DIGITS),
                    "suggested_probability": round(float(shares_C[suggested]), _DIGITS),
                }

    return write_json_lines_whole(Path(folder) / LABEL_ERRORS_FILE, lines())
