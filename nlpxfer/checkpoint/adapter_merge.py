"""Fold an adapter into its base and write the result as an ordinary model folder, once it is seen to be equal."""

from __future__ import annotations

import logging
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from nlpxfer.checkpoint.adapters import BaseFacts, load_adapter, merged
from nlpxfer.checkpoint.load import load_classifier
from nlpxfer.checkpoint.save import save_classifier
from nlpxfer.errors import CheckpointError, OutputExistsError
from nlpxfer.strict_json import write_json_whole

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

TOLERANCE: Final = 1e-5
"""Largest difference of a logit between adapter and merged model, over the largest logit where that is above 1."""
_TEXTS: Final = (
    "The quick brown fox jumps over the lazy dog.",
    "hello",
    "where is my card payment of 12.50, and why was it declined twice?",
    "A second, somewhat longer text about bread, music, football and the weather in the north, for good measure.",
)
_KEPT_FILES: Final = ("calibration.json", "run.json")


def merge_bundle(folder: str | Path, out: str | Path, *, base: str | None = None) -> float:
    """Write the model that an adapter and its base make together.

    It is loaded back from where it was written and compared with the adapter on a few texts before the folder appears
    under its name. Labels, tokenizer, temperature, `max_length` and how longer texts are read are those of the bundle.

    Args:
        folder: The bundle.
        out: The new folder; whatever is there is left alone.
        base: See `load_adapter`.

    Returns:
        The largest difference of a logit.

    Raises:
        OutputExistsError: `out` exists and is not an empty folder.
        CheckpointError: The bundle or its base cannot be used, its kind cannot be merged, or the logits differ.
    """
    out = Path(out)
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise OutputExistsError(f"{out} exists and is not an empty folder.", fix="name a new folder")
    adapter = load_adapter(folder, base)
    before_NC = _logits(adapter.model, adapter.tokenizer)
    model = merged(adapter)
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        save_classifier(model, adapter.tokenizer, adapter.schema, staging)
        after_NC = _logits(load_classifier(str(staging), schema=adapter.schema).model, adapter.tokenizer)
        difference = float((before_NC - after_NC).abs().max())
        if not difference <= TOLERANCE * max(1.0, float(before_NC.abs().max())):
            raise CheckpointError(
                f"The merged model is not the adapter: a logit differs by {difference:.2g}.",
                why="The adapter magnifies some weights so much that float32 cannot hold the sum.",
                fix="use the bundle as it is",
            )
        for name in _KEPT_FILES:
            if (adapter.folder / name).is_file():
                shutil.copy(adapter.folder / name, staging / name)
        if not (staging / "run.json").is_file():
            write_json_whole(staging / "run.json", _origin(adapter.base))
        staging.chmod(0o755)
        staging.replace(out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    logger.info("%s: merged, largest difference of a logit %.2g", out, difference)
    return difference


def _origin(base: BaseFacts) -> dict[str, Any]:
    """What run.json says where the bundle has none."""
    parent = {"name": base.name, "revision": base.revision, "weights": base.weights}
    return {"config": {"max_length": base.max_length, **(base.long_texts or {})}, "parents": {"model": parent}}


@torch.no_grad()
def _logits(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    inputs = tokenizer(list(_TEXTS), padding=True, truncation=True, max_length=32, return_tensors="pt")
    names = ("input_ids", "attention_mask", "token_type_ids")
    logits: torch.Tensor = model(**{name: inputs[name] for name in names if name in inputs}).logits
    return logits
