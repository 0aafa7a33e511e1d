"""A transformers classifier as an ONNX graph, and the same with int8 weights.

transformers' own exporter (`torch.export` with symbolic shapes) is chosen over `torch.onnx.export` alone because it
knows what of each family cannot be traced, and over optimum-onnx, which needs transformers 4. The graph is kept as it
is: fusing it for onnxruntime beforehand was no faster, as onnxruntime does that when it opens a file, and would tie
the file to it.

int8 is onnxruntime's dynamic quantisation: weights per output channel, activations per tensor and batch while it runs.
Per channel instead of per tensor, because on a distilled MiniLM that changed 2 of 256 predictions instead of 21. The
head's linear layers stay in float32, as they do in bfloat16 (`nlpxfer.train.regime.float32_head`). As a batch shares
the scale of its activations, int8 logits depend a little on the rows beside them.

The exporter notes the line of source behind each node, with its path: all notes are removed.
"""

from __future__ import annotations

import ast
import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from torch import Tensor

from nlpxfer.backends import LOGITS
from nlpxfer.checkpoint.head import head_of
from nlpxfer.checkpoint.quiet import quiet_transformers
from nlpxfer.errors import ConfigError, ExportError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Graph = Any  # onnx_ir.Model: the package is optional

OPSETS: Final = range(18, 23)
"""From 23 on, onnxruntime 1.31 cannot quantise attention, and its rotary embedding takes one row only."""
EMBEDDED_BYTES: Final = 1_800_000_000
"""Weights of more bytes lie in a file of their own: protobuf ends at 2 GiB."""


def require_onnx() -> None:
    """Refuse to start where a package that exporting needs is missing.

    Raises:
        ConfigError: Names the packages.
    """
    missing = []
    for package in ("onnx", "onnxscript", "onnxruntime"):
        try:
            __import__(package)
        except ImportError:
            missing.append(package)
    if missing:
        raise ConfigError(f"Exporting needs {', '.join(missing)}.", fix='pip install "nlpxfer[onnx]"')


def to_graph(model: PreTrainedModel, inputs: dict[str, Tensor], *, opset: int | None = None) -> Graph:
    """Trace a classifier with a symbolic number of rows and of tokens.

    Args:
        model: In float32, on the CPU, in eval mode.
        inputs: A batch of several rows of several tokens, with padding.
        opset: ONNX operator set; None for the exporter's own choice.

    Raises:
        ExportError: The exporter cannot trace this family, or fixes one of the axes.
    """
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter

    try:
        with _quiet(), _plain_outputs(model):
            exporter: Any = OnnxExporter  # its types name only what 5.23 returns
            exported = exporter().export(model, inputs, config=OnnxConfig(dynamic=True, opset_version=opset))
    except Exception as error:  # noqa: BLE001 - torch, onnxscript and transformers each raise their own
        raise ExportError(
            f"{type(model).__name__} cannot be exported: {_first_line(error)}",
            why="transformers' exporter cannot trace this family as a graph.",
            fix="use the folder as it is: nlpxfer predict reads it with torch",
        ) from error
    # transformers 5.20, the last for Python 3.10, returns torch's ONNXProgram
    graph: Graph = exported.program if hasattr(exported, "program") else exported.model
    _name_axes_(graph, type(model).__name__)
    return graph


def head_nodes(graph: Graph, model: PreTrainedModel) -> list[str]:
    """Names of the nodes that multiply by the weights of the classification head; needs the exporter's notes."""
    parts = head_of(model)
    modules = {parts.final_name, *parts.transforms}
    found = []
    for node in graph.graph:
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
        if node.op_type in ("MatMul", "Gemm") and modules & {*scopes}:
            found.append(str(node.name))
    return found


def save_graph(graph: Graph, file: Path) -> None:
    """Write a graph without the exporter's notes; weights beside it in `<file>.data` if they are too many bytes."""
    import onnx_ir
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    for value in _inner_values(graph):  # stale once a Gemm's weights are turned; whoever needs them infers them anew
        value.shape, value.type = None, None
    cleared = ClearMetadataAndDocStringPass()(graph).model
    tensors = [value.const_value for value in cleared.graph.initializers.values()]
    weights = sum(tensor.nbytes for tensor in tensors if tensor is not None)
    onnx_ir.save(cleared, str(file), external_data=f"{file.name}.data" if weights > EMBEDDED_BYTES else None)


def quantise(source: Path, target: Path, *, float_nodes: Sequence[str]) -> None:
    """Write the same graph with int8 weights.

    Args:
        source: File of `save_graph`.
        target: The file to write.
        float_nodes: Nodes that stay in float32.

    Raises:
        ExportError: onnxruntime cannot quantise it.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    # a Gemm becomes a MatMul of another name before the nodes to leave out are looked up
    excluded = [name for node in float_nodes for name in (node, f"{node}_MatMul")]
    try:
        with _quiet():
            quantize_dynamic(
                source,
                target,
                per_channel=True,
                weight_type=QuantType.QInt8,
                nodes_to_exclude=excluded,
                use_external_data_format=source.with_name(f"{source.name}.data").exists(),
            )
    except Exception as error:  # noqa: BLE001 - onnx and onnxruntime raise their own
        raise ExportError(
            f"onnxruntime cannot quantise {source.name}: {_first_line(error)}", fix="leave --int8 out"
        ) from error


def _name_axes_(graph: Graph, name: str) -> None:
    """Name the axes of inputs and outputs, which the exporter numbers. Raises where one is not symbolic."""
    import onnx_ir

    fixed = [value.name for value in graph.graph.inputs if any(isinstance(size, int) for size in value.shape)]
    outputs = {value.name: value for value in graph.graph.outputs}
    if fixed or list(outputs) != [LOGITS] or isinstance(outputs[LOGITS].shape[0], int):
        raise ExportError(
            f"{name} cannot be exported for any number of rows and tokens.",
            why=f"Tracing fixed the shape of {', '.join(fixed)}." if fixed else f"It gives {', '.join(outputs)}.",
        )
    for value in graph.graph.inputs:
        value.shape = onnx_ir.Shape(["batch", "sequence"])
    outputs[LOGITS].shape = onnx_ir.Shape(["batch", outputs[LOGITS].shape[1]])


def _inner_values(graph: Graph) -> Iterator[Any]:
    """Weights, and results of nodes that are no outputs of the model."""
    yield from graph.graph.initializers.values()
    outputs = {id(value) for value in graph.graph.outputs}
    for node in graph.graph:
        for value in node.outputs:
            if id(value) not in outputs:
                yield value


@contextlib.contextmanager
def _plain_outputs(model: PreTrainedModel) -> Iterator[None]:
    """The model gives logits alone, whatever its config asks for; the config is restored."""
    wanted = {"use_cache": False, "output_hidden_states": False, "output_attentions": False, "return_dict": True}
    before = {name: getattr(model.config, name) for name in wanted if hasattr(model.config, name)}
    for name in before:
        setattr(model.config, name, wanted[name])
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(model.config, name, value)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress lines, log lines, warnings and dumped graphs of the exporter; what goes wrong it also raises.

    The root logger gets a handler for the time: a library that calls `logging.warning` would leave one behind.
    """
    silent = logging.NullHandler()
    root, before = logging.getLogger(), logging.root.manager.disable
    root.addHandler(silent)
    logging.disable(logging.ERROR)
    said = io.StringIO()
    try:
        with warnings.catch_warnings(), quiet_transformers():
            warnings.simplefilter("ignore")
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                yield
    finally:
        logging.disable(before)
        root.removeHandler(silent)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
