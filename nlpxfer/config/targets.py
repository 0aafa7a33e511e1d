"""The options that say what a student has to keep of its teacher, and what is written about where it does not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from nlpxfer.config.options import option


@dataclass(frozen=True, kw_only=True)
class TargetOptions:
    """What the student is held against.

    Attributes:
        TARGETS_NOT_SEARCHED: Why a search for options does not vary these.
    """

    TARGETS_NOT_SEARCHED: ClassVar[Mapping[str, str]] = {
        "min_retention": "it is a check of the result",
        "min_class_retention": "it is a check of the result",
    }

    min_retention: float | None = option(
        None, "End with exit code 3 if the student keeps less of the teacher's test score, such as 0.97."
    )
    min_class_retention: float | None = option(
        None, "The same for the F1 of each class that has 20 or more test rows."
    )
    disagreements: bool = option(
        False, "Write disagreements.jsonl: rows, with texts, that the two answer differently."
    )

    def target_faults(self) -> list[str]:
        """What is wrong with the values, one sentence each."""
        return [
            f"{name}: {value} is not a share above 0 and up to 1"
            for name in ("min_retention", "min_class_retention")
            if (value := getattr(self, name)) is not None and not 0 < value <= 1
        ]
