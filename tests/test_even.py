"""Places without a row even out the shares of the processes, and count as nothing."""

import numpy as np
import pytest
import torch

from nlpxfer.data.tokenise import Collator, TokenisedRows
from nlpxfer.train.even import COUNTS, EMPTY, EvenSampler, GapCollator, RowsWithGaps
from nlpxfer.train.sampler import LengthGroupedSampler


@pytest.fixture
def rows():
    """Three rows of 2, 1 and 3 tokens."""
    tokens = np.array([5, 6, 7, 8, 9, 4], dtype=np.int32)
    return TokenisedRows(tokens, None, np.array([0, 2, 3, 6]), {"labels": np.array([0, 1, 2])})


@pytest.mark.parametrize(("count", "together", "places"), [(7, 4, 8), (8, 4, 8), (1, 6, 6)])
def test_the_order_is_filled_up_at_its_end(count, together, places):
    plain = LengthGroupedSampler(np.arange(count), 2, seed=3)
    even = EvenSampler(plain, together)
    plain.set_epoch(0)
    first = list(even)
    assert len(even) == len(first) == places
    assert first[:count] == list(plain)
    assert first[count:] == [EMPTY] * (places - count)


def test_the_epoch_reaches_the_order():
    plain = LengthGroupedSampler(np.ones(32), 4, seed=3)
    even = EvenSampler(plain, 8)
    first = list(even)
    even.set_epoch(1)
    assert plain.epoch == 1
    assert list(even) != first


def test_an_empty_place_holds_no_row(rows):
    gaps = RowsWithGaps(rows)
    assert len(gaps) == 3
    assert gaps[EMPTY] is None
    assert gaps[2]["labels"] == 2


def test_empty_places_are_left_out_of_a_batch(rows):
    gaps, collate = RowsWithGaps(rows), GapCollator(Collator(0), rows[1])
    batch = collate([gaps[0], gaps[EMPTY], gaps[2]])
    assert batch["labels"].tolist() == [0, 2]
    assert batch["input_ids"].tolist() == [[5, 6, 0], [8, 9, 4]]
    assert torch.equal(batch[COUNTS], torch.tensor(1))


def test_a_batch_of_empty_places_stands_in_and_counts_nothing(rows):
    gaps, collate = RowsWithGaps(rows), GapCollator(Collator(0), rows[1])
    batch = collate([gaps[EMPTY], gaps[EMPTY]])
    assert batch["input_ids"].tolist() == [[7]]
    assert torch.equal(batch[COUNTS], torch.tensor(0))
