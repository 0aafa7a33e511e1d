"""The head of each family: found, readable, replaceable, transparent."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import DECODERS, ENCODERS, FAMILIES, HIDDEN, LABELS

from nlpxfer.checkpoint import load_classifier
from nlpxfer.checkpoint.head import (
    embedding_parameters,
    features,
    head_of,
    make_transparent_,
    pooled_rms,
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
    """Independent of the code under test: the first token's state, or the last real token's."""
    hidden = getattr(model, model.base_model_prefix)(**batch)[0]
    return hidden[:, 0]


@pytest.mark.parametrize("family", ENCODERS)
def test_transparent_head_passes_the_pooled_state_on(load, family):
    model, tokenizer = load(family)
    batch = batch_of(tokenizer)
    pooled = pooled_states(model, batch).detach()
    rms = pooled_rms(model, [batch])
    assert rms == pytest.approx(pooled.square().mean().sqrt().item(), rel=1e-4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    scale = make_transparent_(model, rms=rms, target_rms=0.1)
    assert scale == pytest.approx(0.1 / rms)
    read, scaled = features(model, batch).detach(), pooled * scale
    if family == "modernbert":  # no bias: gelu(z) is about z/2, then a LayerNorm over each row
        expected = torch.nn.functional.layer_norm(scaled, (HIDDEN,), eps=1e-5)
        cosine = torch.cosine_similarity(read, expected, dim=-1)
        assert cosine.min() > 0.98
    else:
        # Value, slope, and the factor of the Taylor bound |error| <= factor |z|^3 around the chosen bias.
        offset, slope, cubic = {
            "tanh": (0.0, 1.0, 1 / 3),
            "relu": (0.6, 1.0, 0.0),
            "gelu": (math.sqrt(2) * 0.9213504, 0.9213504 + math.sqrt(2) * 0.1467627, 0.0692),  # Phi, phi at sqrt 2
        }[EXPECTED[family][2]]
        error = (read - offset - slope * scaled).abs()
        assert (error <= cubic * scaled.abs() ** 3 * 1.2 + 1e-6).all()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    name = EXPECTED[family][1][0]
    allowed = {f"{name}.weight", f"{name}.bias", "head.norm.weight"}
    assert f"{name}.weight" in changed
    assert changed <= allowed


@pytest.mark.parametrize("family", DECODERS)
def test_decoders_have_nothing_to_make_transparent(load, family):
    model, tokenizer = load(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batch = batch_of(tokenizer, "left")
    rms = pooled_rms(model, [batch, batch])
    assert rms == pytest.approx(features(model, batch).square().mean().sqrt().item(), rel=1e-5)
    assert make_transparent_(model, rms=rms) == 1.0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_impossible_requests_are_refused(load):
    model, _ = load("bert")
    for rms in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ConfigError):
            make_transparent_(model, rms=rms)
    with pytest.raises(ConfigError, match="no batches"):
        pooled_rms(model, [])
    model.classifier = torch.nn.Linear(HIDDEN, 7)
    with pytest.raises(CheckpointError, match="no classification layer with 4 outputs"):
        head_of(model)
    model, _ = load("deberta-v2")
    model.config.pooler_hidden_act = "mish"
    with pytest.raises(CheckpointError, match="'mish'"):
        make_transparent_(model, rms=1.0)


def test_pooled_rms_ignores_dropout_and_restores_the_mode(tiny_checkpoint):
    checkpoint = load_classifier(str(tiny_checkpoint("bert", dropout=0.5)), schema=SCHEMA)
    batch = batch_of(checkpoint.tokenizer)
    expected = pooled_rms(checkpoint.model, [batch])
    checkpoint.model.train()
    checkpoint.model.bert.embeddings.eval()
    assert pooled_rms(checkpoint.model, [batch]) == expected
    assert checkpoint.model.training
    assert not checkpoint.model.bert.embeddings.training


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
