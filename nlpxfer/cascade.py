"""A cascade of two finished classifiers: the student answers where it is sure, the teacher all other rows.

    nlpxfer cascade fit runs/student runs/teacher validation.csv --output_file cascade.json
    nlpxfer cascade evaluate runs/student runs/teacher test.csv --cascade cascade.json --plot cascade.png
    nlpxfer cascade predict runs/student runs/teacher new.csv --cascade cascade.json --output_file labelled.csv

`cascade.json` holds the threshold and what it was fitted for: fingerprints of both models' weights, labels,
temperature and length of the student's texts. Another model than that is refused, since a threshold says nothing about
it. The models themselves are named in each call and not in the file, which so holds no path of a machine.

Labels are matched by name. Both models must be of one kind of task: one label for each row, or several.

Shapes: N rows, S rows sent on, C classes.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from nlpxfer.classify import (
    AnswerColumns,
    Classifier,
    Predicted,
    label_rows,
    labelled_windows,
    separator_of,
    text_columns,
    trained_column,
)
from nlpxfer.data.stream import Row
from nlpxfer.errors import CheckpointError, ConfigError, DataNotFoundError, LabelError
from nlpxfer.evaluate.cascade import CascadePoint, cascade_curve, certainty, choose_point, thinned
from nlpxfer.evaluate.interval import MetricName, paired_gain
from nlpxfer.evaluate.task import label_set_f1
from nlpxfer.problem import GAIN, MULTI_LABEL, REGRESSION
from nlpxfer.report.plots import CascadePicture, cascade_plot
from nlpxfer.report.report import METRIC_WORDS
from nlpxfer.strict_json import require_new, write_json_whole

logger = logging.getLogger(__name__)

Array = np.ndarray[Any, Any]

MODEL: Final = "model"
STUDENT, TEACHER = "student", "teacher"
TOLERANCE: Final = 0.005
FORMAT_VERSION: Final = 1
_WARMUP_ROWS: Final = 16


@dataclass(frozen=True, kw_only=True)
class Cascade:
    """Two classifiers and the threshold between them.

    Attributes:
        student: Asked first.
        teacher: Asked where the student is not sure.
        min_probability: Rows of whose answer the student is less sure (`evaluate.cascade.certainty`) are sent on;
            None: all.
        order_C: Where each of the student's labels stands in the teacher's.
    """

    student: Classifier
    teacher: Classifier
    min_probability: float | None
    order_C: Sequence[int]

    @property
    def metric(self) -> MetricName:
        """What the answers are judged by: a mean over rows."""
        return GAIN[self.student.schema.problem_type]

    @classmethod
    def of(cls, student: Classifier, teacher: Classifier, min_probability: float | None) -> Cascade:
        """The cascade of two classifiers.

        Raises:
            ConfigError: One of them gives numbers, or they are of different kinds of task; or the threshold is not in
                0..1.
            LabelError: They know different labels; lists both sides.
        """
        kinds = {STUDENT: student.schema.problem_type, TEACHER: teacher.schema.problem_type}
        for who, kind in kinds.items():
            if kind == REGRESSION:
                raise ConfigError(
                    f"A cascade needs models that give labels; the {who} is one of the kind {kind}.",
                    why="a number has no probability to draw a line at",
                )
        if kinds[STUDENT] != kinds[TEACHER]:
            raise ConfigError(
                f"A cascade needs two models of one kind; the {STUDENT} is one of the kind {kinds[STUDENT]}, "
                f"the {TEACHER} of {kinds[TEACHER]}."
            )
        if min_probability is not None and not 0 <= min_probability <= 1:
            raise ConfigError(f"min_probability: {min_probability} is not between 0 and 1")
        try:
            order_C = student.schema.reorder(teacher.schema)
        except LabelError as error:
            raise LabelError(f"Student (here) and teacher (there) cannot answer for one another. {error}") from None
        return cls(student=student, teacher=teacher, min_probability=min_probability, order_C=order_C)

    def student_shares(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> Array:
        """The student's calibrated probabilities, shape (N, C)."""
        return self.student.probabilities(texts, pairs)

    def teacher_shares(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> Array:
        """The teacher's calibrated probabilities with the student's order of labels, shape (N, C)."""
        if not texts:
            return np.zeros((0, len(self.order_C)))
        shares: Array = self.teacher.probabilities(texts, pairs)[:, list(self.order_C)]
        return shares

    def thresholds_C(self, who: str) -> Array:
        """Probabilities above which the student or the teacher gives a label, in the student's order of labels."""
        return self.student.thresholds_C if who == STUDENT else self.teacher.thresholds_C[list(self.order_C)]

    def sureness(self, shares_NC: Array) -> Array:
        """How sure the student is of its answers, shape (N,)."""
        several = self.student.schema.problem_type == MULTI_LABEL
        return certainty(shares_NC, shares_NC > self.thresholds_C(STUDENT) if several else None)

    def row_scores(self, who: str, shares_NC: Array, labels: Sequence[Any]) -> Array:
        """What each answer of the student or the teacher scores, shape (N,): right or wrong, or the F1 of its labels.

        Args:
            who: `STUDENT` or `TEACHER`.
            shares_NC: Its probabilities, in the student's order of labels.
            labels: Gold labels, as `LabelSchema.array` takes them.
        """
        gold = self.student.schema.array(labels)
        if self.student.schema.problem_type == MULTI_LABEL:
            return label_set_f1(shares_NC > self.thresholds_C(who), gold > 0.5)
        right_N: Array = shares_NC.argmax(axis=1) == gold
        return right_N

    def sends_on(self, shares_NC: Array) -> Array:
        """Which rows the teacher is asked about, shape (N,)."""
        if self.min_probability is None:
            return np.ones(len(shares_NC), dtype=bool)
        sent_N: Array = self.sureness(shares_NC) < self.min_probability
        return sent_N

    def probabilities(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> tuple[Array, Array]:
        """Calibrated probabilities by whoever answers, shape (N, C), and whether that is the teacher, shape (N,)."""
        shares_NC = self.student_shares(texts, pairs)
        sent_N = self.sends_on(shares_NC)
        shares_NC[sent_N] = self.teacher_shares(*_chosen(texts, pairs, sent_N))
        return shares_NC, sent_N


def _chosen(texts: Sequence[str], pairs: Sequence[str] | None, rows_N: Array) -> tuple[list[str], list[str] | None]:
    rows = np.flatnonzero(rows_N).tolist()
    return [texts[row] for row in rows], None if pairs is None else [pairs[row] for row in rows]


def fit_cascade(
    student: Classifier,
    teacher: Classifier,
    source: str | Path,
    output: str | Path,
    *,
    tolerance: float | None = TOLERANCE,
    text_column: str | None = None,
    text_pair_column: str | None = None,
    label_column: str | None = None,
    label_separator: str | None = None,
    quiet: bool = True,
) -> dict[str, Any]:
    """Fit the threshold on a labelled file and write `cascade.json`; see `evaluate.cascade` for the rule.

    Args:
        student: The small model.
        teacher: The large one.
        source: Rows that neither was trained on: the validation file, not the test file.
        output: Where `cascade.json` goes.
        tolerance: How far the accuracy may be below the teacher's; None: the highest accuracy. Multi-label: the F1
            per row.
        text_column: Column with the text. Default: that of the training where the file has it, else "text".
        text_pair_column: Column with the second text, for tasks on pairs. Default: that of the training.
        label_column: Column with the gold label. Default: that of the training where the file has it, else "label".
        label_separator: Between the labels of a multi-label row that are one text. Default: that of the training,
            else "|".
        quiet: No progress bar.

    Returns:
        What was written.

    Raises:
        ConfigError: `output` exists, `tolerance` is not in [0, 1), or the models make no cascade (`Cascade.of`).
        LabelError: The models or the file have other labels.
        DataError: A row has no text or label, or cannot be read.
    """
    if tolerance is not None and not 0 <= tolerance < 1:
        raise ConfigError(f"tolerance: {tolerance} is not a share of at least 0 and below 1")
    require_new(output)
    cascade = Cascade.of(student, teacher, None)
    asked = _ask_both(cascade, source, text_column, text_pair_column, label_column, label_separator, quiet)
    curve, metric = cascade_curve(asked.sure_N, asked.small_N, asked.large_N), cascade.metric
    content = {
        "version": FORMAT_VERSION,
        **_point(choose_point(curve, tolerance), metric),
        f"student_{metric}": curve[0].score,
        f"teacher_{metric}": curve[-1].score,
        "rows": len(asked.sure_N),
        "rule": f"highest {metric}" if tolerance is None else "fewest rows sent on within the tolerance",
        "tolerance": tolerance,
        **_facts(cascade),
        "curve": [_point(point, metric) for point in thinned(curve)],
    }
    write_json_whole(output, content, new=True)
    return content


def _point(point: CascadePoint, metric: str) -> dict[str, Any]:
    return {"min_probability": point.min_probability, "sent": point.sent, metric: point.score}


def _facts(cascade: Cascade) -> dict[str, Any]:
    """What a threshold depends on."""
    student, teacher = cascade.student, cascade.teacher
    facts: dict[str, Any] = {
        "labels": list(student.schema.names),
        "student": {
            "weights": student.backend.weights_sha256,
            "temperature": student.temperature,
            "max_length": student.max_length,
        },
        "teacher": {"weights": teacher.backend.weights_sha256},
    }
    if student.schema.problem_type == MULTI_LABEL:  # which labels are given depends on these too
        facts[TEACHER]["temperature"] = teacher.temperature
        for who in (STUDENT, TEACHER):
            facts[who]["thresholds"] = cascade.thresholds_C(who).tolist()
    return facts


def load_cascade(path: str | Path, student: Classifier, teacher: Classifier) -> Cascade:
    """The cascade that a `cascade.json` describes, with the two models it was fitted for.

    Raises:
        DataNotFoundError: There is no such file.
        CheckpointError: The file cannot be used, or was fitted for other models; says what differs.
        LabelError, ConfigError: See `Cascade.of`.
    """
    path = Path(path)
    if not path.is_file():
        raise DataNotFoundError(f"{path} is no file.", fix="nlpxfer cascade fit STUDENT TEACHER validation.csv")
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
        least, known = found["min_probability"], {name: found[name] for name in ("labels", STUDENT, TEACHER)}
        usable = found["version"] == FORMAT_VERSION and (least is None or 0 <= float(least) <= 1)
        usable &= all(isinstance(known[who], dict) for who in (STUDENT, TEACHER))
        usable &= isinstance(known["labels"], list) and all(isinstance(name, str) for name in known["labels"])
    except (ValueError, KeyError, TypeError):
        usable = False
    if not usable:
        raise CheckpointError(f"{path} holds no usable cascade.", fix="nlpxfer cascade fit, again")
    cascade = Cascade.of(student, teacher, None if least is None else float(least))
    facts = _facts(cascade)
    differing = [
        f"{part} {name}: {known[part].get(name)!r} there, {value!r} here"
        for part in (STUDENT, TEACHER)
        for name, value in facts[part].items()
        if known[part].get(name) != value
    ]
    if sorted(known["labels"]) != sorted(facts["labels"]):
        differing.append("labels")
    if differing:
        listed = "\n".join(f"  - {each}" for each in differing)
        raise CheckpointError(
            f"{path} was fitted for other models:\n{listed}",
            why="a threshold holds for the student's probabilities and the teacher that it was fitted with",
            fix="name these models, or fit again",
        )
    return cascade


def predict_cascade(
    cascade: Cascade,
    source: str | Path,
    output: str | Path,
    *,
    text_column: str | None = None,
    text_pair_column: str | None = None,
    label_separator: str | None = None,
    quiet: bool = True,
) -> tuple[Predicted, int]:
    """Label the rows of a file, in new columns beside those that are there; memory does not grow with the file.

    The columns are those of `predict_file`, of whoever answers, and `model`: student or teacher. A row whose text is
    missing or blank gets nothing in them. The output appears whole at the end or not at all.

    Returns:
        What was done, and how many rows the teacher answered.

    Raises:
        DataError, ConfigError: See `label_rows`.
    """
    sent = 0
    separator = separator_of(label_separator, cascade.student, cascade.teacher)
    answering = {
        who: AnswerColumns(cascade.student.schema, cascade.thresholds_C(who), label_separator=separator)
        for who in (STUDENT, TEACHER)
    }

    def answers(texts: Sequence[str], pairs: Sequence[str] | None) -> Iterator[Row]:
        nonlocal sent
        for shares_C, by_teacher in zip(*cascade.probabilities(texts, pairs), strict=True):
            sent += int(by_teacher)
            who = TEACHER if by_teacher else STUDENT
            yield {**answering[who].row(shares_C), MODEL: who}

    types = answering[STUDENT].types | {MODEL: str}
    columns = text_columns(text_column, text_pair_column, source, cascade.student, cascade.teacher)
    rows, blank = label_rows(source, output, answers, types, columns, quiet=quiet)
    return Predicted(rows, blank, 0), sent


@dataclass(frozen=True, eq=False)
class _Asked:
    """What both models' answers for a labelled file score, and the seconds that they took, tokenising included.

    The teacher's seconds are parted into those for the rows that the cascade sends on, and for the others.
    """

    sure_N: Array
    small_N: Array
    large_N: Array
    sent_N: Array
    student_seconds: float
    sent_seconds: float
    other_seconds: float


def _ask_both(
    cascade: Cascade,
    source: str | Path,
    text_column: str | None,
    text_pair_column: str | None,
    label_column: str | None,
    label_separator: str | None,
    quiet: bool,
) -> _Asked:
    """Ask both models for every row of a labelled file, each row once."""
    found: list[tuple[Array, ...]] = []
    seconds = np.zeros(3)
    models = cascade.student, cascade.teacher
    texts_in = text_columns(text_column, text_pair_column, source, *models)
    columns = (*texts_in, trained_column("label_column", label_column, source, *models))
    separator = separator_of(label_separator, *models)
    for texts, pairs, gold in labelled_windows(cascade.student.schema, source, columns, separator, quiet):
        if not found:  # the first batches of a model are slow
            first = texts[:_WARMUP_ROWS], None if pairs is None else pairs[:_WARMUP_ROWS]
            cascade.student_shares(*first)
            cascade.teacher_shares(*first)
        start = time.perf_counter()
        small_NC = cascade.student_shares(texts, pairs)
        sent_N = cascade.sends_on(small_NC)
        times, large_NC = [time.perf_counter() - start], np.empty_like(small_NC)
        for part_N in (sent_N, ~sent_N):
            start = time.perf_counter()
            large_NC[part_N] = cascade.teacher_shares(*_chosen(texts, pairs, part_N))
            times.append(time.perf_counter() - start)
        seconds += times
        scores = (cascade.row_scores(who, shares, gold) for who, shares in ((STUDENT, small_NC), (TEACHER, large_NC)))
        found.append((cascade.sureness(small_NC), *scores, sent_N))
    sure_N, small_N, large_N, sent_N = (np.concatenate(column) for column in zip(*found, strict=True))
    return _Asked(sure_N, small_N, large_N, sent_N, *seconds.tolist())


def evaluate_cascade(
    cascade: Cascade,
    source: str | Path,
    *,
    plot: str | Path | None = None,
    text_column: str | None = None,
    text_pair_column: str | None = None,
    label_column: str | None = None,
    label_separator: str | None = None,
    quiet: bool = True,
) -> dict[str, Any]:
    """Score against cost of a cascade on a labelled file, with the student alone and the teacher alone beside it.

    Args:
        cascade: Two models and a threshold.
        source: Rows that the threshold was not fitted on.
        plot: Where to draw the score against the share of rows sent on; PNG.
        text_column: Column with the text. Default: that of the training where the file has it, else "text".
        text_pair_column: Column with the second text, for tasks on pairs. Default: that of the training.
        label_column: Column with the gold label. Default: that of the training where the file has it, else "label".
        label_separator: Between the labels of a multi-label row that are one text. Default: that of the training,
            else "|".
        quiet: No progress bar.

    Returns:
        `rows`, `sent` (share), `min_probability`; for `cascade`, `student` and `teacher` each `accuracy` (multi-label:
        `sample_f1`), `seconds` (measured on this machine, tokenising included) and `rows_per_second`;
        `against_teacher`, the difference of these scores with a paired interval; `curve`, what other thresholds would
        have done.

    Raises:
        ConfigError: `plot` has another ending than .png, or exists.
        DataError: A row has no text or label, or cannot be read.
        LabelError: A label is none of the models'.
    """
    if plot is not None:
        if Path(plot).suffix.lower() != ".png":
            raise ConfigError(f"plot: {plot} is no .png.", fix="--plot cascade.png")
        require_new(plot, "plot")
    asked = _ask_both(cascade, source, text_column, text_pair_column, label_column, label_separator, quiet)
    curve, metric = cascade_curve(asked.sure_N, asked.small_N, asked.large_N), cascade.metric
    both_N = np.where(asked.sent_N, asked.large_N, asked.small_N)
    rows, sent = len(both_N), float(asked.sent_N.mean())
    models = {
        "cascade": (both_N, asked.student_seconds + asked.sent_seconds),
        STUDENT: (asked.small_N, asked.student_seconds),
        TEACHER: (asked.large_N, asked.sent_seconds + asked.other_seconds),
    }
    scores = {
        name: {metric: float(each_N.mean()), "seconds": seconds, "rows_per_second": rows / max(seconds, 1e-9)}
        for name, (each_N, seconds) in models.items()
    }
    gain = paired_gain([both_N], [asked.large_N], metric=metric)
    if plot is not None:
        require_new(plot, "plot")  # it may have appeared while the models were asked
        point = CascadePoint(min_probability=cascade.min_probability, sent=sent, score=scores["cascade"][metric])
        speeds = {name: each["rows_per_second"] for name, each in scores.items()}
        words = METRIC_WORDS[metric]
        cascade_plot(CascadePicture(curve=curve, chosen=point, rows_per_second=speeds, rows=rows, metric=words), plot)
    return {
        "rows": rows,
        "sent": sent,
        "min_probability": cascade.min_probability,
        **scores,
        "against_teacher": {"gain": gain.gain, "low": gain.low, "high": gain.high, "level": gain.level},
        "curve": [_point(point, metric) for point in thinned(curve)],
    }
