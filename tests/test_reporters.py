"""Trackers: TensorBoard's files hold what was logged, lie where they should, and stay at home."""

import os
import signal

import pytest
from recipe_runs import call, finished, tiny_words
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nlpxfer.hub.folder import finished_files
from nlpxfer.train.trainer import TransferTrainer


@pytest.fixture
def words(tiny_data, tiny_checkpoint, tmp_path, monkeypatch):
    """Two epochs of eight steps."""
    monkeypatch.setenv("NLPXFER_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    own = ["--report_to", "tensorboard", "--logging_steps", "4", "--linear_probe", "false"]
    own += ["--control_arm", "false"]
    return [*tiny_words(tiny_data, tiny_checkpoint("bert"), epochs=2), *own]


def curves(folder):
    events = EventAccumulator(str(folder))
    events.Reload()
    assert events.Tags()["tensors"] == [], "no texts: they would hold paths of this machine"
    return {tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_each_arm_has_its_curves_and_the_hub_gets_none(words, tmp_path):
    run = finished("finetune", tmp_path / "out", *words, "--num_seeds", "2")
    folder = run.folder / "tensorboard"
    assert {path.name for path in folder.iterdir()} == {"fine-tuned-42", "fine-tuned-43"}
    one, other = (curves(folder / f"fine-tuned-{seed}") for seed in (42, 43))
    history = run.arm("fine-tuned")["details"]["history"]
    for tag, name in (("train/loss", "loss"), ("eval/accuracy", "eval_accuracy"), ("eval/loss", "eval_loss")):
        assert dict(one[tag]) == pytest.approx({line["step"]: line[name] for line in history if name in line}), tag
        assert [step for step, _ in one[tag]] == [step for step, _ in other[tag]]
    assert [step for step, _ in one["train/loss"]] == [4, 8, 12, 16]
    assert [step for step, _ in one["eval/macro_f1"]] == [8, 16]
    assert one["train/loss"] != other["train/loss"]
    for path in folder.rglob("events*"):
        assert str(tmp_path).encode() not in path.read_bytes()
    assert not [name for name in finished_files(run.folder) if "tensorboard" in name]
    again = finished("finetune", tmp_path / "out", *words, "--overwrite", "true", "--max_steps", "1")
    assert {path.name for path in (again.folder / "tensorboard").iterdir()} == {"fine-tuned-42"}


def test_a_resumed_run_goes_on_with_its_curves_in_the_folder_that_was_named(words, tmp_path, monkeypatch):
    """Killed after the second log line, resumed from the first epoch: no step twice, none left out."""
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    plain = TransferTrainer.training_step

    def training_step(self, *arguments, **options):
        if self.state.global_step == 12:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            raise KeyboardInterrupt
        return plain(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(TransferTrainer, "training_step", training_step)
        assert call("finetune", tmp_path / "out", *words).code == 75
    assert [step for step, _ in curves(tmp_path / "logs" / "fine-tuned-42")["train/loss"]] == [4, 8, 12]
    finished("finetune", tmp_path / "out", *words, "--resume_from_checkpoint", "true")
    found = curves(tmp_path / "logs" / "fine-tuned-42")
    assert [step for step, _ in found["train/loss"]] == [4, 8, 12, 16]
    assert [step for step, _ in found["eval/accuracy"]] == [8, 16]
    assert not (tmp_path / "out" / "tensorboard").exists()
