"""A YAML file of flat keys, its values as they are written."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from nlpxfer.errors import ConfigError

_NULL, _STRING = "tag:yaml.org,2002:null", "tag:yaml.org,2002:str"
_YAML_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in "null str int float bool timestamp seq map".split()}
_EXPONENT = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+")


Parts = Mapping[str, "str | None | list[str | None]"]
"""A mapping as it is written: names to words, or to lists of words; None is YAML's null."""


@dataclass(frozen=True)
class Given:
    """What an option was set to: words as on a command line, or None for YAML's null, and where that stands.

    A mapping is one word, its JSON, and `parts` holds its items as they are written.
    """

    words: list[str] | None
    where: str = ""
    parts: Parts | None = None


def read_yaml(path: str, faults: list[str]) -> dict[str, Given]:
    """The keys of a YAML file, their values as they are written there: `1.10` and `no` mean what a command line means.

    Raises:
        ConfigError: The file does not exist, is no YAML, or does not hold flat keys.
    """
    if not Path(path).is_file():
        beside = sorted(str(p) for p in Path(path).parent.glob("*.yaml")) if Path(path).parent.is_dir() else []
        raise ConfigError(
            f"There is no configuration file {path}.",
            why="the first word of a recipe's command line is a YAML file or an option that starts with --",
            available=beside,
        )
    try:
        root = yaml.compose(Path(path).read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if root is None:
        return {}
    if not isinstance(root, yaml.MappingNode):
        kind = "list" if isinstance(root, yaml.SequenceNode) else "text"
        raise ConfigError(f"{path} must hold flat `key: value` lines, but holds a {kind}.")
    where, given = f" (in {Path(path).name})", {}
    for key_node, node in root.value:
        key = str(key_node.value).replace("-", "_")
        if key in given:
            faults.append(f"{key}: given twice{where}")
        if node.tag not in _YAML_TAGS or (isinstance(node, yaml.SequenceNode) and not node.value):
            faults.append(f"{key}: no value can be read from {node.tag if node.value else 'an empty list'}{where}")
        given[key] = Given(_words_of(node), where, _parts_of(node))
    return given


def written_parts(words: Sequence[str]) -> Parts | None:
    """What stands in a mapping on a command line; None if the words are no mapping."""
    if len(words) != 1 or not words[0].startswith("{"):
        return None
    try:
        return _parts_of(yaml.compose(words[0], Loader=yaml.SafeLoader))
    except yaml.YAMLError:
        return None


def _parts_of(node: yaml.Node | None) -> Parts | None:
    if not isinstance(node, yaml.MappingNode):
        return None
    return {str(key.value): _part(value) for key, value in node.value}


def _part(node: yaml.Node) -> str | None | list[str | None]:
    if isinstance(node, yaml.SequenceNode):
        return [None if item.tag == _NULL else " ".join(_words_of(item) or []) for item in node.value]
    words = _words_of(node)
    return None if words is None else words[0]


def _words_of(node: yaml.Node) -> list[str] | None:
    if isinstance(node, yaml.SequenceNode):
        return [word for item in node.value for word in _words_of(item) or ["null"]]
    if isinstance(node, yaml.MappingNode):
        return [json.dumps(_constructed(node))]
    return None if node.tag == _NULL else [str(node.value)]


def _constructed(node: yaml.Node) -> object:
    """A nested value, typed as YAML does, save that 1e-5 is a number (YAML 1.1 takes it for a text)."""
    if isinstance(node, yaml.MappingNode):
        return {str(key.value): _constructed(value) for key, value in node.value}
    if isinstance(node, yaml.SequenceNode):
        return [_constructed(item) for item in node.value]
    if node.tag == _STRING:
        is_number = node.style is None and _EXPONENT.fullmatch(node.value)  # type: ignore[attr-defined]
        return float(node.value) if is_number else node.value
    return yaml.safe_load(node.value)
