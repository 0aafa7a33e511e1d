"""What a model costs: rows per second, parameters, bytes, memory, training time, and the limit of the hardware.

Machines are noisy, so speeds are medians with the range seen, and two models are compared by alternating them in one
run and taking the median of the ratios (`alternate_rates`), never by dividing two rates that were measured apart.
"""

from __future__ import annotations

import importlib
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nlpxfer.errors import CheckpointError, CheckpointNotFoundError, ConfigError


@dataclass(frozen=True, kw_only=True)
class Rate:
    """Rows per second: median, lowest and highest of `repeats` measurements."""

    rows_per_second: float
    low: float
    high: float
    repeats: int


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """How many times faster than the first run: median, lowest and highest of the `repeats` paired ratios."""

    median: float
    low: float
    high: float
    repeats: int


@dataclass(frozen=True, kw_only=True)
class AlternatingRates:
    """Rates of runs that were measured in turn; `ratios` holds each run but the first against the first."""

    rates: dict[str, Rate]
    ratios: dict[str, Ratio]


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The `cost` of report.json; seconds of wall-clock time, tokens without padding, bytes.

    `train_seconds` is the time in the training loop, `total_seconds` everything from start to end, preparation and
    search included. `tokens` were trained on in `train_seconds`. `search_seconds` went into trials of a search.
    """

    train_seconds: float
    total_seconds: float
    tokens: int
    tokens_per_second: float
    peak_memory_bytes: int
    search_seconds: float = 0.0


class Stopwatch:
    """Wall-clock time since it was made, and of named parts that may run several times.

    >>> watch = Stopwatch()
    >>> with watch.lap("train"):
    ...     pass
    >>> 0 <= watch.seconds("train") <= watch.total_seconds
    True
    """

    def __init__(self) -> None:
        """Start the clock."""
        self._start = time.perf_counter()
        self._laps: dict[str, float] = {}

    @contextmanager
    def lap(self, name: str) -> Iterator[None]:
        """Add the time spent inside the `with` block to the part `name`, also when the block raises."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._laps[name] = self._laps.get(name, 0.0) + time.perf_counter() - start

    def seconds(self, name: str) -> float:
        """Seconds spent in the part `name`; 0 if it never ran."""
        return self._laps.get(name, 0.0)

    @property
    def total_seconds(self) -> float:
        """Seconds since this stopwatch was made."""
        return time.perf_counter() - self._start

    def cost(self, *, tokens: int, train: str = "train") -> Cost:
        """The cost up to now, with the memory peak of this process.

        Args:
            tokens: Tokens trained on, without padding.
            train: The name of the part that was training.
        """
        seconds = self.seconds(train)
        return Cost(
            train_seconds=seconds,
            total_seconds=self.total_seconds,
            tokens=tokens,
            tokens_per_second=tokens / seconds if seconds > 0 else 0.0,
            peak_memory_bytes=peak_memory_bytes(),
        )


def inference_run(model: torch.nn.Module, batches: Iterable[Mapping[str, Any]]) -> Callable[[], None]:
    """A callable that runs `model` once over ready batches, for `measure_rate` and `alternate_rates`.

    The model runs in its own dtype, on the device where it is, in eval mode and without gradients; its mode is
    restored after each run. Batches are moved to the device beforehand, so tokenising and copying are not measured.

    Args:
        model: Called as `model(**batch)`.
        batches: Keyword arguments of each call, tensors (rows, ...).
    """
    device = next(model.parameters()).device
    ready = [{name: value.to(device) for name, value in batch.items()} for batch in batches]

    def run() -> None:
        training = model.training
        model.eval()
        try:
            with torch.inference_mode():
                for batch in ready:
                    model(**batch)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        finally:
            model.train(training)

    return run


def measure_rate(run: Callable[[], object], rows: int, *, repeats: int = 3, warmup: int = 1) -> Rate:
    """Rows per second of `run`, which handles `rows` rows.

    Args:
        run: Called `warmup + repeats` times; must not return before its work is done.
        rows: Rows handled by one call.
        repeats: Measured calls.
        warmup: Calls before, not measured.

    Raises:
        ConfigError: No rows, no repeats, or a negative warm-up.
    """
    return alternate_rates({"run": run}, rows, repeats=repeats, warmup=warmup).rates["run"]


def alternate_rates(
    runs: Mapping[str, Callable[[], object]], rows: int, *, repeats: int = 5, warmup: int = 1
) -> AlternatingRates:
    """Rows per second of several runs, measured in turn (A B A B ...), and their ratios to the first.

    A ratio is formed inside each turn, so a machine that slows down between turns does not bend it.

    Args:
        runs: Name -> callable; each call handles the same `rows` rows. The first is what the others are compared with.
        rows: Rows handled by one call.
        repeats: Measured turns.
        warmup: Turns before, not measured.

    Raises:
        ConfigError: No runs, no rows, no repeats, or a negative warm-up.
    """
    if not runs or rows < 1 or repeats < 1 or warmup < 0:
        raise ConfigError(
            f"Cannot measure {len(runs)} runs of {rows} rows with {repeats} repeats and {warmup} warm-up turns",
            fix="at least 1 run, 1 row, 1 repeat, and a warm-up of 0 or more",
        )
    for _ in range(warmup):
        for run in runs.values():
            run()
    speeds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            speeds[name].append(rows / max(time.perf_counter() - start, 1e-9))
    first, *others = runs
    ratios = {}
    for name in others:
        pairs = [other / base for other, base in zip(speeds[name], speeds[first], strict=True)]
        ratios[name] = Ratio(median=statistics.median(pairs), low=min(pairs), high=max(pairs), repeats=repeats)
    rates = {
        name: Rate(rows_per_second=statistics.median(each), low=min(each), high=max(each), repeats=repeats)
        for name, each in speeds.items()
    }
    return AlternatingRates(rates=rates, ratios=ratios)


def parameter_count(model: torch.nn.Module) -> int:
    """Number of weights; shared ones count once, frozen ones too, but not the head that an adapter's own replaces."""
    return sum(p.numel() for name, p in model.named_parameters() if ".original_module." not in f".{name}")


def stored_bytes(model: torch.nn.Module) -> int:
    """Bytes of the weights, each counted once; not those of the head that an adapter's own replaces."""
    kept = {v.data_ptr(): v for name, v in model.state_dict().items() if ".original_module." not in f".{name}"}
    return sum(value.numel() * value.element_size() for value in kept.values())


def embedding_parameter_count(model: torch.nn.Module) -> int:
    """Number of weights in embedding tables (tokens, positions, types); shared ones count once."""
    tables = {
        id(module.weight): module.weight.numel()
        for module in model.modules()
        if isinstance(module, (torch.nn.Embedding, torch.nn.EmbeddingBag))
    }
    return sum(tables.values())


def model_bytes(folder: str | Path) -> int:
    """Bytes of the weight files (`*.safetensors`) of a model folder; tokenizer and plots do not count.

    Raises:
        CheckpointNotFoundError: No such folder.
        CheckpointError: No weight file in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointNotFoundError(f"No model folder {folder}")
    files = list(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"No *.safetensors file in {folder}", why="it is not the folder of a saved model")
    return sum(file.stat().st_size for file in files)


def peak_memory_bytes(device: torch.device | str | None = None) -> int:
    """Highest memory use so far: of the GPU if `device` is one, else of this process's resident memory.

    Child processes (data loading workers, other ranks) do not count.
    """
    if device is not None and torch.device(device).type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    status = Path("/proc/self/status")
    if status.is_file():  # Linux hands ru_maxrss on to started processes: it may be the peak of a notebook
        lines = dict(line.split(":", 1) for line in status.read_text(encoding="utf-8").splitlines() if ":" in line)
        if "VmHWM" in lines:
            return 1024 * int(lines["VmHWM"].split()[0])
    try:
        import resource
    except ImportError:  # Windows has no resource module; accelerate brings psutil along
        psutil = importlib.import_module("psutil")
        return int(psutil.Process().memory_info().peak_wset)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def gemm_peak_flops(
    dtype: torch.dtype = torch.float32, *, size: int = 2048, repeats: int = 5, device: torch.device | str = "cpu"
) -> float:
    """Best measured rate of a square matrix product, in floating-point operations per second.

    This is the practical ceiling of the machine for a model's matrix products: 2 * size^3 operations each.

    Args:
        dtype: Of both factors.
        size: Rows and columns.
        repeats: Measured products after one warm-up; the fastest counts.
        device: Where to multiply.

    Raises:
        ConfigError: Size or repeats below 1.
    """
    if size < 1 or repeats < 1:
        raise ConfigError(f"Cannot multiply matrices of size {size} {repeats} times", fix="values of 1 or more")
    left, right = torch.randn(2, size, size, device=device).to(dtype)

    def run() -> None:
        left @ right
        if left.device.type == "cuda":
            torch.cuda.synchronize(left.device)

    return measure_rate(run, 1, repeats=repeats).high * 2.0 * size**3


def training_flops(non_embedding_parameters: int, tokens: int) -> int:
    """Floating-point operations of training, 6 * N * T; attention scores are left out.

    Args:
        non_embedding_parameters: N, weights outside embedding tables, all of them trained.
        tokens: T, tokens trained on, without padding, counted once per epoch.

    Source: Kaplan et al., Scaling Laws for Neural Language Models, 2020, arXiv:2001.08361, section 2.1.
    """
    return 6 * non_embedding_parameters * tokens
