"""Model outputs for many rows: sorted by length, no padding computed, spread over the processes, in the given order.

The one way that rows go through a model without training: validation during training, final scores, features for the
linear probe and teacher logits all come from here.

Windows of long rows go through the model as rows of their own and are averaged at the end, so a batch never holds more
than rows of one window would: a row of eight windows may be spread over several batches. For features that is exact
too: the final layer is linear.

Shapes: N rows, B rows of a batch, W windows of all rows, D outputs per row (classes or features).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from nlpxfer.data.tokenise import Collator, TokenisedRows
from nlpxfer.methods.base import mean_by_row, model_inputs
from nlpxfer.train.launch import world
from nlpxfer.train.precision import computing_in
from nlpxfer.train.regime import float32_head

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Array = np.ndarray[Any, Any]
Output = Callable[[nn.Module, Mapping[str, Tensor]], Tensor]


def class_logits(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """The class logits of a batch; shape (B, classes)."""
    logits: Tensor = model(**inputs).logits
    return logits


def predict(
    model: PreTrainedModel,
    rows: TokenisedRows,
    collator: Collator,
    *,
    batch_size: int = 64,
    bf16: bool = False,
    output: Output = class_logits,
    description: str = "",
    quiet: bool = True,
) -> Array:
    """Outputs of a model for N rows, float32, shape (N, D), in the order of `rows`.

    The model runs in eval mode; then each of its modules is put back into the mode it was in. With several processes
    each computes its share and all get the whole.

    Args:
        model: Model on its device.
        rows: N tokenised rows.
        collator: Pads a batch.
        batch_size: Windows of the longest length per batch; shorter ones come in batches of up to twice as many.
        bf16: Compute in bfloat16, the head in float32 all the same.
        output: What of the model to keep.
        description: Shown beside the progress bar.
        quiet: No progress bar.

    Raises:
        ValueError: There are no rows.
    """
    if not len(rows):
        raise ValueError("there are no rows to predict")
    rank, processes = world()
    windows = rows.each_window()
    batches = batches_by_length(windows.lengths, batch_size)
    rounds = -(-len(batches) // processes)
    mine = [batches[i * processes + rank] if i * processes + rank < len(batches) else None for i in range(rounds)]
    device = next(model.parameters()).device
    modes = [(module, module.training) for module in model.modules()]
    model.eval()  # type: ignore[no-untyped-call]
    found: list[tuple[Array, Array]] = []
    try:
        with float32_head(model, enabled=bf16):
            for indices in tqdm(mine, desc=description, disable=quiet or rank > 0, leave=False):
                # every process makes the same number of forward passes: a sharded model needs all of them
                asked = batches[0] if indices is None else indices
                batch = model_inputs(collator([windows[int(i)] for i in asked]))
                with computing_in(bf16, device):
                    values = output(model, {name: tensor.to(device) for name, tensor in batch.items()})
                if indices is not None:
                    found.append((indices, values.float().cpu().numpy()))
    finally:
        for module, mode in modes:
            module.training = mode
    parts = found
    if processes > 1:  # not by accelerate, which gathers nothing where it did not set up the processes itself
        everyone: list[Any] = [None] * processes
        torch.distributed.all_gather_object(everyone, found)
        parts = [part for some in everyone for part in some]
    result = np.empty((len(windows), *parts[0][1].shape[1:]), dtype=np.float32)
    for indices, part in parts:
        result[indices] = part
    return mean_of_windows(result, rows)


def mean_of_windows(values_WD: Array, rows: TokenisedRows) -> Array:
    """Means over the windows of each of N rows, shape (N, D)."""
    if rows.windows is None:
        return values_WD
    means_ND: Array = mean_by_row(torch.from_numpy(values_WD), torch.from_numpy(rows.windows_per_row)).numpy()
    return means_ND


def batches_by_length(lengths: Array, batch_size: int) -> list[Array]:
    """Row indices, longest first, in batches of `batch_size` to twice that many rows and about as many tokens.

    >>> [b.tolist() for b in batches_by_length(np.array([4, 1, 2, 4, 1]), 1)]
    [[0], [3], [2, 1], [4]]
    """
    order = np.argsort(-np.asarray(lengths), kind="stable")
    budget = batch_size * int(lengths.max(initial=1))
    batches, start = [], 0
    while start < len(order):
        size = max(1, min(budget // max(1, int(lengths[order[start]])), 2 * batch_size))
        batches.append(order[start : start + size])
        start += size
    return batches
