"""What computes a classifier's logits: torch on its weights, or onnxruntime on a folder of `nlpxfer export`.

A backend knows all that a `Classifier` asks of a folder, so nothing else needs to know which one it is. What the
folder holds decides: safetensors are read by torch, `model.onnx` by onnxruntime, `model_int8.onnx` where it is asked
for or alone. A folder with safetensors and ONNX files is torch's.

onnxruntime computes on the CPU. Its threads do not spin while they wait: on two idle cores that was neither faster nor
slower, and beside another busy process it was 1.8 times as fast.

Shapes: N rows, W windows of all of them, C classes.
"""

from __future__ import annotations

import json
import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

import numpy as np
import torch

from nlpxfer.checkpoint.adapters import find_bundle, load_adapter, merged
from nlpxfer.checkpoint.load import Checkpoint, load_description, load_teacher, stored_schema
from nlpxfer.checkpoint.safety import WEIGHTS, WEIGHTS_INDEX
from nlpxfer.checkpoint.static import INT8_FOLDER, StaticConfig, StaticForSequenceClassification, is_static
from nlpxfer.checkpoint.tokenizer import max_positions
from nlpxfer.data.tokenise import Collator, TokenisedRows
from nlpxfer.errors import CheckpointError, ConfigError
from nlpxfer.hub.folder import digest
from nlpxfer.methods.base import MODEL_INPUTS
from nlpxfer.report.run import recorded_options
from nlpxfer.train.launch import own_cores
from nlpxfer.train.precision import choose_precision, fault_of, padding_multiple
from nlpxfer.train.predict import batches_by_length, mean_of_windows, predict

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from nlpxfer.data.schema import LabelSchema

Array = np.ndarray[Any, Any]

logger = logging.getLogger(__name__)

ONNX_FILE: Final = "model.onnx"
INT8_FILE: Final = "model_int8.onnx"
EXPORT_FILE: Final = "export.json"
LOGITS: Final = "logits"
TORCH_BATCH: Final = 64
ONNX_BATCH: Final = 16
"""At 64 rows of 128 tokens onnxruntime's activations leave the cache; 16 ran 1.5 times as fast."""


class Turns:
    """A lock of an object that can be copied and sent to other processes, where the copy has a lock of its own."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type[Turns], tuple[()]]:
        """How to pickle it: as a new one."""
        return Turns, ()


@dataclass(frozen=True, kw_only=True, eq=False)
class Backend(ABC):
    """What gives a classifier's logits, and what its folder says of it.

    Attributes:
        config: The model's config.
        schema: Its labels, in the order of the logits, and its kind of task.
        tokenizer: Its tokenizer, with a pad token.
        folder: Where it was read from.
        max_positions: Most tokens that the model can read.
        trained: Options of the training, from run.json; empty where the folder does not say.
        default_batch_size: Rows of the longest length per batch.
        alone: Held while texts are tokenised and answered: tokenizers keep how the last call cut texts, and the head's
            precision is set for the time of a call, so threads take turns.
    """

    config: PreTrainedConfig
    schema: LabelSchema
    tokenizer: PreTrainedTokenizerBase
    folder: Path | None
    max_positions: int
    trained: Mapping[str, Any]
    default_batch_size: int
    alone: Turns = field(default_factory=Turns, init=False, repr=False)

    @property
    @abstractmethod
    def weights_sha256(self) -> str:
        """sha256 (hex) over what the logits are computed with."""

    @abstractmethod
    def logits(self, rows: TokenisedRows, *, max_length: int, batch_size: int | None = None) -> Array:
        """Logits of N rows, float32, shape (N, C); `max_length` is the most tokens of a window."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TorchBackend(Backend):
    """A transformers model.

    Attributes:
        checkpoint: Model on its device, and tokenizer.
        bf16: Whether it computes in bfloat16.
    """

    checkpoint: Checkpoint
    bf16: bool

    @property
    def weights_sha256(self) -> str:
        """See `Backend.weights_sha256`."""
        return self.checkpoint.weights_sha256

    def logits(self, rows: TokenisedRows, *, max_length: int, batch_size: int | None = None) -> Array:
        """See `Backend.logits`."""
        if not len(rows):
            return np.empty((0, len(self.schema)), dtype=np.float32)
        model = self.checkpoint.model
        multiple = padding_multiple(model.device, bf16=self.bf16)
        collator = Collator.for_tokenizer(self.tokenizer, multiple_of=multiple, rounded_to=max_length)
        return predict(model, rows, collator, batch_size=batch_size or self.default_batch_size, bf16=self.bf16)


@dataclass(frozen=True, kw_only=True, eq=False)
class StaticBackend(TorchBackend):
    """A static classifier on the CPU: rows are looked up as they lie, without padding, and nothing is sorted."""

    def logits(self, rows: TokenisedRows, *, max_length: int, batch_size: int | None = None) -> Array:
        """See `Backend.logits`; batches have a size of their own."""
        model = cast("StaticForSequenceClassification", self.checkpoint.model)
        windows = rows.each_window()
        tokens_T, starts_W = (torch.from_numpy(each.astype(np.int64)) for each in (windows.tokens, windows.starts))
        return mean_of_windows(model.flat_logits(tokens_T, starts_W[:-1]).numpy(), rows)


@dataclass(frozen=True, kw_only=True, eq=False)
class OnnxBackend(Backend):
    """An onnxruntime session on the CPU.

    Attributes:
        session: An `onnxruntime.InferenceSession`.
        file: What it was read from.
    """

    session: Any
    file: Path

    @property
    def weights_sha256(self) -> str:
        """See `Backend.weights_sha256`: of the file, and of the one with large weights where there is one."""
        beside = self.file.with_name(f"{self.file.name}.data")
        return "+".join(digest(file).sha256 for file in (self.file, beside) if file.is_file())

    def logits(self, rows: TokenisedRows, *, max_length: int, batch_size: int | None = None) -> Array:
        """See `Backend.logits`."""
        collator = Collator.for_tokenizer(self.tokenizer, rounded_to=max_length)
        wanted = [each.name for each in self.session.get_inputs()]
        windows = rows.each_window()
        logits_WC = np.empty((len(windows), len(self.schema)), dtype=np.float32)
        for indices in batches_by_length(windows.lengths, batch_size or self.default_batch_size):
            batch = collator([windows[int(i)] for i in indices])
            logits_WC[indices] = self.session.run([LOGITS], {name: batch[name].numpy() for name in wanted})[0]
        return mean_of_windows(logits_WC, rows)


def open_backend(model: str, *, base: str | None = None, int8: bool = False, bf16: bool | None = None) -> Backend:
    """Open a classifier with the backend that its folder is made for.

    Args:
        model: Output folder of a recipe or of `nlpxfer export`, any classifier on the Hub, or an adapter bundle.
        base: The base of an adapter, where it was a local folder.
        int8: Take `model_int8.onnx`.
        bf16: Compute in bfloat16; torch alone can. Default: measured.

    Raises:
        CheckpointError: It is no classifier, damaged, an adapter without its base, or has no int8 weights where they
            are asked for.
        ConfigError: `bf16` or `base` is given for an ONNX file, or `base` for a whole model; or onnxruntime is not
            installed.
    """
    if int8 and is_static_folder(beside := str(Path(model).expanduser() / INT8_FOLDER)):
        return open_torch(beside, base=base, bf16=bf16)
    file = onnx_file(model, int8=int8)
    if file is None:
        return open_torch(model, base=base, bf16=bf16)
    faults = [] if base is None else [f"base: {file} is a whole model and needs none"]
    if bf16 is not None:
        faults.append(f"bf16: {file} is computed in the precision that it was written in")
    if faults:
        raise ConfigError.from_faults(faults)
    return open_onnx(file)


def has_precision(model: str, *, int8: bool = False) -> bool:
    """Whether bfloat16 can be chosen for a model: torch computes it, and it is not static.

    Raises:
        CheckpointError: int8 is asked for, and there is no such file.
    """
    return not is_static_folder(model) and onnx_file(model, int8=int8) is None


def is_static_folder(model: str) -> bool:
    """Whether a name is the folder of a static model."""
    try:
        config = json.loads((Path(model).expanduser() / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # a model of the Hub, or damaged, which loading tells
        return False
    return isinstance(config, dict) and config.get("model_type") == StaticConfig.model_type


def onnx_file(model: str, *, int8: bool = False) -> Path | None:
    """The ONNX file that a name means; None where torch is to read it.

    Raises:
        CheckpointError: int8 is asked for, and there is no such file.
    """
    folder = Path(model).expanduser()
    there = [name for name in (ONNX_FILE, INT8_FILE) if (folder / name).is_file()]
    if int8 and INT8_FILE not in there:
        below = [str(path.parent) for path in sorted(folder.glob(f"*/{INT8_FILE}"))]
        if is_static_folder(model) and folder.name == INT8_FOLDER:
            raise CheckpointError(f"{model} is the int8 form of a static model.", fix="leave --int8 out")
        raise CheckpointError(
            f"{model} holds no {INT8_FILE}.",
            why="int8 weights are made by exporting a trained model",
            available=below,
            fix="nlpxfer export MODEL OUT --int8; a static student has them in its own folder",
        )
    if int8:
        return folder / INT8_FILE
    if not there or any((folder / name).is_file() for name in (WEIGHTS, WEIGHTS_INDEX)):
        return None
    return folder / there[0]


def open_torch(model: str, *, base: str | None = None, bf16: bool | None = None) -> TorchBackend:
    """A folder, Hub id or bundle with torch, on the accelerator if there is one. Raises: see `open_backend`."""
    schema, checkpoint, trained = _read(model, base)
    static = is_static(checkpoint.model)
    if static and bf16:
        raise ConfigError(f"bf16: {model} is static, which is computed in float32.", fix="leave --bf16 out")
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() and not static else None
    device = device or torch.device("cpu")
    checkpoint.model.to(device)  # type: ignore[arg-type]  # its decorator hides self
    in_bf16 = not static and choose_precision(bf16, device).bf16
    if in_bf16 and fault_of(checkpoint.model, checkpoint.tokenizer("a b c", return_tensors="pt"), bf16=True):
        if bf16:
            raise ConfigError(f"bf16: {model} does not compute in bfloat16.", fix="leave --bf16 out")
        in_bf16 = False
        logger.info("%s does not compute in bfloat16: float32", model)
    return (StaticBackend if static else TorchBackend)(
        config=checkpoint.model.config,
        schema=schema,
        tokenizer=checkpoint.tokenizer,
        folder=checkpoint.folder,
        max_positions=max_positions(checkpoint.model, checkpoint.tokenizer),
        trained=trained,
        default_batch_size=TORCH_BATCH,
        checkpoint=checkpoint,
        bf16=in_bf16,
    )


def open_onnx(file: Path, *, threads: int | None = None) -> OnnxBackend:
    """A file in a folder of `nlpxfer export` with onnxruntime. Raises: see `open_backend`."""
    described = load_description(str(file.parent))
    positions = _exported_positions(file.parent / EXPORT_FILE)
    session = onnx_session(file, threads=threads)
    _check_interface(session, file, len(described.schema))
    return OnnxBackend(
        config=described.config,
        schema=described.schema,
        tokenizer=described.tokenizer,
        folder=described.folder,
        max_positions=positions,
        trained=recorded_options(described.folder),
        default_batch_size=ONNX_BATCH,
        session=session,
        file=file,
    )


def onnx_session(file: Path, *, threads: int | None = None) -> Any:  # noqa: ANN401 - onnxruntime is optional
    """An onnxruntime session.

    Args:
        file: The ONNX file.
        threads: Default: this process's share of the cores.

    Raises:
        ConfigError: onnxruntime is not installed.
        CheckpointError: The file cannot be read.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ConfigError(
            f"{file} needs onnxruntime, which cannot be imported: {error}.", fix='pip install "nlpxfer[onnx]"'
        ) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or own_cores()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.enable_mem_pattern = False  # a plan is kept for each shape, and batches have hundreds
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # noqa: BLE001 - onnxruntime's errors share no base
        raise CheckpointError(
            f"onnxruntime cannot read {file}: {str(error).splitlines()[0]}",
            why="It is damaged or incomplete, or was written for a newer onnxruntime.",
            fix="export the model again",
        ) from error


def _read(model: str, base: str | None) -> tuple[LabelSchema, Checkpoint, dict[str, Any]]:
    """Labels, model with tokenizer, and the options of the training, if the folder says."""
    bundle = find_bundle(model)
    if bundle is not None:
        adapter = load_adapter(bundle, base)
        plain = merged(adapter) if adapter.merges else cast("PreTrainedModel", adapter.model)
        plain.requires_grad_(False)
        checkpoint = Checkpoint(
            model=plain, tokenizer=adapter.tokenizer, name=model, folder=bundle, fresh=(), head_kept=True
        )
        reading = {"max_length": adapter.base.max_length, **(adapter.base.long_texts or {})}
        return adapter.schema, checkpoint, recorded_options(bundle) | reading
    if base is not None:
        raise ConfigError(f"base: {model} is a whole model and needs none", fix="leave --base out")
    schema = stored_schema(model)
    checkpoint = load_teacher(model, schema=schema)
    return schema, checkpoint, recorded_options(checkpoint.folder)


def _exported_positions(file: Path) -> int:
    """Most tokens that an exported model can read, from export.json."""
    try:
        return int(json.loads(file.read_text(encoding="utf-8"))["max_positions"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{file.parent} holds no readable {EXPORT_FILE}.",
            why="It was not written by `nlpxfer export`, so nothing says how many tokens its model can read.",
            fix="nlpxfer export MODEL OUT, with the folder or Hub id of the torch model",
        ) from error


def _check_interface(session: Any, file: Path, labels: int) -> None:  # noqa: ANN401 - onnxruntime is optional
    """Refuse a file whose inputs and outputs are not those of a classifier with as many labels."""
    inputs = [each.name for each in session.get_inputs()]
    outputs = {each.name: each.shape for each in session.get_outputs()}
    if not {*inputs} <= {*MODEL_INPUTS} or LOGITS not in outputs:
        raise CheckpointError(
            f"{file} takes {', '.join(inputs)} and gives {', '.join(outputs)}.",
            why=f"A classifier takes some of {', '.join(MODEL_INPUTS)} and gives {LOGITS}.",
        )
    if outputs[LOGITS][-1] != labels:
        raise CheckpointError(
            f"{file} gives {outputs[LOGITS][-1]} logits, its config.json names {labels} labels.",
            why="The folder mixes files of two models.",
        )
