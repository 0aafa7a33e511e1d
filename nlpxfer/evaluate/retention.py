"""What a student keeps of its teacher: score, classes, answers and probabilities, on the test rows.

The score is the accuracy, of a multi-label task the micro-F1, of numbers Spearman's correlation; classes and labels
are compared by their F1. The control arm is measured in the same way, so that a reader sees what the student would
keep of the teacher without having had one. What means nothing for a kind of task is left out, not 0.

Probabilities are compared as the models give them, at temperature 1; calibration before and after a temperature,
fitted on the validation rows, stands beside that.

Shapes: N rows, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nlpxfer.errors import ConfigError
from nlpxfer.evaluate.calibration import calibrate, fit_temperature
from nlpxfer.evaluate.metrics import ClassScores, per_class_table, per_label_table
from nlpxfer.evaluate.mixture import answered
from nlpxfer.evaluate.ratio import RatioMetric, Share, intervals_by_label, paired_ratio
from nlpxfer.evaluate.task import answers
from nlpxfer.problem import MULTI_LABEL, REGRESSION, SINGLE_LABEL, ProblemType

Array = NDArray[Any]

FEW_ROWS: Final = 20
"""A class with fewer test rows is not called the worst, nor judged: one row more or less is 5 points of its recall."""
_SCORE: Final[Mapping[ProblemType, RatioMetric]] = {
    SINGLE_LABEL: "accuracy",
    MULTI_LABEL: "micro_f1",
    REGRESSION: "spearman",
}


@dataclass(frozen=True, eq=False)
class Answers:
    """Logits of one trained model, shapes (M, C) and (N, C)."""

    validation: Array
    test: Array


@dataclass(frozen=True, eq=False)
class Gold:
    """The task: its kind, its label names, and the labels of the validation and the test rows."""

    problem_type: ProblemType
    names: Sequence[str]
    validation: Array
    test: Array


def retained(student_S: Sequence[Answers], teacher: Answers, gold: Gold) -> dict[str, Any]:
    """What a student keeps of its teacher.

    Args:
        student_S: One per training seed; the first is the model that is saved.
        teacher: The teacher.
        gold: The task.

    Returns:
        `score`, a `Share` as plain values; `mean_absolute_error`, likewise (numbers only); `per_class`, see
        `class_shares`, and `worst_class`, see `worst_class` (not for numbers); `agreement`, see `agreement`, the mean
        over the seeds; `calibration`, that of the first seed (not for numbers).
    """
    kind = gold.problem_type
    found: dict[str, Any] = {"score": vars(score_share(student_S, teacher, gold))}
    if kind == REGRESSION:
        found["mean_absolute_error"] = vars(_share(student_S, teacher, gold, "mean_absolute_error"))
    else:
        found["per_class"] = class_shares([each.test for each in student_S], teacher.test, gold)
        found["worst_class"] = worst_class(found["per_class"])
    each_S = [agreement(teacher.test, each.test, kind) for each in student_S]
    known = [name for name in each_S[0] if all(name in each for each in each_S)]  # Spearman's of a constant is none
    found["agreement"] = {name: float(np.mean([each[name] for each in each_S])) for name in known}
    return found | calibration_facts(student_S[0], gold)


def score_share(student_S: Sequence[Answers], teacher: Answers, gold: Gold) -> Share:
    """The student's share of the teacher's test score, with an interval over the test rows."""
    return _share(student_S, teacher, gold, _SCORE[gold.problem_type])


def _share(student_S: Sequence[Answers], teacher: Answers, gold: Gold, metric: RatioMetric) -> Share:
    kind = gold.problem_type
    ours = [answers(kind, each.test) for each in student_S]
    truth = gold.test > 0.5 if kind == MULTI_LABEL else gold.test
    return paired_ratio(ours, answers(kind, teacher.test), truth, metric=metric)


def calibration_facts(model: Answers, gold: Gold) -> dict[str, Any]:
    """`calibration` of a model: temperature, and ECE, Brier score and loss on the test rows before and after it.

    Nothing for numbers, which have no probabilities.
    """
    if gold.problem_type == REGRESSION:
        return {}
    return {
        "calibration": vars(calibrate(model.validation, gold.validation, model.test, gold.test, gold.problem_type))
    }


def fitted_temperature(model: Answers, gold: Gold) -> float:
    """The temperature of a model's probabilities, fitted on the validation rows that it answers.

    1 where there are none, and for numbers, which have no probabilities.
    """
    known_M = answered(model.validation)
    if gold.problem_type == REGRESSION or not known_M.any():
        return 1.0
    return fit_temperature(model.validation[known_M], gold.validation[known_M], gold.problem_type)


def class_shares(student_S: Sequence[Array], teacher: Array, gold: Gold) -> list[dict[str, Any]]:
    """What the student keeps of each class or label, in the order of the names.

    Args:
        student_S: Test logits, one per training seed.
        teacher: Test logits.
        gold: The task.

    Returns:
        For each class `label`, `rows` (test rows that have it), `few` (fewer than `FEW_ROWS`), `teacher` and
        `student` (F1, the mean over the seeds), `share` (None where the teacher's F1 is 0), and its interval `low` and
        `high` over test rows and seeds (None where the teacher's F1 is 0 in some resample).
    """
    ours = [[row["f1"] for row in _table(logits, gold)] for logits in student_S]
    intervals = intervals_by_label([_given(logits, gold) for logits in student_S], _given(teacher, gold), _true(gold))
    found = []
    students = np.mean(ours, axis=0).tolist()
    for row, student, (low, high) in zip(_table(teacher, gold), students, intervals, strict=True):
        entry = {"label": row["label"], "rows": row["rows"], "few": row["rows"] < FEW_ROWS}
        share = student / row["f1"] if row["f1"] else None
        found.append(entry | {"teacher": row["f1"], "student": student, "share": share, "low": low, "high": high})
    return found


def _given(logits_NC: Array, gold: Gold) -> Array:
    """Which classes or labels a model gives each row, bool, (N, C)."""
    given = answers(gold.problem_type, logits_NC)
    return given if gold.problem_type == MULTI_LABEL else _hot(given, gold)


def _true(gold: Gold) -> Array:
    """Which each test row has, bool, (N, C)."""
    return gold.test > 0.5 if gold.problem_type == MULTI_LABEL else _hot(gold.test, gold)


def _hot(classes_N: Array, gold: Gold) -> Array:
    found: Array = classes_N[:, None] == np.arange(len(gold.names))
    return found


def _table(logits_NC: Array, gold: Gold) -> list[ClassScores]:
    if gold.problem_type == MULTI_LABEL:
        return per_label_table(logits_NC > 0, gold.test > 0.5, gold.names)
    return per_class_table(logits_NC, gold.test, gold.names)


def worst_class(table: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The class that the student keeps least of, among those with enough rows; of all where none has enough.

    None where the teacher's F1 is 0 for every class. Of equal shares the class with more rows.
    """
    known = [row for row in table if row["share"] is not None]
    enough = [row for row in known if not row["few"]] or known
    return dict(min(enough, key=lambda row: (row["share"], -row["rows"]))) if enough else None


def agreement(teacher_NC: ArrayLike, student_NC: ArrayLike, problem_type: ProblemType) -> dict[str, float]:
    """How far two models say the same of the same rows.

    Args:
        teacher_NC: Logits, or numbers (N, 1).
        student_NC: Likewise.
        problem_type: What they stand for.

    Returns:
        `same_answer`, the share of rows with the same class or the same set of labels; `kl`, the mean KL divergence of
        the student's distribution from the teacher's, KL(teacher || student), and `js`, the mean Jensen-Shannon
        divergence (at most ln 2), both in nats; of a multi-label task `same_label`, the share of single decisions
        that are the same, and divergences between the yes and no of each label. For numbers `spearman` (absent
        where one side is constant) and `mean_absolute_difference`.
    """
    teacher, student = (np.asarray(each, dtype=np.float64) for each in (teacher_NC, student_NC))
    if problem_type == REGRESSION:
        return _number_agreement(teacher[:, 0], student[:, 0])
    same = answers(problem_type, teacher) == answers(problem_type, student)
    found = {"same_answer": float(same.all(axis=1).mean() if problem_type == MULTI_LABEL else same.mean())}
    if problem_type == MULTI_LABEL:
        found["same_label"] = float(same.mean())
        teacher, student = (np.stack([each.ravel(), np.zeros(each.size)], axis=1) for each in (teacher, student))
    kl, js = divergences(teacher, student)
    return found | {"kl": float(kl.mean()), "js": float(js.mean())}


def _number_agreement(teacher_N: Array, student_N: Array) -> dict[str, float]:
    from scipy.stats import spearmanr

    found = {"mean_absolute_difference": float(np.abs(teacher_N - student_N).mean())}
    if len(teacher_N) > 1 and np.ptp(teacher_N) > 0 and np.ptp(student_N) > 0:
        found["spearman"] = float(spearmanr(teacher_N, student_N).statistic)
    return found


def divergences(first_NC: Array, second_NC: Array) -> tuple[Array, Array]:
    """KL(first || second) and the Jensen-Shannon divergence of the softmax of each row, in nats; shapes (N,).

    >>> kl, js = divergences(np.log([[0.5, 0.5]]), np.log([[0.75, 0.25]]))
    >>> kl.round(4).tolist(), js.round(4).tolist()
    ([0.1438], [0.0338])
    """
    from scipy.special import log_softmax

    first, second = log_softmax(first_NC, axis=1), log_softmax(second_NC, axis=1)
    middle = np.logaddexp(first, second) - np.log(2)

    def divergence(one: Array, other: Array) -> Array:
        return np.asarray((np.exp(one) * (one - other)).sum(axis=1))

    return divergence(first, second), (divergence(first, middle) + divergence(second, middle)) / 2


def check_gate(gold: Gold, min_class_retention: float | None) -> None:
    """Refuse a gate on classes that has nothing to judge.

    Raises:
        ConfigError: The task has no classes, or no class has enough test rows.
    """
    if min_class_retention is None:
        return
    if gold.problem_type == REGRESSION:
        raise ConfigError("min_class_retention: a regression has no classes.", fix="--min_retention")
    most = int(_true(gold).sum(axis=0).max())
    if most < FEW_ROWS:
        raise ConfigError(
            f"min_class_retention: no class has {FEW_ROWS} test rows (the largest has {most}), too few to judge one.",
            fix="more test rows, or --min_retention alone",
        )


def gate_faults(found: Mapping[str, Any], min_retention: float | None, min_class_retention: float | None) -> list[str]:
    """Which figures of `retained` fall short of what was asked for, one sentence each; classes with few rows are out.

    Args:
        found: What `retained` gives.
        min_retention: Least share of the teacher's score.
        min_class_retention: Least share of the teacher's F1 in each class that the teacher gets right at all.
    """
    faults, score = [], found["score"]
    if min_retention is not None and (score["value"] is None or score["value"] < min_retention):
        limit = f"min_retention {min_retention:g}"
        never = f"cannot be told, since the teacher's is not above 0; {limit} is not met"
        kept = never if score["value"] is None else f"is {score['value']:.4f}, below {limit}"
        faults.append(f"the share of the teacher's test {score['metric']} {kept}")
    if min_class_retention is not None:
        faults += [
            f"{row['label']}: the share of the teacher's F1 is {row['share']:.4f} ({row['student']:.4f} of "
            f"{row['teacher']:.4f}, {row['rows']} test rows), below min_class_retention {min_class_retention:g}"
            for row in found.get("per_class", ())
            if row["share"] is not None and not row["few"] and row["share"] < min_class_retention
        ]
    return faults
