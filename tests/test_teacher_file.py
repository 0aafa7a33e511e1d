"""What somebody has written down about texts is read by name and by text, and refused where it is no probability."""

import csv
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from nlpxfer.data.schema import LabelSchema
from nlpxfer.data.teacher_file import FLOOR, read_teacher_file, rounding_of
from nlpxfer.errors import ConfigError, DataError, DataNotFoundError, LabelError
from nlpxfer.problem import MULTI_LABEL, REGRESSION

SCHEMA = LabelSchema(("food", "music", "sport"))
SEVERAL = LabelSchema(SCHEMA.names, MULTI_LABEL)


def write_csv(path, header, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def softmax(logits):
    shares = np.exp(logits.astype(np.float64))
    return shares / shares.sum(axis=1, keepdims=True)


def test_columns_are_matched_by_name_and_rows_by_text(tmp_path):
    rows = [["one", 0.7, 0.1, 0.2], ["two", 0.0, 1.0, 0.0], ["one", 0.7, 0.1, 0.2]]
    file = read_teacher_file(write_csv(tmp_path / "llm.csv", ["text", "sport", "food", "music"], rows), SCHEMA)
    logits = file.logits(["two", "three", "one", "two"])
    assert logits.dtype == np.float32
    assert np.isnan(logits[1]).all()
    np.testing.assert_allclose(softmax(logits[[0, 2, 3]]), [[1, 0, 0], [0.1, 0.2, 0.7], [1, 0, 0]], atol=3 * FLOOR)
    assert logits[0].tolist() == logits[3].tolist()
    np.testing.assert_allclose(logits[0][1:], np.log(FLOOR), rtol=1e-6)
    assert file.name == "llm.csv"
    assert len(file.sha256) == 64


def test_objects_of_probabilities_and_of_choices(tmp_path):
    rows = [
        {"text": "a", "probabilities": {"music": 0.25, "food": 0.5, "sport": 0.2504}},
        {"text": "b", "label": "sport"},
    ]
    file = read_teacher_file(write_jsonl(tmp_path / "llm.jsonl", rows), SCHEMA)
    np.testing.assert_allclose(softmax(file.logits(["a", "b"]))[0], np.array([0.5, 0.25, 0.2504]) / 1.0004, rtol=1e-5)
    assert file.logits(["b"])[0].argmax() == 2


def test_multi_label_probabilities_need_not_sum_to_one(tmp_path):
    rows = [{"text": "a", "probabilities": {"food": 0.9, "music": 0.9, "sport": 0.5}}, {"text": "b", "label": []}]
    file = read_teacher_file(write_jsonl(tmp_path / "llm.jsonl", rows), SEVERAL)
    logits = file.logits(["a", "b"])
    np.testing.assert_allclose(1 / (1 + np.exp(-logits[0])), [0.9, 0.9, 0.5], rtol=1e-5)
    np.testing.assert_allclose(1 / (1 + np.exp(-logits[1].astype(np.float64))), [FLOOR] * 3, rtol=1e-3)


def test_pairs_are_found_by_both_texts(tmp_path):
    rows = [["one", "x", 1, 0, 0], ["one", "y", 0, 1, 0]]
    path = write_csv(tmp_path / "llm.csv", ["text", "second", *SCHEMA.names], rows)
    file = read_teacher_file(path, SCHEMA, pair="second")
    found = file.logits(["one", "one", "one"], ["y", "x", "z"])
    assert found[:2].argmax(axis=1).tolist() == [1, 0]
    assert np.isnan(found[2]).all()


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (["b", 0.7, -0.1, 0.4], r"row 2 \(line 3\): -0.1 for 'music' is negative"),
        (["b", 0.7, 0.1, 0.1], r"row 2 \(line 3\): the probabilities sum to 0.9, not to 1"),
        (["b", 1.5, 0, 0], "1.5 for 'food' is above 1"),
        (["b", "nan", 0.5, 0.5], "nan for 'food' is not finite"),
        (["b", "much", 0.5, 0.5], "'much' for 'food' is no number"),
        (["b", "", 0.5, 0.5], "'' for 'food' is no number"),
        (["b", 0.97, 0.01, 0.001], r"the probabilities sum to 0.981, not to 1 \(0.0015 off could be rounding\)"),
        (["b", 97, 2, 1], "97 for 'food' is above 1"),
        (["a", 0.5, 0.5, 0], r"row 2 \(line 3\): says something else than row 1 \(line 2\) about the same text"),
    ],
)
def test_what_is_no_probability_is_refused_by_row(row, told, tmp_path):
    path = write_csv(tmp_path / "llm.csv", ["text", *SCHEMA.names], [["a", 1, 0, 0], row])
    with pytest.raises(DataError, match=told) as caught:
        read_teacher_file(path, SCHEMA)
    assert str(path) in str(caught.value)


def many_classes(count):
    return LabelSchema(tuple(f"c{index:02d}" for index in range(count)))


def rounded(count, digits):
    """Probabilities of many classes that lose by rounding what sums to more than a thousandth."""
    shares = np.array([0.7, *[0.3 / (count - 1)] * (count - 1)])
    found = np.round(shares, digits)
    assert abs(found.sum() - 1) > 0.002
    return found


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize(("count", "digits"), [(20, 2), (100, 3)])
def test_rounded_probabilities_are_scaled_to_one(kind, count, digits, tmp_path):
    """However a format keeps them: as text, as float64 or as float32."""
    schema, shares = many_classes(count), rounded(count, digits)
    named = dict(zip(schema.names, shares.tolist(), strict=True))
    if kind == "jsonl":
        path = write_jsonl(tmp_path / "llm.jsonl", [{"text": "a", "probabilities": named}])
    elif kind == "csv":
        path = write_csv(tmp_path / "llm.csv", ["text", *named], [["a", *(f"{p:.{digits}f}" for p in shares)]])
    else:
        columns = {name: pa.array([p], pa.float32()) for name, p in named.items()}
        path = tmp_path / "llm.parquet"
        pq.write_table(pa.table({"text": ["a"], **columns}), path)
    logits = read_teacher_file(path, schema).logits(["a"])
    np.testing.assert_allclose(softmax(logits)[0], shares / shares.sum(), atol=count * FLOOR)


@pytest.mark.parametrize(
    ("row", "tolerance"),
    [
        (["0.50", "0.25", "0.24"], 0.015),
        (["0.5", "0.2", "0.2"], 0.015),  # a digit is none of rounding: a file may have dropped a 0
        (["0.501", "0.25", "0.24"], 0.0015),
        ([0.501, 0.25, 0.24], 0.0015),
        ([0.5, 0.25, 1e-05], 0.001),
        ([0.5, 0.25, 0.2400001], 0.001),
        ([1, 0, 0], 0.015),
        (["0.01"] * 30, 0.15),
        (["0.01"] * 90, 0.25),
        ([float(np.float32(0.33))] * 3, 0.015),
    ],
)
def test_what_rounding_explains(row, tolerance):
    assert rounding_of(row) == pytest.approx(tolerance)


def test_scores_that_are_no_probabilities_are_refused(tmp_path):
    """Of many classes too, where half a hundredth of each is much."""
    schema = many_classes(90)
    path = write_csv(tmp_path / "llm.csv", ["text", *schema.names], [["a", *["0.02"] * 90]])
    with pytest.raises(DataError, match=r"sum to 1.8, not to 1 \(0.25 off could be rounding\)"):
        read_teacher_file(path, schema)
    scores = [f"{share:.6f}" for share in np.linspace(0.001, 0.0205, 90)]
    path = write_csv(tmp_path / "scores.csv", ["text", *schema.names], [["a", *scores]])
    with pytest.raises(DataError, match=r"sum to 0.9675, not to 1 \(0.001 off"):
        read_teacher_file(path, schema)


def test_all_faults_are_told_together(tmp_path):
    path = write_csv(tmp_path / "llm.csv", ["text", *SCHEMA.names], [["a", 1, 1, 0], ["b", 0, 0, 0], ["c", 1, 0, 0]])
    with pytest.raises(DataError, match=r"(?s)has 2 faults.*row 1.*sum to 2.*row 2.*sum to 0"):
        read_teacher_file(path, SCHEMA)


def test_columns_that_are_not_the_labels_are_refused(tmp_path):
    path = write_csv(tmp_path / "llm.csv", ["text", "food", "musik", "sport"], [["a", 1, 0, 0]])
    with pytest.raises(LabelError) as caught:
        read_teacher_file(path, SCHEMA)
    assert "not a label: 'musik' (did you mean 'music'?)" in str(caught.value)
    assert "no column for: music" in str(caught.value)


def test_the_columns_of_texts_are_named_as_in_the_data(tmp_path):
    rows = [["one", "x", 1, 0, 0]]
    own = write_csv(tmp_path / "own.csv", ["utterance", "reply", *SCHEMA.names], rows)
    file = read_teacher_file(own, SCHEMA, text="utterance", pair="reply")
    assert file.logits(["one"], ["x"]).argmax(axis=1).tolist() == [0]
    other = write_csv(tmp_path / "other.csv", ["text", "reply", *SCHEMA.names], rows)
    with pytest.raises(DataError) as caught:
        read_teacher_file(other, SCHEMA, text="utterance", pair="reply")
    message = str(caught.value)
    assert "has no column 'utterance'" in message
    assert "name the columns of texts as in the data: 'utterance' and 'reply'" in message
    assert "--text_column and" not in message
    with pytest.raises(DataError, match="name the column of texts as in the data: 'body'"):
        read_teacher_file(other, SCHEMA, text="body")


def test_a_choice_under_another_name_is_told_the_name(tmp_path):
    path = write_jsonl(tmp_path / "llm.jsonl", [{"text": "a", "label": "food"}])
    with pytest.raises(LabelError) as caught:
        read_teacher_file(path, SCHEMA, label="intent")
    assert "not a label: 'label'" in str(caught.value)
    assert "or, of each row, 'probabilities' or 'intent'" in str(caught.value)


def test_choices_are_read_as_the_labels_of_the_data(tmp_path):
    numbers = LabelSchema(("1", "2", "1.0"))
    rows = [{"text": text, "label": label} for text, label in (("a", 2.0), ("b", 1), ("c", " 1.0 "))]
    file = read_teacher_file(write_jsonl(tmp_path / "llm.jsonl", rows), numbers)
    assert file.logits(["a", "b", "c"]).argmax(axis=1).tolist() == [1, 0, 2]
    several = LabelSchema(numbers.names, MULTI_LABEL)
    rows = [{"text": "a", "label": [2.0, " 1.0"]}]
    file = read_teacher_file(write_jsonl(tmp_path / "lists.jsonl", rows), several)
    assert (file.logits(["a"]) > 0).tolist() == [[False, True, True]]
    path = write_csv(tmp_path / "texts.csv", ["text", "label"], [["a", "2 | 1.0"], ["b", ""]])
    file = read_teacher_file(path, several, separator="|")
    assert (file.logits(["a", "b"]) > 0).tolist() == [[False, True, True], [False] * 3]
    features = Features({"text": Value("string"), "label": ClassLabel(names=["sport", "food", "music"])})
    rows = [{"text": "a", "label": "sport"}, {"text": "b", "label": "music"}]
    Dataset.from_list(rows, features=features).to_parquet(str(tmp_path / "llm.parquet"))
    file = read_teacher_file(tmp_path / "llm.parquet", SCHEMA)
    assert file.logits(["a", "b"]).argmax(axis=1).tolist() == [2, 1]


def test_a_choice_that_looks_like_a_label(tmp_path):
    path = write_jsonl(tmp_path / "llm.jsonl", [{"text": "a", "label": "cafe\u0301"}])
    with pytest.raises(DataError, match=r"look alike .*'cafe\\u0301' and 'caf\\xe9'"):
        read_teacher_file(path, LabelSchema(("caf\u00e9", "pub")))


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"text": "b", "probabilities": {"food": 1, "music": 0}}, r"row 2 \(line 2\): no probability for 'sport'"),
        ({"text": "b", "probabilities": {"food": 1, "music": 0, "sport": 0, "art": 0}}, "not a label: 'art'"),
        ({"text": "b", "probabilities": [1, 0, 0]}, "is no object of label names"),
        ({"text": "b", "probabilities": {"food": True, "music": 0, "sport": 0}}, "True for 'food' is no number"),
        ({"text": "b", "label": "art"}, "not a label: 'art'"),
        ({"text": "b", "label": ["food"]}, "'label' is a list, one label is needed"),
        ({"text": "b", "label": 1.5}, "'label' is the number 1.5, not a class"),
        ({"text": "b", "label": " "}, "'label' is blank"),
        ({"text": "b"}, "has neither of 'probabilities' and 'label'"),
        ({"text": "b", "label": "food", "probabilities": {}}, "has both of"),
        ({"text": 7, "label": "food"}, "has no text"),
    ],
)
def test_objects_that_say_nothing_are_refused_by_row(row, told, tmp_path):
    path = write_jsonl(tmp_path / "llm.jsonl", [{"text": "a", "label": "food"}, row])
    with pytest.raises(DataError, match=told):
        read_teacher_file(path, SCHEMA)


def test_missing_texts_are_listed(tmp_path):
    file = read_teacher_file(write_jsonl(tmp_path / "llm.jsonl", [{"text": "a", "label": "food"}]), SCHEMA)
    file.require_all("llm.jsonl", ["a", "a"], None, split="train")
    texts = ["a", *(f"text {i}" for i in range(9))]
    with pytest.raises(DataError) as caught:
        file.require_all("llm.jsonl", texts, None, split="train")
    message = str(caught.value)
    assert "says nothing about 9 of the 10 texts of train" in message
    assert "row 2: 'text 0'" in message
    assert "and 4 more" in message
    assert "--teacher_file_partial true" in message


def test_files_and_tasks_that_cannot_be_used(tmp_path):
    with pytest.raises(DataNotFoundError):
        read_teacher_file(tmp_path / "none.csv", SCHEMA)
    with pytest.raises(DataError, match="has no column 'text'"):
        read_teacher_file(write_csv(tmp_path / "a.csv", ["body", *SCHEMA.names], [["a", 1, 0, 0]]), SCHEMA)
    with pytest.raises(ConfigError, match="a regression has none"):
        read_teacher_file(tmp_path / "a.csv", LabelSchema(("score",), REGRESSION))
