"""A look at the loss before the first step: what would go wrong without a word is an error or a warning here.

On the first batch that training takes, each term of the loss is computed with its gradient, in the same mode and
precision. Nothing of the run changes by it: the random state is put back, no gradient is kept, and with several
processes the model is asked without its DDP wrapper, each process on its own batch. A resumed run keeps what was found
at its start; the check is never made in the middle of a run.

Shapes: B batch rows, W windows of them, L tokens.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from nlpxfer.errors import DataError, NotFiniteError
from nlpxfer.methods.base import Batch, LossTerm, Method

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

TOO_MANY_TIMES: Final = 100
"""From this ratio on, one term drowns another."""


def preflight(method: Method, model: PreTrainedModel, batch: Batch, *, pad_token_id: int) -> dict[str, Any]:
    """Check masks, labels and hooks, and measure each weighted term of the loss on one batch.

    Args:
        method: Gives the terms.
        model: The model, in train mode, without a DDP wrapper.
        batch: The first batch, on the model's device, with all columns that the method reads.
        pad_token_id: What fills short rows.

    Returns:
        For the report: `rows`, `tokens`, what `method.describe` says, `terms` (for each its `weight`, the `rows` that
        count in it, and, times the weight, its `loss` and `gradient_norm`), and `warnings`.

    Raises:
        DataError: The attention mask is missing or does not fit the tokens.
        LabelError, CheckpointError: The labels do not fit, or states could not be read.
        NotFiniteError: A term or its gradient is NaN or infinite, or a term has no gradient.
    """
    check_mask(batch, pad_token_id)
    facts = method.describe(model)
    with _random_state_kept(batch["input_ids"].device):
        terms = method.loss_terms(model, batch)
        counts = {name: int(count) for name, count in method.counts(batch).items()}
        measured = {name: _measure(name, term, counts[name], model) for name, term in terms.items() if term.weight}
    warnings = _warnings(measured, agrees=method.ema_decay is not None)
    for warning in warnings:
        logger.warning("before the first step: %s", warning)
    logger.info("before the first step: %s", _told(measured))
    tokens = int(batch["attention_mask"].sum())
    return {"rows": max(counts.values()), "tokens": tokens, **facts, "terms": measured, "warnings": warnings}


@contextlib.contextmanager
def _random_state_kept(device: torch.device) -> Iterator[None]:
    """Put the random states of the CPU and of `device` back at the end."""
    others = {} if device.type == "cpu" else {"devices": [device], "device_type": device.type}
    with torch.random.fork_rng(**(others or {"devices": []})):
        yield


def check_mask(batch: Batch, pad_token_id: int) -> None:
    """Refuse a batch whose attention mask is missing, or is not 1 for a row's tokens and 0 for the padding after them.

    Raises:
        DataError: Says what is wrong.
    """
    ids_WL, mask_WL = batch["input_ids"], batch.get("attention_mask")
    if mask_WL is None:
        raise DataError("The batch has no attention mask: padding would be read as text.")
    if mask_WL.shape != ids_WL.shape:
        raise DataError(f"The attention mask has shape {tuple(mask_WL.shape)}, the tokens {tuple(ids_WL.shape)}.")
    faults = {
        "holds other numbers than 0 and 1": bool(((mask_WL != 0) & (mask_WL != 1)).any()),
        "is 0 for a whole row": bool((mask_WL.sum(dim=1) == 0).any()),
        "has a token after padding": bool((mask_WL.diff(dim=1) > 0).any()),
        "is 0 where there is a token": bool(((mask_WL == 0) & (ids_WL != pad_token_id)).any()),
    }
    found = [fault for fault, here in faults.items() if here]
    if found:
        raise DataError(f"The attention mask {' and '.join(found)}.", why="the collator and the tokenizer do not fit")


def _measure(name: str, term: LossTerm, rows: int, model: nn.Module) -> dict[str, Any]:
    """Weighted loss and gradient norm of one term, a mean over the rows of the batch that count in it."""
    loss = term.weight * term.rows_B.sum() / max(rows, 1)
    known = {"weight": term.weight, "rows": rows}
    if not loss.requires_grad:
        raise NotFiniteError(f"The loss term {name} (weight {term.weight:g}) has no gradient: it would teach nothing.")
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found: list[Tensor] = [
        value
        for value in torch.autograd.grad(loss, learning, retain_graph=True, allow_unused=True)
        if value is not None
    ]
    norm = float(torch.stack([value.double().norm() for value in found]).norm()) if found else 0.0
    size = float(loss.detach())
    if not all(map(_is_finite, (size, norm))):
        raise NotFiniteError(
            f"Before the first step the loss term {name} is {size} and the norm of its gradient {norm}.",
            why="weights, teacher states or logits are damaged, or too large for the precision",
        )
    if norm == 0 and size != 0:
        raise NotFiniteError(
            f"The loss term {name} (weight {term.weight:g}) is {size:.4g}, but its gradient is 0.",
            why="what it reads does not depend on any weight that learns, so it would teach nothing",
        )
    return {**known, "loss": size, "gradient_norm": norm}


def _is_finite(number: float) -> bool:
    return bool(torch.isfinite(torch.tensor(number)))


def _warnings(measured: Mapping[str, Mapping[str, Any]], *, agrees: bool) -> list[str]:
    """Terms of 0, and for losses and for gradients the largest term if it drowns the smallest.

    agrees: Teacher and student are the same at the start, so that a term of 0 says nothing.
    """
    idle = [name for name, found in measured.items() if found["rows"] and not found["loss"]]
    warnings = [] if agrees else [f"{name} is 0 on the first batch: teacher and student agree" for name in idle]
    counted = {name: found for name, found in measured.items() if found["rows"] and found["loss"]}
    for key, what in (("loss", "loss"), ("gradient_norm", "gradient norm")):
        sizes = {name: abs(found[key]) for name, found in counted.items() if found[key]}
        if len(sizes) < 2:
            continue
        most, least = max(sizes, key=lambda name: sizes[name]), min(sizes, key=lambda name: sizes[name])
        if sizes[most] >= TOO_MANY_TIMES * sizes[least]:
            times = sizes[most] / sizes[least]
            warnings.append(
                f"the {what} of {most}, {sizes[most]:.4g}, is {times:.0f} times that of {least}, {sizes[least]:.4g}, "
                "each with its weight: lower the weight of the first"
            )
    return warnings


def _told(measured: Mapping[str, Mapping[str, Any]]) -> str:
    return "; ".join(
        f"{name} {found['loss']:.4g} (gradient {found['gradient_norm']:.4g})" for name, found in measured.items()
    )
