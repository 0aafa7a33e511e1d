"""The score of a student against the number of unlabelled texts that it was taught on, as PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from nlpxfer.errors import DataError
from nlpxfer.report.plots import transfer_curve_plot
from nlpxfer.report.report import METRIC_WORDS, SPLITS, Arm

TRANSFER_CURVE_FILE: Final = "transfer_curve.png"
_SHOWN: Final = ("micro_f1", "mean_absolute_error", "accuracy")
"""The metric that is drawn: the first that the task has."""


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """A student of the curve.

    Attributes:
        unlabelled_rows: Texts without labels that it was taught on.
        steps: Optimizer steps.
        validation: Metric -> mean over the seeds.
        test: Likewise.
        deviations: Split -> standard deviation of the drawn metric over the seeds; None with one seed.
    """

    unlabelled_rows: int
    steps: int
    validation: Mapping[str, float]
    test: Mapping[str, float]
    deviations: Mapping[str, float | None]

    @classmethod
    def of(cls, unlabelled_rows: int, steps: int, arm: Arm) -> CurvePoint:
        """The point of an arm."""
        validation, test = dict(arm.metrics["validation"]), dict(arm.metrics["test"])
        drawn = drawn_metric(test)
        deviations = {split: arm.deviation(drawn, split) for split in SPLITS}
        return cls(
            unlabelled_rows=unlabelled_rows, steps=steps, validation=validation, test=test, deviations=deviations
        )


def drawn_metric(metrics: Mapping[str, float]) -> str:
    """Which of the metrics the picture shows."""
    return next(name for name in _SHOWN if name in metrics)


def _steps(points: Sequence[CurvePoint]) -> str:
    fewest, most = (choose(point.steps for point in points) for choose in (min, max))
    return f"{most} steps each" if fewest == most else f"{fewest} to {most} steps"


def draw_curve(points: Sequence[CurvePoint], path: str | Path) -> Path:
    """Draw validation and test score against the number of unlabelled texts.

    Args:
        points: With ascending numbers of texts.
        path: The file to write.

    Raises:
        DataError: There are no points.
    """
    if not points:
        raise DataError("There are no points to draw")
    metric = drawn_metric(points[0].test)
    scores = {
        "validation": [point.validation[metric] for point in points],
        "test": [point.test[metric] for point in points],
    }
    spreads = {split: [point.deviations[split] or 0.0 for point in points] for split in scores}
    return transfer_curve_plot(
        [point.unlabelled_rows for point in points],
        scores,
        spreads,
        metric=METRIC_WORDS.get(metric, metric),
        title=f"What unlabelled text is worth ({_steps(points)})",
        path=path,
    )
