"""An interrupted run goes on as if nothing had happened, or says why it cannot."""

import hashlib
import json
import os
import shutil
import signal
import time

import pytest
from recipe_runs import call, finished, tiny_words
from transformers import TrainerCallback

from nlpxfer import result
from nlpxfer.checkpoint.own_files import foreign_paths
from nlpxfer.classify import Classifier
from nlpxfer.evaluate import arms
from nlpxfer.train.checkpoints import damage
from nlpxfer.train.trainer import TransferTrainer

RESUME = ["--resume_from_checkpoint", "true"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NLPXFER_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def words(tiny_data, tiny_checkpoint):
    """Dropout, micro-batches, a ragged last batch, warm-up and the best weights: all that a resumed run must restore.

    60 rows in batches of 4 by 2: 8 optimizer steps an epoch, the last of them short.
    """
    own = ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2", "--max_train_samples", "60"]
    model = tiny_checkpoint("bert", dropout=0.1)
    return {key: [*tiny_words(tiny_data, model, epochs=3), *own] for key in ("finetune", "distill")}


@pytest.fixture(scope="module")
def whole(words, tmp_path_factory):
    """The same runs without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    os.environ["NLPXFER_CACHE"] = str(folder / "cache")
    return {key: finished(key, folder / key, *words[key]) for key in words}


def signal_at(monkeypatch, step, arm, number=signal.SIGTERM, times=1):
    """Send this process a signal during a step of an arm, once."""
    plain, left = TransferTrainer.training_step, [times]

    def training_step(self, *arguments, **options):
        if self.state.global_step == step and self.identity.facts["arm"] == arm and left[0]:
            for _ in range(left[0]):
                os.kill(os.getpid(), number)
            left[0] = 0
        return plain(self, *arguments, **options)

    monkeypatch.setattr(TransferTrainer, "training_step", training_step)


def signal_at_last_score(monkeypatch, arm, step=None):
    """Send this process a signal while the scores after the last step of an arm are taken, once."""
    plain, left = TransferTrainer.evaluation_loop, [True]

    def evaluation_loop(self, *arguments, **options):
        last = step or self.state.max_steps
        if self.identity.facts["arm"] == arm and self.state.global_step == last and left:
            left.clear()
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, *arguments, **options)

    monkeypatch.setattr(TransferTrainer, "evaluation_loop", evaluation_loop)


def interrupted(key, folder, words, monkeypatch, step, arm, of=24, **options):
    with monkeypatch.context() as patch:
        signal_at(patch, step, arm, **options)
        ended = call(key, folder, *words)
    assert ended.code == 75, ended.err
    assert f"at step {step + 1} of {of}" in ended.err
    assert "--resume_from_checkpoint true" in ended.err
    assert not (folder / "report.json").exists()
    checkpoint = folder / "checkpoints" / f"{arm}-42" / f"checkpoint-{step + 1}"
    assert damage(checkpoint) == ""
    assert foreign_paths(folder) == []
    return checkpoint


def sha256(folder):
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def assert_same(one, other):
    """Weights bit for bit; scores, steps and tokens too."""
    assert sha256(one.folder) == sha256(other.folder)
    assert one.report["metrics"] == other.report["metrics"]
    assert one.report["cost"]["tokens"] == other.report["cost"]["tokens"]
    for mine, theirs in zip(one.report["arms"], other.report["arms"], strict=True):
        assert mine["metrics"] == theirs["metrics"], mine["name"]
        assert mine["details"].get("steps") == theirs["details"].get("steps")
        histories = [arm["details"].get("history", []) for arm in (mine, theirs)]
        for line in [*histories[0], *histories[1]]:
            for timing in [name for name in line if "runtime" in name or "per_second" in name]:
                del line[timing]
        assert histories[0] == histories[1], mine["name"]


@pytest.mark.parametrize("step", [0, 2, 7, 10, 23], ids=lambda step: f"step {step + 1}")
def test_finetune_goes_on_bit_for_bit(step, words, whole, tmp_path, monkeypatch):
    """In the middle of an epoch, at its end (step 8), and at the very end (step 24)."""
    interrupted("finetune", tmp_path / "out", words["finetune"], monkeypatch, step, "fine-tuned")
    assert_same(finished("finetune", tmp_path / "out", *words["finetune"], *RESUME), whole["finetune"])
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_windows_balanced_draws_copies_and_two_passes_go_on_bit_for_bit(words, tmp_path, monkeypatch):
    own = [*words["finetune"], "--sampling", "balanced", "--r_drop_weight", "0.5", "--dropout", "0.1"]
    own += ["--augmentation", "swap,typo", "--long_texts", "sliding_window", "--control_arm", "false"]
    own[own.index("--max_length") + 1] = "8"
    of = 45  # 120 rows
    interrupted("finetune", tmp_path / "out", own, monkeypatch, 20, "fine-tuned", of=of)
    resumed = finished("finetune", tmp_path / "out", *own, *RESUME)
    assert resumed.report["data"]["augmented"]["added"] == 60
    assert resumed.report["data"]["long_texts"]["train"]["windows_per_row"] > 1
    assert_same(resumed, finished("finetune", tmp_path / "whole", *own))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_that_come_together_are_one_request(number, words, tmp_path, monkeypatch):
    own = "finetune", tmp_path / "out", words["finetune"], monkeypatch, 2, "fine-tuned"
    before = signal.signal(number, signal.default_int_handler)  # under nohup it would be ignored
    try:
        interrupted(*own, number=number, times=3)
    finally:
        signal.signal(number, before)


def test_distill_goes_on_in_the_arm_that_was_interrupted(words, whole, tmp_path, monkeypatch, caplog):
    checkpoint = interrupted("distill", tmp_path / "out", words["distill"], monkeypatch, 10, "distilled")
    assert not list(checkpoint.parent.parent.glob("teacher-42/checkpoint-*")), "a finished arm keeps its model only"
    again = finished("distill", tmp_path / "out", *words["distill"], *RESUME)
    assert "teacher, seed 42: already trained" in caplog.text
    assert "resuming from checkpoint-11" in caplog.text
    assert again.report["checks"]["teacher"]["computed"] == 0
    assert_same(again, whole["distill"])
    assert sha256(again.folder / "teacher") == sha256(whole["distill"].folder / "teacher")


def test_the_time_before_an_interruption_counts(words, tmp_path, monkeypatch):
    """That of a finished arm, and that of the one that was broken off; the first attempt is slow."""
    plain = TransferTrainer.training_step

    def training_step(self, *arguments, **options):
        time.sleep(1.0 if self.state.global_step == 0 else 0)
        return plain(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(TransferTrainer, "training_step", training_step)
        interrupted("distill", tmp_path / "out", words["distill"], patch, 10, "distilled")
    report = finished("distill", tmp_path / "out", *words["distill"], *RESUME).report
    trained = [arm["seconds"] for arm in report["arms"] if arm["details"].get("steps")]
    assert min(sorted(trained)[-2:]) > 1
    assert report["cost"]["total_seconds"] > sum(trained)


def test_a_trial_of_layers_is_made_again(words, tmp_path, monkeypatch):
    own = [*words["distill"], "--student_layers", "trial", "--student_num_layers", "2", "--control_arm", "false"]
    with monkeypatch.context() as patch:
        signal_at(patch, 2, "bottom")
        first = call("distill", tmp_path / "out", *own)
    with monkeypatch.context() as patch:
        signal_at_last_score(patch, "bottom")
        second = call("distill", tmp_path / "out", *own, *RESUME)
    for ended in (first, second):
        assert (ended.code, "when bottom was trained; nothing of it is kept" in ended.err) == (75, True), ended.err
    interrupted("distill", tmp_path / "out", [*own, *RESUME], monkeypatch, 10, "distilled")
    again = finished("distill", tmp_path / "out", *own, *RESUME)
    without = finished("distill", tmp_path / "whole", *own)
    assert again.report["checks"]["student_layers"] == without.report["checks"]["student_layers"]
    assert_same(again, without)


def test_layers_that_a_probe_picked_are_told_by_a_resumed_run(words, tmp_path, monkeypatch):
    own = [*words["distill"], "--student_layers", "probe", "--student_num_layers", "2", "--control_arm", "false"]
    with monkeypatch.context() as patch:
        patch.setattr(result, "write_card", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            call("distill", tmp_path / "out", *own)
    again = finished("distill", tmp_path / "out", *own, *RESUME)
    assert again.report["checks"]["student_layers"]["layers"]


def test_folds_go_on_in_the_one_that_was_interrupted(words, tmp_path, monkeypatch, caplog):
    """60 rows, 30 for each of two folds: 4 optimizer steps an epoch, 12 in all."""
    own = [*words["finetune"], "--control_arm", "false", "--num_folds", "2"]
    without = finished("finetune", tmp_path / "whole", *own)
    interrupted("finetune", tmp_path / "out", own, monkeypatch, 5, "fold-2-of-2", of=12)
    again = finished("finetune", tmp_path / "out", *own, *RESUME, "--error_report", "true")
    assert "fine-tuned, seed 42: already trained" in caplog.text
    assert "fold-1-of-2, seed 42: already trained" in caplog.text
    assert "resuming from checkpoint-6" in caplog.text
    assert_same(again, without)
    for name in ("predictions/out_of_fold.jsonl", "label_errors.jsonl"):
        assert (again.folder / name).read_bytes() == (without.folder / name).read_bytes()
    scores = [run.report["checks"]["cross_validation"] for run in (again, without)]
    assert scores[0] | {"seconds": 0} == scores[1] | {"seconds": 0}
    assert not (again.folder / "checkpoints").exists()


def test_interrupted_twice(words, whole, tmp_path, monkeypatch):
    interrupted("finetune", tmp_path / "out", words["finetune"], monkeypatch, 4, "fine-tuned")
    interrupted("finetune", tmp_path / "out", [*words["finetune"], *RESUME], monkeypatch, 17, "fine-tuned")
    assert_same(finished("finetune", tmp_path / "out", *words["finetune"], *RESUME), whole["finetune"])


def test_early_stopping_does_not_forget_how_long_it_waited(words, tmp_path, monkeypatch):
    """No step changes a prediction, so the first score stays the best: two more end the run at step 24, not at 32."""
    own = [*words["finetune"], "--early_stopping_patience", "2", "--control_arm", "false"]
    own[own.index("--learning_rate") + 1] = "1e-12"
    own[own.index("--num_train_epochs") + 1] = "5"
    interrupted("finetune", tmp_path / "out", own, monkeypatch, 19, "fine-tuned", of=40)
    again = finished("finetune", tmp_path / "out", *own, *RESUME)
    assert again.arm("fine-tuned")["details"]["steps"] == 24


def test_a_training_that_ended_inside_an_epoch_does_not_go_on(words, tmp_path, monkeypatch):
    """Asked to stop in its last step, half an epoch after the last whole one: only the scores are left to take."""
    own = [*words["finetune"], "--max_steps", "20", "--lr_scheduler_type", "constant"]
    del own[own.index("--num_train_epochs") : own.index("--num_train_epochs") + 2]
    interrupted("finetune", tmp_path / "out", own, monkeypatch, 19, "fine-tuned", of=20)
    resumed = finished("finetune", tmp_path / "out", *own, *RESUME)
    assert resumed.arm("fine-tuned")["details"]["steps"] == 20
    assert_same(resumed, finished("finetune", tmp_path / "whole", *own))


@pytest.mark.parametrize(
    "plan",
    [
        "--save_strategy best",
        "--save_strategy best --eval_strategy steps --eval_steps 8",
        "--save_strategy no --load_best_model_at_end false",
    ],
)
def test_a_run_that_is_stopped_at_an_evaluation_keeps_its_score_without_checkpoints_of_its_own(
    plan, words, tmp_path, monkeypatch
):
    """The second score is no better than the first, so it is not a reason to save either."""
    own = [*words["finetune"], *plan.split(), "--early_stopping_patience", "2", "--control_arm", "false"]
    own[own.index("--learning_rate") + 1] = "1e-12"
    interrupted("finetune", tmp_path / "out", own, monkeypatch, 15, "fine-tuned")
    resumed = finished("finetune", tmp_path / "out", *own, *RESUME)
    history = resumed.arm("fine-tuned")["details"]["history"]
    assert [line["step"] for line in history if "eval_loss" in line] == [8, 16, 24]
    assert_same(resumed, finished("finetune", tmp_path / "whole", *own))


@pytest.mark.parametrize(
    ("key", "arm", "plan", "step"),
    [
        ("finetune", "fine-tuned", "--save_strategy no --load_best_model_at_end false", 24),
        ("finetune", "fine-tuned", "--save_strategy best --early_stopping_patience 1", 16),
        ("distill", "distilled", "--self_distillation ema --save_strategy no --load_best_model_at_end false", 24),
    ],
)
def test_an_arm_that_was_trained_when_the_signal_came_is_kept(
    key, arm, plan, step, words, tmp_path, monkeypatch, caplog
):
    own = [*words[key], "--control_arm", "false", *plan.split()]
    own[own.index("--learning_rate") + 1] = "1e-12" if step == 16 else "1e-3"
    with monkeypatch.context() as patch:
        signal_at_last_score(patch, arm, step)
        ended = call(key, tmp_path / "out", *own)
    assert ended.code == 75, ended.err
    assert f"asked to stop when {arm}, seed 42, was trained; its model is kept" in ended.err
    assert "--resume_from_checkpoint true" in ended.err
    assert "checkpoint is saved" not in ended.err
    assert not (tmp_path / "out" / "report.json").exists()
    assert damage(tmp_path / "out" / "checkpoints" / f"{arm}-42" / "finished") == ""
    with monkeypatch.context() as patch:
        patch.setattr(TransferTrainer, "training_step", lambda *_, **__: 1 / 0)
        resumed = finished(key, tmp_path / "out", *own, *RESUME)
    assert f"{arm}, seed 42: already trained" in caplog.text
    assert resumed.arm(arm)["details"]["steps"] == step
    assert_same(resumed, finished(key, tmp_path / "whole", *own))


@pytest.mark.parametrize("strategy", ["epoch", "steps"])
def test_a_training_that_was_stopped_early_does_not_go_on(strategy, words, tmp_path, monkeypatch):
    """Killed when it was trained: the first score stays the best, and the next ends it at step 16."""
    own = [*words["finetune"], "--early_stopping_patience", "1", "--control_arm", "false"]
    own += ["--eval_strategy", strategy, "--save_strategy", strategy]
    own += [] if strategy == "epoch" else ["--eval_steps", "8", "--save_steps", "8"]
    own[own.index("--learning_rate") + 1] = "1e-12"
    with monkeypatch.context() as patch:
        patch.setattr(arms, "_finish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            call("finetune", tmp_path / "out", *own)
    seen, plain = [], TransferTrainer.training_step
    monkeypatch.setattr(TransferTrainer, "training_step", lambda *args, **kw: seen.append(args) or plain(*args, **kw))
    resumed = finished("finetune", tmp_path / "out", *own, *RESUME)
    assert resumed.arm("fine-tuned")["details"]["steps"] == 16
    assert not seen


def test_what_is_restored_keeps_its_place_among_the_callbacks(words, tmp_path, monkeypatch):
    """The judge of a trial looks whether early stopping, which comes before it, has stopped already."""
    orders, plain = [], TransferTrainer.training_step

    def training_step(self, *arguments, **options):
        orders.append([type(callback).__name__ for callback in self.callback_handler.callbacks])
        return plain(self, *arguments, **options)

    class Last(TrainerCallback):
        pass

    made = TransferTrainer.__init__

    def init(self, *arguments, **options):
        made(self, *arguments, **options)
        self.add_callback(Last())

    monkeypatch.setattr(TransferTrainer, "training_step", training_step)
    monkeypatch.setattr(TransferTrainer, "__init__", init)
    own = [*words["finetune"], "--early_stopping_patience", "2", "--control_arm", "false"]
    interrupted("finetune", tmp_path / "out", own, monkeypatch, 9, "fine-tuned")
    before = orders[-1]
    assert before[-2:] == ["EarlyStoppingCallback", "Last"]
    finished("finetune", tmp_path / "out", *own, *RESUME)
    assert orders[-1] == before


def test_a_damaged_checkpoint_is_skipped(words, whole, tmp_path, monkeypatch, caplog):
    newest = interrupted("finetune", tmp_path / "out", words["finetune"], monkeypatch, 10, "fine-tuned")
    optimizer = newest / "optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:-1])
    again = finished("finetune", tmp_path / "out", *words["finetune"], *RESUME)
    assert "skipping checkpoint-11: optimizer.pt was changed" in caplog.text
    assert "resuming from checkpoint-8" in caplog.text
    assert_same(again, whole["finetune"])


def refused_to_resume(key, folder, *words):
    ended = call(key, folder, *words, *RESUME)
    assert ended.code == 2, ended.err
    assert not (folder / "report.json").exists()
    return ended.err


def test_what_cannot_be_resumed(words, tmp_path, monkeypatch):
    out, own = tmp_path / "out", words["finetune"]
    checkpoint = interrupted("finetune", out, own, monkeypatch, 10, "fine-tuned")

    def changed(option, value):
        other = list(own)
        other[other.index(option) + 1] = value
        return other

    message = refused_to_resume("finetune", out, *changed("--learning_rate", "2e-3"))
    assert "learning_rate: was 0.001, is 0.002" in message
    assert "data_fingerprint" in refused_to_resume("finetune", out, *changed("--max_train_samples", "59"))
    assert "linear_probe: was True, is False" in refused_to_resume("finetune", out, *own, "--linear_probe", "false")
    assert "bf16: was False, is True" in refused_to_resume("finetune", out, *changed("--bf16", "true"))
    message = refused_to_resume("finetune", out, *changed("--gradient_accumulation_steps", "1"))
    assert "gradient_accumulation_steps: was 2, is 1" in message
    assert "--allow_topology_change" in message

    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["topology"]["processes"] = 2
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    assert "processes: was 2, is 1" in refused_to_resume("finetune", out, *own)
    for folder in checkpoint.parent.glob("checkpoint-*"):
        (folder / "model.safetensors").unlink()
    message = refused_to_resume("finetune", out, *own)
    assert "None of the 2 checkpoints" in message
    assert "--overwrite" in message


def test_a_finished_arm_of_another_run_is_not_taken_over(words, tmp_path, monkeypatch):
    interrupted("distill", tmp_path / "out", words["distill"], monkeypatch, 3, "distilled")
    other = list(words["distill"])
    other[other.index("--learning_rate") + 1] = "2e-3"
    assert "learning_rate: was 0.001, is 0.002" in refused_to_resume("distill", tmp_path / "out", *other)


def test_an_interrupted_run_is_not_overwritten_by_mistake(words, tmp_path, monkeypatch):
    checkpoint = interrupted("finetune", tmp_path / "out", words["finetune"], monkeypatch, 3, "fine-tuned")
    ended = call("finetune", tmp_path / "out", *words["finetune"])
    assert ended.code == 2
    assert "is not empty" in ended.err
    assert damage(checkpoint) == ""
    finished("finetune", tmp_path / "out", *words["finetune"], "--overwrite", "true", "--control_arm", "false")


def test_resuming_without_a_checkpoint_says_so(words, tmp_path, caplog):
    finished("finetune", tmp_path / "out", *words["finetune"], *RESUME, "--control_arm", "false")
    assert "there is nothing to resume" in caplog.text


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_without_an_unfinished_run_is_left_alone(words, tiny_checkpoint, tmp_path):
    """As job scripts do that always pass the option: here with the base model's folder."""
    folder = tmp_path / "base"
    shutil.copytree(tiny_checkpoint("bert"), folder)
    (folder / "README.md").write_text("my own")
    (folder / "checkpoints" / "mine").mkdir(parents=True)
    (folder / "checkpoints" / "mine" / "weights.pt").write_text("years of work")
    before = contents(folder)
    assert "holds no unfinished run" in refused_to_resume("finetune", folder, *words["finetune"])
    assert contents(folder) == before


def test_a_run_that_ends_before_its_first_checkpoint_is_resumed(words, whole, tmp_path, monkeypatch):
    """Killed, not asked to stop; the job script gives the same words each time. Files of others in it stay."""
    own = [*words["finetune"], *RESUME]
    with monkeypatch.context() as patch:
        patch.setattr(TransferTrainer, "training_step", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            call("finetune", tmp_path / "out", *own)
    (tmp_path / "out" / "checkpoints" / "mine").mkdir()
    (tmp_path / "out" / "checkpoints" / "mine" / "weights.pt").write_text("years of work")
    assert_same(finished("finetune", tmp_path / "out", *own), whole["finetune"])
    assert set(contents(tmp_path / "out" / "checkpoints")) == {"mine/weights.pt"}
    assert "is finished" in call("finetune", tmp_path / "out", *own).err


def test_what_loads_of_a_run_killed_while_it_wrote_predicts_as_it_should(words, whole, tmp_path, monkeypatch):
    plain, out = result.save_classifier, tmp_path / "out"

    def save_and_die(*arguments):
        plain(*arguments)
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(result, "save_classifier", save_and_die)
        with pytest.raises(ZeroDivisionError):
            call("finetune", out, *words["finetune"])
    assert not (out / "report.json").exists()
    ours, theirs = (Classifier.load(str(folder)) for folder in (out, whole["finetune"].folder))
    assert ours.temperature == theirs.temperature != 1
    assert ours.max_length == theirs.max_length == 32
    assert_same(finished("finetune", out, *words["finetune"], *RESUME), whole["finetune"])


def test_rates_per_layer_and_the_way_from_the_start_resume_too(words, tmp_path, monkeypatch):
    plan = [*words["finetune"], "--layer_decay", "0.8", "--gradual_unfreezing", "0.7", "--l2_sp_weight", "0.1"]
    whole = finished("finetune", tmp_path / "whole", *plan)
    interrupted("finetune", tmp_path / "broken", plan, monkeypatch, 9, "fine-tuned")
    resumed = finished("finetune", tmp_path / "broken", *plan, *RESUME)
    assert sha256(resumed.folder) == sha256(whole.folder)
