"""The head of each family: found, readable, replaceable, transparent."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import DECODERS, ENCODERS, FAMILIES, HIDDEN, LABELS

from nlpxfer.checkpoint import load_classifier
from nlpxfer.checkpoint.head import (
    PooledMoments,
    embedding_parameters,
    features,
    head_of,
    make_transparent_,
    pooled_moments,
    replace_final_,
    set_final_,
)
from nlpxfer.data.schema import LabelSchema
from nlpxfer.errors import CheckpointError, ConfigError

SCHEMA = LabelSchema(LABELS)
TEXTS = ["the goal", "bread and cheese in the kitchen for dinner", "we took the train", "a"]

EXPECTED = {
    "bert": ("classifier", ["bert.pooler.dense"], "tanh"),
    "albert": ("classifier", ["albert.pooler"], "tanh"),
    "roberta": ("classifier.out_proj", ["classifier.dense"], "tanh"),
    "xlm-roberta": ("classifier.out_proj", ["classifier.dense"], "tanh"),
    "electra": ("classifier.out_proj", ["classifier.dense"], "gelu"),
    "distilbert": ("classifier", ["pre_classifier"], "relu"),
    "deberta-v2": ("classifier", ["pooler.dense"], "gelu"),
    "modernbert": ("classifier", ["head.dense"], "gelu"),
    **dict.fromkeys(DECODERS, ("score", [], "")),
}


@pytest.fixture
def load(tiny_checkpoint):
    def load(family, kind="base"):
        checkpoint = load_classifier(str(tiny_checkpoint(family, kind)), schema=SCHEMA)
        return checkpoint.model, checkpoint.tokenizer

    return load


def batch_of(tokenizer, side="right"):
    tokenizer.padding_side = side
    return dict(tokenizer(TEXTS, padding=True, return_tensors="pt"))


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_of_the_head(load, family):
    model, _ = load(family)
    parts = head_of(model)
    assert (parts.final_name, list(parts.transforms), parts.activation) == EXPECTED[family]
    assert parts.final is model.get_submodule(parts.final_name)
    assert parts.has_bias == (family not in DECODERS)
    assert (parts.norm is not None) == (family == "modernbert")


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_final_layer_of_the_features(load, family, side):
    model, tokenizer = load(family, "classifier")
    batch = batch_of(tokenizer, side)
    assert (batch["attention_mask"] == 0).any()
    read = features(model, {**batch, "labels": torch.zeros(4, dtype=torch.long)})
    assert read.shape == (4, HIDDEN)
    logits = model(**batch).logits
    torch.testing.assert_close(head_of(model).final(read), logits, rtol=0, atol=1e-5)
    assert (logits[0] - logits[1]).abs().max() > 1e-4
    assert read.requires_grad
    assert not head_of(model).final._forward_pre_hooks


def test_features_of_a_single_row_without_pad_token(load):
    model, tokenizer = load("gpt2")
    model.config.pad_token_id = None
    batch = dict(tokenizer(["the goal of the match"], return_tensors="pt"))
    torch.testing.assert_close(model.score(features(model, batch)), model(**batch).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_set_final_makes_the_probe_the_classifier(load, family):
    model, tokenizer = load(family)
    batch = batch_of(tokenizer)
    weight, bias = torch.randn(4, HIDDEN), torch.randn(4)
    read = features(model, batch)
    if family in DECODERS:
        with pytest.raises(CheckpointError, match="no bias"):
            set_final_(model, weight, bias)
        set_final_(model, weight, None)
        expected = read @ weight.T
    else:
        set_final_(model, weight, bias)
        expected = read @ weight.T + bias
    torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-5, atol=1e-5)
    set_final_(model, weight, None)
    torch.testing.assert_close(model(**batch).logits, read @ weight.T, rtol=1e-5, atol=1e-5)
    with pytest.raises(CheckpointError, match="shape"):
        set_final_(model, torch.zeros(3, HIDDEN), None)


def pooled_states(model, batch):
    """Independent of the code under test: what the base model says about the first token."""
    return getattr(model, model.base_model_prefix)(**batch)[0][:, 0].detach()


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("family", ENCODERS)
def test_moments_of_the_pooled_state(load, family):
    model, tokenizer = load(family)
    batch = batch_of(tokenizer)
    states = pooled_states(model, batch).double().numpy()
    halves = [{key: value[rows] for key, value in batch.items()} for rows in (slice(0, 2), slice(2, 4))]
    moments = pooled_moments(model, halves)
    np.testing.assert_allclose(moments.mean_H, states.mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(moments.deviation_H, states.std(axis=0, ddof=1), atol=1e-5)


@pytest.mark.parametrize("family", DECODERS)
def test_moments_of_decoders_are_those_of_the_features(load, family):
    model, tokenizer = load(family)
    batch = batch_of(tokenizer, "left")
    states = features(model, batch).detach().double().numpy()
    moments = pooled_moments(model, [batch, batch])
    np.testing.assert_allclose(moments.mean_H, states.mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(moments.deviation_H, np.tile(states, (2, 1)).std(axis=0, ddof=1), atol=1e-5)


@pytest.mark.parametrize("size", [0.5, 0.1])
@pytest.mark.parametrize("family", ENCODERS)
def test_transparent_head_standardises_the_pooled_state(load, family, size):
    """z = size (x - m) / s + b has the mean b and the deviation `size` in each entry; without a bias the latter."""
    model, tokenizer = load(family)
    batch = batch_of(tokenizer)
    pooled = pooled_states(model, batch)
    before = state_of(model)
    moments = pooled_moments(model, [batch])
    make_transparent_(model, moments, size=size)
    name = EXPECTED[family][1][0]
    z = model.get_submodule(name)(pooled).detach()
    torch.testing.assert_close(z.std(dim=0), torch.full((HIDDEN,), size), rtol=1e-3, atol=1e-5)
    offset = {"tanh": 0.0, "relu": 6 * size, "gelu": math.sqrt(2)}[EXPECTED[family][2]]
    if family == "modernbert":  # no bias, so the mean stays
        expected = pooled.mean(dim=0) * size / pooled.std(dim=0)
        torch.testing.assert_close(z.mean(dim=0), expected, rtol=1e-3, atol=1e-4)
        assert torch.equal(model.head.norm.weight, torch.ones(HIDDEN))
    else:
        torch.testing.assert_close(z.mean(dim=0), torch.full((HIDDEN,), offset), rtol=1e-3, atol=1e-4)
    after = model.state_dict()
    changed = {key for key, value in after.items() if not torch.equal(value, before[key])}
    assert f"{name}.weight" in changed
    assert changed <= {f"{name}.weight", f"{name}.bias", "head.norm.weight"}


@pytest.mark.parametrize("family", sorted(set(ENCODERS) - {"modernbert"}))
def test_transparent_head_is_nearly_a_straight_line(load, family):
    """With the Taylor bound of each activation around its offset; relu is a straight line as long as z > 0."""
    model, tokenizer = load(family)
    batch = batch_of(tokenizer)
    pooled = pooled_states(model, batch)
    make_transparent_(model, pooled_moments(model, [batch]), size=0.1)
    z = 0.1 * (pooled - pooled.mean(dim=0)) / pooled.std(dim=0)
    # Value, slope, and the factor of |error| <= factor |z|^3. Phi and phi at sqrt 2 are 0.92135 and 0.14676.
    offset, slope, cubic = {
        "tanh": (0.0, 1.0, 1 / 3),
        "relu": (0.6, 1.0, 0.0),
        "gelu": (math.sqrt(2) * 0.9213504, 0.9213504 + math.sqrt(2) * 0.1467627, 0.0692),
    }[EXPECTED[family][2]]
    error = (features(model, batch).detach() - offset - slope * z).abs()
    assert (error <= cubic * z.abs() ** 3 * 1.2 + 1e-4).all()


def test_an_entry_that_does_not_vary_is_not_blown_up(load):
    model, _ = load("bert")
    deviation = torch.full((HIDDEN,), 2.0)
    deviation[3] = 0.0
    make_transparent_(model, PooledMoments(torch.zeros(HIDDEN), deviation), size=0.5)
    scale = model.bert.pooler.dense.weight.diagonal()
    assert scale[0].item() == pytest.approx(0.25)
    assert scale[3].item() == pytest.approx(0.5 / 0.2, rel=1e-4)  # a tenth of the median deviation


@pytest.mark.parametrize("family", FAMILIES)
def test_probe_on_the_features_of_a_transparent_head_starts_the_classifier(load, family):
    model, tokenizer = load(family)
    batch = batch_of(tokenizer)
    make_transparent_(model, pooled_moments(model, [batch]), size=0.5)
    read = features(model, batch).detach().double().numpy()
    weight, bias = np.random.default_rng(0).normal(size=(4, HIDDEN)), np.arange(4.0)
    if family in DECODERS:
        bias = np.zeros(4)
    set_final_(model, torch.from_numpy(weight), None if family in DECODERS else torch.from_numpy(bias))
    logits = model(**batch).logits.detach().numpy()
    np.testing.assert_allclose(logits, read @ weight.T + bias, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", DECODERS)
def test_decoders_have_nothing_to_make_transparent(load, family):
    model, tokenizer = load(family)
    before = state_of(model)
    make_transparent_(model, pooled_moments(model, [batch_of(tokenizer, "left")]))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("change", ["shape", "activation"])
def test_heads_that_cannot_start_from_a_probe_say_what_to_do(load, monkeypatch, change):
    model, tokenizer = load("roberta")
    moments = pooled_moments(model, [batch_of(tokenizer)])
    if change == "shape":
        model.classifier.dense = torch.nn.Linear(HIDDEN, 2 * HIDDEN)
    else:
        found = replace(head_of(model), activation="selu")
        monkeypatch.setattr("nlpxfer.checkpoint.head.head_of", lambda _: found)
    with pytest.raises(CheckpointError, match=r"--linear_probe false"):
        make_transparent_(model, moments)


def test_impossible_requests_are_refused(load):
    model, tokenizer = load("bert")
    sound = PooledMoments(torch.zeros(HIDDEN), torch.ones(HIDDEN))
    for size in (0.0, -1.0, math.nan):
        with pytest.raises(ConfigError, match="positive size"):
            make_transparent_(model, sound, size=size)
    for value in (math.nan, math.inf):
        with pytest.raises(ConfigError, match="finite moments"):
            make_transparent_(model, PooledMoments(torch.zeros(HIDDEN), torch.full((HIDDEN,), value)))
        with pytest.raises(ConfigError, match="finite moments"):
            make_transparent_(model, PooledMoments(torch.full((HIDDEN,), value), torch.ones(HIDDEN)))
    one_row = {key: value[:1] for key, value in batch_of(tokenizer).items()}
    for batches in ([], [one_row]):
        with pytest.raises(ConfigError, match="two rows"):
            pooled_moments(model, batches)
    model.classifier = torch.nn.Linear(HIDDEN, 7)
    with pytest.raises(CheckpointError, match="no classification layer with 4 outputs"):
        head_of(model)
    model, _ = load("deberta-v2")
    model.config.pooler_hidden_act = "mish"
    with pytest.raises(CheckpointError, match="'mish'"):
        make_transparent_(model, sound)


def test_refused_activation_leaves_the_weights_as_they_were(load):
    model, _ = load("deberta-v2")
    model.config.pooler_hidden_act = "mish"
    before = state_of(model)
    with pytest.raises(CheckpointError):
        make_transparent_(model, PooledMoments(torch.zeros(HIDDEN), torch.ones(HIDDEN)))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_moments_ignore_dropout_and_restore_the_mode(tiny_checkpoint):
    checkpoint = load_classifier(str(tiny_checkpoint("bert", dropout=0.5)), schema=SCHEMA)
    batch = batch_of(checkpoint.tokenizer)
    expected = pooled_moments(checkpoint.model, [batch])
    checkpoint.model.train()
    checkpoint.model.bert.embeddings.eval()
    found = pooled_moments(checkpoint.model, [batch])
    assert torch.equal(found.mean_H, expected.mean_H)
    assert torch.equal(found.deviation_H, expected.deviation_H)
    assert checkpoint.model.training
    assert not checkpoint.model.bert.embeddings.training
    assert not checkpoint.model.bert.pooler.dense._forward_pre_hooks


@pytest.mark.parametrize("family", FAMILIES)
def test_replaced_final_has_the_new_size(load, family):
    model, tokenizer = load(family, "classifier")
    replace_final_(model, 7)
    assert model(**batch_of(tokenizer)).logits.shape == (4, 7)
    assert head_of(model).final.weight.std().item() == pytest.approx(0.1, rel=0.25)  # initializer_range of tiny models
    assert head_of(model).has_bias == (family not in DECODERS)


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("bert", ["word_embeddings", "position_embeddings", "token_type_embeddings"]),
        ("xlm-roberta", ["word_embeddings", "token_type_embeddings", "position_embeddings"]),
        ("electra", ["word_embeddings", "position_embeddings", "token_type_embeddings"]),
        ("albert", ["word_embeddings", "position_embeddings", "token_type_embeddings"]),
        ("distilbert", ["word_embeddings", "position_embeddings"]),
        ("deberta-v2", ["word_embeddings"]),
        ("modernbert", ["tok_embeddings"]),
        ("gpt2", ["wte", "wpe"]),
        ("qwen2", ["embed_tokens"]),
        ("llama", ["embed_tokens"]),
        ("gpt_neox", ["embed_in"]),
    ],
)
def test_embedding_parameters(load, family, names):
    model, _ = load(family)
    found = embedding_parameters(model)
    assert [name.split(".")[-2] for name, _ in found] == names
    parameters = dict(model.named_parameters())
    assert all(parameters[name] is parameter for name, parameter in found)
