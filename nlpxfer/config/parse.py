"""From a command line, and the YAML file that it names, to dataclasses; all faults in one error."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

from transformers import HfArgumentParser

from nlpxfer.config.options import ANY_VALUE, REFUSED_OPTIONS, unstarted
from nlpxfer.config.ranges import (
    Range,
    as_converted,
    attach,
    end_faults,
    faults_of,
    read_range,
    search_faults,
    stand_ins,
)
from nlpxfer.config.yaml_file import Given, Parts, read_yaml, written_parts
from nlpxfer.errors import ConfigError, nearest

_PATHS = ("_name_or_path", "_file", "_dir", "_cache", "dataset_name")
_NAMES = ("_column", "_name", "_model_id", "_teacher")
"""How options end that name a place, or something else that has to be there."""


class _Parser(HfArgumentParser):
    """An argparse parser that raises its complaint instead of printing a long usage and leaving."""

    def error(self, message: str) -> NoReturn:
        raise argparse.ArgumentError(None, re.sub(r"^argument --\S+: ", "", message))


def parse(types: Sequence[type], argv: Sequence[str] | None = None) -> tuple[Any, ...]:
    """Read the options of a recipe.

    Args:
        types: Dataclasses whose fields together are the options; no two share a field.
        argv: Words of the command line without the program's name; default `sys.argv[1:]`. The first may be a YAML
            file with flat keys. A mapping with `low` and `high`, or with `choices`, is a range to search.

    Returns:
        One instance of each type, in the order given. `RunOptions` holds the ranges; an option with a range has its
        default, or an end of the range where only that fits the values of others.

    Raises:
        ConfigError: Unknown, misspelt, doubled or ill-typed options, options without effect, and values outside their
            range: all of them.
        SystemExit: After `--help`.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    parser = _Parser(list[Any](types), allow_abbrev=False, add_help=False)
    refused = _refusals(types)
    if any(word in ("-h", "--help") for word in words):
        sys.stdout.write(_help(parser, refused))
        raise SystemExit(0)
    faults: list[str] = []
    given: dict[str, Given] = {}
    if words and not words[0].startswith("-"):
        given.update(read_yaml(words.pop(0), faults))
    given.update(_read_words(words, faults))
    owners = {f.name: cls for cls in types for f in dataclasses.fields(cls) if f.init}
    hints = {name: hint for cls in types for name, hint in get_type_hints(cls).items()}
    parsed: dict[str, Any] = {}
    ranges: dict[str, Range] = {}
    for key, value in given.items():
        try:
            hint = hints.get(key)
            if value.parts is not None and _is_range(value.parts, hint):
                ranges[key] = _range_of(parser, key, value, owners, refused, hint)
            else:
                parsed[key] = _value_of(parser, key, value, owners.keys(), refused, hint)
        except argparse.ArgumentError as error:
            faults.append(f"{key}: {error.message}{value.where}")
        except ConfigError as error:
            faults += [f"{key}: {fault}{value.where}" for fault in error.faults]
    with unstarted():  # what nlpxfer finds is told before the processes meet
        _build(types, parsed, ranges, given, faults)
    return _build(types, parsed, ranges, given, [])


def _refusals(types: Sequence[type]) -> dict[str, str]:
    """Option -> what is said where it is given."""
    refused = {key: f"not supported: {why}" for key, why in REFUSED_OPTIONS.items()}
    for cls in types:
        idle = getattr(cls, "without_effect", {})
        refused |= {key: f"has no effect here: {why}" for key, why in idle.items() if key not in refused}
    return refused


def _help(parser: _Parser, refused: Mapping[str, str]) -> str:
    """The parser's help, without the options that `parse` refuses."""
    for action in parser._actions:  # argparse has no public way to them
        if action.dest in refused or f"--{action.dest}" not in action.option_strings:
            action.help = argparse.SUPPRESS
    parser.prog = f"{Path(sys.argv[0]).name} [config.yaml]"
    return parser.format_help()


def _read_words(words: Sequence[str], faults: list[str]) -> dict[str, Given]:
    """Group `--key value ...` and `--key=value`."""
    given: dict[str, list[str]] = {}
    key = ""
    for word in words:
        if word.startswith("--"):
            name, has_value, value = word[2:].partition("=")
            key = name.replace("-", "_")
            if key in given:
                faults.append(f"{key}: given twice on the command line")
            given[key] = [value] if has_value else []
        elif not key:
            faults.append(f"{word!r}: expected --key before it")
        else:
            given[key].append(word)
    return {key: Given(values, parts=written_parts(values)) for key, values in given.items()}


def _is_range(parts: Parts, hint: Any) -> bool:  # noqa: ANN401
    """Whether a mapping is meant as a range: it has the parts of one, or no other mapping is a value of the option."""
    kinds = get_args(hint) or (hint,)
    if any(kind is dict or get_origin(kind) is dict for kind in kinds):
        return False
    return bool(parts.keys() & {"low", "high", "choices"}) or (hint is not None and str not in kinds)


def _range_of(
    parser: _Parser,
    key: str,
    value: Given,
    owners: Mapping[str, type],
    refused: Mapping[str, str],
    hint: Any,  # noqa: ANN401
) -> Range:
    if key not in owners or key in refused:
        _value_of(parser, key, value, owners.keys(), refused, hint)  # says which of the two

    def typed(word: str | None) -> Any:  # noqa: ANN401
        return _value_of(parser, key, Given(None if word is None else [word]), owners.keys(), refused, hint)

    return read_range(owners[key], key, hint, value.parts or {}, typed)


def _value_of(
    parser: _Parser,
    key: str,
    value: Given,
    known: Collection[str],
    refused: Mapping[str, str],
    hint: Any,  # noqa: ANN401
) -> Any:  # noqa: ANN401
    """The typed value of an option.

    Raises:
        argparse.ArgumentError: It is unknown, not supported, or of a wrong type.
    """
    if key not in known:
        close = nearest(key, set(known) - refused.keys())
        raise argparse.ArgumentError(None, "unknown option" + (f"; did you mean {close}?" if close else ""))
    if key in refused:
        raise argparse.ArgumentError(None, refused[key])
    words, kinds = _places(key, value.words), get_args(hint) or (hint,)
    if words is None:
        if type(None) not in kinds:
            raise argparse.ArgumentError(None, "it has no value; write one, or leave the key out")
        return None
    if not words and (bool in kinds or key == "resume_from_checkpoint"):
        words = ["true"]
    if len(words) > 1 and list[str] in kinds:  # `str | list[str]`, of which HfArgumentParser only sees the first
        return words
    if str not in kinds and any(get_origin(kind) is dict for kind in kinds):  # HfArgumentParser would call dict(text)
        return _nested(" ".join(words))
    namespace, rest = parser.parse_known_args([f"--{key}={words[0]}"] if len(words) == 1 else [f"--{key}", *words])
    if rest:
        raise argparse.ArgumentError(None, f"takes one value, but got {' '.join(words)}")
    typed = getattr(namespace, key)
    if isinstance(typed, float) and not math.isfinite(typed):
        raise argparse.ArgumentError(None, f"{typed} is not a finite number")
    return typed


def _places(key: str, words: Sequence[str] | None) -> list[str] | None:
    """The words of an option; of one that names a place the home folder is written out.

    Raises:
        argparse.ArgumentError: It names nothing, as the variable of a shell that was never set.
    """
    if words is not None and "" in words and key.endswith((*_PATHS, *_NAMES)):
        raise argparse.ArgumentError(None, "it is empty; leave it out")
    if words is None or not key.endswith(_PATHS):
        return None if words is None else [*words]
    return [os.path.expanduser(word) for word in words]  # noqa: PTH111 - a Hub id or a list of names is no path


def _nested(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentError(None, f"{text!r} is not a JSON object such as '{{\"key\": true}}'")
    return value


def _build(
    types: Sequence[type],
    parsed: Mapping[str, Any],
    ranges: Mapping[str, Range],
    given: Mapping[str, Given],
    faults: list[str],
) -> tuple[Any, ...]:
    built: list[Any] = []
    converted: dict[str, Range] = {}
    for cls in types:
        names = {f.name for f in dataclasses.fields(cls) if f.init}
        values = {key: value for key, value in parsed.items() if key in names}
        mine = {key: found for key, found in ranges.items() if key in names}
        values |= stand_ins(cls, values, mine)
        own = [*faults_of(cls, values)]
        if not own:
            built.append(cls(**values))
            faults += _without_effect(built[-1], parsed, mine, given)
        own += end_faults(cls, values, mine, own)
        converted |= {} if own else dict(as_converted(cls, values, mine))
        faults += own
    faults += _overruled(built, parsed, ranges, given)
    if "num_trials" not in given or not faults:
        faults += search_faults(parsed.get("num_trials", 0), parsed, ranges)
    attach(built, converted)
    if faults:
        raise ConfigError.from_faults(faults, fix="--help lists all options")
    return tuple(built)


def _without_effect(
    options: object, parsed: Mapping[str, Any], ranges: Mapping[str, Range], given: Mapping[str, Given]
) -> list[str]:
    """Options that wait for a switch, save lines of a file that repeat a default or whose switch was turned off.

    A range is never such a line: its values would be tried, and all alike.
    """
    faults = []
    defaults = {f.name: f.default for f in dataclasses.fields(options)}  # type: ignore[arg-type]  # a dataclass
    for key, (switch, wanted) in getattr(options, "needed_switches", {}).items():
        if parsed.get(key) is None and key not in ranges:
            continue
        values = ranges[switch].ends if switch in ranges else (getattr(options, switch),)
        on = any(value == wanted if wanted is not None else value for value in values)
        turned_off = switch in given and not given[switch].where
        harmless = given[key].where and key not in ranges and (turned_off or parsed[key] == defaults[key])
        if not harmless and not on:
            shown = ANY_VALUE[switch] if wanted is None else str(wanted).lower()
            faults.append(f"{key}: has no effect without --{switch} {shown}{given[key].where}")
    return faults


def _overruled(
    built: Sequence[object], parsed: Mapping[str, Any], ranges: Mapping[str, Range], given: Mapping[str, Given]
) -> list[str]:
    """Options that another one, which was given too, makes meaningless."""
    faults = []
    defaults = {f.name: f.default for options in built for f in dataclasses.fields(options)}  # type: ignore[arg-type]

    def differs(key: str) -> bool:
        return key in ranges or parsed.get(key, defaults[key]) != defaults[key]

    for options in built:
        for key, other in getattr(options, "overruled_by", {}).items():
            if other in defaults and differs(key) and differs(other):
                faults.append(f"{key}: does nothing beside {other}{given[key].where}")
    return faults
