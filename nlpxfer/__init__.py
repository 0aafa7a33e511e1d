"""Knowledge transfer between language models, measured.

    report = nlpxfer.run_recipe("finetune", train_file="train.csv", output_dir="runs/mine")
    classifier = nlpxfer.Classifier.load("runs/mine")

Names are loaded when first used: importing the package is quick and has no side effects.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nlpxfer.cascade import Cascade, evaluate_cascade, fit_cascade, load_cascade, predict_cascade
    from nlpxfer.classify import Classifier, evaluate_file, predict_file
    from nlpxfer.errors import NlpxferError
    from nlpxfer.hub.push import push_folder
    from nlpxfer.recipes import run_recipe

__version__ = "0.1.0"

__all__ = [
    "Cascade",
    "Classifier",
    "NlpxferError",
    "evaluate_cascade",
    "evaluate_file",
    "fit_cascade",
    "load_cascade",
    "predict_cascade",
    "predict_file",
    "push_folder",
    "run_recipe",
]

_MODULES = {
    "Cascade": "cascade",
    "Classifier": "classify",
    "NlpxferError": "errors",
    "evaluate_cascade": "cascade",
    "evaluate_file": "classify",
    "fit_cascade": "cascade",
    "load_cascade": "cascade",
    "predict_cascade": "cascade",
    "predict_file": "classify",
    "push_folder": "hub.push",
    "run_recipe": "recipes",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401 - any public object
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
