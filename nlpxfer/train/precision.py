"""Whether bfloat16 is fast here: measured, not guessed.

A CPU without bfloat16 instructions emulates them, several times slower than float32; one with them is two to three
times faster. GPUs before Ampere are of the first kind too.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from nlpxfer.methods.base import Batch, model_inputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from nlpxfer.config import RunOptions

logger = logging.getLogger(__name__)

WORTH_IT = 1.2
"""Speed-up from which bfloat16 is taken: below it the rounding is not worth the gain."""


@dataclass(frozen=True)
class Precision:
    """Result of the measurement.

    Attributes:
        bf16: Whether to compute in bfloat16.
        speed_up: float32 seconds over bfloat16 seconds of a layer-sized product; None if not measured.
        chosen_by: "user" or "measured".
    """

    bf16: bool
    speed_up: float | None
    chosen_by: str


def choose_precision(wanted: bool | None, device: torch.device) -> Precision:
    """The user's wish, or the outcome of a measurement of about 50 ms on `device`."""
    if wanted is not None:
        return Precision(wanted, None, "user")
    speed_up = bf16_speed_up(device) if device.type != "cpu" or _has_bf16_kernels() else 0.0
    logger.info("bfloat16 matrix products run %.2f times as fast as float32 on %s", speed_up, device.type)
    return Precision(speed_up >= WORTH_IT, round(speed_up, 2), "measured")


def bf16_speed_up(device: torch.device, *, rows: int = 1024, width: int = 768, repeats: int = 3) -> float:
    """float32 seconds over bfloat16 seconds of a (rows x width) by (width x 4 width) product; the best of repeats."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        # no random numbers: whether this is measured must not change a run
        left = torch.full((rows, width), 0.5, device=device, dtype=dtype)
        right = torch.full((width, 4 * width), 0.5, device=device, dtype=dtype)
        try:
            left @ right
        except RuntimeError:
            return 0.0
        seconds[dtype] = min(_seconds_of(left, right, device) for _ in range(repeats))
    return seconds[torch.float32] / seconds[torch.bfloat16]


def _has_bf16_kernels() -> bool:
    """Whether oneDNN has bfloat16 for this CPU; without them one product takes seconds."""
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return supported is None or bool(supported())


def _seconds_of(left: torch.Tensor, right: torch.Tensor, device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    for _ in range(2):
        left @ right
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def padding_multiple(device: torch.device, *, bf16: bool) -> int:
    """What the padded length of a training batch is rounded up to.

    8 suits the tensor cores of GPUs. On a CPU, oneDNN compiles its bfloat16 kernels anew for every new shape, and a
    run whose batches have sixteen lengths instead of a hundred is an eighth faster. float32 needs no kernels made.
    """
    return 8 if bf16 or device.type != "cpu" else 1


def autocast_type(options: RunOptions) -> torch.dtype | None:
    """What the matrix products of training compute in; None for float32."""
    if options.fp16:
        return torch.float16
    return torch.bfloat16 if options.bf16 else None


@contextlib.contextmanager
def computing_in(bf16: bool, device: torch.device) -> Iterator[None]:
    """Inference without gradients, in bfloat16 where asked for."""
    with torch.inference_mode(), torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
        yield


def fault_of(model: PreTrainedModel, batch: Batch, *, bf16: bool) -> str | None:
    """Why a batch does not go through the model, in one line; None if it does.

    DeBERTa's first version, say, does not compute in bfloat16 (2026-11, transformers 5.23).

    Args:
        model: On its device, in eval mode.
        batch: A few rows; see `model_inputs`.
        bf16: Whether under autocast to bfloat16.

    Raises:
        OutOfMemoryError: There is no room for it.
    """
    inputs = {name: value.to(model.device) for name, value in model_inputs(batch).items()}
    try:
        with torch.no_grad(), torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=bf16):
            model(**inputs)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - families fail in their own ways
        return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
    return None
