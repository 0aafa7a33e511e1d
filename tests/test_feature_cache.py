"""Frozen features come from the model once, and from disk after that; whatever they depend on gives others."""

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import ENCODERS, LABELS, make_rows

from nlpxfer.checkpoint import load_classifier, use_mean_pooling
from nlpxfer.checkpoint.fingerprint import body_fingerprint
from nlpxfer.checkpoint.head import head_logits, head_of, head_parameters, pooled_states
from nlpxfer.config.long_texts import LongTexts
from nlpxfer.data.schema import LabelSchema
from nlpxfer.data.tokenise import Collator, tokenise
from nlpxfer.errors import NoSpaceError, NotFiniteError, StaleCacheError
from nlpxfer.train import feature_cache
from nlpxfer.train.feature_cache import pooled_features, row_keys

SCHEMA = LabelSchema(LABELS)
TEXTS = list(dict.fromkeys(row["text"] for row in make_rows(40, seed=4, words=20)))


class Asked:
    """Counts the texts that go through a model, and can break off."""

    def __init__(self, model, monkeypatch):
        self.texts, self.passes, self.breaks_at, forward = 0, 0, None, model.forward

        def counted(**inputs):
            self.passes += 1
            if self.passes == self.breaks_at:
                raise KeyboardInterrupt
            self.texts += len(inputs["input_ids"])
            return forward(**inputs)

        monkeypatch.setattr(model, "forward", counted)

    def since(self):
        count, self.texts = self.texts, 0
        return count


@pytest.fixture
def load(tiny_checkpoint):
    def load(family="bert", seed=0, head_seed=1, **options):
        return load_classifier(str(tiny_checkpoint(family, seed=seed, **options)), schema=SCHEMA, seed=head_seed)

    return load


@pytest.fixture
def bert(load):
    return load()


def rows_of(checkpoint, texts=TEXTS, pairs=None, max_length=32):
    return tokenise(checkpoint.tokenizer, texts, pairs, max_length=max_length)


def features_of(checkpoint, folder, texts=TEXTS, model=None, pairs=None, max_length=32, **options):
    rows, collator = rows_of(checkpoint, texts, pairs, max_length), Collator.for_tokenizer(checkpoint.tokenizer)
    return pooled_features(model or checkpoint.model, rows, collator, batch_size=4, folder=folder, **options)


# -- what the head reads


@pytest.mark.parametrize("family", [*ENCODERS, "gpt2", "qwen2", "llama"])
def test_the_head_on_pooled_states_gives_the_models_logits(load, family):
    checkpoint = load(family)
    model, rows = checkpoint.model, rows_of(checkpoint)
    batch = Collator.for_tokenizer(checkpoint.tokenizer)([rows[i] for i in range(7)])
    inputs = {name: values for name, values in batch.items() if name != "labels"}
    with torch.no_grad():
        pooled = pooled_states(model, batch)
        assert pooled.shape == (7, 32)
        torch.testing.assert_close(head_logits(model, pooled), model(**inputs).logits, rtol=1e-5, atol=1e-6)
        for parameter in head_parameters(model).values():
            parameter.add_(1.0)
        torch.testing.assert_close(pooled_states(model, batch), pooled, rtol=0, atol=0)
    transforms = head_of(model).transforms
    assert bool(transforms) == (family in ENCODERS)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_features_are_those_of_each_row_alone(load, family, tmp_path):
    checkpoint = load(family)
    found = features_of(checkpoint, tmp_path).states_NH
    assert found.dtype == np.float32
    for text, row in zip(TEXTS, found, strict=True):
        ids = checkpoint.tokenizer(text, return_tensors="pt")["input_ids"][:, :32]
        base = checkpoint.model.base_model(input_ids=ids).last_hidden_state[0]
        np.testing.assert_allclose(row, base[0 if family == "bert" else -1].detach(), atol=1e-5)


# -- once


def test_the_second_time_nothing_goes_through_the_model(bert, tmp_path, monkeypatch):
    asked = Asked(bert.model, monkeypatch)
    first = features_of(bert, tmp_path)
    assert asked.since() == first.computed == len(TEXTS)
    assert first.tokens == rows_of(bert).lengths.sum()
    again = features_of(bert, tmp_path)
    np.testing.assert_array_equal(again.states_NH, first.states_NH)
    order = np.random.default_rng(0).permutation(len(TEXTS))
    shuffled = features_of(bert, tmp_path, [TEXTS[i] for i in order])
    np.testing.assert_array_equal(shuffled.states_NH, first.states_NH[order])
    assert (again.computed, shuffled.computed, again.tokens, asked.since()) == (0, 0, 0, 0)
    assert again.facts() == {"rows": len(TEXTS), "computed": 0, "bytes": len(TEXTS) * 32 * 4} | {
        "seconds": again.seconds,
        "key": first.key,
    }


def test_a_new_head_and_other_labels_read_the_same_features(bert, load, tiny_checkpoint, tmp_path, monkeypatch):
    first = features_of(bert, tmp_path)
    others = [load(head_seed=5), load_classifier(str(tiny_checkpoint("bert")), schema=LabelSchema(("a", "b")))]
    with torch.no_grad():
        others[0].model.bert.pooler.dense.weight.zero_()
    for other in others:
        asked = Asked(other.model, monkeypatch)
        np.testing.assert_array_equal(features_of(other, tmp_path).states_NH, first.states_NH)
        assert asked.since() == 0


def test_further_texts_alone_are_computed(bert, tmp_path, monkeypatch):
    asked = Asked(bert.model, monkeypatch)
    features_of(bert, tmp_path, TEXTS[:10])
    assert asked.since() == 10
    found = features_of(bert, tmp_path, [TEXTS[20], *TEXTS[5:12], TEXTS[20], TEXTS[0]])
    assert asked.since() == found.computed == 3, "one new text twice, two more, and six known ones"
    np.testing.assert_array_equal(found.states_NH[0], found.states_NH[8])
    np.testing.assert_allclose(
        found.states_NH, features_of(bert, tmp_path / "b").states_NH[[20, *range(5, 12), 20, 0]], atol=1e-6
    )


def test_another_cut_shares_the_texts_that_it_leaves_alone(bert, tmp_path, monkeypatch):
    features_of(bert, tmp_path)
    asked = Asked(bert.model, monkeypatch)
    found = features_of(bert, tmp_path, max_length=10)
    longer = int((rows_of(bert).lengths > 10).sum())
    assert 0 < asked.since() == found.computed == longer < len(TEXTS)
    fresh = features_of(bert, tmp_path / "fresh", max_length=10)
    np.testing.assert_allclose(found.states_NH, fresh.states_NH, atol=1e-6)


def test_pairs_are_no_texts(bert, tmp_path):
    texts, pairs = ["the goal", "the goal"], ["bread", "guitar"]
    both = features_of(bert, tmp_path, texts, pairs=pairs)
    alone = features_of(bert, tmp_path, texts)
    assert (both.computed, alone.computed) == (2, 1)
    assert np.abs(both.states_NH[0] - both.states_NH[1]).max() > 1e-4
    split = rows_of(bert, ["the goal"], ["bread"])
    other = type(split)(split.tokens, np.zeros_like(split.token_types), split.starts, split.columns)
    assert row_keys(split) != row_keys(other), "segments count"


def test_windows_of_the_same_tokens_are_other_rows(bert):
    plan, texts = LongTexts(policy="sliding_window"), ["a b", " ".join(["goal"] * 20)]
    rows = tokenise(bert.tokenizer, texts, max_length=8, long_texts=plan)
    assert row_keys(rows)[0] == row_keys(tokenise(bert.tokenizer, texts, max_length=8))[0]
    cut = replace(rows, windows=np.array([*rows.windows[:-2], rows.windows[-2] + 1, rows.windows[-1]]))
    assert row_keys(cut)[0] == row_keys(rows)[0]
    assert row_keys(cut)[1] != row_keys(rows)[1]


def test_whatever_the_features_depend_on_gives_others(bert, load, tmp_path):
    body = load(head_seed=1)
    with torch.no_grad():
        body.model.bert.encoder.layer[1].output.dense.bias[3] += 1e-3
    activation = load(hidden_act="relu")
    found = {
        "plain": features_of(bert, tmp_path),
        "bfloat16": features_of(bert, tmp_path, bf16=True),
        "weights": features_of(body, tmp_path),
        "config": features_of(activation, tmp_path),
        "pooling": features_of(bert, tmp_path, model=use_mean_pooling(bert.model)),
    }
    assert len({features.key for features in found.values()}) == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(features.key for features in found.values())
    for name, features in found.items():
        assert features.computed == len(TEXTS)
        if name != "plain":
            assert np.abs(features.states_NH - found["plain"].states_NH).max() > 1e-6, name


def test_mean_pooling_of_modernbert_is_in_the_config_alone(load):
    model = load("modernbert").model
    assert body_fingerprint(model) != body_fingerprint(use_mean_pooling(model))


def test_default_folder(bert, tmp_path, monkeypatch):
    monkeypatch.setenv("NLPXFER_CACHE", str(tmp_path / "mine"))
    found = features_of(bert, None)
    assert [path.name for path in (tmp_path / "mine" / "features").iterdir()] == [found.key]


def test_the_log_says_how_much_memory_they_take(bert, tmp_path, caplog):
    caplog.set_level("INFO", logger="nlpxfer")
    features_of(bert, tmp_path, TEXTS[:5])
    assert "5 rows of 32 numbers (0.0 MB), 5 computed in float32" in caplog.text


# -- interruption and damage


def test_an_interrupted_pass_goes_on(bert, tmp_path, monkeypatch):
    monkeypatch.setattr(feature_cache, "PART_ROWS", 8)
    whole = features_of(bert, tmp_path / "whole").states_NH
    asked = Asked(bert.model, monkeypatch)
    asked.breaks_at = 6
    with pytest.raises(KeyboardInterrupt):
        features_of(bert, tmp_path / "cut")
    kept = 8 * len(list((tmp_path / "cut").rglob("part-*.safetensors")))
    assert 0 < kept < len(TEXTS)
    asked.since()
    rest = features_of(bert, tmp_path / "cut")
    assert asked.since() == rest.computed == len(TEXTS) - kept
    np.testing.assert_allclose(rest.states_NH, whole, atol=1e-6)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-10])


def flip_last_bit(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("harm", [truncate, flip_last_bit, lambda path: path.write_bytes(b"")])
def test_a_damaged_part_is_computed_anew(bert, tmp_path, monkeypatch, caplog, harm):
    monkeypatch.setattr(feature_cache, "PART_ROWS", 16)
    first = features_of(bert, tmp_path)
    parts = sorted(tmp_path.rglob("part-*.safetensors"))
    assert len(parts) == 3
    harm(parts[0])
    asked = Asked(bert.model, monkeypatch)
    again = features_of(bert, tmp_path)
    assert 0 < asked.since() == again.computed < len(TEXTS)
    assert parts[0].name in caplog.text
    assert "computed anew" in caplog.text
    np.testing.assert_allclose(again.states_NH, first.states_NH, atol=1e-6)
    caplog.clear()
    features_of(bert, tmp_path)
    assert asked.since() == 0
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_a_part_of_another_body_does_not_count(bert, load, tmp_path):
    """Copied by hand into the wrong folder."""
    mine, other = features_of(bert, tmp_path), features_of(load(seed=3), tmp_path)
    (part,) = (tmp_path / other.key).glob("part-*")
    (own,) = (tmp_path / mine.key).glob("part-*")
    part.rename(own.parent / part.name)
    own.unlink()
    again = features_of(bert, tmp_path)
    assert again.computed == len(TEXTS)
    np.testing.assert_array_equal(again.states_NH, mine.states_NH)


@pytest.mark.parametrize("content", ["{", '{"version": 0}', None])
def test_a_damaged_manifest_is_written_anew(bert, tmp_path, content):
    first = features_of(bert, tmp_path)
    manifest = tmp_path / first.key / "manifest.json"
    sound = manifest.read_text()
    manifest.unlink() if content is None else manifest.write_text(content)
    assert features_of(bert, tmp_path).computed == 0
    assert manifest.read_text() == sound


def test_a_folder_of_something_else_is_left_alone(bert, tmp_path):
    folder = tmp_path / features_of(bert, tmp_path / "elsewhere").key
    folder.mkdir()
    (folder / "thesis.tex").write_text("precious")
    with pytest.raises(StaleCacheError, match="is no feature cache"):
        features_of(bert, tmp_path)
    assert [path.name for path in folder.iterdir()] == ["thesis.tex"]


def test_features_that_are_not_finite_are_not_kept(bert, tmp_path):
    with torch.no_grad():
        bert.model.bert.encoder.layer[0].output.LayerNorm.weight[0] = float("nan")
    with pytest.raises(NotFiniteError, match="The model gives features that are NaN"):
        features_of(bert, tmp_path)
    assert list(tmp_path.rglob("part-*")) == []


def test_a_full_disk_is_noticed_before_the_pass(bert, tmp_path, monkeypatch):
    from collections import namedtuple

    usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10**6, 10**6 - 1000, 1000))
    asked = Asked(bert.model, monkeypatch)
    with pytest.raises(NoSpaceError, match="feature_cache"):
        features_of(bert, tmp_path)
    assert asked.since() == 0
