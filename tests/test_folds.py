"""Folds: dealt out evenly, no text on two sides, every row predicted by the one model that has not seen it."""

import csv
import json
import random
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from recipe_runs import KEYS, QUICK, call, files, finished, refused, tiny_words
from test_problem_types import LEARN, MULTI, NUMBERS, topic_rows
from tiny import FILLER, LABELS, TOPICS, build_tokenizer, write_csv

import nlpxfer.run
from nlpxfer.data.folds import make_folds
from nlpxfer.data.splits import iterative_folds, stratified_folds
from nlpxfer.data.tokenise import tokenise
from nlpxfer.errors import ConfigError, DataError
from nlpxfer.evaluate.arms import Splits
from nlpxfer.evaluate.folds import OutOfFold, predict_out_of_fold
from nlpxfer.hub import finished_files
from nlpxfer.problem import MULTI_LABEL, REGRESSION
from nlpxfer.report.out_of_fold import write_label_errors

# -- dealing rows out


@pytest.mark.parametrize("folds", [2, 3, 7])
def test_classes_are_spread_evenly(folds):
    labels = ["a"] * 50 + ["b"] * 23 + ["c"] * 8
    found = stratified_folds(labels, [f"text {i}" for i in range(81)], folds=folds, seed=1)
    for label in "abc":
        counts = Counter(fold for fold, of in zip(found, labels, strict=True) if of == label)
        assert max(counts.values()) - min(counts.values()) <= 1
        assert len(counts) == folds
    sizes = Counter(found).values()
    assert max(sizes) - min(sizes) <= 2


def test_equal_texts_share_a_fold_and_the_order_of_the_file_does_not_matter():
    keys = [f"text {i % 40}" for i in range(100)]
    labels = [i % 40 % 3 for i in range(100)]
    found = stratified_folds(labels, keys, folds=4, seed=5)
    by_key = dict(zip(keys, found, strict=True))
    assert [by_key[key] for key in keys] == found
    order = random.Random(0).sample(range(100), 100)
    shuffled = stratified_folds([labels[i] for i in order], [keys[i] for i in order], folds=4, seed=5)
    assert shuffled == [found[i] for i in order]
    assert stratified_folds(labels, keys, folds=4, seed=6) != found


def test_a_text_that_repeats_often_is_balanced_by_others():
    found = stratified_folds("a" * 24, ["often"] * 12 + [f"text {i}" for i in range(12)], folds=2, seed=0)
    assert Counter(found) == {0: 12, 1: 12}


def test_no_fold_is_empty():
    for folds in range(2, 7):
        assert set(stratified_folds("aaaabb", "uvwxyz", folds=folds, seed=0)) == set(range(folds))
    for folds in (1, 7):
        with pytest.raises(ValueError, match="between 2 and the 6 different texts"):
            stratified_folds("aaaabb", "uvwxyz", folds=folds, seed=0)


def folds_of(texts, labels, count=3, names="abcd"):
    return make_folds(texts, None, np.asarray(labels), names, count=count, seed=0)


def test_small_classes_are_handled_and_named(caplog):
    texts = [f"text {i}" for i in range(12)] + ["rare one", "Rare  One", "scarce one", "scarce two"]
    found = folds_of(texts, [0] * 6 + [1] * 6 + [2] * 2 + [3] * 2)
    assert found.unlearnt_N.tolist() == [False] * 12 + [True] * 2 + [False] * 2, "c stands in one fold only"
    assert "fewer different texts than the 3 folds, missing in some: c, d" in caplog.text
    assert "stand in one fold, so that its model has not learnt them: c" in caplog.text
    assert len(found.warnings) == 2
    assert folds_of(texts[:12], [0] * 6 + [1] * 6).warnings == ()


def test_what_cannot_be_dealt_out_is_refused():
    with pytest.raises(ConfigError, match="num_folds: 5 is more than the 4 different training texts"):
        folds_of(["a", "b", "c", "d", "A"], [0, 1, 0, 1, 0], count=5)
    with pytest.raises(ConfigError, match="without fold [12] the training rows have one class only"):
        folds_of(["a", "b", "c", "only"], [0, 0, 0, 1], count=2)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_labels_of_sets_are_spread_evenly(count):
    chooser = random.Random(count)
    sets = [
        [label for label, share in enumerate((0.6, 0.3, 0.1, 0.05)) if chooser.random() < share] for _ in range(400)
    ]
    keys = [f"text {i % 380}" for i in range(400)]
    found = iterative_folds(sets, keys, folds=count, seed=1)
    for label in range(4):
        held = Counter(fold for fold, of in zip(found, sets, strict=True) if label in of)
        assert max(held.values()) - min(held.values()) <= 3, label
    sizes = Counter(found)
    assert len(sizes) == count
    assert max(sizes.values()) - min(sizes.values()) <= 6
    by_key = dict(zip(keys, found, strict=True))
    assert [by_key[key] for key in keys] == found
    assert iterative_folds(sets, keys, folds=count, seed=2) != found


def test_a_label_of_one_fold_is_named_and_its_rows_are_known(caplog):
    texts, gold = [f"text {i}" for i in range(8)], np.zeros((8, 3))
    gold[:6, 0] = gold[0, 1] = 1
    folds = make_folds(texts, None, gold, "abc", count=2, seed=0, problem_type=MULTI_LABEL)
    assert folds.unlearnt_N.tolist() == [True] + [False] * 7
    assert "missing in some: b" in caplog.text
    assert "has not learnt them: b" in caplog.text


def test_numbers_are_spread_evenly():
    numbers = np.random.default_rng(0).gamma(2, size=300)
    texts = [f"text {i}" for i in range(300)]
    folds = make_folds(texts, None, numbers, ["score"], count=3, seed=0, problem_type=REGRESSION)
    means = [numbers[folds.fold_N == fold].mean() for fold in range(3)]
    assert max(means) - min(means) < 0.25 * numbers.std()
    assert not folds.unlearnt_N.any()
    assert folds.warnings == ()


# -- out of fold

TOKENIZER = build_tokenizer("bert")


def task(texts, labels):
    """Splits whose rows are these; validation and test are of no matter."""
    rows = tokenise(TOKENIZER, texts, max_length=16, labels=labels)
    return lambda tokenizer: Splits(rows, rows.select([0]), rows.select([1]))


def memorising(name, part, classes=4):
    """An arm that knows the rows it was trained on by heart, and nothing else."""
    splits = part(TOKENIZER)
    known = {
        bytes(row["input_ids"]): int(row["labels"]) for row in (splits.train[i] for i in range(len(splits.train)))
    }
    rows = [splits.test[i] for i in range(len(splits.test))]
    logits = np.zeros((len(rows), classes), dtype=np.float32)
    for logits_C, row in zip(logits, rows, strict=True):
        if bytes(row["input_ids"]) in known:
            logits_C[known[bytes(row["input_ids"])]] = 10
    return SimpleNamespace(test_logits=logits, train_seconds=1.5)


@pytest.fixture
def repeated():
    """60 texts, 20 of them twice (once with other blanks and case), labels at random."""
    chooser = random.Random(3)
    once = [" ".join(chooser.choices(FILLER, k=6)) for _ in range(60)]
    texts = [*once, *(f" {text.upper()}" for text in once[:20])]
    chooser.shuffle(texts)
    return texts, np.array([chooser.randrange(4) for _ in texts])


def test_no_row_is_predicted_by_a_model_that_knows_it(repeated):
    texts, labels = repeated
    folds = folds_of(texts, labels, count=5)
    found = predict_out_of_fold(folds, labels, task(texts, labels), memorising)
    assert not found.logits_NC.any()
    assert found.seconds == 7.5
    leaking = type(folds)(5, np.arange(len(texts)) % 5, folds.unlearnt_N, ())
    assert predict_out_of_fold(leaking, labels, task(texts, labels), memorising).logits_NC.any(), (
        "this test sees leaks"
    )


@pytest.mark.parametrize("seed", range(3))
def test_predictions_stand_beside_their_own_rows(repeated, seed):
    """An arm whose logits are a function of the row's tokens, and a shuffled file."""
    texts, labels = repeated
    order = np.random.default_rng(seed).permutation(len(texts))
    texts, labels = [texts[i] for i in order], labels[order]

    def telling(name, part):
        test = part(TOKENIZER).test
        sums = [[test[i]["input_ids"].sum(), test[i]["labels"], 0, 0] for i in range(len(test))]
        return SimpleNamespace(test_logits=np.asarray(sums, dtype=np.float32), train_seconds=0.0)

    found = predict_out_of_fold(folds_of(texts, labels, count=4), labels, task(texts, labels), telling)
    rows = tokenise(TOKENIZER, texts, max_length=16)
    assert found.logits_NC[:, 0].tolist() == [rows[i]["input_ids"].sum() for i in range(len(rows))]
    assert found.logits_NC[:, 1].tolist() == labels.tolist()


def test_other_rows_than_those_of_the_run_are_refused(repeated):
    texts, labels = repeated
    folds = folds_of(texts, labels)
    with pytest.raises(DataError, match="are not the training rows of the run"):
        predict_out_of_fold(folds, labels, task(texts[::-1], labels[::-1]), memorising)


def test_scores_by_hand():
    labels = np.array([0, 0, 1, 1, 1])
    folds = type(folds_of(list("uvwxyz"), [0, 0, 1, 1, 1, 1]))(
        2, np.array([0, 1, 0, 1, 1]), np.zeros(5, dtype=bool), ("said",)
    )

    def arm(name, part):
        logits = {"fold-1-of-2": [[2, 0], [0, 2]], "fold-2-of-2": [[0, 2], [0, 2], [2, 0]]}[name]
        return SimpleNamespace(test_logits=np.asarray(logits, dtype=np.float32), train_seconds=2.0)

    scores = predict_out_of_fold(folds, labels, task(list("uvwxy"), labels), arm).scores()
    assert [fold["rows"] for fold in scores["per_fold"]] == [2, 3]
    assert [fold["accuracy"] for fold in scores["per_fold"]] == pytest.approx([1, 1 / 3])
    assert scores["mean"]["accuracy"] == pytest.approx(2 / 3)
    assert scores["deviation"]["accuracy"] == pytest.approx((2 / 3) / 2**0.5)
    assert scores["pooled"]["accuracy"] == pytest.approx(3 / 5)
    assert (scores["folds"], scores["seconds"], scores["warnings"]) == (2, 4.0, ["said"])


def test_pairs(tmp_path):
    """Rows are the same if both texts are; and both stand in the list of label errors."""
    texts, pairs = ["one", "one", "one", "two", "Two", "three"], ["a", "b", "A", "c", "c", "d"]
    labels = np.array([0, 1, 0, 1, 1, 0])
    folds = make_folds(texts, pairs, labels, "xy", count=4, seed=0)
    assert folds.fold_N[0] == folds.fold_N[2] != folds.fold_N[1]
    assert folds.fold_N[3] == folds.fold_N[4]
    sure = np.where(np.arange(2) == labels[:, None], 2.0, -2.0).astype(np.float32)
    sure[5] *= -1
    found = OutOfFold(folds, labels, sure, 1.0)
    written = lines(write_label_errors(tmp_path, found, "xy", range(11, 17), texts, pairs))
    told = [(row["row"], row["text"], row["text_pair"], row["suggested"]) for row in written]
    assert told == [(16, "three", "d", "y")]


# -- the recipe

WORDS = [*QUICK, "--num_train_epochs", "3", "--learning_rate", "3e-3", "--pooling", "mean", "--control_arm", "false"]


def easy_rows(count, seed):
    """Rows of three words of a topic and one other: a tiny model learns them in a second."""
    chooser, rows = random.Random(seed), {}
    while len(rows) < count:
        label = chooser.choice(LABELS)
        text = " ".join([*chooser.choices(TOPICS[label], k=3), chooser.choice(FILLER)])
        rows[text] = {"text": text, "label": label}
    return list(rows.values())


@pytest.fixture(scope="module")
def small(tiny_checkpoint):
    return ["--model_name_or_path", tiny_checkpoint("bert", layers=1)]


@pytest.fixture(scope="module")
def noisy(tmp_path_factory, small):
    """A run with everything on, over 160 training rows of which 16 have a wrong label, and its fold models."""
    rows = easy_rows(300, seed=1)
    chooser = random.Random(0)
    train = [dict(row) for row in rows[:160]]
    wrong = set(chooser.sample(range(160), 16))
    for index in wrong:
        train[index]["label"] = chooser.choice([label for label in LABELS if label != train[index]["label"]])
    folder = tmp_path_factory.mktemp("noisy")
    parts = {"train": train, "validation": rows[160:230], "test": rows[230:]}
    data = SimpleNamespace(**{name: write_csv(folder / f"{name}.csv", part) for name, part in parts.items()})
    arms, plain = {}, nlpxfer.run.train_arm

    def train_arm(name, **options):
        arms[name] = plain(name, **options)
        return arms[name]

    words = [*WORDS, *small, *files(data), "--linear_probe_size", "0"]  # few steps, which start from a sure probe
    own = ["--num_folds", "3", "--abstain_precision", "0.9", "--error_report", "true", "--save_predictions", "true"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nlpxfer.run, "train_arm", train_arm)
        run = finished("finetune", folder / "out", *words, *own)
    return SimpleNamespace(run=run, rows=train, wrong=wrong, arms=arms, data=data, parts=parts, words=words)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_file_says_what_the_fold_models_say(noisy):
    """Each row through the model of its fold, by itself: rows, gold labels and probabilities belong together."""
    found = lines(noisy.run.folder / "predictions" / "out_of_fold.jsonl")
    assert [row["row"] for row in found] == list(range(1, 161))
    assert [row["label"] for row in found] == [row["label"] for row in noisy.rows]
    assert Counter(row["fold"] for row in found).keys() == {1, 2, 3}
    names = noisy.arms["fine-tuned"].model.config.id2label
    for row, own in zip(found, noisy.rows, strict=True):
        arm = noisy.arms[f"fold-{row['fold']}-of-3"]
        with torch.no_grad():
            logits_C = arm.model(**arm.tokenizer(own["text"], return_tensors="pt")).logits[0].double()
        shares = {names[i]: share for i, share in enumerate(logits_C.softmax(0).tolist())}
        assert row["probabilities"] == pytest.approx(shares, abs=2e-5)
        assert row["predicted"] == max(shares, key=shares.get)
        assert row["probability"] == row["probabilities"][row["predicted"]]


def test_the_report_has_the_scores_of_the_folds(noisy):
    found = lines(noisy.run.folder / "predictions" / "out_of_fold.jsonl")
    scores = noisy.run.report["checks"]["cross_validation"]
    right = {fold: [r["label"] == r["predicted"] for r in found if r["fold"] == fold] for fold in (1, 2, 3)}
    each = [np.mean(part) for part in right.values()]
    assert [fold["rows"] for fold in scores["per_fold"]] == [len(part) for part in right.values()]
    assert [fold["accuracy"] for fold in scores["per_fold"]] == pytest.approx(each)
    assert scores["mean"]["accuracy"] == pytest.approx(np.mean(each))
    assert scores["deviation"]["accuracy"] == pytest.approx(np.std(each, ddof=1))
    assert scores["pooled"]["accuracy"] == pytest.approx(np.mean(sum(right.values(), [])))
    assert scores["seconds"] == pytest.approx(sum(noisy.arms[f"fold-{k}-of-3"].train_seconds for k in (1, 2, 3)))
    assert scores["seed"] == 42


def test_planted_label_errors_are_found(noisy):
    found = lines(noisy.run.folder / "label_errors.jsonl")
    hits = [row["row"] - 1 in noisy.wrong for row in found]
    assert np.mean(hits) > 0.5, "by chance it would be 0.1"
    assert sum(hits) >= 12, "of 16"
    assert np.mean(hits[:8]) > 0.8
    assert [row["rank"] for row in found] == list(range(1, len(found) + 1))
    told = {row["row"]: row for row in lines(noisy.run.folder / "predictions" / "out_of_fold.jsonl")}
    for row in found:
        own = noisy.rows[row["row"] - 1]
        assert (row["text"], row["label"]) == (own["text"], own["label"])
        shares = told[row["row"]]["probabilities"]
        assert (row["label_probability"], row["suggested_probability"]) == (
            shares[row["label"]],
            shares[row["suggested"]],
        )
    assert noisy.run.report["checks"]["cross_validation"]["label_errors"]["rows"] == len(found)


def test_the_saved_model_is_the_one_of_all_rows(noisy, tmp_path):
    plain = finished("finetune", tmp_path / "plain", *noisy.words)
    saved = (noisy.run.folder / "model.safetensors").read_bytes()
    assert (plain.folder / "model.safetensors").read_bytes() == saved
    assert noisy.run.report["metrics"] == plain.report["metrics"]
    assert "cross_validation" not in plain.report["checks"]
    assert "abstain" not in plain.report["checks"]
    assert not (noisy.run.folder / "checkpoints").exists()
    assert not (plain.folder / "label_errors.jsonl").exists()
    assert not (plain.folder / "predictions" / "out_of_fold.jsonl").exists()


def test_the_error_report_of_a_run(noisy):
    found = json.loads((noisy.run.folder / "errors.json").read_text())
    assert list(found) == ["validation", "test"]
    temperature = json.loads((noisy.run.folder / "calibration.json").read_text())["temperature"]
    for split, part in found.items():
        scaled = torch.tensor(getattr(noisy.arms["fine-tuned"], f"{split}_logits")).double() / temperature
        sure = scaled.softmax(1).max(1).values
        for row in part["mistakes"]:
            assert row["probability"] == pytest.approx(float(sure[row["row"] - 1]), abs=1e-6), "calibrated"
        answers = noisy.run.logits_of(split)
        wrong = {row["row"] for row in answers if row["label"] != row["predicted"]}
        assert part["errors"] == len(wrong)
        assert {row["row"] for row in part["mistakes"]} == wrong
        for row in part["mistakes"]:
            assert noisy.parts[split][row["row"] - 1] == {"text": row["text"], "label": row["label"]}
    page = (noisy.run.folder / "errors.md").read_text()
    assert all(row["text"] in page for row in found["test"]["mistakes"])


def test_the_rule_for_abstaining_of_a_run(noisy):
    content = json.loads((noisy.run.folder / "calibration.json").read_text())
    rule, checks = content["abstain"], noisy.run.report["checks"]
    assert content["temperature"] == checks["calibration"]["temperature"]
    arm = noisy.arms["fine-tuned"]
    for split in ("validation", "test"):
        scaled = torch.tensor(getattr(arm, f"{split}_logits")).double() / content["temperature"]
        sure, best = scaled.softmax(1).max(1)
        right = [
            row["label"] == arm.model.config.id2label[int(i)] for row, i in zip(noisy.parts[split], best, strict=True)
        ]
        kept = sure.numpy() >= rule["min_probability"] - 1e-12
        assert checks["abstain"][split]["coverage"] == pytest.approx(kept.mean())
        assert checks["abstain"][split]["precision"] == pytest.approx(np.mean(np.asarray(right)[kept]))
        assert 0 < checks["risk_coverage"][split]["aurc_perfect_order"] < checks["risk_coverage"][split]["aurc"] < 0.5
    assert rule["precision"] == 0.9
    assert rule["coverage"] == checks["abstain"]["validation"]["coverage"]
    assert checks["abstain"]["validation"]["precision"] > 0.9


def test_no_text_of_the_data_is_ever_pushed(noisy):
    """Nothing that a push may send holds a text; what holds texts is not on the list."""
    sent = finished_files(noisy.run.folder)
    assert {"README.md", "report.json", "calibration.json"} <= set(sent)
    texts = [row["text"].encode() for part in noisy.parts.values() for row in part]
    for path in sent.values():
        content = path.read_bytes()
        assert not any(text in content for text in texts), path.name
    holding = {
        path.relative_to(noisy.run.folder).as_posix()
        for path in noisy.run.folder.rglob("*")
        if path.is_file() and any(text in path.read_bytes() for text in texts)
    }
    assert holding == {"errors.json", "errors.md", "label_errors.jsonl"}


def test_a_run_with_these_files_can_be_overwritten(noisy, tmp_path):
    import shutil

    shutil.copytree(noisy.run.folder, tmp_path / "out")
    again = finished("finetune", tmp_path / "out", *noisy.words, "--overwrite", "true")
    assert not (again.folder / "errors.json").exists()
    assert not (again.folder / "label_errors.jsonl").exists()


def test_models_that_learn_labels_by_heart_do_not_know_the_rows_held_out(tmp_path, small):
    """Labels at random, every text twice: fold models get their own rows right and the held-out ones by chance."""
    chooser = random.Random(7)
    once = [" ".join(chooser.choices(FILLER, k=5)) for _ in range(40)]
    own = [{"text": text, "label": chooser.choice(LABELS)} for text in once]
    rows = [*own, *({**row, "text": row["text"].upper()} for row in own)]
    chooser.shuffle(rows)
    other = write_csv(tmp_path / "other.csv", easy_rows(20, seed=3))
    data = SimpleNamespace(train=write_csv(tmp_path / "train.csv", rows), validation=other, test=other)
    arms, plain = {}, nlpxfer.run.train_arm

    def train_arm(name, **options):
        arm = plain(name, **options)
        splits = options["split"](arm.tokenizer)
        known = nlpxfer.run.predict(arm.model, splits.train, nlpxfer.run.Collator.for_tokenizer(arm.tokenizer))
        arms[name] = np.mean(known.argmax(axis=1) == splits.train.columns["labels"])
        return arm

    words = [*QUICK, *small, *files(data), "--num_train_epochs", "25", "--learning_rate", "5e-3", "--num_folds", "2"]
    words += ["--control_arm", "false", "--eval_strategy", "no", "--save_strategy", "no"]
    words += [
        "--load_best_model_at_end",
        "false",
        "--per_device_train_batch_size",
        "16",
        "--freeze_embeddings",
        "false",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nlpxfer.run, "train_arm", train_arm)
        run = finished("finetune", tmp_path / "out", *words)
    assert min(arms["fold-1-of-2"], arms["fold-2-of-2"]) > 0.9
    assert run.report["checks"]["cross_validation"]["pooled"]["accuracy"] < 0.5


def test_several_seeds_share_the_folds_of_the_first(noisy, tmp_path, small):
    words = [*WORDS, *small, *files(noisy.data), "--num_seeds", "2", "--num_folds", "2", "--max_train_samples", "40"]
    words[words.index("--num_train_epochs") + 1] = "1"
    run = finished("finetune", tmp_path / "out", *words)
    assert run.run["seeds"] == [42, 43]
    assert run.report["checks"]["cross_validation"]["seed"] == 42
    found = lines(run.folder / "predictions" / "out_of_fold.jsonl")
    assert len(found) == 40
    with noisy.data.train.open(newline="") as file:
        whole = list(csv.DictReader(file))
    assert [row["label"] for row in found] == [whole[row["row"] - 1]["label"] for row in found], "numbers of the file"


def test_a_checkpoint_that_knows_the_labels_already_is_named(noisy, tmp_path, caplog):
    at = WORDS.index("--num_train_epochs")
    words = [*WORDS[:at], *WORDS[at + 2 :], *files(noisy.data), "--num_folds", "2", "--max_steps", "1"]
    words.append("--model_name_or_path")
    finished("finetune", tmp_path / "out", *words, noisy.run.folder)
    assert "already classifies into these labels" in caplog.text


@pytest.mark.parametrize("key", KEYS)
def test_every_recipe_trains_on_folds_or_refuses(key, tmp_path, tiny_data, tiny_checkpoint):
    words = [
        *tiny_words(tiny_data, tiny_checkpoint("bert", layers=2), key=key),
        "--max_train_samples",
        "32",
        "--num_folds",
        "2",
    ]
    ended = call(key, tmp_path / "out", *words, "--control_arm", "false")
    if ended.code:
        assert "num_folds: has no effect here: the teacher has seen the rows held out" in ended.err
        assert not (tmp_path / "out").exists()
    else:
        assert len(lines(tmp_path / "out" / "predictions" / "out_of_fold.jsonl")) == 32


@pytest.fixture(scope="module")
def topics(tmp_path_factory):
    """Rows on any number of topics; of the first 30 training rows a label is missing or too much."""
    rows, folder, chooser = topic_rows(330, seed=5), tmp_path_factory.mktemp("topics"), random.Random(1)
    wrong = {}
    for index in range(30):
        given, label = set(filter(None, rows[index]["labels"].split("|"))), chooser.choice(sorted(TOPICS))
        wrong[index + 1] = (label, "remove" if label not in given else "add")
        rows[index]["labels"] = "|".join(sorted(given ^ {label}))
    parts = {"train": rows[:220], "validation": rows[220:275], "test": rows[275:]}
    data = SimpleNamespace(**{name: write_csv(folder / f"{name}.csv", part) for name, part in parts.items()})
    return SimpleNamespace(rows=parts["train"], wrong=wrong, data=data)


def test_labels_of_sets_that_look_wrong(topics, small, tmp_path):
    words = [*QUICK, *small, *files(topics.data), *MULTI, *LEARN, "--control_arm", "false"]
    run = finished("finetune", tmp_path / "out", *words, "--num_folds", "2")
    found = lines(run.folder / "predictions" / "out_of_fold.jsonl")
    assert [row["row"] for row in found] == list(range(1, 221))
    assert ["|".join(sorted(row["label"])) for row in found] == [row["labels"] for row in topics.rows]
    for row in found:
        assert row["predicted"] == {name: share for name, share in row["probabilities"].items() if share > 0.5}
    scores = run.report["checks"]["cross_validation"]
    hits = sum(len({*row["label"]} & {*row["predicted"]}) for row in found)
    total = sum(len(row["label"]) + len(row["predicted"]) for row in found)
    assert scores["pooled"]["micro_f1"] == pytest.approx(2 * hits / total)
    assert scores["pooled"]["micro_f1"] > 0.7
    told = lines(run.folder / "label_errors.jsonl")
    assert scores["label_errors"]["rows"] == len(told)
    right = [topics.wrong.get(row["row"]) == (row["label"], row["suggested"]) for row in told]
    assert np.mean(right[:10]) > 0.7, "by chance it would be 0.03"
    for row in told:
        own = topics.rows[row["row"] - 1]
        assert (row["text"], "|".join(sorted(row["labels"]))) == (own["text"], own["labels"])
        assert (row["label"] in row["labels"]) == (row["suggested"] == "remove")
        assert row["probability"] == found[row["row"] - 1]["probabilities"][row["label"]]


def test_numbers_out_of_fold(topics, small, tmp_path):
    words = [*QUICK, *small, *files(topics.data), *NUMBERS, "--control_arm", "false"]
    run = finished("finetune", tmp_path / "out", *words, "--num_folds", "3")
    found = lines(run.folder / "predictions" / "out_of_fold.jsonl")
    assert [row["label"] for row in found] == [float(row["score"]) for row in topics.rows]
    assert {row["fold"] for row in found} == {1, 2, 3}
    pooled = run.report["checks"]["cross_validation"]["pooled"]
    errors = [abs(row["label"] - row["predicted"]) for row in found]
    assert pooled["mean_absolute_error"] == pytest.approx(np.mean(errors), abs=1e-5)
    assert not (run.folder / "label_errors.jsonl").exists()
    assert "label_errors" not in run.report["checks"]["cross_validation"]


@pytest.mark.parametrize("kind", [MULTI, NUMBERS], ids=["labels", "numbers"])
def test_teachers_of_folds_in_other_kinds_of_task(kind, topics, small, tmp_path):
    words = [*QUICK, *small, *files(topics.data), *kind, "--max_train_samples", "60", "--num_train_epochs", "1"]
    own = ["--learning_rate", "1e-3", "--control_arm", "false", "--student_num_layers", "1"]
    run = finished("distill", tmp_path / "out", *words, *own, "--teacher_folds", "2")
    found = run.report["checks"]["teacher"]
    assert found["folds"] == 2
    assert found["out_of_fold"]["micro_f1" if kind is MULTI else "mean_absolute_error"] > 0


def test_refusals_come_before_anything_is_written(tmp_path, tiny_data, tiny_checkpoint):
    words = tiny_words(tiny_data, tiny_checkpoint("bert"))
    message = refused("finetune", tmp_path / "out", *words, "--num_folds", "241")
    assert "num_folds: 241 is more than the 240 different training texts" in message
    message = refused("finetune", tmp_path / "out", *words, "--abstain_precision", "0.99")
    assert "80 validation rows cannot show a precision of 0.99: 299 are needed" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("key", "option"), [("finetune", "num_folds"), ("distill", "teacher_folds")])
def test_a_fold_that_leaves_no_whole_batch_is_refused(key, option, tiny_data, tiny_checkpoint, tmp_path):
    words = [*tiny_words(tiny_data, tiny_checkpoint("bert"), key=key), "--max_train_samples", "16"]
    own = ["--per_device_train_batch_size", "16", "--dataloader_drop_last", "true", f"--{option}", "2"]
    message = refused(key, tmp_path / "out", *words, *own)
    assert "dataloader_drop_last: 8 training rows make no whole batch of 16" in message
    assert not (tmp_path / "out").exists()


def test_edited_copies_of_a_held_out_row_are_refused(tiny_data, tiny_checkpoint, tmp_path):
    words = [*tiny_words(tiny_data, tiny_checkpoint("bert")), "--num_folds", "3", "--augmentation", "swap"]
    assert "edited copies of a held-out row" in refused("finetune", tmp_path / "out", *words)
