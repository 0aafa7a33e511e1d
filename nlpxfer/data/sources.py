"""Where a request's rows are: named files, a local folder, a bundled set, or a dataset of the Hub.

A `dataset_name` is looked up in this order: a folder that exists, a bundled set, the Hub. What was found is logged.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from nlpxfer.data.files import Table, read_table
from nlpxfer.data.formats import READERS
from nlpxfer.data.rows import NO_LABEL
from nlpxfer.errors import DataError, DataNotFoundError, nearest

if TYPE_CHECKING:
    from datasets import Dataset

LOGGER = logging.getLogger(__name__)
SPLITS: Final = ("train", "validation", "test")
SPLIT_NAMES: Final[Mapping[str, tuple[str, ...]]] = {
    "train": ("train",),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}
UNLABELLED_FILE: Final = "unlabelled.txt"
# `load_dataset` takes these for readers, and would read whatever lies in the current folder.
READER_NAMES: Final = frozenset(
    "arrow audiofolder cache csv eval generator hdf5 imagefolder json lance pandas parquet pdffolder spark sql text "
    "videofolder webdataset xml".split()
)


def bundled_folder() -> Path | None:
    """The folder of the bundled sets: inside the installed package, or `data/` of a checkout."""
    package = Path(__file__).resolve().parents[1]
    if (package / "_data").is_dir():
        return package / "_data"
    checkout = package.parent
    return checkout / "data" if (checkout / "pyproject.toml").is_file() and (checkout / "data").is_dir() else None


def bundled_names() -> list[str]:
    """The names of the bundled sets."""
    folder = bundled_folder()
    return [] if folder is None else sorted(item.name for item in folder.iterdir() if split_files(item))


def find_folder(dataset_name: str) -> Path | None:
    """The local folder that a dataset name means; None if it must be an id on the Hub.

    Raises:
        DataNotFoundError: The name is written as a path, and there is no such folder.
    """
    folder = Path(dataset_name).expanduser()
    if folder.is_dir():
        LOGGER.info("dataset %s: a local folder", dataset_name)
        return folder
    if folder.is_file():
        raise DataError(f"{dataset_name} is a file, not a dataset.", fix=f"--train_file {dataset_name}")
    if dataset_name in bundled_names():
        LOGGER.info("dataset %s: bundled with nlpxfer", dataset_name)
        return (bundled_folder() or Path()) / dataset_name
    if (
        folder.is_absolute()
        or dataset_name.startswith((".", "~"))
        or dataset_name.count("/") > 1
        or "\\" in dataset_name
    ):
        parent = folder.parent
        near = (
            nearest(folder.name, [item.name for item in parent.iterdir() if item.is_dir()]) if parent.is_dir() else ""
        )
        raise DataNotFoundError(f"The folder {dataset_name} does not exist.", fix=str(parent / near) if near else "")
    return None


def split_files(folder: Path) -> dict[str, Path]:
    """The files of a folder that are its splits, such as train.csv and dev.jsonl.

    Raises:
        DataError: Two files claim the same split.
    """
    found: dict[str, Path] = {}
    if not folder.is_dir():
        return found
    for split, names in SPLIT_NAMES.items():
        files = sorted(
            path
            for path in folder.iterdir()
            if path.is_file() and path.stem.lower() in names and path.suffix.lower() in READERS
        )
        if len(files) > 1:
            listed = " and ".join(path.name for path in files)
            raise DataError(
                f"{folder} has more than one {split} file: {listed}.", fix="name the files: --train_file ..."
            )
        if files:
            found[split] = files[0]
    return found


def read_folder(folder: Path, columns: Sequence[str]) -> dict[str, Table]:
    """Read the split files of a folder.

    Raises:
        DataNotFoundError: The folder has no train file.
    """
    files = split_files(folder)
    if "train" not in files:
        raise DataNotFoundError(
            f"{folder} has no train file.",
            fix="name it train.csv, .tsv, .json, .jsonl or .parquet, or give --train_file",
            available=sorted(item.name for item in folder.iterdir()),
        )
    return {split: read_table(path, columns) for split, path in files.items()}


def read_hub(dataset_name: str, config_name: str | None, columns: Sequence[str], label: str) -> dict[str, Table]:
    """Read the splits of a dataset of the Hub; code from the Hub is never run.

    Downloads go to the Hugging Face cache. A split all of whose labels are hidden (-1) is left out, with a warning.

    Raises:
        DataNotFoundError: There is no such dataset, or the Hub cannot be reached.
        DataError: The dataset has no training split or not the columns, or cannot be loaded.
    """
    splits = _download(dataset_name, config_name)
    tables: dict[str, Table] = {}
    for split, names in SPLIT_NAMES.items():
        found = [name for name in names if name in splits]
        if found:
            table = _from_hub(splits[found[0]], f"{dataset_name} [{found[0]}]", columns)
            if (
                split != "train"
                and label in table.class_names
                and all(value == NO_LABEL for value in table.columns[label])
            ):
                LOGGER.warning("%s is left out: all of its labels are hidden (-1)", table.source)
                continue
            tables[split] = table
    if "train" not in tables:
        raise DataError(f"The dataset {dataset_name} has no split 'train'.", available=sorted(splits))
    unused = sorted(set(splits) - {name for names in SPLIT_NAMES.values() for name in names})
    if unused:
        LOGGER.info("dataset %s: the splits %s are not used", dataset_name, ", ".join(unused))
    return tables


def _download(dataset_name: str, config_name: str | None) -> dict[str, Dataset]:
    import datasets

    bundled = bundled_names()
    if dataset_name in READER_NAMES:
        raise DataNotFoundError(
            f"{dataset_name!r} is a file format, not a dataset.", fix="--train_file", available=bundled
        )
    near = nearest(dataset_name, bundled)
    LOGGER.info("dataset %s: from the Hub", dataset_name)
    try:
        splits: dict[str, Dataset] = dict(datasets.load_dataset(dataset_name, config_name))
    except (datasets.exceptions.DatasetNotFoundError, ConnectionError) as error:
        unreachable = isinstance(error, ConnectionError)
        raise DataNotFoundError(
            f"The dataset {dataset_name!r} is no local folder and no bundled set, and "
            + ("the Hub cannot be reached." if unreachable else "does not exist on the Hub or cannot be accessed."),
            why="offline" if unreachable else "a typing error, or a private or gated dataset without a login",
            fix=f"--dataset_name {near}" if near else "give local files: --train_file ...",
            available=bundled,
        ) from error
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"The dataset {dataset_name!r} cannot be loaded: {error}",
            why="it needs --dataset_config_name, or code of its own, which is never run",
        ) from error
    return splits


def _from_hub(dataset: Dataset, source: str, columns: Sequence[str]) -> Table:
    from datasets import ClassLabel

    missing = [name for name in columns if name not in dataset.column_names]
    if missing:
        hints = [f"{near!r} in place of {name!r}" for name in missing if (near := nearest(name, dataset.column_names))]
        raise DataError(
            f"{source} has no column {', '.join(map(repr, missing))}.",
            fix=", ".join(hints) or "--text_column and --label_column name the columns",
            available=dataset.column_names,
        )
    if not len(dataset):
        raise DataError(f"{source} has no rows.")
    values: dict[str, list[Any]] = {name: list(dataset[name]) for name in columns}
    kinds = {name: getattr(kind, "feature", kind) for name, kind in dataset.features.items() if name in columns}
    named = {name: tuple(kind.names) for name, kind in kinds.items() if isinstance(kind, ClassLabel)}
    return Table(source=source, name=source, columns=values, class_names=named)
