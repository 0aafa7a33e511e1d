from __future__ import annotations

import json
import logging

import datasets
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from nlpxfer.data import DataRequest, load_data, sources
from nlpxfer.errors import ConfigError, DataError, DataNotFoundError

NAMES = ["world", "art", "unused"]  # in an order that sorting would change


def lines(count, start=0):
    rows = [
        {"text": f"{name} text {i}", "label": name, "tags": ["x"]}
        for i in range(start, start + count)
        for name in "ab"
    ]
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def folder(tmp_path):
    """A folder data set like the bundled ones."""
    path = tmp_path / "small-set"
    path.mkdir()
    for split, start in (("train", 0), ("validation", 100), ("test", 200)):
        (path / f"{split}.jsonl").write_text(lines(3, start), encoding="utf-8")
    (path / "unlabelled.txt").write_text("free text\nother free text\na text 100\n", encoding="utf-8")
    return path


@pytest.fixture
def hub(monkeypatch):
    """Stands in for the Hub: answers with what a test puts in, and records what it was asked for."""
    state = {"asked": None, "answer": None}

    def load_dataset(*asked):
        state["asked"] = asked
        if isinstance(state["answer"], Exception):
            raise state["answer"]
        return state["answer"]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return state


def hub_split(labels, names=NAMES, prefix=""):
    kinds = Features({"text": Value("string"), "label": ClassLabel(names=names), "extra": Value("int64")})
    rows = {"text": [f"{prefix} {i}" for i in range(len(labels))], "label": labels, "extra": [0] * len(labels)}
    return Dataset.from_dict(rows, features=kinds)


def test_local_folder(folder):
    data = load_data(DataRequest(dataset_name=str(folder)))
    assert data.sources == {"train": "train.jsonl", "validation": "validation.jsonl", "test": "test.jsonl"}
    assert (len(data.train), len(data.validation), len(data.test)) == (6, 6, 6)
    assert data.unlabelled is None


def test_unlabelled_file_auto_takes_that_of_the_folder(folder):
    data = load_data(DataRequest(dataset_name=str(folder), unlabelled_file="auto"))
    assert data.unlabelled["text"][:] == ["free text", "other free text"]
    assert data.unlabelled["row"][:] == [1, 2]
    assert data.sources["unlabelled"] == "unlabelled.txt"
    assert data.removed == {"unlabelled_exact": 1}
    (folder / "unlabelled.txt").unlink()
    with pytest.raises(DataNotFoundError, match=r"unlabelled\.txt does not exist"):
        load_data(DataRequest(dataset_name=str(folder), unlabelled_file="auto"))


def test_bundled_set_by_name(folder, monkeypatch, caplog):
    monkeypatch.setattr(sources, "bundled_folder", lambda: folder.parent)
    with caplog.at_level(logging.INFO):
        data = load_data(DataRequest(dataset_name="small-set", unlabelled_file="auto"))
    assert data.schema.names == ("a", "b")
    assert "dataset small-set: bundled with nlpxfer" in caplog.text


def test_bundled_folder_is_that_of_the_wheel_or_of_the_checkout(tmp_path, monkeypatch):
    package = tmp_path / "site" / "nlpxfer"
    (package / "data").mkdir(parents=True)
    monkeypatch.setattr(sources, "__file__", str(package / "data" / "sources.py"))
    (tmp_path / "site" / "data").mkdir()
    assert sources.bundled_folder() is None  # somebody else's folder beside an installed package
    (tmp_path / "site" / "pyproject.toml").touch()
    assert sources.bundled_folder() == tmp_path / "site" / "data"
    (package / "_data").mkdir()
    assert sources.bundled_folder() == package / "_data"


def test_dev_is_validation(folder):
    (folder / "validation.jsonl").rename(folder / "dev.jsonl")
    assert load_data(DataRequest(dataset_name=str(folder))).sources["validation"] == "dev.jsonl"


def test_two_files_for_one_split(folder):
    (folder / "val.csv").write_text("text,label\nx,a\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"more than one validation file: val\.csv and validation\.jsonl"):
        load_data(DataRequest(dataset_name=str(folder)))


def test_folder_without_train_file(tmp_path):
    (tmp_path / "part-0.csv").touch()
    with pytest.raises(DataNotFoundError, match=r"has no train file\.\n  Available: part-0\.csv"):
        load_data(DataRequest(dataset_name=str(tmp_path)))


def test_missing_folder_names_the_nearest(folder):
    with pytest.raises(DataNotFoundError, match=r"smal-set does not exist\.\n  Try: .*small-set"):
        load_data(DataRequest(dataset_name=str(folder.parent / "smal-set")))


def test_file_as_dataset_name(folder):
    with pytest.raises(DataError, match="is a file, not a dataset"):
        load_data(DataRequest(dataset_name=str(folder / "train.jsonl")))


def test_options_of_the_hub_are_refused_for_folders(folder, hub):
    with pytest.raises(ConfigError, match="dataset_config_name is for the Hub"):
        load_data(DataRequest(dataset_name=str(folder), dataset_config_name="x"))
    with pytest.raises(ConfigError, match="'auto' needs a folder"):
        load_data(DataRequest(dataset_name="org/set", unlabelled_file="auto"))
    assert hub["asked"] is None


def test_hub_dataset_keeps_the_order_of_its_class_names(hub):
    hub["answer"] = DatasetDict(
        train=hub_split([0, 1, 0, 1], prefix="t"),
        dev=hub_split([1, 0], prefix="d"),
        test=hub_split([1, 0], prefix="e"),
        unsupervised=hub_split([-1]),
    )
    data = load_data(DataRequest(dataset_name="org/set", dataset_config_name="small"))
    assert hub["asked"] == ("org/set", "small")
    assert data.schema.names == ("world", "art")
    assert data.train["label"][:] == [0, 1, 0, 1]
    assert data.validation["label"][:] == [1, 0]
    assert data.sources == {"train": "org/set [train]", "validation": "org/set [dev]", "test": "org/set [test]"}
    assert any("left out: unused" in line for line in data.warnings)


def test_hub_test_split_with_hidden_labels_is_replaced(hub, caplog):
    hub["answer"] = DatasetDict(train=hub_split([0, 1] * 10, prefix="t"), test=hub_split([-1, -1], prefix="e"))
    data = load_data(DataRequest(dataset_name="org/set"))
    assert data.sources["test"] == "carved from org/set [train]"
    assert "org/set [test] is left out: all of its labels are hidden" in caplog.text


def test_hub_faults_name_split_and_row(hub):
    hub["answer"] = DatasetDict(train=hub_split([0, 1, -1]))
    with pytest.raises(DataError, match=r"org/set \[train\], row 3: 'label' is -1"):
        load_data(DataRequest(dataset_name="org/set"))
    with pytest.raises(DataError, match=r"org/set \[train\] has no column 'txt'(.|\n)*'text' in place of 'txt'"):
        load_data(DataRequest(dataset_name="org/set", text_column="txt"))
    hub["answer"] = DatasetDict(training=hub_split([0, 1]))
    with pytest.raises(DataError, match=r"no split 'train'\.\n  Available: training"):
        load_data(DataRequest(dataset_name="org/set"))
    hub["answer"] = DatasetDict(train=hub_split([]))
    with pytest.raises(DataError, match=r"org/set \[train\] has no rows"):
        load_data(DataRequest(dataset_name="org/set"))


@pytest.mark.parametrize(
    ("failure", "kind", "message"),
    [
        (ConnectionError("no route"), DataNotFoundError, "the Hub cannot be reached"),
        (datasets.exceptions.DatasetNotFoundError("gone"), DataNotFoundError, "does not exist on the Hub"),
        (ValueError("Config name is missing"), DataError, "cannot be loaded: Config name is missing"),
        (RuntimeError("Dataset scripts are no longer supported"), DataError, "which is never run"),
    ],
)
def test_hub_failures(hub, folder, monkeypatch, failure, kind, message):
    monkeypatch.setattr(sources, "bundled_folder", lambda: folder.parent)
    hub["answer"] = failure
    with pytest.raises(kind, match=message) as caught:
        load_data(DataRequest(dataset_name="smallset"))
    assert "'smallset'" in str(caught.value)
    if kind is DataNotFoundError:
        assert "Try: --dataset_name small-set" in str(caught.value)


def test_names_of_file_readers_never_read_the_current_folder(hub):
    with pytest.raises(DataNotFoundError, match="'csv' is a file format"):
        load_data(DataRequest(dataset_name="csv"))
    assert hub["asked"] is None
