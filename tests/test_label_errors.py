"""Confident learning: thresholds, joint and ranking by hand, and planted errors that are found."""

import numpy as np
import pytest

from nlpxfer.errors import DataError
from nlpxfer.evaluate.label_errors import find_label_errors, find_label_set_errors

# two classes; t_0 = (0.9 + 0.8 + 0.1) / 3 = 0.6, t_1 = (0.7 + 0.5 + 0.3) / 3 = 0.5
SHARES = np.array([[0.9, 0.1], [0.8, 0.2], [0.1, 0.9], [0.3, 0.7], [0.5, 0.5], [0.7, 0.3]])
LABELS = np.array([0, 0, 0, 1, 1, 1])


def test_by_hand():
    found = find_label_errors(SHARES, LABELS)
    assert found.thresholds_C == pytest.approx([0.6, 0.5])
    assert found.joint_CC.tolist() == [[2, 1], [1, 2]]
    assert found.rows_E.tolist() == [2, 5], "margins 0.1 - 0.9 and 0.3 - 0.7"
    assert found.suggested_E.tolist() == [1, 0]
    assert found.share == pytest.approx(1 / 3)


def test_the_order_is_that_of_the_margin_and_not_of_self_confidence():
    # row 0: 0.20 - 0.45 = -0.25; row 1: 0.25 - 0.70 = -0.45 comes first although its own label is likelier
    shares = [[0.20, 0.45, 0.35], [0.25, 0.70, 0.05], [0.9, 0.05, 0.05], [0.1, 0.4, 0.5], [0.1, 0.4, 0.5]]
    found = find_label_errors(shares, [0, 0, 0, 1, 2])
    assert found.thresholds_C == pytest.approx([0.45, 0.4, 0.5])
    assert found.rows_E.tolist() == [1, 0, 3]
    assert found.suggested_E.tolist() == [1, 1, 2]


def test_a_class_that_models_are_never_sure_of_is_not_accused_as_a_whole():
    """Rows of class 1 get 0.4 at most: argmax would accuse all of them, their own threshold accuses none."""
    shares = [[0.95, 0.05], [0.95, 0.05], [0.6, 0.4], [0.61, 0.39], [0.6, 0.4]]
    found = find_label_errors(shares, [0, 0, 1, 1, 1])
    assert len(found) == 0
    assert found.joint_CC.tolist() == [[2, 0], [0, 2]], "the row at 0.39 reaches no threshold"


def test_a_less_probable_class_is_never_suggested():
    """Row 0 misses the threshold of its own class and reaches the low one of class 1, which is no reason."""
    shares = [[0.6, 0.2, 0.2], [0.9, 0.05, 0.05], [0.8, 0.1, 0.1], [0.3, 0.3, 0.4]]
    found = find_label_errors(shares, [0, 0, 1, 2])
    assert found.joint_CC[0, 1] == 1
    assert 0 not in found.rows_E


def test_equal_rows_reach_their_own_mean_despite_rounding():
    shares = np.tile([0.1, 0.9], (3, 1))
    found = find_label_errors(shares, [0, 0, 0])
    assert found.thresholds_C[0] > 0.1, "0.1 + 0.1 + 0.1 is more than 0.3"
    assert found.joint_CC.tolist() == [[3, 0], [0, 0]]


def test_rows_that_are_left_out_neither_accuse_nor_count():
    left_out = np.array([False, False, True, False, False, False])
    found = find_label_errors(SHARES, LABELS, left_out_N=left_out)
    assert found.thresholds_C == pytest.approx([0.85, 0.5])
    assert found.rows_E.tolist() == []
    assert found.joint_CC.sum() == 3
    nobody = find_label_errors(SHARES, LABELS, left_out_N=LABELS == 1)
    assert nobody.thresholds_C[1] == np.inf
    assert nobody.joint_CC[:, 1].sum() == 0


@pytest.mark.parametrize("classes", [2, 5, 20])
def test_planted_errors_are_found(classes):
    """12 % of the labels are moved to the next class; the probabilities come from a fair but unsure model."""
    random = np.random.default_rng(classes)
    true = random.integers(0, classes, 3000)
    logits = random.normal(size=(3000, classes))
    logits[np.arange(3000), true] += 4
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    moved = random.random(3000) < 0.12
    found = find_label_errors(shares, np.where(moved, (true + 1) % classes, true))
    hits = moved[found.rows_E]
    assert hits.mean() > 0.7, "by chance it would be 0.12"
    assert hits.sum() > 0.7 * moved.sum()
    assert hits[: len(hits) // 4].mean() > 0.98, "the first are the surest"
    assert np.mean(found.suggested_E[hits] == true[found.rows_E[hits]]) > 0.9
    assert found.share == pytest.approx(moved.mean(), abs=0.05)


def test_clean_labels_are_hardly_accused():
    random = np.random.default_rng(1)
    true = random.integers(0, 4, 2000)
    logits = random.normal(size=(2000, 4))
    logits[np.arange(2000), true] += 5
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert len(find_label_errors(shares, true)) < 20


@pytest.mark.parametrize(("shares", "labels"), [([[1.0, 0.0]], [0, 1]), ([1.0], [0]), (np.zeros((0, 2)), [])])
def test_shapes_that_do_not_fit(shares, labels):
    with pytest.raises(DataError, match="do not fit"):
        find_label_errors(shares, labels)


def test_labels_of_a_set_are_judged_one_against_the_rest():
    shares_NC = np.array([[0.9, 0.1], [0.8, 0.95], [0.1, 0.2], [0.2, 0.1], [0.97, 0.9], [0.1, 0.8]])
    gold_NC = np.array([[1, 0], [1, 0], [1, 0], [0, 0], [0, 1], [0, 1]])
    found = find_label_set_errors(shares_NC, gold_NC)
    each = list(zip(found.rows_E.tolist(), found.labels_E.tolist(), strict=True))
    assert each == [(4, 0), (1, 1), (2, 0)], "given with 0.03, 0.05 and 0.1"
    for label in (0, 1):
        alone = find_label_errors(np.stack([1 - shares_NC[:, label], shares_NC[:, label]], axis=1), gold_NC[:, label])
        assert sorted(alone.rows_E) == sorted(row for row, of in each if of == label)
    assert found.share == pytest.approx((2 / 6 + 1 / 6) / 2, abs=0.05)
    left_out = np.array([False, True, False, False, False, False])
    assert 1 not in find_label_set_errors(shares_NC, gold_NC, left_out_N=left_out).rows_E
    with pytest.raises(DataError, match="do not fit"):
        find_label_set_errors(shares_NC, gold_NC[:, 0])
