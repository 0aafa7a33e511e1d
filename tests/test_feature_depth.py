"""The layer at which a frozen checkpoint is read: LogME of each, the states there, the cut, and the recipe."""

import json

import numpy as np
import pytest
import torch
from recipe_runs import QUICK, files, finished, refused
from scipy.optimize import minimize
from scipy.stats import multivariate_normal
from tiny import LABELS, build_tokenizer, make_rows
from transformers import AutoConfig, AutoModelForSequenceClassification

from nlpxfer.checkpoint import load_classifier, student
from nlpxfer.checkpoint.depth import cut_to_depth, depth_of, states_by_depth
from nlpxfer.checkpoint.head import pooled_states
from nlpxfer.checkpoint.pooling import use_mean_pooling
from nlpxfer.data.schema import LabelSchema
from nlpxfer.data.tokenise import Collator, tokenise
from nlpxfer.errors import CheckpointError, ConfigError
from nlpxfer.evaluate import feature_depth
from nlpxfer.evaluate.feature_depth import read_at_best_depth
from nlpxfer.evaluate.transferability import logme
from nlpxfer.methods.base import model_inputs
from nlpxfer.problem import MULTI_LABEL, REGRESSION

SCHEMA = LabelSchema(LABELS)


# -- LogME


def made(rows, features, signal, seed):
    """Features, and classes that depend on the first three of them as far as `signal` says."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, features))
    scores = signal * x[:, :3] + rng.standard_normal((rows, 3))
    return x, np.eye(3)[scores.argmax(1)]


@pytest.mark.parametrize(("rows", "features"), [(60, 12), (20, 30)])
def test_logme_is_the_largest_density_of_the_targets(rows, features):
    x, y = made(rows, features, 2.0, seed=1)
    x = (x @ np.diag(np.linspace(0.2, 3.0, features)) + 5.0).astype(np.float32)
    basis = np.linalg.svd(np.ones((rows, 1)))[0][:, 1:]  # of what has mean 0
    centred, expected = basis.T @ x.astype(np.float64), []
    for target in (basis.T @ y).T:

        def lost(logs, target=target):
            covariance = np.exp(-logs[1]) * np.eye(rows - 1) + np.exp(-logs[0]) * centred @ centred.T
            return -multivariate_normal(np.zeros(rows - 1), covariance).logpdf(target)

        expected.append(-min(minimize(lost, start, method="Nelder-Mead").fun for start in ((0, 0), (3, 3), (6, 2))))
    assert logme(x, y) == pytest.approx(np.mean(expected) / (rows - 1), abs=1e-4)


@pytest.mark.parametrize("rows", [48, 400])
def test_features_that_tell_the_classes_rank_above_noise(rows):
    """Also with fewer rows than features, where the published form ranks them the other way round."""
    for seed in range(10):
        x, y = made(rows, 96, 3.0, seed)
        noise = np.random.default_rng(100 + seed).standard_normal(x.shape)
        assert logme(x, y) > logme(noise, y)


def test_scale_and_place_of_the_features_do_not_count():
    x, y = made(50, 80, 2.0, seed=3)
    assert logme(100 * x + 7, y) == pytest.approx(logme(x, y), rel=1e-4)


def test_what_does_not_vary_is_left_out():
    x, y = made(50, 8, 2.0, seed=3)
    wider = np.concatenate([x, np.ones((50, 2))], axis=1), np.concatenate([y, np.zeros((50, 1))], axis=1)
    assert logme(*wider) == pytest.approx(logme(x, y), rel=1e-6)
    assert logme(np.ones((50, 4)), y) < logme(x, y), "features that say nothing"
    for bad in ((x, np.ones((50, 2))), (x[:1], y[:1]), (x, y[:9]), (x, y[:, 0])):
        with pytest.raises(ValueError, match="no target varies|logme got"):
            logme(*bad)


# -- states and cuts


def batch_of(checkpoint, count=7):
    texts = [row["text"] for row in make_rows(count, seed=4, words=20)]
    rows = tokenise(checkpoint.tokenizer, texts, max_length=32)
    return model_inputs(Collator.for_tokenizer(checkpoint.tokenizer)([rows[i] for i in range(count)]))


SLICED = "bert roberta electra distilbert deberta-v2 modernbert gpt2 qwen2 llama gpt_neox".split()
HOLD_A_MEAN = "bert roberta electra distilbert modernbert".split()


@pytest.mark.parametrize(
    ("family", "pooled"), [*((family, False) for family in SLICED), *((family, True) for family in HOLD_A_MEAN)]
)
def test_states_by_depth_are_those_of_models_cut_there(tiny_checkpoint, family, pooled):
    checkpoint = load_classifier(str(tiny_checkpoint(family)), schema=SCHEMA)
    model = checkpoint.model
    model = use_mean_pooling(model) if pooled else model
    batch = batch_of(checkpoint)
    with torch.no_grad():
        before = model(**batch).logits
        states_BKH = states_by_depth(model, batch)
        assert states_BKH.shape == (7, depth_of(model), 32) == (7, 4, 32)
        for depth in range(1, 5):
            expected = pooled_states(cut_to_depth(model, depth), batch)
            torch.testing.assert_close(states_BKH[:, depth - 1], expected, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(states_BKH[:, 0], states_BKH[:, 3], atol=1e-2), "depth matters"
        torch.testing.assert_close(model(**batch).logits, before, rtol=0, atol=0)


def built(family, folder, **options):
    """A classifier of a family that tiny.py lacks, with the tokenizer of BERT or of the family."""
    tokenizer = build_tokenizer("deberta-v2" if family == "deberta-v2" else "bert")
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = AutoConfig.for_model(family, **sizes, intermediate_size=64, max_position_embeddings=64, **options)
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_what_runs_between_the_layers_runs_at_each_depth(tmp_path):
    """DeBERTa's convolution stands between its first two layers."""
    checkpoint = load_classifier(str(built("deberta-v2", tmp_path, conv_kernel_size=3)), schema=SCHEMA, head="new")
    model, batch = checkpoint.model, batch_of(checkpoint)
    with torch.no_grad():
        states_BKH = states_by_depth(model, batch)
        for depth in range(1, 5):
            expected = pooled_states(cut_to_depth(model, depth), batch)
            torch.testing.assert_close(states_BKH[:, depth - 1], expected, rtol=1e-5, atol=1e-5)


def test_windows_of_longformer_are_cut_with_its_layers(tmp_path):
    folder = built("longformer", tmp_path, attention_window=[4, 4, 8, 8], pad_token_id=0)
    cut = cut_to_depth(load_classifier(str(folder), schema=SCHEMA, head="new").model, 3)
    assert cut.config.attention_window == [4, 4, 8]


def test_a_family_whose_layers_are_not_called_as_modules(tmp_path):
    widths = {f"{part}_groups": 1 for part in ("q", "k", "v", "post_attention", "intermediate", "output")}
    folder = built("squeezebert", tmp_path / "model", embedding_size=32, **widths)
    checkpoint = load_classifier(str(folder), schema=SCHEMA, head="new")
    with pytest.raises(CheckpointError, match="cannot be told apart"), torch.no_grad():
        states_by_depth(checkpoint.model, batch_of(checkpoint))
    rows, collator = task_of(checkpoint, "class"), Collator.for_tokenizer(checkpoint.tokenizer)
    model, choice = read_at_best_depth(checkpoint.model, rows, collator, folder=tmp_path / "cache")
    assert model is checkpoint.model
    assert choice is None


def test_a_cut_that_a_family_does_not_survive_is_refused(tiny_checkpoint, monkeypatch):
    model = load_classifier(str(tiny_checkpoint("bert")), schema=SCHEMA).model

    def fail(model):
        raise IndexError("a layer is missing")

    monkeypatch.setattr(student, "_probe", fail)
    with pytest.raises(CheckpointError, match="does not run after keeping") as error:
        cut_to_depth(model, 2)
    assert "a layer is missing" in str(error.value)


def test_a_cut_keeps_the_mean(tiny_checkpoint):
    checkpoint = load_classifier(str(tiny_checkpoint("bert")), schema=SCHEMA)
    cut = cut_to_depth(use_mean_pooling(checkpoint.model), 2)
    assert cut.config.num_hidden_layers == 3
    assert [cut_to_depth(checkpoint.model, depth).config.num_hidden_layers for depth in (-1, -4)] == [4, 1]
    for depth in (0, 5, -5):
        with pytest.raises(ConfigError, match="no layer") as error:
            cut_to_depth(checkpoint.model, depth)
        assert "1 to 4" in str(error.value)
    with pytest.raises(CheckpointError):
        depth_of(load_classifier(str(tiny_checkpoint("albert")), schema=SCHEMA).model)


# -- the choice


def forgetful(folder, layer):
    """A copy whose layers from this one on give the same state whatever they read."""
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    for name in weights:
        if any(f"layer.{later}.output.LayerNorm.weight" in name for later in range(layer, 4)):
            weights[name] = torch.zeros_like(weights[name])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def task_of(checkpoint, labels, count=96):
    rows = make_rows(count, seed=1)
    values = {"class": [LABELS.index(row["label"]) for row in rows]}
    values["several"] = np.eye(4, dtype=np.float32)[values["class"]]
    values["number"] = np.asarray(values["class"], dtype=np.float32)
    return tokenise(checkpoint.tokenizer, [row["text"] for row in rows], max_length=32, labels=values[labels])


@pytest.mark.parametrize(
    ("labels", "options"),
    [("class", {}), ("several", {"problem_type": MULTI_LABEL}), ("number", {"problem_type": REGRESSION})],
)
def test_the_layer_that_tells_most_is_read(tiny_copy, tmp_path, labels, options):
    checkpoint = load_classifier(str(forgetful(tiny_copy("bert"), 2)), schema=SCHEMA)
    model = use_mean_pooling(checkpoint.model)
    rows, collator = task_of(checkpoint, labels), Collator.for_tokenizer(checkpoint.tokenizer)
    cut, choice = read_at_best_depth(model, rows, collator, folder=tmp_path, **options)
    assert choice.layer in (1, 2)
    assert cut.config.num_hidden_layers == choice.layer + 1
    assert max(choice.logme[2:]) < min(choice.logme[:2])
    assert choice.rows == 96
    again = read_at_best_depth(model, rows, collator, folder=tmp_path, **options)[1]
    assert (again.logme, again.tokens) == (choice.logme, 0), "states are kept"
    assert choice.tokens > 96


def test_rows_without_a_label_and_more_than_the_sample_do_not_count(tiny_checkpoint, tmp_path, monkeypatch):
    checkpoint = load_classifier(str(tiny_checkpoint("bert")), schema=SCHEMA)
    rows, collator = task_of(checkpoint, "class"), Collator.for_tokenizer(checkpoint.tokenizer)
    rows.columns["labels"][::2] = -100
    _, choice = read_at_best_depth(checkpoint.model, rows, collator, folder=tmp_path)
    known = rows.select(np.arange(1, 96, 2))
    assert choice.logme == read_at_best_depth(checkpoint.model, known, collator, folder=tmp_path)[1].logme
    monkeypatch.setattr(feature_depth, "SAMPLE_ROWS", 20)
    sampled = read_at_best_depth(checkpoint.model, rows, collator, folder=tmp_path / "sample")[1]
    assert (sampled.rows, sampled.computed) == (20, 20)
    shuffled = rows.select(np.random.default_rng(0).permutation(96))
    again = read_at_best_depth(checkpoint.model, shuffled, collator, folder=tmp_path / "sample")[1]
    assert again.logme == pytest.approx(sampled.logme)
    assert (again.rows, again.computed) == (20, 0), "the same rows in whatever order they come"


def test_numbers_are_one_target_however_many_they_are(tiny_checkpoint, tmp_path, monkeypatch):
    """The sample of a regression does not grow with the number of distinct values."""
    monkeypatch.setattr(feature_depth, "SAMPLE_ROWS", 20)
    checkpoint = load_classifier(str(tiny_checkpoint("bert")), schema=SCHEMA)
    rows, collator = task_of(checkpoint, "number"), Collator.for_tokenizer(checkpoint.tokenizer)
    rows.columns["labels"] = np.linspace(0, 1, 96, dtype=np.float32)
    choice = read_at_best_depth(checkpoint.model, rows, collator, folder=tmp_path, problem_type=REGRESSION)[1]
    assert choice.rows == 20


def test_where_there_is_no_choice_the_model_stays(tiny_checkpoint, tmp_path):
    for family, label, count in (("albert", None, 96), ("bert", 2, 96), ("bert", None, 15)):
        checkpoint = load_classifier(str(tiny_checkpoint(family)), schema=SCHEMA)
        rows, collator = task_of(checkpoint, "class", count), Collator.for_tokenizer(checkpoint.tokenizer)
        if label is not None:
            rows.columns["labels"][:] = label
        model, choice = read_at_best_depth(checkpoint.model, rows, collator, folder=tmp_path)
        assert model is checkpoint.model
        assert choice is None


def test_layers_that_say_the_same_are_not_cut_off(tiny_copy, tmp_path):
    """Rounding does not choose."""
    checkpoint = load_classifier(str(forgetful(tiny_copy("bert"), 0)), schema=SCHEMA)
    rows, collator = task_of(checkpoint, "class"), Collator.for_tokenizer(checkpoint.tokenizer)
    model, choice = read_at_best_depth(checkpoint.model, rows, collator, folder=tmp_path)
    assert model is checkpoint.model
    assert choice.layer == 4


def test_a_depth_that_the_family_cannot_hold_is_passed_over(tiny_copy, tmp_path, monkeypatch):
    checkpoint = load_classifier(str(forgetful(tiny_copy("bert"), 2)), schema=SCHEMA)
    rows, collator = task_of(checkpoint, "class"), Collator.for_tokenizer(checkpoint.tokenizer)
    best = read_at_best_depth(checkpoint.model, rows, collator, folder=tmp_path)[1].layer

    def refuse(model, depth):
        if depth == best:
            raise CheckpointError("this family cannot")
        return cut_to_depth(model, depth)

    monkeypatch.setattr(feature_depth, "cut_to_depth", refuse)
    cut, choice = read_at_best_depth(checkpoint.model, rows, collator, folder=tmp_path)
    assert choice.layer == 3 - best
    assert cut.config.num_hidden_layers == choice.layer


# -- the recipe


def words_of(data, model, *words):
    return [*QUICK, *files(data), "--model_name_or_path", model, "--control_arm", "false", *words]


def test_the_recipe_saves_the_layers_that_are_read(tiny_data, tiny_copy, tmp_path, monkeypatch):
    monkeypatch.setenv("NLPXFER_CACHE", str(tmp_path / "cache"))
    folder = forgetful(tiny_copy("bert"), 2)
    run = finished("features", tmp_path / "chosen", *words_of(tiny_data, folder))
    layers = run.arm("features")["details"]["layers"]
    assert layers["chosen"] in (1, 2)
    assert layers["rows"] == 240
    assert list(layers["logme"]) == ["1", "2", "3", "4"]
    assert max(layers["logme"], key=layers["logme"].get) == str(layers["chosen"])
    assert AutoConfig.from_pretrained(run.folder).num_hidden_layers == layers["chosen"] + 1
    model = AutoModelForSequenceClassification.from_pretrained(run.folder)
    assert model.num_parameters() == json.loads((run.folder / "report.json").read_text())["arms"][0]["parameters"]
    assert run.report["checks"]["features"]["logits_difference"] < 1e-4
    place = f"at layer {layers['chosen']} of 4"
    assert place in run.arm("features")["description"]
    assert place in (run.folder / "README.md").read_text()


def test_a_layer_that_is_not_there_is_refused(tiny_data, tiny_checkpoint, tmp_path):
    for family, layer, fault in (("bert", "5", "no layer 5 among 4"), ("bert", "0", "count from 1")):
        words = words_of(tiny_data, tiny_checkpoint(family), "--feature_layer", layer)
        assert fault in refused("features", tmp_path / "out", *words)
    words = words_of(tiny_data, tiny_checkpoint("albert"), "--feature_layer")
    assert "ALBERT" in refused("features", tmp_path / "out", *words, "2")
    assert not (tmp_path / "out" / "config.json").exists()
    assert finished("features", tmp_path / "whole", *words, "-1").report["metrics"]


@pytest.mark.parametrize("words", [[], ["--feature_layer", "2"], ["--pooling", "own"]])
def test_a_model_that_was_cut_teaches(words, tiny_data, tiny_copy, tmp_path, monkeypatch):
    """The control student has its layers from the checkpoint that the teacher reads a part of."""
    monkeypatch.setenv("NLPXFER_CACHE", str(tmp_path / "cache"))
    folder = forgetful(tiny_copy("bert"), 2)
    teacher = finished("features", tmp_path / "teacher", *words_of(tiny_data, folder, *words)).folder
    assert AutoConfig.from_pretrained(teacher).num_hidden_layers <= 3
    plan = [*QUICK, *files(tiny_data), "--teacher_name_or_path", teacher, "--student_num_layers", "1"]
    for more in ([], ["--model_name_or_path", folder]):
        if not more:  # run.json keeps no path of this machine
            told = json.loads((teacher / "run.json").read_text())
            told["config"]["model_name_or_path"] = str(folder)
            (teacher / "run.json").write_text(json.dumps(told))
        run = finished("distill", tmp_path / f"out{len(more)}", *plan, *more)
        assert run.arm("control")["description"].endswith(f"from {folder.name}")
        assert run.arm("control")["parameters"] == run.arm("distilled")["parameters"]
