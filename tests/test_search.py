"""Recipes that search their options: what a trial sees and leaves, and what the run makes of the best one."""

import hashlib
import json
import os
import re
import signal

import pytest
import torch
from processes import run as run_program
from processes import torchrun
from recipe_runs import QUICK, call, files, finished, refused
from tiny import LAYERS

from nlpxfer.checkpoint.own_files import foreign_paths
from nlpxfer.config import DataOptions, RunOptions, parse
from nlpxfer.errors import ConfigError
from nlpxfer.start import start_run
from nlpxfer.train.trainer import TransferTrainer

RESUME = ["--resume_from_checkpoint", "true"]
SPACE = {
    "learning_rate": "{low: 0.00001, high: 0.5, log: true}",
    "num_train_epochs": "{choices: [1, 2, 3]}",
    "label_smoothing_factor": "{low: 0.0, high: 0.2}",
    "num_trials": "5",
    "control_arm": "false",
    "linear_probe": "false",
    "max_train_samples": "60",
    "per_device_train_batch_size": "8",
}
"""60 rows in batches of 8: 8 steps an epoch."""


@pytest.fixture(scope="module")
def words(tiny_data, tiny_checkpoint):
    """Options of a run that searches, with changes; None takes one out."""
    shared = [*QUICK, *files(tiny_data), "--model_name_or_path", str(tiny_checkpoint("bert"))]

    def made(**changes):
        chosen = {name: value for name, value in {**SPACE, **changes}.items() if value is not None}
        return [*shared, *(f"--{name}={value}" for name, value in chosen.items())]

    return made


@pytest.fixture(scope="module")
def whole(words, tmp_path_factory):
    """A search that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TENSORBOARD_LOGGING_DIR", str(folder / "logs"))
        return finished("finetune", folder / "out", *words(report_to="tensorboard"))


def sha256(folder):
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def without_times(search):
    trials = [{name: value for name, value in trial.items() if name != "seconds"} for trial in search["trials"]]
    return {**search, "seconds": None, "trials": trials}


def at_step(monkeypatch, arm, step, do):
    """Call something before a step of an arm or a trial, once."""
    plain, left = TransferTrainer.training_step, [True]

    def training_step(self, *arguments, **options):
        if self.identity.facts["arm"] == arm and self.state.global_step == step and left:
            left.clear()
            do(self)
        return plain(self, *arguments, **options)

    monkeypatch.setattr(TransferTrainer, "training_step", training_step)


def test_the_run_has_the_options_of_the_best_trial(whole):
    search, config = whole.report["search"], whole.run["config"]
    trials = search["trials"]
    assert [trial["number"] for trial in trials] == [1, 2, 3, 4, 5]
    first = {"learning_rate": 3e-4, "num_train_epochs": 2.0, "label_smoothing_factor": 0.0}
    assert trials[0]["options"] == first, "the recipe's own"
    complete = [trial for trial in trials if trial["state"] == "complete"]
    best = max(complete, key=lambda trial: trial["value"])
    assert search["best"] == {name: best[name] for name in ("number", "options", "value")}
    assert {name: config[name] for name in best["options"]} == best["options"]
    assert whole.arm("fine-tuned")["details"]["steps"] == 8 * best["options"]["num_train_epochs"]
    assert whole.report["metrics"]["validation"]["accuracy"] == best["value"], "the same seed, so the same training"
    assert whole.run["facts"]["ranges"] == search["ranges"]
    assert search["ranges"]["learning_rate"] == {"low": 1e-5, "high": 0.5, "log": True}
    assert (search["metric"], search["direction"], search["ended_by"]) == ("accuracy", "maximize", "num_trials")


def test_a_trial_that_is_worse_than_the_others_ends_early(whole):
    trials = whole.report["search"]["trials"]
    pruned = [trial for trial in trials if trial["state"] == "pruned"]
    assert pruned
    for trial in trials:
        planned = 8 * trial["options"]["num_train_epochs"]
        assert (trial["steps"] < planned) == (trial["state"] == "pruned"), trial
        assert 0 <= trial["value"] <= 1


def test_the_time_of_all_trials_counts(whole):
    report = whole.report
    seconds = [trial["seconds"] for trial in report["search"]["trials"]]
    assert min(seconds) > 0
    assert report["cost"]["search_seconds"] == report["search"]["seconds"] == pytest.approx(sum(seconds))
    assert report["cost"]["total_seconds"] > report["cost"]["search_seconds"] + report["cost"]["train_seconds"]


def test_nothing_of_the_trials_stays(whole):
    assert not (whole.folder / "checkpoints").exists()
    assert "chosen by the validation accuracy of 5 trials" in (whole.folder / "README.md").read_text()
    assert [path.name for path in (whole.folder.parent / "logs").iterdir()] == ["fine-tuned-42"]
    assert "trial" not in whole.err, "no bar where there is no terminal"


def test_an_interrupted_search_goes_on_and_never_sees_a_test_row(
    words, whole, tiny_data, tmp_path, monkeypatch, caplog
):
    """In the middle of the third trial: two are not repeated, one is finished, the others are those of `whole`."""
    from nlpxfer import run

    caplog.set_level("INFO", logger="nlpxfer")
    out, plain = tmp_path / "out", run.tokenise
    seen, texts = [], {line.rpartition(",")[0] for line in tiny_data.test.read_text().splitlines()[1:]}
    with monkeypatch.context() as patch:
        patch.setattr(run, "tokenise", lambda *args, **options: seen.extend(args[1]) or plain(*args, **options))
        at_step(patch, "trial 3", 4, lambda _: os.kill(os.getpid(), signal.SIGTERM))
        ended = call("finetune", out, *words())
        assert (ended.code, "at step 5 of" in ended.err) == (75, True), ended.err
        assert len(set(seen)) == 60 + 80
        assert not texts & set(seen)
    folder = out / "checkpoints" / "search"
    assert {path.name for path in folder.iterdir()} == {"manifest.json", "study.log", "trial-3"}
    assert foreign_paths(out) == []
    with monkeypatch.context() as patch:
        at_step(patch, "fine-tuned", 4, lambda _: os.kill(os.getpid(), signal.SIGTERM))
        caplog.clear()
        again = call("finetune", out, *words(), *RESUME)
        assert again.code == 75, again.err
    assert "trial 2 of 5" not in caplog.text
    assert caplog.text.count("resuming from checkpoint-5") == 1
    assert "training from the start" not in caplog.text.partition("fine-tuned, seed 42")[0]
    assert re.search(r"trial 3 of 5: \w+, accuracy 0\.\d{4}, \d+ s; best 0\.\d{4} .trial \d.; about", caplog.text)
    assert {path.name for path in folder.iterdir()} == {"manifest.json", "study.log"}
    assert "num_trials: was 5, is 6" in call("finetune", out, *words(num_trials=6), *RESUME).err
    other = words(learning_rate="{low: 1e-5, high: 0.4}")
    assert "range of learning_rate: was {'low': 1e-05, 'high': 0.5" in call("finetune", out, *other, *RESUME).err
    caplog.clear()
    resumed = finished("finetune", out, *words(), *RESUME)
    assert " of 5: " not in caplog.text, "the search is finished"
    assert without_times(resumed.report["search"]) == without_times(whole.report["search"])
    assert resumed.report["metrics"] == whole.report["metrics"]
    assert sha256(resumed.folder) == sha256(whole.folder)
    assert resumed.report["cost"]["total_seconds"] > resumed.report["cost"]["search_seconds"]


def test_a_trial_that_is_interrupted_at_a_score_keeps_it_and_ends_early_there_too(words, whole, tmp_path, monkeypatch):
    """In the last step of an epoch, of a trial that goes on and of one that does not."""
    trials = whole.report["search"]["trials"]
    pruned = next(trial for trial in trials if trial["state"] == "pruned")
    longer = next(trial for trial in trials if trial["state"] == "complete" and trial["steps"] > 8)
    again = []
    for number, step in sorted([(pruned["number"], pruned["steps"]), (longer["number"], 8)]):
        with monkeypatch.context() as patch:
            at_step(patch, f"trial {number}", step - 1, lambda _: os.kill(os.getpid(), signal.SIGTERM))
            ended = call("finetune", tmp_path / "out", *words(), *again)
        assert (ended.code, f"at step {step} of" in ended.err) == (75, True), ended.err
        state = tmp_path / "out" / "checkpoints" / "search" / f"trial-{number}" / f"checkpoint-{step}"
        history = json.loads((state / "trainer_state.json").read_text())["log_history"]
        assert [line["step"] for line in history if "eval_loss" in line][-1] == step
        again = RESUME
    resumed = finished("finetune", tmp_path / "out", *words(), *RESUME)
    assert without_times(resumed.report["search"]) == without_times(whole.report["search"])


def test_a_trial_that_had_ended_when_the_signal_came_is_not_repeated(words, whole, tmp_path, monkeypatch, caplog):
    """In its last score."""
    caplog.set_level("INFO", logger="nlpxfer")
    plain, left = TransferTrainer.evaluation_loop, [True]

    def evaluation_loop(self, *arguments, **options):
        if self.identity.facts["arm"] == "trial 2" and self.state.global_step == self.state.max_steps and left:
            left.clear()
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, *arguments, **options)

    monkeypatch.setattr(TransferTrainer, "evaluation_loop", evaluation_loop)
    ended = call("finetune", tmp_path / "out", *words())
    assert ended.code == 75, ended.err
    assert "asked to stop when trial 2 of 5 had ended; its score is kept" in ended.err
    assert "--resume_from_checkpoint true" in ended.err
    folder = tmp_path / "out" / "checkpoints" / "search"
    assert {path.name for path in folder.iterdir()} == {"manifest.json", "study.log"}
    caplog.clear()
    resumed = finished("finetune", tmp_path / "out", *words(), *RESUME)
    assert "trial 2 of 5" not in caplog.text
    assert without_times(resumed.report["search"]) == without_times(whole.report["search"])


ONE_EPOCH = {"num_train_epochs": "1", "label_smoothing_factor": "0", "num_trials": "2"}


def test_a_trial_that_diverges_counts_as_failed(words, tmp_path):
    plan = words(**ONE_EPOCH, learning_rate="{choices: [0.0001, 1e30]}")
    run = finished("finetune", tmp_path / "out", *plan)
    good, bad = run.report["search"]["trials"]
    assert (good["state"], good["options"]) == ("complete", {"learning_rate": 1e-4})
    assert (bad["state"], bad["value"], bad["options"]) == ("failed", None, {"learning_rate": 1e30})
    assert "became" in bad["reason"]
    assert bad["seconds"] > 0
    assert run.run["config"]["learning_rate"] == 1e-4


FIT = {
    "passes that differ": {"r_drop_weight": "1", "dropout": "{low: 0.05, high: 0.3}"},
    "a long training": {"eval_delay": "3", "num_train_epochs": "{choices: [4, 5]}"},
    "small batches": {
        "dataloader_drop_last": "true", "per_device_train_batch_size": "{choices: [4, 8]}", "max_train_samples": "24",
    },
    "an optimizer": {"optim_args": "momentum=0.9", "optim": "{choices: [sgd, rmsprop]}"},
}  # fmt: skip
"""Options that do not fit the default of what is searched, but its range."""


@pytest.mark.parametrize("case", FIT)
def test_what_fits_the_range_is_not_refused_for_the_default(case, words, tmp_path):
    own = {**ONE_EPOCH, "learning_rate": "0.001", **FIT[case]}
    run = finished("finetune", tmp_path / "out", *words(**own))
    assert {trial["state"] for trial in run.report["search"]["trials"]} == {"complete"}


@pytest.mark.parametrize("recipe", ["finetune", "adapters"])
def test_a_trial_is_judged_by_its_own_values(recipe, words, tmp_path):
    """Without dropout the two passes of R-Drop do not differ: such a trial fails, and cannot win."""
    both = {"r_drop_weight": "{choices: [0.5, 1.0]}", "dropout": "{choices: [0.0, 0.1]}", "num_trials": "4"}
    run = finished(recipe, tmp_path / "out", *words(**{**ONE_EPOCH, "learning_rate": "0.001", **both}))
    trials = run.report["search"]["trials"]
    assert len({tuple(trial["options"].values()) for trial in trials}) == 4
    assert all((trial["state"] == "failed") == (trial["options"]["dropout"] == 0) for trial in trials)
    assert run.run["config"]["dropout"] == 0.1


def test_what_fits_no_value_of_a_range_is_refused_at_once(words, tmp_path):
    cases = {
        "r_drop_weight: 1 does nothing where": {"r_drop_weight": "{low: 0.0, high: 1.0}"},
        "eval_delay: 9 is beyond the end of the training": {
            "eval_delay": "9", "num_train_epochs": "{choices: [4, 5]}",
        },
        "60 training rows make no whole batch of": {
            "dataloader_drop_last": "true", "per_device_train_batch_size": "{choices: [64, 128]}",
        },
    }  # fmt: skip
    for message, changes in cases.items():
        plan = words(**{**ONE_EPOCH, "learning_rate": "0.001", **changes})
        assert message in refused("finetune", tmp_path / "out", *plan)
        assert not (tmp_path / "out").exists()


UNFIT = {
    "schedule": ({"lr_scheduler_type": "{choices: [linear, warmup_stable_decay]}"}, "lr_scheduler_type, "),
    "end of the schedule": (
        {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": '{"lr_end": 0.001}', "warmup_steps": "0"}
        | {"learning_rate": "{choices: [0.01, 0.0001]}"},
        "lr_scheduler_type, ",
    ),
    "optimizer": ({"optim": "{choices: [adamw_torch, schedule_free_adamw]}"}, "optim: "),
    "batches": (
        {"dataloader_drop_last": "true", "per_device_train_batch_size": "{choices: [8, 512]}"},
        "dataloader_drop_last: 60 training rows make no whole batch of 512",
    ),
    "layers": ({"layer_decay": "{choices: [1.0, 0.5]}"}, "AlbertForSequenceClassification"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_a_trial_whose_options_do_not_fit_the_model_counts_as_failed(case, words, tiny_checkpoint, tmp_path):
    changes, reason = UNFIT[case]
    plan = words(**{**ONE_EPOCH, "learning_rate": "0.001", **changes})
    if case == "layers":
        plan[plan.index("--model_name_or_path") + 1] = str(tiny_checkpoint("albert"))
    run = finished("finetune", tmp_path / "out", *plan)
    states = [trial["state"] for trial in run.report["search"]["trials"]]
    assert sorted(states) == ["complete", "failed"]
    assert reason in next(trial["reason"] for trial in run.report["search"]["trials"] if trial["state"] == "failed")


def test_if_all_trials_fail_the_error_says_why(words, tmp_path, monkeypatch):
    """More layers than the model has, and a GPU that is too small."""

    def full(trainer):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\n and more")

    at_step(monkeypatch, "trial 1", 0, full)
    at_step(monkeypatch, "trial 2", 0, full)
    plan = words(**ONE_EPOCH, learning_rate="1e-4", num_trained_layers="{choices: [1, 99]}")
    message = refused("finetune", tmp_path / "out", *plan)
    assert "All 2 trials of the search failed" in message
    assert "CUDA out of memory. Tried to allocate 2 GiB\n" in message
    assert "num_trained_layers: 99" in message


def test_a_score_at_the_end_where_none_is_taken_on_the_way(words, tmp_path):
    """Without evaluations the last weights are scored: those that the run would keep."""
    never = {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": "false"}
    run = finished("finetune", tmp_path / "out", *words(**ONE_EPOCH, **never, metric_for_best_model="loss"))
    search = run.report["search"]
    assert {trial["state"] for trial in search["trials"]} == {"complete"}
    assert search["direction"] == "minimize"
    assert search["best"]["value"] == min(trial["value"] for trial in search["trials"])
    assert run.report["metrics"]["validation"]["loss"] == pytest.approx(search["best"]["value"], rel=1e-6)


def test_distill_searches_for_the_student(words, tmp_path, monkeypatch):
    monkeypatch.setenv("NLPXFER_CACHE", str(tmp_path / "cache"))
    student = {"student_num_layers": "{low: 1, high: 3}", "temperature": "{low: 1, high: 4}", "control_arm": "true"}
    run = finished("distill", tmp_path / "out", *words(**ONE_EPOCH, **student, kd_weight="{low: 0.1, high: 1}"))
    search = run.report["search"]
    assert list(search["ranges"]) == ["student_num_layers", "temperature", "kd_weight", "learning_rate"]
    assert search["trials"][0]["options"] == {
        "student_num_layers": LAYERS // 2, "temperature": 2, "kd_weight": 0.9, "learning_rate": 3e-4
    }, "the defaults, of the learning rate that for its width"  # fmt: skip
    best = search["best"]["options"]
    assert json.loads((run.folder / "config.json").read_text())["num_hidden_layers"] == best["student_num_layers"]
    assert run.arm("control")["parameters"] == run.arm("distilled")["parameters"]
    assert run.report["metrics"]["validation"]["accuracy"] == search["best"]["value"]
    message = refused("distill", tmp_path / "other", *words(teacher_learning_rate="{low: 0.1, high: 1}"))
    assert "teacher_learning_rate: it cannot be a range: the search is for the student" in message


def test_adapters_search_from_the_defaults_of_their_kind(words, tmp_path):
    own = {"adapter_rank": "{choices: [2, 4, 8]}", "adapter_alpha": "{low: 1, high: 64}"}
    run = finished("adapters", tmp_path / "out", *words(**ONE_EPOCH, **own, adapter_dropout="{low: 0, high: 0.5}"))
    first, second = run.report["search"]["trials"]
    assert first["options"] == {
        "learning_rate": 2e-3, "adapter_rank": 8, "adapter_alpha": 16, "adapter_dropout": 0
    }, "LoRA's own"  # fmt: skip
    assert second["options"]["adapter_rank"] in (2, 4, 8)
    config = json.loads((run.folder / "adapter" / "adapter_config.json").read_text())
    best = run.report["search"]["best"]
    assert config["r"] == best["options"]["adapter_rank"] == run.run["config"]["adapter_rank"]
    assert run.report["metrics"]["validation"]["accuracy"] == best["value"]


def test_what_a_search_needs_is_checked_before_anything_runs(words, tiny_data, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name, *rest: None)
        assert "pip install 'nlpxfer[hpo]'" in refused("finetune", tmp_path / "out", *words())
    assert not (tmp_path / "out").exists()
    plan = ["--learning_rate", "{low: 0.1, high: 1}", "--num_trials", "2", "--output_dir", str(tmp_path / "out")]
    data, options = parse((DataOptions, RunOptions), [*QUICK, *files(tiny_data), *plan])
    with pytest.raises(ConfigError, match="learning_rate: merge does not search"), start_run("merge", data, options):
        pass


def test_defaults_follow_from_the_options_of_each_trial(words, tmp_path, monkeypatch):
    """16 steps an epoch: 3 epochs are too few for a small head and its rate, 4 are enough; as if they were typed."""
    seen, plain = set(), TransferTrainer.training_step

    def training_step(self, *arguments, **options):
        seen.add((self.options.num_train_epochs, self.options.learning_rate, self.options.linear_probe_size))
        return plain(self, *arguments, **options)

    monkeypatch.setattr(TransferTrainer, "training_step", training_step)
    epochs = {"num_train_epochs": "{choices: [3, 4]}", "num_trials": "2", "linear_probe": None}
    rows = {"max_train_samples": "64", "per_device_train_batch_size": "4"}
    plan = words(**epochs, **rows, learning_rate=None, label_smoothing_factor=None)
    run = finished("finetune", tmp_path / "out", *plan)
    assert seen == {(3, 3e-5, 0.0), (4, 3e-4, 0.02)}
    config = run.run["config"]
    assert (config["num_train_epochs"], config["learning_rate"], config["linear_probe_size"]) in seen


def test_each_trial_has_its_own_weights_of_contradicted_rows(words, tiny_data, tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("NLPXFER_CACHE", str(tmp_path / "cache"))
    seen, plain = {}, TransferTrainer.fit

    def fit(self, **options):
        if "teacher_weights" in self.rows.columns:
            seen[self.identity.facts["arm"]] = float(self.rows.columns["teacher_weights"].min())
        return plain(self, **options)

    monkeypatch.setattr(TransferTrainer, "fit", fit)
    taught = {"teacher_name_or_path": str(tiny_checkpoint("bert", "classifier")), "student_num_layers": "1"}
    plan = words(**{**ONE_EPOCH, **taught}, learning_rate="0.001", contradiction_weight="{choices: [1.0, 0.25]}")
    at = plan.index("--model_name_or_path")
    run = finished("distill", tmp_path / "out", *plan[:at], *plan[at + 2 :])
    trials = run.report["search"]["trials"]
    assert [seen[f"trial {number}"] for number in (1, 2)] == [
        trial["options"]["contradiction_weight"] for trial in trials
    ]
    assert sorted(seen.values())[0] == 0.25
    assert seen["distilled"] == run.run["config"]["contradiction_weight"]


def test_a_student_that_teaches_itself_has_the_shape_of_its_trial(words, tmp_path, monkeypatch):
    seen, plain = {}, TransferTrainer.fit

    def fit(self, **options):
        seen[self.identity.facts["arm"]] = self.network.config.num_hidden_layers
        return plain(self, **options)

    monkeypatch.setattr(TransferTrainer, "fit", fit)
    plan = words(**ONE_EPOCH, learning_rate="0.001", self_distillation="ema", student_num_layers="{choices: [1, 3]}")
    plan[plan.index("--control_arm=false")] = "--control_arm=true"
    run = finished("distill", tmp_path / "out", *plan)
    trials = [trial["options"]["student_num_layers"] for trial in run.report["search"]["trials"]]
    assert [seen["trial 1"], seen["trial 2"]] == trials
    chosen = run.report["search"]["best"]["options"]["student_num_layers"]
    assert seen["distilled"] == seen["control"] == run.run["config"]["student_num_layers"] == chosen


@pytest.mark.processes
def test_two_processes_make_the_same_trials_together(words, whole, tmp_path):
    """Scores agree to rounding with those of one process; what follows from a score may then differ."""
    plan = words(per_device_train_batch_size=4, num_trials="2", output_dir=tmp_path / "two")
    done = run_program(torchrun("recipes/finetune.py", *plan))
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "two" / "report.json").read_text())
    assert report["checks"]["processes"] == 2
    trials = report["search"]["trials"]
    assert len(trials) == 2
    for mine, theirs in zip(trials, whole.report["search"]["trials"], strict=False):
        assert mine["options"] == theirs["options"]
    assert trials[0]["steps"] == 16
    assert trials[0]["value"] == pytest.approx(whole.report["search"]["trials"][0]["value"], abs=0.03)
    assert done.stdout.count("transfer: ") == 1
    assert not (tmp_path / "two" / "checkpoints").exists()
