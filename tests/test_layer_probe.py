"""Layers picked by probes: the removal order against a slow reference, and what rows take part."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import LABELS, LAYERS, make_rows

from nlpxfer.checkpoint.load import load_classifier
from nlpxfer.checkpoint.pooling import use_mean_pooling
from nlpxfer.checkpoint.student import model_layers
from nlpxfer.data.schema import LabelSchema
from nlpxfer.data.tokenise import tokenise
from nlpxfer.errors import ConfigError, DataError
from nlpxfer.train.layer_probe import probe_layers

SCHEMA = LabelSchema(tuple(sorted(LABELS)))


@pytest.fixture
def source(tiny_checkpoint):
    return load_classifier(str(tiny_checkpoint("bert", kind="classifier")), schema=SCHEMA)


def rows_of(source, count=96):
    rows = make_rows(count, seed=3)
    labels = [SCHEMA.names.index(row["label"]) for row in rows]
    return tokenise(source.tokenizer, [row["text"] for row in rows], max_length=32, labels=labels)


def test_a_layer_that_does_nothing_goes_first_and_one_that_destroys_goes_too(source):
    """Layer 2 adds nothing to its input; after layer 1 all texts are the same, so a probe needs it gone."""
    model = source.model
    idle, harmful = model_layers(model)[1][2], model_layers(model)[1][1]
    with torch.no_grad():
        for part in (idle.attention.output.dense, idle.output.dense):
            part.weight.zero_()
            part.bias.zero_()
        harmful.output.LayerNorm.weight.zero_()
    choice = probe_layers(source, rows_of(source), 3)
    assert [step["layer"] for step in choice.removed] == [1]
    assert choice.layers == (0, 2, 3)
    with torch.no_grad():
        harmful.output.LayerNorm.weight.fill_(1.0)
    choice = probe_layers(source, rows_of(source), 3)
    losses = choice.removed[0]["loss_without"]
    assert set(losses) == {"0", "1", "2", "3"}
    assert choice.loss == min(losses.values())


def test_it_is_the_same_each_time_and_one_path(source):
    one, same = (probe_layers(source, rows_of(source), 2, seed=1) for _ in range(2))
    assert one == same
    three = probe_layers(source, rows_of(source), 3, seed=1)
    assert three.removed == one.removed[:1]
    assert {*one.layers} < {*three.layers}
    whole = probe_layers(source, rows_of(source), LAYERS, seed=1)
    assert whole.layers == (0, 1, 2, 3)
    assert not whole.removed
    assert whole.loss > 0


def test_rows_without_a_label_take_no_part(source):
    rows = rows_of(source)
    labels = rows.columns["labels"].copy()
    labels[::2] = -100
    choice = probe_layers(source, rows.with_columns(labels=labels), 3)
    assert choice.rows == (32, 16)
    assert choice.facts()["fit_rows"] == 32


def test_the_mean_is_probed_where_the_student_reads_it(source):
    rows = rows_of(source)
    first, mean = (probe_layers(source, rows, 3, mean_pooling=how) for how in (False, True))
    assert first.removed[0]["loss_without"] != mean.removed[0]["loss_without"]
    pooled = replace(source, model=use_mean_pooling(source.model))
    again = probe_layers(pooled, rows, 3, mean_pooling=True)
    assert again.layers == mean.layers
    np.testing.assert_allclose(again.loss, mean.loss, rtol=1e-3)


def test_what_cannot_be_probed_is_refused(source):
    with pytest.raises(ConfigError, match="5 layers cannot be picked from 4"):
        probe_layers(source, rows_of(source), 5)
    with pytest.raises(DataError, match="probes need 8 labelled training rows, and there are 4"):
        probe_layers(source, rows_of(source, 4), 2)
    rows = rows_of(source)
    with pytest.raises(DataError, match="have all the same label"):
        probe_layers(source, rows.with_columns(labels=np.zeros(len(rows), dtype=np.int64)), 2)
