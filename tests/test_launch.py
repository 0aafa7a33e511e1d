"""How the run was started is read right, and a launch that came up short is refused."""

import logging
import os
import pickle
import random

import numpy as np
import psutil
import pytest
import torch
import yaml

from nlpxfer.errors import ConfigError, LaunchError, NoSpaceError, OutputExistsError
from nlpxfer.train import launch
from nlpxfer.train.launch import (
    by_itself,
    check_process_count,
    is_main_process,
    on_main,
    processes_asked_for,
    seed_everything,
    use_threads,
    wait_for_everyone,
    world,
)

LAUNCH = ["/venv/bin/python", "/venv/bin/accelerate", "launch"]


@pytest.fixture
def parent(monkeypatch, tmp_path):
    """Sets the command line of the parent process; there is no default configuration file."""

    class Parent:
        words: list[str] = []

        def cmdline(self):
            return self.words

    monkeypatch.setattr(psutil.Process, "parent", lambda self: Parent)
    monkeypatch.setattr(Parent, "cmdline", classmethod(lambda cls: cls.words))
    monkeypatch.setattr("accelerate.commands.config.config_args.default_config_file", str(tmp_path / "none.yaml"))

    def set_words(*words):
        Parent.words = list(words)

    return set_words


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        (["--num_processes", "2", "recipes/distill.py"], 2),
        (["--num_processes=2", "recipes/distill.py"], 2),
        (["--num-processes", "4", "recipes/distill.py"], 4),
        (["--num-processes=4", "recipes/distill.py"], 4),
        (["--cpu", "--num_processes", "3", "--mixed_precision", "bf16", "recipes/distill.py", "--seed", "1"], 3),
        (["--multi_gpu", "recipes/distill.py"], None),
        (["recipes/distill.py", "--overwrite"], None),
        (["-m", "--num_processes", "2", "nlpxfer.cli", "run", "distill"], 2),
        # what follows the script belongs to the script
        (["recipes/distill.py", "--num_processes", "9"], None),
        (["--multi_gpu", "recipes/distill.py", "--num_processes", "9"], None),
        (["--num_processes", "2", "recipes/distill.py", "--num_processes", "9", "--overwrite"], 2),
        (["recipes/distill.py", "--config_file", "nowhere.yaml", "--overwrite"], None),
    ],
)
@pytest.mark.parametrize(
    "launcher",
    [
        LAUNCH,
        ["/usr/bin/accelerate", "launch"],
        ["/venv/bin/python", "/venv/bin/accelerate-launch"],
        ["python", "-m", "accelerate.commands.launch"],
        ["python", "-u", "-m", "accelerate.commands.accelerate_cli", "launch"],
        ["python", "/lib/accelerate/commands/launch.py"],
    ],
    ids=lambda words: " ".join(words[-2:]),
)
def test_launcher_words(parent, launcher, words, asked):
    parent(*launcher, *words)
    assert processes_asked_for() == asked


@pytest.mark.parametrize(
    "words",
    [
        ["/bin/bash"],
        [],
        ["python", "-m", "pytest", "tests/test_launch.py", "--num_processes", "2"],
        ["torchrun", "--nproc_per_node", "2", "recipes/distill.py"],
        ["python", "mine/launch.py", "--num_processes", "2", "x.py"],
        ["accelerate", "config", "--num_processes", "2"],
        [*LAUNCH, "--no_such_option", "--num_processes"],
    ],
)
def test_no_launcher_to_be_read(parent, words, capsys):
    parent(*words)
    assert processes_asked_for() is None
    assert capsys.readouterr() == ("", "")


def test_no_parent_or_no_right_to_read_it(monkeypatch):
    monkeypatch.setattr(psutil.Process, "parent", lambda self: None)
    assert processes_asked_for() is None

    def denied(self):
        raise psutil.AccessDenied

    monkeypatch.setattr(psutil.Process, "parent", denied)
    assert processes_asked_for() is None


@pytest.mark.parametrize(("value", "asked"), [(3, 3), (None, None), (-1, None), ("2", 2)])
@pytest.mark.parametrize("form", ["--config_file {}", "--config-file={}", None], ids=["given", "equals", "default"])
def test_configuration_file(parent, tmp_path, monkeypatch, form, value, asked):
    file = tmp_path / "accelerate.yaml"
    file.write_text(yaml.safe_dump({"distributed_type": "MULTI_CPU", "num_processes": value}))
    words = form.format(file).split() if form else []
    if form is None:
        monkeypatch.setattr("accelerate.commands.config.config_args.default_config_file", str(file))
    parent(*LAUNCH, *words, "recipes/distill.py")
    assert processes_asked_for() == asked
    parent(*LAUNCH, *words, "--num_processes", "7", "recipes/distill.py")
    assert processes_asked_for() == 7


def test_empty_configuration_file(parent, tmp_path):
    file = tmp_path / "accelerate.yaml"
    file.write_text("")
    parent(*LAUNCH, "--config_file", str(file), "recipes/distill.py")
    assert processes_asked_for() is None


def test_too_few_processes_are_refused(parent, monkeypatch):
    parent(*LAUNCH, "--cpu", "--num_processes", "2", "recipes/distill.py")
    with pytest.raises(LaunchError) as caught:
        check_process_count()
    message = str(caught.value)
    assert message.startswith("2 processes were asked for, but 1 is running.")
    assert "torchrun --nproc_per_node 2" in message
    assert "--num_processes 2" in message
    monkeypatch.setattr(launch, "world", lambda: (0, 2))
    check_process_count()
    parent(*LAUNCH, "--num_processes", "4", "recipes/distill.py")
    with pytest.raises(LaunchError, match="4 processes were asked for, but 2 are running"):
        check_process_count()
    parent("/bin/bash")
    check_process_count()


def test_one_process():
    assert world() == (0, 1)
    assert is_main_process()
    wait_for_everyone()


def test_seeds_repeat():
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002

    seed_everything(5)
    first = draw()
    seed_everything(6)
    second = draw()
    seed_everything(5)
    assert draw() == first
    assert all(a != b for a, b in zip(first, second, strict=True))


@pytest.fixture
def threads():
    """Restores the number of threads."""
    before = torch.get_num_threads()
    yield before
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("wanted", "cores", "processes", "expected"),
    [(3, 8, 1, 3), (3, 8, 4, 3), (None, 6, 1, 6), (None, 6, 2, 3), (None, 7, 2, 3), (None, 2, 4, 1)],
)
def test_threads(monkeypatch, threads, caplog, wanted, cores, processes, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    torch.set_num_threads(9)
    caplog.set_level(logging.INFO, "nlpxfer")
    assert use_threads(wanted) == expected
    assert torch.get_num_threads() == expected
    assert caplog.messages == [f"using {expected} CPU threads instead of 9"]
    assert use_threads(wanted) == expected
    assert len(caplog.messages) == 1


def test_a_process_by_itself_shares_no_work(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "barrier", lambda: pytest.fail("nobody comes"))
    assert world() == (1, 2)
    with by_itself():
        assert world() == (0, 1)
        wait_for_everyone()
    assert world() == (1, 2)


@pytest.mark.parametrize(
    "error",
    [
        NoSpaceError("no room", why="the disk is full", fix="free some"),
        OutputExistsError("in use"),
        ConfigError.from_faults(["a: is wrong", "b: too"]),
        PermissionError(13, "Permission denied", "/out"),
    ],
)
def test_an_error_of_the_first_process_is_raised_in_all_as_it_is(error, monkeypatch):
    sent = []

    def fail():
        raise error

    monkeypatch.setattr(launch, "from_main", lambda value: pickle.loads(sent[0]) if sent else value)
    with pytest.raises(type(error)) as caught:
        on_main(fail)
    assert caught.value is error
    sent.append(pickle.dumps((None, error)))
    monkeypatch.setattr(launch, "world", lambda: (1, 2))
    with pytest.raises(type(error)) as caught:
        on_main(lambda: pytest.fail("not the first process"))
    assert str(caught.value) == str(error)
    assert vars(caught.value) == vars(error)


def test_what_is_no_fault_of_the_user_is_not_carried_over():
    with pytest.raises(ZeroDivisionError):
        on_main(lambda: 1 // 0)
    assert on_main(lambda: 3) == 3
