"""What every method of the registry keeps, on tiny BERT and GPT-2 checkpoints."""

import hashlib
import json

import numpy as np
import pytest
import torch
from gradients import step_rows, step_tokenizer
from recipe_runs import KEYS, RANDOM, finished, refused, tiny_words
from tiny import LABELS
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from nlpxfer.checkpoint.head import embedding_parameters, head_parameters
from nlpxfer.checkpoint.linear_layers import linear_layers
from nlpxfer.checkpoint.load import load_classifier
from nlpxfer.checkpoint.save import save_classifier
from nlpxfer.config import RunOptions
from nlpxfer.data.schema import LabelSchema
from nlpxfer.data.tokenise import Collator
from nlpxfer.errors import ConfigError
from nlpxfer.evaluate.arms import Splits, train_arm
from nlpxfer.evaluate.feature_arm import feature_arm
from nlpxfer.methods import REGISTRY, Method, method_row
from nlpxfer.methods.base import model_inputs
from nlpxfer.train.predict import predict

FAMILIES = ["bert", "gpt2"]
SCHEMA = LabelSchema(tuple(sorted(LABELS)))
BAD_OPTIONS = {
    "adapters": (["--adapter", "lorra"], "adapter: 'lorra' is not one of lora, rslora"),
    "finetune": (["--label_smoothing_factor", "1.5"], "label_smoothing_factor: 1.5 is not in [0, 1)"),
    "features": (["--classifier", "mlp", "--num_train_epochs", "2.5"], "num_train_epochs: 2.5 is not a whole number"),
    "distill": (["--temperature", "0"], "temperature: 0.0 is not above 0"),
}

each_method = pytest.mark.parametrize("row", REGISTRY, ids=lambda row: row.key)
each_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NLPXFER_CACHE", str(tmp_path / "cache"))


def options(folder, **changes):
    """Float32, no validation in between, a step of eight rows."""
    shared = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "per_device_train_batch_size": 8,
        "eval_strategy": "no",
        "save_strategy": "no",
        "load_best_model_at_end": False,
        "weight_decay": 0.0,
    }
    return RunOptions(**{**shared, **changes})


def taught_rows(family):
    """Eight labelled rows whose teacher is sure of the gold label."""
    rows = step_rows(family)
    return rows.with_columns(teacher_logits=8 * np.eye(4, dtype=np.float32)[rows.columns["labels"]])


def trained(row, family, checkpoint, folder, **changes):
    rows = taught_rows(family)
    shared = {
        "build": lambda: load_classifier(str(checkpoint), schema=SCHEMA),
        "method": row.load()(),
        "split": lambda tokenizer: Splits(rows, rows, rows),
        "options": options(folder, **changes),
        "seed": 7,
    }
    if row.key != "features":
        return train_arm(row.key, schema=SCHEMA, facts={}, **shared)
    arm = feature_arm(row.key, **shared)
    save_classifier(arm.model, arm.tokenizer, SCHEMA, folder / "checkpoints" / "features-7" / "finished")
    return arm


def frozen_weights(row, model, embeddings_too):
    """Names of the parameters that a method leaves as they were."""
    if row.key == "features":
        return {name for name, _ in model.named_parameters()} - head_parameters(model).keys()
    if row.key == "adapters":
        learning = {f"{name}.weight" for name in linear_layers(model)}
        learning |= {name for name, _ in model.named_parameters() if not name.startswith(model.base_model_prefix)}
        learning |= {name for name, _ in model.named_parameters() if ".pooler." in name}
        return {name for name, _ in model.named_parameters()} - learning
    return {name for name, _ in embedding_parameters(model)} if embeddings_too else set()


@each_method
def test_it_is_built_without_arguments_and_found_by_name(row):
    assert isinstance(row.load()(), Method)
    assert method_row(row.key) is row
    assert row.summary
    assert row.source


@each_method
@each_family
def test_terms_and_counts_have_the_same_names(row, family, tiny_checkpoint):
    model = AutoModelForSequenceClassification.from_pretrained(tiny_checkpoint(family, kind="classifier"))
    rows = taught_rows(family)
    batch = Collator.for_tokenizer(step_tokenizer(family))([rows[i] for i in range(3)])
    method = row.load()()
    terms, counts = method.loss_terms(model, batch), method.counts(batch)
    assert terms.keys() == counts.keys()
    assert all(term.rows_B.shape == (3,) for term in terms.values())
    assert sum(term.weight for term in terms.values()) == pytest.approx(1)
    assert all(int(count) == 3 for count in counts.values())


@each_method
@each_family
@pytest.mark.parametrize("frozen", [True, False])
def test_it_changes_only_the_weights_it_says(row, family, frozen, tiny_checkpoint, tmp_path):
    checkpoint = tiny_checkpoint(family)
    before = load_classifier(str(checkpoint), schema=SCHEMA).model
    assert frozen_weights(row, before, True)
    if row.key == "adapters" and not frozen:
        with pytest.raises(ConfigError, match="freeze_embeddings: does not fit an adapter"):
            trained(row, family, checkpoint, tmp_path, freeze_embeddings=frozen)
        return
    arm = trained(row, family, checkpoint, tmp_path, freeze_embeddings=frozen, linear_probe=False, max_steps=3)
    kept = {
        name
        for (name, old), (same, new) in zip(before.named_parameters(), arm.model.named_parameters(), strict=True)
        if name == same and torch.equal(old, new)
    }
    assert kept == frozen_weights(row, before, frozen)


@each_method
@each_family
def test_it_overfits_one_batch(row, family, tiny_checkpoint, tmp_path):
    changes = {"max_steps": 60, "learning_rate": 3e-3, "linear_probe": False, "lr_scheduler_type": "constant"}
    arm = trained(row, family, tiny_checkpoint(family), tmp_path, **changes)
    gold = taught_rows(family).columns["labels"]
    assert np.argmax(arm.test_logits, axis=1).tolist() == gold.tolist()
    chosen = torch.log_softmax(torch.from_numpy(arm.test_logits), 1)[range(8), gold]
    assert float(-chosen.mean()) < 0.1


@pytest.mark.parametrize("bf16", [False, True])
def test_training_leaves_no_wrapper_on_the_model(bf16, tiny_checkpoint, tmp_path):
    """accelerate takes a copy of a prepared model for prepared, and would train it alone and in float32."""
    row = method_row("finetune")
    before = vars(load_classifier(str(tiny_checkpoint("bert")), schema=SCHEMA).model).keys()
    arm = trained(row, "bert", tiny_checkpoint("bert"), tmp_path, max_steps=1, bf16=bf16)
    assert vars(arm.model).keys() - before == set()


@each_method
@each_family
def test_the_saved_folder_gives_the_logits_that_were_scored(row, family, tiny_checkpoint, tmp_path):
    arm = trained(row, family, tiny_checkpoint(family), tmp_path, max_steps=2)
    folder = tmp_path / "checkpoints" / f"{row.key}-7" / "finished"
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert list(model.config.id2label.values()) == list(SCHEMA.names)
    again = predict(model, taught_rows(family), Collator.for_tokenizer(tokenizer))
    np.testing.assert_allclose(again, arm.test_logits, rtol=0, atol=1e-5 if row.key == "features" else 0)
    one = taught_rows(family)[0]
    alone = model(**model_inputs(Collator.for_tokenizer(tokenizer)([one]))).logits.detach().numpy()
    np.testing.assert_allclose(alone[0], arm.test_logits[0], atol=1e-5)


@pytest.mark.parametrize("key", KEYS)
@each_family
def test_a_seed_repeats_bit_for_bit_and_another_one_differs(key, family, tiny_checkpoint, tiny_data, tmp_path):
    """Whole recipe runs, with dropout, so that the order of rows, the head and the masks all come from the seed."""
    words = tiny_words(tiny_data, tiny_checkpoint(family, dropout=0.1), key=key)
    words += ["--control_arm", "false", "--max_train_samples", "64"]
    draws = not (key == "features" and family == "gpt2")  # logistic regression draws no random numbers
    words += [*RANDOM.get(key, []), "--linear_probe", "false"] if draws else []
    runs = {
        name: finished(key, tmp_path / name, *words, "--seed", seed)
        for name, seed in (("one", 1), ("same", 1), ("other", 2))
    }
    sums = {
        name: hashlib.sha256((run.folder / "model.safetensors").read_bytes()).hexdigest() for name, run in runs.items()
    }
    assert sums["one"] == sums["same"]
    assert (sums["one"] != sums["other"]) == draws
    assert runs["one"].report["metrics"] == runs["same"].report["metrics"]
    prints = {name: run.run["data_fingerprint"] for name, run in runs.items()}
    assert len(set(prints.values())) == 1, "seeds must share their data"


@pytest.mark.parametrize("key", KEYS)
def test_a_wrong_option_gives_the_promised_message(key, tmp_path):
    words, message = BAD_OPTIONS[key]
    assert message in refused(key, tmp_path / "out", *words)


@pytest.mark.parametrize("key", KEYS)
def test_the_config_of_the_result_names_the_labels(key, tiny_checkpoint, tiny_data, tmp_path):
    words = tiny_words(tiny_data, tiny_checkpoint("bert"), key=key)
    run = finished(key, tmp_path / "out", *words, "--max_train_samples", "32")
    config = json.loads((run.folder / "config.json").read_text())
    assert config["id2label"] == {str(i): name for i, name in enumerate(sorted(LABELS))}
    assert config["problem_type"] == "single_label_classification"
