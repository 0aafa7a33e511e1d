"""Using a classifier: `nlpxfer predict` on a file against transformers' pipeline; memory over a long file.

    python benchmarks/predict.py --scale small --data debian-sections
    python benchmarks/predict.py --scale full --data debian-sections        a million rows: an hour on two cores

The classifier is the checkpoint with a linear probe as its head. Cells of each data set:

- `sweep/<precision>/<batch>`: rows per second of `pipeline("text-classification")`, to choose its batch size
- `rates`: in turns, the pipeline at its best batch size, in float32 and bfloat16, and `predict` with torch, ONNX, int8
- `memory/torch`, `memory/int8`: resident memory of the command while it labels a long file that repeats the texts
  (by a model of one layer, but at `--scale smoke`), and that every row came back in its place

`predict` reads a csv file and writes one; the pipeline gets a list of texts and returns one. Both have loaded their
model before. The seconds of the cells `memory` are those of the whole command.
"""

from __future__ import annotations

import csv
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import measuring
import psutil
import torch
from data_sets import data_sets
from measuring import Results, judged
from transformers import pipeline

from nlpxfer.checkpoint.load import Checkpoint, layer_student, load_classifier
from nlpxfer.checkpoint.save import save_classifier
from nlpxfer.classify import Classifier, predict_file
from nlpxfer.cli import run_main
from nlpxfer.config import DataOptions, RunOptions
from nlpxfer.data.tokenise import Collator
from nlpxfer.evaluate.cost import alternate_rates
from nlpxfer.export import ExportRequest, export_classifier
from nlpxfer.run import Run
from nlpxfer.start import start_run
from nlpxfer.strict_json import write_json_whole
from nlpxfer.train.launch import use_threads
from nlpxfer.train.linear_probe import start_from_linear_probe_

SPEED_TARGET = 3.0
GROWTH_TARGET = 1.05
BATCHES = (1, 8, 32, 128)
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SIDES: dict[str, tuple[str, dict[str, Any]]] = {
    "torch": ("model", {}),
    "onnx": ("onnx", {}),
    "int8": ("onnx", {"int8": True}),
}
"""Side of nlpxfer -> the folder it reads, and options of `Classifier.load`."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is measured on one data set."""

    train_rows: int | None
    sweep_rows: int
    rows: int
    turns: int
    long_rows: int
    long_layers: int | None
    sample_seconds: float


SMALL = Size(train_rows=2000, sweep_rows=128, rows=512, turns=5, long_rows=100_000, long_layers=1, sample_seconds=0.5)
SIZES = {
    "smoke": replace(
        SMALL, train_rows=96, sweep_rows=16, rows=32, turns=2, long_rows=3000, long_layers=None, sample_seconds=0.05
    ),
    "small": SMALL,
    "full": replace(SMALL, train_rows=None, sweep_rows=512, rows=10_000, long_rows=1_000_000, sample_seconds=5),
}


class Bench:
    """The measurements on one data set.

    Args:
        name: Name of the data set.
        run: Its rows and options, as a recipe has them.
        size: How much to measure.
        model: Checkpoint that gets a head.
        folder: Where models and files go while it runs.
        results: Finished cells; the best batch size is read from there.
    """

    def __init__(self, name: str, run: Run, size: Size, model: str, folder: Path, results: Results) -> None:
        self.name, self.run, self.size, self.model, self.results = name, run, size, model, results
        self.folder = folder
        use_threads(None)

    @cached_property
    def models(self) -> dict[str, Path]:
        """Folders that hold `model` and `onnx`: of the classifier, and of the one that reads the long file."""
        shutil.rmtree(self.folder, ignore_errors=True)
        whole = load_classifier(self.model, schema=self.run.data.schema)
        made = {"whole": self._save(whole, self.folder / "whole")}
        if self.size.long_layers is None:
            return made | {"long": made["whole"]}
        shallow = layer_student(whole, list(range(self.size.long_layers)))
        return made | {"long": self._save(shallow, self.folder / "long")}

    def _save(self, checkpoint: Checkpoint, folder: Path) -> Path:
        """Give a checkpoint its head; write it and its export."""
        splits = self.run.split(checkpoint.tokenizer)
        collator = Collator.for_tokenizer(checkpoint.tokenizer)
        bf16 = self.run.precision.bf16
        start_from_linear_probe_(checkpoint.model, splits.train, splits.validation, collator, bf16=bf16)
        save_classifier(checkpoint.model, checkpoint.tokenizer, self.run.data.schema, folder / "model")
        write_json_whole(folder / "model" / "run.json", {"config": {"max_length": self.run.data_options.max_length}})
        texts = folder / "texts.csv"
        write_rows(texts, self.texts, len(self.texts))
        export_classifier(ExportRequest(model=str(folder / "model"), out=folder / "onnx", int8=True, texts=texts))
        return folder

    @cached_property
    def texts(self) -> list[str]:
        """The test texts, or as many as are measured on, evenly spread."""
        texts = self.run.texts("test")[0]
        return texts[:: max(1, len(texts) // self.size.rows)][: self.size.rows]

    def cells(self) -> dict[str, Callable[[], dict[str, Any]]]:
        """All cells by name."""
        found: dict[str, Callable[[], dict[str, Any]]] = {
            f"sweep/{precision}/{batch}": partial(self.sweep, precision, batch)
            for precision in PRECISIONS
            for batch in BATCHES
        }
        found["rates"] = self.rates
        found |= {f"memory/{side}": partial(self.memory, side) for side in ("torch", "int8")}
        return {f"{self.name}/{key}": cell for key, cell in found.items()}

    def sweep(self, precision: str, batch: int) -> dict[str, Any]:
        """Rows per second of the pipeline at one batch size."""
        ask = self._pipeline(precision, batch)
        texts = self.texts[: self.size.sweep_rows]
        rates = alternate_rates({"pipeline": lambda: ask(texts)}, len(texts), repeats=min(3, self.size.turns))
        return {"precision": precision, "batch_size": batch, **asdict(rates.rates["pipeline"])}

    def _pipeline(self, precision: str, batch: int) -> Callable[[list[str]], list[str]]:
        """A pipeline as a function from texts to labels."""
        folder, device = str(self.models["whole"] / "model"), self.run.options.device
        made = pipeline("text-classification", model=folder, dtype=PRECISIONS[precision], device=device)
        options = {"batch_size": batch, "truncation": True, "max_length": self.run.data_options.max_length}
        return lambda texts: [answer["label"] for answer in made(texts, **options)]

    def rates(self) -> dict[str, Any]:
        """The pipeline at its best batch sizes and `predict`, in turns; labels and accuracy of each."""
        batches = {precision: self._best_batch(precision) for precision in PRECISIONS}
        answers: dict[str, list[str]] = {}
        runs = {f"pipeline {precision}": self._pipeline(precision, batch) for precision, batch in batches.items()}
        runs |= {side: self._predict(side) for side in SIDES}
        gold = [self.run.data.schema.names[label] for label in self.run.data.test["label"][:]]
        gold = gold[:: max(1, len(gold) // self.size.rows)][: self.size.rows]

        def noting(side: str) -> None:
            answers[side] = runs[side](self.texts)

        measured = alternate_rates(
            {side: partial(noting, side) for side in runs}, len(self.texts), repeats=self.size.turns
        )
        reference = answers["pipeline float32"]
        return {
            "rows": len(self.texts),
            "batch_sizes": batches,
            "threads": torch.get_num_threads(),
            "bf16": self.run.precision.bf16,
            "rates": {side: asdict(rate) for side, rate in measured.rates.items()},
            "ratios": {side: asdict(ratio) for side, ratio in measured.ratios.items()},
            "accuracy": {side: _share_equal(found, gold) for side, found in answers.items()},
            "same_label_as_pipeline": {side: _share_equal(found, reference) for side, found in answers.items()},
        }

    def _best_batch(self, precision: str) -> int:
        cells = self.results.under(f"{self.name}/sweep/{precision}/")
        if {cell["batch_size"] for cell in cells} != set(BATCHES):
            raise measuring.Skipped("its batch sizes were not compared yet: measure the cells named sweep first")
        return int(max(cells, key=lambda cell: cell["rows_per_second"])["batch_size"])

    def _predict(self, side: str) -> Callable[[list[str]], list[str]]:
        """`nlpxfer predict` from file to file, as a function from texts to labels."""
        name, options = SIDES[side]
        classifier = Classifier.load(str(self.models["whole"] / name), **options)
        source, target = self.folder / f"{side}-in.csv", self.folder / f"{side}-out.csv"
        write_rows(source, self.texts, len(self.texts))

        def answer(_: list[str]) -> list[str]:
            target.unlink(missing_ok=True)
            predict_file(classifier, source, target)
            with target.open(encoding="utf-8", newline="") as file:
                return [row["predicted_label"] for row in csv.DictReader(file)]

        return answer

    def memory(self, side: str) -> dict[str, Any]:
        """Resident memory of the command while it labels a long file, and whether all rows are where they were."""
        name, options = SIDES[side]
        model, count = self.models["long"] / name, self.size.long_rows
        source, target = self.folder / "long-in.csv", self.folder / "long-out.csv"
        target.unlink(missing_ok=True)
        write_rows(source, self.texts, count)
        words = ["predict", str(model), str(source), "--output_file", str(target)]
        flags = [f"--{option}" for option in options]
        samples = watch([sys.executable, "-m", "nlpxfer.cli", *words, *flags], every=self.size.sample_seconds)
        check_rows(target, self.texts, count)
        early, late = (fifth(samples, which) for which in (1, 4))
        for path in (source, target):
            path.unlink()
        step = max(1, len(samples) // 40)
        return {
            "rows": count,
            "seconds": samples[-1][0],
            "rows_per_second": count / samples[-1][0],
            "early_bytes": early,
            "late_bytes": late,
            "growth": late / early,
            "rows_in_order": True,  # check_rows raises where they are not
            "samples": [{"seconds": seconds, "bytes": size} for seconds, size in samples[::step]],
        }

    def summary(self) -> dict[str, Any]:
        """The figures and their targets, as far as their cells are finished."""
        found: dict[str, Any] = {}
        if rates := self.results.get(f"{self.name}/rates"):
            ratios = {side: ratio["median"] for side, ratio in rates["ratios"].items()}
            found["rows"] = rates["rows"]
            found["speed"] = {side: judged(ratios[side], SPEED_TARGET) for side in SIDES}
        memory = {side: self.results.get(f"{self.name}/memory/{side}") for side in ("torch", "int8")}
        found["memory"] = {
            side: judged(cell["growth"], GROWTH_TARGET, at_most=True) for side, cell in memory.items() if cell
        }
        return found


def write_rows(path: Path, texts: Sequence[str], count: int) -> None:
    """A csv file of `count` rows with a row number, which repeats the texts."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["row", "text"])
        writer.writerows([number, texts[number % len(texts)]] for number in range(count))


def check_rows(path: Path, texts: Sequence[str], count: int) -> None:
    """Raise where a row of a labelled file is not the one that was written there."""
    seen = 0
    with path.open(encoding="utf-8", newline="") as file:
        for seen, row in enumerate(csv.DictReader(file), start=1):
            number = seen - 1
            if row["row"] != str(number) or row["text"] != texts[number % len(texts)] or not row["predicted_label"]:
                raise RuntimeError(f"row {number} of {path.name} is {row}")
    if seen != count:
        raise RuntimeError(f"{path.name} has {seen} rows instead of {count}")


def watch(command: Sequence[str], *, every: float) -> list[tuple[float, int]]:
    """Run a command and return (seconds since its start, resident bytes), sampled until it ends."""
    start, samples = time.perf_counter(), []
    with psutil.Popen(list(command), stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            try:
                samples.append((time.perf_counter() - start, int(process.memory_info().rss)))
            except psutil.Error:
                break  # it ended in between
            time.sleep(every)
        code = process.wait()
    if code:
        raise RuntimeError(f"{' '.join(command[2:4])} ended with exit code {code}")
    samples.append((time.perf_counter() - start, samples[-1][1]))
    return samples


def fifth(samples: Sequence[tuple[float, int]], which: int) -> int:
    """The highest use in one of the five parts of the time, numbered from 0; loading lies in the first."""
    end = samples[-1][0]
    part = [size for seconds, size in samples if which * end / 5 <= seconds <= (which + 1) * end / 5]
    return max(part or [samples[-1][1]])


def _share_equal(found: Sequence[str], expected: Sequence[str]) -> float:
    return statistics.fmean(one == other for one, other in zip(found, expected, strict=True))


def main(argv: Sequence[str] | None = None, sets: Mapping[str, Mapping[str, Any]] | None = None) -> Path:
    """Measure and write the results file; `sets` replaces the data sets (name -> values of `DataOptions`)."""
    asked = measuring.arguments("predict", __doc__ or "", argv)
    measuring.show_log()
    known = data_sets(asked.data, asked.work) if sets is None else sets
    size = SIZES[asked.scale]
    settings = {"model": asked.model, "pipeline_batch_sizes": list(BATCHES), **asdict(size)}
    results = Results("predict", asked, settings)
    summary = {}
    for name, values in known.items():
        folder = asked.work / f"predict-{asked.scale}-{name}"
        options = RunOptions(output_dir=str(asked.work / f"predict-{asked.scale}-run-{name}"), overwrite=True)
        with start_run("finetune", DataOptions(**{**values, "max_train_samples": size.train_rows}), options) as run:
            results.use_data(name, run.data.fingerprint)
            bench = Bench(name, run, size, asked.model, folder, results)
            results.measure(bench.cells())
            summary[name] = bench.summary()
    return results.write(summary)


if __name__ == "__main__":
    run_main(main)
