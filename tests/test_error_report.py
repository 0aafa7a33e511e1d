"""errors.json and errors.md: the worst mistakes first, confusions by count, and texts that stay texts."""

import csv
import json

import numpy as np
import pytest
from recipe_runs import finished, tiny_words
from test_problem_types import MULTI, NUMBERS, topic_rows
from tiny import write_csv

from nlpxfer.classify import Classifier, predict_file
from nlpxfer.problem import MULTI_LABEL, REGRESSION
from nlpxfer.report.error_report import (
    SHOWN,
    error_summary,
    label_set_error_summary,
    number_error_summary,
    number_groups,
    write_error_report,
)

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


# -- multi-label

THRESHOLDS = np.array([0.5, 0.2, 0.8])
LABEL_SHARES = np.array(
    [
        [0.9, 0.1, 0.1],  # right
        [0.4, 0.3, 0.9],  # cat missing (0.1 of 0.5), eel extra (0.1 of 0.2)
        [0.5, 0.2, 0.8],  # right: a probability on the threshold gives no label
        [0.1, 0.02, 0.85],  # dog missing (0.18 of 0.2), eel extra (0.05 of 0.2)
        [0.45, 0.68, 0.1],  # cat missing (0.05 of 0.5), dog extra (0.48 of 0.8), eel missing (0.7 of 0.8)
        [0.15, 0.1, 0.96],  # cat missing (0.35 of 0.5), eel extra (0.16 of 0.2)
    ]
)
LABEL_SETS = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 0], [0, 1, 0], [1, 0, 1], [1, 0, 0]]) > 0
LABEL_TEXTS = ["meow", "meow woof", "quiet", "woof | *woof*", "splash", "purr"]


@pytest.fixture
def of_labels():
    return label_set_error_summary(LABEL_SHARES, LABEL_SETS, THRESHOLDS, NAMES, range(11, 17), LABEL_TEXTS)


def test_wrong_decisions_the_furthest_from_the_threshold_first(of_labels):
    assert [(each["row"], each["label"], each["kind"]) for each in of_labels["mistakes"]] == [
        (14, "dog", "missing"),  # 0.9 of the way
        (15, "eel", "missing"),  # 0.875
        (16, "eel", "extra"),  # 0.8
        (16, "cat", "missing"),  # 0.7
        (15, "dog", "extra"),  # 0.6
        (12, "eel", "extra"),  # 0.5
        (14, "eel", "extra"),  # 0.25
        (12, "cat", "missing"),  # 0.2
        (15, "cat", "missing"),  # 0.1
    ]
    assert of_labels["mistakes"][1] == {
        "row": 15,
        "text": "splash",
        "labels": ["cat", "eel"],
        "predicted": ["dog"],
        "label": "eel",
        "kind": "missing",
        "probability": 0.1,
        "threshold": 0.8,
    }
    assert (of_labels["rows"], of_labels["errors"]) == (6, 4)
    assert (of_labels["labels_missing"], of_labels["labels_extra"]) == (5, 4)


def test_labels_given_where_another_is_missing(of_labels):
    keys = "missing", "extra", "rows", "share_of_label", "share_of_errors"
    assert [tuple(each[key] for key in keys) for each in of_labels["confusions"]] == [
        ("cat", "eel", 2, 0.5, 0.5),
        ("cat", "dog", 1, 0.25, 0.25),
        ("dog", "eel", 1, 0.5, 0.25),
        ("eel", "dog", 1, 1.0, 0.25),
    ]


def test_scores_of_labels_are_those_with_the_thresholds(of_labels):
    assert of_labels["per_class"][0] == {"label": "cat", "precision": 1.0, "recall": 0.25, "f1": 0.4, "rows": 4}
    assert of_labels["per_class"][1]["f1"] == 0.5, "dog is given twice, at 0.3 and 0.68, and once rightly"


@pytest.mark.parametrize(("threshold", "share", "gold"), [(0.0, 0.0, True), (1e-320, 0.0, True), (0.5, 1.0, False)])
def test_thresholds_and_probabilities_at_the_ends(threshold, share, gold):
    table = [np.array([[value]]) for value in (share, gold)]
    found = label_set_error_summary(*table, np.array([threshold]), ["cat"], [1], ["x"])
    assert [each["kind"] for each in found["mistakes"]] == ["missing" if gold else "extra"]
    assert found["confusions"] == []


def test_at_most_fifty_wrong_decisions():
    random = np.random.default_rng(0)
    names = [f"n{i}" for i in range(12)]
    gold = random.random((500, 12)) < 0.3
    found = label_set_error_summary(random.random((500, 12)), gold, np.full(12, 0.5), names, range(500), ["x"] * 500)
    assert len(found["mistakes"]) == len(found["confusions"]) == SHOWN
    assert found["labels_missing"] + found["labels_extra"] > 2500 > 500 >= found["errors"]
    sure = [abs(each["probability"] - 0.5) for each in found["mistakes"]]
    assert sure == sorted(sure, reverse=True)


def test_files_of_labels(of_labels, tmp_path):
    given = LABEL_SETS * 0.9
    nothing = label_set_error_summary(given, LABEL_SETS, np.full(3, 0.5), NAMES, range(6), LABEL_TEXTS)
    write_error_report(tmp_path, {"validation": nothing, "test": of_labels}, MULTI_LABEL)
    assert json.loads((tmp_path / "errors.json").read_text()) == {"validation": nothing, "test": of_labels}
    page = (tmp_path / "errors.md").read_text()
    assert "## Validation: 0 of 6 rows have a missing or an extra label" in page
    assert "## Test: 4 of 6 rows have a missing or an extra label" in page
    assert "Labels missing: 5. Labels given wrongly: 4." in page
    assert page.count("### Labels given where another is missing") == 1
    assert page.count("### Probabilities furthest on the wrong side of the threshold") == 1
    assert "| cat | eel | 2 | 50.0 % | 50.0 % |" in page
    lines = "- row 15: extra dog (0.680, threshold 0.200): splash", "  - labels: cat, eel", "  - predicted: dog"
    assert "\n".join(lines) in page
    line = r"- row 14: missing dog (0.020, threshold 0.200): woof \| \*woof\*"
    assert line in page, "texts are shown, not interpreted"
    test = page[page.index("## Test") :]
    assert test.index("| eel | 0.000") < test.index("| cat | 1.000 | 0.250 | 0.400 | 4 |"), "the worst label first"


def test_rows_without_labels_are_shown_as_such(tmp_path):
    shares, gold = np.array([[0.9], [0.1]]), np.array([[False], [True]])
    found = label_set_error_summary(shares, gold, np.array([0.5]), ["none"], [1, 2], ["one", "two"])
    assert [(each["labels"], each["predicted"]) for each in found["mistakes"]] == [([], ["none"]), (["none"], [])]
    write_error_report(tmp_path, {"test": found}, MULTI_LABEL)
    page = (tmp_path / "errors.md").read_text()
    assert "): one\n  - labels: *none*\n  - predicted: none\n" in page
    assert "): two\n  - labels: none\n  - predicted: *none*\n" in page


# -- regression

GOLD = np.array([1, 1, 2, 5, 5], dtype=np.float32)
FOUND = np.array([1.5, 0.5, 2, 3, 4.2], dtype=np.float32)


@pytest.fixture
def of_numbers():
    return number_error_summary(FOUND, GOLD, range(11, 16), TEXTS)


def test_largest_errors_first(of_numbers):
    assert of_numbers["rows"] == 5
    assert "errors" not in of_numbers
    assert of_numbers["mean_absolute_error"] == pytest.approx(3.8 / 5)
    assert of_numbers["mean_error"] == pytest.approx(-2.8 / 5)
    assert [each["row"] for each in of_numbers["mistakes"]] == [14, 15, 11, 12], "row 13 is right"
    assert of_numbers["mistakes"][1] == {"row": 15, "text": "…", "label": 5.0, "predicted": 4.2, "error": -0.8}


def test_errors_by_number(of_numbers):
    keys = "rows", "lowest", "highest", "mean_error", "mean_absolute_error"
    assert [tuple(each[key] for key in keys) for each in of_numbers["by_number"]] == [
        (2, 1.0, 1.0, 0.0, 0.5),
        (1, 2.0, 2.0, 0.0, 0.0),
        (2, 5.0, 5.0, pytest.approx(-1.4), pytest.approx(1.4)),
    ]


def test_groups_of_numbers():
    whole = np.array([9.0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 8])
    assert number_groups(whole).tolist() == whole.tolist(), "ten whole numbers have a group each"
    assert np.bincount(number_groups(np.arange(11.0))).tolist() == [2, 2, 3, 2, 2], "eleven have not"
    assert number_groups(np.array([0.5, 2.5, 0.5, 1.0, 1.5, 2.0])).tolist() == [0, 4, 0, 1, 2, 3]
    continuous = np.random.default_rng(0).normal(size=100)
    groups = number_groups(continuous)
    assert np.bincount(groups).tolist() == [20] * 5
    assert (np.diff(groups[np.argsort(continuous)]) >= 0).all()


@pytest.mark.parametrize("turned", [1, -1])
def test_many_equal_numbers_are_a_group_of_their_own(turned):
    numbers = turned * np.array([0.0] * 65 + list(range(1, 36)))
    groups = number_groups(numbers)
    rows = [int((groups == group).sum()) for group in np.unique(groups)]
    assert rows == ([65, 15, 20] if turned == 1 else [20, 15, 65])
    assert len(set(groups[numbers == 0])) == 1


def test_at_most_fifty_numbers():
    random = np.random.default_rng(0)
    found = number_error_summary(random.normal(size=300), random.normal(size=300), range(300), ["x"] * 300)
    sizes = [abs(each["error"]) for each in found["mistakes"]]
    assert len(sizes) == SHOWN
    assert sizes == sorted(sizes, reverse=True)
    assert sum(group["rows"] for group in found["by_number"]) == 300


def test_files_of_numbers(of_numbers, tmp_path):
    nothing = number_error_summary(np.array([0.25, 1e6]), np.array([0.25, 1e6]), range(2), TEXTS[:2])
    write_error_report(tmp_path, {"validation": nothing, "test": of_numbers}, REGRESSION)
    assert json.loads((tmp_path / "errors.json").read_text()) == {"validation": nothing, "test": of_numbers}
    page = (tmp_path / "errors.md").read_text()
    assert "## Test: mean absolute error 0.76, mean error -0.56, 5 rows" in page
    assert page.count("### Largest errors") == 1, "a split without errors lists none"
    assert "| 5 | -1.4 | 1.4 | 2 |" in page
    assert "- row 14: 5 → 3 (-2): a \\| &lt;b&gt;" in page
    wide = number_error_summary(np.zeros(10), np.arange(10) / 2, range(10), ["x"] * 10)
    write_error_report(tmp_path, {"test": wide}, REGRESSION)
    assert "| 0 to 0.5 | -0.25 | 0.25 | 2 |" in (tmp_path / "errors.md").read_text()


def test_second_texts_of_labels_and_numbers(tmp_path):
    second = [f"second {i}" for i in range(6)]
    of_labels = label_set_error_summary(LABEL_SHARES, LABEL_SETS, THRESHOLDS, NAMES, range(6), LABEL_TEXTS, second)
    of_numbers = number_error_summary(FOUND, GOLD, range(5), TEXTS, second[:5])
    for found, kind in ((of_labels, MULTI_LABEL), (of_numbers, REGRESSION)):
        assert all(each["text_pair"] == f"second {each['row']}" for each in found["mistakes"])
        assert list(found["mistakes"][0])[:3] == ["row", "text", "text_pair"]
        write_error_report(tmp_path, {"test": found}, kind)
        assert "⏎ second 4" in (tmp_path / "errors.md").read_text()


# -- runs


def run_and_answers(folder, model, rows, *words, epochs=12):
    """A run with the report, its errors on the test rows, and the rows as `predict` labels them."""
    parts = {"train": rows[:200], "validation": rows[200:260], "test": rows[260:]}
    files = type("Files", (), {name: write_csv(folder / f"{name}.csv", part) for name, part in parts.items()})
    run = finished("finetune", folder / "out", *tiny_words(files, model, epochs), *words, "--error_report", "true")
    found = json.loads((run.folder / "errors.json").read_text())
    assert list(found) == ["validation", "test"]
    assert found["test"]["rows"] == len(parts["test"])
    predict_file(Classifier.load(str(run.folder), bf16=False), files.test, folder / "labelled.csv")
    with open(folder / "labelled.csv", encoding="utf-8") as file:
        answers = list(csv.DictReader(file))
    for each in found["test"]["mistakes"]:
        answer = answers[each["row"] - 1]
        assert (each["text"], each.get("text_pair")) == (answer["text"], answer.get("second"))
    return run, found["test"], answers


def of_two_texts(rows):
    return [{**row, **dict(zip(("text", "second"), row["text"].split(" ", 1), strict=True))} for row in rows]


@pytest.fixture
def model(tiny_checkpoint):
    return tiny_checkpoint("bert", layers=1)


def test_a_run_with_one_label_for_two_texts(model, tmp_path):
    rows = [{**row, "label": f"{row['score']} topics"} for row in of_two_texts(topic_rows(330, seed=3))]
    _, found, answers = run_and_answers(tmp_path, model, rows, "--text_pair_column", "second", epochs=2)
    wrong = {number for number, row in enumerate(answers, start=1) if row["label"] != row["predicted_label"]}
    assert 0 < found["errors"] == len(wrong) <= SHOWN
    assert {each["row"] for each in found["mistakes"]} == wrong
    for each in found["mistakes"]:
        assert each["probability"] == pytest.approx(float(answers[each["row"] - 1]["probability"]), abs=1e-5)


def test_a_run_with_several_labels_for_two_texts(model, tmp_path):
    rows = of_two_texts(topic_rows(330, seed=3))
    run, found, answers = run_and_answers(tmp_path, model, rows, *MULTI, "--text_pair_column", "second")
    expected = {}
    for number, row in enumerate(answers, start=1):
        gold, given = ({*row[key].split("|")} - {""} for key in ("labels", "predicted_labels"))
        expected |= {(number, label): "missing" for label in gold - given}
        expected |= {(number, label): "extra" for label in given - gold}
    assert {*expected.values()} == {"missing", "extra"}
    assert len(expected) <= SHOWN
    assert {(each["row"], each["label"]): each["kind"] for each in found["mistakes"]} == expected
    assert found["errors"] == len({number for number, _ in expected})
    thresholds = run.report["checks"]["thresholds"]
    assert {*thresholds["by_label"].values()} != {0.5}
    for each in found["mistakes"]:
        answer = answers[each["row"] - 1]
        shares = dict(zip(*(answer[key].split("|") for key in ("predicted_labels", "probabilities")), strict=True))
        assert each["predicted"] == [label for label in shares if label]
        assert each["labels"] == [label for label in answer["labels"].split("|") if label]
        assert each["threshold"] == pytest.approx(thresholds["by_label"][each["label"]], abs=1e-6)
        assert (each["probability"] > each["threshold"]) == (each["kind"] == "extra")
        if each["kind"] == "extra":
            assert each["probability"] == pytest.approx(float(shares[each["label"]]), abs=1e-5)
    seen = [row["f1"] for row in found["per_class"]]
    assert np.mean(seen) == pytest.approx(thresholds["test"]["macro_f1"]), "not the scores at 0.5"
    page = (run.folder / "errors.md").read_text()
    assert f"## Test: {found['errors']} of {len(answers)} rows have a missing or an extra label" in page


def test_a_run_with_numbers(model, tmp_path):
    run, found, answers = run_and_answers(tmp_path, model, topic_rows(330, seed=3), *NUMBERS)
    errors = np.array([float(row["predicted_number"]) - float(row["score"]) for row in answers])
    worst = np.argsort(-np.abs(errors))[:SHOWN]
    assert [abs(each["error"]) for each in found["mistakes"]] == pytest.approx(np.abs(errors[worst]), abs=1e-5)
    for each in found["mistakes"]:
        assert each["error"] == pytest.approx(errors[each["row"] - 1], abs=1e-5)
        assert each["label"] == float(answers[each["row"] - 1]["score"])
        assert each["predicted"] == pytest.approx(each["label"] + each["error"], abs=1e-5)
    assert found["mean_absolute_error"] == pytest.approx(run.report["metrics"]["test"]["mean_absolute_error"])
    assert found["mean_error"] == pytest.approx(errors.mean(), abs=1e-5)
    assert "calibration" not in run.report["checks"]
    scores = np.array([float(row["score"]) for row in answers])
    for group, number in zip(found["by_number"], range(4), strict=True):
        assert (group["lowest"], group["highest"], group["rows"]) == (number, number, (scores == number).sum())
        assert group["mean_error"] == pytest.approx(errors[scores == number].mean(), abs=1e-5)
    assert "### Largest errors" in (run.folder / "errors.md").read_text()
