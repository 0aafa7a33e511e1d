"""The transfer methods, one line each.

A new method is one module, one line here, one recipe with its YAML, and one row of the README's table; the contract
tests iterate over this registry. Other packages add methods through the entry-point group `nlpxfer.methods`: the name
is the key, the value a `MethodRow`, whose `recipe` is what `nlpxfer run <key>` runs.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from importlib.metadata import entry_points

from nlpxfer.errors import ConfigError, nearest
from nlpxfer.methods.base import LossTerm, Method

__all__ = ["REGISTRY", "LossTerm", "Method", "MethodRow", "available_methods", "method_row"]


@dataclass(frozen=True, kw_only=True)
class MethodRow:
    """One transfer method.

    Attributes:
        key: Its name: module, recipe, YAML file and README row share it.
        target: `module:Class` of the `Method`.
        family: Family of transfer methods it belongs to.
        summary: What it does, in one line.
        source: Paper it follows.
        recipe: Of a method of another package: the module whose `main` takes the command line, and that ends in
            `run_main(main)` when it is run as a program; ours have `recipes/<key>.py`.
    """

    key: str
    target: str
    family: str
    summary: str
    source: str
    recipe: str = ""

    def load(self) -> type[Method]:
        """Import the method's class."""
        module, _, name = self.target.partition(":")
        loaded: type[Method] = getattr(importlib.import_module(module), name)
        return loaded


REGISTRY = (
    MethodRow(
        key="finetune",
        target="nlpxfer.methods.finetune:FineTune",
        family="Transfer of a pretrained model",
        summary="linear probe on frozen features, then all weights",
        source="Kumar et al. 2022, arXiv:2202.10054",
    ),
    MethodRow(
        key="features",
        target="nlpxfer.methods.features:FeatureBased",
        family="Transfer of a pretrained model",
        summary="a classifier on frozen features, which are computed once",
        source="Peters et al. 2019, arXiv:1903.05987",
    ),
    MethodRow(
        key="adapters",
        target="nlpxfer.methods.adapters:Adapters",
        family="Transfer of a pretrained model",
        summary="small adapters and the head learn, the pretrained weights stay",
        source="Hu et al. 2021, arXiv:2106.09685",
    ),
    MethodRow(
        key="distill",
        target="nlpxfer.methods.distill:Distill",
        family="Distillation",
        summary="a smaller student learns the teacher's softened predictions",
        source="Hinton et al. 2015, arXiv:1503.02531",
    ),
)


def available_methods() -> list[MethodRow]:
    """The methods of nlpxfer, then those of installed packages.

    Raises:
        ConfigError: An entry point cannot be loaded, is no `MethodRow`, or has another name than its row; or two
            packages declare the same key.
    """
    rows = {row.key: row for row in REGISTRY}
    for point in entry_points(group="nlpxfer.methods"):
        try:
            row = point.load()
        except Exception as error:  # noqa: BLE001 - the code of another package
            raise ConfigError(
                f"The entry point nlpxfer.methods:{point.name} cannot be loaded: {error}",
                fix="uninstall or update the package that declares it",
            ) from error
        if not isinstance(row, MethodRow):
            kind = type(row).__name__
            raise ConfigError(f"The entry point nlpxfer.methods:{point.name} is a {kind}, not a MethodRow.")
        if row.key != point.name:
            raise ConfigError(f"The entry point nlpxfer.methods:{point.name} declares the method {row.key!r}.")
        if row.key in rows:
            raise ConfigError(f"Two packages declare the method {row.key!r}.")
        rows[row.key] = row
    return list(rows.values())


def method_row(key: str) -> MethodRow:
    """The method of this name.

    Raises:
        ConfigError: There is none; names the nearest.
    """
    rows = {row.key: row for row in available_methods()}
    if key not in rows:
        close = nearest(key, rows)
        raise ConfigError(
            f"There is no method {key!r}." + (f" Did you mean {close!r}?" if close else ""), available=sorted(rows)
        )
    return rows[key]
