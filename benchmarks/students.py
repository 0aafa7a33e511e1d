"""Students of a fine-tuned teacher: what each keeps of it, against its control arm and against other tools.

    NLPXFER_DATA=FOLDER python benchmarks/students.py --scale small
    NLPXFER_DATA=FOLDER python benchmarks/students.py --scale full

Cells of each data set:

- `teacher`: the checkpoint fine-tuned by `recipes/finetune.py`; all others learn from it
- `<student>`: `recipes/distill.py` with that student and its control arm, several seeds in one run
- `textbrewer`: the layers of the first student, trained by TextBrewer with its cache of the same teacher's logits
- `sentence-transformers`: the same layers, trained by its loss for layer reduction to give the teacher's sentence
  vectors, and logistic regression on the labels
- `model2vec`: the same teacher's body made static by model2vec, and logistic regression on the labels
- `speed`: rows per second of `Classifier.logits` for teacher, static student and its int8 form, and of model2vec with
  its regression, in turns, tokenising included
- `int8`: the same of the teacher, the first student of layers that is there, and what `nlpxfer export --int8` makes of
  that student; needs the extra `onnx`
- `mixed-<student>`: the teacher also labels mixtures of the training texts, and nothing else
- `more-<student>`: the teacher labels more texts: the other training texts, or the unlabelled ones of bundled data
- `more-textbrewer`, `more-sentence-transformers`: the same texts for these, at the rate that was best without them;
  TextBrewer then has no label loss, as either all of its rows have labels or none has
- `few-teacher`, `few-<student>`: the same with few labels per class, for the teacher too

What a student keeps is its test accuracy over the teacher's. Defaults of the recipes, save for epochs and seeds. The
others have as many epochs, one seed, and the learning rate of `LEARNING_RATES` that is best on validation rows. The
bottom layers are measured where they were better than evenly chosen ones on validation rows.
"""

from __future__ import annotations

import csv
import importlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import measuring
import torch
from data_sets import data_sets
from measuring import Results, Skipped, judged
from peers import LEARNING_RATES, embedding_student, textbrewer_seconds

from nlpxfer.checkpoint.load import Checkpoint, load_classifier
from nlpxfer.checkpoint.pooling import with_pooling
from nlpxfer.classify import Classifier
from nlpxfer.cli import run_main
from nlpxfer.config import DataOptions, RunOptions
from nlpxfer.data.tokenise import Collator, TokenisedRows
from nlpxfer.errors import ConfigError
from nlpxfer.evaluate.cost import alternate_rates
from nlpxfer.export import ExportRequest, export_classifier
from nlpxfer.recipes import load_recipe
from nlpxfer.report.report import Arm, Report
from nlpxfer.run import Run
from nlpxfer.start import start_run
from nlpxfer.students import student_of
from nlpxfer.train.predict import predict

DISTIL = load_recipe("distill").DistillOptions
DATA = "banking77,debian-sections,clinc150,scicite"
STUDENTS: dict[str, list[str]] = {
    "3 layers": ["--student_num_layers", "3"],
    "3 layers, bottom": ["--student_num_layers", "3", "--student_layers", "bottom"],
    "3 layers, narrower": ["--student_num_layers", "3", "--student_intermediate_size", "1280"],
    "2 layers": ["--student_num_layers", "2"],
    "static": ["--student", "static"],
}
"""Student -> options of the recipe. The teacher is read by the mean, and so are students of its layers: each has one
more that computes it. The narrower one keeps 1,280 of 1,536 inner values of each layer."""
KEPT_TARGETS = {"2 layers": 0.975, "static": 0.93} | dict.fromkeys(list(STUDENTS)[:3], 0.99)
SPEED_TARGETS = {"static": 50.0} | dict.fromkeys(list(STUDENTS)[:3], 1.8)
PEERS = ("textbrewer", "sentence-transformers", "model2vec")
KEPT = ("teacher", "distilled", "control", "gain", "machine")
STRENGTHS = (0.1, 1.0, 10.0, 100.0)
"""Inverse strengths of the regression on model2vec's vectors, chosen on validation rows."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is measured on a data set; rows are stratified samples of the training rows.

    The `more` students learn from texts without labels too, and the `mixed` ones from `mixed_texts` mixtures for each
    row, both for `text_epochs` and `text_seeds`; `few` rows have labels in the cells that start so, None leaves
    these out.
    """

    rows: int | None
    epochs: int
    seeds: int
    few: int | None = None
    more: tuple[str, ...] = ("3 layers", "2 layers", "static")
    mixed: tuple[str, ...] = ("3 layers", "2 layers", "static")
    mixed_texts: int = 5
    text_epochs: int = 3
    text_seeds: int = 1
    students: tuple[str, ...] = ("3 layers", "2 layers", "static")
    speed_rows: int = 1000


BOTTOM = ("3 layers", "3 layers, bottom", "2 layers", "static")
SMALL = Size(rows=1000, epochs=4, seeds=3)
SIZES: dict[str, dict[str, Size]] = {
    "small": dict.fromkeys(DATA.split(","), SMALL)
    | {
        "banking77": Size(rows=2000, epochs=5, seeds=3, few=770, text_seeds=3, students=BOTTOM, mixed=BOTTOM),
        "clinc150": Size(rows=1500, epochs=4, seeds=3, students=BOTTOM, mixed=BOTTOM),
    },
    "full": dict.fromkeys(DATA.split(","), Size(rows=None, epochs=5, seeds=1))
    | {
        "banking77": Size(rows=None, epochs=5, seeds=1, few=770, text_seeds=5, students=tuple(STUDENTS)),
        "clinc150": Size(rows=None, epochs=5, seeds=1, students=BOTTOM),
    },
}
"""At full scale each student is trained once."""
MOST = {"small": {"validation": 500, "test": 2000}}
"""Scale -> rows that are kept of a split of a set that is not bundled."""
SMOKE = Size(
    rows=96,
    epochs=1,
    seeds=1,
    few=48,
    text_epochs=1,
    students=("2 layers", "static"),
    more=("static",),
    mixed=("static",),
    mixed_texts=1,
    speed_rows=16,
)


class Bench:
    """The cells of one data set.

    Args:
        name: Name of the data set.
        values: Values of `DataOptions`.
        size: How much to measure.
        asked: The command line.
        results: Finished cells.
    """

    def __init__(self, name: str, values: Mapping[str, Any], size: Size, asked: Any, results: Results) -> None:  # noqa: ANN401
        self.name, self.size, self.asked, self.results = name, size, asked, results
        self.rows = dict(values) | ({} if size.rows is None else {"max_train_samples": size.rows})
        self.few = dict(values) | {"max_train_samples": size.few}
        self.folder = asked.work / f"students-{asked.scale}-{name}"

    def cells(self) -> dict[str, Callable[[], dict[str, Any]]]:
        """All cells by name."""
        found: dict[str, Callable[[], dict[str, Any]]] = {"teacher": lambda: self.teacher("teacher", self.rows)}
        found |= {student: lambda s=student: self.student(s) for student in self.size.students}
        found |= {"textbrewer": self.textbrewer, "sentence-transformers": self.sentence_transformers}
        found |= {"model2vec": self.model2vec, "speed": self.speed, "int8": self.int8}
        if self.size.more:
            found["more-textbrewer"] = lambda: self.textbrewer("more-")
            found["more-sentence-transformers"] = lambda: self.sentence_transformers("more-")
        for student in self.size.mixed:
            found[f"mixed-{student}"] = lambda s=student: self.student(s, "mixed-")
        for student in self.size.more:
            found[f"more-{student}"] = lambda s=student: self.student(s, "more-")
        if self.size.few is not None:
            found["few-teacher"] = lambda: self.teacher("few-teacher", self.few)
            for student in self.size.students:
                found[f"few-{student}"] = lambda s=student: self.student(s, "few-")
        return {f"{self.name}/{key}": cell for key, cell in found.items()}

    def teacher(self, key: str, values: Mapping[str, Any]) -> dict[str, Any]:
        """Fine-tune it, and keep its folder."""
        epochs = self.size.epochs if key == "teacher" else 10
        report = self._run("finetune", key, values, ["--num_train_epochs", str(epochs)])
        arm = report.arms[0]
        return {"rows": report.data["rows"], **_arm(arm), "train_seconds": arm.seconds}

    def student(self, student: str, prefix: str = "") -> dict[str, Any]:
        """A run of the recipe: the student and its control arm, all seeds; a prefix adds texts without labels."""
        few = prefix == "few-"
        values = dict(self.few if few else self.rows)
        teacher = self._kept("few-teacher" if few else "teacher")
        words = ["--teacher_name_or_path", str(teacher), "--model_name_or_path", self.asked.model, *STUDENTS[student]]
        seeds = self.size.text_seeds if prefix else self.size.seeds
        words += ["--num_seeds", str(seeds), "--teacher_cache", str(self.folder / f"cache-{teacher.name}")]
        epochs = self.size.text_epochs if prefix else self.size.epochs
        if "static" not in STUDENTS[student]:  # it has epochs of its own
            words += ["--num_train_epochs", str(epochs)]
        if prefix == "mixed-":
            values["mixed_texts"] = self.size.mixed_texts
        elif prefix:
            values["unlabelled_file"] = self._texts()
        report = self._run("distill", f"{prefix}{student}".replace(" ", "-"), values, words)
        arms = {arm.name: arm for arm in report.arms}
        kept = report.checks["retention"]["students"]
        return {
            "rows": report.data["rows"],
            "teacher": _arm(arms["teacher"]),
            "distilled": _arm(arms["distilled"]) | {"kept": kept["distilled"]["score"]},
            "control": _arm(arms["control"]) | {"kept": kept["control"]["score"]},
            "speed_ratio": report.checks["speed_ratio"]["distilled"],
            "gain": asdict(report.verdict),
            "train_seconds": arms["distilled"].seconds,
        }

    def textbrewer(self, prefix: str = "") -> dict[str, Any]:
        """Layers of the teacher with a new head, trained by TextBrewer."""

        def trained(run: Run, rate: float) -> tuple[float, dict[str, Any]]:
            teacher, made = self._layers(run)
            rows, scratch = run.tokenise(teacher.tokenizer, "train"), run.folder / "checkpoints"
            share = DISTIL().share_of_teacher
            if prefix:
                share = 1.0
                rows = TokenisedRows.join(rows, run.tokenise(teacher.tokenizer, "unlabelled"))
            shared = {"learning_rate": rate, "epochs": self._epochs(prefix), "cached": True, "seed": 42}
            shared |= {"temperature": DISTIL.temperature, "kd_weight": share}
            seconds = textbrewer_seconds(made.model, teacher.model, rows, teacher.tokenizer, scratch, **shared)
            collator = Collator.for_tokenizer(teacher.tokenizer)
            logits = [
                predict(made.model, run.tokenise(teacher.tokenizer, split), collator)
                for split in ("validation", "test")
            ]
            return seconds, measuring.scores(run, *logits)

        return self._at_best_rate("textbrewer", trained, prefix)

    def sentence_transformers(self, prefix: str = "") -> dict[str, Any]:
        """The regression on vectors of fewer layers that sentence-transformers trained to be the teacher's vectors."""

        def trained(run: Run, rate: float) -> tuple[float, dict[str, Any]]:
            teacher, made = self._layers(run)
            texts = {split: run.texts(split)[0] for split in ("train", "validation", "test")}
            shutil.rmtree(self.folder / "peer", ignore_errors=True)
            shared = {"learning_rate": rate, "epochs": self._epochs(prefix)}
            read = [*texts["train"], *(run.texts("unlabelled")[0] if prefix else [])]
            encode, seconds = embedding_student(teacher, made, read, self.folder / "peer", **shared)
            return seconds, self._regression(run, {split: encode(texts[split]) for split in texts})

        return self._at_best_rate("sentence-transformers", trained, prefix)

    def _epochs(self, prefix: str) -> int:
        return self.size.text_epochs if prefix else self.size.epochs

    def _at_best_rate(
        self, name: str, trained: Callable[[Run, float], tuple[float, dict[str, Any]]], prefix: str
    ) -> dict[str, Any]:
        """What a student of another tool scores at the learning rate that is best for it on validation rows.

        Args:
            name: Of the tool's cell.
            trained: From the data and a learning rate to seconds of training and scores.
            prefix: "more-" with further texts, at the rate that was best without.
        """
        rates, found = LEARNING_RATES, []
        if prefix:
            plain = self.results.get(f"{self.name}/{name}")
            if plain is None:
                raise Skipped(f"its learning rate is not known yet: measure the cell {self.name}/{name} first")
            rates = (plain["learning_rate"],)
        for rate in rates:
            with self._data(prefix) as run:
                seconds, scores = trained(run, rate)
            found.append({"learning_rate": rate, "train_seconds": seconds, **scores})
        return max(found, key=lambda each: each["validation_accuracy"]) | {"teacher": self._taught_by()}

    def _taught_by(self) -> float:
        """Test accuracy of the teacher whose folder is there."""
        report = json.loads((self._kept("teacher") / "report.json").read_text(encoding="utf-8"))
        return float(report["metrics"]["test"]["accuracy"])

    def model2vec(self) -> dict[str, Any]:
        """The regression on vectors of the teacher's body, which model2vec made static with its defaults."""
        static = self._model2vec()
        with self._data() as run:
            vectors = {split: static.encode(run.texts(split)[0]) for split in ("train", "validation", "test")}
            return self._regression(run, vectors) | {"teacher": self._taught_by()}

    @staticmethod
    def _regression(run: Run, vectors: Mapping[str, Any]) -> dict[str, Any]:
        """Logistic regression on vectors of all splits, its strength chosen on validation rows."""
        from sklearn.linear_model import LogisticRegression

        labels = {split: run.labels(split) for split in vectors}
        found = []
        for strength in STRENGTHS:
            fitted = LogisticRegression(C=strength, max_iter=1000).fit(vectors["train"], labels["train"])
            found.append((fitted.score(vectors["validation"], labels["validation"]), -strength, fitted))
        validation, strength, best = max(found, key=lambda each: each[:2])
        test = float(best.score(vectors["test"], labels["test"]))
        return {"validation_accuracy": float(validation), "test_accuracy": test, "strength": -strength}

    def _layers(self, run: Run) -> tuple[Checkpoint, Checkpoint]:
        """The teacher, and as many of its layers as the first student has, with a new head that reads alike."""
        teacher = load_classifier(str(self._kept("teacher")), schema=run.data.schema)
        teacher.model.requires_grad_(False)
        plan = DISTIL(student_num_layers=int(STUDENTS[self.size.students[0]][1]))
        made: Checkpoint = student_of(run, plan, teacher)(42)
        return teacher, replace(made, model=with_pooling(made, run.options.pooling))

    def speed(self) -> dict[str, Any]:
        """Rows per second of those that answer texts, in turns, float32."""
        with self._data() as run:
            texts = run.texts("test")[0]
        texts = (texts * (self.size.speed_rows // len(texts) + 1))[: self.size.speed_rows]
        teacher, static = str(self._kept("teacher")), str(self._kept("static"))
        sides = {"teacher": Classifier.load(teacher, bf16=False), "static": Classifier.load(static)}
        sides["static int8"] = Classifier.load(static, int8=True)
        runs = {name: lambda c=side: c.logits(texts) for name, side in sides.items()}
        try:
            vectors = self._model2vec()
            runs["model2vec"] = lambda: vectors.encode(texts)
        except Skipped as reason:
            self.results.skipped[f"{self.name}/speed: model2vec"] = str(reason)
        return _in_turns(runs, len(texts))

    def int8(self) -> dict[str, Any]:
        """A student of layers in float32 and exported with int8 weights: rows per second in turns, and scores."""
        layers = [name for name in self.size.students if "static" not in STUDENTS[name]]
        made = [name for name in layers if (self.folder / name.replace(" ", "-") / "report.json").is_file()]
        if not made:
            raise Skipped(f"there is none of the students {', '.join(layers)} yet: measure one of them first")
        folder, exported = self._kept(made[0].replace(" ", "-")), self.folder / "int8"
        shutil.rmtree(exported, ignore_errors=True)
        try:
            export_classifier(ExportRequest(model=str(folder), out=exported, int8=True), quiet=True)
        except ConfigError as reason:
            raise Skipped(str(reason)) from reason
        with self._data() as run:
            texts, labels = run.texts("test")[0], run.labels("test")
        sides = {"teacher": Classifier.load(str(self._kept("teacher")), bf16=False)}
        sides |= {
            "float32": Classifier.load(str(folder), bf16=False),
            "int8": Classifier.load(str(exported), int8=True),
        }
        answers = {name: side.logits(texts).argmax(axis=1) for name, side in sides.items()}
        timed = texts[: self.size.speed_rows]
        runs = {name: lambda c=side: c.logits(timed) for name, side in sides.items()}
        return _in_turns(runs, len(timed)) | {
            "student": made[0],
            "accuracy": {name: float((found == labels).mean()) for name, found in answers.items()},
            "same_label": float((answers["int8"] == answers["float32"]).mean()),
        }

    def _model2vec(self) -> Any:  # noqa: ANN401 - optional package
        try:
            distil = importlib.import_module("model2vec.distill").distill_from_model
        except ImportError as error:
            raise Skipped(f"model2vec cannot be imported: {error}") from error
        teacher = load_classifier(
            str(self._kept("teacher")), schema=Classifier.load(str(self._kept("teacher"))).schema
        )
        return distil(teacher.model.base_model, teacher.tokenizer)

    def _run(self, recipe: str, key: str, values: Mapping[str, Any], words: Sequence[str]) -> Report:
        """A run of a recipe in a folder of its own."""
        folder = self.folder / key
        shutil.rmtree(folder, ignore_errors=True)
        asked = [word for name, value in values.items() for word in (f"--{name}", str(value))]
        if recipe == "finetune":
            asked += ["--model_name_or_path", self.asked.model, "--control_arm", "false"]
        report: Report = load_recipe(recipe).main([*asked, *words, "--output_dir", str(folder)])
        kind = key.partition("-")[0]
        other_rows = f"-{kind}" if kind in ("mixed", "more", "few") else ""
        self.results.use_data(f"{self.name}{other_rows}", report.data["fingerprint"])
        return report

    def _kept(self, key: str) -> Path:
        """The folder of a cell's model; a teacher that was measured on another machine is trained again."""
        folder: Path = self.folder / key
        if key.endswith("teacher") and not folder.exists() and self.results.get(f"{self.name}/{key}"):
            self.teacher(key, self.few if key.startswith("few") else self.rows)
        if not (folder / "report.json").is_file():
            raise Skipped(f"there is no {key} yet: measure the cell {self.name}/{key} first")
        return folder

    def _data(self, prefix: str = "") -> Any:  # noqa: ANN401 - a context that gives a Run
        folder = self.folder / "scratch"
        shutil.rmtree(folder, ignore_errors=True)  # what TextBrewer wrote is not nlpxfer's to overwrite
        options = RunOptions(output_dir=str(folder))
        data = DataOptions(**self.rows)
        if prefix:
            return start_run("distill", data, options, DISTIL(unlabelled_file=self._texts()))
        return start_run("finetune", data, options)

    def _texts(self) -> str:
        """The training texts without their labels, one a line; of bundled data its own unlabelled ones."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file: Path = self.folder / "unlabelled.txt"
        source = self.few.get("train_file")
        if source is None:
            return "auto"
        with Path(source).open(encoding="utf-8", newline="") as rows:
            texts = [" ".join(row["text"].split()) for row in csv.DictReader(rows)]
        file.write_text("".join(f"{text}\n" for text in dict.fromkeys(texts)), encoding="utf-8")
        return str(file)

    def summary(self) -> dict[str, Any]:
        """Each student beside its control arm, with the targets."""
        found: dict[str, Any] = {}
        measured = {"": self.size.students, "mixed-": self.size.mixed, "more-": self.size.more}
        for prefix, wanted in (measured | {"few-": self.size.students}).items():
            students = {}
            for student in wanted:
                cell = self.results.get(f"{self.name}/{prefix}{student}")
                if cell is None:
                    continue
                kept, ratio = cell["distilled"]["kept"]["value"], cell["speed_ratio"]["median"]
                students[student] = {key: cell[key] for key in KEPT if key in cell} | {
                    "rows": cell["rows"],
                    "kept": judged(kept, KEPT_TARGETS[student]) if prefix != "few-" else kept,
                    "speed_ratio": judged(ratio, SPEED_TARGETS[student])
                    if student in SPEED_TARGETS and student != "static"
                    else ratio,
                }
            found[prefix + "students"] = students
        known = {key: self.results.get(f"{self.name}/{key}") for key in (*PEERS, *(f"more-{key}" for key in PEERS))}
        found["peers"] = {key: cell for key, cell in known.items() if cell is not None}
        found |= {key: self.results.get(f"{self.name}/{key}") for key in ("speed", "int8")}
        if found["speed"]:
            found["static_speed"] = judged(found["speed"]["ratios"]["static"]["median"], SPEED_TARGETS["static"])
        return found


def _in_turns(runs: Mapping[str, Callable[[], object]], rows: int) -> dict[str, Any]:
    """Rows per second of several runs, and their ratios to the first."""
    measured = alternate_rates(runs, rows, repeats=5)
    ratios = {name: vars(ratio) for name, ratio in measured.ratios.items()}
    return {"rates": {name: vars(rate) for name, rate in measured.rates.items()}, "ratios": ratios}


def _arm(arm: Arm) -> dict[str, Any]:
    """Scores and size of an arm."""
    metrics = json.loads(json.dumps(arm.metrics))
    seeds = [each.metrics["test"]["accuracy"] for each in arm.per_seed] or [metrics["test"]["accuracy"]]
    return {
        "validation_accuracy": metrics["validation"]["accuracy"],
        "test_accuracy": measuring.mean_and_deviation(seeds),
        "parameters": arm.parameters,
        "bytes": arm.bytes,
        "latency": arm.latency,
    }


def main(argv: Sequence[str] | None = None, sets: Mapping[str, Mapping[str, Any]] | None = None) -> Path:
    """Measure and write the results file; `sets` replaces the data sets (name -> values of `DataOptions`)."""
    asked = measuring.arguments("students", __doc__ or "", argv, DATA)
    measuring.show_log()
    known = data_sets(asked.data, asked.work, MOST.get(asked.scale)) if sets is None else sets
    sizes = {name: SIZES.get(asked.scale, {}).get(name, SMOKE) for name in known}
    settings = {name: asdict(size) | {"most": MOST.get(asked.scale)} for name, size in sizes.items()}
    shares = {"layers": DISTIL().share_of_teacher, "static": DISTIL(student="static").share_of_teacher}
    shared = {"model": asked.model, "students": STUDENTS, "kd_weight": shares}
    results = Results("students", asked, shared | settings, several_machines=True)
    summary = {}
    for name, values in known.items():
        bench = Bench(name, values, sizes[name], asked, results)
        results.measure(bench.cells())
        summary[name] = bench.summary() | {"threads": torch.get_num_threads()}
    return results.write(summary)


if __name__ == "__main__":
    run_main(main)
