"""How the run was started: processes, threads, devices, seeds; and a clear refusal where it is not as asked for.

`accelerate launch --cpu --num_processes 2` starts one process without a word. nlpxfer reads what its launcher was
asked for and fails where fewer processes came up.
"""

from __future__ import annotations

import logging
import os
import random
from pathlib import Path

import numpy as np
import torch
import yaml

from nlpxfer.errors import LaunchError

logger = logging.getLogger(__name__)


def world() -> tuple[int, int]:
    """Rank of this process and number of processes; (0, 1) without a process group."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def is_main_process() -> bool:
    """Whether this process is the one that writes."""
    return world()[0] == 0


def wait_for_everyone() -> None:
    """A barrier, if there are several processes."""
    if world()[1] > 1:
        torch.distributed.barrier()


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
            f"{asked} processes were asked for, but {running} is running.",
            why="`accelerate launch` starts only one process when it finds no GPU, or with --cpu",
            fix=f"ACCELERATE_USE_CPU=true torchrun --nproc_per_node {asked} RECIPE …   (CPU), or "
            f"accelerate launch --multi_gpu --num_processes {asked} RECIPE …   (GPUs)",
        )


def processes_asked_for() -> int | None:
    """What the launcher's command line or configuration file asks for; None if there is no launcher to be read."""
    words = _launcher_words()
    if words is None:
        return None
    options = _options(words)
    if "num_processes" in options:
        return int(options["num_processes"])
    file = options.get("config_file")
    if file is None:
        from accelerate.commands.config.config_args import default_config_file

        file = default_config_file
    if file and Path(file).is_file():
        loaded = yaml.safe_load(Path(file).read_text(encoding="utf-8")) or {}
        asked = loaded.get("num_processes")
        return int(asked) if asked is not None and int(asked) > 0 else None
    return None


def _launcher_words() -> list[str] | None:
    """The words after `accelerate launch` up to the script, from the command line of the parent process."""
    import psutil

    try:
        parent = psutil.Process().parent()
        words = parent.cmdline() if parent else []
    except psutil.Error:
        return None
    for i, word in enumerate(words[:-1]):
        if Path(word).name in ("accelerate", "accelerate-launch", "accelerate_cli.py", "launch.py"):
            return words[i + 1 :]
    if "accelerate.commands.launch" in words or "accelerate.commands.accelerate_cli" in words:
        return words
    return None


def _options(words: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for i, word in enumerate(words):
        if word.endswith(".py") and not word.startswith("-") and not words[i - 1].startswith("--"):
            break
        if word.startswith("--"):
            name, has_value, value = word[2:].partition("=")
            found[name.replace("-", "_")] = value if has_value else (words[i + 1] if i + 1 < len(words) else "")
    return found


def use_threads(wanted: int | None) -> int:
    """Set the CPU threads of this process: those wanted, or an even share of the cores it may use.

    `accelerate launch` sets OMP_NUM_THREADS=1 where no GPU is found, which leaves the other cores idle.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = wanted or max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if threads != torch.get_num_threads():
        logger.info("using %d CPU threads instead of %d", threads, torch.get_num_threads())
        torch.set_num_threads(threads)
    return threads
