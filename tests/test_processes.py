"""Recipes under their launchers: two processes, interruption from outside, and what accelerate keeps silent about."""

import hashlib
import json
import re
import textwrap

import pytest
from processes import accelerate_launch, python, run, together, torchrun
from recipe_runs import QUICK, call, files, finished
from safetensors.torch import load_file

from nlpxfer.checkpoint.save import held

pytestmark = pytest.mark.processes

SPOILT = """
import os, sys
from nlpxfer.cli import run_main
from nlpxfer.recipes import load_recipe
from nlpxfer.train.trainer import TransferTrainer

where, recipe, *words = sys.argv[1:]
compute, calls = TransferTrainer.compute_loss, []

def spoilt(self, *args, **kwargs):
    loss = compute(self, *args, **kwargs)
    if where in str(self.args.output_dir):
        calls.append(where)
    return loss * float("nan") if calls == [where] and os.environ["RANK"] == "1" else loss

TransferTrainer.compute_loss = spoilt
load_recipe("distill").has_onnx = lambda: False
run_main(load_recipe(recipe).main, words)
"""
"""Runs a recipe in which the second process's first micro-batch of a training has no finite loss."""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NLPXFER_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def words(tiny_data, tiny_checkpoint):
    """61 rows, which neither two processes nor batches of eight divide; long enough to be interrupted."""
    model = ["--model_name_or_path", str(tiny_checkpoint("bert"))]
    return [*QUICK, *files(tiny_data), *model, "--max_train_samples", "61", "--num_train_epochs", "15"]


def sealed(folder):
    """Steps of the checkpoints that were written to their end."""
    found = folder.glob("checkpoint-*/manifest.json")
    return sorted(int(path.parent.name.rpartition("-")[2]) for path in found)


def test_two_processes_interrupted_and_resumed_give_what_one_process_gives(words, tmp_path):
    """Scores agree to rounding: sums over two shares are added in another order than sums over the whole."""
    plan = [*words, "--teacher_num_train_epochs", "2", "--learning_rate", "1e-4"]
    shares = ["--per_device_train_batch_size", "4", "--output_dir", str(tmp_path / "two")]
    student = tmp_path / "two" / "checkpoints" / "distilled-42"
    command = torchrun("recipes/distill.py", *plan, *shares)
    broken_off = run(command, interrupt_if=lambda: sealed(student))
    assert broken_off.returncode != 0
    assert re.search(r"asked to stop at step \d+ of 120", broken_off.stderr), broken_off.stderr
    assert sealed(student)
    assert not (tmp_path / "two" / "report.json").exists()

    one_process = call("distill", tmp_path / "two", *plan, *shares[:2], "--resume_from_checkpoint", "true")
    assert one_process.code == 2
    assert "processes: was 2, is 1" in one_process.err

    resumed = run([*command, "--resume_from_checkpoint", "true"])
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout.count("transfer: ") == 1, "one process alone reports"
    assert [path.name for path in tmp_path.iterdir() if path.name not in ("cache", "two")] == []

    one = finished("distill", tmp_path / "one", *plan, "--per_device_train_batch_size", "8")
    names = {path.name for path in one.folder.iterdir()}
    assert {path.name for path in (tmp_path / "two").iterdir()} == names
    report = json.loads((tmp_path / "two" / "report.json").read_text())
    assert report["checks"]["processes"] == 2
    for mine, theirs in zip(report["arms"], one.report["arms"], strict=True):
        assert mine["name"] == theirs["name"]
        for name in ("steps", "tokens"):
            assert mine["details"].get(name) == theirs["details"].get(name), (mine["name"], name)
        for split in ("validation", "test"):
            assert mine["metrics"][split]["loss"] == pytest.approx(theirs["metrics"][split]["loss"], rel=1e-4)
            assert mine["metrics"][split]["accuracy"] == pytest.approx(theirs["metrics"][split]["accuracy"], abs=0.03)
    weights, expected = (load_file(folder / "model.safetensors") for folder in (tmp_path / "two", one.folder))
    name = "bert.encoder.layer.0.attention.self.value.weight"
    start = load_file(tmp_path / "one" / "teacher" / "model.safetensors")[name]
    moved = (expected[name] - start).norm()
    assert (weights[name] - expected[name]).norm() < 0.01 * moved


def test_two_processes_keep_the_ranks_of_one(words, tmp_path):
    """AdaLoRA scores by gradients and ranks by scores: each process by itself, and all of them alike."""
    plan = [*words[:-1], "3", "--adapter", "adalora", "--control_arm", "false"]
    plan += ["--load_best_model_at_end", "false"]
    shares = ["--per_device_train_batch_size", "4", "--output_dir", str(tmp_path / "two")]
    two = run(torchrun("recipes/adapters.py", *plan, *shares))
    assert two.returncode == 0, two.stderr
    one = finished("adapters", tmp_path / "one", *plan, "--per_device_train_batch_size", "8")
    weights, expected = (
        load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (tmp_path / "two", one.folder)
    )
    kept = {name: values != 0 for name, values in expected.items() if "lora_E" in name}
    agreeing = [float((kept[name] == (weights[name] != 0)).float().mean()) for name in kept]
    assert sum(int(values.sum()) for values in kept.values()) == 8 * len(kept)
    assert sum(int(weights[name].count_nonzero()) for name in kept) == 8 * len(kept)
    assert sum(agreeing) / len(agreeing) > 0.95


def test_a_program_that_is_terminated_can_be_resumed(words, tmp_path):
    own = [*words, "--learning_rate", "1e-3", "--control_arm", "false"]
    arm = tmp_path / "out" / "checkpoints" / "fine-tuned-42"
    command = python("recipes/finetune.py", *own, "--output_dir", tmp_path / "out")
    done = run(command, interrupt_if=lambda: sealed(arm))
    assert done.returncode == 75, done.stderr
    assert "Traceback" not in done.stderr
    assert "--resume_from_checkpoint true" in done.stderr
    assert len(sealed(arm)) >= 1
    resumed = finished("finetune", tmp_path / "out", *own, "--resume_from_checkpoint", "true")
    whole = finished("finetune", tmp_path / "whole", *own)
    sums = {
        hashlib.sha256((ended.folder / "model.safetensors").read_bytes()).hexdigest() for ended in (resumed, whole)
    }
    assert len(sums) == 1
    assert resumed.report["metrics"] == whole.report["metrics"]


def test_accelerate_with_fewer_processes_than_asked_for_is_refused(words, tmp_path):
    command = accelerate_launch("--cpu", "--num_processes", "2", "recipes/finetune.py", *words)
    done = run([*command, "--output_dir", str(tmp_path / "out")])
    assert done.returncode != 0
    assert "2 processes were asked for, but 1 is running." in done.stderr
    assert "torchrun --nproc_per_node 2" in done.stderr
    assert not (tmp_path / "out").exists()


def test_two_recipes_in_one_program_share_the_processes(tiny_data, tiny_checkpoint, tmp_path):
    program = """
        import os, time
        from nlpxfer import run_recipe
        from nlpxfer.cli import run_main

        def main(argv=None):
            shared = {shared}
            run_recipe("finetune", **shared, model_name_or_path={model!r}, output_dir={first!r})
            if os.environ["RANK"] == "1":
                time.sleep(3)
            teacher = dict(teacher_name_or_path={first!r}, student_num_layers=1)
            run_recipe("distill", **shared, **teacher, output_dir={second!r})

        run_main(main)
    """
    named = [*QUICK, *files(tiny_data), "--max_train_samples", "61", "--max_steps", "2", "--learning_rate", "1e-3"]
    shared = dict(zip((name[2:] for name in named[::2]), named[1::2], strict=True)) | {"control_arm": False}
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    model = str(tiny_checkpoint("bert"))
    text = textwrap.dedent(program).format(shared=shared, model=model, first=first, second=second)
    (tmp_path / "twice.py").write_text(text)
    done = run(torchrun(tmp_path / "twice.py"))
    assert done.returncode == 0, done.stderr
    for folder in (first, second):
        assert json.loads((tmp_path / folder / "report.json").read_text())["checks"]["processes"] == 2


@pytest.mark.parametrize(
    ("own", "told"),
    [
        (["--num_train_epoch", "3"], "num_train_epoch: unknown option; did you mean num_train_epochs?"),
        (["--model_name_or_path", "nowhere/at/all"], "nowhere/at/all"),
    ],
)
def test_an_error_of_all_processes_is_told_once(own, told, words, tmp_path):
    given = words.index("--model_name_or_path") if own[0] in words else len(words)
    own = [*words[:given], *words[given + 2 :], *own]
    done = run(torchrun("recipes/finetune.py", *own, "--output_dir", tmp_path / "out"))
    assert done.returncode != 0
    assert sum(told in line for line in done.stderr.splitlines()) == 1, done.stderr


@pytest.mark.parametrize(
    ("own", "told"),
    [
        (["--push_to_hub", "true", "--hub_model_id", "bad name/x y"], "'bad name/x y'"),
        (["--overwrite", "true"], "Another run is writing to the output folder"),
    ],
)
def test_what_only_the_first_process_finds_wrong_ends_all_alike(own, told, words, tmp_path):
    (tmp_path / "out").mkdir()
    with held(tmp_path / "out"):
        ended = together(python("recipes/finetune.py", *words, "--output_dir", tmp_path / "out", *own))
    assert [one.returncode for one in ended] == [2, 2], ended
    for one in ended:
        assert told in one.stderr
        assert "Traceback" not in one.stderr


def test_a_loss_that_one_process_has_fails_the_trial_of_all(words, tmp_path):
    (tmp_path / "spoilt.py").write_text(SPOILT)
    own = [*words[:-1], "1", "--control_arm", "false", "--learning_rate", "{choices: [1e-3, 2e-3]}"]
    own += ["--num_trials", "2", "--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2"]
    command = python(tmp_path / "spoilt.py", "trial-1", "finetune", "--output_dir", tmp_path / "out", *own)
    for one in together(command):
        assert one.returncode == 2, one.stderr
        assert "Trial 1 failed: The loss became nan after step 0" in one.stderr
    for one in together([*command, "--resume_from_checkpoint", "true"]):
        assert one.returncode == 0, one.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [trial["state"] for trial in report["search"]["trials"]] == ["failed", "complete"]


def test_a_loss_that_one_process_has_fails_the_student_of_all(words, tiny_checkpoint, tmp_path):
    (tmp_path / "spoilt.py").write_text(SPOILT)
    own = [*words[:-1], "2", "--control_arm", "false", "--learning_rate", "1e-3", "--search", "true", "--keep", "0.5"]
    own += ["--teacher_name_or_path", tiny_checkpoint("bert", "classifier"), "--search_budget", "8"]
    own += ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2"]
    command = python(tmp_path / "spoilt.py", "ladder", "distill", "--output_dir", tmp_path / "out", *own)
    for one in together(command):
        assert one.returncode == 0, one.stderr
    students = json.loads((tmp_path / "out" / "report.json").read_text())["checks"]["search"]["tried"]
    assert sum(each["outcome"].startswith("failed: The loss became nan") for each in students) == 1


def test_a_loss_that_one_process_refuses_before_the_first_step_ends_all_alike(words, tiny_checkpoint, tmp_path):
    refusal = """
    import os
    import nlpxfer.train.trainer as trainer
    from nlpxfer.cli import run_main
    from nlpxfer.errors import NotFiniteError
    from nlpxfer.recipes import load_recipe

    def refuse(*args, **kwargs):
        if os.environ["RANK"] == "1":
            raise NotFiniteError("the loss term kd is nan")
        return {}

    trainer.preflight = refuse
    run_main(load_recipe("distill").main)
    """
    (tmp_path / "refusal.py").write_text(textwrap.dedent(refusal))
    own = ["--teacher_name_or_path", tiny_checkpoint("bert", "classifier"), "--student_num_layers", "1"]
    own += ["--learning_rate", "1e-3", "--output_dir", tmp_path / "out"]
    for one in together(python(tmp_path / "refusal.py", *words, *own)):
        assert one.returncode == 2, one.stderr
        assert "the loss term kd is nan" in one.stderr
