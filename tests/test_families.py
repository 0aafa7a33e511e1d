"""Families beside those of `tiny.FAMILIES`: what works as there, and what is refused with its reason."""

import csv
import logging

import pytest
import torch
from recipe_runs import finished, refused, tiny_words
from tiny import LABELS
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from nlpxfer.checkpoint.head import features, head_logits, head_of, pooled_states
from nlpxfer.checkpoint.load import layer_student, load_classifier, load_teacher
from nlpxfer.checkpoint.tokenizer import max_positions
from nlpxfer.classify import Classifier
from nlpxfer.data.schema import LabelSchema
from nlpxfer.errors import CheckpointError
from nlpxfer.smallest import slices

SCHEMA = LabelSchema(tuple(sorted(LABELS)))
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
OPTIONS = {
    "longformer": {"attention_window": 8, "max_position_embeddings": 66},
    "deberta": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "nystromformer": {"num_landmarks": 8, "segment_means_seq_len": 8},
    "convbert": {"embedding_size": 32, "head_ratio": 2, "conv_kernel_size": 3},
    "roformer": {"embedding_size": 32},
    "big_bird": {"attention_type": "original_full"},
    "bart": {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "eos_token_id": 3}
    | {"decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64},
    "funnel": {"d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 64, "block_sizes": [1, 1]},
}


@pytest.fixture
def made(tiny_checkpoint, tmp_path):
    """Factory: a tiny classifier of a family with BERT's words."""

    def make(family):
        tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint("bert"))
        torch.manual_seed(0)
        sizes = {} if family in ("bart", "funnel") else SIZES
        shared = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
        shared |= {
            "id2label": dict(enumerate(SCHEMA.names)),
            "label2id": {label: i for i, label in enumerate(SCHEMA.names)},
        }
        config = AutoConfig.for_model(family, **{**sizes, **shared, **OPTIONS.get(family, {})})
        model = AutoModelForSequenceClassification.from_config(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.startswith("classifier"):
                    parameter.normal_(std=0.5)
        model.save_pretrained(tmp_path / family)
        tokenizer.save_pretrained(tmp_path / family)
        return tmp_path / family

    return make


@pytest.mark.parametrize("family", ["fnet", "funnel"])
def test_a_family_that_reads_padding_is_refused(family, made):
    with pytest.raises(CheckpointError, match="which reads padding like words"):
        load_classifier(str(made(family)), schema=SCHEMA)


@pytest.mark.parametrize("family", ["convbert", "nystromformer"])
def test_a_family_that_sees_padding_is_named(family, made, caplog):
    with caplog.at_level(logging.WARNING):
        load_classifier(str(made(family)), schema=SCHEMA)
    assert "padding shines through" in caplog.text


@pytest.mark.parametrize("family", ["big_bird", "convbert", "roformer", "nystromformer", "longformer", "deberta"])
def test_the_head_is_read_as_it_computes(family, made):
    checkpoint = load_classifier(str(made(family)), schema=SCHEMA)
    batch = dict(
        checkpoint.tokenizer(["the goal of the match", "bread and cheese ok"], padding=True, return_tensors="pt")
    )
    with torch.no_grad():
        logits = checkpoint.model(**batch).logits
        torch.testing.assert_close(head_of(checkpoint.model).final(features(checkpoint.model, batch)), logits)
        pooled = pooled_states(checkpoint.model, batch)
        torch.testing.assert_close(head_logits(checkpoint.model, pooled), logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["longformer", "convbert"])
def test_a_frozen_teacher_gives_students_of_its_layers(family, made):
    teacher = load_teacher(str(made(family)), schema=SCHEMA)
    assert not any(p.requires_grad for p in teacher.model.parameters())
    assert layer_student(teacher, [0]).model.config.num_hidden_layers == 1


def test_a_family_without_a_table_of_tokens_is_refused(tmp_path):
    from transformers import CanineTokenizer

    config = AutoConfig.for_model("canine", **SIZES, num_hash_buckets=64, local_transformer_stride=8)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    CanineTokenizer().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="has no plain token embeddings"):
        load_classifier(str(tmp_path), schema=SCHEMA)


def test_a_model_that_does_not_compute_in_bfloat16(made, tiny_data, tmp_path, caplog):
    folder = made("deberta")
    words = tiny_words(tiny_data, folder)
    at = words.index("--bf16")
    wished = [*words[:at], "--bf16", "true", *words[at + 2 :], "--linear_probe", "false"]
    message = refused("finetune", tmp_path / "no", *wished)
    assert message.startswith("DebertaForSequenceClassification does not compute in bfloat16")
    assert "--bf16 false" in message
    run = finished("finetune", tmp_path / "out", *words, "--save_predictions", "true", "--control_arm", "false")
    with caplog.at_level(logging.INFO), tiny_data.test.open(newline="") as file:
        answers = Classifier.load(str(run.folder)).logits([row["text"] for row in csv.DictReader(file)])
    assert [SCHEMA.names[i] for i in answers.argmax(axis=1)] == [row["predicted"] for row in run.logits_of()]


def test_a_text_model_inside_of_another_tells_its_sizes(made):
    checkpoint = load_classifier(str(made("bert")), schema=SCHEMA)
    text = checkpoint.model.config
    text.max_position_embeddings = 40
    outer = type("Outer", (), {"get_text_config": lambda self: text, "model_type": "bert", "is_decoder": False})()
    checkpoint.model.config = outer
    assert [choice.values for choice in slices(checkpoint.model)] == [{"student_num_layers": 1}]
    assert max_positions(checkpoint.model, checkpoint.tokenizer) == 40


def test_a_prefix_that_does_not_compute_in_float32_either_is_not_told_of_bfloat16(made, tiny_data, tmp_path):
    words = [*tiny_words(tiny_data, made("bart")), "--adapter", "prefix"]
    message = refused("adapters", tmp_path / "out", *words)
    assert message.startswith("adapter: prefix does not compute in this model")
    assert "bf16" not in message
