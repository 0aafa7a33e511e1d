"""The rows that a student learns from, with what the teachers say about them.

Rows are in the order of the data; logits were found by text, so that they belong to their rows however these were
drawn. Labelled rows that nobody says anything about stay, for their label; those without a label go.

Shapes: N rows, C classes: training rows first, then unlabelled ones, then mixtures, if there are any.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from nlpxfer.config.teachers import TeacherOptions
from nlpxfer.data.tokenise import TokenisedRows
from nlpxfer.errors import ConfigError
from nlpxfer.evaluate.arms import Splits
from nlpxfer.evaluate.mixture import answered
from nlpxfer.problem import MULTI_LABEL, REGRESSION, ProblemType
from nlpxfer.teachers.panel import Panel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from nlpxfer.run import Run

Array = np.ndarray[Any, Any]


class TransferRows:
    """Training rows and texts without labels, with the teachers' logits.

    Attributes:
        logits: Of all rows (N, C), NaN in rows that nobody says anything about.
        facts: For the report.
        columns: Further columns, each with N rows.
    """

    def __init__(self, run: Run, panel: Panel) -> None:
        self.run = run
        self.columns: dict[str, Array] = {}
        self.labels = run.labels("train")
        self.logits, self.facts = panel.logits(run, run.data.taught)
        known_N = answered(self.logits)
        against_N = contradicts(run.problem_type, self.logits[: len(self.labels)], self.labels)
        self.contradicted_N = np.zeros(len(self.logits), dtype=bool)
        self.contradicted_N[: len(against_N)] = against_N
        labelled_N = np.arange(len(self.logits)) < len(self.labels)
        self.kept_N = known_N | labelled_N
        self.facts = self.facts | {"untaught": int((~known_N).sum())}
        if run.problem_type != REGRESSION:
            self.facts |= {"contradicted": int(against_N.sum())}

    @property
    def taught(self) -> int:
        """How many rows are taught, with and without labels."""
        return int(self.kept_N.sum())

    @property
    def unlabelled(self) -> int:
        """How many unlabelled rows are taught."""
        return int(self.kept_N[self._unlabelled].sum())

    @property
    def _unlabelled(self) -> slice:
        rows = self.run.data.unlabelled
        return slice(len(self.labels), len(self.labels) + (0 if rows is None else len(rows)))

    def by_split(self) -> dict[str, Array]:
        """The logits of the training and unlabelled rows, NaN in rows that nobody says anything about."""
        parts = {"train": self.logits[: len(self.labels)]}
        if self.run.data.unlabelled is not None:
            parts["unlabelled"] = self.logits[self._unlabelled]
        return parts

    def tokenise(self, tokenizer: PreTrainedTokenizerBase) -> TokenisedRows:
        """All rows, N, as a tokenizer sees them."""
        return with_unlabelled(self.run, tokenizer).train

    def split(
        self, options: TeacherOptions, unlabelled: int | None = None
    ) -> Callable[[PreTrainedTokenizerBase], Splits]:
        """How the splits are made for a tokenizer; `train` has the columns `teacher_logits` and `teacher_weights`.

        Args:
            options: Say what a row counts that the teacher contradicts.
            unlabelled: Use only so many of the unlabelled rows, drawn by lot; smaller draws lie in larger ones.
        """

        def made(tokenizer: PreTrainedTokenizerBase) -> Splits:
            splits = with_unlabelled(self.run, tokenizer)
            weights_N = np.where(self.contradicted_N, options.contradiction_weight, 1.0).astype(np.float32)
            taught = {"teacher_logits": self.logits, "teacher_weights": weights_N, **self.columns}
            train = splits.train.with_columns(**taught)
            kept_N = self._drawn(unlabelled)
            return Splits(train if kept_N.all() else train.select(kept_N), splits.validation, splits.test)

        return made

    def _drawn(self, unlabelled: int | None) -> Array:
        if unlabelled is None:
            return self.kept_N
        drawn_N = self.kept_N.copy()
        drawn_N[self._unlabelled] = False
        texts = np.flatnonzero(self.kept_N[self._unlabelled]) + len(self.labels)
        order = np.random.default_rng(self.run.data_options.data_split_seed).permutation(len(texts))
        drawn_N[texts[order[:unlabelled]]] = True
        return drawn_N


def with_unlabelled(run: Run, tokenizer: PreTrainedTokenizerBase) -> Splits:
    """The splits as a tokenizer sees them; the rows without labels, if there are any, after the training rows."""
    splits = run.split(tokenizer)
    train = splits.train
    for split in run.data.taught[1:]:
        train = TokenisedRows.join(train, run.tokenise(tokenizer, split))
    return replace(splits, train=train)


def contradicts(problem_type: ProblemType, logits_NC: Array, labels: Array) -> Array:
    """Rows where the teacher's best label is not gold; none in rows that it says nothing about, bool (N).

    In a multi-label task: its most probable label is not among those of the row, or the row has none and the teacher
    gives it one.

    A regression has no best label, and no contradictions.
    """
    if problem_type == REGRESSION:
        return np.zeros(len(logits_NC), dtype=bool)
    known_N = answered(logits_NC)
    safe_NC = np.where(known_N[:, None], logits_NC, 0.0)
    best_N = safe_NC.argmax(axis=1)
    if problem_type == MULTI_LABEL:
        gold_NC = np.asarray(labels) > 0.5
        right_N = gold_NC[np.arange(len(best_N)), best_N]
        right_N |= ~gold_NC.any(axis=1) & (safe_NC.max(axis=1, initial=-np.inf) <= 0)
    else:
        right_N = best_N == labels
    return np.asarray(known_N & ~right_N)


def check_contradiction_weight(run: Run, options: TeacherOptions) -> None:
    """Refuse a weight that could do nothing.

    Raises:
        ConfigError: The task is a regression.
    """
    if run.problem_type == REGRESSION and (
        options.contradiction_weight != 1 or "contradiction_weight" in run.options.ranges
    ):
        raise ConfigError("contradiction_weight: means nothing for a regression, which has no best label.")
