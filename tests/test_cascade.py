"""A cascade: the threshold by hand, and files answered as the two models answer them."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from tiny import LABELS, make_rows, write_csv

from nlpxfer import classify
from nlpxfer.cascade import Cascade, evaluate_cascade, fit_cascade, load_cascade, predict_cascade
from nlpxfer.checkpoint import load_classifier, save_classifier
from nlpxfer.classify import Classifier
from nlpxfer.cli import main
from nlpxfer.data.schema import LabelSchema
from nlpxfer.errors import CheckpointError, ConfigError, DataError, DataNotFoundError, LabelError
from nlpxfer.evaluate.calibration import save_calibration
from nlpxfer.evaluate.cascade import cascade_curve, choose_point, thinned
from nlpxfer.problem import MULTI_LABEL, REGRESSION

SCHEMA = LabelSchema(tuple(sorted(LABELS)))
TURNED = LabelSchema(SCHEMA.names[::-1])
SETS, TURNED_SETS = LabelSchema(SCHEMA.names, MULTI_LABEL), LabelSchema(TURNED.names, MULTI_LABEL)
NUMBER = LabelSchema(("score",), REGRESSION)


def plain_curve(sure, small, large):
    """Every threshold tried by itself."""
    found = {}
    for least in [0.0, *sorted(set(sure)), np.inf]:
        sent = np.asarray(sure) < least
        found[sent.mean()] = np.where(sent, large, small).mean()
    return found


def test_the_curve_is_that_of_every_threshold_with_ties():
    generator = np.random.default_rng(0)
    sure = generator.integers(1, 30, 200) / 30
    small, large = generator.random(200) < sure, generator.random(200) < 0.9
    curve = cascade_curve(sure, small, large)
    assert {point.sent: point.score for point in curve} == pytest.approx(plain_curve(sure, small, large))
    assert (curve[0].min_probability, curve[0].sent, curve[0].score) == (0.0, 0.0, small.mean())
    assert (curve[-1].min_probability, curve[-1].sent, curve[-1].score) == (None, 1.0, large.mean())
    for point in curve[:-1]:
        assert (sure < point.min_probability).mean() == point.sent
    assert [point.sent for point in curve] == sorted({point.sent for point in curve})


def test_probabilities_next_to_each_other_are_told_apart():
    below = np.nextafter(1.0, 0.0)
    curve = cascade_curve([below, 1.0], [True, True], [False, True])
    assert [point.sent for point in curve] == [0.0, 0.5, 1.0]
    assert below < curve[1].min_probability <= 1.0


def test_the_two_rules():
    """Ten rows, by how sure the student is: it is wrong on the first three and the last, the teacher on two others."""
    sure = np.arange(1, 11) / 20 + 0.45
    small = np.array([0, 0, 0, 1, 1, 1, 1, 1, 1, 0], bool)
    large = np.array([1, 1, 1, 1, 0, 1, 1, 0, 1, 1], bool)
    curve = cascade_curve(sure, small, large)
    assert [round(10 * point.score) for point in curve] == [6, 7, 8, 9, 9, 8, 8, 8, 7, 7, 8]
    assert choose_point(curve, 0.0).sent == 0.2  # the first that is as good as the teacher's 8 of 10
    assert choose_point(curve, 0.1).sent == 0.1
    assert choose_point(curve, 0.2).sent == 0.0
    assert choose_point(curve, None).sent == pytest.approx(0.3)
    assert choose_point(curve, None).min_probability == pytest.approx((sure[2] + sure[3]) / 2)
    useless = cascade_curve(sure, ~large, large)
    assert choose_point(useless, 0.0).min_probability is None


def test_a_long_curve_is_thinned_but_keeps_its_ends():
    curve = cascade_curve(np.linspace(0, 1, 1000), np.ones(1000), np.ones(1000))
    few = thinned(curve)
    assert len(few) == 101
    assert (few[0], few[-1]) == (curve[0], curve[-1])
    assert thinned(few) == few


def test_a_curve_without_rows():
    with pytest.raises(DataError, match="cannot be judged on 0"):
        cascade_curve([], [], [])


def make_model(folder, source, schema, temperature, scale):
    checkpoint = load_classifier(str(source), schema=schema)
    texts = [row["text"] for row in make_rows(50, seed=9)]
    with torch.no_grad():  # so that rows get different labels
        checkpoint.model.classifier.weight.mul_(scale)
        logits = checkpoint.model(**checkpoint.tokenizer(texts, padding=True, return_tensors="pt")).logits
        checkpoint.model.classifier.bias.sub_(logits.mean(dim=0))
    save_classifier(checkpoint.model, checkpoint.tokenizer, schema, folder)
    save_calibration(folder, temperature)
    return folder


@pytest.fixture(scope="module")
def folders(tiny_checkpoint, tmp_path_factory):
    """A BERT student and a DistilBERT teacher, whose labels stand in the opposite order."""
    root = tmp_path_factory.mktemp("models")
    student = make_model(root / "student", tiny_checkpoint("bert", layers=1), SCHEMA, 2.0, 50)
    return student, make_model(root / "teacher", tiny_checkpoint("distilbert"), TURNED, 1.5, 20)


@pytest.fixture(scope="module")
def models(folders):
    return [Classifier.load(str(folder), bf16=False) for folder in folders]


@pytest.fixture(scope="module")
def rows(models):
    """Labels that the teacher mostly has right, and the student mostly where it is sure."""
    made = make_rows(60, seed=9)
    student, teacher = (model.probabilities([row["text"] for row in made]) for model in models)
    half = np.median(student.max(axis=1))
    for index, row in enumerate(made):
        mine, theirs = SCHEMA.names[student[index].argmax()], TURNED.names[teacher[index].argmax()]
        row |= {"id": str(index), "label": mine if student[index].max() >= half else theirs}
    return made


@pytest.fixture
def source(rows, tmp_path):
    return write_csv(tmp_path / "in.csv", rows)


def read(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("who", [0, 1])
def test_models_of_pairs_read_the_second_text_of_their_training(folders, rows, tmp_path, who):
    copies = [Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in folders]
    (copies[who] / "run.json").write_text(json.dumps({"config": {"text_pair_column": "second"}}))
    student, teacher = (Classifier.load(str(folder), bf16=False) for folder in copies)
    with pytest.raises(DataError, match="no column second"):
        fit_cascade(student, teacher, write_csv(tmp_path / "single.csv", rows), tmp_path / "cascade.json")
    paired = [one | {"second": two["text"]} for one, two in zip(rows, rows[::-1], strict=True)]
    source = write_csv(tmp_path / "in.csv", paired)
    named = fit_cascade(student, teacher, source, tmp_path / "named.json", text_pair_column="second")
    assert fit_cascade(student, teacher, source, tmp_path / "cascade.json") == named
    cascade = load_cascade(tmp_path / "cascade.json", student, teacher)
    predict_cascade(cascade, source, tmp_path / "out.csv")
    shares, _ = cascade.probabilities([row["text"] for row in paired], [row["second"] for row in paired])
    assert [float(row["probability"]) for row in read(tmp_path / "out.csv")] == pytest.approx(
        shares.max(axis=1), abs=1e-5
    )
    with pytest.raises(DataError, match="no column second"):
        predict_cascade(cascade, tmp_path / "single.csv", tmp_path / "other.csv")


@pytest.mark.parametrize("who", [0, 1])
def test_the_columns_of_the_training_are_the_default(folders, rows, source, tmp_path, who, capsys):
    copies = [Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in folders]
    (copies[who] / "run.json").write_text(json.dumps({"config": {"text_column": "words", "label_column": "intent"}}))
    named = [{"words": row["text"], "intent": row["label"], "text": "a", "label": "food"} for row in rows]
    named_source = write_csv(tmp_path / "named.csv", named)
    found = {}
    for file in (source, named_source):
        words = ["fit", *copies, file, "--output_file", tmp_path / f"{file.stem}.json", "--bf16", "false"]
        with pytest.raises(SystemExit) as left:
            main(["cascade", *map(str, words)])
        assert left.value.code == 0
        found[file.stem] = json.loads((tmp_path / f"{file.stem}.json").read_text())
    assert found["in"] == found["named"]
    capsys.readouterr()
    cascade = load_cascade(tmp_path / "in.json", *(Classifier.load(str(folder), bf16=False) for folder in copies))
    evaluated = [evaluate_cascade(cascade, file)["cascade"]["accuracy"] for file in (source, named_source)]
    assert evaluated[0] == evaluated[1]
    for number, file in enumerate((source, named_source)):
        predict_cascade(cascade, file, tmp_path / f"{number}.csv")
    answers = [[row["probability"] for row in read(tmp_path / f"{number}.csv")] for number in (0, 1)]
    assert answers[0] == answers[1]


def test_fit_finds_the_line(models, rows, source, tmp_path):
    student, teacher = models
    found = fit_cascade(student, teacher, source, tmp_path / "cascade.json", tolerance=0.0)
    assert json.loads((tmp_path / "cascade.json").read_text()) == found
    texts, gold = [row["text"] for row in rows], np.array([row["label"] for row in rows])
    small, large = student.probabilities(texts), teacher.probabilities(texts)
    mine = np.array(SCHEMA.names)[small.argmax(axis=1)] == gold
    theirs = np.array(TURNED.names)[large.argmax(axis=1)] == gold
    assert found["student_accuracy"] == pytest.approx(mine.mean())
    assert found["teacher_accuracy"] == pytest.approx(theirs.mean())
    curve = cascade_curve(small.max(axis=1), mine, theirs)
    assert found["sent"] == choose_point(curve, 0.0).sent
    best = fit_cascade(student, teacher, source, tmp_path / "best.json", tolerance=None)
    assert best["accuracy"] == 1.0  # by the way the labels were made
    assert 0 < best["sent"] <= 0.5
    assert "/" not in "".join(key + str(value) for key, value in best.items() if key != "curve")
    with pytest.raises(ConfigError, match="exists"):
        fit_cascade(student, teacher, source, tmp_path / "best.json")
    with pytest.raises(ConfigError, match="tolerance: -1"):
        fit_cascade(student, teacher, source, tmp_path / "more.json", tolerance=-1)


@pytest.mark.parametrize("window", [7, 8192])
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_file_is_answered_by_whoever_is_to_answer(models, rows, kind, window, tmp_path, monkeypatch):
    monkeypatch.setattr(classify, "WINDOW", window)
    student, teacher = models
    small = student.probabilities([row["text"] for row in rows])
    large = teacher.probabilities([row["text"] for row in rows])
    line = float(np.sort(small.max(axis=1))[24:26].mean())
    made = [*rows[:30], {"text": " ", "label": "x", "id": "blank"}, *rows[30:]]
    source = tmp_path / f"in.{kind}"
    if kind == "csv":
        write_csv(source, made)
    else:
        source.write_text("".join(json.dumps(row) + "\n" for row in made))
    output = tmp_path / "out.csv"
    output = output if kind == "csv" else output.with_suffix(".jsonl")
    done, sent = predict_cascade(Cascade.of(student, teacher, line), source, output)
    assert (done.rows, done.without_text, sent) == (61, 1, 25)
    found = read(output) if kind == "csv" else [json.loads(line) for line in output.read_text().splitlines()]
    assert [{name: row[name] for name in made[0]} for row in found] == made, "order and other columns"
    assert not found[30]["model"]
    assert not found[30]["predicted_label"]
    del found[30]
    for row, mine, theirs in zip(found, small, large, strict=True):
        by_teacher = mine.max() < line
        shares, names = (theirs, TURNED.names) if by_teacher else (mine, SCHEMA.names)
        assert row["model"] == ("teacher" if by_teacher else "student")
        assert row["predicted_label"] == names[shares.argmax()]
        assert float(row["probability"]) == pytest.approx(shares.max(), abs=1e-5)


def test_evaluate_measures_both_ends(models, rows, source, tmp_path):
    student, teacher = models
    small = student.probabilities([row["text"] for row in rows])
    line = float(np.sort(small.max(axis=1))[24:26].mean())
    found = evaluate_cascade(Cascade.of(student, teacher, line), source, plot=tmp_path / "cascade.png")
    predict_cascade(Cascade.of(student, teacher, line), source, tmp_path / "out.csv")
    answered = read(tmp_path / "out.csv")
    right = np.mean([row["predicted_label"] == row["label"] for row in answered])
    assert found["cascade"]["accuracy"] == pytest.approx(right)
    assert found["sent"] == 25 / 60
    assert found["student"]["accuracy"] == found["curve"][0]["accuracy"]
    assert found["teacher"]["accuracy"] == found["curve"][-1]["accuracy"]
    assert (
        found["student"]["seconds"]
        < found["cascade"]["seconds"]
        < (found["student"]["seconds"] + found["teacher"]["seconds"])
    )
    gain = found["against_teacher"]
    assert gain["low"] <= gain["gain"] <= gain["high"]
    assert gain["gain"] == pytest.approx(right - found["teacher"]["accuracy"])
    assert imread(tmp_path / "cascade.png").shape[0] > 200
    with pytest.raises(ConfigError, match="exists"):
        evaluate_cascade(Cascade.of(student, teacher, line), source, plot=tmp_path / "cascade.png")
    everything = evaluate_cascade(Cascade.of(student, teacher, None), source)
    assert (everything["sent"], everything["cascade"]["accuracy"]) == (1.0, everything["teacher"]["accuracy"])


def test_other_models_than_it_was_fitted_for_are_refused(models, folders, source, tmp_path):
    student, teacher = models
    fit_cascade(student, teacher, source, tmp_path / "cascade.json", tolerance=0.1)
    found = json.loads((tmp_path / "cascade.json").read_text())
    assert load_cascade(tmp_path / "cascade.json", student, teacher).min_probability == found["min_probability"]
    with pytest.raises(CheckpointError, match=r"(?s)fitted for other models.*student weights.*teacher weights"):
        load_cascade(tmp_path / "cascade.json", teacher, student)
    copy = shutil.copytree(folders[0], tmp_path / "copy")
    same = Classifier.load(str(copy), bf16=False)
    load_cascade(tmp_path / "cascade.json", same, teacher)
    save_calibration(copy, 3.0)
    with pytest.raises(CheckpointError, match=r"student temperature: 2\.0 there, 3\.0 here"):
        load_cascade(tmp_path / "cascade.json", Classifier.load(str(copy), bf16=False), teacher)
    changes = {"min_probability": 2.0}, {"version": 9}, {"student": None}, {"labels": None}, {"labels": [1, "a"]}
    for broken in ("", "{}", *(json.dumps(found | change) for change in changes)):
        (tmp_path / "broken.json").write_text(broken)
        with pytest.raises(CheckpointError, match="no usable cascade"):
            load_cascade(tmp_path / "broken.json", student, teacher)
    with pytest.raises(DataNotFoundError, match="cascade fit"):
        load_cascade(tmp_path / "none.json", student, teacher)


def test_models_that_make_no_cascade(models, folders, tiny_checkpoint, tmp_path):
    student, _ = models
    other = LabelSchema(("food", "music", "sport", "weather"))
    make_model(tmp_path / "other", tiny_checkpoint("bert", layers=1), other, 1.0, 1)
    with pytest.raises(LabelError, match=r"(?s)Student \(here\).*only here: travel.*only there: weather"):
        Cascade.of(student, Classifier.load(str(tmp_path / "other"), bf16=False), 0.5)
    several = Classifier.load(make_model(tmp_path / "several", tiny_checkpoint("bert", layers=1), SETS, 1.0, 1))
    with pytest.raises(ConfigError, match=r"student is one of the kind single_label.*teacher of multi_label"):
        Cascade.of(student, several, 0.5)
    numbers = Classifier.load(make_model(tmp_path / "number", tiny_checkpoint("bert", layers=1), NUMBER, 1.0, 1))
    with pytest.raises(ConfigError, match=r"(?s)the student is one of the kind regression.*no probability"):
        Cascade.of(numbers, student, 0.5)
    with pytest.raises(ConfigError, match=r"min_probability: 1\.5"):
        Cascade.of(student, student, 1.5)


@pytest.fixture(scope="module")
def several(tiny_checkpoint, tmp_path_factory):
    """Folders of a student and a teacher of several labels, each with thresholds of its own."""
    root = tmp_path_factory.mktemp("several")
    student = make_model(root / "student", tiny_checkpoint("bert", layers=1), SETS, 2.0, 50)
    teacher = make_model(root / "teacher", tiny_checkpoint("distilbert"), TURNED_SETS, 1.5, 20)
    save_calibration(student, 2.0, thresholds=dict(zip(SETS.names, (0.3, 0.4, 0.5, 0.6), strict=True)))
    save_calibration(teacher, 1.5, thresholds=dict(zip(SETS.names, (0.7, 0.6, 0.5, 0.4), strict=True)))
    return student, teacher


def sets_by_hand(folder, thresholds, texts):
    """Probabilities in the order of SETS, and the labels above the thresholds."""
    model = Classifier.load(str(folder), bf16=False)
    shares = model.probabilities(texts)[:, [model.schema.names.index(name) for name in SETS.names]]
    return shares, shares > np.array(thresholds)


def test_a_cascade_of_several_labels(several, rows, tmp_path, capsys):
    """The student's decisions by its thresholds, the teacher's by its own; scored by the F1 of each row's labels."""
    texts = [row["text"] for row in rows]
    small, mine = sets_by_hand(several[0], (0.3, 0.4, 0.5, 0.6), texts)
    _, theirs = sets_by_hand(several[1], (0.7, 0.6, 0.5, 0.4), texts)
    sure = np.prod(np.where(mine, small, 1 - small), axis=1) ** 0.25
    line = np.median(sure)
    gold = np.where((sure >= line)[:, None], mine, theirs)
    gold[::10] = ~gold[::10]  # whom nobody has right
    named = [";".join(name for name, given in zip(SETS.names, row, strict=True) if given) for row in gold]
    source = write_csv(tmp_path / "in.csv", [{"text": t, "label": n} for t, n in zip(texts, named, strict=True)])

    def call(step, *words):
        given = [step, *several, source, "--bf16", "false", "--label_separator", ";", *words]
        with pytest.raises(SystemExit) as left:
            main(["cascade", *map(str, given)])
        assert left.value.code == 0
        return capsys.readouterr().out

    def f1(given):
        hits, total = (given & gold).sum(axis=1), given.sum(axis=1) + gold.sum(axis=1)
        return np.where(total == 0, 1.0, 2 * hits / np.maximum(total, 1))

    said = call("fit", "--highest_accuracy", "--output_file", tmp_path / "cascade.json")
    assert "sample_f1" in said
    fitted = json.loads((tmp_path / "cascade.json").read_text())
    assert fitted["student_sample_f1"] == pytest.approx(f1(mine).mean())
    assert fitted["teacher_sample_f1"] == pytest.approx(f1(theirs).mean())
    best = max(plain_curve(sure, f1(mine), f1(theirs)).items(), key=lambda item: (round(item[1], 9), -item[0]))
    assert (fitted["sent"], fitted["sample_f1"]) == pytest.approx(best)
    assert 0 < fitted["sent"] < 1
    assert fitted["sample_f1"] > max(fitted["student_sample_f1"], fitted["teacher_sample_f1"])

    found = json.loads(call("evaluate", "--cascade", tmp_path / "cascade.json", "--plot", tmp_path / "c.png"))
    assert found["cascade"]["sample_f1"] == pytest.approx(fitted["sample_f1"])
    assert found["against_teacher"]["gain"] == pytest.approx(fitted["sample_f1"] - f1(theirs).mean())
    assert imread(tmp_path / "c.png").shape[0] > 200

    call("predict", "--cascade", tmp_path / "cascade.json", "--output_file", tmp_path / "out.csv")
    sent = sure < fitted["min_probability"]
    for number, row in enumerate(read(tmp_path / "out.csv")):
        given = (theirs if sent[number] else mine)[number]
        assert row["model"] == ("teacher" if sent[number] else "student")
        assert row["predicted_labels"] == ";".join(np.array(SETS.names)[given])
        assert len(row["probabilities"].split(";")) == max(1, given.sum())

    models = [Classifier.load(str(folder), bf16=False) for folder in several]
    moved = replace(models[1], thresholds_C=models[1].thresholds_C / 2)
    with pytest.raises(CheckpointError, match="teacher thresholds"):
        load_cascade(tmp_path / "cascade.json", models[0], moved)


def test_bad_files_leave_nothing(models, rows, tmp_path):
    cascade = Cascade.of(*models, 0.5)
    taken = write_csv(tmp_path / "taken.csv", [{**row, "model": "x"} for row in rows])
    with pytest.raises(ConfigError, match="already has model"):
        predict_cascade(cascade, taken, tmp_path / "out.csv")
    lines = tmp_path / "taken.jsonl"
    lines.write_text(json.dumps({"text": "a"}) + "\n" + json.dumps({"text": "b", "probability": 1}) + "\n")
    with pytest.raises(ConfigError, match="row 2 already has probability"):
        predict_cascade(cascade, lines, tmp_path / "out.jsonl")
    unknown = write_csv(tmp_path / "unknown.csv", [{**rows[0], "label": "weather"}])
    with pytest.raises(LabelError, match="weather"):
        fit_cascade(*models, unknown, tmp_path / "cascade.json")
    blank = write_csv(tmp_path / "blank.csv", [rows[0], {**rows[1], "text": ""}])
    with pytest.raises(DataError, match="row 2: there is no text in the column text"):
        evaluate_cascade(cascade, blank)
    assert {path.name for path in tmp_path.iterdir()} == {"taken.csv", "taken.jsonl", "unknown.csv", "blank.csv"}


def test_the_command(folders, source, tmp_path, capsys):
    student, teacher = map(str, folders)
    line, out = tmp_path / "cascade.json", tmp_path / "out.jsonl"

    def call(step, *words):
        with pytest.raises(SystemExit) as left:
            main(["cascade", step, student, teacher, str(source), "--bf16", "false", *map(str, words)])
        return left.value.code, capsys.readouterr()

    code, said = call("fit", "--output_file", line, "--highest_accuracy")
    assert code == 0
    assert said.out.startswith(f"{line}: ")
    assert "accuracy 1.0000" in said.out
    code, said = call("evaluate", "--cascade", line, "--plot", tmp_path / "a.png")
    assert code == 0
    assert json.loads(said.out)["cascade"]["accuracy"] == 1.0
    code, said = call("predict", "--cascade", line, "--output_file", out)
    assert code == 0
    sent = sum(json.loads(line)["model"] == "teacher" for line in out.read_text().splitlines())
    assert said.out == f"{out}: 60 rows, {sent} by the teacher\n"
    code, said = call("predict", "--cascade", line, "--output_file", out)
    assert code == 2
    assert "exists" in said.err
