from __future__ import annotations

import csv
import json
import logging
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from nlpxfer.data import DataRequest, find_leaks, load_data, normalise_text
from nlpxfer.errors import ConfigError, DataError, LabelError

ROOT = Path(__file__).resolve().parents[1]
LONG = " ".join(f"w{i}" for i in range(25))
LONG_NEAR = " ".join(f"w{i}" for i in range(1, 25))
LONG_FREE = " ".join(f"w{i}" for i in range(24))


def write(path, rows, columns=("text", "label")):
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)
    return str(path)


def rows(count, prefix="", labels="ab"):
    return [(f"{prefix} text {label} {i}", label) for i in range(count) for label in labels]


@pytest.fixture
def three(tmp_path):
    """Train, validation and test files whose texts have nothing in common."""
    return {
        "train_file": write(tmp_path / "train.csv", rows(10, "train")),
        "validation_file": write(tmp_path / "validation.csv", rows(3, "validation")),
        "test_file": write(tmp_path / "test.csv", rows(3, "test")),
    }


def rewrite(three, split, content, **columns):
    write(Path(three[f"{split}_file"]), content, **columns)


def fault(kind, **options):
    with pytest.raises(kind) as caught:
        load_data(DataRequest(**options))
    return str(caught.value)


def test_three_files(three):
    data = load_data(DataRequest(**three))
    assert data.schema.names == ("a", "b")
    assert data.train.column_names == ["text", "label", "row"]
    assert data.train[0] == {"text": "train text a 0", "label": 0, "row": 1}
    assert data.train[19] == {"text": "train text b 9", "label": 1, "row": 20}
    assert data.sources == {"train": "train.csv", "validation": "validation.csv", "test": "test.csv"}
    assert data.leaks["train_test"] == {"exact": 0, "near": 0, "near_threshold": 0.9, "share": 0.0, "rows": []}
    assert set(data.leaks) == {"train_validation", "train_test", "validation_test"}
    assert data.removed == {}
    assert data.warnings == ()


def test_nothing_is_written_to_disk(three, tmp_path, monkeypatch):
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setenv("HOME", str(tmp_path))
    data = load_data(DataRequest(**three))
    assert data.train.cache_files == []
    assert sorted(tmp_path.rglob("*")) == before


def test_facts_have_numbers_but_no_folder(three, tmp_path):
    facts = load_data(DataRequest(**three)).facts()
    assert facts["rows"] == {"train": 20, "validation": 6, "test": 6}
    assert facts["classes"] == 2
    assert facts["class_rows"]["test"] == {"a": 3, "b": 3}
    assert facts["leaks"]["train_test"] == {"exact": 0, "near": 0, "near_threshold": 0.9, "share": 0.0}
    assert str(tmp_path) not in str(facts)


def test_labels_are_in_natural_order_of_the_training_rows(tmp_path, three):
    train = write(tmp_path / "train.csv", [(f"t{label}{i}", label) for i in range(3) for label in ("10", "2", "1")])
    other = write(tmp_path / "other.csv", [("x", "2"), ("y", "10")])
    data = load_data(DataRequest(train_file=train, validation_file=other, test_file=other))
    assert data.schema.names == ("1", "2", "10")
    assert data.validation["label"][:] == [1, 2]
    assert data.warnings == (
        "validation has no row of 1 classes: 1",
        "test has no row of 1 classes: 1",
    )


def test_number_names_are_logged(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        load_data(DataRequest(train_file=write(tmp_path / "train.csv", rows(5, labels="01"))))
    assert "train.csv: the label names are numbers: 0, 1" in caplog.text


def test_labels_unknown_to_training_are_listed_with_file_and_row(three):
    rewrite(three, "validation", [("x", "a"), ("y", "bb"), ("z", "bb")])
    rewrite(three, "test", [("x", "c"), ("y", "b")])
    text = fault(LabelError, **three)
    assert f"{three['validation_file']}, row 2 (line 3), row 3 (line 4): 'bb'" in text
    assert f"{three['test_file']}, row 1 (line 2): 'c'" in text
    assert "Available: a, b" in text


def test_one_class_only(tmp_path):
    text = fault(DataError, train_file=write(tmp_path / "train.csv", rows(5, labels="a")))
    assert "train.csv: all 5 rows have one label, 'a'" in text


def test_single_row_of_a_class_is_a_warning_when_nothing_is_carved(three):
    rewrite(three, "train", [*rows(3, "train"), ("alone", "c")])
    assert load_data(DataRequest(**three)).warnings[0] == (
        "train.csv: classes with too few rows: 'c' has 1, row 7 (line 8)"
    )


def test_class_with_too_few_rows_to_carve_is_an_error(tmp_path, three):
    train = write(tmp_path / "train.csv", [*rows(9), ("one", "c"), ("two", "c")])
    text = fault(DataError, train_file=train)
    assert "train.csv: classes with too few rows: 'c' has 2, row 19 (line 20), row 20 (line 21)" in text
    assert "validation and test must be carved out of the training rows: each class needs 3 rows" in text
    data = load_data(DataRequest(train_file=train, validation_file=three["validation_file"]))
    assert Counter(data.test["label"][:])[2] == 1


def test_class_with_one_repeated_text_cannot_be_carved(tmp_path):
    train = write(tmp_path / "train.csv", [*rows(9), *[("same", "c")] * 4])
    text = fault(DataError, train_file=train)
    assert "train.csv: no test split can be carved out. Class 'c' cannot be split" in text


def test_labels_that_differ_by_case_are_pointed_out(three):
    rewrite(three, "train", rows(3, "train", labels=["a", "b", "B"]))
    assert (
        "train.csv: labels that differ by case only are kept apart: B, b" in load_data(DataRequest(**three)).warnings
    )


def test_number_like_names_of_other_splits_are_those_of_the_training_rows(three):
    rewrite(three, "train", rows(6, "train", labels=["1.5", "high"]))
    for split in ("validation", "test"):
        rewrite(three, split, rows(3, split, labels=["1.5"]))
    data = load_data(DataRequest(**three))
    assert data.schema.names == ("1.5", "high")
    assert set(data.test["label"][:]) == {0}


def test_labels_that_differ_by_their_form_of_unicode(three):
    whole, parted = "caf\u00e9", "cafe\u0301"
    rewrite(three, "train", rows(3, "train", labels=["a", whole]))
    for split in ("validation", "test"):
        rewrite(three, split, rows(3, split, labels=["a", parted]))
    text = fault(LabelError, **three)
    assert f"Likely reason: '{parted}' and '{whole}' look alike and are written with other characters" in text
    assert r"'cafe\u0301' and 'caf\xe9'; bring both to one form of Unicode, such as NFC" in text
    for split in ("train", "validation", "test"):
        rewrite(three, split, rows(3, split, labels=["a", whole, parted]))
    data = load_data(DataRequest(**three))
    told = r"labels that differ by their form of Unicode only are kept apart: 'cafe\u0301', 'caf\xe9'"
    assert f"train.csv: {told}" in data.warnings
    assert len(data.schema) == 3


def test_missing_splits_are_carved(tmp_path):
    train = write(tmp_path / "train.csv", [*rows(50), *[("Said  twice", "a"), ("said twice", "a")] * 5])
    data = load_data(DataRequest(train_file=train, validation_share=0.2, test_share=0.1))
    assert data.sources == {
        "train": "train.csv",
        "validation": "carved from train.csv",
        "test": "carved from train.csv",
    }
    counts = {name: Counter(getattr(data, name)["label"][:]) for name in ("train", "validation", "test")}
    assert counts["test"] == {0: 6, 1: 5}
    assert counts["validation"] == {0: 12, 1: 10}
    numbers = [row for name in counts for row in getattr(data, name)["row"]]
    assert sorted(numbers) == list(range(1, 111))
    assert data.train[0]["text"] == rows(50)[data.train[0]["row"] - 1][0]
    assert all(found["exact"] == 0 for found in data.leaks.values())


def test_carving_follows_the_seed(tmp_path):
    train = write(tmp_path / "train.csv", rows(50))
    first, again, other = (load_data(DataRequest(train_file=train, seed=seed)) for seed in (1, 1, 2))
    assert first.test["row"][:] == again.test["row"][:]
    assert first.fingerprint == again.fingerprint
    assert first.test["row"][:] != other.test["row"][:]


def test_sample_is_stratified(three):
    data = load_data(DataRequest(**three, max_train_samples=6))
    assert Counter(data.train["label"][:]) == {0: 3, 1: 3}
    assert data.removed == {"train_sample": 14}
    assert (len(data.validation), len(data.test)) == (6, 6)
    assert "1 training rows were asked for, but there are 2 classes" in fault(DataError, **three, max_train_samples=1)


@pytest.fixture
def leaky(three, tmp_path):
    rewrite(three, "train", [*rows(5, "train"), ("Leaked  EXACTLY here", "a"), (LONG, "b"), ("also validated", "a")])
    rewrite(three, "test", [("fresh", "b"), ("leaked exactly here", "b"), (LONG_NEAR, "a")])
    rewrite(three, "validation", [("also Validated", "a"), ("leaked exactly here", "b")])
    (tmp_path / "free.txt").write_text(f"free\n{LONG_FREE}\nFRESH\nalso validated\n{LONG}\n", encoding="utf-8")
    return {**three, "unlabelled_file": str(tmp_path / "free.txt")}


def test_leaks_are_counted(leaky):
    data = load_data(DataRequest(**leaky))
    assert data.leaks["train_test"] == {"exact": 1, "near": 1, "near_threshold": 0.9, "share": 2 / 3, "rows": [1, 2]}
    assert data.leaks["train_validation"]["rows"] == [0, 1]
    assert data.leaks["validation_test"]["rows"] == [1]
    assert data.leaks["unlabelled_test"] == {"exact": 0, "near": 1, "near_threshold": 0.9, "share": 1 / 3, "rows": [2]}
    assert data.leaks["unlabelled_validation"]["rows"] == []
    assert len(data.train) == 13


def test_unlabelled_texts_of_labelled_rows_always_go(leaky):
    data = load_data(DataRequest(**leaky))
    assert data.unlabelled["text"][:] == ["free", LONG_FREE]
    assert data.unlabelled["row"][:] == [1, 2]
    assert data.removed == {"unlabelled_exact": 3}
    assert data.facts()["rows"]["unlabelled"] == 2


def test_unlabelled_texts_may_be_training_rows_that_were_not_drawn(leaky, tmp_path):
    """Few labels: all texts of the training file may serve without theirs, each of them once."""
    texts = [*(text for text, _ in rows(5, "train")), "free"]
    (tmp_path / "free.txt").write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    data = load_data(DataRequest(**leaky, max_train_samples=4))
    both = [*data.train["text"][:], *data.unlabelled["text"][:]]
    assert len(both) == len(set(both))
    assert set(texts) <= set(both)
    assert len(data.unlabelled) > 1


def test_dropping_leaks_leaves_evaluation_rows_alone(leaky):
    data = load_data(DataRequest(**leaky, drop_leaks=True))
    assert data.train["row"][:] == list(range(1, 11))
    assert data.unlabelled["text"][:] == ["free"]
    assert (len(data.validation), len(data.test)) == (2, 3)
    assert data.removed == {"unlabelled_exact": 2, "train_leaks": 3, "unlabelled_leaks": 2}
    assert {pair: found["rows"] for pair, found in data.leaks.items() if found["rows"]} == {"validation_test": [1]}


def test_dropping_leaks_draws_the_sample_from_what_is_left(leaky):
    data = load_data(DataRequest(**leaky, drop_leaks=True, max_train_samples=10))
    assert data.train["row"][:] == list(range(1, 11))


def test_losing_a_class_or_everything_to_leaks_is_an_error(leaky, three, tmp_path):
    rewrite(three, "train", [*rows(5, "train"), ("fresh", "c"), ("leaked exactly here", "c")])
    assert "train.csv: every training row of 'c' also stands" in fault(DataError, **three, drop_leaks=True)
    (tmp_path / "free.txt").write_text("FRESH\n", encoding="utf-8")
    assert "free.txt: all 1 rows also stand in train, validation or test" in fault(DataError, **leaky)


def test_contradictions_are_counted_once_per_text(three):
    rewrite(
        three,
        "train",
        [*rows(3, "train"), ("same", "a"), ("Same", "b"), ("same ", "b"), ("twice", "a"), ("twice", "a")],
    )
    data = load_data(DataRequest(**three))
    assert data.contradictions == 1
    assert data.facts()["contradictions"] == 1


def test_pairs(tmp_path):
    columns = ("premise", "hypothesis", "relation")
    train = write(tmp_path / "train.csv", [(f"p{i}", f"h{i}", "ab"[i % 2]) for i in range(20)], columns)
    test = write(tmp_path / "test.csv", [("p0", "h1", "a"), ("P1", "h1", "b")], columns)
    free = write(tmp_path / "free.csv", [("p1", "h1"), ("p1", "h2")], columns[:2])
    named = {"text_column": "premise", "text_pair_column": "hypothesis", "label_column": "relation"}
    data = load_data(DataRequest(train_file=train, test_file=test, unlabelled_file=free, **named))
    assert data.train.column_names == ["text", "text_pair", "label", "row"]
    assert data.test[1] == {"text": "P1", "text_pair": "h1", "label": 1, "row": 2}
    assert data.leaks["train_test"]["exact"] == (2 in data.train["row"][:])
    assert data.unlabelled[0] == {"text": "p1", "text_pair": "h2", "row": 2}
    assert data.removed["unlabelled_exact"] == 1


def test_fingerprint_changes_with_any_content(three, tmp_path):
    base = [*rows(5, "train")]
    changed = {
        "text": [("train text a zero", "a"), *base[1:]],
        "label": [(base[0][0], "b"), *base[1:]],
        "order": [base[1], base[0], *base[2:]],
        "schema": [(text, {"a": "x", "b": "y"}[label]) for text, label in base],
        "join": [("train text a 0train text b 0", "a"), *base[2:]],
    }
    evaluated = {"validation": rows(2, "v"), "test": rows(2, "t")}
    prints = set()
    for name, content in {"base": base, **changed}.items():
        names = {"a": "x", "b": "y"} if name == "schema" else {"a": "a", "b": "b"}
        rewrite(three, "train", content)
        for split, held in evaluated.items():
            rewrite(three, split, [(text, names[label]) for text, label in held])
        prints.add(load_data(DataRequest(**three)).fingerprint)
    assert len(prints) == 1 + len(changed)
    (tmp_path / "free.txt").write_text("free\n", encoding="utf-8")
    assert load_data(DataRequest(**three, unlabelled_file=str(tmp_path / "free.txt"))).fingerprint not in prints


def test_fingerprint_is_the_same_in_other_processes_and_formats(three, tmp_path):
    here = load_data(DataRequest(**three)).fingerprint
    code = (
        "import sys; from nlpxfer.data import *;"
        "sys.stdout.write(load_data(DataRequest(train_file=sys.argv[1], validation_file=sys.argv[2],"
        "test_file=sys.argv[3])).fingerprint)"
    )
    command = [sys.executable, "-c", code, *three.values()]
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(ROOT)}
    there = subprocess.run(command, env=environment, capture_output=True, check=True)
    assert there.stdout.decode() == here
    with open(three["train_file"], encoding="utf-8", newline="") as file:
        content = list(csv.DictReader(file))
    (tmp_path / "train.json").write_text(json.dumps(content), encoding="utf-8")
    assert load_data(DataRequest(**{**three, "train_file": str(tmp_path / "train.json")})).fingerprint == here


def test_every_impossible_option_is_told_at_once():
    text = fault(
        ConfigError,
        dataset_name="x",
        train_file="y.csv",
        validation_share=0.6,
        test_share=0.5,
        max_train_samples=0,
        label_column="text",
    )
    assert "dataset_name and train_file exclude each other" in text
    assert "validation_share and test_share together must be less than 1" in text
    assert "max_train_samples must be at least 1, not 0" in text
    assert "text, text pair and label need a column each, not 'text', 'text'" in text
    text = fault(ConfigError, dataset_config_name="x", unlabelled_file="auto", test_share=0.0)
    assert "no training data" in text
    assert "dataset_config_name needs dataset_name" in text
    assert "'auto' needs a dataset_name" in text
    assert "test_share must lie between 0 and 1, not 0.0" in text


def test_keys_of_find_leaks_are_those_of_the_rows():
    assert find_leaks([normalise_text("A  b")], [normalise_text("a b")]).exact == (0,)
