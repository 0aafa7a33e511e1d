from __future__ import annotations

import json
import os

import numpy as np
import pytest

from nlpxfer.data import LabelSchema
from nlpxfer.data.schema import natural_order
from nlpxfer.errors import DataNotFoundError, LabelError


def test_names_and_indices_match_both_ways():
    schema = LabelSchema(("b", "a", "c"))
    assert len(schema) == 3
    assert "a" in schema
    assert "d" not in schema
    assert schema.id2label == {0: "b", 1: "a", 2: "c"}
    assert schema.label2id == {"b": 0, "a": 1, "c": 2}
    assert [schema.encode(name) for name in ("a", "b", "c")] == [1, 0, 2]


def test_changing_a_returned_dict_leaves_the_schema_alone():
    schema = LabelSchema(("a", "b"))
    schema.label2id["a"] = 7
    assert schema.encode("a") == 0


def test_encode_names_the_nearest_and_all_labels():
    with pytest.raises(LabelError, match=r"'positiv'.*\n  Available: negative, positive\n  Try: 'positive'"):
        LabelSchema(("negative", "positive")).encode("positiv")


def test_names_that_look_alike_are_told_apart():
    with pytest.raises(LabelError, match=r"(?s)Likely reason: .*'cafe\\u0301' and 'caf\\xe9'; bring both to one form"):
        LabelSchema(("a", "caf\u00e9")).encode("cafe\u0301")
    with pytest.raises(LabelError, match=r"(?s)Likely reason: .*'caf\\xe9' and 'cafe\\u0301'; bring both to one form"):
        LabelSchema(("a", "caf\u00e9")).reorder(LabelSchema(("a", "cafe\u0301")))


@pytest.mark.parametrize("names", [(), ("a", "a"), ("a", " "), ("a", 1)])
def test_impossible_names_are_refused(names):
    with pytest.raises(LabelError):
        LabelSchema(names)


def test_reorder_brings_columns_into_our_order_by_name():
    ours, theirs = LabelSchema(("x", "y", "z")), LabelSchema(("z", "x", "y"))
    logits_BC = np.array([[30, 10, 20]])  # z, x, y
    assert logits_BC[:, ours.reorder(theirs)].tolist() == [[10, 20, 30]]
    assert ours.reorder(ours) == [0, 1, 2]


def test_reorder_lists_both_sides():
    with pytest.raises(LabelError) as caught:
        LabelSchema(("spam", "ham")).reorder(LabelSchema(("spam", "eggs")))
    text = str(caught.value)
    assert "only here: ham" in text
    assert "only there: eggs" in text
    assert "here: spam, ham" in text
    assert "there: spam, eggs" in text


def test_saved_schema_loads_equal_and_leaves_no_other_file(tmp_path):
    schema = LabelSchema(("ä", "None", "10", "2"))
    schema.save(tmp_path)
    schema.save(tmp_path)
    assert os.listdir(tmp_path) == ["labels.json"]
    assert LabelSchema.load(tmp_path) == schema
    assert json.loads((tmp_path / "labels.json").read_text(encoding="utf-8"))["names"] == ["ä", "None", "10", "2"]


def test_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    LabelSchema(("a", "b")).save(tmp_path)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        LabelSchema(("c", "d")).save(tmp_path)
    assert os.listdir(tmp_path) == ["labels.json"]
    assert LabelSchema.load(tmp_path).names == ("a", "b")


def test_missing_and_damaged_files_are_named(tmp_path):
    with pytest.raises(DataNotFoundError, match=r"labels\.json does not exist"):
        LabelSchema.load(tmp_path)
    for content in ("{", '{"name": []}', '{"names": "ab"}', "[]"):
        (tmp_path / "labels.json").write_text(content, encoding="utf-8")
        with pytest.raises(LabelError, match=r"labels\.json is damaged"):
            LabelSchema.load(tmp_path)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["10", "2", "1"], ["1", "2", "10"]),
        (["5", "-2", "0"], ["-2", "0", "5"]),
        (["b", "B", "a"], ["B", "a", "b"]),
        (["class 10", "class 9", "class"], ["class", "class 9", "class 10"]),
        (["01", "1"], ["01", "1"]),
    ],
)
def test_natural_order(names, expected):
    assert list(natural_order(names)) == expected
    assert list(natural_order(reversed(names))) == expected
