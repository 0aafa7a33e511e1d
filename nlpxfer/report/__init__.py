"""What a run leaves for its readers: report.json, run.json, the model card, plots and a table."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nlpxfer.report.card import CardFacts, build_card, hub_model_id, write_card
    from nlpxfer.report.markdown import escape_markdown
    from nlpxfer.report.plots import confusion_plot, per_class_plot
    from nlpxfer.report.privacy import scrub, scrub_text
    from nlpxfer.report.report import (
        Arm,
        Report,
        SeedResult,
        Verdict,
        build_report,
        mean_metrics,
        validate_report,
        write_report,
    )
    from nlpxfer.report.run import versions, write_run
    from nlpxfer.report.table import arms_table, arms_text

__all__ = [
    "Arm",
    "CardFacts",
    "Report",
    "SeedResult",
    "Verdict",
    "arms_table",
    "arms_text",
    "build_card",
    "build_report",
    "confusion_plot",
    "escape_markdown",
    "hub_model_id",
    "mean_metrics",
    "per_class_plot",
    "scrub",
    "scrub_text",
    "validate_report",
    "versions",
    "write_card",
    "write_report",
    "write_run",
]

_MODULE_NAMES = {
    "card": ("CardFacts", "build_card", "hub_model_id", "write_card"),
    "markdown": ("escape_markdown",),
    "plots": ("confusion_plot", "per_class_plot"),
    "run": ("versions", "write_run"),
    "privacy": ("scrub", "scrub_text"),
    "table": ("arms_table", "arms_text"),
}
_MODULE_OF = {name: module for module, names in _MODULE_NAMES.items() for name in names}


def __getattr__(name: str) -> Any:  # noqa: ANN401 - any public object
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF.get(name, 'report')}"), name)
