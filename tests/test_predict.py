"""Outputs for many rows: in order, and the same as for each row alone."""

import numpy as np
import pytest
import torch
from tiny import DECODERS, LABELS, make_rows

from nlpxfer.checkpoint import load_classifier
from nlpxfer.checkpoint.head import features
from nlpxfer.data.schema import LabelSchema
from nlpxfer.data.tokenise import Collator, tokenise
from nlpxfer.methods.base import model_inputs
from nlpxfer.train.predict import batches_by_length, predict

SCHEMA = LabelSchema(LABELS)
TEXTS = [row["text"] for row in make_rows(37, seed=3, words=20)]


@pytest.fixture
def load(tiny_checkpoint):
    def load(family, side="right", **options):
        checkpoint = load_classifier(str(tiny_checkpoint(family, "classifier", **options)), schema=SCHEMA)
        checkpoint.tokenizer.padding_side = side
        rows = tokenise(checkpoint.tokenizer, TEXTS, max_length=32)
        return checkpoint.model, rows, Collator.for_tokenizer(checkpoint.tokenizer)

    return load


def one_by_one(model, rows):
    model.eval()
    with torch.no_grad():
        return np.concatenate(
            [model(torch.from_numpy(row["input_ids"][None].astype(np.int64))).logits for row in rows]
        )


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "modernbert", *DECODERS])
def test_predictions_are_those_of_each_row_alone(load, family, side):
    model, rows, collator = load(family, side)
    assert len(set(rows.lengths)) > 5
    found = predict(model, rows, collator, batch_size=5)
    assert found.dtype == np.float32
    assert found.shape == (37, 4)
    np.testing.assert_allclose(found, one_by_one(model, rows), atol=1e-5)
    assert np.abs(found - found[0]).max() > 1e-2  # rows differ, so a wrong order would show


@pytest.mark.parametrize("family", DECODERS)
def test_decoders_read_the_last_real_token_with_padding_on_either_side(load, family):
    """Positions are given: counted from the padding, as GPT-2 has it without, they would tell the sides apart."""
    model, rows, _ = load(family)
    chosen = [rows[i] for i in range(8)]
    assert len({len(row["input_ids"]) for row in chosen}) > 3
    expected = one_by_one(model, chosen)
    for side in ("right", "left"):
        batch = model_inputs(Collator(model.config.pad_token_id, side)(chosen))
        assert (batch["attention_mask"][:, 0 if side == "left" else -1] == 0).any()
        positions = (batch["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
        with torch.no_grad():
            logits = model(**batch, position_ids=positions).logits
        np.testing.assert_allclose(logits, expected, atol=1e-5, err_msg=side)
    assert np.abs(expected - expected[0]).max() > 1e-2


@pytest.mark.parametrize("batch_size", [1, 3, 64, 1000])
def test_batch_size_does_not_matter(load, batch_size):
    model, rows, collator = load("bert")
    expected = predict(model, rows, collator, batch_size=8)
    np.testing.assert_allclose(predict(model, rows, collator, batch_size=batch_size), expected, atol=1e-5)


def test_order_of_the_rows_does_not_matter(load):
    model, rows, collator = load("bert")
    order = np.random.default_rng(0).permutation(len(rows))
    shuffled = predict(model, rows.select(order), collator, batch_size=4)
    np.testing.assert_allclose(shuffled, predict(model, rows, collator, batch_size=4)[order], atol=1e-5)


def test_model_is_evaluated_and_put_back(load):
    model, rows, collator = load("bert", dropout=0.5)
    model.train()
    model.bert.embeddings.eval()
    first = predict(model, rows, collator)
    assert model.training
    assert model.bert.encoder.training
    assert not model.bert.embeddings.training
    assert np.array_equal(first, predict(model.eval(), rows, collator))
    assert not model.training


def test_model_is_put_back_after_a_failure(load):
    model, rows, collator = load("bert")
    model.train()

    def fail(model, inputs):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        predict(model, rows, collator, output=fail)
    assert model.training


def test_other_outputs(load):
    model, rows, collator = load("bert")
    read = predict(model, rows, collator, output=features, batch_size=4)
    logits = read @ model.classifier.weight.detach().numpy().T + model.classifier.bias.detach().numpy()
    np.testing.assert_allclose(logits, predict(model, rows, collator), atol=1e-5)


def test_columns_are_kept_from_the_model(load):
    model, rows, collator = load("bert")
    seen = set()

    def note(model, inputs):
        seen.update(inputs)
        assert not torch.is_grad_enabled()
        return model(**inputs).logits

    predict(model, rows.with_columns(teacher_logits=np.zeros((37, 4))), collator, output=note)
    assert seen == {"input_ids", "attention_mask", "token_type_ids"}


def test_bf16_is_near_but_not_equal(load):
    model, rows, collator = load("bert")
    exact, rough = predict(model, rows, collator), predict(model, rows, collator, bf16=True)
    assert rough.dtype == np.float32
    assert 0 < np.abs(exact - rough).max() < 0.1 * np.abs(exact).max()


def test_no_rows(load):
    model, rows, collator = load("bert")
    with pytest.raises(ValueError, match="no rows"):
        predict(model, rows.select([]), collator)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_batches_respect_the_budget(batch_size):
    lengths = np.random.default_rng(0).integers(1, 120, size=1001)
    batches = batches_by_length(lengths, batch_size)
    assert sorted(np.concatenate(batches).tolist()) == list(range(1001))
    assert lengths[batches[0][0]] == lengths.max()
    sizes = [len(batch) for batch in batches]
    assert max(sizes) <= 2 * batch_size
    assert min(sizes[:-1]) >= batch_size
    for batch in batches:
        assert len(batch) * lengths[batch].max() <= batch_size * lengths.max()
    firsts = [lengths[batch].max() for batch in batches]
    assert firsts == sorted(firsts, reverse=True)


def test_batches_of_nothing():
    assert batches_by_length(np.zeros(0, dtype=int), 4) == []
