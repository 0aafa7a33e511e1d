"""Order of the training rows: complete, repeatable, of like length."""

import random

import numpy as np
import pytest
import torch

from nlpxfer.train.sampler import WINDOW_BATCHES, LengthGroupedSampler

LENGTHS = np.random.default_rng(0).integers(3, 100, size=2003)


def batches_of(sampler, size):
    order = list(sampler)
    return [order[start : start + size] for start in range(0, len(order), size)]


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize(("rows", "batch"), [(2003, 8), (2003, 2003), (7, 8), (8, 8), (1, 1), (0, 4)])
def test_every_row_comes_once(rows, batch, grouped):
    sampler = LengthGroupedSampler(LENGTHS[:rows], batch, seed=1, grouped=grouped)
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        order = list(sampler)
        assert len(sampler) == rows
        assert sorted(order) == list(range(rows))
        assert all(type(index) is int for index in order)


@pytest.mark.parametrize("grouped", [True, False])
def test_order_depends_on_seed_and_epoch_only(grouped):
    def order(seed, epoch):
        random.seed(seed + 17)
        torch.manual_seed(epoch + 3)
        sampler = LengthGroupedSampler(LENGTHS, 8, seed=seed, grouped=grouped)
        list(sampler)  # another epoch before does not count
        sampler.set_epoch(epoch)
        return list(sampler)

    first = order(1, 2)
    torch.manual_seed(99)
    np.random.seed(5)  # noqa: NPY002
    assert order(1, 2) == first
    assert order(1, 3) != first
    assert order(2, 2) != first
    assert order(2, 1) != first


def test_global_random_states_are_left_alone():
    before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state())  # noqa: NPY002
    list(LengthGroupedSampler(LENGTHS, 8, seed=1))
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[2])


def padded_tokens(batches):
    return sum(len(batch) * LENGTHS[batch].max() for batch in batches)


def test_grouped_batches_are_padded_little():
    grouped = padded_tokens(batches_of(LengthGroupedSampler(LENGTHS, 8, seed=1), 8))
    shuffled = padded_tokens(batches_of(LengthGroupedSampler(LENGTHS, 8, seed=1, grouped=False), 8))
    real = LENGTHS.sum()
    assert grouped / real < 1.03  # batches of 8 from windows of 400 rows; lengths are uniform over 3 to 99
    assert shuffled / real > 1.6


def test_short_last_batch_comes_last():
    batches = batches_of(LengthGroupedSampler(LENGTHS, 8, seed=1), 8)
    assert [len(batch) for batch in batches] == [8] * 250 + [3]
    # the short batch is a random sample: neither the longest nor the shortest rows are always in it
    lasts = set()
    sampler = LengthGroupedSampler(LENGTHS, 8, seed=1)
    for epoch in range(4):
        sampler.set_epoch(epoch)
        lasts.add(tuple(batches_of(sampler, 8)[-1]))
    assert len(lasts) == 4


def test_batches_come_in_no_order_of_length():
    batches = batches_of(LengthGroupedSampler(LENGTHS, 8, seed=1), 8)[:-1]
    means = [LENGTHS[batch].mean() for batch in batches]
    assert abs(np.corrcoef(means, range(len(means)))[0, 1]) < 0.2
    first_window = means[:WINDOW_BATCHES]
    assert first_window != sorted(first_window, reverse=True)


def test_rows_of_a_batch_come_with_other_rows_in_the_next_epoch():
    sampler = LengthGroupedSampler(LENGTHS, 8, seed=1)
    first = {frozenset(batch) for batch in batches_of(sampler, 8)}
    sampler.set_epoch(1)
    assert not first & {frozenset(batch) for batch in batches_of(sampler, 8)}
