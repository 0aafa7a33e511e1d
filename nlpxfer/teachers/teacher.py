"""The kinds of teachers: a classifier, probabilities in a file, an entailment model. Each is asked by texts.

All columns are in the order of the schema: classifiers are loaded so, files and hypotheses are matched by label name.

Shapes: N rows, C classes.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from nlpxfer.checkpoint.entailment import Entailment, hypotheses, load_entailment
from nlpxfer.checkpoint.load import Checkpoint, load_teacher
from nlpxfer.config.long_texts import LongTexts
from nlpxfer.config.teachers import LEARNT, VALIDATION_LOSS, TeacherOptions
from nlpxfer.data.teacher_file import TeacherFile, read_teacher_file
from nlpxfer.errors import ConfigError
from nlpxfer.evaluate.folds import OutOfFold
from nlpxfer.report.privacy import scrub_text
from nlpxfer.train.teacher_cache import teacher_logits
from nlpxfer.train.zero_shot import zero_shot_logits

if TYPE_CHECKING:
    from nlpxfer.run import Run

Array = np.ndarray[Any, Any]
TRAINING = ("train", "unlabelled", "mixed")
"""Splits whose logits are cached and may be computed in bfloat16; scores are always those of float32."""


class Teacher(ABC):
    """Somebody who can be asked for the labels of texts."""

    @property
    @abstractmethod
    def name(self) -> str:
        """For reports."""

    @abstractmethod
    def parent(self, run: Run) -> dict[str, Any]:
        """What run.json says about it: name and fingerprints."""

    @abstractmethod
    def logits(self, run: Run, splits: Sequence[str]) -> tuple[Array, dict[str, Any]]:
        """Its answers to the rows of some splits, one after the other.

        Returns:
            Logits (N, C), NaN in rows that it says nothing about, and facts for the report: rows, how many of them
            were computed, seconds.
        """

    @property
    def model(self) -> Checkpoint | None:
        """What computes its answers, if anything does."""
        return None

    @property
    def checkpoint(self) -> Checkpoint | None:
        """Its model, if it is a classifier, from which students can be cut."""
        return None


@dataclass(frozen=True, eq=False)
class ModelTeacher(Teacher):
    """A classifier.

    Attributes:
        classifier: Frozen.
        folder: Of caches, one of them its own; None for the default.
        held_out: What models that have not seen them say about the training rows, instead of what this one says.
    """

    classifier: Checkpoint
    folder: str | None = None
    held_out: OutOfFold | None = None

    @property
    def name(self) -> str:
        """As it was asked for, without folders of this machine."""
        return scrub_text(self.classifier.name)

    @property
    def model(self) -> Checkpoint:
        """The classifier."""
        return self.classifier

    @property
    def checkpoint(self) -> Checkpoint:
        """The classifier."""
        return self.classifier

    def parent(self, run: Run) -> dict[str, Any]:
        """Name, revision, weights and tokenizer."""
        return run.parent_facts(self.classifier)

    def logits(self, run: Run, splits: Sequence[str]) -> tuple[Array, dict[str, Any]]:
        """Of training and unlabelled rows from the cache, or out of fold; of others computed in float32."""
        if not set(splits) <= set(TRAINING):
            fresh = [run.predict(self.classifier.model, self.classifier.tokenizer, split) for split in splits]
            return np.concatenate(fresh), {}
        asked = [split for split in splits if split != "train" or self.held_out is None]
        parts: list[Array] = []
        facts: dict[str, Any] = {"rows": 0, "computed": 0, "seconds": 0.0}
        if self.held_out is not None and "train" in splits:
            parts.append(_unseen(self.held_out))
            facts |= {"folds": self.held_out.folds.count, "out_of_fold": _scores(self.held_out)}
        if asked:
            texts, pairs = texts_of(run, asked)
            found, told = teacher_logits(
                self.classifier,
                texts,
                pairs,
                labels=run.data.schema.names,
                max_length=run.data_options.max_length,
                long_texts=run.long_texts,
                batch_size=run.options.per_device_eval_batch_size,
                bf16=bool(run.options.bf16),
                folder=self.folder,
                quiet=bool(run.options.disable_tqdm),
            )
            parts.append(found)
            facts |= told
        facts["rows"] = sum(len(part) for part in parts)
        return parts[0] if len(parts) == 1 else np.concatenate(parts), facts


@dataclass(frozen=True, eq=False)
class ZeroShotTeacher(Teacher):
    """An entailment model, which needs no label of any row.

    Attributes:
        scorer: The model.
        asked: The hypothesis of each label.
        folder: Of caches, one of them its own; None for the default.
    """

    scorer: Entailment
    asked: tuple[str, ...]
    folder: str | None = None

    @property
    def name(self) -> str:
        """As it was asked for, without folders of this machine."""
        return f"{scrub_text(self.scorer.checkpoint.name)}, zero-shot"

    @property
    def model(self) -> Checkpoint:
        """The entailment model."""
        return self.scorer.checkpoint

    def parent(self, run: Run) -> dict[str, Any]:
        """Name, revision, weights and tokenizer, and what it is asked."""
        names = run.data.schema.names
        return run.parent_facts(self.scorer.checkpoint) | {"hypotheses": dict(zip(names, self.asked, strict=True))}

    def logits(self, run: Run, splits: Sequence[str]) -> tuple[Array, dict[str, Any]]:
        """From the cache as far as they are there."""
        texts, _ = texts_of(run, splits)
        return zero_shot_logits(
            self.scorer,
            texts,
            labels=run.data.schema.names,
            hypotheses=self.asked,
            problem_type=run.problem_type,
            max_length=run.data_options.max_length,
            batch_size=run.options.per_device_eval_batch_size,
            bf16=bool(run.options.bf16) and set(splits) <= set(TRAINING),
            folder=self.folder,
            quiet=bool(run.options.disable_tqdm),
        )


@dataclass(frozen=True, eq=False)
class FileTeacher(Teacher):
    """Probabilities that somebody has written down.

    Attributes:
        file: What they are.
    """

    file: TeacherFile

    @property
    def name(self) -> str:
        """Of the file, without its folder."""
        return self.file.name

    def parent(self, run: Run) -> dict[str, Any]:
        """Name and fingerprint of the file."""
        return {"name": self.file.name, "sha256": self.file.sha256}

    def logits(self, run: Run, splits: Sequence[str]) -> tuple[Array, dict[str, Any]]:
        """As far as the file holds the texts."""
        found = self.file.logits(*texts_of(run, splits))
        return found, {"rows": len(found), "answered": int((~np.isnan(found[:, 0])).sum())}


def _unseen(found: OutOfFold) -> Array:
    """What models that have not seen the training rows say about them; NaN for a class that they have not seen."""
    return np.where(found.folds.unlearnt_N[:, None], np.float32(np.nan), found.logits_NC)


def _scores(found: OutOfFold) -> dict[str, float]:
    return found.pooled() | {"seconds": round(found.seconds, 2)}


def texts_of(run: Run, splits: Sequence[str]) -> tuple[list[str], list[str] | None]:
    """The texts of some splits, one after the other, and their second texts where the task is on pairs."""
    parts = [run.texts(split) for split in splits]
    if len(parts) == 1:
        return parts[0]
    texts = [text for part, _ in parts for text in part]
    return texts, None if parts[0][1] is None else [pair for _, part in parts for pair in part or []]


def fingerprint(parents: Sequence[dict[str, Any]], weights: Sequence[float]) -> str:
    """One short text that changes with what several teachers are, and how they are mixed."""
    content = json.dumps([list(parents), [round(weight, 6) for weight in weights]], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def open_teachers(run: Run, options: TeacherOptions) -> list[Teacher]:
    """The teachers that were given, in this order: classifiers, the file, the entailment model.

    Nothing is computed or written yet; what cannot work is refused here.

    Raises:
        ConfigError: Options that do not fit the data.
        CheckpointError, LabelError: See `load_teacher` and `load_entailment`.
        DataError: See `read_teacher_file`; or the file lacks texts.
    """
    found: list[Teacher] = []
    for name in options.teacher_names:
        model = load_teacher(name, schema=run.data.schema)
        found.append(ModelTeacher(model, options.teacher_cache))
    if options.teacher_file:
        found.append(FileTeacher(_read_file(run, options)))
    if options.zero_shot_teacher:
        name = options.zero_shot_teacher
        if run.data_options.text_pair_column is not None:
            raise ConfigError("zero_shot_teacher: reads a text and a hypothesis; it cannot read pairs of texts.")
        if run.long_texts.policy != LongTexts().policy:
            raise ConfigError(
                "long_texts: a zero-shot teacher reads the beginning of a text beside each hypothesis, and no more.",
                fix="--long_texts head, or a teacher of another kind",
            )
        asked = hypotheses(options.hypothesis_template, run.data.schema.names, options.label_descriptions)
        scorer = load_entailment(name, problem_type=run.problem_type)
        found.append(ZeroShotTeacher(scorer, asked, options.teacher_cache))
    return found


def _read_file(run: Run, options: TeacherOptions) -> TeacherFile:
    if run.data_options.augmentation and not options.teacher_file_partial:
        raise ConfigError(
            "augmentation: teacher_file cannot hold answers to edited copies, which the run makes.",
            fix="--teacher_file_partial true, with which their labels teach them, or leave augmentation out",
        )
    source, columns = str(options.teacher_file), run.data_options
    file = read_teacher_file(
        source,
        run.data.schema,
        text=columns.text_column,
        pair=columns.text_pair_column,
        label=str(columns.label_column),
        separator=columns.label_separator,
    )
    splits = run.data.taught
    if not options.teacher_file_partial:
        for split in splits:
            file.require_all(source, *run.texts(split), split=f"the {split} rows")
    elif np.isnan(file.logits(*texts_of(run, splits))).all():
        raise ConfigError(
            f"teacher_file: {source} says nothing about any training or unlabelled text.",
            why="texts are compared to the letter",
        )
    if options.teacher_weights in (VALIDATION_LOSS, LEARNT):
        file.require_all(source, *run.texts("validation"), split="the validation rows, which find the weights")
    return file
