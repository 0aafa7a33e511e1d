"""Pictures as PNG: confusion matrix and F1 per class of a test result, accuracy against cost of several models.

Drawn through matplotlib's object interface (`Figure`, Agg canvas): no pyplot, so no global state, no window, and no
figure that stays in memory.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nlpxfer.errors import DataError, LabelError
from nlpxfer.evaluate.cascade import CascadePoint
from nlpxfer.evaluate.metrics import ClassScores
from nlpxfer.strict_json import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

CONFUSION_FILE: Final = "confusion.png"
PER_CLASS_FILE: Final = "per_class.png"
MAX_SHOWN: Final = 30
_LABEL_LENGTH: Final = 32
_ROWS_PER_PANEL: Final = 40
_DPI: Final = 120
_INK, _GREY, _BAR = "#1f2933", "#7b8794", "#2f6f9f"


def confusion_plot(labels_B: ArrayLike, predictions_B: ArrayLike, names: Sequence[str], path: str | Path) -> Path:
    """Draw the confusion matrix, each row divided by the rows of its label, as PNG.

    With more than 30 classes, the 30 that take part in most errors are shown, and the title says so; shares refer
    to all rows of a label, so a row may sum to less than 100 %.

    Args:
        labels_B: True class indices, shape (rows,).
        predictions_B: Predicted class indices, shape (rows,).
        names: Label names in schema order.
        path: The file to write.

    Raises:
        DataError: No rows, or shapes that do not fit.
        LabelError: An index outside the names.
    """
    counts_CC = confusion_counts(labels_B, predictions_B, len(names))
    shown = most_confused(counts_CC, MAX_SHOWN)
    totals = counts_CC.sum(axis=1, keepdims=True)
    shares = np.divide(counts_CC, totals, out=np.zeros(counts_CC.shape), where=totals > 0)[np.ix_(shown, shown)]
    what = (
        "Confusion matrix" if len(shown) == len(names) else f"The {len(shown)} most confused of {len(names)} classes"
    )
    figure, axes = _matrix_figure(len(shown))
    _draw_matrix(axes, shares, [short_name(names[index]) for index in shown])
    axes.set_title(f"{what}\n% of the test rows of each label", fontsize=11, color=_INK, pad=12)
    return _save(figure, path)


def per_class_plot(table: Sequence[ClassScores], path: str | Path) -> Path:
    """Draw the F1 of each class as bars, the worst first, with the number of test rows n, as PNG.

    Args:
        table: From `per_class_table`; classes with neither rows nor F1 are listed with 0.
        path: The file to write.

    Raises:
        DataError: An empty table.
    """
    from matplotlib.figure import Figure

    if not table:
        raise DataError("There are no classes to draw")
    ordered = sorted(table, key=lambda row: (row["f1"], row["rows"]))
    panels = math.ceil(len(ordered) / _ROWS_PER_PANEL)
    per_panel = math.ceil(len(ordered) / panels)
    longest = max(len(short_name(row["label"])) for row in ordered)
    size = ((3.6 + 0.075 * longest) * panels, 1.3 + 0.24 * per_panel)
    figure = Figure(figsize=size, dpi=_DPI, layout="constrained")
    grid = figure.subplots(1, panels, squeeze=False)[0]
    for panel, axes in enumerate(grid):
        _draw_bars(axes, ordered[panel * per_panel : (panel + 1) * per_panel], per_panel)
    figure.suptitle(f"F1 per class ({len(ordered)} classes, worst first; n: test rows)", fontsize=11, color=_INK)
    return _save(figure, path)


@dataclass(frozen=True, kw_only=True)
class CascadePicture:
    """What `cascade_plot` shows.

    Attributes:
        curve: Points from no row sent on (the student alone) to all of them (the teacher alone).
        chosen: The point of the threshold in use.
        rows_per_second: Measured, for `cascade`, `student` and `teacher`.
        rows: Labelled rows behind it.
        metric: What the points' scores are, in words.
    """

    curve: Sequence[CascadePoint]
    chosen: CascadePoint
    rows_per_second: Mapping[str, float]
    rows: int
    metric: str = "accuracy"


def cascade_plot(picture: CascadePicture, path: str | Path) -> Path:
    """Draw the score of a cascade against the share of rows that it sends on to the teacher, as PNG.

    Args:
        picture: What to show; both ends of the curve and the point in use are marked, with their rows per second.
        path: The file to write.

    Raises:
        DataError: The curve has no points.
    """
    from matplotlib.figure import Figure

    if not picture.curve:
        raise DataError("There are no points to draw")
    figure = Figure(figsize=(7, 4.4), dpi=_DPI, layout="constrained")
    axes = figure.subplots()
    sent, right = ([100 * getattr(point, name) for point in picture.curve] for name in ("sent", "score"))
    axes.plot(sent, right, color=_BAR, linewidth=1.6, zorder=2)
    marked = {"student": picture.curve[0], "cascade": picture.chosen, "teacher": picture.curve[-1]}
    for name, point in marked.items():
        shown = f"{name if name == 'cascade' else f'{name} only'}: {100 * point.score:.1f} %"
        shown += f", {picture.rows_per_second[name]:,.0f} rows/s"
        shape = "o" if name == "cascade" else "s"
        axes.plot(100 * point.sent, 100 * point.score, shape, markersize=8, label=shown, zorder=3)
    _plain_axes(axes, "% of the rows sent on to the teacher", f"{picture.metric} in %")
    axes.legend(fontsize=9, frameon=False, labelcolor=_INK)
    axes.set_title(
        f"{picture.metric[0].upper()}{picture.metric[1:]} against cost ({picture.rows:,} rows)",
        fontsize=11,
        color=_INK,
        pad=10,
    )
    return _save(figure, path)


@dataclass(frozen=True, kw_only=True)
class SpeedPoint:
    """A model in the picture of accuracy against speed."""

    name: str
    accuracy: float
    rows_per_second: float


def pareto_front(points: Sequence[SpeedPoint]) -> list[bool]:
    """Which models no other one beats: none is at least as good and as fast, and better in one of the two.

    >>> pareto_front([SpeedPoint(name=n, accuracy=a, rows_per_second=r)
    ...               for n, a, r in (("a", 0.9, 10), ("b", 0.8, 20), ("c", 0.8, 15))])
    [True, True, False]
    """

    def beats(one: SpeedPoint, other: SpeedPoint) -> bool:
        ours, theirs = ((point.accuracy, point.rows_per_second) for point in (one, other))
        return ours != theirs and all(mine >= its for mine, its in zip(ours, theirs, strict=True))

    return [not any(beats(other, point) for other in points) for point in points]


def pareto_plot(points: Sequence[SpeedPoint], path: str | Path, *, least: float | None = None) -> Path:
    """Draw accuracy against rows per second, on a logarithmic axis, with the front marked, as PNG.

    Args:
        points: The models.
        path: The file to write.
        least: An accuracy to be reached, drawn as a line.

    Raises:
        DataError: No models, or a speed that is not above 0.
    """
    from matplotlib.figure import Figure

    if not points or any(point.rows_per_second <= 0 for point in points):
        raise DataError("A picture of accuracy against speed needs models with rows per second above 0")
    figure = Figure(figsize=(7, 4.8), dpi=_DPI, layout="constrained")
    axes = figure.subplots()
    on_front = pareto_front(points)
    front = sorted((point for point, on in zip(points, on_front, strict=True) if on), key=lambda p: p.rows_per_second)
    axes.plot([p.rows_per_second for p in front], [100 * p.accuracy for p in front], "-", color=_BAR, zorder=1)
    for point, on in zip(points, on_front, strict=True):
        place, colour = (point.rows_per_second, 100 * point.accuracy), _BAR if on else _GREY
        axes.plot(*place, "o" if on else "x", color=colour, markersize=7, zorder=2)
        text = axes.annotate(short_name(point.name), place, xytext=(5, 5), textcoords="offset points", fontsize=8)
        text.set_parse_math(False)
        text.set_color(colour)
    if least is not None:
        axes.axhline(100 * least, color=_GREY, linewidth=1, linestyle="--", zorder=0)
    axes.set_xscale("log")
    axes.margins(x=0.15, y=0.12)
    _plain_axes(axes, "rows per second (CPU)", "validation score in %")
    axes.set_title("Score against speed; dots: no other is better and as fast", fontsize=11, color=_INK, pad=10)
    return _save(figure, path)


def _plain_axes(axes: Axes, below: str, beside: str) -> None:
    axes.set_xlabel(below, color=_INK)
    axes.set_ylabel(beside, color=_INK)
    axes.grid(visible=True, color="#e4e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(_GREY)


def transfer_curve_plot(
    texts: Sequence[int],
    scores: Mapping[str, Sequence[float]],
    deviations: Mapping[str, Sequence[float]],
    *,
    metric: str,
    title: str,
    path: str | Path,
) -> Path:
    """Draw scores against numbers of unlabelled texts, as PNG; bars are a standard deviation, if it is not 0.

    The axis of texts is linear up to the first number above 0 and logarithmic beyond, so that 0 has a place.

    Args:
        texts: Ascending.
        scores: Split -> score for each number of texts.
        deviations: Split -> their deviations.
        metric: What the score is, for a reader.
        title: Above the picture.
        path: The file to write.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    figure = Figure(figsize=(6.4, 4.2), dpi=_DPI, layout="constrained")
    axes = figure.subplots()
    for colour, (split, values) in zip((_GREY, _BAR), scores.items(), strict=True):
        bars = list(deviations[split]) if any(deviations[split]) else None
        axes.errorbar(texts, values, yerr=bars, marker="o", markersize=4, capsize=3, color=colour, label=split)
    axes.set_xscale("symlog", linthresh=max(1, min((number for number in texts if number), default=1)))
    axes.set_xticks(texts, [f"{number:,}" for number in texts], rotation=30, ha="right")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("unlabelled texts", color=_INK)
    axes.set_ylabel(metric, color=_INK)
    axes.set_title(title, fontsize=11, color=_INK)
    axes.yaxis.grid(visible=True, color="#e4e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    _style_ticks(axes, 9)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False, labelcolor=_INK)
    return _save(figure, path)


def confusion_counts(labels_B: ArrayLike, predictions_B: ArrayLike, classes: int) -> NDArray[np.int64]:
    """How many rows of label i were predicted as j, shape (classes, classes).

    Raises:
        DataError: No rows, or shapes that do not fit.
        LabelError: An index outside 0..classes-1.
    """
    labels, predictions = np.asarray(labels_B), np.asarray(predictions_B)
    if labels.ndim != 1 or labels.shape != predictions.shape or not len(labels):
        raise DataError(f"Labels of shape {labels.shape} and predictions of shape {predictions.shape} do not fit")
    if min(labels.min(), predictions.min()) < 0 or max(labels.max(), predictions.max()) >= classes:
        raise LabelError(f"Labels and predictions must be class indices from 0 to {classes - 1}")
    return np.bincount(labels * classes + predictions, minlength=classes**2).reshape(classes, classes)


def most_confused(counts_CC: NDArray[np.int64], limit: int) -> list[int]:
    """The `limit` classes with most errors, as label or as prediction, in schema order."""
    errors = counts_CC - np.diag(np.diag(counts_CC))
    ranked = np.argsort(-(errors.sum(axis=0) + errors.sum(axis=1)), kind="stable")
    return sorted(ranked[:limit].tolist())


def short_name(name: str) -> str:
    """A label name on one line of at most 32 characters, cut in the middle because endings tell labels apart.

    >>> short_name("balance_not_updated_after_cheque_or_cash_deposit")
    'balance_not_upda…or_cash_deposit'
    """
    name = " ".join("".join(character if character.isprintable() else " " for character in name).split())
    if len(name) <= _LABEL_LENGTH:
        return name
    tail = (_LABEL_LENGTH - 1) // 2
    return f"{name[: _LABEL_LENGTH - 1 - tail]}…{name[-tail:]}"


def _matrix_figure(classes: int) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    cells = max(0.36 * classes, 2.2)
    figure = Figure(figsize=(cells + 3, cells + 3), dpi=_DPI)
    axes = figure.add_axes((2.5 / (cells + 3), 2.5 / (cells + 3), cells / (cells + 3), cells / (cells + 3)))
    return figure, axes


def _draw_matrix(axes: Axes, shares: NDArray[np.float64], names: Sequence[str]) -> None:
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="equal")
    positions = range(len(names))
    axes.set_xticks(positions, names, rotation=45 if len(names) > 3 else 30, ha="right", rotation_mode="anchor")
    axes.set_yticks(positions, names)
    _style_ticks(axes, 9)
    axes.set_xlabel("predicted", color=_INK)
    axes.set_ylabel("label", color=_INK)
    axes.set_xticks(np.arange(len(names) + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(len(names) + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1)
    axes.tick_params(which="both", length=0)
    for row, column in np.argwhere(shares >= 0.005):
        share = shares[row, column]
        colour = "white" if share > 0.55 else _INK
        axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=9, color=colour)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _draw_bars(axes: Axes, rows: Sequence[ClassScores], room: int) -> None:
    positions = list(range(len(rows)))
    axes.barh(positions, [row["f1"] for row in rows], color=_BAR, height=0.72)
    axes.set_yticks(positions, [short_name(row["label"]) for row in rows])
    _style_ticks(axes, 8)
    axes.set_ylim(room - 0.4, -0.6)
    axes.set_xlim(0, 1.0)
    axes.xaxis.grid(visible=True, color="#e4e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)
    axes.spines["left"].set_color(_GREY)
    for position, row in zip(positions, rows, strict=True):
        text = f"{row['f1']:.2f}  n={row['rows']:,}"
        axes.annotate(
            text, (1.0, position), xytext=(4, 0), textcoords="offset points", va="center", fontsize=7.5, color=_GREY
        )


def _style_ticks(axes: Axes, size: int) -> None:
    for label in [*axes.get_xticklabels(), *axes.get_yticklabels()]:
        label.set_parse_math(False)  # a label may hold dollar signs
        label.set_fontsize(size)
        label.set_color(_INK)


def _save(figure: Any, path: str | Path) -> Path:  # noqa: ANN401 - matplotlib is untyped
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure)
    with warnings.catch_warnings(record=True) as caught, replacing(path) as temporary:
        warnings.filterwarnings("always", message="Glyph .* missing from font")
        figure.savefig(temporary, format="png", metadata={"Software": None}, bbox_inches="tight", pad_inches=0.15)
    if caught:
        logger.warning("%s: some characters of the label names are not in the font and are drawn as boxes", path.name)
    return path
