"""bfloat16 is taken where it was asked for or measured to be fast, and nowhere else."""

import pytest
import torch

from nlpxfer.train import precision
from nlpxfer.train.precision import Precision, bf16_speed_up, choose_precision, computing_in, padding_multiple

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch):
    """Replaces the stopwatch: seconds per dtype, of a CPU that has kernels for both."""
    seconds = {torch.float32: 1.0, torch.bfloat16: 1.0}
    monkeypatch.setattr(precision, "_has_bf16_kernels", lambda: True)
    monkeypatch.setattr(precision, "_seconds_of", lambda left, right, device: seconds[left.dtype])
    return seconds


@pytest.mark.parametrize("wanted", [True, False])
def test_the_users_wish_is_not_questioned(monkeypatch, wanted):
    monkeypatch.setattr(precision, "bf16_speed_up", lambda device: pytest.fail("measured without need"))
    assert choose_precision(wanted, CPU) == Precision(wanted, None, "user")


@pytest.mark.parametrize(("seconds", "taken"), [(0.4, True), (0.83, True), (0.9, False), (1.0, False), (6.0, False)])
def test_bf16_is_taken_where_it_is_fast(clock, seconds, taken):
    clock[torch.bfloat16] = seconds
    assert choose_precision(None, CPU) == Precision(taken, round(1 / seconds, 2), "measured")


def test_the_best_of_the_repeats_counts(monkeypatch):
    readings = {torch.float32: iter([5.0, 2.0, 3.0]), torch.bfloat16: iter([4.0, 9.0, 1.0])}
    monkeypatch.setattr(precision, "_seconds_of", lambda left, right, device: next(readings[left.dtype]))
    assert bf16_speed_up(CPU, rows=2, width=2, repeats=3) == 2.0


def test_a_device_without_bf16_is_no_fault(monkeypatch):
    def no_bf16(left, right):
        if left.dtype == torch.bfloat16:
            raise RuntimeError("not implemented for 'BFloat16'")
        return original(left, right)

    original = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", no_bf16)
    assert bf16_speed_up(CPU, rows=2, width=2) == 0.0
    assert choose_precision(None, CPU).bf16 is False


def test_a_real_measurement_gives_a_positive_number_and_leaves_the_random_state():
    before = torch.get_rng_state()
    assert 0 < bf16_speed_up(CPU, rows=64, width=32) < 100
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("bf16", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_computing_in(bf16, dtype):
    layer = torch.nn.Linear(3, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16), computing_in(bf16, CPU):  # the outer context does not win
        found = layer(torch.ones(1, 3))
    assert found.dtype == dtype
    assert not found.requires_grad


@pytest.mark.parametrize(("device", "bf16", "multiple"), [("cpu", False, 1), ("cpu", True, 8), ("cuda", True, 8)])
def test_padding_multiple(device, bf16, multiple):
    assert padding_multiple(torch.device(device), bf16=bf16) == multiple


def test_a_cpu_without_bfloat16_kernels_is_not_measured(monkeypatch):
    """One product takes seconds there, and every command would wait for seven of them."""
    monkeypatch.setattr(precision, "_has_bf16_kernels", lambda: False)
    monkeypatch.setattr(precision, "_seconds_of", lambda *_: pytest.fail("measured"))
    assert choose_precision(None, CPU) == Precision(False, 0.0, "measured")
