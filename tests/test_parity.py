"""How far two sets of logits differ: hand-computed."""

import numpy as np
import pytest

from nlpxfer.errors import NotFiniteError
from nlpxfer.evaluate.parity import parity
from nlpxfer.problem import MULTI_LABEL, REGRESSION


def test_differences_and_changed_predictions():
    reference = [[2.0, 1.0, 0.0], [0.0, 0.5, 0.4], [1.0, 1.0005, 0.0], [3.0, 0.0, 0.0]]
    other = [[2.0, 1.5, 0.0], [0.0, 0.4, 0.5], [1.0005, 1.0, 0.0], [2.0, 0.0, 0.0]]
    found = parity(reference, other)
    assert (found.rows, found.changed, found.changed_share, found.changed_ties) == (4, 2, 0.5, 1)
    assert found.max_difference == pytest.approx(1.0)
    assert found.mean_difference == pytest.approx((0.5 + 0.2 + 0.001 + 1.0) / 12)
    assert not found.holds


@pytest.mark.parametrize(
    ("other", "holds"),
    [
        ([[0.0009, 1.0]], True),
        ([[0.0011, 1.0]], False),
        ([[np.nextafter(0.0, 1), 1.0]], True),
    ],
)
def test_what_rounding_explains(other, holds):
    assert parity([[0.0, 1.0]], other).holds is holds


def test_rounding_grows_with_the_logits():
    assert parity([[0.0, 30.0]], [[0.02, 30.0]]).holds
    assert not parity([[0.0, 30.0]], [[0.04, 30.0]]).holds


def test_a_tie_may_change_but_no_clear_prediction():
    assert parity([[0.0, 0.0005]], [[0.0005, 0.0]]).holds
    clear = parity([[0.0, 0.0015]], [[0.0008, 0.0007]])
    assert clear.max_difference < 1e-3
    assert (clear.changed, clear.changed_ties, clear.holds) == (1, 0, False)


def test_labels_of_a_multi_label_row_change_where_a_logit_crosses_its_cut():
    reference = [[1.0, -1.0], [0.5, 0.2], [-0.0004, 3.0], [2.0, 2.0]]
    other = [[0.1, -0.1], [0.5, -0.2], [0.0004, 3.0], [2.0, 0.5]]
    found = parity(reference, other, MULTI_LABEL)
    assert (found.changed, found.changed_ties) == (2, 1)
    assert parity(reference, other, MULTI_LABEL, [0.0, 1.0]).changed == 2, "the third by a tie, the last by its second"
    assert parity(reference, other, MULTI_LABEL, [-np.inf, np.inf]).changed == 0


def test_numbers_are_compared_without_predictions():
    found = parity([[0.1], [0.2]], [[0.3], [0.2]], REGRESSION)
    assert (found.changed, found.max_difference, found.holds) == (0, pytest.approx(0.2), False)
    assert parity([[0.1]], [[0.1005]], REGRESSION).holds


def test_windows_join_to_the_whole():
    values = np.random.default_rng(0)
    reference, other = values.normal(size=(2, 30, 3))
    parts = parity(reference[:7], other[:7]).joined(parity(reference[7:], other[7:]))
    whole = parity(reference, other)
    assert parts.mean_difference == pytest.approx(whole.mean_difference)
    assert (parts.rows, parts.max_difference, parts.changed, parts.changed_share, parts.changed_ties) == (
        *(whole.rows, whole.max_difference, whole.changed, whole.changed_share, whole.changed_ties),
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_no_number_is_no_answer(bad):
    with pytest.raises(NotFiniteError, match="the rewritten model"):
        parity([[0.0, 1.0]], [[bad, 1.0]])
