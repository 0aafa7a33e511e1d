"""The trials of a search: short-lived arms that are scored on the validation rows and leave nothing but their score.

A trial is prepared and trained by the same code as an arm. Its score is what decides about an arm's weights too: the
best evaluation where `load_best_model_at_end` is on, the last one otherwise. It saves no checkpoints of its own, only
the one of an interruption, and sends nothing to trackers: report.json holds all trials.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils.memory import clear_device_cache
from tqdm.auto import tqdm
from transformers.trainer_utils import SaveStrategy

from nlpxfer.checkpoint.load import Checkpoint
from nlpxfer.config import RunOptions
from nlpxfer.config.options import plain_value
from nlpxfer.data.schema import LabelSchema
from nlpxfer.errors import CheckpointError, ConfigError, Interrupted, NlpxferError, NotFiniteError, SearchError
from nlpxfer.evaluate.arms import PreparedArm, Splits, prepare_arm, topology, unwrapped
from nlpxfer.methods.base import Method
from nlpxfer.train.checkpoints import RunIdentity
from nlpxfer.train.launch import is_main_process, wait_for_everyone, world
from nlpxfer.train.search import Judge, Search
from nlpxfer.train.study import Outcome
from nlpxfer.train.trainer import GO_ON, Sampling, check_training

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

FAILURES = (NotFiniteError, ConfigError, CheckpointError, torch.OutOfMemoryError)
"""What the values of a trial can be at fault for."""

Look = Callable[["PreTrainedModel", "PreTrainedTokenizerBase"], None]
Split = Callable[["PreTrainedTokenizerBase"], Splits]


@dataclass(frozen=True, kw_only=True)
class TrialArm:
    """What a trial trains; the fields are the arguments of `train_arm` of these names."""

    build: Callable[[], Checkpoint]
    method: Method
    split: Split
    schema: LabelSchema
    options: RunOptions
    facts: Mapping[str, Any]
    sampling: Sampling = "natural"


def make_trials(search: Search, arm_of: Callable[[Mapping[str, Any]], TrialArm], *, quiet: bool) -> None:
    """Make trials until the search has enough of them.

    Args:
        search: Gives the values and remembers the scores.
        arm_of: From values to what is trained.
        quiet: No progress bar.

    Raises:
        Interrupted: A signal asked to stop; finished trials are kept, and a checkpoint of one that is not.
        SearchError: A trial failed, and there are several processes.
    """
    total, started = search.plan.num_trials, time.perf_counter()
    hidden = quiet or not is_main_process()
    with tqdm(total=total, initial=search.done, desc="search", unit="trial", disable=hidden) as bar:
        while search.wants_more():
            number, values = search.ask()
            shown = ", ".join(f"{name} {_short(value)}" for name, value in values.items())
            logger.info("trial %d of %d: %s", number, total, shown)
            outcome, asked = _tried(number, partial(arm_of, values), search)
            best = search.tell(outcome)
            leader = "none complete yet" if best is None else f"best {best[1]:.4f} (trial {best[0]})"
            left = (time.perf_counter() - started) / (number - search.done) * (total - number)
            facts = (number, total, _ended(outcome, search.plan.metric), leader, left)
            logger.info("trial %d of %d: %s; %s; about %.0f s left", *facts)
            bar.set_postfix_str(leader)
            bar.update()
            if asked:
                told = f"The run was asked to stop when trial {number} of {total} had ended; its score is kept."
                raise Interrupted(told, fix=GO_ON)


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(plain_value(value))


def _ended(outcome: Outcome, metric: str) -> str:
    reason = f" ({outcome.reason})" if outcome.reason else ""
    score = "" if outcome.value is None else f", {metric} {outcome.value:.4f}"
    return f"{outcome.state}{reason}{score}, {outcome.seconds:.0f} s"


def _tried(number: int, arm: Callable[[], TrialArm], search: Search) -> tuple[Outcome, bool]:
    """A trial from the first build to its score; what its values are at fault for makes it a failed one.

    Gives too whether a signal asked to stop when there was nothing left to train.
    """
    asked = False
    start, folder = time.perf_counter(), search.folder / f"trial-{number}"
    try:
        outcome, asked = _train(number, arm(), search, folder)
    except FAILURES as error:
        reason = error.what if isinstance(error, NlpxferError) else str(error).partition("\n")[0]
        seconds = time.perf_counter() - start
        outcome = Outcome(state="failed", value=None, seconds=seconds, steps=None, reason=reason)
        if world()[1] > 1:
            search.note(outcome)
            raise SearchError(
                f"Trial {number} failed: {reason}",
                why="with several processes the search cannot go on by itself: they may stand at unlike steps",
                fix=f"{GO_ON} goes on with the next trial",
            ) from error
    clear_device_cache(garbage_collection=True)
    wait_for_everyone()
    if is_main_process():
        shutil.rmtree(folder, ignore_errors=True)
    return outcome, asked


def short_run(arm: TrialArm, folder: Path, *, steps: int, look: Look | None = None) -> float:
    """Train an arm for so many optimizer steps; gives its validation score and leaves nothing.

    The score is that of `metric_for_best_model`: the best evaluation where `load_best_model_at_end` is on, or else the
    last one. The learning rate's schedule is that of a run of this length.

    Args:
        arm: What is trained.
        folder: For the time of the training.
        steps: Optimizer steps.
        look: Called with the trained model, as it is after the last step, and its tokenizer.

    Raises:
        NotFiniteError: The training diverged.
        Interrupted: A signal asked to stop.
    """
    options = _options_in(folder, arm)
    options.max_steps, options.eval_delay = steps, 0  # it is scored at its end, which may be before the first one
    prepared = _prepared(arm, options, folder.name)
    trainer = prepared.trainer
    with contextlib.suppress(Interrupted):  # its message promises a checkpoint, which nothing here goes on from
        trainer.fit(resume=False)
    if trainer.stop.asked:
        ended = f"The run was asked to stop when {folder.name} was trained; nothing of it is kept."
        raise Interrupted(ended, fix=GO_ON)
    name = f"eval_{options.metric_for_best_model}"

    def scores() -> list[tuple[float, float]]:
        return [(line["step"], float(line[name])) for line in trainer.state.log_history if name in line]

    if not scores() or scores()[-1][0] < trainer.state.global_step:
        trainer.evaluate()
    if look is not None:
        arm.method.release_(unwrapped(trainer))
        look(unwrapped(trainer), prepared.checkpoint.tokenizer)
    better = max if options.greater_is_better else min
    found = [score for _, score in scores()]
    clear_device_cache(garbage_collection=True)
    wait_for_everyone()
    if is_main_process():
        shutil.rmtree(folder, ignore_errors=True)
    return better(found) if options.load_best_model_at_end else found[-1]


def _options_in(folder: Path, arm: TrialArm) -> RunOptions:
    """The options of an arm that is trained to be scored, and leaves nothing."""
    arm.method.check(arm.options)
    options = copy.copy(arm.options)
    options.output_dir, options.save_strategy = str(folder), SaveStrategy.NO
    options.report_to, options.push_to_hub, options.disable_tqdm = [], False, True
    return options


def _prepared(arm: TrialArm, options: RunOptions, name: str) -> PreparedArm:
    """The arm, ready to be trained."""
    prepared = prepare_arm(
        build=arm.build,
        method=arm.method,
        split=arm.split,
        schema=arm.schema,
        options=options,
        identity=RunIdentity({**arm.facts, "arm": name, "seed": options.seed}, topology(options)),
        sampling=arm.sampling,
    )
    check_training(prepared.trainer.network, options, len(prepared.trainer.rows))
    return prepared


def _train(number: int, arm: TrialArm, search: Search, folder: Path) -> tuple[Outcome, bool]:
    """Train a trial, and read its score from its evaluations; see `_tried`."""
    options, start = _options_in(folder, arm), time.perf_counter()
    resume = options.resume and folder.is_dir()
    trainer, judge = _prepared(arm, options, f"trial {number}").trainer, Judge(search)
    trainer.add_callback(judge)
    trainer.fit(resume=resume)
    trainer.remove_callback(judge)
    curve, state, keep_best = judge.curve(trainer.state), trainer.state, bool(options.load_best_model_at_end)
    if not curve or (not keep_best and curve[-1][0] < state.global_step / state.max_steps):
        trainer.evaluate()
        curve = judge.curve(state)
    better = max if options.greater_is_better else min
    outcome = Outcome(
        state="pruned" if judge.pruned else "complete",
        value=better(value for _, value in curve) if keep_best else curve[-1][1],
        seconds=trainer.seconds_before + time.perf_counter() - start,
        steps=state.global_step,
        curve=curve,
    )
    return outcome, trainer.stop.asked
