"""Static classifiers: the mean of token vectors against slow references, their folder, and their int8 form."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from processes import ROOT
from tiny import LABELS, WORDS
from transformers import AutoModelForSequenceClassification, pipeline

from nlpxfer.backends import StaticBackend, has_precision
from nlpxfer.checkpoint.head import embedding_parameters, head_of
from nlpxfer.checkpoint.load import load_classifier, load_teacher, stored_schema
from nlpxfer.checkpoint.save import save_classifier
from nlpxfer.checkpoint.static import StaticConfig, StaticForSequenceClassification, static_int8
from nlpxfer.classify import Classifier
from nlpxfer.data.schema import LabelSchema
from nlpxfer.data.tokenise import Collator, tokenise
from nlpxfer.errors import CheckpointError, ConfigError, ExportError
from nlpxfer.export import ExportRequest, export_classifier
from nlpxfer.methods.base import model_inputs
from nlpxfer.train.linear_probe import start_from_linear_probe_
from nlpxfer.train.predict import predict
from nlpxfer.train.static_start import (
    SIF,
    StaticPlan,
    ignored_ids,
    lone_tokens,
    start_table,
    static_student,
    token_counts,
    token_states,
)

SCHEMA = LabelSchema(tuple(sorted(LABELS)))
TEXTS = ["the guitar and the piano", "bread with cheese unheardof", "match", "unheardof", "the airport " * 9]
SHAPES = [(False, False), (True, False), (False, True), (True, True)]
each_shape = pytest.mark.parametrize(("hidden_layer", "normalize"), SHAPES)


@pytest.fixture
def source(tiny_checkpoint):
    return load_teacher(str(tiny_checkpoint("bert", kind="classifier")), schema=SCHEMA)


@pytest.fixture
def student(source):
    def make(hidden_layer=False, normalize=False, dim=12):
        plan = StaticPlan(dim=dim, hidden_layer=hidden_layer, normalize=normalize, max_length=32)
        states = token_states(source)
        counts = token_counts([tokenise(source.tokenizer, TEXTS, max_length=32)], len(states))
        made = static_student(source, states, counts, plan, seed=5)
        with torch.no_grad():
            made.model.classifier.weight.mul_(50)  # so that answers differ clearly
        return made

    return make


def by_hand(model, tokenizer, text):
    """Logits of one text in numpy, from the model's definition."""
    state = {name: value.numpy().astype(np.float64) for name, value in model.state_dict().items()}
    ids = [token for token in tokenizer(text)["input_ids"] if token not in tokenizer.all_special_ids]
    mean = state["embeddings"][ids].mean(axis=0) if ids else np.zeros(model.config.hidden_size)
    if model.config.normalize and ids:
        mean /= np.linalg.norm(mean)
    if model.config.hidden_layer:
        mean = np.maximum(state["pre_classifier.weight"] @ mean + state["pre_classifier.bias"], 0)
    return state["classifier.weight"] @ mean + state["classifier.bias"]


def padded(checkpoint, texts, **options):
    rows = tokenise(checkpoint.tokenizer, texts, max_length=32)
    return model_inputs(
        Collator.for_tokenizer(checkpoint.tokenizer, **options)([*map(rows.__getitem__, range(len(rows)))])
    )


@each_shape
def test_logits_are_those_of_the_definition(student, hidden_layer, normalize):
    made = student(hidden_layer, normalize)
    expected = [by_hand(made.model, made.tokenizer, text) for text in TEXTS]
    found = made.model(**padded(made, TEXTS)).logits.detach().numpy()
    assert np.ptp(found, axis=0).min() > 1e-3
    np.testing.assert_allclose(found, expected, atol=1e-5)


@each_shape
def test_padding_and_the_rows_beside_make_no_difference(student, hidden_layer, normalize):
    made = student(hidden_layer, normalize)
    together = made.model(**padded(made, TEXTS)).logits
    wide = made.model(**padded(made, TEXTS, multiple_of=32)).logits
    alone = torch.cat([made.model(**padded(made, [text])).logits for text in TEXTS])
    torch.testing.assert_close(wide, together, rtol=0, atol=1e-6)
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-6)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("chunk", [4, 1 << 17])
def test_rows_without_padding_give_the_same(student, int8, chunk, monkeypatch):
    monkeypatch.setattr("nlpxfer.checkpoint.static._CHUNK_TOKENS", chunk)
    made = student()
    model = static_int8(made.model) if int8 else made.model
    rows = tokenise(made.tokenizer, TEXTS, max_length=32)
    flat = model.flat_logits(torch.from_numpy(rows.tokens).long(), torch.from_numpy(rows.starts[:-1]))
    torch.testing.assert_close(flat, model(**padded(made, TEXTS)).logits.detach(), rtol=0, atol=1e-6)


def test_the_loss_is_that_of_any_classifier(student):
    made = student()
    labels = torch.tensor([0, 1, 2, 3, 0])
    batch = padded(made, TEXTS)
    found = made.model(**batch, labels=labels)
    torch.testing.assert_close(found.loss, torch.nn.functional.cross_entropy(found.logits, labels))
    assert made.model(**batch, return_dict=False)[0].shape == (5, 4)


def test_gradients_reach_the_tokens_of_the_text_alone(student):
    made = student()
    made.model.requires_grad_(True)
    made.model(**padded(made, ["guitar unheardof"])).logits.square().sum().backward()
    touched = made.model.embeddings.grad.abs().sum(dim=1).nonzero().flatten().tolist()
    assert touched == [made.tokenizer.convert_tokens_to_ids("guitar")]


def test_a_token_starts_as_its_mean_state(source):
    """Against the plain way: one forward pass for each token."""
    states = token_states(source)
    for word in ("guitar", "the"):
        batch = source.tokenizer(word, return_tensors="pt")
        assert batch["input_ids"].shape == (1, 3)
        with torch.no_grad():
            expected = source.model.bert(**batch).last_hidden_state[0].mean(dim=0)
        token = source.tokenizer.convert_tokens_to_ids(word)
        np.testing.assert_allclose(states[token], expected.numpy(), atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2", "qwen2"])
def test_lone_tokens_stand_between_the_special_ones(tiny_checkpoint, family):
    made = load_classifier(str(tiny_checkpoint(family)), schema=SCHEMA)
    rows = lone_tokens(made.tokenizer, len(made.tokenizer))
    for token in (3, len(made.tokenizer) - 1):
        special = made.tokenizer("a", return_special_tokens_mask=True)
        framed = [i for i, one in zip(special["input_ids"], special["special_tokens_mask"], strict=True) if one]
        found = rows[token]["input_ids"].tolist()
        assert sorted(found) == sorted([*framed, token])
    states = token_states(made)
    assert states.shape == (len(made.tokenizer), 32)
    assert np.isfinite(states).all()


def test_the_table_is_weighted_pca(source):
    """Distances between rare tokens are those of the states; a frequent token is shrunk by a / (a + p)."""
    states = token_states(source)
    ignored = ignored_ids(source.tokenizer)
    counts = np.zeros(len(states), dtype=np.int64)
    counts[20], counts[21] = 3, 1
    full = start_table(states, counts, dim=32, ignored=ignored)
    assert not full[ignored].any()
    plain = start_table(states, np.zeros_like(counts), dim=32, ignored=ignored)
    for token, share in ((20, 0.75), (21, 0.25), (30, 0.0)):
        np.testing.assert_allclose(full[token], plain[token] * SIF / (SIF + share), rtol=1e-4)
    ratio = np.linalg.norm(plain[40] - plain[50]) / np.linalg.norm(states[40] - states[50])
    again = np.linalg.norm(plain[60] - plain[70]) / np.linalg.norm(states[60] - states[70])
    assert ratio == pytest.approx(again, rel=1e-4)
    kept = np.setdiff1d(np.arange(len(states)), ignored)
    small = start_table(states, np.zeros_like(counts), dim=4, ignored=ignored)[kept]
    correlations = np.corrcoef(small.T)
    np.testing.assert_allclose(correlations, np.eye(4), atol=1e-4)
    assert small.std() == pytest.approx(1, rel=1e-5)
    values = np.linalg.eigvalsh(np.cov(states[kept].T))[::-1]
    assert small.var(axis=0)[0] / small.var(axis=0)[3] == pytest.approx(values[0] / values[3], rel=1e-3)


def test_counts_of_tokens(source):
    rows = tokenise(source.tokenizer, ["the guitar the", "the"], max_length=8)
    counts = token_counts([rows, rows], 200)
    assert counts[source.tokenizer.convert_tokens_to_ids("the")] == 6
    assert counts[source.tokenizer.convert_tokens_to_ids("guitar")] == 2


def test_the_linear_probe_sets_its_head(student):
    made = student(dim=32)
    words = [f"{word} {other}" for word in WORDS[:20] for other in WORDS[20:24]]
    labels = np.arange(len(words)) % 4
    rows = tokenise(made.tokenizer, words, max_length=8, labels=labels)
    before = made.model.embeddings.detach().clone()
    probe = start_from_linear_probe_(made.model, rows, rows, Collator.for_tokenizer(made.tokenizer))
    assert probe.validation_accuracy == 1.0
    assert torch.equal(before, made.model.embeddings)
    assert head_of(made.model).final is made.model.classifier
    assert embedding_parameters(made.model) == []  # freeze_embeddings leaves them to learn


@each_shape
def test_a_saved_folder_loads_as_it_was(student, tmp_path, hidden_layer, normalize):
    made = student(hidden_layer, normalize)
    folder = save_classifier(made.model, made.tokenizer, SCHEMA, tmp_path / "static")
    again, info = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    batch = padded(made, TEXTS)
    logits = made.model(**batch).logits
    assert torch.equal(again.eval()(**batch).logits, logits)
    assert stored_schema(str(folder)) == SCHEMA
    turned = LabelSchema(SCHEMA.names[::-1])
    torch.testing.assert_close(load_teacher(str(folder), schema=turned).model(**batch).logits, logits.flip(1))
    other = load_classifier(str(folder), schema=LabelSchema(("one", "two")))
    assert other.fresh == ("classifier.weight", "classifier.bias")
    assert torch.equal(other.model.embeddings, made.model.embeddings)


def test_a_new_process_loads_it_with_a_pipeline(student, tmp_path):
    made = student()
    folder = save_classifier(made.model, made.tokenizer, SCHEMA, tmp_path / "static")
    code = (
        "import sys, json, nlpxfer.checkpoint\nfrom transformers import pipeline\n"
        "found = pipeline('text-classification', sys.argv[1], top_k=None)([sys.argv[2]])[0]\n"
        "print(json.dumps({one['label']: one['score'] for one in found}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder), TEXTS[0]], check=True, capture_output=True, text=True
    )
    shares = torch.softmax(made.model(**padded(made, TEXTS[:1])).logits, 1)[0].tolist()
    assert json.loads(done.stdout) == pytest.approx(dict(zip(SCHEMA.names, shares, strict=True)), abs=1e-6)


def test_a_table_that_is_missing_is_refused(student, tmp_path):
    from safetensors.torch import load_file, save_file

    made = student()
    folder = save_classifier(made.model, made.tokenizer, SCHEMA, tmp_path / "static")
    state = load_file(folder / "model.safetensors")
    del state["embeddings"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="holds no weights for 1 parameters of its body: embeddings"):
        load_classifier(str(folder), schema=LabelSchema(("one", "two")))


def reader_of_the_docs():
    """`static_logits` as docs/students.md shows it."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "students.md").read_text(), flags=re.DOTALL)
    code = next(block for block in blocks if "def static_logits" in block)
    assert "nlpxfer" not in code
    names = {}
    exec(code, names)
    return names["static_logits"]


@each_shape
@pytest.mark.parametrize("int8", [False, True])
def test_the_folder_is_read_without_this_package(student, tmp_path, hidden_layer, normalize, int8):
    made = student(hidden_layer, normalize)
    model = static_int8(made.model) if int8 else made.model
    folder = save_classifier(model, made.tokenizer, SCHEMA, tmp_path / "static")
    expected = Classifier.load(str(folder), max_length=32).logits(TEXTS)
    np.testing.assert_allclose(reader_of_the_docs()(folder, TEXTS), expected, atol=1e-5)


@each_shape
@pytest.mark.parametrize("int8", [False, True])
def test_the_folder_is_one_of_model2vec(student, tmp_path, hidden_layer, normalize, int8):
    inference = pytest.importorskip("model2vec.inference", reason="model2vec is not installed: pip install model2vec")
    made = student(hidden_layer, normalize)
    model = static_int8(made.model) if int8 else made.model
    folder = save_classifier(model, made.tokenizer, SCHEMA, tmp_path / "static")
    found = inference.StaticModelPipeline.from_pretrained(str(folder))
    assert found.classes_.tolist() == list(SCHEMA.names)
    assert found.model.max_length == 30
    expected = Classifier.load(str(folder), max_length=32).probabilities(TEXTS)
    np.testing.assert_allclose(found.predict_proba(TEXTS), expected, atol=1e-5)


def test_int8_is_a_quarter_of_the_size_and_answers_alike(student, tmp_path):
    made = student(dim=32)
    small = static_int8(made.model)
    table = made.model.embeddings.detach()
    error = (small.embeddings.float() * small.weights[:, None] - table).abs()
    assert (error <= table.abs().amax(dim=1, keepdim=True) / 254 + 1e-7).all()
    texts = [f"{one} {other}" for one in WORDS for other in WORDS[:4]]
    batch = padded(made, texts)
    exact, rounded = made.model(**batch).logits.detach(), small(**batch).logits
    assert (exact.argmax(1) == rounded.argmax(1)).float().mean() > 0.97
    assert 0 < (exact - rounded).abs().max() < 0.02 * exact.abs().max()
    folder = save_classifier(small, made.tokenizer, SCHEMA, tmp_path / "int8")
    again = load_teacher(str(folder), schema=SCHEMA).model
    assert again.embeddings.dtype == torch.int8
    assert torch.equal(again(**batch).logits, rounded)
    size = save_classifier(made.model, made.tokenizer, SCHEMA, tmp_path / "whole") / "model.safetensors"
    # 36 bytes a token instead of 128
    saved = size.stat().st_size - (folder / "model.safetensors").stat().st_size
    assert saved == pytest.approx(92 * len(table), abs=400)


def test_int8_is_not_trained_nor_made_twice(student):
    small = static_int8(student().model)
    with pytest.raises(CheckpointError, match="int8 cannot be trained"):
        small.train()
    with pytest.raises(ConfigError, match="in int8 already"):
        static_int8(small)


def test_predictions_take_the_quick_path(student, tmp_path):
    made = student()
    folder = save_classifier(made.model, made.tokenizer, SCHEMA, tmp_path / "static")
    classifier = Classifier.load(str(folder), max_length=32)
    assert isinstance(classifier.backend, StaticBackend)
    rows = tokenise(made.tokenizer, TEXTS, max_length=32)
    slow = predict(made.model, rows, Collator.for_tokenizer(made.tokenizer))
    np.testing.assert_allclose(classifier.logits(TEXTS), slow, atol=1e-6)
    assert classifier.logits([]).shape == (0, len(SCHEMA))
    assert not has_precision(str(folder))
    assert has_precision("team/model")
    with pytest.raises(ConfigError, match="bf16: .* is static, which is computed in float32"):
        Classifier.load(str(folder), bf16=True)


def test_windows_of_a_long_text_are_averaged(student, tmp_path):
    made = student()
    folder = save_classifier(made.model, made.tokenizer, SCHEMA, tmp_path / "static")
    run = {"config": {"max_length": 8, "long_texts": "sliding_window", "window_overlap": 2, "max_windows": 8}}
    (folder / "run.json").write_text(json.dumps(run))
    classifier = Classifier.load(str(folder))
    rows = classifier.rows(TEXTS)
    assert rows.windows is not None
    slow = predict(made.model, rows, Collator.for_tokenizer(made.tokenizer))
    np.testing.assert_allclose(classifier.logits(TEXTS), slow, atol=1e-6)


def test_other_sources_are_refused(source, student):
    with pytest.raises(ConfigError, match="static_dim: 33 is more than the 32 numbers"):
        student(dim=33)
    made = student()
    with pytest.raises(CheckpointError, match="is static: no static student is made from it"):
        token_states(made)


@pytest.mark.parametrize(
    ("kind", "activation"),
    [
        ("single_label_classification", "softmax"),
        ("multi_label_classification", "sigmoid"),
        ("regression", "identity"),
    ],
)
def test_the_config_tells_model2vec_the_kind_of_task(kind, activation):
    config = StaticConfig(vocab_size=9, hidden_size=2, id2label={0: "b", 1: "a"}, problem_type=kind, max_tokens=7)
    known = json.loads(StaticForSequenceClassification(config).config.to_json_string())
    assert known["head_config"] == {"n_layers": 1, "activation": activation, "classes": ["b", "a"]}
    assert (known["max_length"], known["normalize"], known["embedding_dtype"]) == (7, False, "float32")
    assert StaticConfig.from_dict(known).max_tokens == 7


def test_an_export_is_refused(student, tmp_path):
    pytest.importorskip("onnxscript")
    made = student()
    folder = save_classifier(made.model, made.tokenizer, SCHEMA, tmp_path / "static")
    with pytest.raises(ExportError, match="is static, and static models are not written as ONNX"):
        export_classifier(ExportRequest(model=str(folder), out=tmp_path / "onnx"))
    assert not (tmp_path / "onnx").exists()


def test_pipeline_is_imported_with_the_checkpoints(student, tmp_path):
    made = student()
    folder = save_classifier(made.model, made.tokenizer, SCHEMA, tmp_path / "static")
    assert pipeline("text-classification", str(folder))("the guitar")[0]["label"] in SCHEMA.names


def test_options_that_a_static_model_has_no_use_for(student, tmp_path):
    made = student()
    folder = save_classifier(made.model, made.tokenizer, SCHEMA, tmp_path / "out")
    small = save_classifier(static_int8(made.model), made.tokenizer, SCHEMA, folder / "int8")
    assert Classifier.load(str(folder), int8=True).backend.folder == small
    with pytest.raises(ConfigError, match="batch_size: .* is static, which has no batches"):
        Classifier.load(str(folder), batch_size=7)
    with pytest.raises(CheckpointError, match="is the int8 form of a static model") as caught:
        Classifier.load(str(small), int8=True)
    assert "leave --int8 out" in str(caught.value)


def test_a_folder_named_int8_need_not_be_that_of_a_static_model(tiny_copy):
    folder = tiny_copy("bert", "classifier", SCHEMA.names)
    (folder / "int8").mkdir()
    for name in ("config.json", "model_int8.onnx"):
        (folder / "int8" / name).write_text('{"model_type": "bert"}')
    with pytest.raises(CheckpointError, match=r"holds no model_int8\.onnx") as caught:
        Classifier.load(str(folder), int8=True)
    assert f"Available: {folder / 'int8'}" in str(caught.value)
