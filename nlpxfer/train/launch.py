"""How the run was started: processes, threads, devices, seeds; and a clear refusal where it is not as asked for.

`accelerate launch --cpu --num_processes 2` starts one process without a word. nlpxfer reads what its launcher was
asked for and fails where fewer processes came up.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import contextvars
import io
import logging
import os
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar, cast

import numpy as np
import torch
import yaml

from nlpxfer.errors import LaunchError, NlpxferError

logger = logging.getLogger(__name__)

T = TypeVar("T")

_BY_ITSELF: contextvars.ContextVar[bool] = contextvars.ContextVar("by_itself", default=False)


def world() -> tuple[int, int]:
    """Rank of this process and number of processes; (0, 1) without a process group, and inside `by_itself`."""
    if _BY_ITSELF.get():
        return 0, 1
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


@contextlib.contextmanager
def by_itself() -> Iterator[None]:
    """Inside, this process shares no work with the others, which meanwhile do something else or wait."""
    token = _BY_ITSELF.set(True)
    try:
        yield
    finally:
        _BY_ITSELF.reset(token)


def is_main_process() -> bool:
    """Whether this process is the one that writes."""
    return world()[0] == 0


def from_main(value: T) -> T:
    """The first process's value, in all processes; pickled, so small."""
    if world()[1] > 1:
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]
    return value


def on_main(do: Callable[[], T]) -> T:
    """What a call gives that the first process alone makes, in all processes; pickled, so small.

    Raises:
        NlpxferError, OSError: What the call raises, in all processes: else the others would wait for the first.
    """
    found: T | None = None
    fault: NlpxferError | OSError | None = None
    if is_main_process():
        try:
            found = do()
        except (NlpxferError, OSError) as error:
            fault = error
    found, fault = from_main((found, fault))
    if fault is not None:
        raise fault
    return cast("T", found)


def on_all(do: Callable[[], T]) -> T:
    """What a call gives that all processes make, each for itself.

    Raises:
        NlpxferError, OSError: What the call raises in any process, in all of them: else some would wait for others.
    """
    found: T | None = None
    faults: list[NlpxferError | OSError | None] = [None] * world()[1]
    try:
        found = do()
    except (NlpxferError, OSError) as error:
        faults[world()[0]] = error
    if world()[1] > 1:
        torch.distributed.all_gather_object(faults, faults[world()[0]])
    for fault in faults:
        if fault is not None:
            raise fault
    return cast("T", found)


def wait_for_everyone() -> None:
    """A barrier, if there are several processes."""
    if world()[1] > 1:
        torch.distributed.barrier()


def leave_at_exit() -> None:
    """End the process group with the program, not with a run: a second one cannot be started by the same launch."""
    atexit.unregister(_leave)
    atexit.register(_leave)


def _leave() -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch; before a model is built, so that its head repeats."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - libraries draw from the global state
    torch.manual_seed(seed)


def check_process_count() -> None:
    """Compare the number of processes asked for with the number running.

    Raises:
        LaunchError: The launcher was asked for more processes than run.
    """
    asked, running = processes_asked_for(), world()[1]
    if asked is not None and asked > running:
        raise LaunchError(
            f"{asked} processes were asked for, but {running} {'is' if running == 1 else 'are'} running.",
            why="`accelerate launch` starts only one process when it finds no GPU, or with --cpu",
            fix=f"ACCELERATE_USE_CPU=true torchrun --nproc_per_node {asked} RECIPE …   (CPU), or "
            f"accelerate launch --multi_gpu --num_processes {asked} RECIPE …   (GPUs)",
        )


def processes_asked_for() -> int | None:
    """What the launcher's command line or configuration file asks for; None if there is no launcher to be read."""
    words = _launcher_words()
    options = None if words is None else _launcher_options(words)
    if options is None:
        return None
    if options.num_processes is not None:
        return int(options.num_processes)
    from accelerate.commands.config.config_args import default_config_file

    file = options.config_file or default_config_file
    if file and Path(file).is_file():
        loaded = yaml.safe_load(Path(file).read_text(encoding="utf-8")) or {}
        asked = loaded.get("num_processes")
        return int(asked) if asked is not None and int(asked) > 0 else None
    return None


def _launcher_words() -> list[str] | None:
    """The words after `accelerate launch`, from the command line of the parent process."""
    import psutil

    try:
        parent = psutil.Process().parent()
        words = parent.cmdline() if parent else []
    except psutil.Error:
        return None
    for i, word in enumerate(words):
        if Path(word).name == "accelerate-launch" or word == "accelerate.commands.launch":
            return words[i + 1 :]
        if Path(word).parts[-3:] == ("accelerate", "commands", "launch.py"):
            return words[i + 1 :]
        commands = ("accelerate", "accelerate_cli.py", "accelerate.commands.accelerate_cli")
        if Path(word).name in commands and words[i + 1 : i + 2] == ["launch"]:
            return words[i + 2 :]
    return None


def _launcher_options(words: Sequence[str]) -> argparse.Namespace | None:
    """The launcher's options as its own parser reads them; None if it cannot. What follows the script is left out."""
    from accelerate.commands.launch import launch_command_parser

    try:
        with contextlib.redirect_stderr(io.StringIO()):
            options: argparse.Namespace = launch_command_parser().parse_args(list(words))
    except SystemExit:
        return None
    return options


def own_cores() -> int:
    """This process's even share of the cores that it may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def use_threads(wanted: int | None) -> int:
    """Set the CPU threads of this process's torch: those wanted, or `own_cores`.

    `accelerate launch` sets OMP_NUM_THREADS=1 where no GPU is found, which leaves the other cores idle.
    """
    threads = wanted or own_cores()
    if threads != torch.get_num_threads():
        logger.info("using %d CPU threads instead of %d", threads, torch.get_num_threads())
        torch.set_num_threads(threads)
    return threads
