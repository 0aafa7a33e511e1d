"""Classifiers on frozen features: the saved checkpoint computes what was fitted, and the recipe asks its body once."""

import csv
import json
import pickle
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sklearn.linear_model
import torch
from processes import ROOT, run, torchrun
from recipe_runs import QUICK, Ended, call, files, finished, refused
from safetensors.torch import load_file
from tiny import LABELS, make_rows, write_csv
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForSequenceClassification, pipeline

from nlpxfer import result
from nlpxfer.checkpoint import load_classifier
from nlpxfer.checkpoint.head import head_features, head_of, head_parameters
from nlpxfer.classify import Classifier, evaluate_file
from nlpxfer.data.schema import LabelSchema
from nlpxfer.data.tokenise import Collator, tokenise
from nlpxfer.errors import ConfigError, DataError, NotFiniteError
from nlpxfer.evaluate import feature_arm
from nlpxfer.methods.features import FeatureBased
from nlpxfer.train import linear_probe
from nlpxfer.train.feature_cache import pooled_features
from nlpxfer.train.feature_head import MlpPlan, fit_logistic_head_, fit_mlp_head_, logits_of_features
from nlpxfer.train.predict import predict

SCHEMA = LabelSchema(LABELS)
MLP = FeatureBased(classifier="mlp")
WITH_HIDDEN_LAYER = ("bert", "roberta", "distilbert", "electra", "modernbert")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NLPXFER_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def task(tiny_checkpoint):
    """Factory: checkpoint, and pooled states and labels of 160 training and 60 validation rows."""

    def build(family):
        checkpoint = load_classifier(str(tiny_checkpoint(family)), schema=SCHEMA)
        collator, arrays = Collator.for_tokenizer(checkpoint.tokenizer), []
        for count, seed in ((160, 1), (60, 2)):
            rows = make_rows(count, seed=seed)
            gold = [LABELS.index(row["label"]) for row in rows]
            tokens = tokenise(checkpoint.tokenizer, [row["text"] for row in rows], max_length=32, labels=gold)
            arrays += [pooled_features(checkpoint.model, tokens, collator).states_NH, tokens.columns["labels"]]
        return checkpoint, tokens, arrays

    return build


def whole_model(checkpoint, tokens):
    return predict(checkpoint.model, tokens, Collator.for_tokenizer(checkpoint.tokenizer))


def cross_entropy(logits, labels):
    return float(functional.cross_entropy(torch.from_numpy(logits), torch.from_numpy(labels)))


# -- logistic regression


@pytest.mark.parametrize("family", ["bert", "distilbert", "modernbert", "gpt2"])
def test_logistic_regression_is_that_of_scikit_learn(task, monkeypatch, family):
    monkeypatch.setattr(linear_probe, "PENALTIES", (0.3,))
    monkeypatch.setattr(linear_probe, "ITERATIONS", 2000)
    checkpoint, tokens, arrays = task(family)
    probe = fit_logistic_head_(checkpoint.model, *arrays)
    with torch.no_grad():
        train, held_out = (head_features(checkpoint.model, torch.from_numpy(arrays[i])).double() for i in (0, 2))
    bias = head_of(checkpoint.model).has_bias
    scale = torch.maximum(train.std(0, correction=0), train.std(0, correction=0).quantile(0.5) / 10)
    mean = train.mean(0) if bias else 0.0
    own = sklearn.linear_model.LogisticRegression(C=0.3, fit_intercept=bias, max_iter=5000, tol=1e-8)
    own.fit((train - mean) / scale, arrays[1])
    found, expected = whole_model(checkpoint, tokens), own.decision_function((held_out - mean) / scale)
    for logits in (found, expected):
        logits -= logits.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(found, expected, atol=2e-2)
    assert probe.validation_accuracy == pytest.approx(np.mean(found.argmax(axis=1) == arrays[3]))
    assert probe.penalty == 0.3


def test_the_penalty_has_the_lowest_validation_loss(task, monkeypatch):
    checkpoint, _, arrays = task("bert")
    chosen = fit_logistic_head_(checkpoint.model, *arrays).penalty
    losses = {}
    for penalty in linear_probe.PENALTIES:
        monkeypatch.setattr(linear_probe, "PENALTIES", (penalty,))
        fit_logistic_head_(checkpoint.model, *arrays)
        losses[penalty] = cross_entropy(logits_of_features(checkpoint.model, arrays[2]), arrays[3])
    assert losses[chosen] < min(losses.values()) + 1e-3
    assert max(losses.values()) > min(losses.values()) + 1e-2, "the penalty matters here"


def test_fewer_than_two_classes_are_refused(task):
    checkpoint, _, arrays = task("bert")
    arrays[1] = np.where(arrays[1] == 2, 2, -100)
    for fit in (fit_logistic_head_, lambda *given: fit_mlp_head_(given[0], MLP, *given[1:], plan=MlpPlan())):
        with pytest.raises(DataError, match="the same label"):
            fit(checkpoint.model, *arrays)


# -- the network


@pytest.mark.parametrize("family", WITH_HIDDEN_LAYER)
def test_the_network_is_the_checkpoints_own_head(task, family):
    checkpoint, tokens, arrays = task(family)
    before = {name: value.clone() for name, value in checkpoint.model.state_dict().items()}
    logistic = fit_logistic_head_(checkpoint.model, *arrays)
    start = cross_entropy(whole_model(checkpoint, tokens), arrays[3])
    plan = MlpPlan(weight_decays=(0.01, 1.0), epochs=12, batch_size=20)
    fit = fit_mlp_head_(checkpoint.model, MLP, *arrays, plan=plan)
    logits = whole_model(checkpoint, tokens)
    np.testing.assert_allclose(logits_of_features(checkpoint.model, arrays[2]), logits, atol=1e-5)
    assert cross_entropy(logits, arrays[3]) == pytest.approx(fit.validation_loss, abs=1e-5)
    losses = [line["eval_loss"] for line in fit.history]
    assert fit.validation_loss == min([*losses, fit.validation_loss]) <= start + 1e-5
    if fit.epochs:
        best = min(fit.history, key=lambda line: line["eval_loss"])
        assert (best["weight_decay"], best["epoch"]) == (fit.weight_decay, fit.epochs)
    assert fit.steps == 8 * len(losses)
    assert logistic.validation_accuracy > 0
    changed = {name for name, value in checkpoint.model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed <= head_parameters(checkpoint.model).keys()


def plain_network(model, mean, scale):
    """torch's own modules that make of (x - mean) / scale what the head of a BERT makes of x."""
    dense, final = model.bert.pooler.dense, model.classifier
    plain = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 4))
    with torch.no_grad():
        plain[0].weight.copy_(dense.weight * scale)
        plain[0].bias.copy_(dense.bias + dense.weight @ mean)
        plain[2].load_state_dict(final.state_dict())
    return plain


def test_one_pass_is_that_of_a_plain_network(task):
    """torch's own modules on standardised states, the same batches, and AdamW with weight decay on matrices alone."""
    checkpoint, _, arrays = task("bert")
    states, labels = torch.from_numpy(arrays[0]), torch.from_numpy(arrays[1])
    mean, scale = states.mean(0), states.std(0)
    model = checkpoint.model
    plain = plain_network(model, mean, scale)
    groups = [{"params": [plain[i].weight for i in (0, 2)], "weight_decay": 0.5},
              {"params": [plain[i].bias for i in (0, 2)], "weight_decay": 0.0}]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    loss_of = nn.CrossEntropyLoss(label_smoothing=0.1)
    for rows in torch.randperm(160, generator=torch.Generator().manual_seed(7)).split(50):
        optimizer.zero_grad()
        loss_of(plain((states[rows] - mean) / scale), labels[rows]).backward()
        optimizer.step()
    plan = MlpPlan(learning_rate=0.01, weight_decays=(0.5,), epochs=1, batch_size=50, seed=7)
    method = FeatureBased(classifier="mlp", label_smoothing=0.1)
    fit = fit_mlp_head_(model, method, *arrays, plan=plan)
    assert fit.epochs == 1
    expected = plain((torch.from_numpy(arrays[2]) - mean) / scale).detach().numpy()
    np.testing.assert_allclose(logits_of_features(model, arrays[2]), expected, atol=1e-4)


def test_the_logits_of_windows_are_averaged_before_the_loss(task):
    """torch's own modules: each row's loss is that of the mean of its windows' logits."""
    checkpoint, _, arrays = task("bert")
    random = torch.Generator().manual_seed(3)
    counts, two_each = torch.randint(1, 4, (160,), generator=random), torch.full((len(arrays[2]),), 2)
    states, held_out = (
        torch.from_numpy(rows).repeat_interleave(windows, dim=0)
        for rows, windows in ((arrays[0], counts), (arrays[2], two_each))
    )
    states, held_out = (each + each.std(0) * torch.randn(each.shape, generator=random) for each in (states, held_out))
    labels, gold = torch.from_numpy(arrays[1].copy()), torch.from_numpy(arrays[3])
    labels[::9] = -100  # no label: left out with its windows
    kept = labels >= 0
    states_kept = states[kept.repeat_interleave(counts)]
    mean, scale = states_kept.mean(0), states_kept.std(0)
    model = checkpoint.model
    plain = plain_network(model, mean, scale)

    def row_logits(states, counts):
        return torch.stack([part.mean(0) for part in plain((states - mean) / scale).split(counts.tolist())])

    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.01, weight_decay=0.0)
    rows_of, loss_of = states_kept.split(counts[kept].tolist()), nn.CrossEntropyLoss()
    for rows in torch.randperm(int(kept.sum()), generator=torch.Generator().manual_seed(7)).split(20):
        optimizer.zero_grad()
        chosen = torch.cat([rows_of[row] for row in rows])
        loss_of(row_logits(chosen, counts[kept][rows]), labels[kept][rows]).backward()
        optimizer.step()
    windows = [SimpleNamespace(windows_per_row=each.numpy()) for each in (counts, two_each)]
    plan = MlpPlan(learning_rate=0.01, weight_decays=(0.0,), epochs=1, batch_size=20, seed=7)
    given = (part.numpy() for part in (states, labels, held_out, gold))
    fit = fit_mlp_head_(model, MLP, *given, plan=plan, windows=windows)
    assert fit.epochs == 1
    expected = plain((held_out - mean) / scale).detach().numpy()
    np.testing.assert_allclose(logits_of_features(model, held_out.numpy()), expected, atol=1e-4)
    loss = loss_of(row_logits(held_out, two_each), gold)
    assert fit.validation_loss == pytest.approx(loss.item(), abs=1e-4)


def test_it_learns_what_logistic_regression_cannot(task):
    """The class is whether two entries of the state are of one sign."""
    checkpoint, _, _ = task("bert")
    states = np.random.default_rng(0).normal(size=(1200, 32)).astype(np.float32) * 0.01 + 3.0
    labels = ((states[:, 0] > 3) == (states[:, 1] > 3)).astype(np.int64)
    arrays = (states[:900], labels[:900], states[900:], labels[900:])
    assert fit_logistic_head_(checkpoint.model, *arrays).validation_accuracy < 0.65
    plan = MlpPlan(learning_rate=0.01, weight_decays=(0.01,), epochs=60, batch_size=64, patience=0)
    fit_mlp_head_(checkpoint.model, MLP, *arrays, plan=plan)
    assert np.mean(logits_of_features(checkpoint.model, arrays[2]).argmax(axis=1) == arrays[3]) > 0.85


def test_training_ends_when_nothing_gets_better(task):
    checkpoint, _, arrays = task("bert")
    fit_logistic_head_(checkpoint.model, *arrays)
    shared = {"learning_rate": 0.03, "weight_decays": (0.01,), "epochs": 40, "batch_size": 40}
    copies = {name: value.clone() for name, value in head_parameters(checkpoint.model).items()}
    patient = fit_mlp_head_(checkpoint.model, MLP, *arrays, plan=MlpPlan(**shared, patience=0))
    with torch.no_grad():
        for name, value in head_parameters(checkpoint.model).items():
            value.copy_(copies[name])
    quick = fit_mlp_head_(checkpoint.model, MLP, *arrays, plan=MlpPlan(**shared, patience=2))
    assert len(patient.history) == 40
    losses = [line["eval_loss"] for line in quick.history]
    best = int(np.argmin(losses))
    assert len(losses) == best + 3 < 40
    assert losses == pytest.approx([line["eval_loss"] for line in patient.history[: len(losses)]])


def test_a_family_without_a_hidden_layer_is_refused(task):
    checkpoint, _, arrays = task("gpt2")
    with pytest.raises(ConfigError, match="no hidden layer.*cannot hold an mlp"):
        fit_mlp_head_(checkpoint.model, MLP, *arrays, plan=MlpPlan())


def test_a_diverging_network_is_refused(task):
    checkpoint, _, arrays = task("bert")
    plan = MlpPlan(learning_rate=1e30, batch_size=20)
    with pytest.raises(NotFiniteError, match="--learning_rate 1e\\+29"):
        fit_mlp_head_(checkpoint.model, MLP, *arrays, plan=plan)


@pytest.mark.parametrize(
    ("values", "fault"),
    [({"classifier": "svm"}, "classifier: 'svm' is not one of logistic, mlp"),
     ({"label_smoothing": 1.0}, "label_smoothing_factor: 1.0 is not in [0, 1)")],
)  # fmt: skip
def test_the_method_refuses(values, fault):
    with pytest.raises(ConfigError) as caught:
        FeatureBased(**values)
    assert list(caught.value.faults) == [fault]


def test_the_gradient_reaches_what_is_trained_and_no_more(tiny_checkpoint):
    checkpoint = load_classifier(str(tiny_checkpoint("bert")), schema=SCHEMA)
    model = checkpoint.model
    encoded = checkpoint.tokenizer(["bread", "goal"], padding=True, return_tensors="pt")
    batch = {**encoded, "labels": torch.tensor([0, 2])}
    for classifier in ("logistic", "mlp"):
        method = FeatureBased(classifier=classifier)
        model.zero_grad(set_to_none=True)
        method.loss_terms(model, batch)["label"].rows_B.sum().backward()
        reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
        assert reached == method.trained_parameters(model).keys()
    expected = functional.cross_entropy(model(**encoded).logits, batch["labels"], reduction="none")
    torch.testing.assert_close(method.loss_terms(model, batch)["label"].rows_B, expected)


# -- the recipe


@pytest.fixture
def bert(tiny_checkpoint):
    return tiny_checkpoint("bert")


def words_of(data, model, *words):
    return [*QUICK, *files(data), "--model_name_or_path", model, "--control_arm", "false", *words]


WHOLE = ("--feature_layer", "-1")
"""All layers of a tiny checkpoint; else LogME chooses."""


def computed(run):
    details = run.report["arms"][0]["details"]["features"]
    return {split: facts["computed"] for split, facts in details.items()}


def test_a_run_and_what_others_share_with_it(tiny_data, bert, tmp_path, caplog):
    caplog.set_level("INFO", logger="nlpxfer")
    plan = [*QUICK, *files(tiny_data), "--model_name_or_path", bert, *WHOLE]
    first = finished("features", tmp_path / "one", *plan, "--feature_cache", tmp_path / "mine")
    report = first.report
    assert [arm["name"] for arm in report["arms"]] == ["features", "no transfer (TF-IDF)", "majority class"]
    assert report["verdict"]["versus"] == "no transfer (TF-IDF)"
    assert computed(first) == {"train": 240, "validation": 80, "test": 80}
    details = first.arm("features")["details"]
    assert details["classifier"] == "logistic"
    assert details["penalty"] in linear_probe.PENALTIES
    assert details["features"]["train"]["bytes"] == 240 * 32 * 4
    assert report["cost"]["tokens"] == details["tokens"] > 240
    assert report["checks"]["features"]["logits_difference"] < 1e-4
    assert str(tmp_path) not in (first.folder / "run.json").read_text()
    assert not (tmp_path / "cache").exists()
    shared = words_of(tiny_data, bert, *WHOLE, "--feature_cache", tmp_path / "mine")
    network = finished("features", tmp_path / "two", *shared, "--classifier", "mlp", "--num_seeds", "2")
    assert computed(network) == {"train": 0, "validation": 0, "test": 0}
    assert [result["seed"] for result in network.arm("features")["per_seed"]] == [42, 43]
    assert network.report["cost"]["tokens"] == 0
    fewer = finished("features", tmp_path / "three", *shared, "--max_train_samples", "40", "--seed", "9")
    assert computed(fewer) == {"train": 0, "validation": 0, "test": 0}
    precise = [word.replace("false", "true") if shared[i - 1] == "--bf16" else word for i, word in enumerate(shared)]
    rounded = finished("features", tmp_path / "four", *precise)
    assert computed(rounded) == {"train": 240, "validation": 0, "test": 0}, "scores stay those of float32"
    assert rounded.report["checks"]["features"]["logits_difference"] < 1e-4


@pytest.mark.parametrize("classifier", ["logistic", "mlp"])
def test_the_folder_works_without_nlpxfer_and_with_it(classifier, tiny_data, bert, tmp_path):
    words = [*WHOLE, "--classifier", classifier, "--save_predictions", "true"]
    run = finished("features", tmp_path / "out", *words_of(tiny_data, bert, *words))
    with tiny_data.test.open(newline="") as file:
        texts = [row["text"] for row in csv.DictReader(file)]
    found = pipeline("text-classification", str(run.folder), device="cpu")(texts)
    assert [one["label"] for one in found] == [row["predicted"] for row in run.logits_of("test")]
    np.testing.assert_allclose(
        [one["score"] for one in found], [row["probability"] for row in run.logits_of("test")], atol=1e-5
    )
    scored = evaluate_file(Classifier.load(str(run.folder), bf16=False), tiny_data.test)
    assert scored["accuracy"] == pytest.approx(run.report["metrics"]["test"]["accuracy"])
    assert AutoConfig.from_pretrained(run.folder).num_hidden_layers == 5, "BERT reads the mean unless told otherwise"
    weights, body = load_file(run.folder / "model.safetensors"), load_file(bert / "model.safetensors")
    kept = [name for name in body if torch.equal(weights[f"bert.{name}"], body[name])]
    assert set(body) - set(kept) == {"pooler.dense.weight", "pooler.dense.bias"}


@pytest.mark.parametrize(
    ("family", "pooling", "layers"), [("gpt2", "auto", 4), ("bert", "own", 4), ("bert", "mean", 5)]
)
def test_pooling(family, pooling, layers, tiny_data, tiny_checkpoint, tmp_path):
    words = words_of(tiny_data, tiny_checkpoint(family), *WHOLE, "--pooling", pooling)
    run = finished("features", tmp_path / "out", *words)
    model = AutoModelForSequenceClassification.from_pretrained(run.folder)
    assert model.config.num_hidden_layers == layers


def test_a_trained_classifier_gets_a_new_head(tiny_data, tiny_checkpoint, tmp_path):
    """Its own head is that of another fit, also where the labels are the same."""
    base = tiny_checkpoint("bert", "classifier")
    run = finished("features", tmp_path / "out", *words_of(tiny_data, base, *WHOLE, "--pooling", "own"))
    weights, before = (load_file(folder / "model.safetensors") for folder in (run.folder, base))
    changed = {name for name in before if not torch.equal(weights[name], before[name])}
    assert changed == {f"{part}.{kind}" for part in ("bert.pooler.dense", "classifier") for kind in ("weight", "bias")}


def test_an_interrupted_run_leaves_its_features(tiny_data, bert, tmp_path, monkeypatch):
    words = words_of(tiny_data, bert)
    predicted = feature_arm.predict

    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(feature_arm, "predict", interrupt)
    broken_off = call("features", tmp_path / "out", *words)
    assert broken_off.code == 75
    assert not (tmp_path / "out" / "config.json").exists()
    monkeypatch.setattr(feature_arm, "predict", predicted)
    again = finished("features", tmp_path / "out", *words)
    assert sum(computed(again).values()) == 0


def test_a_run_that_ended_while_it_wrote_says_how_to_go_on(tiny_data, bert, tmp_path, monkeypatch):
    words = words_of(tiny_data, bert)
    with monkeypatch.context() as patch:
        patch.setattr(result, "write_card", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            call("features", tmp_path / "out", *words)
    message = call("features", tmp_path / "out", *words).err
    assert "Try: another --output_dir, or --overwrite\n" in message
    assert sum(computed(finished("features", tmp_path / "out", *words, "--overwrite", "true")).values()) == 0


def test_a_head_that_computes_something_else_is_refused(tiny_data, bert, tmp_path, monkeypatch):
    whole = feature_arm.predict
    monkeypatch.setattr(feature_arm, "predict", lambda *given, **options: whole(*given, **options) * 1.5)
    message = refused("features", tmp_path / "out", *words_of(tiny_data, bert))
    assert "other logits than the whole model" in message


REFUSED = {
    "a learning rate": (["--learning_rate", "3e-4"], ["learning_rate: has no effect without --classifier mlp"]),
    "passes": (["--num_train_epochs", "50"], ["num_train_epochs: has no effect without --classifier mlp"]),
    "smoothing": (["--label_smoothing_factor", "0.1"], ["label_smoothing_factor: has no effect without"]),
    "layers": (["--layer_decay", "0.9", "--num_trained_layers", "2"], ["layer_decay: has no effect here",
                                                                        "num_trained_layers: has no effect here"]),
    "a default": (["--warmup_steps", "0.1"], ["warmup_steps: has no effect here"]),
    "half precision": (["--fp16", "true"], ["fp16: has no effect here"]),
    "resuming": (["--resume_from_checkpoint", "true"], ["resume_from_checkpoint: has no effect here", "same command"]),
    "seeds": (["--num_seeds", "3"], ["num_seeds: logistic regression draws no random numbers", "--classifier mlp"]),
    "another classifier": (["--classifier", "svm"], ["classifier", "svm", "mlp"]),
    "with an mlp too": (["--classifier", "mlp", "--dropout", "0.1", "--max_steps", "9"],
                        ["dropout: has", "max_steps: has"]),
    "misspelt": (["--feature_cash", "x"], ["did you mean feature_cache"]),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_options_that_mean_nothing_are_refused(name, tmp_path):
    words, needles = REFUSED[name]
    message = refused("features", tmp_path / "out", *words)
    for needle in needles:
        assert needle in message
    assert not (tmp_path / "out").exists()


def test_an_mlp_of_gpt2_is_refused_before_the_pass(tiny_data, tiny_checkpoint, tmp_path):
    words = words_of(tiny_data, tiny_checkpoint("gpt2"), "--classifier", "mlp")
    message = refused("features", tmp_path / "out", *words)
    assert "the head of GPT2ForSequenceClassification has no hidden layer" in message
    assert "--classifier logistic" in message
    assert not (tmp_path / "cache").exists()


def test_a_file_may_repeat_defaults_and_no_more(tmp_path):
    from recipe_runs import option_classes

    from nlpxfer.config import parse

    plan = tmp_path / "mine.yaml"
    plan.write_text("learning_rate: 0.0003\n")
    _, options = parse(option_classes("features"), [str(plan)])
    assert "learning_rate" in options.idle
    plan.write_text("learning_rate: 0.002\n")
    with pytest.raises(ConfigError, match=r"has no effect without --classifier mlp \(in mine.yaml\)"):
        parse(option_classes("features"), [str(plan)])
    _, options = parse(option_classes("features"), [str(plan), "--classifier", "mlp"])
    assert options.plan.learning_rate == 0.002
    assert "learning_rate" not in options.idle


def test_help_shows_what_applies(capsys):
    from nlpxfer.recipes import load_recipe

    with pytest.raises(SystemExit):
        load_recipe("features").main(["--help"])
    shown = set(re.findall(r"--(\w+)", capsys.readouterr().out))
    assert {"classifier", "feature_cache", "learning_rate", "pooling", "seed"} <= shown
    assert not {"layer_decay", "optim", "report_to", "fp16", "hub_token"} & shown


def test_the_example_of_the_page(tiny_data, bert, tmp_path, monkeypatch):
    """The Python block as it stands, with a tiny checkpoint and tiny files."""
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "features.md").read_text(), flags=re.DOTALL)
    values = {}
    for split in ("train", "validation"):
        with getattr(tiny_data, split).open(newline="") as file:
            rows = list(csv.DictReader(file))
        values[split] = ([row["text"] for row in rows], [LABELS.index(row["label"]) for row in rows])
    exec(compile(block.replace("all-MiniLM-L6-v2", str(bert)), "features.md", "exec"), {"LABELS": LABELS, **values})
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "runs" / "mine")
    assert sorted(saved.config.label2id) == sorted(LABELS)


# -- several processes


@pytest.mark.processes
def test_two_processes_give_what_one_gives(tiny_data, bert, tmp_path):
    words = words_of(tiny_data, bert, "--classifier", "mlp", "--max_train_samples", "61")
    cache = ["--feature_cache", tmp_path / "of-two", "--output_dir", tmp_path / "two"]
    done = run(torchrun("recipes/features.py", *words, *cache))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("transfer: ") == 1, "one process alone reports"
    two, one = Ended(0, "", "", tmp_path / "two"), finished("features", tmp_path / "one", *words)
    assert two.report["checks"]["processes"] == 2
    assert computed(two) == computed(one) == {"train": 61, "validation": 80, "test": 80}
    for split in ("validation", "test"):
        ours, theirs = (ended.report["metrics"][split] for ended in (two, one))
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
    weights, expected = (load_file(Path(ended.folder) / "model.safetensors") for ended in (two, one))
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-2, atol=1e-3)
    again = finished("features", tmp_path / "again", *words, *cache[:2])
    assert sum(computed(again).values()) == 0, "one process reads what two wrote"


def test_a_fault_in_the_first_process_reaches_the_others():
    """What is sent to the processes that wait is the error itself."""
    error = pickle.loads(pickle.dumps(NotFiniteError("The loss became nan.", fix="--learning_rate 1e-4")))
    assert isinstance(error, NotFiniteError)
    assert "--learning_rate 1e-4" in str(error)


def test_folds_are_those_of_runs_without_the_held_out_rows(tiny_data, tiny_checkpoint, tmp_path):
    words = [*words_of(tiny_data, tiny_checkpoint("bert")), "--save_predictions", "true"]
    run = finished("features", tmp_path / "out", *words, "--num_folds", "2")
    told = [json.loads(line) for line in (run.folder / "predictions" / "out_of_fold.jsonl").read_text().splitlines()]
    with tiny_data.train.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["label"] for row in told] == [row["label"] for row in rows]
    parts = {fold: [row for row, found in zip(rows, told, strict=True) if found["fold"] == fold] for fold in (1, 2)}
    for fold in (1, 2):
        data = SimpleNamespace(train=write_csv(tmp_path / f"train{fold}.csv", parts[3 - fold]),
                               validation=tiny_data.validation,
                               test=write_csv(tmp_path / f"test{fold}.csv", parts[fold]))  # fmt: skip
        words = [*words_of(data, tiny_checkpoint("bert")), "--save_predictions", "true"]
        alone = finished("features", tmp_path / f"alone{fold}", *words).logits_of("test")
        mine = [found for found in told if found["fold"] == fold]
        assert [found["predicted"] for found in mine] == [row["predicted"] for row in alone]
        shares = [row["probability"] for row in alone]
        assert [found["probability"] for found in mine] == pytest.approx(shares, abs=1e-4)
    scores = run.report["checks"]["cross_validation"]
    assert scores["pooled"]["accuracy"] == pytest.approx(np.mean([row["label"] == row["predicted"] for row in told]))
