"""Options of the loss with the gold labels, in all recipes whose result learns from these alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from nlpxfer.config.options import option


@dataclass(frozen=True, kw_only=True)
class LabelLossOptions:
    """What helps where some classes are rare, and R-Drop."""

    class_weights: Literal["none", "balanced"] = option("none", "balanced: all classes count alike, however rare.")
    sampling: Literal["natural", "balanced"] = option(
        "natural", "balanced: all classes are drawn equally often, rare rows several times an epoch."
    )
    focal_gamma: float = option(0.0, "gamma: rows that are right already count (1 - p)^gamma.")
    logit_adjustment: float = option(0.0, "tau: add tau log(class share) to the logits while training.")
    r_drop_weight: float = option(0.0, "alpha: weight of the loss by which two passes with dropout agree (R-Drop).")

    def label_loss_faults(self) -> list[str]:
        """What is wrong with the values, one sentence each."""
        faults = []
        for name, choices in (("class_weights", ("none", "balanced")), ("sampling", ("natural", "balanced"))):
            value = getattr(self, name)
            if value not in choices:
                faults.append(f"{name}: {value!r} is not one of {', '.join(choices)}")
        for name in ("focal_gamma", "logit_adjustment", "r_drop_weight"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                faults.append(f"{name}: {value} is not a finite number of at least 0")
        asked = {
            "class_weights": self.class_weights == "balanced",
            "sampling": self.sampling == "balanced",
            "logit_adjustment": bool(self.logit_adjustment),
        }
        names = [name for name, is_on in asked.items() if is_on]
        if len(names) > 1:
            each = "both" if len(names) == 2 else "all"
            faults.append(f"{', '.join(names)}: {each} make rare classes count more; use one of them")
        return faults
