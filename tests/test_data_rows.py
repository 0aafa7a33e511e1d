from __future__ import annotations

import pytest

from nlpxfer.data import normalise_text
from nlpxfer.data.files import Table
from nlpxfer.data.rows import check_rows
from nlpxfer.errors import DataError
from nlpxfer.problem import MULTI_LABEL


def table(labels=None, texts=None, pairs=None, class_names=None):
    count = len(labels or texts or pairs)
    columns = {"text": texts or [f"text {i}" for i in range(count)], "label": labels or ["a"] * count}
    if pairs:
        columns["pair"] = pairs
    return Table(
        source="folder/rows.jsonl",
        name="rows.jsonl",
        columns=columns,
        lines=range(1, count + 1),
        class_names={"label": class_names} if class_names else {},
    )


def names(*labels, class_names=None):
    return check_rows(table(list(labels), class_names=class_names), text="text", pair=None, label="label").labels


def fault(rows, pair=None):
    with pytest.raises(DataError) as caught:
        check_rows(rows, text="text", pair=pair, label="label")
    assert "folder/rows.jsonl" in str(caught.value)
    return str(caught.value)


def test_normalised_texts():
    assert normalise_text(" Lost\tmy\u00a0\nCARD ") == "lost my card"
    assert normalise_text("cafe\u0301") == normalise_text("CAF\u00c9")
    assert normalise_text("a b", "c") != normalise_text("a", "b c")
    assert normalise_text("a\x1fb") == "a b"


def test_labels_are_named_by_their_value():
    assert names("a", " b ", 3, True, 2.0, "1.0") == ["a", "b", "3", "True", "2", "1.0"]
    assert names("None", "N/A") == ["None", "N/A"]


def test_class_numbers_get_their_names():
    assert names(1, 0, class_names=("ham", "spam")) == ["spam", "ham"]
    text = fault(table([0, 2, -1], class_names=("ham", "spam")))
    assert "row 2 (line 2): 'label' is 2, but there are only 2 classes" in text
    assert "row 3 (line 3): 'label' is -1, the mark for 'no label'" in text


def test_missing_labels_name_their_rows():
    text = fault(table(["a", None, " ", "b", float("nan")]))
    assert "row 2 (line 2), row 5 (line 5): 'label' is missing (2 rows)" in text
    assert "row 3 (line 3): 'label' is blank" in text
    assert "row 1 (line 1): 'label' is of type dict" in fault(table([{"a": 1}, "b"]))


def test_other_tasks_are_refused_by_name():
    assert "row 2 (line 2): 'label' holds a list of labels" in fault(table(["a", ["b"]]))
    assert "row 2 (line 2): 'label' is the number 0.5, not a class" in fault(table([1.0, 0.5]))
    assert "row 1 (line 1): 'label' is the number inf, not a class" in fault(table([float("inf"), 1.0]))
    assert "row 2 (line 2): 'label' is the number 0.73, not a class" in fault(table(["1", "0.73"]))


def test_number_like_names_among_words_are_names():
    assert names("1.5", "high") == ["1.5", "high"]
    assert names("nan", "inf") == ["nan", "inf"]


def test_number_like_names_that_are_known_are_names():
    rows = table(["1.5", " 0.25 ", "1.5"])
    found = check_rows(rows, text="text", pair=None, label="label", known={"1.5", "0.25", "high"})
    assert found.labels == ["1.5", "0.25", "1.5"]
    with pytest.raises(DataError, match=r"'label' is the number 1\.5, not a class"):
        check_rows(table([1.5, 2.0]), text="text", pair=None, label="label", known={"1.5", "2"})
    assert "holds a label that is the number 1.5, not a class" in several_fault([[2.0], [1.5]])


def several_fault(labels):
    with pytest.raises(DataError) as caught:
        check_rows(table(labels), text="text", pair=None, label="label", problem_type=MULTI_LABEL)
    return str(caught.value)


def test_faulty_texts_are_listed_five_at_a_time():
    text = fault(table(texts=["x", "", " \n", None, "\u00a0", *[""] * 4, "y", 7, "a\0b", "\ud800"]))
    assert "row 2 (line 2), row 3 (line 3), row 5 (line 5), row 6 (line 6), row 7 (line 7) and 2 more: " in text
    assert "'text' is empty or holds white space only (7 rows)" in text
    assert "row 4 (line 4): 'text' is missing" in text
    assert "row 11 (line 11): 'text' is of type int" in text
    assert "row 12 (line 12): 'text' holds a NUL character" in text
    assert "row 13 (line 13): 'text' holds half of a character" in text


def test_pairs_are_checked_too():
    assert "row 2 (line 2): 'pair' is empty" in fault(table(pairs=["x", ""]), pair="pair")


def test_taken_rows_keep_their_numbers():
    rows = check_rows(table(["a", "b", "c"]), text="text", pair=None, label="label").take([2, 0])
    assert (rows.texts, rows.labels, rows.numbers) == (["text 2", "text 0"], ["c", "a"], [3, 1])
    assert rows.place(0) == "row 3 (line 3)"
