"""The steps of an export: trace, quantise, compare with torch, measure, and only then show the folder."""

from __future__ import annotations

import logging
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from tqdm.auto import tqdm

import nlpxfer
from nlpxfer.backends import EXPORT_FILE, INT8_FILE, ONNX_FILE, Backend, TorchBackend, onnx_file, open_onnx, open_torch
from nlpxfer.checkpoint.save import check_free_space, save_description
from nlpxfer.checkpoint.static import is_static
from nlpxfer.classify import Classifier, text_columns
from nlpxfer.data.stream import RowReader
from nlpxfer.data.tokenise import Collator, TokenisedRows, tokenise
from nlpxfer.errors import ConfigError, ExportError, OutputExistsError
from nlpxfer.evaluate.calibration import CALIBRATION_FILE, label_cuts, save_calibration
from nlpxfer.evaluate.cost import alternate_rates, parameter_count
from nlpxfer.evaluate.parity import Parity, parity
from nlpxfer.export.graph import OPSETS, head_nodes, quantise, require_onnx, save_graph, to_graph
from nlpxfer.export.texts import Texts, texts_to_compare
from nlpxfer.methods.base import model_inputs
from nlpxfer.problem import REGRESSION
from nlpxfer.report.run import recorded_run
from nlpxfer.strict_json import plain, write_json_whole
from nlpxfer.train.launch import use_threads

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

SCHEMA_VERSION: Final = 1
TRACED_TEXTS: Final = ("one two three four five six seven eight nine ten", "one two three", "one")
TRACED_TOKENS: Final = 11
SPEED_ROWS: Final = 128
SPEED_TURNS: Final = 5
RUN_FILE: Final = "run.json"
TORCH: Final = "torch"
FP32: Final = "fp32"
INT8: Final = "int8"
FILES: Final[Mapping[str, str]] = {FP32: ONNX_FILE, INT8: INT8_FILE}
"""What a file is called in `export.json` -> its name."""


@dataclass(frozen=True, kw_only=True)
class ExportRequest:
    """What to export, and what to compare it on.

    Attributes:
        model: Output folder of a recipe, any classifier that torch reads, or an adapter bundle.
        out: The folder to write; it must not exist.
        base: The base of an adapter, where it was a local folder.
        int8: Also write `model_int8.onnx`.
        opset: ONNX operator set. Default: the exporter's choice.
        texts: csv, tsv, jsonl or parquet with texts to compare on. Default: bundled and built-in ones.
        text_column: Column of `texts` with the text. Default: that of the training where it is there, else "text".
        text_pair_column: Column of `texts` with the second text. Default: that of the training.
        max_changed: Largest share of predictions that int8 may change, 0 to 1. Default: any.
        threads: CPU threads while it is compared and measured. Default: this process's share of the cores.
    """

    model: str
    out: Path
    base: str | None = None
    int8: bool = False
    opset: int | None = None
    texts: Path | None = None
    text_column: str | None = None
    text_pair_column: str | None = None
    max_changed: float | None = None
    threads: int | None = None

    def check(self) -> None:
        """Find what cannot be used before anything is loaded.

        Raises:
            OutputExistsError: `out` exists.
            ConfigError: Options that cannot be used, all listed; or packages are missing.
            DataError: `texts` cannot be read.
        """
        if self.out.exists() or self.out.is_symlink():
            raise OutputExistsError(f"{self.out} exists.", fix="choose another folder, or remove it")
        faults = []
        if self.opset is not None and self.opset not in OPSETS:
            faults.append(f"opset: {self.opset} is not one of {OPSETS[0]} to {OPSETS[-1]}")
        if self.max_changed is not None and not 0 <= self.max_changed <= 1:
            faults.append(f"max_changed: {self.max_changed} is not between 0 and 1")
        if self.max_changed is not None and not self.int8:
            faults.append("max_changed: it limits what int8 changes, and --int8 is not given")
        if self.texts is None and (self.text_column, self.text_pair_column) != (None, None):
            faults.append("text_column, text_pair_column: they name columns of --texts, which is not given")
        if onnx_file(self.model) is not None:
            faults.append(f"{self.model} is an exported model already; give the folder that it was made from")
        if faults:
            raise ConfigError.from_faults(faults)
        require_onnx()
        if self.texts is not None:
            RowReader(self.texts)


def export_classifier(request: ExportRequest, *, quiet: bool = True) -> dict[str, Any]:
    """Write ONNX files, config, tokenizer, labels, calibration and `export.json`: all of it or nothing.

    Args:
        request: What to export.
        quiet: No progress bar.

    Returns:
        The content of `export.json`.

    Raises:
        OutputExistsError, ConfigError, DataError: See `ExportRequest.check`; or `max_changed` for a regression.
        CheckpointError: `model` cannot be read as a classifier.
        ExportError: The family cannot be exported, or its answers differ from those of torch.
        NotFiniteError: The model answers with NaN.
    """
    request.check()
    use_threads(request.threads)  # the same for all that are compared
    backend = open_torch(request.model, base=request.base, bf16=False)
    _refuse_unmerged(backend)
    _refuse_static(backend)
    backend.checkpoint.model.to("cpu")  # type: ignore[arg-type]  # its decorator hides self
    classifier = Classifier.of(backend)
    if request.max_changed is not None and backend.schema.problem_type == REGRESSION:
        raise ConfigError(
            "max_changed: a regression gives numbers, and int8 moves all of them.",
            fix="leave it out; the command says how far they move",
        )
    columns: tuple[str, str | None] = ("text", backend.trained.get("text_pair_column"))
    if request.texts is not None:
        columns = text_columns(request.text_column, request.text_pair_column, request.texts, classifier)
    texts = texts_to_compare(backend.tokenizer, request.texts, *columns)
    check_free_space(request.out, (6 if request.int8 else 5) * parameter_count(backend.checkpoint.model))
    with _appearing(request.out) as folder, tqdm(total=4, desc="export", unit="step", disable=quiet) as bar:
        save_description(backend.config, backend.tokenizer, backend.schema, folder)
        parts = backend.checkpoint.model, backend.tokenizer, folder
        opset = write_graphs(*parts, positions=backend.max_positions, int8=request.int8, opset=request.opset)
        report = _describe(classifier, backend) | {"opset": opset}
        _write_rest(backend, folder, report)
        bar.update()
        names = (FP32, INT8) if request.int8 else (FP32,)
        backends: dict[str, Backend] = {TORCH: backend}
        backends |= {name: open_onnx(folder / FILES[name], threads=request.threads) for name in names}
        bar.update()
        parities, sample = _compare(classifier, backends, texts)
        _refuse_differences(parities, request.max_changed)
        report["texts"] = {"source": texts.source, "rows": parities[FP32].rows}
        report["parity"] = parities
        bar.update()
        report["speed"] = _speed(backends, sample, classifier.max_length)
        report["bytes"] = {path.name: path.stat().st_size for path in sorted(folder.glob("*.onnx*"))}
        report["versions"] = _versions()
        report |= plain(report, EXPORT_FILE)
        write_json_whole(folder / EXPORT_FILE, report)
        bar.update()
    return report


def _refuse_unmerged(backend: TorchBackend) -> None:
    from transformers import PreTrainedModel

    if not isinstance(backend.checkpoint.model, PreTrainedModel):
        raise ExportError(
            f"{backend.checkpoint.name} is an adapter of a kind that cannot be folded into its base.",
            fix="use the bundle as it is: nlpxfer predict reads it with torch",
        )


def _refuse_static(backend: TorchBackend) -> None:
    if is_static(backend.checkpoint.model):
        raise ExportError(
            f"{backend.checkpoint.name} is static, and static models are not written as ONNX.",
            why="Nearly all of their time is the tokenizer's, which onnxruntime would not change.",
            fix="use the folder as it is: nlpxfer predict and model2vec read it, int8/ in it has int8 weights",
        )


def _describe(classifier: Classifier, backend: TorchBackend) -> dict[str, Any]:
    """What `open_onnx` needs to know, and where the weights come from."""
    return {
        "schema_version": SCHEMA_VERSION,
        "family": backend.config.model_type,
        "problem_type": backend.schema.problem_type,
        "weights_sha256": backend.checkpoint.weights_sha256,
        "max_length": classifier.max_length,
        "max_positions": backend.max_positions,
    }


def write_graphs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    positions: int,
    int8: bool,
    opset: int | None = None,
) -> int:
    """Write the ONNX files of a classifier that is in float32, on the CPU and in eval mode.

    Args:
        model: The classifier.
        tokenizer: Its tokenizer.
        folder: Where they go.
        positions: Tokens that it can read.
        int8: Also write the int8 file.
        opset: ONNX operator set. Default: the exporter's choice.

    Returns:
        The operator set.

    Raises:
        ExportError: The family cannot be exported or quantised.
    """
    # three rows of unlike lengths: an axis with the size of another one could pass for it
    rows = tokenise(tokenizer, TRACED_TEXTS, max_length=min(TRACED_TOKENS, positions))
    batch = Collator.for_tokenizer(tokenizer)([rows[index] for index in range(len(rows))])
    graph = to_graph(model, model_inputs(batch), opset=opset)
    head, chosen = head_nodes(graph, model), int(graph.opset_imports[""])
    save_graph(graph, folder / ONNX_FILE)
    if int8:
        quantise(folder / ONNX_FILE, folder / INT8_FILE, float_nodes=head)
    return chosen


def _write_rest(backend: TorchBackend, folder: Path, report: Mapping[str, Any]) -> None:
    """Write what the ONNX files are read with: calibration, the options of the training, and the report so far."""
    if backend.folder and (backend.folder / CALIBRATION_FILE).is_file():
        shutil.copyfile(backend.folder / CALIBRATION_FILE, folder / CALIBRATION_FILE)
    else:
        save_calibration(folder, 1.0)
    write_json_whole(folder / RUN_FILE, recorded_run(backend.folder) | {"config": dict(backend.trained)})
    write_json_whole(folder / EXPORT_FILE, dict(report))


def _compare(
    classifier: Classifier, backends: Mapping[str, Backend], texts: Texts
) -> tuple[dict[str, Parity], TokenisedRows]:
    """How far each backend answers as torch does, and the first rows, for measuring speed."""
    found: dict[str, Parity] = {}
    sample: TokenisedRows | None = None
    kind, length = classifier.schema.problem_type, classifier.max_length
    cuts_C = label_cuts(classifier.temperature, classifier.thresholds_C)
    for first, second in texts.windows:
        rows = classifier.rows(first, second)
        reference = backends[TORCH].logits(rows, max_length=length)
        for name in FILES.keys() & backends.keys():
            part = parity(reference, backends[name].logits(rows, max_length=length), kind, cuts_C)
            found[name] = found[name].joined(part) if name in found else part
        if sample is None:
            sample = rows.select(range(min(len(rows), SPEED_ROWS)))
    if sample is None:
        raise ValueError("there are no texts to compare on")
    return dict(sorted(found.items())), sample


def _refuse_differences(parities: Mapping[str, Parity], max_changed: float | None) -> None:
    exact, coarse = parities[FP32], parities.get(INT8)
    if not exact.holds:
        raise ExportError(
            f"{ONNX_FILE} does not answer as the torch model does: a logit differs by {exact.max_difference:.2g} "
            f"(allowed: {exact.allowed:.2g}), and {exact.changed} of {exact.rows} predictions changed.",
            why="the exporter or onnxruntime computes a part of this family otherwise",
            fix="another --opset; or use the folder as it is: nlpxfer predict reads it with torch",
        )
    if coarse is not None and max_changed is not None and coarse.changed_share > max_changed:
        raise ExportError(
            f"int8 changes {coarse.changed} of {coarse.rows} predictions ({coarse.changed_share:.2%}), "
            f"more than the {max_changed:.2%} of --max_changed.",
            fix="leave --int8 out, or allow more",
        )


def _speed(backends: Mapping[str, Backend], rows: TokenisedRows, max_length: int) -> dict[str, Any]:
    """Rows per second of tokenised rows, in turns, and ratios to torch in float32."""
    runs = {name: partial(backend.logits, rows, max_length=max_length) for name, backend in backends.items()}
    measured = alternate_rates(runs, len(rows), repeats=SPEED_TURNS)
    return {
        "threads": torch.get_num_threads(),
        "rows": len(rows),
        "tokens": int(rows.lengths.sum()),
        "rates": measured.rates,
        "ratios_to_torch": measured.ratios,
    }


def _versions() -> dict[str, str]:
    packages = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime")
    own = {"nlpxfer": nlpxfer.__version__, "python": platform.python_version()}
    return own | {package: version(package) for package in packages}


@contextmanager
def _appearing(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` that takes its name when the block ends well, and is removed when it does not."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    hidden = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    staging = hidden / folder.name  # mkdtemp's own folder is closed to all but its owner
    try:
        staging.mkdir()
        yield staging
        for path in staging.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        if folder.exists():
            raise OutputExistsError(f"{folder} appeared while it was exported to.", fix="choose another folder")
        staging.rename(folder)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
