"""Mean pooling built into plain classes."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
from recipe_runs import finished, tiny_words
from tiny import LABELS
from transformers import AutoConfig, AutoModelForSequenceClassification

from nlpxfer.checkpoint import load_classifier, model_layers, save_classifier, use_mean_pooling
from nlpxfer.checkpoint.head import head_of
from nlpxfer.checkpoint.pooling import has_mean_layer, is_mean_encoder, wants_mean
from nlpxfer.data.schema import LabelSchema
from nlpxfer.errors import CheckpointError, ConfigError

SCHEMA = LabelSchema(LABELS)
POST_NORM = ("bert", "roberta", "xlm-roberta", "electra", "distilbert")
TEXTS = ["the goal of the match in the new stadium before the concert", "bread and cheese", "a train"]


@pytest.fixture
def load(tiny_checkpoint):
    return lambda family, **how: load_classifier(str(tiny_checkpoint(family, "classifier", **how)), schema=SCHEMA)


def pooled_input(model, batch):
    """What the first transform of the head reads."""
    captured = []
    first = next(iter(head_of(model).transforms.values()))
    handle = first.register_forward_pre_hook(lambda _, inputs: captured.append(inputs[0]))
    model(**batch)
    handle.remove()
    return captured[0]


def masked_mean(model, batch):
    hidden = getattr(model, model.base_model_prefix)(**batch)[0]
    mask = batch["attention_mask"].unsqueeze(-1)
    return (hidden * mask).sum(1) / mask.sum(1)


@pytest.mark.parametrize("family", [*POST_NORM, "modernbert"])
def test_head_reads_the_mean_over_real_tokens(load, family):
    checkpoint = load(family)
    batch = checkpoint.tokenizer(TEXTS, padding=True, return_tensors="pt")
    pooled = use_mean_pooling(checkpoint.model)
    assert type(pooled) is type(checkpoint.model)
    expected = masked_mean(checkpoint.model, batch)
    first = pooled_input(checkpoint.model, batch)
    assert (expected - first).abs().max() > 0.1  # the first token is another state
    if family == "modernbert":
        torch.testing.assert_close(pooled_input(pooled, batch), expected, rtol=1e-5, atol=1e-6)
    else:
        normed = torch.nn.functional.layer_norm(expected, expected.shape[-1:], eps=1e-12)
        found = pooled_input(pooled, batch)
        # h_i / 2048 is left of the first token's own state
        assert (found - normed).abs().max() < 5e-3
        assert (found - normed).square().mean().sqrt() < 1e-3


@pytest.mark.parametrize("family", [*POST_NORM, "modernbert"])
def test_padding_does_not_count(load, family):
    checkpoint = load(family)
    pooled = use_mean_pooling(checkpoint.model)
    together = pooled(**checkpoint.tokenizer(TEXTS, padding=True, return_tensors="pt")).logits
    for row, text in enumerate(TEXTS):
        alone = pooled(**checkpoint.tokenizer([text], return_tensors="pt")).logits[0]
        torch.testing.assert_close(together[row], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", [*POST_NORM, "modernbert"])
def test_reload_without_our_code_gives_the_same(load, family, tmp_path):
    checkpoint = load(family)
    before = checkpoint.weights_sha256
    pooled = use_mean_pooling(checkpoint.model)
    assert checkpoint.weights_sha256 == before
    extra = 0 if family == "modernbert" else 1
    assert pooled.config.num_hidden_layers == checkpoint.model.config.num_hidden_layers + extra
    assert len(model_layers(pooled)[1]) == pooled.config.num_hidden_layers
    batch = checkpoint.tokenizer(TEXTS, padding=True, return_tensors="pt")
    save_classifier(pooled, checkpoint.tokenizer, SCHEMA, tmp_path / "pooled")
    reloaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "pooled").eval()
    assert torch.equal(reloaded(**batch).logits, as_it_stands(pooled)(**batch).logits)
    torch.testing.assert_close(reloaded(**batch).logits, pooled(**batch).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", POST_NORM)
def test_the_layer_trains_and_stays_a_mean(load, family):
    checkpoint = load(family)
    pooled = use_mean_pooling(checkpoint.model).train()
    batch = checkpoint.tokenizer(TEXTS, padding=True, return_tensors="pt")
    optimizer = torch.optim.AdamW(pooled.parameters(), lr=1e-3)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = pooled(**batch, labels=torch.tensor([0, 1, 2])).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    last = model_layers(pooled)[1][-1]
    weights = {name: value for name, value in last.named_parameters() if "query" in name or "q_lin" in name}
    assert len(weights) == 2
    assert not any(value.any() for value in weights.values())


def as_it_stands(pooled):
    """The same model, its mean computed token by token by the family's own layer."""
    plain = copy.deepcopy(pooled)
    vars(model_layers(plain)[1][-1]).pop("forward", None)
    return plain


def perturbed(model):
    """As after some training: no weight is 0 or 1 any more but those of queries and keys."""
    last = model_layers(model)[1][-1]
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in last.named_parameters():
            if not any(part in name for part in ("query", "key", "q_lin", "k_lin")):
                weight += 0.05 * torch.randn(weight.shape, generator=noise)
    return model


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("family", POST_NORM)
def test_the_mean_is_computed_once_per_text(load, family, padded):
    checkpoint = load(family)
    pooled = perturbed(use_mean_pooling(checkpoint.model))
    for part in pooled.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    plain = as_it_stands(pooled)
    batch = checkpoint.tokenizer(TEXTS if padded else TEXTS[:1] * 3, padding=True, return_tensors="pt")
    last = model_layers(pooled)[1][-1]
    inner = last.get_submodule("ffn.lin1" if family == "distilbert" else "intermediate.dense")
    seen = []
    inner.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape)))
    for train in (False, True):
        found, expected = (model.train(train)(**batch, labels=torch.tensor([0, 1, 2])) for model in (pooled, plain))
        torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-5)
    assert set(seen) == {(3, 1, pooled.config.hidden_size)}
    for loss in (found.loss, expected.loss):
        loss.backward()
    theirs = dict(plain.named_parameters())
    for name, weight in pooled.named_parameters():
        assert (weight.grad is None) == (theirs[name].grad is None), name
        if weight.grad is not None:
            torch.testing.assert_close(weight.grad, theirs[name].grad, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("family", ["bert", "distilbert"])
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_token_by_token_where_it_matters(load, family, kernel):
    """Dropout of attention draws for each token; eager attention shows its weights."""
    checkpoint = load(family, dropout=0.1)
    pooled = perturbed(use_mean_pooling(checkpoint.model))
    pooled.set_attn_implementation(kernel)
    plain = as_it_stands(pooled)
    batch = checkpoint.tokenizer(TEXTS, padding=True, return_tensors="pt")
    train, asked = (True, {}) if kernel == "sdpa" else (False, {"output_attentions": True})
    found = []
    for model in (pooled, plain):
        torch.manual_seed(0)
        found.append(model.train(train)(**batch, **asked))
    assert torch.equal(found[0].logits, found[1].logits)
    if asked:
        assert len(found[0].attentions) == pooled.config.num_hidden_layers


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "deberta-v2", "albert"])
def test_other_families_are_refused(load, family):
    with pytest.raises(CheckpointError, match=r"(?s)cannot be read as a mean.*modernbert, bert"):
        use_mean_pooling(load(family).model)


@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_the_added_layer_follows_the_model_to_another_attention(load, family):
    """A layer with a config of its own would keep the attention kernel that it was made with."""
    pooled = use_mean_pooling(load(family).model)
    pooled.set_attn_implementation("eager")
    kernels = {m.config._attn_implementation for m in pooled.modules() if hasattr(m, "config")}
    assert kernels == {"eager"}


@pytest.mark.parametrize("family", POST_NORM)
def test_a_mean_layer_is_known_and_not_added_twice(family, tiny_checkpoint):
    model = AutoModelForSequenceClassification.from_pretrained(tiny_checkpoint(family, kind="classifier"))
    pooled = use_mean_pooling(model)
    assert (has_mean_layer(model), has_mean_layer(pooled)) == (False, True)
    again = use_mean_pooling(pooled)
    assert again.config.num_hidden_layers == pooled.config.num_hidden_layers == 5
    assert again is not pooled


OLD_KEYS = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")


def old_form(*on):
    return {"word_embedding_dimension": 8} | {f"pooling_mode_{key}": key in on for key in OLD_KEYS}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (old_form("mean_tokens"), True),
        (old_form("cls_token"), False),
        (old_form("mean_tokens", "max_tokens"), False),
        (old_form("mean_sqrt_len_tokens"), False),
        (old_form(), False),
        ({"embedding_dimension": 8, "pooling_mode": "mean", "include_prompt": True}, True),
        ({"pooling_mode": "cls"}, False),
        ({"pooling_mode": ["mean", "max"]}, False),
        (["mean"], False),
    ],
)
def test_what_a_folder_says_of_its_pooling(content, expected, tmp_path):
    assert not is_mean_encoder(tmp_path)
    (tmp_path / "1_Pooling").mkdir()
    file = tmp_path / "1_Pooling" / "config.json"
    file.write_text(json.dumps(content))
    assert is_mean_encoder(tmp_path) is expected
    file.write_text("{")
    assert not is_mean_encoder(tmp_path)


@pytest.fixture
def encoder(tiny_checkpoint, tmp_path):
    """A tiny checkpoint of a family with the file of a sentence encoder that is read by the mean."""

    def make(family, kind="classifier"):
        shutil.copytree(tiny_checkpoint(family, kind), tmp_path / family)
        (tmp_path / family / "1_Pooling").mkdir()
        (tmp_path / family / "1_Pooling" / "config.json").write_text(json.dumps(old_form("mean_tokens")))
        return tmp_path / family

    return make


@pytest.mark.parametrize(("family", "expected"), [("bert", True), ("modernbert", True), ("gpt2", False)])
def test_auto_is_the_mean_where_the_folder_says_so_and_the_family_can(load, encoder, family, expected):
    checkpoint = load_classifier(str(encoder(family)), schema=SCHEMA)
    assert wants_mean(checkpoint, "auto") is expected
    assert wants_mean(checkpoint, "mean")
    assert not wants_mean(checkpoint, "own")
    assert not wants_mean(load(family), "auto")
    with pytest.raises(ConfigError, match=r"pooling='max' is not known(?s:.*)auto"):
        wants_mean(checkpoint, "max")


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_auto_knows_a_model_that_reads_the_mean_already(family, load, tmp_path):
    checkpoint = load(family)
    save_classifier(use_mean_pooling(checkpoint.model), checkpoint.tokenizer, SCHEMA, tmp_path / "pooled")
    assert wants_mean(load_classifier(str(tmp_path / "pooled"), schema=SCHEMA), "auto")


@pytest.mark.parametrize(("pooling", "layers"), [("auto", 5), ("own", 4)])
def test_a_run_reads_a_sentence_encoder_by_the_mean(pooling, layers, tiny_data, encoder, tmp_path):
    words = [*tiny_words(tiny_data, encoder("bert", "base")), "--control_arm", "false", "--pooling", pooling]
    run = finished("finetune", tmp_path / "out", *words)
    assert AutoConfig.from_pretrained(run.folder).num_hidden_layers == layers
    student = ["--teacher_name_or_path", run.folder, "--student_num_layers", "2", "--pooling", pooling]
    taught = finished("distill", tmp_path / "student", *tiny_words(tiny_data), *student)
    assert AutoConfig.from_pretrained(taught.folder).num_hidden_layers == layers - 2
    assert taught.arm("control")["parameters"] == taught.arm("distilled")["parameters"]


def test_teacher_and_pretrained_are_read_alike(tiny_data, tiny_checkpoint, tmp_path):
    """The control student's layers come from a plain checkpoint, and are read by the mean as the student's."""
    bert = tiny_checkpoint("bert", "base")
    words = [*tiny_words(tiny_data, bert), "--pooling", "mean", "--control_arm", "false"]
    teacher = finished("finetune", tmp_path / "teacher", *words).folder
    words = [*tiny_words(tiny_data, bert), "--teacher_name_or_path", teacher, "--student_num_layers", "2"]
    run = finished("distill", tmp_path / "out", *words)
    assert AutoConfig.from_pretrained(run.folder).num_hidden_layers == 3
    assert run.arm("control")["parameters"] == run.arm("distilled")["parameters"]
    narrow = finished("distill", tmp_path / "narrow", *words, "--student_intermediate_size", "16")
    config = AutoConfig.from_pretrained(narrow.folder)
    assert (config.num_hidden_layers, config.intermediate_size) == (3, 16)
