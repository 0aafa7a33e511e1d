"""Recipes from end to end on tiny models: each option does what it says, and the folder keeps its contract."""

import gc
import hashlib
import json
import logging
import shutil
import sys
import weakref

import numpy as np
import pytest
import torch
from processes import python
from processes import run as run_program
from recipe_runs import KEYS, RANDOM, call, finished, refused, tiny_words
from tiny import LABELS, build_checkpoint, make_rows, write_csv
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from nlpxfer.checkpoint.save import held
from nlpxfer.config import RunOptions
from nlpxfer.start import _show_progress, _Terminal
from nlpxfer.train.trainer import TransferTrainer

PLAIN_FILES = {
    "README.md",
    "calibration.json",
    "config.json",
    "confusion.png",
    "labels.json",
    "model.safetensors",
    "per_class.png",
    "report.json",
    "run.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("NLPXFER_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def bert(tiny_checkpoint):
    return tiny_checkpoint("bert")


@pytest.fixture(scope="module")
def teacher(tiny_checkpoint, tiny_data, tmp_path_factory):
    """A classifier fine-tuned by the recipe."""
    folder = tmp_path_factory.mktemp("teacher") / "bert"
    words = tiny_words(tiny_data, tiny_checkpoint("bert"), epochs=3, rate="3e-3")
    return finished("finetune", folder, *words, "--control_arm", "false").folder


def distil(tiny_data, folder, teacher, *words):
    plan = tiny_words(tiny_data)
    return finished("distill", folder, *plan, "--teacher_name_or_path", teacher, *words)


def sha256(folder):
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def relabelled(teacher, folder, order):
    """The same classifier with its columns in another order, named accordingly."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(teacher, folder)
    config = json.loads((folder / "config.json").read_text())
    names = [config["id2label"][str(i)] for i in order]
    config["id2label"] = {str(i): name for i, name in enumerate(names)}
    config["label2id"] = {name: i for i, name in enumerate(names)}
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    for name in ("classifier.weight", "classifier.bias"):
        weights[name] = weights[name][torch.tensor(order)].contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("key", KEYS)
def test_the_folder_keeps_the_contract(key, tiny_data, bert, tmp_path):
    run = finished(key, tmp_path / "runs" / "out", *tiny_words(tiny_data, bert, key=key))
    found = {path.name for path in run.folder.iterdir()}
    assert found == PLAIN_FILES | {"distill": {"teacher"}, "adapters": {"adapter"}}.get(key, set())
    for path in run.folder.rglob("*"):
        assert path.name not in ("training_args.bin", "optimizer.pt", "manifest.json")
        if path.suffix in (".json", ".md", ".safetensors"):
            for place in (str(tmp_path), str(tiny_data.folder), str(bert)):
                assert place.encode() not in path.read_bytes(), path.name
    report = run.report
    assert report["recipe"] == key
    assert report["data"]["rows"] == {"train": 240, "validation": 80, "test": 80}
    assert report["cost"]["tokens"] > 0
    assert run.run["config"].get("learning_rate") == (None if key == "features" else 1e-3)
    assert report["checks"]["precision"] == {"bf16": False, "speed_up": None, "chosen_by": "user"}
    assert str(run.folder / "report.json") in run.out


def test_arms_of_finetune(tiny_data, bert, tmp_path):
    run = finished("finetune", tmp_path / "out", *tiny_words(tiny_data, bert))
    report = run.report
    assert [arm["name"] for arm in report["arms"]] == ["fine-tuned", "no transfer (TF-IDF)", "majority class"]
    assert report["verdict"]["versus"] == "no transfer (TF-IDF)"
    difference = (
        run.arm("fine-tuned")["metrics"]["test"]["accuracy"] - report["arms"][1]["metrics"]["test"]["accuracy"]
    )
    assert report["verdict"]["gain"] == pytest.approx(difference)
    assert report["metrics"] == run.arm("fine-tuned")["metrics"]


def test_a_teacher_on_the_spot(tiny_data, bert, tmp_path):
    run = finished("distill", tmp_path / "out", *tiny_words(tiny_data, bert))
    report = run.report
    assert [arm["name"] for arm in report["arms"]] == ["teacher", "control", "distilled", "majority class"]
    assert report["verdict"]["treated"] == "distilled"
    assert run.arm("control")["parameters"] == run.arm("distilled")["parameters"] < run.arm("teacher")["parameters"]
    steps = {arm["name"]: arm["details"]["steps"] for arm in report["arms"][:3]}
    assert steps == {"teacher": 8, "control": 8, "distilled": 8}
    assert (
        set(report["checks"]["speed_ratio"]) == {"distilled/teacher", "control/teacher"}
        or report["checks"]["speed_ratio"]
    )
    kept = run.arm("distilled")["metrics"]["test"]["accuracy"] / run.arm("teacher")["metrics"]["test"]["accuracy"]
    assert report["checks"]["teacher"]["retention"] == pytest.approx(kept)
    assert AutoConfig.from_pretrained(run.folder).num_hidden_layers == 2
    beside = AutoModelForSequenceClassification.from_pretrained(run.folder / "teacher")
    assert beside.config.num_hidden_layers == 4
    assert sorted(beside.config.label2id) == sorted(LABELS)


def test_a_teacher_from_a_folder_is_asked_once(tiny_data, teacher, tmp_path):
    before = sha256(teacher)
    first = distil(tiny_data, tmp_path / "one", teacher)
    again = distil(tiny_data, tmp_path / "two", teacher)
    assert first.report["checks"]["teacher"]["computed"] == first.report["checks"]["teacher"]["rows"] == 240
    assert again.report["checks"]["teacher"]["computed"] == 0
    assert sha256(first.folder) == sha256(again.folder)
    assert sha256(teacher) == before
    assert not (first.folder / "teacher").exists()
    assert first.arm("teacher")["metrics"] == json.loads((teacher / "report.json").read_text())["metrics"]
    assert first.run["parents"]["teacher"]["weights"] == again.run["parents"]["teacher"]["weights"]


@pytest.mark.parametrize(("words", "layers"), [(["--student_num_layers", "3", "--student_layers", "even"], [0, 1, 3]),
                                               (["--student_layers", "0,2"], [0, 2]),
                                               (["--student_num_layers", "1"], [0])])  # fmt: skip
def test_layers_of_the_student(words, layers, tiny_data, teacher, tmp_path, caplog):
    caplog.set_level("INFO", logger="nlpxfer")
    run = distil(tiny_data, tmp_path / "out", teacher, *words, "--control_arm", "false")
    assert f"Kept layers {layers} of 4" in caplog.text
    assert AutoConfig.from_pretrained(run.folder).num_hidden_layers == len(layers)


def test_a_student_of_another_family(tiny_data, tiny_checkpoint, bert, tmp_path):
    """GPT-2 teaches BERT: other weights, other tokenizer, other ids."""
    words = tiny_words(tiny_data, tiny_checkpoint("gpt2"))
    run = finished("distill", tmp_path / "out", *words, "--student_name_or_path", bert)
    assert AutoConfig.from_pretrained(run.folder).model_type == "bert"
    assert AutoConfig.from_pretrained(run.folder / "teacher").model_type == "gpt2"
    assert run.arm("control")["parameters"] == run.arm("distilled")["parameters"]


def test_the_order_of_the_teachers_labels_does_not_matter(tiny_data, teacher, tmp_path):
    other = relabelled(teacher, tmp_path / "permuted", [2, 0, 3, 1])
    assert sha256(other) != sha256(teacher)
    plain, permuted = (
        distil(tiny_data, tmp_path / name, folder, "--control_arm", "false", "--student_name_or_path", folder)
        for name, folder in (("plain", teacher), ("other", other))
    )
    assert plain.report["metrics"] == permuted.report["metrics"]
    assert sha256(plain.folder) == sha256(permuted.folder)
    sliced = [distil(tiny_data, tmp_path / f"s{i}", folder) for i, folder in enumerate((teacher, other))]
    assert sha256(sliced[0].folder) == sha256(sliced[1].folder)
    assert sliced[0].report["verdict"] == sliced[1].report["verdict"]


def test_the_control_student_starts_from_what_the_teacher_started_from(tiny_data, teacher, bert, tmp_path, caplog):
    unknown = distil(tiny_data, tmp_path / "unknown", teacher)
    known = distil(tiny_data, tmp_path / "known", teacher, "--model_name_or_path", bert)
    assert unknown.arm("control")["description"].endswith("from the teacher's own weights (bert)")
    assert "bert-base, which its run.json names, cannot be loaded, so its layers come from the teacher" in caplog.text
    assert known.arm("control")["description"].endswith("from bert-base")
    assert sha256(unknown.folder) == sha256(known.folder), "the taught student is a slice of the teacher in both"
    assert unknown.arm("control")["metrics"] != known.arm("control")["metrics"]
    other = build_checkpoint(tmp_path / "deeper", "bert", layers=5)
    words = [*tiny_words(tiny_data), "--teacher_name_or_path", teacher, "--model_name_or_path"]
    assert "did not start from" in refused("distill", tmp_path / "out", *words, other)
    message = refused("distill", tmp_path / "out", *words, bert, "--student_name_or_path", bert)
    assert "model_name_or_path: does nothing beside teacher_name_or_path and student_name_or_path" in message


@pytest.mark.parametrize("layers", [None, 5])
def test_run_json_says_what_a_teacher_started_from(tiny_data, teacher, bert, tmp_path, layers, caplog):
    """As `recipes/finetune.py` leaves it; a checkpoint that does not fit is not taken."""
    folder = shutil.copytree(teacher, tmp_path / "teacher")
    start = build_checkpoint(tmp_path / "deeper", "bert", layers=layers) if layers else bert
    foreign = {"config": {"model_name_or_path": str(start)}, "parents": {"model": "bert"}}
    (folder / "run.json").write_text(json.dumps(foreign), encoding="utf-8")
    found = distil(tiny_data, tmp_path / "found", folder)
    description = found.arm("control")["description"]
    if layers:
        assert description.endswith("from the teacher's own weights (teacher)")
        assert "which its run.json names, has other weights here" in caplog.text
    else:
        named = distil(tiny_data, tmp_path / "named", folder, "--model_name_or_path", bert)
        assert description == named.arm("control")["description"]
        assert found.arm("control")["metrics"] == named.arm("control")["metrics"]


def test_a_teacher_made_on_the_spot_is_a_folder_of_its_own(tiny_data, bert, tmp_path, caplog):
    """Its run.json says what it started from, so the control of a further student does not start from the teacher."""
    first = finished("distill", tmp_path / "first", *tiny_words(tiny_data, bert))
    written = json.loads((first.folder / "teacher" / "run.json").read_text(encoding="utf-8"))
    assert written["recipe"] == "finetune"
    assert written["config"]["max_length"] == first.run["config"]["max_length"]
    assert "student_num_layers" not in written["config"]
    written["config"]["model_name_or_path"] = str(bert)  # which is a path of this machine, and has been taken out
    for found, said in (({}, None), ({"loaded_weights": "0" * 64}, "has other weights here")):
        written["parents"]["model"].update(found)
        (first.folder / "teacher" / "run.json").write_text(json.dumps(written), encoding="utf-8")
        caplog.clear()
        second = distil(tiny_data, tmp_path / f"second{len(found)}", first.folder / "teacher")
        description = second.arm("control")["description"]
        assert description.endswith("from bert-base" if said is None else "from the teacher's own weights (teacher)")
        assert said is None or said in caplog.text


def test_unlabelled_texts_teach_the_student_and_not_the_control(tiny_data, teacher, tmp_path):
    words = ["--unlabelled_file", tiny_data.unlabelled]
    run = distil(tiny_data, tmp_path / "out", teacher, *words)
    rows = run.report["data"]["rows"]
    assert rows["unlabelled"] == 120
    assert run.report["checks"]["teacher"]["rows"] == 360
    assert run.arm("distilled")["details"]["steps"] == run.arm("control")["details"]["steps"] == 12
    without = distil(tiny_data, tmp_path / "without", teacher)
    assert without.arm("distilled")["details"]["steps"] == 8
    assert sha256(run.folder) != sha256(without.folder)


@pytest.mark.parametrize("key", KEYS)
def test_without_a_control_arm_nothing_is_claimed(key, tiny_data, bert, tmp_path):
    run = finished(key, tmp_path / "out", *tiny_words(tiny_data, bert, key=key), "--control_arm", "false")
    verdict = run.report["verdict"]
    assert (verdict["gain"], verdict["call"], verdict["reason"]) == (
        None,
        "unclear",
        "the control arm was switched off",
    )
    assert not {"control", "no transfer (TF-IDF)"} & {arm["name"] for arm in run.report["arms"]}


@pytest.mark.parametrize("key", KEYS)
def test_several_seeds_give_mean_and_spread(key, tiny_data, bert, tmp_path):
    words = [*tiny_words(tiny_data, bert, key=key), *RANDOM.get(key, []), "--linear_probe", "false"]
    words += ["--max_train_samples", "64"]
    run = finished(key, tmp_path / "out", *words, "--num_seeds", "2")
    arm = run.report["arms"][2 if key == "distill" else 0]
    per_seed = [result["metrics"]["test"]["accuracy"] for result in arm["per_seed"]]
    assert [result["seed"] for result in arm["per_seed"]] == [42, 43]
    assert arm["metrics"]["test"]["accuracy"] == pytest.approx(np.mean(per_seed))
    assert run.report["data"]["leaking_rows"] == 0
    assert run.report["checks"]["test_without_leaks"] == pytest.approx(run.report["metrics"]["test"])
    assert run.report["verdict"]["seeds"] == 2
    assert run.run["seeds"] == [42, 43]
    if key == "distill":
        assert run.arm("teacher")["per_seed"] == []
    first = finished(key, tmp_path / "one", *words)
    assert sha256(first.folder) == sha256(run.folder), "the model of the first seed is saved"


def test_predictions_are_those_of_a_pipeline_in_a_new_process(tiny_data, bert, tmp_path):
    words = [*tiny_words(tiny_data, bert, epochs=2, rate="3e-3"), "--save_predictions", "true"]
    run = finished("distill", tmp_path / "out", *words)
    found = run.logits_of("test")
    assert len(found) == 80
    assert len(run.logits_of("validation")) == 80
    right = np.mean([row["label"] == row["predicted"] for row in found])
    assert right == pytest.approx(run.report["metrics"]["test"]["accuracy"])
    program = (
        "import csv, json, sys\n"
        "from transformers import pipeline\n"
        "texts = [row['text'] for row in csv.DictReader(open(sys.argv[1]))]\n"
        "for folder in sys.argv[2:]:\n"
        "    print(json.dumps(pipeline('text-classification', folder, device='cpu')(texts)))\n"
    )
    done = run_program(python("-W", "ignore", "-c", program, tiny_data.test, run.folder, run.folder / "teacher"))
    assert done.returncode == 0, done.stderr
    student, teacher = (json.loads(line) for line in done.stdout.splitlines())
    assert [one["label"] for one in student] == [row["predicted"] for row in found]
    np.testing.assert_allclose([one["score"] for one in student], [row["probability"] for row in found], atol=1e-5)
    names = [row["label"] for row in found]
    accuracy = np.mean([one["label"] == name for one, name in zip(teacher, names, strict=True)])
    assert accuracy == pytest.approx(run.arm("teacher")["metrics"]["test"]["accuracy"])


def test_early_stopping(tiny_data, bert, tmp_path):
    """A learning rate that changes no prediction: the first evaluation stays the best, and two more end the run."""
    words = [*tiny_words(tiny_data, bert, epochs=9, rate="1e-9"), "--early_stopping_patience", "2"]
    run = finished("finetune", tmp_path / "out", *words, "--control_arm", "false")
    assert run.arm("fine-tuned")["details"]["steps"] == 3 * 8


@pytest.mark.parametrize(("metric", "steps"), [("macro_f1", 3 * 8), ("accuracy", 5 * 8)])
def test_early_stopping_follows_the_metric_that_was_named(metric, steps, tiny_data, bert, tmp_path, monkeypatch):
    """Made-up scores: accuracy only rises, macro-F1 only falls, so that two more evaluations end the run."""
    rising = iter(range(1, 6))

    def scores(problem_type, logits, labels):
        step = next(rising)
        return {"accuracy": step / 10, "macro_f1": 1 - step / 10, "loss": 1.0}

    monkeypatch.setattr("nlpxfer.evaluate.arms.task_metrics", scores)
    words = [*tiny_words(tiny_data, bert, epochs=5), "--metric_for_best_model", metric, "--linear_probe", "false"]
    words += ["--early_stopping_patience", "2", "--control_arm", "false"]
    run = finished("finetune", tmp_path / "out", *words)
    assert run.arm("fine-tuned")["details"]["steps"] == steps


def test_the_best_weights_are_kept(tiny_data, bert, tmp_path):
    words = [*tiny_words(tiny_data, bert, epochs=4, rate="3e-3"), "--control_arm", "false"]
    run = finished("finetune", tmp_path / "out", *words)
    history = [
        line["eval_accuracy"] for line in run.arm("fine-tuned")["details"]["history"] if "eval_accuracy" in line
    ]
    assert len(history) == 4
    assert run.report["metrics"]["validation"]["accuracy"] == pytest.approx(max(history))


def test_mean_pooling_adds_its_layer_and_loads_as_a_plain_class(tiny_data, bert, tmp_path):
    words = [*tiny_words(tiny_data, bert), "--pooling", "mean", "--control_arm", "false", "--save_predictions", "true"]
    run = finished("finetune", tmp_path / "out", *words)
    model = AutoModelForSequenceClassification.from_pretrained(run.folder)
    assert model.config.num_hidden_layers == 5
    assert type(model).__name__ == "BertForSequenceClassification"


def test_without_a_linear_probe(tiny_data, bert, tmp_path):
    words = [*tiny_words(tiny_data, bert), "--control_arm", "false"]
    probed, not_probed = (
        finished("finetune", tmp_path / value, *words, "--linear_probe", value) for value in ("true", "false")
    )
    assert not_probed.arm("fine-tuned")["details"]["linear_probe"] is None
    assert 0 < probed.arm("fine-tuned")["details"]["linear_probe"]["validation_accuracy"] <= 1
    assert sha256(probed.folder) != sha256(not_probed.folder)


def test_freezing_the_embeddings_is_counted(tiny_data, bert, tmp_path):
    words = [*tiny_words(tiny_data, bert), "--control_arm", "false"]
    counts = {}
    for value in ("true", "false"):
        arm = finished("finetune", tmp_path / value, *words, "--freeze_embeddings", value).arm("fine-tuned")
        counts[value] = (arm["details"]["trained_parameters"], arm["parameters"])
    assert counts["false"][0] == counts["false"][1] == counts["true"][1] > counts["true"][0]


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_text_pairs(family, tiny_checkpoint, tmp_path):
    """Whether two texts are of one topic: neither text alone can tell."""
    rows = make_rows(400, seed=4)
    pairs = [
        {"text": one["text"], "second": two["text"], "label": str(one["label"] == two["label"])}
        for one, two in zip(rows[::2], rows[1::2], strict=True)
    ]
    path = write_csv(tmp_path / "pairs.csv", pairs)
    words = ["--train_file", path, "--text_pair_column", "second", "--model_name_or_path", tiny_checkpoint(family)]
    quick = tiny_words(type("Files", (), {"train": path, "validation": path, "test": path}))
    own = [word for word in quick if word not in ("--train_file", "--validation_file", "--test_file", str(path))]
    run = finished("distill", tmp_path / "out", *own, *words)
    assert run.report["data"]["rows"] == {"train": 160, "validation": 20, "test": 20}
    assert run.report["data"]["classes"] == 2
    card = (run.folder / "README.md").read_text()
    assert "text_pair" in card
    assert "tokens of both texts together; of the longer one the end is left out first" in card


@pytest.mark.parametrize("key", KEYS)
def test_overwriting_waits_until_the_new_run_can_start(key, tiny_data, bert, tmp_path):
    first = finished(key, tmp_path / "out", *tiny_words(tiny_data, bert, key=key), "--control_arm", "false")
    before = {path.name: path.stat().st_mtime_ns for path in first.folder.iterdir()}
    words = tiny_words(tiny_data, tmp_path / "missing", key=key)
    failed = call(key, tmp_path / "out", *words, "--overwrite", "true")
    assert failed.code == 2
    assert {path.name: path.stat().st_mtime_ns for path in first.folder.iterdir()} == before
    words = [*tiny_words(tiny_data, bert, key=key), "--control_arm", "false", "--seed", "5"]
    again = finished(key, tmp_path / "out", *words, "--overwrite", "true")
    assert again.run["seeds"] == [5]


def modified(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


LATE = {
    "layers": (["--num_trained_layers", "9"], "num_trained_layers: 9 is more than the"),
    "optimizer": (["--optim", "lomo"], "optim: "),
    "schedule": (["--lr_scheduler_kwargs", '{"nonsense": 1}'], "lr_scheduler_type, lr_scheduler_kwargs: "),
    "batches": (["--dataloader_drop_last", "true", "--per_device_train_batch_size", "500"], "dataloader_drop_last: "),
    "value of the optimizer": (["--adam_epsilon", "-1"], "optim: "),
    "end of the schedule": (
        ["--lr_scheduler_type", "polynomial", "--lr_scheduler_kwargs", '{"lr_end": 1.0}'],
        "lr_scheduler_type, lr_scheduler_kwargs: ",
    ),
    "kernels": (["--use_liger_kernel", "true"], "use_liger_kernel: the package liger-kernel is not installed"),
    "compiler": (["--torch_compile_backend", "nosuch"], "torch_compile_backend, torch_compile_mode: "),
    "workers": (["--dataloader_num_workers", "-1"], "dataloader_num_workers: -1 is negative"),
    "no workers": (
        ["--dataloader_multiprocessing_context", "spawn"],
        "dataloader_multiprocessing_context: has no effect without --dataloader_num_workers 2",
    ),
    "arguments": (["--optim_args", "foo=bar"], "optim_args: 'foo=bar' has no effect on adamw"),
    "modules": (["--optim_target_modules", "foo"], "optim_target_modules: has no effect on adamw"),
    "a file": (["--accelerator_config", "nosuch.json"], "nosuch.json: "),
    "evaluations": (["--eval_delay", "9"], "eval_delay: 9 is beyond the end of the training, after "),
    "no optimizer kept": (["--save_only_model", "true"], "save_only_model: not supported: an interrupted run"),
}


@pytest.fixture(scope="module")
def overwritable(tiny_data, tiny_checkpoint, tmp_path_factory):
    words = [*tiny_words(tiny_data, tiny_checkpoint("bert")), "--control_arm", "false"]
    return finished("finetune", tmp_path_factory.mktemp("overwritable") / "out", *words)


@pytest.mark.parametrize("key", ["finetune", "distill"])
@pytest.mark.parametrize("fault", LATE)
def test_what_cannot_be_trained_costs_no_finished_run(key, fault, overwritable, tiny_data, bert):
    before, (words, message) = modified(overwritable.folder), LATE[fault]
    ended = call(key, overwritable.folder, *tiny_words(tiny_data, bert), *words, "--overwrite", "true")
    assert ended.code == 2, ended.err
    assert ended.err.startswith(message)
    assert modified(overwritable.folder) == before


@pytest.mark.parametrize("written", ["{},", " {}", "{} ,"])
def test_a_teacher_in_the_folder_is_found_however_it_is_written(written, overwritable, tiny_data, bert):
    before = modified(overwritable.folder)
    words = [*tiny_words(tiny_data), "--teacher_name_or_path", written.format(overwritable.folder)]
    ended = call("distill", overwritable.folder, *words, "--overwrite", "true")
    assert ended.code == 2, ended.err
    assert "holds what the run reads: --teacher_name_or_path." in ended.err
    assert modified(overwritable.folder) == before


@pytest.mark.parametrize(
    ("key", "option"),
    [("finetune", "model_name_or_path"), ("adapters", "model_name_or_path"), ("features", "model_name_or_path")]
    + [("distill", name) for name in ("model_name_or_path", "teacher_name_or_path", "student_name_or_path")],
)
def test_a_run_does_not_overwrite_its_own_parent(key, option, overwritable, tiny_data, bert):
    before = modified(overwritable.folder)
    words = tiny_words(tiny_data, None if option == "model_name_or_path" else bert, key=key)
    words += [f"--{option}", str(overwritable.folder), "--overwrite", "true"]
    ended = call(key, overwritable.folder, *words)
    assert ended.code == 2, ended.err
    assert f"holds what the run reads: --{option}." in ended.err
    assert modified(overwritable.folder) == before


@pytest.mark.parametrize("second", [[], ["--overwrite", "true"], ["--resume_from_checkpoint", "true"]])
def test_a_folder_that_another_run_writes_to(second, tiny_data, bert, tmp_path):
    (tmp_path / "out").mkdir()
    with held(tmp_path / "out"):
        assert "Another run is writing" in refused("finetune", tmp_path / "out", *tiny_words(tiny_data, bert), *second)
    finished("finetune", tmp_path / "out", *tiny_words(tiny_data, bert), *second)


@pytest.mark.processes
def test_two_runs_do_not_share_a_folder(tiny_data, bert, tmp_path, monkeypatch):
    """The second starts while the first trains; the first goes on as if nothing had been."""
    words, others = tiny_words(tiny_data, bert), []
    own = ["recipes/finetune.py", *words, "--output_dir", tmp_path / "out", "--overwrite", "true"]
    plain = TransferTrainer.training_step

    def training_step(self, *arguments, **options):
        if not others:
            others.append(run_program(python(*own)))
        return plain(self, *arguments, **options)

    monkeypatch.setattr(TransferTrainer, "training_step", training_step)
    finished("finetune", tmp_path / "out", *words)
    assert others[0].returncode == 2
    assert "Another run is writing to the output folder" in others[0].stderr


def test_a_finished_run_is_not_resumed(tiny_data, bert, tmp_path):
    words = [*tiny_words(tiny_data, bert), "--control_arm", "false"]
    first = finished("finetune", tmp_path / "out", *words)
    before = sha256(first.folder)
    again = call("finetune", tmp_path / "out", *words, "--resume_from_checkpoint", "true")
    assert again.code == 2
    assert "is finished" in again.err
    assert sha256(first.folder) == before


def test_the_bundled_data_are_announced(tmp_path, bert, caplog):
    """Nothing is trained: the model's folder is missing, but what the data would be is said first."""
    caplog.set_level("INFO", logger="nlpxfer")
    refused("finetune", tmp_path / "out", "--model_name_or_path", tmp_path / "missing", "--max_length", "32")
    assert "using the bundled set debian-sections" in caplog.text


def test_a_student_that_cannot_be_made_is_refused_before_the_teacher_is_trained(tiny_data, bert, tmp_path, caplog):
    words = tiny_words(tiny_data, bert)
    caplog.set_level("INFO", logger="nlpxfer")
    message = refused("distill", tmp_path / "out", *words, "--student_layers", "0,9")
    assert "the model has 0 to 3" in message
    wide = build_checkpoint(tmp_path / "short", "bert", max_position_embeddings=16)
    message = refused("distill", tmp_path / "other", *words, "--student_name_or_path", wide)
    assert "max_length: 32 is longer than the 16 tokens" in message
    assert "seed 42" not in caplog.text


RECOMPUTE = "activation_checkpointing" if hasattr(RunOptions, "activation_checkpointing") else "gradient_checkpointing"
TRAINING_OPTIONS = {
    "steps": ["--max_steps", "3"],
    "score every two steps": "--eval_strategy steps --eval_steps 2 --save_strategy steps --save_steps 2".split(),
    "never score": ["--eval_strategy", "no", "--save_strategy", "no", "--load_best_model_at_end", "false"],
    "save the best": ["--save_strategy", "best"],
    "save one": ["--save_total_limit", "1"],
    "best by loss": ["--metric_for_best_model", "loss"],
    "best by macro-F1": ["--metric_for_best_model", "macro_f1"],
    "random batches": ["--train_sampling_strategy", "random"],
    "workers": ["--dataloader_num_workers", "1"],
    "drop the last": ["--dataloader_drop_last", "true", "--per_device_train_batch_size", "28"],
    "one large batch": ["--per_device_train_batch_size", "500"],
    "recompute": [f"--{RECOMPUTE}", "true"],
    "other optimizer": ["--optim", "adafactor"],
    "schedule": ["--lr_scheduler_type", "cosine", "--warmup_steps", "2"],
    "smoothing": ["--label_smoothing_factor", "0.1"],
    "no clipping": ["--max_grad_norm", "0"],
    "log all": ["--logging_steps", "1", "--logging_first_step", "true"],
    "part of an epoch": ["--num_train_epochs", "0.5"],
    "score at the start": ["--eval_on_start", "true"],
    "all deterministic": ["--full_determinism", "true"],
    "top layers": ["--num_trained_layers", "1"],
    "rates per layer": ["--layer_decay", "0.8", "--gradual_unfreezing", "0.5"],
    "pulled to the start": ["--l2_sp_weight", "0.1", "--l2_sp_head_weight", "0.1"],
    "rare classes": ["--class_weights", "balanced", "--focal_gamma", "1"],
    "adjusted logits": ["--logit_adjustment", "1"],
}


@pytest.mark.parametrize("name", TRAINING_OPTIONS)
def test_options_of_training(name, tiny_data, bert, tmp_path):
    words = [*tiny_words(tiny_data, bert), "--control_arm", "false", "--linear_probe", "false"]
    for option in [*TRAINING_OPTIONS[name][::2], *(["--num_train_epochs"] if name == "steps" else [])]:
        if option in words:
            del words[words.index(option) : words.index(option) + 2]
    run = finished("finetune", tmp_path / "out", *words, *TRAINING_OPTIONS[name])
    steps = {"steps": 3, "part of an epoch": 4, "one large batch": 1}.get(name, 8)
    assert run.arm("fine-tuned")["details"]["steps"] == steps
    assert not (run.folder / "checkpoints").exists()


def test_bfloat16(tiny_data, bert, tmp_path):
    words = tiny_words(tiny_data, bert)
    words[words.index("--bf16") + 1] = "true"
    run = finished("distill", tmp_path / "out", *words, "--save_predictions", "true")
    assert run.report["checks"]["precision"]["bf16"] is True
    model = AutoModelForSequenceClassification.from_pretrained(run.folder)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_mean_pooling_of_teacher_and_student(tiny_data, bert, tmp_path, caplog):
    """The layer that computes the mean is no layer to choose from, and is not added to one that is there."""
    caplog.set_level("INFO", logger="nlpxfer")
    words = [*tiny_words(tiny_data, bert), "--student_layers", "even", "--student_num_layers", "2"]
    run = finished("distill", tmp_path / "out", *words, "--pooling", "mean")
    assert AutoConfig.from_pretrained(run.folder / "teacher").num_hidden_layers == 5
    assert AutoConfig.from_pretrained(run.folder).num_hidden_layers == 3
    messages = [record.getMessage() for record in caplog.records]
    kept = {line.partition(":")[0] for line in messages if line.startswith("Kept layers")}
    assert kept == {"Kept layers [0, 3] of 4", "Kept layers [0, 3] of 5"}
    assert run.arm("control")["parameters"] == run.arm("distilled")["parameters"]
    again = finished("finetune", tmp_path / "again", *tiny_words(tiny_data, run.folder), "--pooling", "mean")
    assert AutoConfig.from_pretrained(again.folder).num_hidden_layers == 3


def test_nothing_of_a_run_stays_in_memory(tiny_data, tiny_checkpoint, tmp_path, monkeypatch):
    """Their Trainers and models hold each other: the next run's start must not keep what it finds of the last."""
    made, plain = [], PreTrainedModel.__init__

    def init(self, *arguments, **options):
        plain(self, *arguments, **options)
        made.append(weakref.ref(self))

    monkeypatch.setattr(PreTrainedModel, "__init__", init)
    for name in ("one", "two", "three"):
        finished("finetune", tmp_path / name, *tiny_words(tiny_data, tiny_checkpoint("bert"), steps=1))
    gc.collect()
    assert len(made) > 2
    assert [model() for model in made if model() is not None] == []


@pytest.mark.parametrize(
    ("own", "warned"),
    [([], True), (["--sampling", "balanced"], False), (["--metric_for_best_model", "macro_f1"], False)],
    ids=lambda value: value if isinstance(value, bool) else "-".join(value),
)
def test_a_lower_accuracy_is_told_unless_it_may_be_wanted(own, warned, tiny_data, tiny_checkpoint, tmp_path, caplog):
    words = tiny_words(tiny_data, tiny_checkpoint("bert"), rate="1", steps=3)
    run = finished("finetune", tmp_path / "out", *words, "--control_arm", "false", *own)
    arm = run.arm("fine-tuned")
    assert arm["metrics"]["validation"]["accuracy"] < arm["details"]["linear_probe"]["validation_accuracy"]
    assert ("worse accuracy than the linear probe" in caplog.text) is warned


def test_progress_is_written_once_and_to_the_stream_of_the_time(monkeypatch, capsys):
    package, root = logging.getLogger("nlpxfer"), logging.getLogger()
    monkeypatch.setattr(package, "handlers", [])
    monkeypatch.setattr(root, "handlers", [])
    before = package.level
    try:
        _show_progress(RunOptions(use_cpu=True))
        (handler,) = package.handlers
        assert isinstance(handler, _Terminal)
        package.info("one")
        own = logging.StreamHandler(sys.stdout)
        monkeypatch.setattr(root, "handlers", [own])
        package.info("two")
        monkeypatch.setattr(root, "handlers", [])
        package.info("three")
    finally:
        package.setLevel(before)
    assert capsys.readouterr() == ("two\n", "one\nthree\n")
