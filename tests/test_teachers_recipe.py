"""Who teaches, through the recipe: what the student is given to learn is what the teachers say about those texts."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from recipe_runs import QUICK, call, finished, refused, tiny_words
from tiny import LABELS, make_rows, write_csv
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from nlpxfer.evaluate import arms as arms_module
from nlpxfer.problem import MULTI_LABEL, REGRESSION, SINGLE_LABEL
from nlpxfer.recipes import load_recipe
from nlpxfer.teachers import TransferRows
from nlpxfer.teachers.rows import contradicts

NLI = ("neutral", "entailment", "contradiction")
QUICKLY = ["--control_arm", "false", "--max_train_samples", "32", "--linear_probe", "false"]
OTHER_ORDER = ("travel", "music", "food", "sport")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("NLPXFER_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def taught(monkeypatch):
    """What students were given, one entry for each set of rows: texts, logits, labels."""
    seen = []
    made = TransferRows.__init__

    def record(self, run, panel):
        made(self, run, panel)
        texts = [text for split in run.data.taught for text in run.texts(split)[0]]
        seen.append((texts, np.array(self.logits), run.labels("train"), self))

    monkeypatch.setattr(TransferRows, "__init__", record)
    return seen


def words(tiny_data, *more):
    return [*tiny_words(tiny_data, steps=2), *QUICKLY, *map(str, more)]


def rows_of(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def every_text(tiny_data):
    named = [row["text"] for path in (tiny_data.train, tiny_data.validation, tiny_data.test) for row in rows_of(path)]
    return [*named, *tiny_data.unlabelled.read_text().splitlines()]


def shares_for(text):
    """Probabilities that belong to a text and to no other, in the order of LABELS."""
    rng = np.random.default_rng(sum(ord(letter) * 7**i for i, letter in enumerate(text[:12])))
    shares = rng.dirichlet(np.ones(4))
    return np.round(shares, 6)


def write_answers(path, texts, order=LABELS):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*order, "text"])
        for text in texts:
            named = dict(zip(LABELS, shares_for(text), strict=True))
            writer.writerow([*(named[name] for name in order), text])
    return path


def plain_logits(folder, texts, order=LABELS):
    """What transformers says without this package, one text at a time, in alphabetical order of the labels."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    columns = [model.config.label2id[name] for name in order]
    with torch.no_grad():
        return np.array([model(**tokenizer(t, return_tensors="pt")).logits[0].numpy()[columns] for t in texts])


def softmax(logits):
    shares = np.exp(np.asarray(logits, dtype=np.float64) - np.max(logits, axis=1, keepdims=True))
    return shares / shares.sum(axis=1, keepdims=True)


def test_three_teachers_of_other_families_and_label_orders(tiny_data, tiny_checkpoint, taught, tmp_path):
    bert = tiny_checkpoint("bert", "classifier")
    gpt = tiny_checkpoint("gpt2", "classifier", labels=OTHER_ORDER, seed=4)
    file = write_answers(tmp_path / "llm.csv", every_text(tiny_data)[::-1], order=OTHER_ORDER)
    own = ["--teacher_name_or_path", f"{bert},{gpt}", "--teacher_file", file, "--teacher_weights", "0.5,0.2,0.3"]
    own += ["--unlabelled_file", tiny_data.unlabelled, "--unlabelled_rows", "20"]
    run = finished("distill", tmp_path / "out", *words(tiny_data, *own))
    told = run.report["checks"]["teacher"]
    assert [found["weight"] for found in told["teachers"]] == [0.5, 0.2, 0.3]
    texts, logits, _, _ = taught[0]
    assert len(texts) == told["rows"] == 52
    answers = [plain_logits(bert, texts), plain_logits(gpt, texts), np.log([shares_for(text) for text in texts])]
    mixed = sum(
        found["weight"] * softmax(answer / found["temperature"])
        for found, answer in zip(told["teachers"], answers, strict=True)
    )
    np.testing.assert_allclose(softmax(logits), mixed, atol=2e-5)
    names = [arm["name"] for arm in run.report["arms"]]
    assert names == ["teacher 1", "teacher 2", "teacher 3", "teacher", "distilled", "majority class"]
    assert run.arm("teacher 2")["details"]["weight"] == 0.2
    assert run.arm("teacher 2")["rows_per_second"] > 0
    rows = rows_of(tiny_data.test)
    best = [LABELS[shares_for(row["text"]).argmax()] for row in rows]
    accuracy = np.mean([name == row["label"] for name, row in zip(best, rows, strict=True)])
    assert run.arm("teacher 3")["metrics"]["test"]["accuracy"] == pytest.approx(accuracy)
    assert list(run.run["parents"]) == ["teacher 1", "teacher 2", "teacher 3"]
    for name in ("run.json", "report.json", "README.md"):
        for place in (bert, gpt, tmp_path):
            assert str(place) not in (run.folder / name).read_text(), name
    assert run.run["parents"]["teacher 3"]["name"] == "llm.csv"
    assert set(told["teachers"][0]) >= {"name", "weight", "temperature", "validation_loss", "computed"}
    kept = run.arm("distilled")["metrics"]["test"]["accuracy"] / run.arm("teacher")["metrics"]["test"]["accuracy"]
    assert told["retention"] == pytest.approx(kept)


def test_learnt_weights_and_a_list_of_teachers(tiny_data, tiny_checkpoint, tmp_path):
    bert = tiny_checkpoint("bert", "classifier")
    config = tmp_path / "own.yaml"
    other = tiny_checkpoint("bert", "classifier", seed=1)
    config.write_text(f"teacher_name_or_path:\n  - {bert}\n  - {other}\nteacher_weights: learnt\n")
    folder = tmp_path / "cache"
    report = run_recipe(config, tmp_path / "out", words(tiny_data, "--teacher_cache", folder))
    told = report["checks"]["teacher"]
    assert told["weights_from"] == "learnt"
    assert sum(found["weight"] for found in told["teachers"]) == pytest.approx(1)
    assert len(list(folder.glob("*/manifest.json"))) == 2, "each teacher has a cache of its own"
    assert any("learnt" in arm["description"] for arm in report["arms"] if arm["name"] == "teacher")


def test_one_cache_folder_serves_any_number_of_teachers(tiny_data, tiny_checkpoint, tmp_path):
    bert, gpt = tiny_checkpoint("bert", "classifier"), tiny_checkpoint("gpt2", "classifier")
    nli = tiny_checkpoint("bert", "classifier", labels=NLI)
    cache = ["--teacher_cache", tmp_path / "cache"]

    def computed(folder, *own):
        checks = finished("distill", tmp_path / folder, *words(tiny_data, *cache, *own)).report["checks"]
        told = checks.get("last_teacher", checks["teacher"])
        return [told["computed"]] if "teachers" not in told else [each["computed"] for each in told["teachers"]]

    both = ["--teacher_name_or_path", f"{bert},{gpt}", "--zero_shot_teacher", nli]
    assert computed("several", *both) == [32, 32, 32]
    assert computed("one", "--teacher_name_or_path", gpt) == [0]
    assert computed("chain", "--teacher_name_or_path", bert, "--generations", "2") == [32]
    assert len(list((tmp_path / "cache").glob("*/manifest.json"))) == 4, "that of the first generation is the fourth"
    assert not list((tmp_path / "cache").glob("*.*"))


def run_recipe(config, folder, rest):
    """The report of a run with a YAML file."""
    load_recipe("distill").main([str(config), "--output_dir", str(folder), *rest])
    return json.loads((folder / "report.json").read_text())


def test_a_file_alone_may_leave_rows_out(tiny_data, tiny_checkpoint, taught, tmp_path):
    """Labelled rows that nobody teaches keep their label; unlabelled ones go."""
    texts = every_text(tiny_data)
    known = [*texts[:240:2], *texts[400:405]]
    file = write_answers(tmp_path / "llm.csv", known)
    own = ["--teacher_file", file, "--model_name_or_path", tiny_checkpoint("bert")]
    own += ["--unlabelled_file", tiny_data.unlabelled]
    message = refused("distill", tmp_path / "out", *words(tiny_data, *own))
    assert "says nothing about" in message
    assert "--teacher_file_partial true" in message
    own += ["--teacher_file_partial", "true"]
    asked = [*tiny_words(tiny_data, steps=2), *QUICKLY[2:], *map(str, own)]
    run = finished("distill", tmp_path / "out", *asked)
    assert run.arm("control")["description"].endswith("from bert-base"), "a file has no weights to start from"
    rows, logits, _, transfer = taught[0]
    for text, row in zip(rows, logits, strict=True):
        assert np.isnan(row).all() == (text not in known)
        if text in known:
            np.testing.assert_allclose(softmax(row[None])[0], shares_for(text), atol=1e-5)
    told = run.report["checks"]["teacher"]
    assert told["untaught"] == sum(text not in known for text in rows)
    assert "teacher" not in [arm["name"] for arm in run.report["arms"]], "it does not answer the test rows"
    assert told["retention"] is None
    assert transfer.unlabelled == 5
    assert transfer.kept_N.sum() == 32 + 5


def test_rows_that_are_not_taught_do_not_count(tiny_data, tiny_checkpoint, tmp_path, caplog):
    """A partial file leaves all but 5 unlabelled texts out; a trial is a quarter of what is trained."""
    texts = every_text(tiny_data)
    file = write_answers(tmp_path / "llm.csv", [*texts[:240:2], *texts[400:405]])
    own = ["--teacher_file", file, "--teacher_file_partial", "true", "--unlabelled_file", tiny_data.unlabelled]
    own += ["--model_name_or_path", tiny_checkpoint("bert"), "--student_layers", "trial", "--student_num_layers", "2"]
    own += ["--per_device_train_batch_size", "4", "--transfer_curve", "0,50,all", "--control_arm", "false"]
    run = finished("distill", tmp_path / "out", *tiny_words(tiny_data, epochs=1), *map(str, own))
    assert run.arm("distilled")["details"]["steps"] == 62  # 245 rows
    assert run.report["checks"]["student_layers"]["steps"] == 16
    assert [point["unlabelled_rows"] for point in run.report["checks"]["transfer_curve"]] == [0, 5]
    assert "no point for 50: the teacher answers for 5 unlabelled texts" in caplog.text


def test_sentence_states_are_compared_with_those_of_training_rows(tiny_data, tiny_checkpoint, tmp_path, monkeypatch):
    seen, real = [], load_recipe("distill").TeacherStates

    def states(*arguments):
        seen.append(real(*arguments))
        return seen[-1]

    monkeypatch.setattr(load_recipe("distill"), "TeacherStates", states)
    own = ["--teacher_name_or_path", tiny_checkpoint("bert", "classifier"), "--unlabelled_file", tiny_data.unlabelled]
    finished("distill", tmp_path / "out", *words(tiny_data, *own, "--similarity_weight", "1"))
    assert len(seen[0].others_KH) == 32
    assert len(seen[0].columns["teacher_states"]) > 32


def test_disagreements_are_of_all_rows_that_the_teacher_answered(tiny_data, tiny_checkpoint, taught, tmp_path):
    """Of all splits, though it leaves out rows of each and has no score; held against what the student says itself."""
    named = [row["text"] for path in (tiny_data.train, tiny_data.validation, tiny_data.test) for row in rows_of(path)]
    known = [*named[::2], *tiny_data.unlabelled.read_text().splitlines()[:40]]
    own = ["--teacher_file", write_answers(tmp_path / "llm.csv", known), "--teacher_file_partial", "true"]
    own += ["--unlabelled_file", tiny_data.unlabelled, "--model_name_or_path", tiny_checkpoint("bert")]
    run = finished("distill", tmp_path / "out", *words(tiny_data, *own, "--disagreements", "true"))
    assert "retention" not in run.report["checks"]
    lines = [json.loads(line) for line in (run.folder / "disagreements.jsonl").read_text().splitlines()]
    labelled = taught[0][0][:32]
    asked = {
        "train": labelled,
        "unlabelled": taught[0][0][32:],
        "validation": [row["text"] for row in rows_of(tiny_data.validation)],
        "test": [row["text"] for row in rows_of(tiny_data.test)],
    }
    for split, texts in asked.items():
        answered = [text for text in texts if text in known]
        assert 0 < len(answered) < len(texts)
        says = plain_logits(run.folder, answered).argmax(axis=1)
        differ = [text for text, best in zip(answered, says, strict=True) if shares_for(text).argmax() != best]
        assert sorted(line["text"] for line in lines if line["split"] == split) == sorted(differ), split
        assert differ
    for line in lines:
        assert line["teacher"] == LABELS[shares_for(line["text"]).argmax()]
        assert (line["label"] is None) == (line["split"] == "unlabelled")
        place = {"validation": tiny_data.validation, "test": tiny_data.test}.get(line["split"])
        assert place is None or rows_of(place)[line["row"] - 1]["text"] == line["text"]


@pytest.mark.parametrize("target", ["min_retention", "min_class_retention", "search"])
def test_a_target_that_needs_a_score_is_refused_before_the_student_trains(
    target, tiny_data, tiny_checkpoint, tmp_path, monkeypatch
):
    trained = []
    monkeypatch.setattr(arms_module, "prepare_arm", lambda **arguments: trained.append(arguments))
    file = write_answers(tmp_path / "llm.csv", [row["text"] for row in rows_of(tiny_data.train)])
    own = ["--teacher_file", file, "--model_name_or_path", tiny_checkpoint("bert"), "--disagreements", "true"]
    own += ["--search", "true", "--search_budget", "50"] if target == "search" else [f"--{target}", "0.5"]
    message = refused("distill", tmp_path / "out", *words(tiny_data, *own))
    assert f"{target}: needs a teacher that answers all validation and test rows" in message
    assert trained == []
    assert not (tmp_path / "out").exists()


def test_a_mixture_whose_file_lacks_the_test_texts_is_not_scored(tiny_data, tiny_checkpoint, tmp_path):
    """On the test rows the mixture would be the other teacher alone."""
    texts = [row["text"] for path in (tiny_data.train, tiny_data.validation) for row in rows_of(path)]
    own = ["--teacher_file", write_answers(tmp_path / "llm.csv", texts)]
    own += ["--teacher_name_or_path", tiny_checkpoint("bert", "classifier"), "--student_num_layers", "1"]
    run = finished("distill", tmp_path / "out", *words(tiny_data, *own))
    assert [arm["name"] for arm in run.report["arms"]] == ["teacher 1", "distilled", "majority class"]
    own += ["--min_retention", "0.3"]
    message = refused("distill", tmp_path / "gated", *words(tiny_data, *own))
    assert "min_retention: needs a teacher that answers all validation and test rows" in message


def test_weights_that_the_file_cannot_find_are_refused(tiny_data, tiny_checkpoint, tmp_path):
    file = write_answers(tmp_path / "llm.csv", every_text(tiny_data)[:240])
    own = ["--teacher_file", file, "--teacher_name_or_path", tiny_checkpoint("bert", "classifier")]
    message = refused("distill", tmp_path / "out", *words(tiny_data, *own, "--teacher_weights", "learnt"))
    assert "texts of the validation rows, which find the weights" in message
    assert not (tmp_path / "out").exists()


def test_a_zero_shot_teacher_reads_no_label(tiny_data, tiny_checkpoint, taught, tmp_path):
    """An entailment model made of random weights; it says the same when the labels of the rows are changed."""
    nli = tiny_checkpoint("bert", "classifier", labels=NLI)
    own = ["--zero_shot_teacher", nli, "--model_name_or_path", tiny_checkpoint("bert")]
    run = finished("distill", tmp_path / "out", *words(tiny_data, *own))
    texts, logits, labels, _ = taught[0]
    model = AutoModelForSequenceClassification.from_pretrained(nli).eval()
    tokenizer = AutoTokenizer.from_pretrained(nli)
    with torch.no_grad():
        pairs = [tokenizer(texts[3], f"This text is about {name}.", return_tensors="pt") for name in LABELS]
        expected = [float(model(**pair).logits[0, 1]) for pair in pairs]
    np.testing.assert_allclose(logits[3], expected, atol=1e-5)
    assert "teacher" in [arm["name"] for arm in run.report["arms"]]
    assert run.run["parents"]["teacher"]["hypotheses"]["food"] == "This text is about food."
    swapped = [{"text": text, "label": LABELS[label - 1]} for text, label in zip(texts, labels, strict=True)]
    other = replace(tiny_data, train=write_csv(tmp_path / "swapped.csv", swapped))
    finished("distill", tmp_path / "two", *words(other, *own))
    again = dict(zip(taught[1][0], taught[1][1].tolist(), strict=True))
    assert [again[text] for text in texts] == logits.tolist()
    message = refused("distill", tmp_path / "windows", *words(tiny_data, *own, "--long_texts", "sliding_window"))
    assert "long_texts: a zero-shot teacher reads the beginning" in message
    message = refused("distill", tmp_path / "three", *words(tiny_data, "--zero_shot_teacher",
                                                            tiny_checkpoint("bert", "classifier")))  # fmt: skip
    assert "mean entailment; one is needed" in message


def test_assistants_and_generations_teach_each_other(tiny_data, tiny_checkpoint, taught, tmp_path, monkeypatch):
    teacher = tiny_checkpoint("bert", "classifier")
    trained = {}
    scored = arms_module._scored

    def keep(name, seed, model, tokenizer, *rest):
        trained[name] = (model, tokenizer)
        return scored(name, seed, model, tokenizer, *rest)

    monkeypatch.setattr(arms_module, "_scored", keep)
    own = ["--teacher_name_or_path", teacher, "--assistant_num_layers", "3,2", "--student_num_layers", "1"]
    own += ["--generations", "2", "--contradiction_weight", "0.5", "--learning_rate", "3e-3"]
    plan = [word for word in words(tiny_data) if word not in ("--learning_rate", "1e-3")]
    run = finished("distill", tmp_path / "out", *plan, *own)
    names = [arm["name"] for arm in run.report["arms"]]
    assert names == ["teacher", "assistant-3", "assistant-2", "generation-1", "distilled", "majority class"]
    assert list(trained) == ["assistant-3", "assistant-2", "generation-1", "distilled"]
    layers = [trained[name][0].config.num_hidden_layers for name in trained]
    assert layers == [3, 2, 1, 1]
    texts = taught[0][0]
    np.testing.assert_allclose(taught[0][1], plain_logits(teacher, texts), atol=1e-5)
    for name, (_, logits, _, _) in zip(list(trained)[:3], taught[1:], strict=True):
        model, tokenizer = trained[name]
        with torch.no_grad():
            pair = [model(**tokenizer(text, return_tensors="pt")).logits[0].numpy() for text in texts[:3]]
        np.testing.assert_allclose(logits[:3], pair, atol=1e-4)
    assert run.arm("generation-1")["description"].endswith("taught by assistant-2")
    assert run.arm("distilled")["description"].endswith("taught by generation-1")
    split = taught[-1][3].split(type("Plan", (), {"contradiction_weight": 0.5})())(trained["distilled"][1])
    _, logits, labels, _ = taught[-1]
    assert split.train.columns["teacher_weights"].tolist() == [
        0.5 if wrong else 1.0 for wrong in logits.argmax(axis=1) != labels
    ]
    assert run.report["checks"]["last_teacher"]["contradicted"] == (logits.argmax(axis=1) != labels).sum() > 0
    first = taught[0][1].argmax(axis=1) != labels
    assert run.report["checks"]["teacher"]["contradicted"] == first.sum()


@pytest.mark.parametrize(
    ("own", "told"),
    [
        (["--assistant_num_layers", "4"], "4 is not below the 4 layers of the teacher"),
        (["--assistant_num_layers", "2"], "2 is not above the 2 layers of the student"),
        (["--transfer_curve", "0,500", "--unlabelled_file", "UNLABELLED"], "500 is more than the"),
        (["--unlabelled_rows", "500", "--unlabelled_file", "UNLABELLED"], "unlabelled_rows: 500 is more than the"),
    ],
)
def test_what_does_not_fit_the_data_is_refused(own, told, tiny_data, tiny_checkpoint, tmp_path):
    own = [tiny_data.unlabelled if word == "UNLABELLED" else word for word in own]
    teacher = ["--teacher_name_or_path", tiny_checkpoint("bert", "classifier")]
    assert told in refused("distill", tmp_path / "out", *words(tiny_data, *teacher, *own))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("own", "told"),
    [
        (["--teacher_weights", "learnt"], "teacher_weights: does nothing with one teacher"),
        (["--teacher_name_or_path", "a,b", "--teacher_weights", "0.5,0.3,0.2"], "3 numbers for 2 teachers"),
        (["--teacher_name_or_path", "a,b", "--teacher_weights", "0.5,0.6"], "they sum to 1.1"),
        (["--teacher_name_or_path", "a,b", "--teacher_weights", "best"], "'best' is not one of uniform"),
        (["--teacher_name_or_path", "a,a"], "named twice: a"),
        (["--teacher_name_or_path", "a", "--teacher_folds", "3"], "cannot be combined with teacher_name_or_path"),
        (["--teacher_file", "x.csv", "--teacher_folds", "3"], "cannot be combined with teacher_file"),
        (["--teacher_folds", "1"], "teacher_folds: 1 is not 0 or above 1"),
        (["--assistant_num_layers", "3,4"], "must descend"),
        (["--assistant_num_layers", "three"], "'three' is not a number of layers"),
        (["--generations", "0"], "generations: 0 is below 1"),
        (["--mixed_texts", "-1"], "mixed_texts: -1 is below 0"),
        (["--mixed_texts", "2", "--teacher_file", "x.csv"], "mixed_texts: teacher_file cannot hold answers to texts"),
        (
            ["--mixed_texts", "2", "--teacher_file", "x.csv", "--teacher_name_or_path", "a"],
            "that the run makes; with teacher_file_partial the other teachers answer them",
        ),
        (["--contradiction_weight", "1.5"], "contradiction_weight: 1.5 is not between 0 and 1"),
        (["--transfer_curve", "0,all"], "transfer_curve: has no effect without --unlabelled_file"),
        (["--teacher_file_partial", "true"], "teacher_file_partial: has no effect without --teacher_file"),
        (["--label_descriptions", "x"], "label_descriptions: has no effect without --zero_shot_teacher"),
        (["--zero_shot_teacher", "x", "--hypothesis_template", "about"], "does not hold one {} for the label"),
        (["--teacher_weight_tau", "0.5"], "teacher_weight_tau: has no effect without --teacher_weights"),
        (["--unlabelled_file", "x", "--transfer_curve", "0,some"], "is not a list of numbers"),
        (["--teacher_file", "x.csv", "--teacher_learning_rate", "1e-3"], "does nothing beside teacher_file"),
        (["--teacher_num_train_epochs", "3"], "teacher_num_train_epochs: does nothing beside max_steps"),
        (["--teacher_file", "x.csv", "--teacher_cache", "c"], "teacher_cache: does nothing beside teacher_file alone"),
        (["--teacher_file", "x.csv", "--hidden_weight", "1"], "need one teacher, a classifier"),
        (["--generations", "2", "--similarity_weight", "1"], "need one teacher, a classifier"),
        (["--generations", "2", "--search", "true"], "generations: search tries students"),
        (["--self_distillation", "ema", "--teacher_file", "x.csv"], "teacher_file: needs another teacher than"),
    ],
)
def test_options_that_do_not_go_together(own, told, tiny_data, tmp_path):
    assert told in refused("distill", tmp_path / "out", *words(tiny_data), *own)


def test_out_of_fold_logits_and_their_resumption(tiny_data, tiny_checkpoint, taught, tmp_path, monkeypatch):
    own = ["--model_name_or_path", tiny_checkpoint("bert"), "--teacher_folds", "2"]
    own += ["--unlabelled_file", tiny_data.unlabelled, "--unlabelled_rows", "10", "--save_strategy", "no"]
    own += ["--load_best_model_at_end", "false", "--eval_strategy", "no"]
    prepared, prepare = [], arms_module.prepare_arm
    scored, found = arms_module._scored, {}

    def count(**arguments):
        prepared.append(arguments["identity"].facts["arm"])
        if prepared.count("teacher-fold-2-of-2") == 1 and prepared[-1] == "teacher-fold-2-of-2":
            raise KeyboardInterrupt
        return prepare(**arguments)

    def keep(name, seed, *rest):
        found[name] = scored(name, seed, *rest)
        return found[name]

    monkeypatch.setattr(arms_module, "prepare_arm", count)
    monkeypatch.setattr(arms_module, "_scored", keep)
    plan = words(tiny_data, *own)
    broken_off = None
    try:
        broken_off = call("distill", tmp_path / "out", *plan)
    except KeyboardInterrupt:
        pass
    assert broken_off is None or broken_off.code != 0
    assert prepared == ["teacher", "teacher-fold-1-of-2", "teacher-fold-2-of-2"]
    prepared.clear()
    prepared.append("teacher-fold-2-of-2")
    run = finished("distill", tmp_path / "out", *plan, "--resume_from_checkpoint", "true")
    assert prepared[1:] == ["teacher-fold-2-of-2", "distilled"], "finished ones are not trained again"
    texts, logits, _, _ = taught[-1]
    folds = [found[f"teacher-fold-{number}-of-2"] for number in (1, 2)]
    assert len(folds[0].test_logits) + len(folds[1].test_logits) == 32
    by_fold = np.concatenate([fold.test_logits for fold in folds])
    assert sorted(map(tuple, by_fold.tolist())) == sorted(map(tuple, logits[:32].tolist()))
    seen = plain_logits(run.folder / "teacher", texts)
    np.testing.assert_allclose(logits[32:], seen[32:], atol=1e-5)
    assert np.abs(logits[:32] - seen[:32]).max(axis=1).min() > 1e-5, "no row is taught by the model that has seen it"
    assert run.report["checks"]["teacher"]["folds"] == 2
    assert run.report["checks"]["teacher"]["rows"] == len(texts)
    assert 0 <= run.report["checks"]["teacher"]["out_of_fold"]["accuracy"] <= 1


def test_the_transfer_curve(tiny_data, tiny_checkpoint, taught, tmp_path):
    own = ["--teacher_name_or_path", tiny_checkpoint("bert", "classifier"), "--unlabelled_file", tiny_data.unlabelled]
    run = finished("distill", tmp_path / "out", *words(tiny_data, *own, "--transfer_curve", "all,0,40"))
    points = run.report["checks"]["transfer_curve"]
    total = run.report["data"]["rows"]["unlabelled"]
    assert [point["unlabelled_rows"] for point in points] == [0, 40, total]
    assert [point["steps"] for point in points] == [2, 2, 2]
    assert points[-1]["test"] == run.arm("distilled")["metrics"]["test"]
    assert points[1]["validation"] == run.arm("distilled, 40 unlabelled")["metrics"]["validation"]
    assert (run.folder / "transfer_curve.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    rows = taught[0][3]
    draws = [rows._drawn(size) for size in (0, 40, 60, None)]
    assert [draw[32:].sum() for draw in draws] == [0, 40, 60, total]
    assert all(draw[:32].all() for draw in draws)
    assert not (draws[1] & ~draws[2]).any(), "smaller draws lie in larger ones"


def test_bert_teaches_gpt(tiny_data, tiny_checkpoint, taught, tmp_path):
    teacher, student = tiny_checkpoint("bert", "classifier"), tiny_checkpoint("gpt2")
    own = ["--teacher_name_or_path", teacher, "--student_name_or_path", student]
    run = finished("distill", tmp_path / "out", *words(tiny_data, *own))
    assert AutoConfig.from_pretrained(run.folder).model_type == "gpt2"
    texts, logits, _, _ = taught[0]
    np.testing.assert_allclose(logits, plain_logits(teacher, texts), atol=1e-5)


def test_edited_copies_are_taught_by_what_they_say(tiny_data, tiny_checkpoint, taught, tmp_path):
    teacher = tiny_checkpoint("bert", "classifier")
    own = ["--teacher_name_or_path", teacher, "--augmentation", "deletion,swap"]
    finished("distill", tmp_path / "out", *words(tiny_data, *own))
    texts, logits, _, _ = taught[0]
    assert len(texts) > 40
    np.testing.assert_allclose(logits, plain_logits(teacher, texts), atol=1e-5)
    message = refused("distill", tmp_path / "no", *words(tiny_data, "--augmentation", "swap", "--teacher_folds", "2",
                                                         "--model_name_or_path", tiny_checkpoint("bert")))  # fmt: skip
    assert "teacher_folds: cannot be combined with augmentation" in message


def test_a_file_has_no_answers_to_edited_copies(tiny_data, tiny_checkpoint, tmp_path):
    known = [row["text"] for row in rows_of(tiny_data.train)]
    own = ["--teacher_file", write_answers(tmp_path / "llm.csv", known), "--augmentation", "swap"]
    own += ["--student_name_or_path", tiny_checkpoint("bert")]
    message = refused("distill", tmp_path / "no", *words(tiny_data, *own))
    assert "augmentation: teacher_file cannot hold answers to edited copies" in message
    assert "--teacher_file_partial true" in message
    finished("distill", tmp_path / "out", *words(tiny_data, *own, "--teacher_file_partial", "true"))


@pytest.mark.parametrize("kind", [MULTI_LABEL, REGRESSION])
def test_other_tasks(kind, tiny_checkpoint, taught, tmp_path):
    """Multi-label: the mean of each label's probability; numbers: the weighted mean."""
    rows, several = make_rows(48, seed=6), kind == MULTI_LABEL
    path = tmp_path / "rows.jsonl"
    labels = [[row["label"], LABELS[0]] if several else len(row["text"]) / 40 for row in rows]
    lines = [{"text": row["text"], "label": label} for row, label in zip(rows, labels, strict=True)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    names = LABELS if several else ("label",)
    models = [
        tiny_checkpoint("bert", "classifier", labels=names, problem_type=kind, seed=seed, num_labels=len(names))
        for seed in (0, 1)
    ]
    given = [*QUICK, "--train_file", path, "--problem_type", kind, *QUICKLY[:2], *QUICKLY[4:], "--max_steps", "2"]
    own = ["--teacher_name_or_path", f"{models[0]},{models[1]}", "--teacher_weights", "0.75,0.25"]
    run = finished("distill", tmp_path / "out", *given, *own)
    texts, logits, _, _ = taught[0]
    told = run.report["checks"]["teacher"]["teachers"]
    answers = [plain_logits(model, texts, names) for model in models]
    if several:
        answers = [1 / (1 + np.exp(-a / found["temperature"])) for a, found in zip(answers, told, strict=True)]
        logits = 1 / (1 + np.exp(-logits.astype(np.float64)))
    np.testing.assert_allclose(logits, 0.75 * answers[0] + 0.25 * answers[1], atol=1e-4)
    if not several:
        message = refused("distill", tmp_path / "no", *given, *own, "--contradiction_weight", "0.5")
        assert "contradiction_weight: means nothing for a regression" in message


def test_contradictions():
    logits = np.array([[2.0, 1.0], [2.0, 1.0], [np.nan, np.nan]])
    assert contradicts(SINGLE_LABEL, logits, np.array([0, 1, 1])).tolist() == [False, True, False]
    gold = np.array([[1.0, 1.0], [0.0, 1.0], [0.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    several = np.array([[2.0, 1.0], [2.0, 1.0], [-2.0, -1.0], [-2.0, 1.0], [np.nan, np.nan]])
    assert contradicts(MULTI_LABEL, several, gold).tolist() == [False, True, False, True, False]
    assert not contradicts(REGRESSION, np.ones((2, 1)), np.array([5.0, 6.0])).any()
