"""What a student keeps of its teacher, in words: lines for the terminal, and a section of the model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nlpxfer.report.markdown import escape_markdown
from nlpxfer.report.report import METRIC_WORDS, Arm, Report


def size_facts(student: Arm, teacher: Arm) -> dict[str, Any]:
    """For the report: `parameters`, `bytes` and `rows_per_second` of the teacher and the student, and their ratio.

    `speed_up` is the ratio of the median time for one row, tokenising included: how much sooner the student answers.
    What is not known of both is left out.
    """
    found: dict[str, Any] = {}
    for name in ("parameters", "bytes", "rows_per_second"):
        ours, theirs = getattr(student, name), getattr(teacher, name)
        if ours is not None and theirs:
            found[name] = {"teacher": theirs, "student": ours, "ratio": ours / theirs}
    if student.latency and teacher.latency:
        times = [arm.latency["one_row"]["total_p50_ms"] for arm in (student, teacher) if arm.latency]
        found["speed_up"] = times[1] / times[0]
    return found


def retention_lines(report: Report) -> list[str]:
    """One line on what the student keeps of its teacher, one on how long a row takes; each where it was measured."""
    found = report.checks.get("retention")
    if not found:
        return _latency_lines(report.arms)
    (_, student), *others = found["students"].items()
    line = f"kept:     {_score_words(student['score'])}"
    worst = student.get("worst_class")
    if worst:
        few = ", few rows" if worst["few"] else ""
        label = " ".join(worst["label"].split())
        line += f"; worst class {label} {_percent(worst['share'])} ({_test_rows(worst['rows'])}{few})"
    line += f"; {_agreement_words(student['agreement'])}"
    known = {other: facts["score"]["value"] for other, facts in others}
    line += "".join(f"; {other} keeps {_percent(share)}" for other, share in known.items() if share is not None)
    return [line, *_latency_lines(report.arms)]


def _test_rows(number: int) -> str:
    return f"{number} test row{'' if number == 1 else 's'}"


def _score_words(score: Mapping[str, Any]) -> str:
    if score["value"] is None:
        return f"the teacher's {METRIC_WORDS[score['metric']]} is not above 0: there is no share of it to keep"
    ends = [score[end] for end in ("low", "high")]
    interval = (
        "" if None in ends else f" ({100 * score['level']:g} % interval {_percent(ends[0])} to {_percent(ends[1])})"
    )
    return f"{_percent(score['value'])} of the teacher's {METRIC_WORDS[score['metric']]}{interval}"


def _agreement_words(found: Mapping[str, float]) -> str:
    if "same_answer" in found:
        return f"the teacher's answer on {_percent(found['same_answer'])} of the rows"
    return f"{found['mean_absolute_difference']:.4g} away from the teacher's numbers in the mean"


def _latency_lines(arms: Sequence[Arm]) -> list[str]:
    measured = [(arm.name, arm.latency) for arm in arms if arm.latency]
    if not measured:
        return []
    each = [
        f"{name} {one['total_p50_ms']:.3g} (p95 {one['total_p95_ms']:.3g}), {batch['total_p50_ms']:.3g} in batches"
        for name, one, batch in ((name, found["one_row"], found["batched"]) for name, found in measured)
    ]
    threads = measured[0][1]["threads"]
    return [f"ms a row: {'; '.join(each)} (CPU, {threads} thread{'s' if threads > 1 else ''}, tokenising included)"]


def retention_section(report: Report) -> str:
    """The section of the model card, or nothing for a report without a teacher."""
    found = report.checks.get("retention")
    if not found:
        return ""
    (_, student), *_ = found["students"].items()
    lines = [
        "## Against the teacher",
        "",
        "| model | score kept | same answers | calibration error, before → after its temperature | ms for one row |",
        "|---|---:|---:|---:|---:|",
        _row("teacher", found["teacher"], report.arms, found["teacher_arm"]),
        *(_row(name, facts, report.arms, name) for name, facts in found["students"].items()),
    ]
    if student.get("worst_class"):
        worst = student["worst_class"]
        few = ", which are few" if worst["few"] else ""
        lines += [
            "",
            f"Worst class: {escape_markdown(worst['label'])}, with {_percent(worst['share'])} of the teacher's F1 "
            f"({worst['student']:.3f} of {worst['teacher']:.3f}, {_test_rows(worst['rows'])}{few}).",
        ]
    return "\n".join(lines)


def _row(shown: str, facts: Mapping[str, Any], arms: Sequence[Arm], arm: str) -> str:
    score, same = facts.get("score"), facts.get("agreement", {}).get("same_answer")
    known = facts.get("calibration")
    error = "-" if known is None else f"{known['before']['ece']:.3f} → {known['after']['ece']:.3f}"
    latency = next((each.latency for each in arms if each.name == arm), None)
    cells = [
        escape_markdown(shown),
        "-" if score is None else escape_markdown(_percent(score["value"])),
        "-" if same is None else _percent(same),
        error,
        "-" if latency is None else f"{latency['one_row']['total_p50_ms']:.3g}",
    ]
    return f"| {' | '.join(cells)} |"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"
