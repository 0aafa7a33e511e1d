"""Programs started as a user would start them, each with a time-out."""

import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = 120
"""Seconds after which a program counts as hanging."""


def python(*words):
    """A Python program."""
    return [sys.executable, *map(str, words)]


def torchrun(*words, processes=2):
    """Several gloo processes on this machine that meet at a free port."""
    meeting = ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    return python("-m", "torch.distributed.run", "--nproc_per_node", processes, *meeting, *words)


def accelerate_launch(*words):
    """The launcher of the README."""
    return python("-m", "accelerate.commands.accelerate_cli", "launch", *words)


def environment(**changes):
    """As the tests have it: offline, on the CPU, one thread per process."""
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "ACCELERATE_USE_CPU": "true",
        **changes,
    }


def together(command, processes=2, **changes):
    """The processes of one run without a launcher, which would end the others once one has failed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    meeting |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    with ThreadPoolExecutor(processes) as pool:
        ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
        return list(pool.map(lambda rank: run(command, **meeting, **rank, **changes), ranks))


def run(command, *, interrupt_if=None, **changes):
    """Run a command in the root of the checkout; what it leaves behind at the time-out is killed.

    interrupt_if: Asked every few milliseconds; once it says yes, the command gets SIGTERM.
    """
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(**changes),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        if interrupt_if:
            deadline = time.monotonic() + TIMEOUT
            while process.poll() is None and time.monotonic() < deadline and not interrupt_if():
                time.sleep(0.005)
            process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=TIMEOUT)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return subprocess.CompletedProcess(command, process.returncode, out, err)
