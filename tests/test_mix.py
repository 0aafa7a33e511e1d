"""Mixtures of training texts: what they are made of, what they never are, and who says what they are worth."""

import json
import math
import random
import sys
from itertools import combinations

import numpy as np
import pytest
from recipe_runs import finished, refused, tiny_words
from tiny import make_rows, write_csv
from transformers import AutoTokenizer

from nlpxfer.classify import Classifier
from nlpxfer.config.augmentation import Augmentation
from nlpxfer.data import DataRequest, load_data
from nlpxfer.data.mix import SPANS, mix
from nlpxfer.data.rows import Rows, normalise_text
from nlpxfer.errors import DataError
from nlpxfer.recipes import load_recipe
from nlpxfer.teachers import TransferRows

COUNT = 10
NUMBERED = [[f"{row}.{word}" for word in range(COUNT)] for row in range(12)]
"""Rows whose words tell where they stood."""


def rows_of(texts, pairs=None, labels=None):
    return Rows(
        source="x.csv",
        name="x.csv",
        texts=texts,
        pairs=pairs,
        labels=labels or ["a"] * len(texts),
        numbers=[10 * (i + 1) for i in range(len(texts))],
        lines=None,
    )


def spans_of(text):
    """The spans that a mixture of `NUMBERED` rows is made of: row, first word and number of words of each."""
    places = [tuple(map(int, word.split("."))) for word in text.split()]
    cut = next(i for i in range(1, len(places)) if places[i][0] != places[i - 1][0])
    for part in (places[:cut], places[cut:]):
        words = [word for _, word in part]
        assert {row for row, _ in part} == {part[0][0]}
        assert words == list(range(words[0], words[0] + len(words))), "in a row"
    return [(part[0][0], part[0][1], len(part)) for part in (places[:cut], places[cut:])]


def test_a_mixture_is_a_span_of_a_row_and_a_span_of_another():
    train = rows_of([" ".join(words) for words in NUMBERED])
    mixed, not_made = mix(train, [], count=120, seed=1)
    assert len(mixed) + not_made == 1440
    assert not_made < 30
    assert mixed.labels is None
    lengths, starts, partners, first = [], [], set(), 0
    for number, text in zip(mixed.numbers, mixed.texts, strict=True):
        spans = spans_of(text)
        own = number // 10 - 1
        assert own in {row for row, _, _ in spans}, "the number is that of the row it starts from"
        assert len({row for row, _, _ in spans}) == 2
        first += spans[0][0] == own
        lengths += [length for _, _, length in spans]
        starts += [start for _, start, _ in spans]
        partners.add((own, *({row for row, _, _ in spans} - {own})))
    assert set(lengths) == set(range(round(SPANS[0] * COUNT), round(SPANS[1] * COUNT) + 1))
    assert min(starts) == 0
    assert max(start + length for start, length in zip(starts, lengths, strict=True)) == COUNT
    assert partners == {(a, b) for a in range(12) for b in range(12) if a != b}, "any other row"
    assert first == pytest.approx(len(mixed) / 2, abs=4 * math.sqrt(len(mixed)) / 2), "in either order"


def test_of_a_pair_both_texts_are_mixed_with_the_same_row():
    train = rows_of([" ".join(words) for words in NUMBERED], [" ".join(words[::2]) for words in NUMBERED])
    mixed, _ = mix(train, [], count=3, seed=1)
    for text, pair in zip(mixed.texts, mixed.pairs, strict=True):
        rows = [row for row, _, _ in spans_of(text)]
        seen = list(dict.fromkeys(int(word.split(".")[0]) for word in pair.split()))
        assert seen == rows, "in the same order"


def test_mixtures_are_drawn_by_the_seed_alone():
    train = rows_of([row["text"] for row in make_rows(20, seed=2)])
    random.seed(1)
    first = mix(train, [], count=2, seed=5)[0].texts
    random.seed(2)
    assert mix(train, [], count=2, seed=5)[0].texts == first
    assert mix(train, [], count=2, seed=6)[0].texts != first


def test_no_mixture_repeats_a_text_that_is_there():
    """Of single words each has one mixture with each other one, in two orders."""
    train = rows_of(["One", "two", "three"])
    all_six = {f"{a} {b}" for a in ("one", "two", "three") for b in ("one", "two", "three") if a != b}
    mixed, not_made = mix(train, [], count=40, seed=0)
    assert sorted(map(normalise_text, mixed.texts)) == sorted(all_six)
    assert not_made == 120 - 6
    mixed, not_made = mix(train, [rows_of(["two  ONE"]), rows_of(["three two"])], count=40, seed=0)
    assert set(map(normalise_text, mixed.texts)) == all_six - {"two one", "three two"}
    assert not_made == 120 - 4


def test_texts_without_blanks_are_joined_whole():
    mixed, _ = mix(rows_of(["日本語", "中文"]), [], count=20, seed=0)
    assert sorted(mixed.texts) == ["中文 日本語", "日本語 中文"]


def test_no_mixture_repeats_an_edited_copy(tmp_path):
    rows = [{"text": f"{a} {b}", "label": "xy"[i % 2]} for i, (a, b) in enumerate(combinations("abcdefgh", 2))]
    given = {f"{split}_file": str(write_csv(tmp_path / f"{split}.csv", part))
             for split, part in (("train", rows[:16]), ("validation", rows[16:22]), ("test", rows[22:]))}  # fmt: skip
    data = load_data(DataRequest(**given, augmentation=Augmentation(edits=("swap",)), mixed_texts=5))
    assert data.augmented["added"]
    train, mixed = ({normalise_text(text) for text in rows["text"]} for rows in (data.train, data.mixed))
    assert len(mixed) > 1
    assert not train & mixed


def test_what_cannot_be_mixed_is_refused():
    with pytest.raises(DataError, match="mixed_texts needs two training rows, and there is one"):
        mix(rows_of(["one two"]), [], count=2, seed=0)
    with pytest.raises(DataError, match="no mixture of its training texts differs"):
        mix(rows_of(["a", "b"]), [rows_of(["a b", "b a"])], count=5, seed=0)


# -- data and recipe


def test_mixtures_stand_apart_from_all_other_rows(tmp_path):
    made = list({row["text"]: row for row in make_rows(300, seed=4)}.values())
    parts = {"train": made[:100], "validation": made[100:140], "test": made[140:180]}
    files = {f"{split}_file": str(write_csv(tmp_path / f"{split}.csv", part)) for split, part in parts.items()}
    free = tmp_path / "free.txt"
    free.write_text("".join(f"{row['text']}\n" for row in made[180:]), encoding="utf-8")
    plain = load_data(DataRequest(**files, unlabelled_file=str(free)))
    data = load_data(DataRequest(**files, unlabelled_file=str(free), max_train_samples=40, mixed_texts=3))
    assert data.taught == ["train", "unlabelled", "mixed"]
    assert (plain.taught, plain.mixed, plain.facts()["mixed"]) == (["train", "unlabelled"], None, {})
    assert data.mixed.column_names == ["text", "row"]
    count = len(data.mixed)
    assert data.facts()["mixed"] == {"made": count, "not_made": 120 - count}
    assert data.facts()["rows"] == {"train": 40, "validation": 40, "test": 40, "unlabelled": 120, "mixed": count}
    assert count > 110
    kept = set(data.train["row"][:])
    assert set(data.mixed["row"][:]) == kept, "of the rows of the sample"
    words = {word for text in data.train["text"][:] for word in text.split()}
    assert {word for text in data.mixed["text"][:] for word in text.split()} <= words
    there = {normalise_text(row["text"]) for row in made}
    mixed = [normalise_text(text) for text in data.mixed["text"][:]]
    assert not there & set(mixed)
    assert len(set(mixed)) == count
    assert data.unlabelled["text"][:] == plain.unlabelled["text"][:]
    without = load_data(DataRequest(**files, unlabelled_file=str(free), max_train_samples=40))
    assert data.leaks == without.leaks
    assert data.fingerprint != without.fingerprint


@pytest.fixture
def taught(monkeypatch, tmp_path):
    """The rows that students were taught, and the runs."""
    monkeypatch.setenv("NLPXFER_CACHE", str(tmp_path / "cache"))
    seen, made = [], TransferRows.__init__

    def record(self, run, panel):
        made(self, run, panel)
        seen.append((self, run))

    monkeypatch.setattr(TransferRows, "__init__", record)
    return seen


def words(tiny_data, *more):
    own = ["--control_arm", "false", "--max_train_samples", "32", "--linear_probe", "false", "--mixed_texts", "2"]
    return [*tiny_words(tiny_data), *own, *map(str, more)]


def test_the_teacher_says_what_mixtures_are_worth(tiny_data, tiny_checkpoint, taught, tmp_path):
    teacher = tiny_checkpoint("bert", "classifier")
    own = ["--teacher_name_or_path", teacher, "--unlabelled_file", tiny_data.unlabelled, "--disagreements", "true"]
    own += ["--transfer_curve", "0,all", "--student_name_or_path", tiny_checkpoint("gpt2")]
    run = finished("distill", tmp_path / "out", *words(tiny_data, *own))
    (rows, there), *_ = taught
    counts = [len(getattr(there.data, split)) for split in ("train", "unlabelled", "mixed")]
    assert counts[0] == 32
    assert 56 <= counts[2] <= 64
    assert run.report["checks"]["teacher"]["rows"] == sum(counts)
    assert run.report["data"]["rows"]["mixed"] == counts[2]
    assert run.arm("distilled")["details"]["steps"] == math.ceil(sum(counts) / 32)
    says = Classifier.load(teacher, bf16=False).logits(there.texts("mixed")[0])
    np.testing.assert_allclose(rows.logits[-counts[2] :], says, atol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    options = load_recipe("distill").DistillOptions(teacher_name_or_path=str(teacher))
    split = rows.split(options)(tokenizer).train
    assert len(split) == sum(counts)
    assert (np.asarray(split.columns["labels"])[32:] < 0).all(), "no label but the teacher's"

    points = run.report["checks"]["transfer_curve"]
    assert [point["unlabelled_rows"] for point in points] == [0, counts[1]], "mixtures are no unlabelled texts"
    drawn = rows._drawn(0)
    assert drawn[:32].all()
    assert not drawn[32 : 32 + counts[1]].any()
    assert drawn[32 + counts[1] :].all(), "every point of the curve has them"

    lines = [json.loads(line) for line in (run.folder / "disagreements.jsonl").read_text().splitlines()]
    assert {line["split"] for line in lines} == {"train", "unlabelled", "validation", "test"}, "nobody relabels them"


@pytest.mark.parametrize(
    "own",
    [
        ["--student", "static"],
        ["--teacher_folds", "2"],
        ["--generations", "2"],
        ["--self_distillation", "ema", "--kd_weight", "0.5"],
        ["--search", "true", "--search_budget", "50"],
    ],
)
def test_mixtures_go_with_other_ways_to_teach(own, tiny_data, tiny_checkpoint, taught, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)  # no int8 forms on the ladder, which take a minute
    checkpoint = tiny_checkpoint("bert")
    run = finished("distill", tmp_path / "out", *words(tiny_data, "--model_name_or_path", checkpoint, *own))
    mixed = run.report["data"]["mixed"]["made"]
    assert 56 <= mixed <= 64
    details = run.arm("distilled")["details"]
    epochs = 5 if "static" in own else 1
    assert details["steps"] >= epochs * math.ceil((32 + mixed) / 32) or "--search" in own


def test_mixtures_for_a_file_of_answers_are_refused(tiny_data, tiny_checkpoint, tmp_path):
    """Beside another teacher the file may lack them, if it may lack texts."""
    file = tmp_path / "llm.csv"
    made = [{"text": row["text"], **dict.fromkeys(("food", "music", "sport", "travel"), 0.25)} for row in make_rows(4)]
    write_csv(file, made)
    own = ["--teacher_name_or_path", tiny_checkpoint("bert", "classifier"), "--teacher_file", file]
    told = refused("distill", tmp_path / "out", *words(tiny_data, *own))
    assert "teacher_file_partial" in told
    assert not (tmp_path / "out").exists()
