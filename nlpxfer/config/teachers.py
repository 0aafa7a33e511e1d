"""Who teaches a student, and on which rows: options of `recipes/distill.py`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Final

from nlpxfer.config.options import option

UNIFORM, VALIDATION_LOSS, LEARNT = "uniform", "validation_loss", "learnt"
WEIGHTINGS: Final = (UNIFORM, VALIDATION_LOSS, LEARNT)
ALL: Final = "all"
_FOR_STUDENT: Final = "the search is for the student"


@dataclass(frozen=True, kw_only=True)
class TeacherOptions:
    """Who teaches, how several teachers are mixed, and which rows they teach.

    Attributes:
        TEACHERS_NOT_SEARCHED: Why a search for options does not vary these.
        needed_switches: Option -> the option without which it does nothing.
        overruled_by: Option -> the option beside which it does nothing.
    """

    TEACHERS_NOT_SEARCHED: ClassVar[Mapping[str, str]] = MappingProxyType(
        dict.fromkeys(
            (
                "teacher_name_or_path teacher_num_train_epochs teacher_learning_rate teacher_folds teacher_weight_tau "
                "teacher_file_partial assistant_num_layers generations unlabelled_rows mixed_texts"
            ).split(),
            _FOR_STUDENT,
        )
    )
    needed_switches: ClassVar[Mapping[str, tuple[str, object]]] = MappingProxyType(
        {
            "teacher_weight_tau": ("teacher_weights", VALIDATION_LOSS),
            "teacher_file_partial": ("teacher_file", None),
            "hypothesis_template": ("zero_shot_teacher", None),
            "label_descriptions": ("zero_shot_teacher", None),
            "unlabelled_rows": ("unlabelled_file", None),
            "transfer_curve": ("unlabelled_file", None),
        }
    )

    overruled_by: ClassVar[Mapping[str, str]] = MappingProxyType({"teacher_num_train_epochs": "max_steps"})

    teacher_name_or_path: None | str | list[str] = option(  # HfArgumentParser reads this order alone
        None, "Classifiers fine-tuned on the same labels: folders or Hub ids, several with commas or as a list."
    )
    teacher_file: str | None = option(
        None, "Probabilities of the labels for the texts, by any other teacher: csv or jsonl, see docs/teachers.md."
    )
    teacher_file_partial: bool = option(False, "The file may lack texts: these are then not taught by it.")
    zero_shot_teacher: str | None = option(None, "An entailment (NLI) model that scores the labels: folder or Hub id.")
    hypothesis_template: str = option("This text is about {}.", "What it is asked; {} is a label's description.")
    label_descriptions: str | None = option(
        None, "JSON file of a description for each label. Default: the name, with blanks for underscores."
    )
    teacher_weights: str = option(
        UNIFORM, "How several teachers are mixed: uniform, validation_loss, learnt, or numbers such as 0.5,0.3,0.2."
    )
    teacher_weight_tau: float = option(0.1, "tau in softmax(-validation loss / tau).")
    teacher_num_train_epochs: float | None = option(
        None, "Passes over the training rows for a teacher made on the spot. Default: num_train_epochs."
    )
    teacher_learning_rate: float | None = option(
        None, "Its learning rate. Default: learning_rate if that is given, else by its width."
    )
    teacher_folds: int = option(
        0, "Train it on so many folds as well, so that each training row is taught by a model that has not seen it."
    )
    teacher_cache: str | None = option(
        None, "Folder of teachers' outputs, each in a folder of its own. Default: ~/.cache/nlpxfer/teacher."
    )
    contradiction_weight: float = option(
        1.0, "Weight of the distillation loss of rows where the teacher's best label is not the gold label."
    )
    assistant_num_layers: str | None = option(
        None, "Layers of assistants between teacher and student, each taught by the one before: 4, or 4,3."
    )
    generations: int = option(1, "Students of the same shape, each taught by the one before; the last is the result.")
    unlabelled_file: str | None = option(None, "Unlabelled texts for the teacher to label; auto: the data set's own.")
    unlabelled_rows: int | None = option(None, "Use only so many of them, drawn by lot.")
    mixed_texts: int = option(
        0, "Texts to make of each training text and pieces of others, for the teacher to label; 0: none."
    )
    transfer_curve: str | None = option(
        None, "Also train a student with each of these numbers of unlabelled texts: 0,500,2000,all."
    )

    @property
    def teacher_names(self) -> tuple[str, ...]:
        """The classifiers that were given."""
        given = self.teacher_name_or_path or []
        listed = [given] if isinstance(given, str) else given
        return tuple(name.strip() for text in listed for name in text.split(",") if name.strip())

    @property
    def trains_teacher(self) -> bool:
        """Whether none was given, so that one is fine-tuned first."""
        return not (self.teacher_names or self.teacher_file or self.zero_shot_teacher)

    @property
    def number_of_teachers(self) -> int:
        """How many teach the first student."""
        return max(1, len(self.teacher_names) + bool(self.teacher_file) + bool(self.zero_shot_teacher))

    @property
    def fixed_weights(self) -> tuple[float, ...] | None:
        """The weights, if they are given as numbers."""
        return None if self.teacher_weights in WEIGHTINGS else _numbers(self.teacher_weights)

    @property
    def assistants(self) -> tuple[int, ...]:
        """Layers of each assistant, the first taught by the teacher."""
        return tuple(int(part) for part in (self.assistant_num_layers or "").split(",") if part.strip())

    @property
    def curve(self) -> tuple[int | None, ...]:
        """Numbers of unlabelled texts, ascending; None for all of them."""
        parts = [part.strip() for part in (self.transfer_curve or "").split(",") if part.strip()]
        return tuple(sorted({int(part) for part in parts if part != ALL})) + ((None,) if ALL in parts else ())

    def teacher_faults(self) -> list[str]:
        """What is wrong with the values, one sentence each."""
        faults = [*self._weight_faults(), *self._chain_faults(), *self._row_faults()]
        for name in ("teacher_num_train_epochs", "teacher_learning_rate"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                faults.append(f"{name}: {value} is not positive")
            if value is not None and not self.trains_teacher:
                faults.append(f"{name}: does nothing beside {self._given}")
        if self.teacher_folds and not self.trains_teacher:
            why = "only a teacher that is made on the spot can be trained on folds"
            faults.append(f"teacher_folds: cannot be combined with {self._given}: {why}")
        if self.teacher_folds < 0 or self.teacher_folds == 1:
            faults.append(f"teacher_folds: {self.teacher_folds} is not 0 or above 1")
        twice = [name for name in dict.fromkeys(self.teacher_names) if self.teacher_names.count(name) > 1]
        if twice:
            faults.append(f"teacher_name_or_path: named twice: {', '.join(twice)}")
        if self.teacher_cache and self.teacher_file and not (self.teacher_names or self.zero_shot_teacher):
            faults.append("teacher_cache: does nothing beside teacher_file alone, whose answers are read as they are")
        if self.hypothesis_template.count("{}") != 1:
            faults.append(f"hypothesis_template: {self.hypothesis_template!r} does not hold one {{}} for the label")
        return faults

    @property
    def _given(self) -> str:
        names = ("teacher_name_or_path", "teacher_file", "zero_shot_teacher")
        return " and ".join(name for name in names if getattr(self, name))

    def _weight_faults(self) -> list[str]:
        faults = []
        if not 0 < self.teacher_weight_tau < math.inf:
            faults.append(f"teacher_weight_tau: {self.teacher_weight_tau} is not positive and finite")
        if self.teacher_weights == UNIFORM:
            return faults
        if self.number_of_teachers == 1:
            return [*faults, "teacher_weights: does nothing with one teacher"]
        if self.teacher_weights in WEIGHTINGS:
            return faults
        try:
            found = self.fixed_weights or ()
        except ValueError:
            shown = f"{', '.join(WEIGHTINGS)}, or numbers such as 0.5,0.3,0.2"
            return [*faults, f"teacher_weights: {self.teacher_weights!r} is not one of {shown}"]
        if len(found) != self.number_of_teachers:
            faults.append(f"teacher_weights: {len(found)} numbers for {self.number_of_teachers} teachers")
        if any(not 0 <= weight <= 1 for weight in found) or abs(sum(found) - 1) > 1e-6:
            faults.append(f"teacher_weights: {self.teacher_weights} are not shares of 1: they sum to {sum(found):g}")
        return faults

    def _chain_faults(self) -> list[str]:
        faults = []
        try:
            layers = self.assistants
        except ValueError:
            faults.append(f"assistant_num_layers: {self.assistant_num_layers!r} is not a number of layers, or several")
        else:
            if any(count < 1 for count in layers) or sorted(set(layers), reverse=True) != list(layers):
                faults.append(f"assistant_num_layers: {self.assistant_num_layers} must descend and be above 0")
        if self.generations < 1:
            faults.append(f"generations: {self.generations} is below 1")
        return faults

    def _row_faults(self) -> list[str]:
        faults = []
        if not 0 <= self.contradiction_weight <= 1:
            faults.append(f"contradiction_weight: {self.contradiction_weight} is not between 0 and 1")
        if self.unlabelled_rows is not None and self.unlabelled_rows < 1:
            faults.append(f"unlabelled_rows: {self.unlabelled_rows} is below 1")
        if self.mixed_texts < 0:
            faults.append(f"mixed_texts: {self.mixed_texts} is below 0")
        others = self.teacher_names or self.zero_shot_teacher
        if self.mixed_texts and self.teacher_file and not (others and self.teacher_file_partial):
            partly = "; with teacher_file_partial the other teachers answer them" if others else ""
            faults.append(f"mixed_texts: teacher_file cannot hold answers to texts that the run makes{partly}")
        try:
            sizes = self.curve
        except ValueError:
            faults.append(f"transfer_curve: {self.transfer_curve!r} is not a list of numbers such as 0,500,2000,all")
        else:
            if any(size is not None and size < 0 for size in sizes):
                faults.append(f"transfer_curve: {self.transfer_curve} holds a negative number")
        return faults


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))
