"""Distilling: nlpxfer against a teacher-in-the-loop Trainer and TextBrewer: time, accuracy, the teacher's worth.

    python benchmarks/distill.py --scale small
    NLPXFER_DATA=FOLDER python benchmarks/distill.py --scale full --data banking77

One teacher per data set, fine-tuned by nlpxfer, is shared by all sides and counts on none. The student is its three
evenly spaced layers with a new head; 3 epochs, batches of 32, temperature and weights alike. Cells of each data set:

- `teacher`, `nlpxfer/<seed>`, and `control/<seed>`: the same student and steps without a teacher
- `trainer/<seed>`, `textbrewer/<seed>`, `textbrewer-cached/<seed>` (with its own cache of teacher logits)
- `sweep-trainer/<rate>`, `sweep-textbrewer/<rate>`: their learning rates, chosen on validation rows
- `speed`: rows per second of student and teacher, in turns, float32
- `cost/<student>/cached`, `cost/<student>/each step`: distilling over 5 epochs with one pass of the teacher over all
  rows, and the same in nlpxfer's own engine with the teacher run on each batch; also with a larger teacher

nlpxfer's seconds hold the teacher's pass with tokenising and an empty cache, probe, training, validation after each
epoch and checkpoints. Those of the others hold the training call alone. nlpxfer runs at its default learning rates.
"""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import measuring
import numpy as np
import torch
from data_sets import data_sets
from measuring import Results, judged, mean_and_deviation, median_and_range
from peers import LEARNING_RATES, STOCK, TeacherInTheLoop, stock_arguments, stock_trainer, textbrewer_seconds
from torch import nn
from transformers import PreTrainedModel

from nlpxfer.checkpoint.load import Checkpoint, load_classifier, load_teacher
from nlpxfer.checkpoint.pooling import with_pooling
from nlpxfer.checkpoint.save import save_classifier
from nlpxfer.cli import run_main
from nlpxfer.config import DataOptions, RunOptions
from nlpxfer.data.tokenise import Collator, TokenisedRows
from nlpxfer.evaluate.arms import TrainedArm
from nlpxfer.evaluate.interval import paired_gain
from nlpxfer.methods.base import Batch, LossTerm, Method, row_logits
from nlpxfer.methods.distill import Distill
from nlpxfer.methods.finetune import FineTune
from nlpxfer.recipes import load_recipe
from nlpxfer.run import Run
from nlpxfer.start import start_run
from nlpxfer.students import student_of, training_of
from nlpxfer.teachers import ModelTeacher, Panel, TransferRows
from nlpxfer.train.launch import seed_everything
from nlpxfer.train.precision import autocast_type
from nlpxfer.train.predict import predict

TIME_TARGET = 1 / 3
RETENTION_TARGET = 0.98
SPEED_TARGET = 1.8
PEERS = ("trainer", "textbrewer", "textbrewer-cached")
COST_TARGET = 0.5
COST_EPOCHS = 5
COST_STUDENTS: dict[str, dict[str, Any]] = {
    "3 layers": {"student_num_layers": 3},
    "2 layers": {"student_num_layers": 2},
    "static": {"student": "static", "student_num_layers": None, "static_num_train_epochs": COST_EPOCHS},
    "3 layers, larger teacher": {"student_num_layers": 3},
}
"""Student -> options of the recipe. The larger teacher has twice the layers and width of the model: with MiniLM those
of BERT-base. It is untrained, since only its seconds count, and the student is made of the model's layers."""


@dataclass(frozen=True, kw_only=True)
class TaughtEachStep(Method):
    """Distillation without a cache: the teacher runs on each batch, in the precision of the student."""

    distill: Distill
    teacher: PreTrainedModel
    autocast: torch.dtype | None

    def loss_terms(self, model: nn.Module, batch: Batch) -> dict[str, LossTerm]:
        """Those of `distill`."""
        return self.distill.loss_terms(model, self._taught(batch))

    def counts(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Those of `distill`; the teacher answers all rows."""
        rows = torch.zeros(len(batch["labels"]), 1, device=batch["labels"].device)
        return self.distill.counts({**batch, "teacher_logits": rows})

    def _taught(self, batch: Batch) -> dict[str, torch.Tensor]:
        device = batch["input_ids"].device.type
        with torch.no_grad(), torch.autocast(device, dtype=self.autocast, enabled=self.autocast is not None):
            return {**batch, "teacher_logits": row_logits(self.teacher, batch).float()}


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is measured on one data set; rows are stratified samples of the training rows."""

    rows: int | None
    sweep_rows: int
    epochs: int
    layers: int
    seeds: tuple[int, ...]
    peer_seeds: tuple[int, ...]


SMALL = Size(rows=2000, sweep_rows=992, epochs=3, layers=3, seeds=(42, 43, 44), peer_seeds=(42,))
SIZES: dict[str, dict[str, Size]] = {
    "small": {"banking77": SMALL, "debian-sections": replace(SMALL, rows=1200, sweep_rows=480)},
    "full": {
        "banking77": replace(SMALL, rows=None, sweep_rows=3008, peer_seeds=(42, 43, 44)),
        "debian-sections": replace(
            SMALL, rows=None, sweep_rows=2016, seeds=(42, 43, 44, 45, 46), peer_seeds=(42, 43, 44, 45, 46)
        ),
    },
}
SMOKE = Size(rows=96, sweep_rows=64, epochs=1, layers=2, seeds=(42, 43), peer_seeds=(42,))


class Bench:
    """The measurements on one data set.

    Args:
        name: Name of the data set.
        run: Its rows and options, as the recipe has them.
        size: How much to measure.
        model: Checkpoint that the teacher is fine-tuned from.
        folder: Keeps the teacher between runs of the benchmark.
        results: Finished cells.
    """

    def __init__(self, name: str, run: Run, size: Size, model: str, folder: Path, results: Results) -> None:
        self.name, self.run, self.size, self.model, self.results = name, run, size, model, results
        self.recipe = load_recipe("distill")
        self.teacher_folder, self.cache = folder / f"teacher-{name}", folder / f"cache-{name}"
        self.scratch = run.folder / "checkpoints"
        self.plan = self.recipe.DistillOptions(
            model_name_or_path=model,
            teacher_name_or_path=str(self.teacher_folder),
            student_num_layers=size.layers,
            teacher_cache=str(self.cache),
        )
        self._loaded: Checkpoint | None = None

    @property
    def taught(self) -> Checkpoint:
        """The teacher, loaded once.

        Raises:
            Skipped: It was not trained yet.
        """
        if self._loaded is None:
            if not self.teacher_folder.is_dir():
                raise measuring.Skipped(f"there is no teacher yet: measure the cell {self.name}/teacher first")
            self._loaded = load_teacher(str(self.teacher_folder), schema=self.run.data.schema)
        return self._loaded

    def student(self, seed: int, source: Checkpoint | None = None) -> Checkpoint:
        """An untrained student: evenly spaced layers of the teacher (or of `source`), a new head that reads alike."""
        made: Checkpoint = student_of(self.run, self.plan, source or self.taught, like=self.taught)(seed)
        return replace(made, model=with_pooling(made, self.run.options.pooling))

    def cells(self) -> dict[str, Callable[[], dict[str, Any]]]:
        """All cells by name, in an order that puts nlpxfer's runs between those of the others."""
        sweeps = {f"sweep-trainer/{rate:g}": self._bound(self.sweep_trainer, rate) for rate in LEARNING_RATES}
        sweeps |= {f"sweep-textbrewer/{rate:g}": self._bound(self.sweep_textbrewer, rate) for rate in LEARNING_RATES}
        ours = {f"nlpxfer/{seed}": self._bound(self.nlpxfer, seed) for seed in self.size.seeds}
        peers: dict[str, Callable[[], dict[str, Any]]] = {}
        for seed in self.size.peer_seeds:
            peers[f"trainer/{seed}"] = self._bound(self.trainer, seed)
            peers[f"textbrewer/{seed}"] = self._bound(self.textbrewer, seed)
            peers[f"textbrewer-cached/{seed}"] = self._bound(self.textbrewer_cached, seed)
        found = {"teacher": self.teacher, **sweeps, **_in_between(ours, peers)}
        found |= {f"control/{seed}": self._bound(self.control, seed) for seed in self.size.seeds}
        found |= {"speed": self.speed}
        for student in COST_STUDENTS:
            found[f"cost/{student}/each step"] = lambda s=student: self.cost(s, cached=False)
            found[f"cost/{student}/cached"] = lambda s=student: self.cost(s, cached=True)
        return {f"{self.name}/{key}": cell for key, cell in found.items()}

    @staticmethod
    def _bound(method: Callable[[Any], dict[str, Any]], value: float) -> Callable[[], dict[str, Any]]:
        return lambda: method(value)

    def teacher(self) -> dict[str, Any]:
        """Fine-tune the teacher with nlpxfer's defaults and keep it."""

        def build(seed: int) -> Checkpoint:
            return load_classifier(self.model, schema=self.run.data.schema, seed=seed)

        rate = self.run.start_of_training(build(0))["learning_rate"]
        arm = self.run.train("teacher", build, FineTune(), seeds=self.run.seeds[:1], learning_rate=rate)[0]
        shutil.rmtree(self.teacher_folder, ignore_errors=True)
        save_classifier(arm.model, arm.tokenizer, self.run.data.schema, self.teacher_folder)
        return self._cell(arm) | {"learning_rate": rate}

    def nlpxfer(self, seed: int) -> dict[str, Any]:
        """The distilling recipe's student, from an empty cache of teacher logits."""
        shutil.rmtree(self.cache, ignore_errors=True)
        start = time.perf_counter()
        rows = TransferRows(self.run, Panel([ModelTeacher(self.taught, str(self.cache))]))
        teacher_seconds = time.perf_counter() - start
        method = Distill(temperature=self.plan.temperature, kd_weight=self.plan.share_of_teacher)
        facts = {"teacher": self.taught.weights_sha256}
        split = rows.split(self.plan)
        training = training_of(self.run, self.plan, self.taught) | {"split": split, "seeds": [seed], "facts": facts}
        arm = self.run.train("distilled", self.student, method, **training)[0]
        found = self._cell(arm)
        return found | {"teacher_seconds": teacher_seconds, "seconds": teacher_seconds + arm.train_seconds}

    def cost(self, student: str, *, cached: bool) -> dict[str, Any]:
        """Seconds of a distillation over five epochs, from an empty cache of teacher logits or without one."""
        plan = replace(self.plan, **COST_STUDENTS[student])
        method = Distill(temperature=plan.temperature, kd_weight=plan.share_of_teacher)
        is_larger = student.endswith("larger teacher")
        taught = self.larger_teacher() if is_larger else self.taught
        source = load_classifier(self.model, schema=self.run.data.schema) if is_larger else taught
        shutil.rmtree(self.cache, ignore_errors=True)
        start = time.perf_counter()
        if cached:
            rows = TransferRows(self.run, Panel([ModelTeacher(taught, str(self.cache))]))
            training: dict[str, Any] = {"method": method, "split": rows.split(plan)}
        else:
            training = {
                "method": TaughtEachStep(
                    distill=method,
                    teacher=taught.model.to(self.run.options.device),
                    autocast=autocast_type(self.run.options),
                )
            }
        teacher_seconds = time.perf_counter() - start
        training |= {"num_train_epochs": COST_EPOCHS} | training_of(self.run, plan, source)
        build = student_of(self.run, plan, source)
        arm = self.run.train("cost", build, seeds=[42], facts={"cached": cached}, **training)[0]
        shutil.rmtree(self.scratch, ignore_errors=True)
        found = {"seconds": teacher_seconds + arm.train_seconds, "steps": arm.steps}
        if is_larger:
            return found | {"teacher_parameters": sum(p.numel() for p in taught.model.parameters())}
        scores = measuring.scores(self.run, arm.validation_logits, arm.test_logits)
        return found | {"validation_accuracy": scores["validation_accuracy"]}

    def larger_teacher(self) -> Checkpoint:
        """An untrained classifier of twice the layers and width of the model, with its tokenizer."""
        base = load_classifier(self.model, schema=self.run.data.schema)
        config = copy.deepcopy(base.model.config)
        for size in ("num_hidden_layers", "hidden_size", "intermediate_size"):
            setattr(config, size, 2 * getattr(config, size))
        seed_everything(42)
        folder = self.teacher_folder.with_name(f"larger-{self.teacher_folder.name}")
        shutil.rmtree(folder, ignore_errors=True)
        save_classifier(type(base.model)(config), base.tokenizer, self.run.data.schema, folder)
        return load_teacher(str(folder), schema=self.run.data.schema)

    def control(self, seed: int) -> dict[str, Any]:
        """The same layers of the pretrained checkpoint and the same steps, without a teacher."""
        treated = self.results.get(f"{self.name}/nlpxfer/{seed}")
        if treated is None:
            raise measuring.Skipped(f"its number of steps is that of {self.name}/nlpxfer/{seed}, which is missing")
        base = load_classifier(self.model, schema=self.run.data.schema)

        def build(seed: int) -> Checkpoint:
            return self.student(seed, base)

        training = training_of(self.run, self.plan, self.taught) | {"seeds": [seed], "max_steps": treated["steps"]}
        return self._cell(self.run.train("control", build, FineTune(), **training)[0])

    def _cell(self, arm: TrainedArm) -> dict[str, Any]:
        shutil.rmtree(self.scratch, ignore_errors=True)
        return {
            "seed": arm.seed,
            "learning_rate": training_of(self.run, self.plan, self.taught)["learning_rate"],
            "train_seconds": arm.train_seconds,
            "probe": vars(arm.probe) if arm.probe else None,
            "steps": arm.steps,
            **measuring.scores(self.run, arm.validation_logits, arm.test_logits),
        }

    def trainer(self, seed: int) -> dict[str, Any]:
        """The teacher-in-the-loop Trainer at its best learning rate, float32."""
        rate = measuring.best_rate(self.results.under(f"{self.name}/sweep-trainer/"), LEARNING_RATES)
        return self._peer("trainer", seed, rate, self._train_rows())

    def textbrewer(self, seed: int) -> dict[str, Any]:
        """TextBrewer at its best learning rate, float32."""
        rate = measuring.best_rate(self.results.under(f"{self.name}/sweep-textbrewer/"), LEARNING_RATES)
        return self._peer("textbrewer", seed, rate, self._train_rows())

    def textbrewer_cached(self, seed: int) -> dict[str, Any]:
        """TextBrewer with its own cache of teacher logits, at the learning rate found without it."""
        rate = measuring.best_rate(self.results.under(f"{self.name}/sweep-textbrewer/"), LEARNING_RATES)
        return self._peer("textbrewer-cached", seed, rate, self._train_rows())

    def sweep_trainer(self, rate: float) -> dict[str, Any]:
        """Validation accuracy at a learning rate on part of the rows; bfloat16 and grouped batches, to save time."""
        grouped = {"bf16": self.run.precision.bf16, "train_sampling_strategy": "group_by_length"}
        return self._validation_only(self._peer("trainer", 42, rate, self._sweep_rows(), **grouped))

    def sweep_textbrewer(self, rate: float) -> dict[str, Any]:
        """Validation accuracy at a learning rate on part of the rows, with its cache of teacher logits."""
        return self._validation_only(self._peer("textbrewer-cached", 42, rate, self._sweep_rows()))

    @staticmethod
    def _validation_only(cell: Mapping[str, Any]) -> dict[str, Any]:
        return {key: cell[key] for key in ("learning_rate", "validation_accuracy", "seconds")}

    def _train_rows(self) -> TokenisedRows:
        return self.run.tokenise(self.taught.tokenizer, "train")

    def _sweep_rows(self) -> TokenisedRows:
        rows = self._train_rows()
        return rows.select(np.random.default_rng(0).permutation(len(rows))[: self.size.sweep_rows])

    def _peer(self, kind: str, seed: int, rate: float, rows: TokenisedRows, **changes: Any) -> dict[str, Any]:
        """Train a student with one of the peers and score it in float32."""
        student = self.student(seed).model
        tokenizer, teacher = self.taught.tokenizer, self.taught.model
        weights = {"temperature": self.plan.temperature, "kd_weight": self.plan.share_of_teacher}
        folder, epochs = self.scratch / kind, self.size.epochs
        if kind == "trainer":
            seed_everything(seed)
            arguments = stock_arguments(folder, learning_rate=rate, epochs=epochs, seed=seed, **changes)
            trainer = stock_trainer(
                student, arguments, rows, tokenizer, kind=TeacherInTheLoop, teacher=teacher, **weights
            )
            start = time.perf_counter()
            trainer.train()
            seconds = time.perf_counter() - start
            student = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
        else:
            cached = kind == "textbrewer-cached"
            shared = {"learning_rate": rate, "epochs": epochs, "cached": cached, "seed": seed, **weights}
            seconds = textbrewer_seconds(student, teacher, rows, tokenizer, folder, **shared)
        shutil.rmtree(self.scratch, ignore_errors=True)
        collator = Collator.for_tokenizer(tokenizer)
        logits = [predict(student, self.run.tokenise(tokenizer, split), collator) for split in ("validation", "test")]
        return {"seed": seed, "learning_rate": rate, "seconds": seconds, **measuring.scores(self.run, *logits)}

    def speed(self) -> dict[str, Any]:
        """Rows per second of student and teacher on the CPU, float32, in turns on the same test rows."""
        self.run.with_speed([], {"teacher": self.taught, "student": self.student(42)})
        return {"ratio": self.run.checks["speed_ratio"]["student"]}

    def summary(self) -> dict[str, Any]:
        """The figures and their targets, as far as their cells are finished."""
        found: dict[str, Any] = {"rows": self.run.data.facts()["rows"], "classes": len(self.run.data.schema)}
        under = {key: self.results.under(f"{self.name}/{key}/") for key in ("nlpxfer", "control", *PEERS)}
        for key, cells in under.items():
            if cells:
                found[key] = {
                    "learning_rate": cells[0]["learning_rate"],
                    "test_accuracy": mean_and_deviation(cell["test_accuracy"] for cell in cells),
                    "test_accuracy_without_leaks": mean_and_deviation(c["test_accuracy_without_leaks"] for c in cells),
                    "seconds": median_and_range(cell.get("seconds", cell.get("train_seconds")) for cell in cells),
                }
        if "nlpxfer" in found:
            found["time_ratio"] = {
                key: self._time_ratio(found["nlpxfer"]["seconds"], found[key]["seconds"]["median"])
                for key in PEERS
                if key in found
            }
        teacher = self.results.get(f"{self.name}/teacher")
        if teacher:
            found["teacher"] = {"test_accuracy": teacher["test_accuracy"], "train_seconds": teacher["train_seconds"]}
        if teacher and under["nlpxfer"]:
            kept = found["nlpxfer"]["test_accuracy"]["mean"] / teacher["test_accuracy"]
            found["retention"] = judged(kept, RETENTION_TARGET)
        if speed := self.results.get(f"{self.name}/speed"):
            found["speed_ratio"] = judged(speed["ratio"]["median"], SPEED_TARGET)
        for student in COST_STUDENTS:
            cells = [self.results.get(f"{self.name}/cost/{student}/{kind}") for kind in ("cached", "each step")]
            if all(cells):
                ratio = judged(cells[0]["seconds"] / cells[1]["seconds"], COST_TARGET, at_most=True)
                found.setdefault("cost", {})[student] = ratio | {"seconds": [cell["seconds"] for cell in cells]}
        if under["nlpxfer"] and len(under["nlpxfer"]) == len(under["control"]):
            pairs = [[measuring.correctness(cell) for cell in under[key]] for key in ("nlpxfer", "control")]
            found["gain"] = vars(paired_gain(pairs[0], pairs[1]))
        return found

    @staticmethod
    def _time_ratio(ours: Mapping[str, Any], theirs: float) -> dict[str, Any]:
        """nlpxfer's seconds over those of a peer, with the range over nlpxfer's seeds."""
        spread = {"low": ours["low"] / theirs, "high": ours["high"] / theirs}
        return judged(ours["median"] / theirs, TIME_TARGET, at_most=True) | spread


def _in_between(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Entries of both in turns, so that a machine that changes its speed changes it for both."""
    lists = [list(first.items()), list(second.items())]
    longest = max(map(len, lists))
    return dict(pairs[i] for i in range(longest) for pairs in lists if i < len(pairs))


def main(argv: Sequence[str] | None = None, sets: Mapping[str, Mapping[str, Any]] | None = None) -> Path:
    """Measure and write the results file; `sets` replaces the data sets (name -> values of `DataOptions`)."""
    asked = measuring.arguments("distill", __doc__ or "", argv)
    measuring.show_log()
    known = data_sets(asked.data, asked.work) if sets is None else sets
    sizes = {name: SIZES.get(asked.scale, {}).get(name, SMOKE) for name in (*SIZES.get(asked.scale, {}), *known)}
    results = Results(
        "distill",
        asked,
        {
            "model": asked.model,
            "batch_size": 32,
            "trainer": f"{STOCK}; the teacher's forward pass inside compute_loss",
            "textbrewer": "BasicDistiller on the installed libraries as they are, without changes to it: plain AdamW "
            "(fused), random batches, float32; its loss has no T^2, so kd_loss_weight carries it",
            "peer_learning_rates": list(LEARNING_RATES),
            "sweep": "seed 42, sweep_rows of the rows, all epochs; Trainer in bfloat16 where it is fast with grouped "
            "batches, TextBrewer with its cache of teacher logits",
        }
        | {name: asdict(size) for name, size in sizes.items()},
    )
    summary = {}
    for name, values in known.items():
        size, folder = sizes[name], asked.work / f"distill-{asked.scale}"
        out = folder / f"run-{name}"
        shutil.rmtree(out, ignore_errors=True)  # what the peers wrote is not nlpxfer's to overwrite
        options = RunOptions(output_dir=str(out), num_train_epochs=size.epochs, num_seeds=1)
        with start_run("distill", DataOptions(**{**values, "max_train_samples": size.rows}), options) as run:
            results.use_data(name, run.data.fingerprint)
            bench = Bench(name, run, size, asked.model, folder, results)
            results.measure(bench.cells())
            summary[name] = bench.summary() | {"bf16": vars(run.precision)}
    return results.write(summary)


if __name__ == "__main__":
    run_main(main)
