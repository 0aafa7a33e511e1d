"""Ranges: an option that a search may vary stands as a range where its value would stand.

    learning_rate: {low: 0.00001, high: 0.0005, log: true}
    num_train_epochs: {choices: [2, 4, 8]}

Chosen over a second block or file for the search, because keys stay flat, a range is typed and checked as a value of
its option is, and a value on the command line replaces a range of the file as it replaces a value. The ends of all
ranges, alone and in pairs, are tried on the option classes before anything runs: what these refuse would fail a trial.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar, get_args, get_origin

from transformers.hf_argparser import string_to_bool

from nlpxfer.config.options import DataOptions, RunOptions, plain_value
from nlpxfer.config.yaml_file import Parts
from nlpxfer.errors import ConfigError, nearest

SEARCHED_ARGUMENTS = frozenset(
    "adam_beta1 adam_beta2 adam_epsilon gradient_accumulation_steps label_smoothing_factor lr_scheduler_type "
    "max_steps optim".split()
)
"""Fields of `TrainingArguments` that may be ranges, beside those that `RunOptions` declares anew."""

FIXED_OPTIONS = frozenset(
    "abstain_precision allow_topology_change bf16 control_arm disable_tqdm early_stopping_patience error_report "
    "eval_strategy load_best_model_at_end logging_steps metric_for_best_model num_folds num_seeds num_threads "
    "num_trials output_dir overwrite per_device_eval_batch_size save_predictions save_strategy save_total_limit "
    "search_timeout".split()
)
"""Fields that `RunOptions` declares and in which trials must not differ."""

Plan = TypeVar("Plan")
Typed = Callable[[str | None], Any]


@dataclasses.dataclass(frozen=True)
class Range:
    """What an option may be in a search: any number from `low` to `high`, or one of the choices.

    Attributes:
        low: Least number.
        high: Greatest number.
        log: Draw evenly by the logarithm.
        choices: Values, instead of low and high.
    """

    low: float | int = 0
    high: float | int = 0
    log: bool = False
    choices: tuple[Any, ...] = ()

    def __contains__(self, value: object) -> bool:
        if self.choices:
            return value in self.choices
        return isinstance(value, (int, float)) and self.low <= value <= self.high

    @property
    def ends(self) -> tuple[Any, ...]:
        """The values between which all others lie."""
        return self.choices or (self.low, self.high)

    @property
    def size(self) -> float:
        """How many values there are."""
        if self.choices:
            return len(self.choices)
        return self.high - self.low + 1 if isinstance(self.low, int) else math.inf

    def plain(self) -> dict[str, Any]:
        """As it stands in a YAML file."""
        if self.choices:
            return {"choices": [plain_value(choice) for choice in self.choices]}
        return {"low": self.low, "high": self.high} | ({"log": True} if self.log else {})


def read_range(cls: type, key: str, hint: Any, parts: Parts, typed: Typed) -> Range:  # noqa: ANN401
    """The range of an option, its ends typed as a value of the option is.

    Args:
        cls: The class that holds the option.
        key: Its name.
        hint: Its type.
        parts: What was written: names to words.
        typed: From a word to a value; raises `argparse.ArgumentError`.

    Raises:
        ConfigError: The option cannot be searched, or the range is none; all faults found, without the option's name.
    """
    kinds = set(get_args(hint) or (hint,)) - {type(None)}
    reason = _why_fixed(cls, key, kinds)
    if reason:
        raise ConfigError.from_faults([f"it cannot be a range: {reason}"])
    faults = []
    for name in [name for name in parts if name not in ("low", "high", "log", "choices")]:
        close = nearest(name, ("low", "high", "log", "choices"))
        faults.append(f"{name!r} is no part of a range" + (f"; did you mean {close}?" if close else ""))
    values: dict[str, Any] = {}
    for name in [name for name in ("low", "high", "choices") if name in parts]:
        written = parts[name]
        if isinstance(written, list) != (name == "choices"):
            faults.append(f"{name} is {'no list' if name == 'choices' else 'a list'}")
            continue
        try:
            values[name] = [typed(word) for word in written] if isinstance(written, list) else typed(written)
        except argparse.ArgumentError as error:
            faults.append(f"{name}: {error.message}")
    faults = faults or _shape_faults(parts, values, kinds)
    if faults:
        raise ConfigError.from_faults(faults)
    if "choices" in values:
        return Range(choices=tuple(values["choices"]))
    return Range(values["low"], values["high"], _switch(parts.get("log", "false")) is True)


def _why_fixed(cls: type, key: str, kinds: set[Any]) -> str:
    if issubclass(cls, DataOptions):
        return "all trials must see the same rows, cut alike"
    if issubclass(cls, RunOptions):
        own = key in RunOptions.__dict__["__annotations__"]
        if key in FIXED_OPTIONS or (not own and key not in SEARCHED_ARGUMENTS):
            return "trials must not differ in it"
    reasons: Mapping[str, str] = getattr(cls, "NOT_SEARCHED", {})
    if key in reasons:
        return reasons[key]
    if any(get_origin(kind) is list for kind in kinds):
        return "its value is a list"
    if kinds == {str} and not cls.__dataclass_fields__[key].metadata.get("choices"):  # type: ignore[attr-defined]
        return "it is a free text"
    return ""


def _shape_faults(parts: Parts, values: Mapping[str, Any], kinds: set[Any]) -> list[str]:
    """What is wrong with a range whose parts have names and types."""
    if "choices" in values:
        if len(parts) > 1:
            return ["a range has low and high, or choices, not both"]
        different = {plain_value(value) for value in values["choices"]}
        return [] if len(different) == len(values["choices"]) > 1 else ["choices needs two or more different values"]
    if not kinds & {int, float} or any(get_origin(kind) is Literal for kind in kinds):
        return ["it is no number: write {choices: [...]}"]
    if not {"low", "high"} <= values.keys() or None in (values["low"], values["high"]):
        return ["a range has low and high, or choices"]
    log = _switch(parts.get("log", "false"))
    faults = [f"log: {parts['log']!r} is not true or false"] if log is None else []
    if values["low"] >= values["high"]:
        faults.append(f"low {values['low']} is not below high {values['high']}")
    if log and values["low"] <= 0:
        faults.append(f"log needs a low above 0, not {values['low']}")
    return faults


def _switch(word: object) -> bool | None:
    """What a word says that stands for true or false, as for any switch."""
    try:
        return bool(string_to_bool(word))  # type: ignore[no-untyped-call]
    except (argparse.ArgumentTypeError, AttributeError):
        return None


def end_faults(
    cls: type, values: Mapping[str, Any], ranges: Mapping[str, Range], known: Sequence[str] = ()
) -> list[str]:
    """What an option class refuses of the ends of ranges, each alone and each two together.

    Args:
        cls: The class.
        values: The options that have a value.
        ranges: Ranges of other options of the class.
        known: Faults of the values, which are not told again.
    """
    faults: list[str] = []
    for names in itertools.chain(itertools.combinations(ranges, 1), itertools.combinations(ranges, 2)):
        for ends in itertools.product(*(ranges[name].ends for name in names)):
            found = faults_of(cls, {**values, **dict(zip(names, ends, strict=True))})
            faults += [fault for fault in found if fault not in (*known, *faults)]
    return faults


def faults_of(cls: type, values: Mapping[str, Any]) -> Sequence[str]:
    """What an option class refuses of values for its options; those not named have their defaults."""
    try:
        cls(**values)
    except ConfigError as error:
        return error.faults or (error.what,)
    except (ValueError, TypeError) as error:
        return (str(error),)
    return ()


def stand_ins(cls: type, values: Mapping[str, Any], ranges: Mapping[str, Range]) -> dict[str, Any]:
    """Ends of ranges for the options whose default does not fit the values of others; no other option is named.

    `relation_layer: 1` does nothing where `relation_weight` is 0, its default, and so no value of a range above 0.

    Args:
        cls: The class.
        values: The options that have a value.
        ranges: Ranges of other options of the class.
    """
    chosen: dict[str, Any] = {}
    for name, found in ranges.items():
        if not faults_of(cls, {**values, **chosen}):
            break
        tried = [chosen, *({**chosen, name: end} for end in found.ends)]
        chosen = min(tried, key=lambda each: len(faults_of(cls, {**values, **each})))
    return chosen


def as_converted(cls: type, values: Mapping[str, Any], ranges: Mapping[str, Range]) -> Iterator[tuple[str, Range]]:
    """The ranges of a class with their choices as it keeps them: transformers turns some texts into enumerations."""
    for name, found in ranges.items():
        kept = tuple(getattr(cls(**{**values, name: choice}), name) for choice in found.choices)
        yield name, dataclasses.replace(found, choices=kept)


def search_faults(num_trials: int, values: Mapping[str, Any], ranges: Mapping[str, Range]) -> list[str]:
    """What keeps a search from making sense as a whole.

    Args:
        num_trials: Trials asked for; 0 for no search.
        values: The options that have a value.
        ranges: The others.
    """
    if ranges and not num_trials:
        return [f"{', '.join(ranges)}: a range without a number of trials; add num_trials, such as 20"]
    if num_trials > 0 and not ranges:
        example = "learning_rate: {low: 1e-5, high: 5e-4, log: true}"
        return [f"num_trials: no option has a range to try; write one, such as {example}, or num_trials: 0"]
    faults = []
    size = number_of_values(ranges)
    if ranges and size < num_trials:
        faults.append(f"num_trials: {num_trials} is more than the {size} combinations of the ranges")
    return faults


def number_of_values(ranges: Mapping[str, Range]) -> float:
    """How many combinations of values the ranges hold; infinite if one of them holds numbers that are not whole."""
    return math.prod(found.size for found in ranges.values())


def with_values(options: RunOptions, plan: Plan, values: Mapping[str, Any]) -> tuple[RunOptions, Plan]:
    """Copies of a run's options and of a recipe's own, with other values.

    Raises:
        ConfigError: The recipe's options cannot be combined like that.
    """
    own = {f.name for f in dataclasses.fields(plan)}  # type: ignore[arg-type]
    changed = copy.copy(options)
    for name in values.keys() - own:
        setattr(changed, name, values[name])
    if "learning_rate" in values:
        changed.wanted_learning_rate = changed.learning_rate
    mine = {name: values[name] for name in values.keys() & own}
    return changed, dataclasses.replace(plan, **mine)  # type: ignore[type-var]


def attach(built: Sequence[object], ranges: Mapping[str, Range]) -> None:
    """Hand the ranges to the run's options."""
    for part in built:
        if isinstance(part, RunOptions):
            part.ranges = dict(ranges)
