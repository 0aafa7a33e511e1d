"""Students of all kinds through the whole recipe, and what is refused."""

import csv
import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from recipe_runs import call, finished, refused, tiny_words
from transformers import AutoConfig, AutoModelForSequenceClassification

from nlpxfer import layer_trial, students
from nlpxfer.checkpoint import load_classifier, save_classifier
from nlpxfer.classify import Classifier, evaluate_file
from nlpxfer.cli import main
from nlpxfer.config import RunOptions
from nlpxfer.config.ranges import with_values
from nlpxfer.config.student import StudentOptions
from nlpxfer.data.schema import LabelSchema
from nlpxfer.evaluate import arms as arms_module
from nlpxfer.hub.folder import finished_files
from nlpxfer.train import predict as predict_module
from nlpxfer.train.static_start import StaticPlan, static_student, token_states


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NLPXFER_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def teacher(tiny_checkpoint):
    return tiny_checkpoint("bert", kind="classifier")


def taught(tiny_data, teacher, *words):
    """Options of a run with a teacher that is given; a static student has epochs of its own, steps are none."""
    shared = tiny_words(tiny_data, rate="2e-2")
    if "static" in words or "--max_steps" in words:
        at = shared.index("--num_train_epochs")
        shared[at : at + 2] = []
    return [*shared, "--teacher_name_or_path", str(teacher), *words]


def test_a_static_student_from_training_to_predictions(tiny_data, tiny_checkpoint, tmp_path):
    words = tiny_words(tiny_data, tiny_checkpoint("bert"), rate="2e-2")
    words += ["--student", "static", "--static_dim", "16", "--static_num_train_epochs", "4", "--unlabelled_file"]
    words += [str(tiny_data.unlabelled), "--teacher_num_train_epochs", "2", "--teacher_learning_rate", "3e-3"]
    run = finished("distill", tmp_path / "out", *words, "--save_predictions", "true")
    distilled, control = run.arm("distilled"), run.arm("control")
    assert distilled["details"]["steps"] == control["details"]["steps"] == 4 * (-(-360 // 32))
    config = AutoConfig.from_pretrained(run.folder)
    assert (config.model_type, config.hidden_size, config.max_tokens) == ("nlpxfer-static", 16, 30)
    table = config.vocab_size * 16
    assert distilled["parameters"] == table + 16 * 4 + 4
    assert distilled["details"]["trained_parameters"] == distilled["parameters"]  # embeddings are not frozen
    assert distilled["metrics"]["validation"]["accuracy"] > 0.5
    found = run.report["checks"]["int8"]
    assert found["bytes"] < 0.5 * found["float32_bytes"]
    assert found["changed_share"] < 0.1
    card = (run.folder / "README.md").read_text()
    assert "static student" in card
    assert "library_name: model2vec" in card
    assert "StaticModelPipeline.from_pretrained" in card
    assert "without the order of its words" in card
    assert {"head.safetensors", "modules.json"} <= finished_files(run.folder).keys()
    assert Classifier.load(str(run.folder), int8=True).backend.checkpoint.model.is_int8
    assert not Classifier.load(str(run.folder)).backend.checkpoint.model.is_int8
    expected = [line["predicted"] for line in run.logits_of()]
    for words, most in (((), 0), (("--int8",), found["changed_share"] * 80 + 4)):
        output = tmp_path / f"labelled{len(words)}.csv"
        with pytest.raises(SystemExit) as leaving:
            main(["predict", str(run.folder), str(tiny_data.test), "--output_file", str(output), *words])
        assert leaving.value.code == 0
        with output.open() as file:
            answers = [row["predicted_label"] for row in csv.DictReader(file)]
        assert sum(one != other for one, other in zip(answers, expected, strict=True)) <= most


def test_the_control_starts_from_the_pretrained_checkpoint(tiny_data, teacher, tiny_checkpoint, tmp_path):
    """Taught by labels alone and for one step, the two arms differ in nothing but where their tables come from."""
    words = taught(tiny_data, teacher, "--student", "static", "--static_dim", "32", "--max_steps", "1")
    alike = finished("distill", tmp_path / "alike", *words, "--kd_weight", "0")
    assert alike.arm("control")["metrics"] == alike.arm("distilled")["metrics"]
    pretrained = tiny_checkpoint("bert", kind="classifier", seed=9)
    words += ["--model_name_or_path", str(pretrained), "--kd_weight", "0"]
    other = finished("distill", tmp_path / "other", *words)
    assert other.arm("control")["metrics"] != other.arm("distilled")["metrics"]
    assert other.arm("distilled")["metrics"] == alike.arm("distilled")["metrics"]


@pytest.mark.parametrize(("words", "share"), [(["--student", "static"], 0.5), (["--student_num_layers", "1"], 0.9)])
def test_labels_count_more_for_a_static_student(tiny_data, teacher, tmp_path, words, share):
    words = taught(tiny_data, teacher, *words, "--control_arm", "false", "--max_steps", "2")
    run = finished("distill", tmp_path / "out", *words)
    weights = {name: term["weight"] for name, term in run.report["checks"]["preflight"]["terms"].items()}
    assert weights == {"label": pytest.approx(1 - share), "soft_target": share}
    assert run.run["config"]["kd_weight"] == share


def test_the_shape_of_a_static_student_is_searched(tiny_data, teacher, tmp_path):
    pytest.importorskip("optuna")
    words = taught(tiny_data, teacher, "--student", "static", "--static_dim", "{choices: [4, 16]}")
    words += ["--num_trials", "2", "--static_num_train_epochs", "2", "--control_arm", "false"]
    run = finished("distill", tmp_path / "out", *words)
    search = run.report["search"]
    assert {trial["options"]["static_dim"] for trial in search["trials"]} <= {4, 16}
    best = search["best"]["options"]["static_dim"]
    assert run.run["config"]["static_dim"] == AutoConfig.from_pretrained(run.folder).hidden_size == best
    assert run.arm("distilled")["details"]["steps"] == 2 * 8


REFUSED = {
    "unknown kind": (["--student", "tiny"], "student: 'tiny' is not one of layers, static"),
    "layers": (["--student", "static", "--student_num_layers", "2"], "student_num_layers: a static student has no"),
    "checkpoint": (["--student", "static", "--student_name_or_path", "x"], "student_name_or_path: a static student"),
    "too wide": (["--student", "static", "--static_dim", "33"], "static_dim: 33 is more than the 32 numbers"),
    "no dim": (["--student", "static", "--static_dim", "0"], "static_dim: 0 is below 1"),
    "not static": (["--static_dim", "8"], "static_dim: has no effect without --student static"),
    "mean": (["--student", "static", "--pooling", "mean"], "pooling: does nothing for a static student"),
    "range of epochs": (
        ["--student", "static", "--num_train_epochs", "{choices: [1, 3]}", "--num_trials", "2"],
        "num_train_epochs: for a static student it is static_num_train_epochs",
    ),
    "range of means": (
        ["--student", "static", "--pooling", "{choices: [auto, mean]}", "--num_trials", "2"],
        "pooling: does nothing for a static student",
    ),
    "range of decays": (
        ["--student", "static", "--layer_decay", "{choices: [1.0, 0.5]}", "--num_trials", "2"],
        "layer_decay: a static student has no layers",
    ),
    "generations of unlike shapes": (
        ["--generations", "2", "--student_num_layers", "{choices: [1, 3]}", "--num_trials", "2"],
        "student_num_layers: cannot be searched beside generations",
    ),
    "an assistant below a searched student": (
        ["--assistant_num_layers", "2", "--student_num_layers", "{choices: [1, 3]}", "--num_trials", "2"],
        "assistant_num_layers: 2 is not above the 3 layers of the student",
    ),
    "top layers": (["--student", "static", "--num_trained_layers", "1"], "num_trained_layers: a static student has"),
    "epochs": (
        ["--student", "static", "--num_train_epochs", "3"],
        "num_train_epochs: for a static student it is static_num_train_epochs",
    ),
    "epochs beside steps": (
        ["--student", "static", "--static_num_train_epochs", "3", "--max_steps", "5"],
        "static_num_train_epochs: does nothing beside max_steps",
    ),
    "a range beside steps": (
        [
            "--student",
            "static",
            "--static_num_train_epochs",
            "{choices: [5, 3]}",
            "--max_steps",
            "5",
            "--num_trials=2",
        ],
        "static_num_train_epochs: does nothing beside max_steps",
    ),
    "epochs beside a range of steps": (
        ["--student", "static", "--static_num_train_epochs=3", "--max_steps", "{choices: [5, 3]}", "--num_trials=2"],
        "static_num_train_epochs: does nothing beside max_steps",
    ),
    "width": (["--student_hidden_size", "20"], "student_hidden_size: 20 is not one of 8, 16, 24, 32"),
    "neurons": (["--student_intermediate_size", "65"], "student_intermediate_size: 65 is not between 1 and the 64"),
    "width of a checkpoint": (
        ["--student_hidden_size", "16", "--student_name_or_path", "x"],
        "student_name_or_path: it cannot be combined with student_hidden_size",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_meaning_is_refused(name, tiny_data, teacher, tmp_path):
    words, message = REFUSED[name]
    assert message in refused("distill", tmp_path / "out", *taught(tiny_data, teacher, *words))


def pair_words(folder):
    """Options of a run on pairs of texts."""
    rows = [{"a": f"bread {i}", "b": "guitar", "label": "xy"[i % 2]} for i in range(40)]
    for name in ("train", "test", "validation"):
        lines = [json.dumps({**row, "a": f"{name} {row['a']}"}) for row in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    words = [f for name in ("train", "test", "validation") for f in (f"--{name}_file", folder / f"{name}.jsonl")]
    return [*words, "--text_column", "a", "--text_pair_column", "b", "--max_length", "32", "--bf16", "false"]


def test_pairs_are_refused_for_a_static_student(tiny_checkpoint, tmp_path):
    words = [*pair_words(tmp_path), "--student", "static", "--model_name_or_path", tiny_checkpoint("bert")]
    assert "text_pair_column: a mean over tokens" in refused("distill", tmp_path / "out", *words)
    static = tmp_path / "static"
    source = load_classifier(str(tiny_checkpoint("bert", "classifier")), schema=LabelSchema(("x", "y")), head="new")
    plan = {"dim": 8, "hidden_layer": False, "normalize": False, "max_length": 32}
    made = static_student(source, token_states(source), np.ones(len(source.tokenizer)), StaticPlan(**plan), seed=1)
    save_classifier(made.model, made.tokenizer, LabelSchema(("x", "y")), static)
    words[words.index("--student") : words.index("--student") + 2] = ["--student_name_or_path", str(static)]
    assert "text_pair_column: a mean over tokens" in refused("distill", tmp_path / "out", *words)
    at = words.index("--model_name_or_path")
    words[at : at + 2] = ["--self_distillation", "ema"]
    assert "text_pair_column: a mean over tokens" in refused("distill", tmp_path / "out", *words)


def test_layers_picked_by_probes(tiny_data, teacher, tmp_path):
    words = taught(tiny_data, teacher, "--student_layers", "probe", "--student_num_layers", "2")
    run = finished("distill", tmp_path / "out", *words)
    found = run.report["checks"]["student_layers"]
    gone = [step["layer"] for step in found["removed"]]
    assert sorted([*found["layers"], *gone]) == [0, 1, 2, 3]
    assert [len(step["loss_without"]) for step in found["removed"]] == [4, 3]
    assert found["fit_rows"] + found["held_out_rows"] == 240
    assert AutoConfig.from_pretrained(run.folder).num_hidden_layers == 2
    again = finished("distill", tmp_path / "again", *words, "--control_arm", "false")
    assert again.report["checks"]["student_layers"] == found


def test_even_or_bottom_layers_by_a_trial_of_both(tiny_data, teacher, tmp_path, monkeypatch, caplog):
    """30 steps in all: 8 of each trial. The better one is trained whole, and so is its control."""
    caplog.set_level("INFO", logger="nlpxfer")
    asked, real = [], layer_trial.short_run

    def short_run(arm, folder, *, steps):
        asked.append((folder.name, steps, real(arm, folder, steps=steps)))
        return asked[-1][2]

    monkeypatch.setattr(layer_trial, "short_run", short_run)
    words = taught(tiny_data, teacher, "--student_layers", "trial", "--student_num_layers", "2", "--max_steps", "30")
    run = finished("distill", tmp_path / "out", *words)
    found, scores = run.report["checks"]["student_layers"], {name: score for name, _, score in asked}
    assert [(name, steps) for name, steps, _ in asked] == [("even", 8), ("bottom", 8)]
    chosen = max(scores, key=scores.get)
    layers = {"even": [0, 3], "bottom": [0, 1]}[chosen]
    assert found == {"chosen": chosen, "layers": layers, "steps": 8, "scores": scores}
    assert caplog.text.count(f"Kept layers {layers} of 4") >= 3
    assert run.run["config"]["student_layers"] == chosen
    assert not (run.folder / "checkpoints").exists()
    words[words.index("trial")] = chosen
    plain = finished("distill", tmp_path / "plain", *words)
    assert plain.arm("distilled")["metrics"] == run.arm("distilled")["metrics"]
    assert plain.arm("control")["metrics"] == run.arm("control")["metrics"]


@pytest.mark.parametrize(
    ("metric", "scores", "chosen"),
    [("accuracy", (0.5, 0.5), "even"), ("accuracy", (0.5, 0.6), "bottom"), ("loss", (0.5, 0.6), "even")],
)
def test_the_better_score_of_a_trial_wins(metric, scores, chosen, tiny_data, teacher, tmp_path, monkeypatch):
    left = list(scores)
    monkeypatch.setattr(layer_trial, "short_run", lambda *arm, **steps: left.pop(0))
    words = taught(tiny_data, teacher, "--student_layers", "trial", "--student_num_layers", "2", "--max_steps", "1")
    words += ["--metric_for_best_model", metric, "--control_arm", "false"]
    run = finished("distill", tmp_path / "out", *words)
    assert run.report["checks"]["student_layers"]["chosen"] == chosen
    left[:] = []  # one layer is the first one either way: there is nothing to try
    words[words.index("--student_num_layers") + 1] = "1"
    run = finished("distill", tmp_path / "one", *words)
    assert run.report["checks"]["student_layers"] == {"chosen": "even", "layers": [0]}


def test_a_trial_counts_steps_as_the_training_has_them(tiny_data, teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(layer_trial, "short_run", lambda *arm, **steps: 0.5)
    words = taught(tiny_data, teacher, "--student_layers", "trial", "--student_num_layers", "2")
    words += ["--dataloader_drop_last", "true", "--gradient_accumulation_steps", "2", "--control_arm", "false"]
    words += ["--per_device_train_batch_size", "50"]
    words[words.index("--num_train_epochs") + 1] = "4"
    run = finished("distill", tmp_path / "out", *words)
    assert run.arm("distilled")["details"]["steps"] == 4 * 2  # 4 whole batches of 50 in 240 rows
    assert run.report["checks"]["student_layers"]["steps"] == 2


def test_a_trial_that_ends_before_the_first_evaluation_is_scored_at_its_end(tiny_data, teacher, tmp_path):
    words = taught(tiny_data, teacher, "--student_layers", "trial", "--student_num_layers", "2", "--eval_delay", "1")
    words[words.index("--num_train_epochs") + 1] = "2"
    run = finished("distill", tmp_path / "out", *words, "--control_arm", "false")
    assert set(run.report["checks"]["student_layers"]["scores"]) == {"even", "bottom"}
    assert len([line for line in run.arm("distilled")["details"]["history"] if "eval_accuracy" in line]) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--student", "static", "--static_num_train_epochs", "1", "--eval_delay", "2"],
            "eval_delay: 2 is beyond the end of the training, after 1 epochs",
        ),
        (
            ["--dataloader_drop_last", "true", "--per_device_train_batch_size", "250"],
            "240 training rows make no whole batch of 250",  # of the control
        ),
    ],
)
def test_each_training_of_a_run_is_looked_at(words, message, tiny_data, teacher, tmp_path):
    own = taught(tiny_data, teacher, "--unlabelled_file", str(tiny_data.unlabelled), *words)
    assert message in refused("distill", tmp_path / "out", *own)
    if "--student" not in words:
        run = finished("distill", tmp_path / "out", *own, "--control_arm", "false")
        assert run.arm("distilled")["details"]["steps"] == 1


def test_a_teacher_that_ends_before_its_first_evaluation_is_refused(tiny_data, tiny_checkpoint, tmp_path):
    words = [*tiny_words(tiny_data, tiny_checkpoint("bert"), epochs=3), "--teacher_num_train_epochs", "1"]
    message = refused("distill", tmp_path / "out", *words, "--eval_delay", "2")
    assert "eval_delay: 2 is beyond the end of the training, after 1 epochs" in message


def test_a_student_that_stops_early_and_its_control_start_alike(tiny_data, teacher, tmp_path, monkeypatch):
    sizes, real = [], arms_module.start_from_linear_probe_

    def probe(*arguments, **options):
        sizes.append(options["size"])
        return real(*arguments, **options)

    monkeypatch.setattr(arms_module, "start_from_linear_probe_", probe)
    words = taught(tiny_data, teacher, "--student_num_layers", "2", "--early_stopping_patience", "1")
    words[words.index("--num_train_epochs") + 1] = "8"  # 64 steps: enough for a small head
    words += ["--transfer_curve", "0,all", "--unlabelled_file", str(tiny_data.unlabelled)]
    run = finished("distill", tmp_path / "out", *words)
    arms = [run.arm(name) for name in ("distilled", "control", "distilled, 0 unlabelled")]
    assert arms[0]["details"]["steps"] < 60
    assert sizes == [0.02] * 3
    assert "up to as many steps, without a teacher" in arms[1]["description"]


@pytest.mark.parametrize(
    ("plan", "sizes"),
    [
        (["--student_layers", "probe", "--student_num_layers", "3", "--student_hidden_size", "16"], {20}),
        (["--student", "static", "--static_dim", "8"], {20, 16 * 20}),
    ],
)
def test_no_batch_is_larger_than_was_asked_for(plan, sizes, tiny_data, teacher, tmp_path, monkeypatch):
    """Of the rows that say what a student keeps of its teacher; lone tokens come in sixteen times as large ones."""
    asked, seen = [], []
    batches, parts = predict_module.batches_by_length, students.parts_by_activation
    monkeypatch.setattr(
        predict_module, "batches_by_length", lambda lengths, size: asked.append(size) or batches(lengths, size)
    )

    def parts_by_activation(model, sample, widths):
        sample = list(sample)
        seen.extend(len(batch["input_ids"]) for batch in sample)
        return parts(model, sample, widths)

    monkeypatch.setattr(students, "parts_by_activation", parts_by_activation)
    own = taught(tiny_data, teacher, *plan, "--control_arm", "false", "--per_device_eval_batch_size", "20")
    finished("distill", tmp_path / "out", *own)
    assert set(asked) == sizes
    assert max(seen, default=20) == 20


def test_a_static_teacher_has_no_layers_to_keep(tiny_data, teacher, tmp_path):
    words = taught(tiny_data, teacher, "--student", "static", "--static_dim", "8", "--control_arm", "false")
    finished("distill", tmp_path / "static", *words)
    message = refused("distill", tmp_path / "out", *taught(tiny_data, tmp_path / "static"))
    assert "has no layers that a student could keep; static models have none" in message


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--search", "true"], "student_layers: search tries students of several kinds; leave it out"),
        (["--self_distillation", "ema"], "student_layers: trial cannot be combined with self_distillation"),
        (["--generations", "2"], "student_layers: trial cannot be combined with generations"),
        (["--student_num_layers", "{low: 1, high: 2}", "--num_trials", "2"],
         "student_num_layers: cannot be searched beside student_layers trial"),
    ],
)  # fmt: skip
def test_trials_of_layers_that_are_refused(words, message, tiny_data, teacher, tmp_path):
    words = taught(tiny_data, teacher, "--student_layers", "trial", *words)
    assert message in refused("distill", tmp_path / "out", *words)


def test_a_narrow_student_of_some_layers(tiny_data, teacher, tmp_path):
    words = taught(tiny_data, teacher, "--student_layers", "0,3", "--student_hidden_size", "16")
    run = finished("distill", tmp_path / "out", *words, "--student_intermediate_size", "20")
    config = AutoConfig.from_pretrained(run.folder)
    sizes = config.num_hidden_layers, config.hidden_size, config.num_attention_heads, config.intermediate_size
    assert sizes == (2, 16, 2, 20)
    assert run.arm("distilled")["parameters"] == run.arm("control")["parameters"]


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("probe_layers", ["--student_layers", "probe", "--student_num_layers", "3"]),
        ("parts_by_activation", ["--student_num_layers", "1", "--student_hidden_size", "24"]),
    ],
)
def test_the_control_is_cut_where_the_teacher_says(
    function, words, tiny_data, teacher, tiny_checkpoint, tmp_path, monkeypatch
):
    """What is kept is chosen once, by looking at the teacher: not once more for the control's own checkpoint."""
    asked, original = [], getattr(students, function)

    def spy(source, *arguments, **options):
        asked.append(source)
        return original(source, *arguments, **options)

    monkeypatch.setattr(students, function, spy)
    pretrained = tiny_checkpoint("bert", kind="classifier", seed=9)
    words = taught(tiny_data, teacher, "--model_name_or_path", str(pretrained), "--max_steps", "1", *words)
    run = finished("distill", tmp_path / "out", *words)
    assert len(asked) == 1
    model = getattr(asked[0], "model", asked[0])
    reference = AutoModelForSequenceClassification.from_pretrained(teacher)
    table = reference.bert.embeddings.word_embeddings.weight
    assert torch.equal(model.bert.embeddings.word_embeddings.weight, table)
    assert run.arm("control")["parameters"] == run.arm("distilled")["parameters"]


def test_a_layer_that_computes_a_mean_is_one_of_the_layers_with_pooling_own(tiny_data, tiny_checkpoint, tmp_path):
    """The control's checkpoint has no such layer until it gets one: the same layers are kept of both."""
    words = [*tiny_words(tiny_data, tiny_checkpoint("bert")), "--control_arm", "false", "--pooling", "mean"]
    teacher = finished("finetune", tmp_path / "teacher", *words).folder
    words = taught(tiny_data, teacher, "--pooling", "own", "--student_num_layers", "2", "--max_steps", "2")
    run = finished("distill", tmp_path / "out", *words)
    assert run.arm("control")["parameters"] == run.arm("distilled")["parameters"]
    assert json.loads((run.folder / "config.json").read_text())["num_hidden_layers"] == 2


def test_layers_are_probed_for_each_pooling(tiny_data, teacher, tmp_path, monkeypatch):
    asked, original = [], students.probe_layers

    def spy(source, *arguments, mean_pooling, **options):
        asked.append(mean_pooling)
        return original(source, *arguments, mean_pooling=mean_pooling, **options)

    monkeypatch.setattr(students, "probe_layers", spy)
    words = taught(tiny_data, teacher, "--student_layers", "probe", "--student_num_layers", "1", "--max_steps", "2")
    words += ["--pooling", "{choices: [own, mean]}", "--num_trials", "2", "--control_arm", "false"]
    finished("distill", tmp_path / "out", *words)
    assert sorted(asked) == [False, True]


def run_of(options):
    """What the learning rate of a student is decided by."""
    return SimpleNamespace(options=options, once=lambda key, compute: compute())


@pytest.mark.parametrize(
    ("plan", "width", "rate", "more"),
    [
        (StudentOptions(student="static", static_num_train_epochs=3), 768, 0.01, {"num_train_epochs": 3}),
        (StudentOptions(student_num_layers=3), 384, 3e-4, {}),
        (StudentOptions(student_num_layers=3), 768, 5e-5, {}),
        (StudentOptions(student_hidden_size=384), 768, 3e-4, {}),
        (StudentOptions(student_name_or_path="NARROW"), 768, 3e-4, {}),
    ],
)
def test_students_learn_at_rates_of_their_own(plan, width, rate, more, tiny_checkpoint):
    if plan.student_name_or_path:
        plan = replace(plan, student_name_or_path=str(tiny_checkpoint("distilbert")))
    for asked, used in ((None, rate), (0.5, 0.5)):
        found = students.training_of(run_of(RunOptions(learning_rate=asked)), plan, SimpleNamespace(hidden_size=width))
        assert found == {"learning_rate": used, **more}


def test_a_rate_that_a_search_draws_is_the_students():
    """A static student's own default once hid the drawn one."""
    options, _ = with_values(RunOptions(), StudentOptions(), {"learning_rate": 0.5})
    found = students.training_of(run_of(options), StudentOptions(student="static"), SimpleNamespace(hidden_size=384))
    assert found["learning_rate"] == 0.5


def test_a_family_whose_parts_are_not_known_is_refused(tiny_data, tiny_checkpoint, tmp_path):
    words = taught(tiny_data, tiny_checkpoint("qwen2", kind="classifier"), "--student_hidden_size", "16")
    assert "cannot be made narrower" in refused("distill", tmp_path / "out", *words)


# -- int8


def test_a_student_in_int8_is_measured_kept_and_usable(tiny_data, teacher, tmp_path):
    words = taught(tiny_data, teacher, "--student_num_layers", "2", "--student_int8", "true")
    run = finished("distill", tmp_path / "out", *words, "--min_retention", "0.01")
    plain, small = run.arm("distilled"), run.arm("distilled, int8")
    assert (small["parameters"], small["seconds"]) == (plain["parameters"], 0.0)
    assert small["bytes"] == (run.folder / "onnx" / "model_int8.onnx").stat().st_size < plain["bytes"]
    assert small["latency"]["one_row"]["p50_ms"] > 0
    exported = json.loads((run.folder / "onnx" / "export.json").read_text())
    assert {arm["latency"]["threads"] for arm in run.report["arms"] if arm["latency"]} == {1}, "--num_threads 1"
    assert exported["speed"]["threads"] == 1
    found = evaluate_file(Classifier.load(str(run.folder / "onnx"), int8=True), tiny_data.test)
    assert found["accuracy"] == pytest.approx(small["metrics"]["test"]["accuracy"])
    for name in ("run.json", "calibration.json"):
        assert (run.folder / "onnx" / name).read_bytes() == (run.folder / name).read_bytes()
    checks = run.report["checks"]
    assert (checks["int8"]["bytes"], checks["int8"]["float32_bytes"]) == (small["bytes"], plain["bytes"])
    assert checks["int8"]["rows"] == 80
    assert list(checks["retention"]["students"]) == ["distilled", "distilled, int8", "control"]
    assert not (run.folder / "checkpoints").exists()
    assert "onnx/model_int8.onnx" not in finished_files(run.folder)
    again = finished("distill", tmp_path / "out", *words, "--overwrite", "true", "--control_arm", "false")
    assert (again.folder / "onnx" / "export.json").is_file()


def test_a_student_of_pairs_in_int8(tiny_checkpoint, tmp_path):
    words = [*pair_words(tmp_path), "--model_name_or_path", str(tiny_checkpoint("bert")), "--max_steps", "2"]
    words += ["--student_num_layers", "2", "--student_int8", "true", "--control_arm", "false", "--num_threads", "1"]
    run = finished("distill", tmp_path / "out", *words)
    assert run.arm("distilled, int8")["metrics"]["test"]["loss"] > 0
    asked = {"text_column": "a", "text_pair_column": "b"}
    found = evaluate_file(Classifier.load(str(run.folder / "onnx"), int8=True), tmp_path / "test.jsonl", **asked)
    assert found["accuracy"] == pytest.approx(run.arm("distilled, int8")["metrics"]["test"]["accuracy"])


def test_the_gate_asks_the_int8_form_too(tiny_data, teacher, tmp_path, monkeypatch):
    import nlpxfer.verdict

    plain = nlpxfer.verdict.retained
    calls = []

    def retained(answers, *rest):
        calls.append(answers)
        found = plain(answers, *rest)
        return found | {"score": found["score"] | {"value": 0.5 if len(calls) == 2 else 0.9}}

    monkeypatch.setattr(nlpxfer.verdict, "retained", retained)
    words = taught(tiny_data, teacher, "--student_int8", "true", "--max_steps", "1", "--min_retention", "0.8")
    ended = call("distill", tmp_path / "out", *words)
    assert ended.code == 3
    assert "in int8 the share of the teacher's test accuracy is 0.5000, below min_retention 0.8" in ended.err
    assert ended.err.count("below min_retention") == 1


def test_int8_where_it_means_nothing(tiny_data, teacher, tmp_path):
    words = taught(tiny_data, teacher, "--student_int8", "true", "--search")
    assert "student_int8: search tries" in refused("distill", tmp_path / "out", *words)


def test_a_static_student_in_int8_is_measured_and_needs_no_onnx(tiny_data, teacher, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    words = taught(tiny_data, teacher, "--student", "static", "--student_int8", "true", "--control_arm", "false")
    run = finished("distill", tmp_path / "out", *words)
    plain, small = run.arm("distilled"), run.arm("distilled, int8")
    assert small["parameters"] == plain["parameters"]
    assert small["bytes"] < plain["bytes"] / 2
    found = evaluate_file(Classifier.load(str(run.folder), int8=True), tiny_data.test)
    assert found["accuracy"] == pytest.approx(small["metrics"]["test"]["accuracy"])
    checks = run.report["checks"]
    assert (checks["int8"]["bytes"], checks["int8"]["float32_bytes"]) == (small["bytes"], plain["bytes"])
    assert list(checks["retention"]["students"]) == ["distilled", "distilled, int8"]


def test_int8_needs_packages_and_says_so_before_any_work(tiny_data, teacher, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    told = refused("distill", tmp_path / "out", *taught(tiny_data, teacher, "--student_int8", "true"))
    assert "Exporting needs onnxscript" in told
    assert not (tmp_path / "out").exists()
