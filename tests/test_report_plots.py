"""Plots: the numbers behind them, and pictures that can be drawn for any label names."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from nlpxfer.errors import DataError, LabelError
from nlpxfer.report import confusion_plot, per_class_plot
from nlpxfer.report.plots import confusion_counts, most_confused, short_name

PNG = b"\x89PNG\r\n\x1a\n"


def _table(names, rows=10):
    return [
        {"label": name, "precision": 0.5, "recall": 0.5, "f1": index / len(names), "rows": rows}
        for index, name in enumerate(names)
    ]


def test_counts():
    counts = confusion_counts([0, 0, 1, 2], [0, 1, 1, 0], 3)
    assert counts.tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 0]]


def test_most_confused_counts_errors_on_both_sides():
    counts = np.diag([50, 50, 50, 50])
    counts[3, 1] = 2  # one error pair between 3 and 1
    counts[0, 1] = 1
    # Errors: class 0 one, class 1 three, class 2 none, class 3 two.
    assert most_confused(counts, 2) == [1, 3]
    assert most_confused(counts, 3) == [0, 1, 3]
    assert most_confused(counts, 10) == [0, 1, 2, 3]


@pytest.mark.parametrize("classes", [1, 2, 16, 77, 151])
def test_pictures_of_all_sizes(tmp_path: Path, classes: int):
    names = [f"a_rather_long_label_name_number_{index}_with_ending_{index}" for index in range(classes)]
    labels = np.arange(classes * 3) % classes
    confusion = confusion_plot(labels, np.roll(labels, 1), names, tmp_path / "a" / "confusion.png")
    bars = per_class_plot(_table(names), tmp_path / "per_class.png")
    for path in (confusion, bars):
        assert path.read_bytes().startswith(PNG)
        height, width = imread(path).shape[:2]
        assert 100 < height < 2500
        assert 200 < width < 3500
    assert sorted(file.name for file in tmp_path.rglob("*.png")) == ["confusion.png", "per_class.png"]


def _titles(monkeypatch):
    from matplotlib.axes import Axes

    seen = []
    original = Axes.set_title

    def record(self, text, **options):
        seen.append(text)
        return original(self, text, **options)

    monkeypatch.setattr(Axes, "set_title", record)
    return seen


def test_the_title_says_when_classes_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    titles = _titles(monkeypatch)
    for classes in (30, 31):
        names = [str(index) for index in range(classes)]
        confusion_plot(range(classes), range(classes), names, tmp_path / "x.png")
    assert titles[0].startswith("Confusion matrix")
    assert titles[1].startswith("The 30 most confused of 31 classes")


def test_the_diagonal_is_dark_where_all_is_right(tmp_path: Path):
    right = imread(confusion_plot([0, 1], [0, 1], ["a", "b"], tmp_path / "right.png"))
    wrong = imread(confusion_plot([0, 1], [1, 0], ["a", "b"], tmp_path / "wrong.png"))
    height, width = right.shape[:2]
    y, x = int(height * 0.3), int(width * 0.3)
    assert right[y, x, :3].mean() < 0.4 < 0.8 < wrong[y, x, :3].mean()


def test_signs_in_labels_are_drawn_not_parsed(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    names = ["$x^$", "\\frac{a}{b}", "new\nline", "<b>&amp;", "%d {x}"]
    confusion_plot([0, 1, 2, 3, 4], [0, 1, 2, 3, 4], names, tmp_path / "a.png")
    per_class_plot(_table(names), tmp_path / "b.png")
    assert caplog.records == []
    with caplog.at_level(logging.WARNING):
        confusion_plot([0, 1], [0, 1], ["\u4f60\u597d", "b"], tmp_path / "c.png")
    assert ["not in the font" in record.message for record in caplog.records] == [True]


def test_the_same_data_gives_the_same_bytes(tmp_path: Path):
    first = per_class_plot(_table(["a", "b"]), tmp_path / "1.png").read_bytes()
    assert per_class_plot(_table(["a", "b"]), tmp_path / "2.png").read_bytes() == first


def test_pyplot_is_left_alone(tmp_path: Path):
    import subprocess

    code = (
        "import sys\nfrom nlpxfer.report import confusion_plot\n"
        "confusion_plot([0, 1], [0, 1], ['a', 'b'], 'x.png')\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    environment = {"PYTHONPATH": str(Path(__file__).parents[1]), "MPLCONFIGDIR": str(tmp_path), "HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
    assert (tmp_path / "x.png").exists()


def test_short_name():
    assert short_name("short") == "short"
    assert short_name("x" * 32) == "x" * 32
    cut = short_name("beginning_" + "x" * 40 + "_ending")
    assert len(cut) == 32
    assert cut.startswith("beginning_")
    assert cut.endswith("_ending")


def test_bad_input_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match="do not fit"):
        confusion_plot([0], [0, 1], ["a", "b"], tmp_path / "x.png")
    with pytest.raises(LabelError, match="0 to 1"):
        confusion_plot([0, 2], [0, 1], ["a", "b"], tmp_path / "x.png")
    with pytest.raises(DataError, match="no classes"):
        per_class_plot([], tmp_path / "x.png")
    assert list(tmp_path.iterdir()) == []
