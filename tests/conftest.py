"""Fixtures for all tests: offline, seeded, with tiny real checkpoints and a tiny data set.

`tiny_checkpoint(family, kind=..., labels=..., ...)` returns a folder that is built once per session: never write into
it; copy it (`shutil.copytree`) or use `tiny_copy`, which gives each test its own.
"""

from __future__ import annotations

import os
import sys

sys.path.insert(0, os.path.dirname(__file__))
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import gc
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import LABELS, build_checkpoint, make_rows, write_csv

THREADS = torch.get_num_threads()


@dataclass(frozen=True)
class TinyData:
    """Files of the tiny data set: csv with columns text, label; unlabelled.txt has one text a line."""

    folder: Path
    train: Path
    validation: Path
    test: Path
    unlabelled: Path
    labels: tuple[str, ...] = LABELS


@pytest.fixture(autouse=True, scope="module")
def _quick_collection() -> None:
    """The Trainer collects garbage several times a run: leave out the million objects of the imports (0.4 s each).

    Of later imports as well, before each file.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - transformers and datasets read the global state
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _same_threads() -> None:
    """A recipe sets the threads of its process: rounding must not depend on which tests ran before."""
    if torch.get_num_threads() != THREADS:
        torch.set_num_threads(THREADS)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Factory `tiny_checkpoint(family="bert", kind="base", labels=LABELS, **options) -> folder`, cached."""
    built: dict[tuple[object, ...], Path] = {}

    def build(family: str = "bert", kind: str = "base", labels: tuple[str, ...] = LABELS, **options: object) -> Path:
        key = (family, kind, tuple(labels), repr(sorted(options.items())))
        if key not in built:
            folder = tmp_path_factory.mktemp("tiny") / f"{family}-{kind}"
            built[key] = build_checkpoint(folder, family, kind=kind, labels=labels, **options)
        return built[key]

    return build


@pytest.fixture
def tiny_copy(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """As `tiny_checkpoint`, but a private copy that the test may damage."""

    def copy(*arguments: object, **options: object) -> Path:
        source = tiny_checkpoint(*arguments, **options)
        return Path(shutil.copytree(source, tmp_path / f"copy-{source.name}-{len(list(tmp_path.iterdir()))}"))

    return copy


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    """240 training, 80 validation and 80 test rows of four classes, and 120 unlabelled texts; no text twice."""
    rows = {row["text"]: row for row in make_rows(560, seed=1)}
    unique = list(rows.values())
    folder = tmp_path_factory.mktemp("data")
    unlabelled = folder / "unlabelled.txt"
    unlabelled.write_text("".join(row["text"] + "\n" for row in unique[400:520]), encoding="utf-8")
    return TinyData(
        folder=folder,
        train=write_csv(folder / "train.csv", unique[:240]),
        validation=write_csv(folder / "validation.csv", unique[240:320]),
        test=write_csv(folder / "test.csv", unique[320:400]),
        unlabelled=unlabelled,
    )
