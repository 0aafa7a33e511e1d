"""errors.md: the error summaries of `nlpxfer.report.error_report`, to be read by people."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from nlpxfer.problem import MULTI_LABEL, REGRESSION, ProblemType
from nlpxfer.report.markdown import escape_markdown

_TEXT_LENGTH: Final = 300


def error_page(splits: Mapping[str, Mapping[str, Any]], problem_type: ProblemType) -> str:
    """The whole file.

    Args:
        splits: Name of a split -> its summary.
        problem_type: Whose summaries they are.
    """
    parts = ["# Errors", "This file holds texts of the data. `nlpxfer push` leaves it at home."]
    for name, found in splits.items():
        if problem_type == MULTI_LABEL:
            parts += _label_set_parts(name.capitalize(), found)
        elif problem_type == REGRESSION:
            parts += _number_parts(name.capitalize(), found)
        else:
            parts += _class_parts(name.capitalize(), found)
    return "\n\n".join(parts) + "\n"


def _class_parts(split: str, found: Mapping[str, Any]) -> list[str]:
    parts = [f"## {split}: {found['errors']} of {found['rows']} rows are wrong"]
    if found["errors"]:
        header = ["label", "predicted", "rows", "of the label's rows", "of all errors"]
        parts.append(_confusion_table("Most frequent confusions", header, found["confusions"], "label", "predicted"))
        parts.append(_mistake_list("Most confident mistakes", found["mistakes"], _class_mistake))
    return [*parts, _score_table("Classes, the worst first", found["per_class"])]


def _label_set_parts(split: str, found: Mapping[str, Any]) -> list[str]:
    parts = [f"## {split}: {found['errors']} of {found['rows']} rows have a missing or an extra label"]
    parts.append(f"Labels missing: {found['labels_missing']}. Labels given wrongly: {found['labels_extra']}.")
    if found["confusions"]:
        header = ["missing", "given instead", "rows", "of the missing label's rows", "of all rows with an error"]
        title = "Labels given where another is missing"
        parts.append(_confusion_table(title, header, found["confusions"], "missing", "extra"))
    if found["mistakes"]:
        title = "Probabilities furthest on the wrong side of the threshold"
        parts.append(_mistake_list(title, found["mistakes"], _label_mistake))
    return [*parts, _score_table("Labels, the worst first", found["per_class"])]


def _number_parts(split: str, found: Mapping[str, Any]) -> list[str]:
    size, bias = _number(found["mean_absolute_error"]), _signed(found["mean_error"])
    parts = [f"## {split}: mean absolute error {size}, mean error {bias}, {found['rows']} rows"]
    parts.append("An error is the predicted number minus that of the data: above 0 it was predicted too high.")
    parts.append(_number_table(found["by_number"]))
    if found["mistakes"]:
        parts.append(_mistake_list("Largest errors", found["mistakes"], _number_mistake))
    return parts


def _class_mistake(each: Mapping[str, Any]) -> str:
    sure = f"{each['probability']:.3f} against {each['label_probability']:.3f}"
    return f"{escape_markdown(each['label'])} → {escape_markdown(each['predicted'])} ({sure})"


def _label_mistake(each: Mapping[str, Any]) -> str:
    sure = f"{each['probability']:.3f}, threshold {each['threshold']:.3f}"
    return f"{each['kind']} {escape_markdown(each['label'])} ({sure})"


def _number_mistake(each: Mapping[str, Any]) -> str:
    return f"{_number(each['label'])} → {_number(each['predicted'])} ({_signed(each['error'])})"


def _mistake_list(title: str, mistakes: Sequence[Mapping[str, Any]], what: Callable[[Mapping[str, Any]], str]) -> str:
    lines = [f"### {title}", ""]
    for each in mistakes:
        lines.append(f"- row {each['row']}: {what(each)}: {_text(each)}")
        sets = [key for key in ("labels", "predicted") if isinstance(each.get(key), list)]
        lines += [f"  - {key}: {', '.join(map(escape_markdown, each[key])) or '*none*'}" for key in sets]
    return "\n".join(lines)


def _text(each: Mapping[str, Any]) -> str:
    text = " ⏎ ".join(each[key] for key in ("text", "text_pair") if key in each)
    return escape_markdown(text if len(text) <= _TEXT_LENGTH else text[: _TEXT_LENGTH - 1] + "…")


def _confusion_table(
    title: str, header: Sequence[str], confusions: Sequence[Mapping[str, Any]], gold: str, other: str
) -> str:
    lines = []
    for each in confusions:
        labels = f"{escape_markdown(each[gold])} | {escape_markdown(each[other])}"
        shares = f"{100 * each['share_of_label']:.1f} % | {100 * each['share_of_errors']:.1f} %"
        lines.append(f"| {labels} | {each['rows']} | {shares} |")
    return _table(title, header, lines, names=2)


def _score_table(title: str, table: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for row in sorted(table, key=lambda row: (row["f1"], row["rows"])):
        scores = " | ".join(f"{row[name]:.3f}" for name in ("precision", "recall", "f1"))
        lines.append(f"| {escape_markdown(row['label'])} | {scores} | {row['rows']} |")
    return _table(title, ["label", "precision", "recall", "F1", "rows"], lines, names=1)


def _number_table(groups: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for each in groups:
        ends = dict.fromkeys((_number(each["lowest"]), _number(each["highest"])))
        errors = f"{_signed(each['mean_error'])} | {_number(each['mean_absolute_error'])}"
        lines.append(f"| {' to '.join(ends)} | {errors} | {each['rows']} |")
    header = ["number in the data", "mean error", "mean absolute error", "rows"]
    return _table("Errors by number, the lowest first", header, lines, names=1)


def _table(title: str, header: Sequence[str], lines: Sequence[str], *, names: int) -> str:
    """A table with a title; all columns but the first `names` hold numbers."""
    ruler = "|" + "---|" * names + "---:|" * (len(header) - names)
    return "\n".join([f"### {title}", "", f"| {' | '.join(header)} |", ruler, *lines])


def _number(number: float) -> str:
    return f"{number:.6g}"


def _signed(number: float) -> str:
    return f"{number:+.6g}"
