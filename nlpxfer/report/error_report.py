"""Where a model goes wrong: errors.json for programs and errors.md for people.

Both hold texts of the data, so they are written on request only and are never pushed. Probabilities are the calibrated
ones, and labels of a multi-label task are given by the fitted thresholds, as `nlpxfer predict` does: a confident
mistake is one that a threshold would not catch.

Shapes: N rows, C classes or labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from nlpxfer.evaluate.metrics import per_class_table, per_label_table
from nlpxfer.problem import SINGLE_LABEL, ProblemType
from nlpxfer.report.error_page import error_page
from nlpxfer.report.listed_row import labels_above, listed_row, shown_number
from nlpxfer.report.plots import confusion_counts
from nlpxfer.strict_json import write_json_whole, write_text_whole

ERRORS_FILE: Final = "errors.json"
READABLE_FILE: Final = "errors.md"
SHOWN: Final = 50
"""Mistakes and confusions that are listed, the worst of each."""
NUMBER_GROUPS: Final = 5
"""Groups of rows by their gold number."""
WHOLE_NUMBERS: Final = 10
"""Different whole numbers that still have a group each."""
_DIGITS: Final = 6


def error_summary(
    shares_NC: NDArray[np.float64],
    labels_N: NDArray[np.int64],
    names: Sequence[str],
    numbers_N: Sequence[int],
    texts: Sequence[str],
    pairs: Sequence[str] | None = None,
) -> dict[str, Any]:
    """The errors of one split of a task with one class per row, as plain values.

    Args:
        shares_NC: Calibrated probabilities.
        labels_N: Gold class indices.
        names: Label names in schema order.
        numbers_N: The rows' numbers in their file.
        texts: Their texts.
        pairs: Their second texts, for tasks on pairs.

    Returns:
        `rows`, `errors`; `mistakes`, the most confident 50 (`row`, `text`, `text_pair` for pairs, `label`,
        `predicted`, their probabilities); `confusions`, the 50 most frequent (`label`, `predicted`, `rows`,
        `share_of_label`, `share_of_errors`); `per_class`, see `per_class_table`.

    Raises:
        DataError, LabelError: See `per_class_table`.
    """
    table = per_class_table(shares_NC, labels_N, names)
    predicted_N, sure_N = shares_NC.argmax(axis=1), shares_NC.max(axis=1)
    wrong = np.flatnonzero(predicted_N != labels_N)
    mistakes = [
        {
            **listed_row(index, numbers_N, texts, pairs),
            "label": names[labels_N[index]],
            "predicted": names[predicted_N[index]],
            "probability": round(float(sure_N[index]), _DIGITS),
            "label_probability": round(float(shares_NC[index, labels_N[index]]), _DIGITS),
        }
        for index in wrong[np.argsort(-sure_N[wrong], kind="stable")][:SHOWN]
    ]
    counts_CC = confusion_counts(labels_N, predicted_N, len(names))
    wrong_CC = counts_CC - np.diag(np.diag(counts_CC))
    return {
        "rows": len(labels_N),
        "errors": len(wrong),
        "mistakes": mistakes,
        "confusions": _confusions(wrong_CC, counts_CC.sum(axis=1), len(wrong), names, ("label", "predicted")),
        "per_class": table,
    }


def label_set_error_summary(
    shares_NC: NDArray[np.float64],
    gold_NC: NDArray[np.bool_],
    thresholds_C: NDArray[np.float64],
    names: Sequence[str],
    numbers_N: Sequence[int],
    texts: Sequence[str],
    pairs: Sequence[str] | None = None,
) -> dict[str, Any]:
    """The errors of one split of a multi-label task, as plain values.

    A mistake is one wrong decision about one label of one row. It is the worse, the further the probability lies on
    the wrong side of the label's threshold, relative to the room that there is on that side.

    Args:
        shares_NC: Calibrated probabilities.
        gold_NC: Which labels each row has.
        thresholds_C: The probability above which a label is given.
        names: Label names in schema order.
        numbers_N: The rows' numbers in their file.
        texts: Their texts.
        pairs: Their second texts, for tasks on pairs.

    Returns:
        `rows`; `errors`, the rows with a wrong decision; `labels_missing` and `labels_extra`, the wrong decisions;
        `mistakes`, the worst 50 of them (`row`, `text`, `text_pair` for pairs, `labels`, `predicted`, `label`, `kind`:
        "missing" or "extra", `probability`, `threshold`); `confusions`, the 50 most frequent pairs of a label that is
        missing and one that is extra in the same row (`missing`, `extra`, `rows`, `share_of_label`,
        `share_of_errors`); `per_class`, see `per_label_table`.
    """
    from scipy.sparse import csr_array

    given_NC = shares_NC > thresholds_C
    missing_NC, extra_NC = gold_NC & ~given_NC, given_NC & ~gold_NC
    rows, labels = np.nonzero(missing_NC | extra_NC)
    worst = np.argsort(-_wrong_side(shares_NC, thresholds_C)[rows, labels], kind="stable")[:SHOWN]
    mistakes = [
        {
            **listed_row(row, numbers_N, texts, pairs),
            "labels": labels_above(gold_NC[row], names),
            "predicted": labels_above(given_NC[row], names),
            "label": names[label],
            "kind": "missing" if gold_NC[row, label] else "extra",
            "probability": round(float(shares_NC[row, label]), _DIGITS),
            "threshold": round(float(thresholds_C[label]), _DIGITS),
        }
        for row, label in zip(rows[worst], labels[worst], strict=True)
    ]
    wrong_CC = (csr_array(missing_NC, dtype=np.int64).T @ csr_array(extra_NC, dtype=np.int64)).toarray()
    errors = len(np.unique(rows))
    return {
        "rows": len(gold_NC),
        "errors": errors,
        "labels_missing": int(missing_NC.sum()),
        "labels_extra": int(extra_NC.sum()),
        "mistakes": mistakes,
        "confusions": _confusions(wrong_CC, gold_NC.sum(axis=0), errors, names, ("missing", "extra")),
        "per_class": per_label_table(given_NC, gold_NC, names),
    }


def number_error_summary(
    found_N: NDArray[np.floating[Any]],
    gold_N: NDArray[np.floating[Any]],
    numbers_N: Sequence[int],
    texts: Sequence[str],
    pairs: Sequence[str] | None = None,
) -> dict[str, Any]:
    """The errors of one split of a regression, as plain values; an error is the predicted minus the gold number.

    Args:
        found_N: Predicted numbers.
        gold_N: Gold numbers.
        numbers_N: The rows' numbers in their file.
        texts: Their texts.
        pairs: Their second texts, for tasks on pairs.

    Returns:
        `rows`, `mean_error`, `mean_absolute_error`; `mistakes`, the 50 rows with the largest absolute errors (`row`,
        `text`, `text_pair` for pairs, `label`, `predicted`, `error`); `by_number`, groups of rows by `number_groups`
        (`rows`, `lowest`, `highest`, `mean_error`, `mean_absolute_error`).
    """
    found, gold = found_N.astype(np.float64), gold_N.astype(np.float64)
    error_N = found - gold
    worst = [index for index in np.argsort(-np.abs(error_N), kind="stable")[:SHOWN] if error_N[index]]
    mistakes = []
    for index in worst:
        label, predicted = shown_number(gold[index]), shown_number(found[index])
        numbers = {"label": label, "predicted": predicted, "error": shown_number(predicted - label)}
        mistakes.append({**listed_row(index, numbers_N, texts, pairs), **numbers})
    return {"rows": len(gold), **_mean_errors(error_N), "mistakes": mistakes, "by_number": _by_number(gold, error_N)}


def number_groups(gold_N: NDArray[np.float64]) -> NDArray[np.int64]:
    """The group of each number, ascending with it, shape N; equal numbers are in one group.

    Up to five different numbers, or up to ten that are all whole, have a group each. Others have up to five groups of
    about equally many rows: a number's group is that fifth of the sorted rows in which the middle of its rows lies.

    >>> number_groups(np.array([3.0, 1.0, 5.0, 3.0])).tolist()
    [1, 0, 2, 1]
    """
    distinct, place_N, counts = np.unique(gold_N, return_inverse=True, return_counts=True)
    is_whole = bool((distinct == np.rint(distinct)).all())
    if len(distinct) <= (WHOLE_NUMBERS if is_whole else NUMBER_GROUPS):
        return np.asarray(place_N)
    twice_middle = 2 * np.cumsum(counts) - counts
    return np.asarray((NUMBER_GROUPS * twice_middle // (2 * len(gold_N)))[place_N])


def write_error_report(
    folder: str | Path, splits: Mapping[str, Mapping[str, Any]], problem_type: ProblemType = SINGLE_LABEL
) -> None:
    """Write `errors.json` and `errors.md`, each whole or not at all.

    Args:
        folder: The output folder.
        splits: Name of a split -> its summary.
        problem_type: Whose summaries they are.
    """
    write_json_whole(Path(folder) / ERRORS_FILE, dict(splits))
    write_text_whole(Path(folder) / READABLE_FILE, error_page(splits, problem_type))


def _wrong_side(shares_NC: NDArray[np.float64], thresholds_C: NDArray[np.float64]) -> NDArray[np.float64]:
    """How far each probability lies from its threshold, as a share of the room on its side, shape (N, C)."""
    room_NC = np.where(shares_NC > thresholds_C, 1 - thresholds_C, thresholds_C)
    distance_NC = np.abs(shares_NC - thresholds_C)
    return np.asarray(np.divide(distance_NC, room_NC, out=np.zeros(shares_NC.shape), where=room_NC > 0))


def _confusions(
    wrong_CC: NDArray[np.int64],
    totals_C: NDArray[np.int64],
    errors: int,
    names: Sequence[str],
    keys: tuple[str, str],
) -> list[dict[str, Any]]:
    """The 50 most frequent pairs of a gold label and another one, by these keys; equal ones in schema order.

    Args:
        wrong_CC: Rows of each pair.
        totals_C: Rows of each gold label.
        errors: Rows with an error.
        names: Label names in schema order.
        keys: What the two labels are called.
    """
    pairs = sorted(np.argwhere(wrong_CC).tolist(), key=lambda pair: -int(wrong_CC[tuple(pair)]))
    return [
        {
            keys[0]: names[gold],
            keys[1]: names[other],
            "rows": int(wrong_CC[gold, other]),
            "share_of_label": float(wrong_CC[gold, other] / totals_C[gold]),
            "share_of_errors": float(wrong_CC[gold, other] / errors),
        }
        for gold, other in pairs[:SHOWN]
    ]


def _by_number(gold_N: NDArray[np.float64], error_N: NDArray[np.float64]) -> list[dict[str, float]]:
    group_N = number_groups(gold_N)
    groups = [(gold_N[group_N == group], error_N[group_N == group]) for group in np.unique(group_N)]
    return [
        {
            "rows": len(own),
            "lowest": shown_number(own.min()),
            "highest": shown_number(own.max()),
            **_mean_errors(errors),
        }
        for own, errors in groups
    ]


def _mean_errors(error_N: NDArray[np.float64]) -> dict[str, float]:
    return {"mean_error": float(error_N.mean()), "mean_absolute_error": float(np.abs(error_N).mean())}
