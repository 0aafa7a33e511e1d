"""Loading: labels by name, nothing random unnoticed, pad tokens, lengths, fingerprints."""

from __future__ import annotations

import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import DECODERS, FAMILIES, LABELS, MAIN_FAMILIES, edit_json

from nlpxfer.checkpoint import (
    load_classifier,
    load_teacher,
    max_positions,
    tokenizer_fingerprint,
    weights_fingerprint,
)
from nlpxfer.checkpoint.tokenizer import save_tokenizer
from nlpxfer.data.schema import LabelSchema
from nlpxfer.errors import CheckpointError, ConfigError, LabelError

SCHEMA = LabelSchema(LABELS)
TEXTS = ["the goal of the match", "bread and cheese", "we took the train to the airport before the concert"]


def probabilities_by_name(checkpoint):
    """Label name -> probabilities of the three texts."""
    batch = checkpoint.tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        shares = checkpoint.model(**batch).logits.softmax(-1)
    return {checkpoint.model.config.id2label[i]: shares[:, i] for i in range(shares.shape[1])}


FRESH = {
    "bert": ("classifier.weight", "classifier.bias"),
    "albert": ("classifier.weight", "classifier.bias"),
    "roberta": (
        "classifier.dense.weight",
        "classifier.dense.bias",
        "classifier.out_proj.weight",
        "classifier.out_proj.bias",
    ),
    "distilbert": ("pre_classifier.weight", "pre_classifier.bias", "classifier.weight", "classifier.bias"),
    "deberta-v2": ("pooler.dense.weight", "pooler.dense.bias", "classifier.weight", "classifier.bias"),
    "modernbert": ("head.dense.weight", "head.norm.weight", "classifier.weight", "classifier.bias"),
    **dict.fromkeys(DECODERS, ("score.weight",)),
}
FRESH["xlm-roberta"] = FRESH["electra"] = FRESH["roberta"]


@pytest.mark.parametrize("family", FAMILIES)
def test_base_checkpoint_gets_a_new_head_of_the_right_size(tiny_checkpoint, family):
    folder = tiny_checkpoint(family)
    checkpoint = load_classifier(str(folder), schema=LabelSchema(("x", "y", "z")))
    assert checkpoint.fresh == FRESH[family]
    assert not checkpoint.head_kept
    config = checkpoint.model.config
    assert config.id2label == {0: "x", 1: "y", 2: "z"}
    assert config.label2id == {"x": 0, "y": 1, "z": 2}
    assert config.problem_type == "single_label_classification"
    batch = checkpoint.tokenizer(TEXTS, padding=True, return_tensors="pt")
    output = checkpoint.model(**batch, labels=torch.tensor([0, 1, 2]))
    assert output.logits.shape == (3, 3)
    expected = -output.logits.log_softmax(-1)[torch.arange(3), torch.arange(3)].mean()
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert not checkpoint.model.training
    assert all(parameter.requires_grad for parameter in checkpoint.model.parameters())
    stored = load_file(folder / "model.safetensors")
    state = checkpoint.model.state_dict()
    prefix = checkpoint.model.base_model_prefix + "."
    body = [key for key in state if key.startswith(prefix) and key.removeprefix(prefix) in stored]
    assert len(body) > 10
    assert all(torch.equal(state[key], stored[key.removeprefix(prefix)]) for key in body)


@pytest.mark.parametrize("family", FAMILIES)
def test_permuted_labels_give_the_same_named_probabilities(tiny_checkpoint, family):
    folder = str(tiny_checkpoint(family, "classifier"))
    same = load_classifier(folder, schema=SCHEMA)
    turned = load_classifier(folder, schema=LabelSchema(("travel", "food", "sport", "music")))
    assert same.head_kept
    assert turned.head_kept
    assert same.fresh == turned.fresh == ()
    assert turned.model.config.id2label[0] == "travel"
    before, after = probabilities_by_name(same), probabilities_by_name(turned)
    for name in LABELS:
        torch.testing.assert_close(after[name], before[name], rtol=1e-5, atol=1e-6)
    assert (before["food"] - before["sport"]).abs().max() > 1e-3  # otherwise the test could not fail


def test_mlm_checkpoint_reports_the_pooler_as_fresh(tiny_checkpoint):
    checkpoint = load_classifier(str(tiny_checkpoint("bert", "mlm")), schema=SCHEMA)
    assert checkpoint.fresh == (
        "bert.pooler.dense.weight",
        "bert.pooler.dense.bias",
        "classifier.weight",
        "classifier.bias",
    )


@pytest.mark.parametrize("labels", [("food", "music", "sport", "wine"), ("LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3")])
def test_other_or_placeholder_labels_start_a_new_head(tiny_checkpoint, labels, caplog):
    folder = tiny_checkpoint("bert", "classifier", labels=labels)
    with caplog.at_level(logging.INFO, logger="nlpxfer"):
        checkpoint = load_classifier(str(folder), schema=SCHEMA)
    assert not checkpoint.head_kept
    assert checkpoint.fresh == ("classifier.weight", "classifier.bias")
    stored = load_file(folder / "model.safetensors")["classifier.weight"]
    assert not torch.equal(checkpoint.model.classifier.weight, stored)
    assert "new final layer" in caplog.text


def test_head_new_discards_a_fitting_head(tiny_checkpoint):
    folder = tiny_checkpoint("roberta", "classifier")
    checkpoint = load_classifier(str(folder), schema=SCHEMA, head="new")
    assert checkpoint.fresh == ("classifier.out_proj.weight", "classifier.out_proj.bias")
    stored = load_file(folder / "model.safetensors")
    assert torch.equal(checkpoint.model.classifier.dense.weight, stored["classifier.dense.weight"])
    with pytest.raises(ConfigError, match="auto, new"):
        load_classifier(str(folder), schema=SCHEMA, head="old")


def test_seed_decides_the_new_head_and_leaves_the_global_state(tiny_checkpoint):
    folder = str(tiny_checkpoint("distilbert"))
    state = torch.get_rng_state()
    first, again, other = (load_classifier(folder, schema=SCHEMA, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert first.weights_sha256 == again.weights_sha256
    assert first.weights_sha256 != other.weights_sha256


def test_token_classifier_of_the_same_size_is_not_trusted(tiny_copy):
    folder = tiny_copy("bert", "classifier")
    edit_json(folder / "config.json", architectures=["BertForTokenClassification"])
    checkpoint = load_classifier(str(folder), schema=SCHEMA)
    assert checkpoint.fresh == ("classifier.weight", "classifier.bias")


def test_half_precision_checkpoint_loads_as_float32(tiny_copy):
    folder = tiny_copy("bert")
    tensors = {key: value.half() for key, value in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    edit_json(folder / "config.json", dtype="float16")
    model = load_classifier(str(folder), schema=SCHEMA).model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_missing_layers_are_refused(tiny_copy):
    folder = tiny_copy("bert")
    edit_json(folder / "config.json", num_hidden_layers=6)
    with pytest.raises(CheckpointError, match=r"no weights for 32 parameters of its body: bert.encoder.layer.4"):
        load_classifier(str(folder), schema=SCHEMA)


def test_classifier_without_its_head_is_refused(tiny_copy):
    folder = tiny_copy("bert", "classifier")
    tensors = load_file(folder / "model.safetensors")
    del tensors["classifier.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"no weights for: classifier.weight"):
        load_classifier(str(folder), schema=SCHEMA)
    assert load_classifier(str(folder), schema=SCHEMA, head="new").fresh == ("classifier.weight", "classifier.bias")


def test_weights_of_other_shapes_are_refused(tiny_copy):
    folder = tiny_copy("bert")
    edit_json(folder / "config.json", intermediate_size=48)
    with pytest.raises(CheckpointError, match="do not fit its config"):
        load_classifier(str(folder), schema=SCHEMA)


def test_family_without_classifier_lists_those_with_one(tiny_copy):
    folder = tiny_copy("bert")
    edit_json(folder / "config.json", model_type="clip", architectures=["CLIPModel"])
    with pytest.raises(CheckpointError, match=r"'clip'.*no sequence classification class") as caught:
        load_classifier(str(folder), schema=SCHEMA)
    assert "bert" in str(caught.value)


def test_family_that_reads_the_last_position_is_refused(tiny_copy):
    """XLNet's classifier reads padding behind a shorter text."""
    folder = tiny_copy("bert")
    (folder / "config.json").unlink()
    edit_json(folder / "config.json", model_type="xlnet")
    with pytest.raises(CheckpointError, match="'xlnet', whose classifier reads the last position"):
        load_classifier(str(folder), schema=SCHEMA)


def test_unknown_family_is_refused(tiny_copy):
    folder = tiny_copy("bert")
    edit_json(folder / "config.json", model_type="berd")
    with pytest.raises(CheckpointError, match=r"config.json of .* cannot be read"):
        load_classifier(str(folder), schema=SCHEMA)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
def test_decoder_without_pad_token_pads_with_eos(tiny_checkpoint, family):
    checkpoint = load_classifier(str(tiny_checkpoint(family)), schema=SCHEMA)
    tokenizer, model = checkpoint.tokenizer, checkpoint.model
    assert tokenizer.pad_token == tokenizer.eos_token
    assert model.config.pad_token_id == tokenizer.eos_token_id
    assert len(tokenizer) == model.config.vocab_size
    together = probabilities_by_name(checkpoint)
    for row, text in enumerate(TEXTS):
        alone = model(**tokenizer([text], return_tensors="pt")).logits.softmax(-1)[0]
        for index, name in enumerate(LABELS):
            assert alone[index].item() == pytest.approx(together[name][row].item(), abs=1e-5)


def test_neither_pad_nor_eos_is_refused(tiny_copy):
    folder = tiny_copy("gpt2")
    edit_json(folder / "tokenizer_config.json", eos_token=None, bos_token=None)
    with pytest.raises(CheckpointError, match="neither a pad nor an eos token"):
        load_classifier(str(folder), schema=SCHEMA)


def test_missing_tokenizer_is_refused(tiny_copy):
    folder = tiny_copy("bert")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        load_classifier(str(folder), schema=SCHEMA)


def test_damaged_tokenizer_is_refused(tiny_copy):
    folder = tiny_copy("bert")
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text[: len(text) // 2])
    with pytest.raises(CheckpointError, match="tokenizer of .* cannot be read"):
        load_classifier(str(folder), schema=SCHEMA)


def test_tokenizer_that_its_class_would_mangle_is_refused(tiny_copy, tiny_checkpoint):
    folder = tiny_copy("qwen2")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tiny_checkpoint("bert") / name).read_bytes())
    with pytest.raises(CheckpointError, match="loses tokens"):
        load_classifier(str(folder), schema=SCHEMA)


def test_tokenizer_larger_than_the_embeddings_is_refused(tiny_copy):
    folder = tiny_copy("bert")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["extraword"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(CheckpointError, match="embeddings for"):
        load_classifier(str(folder), schema=SCHEMA)


@pytest.mark.parametrize("family", FAMILIES)
def test_max_positions_is_usable_and_the_largest(tiny_checkpoint, family):
    checkpoint = load_classifier(str(tiny_checkpoint(family)), schema=SCHEMA)
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    tokenizer.model_max_length = int(1e30)
    limit = max_positions(model, tokenizer)
    assert limit == 64  # RoBERTa has 66 positions, two of them before the first token
    ids = torch.full((1, limit), 9)
    assert model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.isfinite().all()
    tokenizer.model_max_length = 40
    assert max_positions(model, tokenizer) == 40


@pytest.mark.parametrize("family", MAIN_FAMILIES)
def test_teacher_is_frozen_and_in_schema_order(tiny_checkpoint, family):
    folder = str(tiny_checkpoint(family, "classifier"))
    teacher = load_teacher(folder, schema=LabelSchema(tuple(reversed(LABELS))))
    assert teacher.head_kept
    assert not teacher.model.training
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    batch = teacher.tokenizer(TEXTS, padding=True, return_tensors="pt")
    reference = load_classifier(folder, schema=SCHEMA).model(**batch).logits
    torch.testing.assert_close(teacher.model(**batch).logits, reference.flip(-1))


def test_teacher_with_other_labels_lists_both_sides(tiny_checkpoint):
    folder = str(tiny_checkpoint("bert", "classifier"))
    with pytest.raises(LabelError) as caught:
        load_teacher(folder, schema=LabelSchema(("food", "music", "wine", "beer")))
    assert "only in teacher (2): sport, travel" in str(caught.value)
    assert "only in data (2): beer, wine" in str(caught.value)


def test_teacher_with_placeholders_or_without_head_is_refused(tiny_checkpoint, tiny_copy):
    placeholders = tiny_checkpoint("bert", "classifier", labels=("LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3"))
    with pytest.raises(LabelError, match="positions are never trusted"):
        load_teacher(str(placeholders), schema=SCHEMA)
    with pytest.raises(CheckpointError, match="not a classifier"):
        load_teacher(str(tiny_checkpoint("bert")), schema=SCHEMA)
    several = tiny_copy("bert", "classifier")
    edit_json(several / "config.json", problem_type="multi_label_classification")
    with pytest.raises(CheckpointError, match="multi_label_classification"):
        load_teacher(str(several), schema=SCHEMA)


def test_more_than_ten_labels_are_ordered_by_number(tiny_checkpoint):
    labels = tuple(f"name {index}" for index in range(12))
    teacher = load_teacher(str(tiny_checkpoint("bert", "classifier", labels=labels)), schema=LabelSchema(labels))
    stored = load_file(teacher.folder / "model.safetensors")["classifier.weight"]
    assert torch.equal(teacher.model.classifier.weight, stored)


def test_weights_fingerprint_sees_every_bit():
    model = torch.nn.Linear(3, 2).double()
    first = weights_fingerprint(model)
    assert weights_fingerprint(model) == first
    with torch.no_grad():
        model.weight[0, 0] = torch.nextafter(model.weight[0, 0], torch.tensor(9.0, dtype=torch.float64))
    assert weights_fingerprint(model) != first
    assert weights_fingerprint(torch.nn.Linear(3, 2).bfloat16()) != weights_fingerprint(torch.nn.Linear(3, 2).half())


def test_tokenizer_fingerprint_depends_on_the_tokenizer_only(tiny_checkpoint):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint("bert"))
    first = tokenizer_fingerprint(tokenizer)
    tokenizer(TEXTS, padding=True, truncation=True, max_length=5)
    assert tokenizer_fingerprint(tokenizer) == first
    assert tokenizer_fingerprint(AutoTokenizer.from_pretrained(tiny_checkpoint("bert", "classifier"))) == first
    tokenizer.padding_side = "left"
    assert tokenizer_fingerprint(tokenizer) != first
    assert tokenizer_fingerprint(AutoTokenizer.from_pretrained(tiny_checkpoint("electra"))) != first


def test_the_fingerprint_of_a_tokenizer_in_python_holds_its_files_and_options(tmp_path):
    from transformers import AutoTokenizer, BertweetTokenizer

    words = ("hello", "@USER", "w@@", "o@@", "r@@", "l@@", "d", "wor@@", "ld")
    (tmp_path / "vocab.txt").write_text("".join(f"{word} 1\n" for word in words))
    (tmp_path / "all.codes").write_text("w o 1\nwo r 1\nl d</w> 1\n")
    (tmp_path / "few.codes").write_text("l d</w> 1\n")
    asked = [("all", False), ("all", True), ("few", False)]
    made = [
        BertweetTokenizer(str(tmp_path / "vocab.txt"), str(tmp_path / f"{codes}.codes"), normalization=changed)
        for codes, changed in asked
    ]
    assert getattr(made[0], "backend_tokenizer", None) is None
    assert len({tuple(each("hello @someone world").input_ids) for each in made}) == 3
    assert len({tokenizer_fingerprint(each) for each in made}) == 3
    save_tokenizer(made[1], tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert again("hello world").input_ids == made[1]("hello world").input_ids
    assert tokenizer_fingerprint(again) == tokenizer_fingerprint(made[1])
    (tmp_path / "all.codes").unlink()  # without what it came from only the class itself can save it, and does not
    with pytest.raises(CheckpointError, match="BertweetTokenizer does not save itself whole"):
        save_tokenizer(made[1], tmp_path / "alone")
    save_tokenizer(again, tmp_path / "next")
    assert tokenizer_fingerprint(AutoTokenizer.from_pretrained(tmp_path / "next")) == tokenizer_fingerprint(again)
