"""The options of data and training run, their ranges, and what of transformers' options is not supported."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from transformers import TrainingArguments

from nlpxfer.config.augmentation import Augmentation
from nlpxfer.config.long_texts import LongTexts
from nlpxfer.errors import ConfigError
from nlpxfer.problem import LOWER_IS_BETTER, METRICS, SINGLE_LABEL, ProblemType

if TYPE_CHECKING:
    from nlpxfer.config.ranges import Range

REFUSED_OPTIONS = {
    "hub_token": "a token on the command line stays in the shell's history; set HF_TOKEN or run `hf auth login`",
    "hub_strategy": "nlpxfer pushes once, at the end, and verifies the push",
    "hub_always_push": "nlpxfer pushes once, at the end, and verifies the push",
    "hub_revision": "nlpxfer pushes to the main branch",
    "average_tokens_across_devices": "losses are always divided by the rows of all processes",
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
    "save_only_model": "an interrupted run could not go on; a finished one keeps no checkpoints",
    "debug": "nlpxfer stops at the first loss or gradient that is not finite",
}
"""Fields of `TrainingArguments` that nlpxfer would have to ignore, each with the reason and what to do instead."""

NEEDED_SWITCHES: dict[str, tuple[str, object]] = {
    "eval_steps": ("eval_strategy", "steps"),
    "save_steps": ("save_strategy", "steps"),
    "activation_checkpointing_kwargs": ("activation_checkpointing", True),
    "gradient_checkpointing_kwargs": ("gradient_checkpointing", True),
    "liger_kernel_config": ("use_liger_kernel", True),
    "fsdp_config": ("fsdp", None),
    "linear_probe_size": ("linear_probe", True),
    "hub_private_repo": ("push_to_hub", True),
    "dataloader_multiprocessing_context": ("dataloader_num_workers", None),
    "dataloader_persistent_workers": ("dataloader_num_workers", None),
    "run_name": ("report_to", None),
    "project": ("report_to", None),
    "trackio_space_id": ("report_to", None),
    "trackio_bucket_id": ("report_to", None),
    "trackio_static_space_id": ("report_to", None),
}
"""Option -> the switch that it needs, and the value of that (None: any). Without it the option would do nothing."""

DATA_SWITCHES: dict[str, tuple[str, object]] = {
    "head_share": ("long_texts", "head_tail"),
    "window_overlap": ("long_texts", "sliding_window"),
    "max_windows": ("long_texts", "sliding_window"),
    "augmentation_copies": ("augmentation", None),
    "augmentation_share": ("augmentation", None),
}
"""The same for the options of the data."""

ANY_VALUE = {
    "report_to": "a tracker",
    "fsdp": "true",
    "dataloader_num_workers": "2",
    "augmentation": "swap",
    "teacher_file": "FILE",
    "zero_shot_teacher": "MODEL",
    "unlabelled_file": "FILE",
}
"""Switch of which any value will do -> what to type, for the message."""

SCHEDULES_BY_LOSS = ("reduce_lr_on_plateau", "greedy")
"""Those of transformers' schedules of the learning rate that are no function of the step."""

REFUSED_BATCHES = {
    "dispatch_batches": "each process reads its own rows",
    "split_batches": "per_device_train_batch_size counts the rows of one process",
}
"""Parts of `accelerator_config` that would change how the rows are dealt out, each with the reason."""

POOLINGS = ("auto", "own", "mean")
"""What a head may be asked to read."""

LEARNING_RATES = ((512, 3e-4, 3e-5), (768, 5e-5, 5e-6))
"""Up to this hidden size -> default learning rates where all weights learn, and where they learn gently."""
WIDEST_LEARNING_RATES = (2e-5, 2e-6)
"""The same for all wider models."""
STATIC_LEARNING_RATE = 0.01
"""The same for a static model: each token's vector learns from the few rows that it stands in."""
DEFAULT_HEAD_SIZE = 0.02
"""That of a random head: the deviation of its weights in BERT and GPT-2."""
STEPS_FOR_SMALL_HEAD = 60
"""Fewer leave a head that starts small unsure of all answers. With 30 steps (450 rows of clinc150) the validation loss
was 2.9 against 0.6 of a probe of its own size, the accuracy alike; with 75 (800 rows of debian-sections) the loss was
alike and the accuracy 3.5 points higher."""


def default_learning_rate(hidden_size: int, *, gently: bool = False, static: bool = False) -> float:
    """Peak learning rate where all weights of a model of this width learn and none was asked for.

    The wider, the lower: 3e-4 was chosen on validation rows for MiniLM, and is that of ELECTRA-Small; for BERT-Base
    and BERT-Large 5e-5 and 2e-5 are the ends of the published range. Sources: Clark et al. 2020, arXiv:2003.10555,
    table 7; Devlin et al. 2019, arXiv:1810.04805, A.3.

    Args:
        hidden_size: Numbers per token between the layers.
        gently: Whether the head is large from the start, so that a small step of the layers changes the answers.
        static: Whether the model has no layers at all: then neither of the other two counts.

    >>> default_learning_rate(384), default_learning_rate(768), default_learning_rate(384, gently=True)
    (0.0003, 5e-05, 3e-05)
    """
    if static:
        return STATIC_LEARNING_RATE
    known = (rates for widest, *rates in LEARNING_RATES if hidden_size <= widest)
    return next(known, [*WIDEST_LEARNING_RATES])[gently]


_UNSTARTED: ContextVar[bool] = ContextVar("unstarted", default=False)


@contextlib.contextmanager
def unstarted() -> Iterator[None]:
    """Inside, `RunOptions` leave out what transformers makes of them: that waits for the other processes."""
    token = _UNSTARTED.set(True)
    try:
        yield
    finally:
        _UNSTARTED.reset(token)


def option(default: Any = dataclasses.MISSING, help: str = "", **kwargs: Any) -> Any:  # noqa: A002, ANN401
    """A dataclass field with its help text, as `HfArgumentParser` reads it."""
    return field(default=default, metadata={"help": help, **kwargs})


def require(faults: list[str], condition: bool, fault: str) -> None:
    """Note a fault unless the condition holds."""
    if not condition:
        faults.append(fault)


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Where the rows come from.

    Attributes:
        needed_switches: See `DATA_SWITCHES`.
    """

    needed_switches: ClassVar[Mapping[str, tuple[str, object]]] = MappingProxyType(DATA_SWITCHES)

    dataset_name: str | None = option(None, "Bundled data set (debian-sections), local folder, or Hub id.")
    dataset_config_name: str | None = option(None, "Configuration of a Hub data set.")
    train_file: str | None = option(None, "Training rows: csv, tsv, json, jsonl or parquet.")
    validation_file: str | None = option(None, "Validation rows; without it a stratified share of the training rows.")
    test_file: str | None = option(None, "Test rows; without it a stratified share of the training rows.")
    text_column: str = option("text", "Column with the text.")
    text_pair_column: str | None = option(None, "Column with a second text, for tasks on pairs.")
    label_column: str = option("label", "Column with the label's name, a list of labels, or a number.")
    problem_type: Literal["auto", "single_label_classification", "multi_label_classification", "regression"] = option(
        "auto", "What a label is. auto: multi-label if the column holds lists, else one class."
    )
    label_separator: str | None = option(None, "Splits the labels of a row that are one text, as in 'a|b'.")
    min_label_rows: int = option(1, "Multi-label: leave out labels with fewer training rows.")
    validation_share: float = option(0.1, "Share of the training rows held out if there is no validation file.")
    test_share: float = option(0.1, "Share of the training rows held out if there is no test file.")
    max_length: int = option(128, "Longest input in tokens; for longer texts see long_texts.")
    long_texts: Literal["head", "head_tail", "sliding_window"] = option(
        "head", "What is read of longer texts: the beginning, beginning and end, or all of it in windows."
    )
    head_share: float | None = option(None, "head_tail: share of max_length for the beginning. Default: 0.25.")
    window_overlap: int | None = option(
        None, "sliding_window: tokens that windows share at least. Default: a quarter of max_length."
    )
    max_windows: int | None = option(None, "sliding_window: most windows of a text; more leave gaps. Default: 8.")
    max_train_samples: int | None = option(None, "Train on a stratified sample of this many rows.")
    drop_leaks: bool = option(False, "Drop training rows that also stand in validation or test.")
    augmentation: str | None = option(
        None, "Edited copies of the training rows to add: swap, deletion, typo, or several with commas; none."
    )
    augmentation_copies: int | None = option(None, "Copies of each row. Default: 1.")
    augmentation_share: float | None = option(None, "Share of the words that an edit touches. Default: 0.1.")
    data_split_seed: int = option(42, "Seed of splits and samples; apart from `seed`, so that seeds share their data.")

    def __post_init__(self) -> None:
        if self.augmentation == "none":  # what the command line has for null
            object.__setattr__(self, "augmentation", None)
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
        require(
            faults,
            self.dataset_name is not None or self.dataset_config_name is None,
            "dataset_config_name: needs dataset_name",
        )
        for split in ("validation", "test"):
            given = getattr(self, f"{split}_file") and getattr(self, f"{split}_share") != 0.1
            require(faults, not given, f"{split}_share: does nothing beside {split}_file")
        require(faults, self.data_split_seed >= 0, f"data_split_seed: {self.data_split_seed} is negative")
        for settings in (LongTexts, Augmentation):
            try:
                settings.from_options(vars(self))
            except ConfigError as error:
                faults += error.faults
        if faults:
            raise ConfigError.from_faults(faults)


@dataclass(kw_only=True)
class RunOptions(TrainingArguments):
    """How to train: every field of transformers' `TrainingArguments`, with nlpxfer's defaults and additions.

    A recipe that has no use for some of them derives its own class.

    Attributes:
        without_effect: Option -> why it does nothing in this recipe. It is refused where it is given.
        needed_switches: See `NEEDED_SWITCHES`.
        overruled_by: Option -> the option beside which it does nothing.
    """

    without_effect: ClassVar[Mapping[str, str]] = MappingProxyType({})
    needed_switches: ClassVar[Mapping[str, tuple[str, object]]] = MappingProxyType(NEEDED_SWITCHES)
    overruled_by: ClassVar[Mapping[str, str]] = MappingProxyType({"num_train_epochs": "max_steps"})

    output_dir: str | None = option(None, "Folder for the model and the report. Default: runs/<recipe>.")
    overwrite: bool = option(False, "Replace what an earlier run left in output_dir.")
    num_seeds: int = option(1, "Repeat with seed, seed+1, ... and report mean and spread; the first model is saved.")
    control_arm: bool = option(True, "Also measure the same budget without the transfer.")
    linear_probe: bool = option(True, "Start a new head from a linear probe on frozen features (LP-FT).")
    linear_probe_size: float | None = option(
        None,
        "Root mean square to scale the probe's weights down to; 0: not at all. Default: 0.02, if the task allows it.",
    )
    freeze_embeddings: bool = option(True, "Keep the embedding tables as they were pretrained.")
    num_trained_layers: int | None = option(None, "Train only so many top layers and the head. Default: all.")
    layer_decay: float = option(1.0, "Learning rate of a layer over that of the layer above it.")
    gradual_unfreezing: float = option(0.0, "Share of the steps after which all layers learn; they join from the top.")
    l2_sp_weight: float = option(0.0, "a in the penalty a/2 |w - w0|^2 on the way from the start (L2-SP).")
    l2_sp_head_weight: float = option(0.0, "b in the penalty b/2 |w_head|^2 on the head (L2-SP).")
    dropout: float | None = option(0.0, "Dropout while training; null in a YAML file: the model's own.")
    pooling: Literal["auto", "own", "mean"] = option(
        "auto", "State the head reads: the mean for sentence encoders made so, the model's own, or the mean."
    )
    early_stopping_patience: int = option(0, "Stop after this many evaluations without a better score; 0: never.")
    save_predictions: bool = option(False, "Write predictions/validation.jsonl and predictions/test.jsonl.")
    error_report: bool = option(False, "Write errors.json and errors.md, which hold texts of the data.")
    num_folds: int = option(0, "Also train on folds of the training rows, and look for wrong labels; 0: no.")
    abstain_precision: float | None = option(None, "Find the probability from which answers are right this often.")
    num_threads: int | None = option(None, "CPU threads per process. Default: all cores, shared by local processes.")
    allow_topology_change: bool = option(False, "Resume with another number of processes or batch size.")
    num_trials: int = option(0, "Trials of a search over the options that are given as ranges; 0: no search.")
    search_timeout: float | None = option(None, "Seconds after which a search starts no further trial.")

    # None until the run has measured what is faster
    bf16: bool | None = option(  # type: ignore[assignment]
        None, "Train in bfloat16. Default: where a measurement finds it faster."
    )
    # None where it was not given: the default is that of the model, the adapter or the student
    learning_rate: float | None = option(  # type: ignore[assignment]
        None, "Peak learning rate of AdamW. Default: by the model's width; adapters, static students: their own."
    )
    num_train_epochs: float = option(2.0, "Passes over the training rows.")
    warmup_steps: float = option(0.1, "Warm-up: a share of all steps if below 1, else a number of steps.")
    weight_decay: float = option(0.01, "Weight decay of AdamW.")
    per_device_train_batch_size: int = option(32, "Rows per process and micro-batch.")
    per_device_eval_batch_size: int = option(64, "Rows per process when predicting.")
    eval_strategy: str = option("epoch", "When to evaluate on the validation rows.", choices=["no", "steps", "epoch"])
    save_strategy: str = option("epoch", "When to save a checkpoint.", choices=["no", "steps", "epoch", "best"])
    save_total_limit: int | None = option(2, "Checkpoints to keep: the best and the newest.")
    load_best_model_at_end: bool = option(True, "Keep the weights with the best validation score.")
    metric_for_best_model: str | None = option(
        None,
        "Validation score that chooses the best weights. Default: accuracy; multi-label: micro_f1, numbers: loss.",
    )
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
        if faults := self._faults():
            raise ConfigError.from_faults(faults)
        self.chosen_output_dir = self.output_dir  # transformers puts a name of its own where there is none
        self.wanted_bf16 = self.bf16
        self.wanted_metric = self.metric_for_best_model
        self.set_best_metric(self.wanted_metric or "accuracy")
        self.wanted_learning_rate = self.learning_rate
        if self.learning_rate is None:
            self.learning_rate = WIDEST_LEARNING_RATES[0]  # until the model is known
        self.ranges: dict[str, Range] = {}
        """Options that a search varies; `parse` puts them here."""
        if self.fsdp in ("true", "false"):  # transformers asks for the switch, which its parser leaves a text
            self.fsdp = self.fsdp == "true"  # type: ignore[assignment]
        if self.bf16 is None:
            self.bf16 = False
        if self.disable_tqdm is None:
            self.disable_tqdm = not sys.stderr.isatty()
        if not _has_accelerator() and not self.use_cpu:
            self.use_cpu = True
        if _UNSTARTED.get():
            return
        try:
            super().__post_init__()  # type: ignore[no-untyped-call]
        except OSError as error:  # a file that an option names
            raise ConfigError(
                f"{error.filename or 'a file that an option names'}: {error.strerror or error}"
            ) from error

    def learning_rate_or(self, default: float) -> float:
        """The learning rate, or this one if none was given."""
        return default if self.wanted_learning_rate is None else float(self.learning_rate or 0)

    def probe_size(self, problem_type: ProblemType, rows: int) -> float:
        """Root mean square that a probe's weights are scaled down to; 0: they stay.

        By default small where more than the head learns, only the order of the answers counts, and there are enough
        steps to grow sure again.

        Args:
            problem_type: What the labels are.
            rows: Training rows with labels.
        """
        if self.linear_probe_size is not None:
            return self.linear_probe_size
        enough = self.training_steps(rows) >= STEPS_FOR_SMALL_HEAD
        small = problem_type == SINGLE_LABEL and self.num_trained_layers != 0 and enough
        return DEFAULT_HEAD_SIZE if small else 0.0

    def steps_per_epoch(self, rows: int) -> int:
        """Optimizer steps of one epoch over as many rows, over all processes, as `Trainer` counts them."""
        processes: int = self.world_size
        batches = rows / (self.per_device_train_batch_size * processes)
        whole = math.floor(batches) if self.dataloader_drop_last else math.ceil(batches)
        return max(1, math.ceil(whole / self.gradient_accumulation_steps))

    def training_steps(self, rows: int) -> int:
        """Optimizer steps of a whole training on as many rows, unless it stops early."""
        if self.max_steps > 0:
            return self.max_steps
        return math.ceil(self.steps_per_epoch(rows) * self.num_train_epochs)

    def ends_of(self, name: str, value: Any) -> tuple[Any, ...]:  # noqa: ANN401 - of any option
        """The values between which those of an option lie: the ends of its range if it is searched, else its value."""
        return self.ranges[name].ends if name in self.ranges else (value,)

    @property
    def is_private(self) -> bool:
        """Whether a new repository on the Hub is private: yes, unless the user says otherwise."""
        return True if self.hub_private_repo is None else bool(self.hub_private_repo)

    def set_best_metric(self, name: str) -> None:
        """Choose the best weights by this validation score."""
        self.metric_for_best_model = name.removeprefix("eval_")
        self.greater_is_better = self.metric_for_best_model not in LOWER_IS_BETTER

    def _faults(self) -> list[str]:
        """What is wrong with the values, one sentence each."""
        faults: list[str] = []
        for f in dataclasses.fields(self):
            default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
            if f.name in REFUSED_OPTIONS and f.name != "do_eval":  # which transformers itself sets
                fault, value = f"{f.name}: not supported: {REFUSED_OPTIONS[f.name]}", getattr(self, f.name)
                require(faults, value == default or not (value or default), fault)  # "" becomes [] in a copy
            elif f.name in self.without_effect:
                fault = f"{f.name}: has no effect here: {self.without_effect[f.name]}"
                require(faults, getattr(self, f.name) == default, fault)
        for name, choices in (
            ("pooling", POOLINGS),
            ("train_sampling_strategy", ("group_by_length", "random")),
        ):
            value = getattr(self, name)
            require(faults, value in choices, f"{name}: {value!r} is not one of {', '.join(choices)}")
        for name in ("seed", "data_seed"):
            value = getattr(self, name) or 0
            require(faults, 0 <= value < 2**32 - self.num_seeds, f"{name}: {value} is not between 0 and 2^32")
        for name in ("adam_beta1", "adam_beta2", "label_smoothing_factor"):
            require(faults, 0 <= getattr(self, name) < 1, f"{name}: {getattr(self, name)} is not in [0, 1)")
        require(faults, self.num_seeds >= 1, f"num_seeds: {self.num_seeds} is below 1")
        require(faults, self.max_steps == -1 or self.max_steps > 0, f"max_steps: {self.max_steps} is not positive")
        require(faults, self.num_folds == 0 or self.num_folds >= 2, f"num_folds: {self.num_folds} is not 0 or above 1")
        sure = self.abstain_precision
        require(faults, sure is None or 0 < sure < 1, f"abstain_precision: {sure} is not between 0 and 1")
        scored = self.eval_strategy != "no" or not self.load_best_model_at_end
        require(faults, scored, "eval_strategy: no keeps no best weights; also give --load_best_model_at_end false")
        workers = self.dataloader_num_workers
        require(faults, workers >= 0, f"dataloader_num_workers: {workers} is negative")
        limit = self.save_total_limit
        require(faults, limit is None or limit >= 1, f"save_total_limit: {limit} is below 1")
        require(faults, self.max_grad_norm >= 0, f"max_grad_norm: {self.max_grad_norm} is negative")
        require(faults, self.num_train_epochs > 0, f"num_train_epochs: {self.num_train_epochs} is not positive")
        require(faults, self.dropout is None or 0 <= self.dropout < 1, f"dropout: {self.dropout} is not in [0, 1)")
        layers = self.num_trained_layers
        require(faults, layers is None or layers >= 0, f"num_trained_layers: {layers} is negative")
        require(faults, 0 < self.layer_decay <= 1, f"layer_decay: {self.layer_decay} is not above 0 and up to 1")
        share = self.gradual_unfreezing
        require(faults, 0 <= share <= 1, f"gradual_unfreezing: {share} is not between 0 and 1")
        schedule = getattr(self.lr_scheduler_type, "value", self.lr_scheduler_type)
        fault = f"gradual_unfreezing: does not work with lr_scheduler_type {schedule}, whose rates follow the loss"
        require(faults, not share or schedule not in SCHEDULES_BY_LOSS, fault)
        for name, plain in (("layer_decay", 1), ("gradual_unfreezing", 0)):
            fault = f"{name}: does nothing beside num_trained_layers 0, where only the head learns"
            require(faults, layers != 0 or getattr(self, name) == plain, fault)
        for name in ("l2_sp_weight", "l2_sp_head_weight"):
            value = getattr(self, name)
            require(faults, 0 <= value < math.inf, f"{name}: {value} is not a finite number of at least 0")
            require(faults, not (value and self.fp16), f"{name}: does not work with fp16; use bf16")
        rate, decay = self.learning_rate, self.weight_decay
        require(faults, rate is None or rate > 0, f"learning_rate: {rate} is not positive")
        size = self.linear_probe_size
        require(faults, size is None or size >= 0, f"linear_probe_size: {size} is negative")
        require(faults, decay is None or decay >= 0, f"weight_decay: {decay} is negative")
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            require(faults, getattr(self, name) >= 1, f"{name}: {getattr(self, name)} is below 1")
        require(
            faults, self.num_threads is None or self.num_threads >= 1, f"num_threads: {self.num_threads} is below 1"
        )
        require(faults, self.num_trials >= 0, f"num_trials: {self.num_trials} is negative")
        timeout = self.search_timeout
        require(faults, timeout is None or timeout > 0, f"search_timeout: {timeout} is not positive")
        require(faults, timeout is None or self.num_trials != 0, "search_timeout: has no effect without num_trials")
        require(faults, self.early_stopping_patience >= 0, "early_stopping_patience: it cannot be negative")
        metric = (self.metric_for_best_model or "accuracy").removeprefix("eval_")
        metrics = dict.fromkeys(name for names in METRICS.values() for name in names)
        require(faults, metric in metrics, f"metric_for_best_model: {metric!r} is not one of {', '.join(metrics)}")
        direction = metric not in LOWER_IS_BETTER
        given = self.greater_is_better
        fault = f"greater_is_better: {given} is wrong for {metric}; leave it out"
        require(faults, metric not in metrics or given in (None, direction), fault)
        resume = self.resume_from_checkpoint
        require(
            faults,
            resume is None or str(resume).lower() in ("true", "false"),
            f"resume_from_checkpoint: {resume!r} is not true or false; nlpxfer resumes the run in output_dir",
        )
        if self.early_stopping_patience:
            require(faults, self.eval_strategy != "no", "early_stopping_patience: needs eval_strategy steps or epoch")
        alone = os.environ.get("WORLD_SIZE", "1") == "1"
        require(
            faults, not (self.ddp_backend and alone), "ddp_backend: needs several processes, but this is the only one"
        )
        parts = _parts(self.accelerator_config)
        for name, reason in REFUSED_BATCHES.items():
            require(faults, not parts.get(name), f"accelerator_config: {name} is not supported: {reason}")
        if self.push_to_hub:
            require(
                faults, bool(self.hub_model_id), "push_to_hub: needs hub_model_id, such as --hub_model_id team/name"
            )
        return faults

    @property
    def idle(self) -> frozenset[str]:
        """Options that do nothing as things stand; they are left out of run.json."""
        return frozenset(self.without_effect)

    @property
    def resume(self) -> bool:
        """Whether to go on with the interrupted run in `output_dir`."""
        return str(self.resume_from_checkpoint).lower() == "true"


def _parts(config: Any) -> Mapping[str, Any]:  # noqa: ANN401 - a mapping, JSON, a file of JSON, or what became of them
    """The parts of an `accelerator_config`; none of one that transformers refuses."""
    if isinstance(config, str):
        try:
            config = json.loads(config if config.startswith("{") else Path(config).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
    return config if isinstance(config, Mapping) else getattr(config, "__dict__", {})


def _has_accelerator() -> bool:
    import torch

    return torch.accelerator.is_available()


def resolved(*options: object) -> dict[str, Any]:
    """All options as one flat, JSON-ready dictionary, without tokens.

    Raises:
        TypeError: An argument is not a dataclass instance.
    """
    flat: dict[str, Any] = {}
    for part in options:
        if not dataclasses.is_dataclass(part) or isinstance(part, type):
            raise TypeError(f"expected a dataclass instance, got {type(part).__name__}")
        idle = part.idle if isinstance(part, RunOptions) else frozenset()
        for f in dataclasses.fields(part):
            if f.init and f.name != "hub_token" and f.name not in idle:
                flat[f.name] = plain_value(getattr(part, f.name))
    return flat


def plain_value(value: Any) -> Any:  # noqa: ANN401
    """The value of an option as JSON has it."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # strict JSON has no infinity
    if isinstance(value, (str, int, float, bool)) or value is None:
        return getattr(value, "value", value)
    if isinstance(value, (list, tuple)):
        return [plain_value(item) for item in value]
    if isinstance(value, dict):
        return {str(key): plain_value(item) for key, item in value.items()}
    return str(getattr(value, "value", value))
