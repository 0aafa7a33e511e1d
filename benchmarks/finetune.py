"""Fine-tuning: nlpxfer against the stock Trainer: steps per second, time to accuracy, what each switch is worth.

    python benchmarks/finetune.py --scale small
    NLPXFER_DATA=FOLDER python benchmarks/finetune.py --scale full --data banking77

Cells of each data set:

- `steps`: both sides in turns on the same rows
- `sweep/<rate>`: the stock Trainer's learning rate, chosen on validation rows
- `stock/<seed>`, `nlpxfer/<seed>`: whole runs
- `probe/<seed>`: test accuracy at the start that the linear probe gives
- `ablation`: grouping, bfloat16, frozen embeddings, no dropout

nlpxfer runs with its defaults, learning rate included. Its seconds hold probe, training, validation after each epoch
and checkpoints; those of the stock Trainer hold training alone. Loading a model and tokenising count on neither side.
"""

from __future__ import annotations

import copy
import itertools
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import measuring
import numpy as np
import torch
from data_sets import data_sets
from measuring import Array, Results, judged, median_and_range
from peers import LEARNING_RATES, STOCK, Curve, epoch_seconds, stock_arguments, stock_model, stock_trainer

from nlpxfer.checkpoint.head import embedding_parameters
from nlpxfer.checkpoint.load import Checkpoint, load_classifier
from nlpxfer.cli import run_main
from nlpxfer.config import DataOptions, RunOptions
from nlpxfer.data.tokenise import Collator, TokenisedRows
from nlpxfer.evaluate.arms import TrainedArm
from nlpxfer.evaluate.cost import embedding_parameter_count, gemm_peak_flops, parameter_count, training_flops
from nlpxfer.evaluate.metrics import classification_metrics
from nlpxfer.methods.finetune import FineTune
from nlpxfer.run import Run
from nlpxfer.start import start_run
from nlpxfer.train.checkpoints import RunIdentity
from nlpxfer.train.linear_probe import start_from_linear_probe_
from nlpxfer.train.predict import predict
from nlpxfer.train.regime import set_dropout_
from nlpxfer.train.trainer import TransferTrainer

SPEED_TARGET = 3.5
TIME_TARGET = 0.1


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is measured on one data set; rows are stratified samples of the training rows."""

    rows: int | None
    stock_epochs: int
    nlpxfer_epochs: float
    nlpxfer_seeds: tuple[int, ...]
    stock_seeds: tuple[int, ...]
    blocks: int
    block_steps: int
    ablation_rounds: int
    ablation_steps: int
    gemm_size: int = 2048


SMALL = Size(
    rows=2000,
    stock_epochs=5,
    nlpxfer_epochs=3,
    nlpxfer_seeds=(42, 43, 44),
    stock_seeds=(42,),
    blocks=5,
    block_steps=15,
    ablation_rounds=2,
    ablation_steps=8,
)
SIZES: dict[str, dict[str, Size]] = {
    "small": {
        "banking77": SMALL,
        "debian-sections": Size(
            **asdict(SMALL) | {"rows": 800, "block_steps": 12, "ablation_rounds": 2, "ablation_steps": 8}
        ),
    },
    "full": {
        "banking77": Size(
            **asdict(SMALL) | {"rows": None, "stock_seeds": (42, 43, 44), "block_steps": 50, "ablation_steps": 50}
        ),
        "debian-sections": Size(
            **asdict(SMALL)
            | {"rows": None, "block_steps": 50, "ablation_steps": 50}
            | {"nlpxfer_seeds": (42, 43, 44, 45, 46), "stock_seeds": (42, 43, 44, 45, 46)}
        ),
    },
}
SMOKE = Size(
    rows=96,
    stock_epochs=2,
    nlpxfer_epochs=1,
    nlpxfer_seeds=(42, 43),
    stock_seeds=(42,),
    blocks=2,
    block_steps=2,
    ablation_rounds=1,
    ablation_steps=2,
    gemm_size=256,
)


class Bench:
    """The measurements on one data set.

    Args:
        name: Name of the data set.
        run: Its rows and options, as a recipe has them.
        size: How much to measure.
        model: Checkpoint to start from.
        results: Finished cells; a chosen learning rate is read from there.
    """

    def __init__(self, name: str, run: Run, size: Size, model: str, results: Results) -> None:
        self.name, self.run, self.size, self.model, self.results = name, run, size, model, results
        self.tokenizer = self.build(42).tokenizer
        self.splits = run.split(self.tokenizer)
        self.collator = Collator.for_tokenizer(self.tokenizer)
        self.scratch = run.folder / "checkpoints"

    def build(self, seed: int) -> Checkpoint:
        return load_classifier(self.model, schema=self.run.data.schema, seed=seed)

    def cells(self) -> dict[str, Callable[[], dict[str, Any]]]:
        """All cells by name, in an order that puts nlpxfer's runs before and after the stock ones."""
        first, *others = self.size.nlpxfer_seeds
        found: dict[str, Callable[[], dict[str, Any]]] = {"steps": self.steps}
        found |= {f"sweep/{rate:g}": self._bound(self.sweep, rate) for rate in LEARNING_RATES}
        found[f"nlpxfer/{first}"] = self._bound(self.nlpxfer, first)
        found |= {f"stock/{seed}": self._bound(self.stock, seed) for seed in self.size.stock_seeds}
        found |= {f"nlpxfer/{seed}": self._bound(self.nlpxfer, seed) for seed in others}
        found |= {f"probe/{first}": self._bound(self.probe, first), "ablation": self.ablation}
        return {f"{self.name}/{key}": cell for key, cell in found.items()}

    @staticmethod
    def _bound(method: Callable[[Any], dict[str, Any]], value: float) -> Callable[[], dict[str, Any]]:
        return lambda: method(value)

    def steps(self) -> dict[str, Any]:
        """Seconds of both sides on the same rows, in turns, and the share of the measured GEMM peak."""
        model = self.build(42).model
        ours = {"grouped": True, "bf16": self.run.precision.bf16, "frozen": True, "dropout": self.run.options.dropout}
        arms = {"stock": self._stock_epoch, "nlpxfer": lambda rows, seed: self._our_epoch(model, rows, seed, **ours)}
        seconds, tokens = self._in_turns(arms, self.size.blocks, self.size.block_steps)
        size = self.size.gemm_size
        peaks = {kind: gemm_peak_flops(getattr(torch, kind), size=size) for kind in ("float32", "bfloat16")}
        weights = parameter_count(model) - embedding_parameter_count(model)
        kinds = {"stock": "float32", "nlpxfer": "bfloat16" if self.run.precision.bf16 else "float32"}
        rates = {
            name: [training_flops(weights, count) / each for count, each in zip(tokens, seconds[name], strict=True)]
            for name in arms
        }
        steps = self._block_rows(self.size.block_steps) / 32
        return {
            "seconds": seconds,
            "tokens": tokens,
            "steps_per_block": steps,
            "steps_per_second": {name: median_and_range(steps / s for s in seconds[name]) for name in arms},
            "ratio": median_and_range(a / b for a, b in zip(seconds["stock"], seconds["nlpxfer"], strict=True)),
            "precision": kinds,
            "gemm_peak_gflops": {name: peak / 1e9 for name, peak in peaks.items()},
            "non_embedding_parameters": weights,
            "training_gflops": {name: float(np.median(rate)) / 1e9 for name, rate in rates.items()},
            "share_of_peak": {name: float(np.median(rate)) / peaks[kinds[name]] for name, rate in rates.items()},
            "note": "6 x non-embedding parameters x real tokens; all of these weights are trained on both sides, the "
            "embedding tables on the stock side only",
        }

    def ablation(self) -> dict[str, Any]:
        """Seconds per step of nlpxfer's Trainer with three switches on and off, and without dropout at last."""
        model = self.build(42).model
        names = ("grouped", "bf16", "frozen")
        arms = {}
        for values in itertools.product((False, True), repeat=3):
            switches = dict(zip(names, values, strict=True))
            label = "+".join(name for name in names if switches[name]) or "none"
            arms[label] = lambda rows, seed, s=switches: self._our_epoch(model, rows, seed, dropout=None, **s)
        pairs = [
            (off, on, name)
            for name in names
            for off in arms
            if name not in _parts(off)
            for on in ["+".join(sorted((*_parts(off), name), key=names.index))]
        ]
        whole = "+".join(names)
        arms[f"{whole}, no dropout"] = lambda rows, seed: self._our_epoch(
            model, rows, seed, dropout=0.0, **dict.fromkeys(names, True)
        )
        pairs.append((whole, f"{whole}, no dropout", "no dropout"))
        seconds, _ = self._in_turns(arms, self.size.ablation_rounds, self.size.ablation_steps)
        steps = self._block_rows(self.size.ablation_steps) / 32
        gains = {}
        for name in (*names, "no dropout"):
            ratios = [
                slow / fast
                for off, on, switch in pairs
                if switch == name
                for slow, fast in zip(seconds[off], seconds[on], strict=True)
            ]
            gains[name] = median_and_range(ratios)
        return {
            "milliseconds_per_step": {label: 1000 * float(np.median(s)) / steps for label, s in seconds.items()},
            "times_faster_by": gains,
            "seconds": seconds,
        }

    def _block_rows(self, steps: int) -> int:
        """Rows of a block: whole batches, as many as there are."""
        return min(steps, len(self.splits.train) // 32) * 32

    def _in_turns(
        self, arms: Mapping[str, Callable[[TokenisedRows, int], float]], blocks: int, steps: int
    ) -> tuple[dict[str, list[float]], list[int]]:
        """Seconds of each arm on each block, and the blocks' tokens; one pass over the block's rows per arm.

        A short block that is not counted comes first; the order of the arms turns round from block to block.
        """
        seconds: dict[str, list[float]] = {name: [] for name in arms}
        tokens = []
        for block in range(-1, blocks):
            chosen = np.random.default_rng(block + 1).permutation(len(self.splits.train))
            rows = self.splits.train.select(chosen[: self._block_rows(steps if block >= 0 else 2)])
            for name in list(arms) if block % 2 == 0 else list(arms)[::-1]:
                found = arms[name](rows, 100 + block)
                if block >= 0:
                    seconds[name].append(found)
            if block >= 0:
                tokens.append(int(rows.lengths.sum()))
        return seconds, tokens

    def _stock_epoch(self, rows: TokenisedRows, seed: int) -> float:
        model = stock_model(self.model, len(self.run.data.schema), seed)
        arguments = stock_arguments(self.scratch / "stock", learning_rate=1e-4, epochs=1, seed=seed)
        return epoch_seconds(stock_trainer(model, arguments, rows, self.tokenizer))

    def _our_epoch(
        self,
        model: torch.nn.Module,
        rows: TokenisedRows,
        seed: int,
        *,
        grouped: bool,
        bf16: bool,
        frozen: bool,
        dropout: float | None,
    ) -> float:
        """One pass of nlpxfer's Trainer over the rows, from a copy of the model; dropout None: the model's own."""
        model = copy.deepcopy(model).train()
        if dropout is not None:
            set_dropout_(model, dropout)
        if frozen:
            for _, parameter in embedding_parameters(model):
                parameter.requires_grad_(False)
        options = RunOptions(
            output_dir=str(self.scratch / "steps"),
            num_train_epochs=1,
            seed=seed,
            bf16=bf16,
            train_sampling_strategy="group_by_length" if grouped else "random",
            eval_strategy="no",
            save_strategy="no",
            load_best_model_at_end=False,
            disable_tqdm=True,
        )
        trainer = TransferTrainer(
            model.to(options.device),
            FineTune(),
            options,
            train_rows=rows,
            validation_rows=self.splits.validation,
            tokenizer=self.tokenizer,
            metrics=classification_metrics,
            identity=RunIdentity({}, {}),
        )
        return epoch_seconds(trainer)

    def sweep(self, rate: float) -> dict[str, Any]:
        """Validation accuracy of the stock Trainer at a learning rate; bfloat16 and grouped batches, to save time."""
        model = stock_model(self.model, len(self.run.data.schema), 42)
        arguments = stock_arguments(
            self.scratch / "sweep",
            learning_rate=rate,
            epochs=self.size.stock_epochs,
            seed=42,
            bf16=self.run.precision.bf16,
            train_sampling_strategy="group_by_length",
        )
        trainer = stock_trainer(model, arguments, self.splits.train, self.tokenizer)
        trainer.train()
        logits = predict(model, self.splits.validation, self.collator, bf16=self.run.precision.bf16)
        accuracy = float(np.mean(np.argmax(logits, axis=1) == self.run.labels("validation")))
        return {"learning_rate": rate, "validation_accuracy": accuracy}

    def stock(self, seed: int) -> dict[str, Any]:
        """The stock Trainer in float32 at its best learning rate, with scores after each epoch."""
        rate = measuring.best_rate(self.results.under(f"{self.name}/sweep/"), LEARNING_RATES)
        model = stock_model(self.model, len(self.run.data.schema), seed)
        arguments = stock_arguments(
            self.scratch / "stock",
            learning_rate=rate,
            epochs=self.size.stock_epochs,
            seed=seed,
        )
        trainer = stock_trainer(model, arguments, self.splits.train, self.tokenizer)
        logits: dict[str, Array] = {}

        def score() -> dict[str, float]:
            splits = {"validation": self.splits.validation, "test": self.splits.test}
            logits.update({split: predict(model, rows, self.collator) for split, rows in splits.items()})
            right = {split: np.argmax(found, axis=1) == self.run.labels(split) for split, found in logits.items()}
            return {f"{split}_accuracy": float(values.mean()) for split, values in right.items()}

        curve = Curve(score)
        seconds = curve.train(trainer)
        found = measuring.scores(self.run, logits["validation"], logits["test"])
        return {"seed": seed, "learning_rate": rate, "train_seconds": seconds, "curve": curve.points, **found}

    def nlpxfer(self, seed: int) -> dict[str, Any]:
        """The fine-tuning recipe's arm, with its defaults."""
        timeline = Timeline()
        with timeline.listening():
            arm = self.run.train("fine-tuned", self.build, FineTune(), seeds=[seed])[0]
        shutil.rmtree(self.scratch, ignore_errors=True)
        return {
            "seed": seed,
            "learning_rate": self.run.options.learning_rate,
            "train_seconds": arm.train_seconds,
            "probe": vars(arm.probe) if arm.probe else None,
            "steps": arm.steps,
            "tokens": arm.tokens,
            "curve": timeline.curve(arm),
            **measuring.scores(self.run, arm.validation_logits, arm.test_logits),
        }

    def probe(self, seed: int) -> dict[str, Any]:
        """Test accuracy of the probe that `nlpxfer/<seed>` starts from: what a user has who stops there."""
        model = self.build(seed).model
        train, validation = self.splits.train, self.splits.validation
        found = start_from_linear_probe_(model, train, validation, self.collator, bf16=self.run.precision.bf16)
        logits = [predict(model, rows, self.collator) for rows in (validation, self.splits.test)]
        return {"seed": seed, "seconds": found.seconds, **measuring.scores(self.run, *logits)}

    def summary(self) -> dict[str, Any]:
        """The figures and their targets, as far as their cells are finished."""
        found: dict[str, Any] = {"rows": self.run.data.facts()["rows"], "classes": len(self.run.data.schema)}
        if steps := self.results.get(f"{self.name}/steps"):
            found["step_ratio"] = judged(steps["ratio"]["median"], SPEED_TARGET)
            found["share_of_peak"] = steps["share_of_peak"]
        stock, ours = (self.results.under(f"{self.name}/{side}/") for side in ("stock", "nlpxfer"))
        for side, cells in (("stock", stock), ("nlpxfer", ours)):
            if cells:
                found[side] = {
                    "learning_rate": cells[0]["learning_rate"],
                    "test_accuracy": measuring.mean_and_deviation(c["test_accuracy"] for c in cells),
                    "test_accuracy_without_leaks": measuring.mean_and_deviation(
                        c["test_accuracy_without_leaks"] for c in cells
                    ),
                    "train_seconds": median_and_range(c["train_seconds"] for c in cells),
                }
        if stock and ours:
            found["time_to_accuracy"] = time_to_accuracy(stock, ours)
        if probe := self.results.under(f"{self.name}/probe/"):
            found["probe_test_accuracy"] = probe[0]["test_accuracy"]
        return found


def _parts(label: str) -> tuple[str, ...]:
    return () if label == "none" else tuple(label.split("+"))


def time_to_accuracy(stock: Sequence[Mapping[str, Any]], ours: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Seconds of nlpxfer until its validation accuracy is that of the stock Trainer after its last epoch.

    The stock side counts twice: to its end, and to the first epoch that was as good as its last.
    """
    goal = float(np.mean([cell["validation_accuracy"] for cell in stock]))
    whole = float(np.median([cell["train_seconds"] for cell in stock]))
    earliest = [seconds_to(cell["curve"], cell["validation_accuracy"]) for cell in stock]
    reached = [seconds_to(cell["curve"], goal) for cell in ours]
    found: dict[str, Any] = {
        "goal_validation_accuracy": goal,
        "stock_seconds": whole,
        "stock_seconds_to_equal_accuracy": float(np.median([s for s in earliest if s is not None])),
        "nlpxfer_seconds": reached,
        "whole_run_ratio": float(np.median([cell["train_seconds"] for cell in ours])) / whole,
        "test_accuracy_gain": float(np.mean([c["test_accuracy"] for c in ours]))
        - float(np.mean([c["test_accuracy"] for c in stock])),
    }
    if None in reached:
        return found | {"ratio": None, "note": "not every seed of nlpxfer reached the goal"}
    median = float(np.median([seconds for seconds in reached if seconds is not None]))
    ratio = judged(median / whole, TIME_TARGET, at_most=True)
    against_earliest = median / found["stock_seconds_to_equal_accuracy"]
    ratio["met"] = ratio["met"] and found["test_accuracy_gain"] >= 0
    return found | {"ratio": ratio, "ratio_to_earliest": against_earliest}


def seconds_to(curve: Sequence[Mapping[str, float]], accuracy: float) -> float | None:
    """Seconds of the first point with at least this validation accuracy; None if there is none."""
    return next((point["seconds"] for point in curve if point["validation_accuracy"] >= accuracy), None)


class Timeline(logging.Handler):
    """When the probe and the evaluations of an nlpxfer run were done, from its log lines."""

    def __init__(self) -> None:
        super().__init__(level=logging.INFO)
        self.probe_done = 0.0
        self.evaluated: list[tuple[float, float]] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the time of the lines that matter."""
        arguments = record.args if isinstance(record.args, tuple) else ()
        if record.name == "nlpxfer.train.linear_probe" and record.msg.startswith("linear probe:"):
            self.probe_done = time.time()
        elif record.name == "nlpxfer.train.trainer" and record.msg.startswith("  epoch"):
            self.evaluated.append((float(str(arguments[0])), time.time()))

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Listen to nlpxfer's log."""
        package = logging.getLogger("nlpxfer")
        level = package.level
        package.addHandler(self)
        package.setLevel(logging.INFO)
        try:
            yield
        finally:
            package.removeHandler(self)
            package.setLevel(level)

    def curve(self, arm: TrainedArm) -> list[dict[str, float]]:
        """Validation accuracy over seconds since the start of the probe.

        Raises:
            RuntimeError: nlpxfer no longer logs what this reads.
        """
        scores = [line["eval_accuracy"] for line in arm.history if "eval_accuracy" in line]
        if arm.probe is None or not self.probe_done or len(scores) != len(self.evaluated):
            raise RuntimeError(f"the log told of {len(self.evaluated)} evaluations, the history of {len(scores)}")
        points = [{"epoch": 0.0, "seconds": arm.probe.seconds, "validation_accuracy": arm.probe.validation_accuracy}]
        start = self.probe_done - arm.probe.seconds
        for (epoch, at), accuracy in zip(self.evaluated, scores, strict=True):
            points.append({"epoch": epoch, "seconds": at - start, "validation_accuracy": accuracy})
        return points


def main(argv: Sequence[str] | None = None, sets: Mapping[str, Mapping[str, Any]] | None = None) -> Path:
    """Measure and write the results file; `sets` replaces the data sets (name -> values of `DataOptions`)."""
    asked = measuring.arguments("finetune", __doc__ or "", argv)
    measuring.show_log()
    known = data_sets(asked.data, asked.work) if sets is None else sets
    sizes = {name: SIZES.get(asked.scale, {}).get(name, SMOKE) for name in (*SIZES.get(asked.scale, {}), *known)}
    results = Results(
        "finetune",
        asked,
        {"model": asked.model, "batch_size": 32, "stock": STOCK, "stock_learning_rates": list(LEARNING_RATES)}
        | {"sweep": "rows and epochs of the timed run, seed 42, bfloat16 where it is fast, grouped batches"}
        | {name: asdict(size) for name, size in sizes.items()},
    )
    summary = {}
    for name, values in known.items():
        size = sizes[name]
        out = asked.work / f"finetune-{asked.scale}-{name}"
        shutil.rmtree(out, ignore_errors=True)  # what the stock Trainer wrote is not nlpxfer's to overwrite
        options = RunOptions(output_dir=str(out), num_train_epochs=size.nlpxfer_epochs)
        with start_run("finetune", DataOptions(**{**values, "max_train_samples": size.rows}), options) as run:
            results.use_data(name, run.data.fingerprint)
            bench = Bench(name, run, size, asked.model, results)
            run.settle(**run.start_of_training(bench.build(0)))
            results.measure(bench.cells())
            summary[name] = bench.summary() | {"bf16": vars(run.precision), "threads": torch.get_num_threads()}
    return results.write(summary)


if __name__ == "__main__":
    run_main(main)
