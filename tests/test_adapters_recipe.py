"""The recipe `adapters` from end to end, and what its bundle is good for afterwards."""

import csv
import hashlib
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gradients import KeepGradient, step_rows, step_tokenizer, step_trainer
from recipe_runs import call, finished, refused, tiny_words
from safetensors.torch import load_file, save_file
from test_problem_types import topic_rows
from test_resume import RESUME, assert_same, interrupted
from tiny import LABELS, make_rows, write_csv
from transformers import AutoModelForSequenceClassification, pipeline

from nlpxfer import result
from nlpxfer.checkpoint.adapter_kinds import KINDS
from nlpxfer.checkpoint.adapter_merge import merge_bundle
from nlpxfer.checkpoint.adapters import load_adapter
from nlpxfer.checkpoint.head import head_of
from nlpxfer.checkpoint.load import load_classifier
from nlpxfer.classify import Classifier, evaluate_file
from nlpxfer.cli import main
from nlpxfer.config import RunOptions
from nlpxfer.config.long_texts import LongTexts
from nlpxfer.data.schema import LabelSchema
from nlpxfer.data.tokenise import Collator
from nlpxfer.errors import CheckpointError, ConfigError, OutputExistsError, PushError
from nlpxfer.hub import finished_files
from nlpxfer.methods.adapters import Adapters
from nlpxfer.problem import MULTI_LABEL, REGRESSION
from nlpxfer.train.linear_probe import start_from_linear_probe_
from nlpxfer.train.predict import predict
from nlpxfer.train.regime import float32_head, training_attention

SCHEMA = LabelSchema(tuple(sorted(LABELS)))
QUICKLY = ["--max_train_samples", "60"]


@pytest.fixture(scope="module")
def bert(tiny_checkpoint):
    return tiny_checkpoint("bert", layers=2)


@pytest.fixture(scope="module")
def lora(bert, tiny_data, tmp_path_factory):
    """A finished run that left a merged model and the bundle."""
    words = [*tiny_words(tiny_data, bert, rate="3e-3"), "--save_predictions", "true"]
    return finished("adapters", tmp_path_factory.mktemp("lora") / "out", *words, "--control_arm", "false")


def test_a_bundle_is_exported_although_its_base_is_no_classifier(lora, bert, tiny_data, tmp_path, capsys):
    words = ["--base", str(bert), "--texts", str(tiny_data.test)]
    with pytest.raises(SystemExit) as left:
        main(["export", str(lora.folder / "adapter"), str(tmp_path / "onnx"), *words])
    assert left.value.code == 0
    assert "fp32: 0 of 80 predictions changed" in capsys.readouterr().out
    assert json.loads((tmp_path / "onnx" / "config.json").read_text())["architectures"] == [
        "BertForSequenceClassification"
    ]


def test_a_bundle_loads_only_once_all_of_it_is_there(prompt_words, bert, tmp_path, monkeypatch):
    """Of a kind that is not merged; killed when the bundle was in place."""
    plain, out = result.move_staged, tmp_path / "out"

    def move_and_die(*arguments, **options):
        plain(*arguments, **options)
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(result, "move_staged", move_and_die)
        with pytest.raises(ZeroDivisionError):
            call("adapters", out, *prompt_words)
    ours = Classifier.load(str(out), base=str(bert))
    resumed = finished("adapters", out, *prompt_words, *RESUME)
    theirs = Classifier.load(str(resumed.folder), base=str(bert))
    assert ours.temperature == theirs.temperature != 1
    assert ours.max_length == theirs.max_length == 32
    assert not [path.name for path in out.iterdir() if path.name.startswith(".")]


@pytest.fixture(scope="module")
def prompt_words(bert, tiny_data):
    words = ["--adapter", "p_tuning", "--num_virtual_tokens", "4", "--control_arm", "false"]
    return [*tiny_words(tiny_data, bert), *QUICKLY, *words]


@pytest.fixture(scope="module")
def prompt(prompt_words, tmp_path_factory):
    """A finished run that could leave no merged model."""
    return finished("adapters", tmp_path_factory.mktemp("prompt") / "out", *prompt_words, "--save_predictions", "true")


@pytest.fixture(scope="module")
def texts(tiny_data, tmp_path_factory):
    rows = make_rows(20, seed=5)
    return [row["text"] for row in rows], write_csv(tmp_path_factory.mktemp("texts") / "in.csv", rows)


def sha256(file):
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_bundle_and_merged_model_say_the_same(lora, bert, tiny_data):
    with tiny_data.test.open() as file:
        texts = [row["text"] for row in csv.DictReader(file)]
    loaded = load_adapter(lora.folder / "adapter", base=str(bert))
    inputs = loaded.tokenizer(texts, padding=True, truncation=True, max_length=32, return_tensors="pt")
    shares = loaded.model(**inputs).logits.softmax(1)
    ask = pipeline("text-classification", str(lora.folder), device="cpu", top_k=None)
    for row, answer, kept in zip(shares, ask(texts), lora.logits_of("test"), strict=True):
        by_name = {one["label"]: one["score"] for one in answer}
        assert row.tolist() == pytest.approx([by_name[name] for name in loaded.schema.names], abs=1e-5)
        assert kept["predicted"] == loaded.schema.names[int(row.argmax())]


def test_what_the_report_says_of_an_adapter(lora, bert):
    arm = lora.arm("adapter")
    bundle = lora.folder / "adapter"
    weights = load_file(bundle / "adapter_model.safetensors")
    assert arm["details"]["trained_parameters"] == sum(value.numel() for value in weights.values())
    assert arm["details"]["adapter_bytes"] == (bundle / "adapter_model.safetensors").stat().st_size
    assert arm["details"]["merged"] is True
    plain = AutoModelForSequenceClassification.from_pretrained(lora.folder)
    assert arm["parameters"] == plain.num_parameters() > 2 * arm["details"]["trained_parameters"]
    assert arm["details"]["linear_probe"]["validation_accuracy"] > 0
    base = json.loads((bundle / "base.json").read_text())
    assert (base["adapter"], base["name"], base["max_length"]) == ("lora", "bert-base", 32)
    for name in ("calibration.json", "run.json", "report.json", "labels.json"):
        assert (bundle / name).read_bytes() == (lora.folder / name).read_bytes()
    assert 'load(".", base="FOLDER")' in (bundle / "README.md").read_text()
    assert 'pipeline("text-classification"' in (lora.folder / "README.md").read_text()


def test_without_a_merged_model_the_run_is_used_through_its_bundle(prompt, bert, texts, tmp_path, capsys):
    names = {path.name for path in prompt.folder.iterdir()}
    assert not names & {"config.json", "model.safetensors", "tokenizer.json"}
    arm = prompt.arm("adapter")
    assert arm["details"]["merged"] is False
    body = sum(4 * value.numel() for value in load_file(bert / "model.safetensors").values())
    classifier, prompt_tokens = 4 * 33, 4 * 32  # the pooler takes the place of the base's own
    assert arm["bytes"] == 4 * arm["parameters"] == body + 4 * (classifier + prompt_tokens)
    card = (prompt.folder / "README.md").read_text()
    assert "no merged model exists" in card
    assert "library_name: peft" in card
    found = []
    for name in (prompt.folder, prompt.folder / "adapter"):
        out = tmp_path / f"{len(found)}.csv"
        words = [str(name), str(texts[1]), "--base", str(bert), "--bf16", "false"]
        with pytest.raises(SystemExit) as left:
            main(["predict", *words, "--output_file", str(out)])
        assert left.value.code == 0, capsys.readouterr().err
        found.append(out.read_bytes())
    assert found[0] == found[1]
    with pytest.raises(SystemExit) as left:
        main(["evaluate", str(prompt.folder), str(texts[1]), "--bf16", "false"])
    assert left.value.code == 2
    assert "--base FOLDER" in capsys.readouterr().err
    classifier = Classifier.load(str(prompt.folder), base=str(bert), bf16=False)
    assert classifier.max_length == 32
    assert classifier.temperature == prompt.report["checks"]["calibration"]["temperature"]
    with pytest.raises(ConfigError, match="not between 4 and the 60 tokens"):
        Classifier.load(str(prompt.folder), base=str(bert), max_length=61)


def test_a_merged_run_is_replaced_by_one_without_a_model(lora, prompt_words, tmp_path):
    first = shutil.copytree(lora.folder, tmp_path / "out")
    assert "is not empty" in call("adapters", first, *prompt_words).err
    again = finished("adapters", first, *prompt_words, "--overwrite", "true")
    assert not (again.folder / "config.json").exists()
    assert json.loads((again.folder / "adapter" / "base.json").read_text())["adapter"] == "p_tuning"


# -- what cannot go together


def test_options_that_do_not_fit_an_adapter_are_refused_together(bert, tiny_data, tmp_path, monkeypatch):
    words = tiny_words(tiny_data, bert)
    message = refused(
        "adapters",
        tmp_path / "out",
        *words,
        *"--num_trained_layers 1 --layer_decay 0.9 --gradual_unfreezing 0.5 --l2_sp_weight 0.1".split(),
        *"--l2_sp_head_weight 0.1 --freeze_embeddings false".split(),
    )
    for name in ("num_trained_layers", "layer_decay", "gradual_unfreezing", "l2_sp_weight", "l2_sp_head_weight",
                 "freeze_embeddings"):  # fmt: skip
        assert f"{name}: does not fit an adapter" in message
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match="fsdp: adapters train with DDP"):
        Adapters().check(RunOptions(output_dir=str(tmp_path), use_cpu=True))
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_cannot_compute_in_bfloat16_is_refused(tiny_data, tiny_checkpoint, tmp_path):
    words = tiny_words(tiny_data, tiny_checkpoint("deberta-v2"), steps=1)
    words += ["--adapter", "loha", "--control_arm", "false"]
    finished("adapters", tmp_path / "float32", *words)
    words[words.index("--bf16") + 1] = "true"
    assert "adapter: loha does not compute in bfloat16" in refused("adapters", tmp_path / "out", *words)


@pytest.mark.parametrize(
    ("words", "messages"),
    [
        (["--adapter", "ia3", "--adapter_rank", "4"], ["adapter_rank: the adapter ia3 has no use for it"]),
        (
            ["--adapter", "hra", "--load_in_8bit", "true", "--load_in_4bit", "true", "--adapter_rank", "0"],
            ["adapter_rank: 0 is below 1", "load_in_8bit, load_in_4bit: choose one", "load_in_8bit: works with lora"],
        ),
        (["--adapter_target_modules", "query", "nowhere"], ["no linear layer of the body is named nowhere"]),
        (["--adapter", "prompt", "--num_virtual_tokens", "40"], ["max_length: 32 is longer than the 24 tokens"]),
    ],
)
def test_what_cannot_work_is_refused_before_any_work(words, messages, bert, tiny_data, tmp_path, caplog):
    message = refused("adapters", tmp_path / "out", *tiny_words(tiny_data, bert), *words)
    for part in messages:
        assert part in message
    assert not (tmp_path / "out").exists()
    assert "seed 42" not in caplog.text


def test_a_family_that_cannot_take_the_adapter_is_refused_before_any_work(tiny_checkpoint, tiny_data, tmp_path):
    words = [*tiny_words(tiny_data, tiny_checkpoint("distilbert", layers=2)), "--adapter", "prefix"]
    message = refused("adapters", tmp_path / "out", *words)
    assert "DistilBertForSequenceClassification takes none" in message
    assert not (tmp_path / "out").exists()


def test_bits_are_refused_without_a_gpu(bert, tiny_data, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = [*tiny_words(tiny_data, bert), "--load_in_8bit", "true"]
    assert "load_in_8bit: needs an NVIDIA GPU" in refused("adapters", tmp_path / "out", *words)
    monkeypatch.setattr("nlpxfer.checkpoint.quantised._gpu", lambda: torch.device("cuda", 0))
    assert "load_in_8bit: needs the GPU, and use_cpu" in refused("adapters", tmp_path / "out", *words)


# -- training


def test_a_kind_has_its_own_learning_rate(bert, tiny_data, tmp_path):
    words = [*tiny_words(tiny_data, bert, steps=1), *QUICKLY, "--adapter", "ia3", "--control_arm", "false"]
    at = words.index("--learning_rate")
    run = finished("adapters", tmp_path / "out", *words[:at], *words[at + 2 :])
    rate = KINDS["ia3"].learning_rate_for(32, gently=True)
    assert run.run["config"]["learning_rate"] == rate == 1.5e-3, "few steps start from a sure probe"


def test_full_fine_tuning_for_as_many_epochs(bert, tiny_data, tmp_path):
    words = [*tiny_words(tiny_data, bert), *QUICKLY, "--full_arm", "true"]
    run = finished("adapters", tmp_path / "out", *words)
    assert [arm["name"] for arm in run.report["arms"]] == ["adapter", "full", "no transfer (TF-IDF)", "majority class"]
    assert run.arm("full")["details"]["steps"] == run.arm("adapter")["details"]["steps"]
    assert run.arm("full")["details"]["trained_parameters"] > run.arm("adapter")["details"]["trained_parameters"]
    gain = run.report["checks"]["gain_over_full"]
    accuracy = [run.arm(name)["metrics"]["test"]["accuracy"] for name in ("adapter", "full")]
    assert gain["gain"] == pytest.approx(accuracy[0] - accuracy[1])
    assert run.report["verdict"]["versus"] == "no transfer (TF-IDF)"
    assert run.arm("full")["parameters"] == run.arm("adapter")["parameters"]


@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize("kind", ["lora", "prompt"])
def test_micro_batches_do_not_change_the_gradient(kind, family, tiny_checkpoint, tmp_path):
    rows = step_rows(family, "uneven")
    found = []
    for batch, micro_batches in ((8, 1), (2, 4)):
        checkpoint = load_classifier(str(tiny_checkpoint(family, layers=2)), schema=SCHEMA)
        torch.manual_seed(1)
        method = Adapters(adapter=kind)
        model = method.adapt(checkpoint.model, checkpoint.fresh)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)  # at 0, as it begins, A has no gradient
        options = RunOptions(
            output_dir=str(tmp_path), use_cpu=True, per_device_train_batch_size=batch, max_steps=1, max_grad_norm=0.0,
            gradient_accumulation_steps=micro_batches, train_sampling_strategy="random", eval_strategy="no",
            save_strategy="no", load_best_model_at_end=False, disable_tqdm=True,
        )  # fmt: skip
        trainer = step_trainer(model, method, options, rows, family)
        keep = KeepGradient()
        trainer.add_callback(keep)
        trainer.fit()
        assert keep.gradient.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
        found.append(torch.cat([gradient.flatten() for _, gradient in sorted(keep.gradient.items())]))
    assert found[0].norm() > 0
    assert (found[0] - found[1]).norm() <= 1e-5 * found[0].norm()


def test_the_best_weights_are_kept(bert, tiny_data, tmp_path):
    """At this rate the loss soon rises: the weights of an early epoch must come back."""
    words = [*tiny_words(tiny_data, bert, epochs=3, rate="0.2"), *QUICKLY, "--metric_for_best_model", "loss"]
    words += ["--lr_scheduler_type", "constant", "--control_arm", "false", "--adapter", "p_tuning"]
    run = finished("adapters", tmp_path / "out", *words)
    losses = [line["eval_loss"] for line in run.arm("adapter")["details"]["history"] if "eval_loss" in line]
    assert len(losses) == 3
    assert min(losses) < losses[-1]
    assert run.report["metrics"]["validation"]["loss"] == pytest.approx(min(losses), rel=1e-4)


@pytest.mark.parametrize(("kind", "problem_type"), [("lora", MULTI_LABEL), ("prompt", REGRESSION)])
def test_other_kinds_of_task(kind, problem_type, bert, tmp_path):
    """The bundle knows what its logits mean: sigmoids with thresholds, or a number."""
    files = {}
    for number, part in enumerate(("train", "validation", "test")):
        rows = topic_rows(80, seed=number)
        files[f"--{part}_file"] = write_csv(tmp_path / f"{part}.csv", rows)
    column = ["labels", "--label_separator", "|"] if problem_type == MULTI_LABEL else ["score"]
    words = ["--bf16", "false", "--num_threads", "1", "--max_length", "32", "--model_name_or_path", bert]
    words += [word for pair in files.items() for word in pair]
    words += ["--label_column", *column, "--problem_type", problem_type, "--adapter", kind, "--num_train_epochs", "1"]
    run = finished("adapters", tmp_path / "out", *words, "--control_arm", "false", "--use_cpu", "true")
    bundle = Classifier.load(str(run.folder / "adapter"), base=str(bert), bf16=False)
    assert bundle.schema.problem_type == problem_type
    given = {"label_separator": "|"} if problem_type == MULTI_LABEL else {}
    scores = evaluate_file(bundle, files["--test_file"], label_column=column[0], **given)
    for name, value in run.report["metrics"]["test"].items():
        assert scores[name] == pytest.approx(value, abs=1e-4), name
    if problem_type == MULTI_LABEL:
        whole = Classifier.load(str(run.folder), bf16=False)
        np.testing.assert_array_equal(bundle.thresholds_C, whole.thresholds_C)
        assert len(bundle.schema) == 4


def test_adalora_ends_with_the_ranks_that_were_asked_for(bert, tiny_data, tmp_path):
    words = [*tiny_words(tiny_data, bert, epochs=3), *QUICKLY, "--adapter", "adalora", "--adapter_rank", "2"]
    run = finished("adapters", tmp_path / "out", *words, "--control_arm", "false", "--load_best_model_at_end", "false")
    weights = load_file(run.folder / "adapter" / "adapter_model.safetensors")
    kept = {name: values for name, values in weights.items() if "lora_E" in name}
    assert {tuple(values.shape) for values in kept.values()} == {(3, 1)}
    assert sum(int(values.count_nonzero()) for values in kept.values()) == 2 * len(kept)
    config = json.loads((run.folder / "adapter" / "adapter_config.json").read_text())
    assert config["rank_pattern"] is None
    assert (config["total_step"], config["tinit"], config["tfinal"]) == (6, 0, 1)


@pytest.mark.parametrize("kind", ["lora", "p_tuning", "adalora"])
def test_an_interrupted_run_goes_on_bit_for_bit(kind, tiny_checkpoint, tiny_data, tmp_path, monkeypatch):
    words = [
        *tiny_words(tiny_data, tiny_checkpoint("bert", layers=2, dropout=0.1), epochs=3),
        *QUICKLY,
        "--dropout",
        "0.1",
    ]
    words += ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2", "--adapter", kind]
    words += ["--control_arm", "false"]
    whole = finished("adapters", tmp_path / "whole", *words)
    checkpoint = interrupted("adapters", tmp_path / "out", words, monkeypatch, 10, "adapter")
    names = {path.name for path in checkpoint.iterdir()}
    assert "trained.safetensors" in names
    assert not names & {"model.safetensors", "adapter_model.safetensors"}, "the frozen weights are not saved"
    resumed = finished("adapters", tmp_path / "out", *words, *RESUME)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert sha256(resumed.folder / "adapter" / name) == sha256(whole.folder / "adapter" / name)
    if kind == "lora":
        assert_same(resumed, whole)
    else:
        assert resumed.report["metrics"] == whole.report["metrics"]


def test_a_finished_seed_is_not_trained_again(bert, tiny_data, tmp_path, monkeypatch, caplog):
    words = [*tiny_words(tiny_data, bert), *QUICKLY, "--adapter", "prompt", "--control_arm", "false"]
    words += ["--num_seeds", "2"]
    whole = finished("adapters", tmp_path / "whole", *words)
    with monkeypatch.context() as patch:
        patch.setattr("nlpxfer.result._write", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        assert call("adapters", tmp_path / "out", *words).code == 75
    caplog.clear()
    resumed = finished("adapters", tmp_path / "out", *words, *RESUME)
    assert [r.getMessage() for r in caplog.records if "already trained" in r.getMessage()] == [
        "adapter, seed 42: already trained",
        "adapter, seed 43: already trained",
    ]
    assert resumed.report["metrics"] == whole.report["metrics"]
    assert sha256(resumed.folder / "adapter" / "adapter_model.safetensors") == sha256(
        whole.folder / "adapter" / "adapter_model.safetensors"
    )


@pytest.mark.parametrize("kind", ["lora", "prefix", "prompt"])
def test_the_head_starts_from_a_probe_on_what_it_reads(kind, bert, tiny_data):
    """A prompt changes the state that the head reads, so the probe must be fitted with the prompt in place."""
    checkpoint = load_classifier(str(bert), schema=SCHEMA)
    rows = step_rows("bert")
    torch.manual_seed(1)
    model = Adapters(adapter=kind).adapt(checkpoint.model, checkpoint.fresh)
    collator = Collator.for_tokenizer(step_tokenizer("bert"))
    probe = start_from_linear_probe_(model, rows, rows, collator)
    right = predict(model, rows, collator).argmax(axis=1) == rows.columns["labels"]
    assert right.mean() == pytest.approx(probe.validation_accuracy)
    final = head_of(model).final
    assert final.weight.requires_grad
    assert final is model.get_base_model().classifier.modules_to_save["default"]


@pytest.mark.parametrize(
    ("kind", "family"), [("lora", "bert"), ("prefix", "bert"), ("ia3", "roberta"), ("prompt", "gpt2")]
)
def test_bfloat16_leaves_the_head_in_float32(kind, family, tiny_checkpoint, tmp_path):
    checkpoint = load_classifier(str(tiny_checkpoint(family, layers=2)), schema=SCHEMA)
    model = Adapters(adapter=kind).adapt(checkpoint.model, checkpoint.fresh)
    seen = {}
    body = next(m for m in model.get_base_model().base_model.modules() if type(m).__name__ in ("Linear", "Conv1D"))
    for name, module in {"final": head_of(model).final, "body": body}.items():
        module.register_forward_hook(lambda m, i, out, name=name: seen.__setitem__(name, out.dtype))
    inputs = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    attention = training_attention(model, bf16=True, device=torch.device("cpu"))
    with float32_head(model), attention, torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.get_base_model().config._attn_implementation == "eager"
        model(**inputs).logits.sum().backward()
    assert model.get_base_model().config._attn_implementation == "sdpa"
    assert seen == {"final": torch.float32, "body": torch.bfloat16}


RECOMPUTE = "activation_checkpointing" if hasattr(RunOptions, "activation_checkpointing") else "gradient_checkpointing"


@pytest.mark.parametrize(
    "own",
    [
        ["--bf16", "true"],
        [f"--{RECOMPUTE}", "true", *"--adapter_target_modules query value --adapter_dropout 0.1".split()],
        "--pooling mean --adapter dora --dropout 0.1 --label_smoothing_factor 0.1 --linear_probe false".split(),
    ],
    ids=lambda own: " ".join(own),
)
def test_options_of_training(own, bert, tiny_data, tmp_path):
    words = [*tiny_words(tiny_data, bert, epochs=2), *QUICKLY, "--control_arm", "false"]
    for option in own:
        if option in words and option.startswith("--"):
            del words[words.index(option) : words.index(option) + 2]
    run = finished("adapters", tmp_path / "out", *words, *own)
    assert run.arm("adapter")["details"]["steps"] == 4
    loaded = load_adapter(run.folder, base=str(bert))
    model = AutoModelForSequenceClassification.from_pretrained(run.folder).eval()
    inputs = loaded.tokenizer(["bread and music", "a goal"], padding=True, return_tensors="pt")
    torch.testing.assert_close(model(**inputs).logits, loaded.model(**inputs).logits, atol=1e-5, rtol=1e-5)


def test_a_prefix_is_refused_where_states_are_computed_again(bert, tiny_data, tmp_path):
    words = [*tiny_words(tiny_data, bert), "--adapter", "prefix", f"--{RECOMPUTE}", "true"]
    assert "drops the keys and values that prefix puts" in refused("adapters", tmp_path / "out", *words)


# -- merging


def test_merge_writes_the_model_of_the_run(lora, bert, texts, tmp_path, capsys):
    out = tmp_path / "new" / "model"
    with pytest.raises(SystemExit) as left:
        main(["merge", str(lora.folder / "adapter"), str(out), "--base", str(bert)])
    assert left.value.code == 0
    assert "merged; no logit differs by more than" in capsys.readouterr().out
    assert sha256(out / "model.safetensors") == sha256(lora.folder / "model.safetensors")
    for name in ("config.json", "labels.json", "calibration.json"):
        assert (out / name).read_bytes() == (lora.folder / name).read_bytes()
    one, other = Classifier.load(str(out), bf16=False), Classifier.load(str(lora.folder), bf16=False)
    assert (one.max_length, one.temperature, one.schema) == (32, other.temperature, other.schema)
    np.testing.assert_array_equal(one.logits(texts[0]), other.logits(texts[0]))
    bundle = Classifier.load(str(lora.folder / "adapter"), base=str(bert), bf16=False)
    np.testing.assert_allclose(bundle.logits(texts[0]), other.logits(texts[0]), atol=1e-5)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["model"]


def test_a_bundle_without_a_run_keeps_its_length_when_merged(lora, bert, tmp_path):
    copied = shutil.copytree(lora.folder / "adapter", tmp_path / "copy")
    (copied / "run.json").unlink()
    merge_bundle(copied, tmp_path / "out", base=str(bert))
    assert Classifier.load(str(tmp_path / "out"), bf16=False).max_length == 32


def test_a_bundle_without_a_run_reads_long_texts_as_the_training_did(bert, tiny_data, tmp_path):
    words = [*tiny_words(tiny_data, bert, steps=1), *QUICKLY, "--control_arm", "false"]
    words[words.index("--max_length") + 1] = "8"
    words += ["--long_texts", "sliding_window", "--window_overlap", "3", "--max_windows", "4"]
    bundle = finished("adapters", tmp_path / "out", *words).folder / "adapter"
    wanted = LongTexts(policy="sliding_window", window_overlap=3, max_windows=4)
    assert Classifier.load(str(bundle), base=str(bert), bf16=False).long_texts == wanted
    (bundle / "run.json").unlink()
    assert Classifier.load(str(bundle), base=str(bert), bf16=False).long_texts == wanted
    merge_bundle(bundle, tmp_path / "merged", base=str(bert))
    merged = Classifier.load(str(tmp_path / "merged"), bf16=False)
    assert (merged.long_texts, merged.max_length) == (wanted, 8)


def test_merge_refuses_and_leaves_nothing(lora, prompt, bert, tiny_checkpoint, tmp_path, monkeypatch, capsys):
    bundle = str(lora.folder / "adapter")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match="is not an empty folder"):
        merge_bundle(bundle, tmp_path / "mine", base=str(bert))
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    with pytest.raises(OutputExistsError, match="link exists and is not an empty folder"):
        merge_bundle(bundle, tmp_path / "link", base=str(bert))
    (tmp_path / "link").unlink()
    (tmp_path / "empty").rmdir()
    with pytest.raises(CheckpointError, match=r"(?s)kind p_tuning cannot be merged.*lora"):
        merge_bundle(prompt.folder, tmp_path / "out", base=str(bert))
    for words, message in (
        ([], "--base FOLDER"),
        (["--base", str(tiny_checkpoint("bert", layers=2, seed=3))], "sha256"),
    ):
        with pytest.raises(SystemExit) as left:
            main(["merge", bundle, str(tmp_path / "out"), *words])
        assert left.value.code == 2
        assert message in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr("peft.tuners.lora.layer.Linear.merge", lambda self, safe_merge=False: None)
        with pytest.raises(CheckpointError, match="The merged model is not the adapter: a logit differs by"):
            merge_bundle(bundle, tmp_path / "out", base=str(bert))
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"


def test_a_whole_model_needs_no_base(lora, bert):
    with pytest.raises(ConfigError, match="is a whole model and needs none"):
        Classifier.load(str(lora.folder), base=str(bert))


# -- pushing


def test_what_is_pushed(lora, prompt):
    whole = set(finished_files(lora.folder))
    assert {"config.json", "model.safetensors", "README.md"} <= whole
    assert "adapter_config.json" not in whole
    adapter = {"adapter_config.json", "adapter_model.safetensors", "base.json", "calibration.json", "labels.json"}
    for run in (lora, prompt):
        names = set(finished_files(run.folder / "adapter"))
        assert adapter | {"README.md", "report.json", "run.json", "tokenizer.json"} <= names
        assert not names & {"config.json", "model.safetensors"}


def test_the_card_of_a_bundle_does_not_name_where_the_merged_model_is(bert, tiny_data, tmp_path, monkeypatch):
    monkeypatch.setattr("nlpxfer.result.push_folder", lambda *words, **options: SimpleNamespace(url="", commit=""))
    monkeypatch.setattr("nlpxfer.start.check_push_request", lambda *words, **options: None)
    words = [*tiny_words(tiny_data, bert, steps=1), "--control_arm", "false", "--adapter", "lora"]
    run = finished("adapters", tmp_path / "out", *words, "--push_to_hub", "true", "--hub_model_id", "me/merged")
    assert "me/merged" in (run.folder / "README.md").read_text()
    assert 'load(".", base="FOLDER")' in (run.folder / "adapter" / "README.md").read_text()


def test_a_damaged_bundle_is_not_pushed(lora, tmp_path):
    copied = shutil.copytree(lora.folder / "adapter", tmp_path / "copy")
    (copied / "base.json").unlink()
    weights = load_file(copied / "adapter_model.safetensors")
    save_file(weights, copied / "adapter_model.safetensors")
    (copied / "adapter_model.safetensors").write_bytes(b"short")
    with pytest.raises(PushError) as refusal:
        finished_files(copied)
    assert "base.json is missing" in str(refusal.value)
    assert "adapter_model.safetensors is cut off or damaged" in str(refusal.value)
