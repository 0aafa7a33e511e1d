"""Where a classifier goes wrong: errors.json for programs and errors.md for people.

Both hold texts of the data, so they are written on request only and are never pushed. Probabilities are the calibrated
ones, as `nlpxfer predict` gives them: a confident mistake is one that a threshold would not catch.

Shapes: N rows, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from nlpxfer.evaluate.metrics import per_class_table
from nlpxfer.report.markdown import escape_markdown
from nlpxfer.report.plots import confusion_counts
from nlpxfer.strict_json import write_json_whole, write_text_whole

ERRORS_FILE: Final = "errors.json"
READABLE_FILE: Final = "errors.md"
SHOWN: Final = 50
"""Mistakes and confusions that are listed, the worst of each."""
_TEXT_LENGTH: Final = 300


def error_summary(
    shares_NC: NDArray[np.float64],
    labels_N: NDArray[np.int64],
    names: Sequence[str],
    numbers_N: Sequence[int],
    texts: Sequence[str],
    pairs: Sequence[str] | None = None,
) -> dict[str, Any]:
    """The errors of one split, as plain values.

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
    mistakes = []
    for index in wrong[np.argsort(-sure_N[wrong], kind="stable")][:SHOWN]:
        pair = {} if pairs is None else {"text_pair": pairs[index]}
        mistakes.append(
            {
                "row": int(numbers_N[index]),
                "text": texts[index],
                **pair,
                "label": names[labels_N[index]],
                "predicted": names[predicted_N[index]],
                "probability": round(float(sure_N[index]), 6),
                "label_probability": round(float(shares_NC[index, labels_N[index]]), 6),
            }
        )
    confusions = _confusions(confusion_counts(labels_N, predicted_N, len(names)), names)
    return {
        "rows": len(labels_N),
        "errors": len(wrong),
        "mistakes": mistakes,
        "confusions": confusions[:SHOWN],
        "per_class": table,
    }


def _confusions(counts_CC: NDArray[np.int64], names: Sequence[str]) -> list[dict[str, Any]]:
    """All pairs of gold and other predicted label, the most frequent first; equal ones in schema order."""
    wrong_CC = counts_CC - np.diag(np.diag(counts_CC))
    totals_C, errors = counts_CC.sum(axis=1), int(wrong_CC.sum())
    pairs = sorted(np.argwhere(wrong_CC).tolist(), key=lambda pair: -int(wrong_CC[tuple(pair)]))
    return [
        {
            "label": names[gold],
            "predicted": names[other],
            "rows": int(wrong_CC[gold, other]),
            "share_of_label": float(wrong_CC[gold, other] / totals_C[gold]),
            "share_of_errors": float(wrong_CC[gold, other] / errors),
        }
        for gold, other in pairs
    ]


def write_error_report(folder: str | Path, splits: Mapping[str, Mapping[str, Any]]) -> None:
    """Write `errors.json` and `errors.md`, each whole or not at all.

    Args:
        folder: The output folder.
        splits: Name of a split -> its `error_summary`.
    """
    write_json_whole(Path(folder) / ERRORS_FILE, dict(splits))
    parts = ["# Errors", "This file holds texts of the data. `nlpxfer push` leaves it at home."]
    for name, found in splits.items():
        parts.append(f"## {name.capitalize()}: {found['errors']} of {found['rows']} rows are wrong")
        parts += [_confusion_table(found["confusions"]), _mistake_list(found["mistakes"])] if found["errors"] else []
        parts.append(_class_table(found["per_class"]))
    write_text_whole(Path(folder) / READABLE_FILE, "\n\n".join(parts) + "\n")


def _confusion_table(confusions: Sequence[Mapping[str, Any]]) -> str:
    lines = ["### Most frequent confusions", "", "| label | predicted | rows | of the label's rows | of all errors |"]
    lines.append("|---|---|---:|---:|---:|")
    for each in confusions:
        shares = f"{100 * each['share_of_label']:.1f} % | {100 * each['share_of_errors']:.1f} %"
        lines.append(f"| {_names(each, ' | ')} | {each['rows']} | {shares} |")
    return "\n".join(lines)


def _mistake_list(mistakes: Sequence[Mapping[str, Any]]) -> str:
    lines = ["### Most confident mistakes", ""]
    for each in mistakes:
        text = " ⏎ ".join(each[key] for key in ("text", "text_pair") if key in each)
        text = text if len(text) <= _TEXT_LENGTH else text[: _TEXT_LENGTH - 1] + "…"
        sure = f"{each['probability']:.3f} against {each['label_probability']:.3f}"
        lines.append(f"- row {each['row']}: {_names(each, ' → ')} ({sure}): {escape_markdown(text)}")
    return "\n".join(lines)


def _class_table(table: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        "### Classes, the worst first",
        "",
        "| label | precision | recall | F1 | rows |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in sorted(table, key=lambda row: (row["f1"], row["rows"])):
        scores = " | ".join(f"{row[name]:.3f}" for name in ("precision", "recall", "f1"))
        lines.append(f"| {escape_markdown(row['label'])} | {scores} | {row['rows']} |")
    return "\n".join(lines)


def _names(each: Mapping[str, Any], between: str) -> str:
    return between.join(escape_markdown(each[key]) for key in ("label", "predicted"))
