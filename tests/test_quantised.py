"""Adapters on a base in 8 and 4 bits, computed by the processor: bitsandbytes has both kinds of layer for it too.

The package itself asks for a GPU, and this is the one thing that is set aside here.
"""

import gc
import json

import pytest
import torch
from recipe_runs import finished, tiny_words
from safetensors.torch import load_file
from test_adapters import SCHEMA, batch, logits_of, method_of, trained
from test_resume import RESUME, assert_same, interrupted
from tiny import FAMILIES

from nlpxfer.checkpoint.adapter_kinds import KINDS
from nlpxfer.checkpoint.adapters import base_facts, head_modules, load_adapter, merged, save_adapter
from nlpxfer.checkpoint.linear_layers import linear_layers, other_linear_layers
from nlpxfer.checkpoint.load import load_classifier
from nlpxfer.checkpoint.pooling import has_mean_layer, use_mean_pooling, with_pooling
from nlpxfer.evaluate import arms

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install 'nlpxfer[bits]'")

QUANTISED = [kind for kind, row in KINDS.items() if row.quantised]
LAYER = {"8bit": "Linear8bitLt", "4bit": "Linear4bit"}
ROUNDING = {"8bit": 0.1, "4bit": 0.35}
"""How far logits on the rounded base may be from those on the float32 one, in parts of what was learnt."""
NEAR = {"8bit": 0.03, "4bit": 0.4}
"""How far logits of a base that learnt nothing may be."""
# Without DoRA on 8 bits: peft 0.21 drops the scales of such weights where they lie on the processor, and only there.
PAIRS = [(kind, bits) for kind in QUANTISED for bits in LAYER if (kind, bits) != ("dora", "8bit")]


@pytest.fixture(autouse=True)
def _on_the_processor(monkeypatch):
    monkeypatch.setattr("nlpxfer.checkpoint.quantised._gpu", lambda: "cpu")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: not including_emulation)
    # bitsandbytes 0.50 packs 4-bit weights anew the first time a model predicts, and cannot train with these
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)


def words_of(data, model, bits, *further, **options):
    """A tiny run on 60 rows; None: with all bits."""
    words = [*tiny_words(data, model, **options), "--max_train_samples", "60", "--control_arm", "false", *further]
    return words if bits is None else [*words, f"--load_in_{bits}", "true"]


def loaded(folder, bits, **options):
    return load_classifier(str(folder), schema=SCHEMA, seed=1, quantised=bits, **options)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bits", LAYER)
def test_the_layers_of_the_blocks_hold_few_bits_and_adapter_and_head_learn(bits, family, tiny_checkpoint):
    folder = tiny_checkpoint(family, layers=2)
    plain = load_classifier(str(folder), schema=SCHEMA, seed=1)
    checkpoint = loaded(folder, bits)
    inside, outside = set(linear_layers(plain.model)), other_linear_layers(plain.model)
    kinds = {name: type(module).__name__ for name, module in checkpoint.model.named_modules()}
    assert {name for name, kind in kinds.items() if kind == LAYER[bits]} == inside
    assert {kinds[name] for name in outside} == {"Linear"}
    assert checkpoint.fresh == plain.fresh
    for name, theirs in plain.model.state_dict().items():
        if name.rpartition(".")[0] not in inside:
            assert torch.equal(checkpoint.model.state_dict()[name].float(), theirs), name

    frozen = {name: p.detach().clone() for name, p in checkpoint.model.named_parameters()}
    model = method_of("lora").adapt(checkpoint.model, checkpoint.fresh)
    wrapped = {name for name, module in model.get_base_model().named_modules() if hasattr(module, "lora_A")}
    assert wrapped == inside
    assert trained(model, batch(checkpoint.tokenizer)) == []
    heads = head_modules(plain.model, plain.fresh)
    for name, after in model.get_base_model().named_parameters():
        name = name.replace(".base_layer", "").replace(".original_module", "")
        if name in frozen:
            # 4 bits: biases take the type of what is computed
            assert torch.equal(after, frozen[name].to(after.dtype)), name
    assert all(any(f".{head}.modules_to_save" in name for name, _ in model.named_modules()) for head in heads)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize(("kind", "bits"), PAIRS)
def test_a_bundle_that_learnt_on_few_bits_works_on_float32_and_merges(kind, bits, family, tiny_checkpoint, tmp_path):
    folder = tiny_checkpoint(family, layers=2)
    checkpoint = loaded(folder, bits)
    facts = base_facts(checkpoint, adapter=kind, pooling="own")
    plain = load_classifier(str(folder), schema=SCHEMA, seed=1)
    assert facts == base_facts(plain, adapter=kind, pooling="own")
    inputs = batch(checkpoint.tokenizer)
    torch.manual_seed(1)
    model = method_of(kind).adapt(checkpoint.model, checkpoint.fresh)
    before = logits_of(model, inputs)
    trained(model, inputs, steps=8)
    few_bits = logits_of(model, inputs)
    save_adapter(model, checkpoint.tokenizer, SCHEMA, tmp_path / "bundle", base=facts)
    loaded_again = load_adapter(tmp_path / "bundle", base=str(folder))
    own = logits_of(loaded_again.model, inputs)
    learnt = (few_bits - before).abs().max()
    assert (own - few_bits).abs().max() < ROUNDING[bits] * learnt, "rounding of the base alone"
    assert torch.allclose(logits_of(merged(loaded_again), inputs), own, atol=1e-5)


@pytest.mark.parametrize("bits", LAYER)
def test_the_layer_of_a_mean_stays_as_it_is(bits, tiny_checkpoint, tmp_path):
    checkpoint = load_classifier(str(tiny_checkpoint("bert", "classifier", layers=2)), schema=SCHEMA)
    use_mean_pooling(checkpoint.model).save_pretrained(tmp_path / "mean")
    checkpoint.tokenizer.save_pretrained(tmp_path / "mean")
    again = loaded(tmp_path / "mean", bits)
    assert has_mean_layer(again.model)
    plain = load_classifier(str(tmp_path / "mean"), schema=SCHEMA)
    inputs = batch(checkpoint.tokenizer)
    torch.testing.assert_close(logits_of(again.model, inputs), logits_of(plain.model, inputs), atol=NEAR[bits], rtol=0)
    model = method_of("lora").adapt(again.model, again.fresh)
    trained(model, inputs)
    assert has_mean_layer(model.get_base_model())
    assert torch.isfinite(logits_of(model, inputs)).all()


@pytest.mark.parametrize("bits", LAYER)
def test_a_run_is_resumed_and_leaves_float32(bits, tiny_checkpoint, tiny_data, tmp_path, monkeypatch, caplog):
    bert = tiny_checkpoint("bert", layers=2)
    batches = ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2"]
    plain, words = (words_of(tiny_data, bert, few, *batches, rate="3e-3", epochs=3) for few in (None, bits))
    plain = finished("adapters", tmp_path / "plain", *plain)
    whole = finished("adapters", tmp_path / "whole", *words)
    loss = whole.report["metrics"]["validation"]["loss"]
    assert loss != plain.report["metrics"]["validation"]["loss"]
    assert loss == pytest.approx(plain.report["metrics"]["validation"]["loss"], rel=0.02)
    weights = load_file(whole.folder / "model.safetensors")
    assert {str(value.dtype) for value in weights.values()} == {"torch.float32"}
    assert "quantization_config" not in json.loads((whole.folder / "config.json").read_text())
    interrupted("adapters", tmp_path / "out", words, monkeypatch, 10, "adapter")
    assert_same(finished("adapters", tmp_path / "out", *words, *RESUME), whole)
    assert "will be cast" not in caplog.text, "one line per layer and step"


@pytest.mark.parametrize("family", ["bert", "distilbert"])
@pytest.mark.parametrize("bits", LAYER)
def test_a_mean_over_tokens_is_added_in_float32(bits, family, tiny_checkpoint, tmp_path):
    folder = tiny_checkpoint(family, layers=2)
    checkpoint = loaded(folder, bits)
    facts = base_facts(checkpoint, adapter="lora", pooling="mean")
    pooled = with_pooling(checkpoint, "mean")
    assert has_mean_layer(pooled)
    inputs = batch(checkpoint.tokenizer)
    plain = load_classifier(str(folder), schema=SCHEMA, seed=1)
    expected = logits_of(with_pooling(plain, "mean"), inputs)
    torch.testing.assert_close(logits_of(pooled, inputs), expected, atol=NEAR[bits], rtol=0)
    model = method_of("lora").adapt(pooled, checkpoint.fresh)
    trained(model, inputs)
    few_bits = logits_of(model, inputs)
    save_adapter(model, checkpoint.tokenizer, SCHEMA, tmp_path / "bundle", base=facts)
    own = load_adapter(tmp_path / "bundle", base=str(folder))
    torch.testing.assert_close(logits_of(own.model, inputs), few_bits, atol=NEAR[bits], rtol=0)


def test_a_search_may_choose_what_the_head_reads(tiny_checkpoint, tiny_data, tmp_path):
    ranges = ["--pooling={choices: [own, mean]}", "--num_trials=2"]
    words = words_of(tiny_data, tiny_checkpoint("bert", layers=2), "4bit", *ranges)
    found = finished("adapters", tmp_path / "out", *words)
    assert [trial["state"] for trial in found.report["search"]["trials"]] == ["complete", "complete"]


def test_the_quantised_base_is_gone_before_the_float32_one_is_scored(
    tiny_checkpoint, tiny_data, tmp_path, monkeypatch
):
    def counting(*args):
        layers.append(sum(type(item).__name__ == "Linear4bit" for item in gc.get_objects()))
        return finished_adapter(*args)

    layers, finished_adapter = [], arms._finished_adapter
    monkeypatch.setattr(arms, "_finished_adapter", counting)
    words = words_of(tiny_data, tiny_checkpoint("bert", layers=2), "4bit", "--num_seeds", "2")
    finished("adapters", tmp_path / "out", *words)
    assert layers == [0, 0]


def test_where_float32_does_not_fit_the_processor_scores(tiny_checkpoint, tiny_data, tmp_path, monkeypatch, caplog):
    def full(model, device):
        if str(device) != "cpu" or not tried:
            tried.append(device)
            raise torch.OutOfMemoryError
        return plain_to(model, device)

    tried = []
    words = words_of(tiny_data, tiny_checkpoint("bert", layers=2), "4bit")
    whole = finished("adapters", tmp_path / "whole", *words)
    kind = type(load_classifier(str(whole.folder), schema=SCHEMA).model)
    plain_to = kind.to
    monkeypatch.setattr(kind, "to", full)
    found = finished("adapters", tmp_path / "out", *words)
    assert len(tried) == 1
    assert "the processor scores it" in caplog.text
    assert found.report["metrics"] == whole.report["metrics"]
