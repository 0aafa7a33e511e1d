"""Recipes as functions: the same programs that `accelerate launch recipes/<method>.py` starts, called from Python.

Recipes of other packages are those of the methods that they register (`nlpxfer.methods`).
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from enum import Enum
from pathlib import Path, PurePath
from types import ModuleType
from typing import TYPE_CHECKING, Any

import yaml

from nlpxfer.errors import ConfigError, nearest

if TYPE_CHECKING:
    from nlpxfer.report.report import Report

PACKAGE_FOLDER = Path(__file__).resolve().parent


def recipe_folder() -> Path:
    """Where the recipes are: `recipes/` of the checkout that this runs from, else those of the installed package.

    Raises:
        ConfigError: Neither is there; the package was installed in a way that dropped them.
    """
    checkout = PACKAGE_FOLDER.parent
    candidates = [PACKAGE_FOLDER / "_recipes"]
    if (checkout / "pyproject.toml").is_file():
        candidates.insert(0, checkout / "recipes")
    for folder in candidates:
        if folder.is_dir():
            return folder
    raise ConfigError(
        "This installation of nlpxfer has no recipes.",
        why=f"none of {', '.join(str(folder) for folder in candidates)} exists",
        fix="pip install --force-reinstall nlpxfer",
    )


def recipe_names() -> list[str]:
    """The names of all recipes, sorted."""
    return sorted(path.stem for path in recipe_folder().glob("*.py") if not path.stem.startswith("_"))


def recipe_file(name: str) -> Path:
    """The program of a recipe: ours, or that of a method of another package.

    Raises:
        ConfigError: There is none of this name; names the nearest. Or a method of another package has none.
    """
    names = recipe_names()
    if name in names:
        return recipe_folder() / f"{name}.py"
    from nlpxfer.methods import available_methods  # which imports torch

    others = {row.key: row.recipe for row in available_methods() if row.key not in names}
    if name not in others:
        known = [*names, *(key for key, module in others.items() if module)]
        close = nearest(name, known)
        raise ConfigError(
            f"There is no recipe {name!r}." + (f" Did you mean {close!r}?" if close else ""), available=known
        )
    try:
        spec = importlib.util.find_spec(others[name]) if others[name] else None
    except ImportError:  # a package above the module is not there
        spec = None
    if spec is None or not spec.origin:
        raise ConfigError(
            f"The method {name!r} of another package has no recipe.",
            why=f"it names the module {others[name]!r}, which is not there" if others[name] else "it names no module",
            fix="update the package that declares it",
        )
    return Path(spec.origin)


def load_recipe(name: str) -> ModuleType:
    """A recipe as a module, loaded once.

    Raises:
        ConfigError: There is none of this name.
    """
    file = recipe_file(name)
    key = f"nlpxfer_recipe_{name}"
    if key not in sys.modules:
        spec = importlib.util.spec_from_file_location(key, file)
        if spec is None or spec.loader is None:
            raise ConfigError(f"The recipe {name} cannot be loaded.")
        module = importlib.util.module_from_spec(spec)
        sys.modules[key] = module  # its dataclasses look their annotations up there
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[key]
            raise
    return sys.modules[key]


def run_recipe(name: str, /, **options: Any) -> Report:  # noqa: ANN401 - values of the recipe's options
    """Run a recipe and return its report; the model and all files are in `output_dir`.

    Args:
        name: Such as `finetune` or `distill`.
        options: As in the recipe's YAML file: `train_file="train.csv", num_train_epochs=3`; paths, and numbers and
            arrays of numpy, are taken too.

    Raises:
        ConfigError: No such recipe, or options that are unknown or do not fit; all of them at once.
        NlpxferError: What else the recipe refuses; see its `main`.
    """
    main = load_recipe(name).main
    values, faults = {}, []
    for key, value in options.items():
        values[key] = _plain(value)
        try:
            yaml.safe_dump(values[key])
        except yaml.YAMLError:
            faults.append(f"{key}: a value of the type {type(value).__name__} cannot be written down")
    if faults:
        raise ConfigError.from_faults(faults)
    with tempfile.TemporaryDirectory(prefix="nlpxfer-") as folder:
        file = Path(folder) / "keywords.yaml"  # errors name it
        file.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
        report: Report = main([str(file)] if values else [])
    return report


def _plain(value: Any) -> Any:  # noqa: ANN401 - any value of an option
    """What YAML can hold of a value: texts for paths, and Python's own numbers and lists."""
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, Enum):
        return _plain(value.value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return _plain(value.tolist()) if hasattr(value, "tolist") else value
