"""Every way to use a pretrained model for a task, side by side: scores, trained parameters, seconds and memory.

    NLPXFER_DATA=FOLDER python benchmarks/finetune_methods.py --scale small
    NLPXFER_DATA=FOLDER python benchmarks/finetune_methods.py --scale full --data banking77,clinc150

A cell `<data>/<method>/<seed>` is a run of the method's recipe with its defaults, save for what METHODS and the sizes
name. Its seconds hold features or linear probe, training, validation after each epoch and checkpoints; loading,
tokenising and the final scoring are not in them. `<data>/stock/<seed>` is the stock Trainer in float32 with its
training alone. The seconds of `taught` come on top of those of its teachers.

The cell `<data>/memory` runs each method for one epoch in a process of its own and notes the most resident memory that
this process had, libraries and data included (Linux).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import measuring
import torch
from data_sets import data_sets
from measuring import Results, Skipped, at_home, judged, mean_and_deviation, median_and_range, most_memory, run_recipe
from peers import STOCK, STOCK_LEARNING_RATE, train_stock

from nlpxfer.checkpoint.adapter_kinds import KINDS
from nlpxfer.cli import run_main
from nlpxfer.report.report import Report

ALL_DATA = "banking77,clinc150,scicite,pubmedqa,unfair_tos,debian-sections,debian-tags"
R_DROP = ["--r_drop_weight", "1", "--dropout", "0.1"]
METHODS: dict[str, tuple[str, list[str]]] = {
    "full": ("finetune", ["--linear_probe", "false"]),
    "lp-ft": ("finetune", []),
    "whole-probe": ("finetune", ["--linear_probe_size", "0"]),
    "features": ("features", []),
    "last-layer": ("features", ["--feature_layer", "-1"]),
    "lora": ("adapters", ["--adapter", "lora"]),
    "prefix": ("adapters", ["--adapter", "prefix"]),
    "layernorm": ("adapters", ["--adapter", "layernorm"]),
    "bitfit": ("adapters", ["--adapter", "bitfit"]),
    "r-drop": ("finetune", R_DROP),
    "lora-r-drop": ("adapters", ["--adapter", "lora", *R_DROP]),
    "taught": ("distill", []),
}
"""Method -> its recipe and options. All read the mean of the token states, as MiniLM was trained to be read. `taught`
is the whole checkpoint once more, which the models of `TEACHERS` teach together; they are measured before it."""
TEACHERS = ("lp-ft", "r-drop", "lora")
BASIC = tuple(method for method in METHODS if method not in ("r-drop", "lora-r-drop", "taught"))
DEFAULTS = {
    **measuring.DEFAULTS,
    "adapters": {name: kind.learning_rate_for(384, gently=False) for name, kind in KINDS.items() if name in METHODS},
}
"""Of the recipes; cells that were measured with others are not taken over."""
HEADLINE = {"debian-tags": "micro_f1", "unfair_tos": "macro_f1", "scicite": "macro_f1", "pubmedqa": "macro_f1"}
"""The score that is usual on a data set; accuracy elsewhere."""
ALL_WEIGHTS = ("full", "lp-ft", "whole-probe", "r-drop")
LORA = ("lora", "lora-r-drop")
ACCURACY_TARGETS = {"banking77": 0.940, "clinc150": 0.965}
FEATURE_POINTS, FEATURE_TIME, LORA_POINTS = 0.02, 0.05, 0.005


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is measured on a data set; rows are a stratified sample of its training rows.

    `options` are further options of a method.
    """

    rows: int | None
    epochs: int
    seeds: tuple[int, ...]
    methods: tuple[str, ...] = BASIC
    stock_epochs: int = 0
    options: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


LARGE = ("r-drop", "lp-ft", "features", "lora", "lora-r-drop", "taught", "full")
SMOOTHED = ("--label_smoothing_factor", "0.1")
PROBED = ("--linear_probe_size", "0", "--learning_rate", "2e-4", *SMOOTHED)
LORA_PROBED = ("--linear_probe_size", "0", "--learning_rate", "1e-3", *SMOOTHED)
LARGE_OPTIONS: dict[str, tuple[str, ...]] = {
    "lp-ft": PROBED,
    "lora": LORA_PROBED,
    "lora-r-drop": LORA_PROBED,
    "full": SMOOTHED,
    "r-drop": PROBED,
}
"""Many rows are many steps: smoothed labels. Chosen on validation rows of banking77, where 3e-5, 1e-4 and 2e-4
were tried for all weights, with the probe at its own size (94.4 %) and scaled down (93.7 % at 3e-4)."""
SMALL = Size(rows=1000, epochs=4, seeds=(42, 43, 44))
SIZES: dict[str, dict[str, Size]] = {
    "small": dict.fromkeys(ALL_DATA.split(","), SMALL)
    | {
        "banking77": Size(rows=1000, epochs=4, seeds=(42, 43, 44), stock_epochs=5),
        "clinc150": Size(rows=1500, epochs=4, seeds=(42, 43, 44)),
        "pubmedqa": Size(rows=None, epochs=4, seeds=(42, 43, 44)),
        "debian-sections": Size(rows=800, epochs=3, seeds=(42, 43, 44)),
        "debian-tags": Size(rows=800, epochs=4, seeds=(42, 43, 44)),
    },
    "full": dict.fromkeys(
        ALL_DATA.split(","), Size(rows=None, epochs=6, seeds=(42,), methods=LARGE, options=LARGE_OPTIONS)
    )
    | {
        "banking77": Size(rows=None, epochs=8, seeds=(42,), methods=LARGE, options=LARGE_OPTIONS),
        "clinc150": Size(rows=None, epochs=5, seeds=(42,), methods=LARGE, options=LARGE_OPTIONS),
    },
}
MOST = {"small": {"validation": 500, "test": 2000}}
"""Scale -> rows that are kept of a split of a set that is not bundled."""
SMOKE = Size(rows=96, epochs=1, seeds=(42, 43), stock_epochs=1, methods=tuple(METHODS))


class Bench:
    """The cells of one data set.

    Args:
        name: Name of the data set.
        values: Values of `DataOptions`.
        size: How much to measure.
        asked: The command line.
        results: Notes what the cells were measured on.
    """

    def __init__(self, name: str, values: Mapping[str, Any], size: Size, asked: Any, results: Results) -> None:  # noqa: ANN401
        self.name, self.size, self.asked, self.results = name, size, asked, results
        self.values = dict(values) | ({} if size.rows is None else {"max_train_samples": size.rows})
        self.folder = asked.work / f"methods-{asked.scale}-{name}"

    def cells(self, number: int) -> dict[str, Callable[[], dict[str, Any]]]:
        """The cells of the seed of this number, if there is one."""
        found: dict[str, Callable[[], dict[str, Any]]] = {}
        for seed in self.size.seeds[number : number + 1]:
            for method in self.size.methods:
                if number and METHODS[method][0] == "features":
                    continue  # draws no random numbers
                found[f"{self.name}/{method}/{seed}"] = lambda m=method, s=seed: self.method(m, s)
            if self.size.stock_epochs and number == 0:
                found[f"{self.name}/stock/{seed}"] = lambda s=seed: self.stock(s)
            if number == 0:
                found[f"{self.name}/memory"] = self.memory
        return found

    def method(self, method: str, seed: int) -> dict[str, Any]:
        """A run of the recipe."""
        folder = self._folder(method, seed)
        recipe, words = self._command(method, seed, folder, self.size.epochs)
        report: Report = run_recipe(recipe, words)
        self.results.use_data(self.name, report.data["fingerprint"])
        arm = next(arm for arm in report.arms if arm.metrics == report.metrics)
        bundle = folder / "adapter" / "adapter_model.safetensors"
        return {
            "seed": seed,
            "rows": report.data["rows"],
            "train_seconds": arm.seconds,
            "trained_parameters": arm.details.get("trained_parameters"),
            "saved_bytes": bundle.stat().st_size if bundle.is_file() else arm.bytes,
            "metrics": json.loads(json.dumps(report.metrics)),
            "without_leaks": report.checks.get("test_without_leaks"),
            "bf16": report.checks["precision"]["bf16"],
        }

    def _command(self, method: str, seed: int, folder: Path, epochs: int) -> tuple[str, list[str]]:
        """A method's recipe and its command line; what an earlier run left in the folder is removed."""
        recipe, own = METHODS[method]
        words = [word for key, value in self.values.items() for word in (f"--{key}", str(value))]
        shutil.rmtree(folder, ignore_errors=True)
        words += ["--output_dir", str(folder)]
        words += ["--control_arm", "false", "--seed", str(seed), *own, *self.size.options.get(method, ())]
        if recipe == "features":
            words += ["--feature_cache", str(self._beside("features"))]
            shutil.rmtree(words[-1], ignore_errors=True)  # each run computes its own
        else:
            words += ["--num_train_epochs", str(epochs)]
        words += self._teachers(seed) if method == "taught" else ["--model_name_or_path", self.asked.model]
        return recipe, words

    def memory(self) -> dict[str, Any]:
        """The most memory that a process of each method had; `taught` is `lp-ft` with answers from disk."""
        seed, found = self.size.seeds[0], {}
        for method in self.size.methods:
            if method != "taught":
                command = self._command(method, seed, self.folder, 1)
                found[method] = most_memory(run_recipe, *command)
        if self.size.stock_epochs:
            found["stock"] = most_memory(train_stock, *self._stock(seed), epochs=1)
        return {"peak_bytes": found}

    def _folder(self, method: str, seed: int) -> Path:
        """Where a method's model lies: that of a teacher until the end, others until the next cell."""
        kept = "taught" in self.size.methods and method in TEACHERS
        return self._beside(f"{method}-{seed}") if kept else self.folder

    def _beside(self, name: str) -> Path:
        """A folder that lasts for several cells."""
        return self.folder.with_name(f"{self.folder.name}-{name}")

    def _teachers(self, seed: int) -> list[str]:
        """Options that name the models of `TEACHERS`, and the whole checkpoint as their student."""
        folders = [self._folder(method, seed) for method in TEACHERS]
        for method, folder in zip(TEACHERS, folders, strict=True):
            if not (folder / "report.json").is_file():
                raise Skipped(f"there is no model of {method} yet: measure the cell {self.name}/{method}/{seed} first")
        cache = self._beside("cache")
        shutil.rmtree(cache, ignore_errors=True)  # each run computes its own
        words = ["--student_name_or_path", self.asked.model, "--teacher_cache", str(cache)]
        return [*words, "--teacher_name_or_path", ",".join(map(str, folders))]

    def drop(self, *, all_folders: bool) -> None:
        """Delete what the cells left behind; models that cells still to come need only with `all_folders`."""
        for folder in self.folder.parent.glob(f"{self.folder.name}*" if all_folders else self.folder.name):
            shutil.rmtree(folder, ignore_errors=True)

    def stock(self, seed: int) -> dict[str, Any]:
        """The stock Trainer in float32, at the learning rate that was best for it in `finetune.py`."""
        fingerprint, cell = train_stock(*self._stock(seed), epochs=self.size.stock_epochs)
        self.results.use_data(self.name, fingerprint)
        return cell

    def _stock(self, seed: int) -> tuple[Mapping[str, Any], Path, str, int]:
        shutil.rmtree(self.folder, ignore_errors=True)
        return self.values, self.folder, self.asked.model, seed

    def summary(self) -> dict[str, Any]:
        """Means over the seeds of each method, and the targets."""
        found: dict[str, Any] = {"metric": HEADLINE.get(self.name, "accuracy"), "methods": {}}
        peaks = (self.results.get(f"{self.name}/memory") or {"peak_bytes": {}})["peak_bytes"]
        for method in (*self.size.methods, "stock"):
            cells = self.results.under(f"{self.name}/{method}/")
            if not cells:
                continue
            test = [cell["metrics"]["test"] for cell in cells]
            names = [name for name in ("accuracy", "micro_f1", "macro_f1") if name in test[0]]
            found["methods"][method] = {
                "test": {name: mean_and_deviation(scores[name] for scores in test) for name in names},
                "trained_parameters": cells[0]["trained_parameters"],
                "saved_bytes": cells[0].get("saved_bytes"),
                "train_seconds": median_and_range(cell["train_seconds"] for cell in at_home(cells)),
                "elsewhere": any("machine" in cell for cell in cells),
                "peak_bytes": peaks.get(method),
            }
        found["rows"] = next((cell["rows"] for cell in self.results.under(f"{self.name}/") if "rows" in cell), None)
        return found | {"targets": self._targets(found["methods"], found["metric"])}

    def _targets(self, methods: Mapping[str, Any], metric: str) -> dict[str, Any]:
        score = {name: item["test"][metric]["mean"] for name, item in methods.items()}
        best_full = max((score[name] for name in ALL_WEIGHTS if name in score), default=None)
        targets: dict[str, Any] = {}
        if best_full is not None and "features" in score:
            targets["features: points lost"] = judged(best_full - score["features"], FEATURE_POINTS, at_most=True)
        best_lora = max((score[name] for name in LORA if name in score), default=None)
        if best_full is not None and best_lora is not None:
            targets["LoRA: points lost"] = judged(best_full - best_lora, LORA_POINTS, at_most=True)
        if {"features", "stock"} <= {name for name, item in methods.items() if not item["elsewhere"]}:
            seconds = [methods[name]["train_seconds"]["median"] for name in ("features", "stock")]
            targets["features: share of stock's time"] = judged(seconds[0] / seconds[1], FEATURE_TIME, at_most=True)
        if self.asked.scale == "full" and self.name in ACCURACY_TARGETS and best_full is not None:
            targets["accuracy"] = judged(max(score.values()), ACCURACY_TARGETS[self.name])
        return targets


def main(argv: Sequence[str] | None = None, sets: Mapping[str, Mapping[str, Any]] | None = None) -> Path:
    """Measure and write the results file; `sets` replaces the data sets (name -> values of `DataOptions`)."""
    asked = measuring.arguments("finetune_methods", __doc__ or "", argv, ALL_DATA)
    measuring.show_log()
    known = data_sets(asked.data, asked.work, MOST.get(asked.scale)) if sets is None else sets
    sizes = {name: SIZES.get(asked.scale, {}).get(name, SMOKE) for name in (*SIZES.get(asked.scale, {}), *known)}
    used = [name for name in METHODS if any(name in size.methods for size in sizes.values())]
    results = Results(
        "finetune_methods",
        asked,
        {
            "model": asked.model,
            "methods": {name: METHODS[name] for name in used},
            "defaults": DEFAULTS,
            "stock": STOCK,
            "stock_learning_rate": STOCK_LEARNING_RATE,
        }
        | {name: asdict(size) | {"most": MOST.get(asked.scale)} for name, size in sizes.items()},
        several_machines=True,
    )
    benches = [Bench(name, values, sizes[name], asked, results) for name, values in known.items()]
    cells: dict[str, Callable[[], dict[str, Any]]] = {}
    for number in range(max(len(bench.size.seeds) for bench in benches)):  # a run broken off has seen each set
        for bench in benches:
            cells |= bench.cells(number)
    results.measure(cells)
    complete = not results.missing(cells)
    for bench in benches:
        bench.drop(all_folders=complete)
    return results.write({bench.name: bench.summary() | {"threads": torch.get_num_threads()} for bench in benches})


if __name__ == "__main__":
    run_main(main)
