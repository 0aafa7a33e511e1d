"""How long one answer takes: milliseconds per row, for one row at a time and for batches, with tokenising and without.

The median (p50) says what is usual, p95 what one request in twenty exceeds. Models are measured in turns, request by
request, so that a machine that slows down hits all of them alike; the threads are those of the process and are said.
Texts come in the order of their file, as requests do, not sorted by length as in a long file: a batch is padded to its
longest row.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from nlpxfer.data.tokenise import Collator, tokenise
from nlpxfer.errors import ConfigError
from nlpxfer.methods.base import model_inputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from nlpxfer.config.long_texts import LongTexts

ONE_ROW_CALLS: Final = 60
BATCH_CALLS: Final = 12
BATCH_ROWS: Final = 32
WARMUP_CALLS: Final = 2

Texts = tuple[Sequence[str], Sequence[str] | None]
"""Texts, and their second texts where the task is on pairs."""


@dataclass(frozen=True, kw_only=True)
class Stages:
    """A model in the two stages of an answer.

    Attributes:
        tokenise: From texts to what the model takes.
        compute: Runs the model on that; returns when its work is done.
    """

    tokenise: Callable[[Texts], Any]
    compute: Callable[[Any], object]

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int,
        long_texts: LongTexts | None = None,
    ) -> Stages:
        """The stages of a transformers model on the CPU, in its own dtype and without gradients."""
        collator = Collator.for_tokenizer(tokenizer)

        def to_batch(texts: Texts) -> dict[str, torch.Tensor]:
            rows = tokenise(tokenizer, *texts, max_length=max_length, long_texts=long_texts).each_window()
            return model_inputs(collator([rows[index] for index in range(len(rows))]))

        def compute(batch: Mapping[str, torch.Tensor]) -> None:
            with torch.inference_mode():
                model(**batch)

        model.eval()  # type: ignore[no-untyped-call]
        return cls(tokenise=to_batch, compute=compute)


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Milliseconds per row: median and 95th percentile over `calls` calls of `rows` rows each.

    `p50_ms` and `p95_ms` are the model's alone, `total_p50_ms` and `total_p95_ms` have its tokenising in them.
    """

    p50_ms: float
    p95_ms: float
    total_p50_ms: float
    total_p95_ms: float
    rows: int
    calls: int


def measure_latency(
    models: Mapping[str, Stages],
    requests: Sequence[Texts],
    *,
    calls: int,
    warmup: int = WARMUP_CALLS,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Latency]:
    """Milliseconds per row of several models, measured in turns: request 1 by each model, then request 2, and so on.

    Args:
        models: Name -> stages.
        requests: Texts of the calls, all with the same number of rows; they are used again from the first one if
            there are fewer than `calls`.
        calls: Measured calls of each model.
        warmup: Calls of each model before, not measured.
        clock: Seconds.

    Raises:
        ConfigError: No models, no requests or no calls; a negative warm-up; requests of different sizes.
    """
    sizes = {len(texts) for texts, _ in requests}
    if not models or calls < 1 or warmup < 0 or len(sizes) != 1 or 0 in sizes:
        raise ConfigError(
            f"Cannot measure {len(models)} models with {calls} calls, {warmup} to warm up, of {sorted(sizes)} rows",
            fix="at least 1 model and 1 call, a warm-up of 0 or more, and requests with the same number of rows",
        )
    rows = sizes.pop()
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for call in range(warmup + calls):
        texts = requests[max(call - warmup, 0) % len(requests)]
        for name, model in models.items():
            start = clock()
            batch = model.tokenise(texts)
            between = clock()
            model.compute(batch)
            end = clock()
            if call >= warmup:
                found[name].append((end - between, end - start))
    return {name: _latency(np.array(seconds), rows) for name, seconds in found.items()}


def _latency(seconds: np.ndarray[Any, Any], rows: int) -> Latency:
    (p50, total_p50), (p95, total_p95) = np.percentile(seconds, [50, 95], axis=0) * 1000 / rows
    return Latency(
        p50_ms=float(p50),
        p95_ms=float(p95),
        total_p50_ms=float(total_p50),
        total_p95_ms=float(total_p95),
        rows=rows,
        calls=len(seconds),
    )


def latency_facts(
    models: Mapping[str, Stages], texts: Sequence[str], pairs: Sequence[str] | None = None
) -> dict[str, dict[str, Any]]:
    """For the report: `one_row` and `batched`, each a `Latency`, and `threads`, for each model.

    Args:
        models: Name -> stages.
        texts: Texts to answer, at least one; evenly spread ones are taken. A batch has `BATCH_ROWS` of them, or all
            where there are fewer.
        pairs: Their second texts, for tasks on pairs.
    """

    def request(indices: Sequence[int]) -> Texts:
        return [texts[i] for i in indices], None if pairs is None else [pairs[i] for i in indices]

    chosen = np.linspace(0, len(texts) - 1, min(ONE_ROW_CALLS, len(texts))).astype(int).tolist()
    one = measure_latency(models, [request([index]) for index in chosen], calls=ONE_ROW_CALLS)
    size = min(BATCH_ROWS, len(texts))
    starts = np.linspace(0, len(texts) - size, min(BATCH_CALLS, len(texts) // size)).astype(int).tolist()
    batches = [request(range(start, start + size)) for start in starts]
    batched = measure_latency(models, batches, calls=BATCH_CALLS)
    threads = torch.get_num_threads()
    return {name: {"one_row": vars(one[name]), "batched": vars(batched[name]), "threads": threads} for name in models}
