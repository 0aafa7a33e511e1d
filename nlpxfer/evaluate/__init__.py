"""Scores, intervals, costs and control arms; names are loaded when first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nlpxfer.evaluate.baselines import TfidfArm, majority, tfidf_arm
    from nlpxfer.evaluate.cost import (
        AlternatingRates,
        Cost,
        Rate,
        Ratio,
        Stopwatch,
        alternate_rates,
        embedding_parameter_count,
        gemm_peak_flops,
        inference_run,
        measure_rate,
        model_bytes,
        parameter_count,
        peak_memory_bytes,
        training_flops,
    )
    from nlpxfer.evaluate.interval import Gain, Interval, Spread, bootstrap_interval, mean_and_spread, paired_gain
    from nlpxfer.evaluate.label_errors import LabelErrors, find_label_errors
    from nlpxfer.evaluate.metrics import (
        Accuracy,
        ClassScores,
        MacroF1,
        PerClass,
        classification_metrics,
        cross_entropy,
        per_class_table,
    )
    from nlpxfer.evaluate.selective import (
        AbstainRule,
        Answers,
        best_answers,
        find_rule,
        label_answers,
        risk_coverage_area,
    )

__all__ = [
    "AbstainRule",
    "Accuracy",
    "AlternatingRates",
    "Answers",
    "ClassScores",
    "Cost",
    "Gain",
    "Interval",
    "LabelErrors",
    "MacroF1",
    "PerClass",
    "Rate",
    "Ratio",
    "Spread",
    "Stopwatch",
    "TfidfArm",
    "alternate_rates",
    "best_answers",
    "bootstrap_interval",
    "classification_metrics",
    "cross_entropy",
    "embedding_parameter_count",
    "find_label_errors",
    "find_rule",
    "gemm_peak_flops",
    "inference_run",
    "label_answers",
    "majority",
    "mean_and_spread",
    "measure_rate",
    "model_bytes",
    "paired_gain",
    "parameter_count",
    "peak_memory_bytes",
    "per_class_table",
    "risk_coverage_area",
    "tfidf_arm",
    "training_flops",
]

_MODULE_NAMES = {
    "label_errors": ("LabelErrors", "find_label_errors"),
    "selective": ("AbstainRule", "Answers", "best_answers", "find_rule", "label_answers", "risk_coverage_area"),
    "baselines": ("TfidfArm", "majority", "tfidf_arm"),
    "interval": ("Gain", "Interval", "Spread", "bootstrap_interval", "mean_and_spread", "paired_gain"),
    "metrics": (
        "Accuracy",
        "ClassScores",
        "MacroF1",
        "PerClass",
        "classification_metrics",
        "cross_entropy",
        "per_class_table",
    ),
}
_MODULE_OF = {name: module for module, names in _MODULE_NAMES.items() for name in names}


def __getattr__(name: str) -> Any:  # noqa: ANN401 - any public object
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF.get(name, 'cost')}"), name)
