"""`nlpxfer predict` and `nlpxfer evaluate`: what they answer is what the model says, row by row and in order."""

import copy
import csv
import json
import os
import pickle
import shutil
import signal
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from safetensors.torch import load_file, save_file
from tiny import LABELS, make_rows, write_csv
from transformers import pipeline

from nlpxfer import classify
from nlpxfer.backends import TorchBackend
from nlpxfer.checkpoint import load_classifier, save_classifier
from nlpxfer.classify import Classifier, evaluate_file, predict_file
from nlpxfer.cli import main
from nlpxfer.data.schema import LabelSchema
from nlpxfer.errors import CheckpointError, ConfigError, DataError, LabelError
from nlpxfer.evaluate.calibration import probabilities, save_calibration
from nlpxfer.evaluate.selective import AbstainRule
from nlpxfer.problem import MULTI_LABEL, REGRESSION

SCHEMA = LabelSchema(tuple(sorted(LABELS)))


@pytest.fixture(scope="module")
def folder(tiny_checkpoint, tmp_path_factory):
    checkpoint = load_classifier(str(tiny_checkpoint("bert")), schema=SCHEMA)
    texts = [row["text"] for row in make_rows(50, seed=9)]
    with torch.no_grad():  # so that rows get different labels
        checkpoint.model.classifier.weight.mul_(50)
        logits = checkpoint.model(**checkpoint.tokenizer(texts, padding=True, return_tensors="pt")).logits
        checkpoint.model.classifier.bias.sub_(logits.mean(dim=0))
    out = save_classifier(checkpoint.model, checkpoint.tokenizer, SCHEMA, tmp_path_factory.mktemp("model") / "out")
    (out / "run.json").write_text(json.dumps({"config": {"max_length": 24}}))
    return out


@pytest.fixture
def classifier(folder):
    return Classifier.load(str(folder), bf16=False)


@pytest.fixture
def rows():
    made = make_rows(50, seed=9)
    return [{"id": str(i), **row} for i, row in enumerate(made)]


def read(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("window", [7, 8192])
def test_answers_are_those_of_a_pipeline(classifier, folder, rows, tmp_path, monkeypatch, window):
    monkeypatch.setattr(classify, "WINDOW", window)
    source = write_csv(tmp_path / "in.csv", rows)
    done = predict_file(classifier, source, tmp_path / "out.csv", all_probabilities=True)
    assert (done.rows, done.without_text, done.abstained) == (50, 0, 0)
    found = read(tmp_path / "out.csv")
    ask = pipeline("text-classification", model=str(folder), top_k=None)
    for row, answer, scores in zip(
        rows, found, ask([r["text"] for r in rows], truncation=True, max_length=24), strict=True
    ):
        assert {key: answer[key] for key in row} == row, "other columns and the order are kept"
        shares = {score["label"]: score["score"] for score in scores}
        assert answer["predicted_label"] == max(shares, key=shares.get)
        assert float(answer["probability"]) == pytest.approx(max(shares.values()), abs=1e-5)
        for name in SCHEMA.names:
            assert float(answer[f"probability_{name}"]) == pytest.approx(shares[name], abs=1e-5)
    assert len({row["predicted_label"] for row in found}) > 1


@pytest.mark.parametrize("name", ["rows", "logits", "probabilities"])
def test_one_text_is_no_list_of_texts(classifier, name):
    with pytest.raises(DataError, match=r"texts is one text.*\n.*texts=\[text\]"):
        getattr(classifier, name)("fine")
    with pytest.raises(DataError, match="pairs is one text"):
        getattr(classifier, name)(["a", "b"], "ab")


def test_what_is_no_text_is_named(classifier):
    for texts, kind in (
        (["a", None], "NoneType"),
        (["a", float("nan")], "float"),
        (np.array(["a", 1], object), "int"),
    ):
        with pytest.raises(DataError, match=f"texts: number 1, from 0, is a {kind}, a text is needed"):
            classifier.logits(texts)
    with pytest.raises(DataError, match="pairs: number 0, from 0, is a bytes"):
        classifier.logits(["a"], [b"a"])
    with pytest.raises(DataError, match="texts is None, a list of texts is needed"):
        classifier.logits(None)
    assert (classifier.logits(np.array(["a", "b c"])) == classifier.logits(["a", "b c"])).all()
    for texts, kind in (({"a", "b"}, "a set"), ({"a": 1}, "a dict")):
        with pytest.raises(DataError, match=f"texts is {kind}, a list of texts is needed"):
            classifier.logits(texts)
    with pytest.raises(DataError, match="texts: number 1, from 0, holds half of a character"):
        classifier.logits(["a", "b\ud800"])


def test_rows_of_a_table_that_was_filtered(classifier, of_pairs):
    texts, pairs = pd.Series(["a", "b c"], index=[5, 7]), pd.Series(["c d", "e"], index=[3, 1])
    assert (classifier.logits(texts) == classifier.logits(["a", "b c"])).all()
    assert (of_pairs.logits(texts, pairs) == of_pairs.logits(["a", "b c"], ["c d", "e"])).all()


def test_threads_take_turns(classifier, monkeypatch):
    """The head's precision and how a tokenizer cuts texts are kept in the model and the tokenizer for the time."""
    inside, most, plain, cut = [], [], TorchBackend.logits, classify.tokenise

    def watched(work):
        def call(*arguments, **options):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.05)
            found = work(*arguments, **options)
            inside.pop()
            return found

        return call

    monkeypatch.setattr(TorchBackend, "logits", watched(plain))
    monkeypatch.setattr(classify, "tokenise", watched(cut))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(classifier.logits, [["a", "b c"]] * 8))
    assert (len(most), max(most)) == (16, 1)
    assert all((each == found[0]).all() for each in found)


def test_files_in_the_home_folder(classifier, folder, rows, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home").mkdir()
    write_csv(tmp_path / "home" / "in.csv", rows[:3])
    predict_file(classifier, "~/in.csv", "~/out.csv")
    with pytest.raises(SystemExit) as left:
        main(["predict", str(folder), "~/in.csv", "--output_file=~/other.csv", "--bf16", "false"])
    assert left.value.code == 0
    assert (tmp_path / "home" / "out.csv").read_text() == (tmp_path / "home" / "other.csv").read_text()
    with pytest.raises(ConfigError, match="output_file: ~/out.csv exists"):
        predict_file(classifier, "~/in.csv", "~/out.csv")
    assert evaluate_file(classifier, "~/in.csv")["rows"] == 3
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_copies_answer_alike(classifier):
    for other in (pickle.loads(pickle.dumps(classifier)), copy.deepcopy(classifier)):
        np.testing.assert_allclose(other.logits(["a", "b c"]), classifier.logits(["a", "b c"]), atol=1e-5)


def test_loading_leaves_the_threads_of_torch_alone(folder):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        Classifier.load(str(folder), bf16=False)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_pairs_are_read_by_those_who_were_trained_on_pairs_alone(of_pairs, of_columns, classifier):
    with pytest.raises(DataError, match=r"(?s)trained to read a second text, second, beside each.*pairs=\["):
        of_pairs.probabilities(["a"])
    assert of_pairs.probabilities(["a"], ["b"]).shape == (1, 4)
    with pytest.raises(DataError, match=r"trained to read one text for each row, not pairs"):
        of_columns.probabilities(["a"], ["b"])
    assert classifier.probabilities(["a"], ["b"]).shape == (1, 4), "of which nothing is known"


def test_no_texts_have_no_answers(classifier):
    assert len(classifier.rows([])) == 0
    assert classifier.logits([]).shape == classifier.probabilities([]).shape == (0, 4)
    assert classifier.logits([], []).dtype == np.float32
    several = replace(classifier, schema=LabelSchema(SCHEMA.names, MULTI_LABEL))
    assert several.probabilities([]).shape == (0, 4)


def test_a_folder_may_be_a_path(classifier, folder, rows):
    texts = [row["text"] for row in rows]
    assert (Classifier.load(Path(folder), bf16=False).logits(texts) == classifier.logits(texts)).all()


def test_max_length_is_that_of_the_training(classifier, folder):
    assert classifier.max_length == 24
    assert Classifier.load(str(folder), max_length=12, bf16=False).max_length == 12
    for length in (3, 10_000):
        with pytest.raises(ConfigError, match=f"max_length: {length} is not between 4 and"):
            Classifier.load(str(folder), max_length=length)


def test_rows_without_a_text_get_no_label(classifier, rows, tmp_path, caplog):
    source = tmp_path / "in.jsonl"
    texts = [rows[0]["text"], "", None, "  ", rows[1]["text"]]
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    done = predict_file(classifier, source, tmp_path / "out.jsonl", min_probability=0.5)
    assert (done.rows, done.without_text) == (5, 3)
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["predicted_label"] is None for row in found] == [False, True, True, True, False]
    assert [row["abstained"] is None for row in found] == [False, True, True, True, False]
    assert "3 of 5 rows have no text" in caplog.text


def test_abstaining(classifier, rows, tmp_path):
    source = write_csv(tmp_path / "in.csv", rows)
    plain = classifier.probabilities([row["text"] for row in rows]).max(axis=1)
    least = float(np.median(plain))
    done = predict_file(classifier, source, tmp_path / "out.csv", min_probability=least)
    flags = [row["abstained"] == "True" for row in read(tmp_path / "out.csv")]
    assert flags == (plain < least).tolist()
    assert done.abstained == sum(flags) == 25
    with pytest.raises(ConfigError, match="min_probability: 1.5"):
        predict_file(classifier, source, tmp_path / "again.csv", min_probability=1.5)


@pytest.fixture
def ruled(folder, rows, tmp_path):
    """From a threshold, or None, to the classifier with that rule; and its calibrated probabilities."""

    def load(least):
        copy = Path(shutil.copytree(folder, tmp_path / f"ruled-{least}"))
        rule = AbstainRule(precision=0.9, confidence=0.95, min_probability=least, coverage=0.5)
        save_calibration(copy, 2.0, abstain=rule)
        return Classifier.load(str(copy), bf16=False)

    return load, probabilities(Classifier.load(str(folder), bf16=False).logits([row["text"] for row in rows]), 2.0)


def test_a_model_with_a_rule_abstains_by_itself(ruled, rows, tmp_path):
    load, shares = ruled
    sure = shares.max(axis=1)
    least = float(np.quantile(sure, 0.7))
    classifier = load(least)
    source = write_csv(tmp_path / "in.csv", rows)
    done = predict_file(classifier, source, tmp_path / "out.csv")
    found = read(tmp_path / "out.csv")
    assert [row["abstained"] == "True" for row in found] == (sure < least).tolist()
    assert done.abstained == 35
    assert [float(row["probability"]) for row in found] == pytest.approx(sure, abs=1e-5)
    lower = float(np.quantile(sure, 0.2))
    assert predict_file(classifier, source, tmp_path / "other.csv", min_probability=lower).abstained == 10

    answered = evaluate_file(classifier, source)["answered"]
    right = shares.argmax(axis=1) == [SCHEMA.encode(row["label"]) for row in rows]
    assert answered == {
        "min_probability": least,
        "answers": 15,
        "coverage": 0.3,
        "precision": pytest.approx(right[sure >= least].mean()),
    }


def test_a_model_that_cannot_keep_its_promise_abstains_from_all(ruled, rows, tmp_path, caplog, capsys):
    classifier = ruled[0](None)
    source = write_csv(tmp_path / "in.csv", rows)
    with pytest.raises(SystemExit):
        main(["predict", str(classifier.backend.folder), str(source), "--output_file", str(tmp_path / "out.csv")])
    assert capsys.readouterr().out.endswith("out.csv: 50 rows, 50 abstained\n")
    assert {row["abstained"] for row in read(tmp_path / "out.csv")} == {"True"}
    assert "no threshold was found in training that gives answers of which 0.9 are right" in caplog.text
    assert predict_file(classifier, source, tmp_path / "other.csv", min_probability=0.01).abstained == 0
    answered = evaluate_file(classifier, source)["answered"]
    assert answered == {"min_probability": None, "answers": 0, "coverage": 0.0, "precision": None}


def test_a_model_without_a_rule_answers_all(classifier, rows, tmp_path):
    source = write_csv(tmp_path / "in.csv", rows)
    predict_file(classifier, source, tmp_path / "out.csv")
    assert "abstained" not in read(tmp_path / "out.csv")[0]
    assert "answered" not in evaluate_file(classifier, source)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("words\na\n", "there is no column text"),
        ("text\n", "has no rows"),
        ("text,probability\na,b\n", "already has probability"),
        ("text\nfine\nbad,row\n", r"row 2 \(line 3\): 2 fields"),
    ],
)
def test_faults_leave_no_output(classifier, content, message, tmp_path):
    source = tmp_path / "in.csv"
    source.write_text(content)
    with pytest.raises((DataError, ConfigError), match=message):
        predict_file(classifier, source, tmp_path / "out.csv")
    assert [entry.name for entry in tmp_path.iterdir()] == ["in.csv"]


def test_a_column_of_that_name_in_a_later_row_is_not_overwritten(classifier, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": "a"}\n{"text": "b", "predicted_label": "mine"}\n')
    with pytest.raises(ConfigError, match="row 2 already has predicted_label"):
        predict_file(classifier, source, tmp_path / "out.jsonl")
    assert [entry.name for entry in tmp_path.iterdir()] == ["in.jsonl"]


def test_numbers_are_no_text_and_nothing_is_overwritten(classifier, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": 7}\n')
    with pytest.raises(DataError, match="row 1: text holds a int"):
        predict_file(classifier, source, tmp_path / "out.jsonl")
    (tmp_path / "out.jsonl").write_text("mine")
    with pytest.raises(ConfigError, match="exists"):
        predict_file(classifier, source, tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_text() == "mine"


@pytest.fixture
def of_pairs(folder, tmp_path):
    """A classifier that was trained on pairs."""
    copy = Path(shutil.copytree(folder, tmp_path / "pairs"))
    (copy / "run.json").write_text(json.dumps({"config": {"max_length": 24, "text_pair_column": "second"}}))
    return Classifier.load(str(copy), bf16=False)


@pytest.fixture
def of_columns(folder, tmp_path):
    """A classifier that was trained on columns of other names."""
    copy = Path(shutil.copytree(folder, tmp_path / "named"))
    named = {"max_length": 24, "text_column": "utterance", "text_pair_column": None, "label_column": "intent"}
    (copy / "run.json").write_text(json.dumps({"config": named}))
    return Classifier.load(str(copy), bf16=False)


def write_rows(path, rows):
    if path.suffix == ".csv":
        return write_csv(path, rows)
    if path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(str(path))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("kind", [".csv", ".jsonl", ".parquet"])
def test_a_model_of_pairs_reads_the_second_text_of_its_training(of_pairs, rows, tmp_path, kind):
    paired = [one | {"second": two["text"], "other": "bread"} for one, two in zip(rows, rows[::-1], strict=True)]
    source = write_rows(tmp_path / f"in{kind}", paired)
    texts, seconds = [row["text"] for row in paired], [row["second"] for row in paired]
    expected = of_pairs.probabilities(texts, seconds).max(axis=1)
    assert expected != pytest.approx(of_pairs.probabilities(texts, texts).max(axis=1), abs=1e-3)

    predict_file(of_pairs, source, tmp_path / "out.jsonl")
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["probability"] for row in found] == pytest.approx(expected, abs=1e-5)
    assert evaluate_file(of_pairs, source) == evaluate_file(of_pairs, source, text_pair_column="second")
    other = evaluate_file(of_pairs, source, text_pair_column="other")
    assert other["loss"] != pytest.approx(evaluate_file(of_pairs, source)["loss"], rel=1e-3)


@pytest.mark.parametrize("kind", [".csv", ".jsonl", ".parquet"])
def test_a_model_of_pairs_does_not_answer_half_of_a_pair(of_pairs, rows, tmp_path, kind):
    source = write_rows(tmp_path / f"in{kind}", rows)
    message = r"no column second.*trained.*\n.*Available: id, text, label\n.*--text_pair_column"
    with pytest.raises(DataError, match=message):
        predict_file(of_pairs, source, tmp_path / "out.jsonl")
    with pytest.raises(DataError, match=message):
        evaluate_file(of_pairs, source)
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("kind", [".csv", ".jsonl", ".parquet"])
def test_the_columns_of_the_training_are_the_default(of_columns, classifier, rows, tmp_path, kind):
    usual = write_rows(tmp_path / f"usual{kind}", rows)
    named = [{"utterance": row["text"], "intent": row["label"], "text": "bread", "label": "food"} for row in rows]
    source = write_rows(tmp_path / f"in{kind}", named)
    expected = evaluate_file(classifier, usual)
    assert evaluate_file(of_columns, usual) == evaluate_file(of_columns, source) == expected
    assert evaluate_file(of_columns, source, text_column="text")["loss"] != pytest.approx(expected["loss"], rel=1e-3)
    other = evaluate_file(of_columns, source, label_column="label")
    assert other["loss"] != pytest.approx(expected["loss"], rel=1e-3)
    found = []
    for model, file, words in (
        (classifier, usual, {}),
        (of_columns, usual, {}),
        (of_columns, source, {}),
        (of_columns, source, {"text_column": "text"}),
    ):
        predict_file(model, file, tmp_path / f"{len(found)}.jsonl", **words)
        lines = (tmp_path / f"{len(found)}.jsonl").read_text().splitlines()
        found.append([json.loads(line)["probability"] for line in lines])
    assert found[0] == found[1] == found[2] != found[3]
    neither = write_rows(tmp_path / f"neither{kind}", [{"words": "a"}])
    with pytest.raises(DataError, match="there is no column text"):
        predict_file(of_columns, neither, tmp_path / "out.jsonl")


def test_a_pair_without_its_second_text_names_the_column(of_pairs, tmp_path):
    lines = [{"text": "a", "second": "b", "label": "food"}, {"text": "a", "second": " ", "label": "food"}]
    with pytest.raises(DataError, match="row 2: there is no text in the column second"):
        evaluate_file(of_pairs, write_rows(tmp_path / "in.csv", lines))
    del lines[0]["second"]
    source = write_rows(tmp_path / "in.jsonl", lines)
    for call in (evaluate_file, lambda model, source: predict_file(model, source, tmp_path / "out.jsonl")):
        with pytest.raises(
            DataError, match=r"row 1: there is no column second.*\n.*label, text\n.*each row a 'second'"
        ):
            call(of_pairs, source)


def test_a_row_of_jsonl_without_its_text(classifier, tmp_path):
    for order in (1, -1):
        source = write_rows(tmp_path / "in.jsonl", [{"text": "a", "label": "food"}, {"label": "food"}][::order])
        row = 2 if order == 1 else 1
        for call in (evaluate_file, lambda model, source: predict_file(model, source, tmp_path / "out.jsonl")):
            with pytest.raises(DataError, match=rf"in.jsonl, row {row}: there is no column text\."):
                call(classifier, source)


def test_blank_lines_and_carriage_returns(classifier, tmp_path, caplog):
    source = tmp_path / "in.csv"
    source.write_bytes(b"text\rbread\r\rball\r")
    assert predict_file(classifier, source, tmp_path / "out.csv").without_text == 1
    assert [bool(row["predicted_label"]) for row in read(tmp_path / "out.csv")] == [True, False, True]
    assert "1 of 3 rows have no text" in caplog.text


def test_numbers_keep_their_significant_digits(classifier, tmp_path, monkeypatch):
    numbers = np.array([1.23456789e-7, -3.21e12, 0.0, 2024.1234], np.float32)
    monkeypatch.setattr(Classifier, "logits", lambda self, texts, pairs=None: numbers[:, None])
    model = replace(classifier, schema=LabelSchema(("score",), REGRESSION))
    predict_file(model, write_csv(tmp_path / "in.csv", [{"text": "a"}] * 4), tmp_path / "out.csv")
    written = [row["predicted_number"] for row in read(tmp_path / "out.csv")]
    assert written == ["1.234568e-07", "-3210000000000.0", "0.0", "2024.123"]


@pytest.fixture
def of_labels(classifier, monkeypatch):
    """A multi-label classifier that gives three rows two labels, one, and none."""
    shares = np.array([[0.9, 0.2, 0.625, 0.1], [0.00002, 0.5, 0.4, 0.6], [0.000001, 0.4, 0.5, 0.6]])
    logits = np.log(shares / (1 - shares)).astype(np.float32)
    monkeypatch.setattr(Classifier, "logits", lambda self, texts, pairs=None: logits)
    schema = LabelSchema(("a", "b", "c", "d"), MULTI_LABEL)
    return replace(classifier, schema=schema, thresholds_C=np.array([0.00001, 0.55, 0.55, 0.65]))


def test_each_label_that_is_given_has_its_probability_beside_it(of_labels, tmp_path):
    source = write_csv(tmp_path / "in.csv", [{"text": "x"}, {"text": ""}, {"text": "x"}, {"text": "x"}])
    predict_file(of_labels, source, tmp_path / "out.csv", label_separator=" + ")
    found = [(row["predicted_labels"], row["probabilities"]) for row in read(tmp_path / "out.csv")]
    assert found == [("a + c", "0.900000 + 0.625000"), ("", ""), ("a", "0.000020"), ("", "")]


def test_each_label_that_is_not_sure_enough_is_abstained_from(of_labels, tmp_path, capsys):
    source = write_csv(tmp_path / "in.csv", [{"text": "x"}, {"text": ""}, {"text": "x"}, {"text": "x"}])
    done = predict_file(of_labels, source, tmp_path / "out.csv", min_probability=0.7)
    assert done.abstained == 2, "rows"
    found = [(row["predicted_labels"], row["abstained_labels"]) for row in read(tmp_path / "out.csv")]
    assert found == [("a|c", "c"), ("", ""), ("a", "a"), ("", "")]
    rule = AbstainRule(precision=0.9, confidence=0.95, min_probability=0.62, coverage=0.5)
    by_itself = replace(of_labels, abstain=rule)
    assert predict_file(by_itself, source, tmp_path / "other.csv").abstained == 1
    gold = [{"text": "x", "label": label} for label in ("a|b", "a", "")]
    answered = evaluate_file(by_itself, write_csv(tmp_path / "gold.csv", gold))["answered"]
    assert answered == {"min_probability": 0.62, "answers": 2, "coverage": 2 / 3, "precision": 0.5}
    nothing = replace(rule, min_probability=None)
    assert predict_file(replace(of_labels, abstain=nothing), source, tmp_path / "none.csv").abstained == 2


def test_labels_are_parted_as_in_the_training(tiny_checkpoint, tmp_path):
    schema = LabelSchema(tuple(sorted(LABELS)), MULTI_LABEL)
    checkpoint = load_classifier(str(tiny_checkpoint("bert", layers=1)), schema=schema)
    folder = tmp_path / "model"
    save_classifier(checkpoint.model, checkpoint.tokenizer, schema, folder)
    rows = [{"text": "x", "label": f"{LABELS[0]};{LABELS[1]}"}, {"text": "y", "label": ""}]
    source = write_csv(tmp_path / "in.csv", rows)
    with pytest.raises(LabelError, match="is none of the classifier's"):
        evaluate_file(Classifier.load(folder, bf16=False), source)
    (folder / "run.json").write_text(json.dumps({"config": {"label_separator": ";"}}))
    classifier = Classifier.load(folder, bf16=False)
    found = evaluate_file(classifier, source)
    assert found == evaluate_file(classifier, source, label_separator=";")
    predict_file(replace(classifier, thresholds_C=np.zeros(4)), source, tmp_path / "out.csv")
    assert read(tmp_path / "out.csv")[0]["predicted_labels"] == ";".join(schema.names)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_separator": "."}, r"label_separator: '\.' may stand in a probability"),
        ({"label_separator": "0"}, r"label_separator: '0' may stand in a probability"),
        ({"label_separator": ""}, r"label_separator: it is empty"),
    ],
)
def test_options_that_multi_label_answers_have_no_room_for(of_labels, options, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        predict_file(of_labels, write_csv(tmp_path / "in.csv", [{"text": "x"}]), tmp_path / "out.csv", **options)


HALF = r"holds half of a character \(a lone surrogate\)"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (r'{"text": "a \ud83d b", "note": "x"}', f"row 3: 'text' {HALF}"),
        (r'{"text": "a", "note": {"x": ["\udc00"]}}', f"row 3: 'note' {HALF}"),
        (r'{"text": "a", "note \ud83d": 1}', f"row 3: the name of a column {HALF}"),
    ],
)
def test_half_a_character_is_named_with_its_row(classifier, line, message, tmp_path):
    source = tmp_path / "in.jsonl"
    whole = r'{"text": "a \ud83d\ude00", "note": "\ud83d\ude00"}' + "\n"
    source.write_text(2 * whole + line + "\n")
    with pytest.raises(DataError, match=message):
        predict_file(classifier, source, tmp_path / "out.jsonl")
    source.write_text(2 * whole)
    assert predict_file(classifier, source, tmp_path / "out.jsonl").rows == 2
    assert json.loads((tmp_path / "out.jsonl").read_text().splitlines()[1])["note"] == "\U0001f600"


@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_appears_meanwhile_is_not_replaced(classifier, rows, tmp_path, monkeypatch, links):
    if not links:  # as on file systems without hard links
        monkeypatch.setattr(os, "link", lambda *names: os.mkdir(tmp_path))
    source, out = write_csv(tmp_path / "in.csv", rows), tmp_path / "out.csv"
    plain = Classifier.logits
    monkeypatch.setattr(Classifier, "logits", lambda *each: out.write_text("precious") and plain(*each))
    with pytest.raises(ConfigError, match=r"out\.csv exists"):
        predict_file(classifier, source, out)
    assert out.read_text() == "precious"
    monkeypatch.setattr(Classifier, "logits", plain)
    out.unlink()
    out.symlink_to(tmp_path / "nowhere.csv")
    with pytest.raises(ConfigError, match=r"output_file: .*out\.csv exists"):
        predict_file(classifier, source, out)
    out.unlink()
    assert predict_file(classifier, source, out).rows == 50
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.csv", "out.csv"]


def test_a_number_beyond_all_doubles_is_not_made_null(classifier, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": "a", "much": 1.5e308, "none": NaN}\n{"text": "b", "much": 1e400}\n')
    with pytest.raises(DataError, match=r"row 2 \(line 2\): .*the number 1e400 is beyond 1\.8e308"):
        predict_file(classifier, source, tmp_path / "out.jsonl")
    source.write_text(source.read_text().splitlines(keepends=True)[0])
    predict_file(classifier, source, tmp_path / "out.jsonl")
    found = json.loads((tmp_path / "out.jsonl").read_text())
    assert (found["much"], found["none"]) == (1.5e308, None)


def test_a_half_written_file_is_removed_when_the_terminal_is_closed(folder, rows, tmp_path, monkeypatch, capsys):
    source = write_csv(tmp_path / "in.csv", rows)
    monkeypatch.setattr(Classifier, "logits", lambda *each: os.kill(os.getpid(), signal.SIGHUP))
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # pytest may run under nohup
    try:
        with pytest.raises(SystemExit) as left:
            main(["predict", str(folder), str(source), "--output_file", str(tmp_path / "out.csv"), "--bf16", "false"])
    finally:
        signal.signal(signal.SIGHUP, before)
    assert (left.value.code, capsys.readouterr().err) == (75, "Interrupted.\n")
    assert [path.name for path in tmp_path.iterdir()] == ["in.csv"]


def test_an_iterator_of_texts_is_refused(classifier):
    with pytest.raises(DataError, match="texts is a list_iterator, a list of texts is needed"):
        classifier.probabilities(iter(["a"]))


def test_half_a_character_in_a_column_that_is_not_needed_is_no_fault_of_scoring(classifier, rows, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps({**rows[0], "note": "\ud83d"}) + "\n")
    assert evaluate_file(classifier, source)["rows"] == 1
    source.write_text(json.dumps({**rows[0], "text": "\ud83d"}) + "\n")
    with pytest.raises(DataError, match=f"row 1: 'text' {HALF}"):
        evaluate_file(classifier, source)


def test_a_separator_of_labels_means_nothing_where_there_is_one(classifier, rows, tmp_path):
    source = write_csv(tmp_path / "in.csv", rows)
    for call in (lambda: predict_file(classifier, source, tmp_path / "out.csv", label_separator=";"),
                 lambda: evaluate_file(classifier, source, label_separator=";")):  # fmt: skip
        with pytest.raises(ConfigError, match="label_separator: the model gives one answer to each row"):
            call()


def test_scores(classifier, rows, tmp_path):
    source = write_csv(tmp_path / "in.csv", rows)
    found = evaluate_file(classifier, source)
    answers = classifier.probabilities([row["text"] for row in rows])
    gold = np.array([SCHEMA.encode(row["label"]) for row in rows])
    assert found["rows"] == 50
    assert found["accuracy"] == pytest.approx(np.mean(answers.argmax(axis=1) == gold))
    assert found["loss"] == pytest.approx(-np.log(answers[range(50), gold]).mean(), rel=1e-5)
    with pytest.raises(LabelError, match="row 2: the label 'other' is none of the classifier's"):
        evaluate_file(classifier, write_csv(tmp_path / "bad.csv", [rows[0], {**rows[1], "label": "other"}]))
    with pytest.raises(DataError, match="there is no column gold"):
        evaluate_file(classifier, source, label_column="gold")


@pytest.mark.parametrize(
    ("kind", "labels"), [(".csv", ["0.5", "01", "1.0"]), (".jsonl", ["0.5", "01", "1.0", 7, 7.0])]
)
def test_names_that_look_like_numbers_are_those_of_the_training(classifier, tmp_path, kind, labels):
    model = replace(classifier, schema=LabelSchema(("0.5", "01", "1.0", "7")))
    source = write_rows(tmp_path / f"in{kind}", [{"text": "bread", "label": label} for label in labels])
    assert evaluate_file(model, source)["rows"] == len(labels)
    assert evaluate_file(model, write_rows(tmp_path / f"one{kind}", [{"text": "a", "label": "0.5"}]))["rows"] == 1
    other = write_rows(tmp_path / f"other{kind}", [{"text": "a", "label": each} for each in ("0.5", "0.75")])
    with pytest.raises(LabelError, match=r"row 2: the label '0\.75' is none"):
        evaluate_file(model, other)


def test_a_label_that_looks_like_one_of_the_classifiers(classifier, tmp_path):
    model = replace(classifier, schema=LabelSchema(("caf\u00e9", "b", "c", "d")))
    source = write_csv(tmp_path / "in.csv", [{"text": "a", "label": "cafe\u0301"}])
    with pytest.raises(LabelError, match=r"row 1: the label .*\n.*Likely reason: .*'cafe\\u0301' and 'caf\\xe9'"):
        evaluate_file(model, source)


@pytest.mark.parametrize("names", [("1", "2", "3", "4"), SCHEMA.names])
def test_class_numbers_of_parquet_have_the_names_that_training_gives_them(classifier, rows, tmp_path, names):
    classifier = replace(classifier, schema=LabelSchema(names))
    named = [{"text": row["text"], "label": names[SCHEMA.encode(row["label"])]} for row in rows]
    features = Features({"text": Value("string"), "label": ClassLabel(names=list(names[::-1]))})
    Dataset.from_list(named, features=features).to_parquet(str(tmp_path / "in.parquet"))
    expected = evaluate_file(classifier, write_csv(tmp_path / "in.csv", named))
    assert evaluate_file(classifier, tmp_path / "in.parquet") == expected


def test_memory_does_not_grow_with_the_file(classifier, tmp_path, monkeypatch):
    monkeypatch.setattr(classify, "WINDOW", 64)
    monkeypatch.setattr(Classifier, "logits", lambda self, texts, pairs=None: np.zeros((len(texts), 4), np.float32))
    peaks = []
    for count in (1_000, 20_000):
        source = tmp_path / f"{count}.csv"
        with source.open("w") as file:
            file.write("id,text\n")
            file.writelines(f"{i},some words in row {i}\n" for i in range(count))
        tracemalloc.start()
        predict_file(classifier, source, tmp_path / f"out-{count}.csv")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert [row["id"] for row in read(tmp_path / f"out-{count}.csv")] == [str(i) for i in range(count)]
    assert peaks[1] < 1.5 * peaks[0]


def test_logits_that_are_not_finite_are_no_answer(folder, rows, tmp_path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    weights = load_file(broken / "model.safetensors")
    weights["classifier.bias"][1] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    path = write_csv(tmp_path / "in.csv", rows)
    for command in (["predict", "--output_file", str(tmp_path / "out.csv")], ["evaluate"]):
        with pytest.raises(SystemExit) as left:
            main([command[0], str(broken), str(path), *command[1:]])
        assert left.value.code == 2
        assert "NaN or infinite for 50 of 50 rows" in capsys.readouterr().err
    assert not (tmp_path / "out.csv").exists()


def test_a_checkpoint_that_does_not_classify_is_refused(tiny_checkpoint):
    with pytest.raises(CheckpointError, match="is not a classifier"):
        Classifier.load(str(tiny_checkpoint("bert")))


def test_commands(folder, rows, tmp_path, capsys):
    source = write_csv(tmp_path / "in.csv", rows)
    words = [str(folder), str(source), "--bf16", "false"]
    with pytest.raises(SystemExit) as left:
        main(["predict", *words, "--output_file", str(tmp_path / "out.csv"), "--min_probability", "0.9"])
    assert left.value.code == 0
    assert "out.csv: 50 rows, " in capsys.readouterr().out
    assert len(read(tmp_path / "out.csv")) == 50
    with pytest.raises(SystemExit) as left:
        main(["evaluate", *words])
    assert left.value.code == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 50
    with pytest.raises(SystemExit) as left:
        main(["evaluate", str(folder), str(tmp_path / "none.csv")])
    assert left.value.code == 2
    assert "is no file" in capsys.readouterr().err
