"""Imports go one way: data -> checkpoint -> methods -> train -> evaluate -> report -> hub -> run -> searched ->
result -> teachers -> students -> layer_trial -> verdict -> smallest -> start -> backends -> classify -> cascade ->
export -> int8 -> recipes -> cli -> __main__.

A later stage may import an earlier one, never the reverse. `errors`, `problem`, `strict_json`, `losses` and `config`
belong to no stage: all may import them, and they import only each other.
"""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "nlpxfer"
STAGES = (
    "data",
    "checkpoint",
    "methods",
    "train",
    "evaluate",
    "report",
    "hub",
    "run",
    "searched",
    "result",
    "teachers",
    "students",
    "layer_trial",
    "verdict",
    "smallest",
    "start",
    "backends",
    "classify",
    "cascade",
    "export",
    "int8",
    "recipes",
    "cli",
    "__main__",
)
FREE = ("errors", "problem", "strict_json", "losses", "config")


def modules():
    """(stage, path) of all modules but the package's own __init__, which only names what the others define."""
    for path in sorted(PACKAGE.rglob("*.py")):
        part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if part not in ("__init__", "_recipes", "_data"):
            yield part, path


def imported_parts(source: str, package: tuple[str, ...]) -> set[str]:
    """First part below nlpxfer of each import, those inside functions included; `package` is where the source stands.

    >>> sorted(imported_parts("import nlpxfer.hub\\nfrom ..train import x", ("nlpxfer", "losses")))
    ['hub', 'train']
    """
    names: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            before = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*before, *([node.module] if node.module else [])])
            names += [f"{base}.{alias.name}" if base == "nlpxfer" else base for alias in node.names]
    found = {name.split(".")[1] for name in names if name.startswith("nlpxfer.")}
    return found & {*STAGES, *FREE} | {name for name in found if (PACKAGE / name).is_dir()}


def faults(part: str, imported: set[str]) -> list[str]:
    """What `part` imports but may not."""
    if part in FREE:
        return sorted(imported - {*FREE})
    allowed = {*FREE, *STAGES[: STAGES.index(part) + 1]}
    return sorted(imported - allowed)


def test_every_module_has_a_place():
    unplaced = sorted({part for part, _ in modules()} - {*STAGES, *FREE})
    assert not unplaced, f"add {unplaced} to STAGES or FREE, and to the order in the docstring"


@pytest.mark.parametrize("part", [*STAGES, *FREE])
def test_imports_go_one_way(part):
    wrong = []
    for owner, path in modules():
        if owner == part:
            package = ("nlpxfer", *path.relative_to(PACKAGE).parent.parts)
            wrong += [
                f"{path.name} imports {name}" for name in faults(part, imported_parts(path.read_text(), package))
            ]
    assert not wrong


@pytest.mark.parametrize(
    ("part", "source", "wrong"),
    [
        ("data", "from nlpxfer.train.trainer import fit", ["train"]),
        ("train", "def late():\n    import nlpxfer.hub", ["hub"]),
        ("losses", "from nlpxfer import data", ["data"]),
        ("checkpoint", "from ..methods import base", ["methods"]),
        ("hub", "from nlpxfer.data import files\nfrom nlpxfer.errors import PushError", []),
        ("train", "from . import sampler\nfrom nlpxfer.losses import classification", []),
    ],
)
def test_the_check_sees_a_wrong_import(part, source, wrong):
    assert faults(part, imported_parts(source, ("nlpxfer", part))) == wrong
