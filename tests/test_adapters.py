"""Adapters of each kind in each family: what is wrapped, what learns, and what a bundle gives back."""

import copy
import json
import logging
import math
import pickle
import shutil
import warnings

import pytest
import torch
from processes import python
from processes import run as run_program
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, LABELS, make_rows
from transformers import AutoModelForSequenceClassification

from nlpxfer.checkpoint.adapter_kinds import KINDS
from nlpxfer.checkpoint.adapters import (
    base_facts,
    head_modules,
    load_adapter,
    merged,
    save_adapter,
    trained_names,
)
from nlpxfer.checkpoint.linear_layers import linear_layers
from nlpxfer.checkpoint.load import load_classifier
from nlpxfer.checkpoint.pooling import has_mean_layer, use_mean_pooling
from nlpxfer.data.schema import LabelSchema
from nlpxfer.errors import CheckpointError, ConfigError, NotFiniteError, ResumeError, UnsafeCheckpointError
from nlpxfer.methods.adapters import Adapters
from nlpxfer.train.checkpoints import load_trained_, save_trained

SCHEMA = LabelSchema(tuple(sorted(LABELS)))
MAIN_KINDS = ("lora", "rslora", "dora", "adalora", "ia3", "prefix", "prompt", "p_tuning", "layernorm", "bitfit")
FURTHER_KINDS = tuple(kind for kind in KINDS if kind not in MAIN_KINDS)
LINEAR_ONLY = tuple(kind for kind, row in KINDS.items() if not row.wraps_conv1d)
SMALL = {"num_virtual_tokens": 4, "adapter_rank": 4, "adapter_num_weights": 64}
IMPOSSIBLE = {
    **{("prefix", family): "takes none" for family in ("distilbert", "deberta-v2", "modernbert", "albert")},
    **{("bitfit", family): "has none" for family in ("modernbert", "llama")},
    **{(kind, "gpt2"): "has Conv1D layers instead" for kind in LINEAR_ONLY},
    ("beft", "gpt2"): "not known which layers",
    ("beft", "llama"): "have none",
}
"""Kind and family that cannot go together, and what the refusal says. All other pairs work."""
PAIRS = [(kind, family) for kind in MAIN_KINDS for family in FAMILIES]
PAIRS += [(kind, family) for kind in FURTHER_KINDS for family in ("bert", "gpt2", "llama")]


def method_of(kind, **options):
    small = {name: value for name, value in SMALL.items() if name in KINDS[kind].options}
    return Adapters(adapter=kind, **{**small, **options})


def adapted(folder, kind, pooling="own", seed=1, **options):
    """A checkpoint, its base's facts, and its model with a fresh adapter."""
    checkpoint = load_classifier(str(folder), schema=SCHEMA, seed=seed)
    facts = base_facts(checkpoint, adapter=kind, pooling=pooling)
    torch.manual_seed(seed)
    return checkpoint, facts, method_of(kind, **options).adapt(checkpoint.model, checkpoint.fresh)


def batch(tokenizer, count=6):
    texts = [row["text"] for row in make_rows(count, seed=3)]
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    return {name: inputs[name] for name in ("input_ids", "attention_mask")}


@torch.no_grad()
def logits_of(model, inputs):
    return model.eval()(**inputs).logits


@torch.no_grad()
def body_of(model, inputs):
    """The states below the head, where nothing is put before the text."""
    return model.get_base_model().eval().base_model(**inputs)[0]


def trained(model, inputs, steps=3):
    """A few steps on random labels; returns the names that learn but got no gradient."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    gold = torch.arange(len(inputs["input_ids"])) % len(SCHEMA)
    for _ in range(steps):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(**inputs).logits, gold).backward()
        optimizer.step()
    return [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


@pytest.fixture(scope="module")
def bundle(tiny_checkpoint, tmp_path_factory):
    """Factory `bundle(kind, family) -> (folder, base folder, inputs, logits)` of briefly trained adapters."""
    made = {}

    def make(kind="lora", family="bert", **options):
        key = (kind, family, repr(options))
        if key not in made:
            base = tiny_checkpoint(family, layers=2)
            checkpoint, facts, model = adapted(base, kind, **options)
            inputs = batch(checkpoint.tokenizer)
            trained(model, inputs)
            folder = tmp_path_factory.mktemp("bundle") / kind
            save_adapter(model, checkpoint.tokenizer, SCHEMA, folder, base=facts)
            made[key] = (folder, base, inputs, logits_of(model, inputs))
        return made[key]

    return make


@pytest.mark.parametrize(("kind", "family"), PAIRS)
def test_each_kind_in_each_family(kind, family, tiny_checkpoint, tmp_path):
    """It learns, its base does not; a bundle gives its logits back, row by row too, and so does the merged model."""
    base = tiny_checkpoint(family, layers=2)
    if (kind, family) in IMPOSSIBLE:
        with pytest.raises(ConfigError, match=IMPOSSIBLE[kind, family]):
            adapted(base, kind)
        return
    checkpoint, facts, model = adapted(base, kind)
    assert set(checkpoint.fresh) <= trained_names(model)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    inputs = batch(checkpoint.tokenizer)
    before, body_before = logits_of(model, inputs), body_of(model, inputs)
    assert trained(model, inputs) == []
    after = logits_of(model, inputs)
    assert (after - before).abs().max() > 0.1
    if KINDS[kind].merges:
        assert (body_of(model, inputs) - body_before).abs().max() > 1e-4, "not the head alone"
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)

    save_adapter(model, checkpoint.tokenizer, SCHEMA, tmp_path / "bundle", base=facts)
    loaded = load_adapter(tmp_path / "bundle", base=str(base))
    torch.testing.assert_close(logits_of(loaded.model, inputs), after, atol=1e-6, rtol=0)
    lengths = inputs["attention_mask"].sum(dim=1)
    alone = [
        logits_of(loaded.model, {name: tensor[i : i + 1, : lengths[i]] for name, tensor in inputs.items()})
        for i in range(len(lengths))
    ]
    torch.testing.assert_close(torch.cat(alone), after, atol=2e-5, rtol=0)

    if not KINDS[kind].merges:
        with pytest.raises(CheckpointError, match="cannot be merged"):
            merged(loaded)
        return
    plain = merged(loaded)
    torch.testing.assert_close(logits_of(plain, inputs), after, atol=1e-5, rtol=0)
    assert not [name for name, module in plain.named_modules() if "peft" in type(module).__module__]
    assert plain.state_dict().keys() == load_classifier(str(base), schema=SCHEMA).model.state_dict().keys()


# -- heads and newly initialised parameters


@pytest.mark.parametrize(
    ("family", "kind", "random"),
    [
        ("bert", "mlm", {"bert.pooler.dense.weight", "classifier.weight"}),
        ("deberta-v2", "base", {"pooler.dense.weight", "classifier.weight"}),
        ("modernbert", "base", {"head.dense.weight", "head.norm.weight", "classifier.weight"}),
        ("roberta", "mlm", {"classifier.dense.weight", "classifier.out_proj.weight"}),
    ],
)
@pytest.mark.parametrize("adapter", ["lora", "prompt", "layernorm"])
def test_no_random_weight_is_frozen_or_left_out(family, kind, random, adapter, tiny_checkpoint, tmp_path, caplog):
    """peft alone knows `classifier` and `score`: it would freeze random poolers and would not save them."""
    caplog.set_level(logging.INFO, logger="nlpxfer")
    folder = tiny_checkpoint(family, kind, layers=2)
    checkpoint, facts, model = adapted(folder, adapter)
    assert random <= set(checkpoint.fresh) <= trained_names(model)
    said = next(r.getMessage() for r in caplog.records if r.getMessage().startswith("newly initialised, trained"))
    assert all(name in said for name in random)
    save_adapter(model, checkpoint.tokenizer, SCHEMA, tmp_path / "bundle", base=facts)
    stored = load_file(tmp_path / "bundle" / "adapter_model.safetensors")
    assert all(any(key.endswith(name) for key in stored) for name in random)


def test_a_random_weight_that_cannot_be_trained_ends_the_run(tiny_checkpoint):
    """Its owner is wrapped; a parameter of the model itself has no owner that could be."""
    folder = tiny_checkpoint("bert", layers=2)
    checkpoint = load_classifier(str(folder), schema=SCHEMA)
    name = "bert.embeddings.LayerNorm.weight"
    model = method_of("lora").adapt(checkpoint.model, (*checkpoint.fresh, name))
    assert name in trained_names(model)
    checkpoint = load_classifier(str(folder), schema=SCHEMA)
    checkpoint.model.register_parameter("scale", torch.nn.Parameter(torch.zeros(())))
    with pytest.raises(CheckpointError, match="would stay frozen: scale"):
        method_of("lora").adapt(checkpoint.model, (*checkpoint.fresh, "scale"))


def test_the_whole_head_learns_though_nothing_of_it_is_new(tiny_checkpoint):
    checkpoint = load_classifier(str(tiny_checkpoint("distilbert", "classifier", layers=2)), schema=SCHEMA)
    assert checkpoint.fresh == ()
    assert head_modules(checkpoint.model, ()) == ["classifier", "pre_classifier"]
    assert {"pre_classifier.weight", "classifier.bias"} <= trained_names(method_of("ia3").adapt(checkpoint.model, ()))


# -- where adapters go


@pytest.mark.parametrize(
    ("family", "wrapped"),
    [
        ("bert", "attention.output.dense attention.self.key attention.self.query attention.self.value "
                 "intermediate.dense output.dense"),
        ("albert", "attention.dense attention.key attention.query attention.value ffn ffn_output"),
        ("modernbert", "attn.Wo attn.Wqkv mlp.Wi mlp.Wo"),
        ("gpt2", "attn.c_attn attn.c_proj mlp.c_fc mlp.c_proj"),
        ("gpt_neox", "attention.dense attention.query_key_value mlp.dense_4h_to_h mlp.dense_h_to_4h"),
        ("llama", "mlp.down_proj mlp.gate_proj mlp.up_proj self_attn.k_proj self_attn.o_proj self_attn.q_proj "
                  "self_attn.v_proj"),
    ],
)  # fmt: skip
def test_all_linear_layers_of_the_blocks_are_wrapped_and_no_others(family, wrapped, tiny_checkpoint):
    checkpoint = load_classifier(str(tiny_checkpoint(family, layers=2)), schema=SCHEMA)
    expected = set(linear_layers(checkpoint.model))
    model = method_of("lora").adapt(checkpoint.model, checkpoint.fresh)
    assert sorted(model.active_peft_config.target_modules) == wrapped.split()
    plain = model.get_base_model()
    assert {name for name, module in plain.named_modules() if hasattr(module, "lora_A")} == expected
    assert len(expected) == (1 if family == "albert" else 2) * len(wrapped.split())


@pytest.mark.parametrize(
    ("family", "scaled", "feedforward"),
    [
        ("roberta", {"attention.self.key", "attention.self.value", "output.dense"}, {"output.dense"}),
        ("distilbert", {"attention.k_lin", "attention.v_lin", "ffn.lin2"}, {"ffn.lin2"}),
        ("deberta-v2", {"attention.self.key_proj", "attention.self.value_proj", "output.dense"}, {"output.dense"}),
        ("gpt2", {"attn.c_attn", "mlp.c_proj"}, {"mlp.c_proj"}),
        ("qwen2", {"self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj"}, {"mlp.down_proj"}),
    ],
)
def test_ia3_scales_keys_values_and_the_input_of_the_last_layer(family, scaled, feedforward, tiny_checkpoint):
    checkpoint, _, model = adapted(tiny_checkpoint(family, layers=2), "ia3")
    found = {
        name.split(".", 3)[-1].removeprefix("0.").removeprefix("1."): module.is_feedforward
        for name, module in model.get_base_model().named_modules()
        if hasattr(module, "ia3_l")
    }
    assert {name for name in scaled if any(key.endswith(name) for key in found)} == scaled
    assert len(found) == len(scaled)
    assert {name for name, last in found.items() if last} == feedforward


@pytest.mark.parametrize("kind", ["oft", "c3a", "road", "vblora"])
def test_blocks_divide_the_layers(kind, tiny_checkpoint):
    """The default is cut down to what fits (32 and 64 here); a size that was asked for is used or refused."""
    folder = tiny_checkpoint("bert", layers=2)
    field = KINDS[kind].options["adapter_block_size"]
    for given, used in ((None, math.gcd(KINDS[kind].defaults["adapter_block_size"], 32)), (4, 4)):
        _, _, model = adapted(folder, kind, adapter_block_size=given)
        assert getattr(model.active_peft_config, field) == used
    with pytest.raises(ConfigError, match="cuts layers into blocks of 24, and here they have 32, 64") as refused:
        adapted(folder, kind, adapter_block_size=24)
    assert "a divisor of 32" in str(refused.value)


def test_where_no_block_fits_another_kind_is_named(tiny_checkpoint):
    folder = tiny_checkpoint("bert", layers=2, intermediate_size=63)
    with pytest.raises(ConfigError, match=r"(?s)c3a cuts layers into blocks of 1,.*--adapter lora"):
        adapted(folder, "c3a")


def test_targets_that_the_user_names(tiny_checkpoint):
    folder = tiny_checkpoint("bert", layers=2)
    _, _, model = adapted(folder, "lora", adapter_target_modules=("query", "output.dense"))
    wrapped = [name for name, module in model.get_base_model().named_modules() if hasattr(module, "lora_A")]
    assert len(wrapped) == 6, "query, attention.output.dense and output.dense of two blocks"
    with pytest.raises(ConfigError, match="no linear layer of the body is named q_proj, classifier") as refused:
        adapted(folder, "lora", adapter_target_modules=("query", "q_proj", "classifier"))
    assert "attention.self.query" in str(refused.value)


def test_the_layer_that_computes_a_mean_is_left_alone(tiny_checkpoint, tmp_path):
    """Its queries and keys are 0: DoRA would divide by their norm, and a mean must stay one."""
    base = tiny_checkpoint("bert", layers=2)
    checkpoint = load_classifier(str(base), schema=SCHEMA)
    facts = base_facts(checkpoint, adapter="dora", pooling="mean")
    pooled = use_mean_pooling(checkpoint.model)
    model = method_of("dora").adapt(pooled, checkpoint.fresh)
    inputs = batch(checkpoint.tokenizer)
    assert trained(model, inputs) == []
    logits = logits_of(model, inputs)
    assert torch.isfinite(logits).all()
    save_adapter(model, checkpoint.tokenizer, SCHEMA, tmp_path / "bundle", base=facts)
    loaded = load_adapter(tmp_path / "bundle", base=str(base))
    torch.testing.assert_close(logits_of(loaded.model, inputs), logits, atol=1e-6, rtol=0)
    plain = merged(loaded)
    assert has_mean_layer(plain)
    torch.testing.assert_close(logits_of(plain, inputs), logits, atol=1e-5, rtol=0)


def test_a_copy_of_a_decoder_with_a_prompt_reads_its_own_rows(bundle):
    """What notes the end of the text is copied with the model; shared, one would read the other's rows."""
    folder, base, inputs, logits = bundle("prompt", "gpt2")
    model = load_adapter(folder, base=str(base)).model
    twin = copy.deepcopy(model)
    logits_of(model, {name: tensor[:1] for name, tensor in inputs.items()})
    torch.testing.assert_close(logits_of(twin, inputs), logits, atol=1e-6, rtol=0)


# -- options


@pytest.mark.parametrize(
    ("options", "faults"),
    [
        ({"adapter": "lorra"}, ["adapter: 'lorra' is not one of lora, rslora", "did you mean lora"]),
        (
            {"adapter": "prompt", "adapter_rank": 0, "adapter_alpha": 1.0, "num_virtual_tokens": 0},
            ["adapter_rank: the adapter prompt has no use for it", "adapter_alpha: the adapter prompt has no use",
             "adapter_rank: 0 is below 1", "num_virtual_tokens: 0 is below 1"],
        ),
        ({"num_virtual_tokens": 4}, ["num_virtual_tokens: the adapter lora has no use for it; it has adapter_rank"]),
        ({"adapter": "bitfit", "adapter_dropout": 0.1}, ["the adapter bitfit has no use for it; it has no option"]),
        (
            {"adapter": "oft", "adapter_block_size": 1, "adapter_num_weights": 0},
            ["adapter_num_weights: the adapter oft has no use", "adapter_block_size: 1 is below 2",
             "adapter_num_weights: 0 is below 1"],
        ),
        (
            {"adapter_alpha": float("inf"), "adapter_dropout": 1.0, "adapter_target_modules": ("",)},
            ["adapter_alpha: inf", "adapter_dropout: 1.0", "a name is empty"],
        ),
    ],
)  # fmt: skip
def test_faults_are_listed_together(options, faults):
    with pytest.raises(ConfigError) as refused:
        Adapters(**options)
    for fault in faults:
        assert fault in str(refused.value)


def test_defaults_and_options_reach_peft(tiny_checkpoint):
    def config(kind, **options):
        checkpoint = load_classifier(str(tiny_checkpoint("bert", layers=2)), schema=SCHEMA)
        return Adapters(adapter=kind, **options).adapt(checkpoint.model, checkpoint.fresh).active_peft_config

    lora = config("lora")
    assert (lora.r, lora.lora_alpha, lora.lora_dropout) == (8, 16, 0.0)
    given = config("dora", adapter_rank=2, adapter_alpha=3.0, adapter_dropout=0.25)
    assert (given.r, given.lora_alpha, given.lora_dropout, given.use_dora) == (2, 3.0, 0.25, True)
    assert config("rslora").use_rslora
    assert config("rslora").lora_alpha == 8
    assert config("loha", adapter_rank=2).alpha == 2
    assert config("prefix").num_virtual_tokens == 20
    assert config("tinylora", adapter_num_weights=5).u == 5
    assert sorted(config("beft").target_modules) == ["attention.self.value"]


def test_without_gpu_and_bitsandbytes_bits_are_refused(tiny_checkpoint, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError) as refused:
        load_classifier(str(tiny_checkpoint("bert", layers=2)), schema=SCHEMA, quantised="4bit")
    assert "load_in_4bit: needs an NVIDIA GPU" in str(refused.value)
    assert "pip install 'nlpxfer[bits]'" in str(refused.value)


# -- bundles


def edited(folder, target, name, **changes):
    """A copy of a bundle with changed entries in one of its JSON files; None removes one."""
    shutil.copytree(folder, target)
    content = {**json.loads((target / name).read_text()), **changes}
    kept = {key: value for key, value in content.items() if key not in changes or value is not None}
    (target / name).write_text(json.dumps(kept))
    return target


def test_what_a_bundle_holds(bundle, tmp_path):
    folder, base, _, _ = bundle()
    assert {path.name for path in folder.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "base.json", "labels.json", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    for path in folder.iterdir():
        assert str(base.parent).encode() not in path.read_bytes(), path.name
        assert path.stat().st_mode & 0o044 == 0o044, "readable by whoever can read the folder"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["task_type"]) == ("bert-base", "SEQ_CLS")
    assert config["modules_to_save"] == ["bert.pooler.dense", "classifier", "score"]
    assert LabelSchema.load(folder).names == SCHEMA.names
    again = load_adapter(folder, base=str(base))
    save_adapter(again.model, again.tokenizer, again.schema, tmp_path / "again", base=again.base)
    for name in ("adapter_config.json", "base.json"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    assert (
        load_file(tmp_path / "again" / "adapter_model.safetensors").keys()
        == load_file(folder / "adapter_model.safetensors").keys()
    )


def test_a_new_process_gets_the_logits_of_the_trained_model(bundle, tmp_path):
    folder, base, inputs, logits = bundle()
    torch.save((inputs, logits), tmp_path / "expected.pt")
    program = (
        "import sys, torch\n"
        "from nlpxfer.checkpoint.adapters import load_adapter\n"
        "folder, base, expected = sys.argv[1:]\n"
        "inputs, logits = torch.load(expected)\n"
        "print(float((load_adapter(folder, base=base).model(**inputs).logits - logits).abs().max()))\n"
    )
    done = run_program(python("-W", "ignore", "-c", program, folder, base, tmp_path / "expected.pt"))
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) <= 1e-6


def test_peft_itself_reads_a_bundle(bundle):
    from peft import PeftModel

    folder, base, inputs, logits = bundle("bitfit", "roberta")
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=4)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")
        torch.testing.assert_close(logits_of(PeftModel.from_pretrained(plain, folder), inputs), logits)


def test_a_wrong_or_missing_base_is_refused(bundle, tiny_checkpoint):
    folder, base, _, _ = bundle()
    other = tiny_checkpoint("bert", layers=2, seed=5)
    with pytest.raises(CheckpointError, match="was trained on other weights") as refused:
        load_adapter(folder, base=str(other))
    hashes = {
        base_facts(load_classifier(str(one), schema=SCHEMA), adapter="lora", pooling="own").weights
        for one in (base, other)
    }
    assert len(hashes) == 2
    assert all(value in str(refused.value) for value in hashes)
    with pytest.raises(CheckpointError, match=r"(?s)local checkpoint 'bert-base'.*--base FOLDER"):
        load_adapter(folder)
    with pytest.raises(CheckpointError, match="was trained on other weights"):
        load_adapter(folder, base=str(tiny_checkpoint("roberta", layers=2)))


def with_config(base, target, **changes):
    """A copy of a model's folder with another config."""
    shutil.copytree(base, target)
    file = target / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return target


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"hidden_act": "relu"}, "hidden_act: 'gelu' there, 'relu' here"),
        ({"num_attention_heads": 8}, "num_attention_heads: 4 there, 8 here"),
        ({"layer_norm_eps": 1e-3}, "layer_norm_eps: 1e-12 there, 0.001 here"),
    ],
)
def test_a_base_that_computes_otherwise_from_the_same_weights_is_refused(changes, told, bundle, tmp_path):
    folder, base, inputs, logits = bundle()
    other = with_config(base, tmp_path / "other", **changes)
    with pytest.raises(CheckpointError, match="with another config") as refused:
        load_adapter(folder, base=str(other))
    assert told in str(refused.value)
    earlier = edited(folder, tmp_path / "earlier", "base.json", config=None)  # written before it had the entry
    torch.testing.assert_close(logits_of(load_adapter(earlier, base=str(base)).model, inputs), logits)
    assert (logits_of(load_adapter(earlier, base=str(other)).model, inputs) - logits).abs().max() > 1e-4


def test_what_does_not_change_the_function_is_no_part_of_the_base(bundle, tmp_path):
    folder, base, inputs, logits = bundle()
    names = {"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1}, "architectures": ["BertModel"]}
    others = {"hidden_dropout_prob": 0.3, "_name_or_path": "somebody/base", "transformers_version": "9.9.9"}
    unknown = {"dtype": "bfloat16", "use_cache": False, "an_option_of_a_later_transformers": 1}
    other = with_config(base, tmp_path / "other", **names, **others, **unknown)
    torch.testing.assert_close(logits_of(load_adapter(folder, base=str(other)).model, inputs), logits)
    assert "somebody" not in (folder / "base.json").read_text()


def test_the_seed_of_the_new_head_is_no_part_of_the_base(tiny_checkpoint):
    folder = str(tiny_checkpoint("bert", layers=2))
    one, other = (load_classifier(folder, schema=SCHEMA, seed=seed) for seed in (1, 2))
    assert one.weights_sha256 != other.weights_sha256
    assert base_facts(one, adapter="lora", pooling="own") == base_facts(other, adapter="lora", pooling="own")
    with torch.no_grad():
        one.model.bert.embeddings.word_embeddings.weight[3, 3] += 1
    assert base_facts(one, adapter="lora", pooling="own") != base_facts(other, adapter="lora", pooling="own")


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("adapter_config.json", {"peft_type": "XLORA"}, "of the type 'XLORA', which is not loaded here"),
        ("adapter_config.json", {"task_type": "CAUSAL_LM"}, "an adapter for 'CAUSAL_LM'"),
        ("adapter_config.json", {"megatron_config": {"a": 1}}, "sets megatron_config"),
        ("adapter_config.json", {"r": 5}, "does not fit its base"),
        ("adapter_config.json", {"bias": "all"}, "lacks weights or holds others"),
        ("adapter_config.json", {"modules_to_save": ["classifier"]}, "lacks weights or holds others|does not fit"),
        ("adapter_config.json", {"target_modules": ["nothing"]}, "does not fit its base"),
        ("base.json", {"weights": None}, "base.json is damaged"),
        ("base.json", {"adapter": "newer"}, "names the adapter 'newer'"),
        ("base.json", {"max_length": "long"}, "base.json is damaged"),
        ("base.json", {"config": "bert"}, "base.json is damaged"),
        ("base.json", {"long_texts": "head_tail"}, "base.json is damaged"),
        ("base.json", {"long_texts": {"long_texts": "middle"}}, "base.json is damaged: long_texts: 'middle'"),
        ("labels.json", {"names": ["a", "b", "c"]}, "does not fit its base"),
    ],
)
def test_damaged_and_foreign_bundles_are_refused(name, changes, message, bundle, tmp_path):
    folder, base, _, _ = bundle()
    with pytest.raises(CheckpointError, match=message):
        load_adapter(edited(folder, tmp_path / "copy", name, **changes), base=str(base))


def test_a_bundle_that_lacks_a_weight_or_has_one_too_many_is_refused(bundle, tmp_path):
    """peft fills what is missing with fresh weights and warns, or says nothing at all (biases)."""
    for number, kind in enumerate(("lora", "bitfit")):
        folder, base, _, _ = bundle(kind)
        copied = shutil.copytree(folder, tmp_path / str(number))
        weights = load_file(copied / "adapter_model.safetensors")
        name = next(name for name in weights if "classifier" not in name and "pooler" not in name)
        taken = weights.pop(name)
        save_file(weights, copied / "adapter_model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=f"lacks weights or holds others.*{name}|does not fit"):
            load_adapter(copied, base=str(base))
        save_file({**weights, name: taken, "more": taken.clone()}, copied / "adapter_model.safetensors")
        with pytest.raises(CheckpointError, match="lacks weights or holds others.*more"):
            load_adapter(copied, base=str(base))


class _Explodes:
    def __reduce__(self):
        return (pytest.fail, ("a pickle of an adapter was opened",))


def test_pickles_links_and_truncated_files_are_refused(bundle, tmp_path):
    folder, base, _, _ = bundle()
    pickled, cut, linked, foreign = (shutil.copytree(folder, tmp_path / name) for name in "pclf")
    (pickled / "adapter_model.safetensors").unlink()
    (pickled / "adapter_model.bin").write_bytes(pickle.dumps(_Explodes()))
    with pytest.raises(UnsafeCheckpointError, match="only adapter_model.bin"):
        load_adapter(pickled, base=str(base))
    file = cut / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="header promises"):
        load_adapter(cut, base=str(base))
    (linked / "tokenizer.json").unlink()
    (linked / "tokenizer.json").symlink_to(folder / "tokenizer.json")
    with pytest.raises(UnsafeCheckpointError, match="is a link to"):
        load_adapter(linked, base=str(base))
    (foreign / "base.json").unlink()
    with pytest.raises(CheckpointError, match=r"an adapter without base.json"):
        load_adapter(foreign, base=str(base))
    with pytest.raises(CheckpointError, match="holds no adapter"):
        load_adapter(base)
    with pytest.raises(CheckpointError, match="an adapter, and a whole model is needed here"):
        load_classifier(str(folder), schema=SCHEMA)


def test_nothing_half_written_is_left(bundle, tmp_path, monkeypatch):
    folder, base, _, _ = bundle()
    loaded = load_adapter(folder, base=str(base))
    monkeypatch.setattr("nlpxfer.checkpoint.adapters.write_json_whole", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_adapter(loaded.model, loaded.tokenizer, SCHEMA, tmp_path / "out", base=loaded.base)
    assert list((tmp_path / "out").iterdir()) == []
    with torch.no_grad():
        next(loaded.model.parameters()).fill_(float("nan"))
    with pytest.raises(NotFiniteError):
        save_adapter(loaded.model, loaded.tokenizer, SCHEMA, tmp_path / "nan", base=loaded.base)


@pytest.mark.parametrize("kind", ["lora", "p_tuning", "bitfit"])
def test_what_learns_is_kept_and_read_back_bit_for_bit(kind, tiny_checkpoint, tmp_path):
    """peft's own file would not do: of p-tuning it holds the prompt, and not the encoder that makes it."""
    base = tiny_checkpoint("bert", layers=2)
    checkpoint, _, model = adapted(base, kind)
    inputs = batch(checkpoint.tokenizer)
    trained(model, inputs)
    save_trained(model, tmp_path / "checkpoint-3")
    _, _, again = adapted(base, kind, seed=9)
    load_trained_(again, tmp_path / "checkpoint-3")
    assert torch.equal(logits_of(again, inputs), logits_of(model, inputs))
    state = dict(again.named_parameters())
    assert all(torch.equal(p, state[name]) for name, p in model.named_parameters() if p.requires_grad)
    _, _, other = adapted(base, "layernorm")
    with pytest.raises(ResumeError, match="other weights than those that learn"):
        load_trained_(other, tmp_path / "checkpoint-3")
