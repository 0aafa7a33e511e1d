"""Options of a recipe: one flat namespace from default < YAML file < command line.

Every recipe is called as `recipes/X.py [config.yaml] [--key value ...]`. The options are plain dataclasses;
transformers' `HfArgumentParser` turns each field into an argparse option, so that a value from YAML and one from
the command line pass through the same type check. Chosen over hydra, jsonargparse and pydantic because
`TrainingArguments` is itself such a dataclass, and a second schema beside it would drift.

Unlike `HfArgumentParser.parse_yaml_file`, the values of a YAML file are read as they are written and checked
(`learning_rate: 2e-5` is a text to YAML, and `eval_strategy: no` a boolean), an unknown key is refused with the
nearest known name, and all faults are shown at once.
"""

from nlpxfer.config.options import (
    NEEDED_SWITCHES,
    REFUSED_OPTIONS,
    DataOptions,
    RunOptions,
    default_learning_rate,
    option,
    resolved,
)
from nlpxfer.config.parse import parse
from nlpxfer.config.ranges import Range

__all__ = [
    "NEEDED_SWITCHES",
    "REFUSED_OPTIONS",
    "DataOptions",
    "Range",
    "RunOptions",
    "default_learning_rate",
    "option",
    "parse",
    "resolved",
]
