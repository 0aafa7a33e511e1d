"""Edited copies of training rows: what an edit does, what is never added, and that nothing else changes."""

import random
from collections import Counter

import numpy as np
import pytest
from recipe_runs import finished, refused, tiny_words
from tiny import make_rows, write_csv

from nlpxfer.config import DataOptions, RunOptions, parse
from nlpxfer.config.augmentation import EDITS, Augmentation
from nlpxfer.data import DataRequest, load_data
from nlpxfer.data.augment import augment, edit_text
from nlpxfer.data.rows import Rows, normalise_text
from nlpxfer.errors import ConfigError

TEXT = "the quick  brown fox jumps\tover the lazy dog, twice; then it sleeps 1234 hours"  # 15 words


def rows_of(texts, labels=None, pairs=None):
    labels = labels or ["a"] * len(texts)
    return Rows(
        source="x.csv",
        name="x.csv",
        texts=texts,
        pairs=pairs,
        labels=labels,
        numbers=range(1, len(texts) + 1),
        lines=[2 * i for i in range(len(texts))],
    )


def edits_of(edit, share, text=TEXT, count=40):
    return [edit_text(text, edit, share, random.Random(seed)) for seed in range(count)]


# -- one edit


@pytest.mark.parametrize(("share", "swaps"), [(0.01, 1), (0.1, 2), (0.2, 3)])
def test_words_change_places(share, swaps):
    for made in edits_of("swap", share):
        assert Counter(made.split()) == Counter(TEXT.split())
        moved = sum(a != b for a, b in zip(made.split(), TEXT.split(), strict=True))
        assert moved <= 2 * swaps
    assert len(set(edits_of("swap", share))) > 10
    assert made.count("  ") == 1, "white space stays where it was"
    assert "\t" in made


@pytest.mark.parametrize(("share", "left_out"), [(0.01, 1), (0.1, 2), (0.5, 8), (1.0, 14)])
def test_words_are_left_out(share, left_out):
    words = TEXT.split()
    for made in edits_of("deletion", share):
        rest = iter(words)
        assert all(word in rest for word in made.split()), "in the same order"
        assert len(made.split()) == len(words) - left_out
        assert made == made.strip() != ""


@pytest.mark.parametrize("share", [0.01, 0.2])
def test_letters_are_mistyped(share):
    count = max(1, round(15 * share))
    kinds = Counter()
    for made in edits_of("typo", share, count=200):
        changed = [(a, b) for a, b in zip(TEXT.split(), made.split(), strict=True) if a != b]
        assert len(changed) <= count
        for before, after in changed:
            kinds[len(after) - len(before)] += 1
            assert before.strip(".,;").isalpha(), "numbers and signs stay"
            assert after
            assert {c for c in after if not c.isalpha()} == {c for c in before if not c.isalpha()}
            if len(after) == len(before):
                assert sorted(after) == sorted(before)
    assert set(kinds) == {-1, 0, 1}


@pytest.mark.parametrize(
    ("edit", "text"), [("swap", "word"), ("deletion", "word"), ("typo", "1 2 34 ..."), ("typo", "a b")]
)
def test_what_cannot_be_edited_stays(edit, text):
    assert set(edits_of(edit, 1.0, text)) == {text}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("text", ["a", "two words", "日本語のテキスト", "é" * 50, "  padded  text  ", "😀 😀"])
def test_no_edit_empties_a_text(edit, text):
    for made in edits_of(edit, 1.0, text):
        assert made.strip()
        assert "\0" not in made


# -- all rows


def test_copies_keep_label_and_row_number():
    made = make_rows(30, seed=2)
    train = rows_of([row["text"] for row in made], [row["label"] for row in made])
    found, not_made = augment(train, [], Augmentation(edits=EDITS, copies=3))
    assert (len(found), not_made) == (120, 0)
    assert list(found.texts[:30]) == list(train.texts)
    assert list(found.numbers[:30]) == list(train.numbers)
    counts = Counter(found.numbers)
    assert set(counts.values()) == {4}
    labels = {number: label for number, label in zip(train.numbers, train.labels, strict=True)}
    lines = {number: line for number, line in zip(train.numbers, train.lines, strict=True)}
    for number, label, line in zip(found.numbers, found.labels, found.lines, strict=True):
        assert (label, line) == (labels[number], lines[number])
    keys = found.keys()
    assert len(set(keys)) == len(keys), "no text twice"


def test_a_copy_depends_on_seed_and_text_only():
    texts = [row["text"] for row in make_rows(20, seed=2)]
    plan = Augmentation(edits=EDITS, copies=2, seed=5)

    def copies(of, plan=plan):
        found, _ = augment(rows_of(of), [], plan)
        return sorted(zip(found.numbers[len(of) :], found.texts[len(of) :], strict=True))

    random.seed(1)
    first = copies(texts)
    random.seed(2)
    assert copies(texts) == first
    assert sorted(text for _, text in copies(texts[::-1])) == sorted(text for _, text in first)
    assert {text for _, text in copies(texts[:5])} <= {text for _, text in first}
    assert copies(texts, Augmentation(edits=EDITS, copies=2, seed=6)) != first


def test_no_copy_reads_like_a_held_out_or_another_text():
    """'b a' is the only swap of 'a b'."""
    plan = Augmentation(edits=("swap",), copies=2)
    found, not_made = augment(rows_of(["a b"]), [], plan)
    assert list(found.texts) == ["a b", "b a"]
    assert not_made == 1, "the second copy would be the first"
    for held_out in ("b a", " B  A "):
        found, not_made = augment(rows_of(["a b"]), [rows_of(["z"]), rows_of([held_out])], plan)
        assert (list(found.texts), not_made) == (["a b"], 2)
    found, not_made = augment(rows_of(["a b", "b a"], ["x", "y"]), [], plan)
    assert (list(found.texts), not_made) == (["a b", "b a"], 4), "two labels for one text"


def test_of_a_pair_one_text_is_edited():
    texts, pairs = ["one two three", "word"], ["four five six", "seven eight"]
    found, not_made = augment(rows_of(texts, pairs=pairs), [], Augmentation(edits=("swap",), copies=6))
    sides = Counter()
    for number, text, pair in list(zip(found.numbers, found.texts, found.pairs, strict=True))[2:]:
        changed = (text != texts[number - 1], pair != pairs[number - 1])
        assert sum(changed) == 1
        sides[number, changed.index(True)] += 1
    assert min(sides[1, 0], sides[1, 1]) > 0, "now the one, now the other"
    assert sides[2, 1] == 1, "a single word cannot be swapped, so the other text is"
    assert sides[2, 0] == 0
    assert not_made == 12 - sides.total()


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({"augmentation": "swap,synonym"}, "augmentation: 'synonym' is not one of swap, deletion, typo"),
        ({"augmentation": ","}, "augmentation: want each of swap, deletion, typo once at most"),
        ({"augmentation": "swap,swap"}, "augmentation: want each of"),
        ({"augmentation": "swap", "augmentation_copies": 0}, "augmentation_copies: 0 is below 1"),
        ({"augmentation": "swap", "augmentation_share": 0.0}, "augmentation_share: 0.0 is not above 0"),
    ],
)
def test_settings_out_of_range(values, fault):
    with pytest.raises(ConfigError) as caught:
        DataOptions(**values, test_share=0.9)
    assert any(fault in each for each in caught.value.faults)
    assert len(caught.value.faults) == 2, "shown together with the others"


def test_copies_can_be_switched_off_on_the_command_line(tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text("augmentation: swap, typo\naugmentation_copies: 2\n")
    words = [str(file), "--output_dir", str(tmp_path)]
    on, off = (parse((DataOptions, RunOptions), [*words, *more])[0] for more in ([], ["--augmentation", "none"]))
    assert Augmentation.from_options(vars(on)) == Augmentation(edits=("swap", "typo"), copies=2)
    assert Augmentation.from_options(vars(off)) is None
    with pytest.raises(ConfigError, match="augmentation_copies: has no effect without --augmentation swap"):
        parse((DataOptions, RunOptions), ["--augmentation_copies", "2"])


# -- data and recipes


def test_only_training_rows_get_copies(tmp_path):
    made = list({row["text"]: row for row in make_rows(300, seed=4)}.values())
    parts = {"train": made[:100], "validation": made[100:140], "test": made[140:180]}
    files = {f"{split}_file": str(write_csv(tmp_path / f"{split}.csv", part)) for split, part in parts.items()}
    plain = load_data(DataRequest(**files))
    data = load_data(DataRequest(**files, augmentation=Augmentation(edits=EDITS, copies=2)))
    added = data.augmented["added"]
    assert data.augmented == {"edits": list(EDITS), "added": added, "not_made": 200 - added}
    assert len(data.train) == 100 + added
    assert added > 190
    assert data.train["text"][:100] == plain.train["text"][:]
    for split in ("validation", "test"):
        assert getattr(data, split)["text"][:] == getattr(plain, split)["text"][:]
    held_out = {normalise_text(row["text"]) for row in made[100:180]}
    assert not held_out & {normalise_text(text) for text in data.train["text"][100:]}
    assert data.leaks == plain.leaks
    assert data.contradictions == plain.contradictions
    assert data.fingerprint != plain.fingerprint
    assert data.facts()["rows"]["train"] == 100 + added
    assert (plain.augmented, plain.facts()["augmented"]) == ({}, {})


def test_copies_stay_out_of_validation_and_test(tmp_path):
    """A text of two words has one swap; four of the six are held out."""
    words = ["one", "two", "three", "four", "five", "six"]
    rows = [{"text": f"{word} {'ab'[i % 2]}x", "label": "ab"[i % 2]} for i, word in enumerate(words)]
    swapped = [{**row, "text": " ".join(row["text"].split()[::-1])} for row in rows]
    parts = {"train": rows, "validation": swapped[:2], "test": swapped[2:4]}
    files = {f"{split}_file": str(write_csv(tmp_path / f"{split}.csv", part)) for split, part in parts.items()}
    data = load_data(DataRequest(**files, augmentation=Augmentation(edits=("swap",))))
    assert data.train["text"][6:] == [row["text"] for row in swapped[4:]]
    assert data.augmented == {"edits": ["swap"], "added": 2, "not_made": 4}


def test_a_teacher_labels_the_copies(tiny_data, tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("NLPXFER_CACHE", str(tmp_path / "cache"))
    words = [*tiny_words(tiny_data, tiny_checkpoint("bert")), "--max_train_samples", "40", "--control_arm", "false"]
    run = finished(
        "distill", tmp_path / "out", *words, "--augmentation", "swap,deletion", "--augmentation_copies", "2"
    )
    report = run.report
    added = report["data"]["augmented"]["added"]
    assert 70 < added <= 80
    assert report["data"]["rows"]["train"] == 40 + added
    assert report["checks"]["teacher"]["rows"] == report["checks"]["teacher"]["computed"] == 40 + added
    assert report["data"]["rows"]["test"] == 80
    steps = {arm["name"]: arm["details"]["steps"] for arm in report["arms"] if arm["details"]}
    assert steps["distilled"] == int(np.ceil((40 + added) / 32))


def test_unknown_edits_are_refused(tiny_data, tmp_path):
    told = refused("distill", tmp_path / "out", *tiny_words(tiny_data), "--augmentation", "backtranslation")
    assert "augmentation: 'backtranslation' is not one of swap, deletion, typo" in told
