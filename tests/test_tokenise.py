"""Rows as flat token ids, and their batches."""

import numpy as np
import pytest
import torch
from tiny import FAMILIES, build_tokenizer

from nlpxfer.data.tokenise import Collator, TokenisedRows, tokenise
from nlpxfer.errors import DataError

TEXTS = ["the goal", "bread and cheese in the kitchen for dinner", "we", "a train to the airport"]
PAIRS = ["a match", "the recipe", "guitar and piano and drum and violin", "passport"]


def padded_tokenizer(family, side="right"):
    tokenizer = build_tokenizer(family)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = side
    return tokenizer


def ids_of(rows):
    return [rows[index]["input_ids"].tolist() for index in range(len(rows))]


@pytest.fixture
def rows():
    """Three rows by hand, with token types and two columns."""
    return TokenisedRows(
        np.array([1, 2, 3, 4, 5, 6], dtype=np.int32),
        np.array([0, 0, 1, 0, 0, 1], dtype=np.int32),
        np.array([0, 3, 4, 6]),
        {"labels": np.array([7, 8, 9]), "teacher_logits": np.array([[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]])},
    )


# -- tokenise


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pairs", [None, PAIRS], ids=["texts", "pairs"])
def test_rows_are_what_the_tokenizer_says(family, pairs):
    tokenizer = padded_tokenizer(family)
    rows = tokenise(tokenizer, TEXTS, pairs, max_length=64, labels=[3, 1, 0, 2])
    for index, text in enumerate(TEXTS):
        expected = tokenizer(text, None if pairs is None else pairs[index])
        row = rows[index]
        assert row["input_ids"].tolist() == expected["input_ids"]
        assert ("token_type_ids" in row) == ("token_type_ids" in expected) == (family == "bert")
        if family == "bert":
            assert row["token_type_ids"].tolist() == expected["token_type_ids"]
        assert row["labels"] == [3, 1, 0, 2][index]
        assert rows.lengths[index] == len(expected["input_ids"])
    assert len(rows) == 4


def test_second_texts_have_token_type_1():
    rows = tokenise(padded_tokenizer("bert"), ["the goal"], ["a match"], max_length=64)
    assert rows[0]["token_type_ids"].tolist() == [0, 0, 0, 0, 1, 1, 1]  # [CLS] the goal [SEP] a match [SEP]


def test_long_texts_are_cut_at_the_end():
    tokenizer = padded_tokenizer("bert")
    whole = tokenizer(TEXTS[1])["input_ids"]
    rows = tokenise(tokenizer, TEXTS, max_length=6)
    assert rows.lengths.tolist() == [4, 6, 3, 6]
    assert rows[1]["input_ids"].tolist() == [*whole[:5], whole[-1]]  # the separator stays


def test_the_longer_text_of_a_pair_is_cut_first():
    tokenizer = padded_tokenizer("bert")
    rows = tokenise(tokenizer, ["the goal"], [PAIRS[2]], max_length=8)
    assert tokenizer.decode(rows[0]["input_ids"]) == "[CLS] the goal [SEP] guitar and piano [SEP]"


def test_rows_without_labels_are_marked():
    rows = tokenise(padded_tokenizer("bert"), TEXTS, max_length=16)
    assert rows.columns["labels"].tolist() == [-100] * 4
    assert rows.columns["labels"].dtype == np.int64


def test_many_rows_cross_the_pieces_in_order():
    tokenizer = padded_tokenizer("gpt2")
    texts = [TEXTS[index % 4] for index in range(4096 * 2 + 3)]
    rows = tokenise(tokenizer, texts, max_length=16, labels=range(len(texts)))
    assert len(rows) == len(texts)
    for index in (0, 4095, 4096, 8191, 8192, 8194):
        assert rows[index]["input_ids"].tolist() == tokenizer(texts[index])["input_ids"]
        assert rows[index]["labels"] == index


def test_tokens_cost_four_bytes_and_token_types_one():
    rows = tokenise(padded_tokenizer("bert"), TEXTS, PAIRS, max_length=64)
    assert rows.tokens.nbytes == 4 * rows.lengths.sum()
    assert rows.token_types.nbytes == rows.lengths.sum()


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_no_texts(family):
    rows = tokenise(padded_tokenizer(family), [], max_length=16)
    assert len(rows) == 0
    assert rows.lengths.tolist() == []
    assert list(rows) == []
    assert len(rows.select([])) == 0
    full = tokenise(padded_tokenizer(family), TEXTS, max_length=16)
    for joined in (TokenisedRows.join(rows, full), TokenisedRows.join(full, rows)):
        assert ids_of(joined) == ids_of(full)
        assert (joined.token_types is None) == (family == "gpt2")


def test_a_text_without_any_token_is_refused_by_number():
    with pytest.raises(DataError, match="Row 2 has no tokens"):
        tokenise(padded_tokenizer("gpt2"), ["the goal", "we", "", "a"], max_length=16)
    assert tokenise(padded_tokenizer("bert"), [""], max_length=16).lengths.tolist() == [2]


def test_other_numbers_of_labels_or_pairs_are_refused():
    tokenizer = padded_tokenizer("bert")
    with pytest.raises(DataError, match="labels has 3 rows, the texts have 4"):
        tokenise(tokenizer, TEXTS, max_length=16, labels=[0, 1, 2])
    for pairs in (PAIRS[:3], [*PAIRS, "a"]):
        with pytest.raises(DataError, match=f"{len(pairs)} second texts"):
            tokenise(tokenizer, TEXTS, pairs, max_length=16)


# -- rows


def test_a_row_by_hand(rows):
    row = rows[2]
    assert row["input_ids"].tolist() == [5, 6]
    assert row["token_type_ids"].tolist() == [0, 1]
    assert row["labels"] == 9
    assert row["teacher_logits"].tolist() == [4.0, 5.0]
    assert len(rows) == 3
    assert rows.lengths.tolist() == [3, 1, 2]


def test_rows_count_from_the_end_and_end(rows):
    assert rows[-1]["input_ids"].tolist() == [5, 6]
    assert rows[-3]["input_ids"].tolist() == [1, 2, 3]
    assert [row["labels"] for row in rows] == [7, 8, 9]
    for index in (3, -4):
        with pytest.raises(IndexError):
            rows[index]


def test_select_keeps_the_order_asked_for(rows):
    chosen = rows.select([2, 0, 2])
    assert ids_of(chosen) == [[5, 6], [1, 2, 3], [5, 6]]
    assert chosen[0]["token_type_ids"].tolist() == [0, 1]
    assert chosen.columns["labels"].tolist() == [9, 7, 9]
    assert chosen.columns["teacher_logits"].tolist() == [[4, 5], [0, 1], [4, 5]]
    assert ids_of(rows.select([])) == []
    assert ids_of(rows) == [[1, 2, 3], [4], [5, 6]]


def test_select_understands_masks_and_negative_numbers(rows):
    assert ids_of(rows.select(np.array([True, False, True]))) == [[1, 2, 3], [5, 6]]
    assert ids_of(rows.select([-1, -2])) == [[5, 6], [4]]
    with pytest.raises(IndexError):
        rows.select([3])


def test_join(rows):
    joined = TokenisedRows.join(rows, rows.select([1, 0]))
    assert ids_of(joined) == [[1, 2, 3], [4], [5, 6], [4], [1, 2, 3]]
    assert joined[4]["token_type_ids"].tolist() == [0, 0, 1]
    assert joined.columns["labels"].tolist() == [7, 8, 9, 8, 7]
    assert joined.columns["teacher_logits"].shape == (5, 2)


def test_join_refuses_rows_that_do_not_fit(rows):
    with pytest.raises(DataError, match=r"Columns differ: .*labels.*weights"):
        TokenisedRows.join(rows, rows.with_columns(weights=np.ones(3)))
    untyped = TokenisedRows(rows.tokens, None, rows.starts, rows.columns)
    for pair in ((rows, untyped), (untyped, rows)):
        with pytest.raises(DataError, match="token types"):
            TokenisedRows.join(*pair)


def test_with_columns(rows):
    wider = rows.with_columns(weights=np.array([0.5, 1.0, 2.0]), labels=np.array([1, 1, 1]))
    assert wider[1]["weights"] == 1.0
    assert wider.columns["labels"].tolist() == [1, 1, 1]
    assert set(rows.columns) == {"labels", "teacher_logits"}
    with pytest.raises(DataError, match="Column weights has 2 rows, the texts have 3"):
        rows.with_columns(weights=np.ones(2))


# -- batches


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2", "qwen2"])
def test_batches_equal_those_of_the_tokenizer(family, multiple, side):
    tokenizer = padded_tokenizer(family, side)
    rows = tokenise(tokenizer, TEXTS, PAIRS, max_length=64, labels=[3, 1, 0, 2])
    collator = Collator(tokenizer.pad_token_id, side, multiple)
    batch = collator([rows[index] for index in range(4)])
    encoded = [tokenizer(text, pair) for text, pair in zip(TEXTS, PAIRS, strict=True)]
    expected = tokenizer.pad(encoded, return_tensors="pt", pad_to_multiple_of=multiple)
    assert set(batch) == {*expected, "labels"}
    for name, values in expected.items():
        assert torch.equal(batch[name], values), name
        assert batch[name].dtype == torch.int64
    assert batch["labels"].tolist() == [3, 1, 0, 2]
    assert batch["input_ids"].shape[1] % multiple == 0


def test_batch_by_hand(rows):
    batch = Collator(99, multiple_of=4)([rows[1], rows[2]])
    assert batch["input_ids"].tolist() == [[4, 99, 99, 99], [5, 6, 99, 99]]
    assert batch["attention_mask"].tolist() == [[1, 0, 0, 0], [1, 1, 0, 0]]
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 0], [0, 1, 0, 0]]
    assert batch["labels"].tolist() == [8, 9]
    assert batch["teacher_logits"].tolist() == [[2, 3], [4, 5]]
    left = Collator(99, "left")([rows[0], rows[2]])
    assert left["input_ids"].tolist() == [[1, 2, 3], [99, 5, 6]]
    assert left["attention_mask"].tolist() == [[1, 1, 1], [0, 1, 1]]
    assert left["token_type_ids"].tolist() == [[0, 0, 1], [0, 0, 1]]


@pytest.mark.parametrize(("rounded_to", "width"), [(None, 4), (6, 4), (3, 3), (2, 3)])
def test_rounding_up_stops_where_a_model_has_no_more_positions(rows, rounded_to, width):
    """The longest of these rows has three tokens: it is never cut."""
    batch = Collator(99, multiple_of=4, rounded_to=rounded_to)([rows[0], rows[2]])
    assert batch["input_ids"].shape == (2, width)


def test_collator_needs_a_padding_token():
    with pytest.raises(DataError, match="no padding token"):
        Collator.for_tokenizer(build_tokenizer("gpt2"))
    for side in ("right", "left"):  # see test_predictions_are_those_of_each_row_alone
        tokenizer = padded_tokenizer("roberta", side)
        assert Collator.for_tokenizer(tokenizer, multiple_of=8) == Collator(1, "right", 8)
