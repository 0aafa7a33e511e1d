"""Texts of more than max_length tokens: what of them is read, and that training, scoring and predicting read alike."""

import csv
import json
import random

import numpy as np
import pytest
import torch
from gradients import METHODS, step_rows, step_trainer
from recipe_runs import finished, refused
from tiny import FAMILIES, FILLER, LABELS, TOPICS, build_tokenizer, make_rows, write_csv

from nlpxfer.checkpoint import load_classifier
from nlpxfer.checkpoint.head import features, head_of
from nlpxfer.classify import Classifier, evaluate_file
from nlpxfer.cli import main
from nlpxfer.config import DataOptions, RunOptions
from nlpxfer.config.long_texts import LongTexts
from nlpxfer.data.schema import LabelSchema
from nlpxfer.data.tokenise import WINDOWS_PER_ROW, Collator, TokenisedRows, tokenise
from nlpxfer.data.windows import length_facts, tell_lengths, window_spans
from nlpxfer.errors import ConfigError
from nlpxfer.methods.base import mean_by_row, model_inputs, row_logits, twice
from nlpxfer.train.linear_probe import start_from_linear_probe_
from nlpxfer.train.predict import predict
from nlpxfer.train.teacher_cache import teacher_logits

SCHEMA = LabelSchema(tuple(sorted(LABELS)))
HEAD_TAIL = LongTexts(policy="head_tail")
WINDOWS = LongTexts(policy="sliding_window", window_overlap=2)
LONG = "bread and cheese in the kitchen for dinner with the man and the woman of the house"  # 17 words
TEXTS = ["the goal", LONG, "we took a train"]


def padded_tokenizer(family):
    tokenizer = build_tokenizer(family)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def windows_of(rows, index):
    """Token ids of each window of a row."""
    row = rows[index]
    ends = np.cumsum(row.get("window_lengths", [len(row["input_ids"])]))
    return [part.tolist() for part in np.split(row["input_ids"], ends)[:-1]]


def framed(tokenizer, content):
    """Tokens between the special ones that the tokenizer sets around a text."""
    whole, bare = (tokenizer("the", add_special_tokens=special)["input_ids"] for special in (True, False))
    start = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
    return [*whole[:start], *content, *whole[start + len(bare) :]]


# -- which tokens


@pytest.mark.parametrize("overlap", [0, 3, 9])
@pytest.mark.parametrize("length", [1, 10, 11, 17, 40, 95])
def test_windows_cover_the_text_evenly(length, overlap):
    spans = window_spans(length, 10, overlap, 1000)
    assert spans[0][0] == 0
    assert spans[-1][1] == length
    assert all(end - begin == min(10, length) for begin, end in spans)
    steps = np.diff([begin for begin, _ in spans])
    assert (10 - steps >= overlap).all(), "neighbours share less than the overlap"
    assert len(steps) == 0 or steps.max() - steps.min() <= 1
    if len(spans) > 1:  # one window fewer could not share so much
        assert 10 + (len(spans) - 2) * (10 - overlap) < length


def test_too_many_windows_are_spread_with_gaps():
    assert window_spans(100, 10, 2, 3) == [(0, 10), (45, 55), (90, 100)]


@pytest.mark.parametrize("family", FAMILIES)
def test_head_and_tail_of_each_family(family):
    tokenizer = padded_tokenizer(family)
    content = tokenizer(LONG, add_special_tokens=False)["input_ids"]
    assert len(content) > 12
    rows = tokenise(tokenizer, TEXTS, max_length=12, long_texts=HEAD_TAIL, labels=[2, 0, 1])
    room = 12 - tokenizer.num_special_tokens_to_add()
    assert windows_of(rows, 1) == [framed(tokenizer, [*content[:3], *content[-(room - 3) :]])]
    for index in (0, 2):
        assert windows_of(rows, index) == [tokenizer(TEXTS[index])["input_ids"]]
    assert rows.windows is None
    assert rows.unread.tolist() == [0, len(content) - room, 0]
    assert rows.columns["labels"].tolist() == [2, 0, 1]


def test_head_share_of_the_paper():
    """Sun et al.: 128 tokens from the beginning and 382 from the end, of 512 with [CLS] and [SEP]."""
    tokenizer = padded_tokenizer("bert")
    words = random.Random(0).choices(FILLER, k=900)
    rows = tokenise(tokenizer, [" ".join(words)], max_length=512, long_texts=HEAD_TAIL)
    ids = tokenizer.convert_tokens_to_ids(words)
    assert rows[0]["input_ids"].tolist() == [tokenizer.cls_token_id, *ids[:128], *ids[-382:], tokenizer.sep_token_id]


def test_the_end_alone():
    tokenizer = padded_tokenizer("gpt2")
    rows = tokenise(tokenizer, [LONG], max_length=5, long_texts=LongTexts(policy="head_tail", head_share=0.0))
    assert rows[0]["input_ids"].tolist() == tokenizer(LONG)["input_ids"][-5:]


@pytest.mark.parametrize("family", FAMILIES)
def test_windows_of_each_family(family):
    tokenizer = padded_tokenizer(family)
    content = tokenizer(LONG, add_special_tokens=False)["input_ids"]
    rows = tokenise(tokenizer, TEXTS, max_length=8, long_texts=WINDOWS, labels=[2, 0, 1])
    room = 8 - tokenizer.num_special_tokens_to_add()
    expected = [framed(tokenizer, content[a:b]) for a, b in window_spans(len(content), room, 2, 8)]
    assert len(expected) >= 3
    assert windows_of(rows, 1) == expected
    assert rows.windows_per_row[1] == len(expected)
    assert rows.lengths[1] == 8 * len(expected), "rows count by the tokens of all their windows"
    assert rows.unread.tolist() == [0, 0, 0]
    assert rows[1]["labels"] == 0


def test_special_tokens_in_the_text_belong_to_the_text():
    tokenizer = padded_tokenizer("bert")
    text = "[SEP] " + LONG + " [SEP]"
    rows = tokenise(tokenizer, [text], max_length=6, long_texts=LongTexts(policy="sliding_window", window_overlap=0))
    sep, cls = tokenizer.sep_token_id, tokenizer.cls_token_id
    first, *_, last = windows_of(rows, 0)
    assert first[:2] == [cls, sep]
    assert last[-2:] == [sep, sep]
    assert all(window[0] == cls and window[-1] == sep and len(window) == 6 for window in windows_of(rows, 0))


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2"])
def test_the_longer_text_of_a_pair_is_windowed_beside_the_shorter_one(family):
    tokenizer = padded_tokenizer(family)
    long, short = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (LONG, "the goal"))
    for texts in (("the goal", LONG), (LONG, "the goal")):
        rows = tokenise(tokenizer, [texts[0]], [texts[1]], max_length=12, long_texts=WINDOWS)
        room = 12 - tokenizer.num_special_tokens_to_add(pair=True) - len(short)
        spans = window_spans(len(long), room, 2, 8)
        for window, (begin, end) in zip(windows_of(rows, 0), spans, strict=True):
            words = " ".join(LONG.split()[begin:end])
            parts = ("the goal", words) if texts[1] == LONG else (words, "the goal")
            assert window == tokenizer(*parts)["input_ids"]
        if family == "bert":
            expected = tokenizer(*[" ".join(t.split()[: spans[0][1]]) for t in texts])["token_type_ids"]
            assert rows[0]["token_type_ids"][: rows[0]["window_lengths"][0]].tolist() == expected


def test_the_shorter_text_of_a_pair_gets_half_of_the_room():
    tokenizer = padded_tokenizer("bert")
    rows = tokenise(tokenizer, [LONG], [LONG + " door"], max_length=11, long_texts=HEAD_TAIL)
    text = tokenizer.decode(rows[0]["input_ids"])
    # 8 tokens of text: 4 of the shorter, and of the longer int(0.25 * (11 - 4)) = 1 and 3
    assert text == "[CLS] bread and cheese in [SEP] bread the house door [SEP]"


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_head_is_what_the_tokenizer_cuts(family, side):
    tokenizer = padded_tokenizer(family)
    tokenizer.truncation_side = side
    for pairs in (None, ["a match", "a", LONG]):
        rows = tokenise(tokenizer, TEXTS, pairs, max_length=9)
        assert rows.windows is None
        for index, text in enumerate(TEXTS):
            cut = tokenizer(text, None if pairs is None else pairs[index], truncation=True, max_length=9)
            assert rows[index]["input_ids"].tolist() == cut["input_ids"]
            if family == "bert":
                assert rows[index]["token_type_ids"].tolist() == cut["token_type_ids"]
        whole = [len(tokenizer(*each)["input_ids"]) for each in zip(TEXTS, pairs or [None] * 3, strict=True)]
        assert rows.unread.tolist() == [max(0, length - 9) for length in whole]


def test_pieces_of_many_characters_stay_in_order(monkeypatch):
    monkeypatch.setattr("nlpxfer.data.tokenise.PIECE_CHARACTERS", 100)
    monkeypatch.setattr("nlpxfer.data.tokenise.PIECE_ROWS", 3)
    tokenizer = padded_tokenizer("bert")
    texts = [row["text"] for row in make_rows(40, words=30)]
    pairs = [row["text"] for row in make_rows(40, words=8, seed=1)]
    rows = tokenise(tokenizer, texts, pairs, max_length=200)
    assert [rows[i]["input_ids"].tolist() for i in range(40)] == tokenizer(texts, pairs)["input_ids"]


# -- rows and batches


@pytest.fixture
def rows():
    """Row 0 has two windows, [1 2] and [3]; row 1 one, [4]; row 2 two, [5] and [6 7]."""
    return TokenisedRows(
        np.arange(1, 8, dtype=np.int32),
        np.array([0, 1, 0, 1, 0, 1, 0], dtype=np.uint8),
        np.array([0, 3, 4, 7]),
        {"labels": np.array([7, 8, 9])},
        np.array([0, 2, 3, 4, 5, 7]),
        np.array([5, 0, 6], dtype=np.int32),
    )


def test_rows_of_windows_by_hand(rows):
    assert rows.windows_per_row.tolist() == [2, 1, 2]
    assert rows.lengths.tolist() == [3, 1, 3]
    assert windows_of(rows, 2) == [[5], [6, 7]]
    chosen = rows.select([2, 1, 2])
    assert [windows_of(chosen, i) for i in range(3)] == [[[5], [6, 7]], [[4]], [[5], [6, 7]]]
    assert chosen.unread.tolist() == [6, 0, 6]
    assert rows.select([]).windows_per_row.tolist() == []
    each = rows.each_window()
    assert [each[i]["input_ids"].tolist() for i in range(len(each))] == [[1, 2], [3], [4], [5], [6, 7]]
    assert each[0]["token_type_ids"].tolist() == [0, 1]
    assert each.tokens is rows.tokens


def test_rows_with_and_without_windows_are_joined(rows):
    plain = TokenisedRows(rows.tokens, rows.token_types, rows.starts, rows.columns)
    for joined, expected in (
        (TokenisedRows.join(rows, plain), [[[1, 2], [3]], [[4]], [[5], [6, 7]], [[1, 2, 3]], [[4]], [[5, 6, 7]]]),
        (TokenisedRows.join(plain, rows), [[[1, 2, 3]], [[4]], [[5, 6, 7]], [[1, 2], [3]], [[4]], [[5], [6, 7]]]),
    ):
        assert [windows_of(joined, i) for i in range(6)] == expected
        assert joined.unread is None
    assert TokenisedRows.join(rows, rows).unread.tolist() == [5, 0, 6, 5, 0, 6]
    assert TokenisedRows.join(plain, plain).windows is None


def test_batch_of_windows_by_hand(rows):
    batch = Collator(0)([rows[1], rows[2]])
    assert batch["input_ids"].tolist() == [[4, 0], [5, 0], [6, 7]]
    assert batch["attention_mask"].tolist() == [[1, 0], [1, 0], [1, 1]]
    assert batch["token_type_ids"].tolist() == [[1, 0], [0, 0], [1, 0]]
    assert batch[WINDOWS_PER_ROW].tolist() == [1, 2]
    assert batch["labels"].tolist() == [8, 9]
    assert WINDOWS_PER_ROW not in Collator(0)([rows.each_window()[0]])
    assert model_inputs(batch).keys() == {"input_ids", "attention_mask", "token_type_ids"}


def test_mean_by_row_and_its_gradient():
    values = torch.tensor([[1.0, 4.0], [3.0, 0.0], [5.0, 6.0]], dtype=torch.float64, requires_grad=True)
    means = mean_by_row(values, torch.tensor([2, 1]))
    assert means.tolist() == [[2.0, 2.0], [5.0, 6.0]]
    means.sum().backward()
    assert values.grad.tolist() == [[0.5, 0.5], [0.5, 0.5], [1.0, 1.0]]
    assert torch.autograd.gradcheck(
        lambda each: mean_by_row(each, torch.tensor([1, 2])), (values.detach().requires_grad_(),)
    )


# -- models


@pytest.fixture
def windowed(tiny_checkpoint):
    """A model, rows of one to four windows, and their collator."""

    def load(family):
        checkpoint = load_classifier(str(tiny_checkpoint(family, "classifier")), schema=SCHEMA)
        made = make_rows(14, seed=4, words=24)
        gold = [SCHEMA.encode(row["label"]) for row in made]
        rows = tokenise(
            checkpoint.tokenizer, [row["text"] for row in made], max_length=12, long_texts=WINDOWS, labels=gold
        )
        assert len(set(rows.windows_per_row)) >= 3
        return checkpoint.model, rows, Collator.for_tokenizer(checkpoint.tokenizer)

    return load


def one_by_one(model, rows):
    """Each window alone, without padding, averaged by a plain mean."""
    found = []
    with torch.no_grad():
        for i in range(len(rows)):
            logits = [model(torch.tensor([window])).logits[0] for window in windows_of(rows, i)]
            found.append(torch.stack(logits).mean(dim=0).numpy())
    return np.stack(found)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_a_row_are_the_mean_over_its_windows(windowed, family):
    """Also that decoders read the last real token of each window, whatever pads it."""
    model, rows, collator = windowed(family)
    expected = one_by_one(model, rows)
    np.testing.assert_allclose(predict(model, rows, collator, batch_size=3), expected, atol=1e-5)
    batch = collator([rows[i] for i in range(8)])
    assert len(batch["input_ids"]) > 8
    with torch.no_grad():
        np.testing.assert_allclose(row_logits(model, batch), expected[:8], atol=1e-5)
        again = row_logits(model, twice(batch))
    np.testing.assert_allclose(again, np.tile(expected[:8], (2, 1)), atol=1e-5)
    assert np.abs(expected - expected[0]).max() > 1e-2


def test_a_prediction_batch_holds_windows_not_rows(windowed):
    """Eight windows of a row take as much room as eight rows: they may be spread over batches."""
    model, rows, collator = windowed("bert")
    seen = []

    def note(model, inputs):
        seen.append(inputs["input_ids"].shape)
        return model(**inputs).logits

    predict(model, rows, collator, batch_size=2, output=note)
    assert max(count * width for count, width in seen) <= 2 * 12
    assert sum(count for count, _ in seen) == rows.windows_per_row.sum()


@pytest.mark.parametrize("family", ["bert", "modernbert", "gpt2"])
def test_the_probe_of_windows_is_an_exact_start(windowed, family):
    """Logits of the final layer on the windows' mean features are the mean of the windows' logits."""
    model, rows, collator = windowed(family)
    start_from_linear_probe_(model, rows, rows, collator)
    final = head_of(model).final
    read = torch.from_numpy(predict(model, rows, collator, output=features))
    with torch.no_grad():
        expected = final(read).numpy()
    np.testing.assert_allclose(predict(model, rows, collator), expected, atol=1e-4, rtol=1e-4)


def test_the_moments_of_the_probe_come_window_by_window(windowed):
    """No pass of the probe holds more than 64 to 128 windows, however many a row has."""
    model, rows, collator = windowed("gpt2")
    many = rows.select(np.resize(np.flatnonzero(rows.windows_per_row > 1), 140))
    assert np.sort(many.windows_per_row)[-64:].sum() > 128
    seen = []
    model.register_forward_pre_hook(
        lambda module, args, inputs: seen.append(len(inputs["input_ids"])), with_kwargs=True
    )
    start_from_linear_probe_(model, many, rows, collator)
    assert max(seen) <= 128


def test_batches_are_rounded_up_to_a_window_at_most(tiny_checkpoint, tmp_path):
    """A model may have no position for more."""
    rows = step_rows(windows=True)
    options = RunOptions(output_dir=str(tmp_path), use_cpu=True, bf16=True, disable_tqdm=True)
    model = load_classifier(str(tiny_checkpoint("bert")), schema=SCHEMA).model
    trainer = step_trainer(model, METHODS["finetune"], options, rows, "bert")
    assert (trainer.pad.multiple_of, trainer.pad.rounded_to) == (8, 6)


# -- settings


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({"long_texts": "tail"}, "long_texts: 'tail' is not one of head, head_tail, sliding_window"),
        ({"long_texts": "head_tail", "head_share": 1.0}, "head_share: 1.0 is not in [0, 1)"),
        ({"long_texts": "sliding_window", "window_overlap": -1}, "window_overlap: -1 is negative"),
        ({"long_texts": "sliding_window", "max_windows": 1}, "max_windows: 1 is below 2"),
    ],
)
def test_settings_out_of_range(values, fault):
    with pytest.raises(ConfigError) as caught:
        DataOptions(**values, test_share=0.9)
    assert any(fault in each for each in caught.value.faults)
    assert len(caught.value.faults) == 2, "shown together with the others"


def test_settings_with_defaults():
    plan = LongTexts.from_options({"long_texts": "sliding_window", "window_overlap": None, "max_windows": None})
    assert plan == LongTexts(policy="sliding_window", head_share=0.25, window_overlap=None, max_windows=8)
    assert plan.overlap(128) == 32
    assert LongTexts(window_overlap=0).overlap(128) == 0
    assert LongTexts.from_options({"max_length": 24}) == LongTexts()


@pytest.mark.parametrize(
    ("plan", "pairs", "max_length", "fault"),
    [
        (
            LongTexts(policy="sliding_window", window_overlap=6),
            False,
            8,
            "window_overlap: 6 is not below the 6 tokens",
        ),
        (LongTexts(policy="sliding_window", window_overlap=5), False, 8, None),
        (
            LongTexts(policy="sliding_window", window_overlap=4),
            True,
            11,
            "window_overlap: 4 is not below the 4 tokens",
        ),
        (LongTexts(policy="sliding_window", window_overlap=3), True, 11, None),
        (LongTexts(policy="head_tail"), True, 3, "max_length: 3 leaves no room beside 3 special tokens"),
    ],
)
def test_windows_need_room(plan, pairs, max_length, fault):
    tokenizer, second = padded_tokenizer("bert"), [LONG] if pairs else None
    if fault is None:
        assert set(
            tokenise(tokenizer, [LONG], second, max_length=max_length, long_texts=plan).lengths % max_length
        ) == {0}
        return
    with pytest.raises(ConfigError) as caught:
        tokenise(tokenizer, [LONG], second, max_length=max_length, long_texts=plan)
    assert fault in str(caught.value)


def test_tokenizers_without_positions_are_refused(monkeypatch):
    tokenizer = padded_tokenizer("bert")
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    with pytest.raises(ConfigError, match="head_tail does not work with") as caught:
        tokenise(tokenizer, TEXTS, max_length=8, long_texts=HEAD_TAIL)
    assert "--long_texts head" in str(caught.value)
    assert len(tokenise(tokenizer, TEXTS, max_length=8)) == 3


# -- what is told


def test_facts_of_lengths():
    tokenizer = padded_tokenizer("gpt2")
    texts = [LONG, "we", "a", "the goal"]
    cut = tokenise(tokenizer, texts, max_length=8)
    assert length_facts(cut) == {"longer": 0.25, "partly_read": 0.25, "windows_per_row": 1.0}
    whole = tokenise(tokenizer, texts, max_length=8, long_texts=WINDOWS)
    assert length_facts(whole) == {"longer": 0.25, "partly_read": 0.0, "windows_per_row": 1.5}
    gaps = tokenise(
        tokenizer, texts, max_length=4, long_texts=LongTexts(policy="sliding_window", window_overlap=0, max_windows=2)
    )
    assert length_facts(gaps) == {"longer": 0.25, "partly_read": 0.25, "windows_per_row": 1.25}
    assert gaps.unread.tolist() == [17 - 8, 0, 0, 0]


@pytest.mark.parametrize(
    ("plan", "remedy"),
    [
        (
            LongTexts(),
            "lose their end: try --long_texts head_tail, --long_texts sliding_window or a larger --max_length",
        ),
        (HEAD_TAIL, "lose their middle: try --long_texts sliding_window or a larger --max_length"),
        (
            LongTexts(policy="sliding_window", window_overlap=0, max_windows=2),
            "lose what lies between the windows: try a larger --max_windows",
        ),
    ],
)
def test_many_rows_that_are_cut_are_told(plan, remedy, caplog):
    tokenizer = padded_tokenizer("gpt2")
    for share, texts in ((0.2, [LONG, "a", "a", "a", "a"]), (0.25, [LONG, "a", "a", "a"])):
        caplog.clear()
        tell_lengths(tokenise(tokenizer, texts, max_length=6, long_texts=plan), plan, 6, batch_size=2)
        told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        expected = f"25 % of the training rows are too long to be read whole (max_length 6) and {remedy}"
        assert told == ([expected] if share > 0.2 else [])


def test_the_size_of_batches_is_told(caplog):
    caplog.set_level("INFO")
    tokenizer = padded_tokenizer("gpt2")
    rows = tokenise(tokenizer, [LONG, "a", LONG, LONG], max_length=8, long_texts=WINDOWS)  # 3, 1, 3, 3 windows
    tell_lengths(rows, WINDOWS, 8, batch_size=2)
    assert "2.5 windows per training row, up to 6 in a batch of 2 rows" in caplog.text


# -- teacher


def test_the_cache_knows_how_long_texts_are_read(tiny_checkpoint, tmp_path):
    teacher = load_classifier(str(tiny_checkpoint("bert", "classifier")), schema=SCHEMA)
    shared = {"labels": SCHEMA.names, "max_length": 8}
    found = {}
    for plan in (LongTexts(), HEAD_TAIL, WINDOWS):
        logits, _ = teacher_logits(teacher, TEXTS, folder=tmp_path / "other", long_texts=plan, **shared)
        rows = tokenise(teacher.tokenizer, TEXTS, max_length=8, long_texts=plan)
        np.testing.assert_allclose(logits, one_by_one(teacher.model, rows), atol=1e-5)
        found[plan.policy] = logits
    assert np.abs(found["head"][1] - found["head_tail"][1]).max() > 1e-3
    assert np.abs(found["head"][1] - found["sliding_window"][1]).max() > 1e-3
    other = LongTexts(policy="sliding_window", window_overlap=3)
    told = [
        teacher_logits(teacher, TEXTS, folder=tmp_path / "cache", long_texts=plan, **shared)[1]
        for plan in (LongTexts(), HEAD_TAIL, WINDOWS, other)
    ]
    assert len({facts["key"] for facts in told}) == 4
    assert [facts["computed"] for facts in told] == [len(set(TEXTS))] * 4


# -- from training to predicting


def deciding_at_the_end(count, seed):
    chooser = random.Random(seed)
    made = []
    for index in range(count):
        label = LABELS[index % len(LABELS)]
        words = [*chooser.choices(FILLER, k=20), *chooser.choices(TOPICS[label], k=3)]
        made.append({"text": " ".join(words), "label": label})
    return made


@pytest.fixture(scope="module")
def end_decides(tmp_path_factory):
    folder = tmp_path_factory.mktemp("end")
    return {
        split: write_csv(folder / f"{split}.csv", deciding_at_the_end(count, seed))
        for seed, (split, count) in enumerate({"train": 160, "validation": 60, "test": 60}.items())
    }


def trained(key, folder, data, checkpoint, *words):
    named = [word for split, path in data.items() for word in (f"--{split}_file", path)]
    shared = (
        "--bf16 false --num_threads 1 --use_cpu true --max_length 16 --freeze_embeddings false --learning_rate 3e-3"
    )
    size = ["--per_device_train_batch_size", "16", "--num_train_epochs", "4", "--control_arm", "false"]
    return finished(key, folder, *shared.split(), *size, *named, "--model_name_or_path", checkpoint, *words)


@pytest.mark.parametrize(
    ("words", "succeeds"),
    [
        (["--long_texts", "head"], False),
        (["--long_texts", "head_tail", "--head_share", "0.4"], True),
        (["--long_texts", "sliding_window", "--window_overlap", "5"], True),
    ],
    ids=["head", "head_tail", "sliding_window"],
)
def test_a_word_at_the_end_decides(words, succeeds, end_decides, tiny_checkpoint, tmp_path, caplog):
    run = trained("finetune", tmp_path / "out", end_decides, tiny_checkpoint("gpt2"), *words)
    scored = run.report["metrics"]["test"]["accuracy"]
    assert scored > 0.8 if succeeds else scored < 0.45
    told = run.report["data"]["long_texts"]
    assert told["policy"].startswith(words[1])
    assert told["train"]["longer"] == told["test"]["longer"] == 1.0
    assert told["train"]["partly_read"] == (0.0 if words[1] == "sliding_window" else 1.0)
    assert ("100 % of the training rows are too long" in caplog.text) == (words[1] != "sliding_window")
    assert run.run["config"]["long_texts"] == words[1]
    card = (run.folder / "README.md").read_text()
    assert ("the first 16 tokens" if words[1] == "head" else "a plain pipeline does not") in card

    classifier = Classifier.load(str(run.folder), bf16=False)
    assert classifier.long_texts == LongTexts.from_options(run.run["config"])
    with pytest.raises(SystemExit) as left:
        main(["predict", str(run.folder), str(end_decides["test"]), "--output_file", str(tmp_path / "answers.csv")])
    assert left.value.code == 0
    with (tmp_path / "answers.csv").open(newline="") as file:
        answers = list(csv.DictReader(file))
    assert np.mean([row["label"] == row["predicted_label"] for row in answers]) == pytest.approx(scored)


@pytest.mark.parametrize(
    ("family", "classifier"),
    [
        *((family, "logistic") for family in ("bert", "distilbert", "modernbert", "gpt2")),
        ("bert", "mlp"),
        ("modernbert", "mlp"),
    ],
)
def test_a_classifier_on_frozen_features_reads_windows(
    family, classifier, end_decides, tiny_checkpoint, tmp_path, monkeypatch
):
    """Whatever the head makes of a window, the saved model says the same of the text as the report."""
    monkeypatch.setenv("NLPXFER_CACHE", str(tmp_path / "cache"))
    files = [word for split, path in end_decides.items() for word in (f"--{split}_file", path)]
    words = ["--max_length", "16", "--bf16", "false", "--num_threads", "1", "--use_cpu", "true"]
    words += ["--model_name_or_path", tiny_checkpoint(family), "--control_arm", "false", "--pooling", "own"]
    words += ["--classifier", classifier]
    windows = ["--long_texts", "sliding_window", "--window_overlap", "5"]
    run = finished("features", tmp_path / "windows", *files, *words, *windows)
    start = finished("features", tmp_path / "head", *files, *words)
    scores = [one.report["metrics"]["test"]["accuracy"] for one in (run, start)]
    assert scores[0] > scores[1] + (0.0 if family == "modernbert" else 0.1)  # whose random features say little
    assert run.report["data"]["long_texts"]["train"]["partly_read"] == 0
    found = evaluate_file(Classifier.load(str(run.folder), bf16=False), end_decides["test"])
    assert found["accuracy"] == scores[0]
    assert found["loss"] == pytest.approx(run.report["metrics"]["test"]["loss"], abs=1e-3)


def test_a_teacher_and_its_student_read_windows(end_decides, tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("NLPXFER_CACHE", str(tmp_path / "cache"))
    words = ["--long_texts", "sliding_window", "--student_num_layers", "2"]
    run = trained("distill", tmp_path / "out", end_decides, tiny_checkpoint("gpt2"), *words)
    assert run.arm("distilled")["metrics"]["test"]["accuracy"] > 0.6
    manifest = json.loads(next((tmp_path / "cache").rglob("manifest.json")).read_text())
    assert manifest["long_texts"] == "sliding_window: overlap 4, at most 8 windows"
    assert run.report["data"]["long_texts"]["train"]["windows_per_row"] == 2.0


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["--head_share", "0.5"], "head_share: has no effect without --long_texts head_tail"),
        (
            ["--long_texts", "head_tail", "--max_windows", "4"],
            "max_windows: has no effect without --long_texts sliding",
        ),
        (
            ["--long_texts", "sliding_window", "--window_overlap", "14"],
            "window_overlap: 14 is not below the 14 tokens",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(words, fault, end_decides, tiny_checkpoint, tmp_path):
    named = [word for split, path in end_decides.items() for word in (f"--{split}_file", path)]
    model = ["--model_name_or_path", tiny_checkpoint("bert"), "--max_length", "16", "--use_cpu", "true"]
    assert fault in refused("finetune", tmp_path / "out", *named, *model, *words)
    assert not (tmp_path / "out").exists()


def test_a_shorter_length_that_leaves_no_steps_is_refused_when_predicting(end_decides, tiny_copy):
    folder = tiny_copy("bert", "classifier", SCHEMA.names)
    config = {"max_length": 32, "long_texts": "sliding_window", "window_overlap": 12}
    (folder / "run.json").write_text(json.dumps({"config": config}))
    assert Classifier.load(str(folder), bf16=False).max_length == 32
    with pytest.raises(ConfigError, match="window_overlap: 12 is not below the 10 tokens(.|\n)*a larger max_length"):
        Classifier.load(str(folder), max_length=12, bf16=False)
