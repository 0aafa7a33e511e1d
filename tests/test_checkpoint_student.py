"""Students cut from a teacher: the kept layers are the teacher's, and a reload gives the same model."""

from __future__ import annotations

import pytest
import torch
from tiny import FAMILIES, LABELS, LAYERS
from transformers import AutoModelForSequenceClassification

from nlpxfer.checkpoint import choose_layers, load_classifier, model_layers, save_classifier, slice_layers
from nlpxfer.checkpoint.student import parse_layers
from nlpxfer.data.schema import LabelSchema
from nlpxfer.errors import CheckpointError, ConfigError

SCHEMA = LabelSchema(LABELS)
SLICEABLE = [family for family in FAMILIES if family != "albert"]
TEXTS = ["the goal of the match in the new stadium before the concert", "bread and cheese", "a train"]


@pytest.fixture
def load(tiny_checkpoint):
    return lambda family, **options: load_classifier(
        str(tiny_checkpoint(family, "classifier", **options)), schema=SCHEMA
    )


def layer_states(model):
    _, layers = model_layers(model)
    return [layer.state_dict() for layer in layers]


@pytest.mark.parametrize("family", SLICEABLE)
def test_blocks_are_found(load, family):
    name, layers = model_layers(load(family).model)
    assert len(layers) == LAYERS
    assert name.split(".")[-1] in ("layer", "layers", "h")


@pytest.mark.parametrize("keep", [[0, 2], [0, 1, 3], [0]])
@pytest.mark.parametrize("family", SLICEABLE)
def test_student_keeps_its_layers_through_save_and_reload(load, family, keep, tmp_path):
    checkpoint = load(family)
    teacher, before = checkpoint.model, layer_states(checkpoint.model)
    student = slice_layers(teacher, keep)
    assert type(student) is type(teacher)
    assert student.config.num_hidden_layers == len(keep)
    assert teacher.config.num_hidden_layers == LAYERS
    for after, index in zip(layer_states(student), keep, strict=True):
        assert after.keys() == before[index].keys()
        assert all(torch.equal(after[key], before[index][key]) for key in after)
    batch = checkpoint.tokenizer(TEXTS, padding=True, return_tensors="pt")
    logits = student(**batch).logits
    assert not torch.allclose(logits, teacher(**batch).logits, atol=1e-4)
    save_classifier(student, checkpoint.tokenizer, SCHEMA, tmp_path / "student")
    reloaded, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "student", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(reloaded.eval()(**batch).logits, logits)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    assert all(
        torch.equal(now[key], old[key]) for now, old in zip(layer_states(teacher), before, strict=True) for key in now
    )


@pytest.mark.parametrize("family", SLICEABLE)
def test_keeping_all_layers_changes_nothing(load, family):
    checkpoint = load(family)
    batch = checkpoint.tokenizer(TEXTS, padding=True, return_tensors="pt")
    student = slice_layers(checkpoint.model, range(LAYERS))
    assert torch.equal(student(**batch).logits, checkpoint.model(**batch).logits)


@pytest.mark.parametrize("family", SLICEABLE)
def test_student_is_the_teacher_with_layers_skipped(load, family):
    """The reference runs the teacher with the dropped layers replaced by the identity."""
    checkpoint = load(family)
    batch = checkpoint.tokenizer(TEXTS, padding=True, return_tensors="pt")
    student = slice_layers(checkpoint.model, [0, 3])
    _, layers = model_layers(checkpoint.model)
    for index in (1, 2):
        layer = layers[index]

        def skip(hidden_states, *args, layer=layer, **kwargs):
            return hidden_states if family != "deberta-v2" else (hidden_states, None)

        layer.forward = skip
    torch.testing.assert_close(student(**batch).logits, checkpoint.model(**batch).logits, rtol=1e-5, atol=1e-6)


def test_modernbert_keeps_each_layer_kind_of_attention(load):
    teacher = load("modernbert").model
    kinds = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    assert teacher.config.layer_types == kinds
    student = slice_layers(teacher, [0, 2, 3])
    assert student.config.layer_types == ["full_attention", "sliding_attention", "full_attention"]
    assert [layer.attention_type for layer in model_layers(student)[1]] == student.config.layer_types
    assert teacher.config.layer_types == kinds


def test_modernbert_without_its_first_layer_is_refused(load):
    with pytest.raises(CheckpointError, match=r"keeping the layers \[1, 2\] of 4.*attn_norm"):
        slice_layers(load("modernbert").model, [1, 2])


def test_qwen2_with_sliding_window_keeps_each_layer_kind(load):
    teacher = load("qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=2).model
    assert teacher.config.layer_types == ["full_attention"] * 2 + ["sliding_attention"] * 2
    assert slice_layers(teacher, [1, 3]).config.layer_types == ["full_attention", "sliding_attention"]


def test_gpt2_whose_scale_depends_on_the_place_is_refused(load):
    teacher = load("gpt2", scale_attn_by_inverse_layer_idx=True).model
    assert slice_layers(teacher, [0, 1]).config.n_layer == 2
    with pytest.raises(CheckpointError, match="a reload would compute something else"):
        slice_layers(teacher, [0, 2])


def test_decoder_layers_are_renumbered_for_the_cache(load):
    student = slice_layers(load("qwen2").model, [1, 3])
    assert [layer.self_attn.layer_idx for layer in model_layers(student)[1]] == [0, 1]


def test_albert_is_refused(load):
    with pytest.raises(CheckpointError, match="ALBERT shares one block"):
        slice_layers(load("albert").model, [0])


@pytest.mark.parametrize(
    ("total", "count", "how", "expected"),
    [
        (6, 3, "bottom", [0, 1, 2]),
        (6, 3, "even", [0, 2, 5]),
        (12, 6, "even", [0, 2, 4, 7, 9, 11]),  # 0, 2.2, 4.4, 6.6, 8.8, 11
        (12, 4, "even", [0, 4, 7, 11]),  # 0, 3.67, 7.33, 11
        (6, 2, "even", [0, 5]),
        (6, 1, "even", [0]),
        (4, 4, "even", [0, 1, 2, 3]),
    ],
)
def test_choose_layers(total, count, how, expected):
    assert choose_layers(total, count, how) == expected


def test_even_choices_are_always_distinct():
    for total in range(1, 30):
        for count in range(1, total + 1):
            chosen = choose_layers(total, count, "even")
            assert len(set(chosen)) == count
            assert chosen == sorted(chosen)
            assert count == 1 or (chosen[0], chosen[-1]) == (0, total - 1)


def test_parse_layers():
    assert parse_layers("0,2,5", 6) == [0, 2, 5]
    assert parse_layers("0, 3", 6, 2) == [0, 3]
    assert parse_layers("even", 6, 3) == [0, 2, 5]
    assert parse_layers("bottom", 6, 2) == [0, 1]


@pytest.mark.parametrize(
    ("text", "count", "message"),
    [
        ("even", None, "needs the number"),
        ("top", None, "'top' is no choice"),
        ("0,6", None, "0 to 5"),
        ("-1", None, "0 to 5"),
        ("2,0", None, "must ascend"),
        ("1,1", None, "must ascend"),
        ("0,2,5", 2, "names 3 layers, but 2"),
        ("bottom", 7, "cannot be cut from 6"),
        ("bottom", 0, "cannot be cut from 6"),
    ],
)
def test_parse_layers_refuses(text, count, message):
    with pytest.raises(ConfigError, match=message):
        parse_layers(text, 6, count)
