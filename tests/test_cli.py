"""The `nlpxfer` command, and the exit codes of every entry point."""

import errno
import io
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from transformers import IntervalStrategy

import nlpxfer
from nlpxfer import cli
from nlpxfer import recipes as recipes_module
from nlpxfer.config import parse
from nlpxfer.errors import ConfigError, Interrupted

RECIPE = """
import sys
from dataclasses import dataclass
from nlpxfer.cli import run_main
from nlpxfer.errors import ConfigError

@dataclass
class Options:
    name: str

def main(argv):
    words = sys.argv[1:]
    if "bad" in words:
        raise ConfigError("bad: unknown option")
    sys.stdout.write(repr((Options("x"), sys.modules[Options.__module__].__file__ == __file__, words)))

if __name__ == "__main__":
    run_main(main)
"""


@pytest.fixture
def recipes(tmp_path, monkeypatch):
    (tmp_path / "distill.py").write_text(RECIPE)
    (tmp_path / "finetune.py").write_text(RECIPE)
    monkeypatch.setattr(recipes_module, "recipe_folder", lambda: tmp_path)
    return tmp_path


def exit_code(call, *args):
    with pytest.raises(SystemExit) as left:
        call(*args)
    return left.value.code


def raises(error):
    def main(argv):
        raise error

    return main


@pytest.mark.parametrize(
    ("main", "code", "said"),
    [
        (lambda argv: "dropped", 0, ""),
        (raises(ConfigError("no such file", fix="make demo")), 2, "no such file\n  Try: make demo\n"),
        (raises(Interrupted("stopped at step 7")), 75, "stopped at step 7\n"),
        (raises(KeyboardInterrupt()), 75, "Interrupted.\n"),
        (lambda argv: os.kill(os.getpid(), signal.SIGTERM), 75, "Interrupted.\n"),
        (lambda argv: os.mkdir("/dev/null/out"), 2, "/dev/null/out: Not a directory.\n"),
        (lambda argv: os.mkdir("/dev/null"), 2, "/dev/null: File exists.\n"),
        (raises(OSError(errno.ENOSPC, "No space left on device")), 2, "A file: No space left on device.\n"),
    ],
)
def test_exit_codes(main, code, said, capsys):
    assert exit_code(cli.run_main, main, []) == code
    assert capsys.readouterr().err == said


def test_another_process_gives_the_first_time_to_tell_an_error_and_tells_no_stop(monkeypatch, capsys):
    waited = []
    monkeypatch.setattr(cli.time, "sleep", waited.append)
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert exit_code(cli.run_main, raises(ConfigError("no such file")), []) == 2
    assert (waited, capsys.readouterr().err) == ([], "no such file\n")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert exit_code(cli.run_main, raises(ConfigError("no such file")), []) == 2
    assert (waited, capsys.readouterr().err) == ([cli.PATIENCE], "no such file\n")
    for stop in (Interrupted("stopped at step 7"), KeyboardInterrupt()):
        assert exit_code(cli.run_main, raises(stop), []) == 75
    assert (waited, capsys.readouterr().err) == ([cli.PATIENCE], "")


def test_a_fault_of_nlpxfer_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        cli.run_main(lambda argv: 1 / 0, [])


def test_a_file_that_nlpxfer_should_have_had_keeps_its_traceback():
    with pytest.raises(FileNotFoundError):
        cli.run_main(lambda argv: open("/nowhere"), [])


def test_a_label_that_the_terminal_cannot_show_ends_nothing(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii", write_through=True))
    assert exit_code(cli.run_main, lambda argv: sys.stdout.write("Größe"), []) == 0
    assert written.getvalue() == b"Gr??e"


def test_version(capsys):
    assert exit_code(cli.main, ["--version"]) == 0
    assert capsys.readouterr().out == f"nlpxfer {nlpxfer.__version__}\n"


def test_methods_shows_every_method(capsys, monkeypatch):
    from nlpxfer.methods import available_methods

    monkeypatch.setenv("COLUMNS", "200")
    assert exit_code(cli.main, ["methods"]) == 0
    shown = capsys.readouterr().out
    for row in available_methods():
        line = next(line for line in shown.splitlines() if line.startswith(row.key))
        assert row.summary in line
        assert row.source in line


@pytest.mark.parametrize(("words", "private"), [([], True), (["--public"], False)])
def test_push_shows_where_the_model_is(words, private, capsys, monkeypatch):
    asked = []

    def push_folder(folder, repo_id, *, private):
        asked.append((str(folder), repo_id, private))
        return SimpleNamespace(url="https://hub/me/it")

    monkeypatch.setattr("nlpxfer.hub.push_folder", push_folder)
    assert exit_code(cli.main, ["push", "runs/it", "--hub_model_id", "me/it", *words]) == 0
    assert asked == [("runs/it", "me/it", private)]
    assert capsys.readouterr().out == "https://hub/me/it\n"


def test_run_is_the_recipe_as_a_program(recipes, capsys):
    before = list(sys.argv)
    words = ["config.yaml", "--help", "--", "--x", "1"]
    assert exit_code(cli.main, ["run", "distill", *words]) == 0
    assert capsys.readouterr().out == f"(Options(name='x'), True, {words})"
    assert sys.argv == before


def test_run_keeps_the_exit_code_of_the_recipe(recipes, capsys):
    assert exit_code(cli.main, ["run", "distill", "bad"]) == 2
    assert capsys.readouterr().err == "bad: unknown option\n"


def test_run_names_the_nearest_recipe(recipes, capsys):
    assert exit_code(cli.main, ["run", "distil"]) == 2
    said = capsys.readouterr().err
    assert said == "There is no recipe 'distil'. Did you mean 'distill'?\n  Available: distill, finetune\n"


def test_run_without_a_method_is_refused(recipes, capsys):
    assert exit_code(cli.main, ["run"]) == 2
    assert "METHOD" in capsys.readouterr().err


@dataclass(kw_only=True)
class Options:
    learning_rate: float | None = None
    max_steps: int = -1
    control_arm: bool = True
    search: dict[str, Any] | None = None
    train_file: str | None = None
    teachers: list[str] | None = None
    strategy: str = "no"


@pytest.fixture
def run(monkeypatch):
    """`run_recipe` of a recipe that returns its options."""
    recipe = SimpleNamespace(main=lambda argv: parse((Options,), argv)[0])
    monkeypatch.setattr(recipes_module, "load_recipe", lambda name: recipe)
    return partial(recipes_module.run_recipe, "mine")


def test_values_of_numpy_and_paths_are_options(run):
    found = run(
        learning_rate=np.float64(1e-3),
        max_steps=np.int64(7),
        control_arm=np.bool_(False),
        search={"rate": np.float32(0.5), "files": (Path("a"), "b")},
        train_file=Path("rows.csv"),
        teachers=(Path("one"), "two"),
        strategy=IntervalStrategy.EPOCH,
    )
    assert found == Options(
        learning_rate=1e-3,
        max_steps=7,
        control_arm=False,
        search={"rate": 0.5, "files": ["a", "b"]},
        train_file="rows.csv",
        teachers=["one", "two"],
        strategy="epoch",
    )
    assert run(teachers=np.array(["x", "y"])).teachers == ["x", "y"]


def test_values_that_are_no_option_are_named(run):
    with pytest.raises(ConfigError) as caught:
        run(train_file=object(), learning_rate=1e-3, search={"a": [object()]})
    assert caught.value.faults == (
        "train_file: a value of the type object cannot be written down",
        "search: a value of the type dict cannot be written down",
    )


def test_the_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "nlpxfer", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"nlpxfer {nlpxfer.__version__}\n"
    done = subprocess.run([sys.executable, "-m", "nlpxfer", "--help"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: nlpxfer ")


def test_recipes_come_from_the_checkout_before_the_package(tmp_path, monkeypatch):
    package = tmp_path / "nlpxfer"
    (package / "_recipes").mkdir(parents=True)
    monkeypatch.setattr(recipes_module, "PACKAGE_FOLDER", package)
    assert recipes_module.recipe_folder() == package / "_recipes"
    (tmp_path / "recipes").mkdir()
    assert recipes_module.recipe_folder() == package / "_recipes"  # some other folder beside site-packages/nlpxfer
    (tmp_path / "pyproject.toml").touch()
    assert recipes_module.recipe_folder() == tmp_path / "recipes"


def test_an_installation_without_recipes_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(recipes_module, "PACKAGE_FOLDER", tmp_path / "nlpxfer")
    with pytest.raises(ConfigError, match="has no recipes"):
        recipes_module.recipe_folder()
