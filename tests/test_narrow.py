"""Narrower students: the same entries of the residual stream everywhere, and a config that leads back to the model."""

import dataclasses

import pytest
import torch
from tiny import HEADS, HIDDEN, INNER, LABELS, LAYERS
from transformers import AutoModelForSequenceClassification

from nlpxfer.checkpoint.load import load_classifier, narrow_student
from nlpxfer.checkpoint.narrow import LAYOUTS, Kept, Widths, narrow_model, narrow_widths, widths_of
from nlpxfer.checkpoint.save import save_classifier
from nlpxfer.checkpoint.student import model_layers
from nlpxfer.data.schema import LabelSchema
from nlpxfer.errors import CheckpointError, ConfigError
from nlpxfer.train.width_scores import parts_by_activation

SCHEMA = LabelSchema(tuple(sorted(LABELS)))
TEXTS = ["the guitar and the piano", "bread with cheese and butter for dinner", "match"]
FAMILIES = ["bert", "roberta", "xlm-roberta", "electra", "distilbert", "gpt2"]
SIZE = HIDDEN // HEADS
ALL = Kept(residual=range(HIDDEN), heads=[range(HEADS)] * LAYERS, neurons=[range(INNER)] * LAYERS)


@pytest.fixture
def load(tiny_checkpoint):
    return lambda family, **options: load_classifier(
        str(tiny_checkpoint(family, kind="classifier", **options)), schema=SCHEMA
    )


def batch_of(checkpoint, texts=TEXTS):
    return checkpoint.tokenizer(texts, padding=True, return_tensors="pt")


def shuffled(count, seed):
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_all_is_the_same_model(load, family):
    checkpoint = load(family)
    batch = batch_of(checkpoint)
    assert torch.equal(narrow_model(checkpoint.model, ALL)(**batch).logits, checkpoint.model(**batch).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_order_of_what_is_kept_makes_no_difference(load, family):
    """Only if every part takes the same entries, and heads and neurons match on both ends, do the logits stay."""
    checkpoint = load(family)
    kept = Kept(
        residual=shuffled(HIDDEN, 1),
        heads=[shuffled(HEADS, 2 + layer) for layer in range(LAYERS)],
        neurons=[shuffled(INNER, 9 + layer) for layer in range(LAYERS)],
    )
    batch = batch_of(checkpoint)
    permuted = narrow_model(checkpoint.model, kept)
    pairs = zip(permuted.parameters(), checkpoint.model.parameters(), strict=True)
    assert not all(torch.equal(new, old) for new, old in pairs)
    torch.testing.assert_close(permuted(**batch).logits, checkpoint.model(**batch).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_narrow_student_reloads_as_it_is(load, family, tmp_path):
    checkpoint = load(family, **({"embedding_size": 12} if family == "electra" else {}))
    widths = narrow_widths(checkpoint.model, 2 * SIZE)
    assert widths == Widths(hidden=HIDDEN // 2, heads=2, neurons=INNER // 2)
    kept = parts_by_activation(checkpoint.model, [batch_of(checkpoint)], widths)
    before = {name: value.clone() for name, value in checkpoint.model.state_dict().items()}
    student = narrow_student(checkpoint, kept, seed=3)
    assert widths_of(student.model) == widths
    assert student.model.num_parameters() < 0.6 * checkpoint.model.num_parameters()
    assert student.fresh
    assert not student.head_kept
    save_classifier(student.model, student.tokenizer, SCHEMA, tmp_path / "narrow")
    again, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "narrow", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    batch = batch_of(student)
    assert torch.equal(again.eval()(**batch).logits, student.model(**batch).logits)
    assert all(torch.equal(before[name], value) for name, value in checkpoint.model.state_dict().items())


def test_weights_are_those_of_the_kept_entries_and_grow_with_the_lost_inputs(load):
    model = load("bert").model
    heads, neurons, entries = [1, 3], [5, 60], [0, 2, *range(10, 24)]
    kept = Kept(residual=entries, heads=[heads] * LAYERS, neurons=[neurons] * LAYERS)
    narrow = narrow_model(model, kept)
    assert narrow.config.intermediate_size == 2
    block, cut = model.bert.encoder.layer[2], narrow.bert.encoder.layer[2]
    rows = [*range(8, 16), *range(24, 32)]
    query = block.attention.self.query
    expected = query.weight[rows][:, entries] * (HIDDEN / 16) ** 0.5
    torch.testing.assert_close(cut.attention.self.query.weight, expected)
    assert torch.equal(cut.attention.self.query.bias, query.bias[rows])
    expected = block.output.dense.weight[entries][:, neurons] * (INNER / 2) ** 0.5
    torch.testing.assert_close(cut.output.dense.weight, expected)
    assert torch.equal(cut.output.LayerNorm.weight, block.output.LayerNorm.weight[entries])
    words = model.bert.embeddings.word_embeddings.weight
    assert torch.equal(narrow.bert.embeddings.word_embeddings.weight, words[:, entries])


def test_electra_whose_embeddings_are_as_wide_as_its_layers(load):
    checkpoint = load("electra", embedding_size=HIDDEN)
    batch = batch_of(checkpoint)
    kept = dataclasses.replace(ALL, residual=shuffled(HIDDEN, 4))
    torch.testing.assert_close(narrow_model(checkpoint.model, kept)(**batch).logits, checkpoint.model(**batch).logits)
    half = dataclasses.replace(ALL, residual=range(16), heads=[[0, 1]] * LAYERS)
    assert narrow_model(checkpoint.model, half).config.embedding_size == 16


def test_electra_cannot_become_as_narrow_as_its_embeddings(load):
    with pytest.raises(ConfigError, match="student_hidden_size: 16 is the size of the embeddings"):
        narrow_widths(load("electra").model, 16)


def test_as_many_labels_as_entries_are_not_taken_for_entries(tiny_checkpoint):
    names = tuple(f"label {number:02}" for number in range(HIDDEN))
    checkpoint = load_classifier(
        str(tiny_checkpoint("bert", kind="classifier", labels=names)), schema=LabelSchema(names)
    )
    half = dataclasses.replace(ALL, residual=range(16), heads=[[0, 1]] * LAYERS)
    assert tuple(narrow_model(checkpoint.model, half).classifier.weight.shape) == (HIDDEN, 16)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_the_parts_with_the_largest_activations_are_kept(load, family):
    """Silenced neurons, heads and entries are the ones that go."""
    checkpoint = load(family)
    model, layers = checkpoint.model, model_layers(checkpoint.model)[1]
    dead = [0, 5, 9]
    with torch.no_grad():
        for layer in layers:
            if family == "bert":
                layer.attention.self.value.weight[:SIZE] = 0
                layer.attention.self.value.bias[:SIZE] = 0
                layer.intermediate.dense.weight[dead] = 0
                layer.intermediate.dense.bias[dead] = 0
            else:
                layer.attn.c_attn.weight[:, 2 * HIDDEN : 2 * HIDDEN + SIZE] = 0
                layer.attn.c_attn.bias[2 * HIDDEN : 2 * HIDDEN + SIZE] = 0
                layer.mlp.c_fc.weight[:, dead] = 0
                layer.mlp.c_fc.bias[dead] = 0
    widths = Widths(hidden=HIDDEN - SIZE, heads=HEADS - 1, neurons=INNER - 3)
    kept = parts_by_activation(model, [batch_of(checkpoint)], widths)
    assert kept.heads == [[1, 2, 3]] * LAYERS
    assert all(not {*dead} & {*neurons} for neurons in kept.neurons)
    assert len(kept.residual) == HIDDEN - SIZE


def test_padding_does_not_count(load):
    checkpoint = load("bert")
    widths = narrow_widths(checkpoint.model, 16)
    alone = [batch_of(checkpoint, [text]) for text in TEXTS]
    assert parts_by_activation(checkpoint.model, alone, widths) == parts_by_activation(
        checkpoint.model, [batch_of(checkpoint)], widths
    )


@pytest.mark.parametrize("family", ["modernbert", "albert", "qwen2", "deberta-v2"])
def test_other_families_are_refused(load, family):
    with pytest.raises(CheckpointError, match="cannot be made narrower: the parts of the family") as error:
        narrow_widths(load(family).model, 16)
    assert all(name in str(error.value) for name in LAYOUTS)


@pytest.mark.parametrize(
    ("hidden", "neurons", "message"),
    [
        (20, None, "student_hidden_size: 20 is not one of 8, 16, 24, 32: heads of 8 are kept whole"),
        (40, None, "student_hidden_size: 40 is not one of"),
        (16, 65, "student_intermediate_size: 65 is not between 1 and the 64 of the teacher"),
    ],
)
def test_sizes_that_cannot_be_cut(load, hidden, neurons, message):
    with pytest.raises(ConfigError, match=message):
        narrow_widths(load("bert").model, hidden, neurons)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"residual": [0, 0, *range(2, 32)]}, "residual: an index is named twice"),
        ({"residual": range(1, 33)}, "residual: .* not in 0 to 31"),
        ({"heads": [range(HEADS)] * 3}, "heads: 3 lists for 4 layers"),
        ({"neurons": [[0], [1], [2], [3, 4]]}, "neurons: every layer keeps as many"),
        ({"heads": [[0]] * LAYERS}, "heads: 1 of 8 entries are not 32"),
    ],
)
def test_indices_that_do_not_fit(load, changes, message):
    with pytest.raises(ConfigError, match=message):
        narrow_model(load("bert").model, dataclasses.replace(ALL, **changes))
