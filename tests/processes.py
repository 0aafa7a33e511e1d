"""Programs started as a user would start them, each with a time-out."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = 120
"""Seconds after which a program counts as hanging."""


def environment(**changes):
    """As the tests have it: offline, one thread per process, no progress bars."""
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **changes,
    }


def run_python(*words, **changes):
    """A Python program, in the root of the checkout."""
    return _run([sys.executable, *words], environment(**changes))


def run_torchrun(*words, processes=2, **changes):
    """Several gloo processes on this machine that meet at a free port."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    rendezvous = ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    return _run([*launcher, *rendezvous, *words], environment(ACCELERATE_USE_CPU="true", **changes))


def _run(command, variables):
    """Kills the whole group of processes at the time-out, so that none is left behind."""
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            out, err = process.communicate(timeout=TIMEOUT)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def interrupt_when(condition, *words, signal_number=signal.SIGTERM, **changes):
    """Start a Python program, send it a signal as soon as `condition()` holds, and wait for its end."""
    process = subprocess.Popen(
        [sys.executable, *words],
        cwd=ROOT,
        env=environment(**changes),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + TIMEOUT
    try:
        while not condition():
            if process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError("the program ended before it could be interrupted:\n" + process.communicate()[1])
            time.sleep(0.005)
        process.send_signal(signal_number)
        out, err = process.communicate(timeout=TIMEOUT)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)
