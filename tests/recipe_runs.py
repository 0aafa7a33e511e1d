"""Recipes as a user calls them, but in this process: exit code, both streams, and the output folder."""

import contextlib
import io
import json
from dataclasses import dataclass, is_dataclass
from pathlib import Path

from nlpxfer.cli import run_main
from nlpxfer.config import DataOptions, RunOptions
from nlpxfer.methods import REGISTRY
from nlpxfer.recipes import load_recipe
from nlpxfer.report.report import validate_report

KEYS = [row.key for row in REGISTRY]
QUICK = ["--bf16", "false", "--num_threads", "1", "--max_length", "32", "--use_cpu", "true"]
"""Options of all tiny runs: float32 and one thread, so that runs repeat bit for bit."""


def option_classes(key):
    """The dataclasses whose fields are the options of a recipe."""
    module = load_recipe(key)
    own = [value for value in vars(module).values() if is_dataclass(value) and value.__module__ == module.__name__]
    own = [cls for cls in own if cls.__name__.endswith("Options")]
    runs = [cls for cls in own if issubclass(cls, RunOptions)] or [RunOptions]
    assert len(runs) == 1
    return DataOptions, *(cls for cls in own if cls not in runs), *runs


@dataclass(frozen=True)
class Ended:
    """How a call of a recipe ended."""

    code: int
    out: str
    err: str
    folder: Path

    @property
    def report(self):
        report = json.loads((self.folder / "report.json").read_text())
        assert validate_report(report) == []
        return report

    @property
    def run(self):
        return json.loads((self.folder / "run.json").read_text())

    def arm(self, name):
        return next(arm for arm in self.report["arms"] if arm["name"] == name)

    def logits_of(self, split="test"):
        return [json.loads(line) for line in (self.folder / "predictions" / f"{split}.jsonl").read_text().splitlines()]


def call(key, folder, *words):
    """Call a recipe; nothing is asserted about how it ends."""
    out, err = io.StringIO(), io.StringIO()
    code = None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            run_main(load_recipe(key).main, ["--output_dir", str(folder), *map(str, words)])
        except SystemExit as leaving:
            code = leaving.code
    return Ended(code, out.getvalue(), err.getvalue(), Path(folder))


def files(data):
    """Options that name the three files of the tiny data set."""
    named = {"train_file": data.train, "validation_file": data.validation, "test_file": data.test}
    return [word for name, path in named.items() for word in (f"--{name}", str(path))]


RANDOM = {"features": ["--classifier", "mlp"]}
"""Options with which the seed matters, where it does not by itself."""


def tiny_words(data, model=None, epochs=1, rate="1e-3", key=None, steps=None):
    """Options of a tiny run of any recipe, of `epochs` or of `steps`; `key` names one that takes neither by itself."""
    length = ["--num_train_epochs", str(epochs)] if steps is None else ["--max_steps", str(steps)]
    training = [*length, "--learning_rate", rate]
    if key == "features":
        training = [] if (epochs, rate) == (1, "1e-3") else [*RANDOM[key], *training]
    words = [*QUICK, *files(data), *training]
    return words + ([] if model is None else ["--model_name_or_path", str(model)])


def finished(key, folder, *words):
    """Call a recipe that must end well."""
    ended = call(key, folder, *words)
    assert ended.code == 0, ended.err
    return ended


def refused(key, folder, *words):
    """Call a recipe that must refuse; its message, without a traceback, and nothing that looks complete."""
    ended = call(key, folder, *words)
    assert ended.code == 2, (ended.code, ended.err)
    assert "Traceback" not in ended.err
    assert ended.err.strip()
    for name in ("config.json", "model.safetensors", "report.json"):
        assert not (Path(folder) / name).exists(), name
    return ended.err
