"""Options of a student that teaches itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Final, Literal

from nlpxfer.config.options import option
from nlpxfer.config.states import WEIGHTS
from nlpxfer.config.student import STATIC
from nlpxfer.config.teachers import TeacherOptions

_DEFAULT_DECAY: Final = 0.99
_ROWS: Final = ("unlabelled_file", "unlabelled_rows", "mixed_texts")
_OF_ANOTHER_TEACHER: Final = (
    *(field.name for field in fields(TeacherOptions) if field.name not in _ROWS),
    "min_retention",
    "min_class_retention",
    "disagreements",
    "search",
    *WEIGHTS,
)


@dataclass(frozen=True, kw_only=True)
class SelfDistillation:
    """Whether the student teaches itself, and how.

    Attributes:
        self_distillation: "ema": the moving average of its weights is its teacher.
        ema_decay: Decay of that average; its range is checked by the method.
    """

    self_distillation: Literal["none", "ema"] = option(
        "none", "ema: no other teacher than the moving average of the student's weights (mean teacher)."
    )
    ema_decay: float = option(_DEFAULT_DECAY, "Share of the average that a step leaves as it was.")

    @property
    def teaches_itself(self) -> bool:
        """Whether there is no other teacher."""
        return self.self_distillation != "none"

    def self_distillation_faults(self, others: Sequence[str] = _OF_ANOTHER_TEACHER) -> list[str]:
        """What does not go together with a student that teaches itself, or needs one; one sentence each.

        Args:
            others: Options of the recipe that are about another teacher.
        """
        if not self.teaches_itself:
            changed = self.ema_decay != _DEFAULT_DECAY
            return ["ema_decay: does nothing without self_distillation ema"] if changed else []
        defaults = {field.name: field.default for field in fields(self)}
        given = [name for name in others if name in defaults and getattr(self, name) != defaults[name]]
        faults = [f"{name}: needs another teacher than self_distillation has" for name in given]
        if getattr(self, "student", None) == STATIC:
            faults.append("student: a static student starts from a teacher, which self_distillation has not")
        if getattr(self, "model_name_or_path", None) and getattr(self, "student_name_or_path", None):
            faults.append("model_name_or_path: does nothing beside student_name_or_path and self_distillation")
        return faults
