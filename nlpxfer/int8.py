"""Students in int8: ONNX run by onnxruntime, called and measured like the torch model that they were made from.

`--student_int8 true` writes the finished student as `nlpxfer export --int8` does, into `onnx/` of the output folder,
and holds the int8 form against the teacher as well. On the ladder of `--search` each student has such a twin. Its
weights are rounded after the training and its activations while it runs; nothing is trained in int8.

A static student has its int8 form in torch (`nlpxfer.checkpoint.static`), and in `int8/` whether it is asked for or
not; no ONNX is needed for it.
"""

from __future__ import annotations

import copy
import logging
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from nlpxfer.backends import INT8_FILE, LOGITS, ONNX_FILE, onnx_session
from nlpxfer.checkpoint.save import save_classifier
from nlpxfer.checkpoint.static import StaticForSequenceClassification, is_static, static_int8
from nlpxfer.checkpoint.tokenizer import max_positions
from nlpxfer.config.student import INT8
from nlpxfer.errors import ConfigError
from nlpxfer.evaluate.arms import ACCELERATE_MARKS, TrainedArm
from nlpxfer.evaluate.cost import parameter_count, stored_bytes
from nlpxfer.export.folder import ExportRequest, export_classifier, write_graphs
from nlpxfer.export.graph import require_onnx
from nlpxfer.report.report import Arm
from nlpxfer.result import int8_facts, int8_table_of, save_fitted
from nlpxfer.run import Run
from nlpxfer.strict_json import write_json_whole
from nlpxfer.train.launch import by_itself, on_main

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from nlpxfer.checkpoint.load import Checkpoint

logger = logging.getLogger(__name__)

FOLDER: Final = "onnx"
"""In the output folder: what `nlpxfer export --int8` writes."""


class Int8Model(nn.Module):
    """A classifier of an ONNX file, on the CPU; `model(**inputs).logits` as from transformers.

    Args:
        file: The ONNX file.
        config: Of the model that it was made from.
    """

    def __init__(self, file: Path, config: Any) -> None:  # noqa: ANN401 - a family's own
        super().__init__()
        self.config, self.file_bytes = config, sum(path.stat().st_size for path in file.parent.glob(f"{file.name}*"))
        self.place = nn.Parameter(torch.zeros(()), requires_grad=False)  # says on which device inputs are wanted
        self.session = onnx_session(file, threads=torch.get_num_threads())
        self.wanted = [each.name for each in self.session.get_inputs()]

    def forward(self, **inputs: Tensor) -> SequenceClassifierOutput:
        """Logits of a batch, shape (B, C)."""
        found = self.session.run([LOGITS], {name: inputs[name].numpy() for name in self.wanted})[0]
        return SequenceClassifierOutput(logits=torch.from_numpy(found))

    def __deepcopy__(self, memo: Any) -> Int8Model:  # noqa: ANN401
        """Itself: a session is not changed by being used."""
        return self


Int8Form = Int8Model | StaticForSequenceClassification


class Int8Maker:
    """Makes int8 models of a run, in its folder for checkpoints.

    Args:
        run: The run.
    """

    def __init__(self, run: Run) -> None:
        self.run, self.made = run, Counter[str]()

    def alone(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Int8Form:
        """The int8 form of a model, by this process for itself.

        Raises:
            ExportError: The family cannot be exported or quantised.
        """
        if isinstance(model, StaticForSequenceClassification):
            return static_int8(model)
        folder = self._next("alone")
        _write(model, tokenizer, folder)
        return Int8Model(folder / INT8_FILE, model.config)

    def together(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Int8Form:
        """The same, made by the first process for all, which call this together; a static one by each."""
        if isinstance(model, StaticForSequenceClassification):
            return static_int8(model)
        folder = self._next("together")
        on_main(lambda: _write(model, tokenizer, folder))
        return Int8Model(folder / INT8_FILE, model.config)

    def _next(self, kind: str) -> Path:
        """A folder that is the same on all processes, as each kind is made equally often on those that make it."""
        self.made[kind] += 1
        return self.run.folder / "checkpoints" / "int8" / f"{kind}-{self.made[kind]}"


def _write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    plain = copy.deepcopy(model).to("cpu").float().eval()  # type: ignore[arg-type]  # its decorator hides self
    for mark in ACCELERATE_MARKS:  # of a model that was just trained
        vars(plain).pop(mark, None)
    write_graphs(plain, tokenizer, folder, positions=max_positions(model, tokenizer), int8=True)
    for file in folder.glob(f"{ONNX_FILE}*"):
        file.unlink()


def check_int8(student: Checkpoint) -> None:
    """See that a student can be written in int8, before anything is trained or removed: the untrained one is.

    A static one always can.

    Raises:
        ConfigError: Packages are missing.
        ExportError: Its family cannot be exported or quantised.
    """
    if is_static(student.model):
        return
    require_onnx()
    with tempfile.TemporaryDirectory() as folder:
        _write(student.model, student.tokenizer, Path(folder) / FOLDER)


def has_onnx() -> bool:
    """Whether int8 models can be made here."""
    try:
        require_onnx()
    except ConfigError as error:
        logger.info("not on the ladder: students in int8 (%s)", str(error).splitlines()[0])
        return False
    return True


def int8_student(run: Run, student: TrainedArm) -> tuple[TrainedArm, Arm, Mapping[str, Path]]:
    """The int8 form of a trained student: as an arm that was scored, its row, and its folder for the output.

    That of a static student has no folder here, since `nlpxfer.result.finish` always writes it. Notes in `checks.int8`
    how far it answers the validation rows as the student does, and both sizes.

    Raises:
        ExportError: It cannot be made, or its float32 form does not answer as torch does.
    """
    if is_static(student.model):
        return *_scored(run, student, int8_table_of(run, student), "the same student with an int8 table"), {}
    place = run.folder / "checkpoints" / "int8" / "student"
    out = place / FOLDER

    def export() -> None:
        shutil.rmtree(place, ignore_errors=True)
        save_classifier(student.model, student.tokenizer, run.data.schema, place / "model")
        save_fitted(run, student, place / "model")
        write_json_whole(place / "model" / "run.json", {"config": dict(run.config)})
        with by_itself():
            threads = torch.get_num_threads()
            export_classifier(ExportRequest(model=str(place / "model"), out=out, int8=True, threads=threads))

    on_main(export)
    model = Int8Model(out / INT8_FILE, student.model.config)
    return *_scored(run, student, model, "the same student with int8 weights, run by onnxruntime"), {FOLDER: out}


def _scored(run: Run, student: TrainedArm, model: Any, description: str) -> tuple[TrainedArm, Arm]:  # noqa: ANN401
    """The int8 form of a student as an arm, and its row."""
    size = int(getattr(model, "file_bytes", None) or stored_bytes(model))
    answers = {split: run.predict(model, student.tokenizer, split) for split in ("validation", "test")}
    arm = replace(
        student,
        name=student.name + INT8,
        model=model,
        validation_logits=answers["validation"],
        test_logits=answers["test"],
        train_seconds=0.0,
    )
    row = replace(run.arm([arm], description), parameters=parameter_count(student.model), bytes=size, details={})
    run.checks["int8"] = int8_facts(run, student, answers["validation"], size)
    return arm, row
