"""Rates with a clock that the test holds; counts on models whose size is known."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from nlpxfer.errors import CheckpointError, CheckpointNotFoundError, ConfigError
from nlpxfer.evaluate import (
    Stopwatch,
    alternate_rates,
    embedding_parameter_count,
    gemm_peak_flops,
    inference_run,
    measure_rate,
    model_bytes,
    parameter_count,
    peak_memory_bytes,
    training_flops,
)


class Clock:
    """Stands still unless a run moves it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def run(self, seconds, order=None, name=""):
        remaining = iter(seconds)

        def step():
            self.now += next(remaining)
            if order is not None:
                order.append(name)

        return step


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_rate_is_the_median_without_the_warm_up(clock: Clock):
    rate = measure_rate(clock.run([100, 1, 2, 4]), 8, repeats=3, warmup=1)
    assert (rate.rows_per_second, rate.low, rate.high, rate.repeats) == (4, 2, 8, 3)


def test_ratios_are_formed_within_each_turn(clock: Clock):
    order: list[str] = []
    # The machine slows down fourfold after the first turn; the student stays twice as fast within each turn.
    teacher = clock.run([1, 2, 8, 8], order, "teacher")
    student = clock.run([1, 1, 4, 4], order, "student")
    result = alternate_rates({"teacher": teacher, "student": student}, 16, repeats=3)
    assert order == ["teacher", "student"] * 4
    assert result.ratios["student"].median == result.ratios["student"].low == result.ratios["student"].high == 2
    assert result.rates["teacher"].rows_per_second == 2
    assert result.rates["student"].rows_per_second == 4
    assert list(result.ratios) == ["student"]


@pytest.mark.parametrize("options", [{"rows": 0}, {"repeats": 0}, {"warmup": -1}])
def test_nothing_to_measure_is_refused(options):
    arguments = {"rows": 1, "repeats": 1, "warmup": 0, **options}
    with pytest.raises(ConfigError, match="Cannot measure"):
        measure_rate(lambda: None, arguments.pop("rows"), **arguments)


def test_inference_run_is_quiet_and_restores_the_mode(tiny_checkpoint):
    from transformers import AutoModelForSequenceClassification

    folder = tiny_checkpoint("bert", kind="classifier")
    model = AutoModelForSequenceClassification.from_pretrained(folder).train()
    seen = []
    model.register_forward_hook(
        lambda module, _, output: seen.append((module.training, output.logits.requires_grad, len(output.logits)))
    )
    run = inference_run(model, [{"input_ids": torch.ones(3, 5, dtype=torch.long)}] * 2)
    run()
    assert seen == [(False, False, 3)] * 2
    assert model.training
    assert measure_rate(run, 6, repeats=2).rows_per_second > 0


def test_parameter_counts_take_shared_weights_once():
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens = torch.nn.Embedding(10, 4)
            self.positions = torch.nn.Embedding(6, 4)
            self.dense = torch.nn.Linear(4, 4)
            self.output = torch.nn.Linear(4, 10, bias=False)
            self.output.weight = self.tokens.weight

    model = Tied()
    model.tokens.weight.requires_grad_(False)
    assert parameter_count(model) == 10 * 4 + 6 * 4 + 4 * 4 + 4
    assert embedding_parameter_count(model) == 10 * 4 + 6 * 4


def test_model_bytes(tmp_path):
    with pytest.raises(CheckpointNotFoundError, match="No model folder"):
        model_bytes(tmp_path / "none")
    (tmp_path / "tokenizer.json").write_bytes(b"x" * 1000)
    with pytest.raises(CheckpointError, match="safetensors"):
        model_bytes(tmp_path)
    (tmp_path / "model-1.safetensors").write_bytes(b"x" * 30)
    (tmp_path / "model-2.safetensors").write_bytes(b"x" * 12)
    assert model_bytes(tmp_path) == 42


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_peak_memory_is_that_of_this_process_and_not_of_the_one_that_started_it():
    """Linux hands `ru_maxrss` on through exec: a run started by a large notebook had the notebook's peak."""
    held = torch.ones(350_000_000)  # 1.4 GB, resident
    code = "import nlpxfer.evaluate.cost as c; x = bytearray(b'x') * 100_000_000; print(c.peak_memory_bytes())"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert 100_000_000 < int(child) < held.nbytes < peak_memory_bytes() < 3 * psutil.Process().memory_info().rss


def test_stopwatch(clock: Clock):
    watch = Stopwatch()
    clock.now += 1
    with watch.lap("train"):
        clock.now += 4
    with contextlib.suppress(KeyError), watch.lap("train"):
        clock.now += 6
        raise KeyError  # a part that fails has taken its time all the same
    cost = watch.cost(tokens=50)
    assert (cost.train_seconds, cost.total_seconds, cost.tokens, cost.tokens_per_second) == (10, 11, 50, 5)
    assert cost.peak_memory_bytes > 1_000_000
    assert watch.seconds("evaluate") == 0
    assert watch.cost(tokens=0, train="nothing").tokens_per_second == 0


def test_gemm_peak_counts_two_operations_per_cell(clock: Clock, monkeypatch: pytest.MonkeyPatch):
    def rate(run, rows, *, repeats):
        run()
        return measure_rate(clock.run([0.5, 0.25, 0.5]), rows, repeats=2)

    monkeypatch.setattr("nlpxfer.evaluate.cost.measure_rate", rate)
    assert gemm_peak_flops(size=10) == 2 * 10**3 / 0.25
    with pytest.raises(ConfigError, match="size 0"):
        gemm_peak_flops(size=0)


def test_gemm_peak_runs_for_real_in_both_precisions():
    for dtype in (torch.float32, torch.bfloat16):
        assert 1e6 < gemm_peak_flops(dtype, size=64, repeats=2) < 1e15


def test_training_flops():
    assert training_flops(11_000_000, 1_000) == 66_000_000_000
