"""Options of a recipe: one flat namespace from default < YAML file < command line.

Every recipe is called as `recipes/X.py [config.yaml] [--key value ...]`. The options are plain dataclasses;
transformers' `HfArgumentParser` turns each field into an argparse option, so that a value from YAML and one from
the command line pass through the same type check. Chosen over hydra, jsonargparse and pydantic because
`TrainingArguments` is itself such a dataclass, and a second schema beside it would drift.

Unlike `HfArgumentParser.parse_yaml_file`, the values of a YAML file are checked (`learning_rate: 2e-5` is a string to
YAML), an unknown key is refused with the nearest known name, and all faults are shown at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn, get_type_hints

import yaml
from transformers import HfArgumentParser, TrainingArguments

from nlpxfer.errors import ConfigError, nearest

logger = logging.getLogger(__name__)

REFUSED_OPTIONS = {
    "hub_token": "a token on the command line stays in the shell's history; set HF_TOKEN or run `hf auth login`",
    "hub_strategy": "nlpxfer pushes once, at the end, and verifies the push",
    "hub_always_push": "nlpxfer pushes once, at the end, and verifies the push",
    "hub_revision": "nlpxfer pushes to the main branch",
    "deepspeed": "use FSDP2 instead: recipes/configs/accelerate/fsdp2.yaml",
    "auto_find_batch_size": "it silently shrinks the effective batch; lower per_device_train_batch_size and raise "
    "gradient_accumulation_steps by the same factor",
    "remove_unused_columns": "nlpxfer passes teacher logits and weights beside the model's inputs",
    "enable_jit_checkpoint": "nlpxfer saves a checkpoint on SIGTERM and SIGINT by itself and exits with 75",
    "length_column_name": "nlpxfer knows the length of each row",
    "label_names": "labels come from label_column",
    "logging_nan_inf_filter": "nlpxfer stops at the first loss that is not finite",
    "prediction_loss_only": "metrics need predictions",
    "bf16_full_eval": "evaluation uses the precision of training, and the final scores are measured in float32",
    "fp16_full_eval": "evaluation uses the precision of training, and the final scores are measured in float32",
    "eval_accumulation_steps": "predictions already leave the device batch by batch",
    "eval_do_concat_batches": "predictions are always whole",
    "eval_use_gather_object": "predictions are always gathered by nlpxfer",
    "batch_eval_metrics": "metrics are computed from all predictions",
    "include_for_metrics": "metrics are computed from logits and labels",
    "include_num_input_tokens_seen": "tokens are always counted without padding: see cost.tokens in report.json",
    "neftune_noise_alpha": "it is meant for generation, and is not supported",
    "local_rank": "the launcher sets it",
    "do_train": "a recipe always trains",
    "do_eval": "a recipe always evaluates",
    "do_predict": "use save_predictions",
    "use_cache": "classification has no generation cache",
    "parallelism_config": "only data parallelism and FSDP2 are supported",
    "restore_callback_states_from_checkpoint": "resuming always restores the state of the run",
    "ignore_data_skip": "a resumed run must see the rows that the interrupted one had not seen",
    "save_on_each_node": "only the first process writes",
}
"""Fields of `TrainingArguments` that nlpxfer would have to ignore, each with the reason and what to do instead."""


def option(default: Any = dataclasses.MISSING, help: str = "", **kwargs: Any) -> Any:  # noqa: A002, ANN401
    """A dataclass field with its help text, as `HfArgumentParser` reads it."""
    return field(default=default, metadata={"help": help, **kwargs})


def require(faults: list[str], condition: bool, fault: str) -> None:
    """Note a fault unless the condition holds."""
    if not condition:
        faults.append(fault)


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Where the rows come from."""

    dataset_name: str | None = option(None, "Bundled data set (debian-sections), local folder, or Hub id.")
    dataset_config_name: str | None = option(None, "Configuration of a Hub data set.")
    train_file: str | None = option(None, "Training rows: csv, tsv, json, jsonl or parquet.")
    validation_file: str | None = option(None, "Validation rows; without it a stratified share of the training rows.")
    test_file: str | None = option(None, "Test rows; without it a stratified share of the training rows.")
    text_column: str = option("text", "Column with the text.")
    text_pair_column: str | None = option(None, "Column with a second text, for tasks on pairs.")
    label_column: str = option("label", "Column with the label name.")
    validation_share: float = option(0.1, "Share of the training rows held out if there is no validation file.")
    test_share: float = option(0.1, "Share of the training rows held out if there is no test file.")
    max_length: int = option(128, "Longest input in tokens; longer texts are cut at the end.")
    max_train_samples: int | None = option(None, "Train on a stratified sample of this many rows.")
    drop_leaks: bool = option(False, "Drop training rows that also stand in validation or test.")
    data_split_seed: int = option(42, "Seed of splits and samples; apart from `seed`, so that seeds share their data.")

    def __post_init__(self) -> None:
        faults: list[str] = []
        require(faults, self.max_length >= 4, f"max_length: {self.max_length} is too small; want at least 4")
        for name in ("validation_share", "test_share"):
            value = getattr(self, name)
            require(faults, 0 < value < 0.5, f"{name}: {value} is not between 0 and 0.5")
        require(
            faults,
            self.max_train_samples is None or self.max_train_samples > 0,
            f"max_train_samples: {self.max_train_samples} is not positive",
        )
        require(
            faults,
            not (self.dataset_name and self.train_file),
            "dataset_name and train_file: give one of the two, not both",
        )
        if faults:
            raise ConfigError.from_faults(faults)


@dataclass(kw_only=True)
class RunOptions(TrainingArguments):
    """How to train: every field of transformers' `TrainingArguments`, with nlpxfer's defaults and additions."""

    output_dir: str | None = option(None, "Folder for the model and the report. Default: runs/<recipe>.")
    overwrite: bool = option(False, "Replace what an earlier run left in output_dir.")
    num_seeds: int = option(1, "Repeat with seed, seed+1, ... and report mean and spread; the first model is saved.")
    control_arm: bool = option(True, "Also measure the same budget without the transfer.")
    linear_probe: bool = option(True, "Start a new head from a linear probe on frozen features (LP-FT).")
    freeze_embeddings: bool = option(True, "Keep the embedding tables as they were pretrained.")
    pooling: Literal["own", "mean"] = option("own", "Which state the head reads: the model's own, or the mean.")
    early_stopping_patience: int = option(0, "Stop after this many evaluations without a better score; 0: never.")
    save_predictions: bool = option(False, "Write predictions/validation.jsonl and predictions/test.jsonl.")
    num_threads: int | None = option(None, "CPU threads per process. Default: all cores, shared by local processes.")
    allow_topology_change: bool = option(False, "Resume with another number of processes or batch size.")

    bf16: bool | None = option(None, "Train in bfloat16. Default: where a measurement finds it faster.")
    learning_rate: float = option(1e-4, "Peak learning rate of AdamW.")
    num_train_epochs: float = option(3.0, "Passes over the training rows.")
    warmup_steps: float = option(0.1, "Warm-up: a share of all steps if below 1, else a number of steps.")
    weight_decay: float = option(0.01, "Weight decay of AdamW.")
    per_device_train_batch_size: int = option(32, "Rows per process and micro-batch.")
    per_device_eval_batch_size: int = option(64, "Rows per process when predicting.")
    eval_strategy: str = option("epoch", "When to evaluate on the validation rows.", choices=["no", "steps", "epoch"])
    save_strategy: str = option("epoch", "When to save a checkpoint.", choices=["no", "steps", "epoch", "best"])
    save_total_limit: int | None = option(2, "Checkpoints to keep: the best and the newest.")
    load_best_model_at_end: bool = option(True, "Keep the weights with the best validation score.")
    metric_for_best_model: str | None = option("accuracy", "Validation score that chooses the best weights.")
    logging_steps: float = option(50, "Steps between two log lines.")
    train_sampling_strategy: str = option(
        "group_by_length",
        "Rows of like length in one batch, or random batches.",
        choices=["group_by_length", "random"],
    )
    disable_tqdm: bool | None = option(None, "No progress bar. Default: quiet when not on a terminal.")
    logging_nan_inf_filter: bool = option(False, "Always off.")
    remove_unused_columns: bool = option(False, "Always off.")
    max_grad_norm: float = option(1.0, "Gradient norm above which gradients are scaled down; 0: never.")

    def __post_init__(self) -> None:
        self._check()
        self.bf16_chosen_by = "user" if self.bf16 is not None else "measured"
        self.wanted_bf16 = self.bf16
        if self.bf16 is None:
            self.bf16 = False
        if self.disable_tqdm is None:
            self.disable_tqdm = not sys.stderr.isatty()
        if not _has_accelerator() and not self.use_cpu:
            self.use_cpu = True
        super().__post_init__()

    def _check(self) -> None:
        faults: list[str] = []
        metrics = ("accuracy", "macro_f1", "loss")
        require(faults, self.num_seeds >= 1, f"num_seeds: {self.num_seeds} is below 1")
        require(faults, self.num_train_epochs > 0, f"num_train_epochs: {self.num_train_epochs} is not positive")
        require(faults, self.learning_rate > 0, f"learning_rate: {self.learning_rate} is not positive")
        require(faults, self.weight_decay >= 0, f"weight_decay: {self.weight_decay} is negative")
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            require(faults, getattr(self, name) >= 1, f"{name}: {getattr(self, name)} is below 1")
        require(faults, self.num_threads is None or self.num_threads >= 1, f"num_threads: {self.num_threads} is below 1")
        require(faults, self.early_stopping_patience >= 0, "early_stopping_patience: it cannot be negative")
        metric = (self.metric_for_best_model or "").removeprefix("eval_")
        known = ", ".join(metrics)
        require(faults, metric in metrics, f"metric_for_best_model: {metric!r} is not one of {known}")
        resume = self.resume_from_checkpoint
        require(
            faults,
            resume is None or str(resume).lower() in ("true", "false"),
            f"resume_from_checkpoint: {resume!r} is not true or false; nlpxfer resumes the run in output_dir",
        )
        if self.early_stopping_patience:
            require(faults, self.eval_strategy != "no", "early_stopping_patience: needs eval_strategy steps or epoch")
        if self.push_to_hub:
            require(faults, bool(self.hub_model_id), "push_to_hub: needs hub_model_id, such as --hub_model_id team/name")
        if faults:
            raise ConfigError.from_faults(faults)

    @property
    def resume(self) -> bool:
        """Whether to go on with the interrupted run in `output_dir`."""
        return str(self.resume_from_checkpoint).lower() == "true"


def _has_accelerator() -> bool:
    import torch

    return torch.accelerator.is_available()


class _Parser(HfArgumentParser):
    """An argparse parser that raises its complaint instead of printing a long usage and leaving."""

    def error(self, message: str) -> NoReturn:
        raise argparse.ArgumentError(None, message)


def parse(types: Sequence[type], argv: Sequence[str] | None = None) -> tuple[Any, ...]:
    """Read the options of a recipe.

    Args:
        types: Dataclasses whose fields together are the options; no two share a field.
        argv: Words of the command line without the program's name; default `sys.argv[1:]`. The first may be a YAML
            file with flat keys.

    Returns:
        One instance of each type, in the order given.

    Raises:
        ConfigError: Unknown, misspelt, doubled or ill-typed options, and values outside their range: all of them.
        SystemExit: After `--help`.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    parser = _Parser(list(types), allow_abbrev=False, add_help=False)
    if any(word in ("-h", "--help") for word in words):
        parser.prog = f"{Path(sys.argv[0]).name} [config.yaml]"
        sys.stdout.write(parser.format_help())
        raise SystemExit(0)
    faults: list[str] = []
    given: dict[str, tuple[list[str], str]] = {}
    if words and not words[0].startswith("-"):
        path = words.pop(0)
        given.update({key: (values, f" (in {Path(path).name})") for key, values in _read_yaml(path).items()})
    given.update({key: (values, "") for key, values in _read_words(words, faults).items()})
    known = {f.name for cls in types for f in dataclasses.fields(cls) if f.init}
    hints = {name: hint for cls in types for name, hint in get_type_hints(cls).items()}
    for key, (values, where) in given.items():
        if not values and (hints.get(key) in (bool, bool | None) or key == "resume_from_checkpoint"):
            given[key] = (["true"], where)
    parsed = _check_each(parser, given, known, faults)
    return _build(types, parsed, faults)


def _read_yaml(path: str) -> dict[str, list[str]]:
    if not Path(path).is_file():
        beside = [str(p) for p in Path(path).parent.glob("*.yaml")] if Path(path).parent.is_dir() else []
        raise ConfigError(
            f"There is no configuration file {path}.",
            why="the first word of a recipe's command line is a YAML file or an option that starts with --",
            available=beside,
        )
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_StrictLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold flat `key: value` lines, but holds a {type(values).__name__}.")
    return {str(key): _as_words(value) for key, value in values.items() if value is not None}


class _StrictLoader(yaml.SafeLoader):
    """A safe YAML loader that refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)  # type: ignore[no-untyped-call]
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _as_words(value: object) -> list[str]:
    if isinstance(value, bool):
        return [str(value).lower()]
    if isinstance(value, list):
        return [word for item in value for word in _as_words(item)]
    if isinstance(value, dict):
        return [json.dumps(value)]
    return [str(value)]


def _read_words(words: Sequence[str], faults: list[str]) -> dict[str, list[str]]:
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
    return given


def _check_each(
    parser: _Parser, given: dict[str, tuple[list[str], str]], known: set[str], faults: list[str]
) -> dict[str, Any]:
    parsed: dict[str, Any] = {}
    for key, (values, where) in given.items():
        if key not in known:
            close = nearest(key, known)
            faults.append(f"{key}: unknown option{where}" + (f"; did you mean {close}?" if close else ""))
        elif key in REFUSED_OPTIONS:
            faults.append(f"{key}: not supported{where}: {REFUSED_OPTIONS[key]}")
        else:
            try:
                words = [f"--{key}={values[0]}"] if len(values) == 1 else [f"--{key}", *values]
                namespace, rest = parser.parse_known_args(words)
                if rest:
                    raise argparse.ArgumentError(None, f"takes one value, but got {' '.join(values)}")
                value = getattr(namespace, key)
                if isinstance(value, float) and not math.isfinite(value):
                    raise argparse.ArgumentError(None, f"{value} is not a finite number")
                parsed[key] = value
            except argparse.ArgumentError as error:
                message = str(error.message).partition(": ")[2] if "argument --" in str(error) else str(error)
                faults.append(f"{key}: {message}{where}")
    return parsed


def _build(types: Sequence[type], parsed: dict[str, Any], faults: list[str]) -> tuple[Any, ...]:
    built: list[Any] = []
    for cls in types:
        names = {f.name for f in dataclasses.fields(cls) if f.init}
        try:
            built.append(cls(**{key: value for key, value in parsed.items() if key in names}))
        except (ValueError, TypeError) as error:
            faults += (error.faults or (error.what,)) if isinstance(error, ConfigError) else (str(error),)
    if faults:
        raise ConfigError.from_faults(faults, fix="--help lists all options")
    return tuple(built)


def resolved(*options: object) -> dict[str, Any]:
    """All options as one flat, JSON-ready dictionary, without tokens.

    Raises:
        TypeError: An argument is not a dataclass instance.
    """
    flat: dict[str, Any] = {}
    for part in options:
        if not dataclasses.is_dataclass(part) or isinstance(part, type):
            raise TypeError(f"expected a dataclass instance, got {type(part).__name__}")
        for f in dataclasses.fields(part):
            if f.init and f.name != "hub_token":
                flat[f.name] = _plain(getattr(part, f.name))
    return flat


def _plain(value: Any) -> Any:  # noqa: ANN401
    if isinstance(value, (str, int, float, bool)) or value is None:
        return getattr(value, "value", value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return str(getattr(value, "value", value))


def local_processes() -> int:
    """Processes of this run on this machine, as the launcher says (1 without one)."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
