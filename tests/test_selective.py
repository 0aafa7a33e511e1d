"""Abstaining: the bound is the exact one, the threshold is the lowest that passes, and promises are mostly kept."""

import json

import numpy as np
import pytest
from scipy.stats import binom

from nlpxfer.errors import CheckpointError, ConfigError
from nlpxfer.evaluate.calibration import load_abstain_rule, load_temperature, save_calibration
from nlpxfer.evaluate.selective import (
    AbstainRule,
    Answers,
    abstain_checks,
    answered_scores,
    best_answers,
    find_rule,
    label_answers,
    lower_bound,
    refuse_unprovable,
    risk_coverage,
    risk_coverage_area,
    rows_needed,
)

RULE = AbstainRule(precision=0.9, confidence=0.95, min_probability=0.7, coverage=0.5)


def one_per_row(sure, right):
    return Answers(np.asarray(sure, dtype=np.float64), np.asarray(right, dtype=bool), np.arange(len(sure)))


@pytest.mark.parametrize(("right", "rows"), [(1, 1), (5, 9), (58, 60), (990, 1000)])
def test_the_bound_is_where_so_many_right_become_unlikely(right, rows):
    """Clopper-Pearson by its definition: at the bound, `right` or more of `rows` has a probability of 5 %."""
    bound = float(lower_bound(right, rows))
    assert binom.sf(right - 1, rows, bound) == pytest.approx(0.05, abs=1e-9)


@pytest.mark.parametrize("precision", [0.5, 0.8, 0.95, 0.999])
def test_fewest_rows(precision):
    rows = rows_needed(precision)
    assert lower_bound(rows, rows) >= precision > lower_bound(rows - 1, rows - 1)
    with pytest.raises(
        ConfigError, match=f"{rows - 1} validation rows cannot show a precision of {precision:g}: {rows}"
    ):
        refuse_unprovable(precision, rows - 1)
    refuse_unprovable(precision, rows)


def slow_threshold(sure, right, precision):
    """The lowest of the probabilities from which the bound passes, one by one."""
    passing = [t for t in sure if lower_bound(right[sure >= t].sum(), (sure >= t).sum()) >= precision]
    return min(passing, default=None)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("digits", [1, 16])
def test_the_lowest_threshold_that_passes(seed, digits):
    """With many ties (one digit) and without."""
    random = np.random.default_rng(seed)
    sure = np.round(random.uniform(0.3, 1, 200), digits)
    right = random.random(200) < sure
    rule = find_rule(one_per_row(sure, right), 0.8)
    assert rule.min_probability == slow_threshold(sure, right, 0.8)
    assert rule.min_probability is not None
    assert rule.coverage == pytest.approx(np.mean(sure >= rule.min_probability))


def test_by_hand():
    """59 right rows at 0.9 show 0.95 just so; with the row at 0.8, which is wrong, they do not."""
    sure, right = [0.9] * 59 + [0.8], [True] * 59 + [False]
    rule = find_rule(one_per_row(sure, right), 0.95)
    assert rule == AbstainRule(precision=0.95, confidence=0.95, min_probability=0.9, coverage=59 / 60)
    assert find_rule(one_per_row(sure[1:], right[1:]), 0.95) == AbstainRule(
        precision=0.95, confidence=0.95, min_probability=None, coverage=0.0
    )
    found = answered_scores(rule, one_per_row([0.95, 0.9, 0.89, 0.5], [True, False, True, True]))
    assert found == {"answers": 2, "coverage": 0.5, "precision": 0.5}


def test_a_few_lucky_rows_are_no_proof():
    sure, right = np.linspace(1, 0.5, 100), np.arange(100) < 10
    assert find_rule(one_per_row(sure, right), 0.9).min_probability is None


def test_the_promise_is_kept_about_as_often_as_it_says():
    """Of 400 models whose probabilities tell right from wrong, few answer less precisely than promised."""
    random = np.random.default_rng(0)
    many = np.sort(random.beta(5, 1, 100_000))
    beyond = np.cumsum(many[::-1])[::-1] / np.arange(len(many), 0, -1)  # precision of answering from here on
    broken = 0
    for _ in range(400):
        sure = random.choice(many, 300)
        rule = find_rule(one_per_row(sure, random.random(300) < sure), 0.9)
        if rule.min_probability is not None:
            broken += beyond[np.searchsorted(many, rule.min_probability)] < 0.9
    assert broken / 400 < 0.09


def test_without_a_threshold_nothing_is_answered(caplog):
    answers = {
        "validation": one_per_row(np.full(40, 0.6), np.arange(40) % 2 == 0),
        "test": one_per_row(np.full(9, 0.9), np.ones(9)),
        "silent": one_per_row([], []),
    }
    found = abstain_checks(answers, 0.9)["abstain"]
    nothing = {"answers": 0, "coverage": 0.0, "precision": None}
    assert found["min_probability"] is None
    assert [found[split] for split in answers] == [nothing] * 3
    assert find_rule(answers["silent"], 0.9).min_probability is None, "a model that never gives a label"
    assert "no threshold gives answers of which 0.9 are right" in caplog.text
    assert abstain_checks(answers, None) == {}


@pytest.mark.parametrize(("wrong", "told"), [(8, False), (9, False), (10, True), (20, True)])
@pytest.mark.parametrize("labels", [1, 3])
def test_a_promise_that_other_rows_refute_is_told(wrong, told, labels, caplog):
    """Of 50 rows at 0.9, 9 wrong ones have a probability of 5.8 %, 10 of 2.5 %; labels of one row count once."""
    assert binom.sf(8, 50, 0.1) > 0.05 > binom.sf(9, 50, 0.1)
    sure, rows = np.full(50 * labels, 0.9), np.arange(50).repeat(labels)
    validation = Answers(sure, np.full(50 * labels, True), rows)
    found = abstain_checks({"validation": validation, "test": Answers(sure, rows >= wrong, rows)}, 0.9)["abstain"]
    assert found["test"]["precision"] == pytest.approx(1 - wrong / 50)
    assert (f"on the test rows only {1 - wrong / 50:.3f} are right, too few for the 0.9" in caplog.text) == told


def test_what_the_answers_are_by_hand():
    shares = np.array([[0.7, 0.2], [0.45, 0.55], [0.4, 0.3]])
    best = best_answers(shares, np.array([0, 0, 0]))
    assert [found.tolist() for found in best] == [[0.7, 0.55, 0.4], [True, False, True], [0, 1, 2]]
    given = label_answers(shares, [[1, 1], [0, 1], [1, 1]], [0.4, 0.5])  # 0.4 is not above 0.4
    assert [found.tolist() for found in given] == [[0.7, 0.45, 0.55], [True, False, True], [0, 1, 1]]


def slow_threshold_of_labels(answers, precision):
    """With n labels of rows with m each as n^2 / sum m^2 answers, of which so many whole ones are right."""
    passing = []
    for least in answers.sure_N:
        kept = answers.sure_N >= least
        sizes = np.unique(answers.row_N[kept], return_counts=True)[1]
        rows = sizes.sum() ** 2 / (sizes**2).sum()
        if lower_bound(np.floor(answers.right_N[kept].mean() * rows + 1e-9), rows) >= precision:
            passing.append(least)
    return min(passing, default=None)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("digits", [1, 16])
def test_labels_of_one_row_count_as_if_they_stood_or_fell_together(seed, digits):
    random = np.random.default_rng(seed)
    shares = np.round(random.uniform(0, 1, (100, 5)), digits)
    answers = label_answers(shares, random.random((100, 5)) < shares**0.3, [0.2, 0.3, 0.4, 0.5, 0.6])
    rule = find_rule(answers, 0.85)
    assert rule.min_probability == slow_threshold_of_labels(answers, 0.85)
    assert rule.min_probability is not None
    alone = find_rule(Answers(answers.sure_N, answers.right_N, np.arange(len(answers.sure_N))), 0.85)
    assert rule.min_probability >= alone.min_probability, "as if each had a row of its own"


def test_the_promise_about_labels_is_kept_about_as_often_as_it_says():
    """Each row makes all its labels more or less likely than the model thinks; 200 models."""
    random, broken, kept = np.random.default_rng(1), 0, 0
    for _ in range(200):
        rare = random.normal(-2.5, 1, 8)

        def drawn(rows, rare=rare):
            logits = rare + random.normal(0, 2, (rows, 8))
            gold = random.random((rows, 8)) < 1 / (1 + np.exp(-logits - random.normal(0, 1.5, (rows, 1))))
            return label_answers(1 / (1 + np.exp(-logits)), gold, np.full(8, 0.3))

        rule = find_rule(drawn(400), 0.75)
        if rule.min_probability is not None:
            kept += 1
            broken += answered_scores(rule, drawn(4000))["precision"] < 0.75
    assert kept > 150
    assert broken / kept < 0.09


def test_area_under_the_risk_coverage_curve_by_hand():
    # errors among the surest 1, 2, 3, 4 rows: 0, 1/2, 1/3, 2/4
    assert risk_coverage_area([0.9, 0.8, 0.7, 0.6], [1, 0, 1, 0]) == pytest.approx((0 + 1 / 2 + 1 / 3 + 1 / 2) / 4)
    assert risk_coverage([0.6, 0.7, 0.8, 0.9], [0, 1, 0, 1])["aurc_perfect_order"] == pytest.approx(
        (0 + 0 + 1 / 3 + 2 / 4) / 4
    )
    assert risk_coverage_area([0.5] * 10, [True] * 7 + [False] * 3) == pytest.approx(0.3), "no order: the error rate"


def test_equally_sure_rows_count_as_the_mean_over_their_orders():
    sure, right = [0.9, 0.5, 0.5, 0.5], [True, True, False, False]
    orders = [risk_coverage_area([4, 3, 2, 1], [True, *rest]) for rest in ((1, 0, 0), (0, 1, 0), (0, 0, 1))]
    assert risk_coverage_area(sure, right) == pytest.approx(np.mean(orders))


def test_a_folder_keeps_its_rule(tmp_path):
    assert load_abstain_rule(None) is None
    assert load_abstain_rule(tmp_path) is None
    save_calibration(tmp_path, 1.5)
    assert load_abstain_rule(tmp_path) is None
    for rule in (RULE, AbstainRule(precision=0.99, confidence=0.95, min_probability=None, coverage=0.0)):
        content = json.loads(save_calibration(tmp_path, 1.5, abstain=rule).read_text())
        assert set(content) == {"temperature", "abstain"}
        assert load_abstain_rule(tmp_path) == rule
        assert load_temperature(tmp_path) == 1.5


@pytest.mark.parametrize("least", ["2", "0", '"often"', "[]", "NaN"])
def test_a_damaged_rule_is_refused(least, tmp_path):
    rule = f'{{"precision": 0.9, "confidence": 0.95, "min_probability": {least}, "coverage": 0.5}}'
    (tmp_path / "calibration.json").write_text(f'{{"temperature": 1.0, "abstain": {rule}}}')
    with pytest.raises(CheckpointError, match="holds no usable rule for abstaining"):
        load_abstain_rule(tmp_path)
    (tmp_path / "calibration.json").write_text('{"temperature": 1.0, "abstain": {}}')
    with pytest.raises(CheckpointError, match="holds no usable rule for abstaining"):
        load_abstain_rule(tmp_path)
