"""The start of a run: everything that can be refused is refused, and the data is loaded, before any work is done."""

from __future__ import annotations

import functools
import gc
import logging
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TextIO

import torch

from nlpxfer.checkpoint.save import check_output_folder, refuse_inputs_below
from nlpxfer.config import DataOptions, RunOptions, resolved
from nlpxfer.config.augmentation import Augmentation
from nlpxfer.data.folds import make_folds
from nlpxfer.data.load import DataRequest, load_data
from nlpxfer.errors import ConfigError, ResumeError
from nlpxfer.evaluate.selective import refuse_unprovable
from nlpxfer.hub import check_push_request
from nlpxfer.problem import BEST, METRICS, REGRESSION, SINGLE_LABEL, ProblemType
from nlpxfer.report.report import REPORT_FILE
from nlpxfer.run import Run
from nlpxfer.train.launch import (
    check_process_count,
    from_main,
    leave_at_exit,
    on_main,
    use_threads,
    wait_for_everyone,
)
from nlpxfer.train.precision import Precision, choose_precision
from nlpxfer.train.reporters import check_reporters
from nlpxfer.train.study import check_search_installed

logger = logging.getLogger(__name__)

BUNDLED_DATA = "debian-sections"
"""What a recipe trains on if no data is given."""


@contextmanager
def start_run(
    recipe: str,
    data_options: DataOptions,
    options: RunOptions,
    *others: Any,  # noqa: ANN401
    searches: bool = False,
) -> Iterator[Run]:
    """Check everything that can be checked before the work starts, then load the data.

    Args:
        recipe: Name of the method; the default output folder is `runs/<recipe>`.
        data_options: Where the rows come from.
        options: How to train.
        others: Further option dataclasses, for run.json; that with `unlabelled_file` says which texts have no labels.
        searches: Whether the recipe calls `Run.search`; options given as ranges are refused otherwise.

    Raises:
        LaunchError: Fewer processes run than were asked for.
        OutputExistsError: The output folder is in use, or holds what the run reads.
        ResumeError: The run to resume is finished.
        ConfigError: `report_to` or a search needs what is not installed; a search is not for this recipe, or folds not
            for these rows; the validation rows cannot show `abstain_precision`; or an option is
            not for this kind of task.
        PushError: A later push could not work.
        DataError, LabelError: The data cannot be used.
    """
    started = time.perf_counter()
    if options.num_folds and data_options.augmentation:
        raise ConfigError("num_folds: edited copies of a held-out row would be learnt from; leave augmentation out.")
    _set_imports_aside()
    _show_progress(options)
    device = options.device  # starts the process group, or takes that of the run before
    leave_at_exit()
    check_process_count()
    threads = use_threads(options.num_threads)
    folder = Path(options.chosen_output_dir or f"runs/{recipe}")
    options.output_dir = str(folder)
    data_options = _with_bundled_data(data_options)
    config = resolved(data_options, options, *others)
    if options.resume and (folder / REPORT_FILE).is_file():
        raise ResumeError(
            f"The run in {folder} is finished: there is nothing to resume.", fix="another --output_dir, or --overwrite"
        )
    resumable = "resume_from_checkpoint" not in options.without_effect
    check_output_folder(folder, overwrite=options.overwrite, resume=options.resume, resumable=resumable)
    refuse_inputs_below(folder, _inputs(config))
    if options.push_to_hub:
        on_main(lambda: check_push_request(str(options.hub_model_id), private=options.is_private))
    check_reporters(options.report_to or ())
    _check_search(recipe, options, searches)
    wait_for_everyone()
    precision = _precision_for_all(options, device)
    options.bf16 = config["bf16"] = precision.bf16
    if options.mixed_precision != "fp16":
        options.mixed_precision = "bf16" if precision.bf16 else "no"
    transfer = next((o for o in others if hasattr(o, "unlabelled_file")), None)
    data = load_data(_request(data_options, transfer))
    _choose_metric(options, data.schema.problem_type)
    config["metric_for_best_model"], config["greater_is_better"] = (
        options.metric_for_best_model,
        options.greater_is_better,
    )
    logger.info(
        "%s: %s rows, %d classes (%s)", recipe, data.facts()["rows"], len(data.schema), data.schema.problem_type
    )
    run = Run(recipe, folder, data, data_options, options, precision, config, started)
    run.checks["threads"] = threads
    _refuse_for_other_tasks(options, data.schema.problem_type)
    if options.abstain_precision is not None:
        refuse_unprovable(options.abstain_precision, len(data.validation))
    if options.num_folds:
        count, seed = options.num_folds, data_options.data_split_seed
        rows, kind = (*run.texts("train"), run.labels("train"), data.schema.names), data.schema.problem_type
        run.folds = make_folds(*rows, count=count, seed=seed, problem_type=kind)
    with run.held:
        yield run


@functools.cache
def _set_imports_aside() -> None:
    """Leave what is there out of later collections: the Trainer asks for several a run, 0.4 s each with the imports.

    Once in a process: what a run leaves behind is garbage, which a second call would keep for ever.
    """
    gc.collect()
    gc.freeze()


def _inputs(config: Mapping[str, Any]) -> dict[str, list[str]]:
    """Option -> the paths, or names that may be paths, of what the run reads."""
    endings, names = ("_name_or_path", "_file"), ("dataset_name", "zero_shot_teacher")
    given = {name: value for name, value in config.items() if value and (name.endswith(endings) or name in names)}
    return {name: value if isinstance(value, list) else [value] for name, value in given.items()}


def _refuse_for_other_tasks(options: RunOptions, problem_type: ProblemType) -> None:
    if options.abstain_precision is not None and problem_type == REGRESSION:
        raise ConfigError("abstain_precision: is for tasks with labels; a number has no probability")
    name = "linear_probe_size"
    if (getattr(options, name) or name in options.ranges) and problem_type != SINGLE_LABEL:
        raise ConfigError(f"{name}: is for tasks with one label per row")


def _choose_metric(options: RunOptions, problem_type: ProblemType) -> None:
    """Choose the best weights by the metric that was asked for, if the task has it, or by the task's own."""
    asked = options.wanted_metric
    if asked is not None and asked.removeprefix("eval_") not in METRICS[problem_type]:
        raise ConfigError(
            f"metric_for_best_model: a task of the kind {problem_type} has no {asked}.",
            available=METRICS[problem_type],
        )
    options.set_best_metric(asked or BEST[problem_type])


def _check_search(recipe: str, options: RunOptions, searches: bool) -> None:
    if not options.num_trials:
        return
    if not searches:
        raise ConfigError(
            f"{', '.join(options.ranges)}: {recipe} does not search options.",
            fix="a value instead of each range, and no num_trials",
        )
    check_search_installed()


def _request(options: DataOptions, transfer: object | None) -> DataRequest:
    of_transfer = ("unlabelled_file", "unlabelled_rows", "mixed_texts")
    known = {f.name for f in fields(DataRequest)} - {"seed", "augmentation", *of_transfer}
    shared = {name: getattr(options, name) for name in known}
    if transfer is not None:
        shared |= {name: getattr(transfer, name) for name in of_transfer}
    return DataRequest(
        **shared,
        seed=options.data_split_seed,
        augmentation=Augmentation.from_options(vars(options)),
    )


def _precision_for_all(options: RunOptions, device: torch.device) -> Precision:
    """One choice for all processes: that of the first."""
    if options.fp16:
        return Precision(False, None, "user: fp16")
    wanted = True if options.mixed_precision == "bf16" else options.wanted_bf16
    return from_main(choose_precision(wanted, device))


class _Terminal(logging.StreamHandler[TextIO]):
    """Writes to what is standard error at the time; nothing once the program has set up logging of its own."""

    @property
    def stream(self) -> TextIO:
        """Where to."""
        return sys.stderr

    @stream.setter
    def stream(self, _: TextIO) -> None:
        """The base class stores that of its making."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to write a record."""
        return not logging.getLogger().handlers and bool(super().filter(record))


def _show_progress(options: RunOptions) -> None:
    """Show what nlpxfer reports, on the first process only, unless the program already set up logging."""
    package = logging.getLogger("nlpxfer")
    if not package.handlers and not logging.getLogger().handlers:
        handler = _Terminal()
        handler.setFormatter(logging.Formatter("%(message)s"))
        package.addHandler(handler)
        package.setLevel(logging.INFO if options.process_index == 0 else logging.ERROR)


def _with_bundled_data(options: DataOptions) -> DataOptions:
    """The options, with the bundled data set if they name no data."""
    if options.dataset_name or options.train_file:
        return options
    logger.info("no data given: using the bundled set %s", BUNDLED_DATA)
    return replace(options, dataset_name=BUNDLED_DATA)
