"""What the benchmarks share: options, data sets, results that survive an interruption, and facts about the machine.

A benchmark is a list of cells, each a measurement that takes seconds to minutes. A finished cell is written to
`<name>_<scale>.partial.json` at once; the same command after an interruption measures only what is missing. At the
end `<name>_<scale>.json` holds the cells, the summary and all that is needed to repeat it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import multiprocessing
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState
from data_sets import BUNDLED, EXTERNAL
from tqdm.auto import tqdm

from nlpxfer.config import default_learning_rate
from nlpxfer.config.options import DEFAULT_HEAD_SIZE
from nlpxfer.errors import ConfigError
from nlpxfer.evaluate.cost import peak_memory_bytes
from nlpxfer.evaluate.metrics import classification_metrics
from nlpxfer.recipes import load_recipe
from nlpxfer.run import Run
from nlpxfer.strict_json import write_json_whole

logger = logging.getLogger("benchmarks")

Array = np.ndarray[Any, Any]
BOTH = "banking77,debian-sections"
SCALES = ("smoke", "small", "full")
PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "scikit-learn",
    "numpy",
    "textbrewer",
    "onnxruntime",
    "model2vec",
)
MODEL = "all-MiniLM-L6-v2"
DEFAULTS = {"learning_rate": default_learning_rate(384), "linear_probe_size": DEFAULT_HEAD_SIZE}
"""Of the recipes, for a model as wide as `MODEL`; cells that were measured with others are not taken over."""


class Skipped(Exception):  # noqa: N818
    """A cell cannot be measured here; its message says why."""


def arguments(name: str, text: str, argv: Sequence[str] | None, data: str = BOTH) -> argparse.Namespace:
    """The options that all benchmarks have; `words` is the command line as given, `data` the usual data sets."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog=f"{name}.py", description=text.partition("\n")[0])
    parser.add_argument("--scale", choices=SCALES, default="small", help="smoke: a minute, figures mean nothing")
    parser.add_argument("--smoke", dest="scale", action="store_const", const="smoke", help="the same as --scale smoke")
    parser.add_argument("--data", default=data, metavar="A,B", help=f"data sets; default: {data}")
    parser.add_argument("--only", action="append", metavar="CELL", help="cells with this in their name; repeatable")
    parser.add_argument("--model", default=MODEL, help="checkpoint to start from")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results", help="where results go")
    parser.add_argument("--work", type=Path, default=Path("runs/benchmarks"), help="folder for models while it runs")
    parser.add_argument("--anew", action="store_true", help="drop the finished cells of an earlier run")
    asked = parser.parse_args(words)
    asked.words, asked.data = words, asked.data.split(",")
    unknown = [name for name in asked.data if name not in {*BUNDLED, *EXTERNAL}]
    if unknown:
        raise ConfigError(f"--data: {unknown[0]!r} is not known.", available=[*BUNDLED, *EXTERNAL])
    return asked


class Results:
    """The cells of a benchmark, kept on disk as they are finished.

    Args:
        name: Name of the benchmark.
        asked: The options; `results`, `scale`, `only`, `anew` and `words` are read.
        settings: Sizes and seeds; finished cells of other settings or library versions are refused.
        several_machines: No figure that depends on the machine is compared between cells, so that those of several
            machines may stand in one file: those not measured on the first one say on which. Else they are refused.
    """

    def __init__(
        self, name: str, asked: argparse.Namespace, settings: Mapping[str, Any], *, several_machines: bool = False
    ) -> None:
        self.name, self.asked, self.several_machines = name, asked, several_machines
        self.path = asked.results / f"{name}_{asked.scale}.json"
        self.partial = asked.results / f"{name}_{asked.scale}.partial.json"
        asked.results.mkdir(parents=True, exist_ok=True)
        chosen = json.loads(json.dumps({"defaults": DEFAULTS, **settings}))
        self.facts = {"settings": chosen, "versions": versions(), "machine": machine()}
        self.elsewhere = False
        self.cells: dict[str, Any] = {}
        self.data: dict[str, str] = {}
        self.skipped: dict[str, str] = {}
        if self.partial.is_file() and not asked.anew:
            self._take_over()

    def _take_over(self) -> None:
        found = json.loads(self.partial.read_text(encoding="utf-8"))
        if self.several_machines:
            self.elsewhere = self.facts["machine"] != found["facts"]["machine"]
            self.facts["machine"] = found["facts"]["machine"]
        for part, now in self.facts.items():
            before = found["facts"][part]
            changed = [key for key in {*before, *now} if key in before and key in now and before[key] != now[key]]
            if changed:
                raise ConfigError(
                    f"{self.partial.name} holds cells measured with other {part}: {', '.join(sorted(changed))}.",
                    fix="--anew measures all cells again",
                )
        self.facts["versions"] = found["facts"]["versions"] | self.facts["versions"]
        self.cells, self.data = found["cells"], found["data"]
        if self.cells:
            logger.info("%s: %d finished cells are kept", self.partial.name, len(self.cells))

    def use_data(self, name: str, fingerprint: str) -> None:
        """Note what the cells of a data set are measured on.

        Raises:
            ConfigError: Finished cells were measured on other rows.
        """
        known = self.data.setdefault(name, fingerprint)
        if known != fingerprint and any(key.startswith(f"{name}/") for key in self.cells):
            raise ConfigError(f"{self.partial.name} holds cells measured on other rows of {name}.", fix="--anew")
        self.data[name] = fingerprint

    def wants(self, key: str) -> bool:
        """Whether the command line asks for this cell."""
        return not self.asked.only or any(part in key for part in self.asked.only)

    def missing(self, cells: Iterable[str]) -> list[str]:
        """Those of the cells that are not finished and were not left out."""
        return [key for key in cells if key not in self.cells and key not in self.skipped]

    def measure(self, cells: Mapping[str, Callable[[], dict[str, Any]]]) -> None:
        """Measure the cells that are asked for and missing, in order, with a progress bar."""
        missing = {key: cells[key] for key in self.missing(cells) if self.wants(key)}
        quiet = not sys.stderr.isatty()
        for key, cell in (bar := tqdm(missing.items(), desc=self.name, unit="cell", disable=quiet)):
            bar.set_postfix_str(key)
            load, start = os.getloadavg()[0] if hasattr(os, "getloadavg") else None, time.perf_counter()
            # accelerate keeps one precision per process and refuses another; cells differ in it
            AcceleratorState._reset_state()
            try:
                found = cell()
            except Skipped as reason:
                self.skipped[key] = str(reason)
                logger.warning("%s is left out: %s", key, reason)
                continue
            found |= {"cell_seconds": time.perf_counter() - start, "load_before": load, "date": now()}
            found |= {"machine": machine()} if self.elsewhere else {}
            self.cells[key] = tidy(found)
            write_json_whole(self.partial, {"facts": self.facts, "data": self.data, "cells": self.cells})
            logger.info("%s: %.0f s", key, found["cell_seconds"])

    def get(self, key: str) -> dict[str, Any] | None:
        """A finished cell, or None."""
        return self.cells.get(key)

    def under(self, prefix: str) -> list[dict[str, Any]]:
        """Finished cells whose name starts with `prefix`, in the order they were measured."""
        return [cell for key, cell in self.cells.items() if key.startswith(prefix)]

    def write(self, summary: Mapping[str, Any]) -> Path:
        """Write the results file and return its path. Keys of a cell that start with _ stay in the partial file."""
        shown = {k: {a: b for a, b in cell.items() if not a.startswith("_")} for k, cell in self.cells.items()}
        document = {
            "benchmark": self.name,
            "scale": self.asked.scale,
            "command": shlex.join(["python", f"benchmarks/{self.name}.py", *_without_folders(self.asked.words)]),
            "date": now(),
            **self.facts,
            "data": self.data,
            "summary": tidy(dict(summary)),
            "skipped": self.skipped,
            "cells": shown,
        }
        write_json_whole(self.path, document)
        return self.path


def _without_folders(words: Sequence[str]) -> list[str]:
    """The command line without the options that name a folder of this machine and do not change the figures."""
    kept, skip = [], False
    for word in words:
        if skip or word in ("--results", "--work"):
            skip = not skip
        elif not word.startswith(("--results=", "--work=")):
            kept.append(word)
    return kept


def now() -> str:
    """Date and time, UTC."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that the figures depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """Processor, cores that this process may use, and the GPU if there is one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    model = platform.processor()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    capability = torch.backends.cpu.get_cpu_capability()
    return {"processor": model, "cores": cores, "instructions": capability, "gpu": gpu, "system": platform.system()}


def tidy(value: Any) -> Any:  # noqa: ANN401 - anything JSON can hold
    """The same value with floats of six digits."""
    if isinstance(value, (float, np.floating)):
        return float(f"{float(value):.6g}")
    if isinstance(value, Mapping):
        return {str(key): tidy(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [tidy(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value


def at_home(cells: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The cells that were measured on the first machine of their file; all of them where none was."""
    return [cell for cell in cells if "machine" not in cell] or list(cells)


def run_recipe(recipe: str, words: Sequence[str]) -> Any:  # noqa: ANN401 - what the recipe returns
    """Run a recipe with a command line."""
    return load_recipe(recipe).main(list(words))


def most_memory(function: Callable[..., object], *values: Any, **named: Any) -> int:  # noqa: ANN401
    """Call a function in a new process: the most memory that this ever had, in bytes.

    Memory that earlier work left to Python does not count.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        process.submit(function, *values, **named).result()
        return process.submit(peak_memory_bytes).result()


def scores(run: Run, validation_logits: Array, test_logits: Array) -> dict[str, Any]:
    """Accuracy and macro-F1 on both splits, test accuracy without leaking rows, and which test rows were right."""
    labels = run.labels("test")
    clean = np.setdiff1d(np.arange(len(labels)), sorted(run.data.leaks.get("train_test", {}).get("rows", [])))
    correct = np.argmax(test_logits, axis=1) == labels
    without = float(correct[clean].mean())
    found: dict[str, Any] = {"test_accuracy_without_leaks": without, "leaks": len(labels) - len(clean)}
    for split, logits in (("validation", validation_logits), ("test", test_logits)):
        metrics = classification_metrics(logits, run.labels(split))
        found |= {f"{split}_{name}": metrics[name] for name in ("accuracy", "macro_f1")}
    return found | {"_correct": np.packbits(correct).tobytes().hex(), "_rows": len(labels)}


def correctness(cell: Mapping[str, Any]) -> Array:
    """Which test rows were right, from a cell made with `scores`."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(cell["_correct"]), dtype=np.uint8))[: cell["_rows"]].astype(bool)


def mean_and_deviation(values: Iterable[float]) -> dict[str, Any]:
    """Mean, sample standard deviation (None for a single value) and the values."""
    numbers = list(values)
    deviation = float(np.std(numbers, ddof=1)) if len(numbers) > 1 else None
    return {"mean": float(np.mean(numbers)), "deviation": deviation, "values": numbers}


def median_and_range(values: Iterable[float]) -> dict[str, Any]:
    """Median, lowest, highest and the values."""
    numbers = list(values)
    return {"median": float(np.median(numbers)), "low": min(numbers), "high": max(numbers), "values": numbers}


def judged(value: float, target: float, *, at_most: bool = False) -> dict[str, Any]:
    """A figure beside its target."""
    met = value <= target if at_most else value >= target
    return {"value": value, "target": target, "at_most": at_most, "met": met}


def best_rate(cells: Sequence[Mapping[str, Any]], rates: Sequence[float]) -> float:
    """The learning rate with the highest validation accuracy; the lower one of equals.

    Raises:
        Skipped: Not all rates have been measured.
    """
    if {cell["learning_rate"] for cell in cells} != set(rates):
        raise Skipped("its learning rates were not compared yet: measure the cells named sweep first")
    best = max(cells, key=lambda cell: (cell["validation_accuracy"], -cell["learning_rate"]))
    return float(best["learning_rate"])


def show_log() -> None:
    """Log lines of the benchmarks and of nlpxfer on standard error."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    for name in ("benchmarks", "nlpxfer"):
        logging.getLogger(name).setLevel(logging.INFO)
