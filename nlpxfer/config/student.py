"""The options that say what a student is: parts of its teacher, a static model, or a checkpoint of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

from nlpxfer.config.options import option

LAYERS, STATIC = "layers", "static"
EVEN, BOTTOM, PROBE, TRIAL = "even", "bottom", "probe", "trial"
"""Ways to choose the layers of a student."""
INT8: Final = ", int8"
"""What the name of a student's int8 form ends with."""
CUTS: Final[Mapping[str, object]] = {
    "student_num_layers": None,
    "student_layers": EVEN,
    "student_hidden_size": None,
    "student_intermediate_size": None,
}
"""Options that say what of the teacher is kept -> their defaults."""
STATIC_OPTIONS: Final = ("static_dim", "static_hidden_layer", "static_normalize", "static_num_train_epochs")


@dataclass(frozen=True, kw_only=True)
class StudentOptions:
    """What the student is."""

    needed_switches: ClassVar[Mapping[str, tuple[str, object]]] = {
        name: ("student", STATIC) for name in STATIC_OPTIONS
    }
    overruled_by: ClassVar[Mapping[str, str]] = {"static_num_train_epochs": "max_steps"}

    student: str = option(LAYERS, "What it is made of: layers, or static: token vectors, no attention.")
    student_name_or_path: str | None = option(None, "Checkpoint to train as the student, instead of a slice.")
    student_num_layers: int | None = option(None, "Layers of the teacher that the student keeps. Default: half.")
    student_layers: str = option(
        EVEN,
        "Which: even, bottom, numbers such as 0,2,5, probe: those missed most, or trial: even or bottom, by a try.",
    )
    student_hidden_size: int | None = option(None, "Hidden size of the student: whole heads of the teacher's.")
    student_intermediate_size: int | None = option(
        None, "Neurons of its feed-forward layers. Default: in proportion to the hidden size."
    )
    student_int8: bool = option(
        False,
        "Also hold it with int8 weights against the teacher, and write that: as ONNX, which needs the extra onnx.",
    )
    static_dim: int | None = option(
        None, "Numbers per token of a static student. Default: 256, or the teacher's hidden size where that is less."
    )
    static_hidden_layer: bool = option(False, "Give its head a hidden layer.")
    static_normalize: bool = option(False, "Scale the mean of its token vectors to length 1.")
    static_num_train_epochs: float = option(5.0, "Passes over the rows for it and its control.")

    def student_faults(self) -> list[str]:
        """What is wrong with the values, one sentence each."""
        faults = []
        if self.student not in (LAYERS, STATIC):
            faults.append(f"student: {self.student!r} is not one of {LAYERS}, {STATIC}")
        cut = [name for name, default in CUTS.items() if getattr(self, name) != default]
        if self.student == STATIC:
            named = ["student_name_or_path"] if self.student_name_or_path else []
            faults += [f"{name}: a static student has no layers, and starts from its teacher" for name in named + cut]
        elif self.student_name_or_path and cut:
            faults.append(f"student_name_or_path: it cannot be combined with {' or '.join(cut)}")
        for name in ("student_num_layers", "student_hidden_size", "student_intermediate_size", "static_dim"):
            value = getattr(self, name)
            if value is not None and value < 1:
                faults.append(f"{name}: {value} is below 1")
        if self.static_num_train_epochs <= 0:
            faults.append(f"static_num_train_epochs: {self.static_num_train_epochs} is not positive")
        return faults
