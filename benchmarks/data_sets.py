"""The data sets of the benchmarks: name -> values for `DataOptions`. One that is not at hand is left out.

Those that are not bundled are read from `$NLPXFER_DATA/<name>/train.csv`, `test.csv` and, where there is one,
`validation.csv`; without it, training rows whose sha1(text) mod 10 is 0 serve as such. clinc150 is measured in scope:
its rows with the label `oos` are left out.
"""

from __future__ import annotations

import csv
import hashlib
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nlpxfer.data.splits import stratified_sample
from nlpxfer.errors import ConfigError

logger = logging.getLogger("benchmarks")

DATA_VARIABLE = "NLPXFER_DATA"
BUNDLED: Mapping[str, Mapping[str, Any]] = {
    "debian-sections": {"dataset_name": "debian-sections"},
    "debian-tags": {"dataset_name": "debian-sections", "label_column": "tags", "min_label_rows": 50},
}
EXTERNAL: Mapping[str, Mapping[str, Any]] = {
    "banking77": {},
    "clinc150": {},
    "scicite": {},
    "pubmedqa": {"text_column": "question", "text_pair_column": "context", "max_length": 256},
    "unfair_tos": {},
}
"""Options of each beside its files."""
SAMPLE_SEED = 42
LEFT_OUT: Mapping[str, str] = {"clinc150": "oos"}
"""Label whose rows are left out."""


def data_sets(names: Sequence[str], work: Path, most: Mapping[str, int] | None = None) -> dict[str, dict[str, Any]]:
    """The sets of these names; those whose files are missing are left out with a message.

    Args:
        names: Names of sets.
        work: Where copies of the files go.
        most: Split -> rows that are kept of it, a stratified sample; bundled sets are small and stay whole.

    Raises:
        ConfigError: None is at hand, or a folder lacks its files.
    """
    sets: dict[str, dict[str, Any]] = {}
    folder = os.environ.get(DATA_VARIABLE)
    for name in names:
        if name in BUNDLED:
            sets[name] = dict(BUNDLED[name])
        elif folder:
            sets[name] = _files(Path(folder) / name, work / f"{name}-data", LEFT_OUT.get(name), most or {})
            sets[name] |= EXTERNAL[name]
        else:
            logger.warning("%s is left out: %s names no folder with %s/train.csv", name, DATA_VARIABLE, name)
    if not sets:
        raise ConfigError("There is no data to measure on.", fix=f"{DATA_VARIABLE}=FOLDER, or --data debian-sections")
    return sets


def _files(source: Path, folder: Path, left_out: str | None, most: Mapping[str, int]) -> dict[str, Any]:
    """Copies of the files in `folder`: with validation rows, without those left out, no more than `most` rows."""
    missing = [name for name in ("train.csv", "test.csv") if not (source / name).is_file()]
    if missing:
        raise ConfigError(f"{DATA_VARIABLE} has no {' and no '.join(f'{source.name}/{name}' for name in missing)}.")
    folder.mkdir(parents=True, exist_ok=True)
    own = (source / "validation.csv").is_file()
    for name in ("train", "validation", "test"):
        origin = name if own or name != "validation" else "train"
        with (source / f"{origin}.csv").open(encoding="utf-8", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["label"] != left_out]
        if not own and name != "test":
            rows = [row for row in rows if _is_held_out(row) is (name == "validation")]
        if name in most and most[name] < len(rows):
            texts, labels = [next(iter(row.values())) for row in rows], [row["label"] for row in rows]
            rows = [rows[i] for i in stratified_sample(labels, texts, count=most[name], seed=SAMPLE_SEED)]
        with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return {f"{name}_file": str(folder / f"{name}.csv") for name in ("train", "validation", "test")}


def _is_held_out(row: Mapping[str, str]) -> bool:
    """Whether a training row serves as a validation row: by the hash of its text, the first column."""
    text = next(iter(row.values()))
    return int(hashlib.sha1(text.encode()).hexdigest(), 16) % 10 == 0
