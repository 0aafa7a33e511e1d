"""The options that say what a student has to keep of its teacher, and how the smallest one that does is looked for."""

from __future__ import annotations

import math
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
        "max_latency_ms": "it is a target",
        "keep": "it is a target",
        "search": "it is another search",
        "search_budget": "it is the budget of another search",
        "disagreements": "it does not change what is learnt",
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

    search: bool = option(False, "Look for the smallest student that keeps enough and is quick enough.")
    keep: float | None = option(
        None, "search: least share of the teacher's validation score that it keeps. Default: 0.98."
    )
    max_latency_ms: float | None = option(
        None, "search: most milliseconds for one row on this CPU, tokenising included. Default: any."
    )
    search_budget: float | None = option(
        None, "search: optimizer steps of all tries together, in trainings of one student. Default: 3."
    )

    def target_faults(self) -> list[str]:
        """What is wrong with the values, one sentence each."""
        shares, above_0 = ("min_retention", "min_class_retention", "keep"), ("max_latency_ms", "search_budget")
        faults = [
            f"{name}: {value} is not a share above 0 and up to 1"
            for name in shares
            if (value := getattr(self, name)) is not None and not 0 < value <= 1
        ]
        for name in above_0:
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                faults.append(f"{name}: {value} is not a positive number")
        if not self.search:
            idle = [name for name in ("keep", *above_0) if getattr(self, name) is not None]
            faults += [f"{name}: has no effect without search" for name in idle]
        return faults
