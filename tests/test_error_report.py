"""errors.json and errors.md: mistakes by confidence, confusions by count, and texts that stay texts."""

import json

import numpy as np
import pytest

from nlpxfer.report.error_report import SHOWN, error_summary, write_error_report

NAMES = ("cat", "dog", "eel")
SHARES = np.array(
    [
        [0.8, 0.1, 0.1],  # right
        [0.6, 0.3, 0.1],  # dog -> cat
        [0.1, 0.2, 0.7],  # cat -> eel
        [0.9, 0.1, 0.0],  # dog -> cat
        [0.2, 0.3, 0.5],  # right
    ]
)
LABELS = np.array([0, 1, 0, 1, 2])
TEXTS = ["meow", "woof", "purr", "a | <b>bark</b>\nand *more*", "…"]


@pytest.fixture
def summary():
    return error_summary(SHARES, LABELS, NAMES, [11, 12, 13, 14, 15], TEXTS)


def test_mistakes_the_most_confident_first(summary):
    assert (summary["rows"], summary["errors"]) == (5, 3)
    assert [each["row"] for each in summary["mistakes"]] == [14, 13, 12]
    assert summary["mistakes"][1] == {
        "row": 13,
        "text": "purr",
        "label": "cat",
        "predicted": "eel",
        "probability": 0.7,
        "label_probability": 0.1,
    }


def test_confusions_the_most_frequent_first(summary):
    assert summary["confusions"] == [
        {
            "label": "dog",
            "predicted": "cat",
            "rows": 2,
            "share_of_label": 1.0,
            "share_of_errors": pytest.approx(2 / 3),
        },
        {
            "label": "cat",
            "predicted": "eel",
            "rows": 1,
            "share_of_label": 0.5,
            "share_of_errors": pytest.approx(1 / 3),
        },
    ]
    assert [row["recall"] for row in summary["per_class"]] == [0.5, 0.0, 1.0]


def test_at_most_fifty_of_each():
    rows = 4000
    random = np.random.default_rng(0)
    shares = random.dirichlet(np.ones(12), size=rows)
    found = error_summary(
        shares, random.integers(0, 12, rows), [f"n{i}" for i in range(12)], range(rows), ["x"] * rows
    )
    assert len(found["mistakes"]) == len(found["confusions"]) == SHOWN == 50
    assert found["errors"] > 3000
    counts = [each["rows"] for each in found["confusions"]]
    assert counts == sorted(counts, reverse=True)


def test_second_texts():
    found = error_summary(SHARES, LABELS, NAMES, range(5), TEXTS, ["second"] * 5)
    assert {each["text_pair"] for each in found["mistakes"]} == {"second"}


def test_files(summary, tmp_path):
    nothing = error_summary(np.eye(3), np.arange(3), NAMES, range(3), TEXTS[:3])
    write_error_report(tmp_path, {"validation": nothing, "test": summary})
    assert json.loads((tmp_path / "errors.json").read_text()) == {
        "validation": json.loads(json.dumps(nothing)),
        "test": json.loads(json.dumps(summary)),
    }
    page = (tmp_path / "errors.md").read_text()
    assert "## Validation: 0 of 3 rows are wrong" in page
    assert "## Test: 3 of 5 rows are wrong" in page
    assert page.count("### Most confident mistakes") == 1, "a split without errors lists none"
    assert "| dog | cat | 2 | 100.0 % | 66.7 % |" in page
    assert "- row 13: cat → eel (0.700 against 0.100): purr" in page
    assert r"a \| &lt;b&gt;bark&lt;/b&gt; and \*more\*" in page, "texts are shown, not interpreted"
    assert page.index("| dog | 0.000") < page.index("| cat | 0.333"), "the worst class first"


def test_long_texts_are_cut_for_reading_only(tmp_path):
    found = error_summary(SHARES, LABELS, NAMES, range(5), ["word " * 400] * 5)
    write_error_report(tmp_path, {"test": found})
    assert len(json.loads((tmp_path / "errors.json").read_text())["test"]["mistakes"][0]["text"]) == 2000
    assert max(map(len, (tmp_path / "errors.md").read_text().splitlines())) < 400
