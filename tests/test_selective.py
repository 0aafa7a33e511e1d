"""Abstaining: the bound is the exact one, the threshold is the lowest that passes, and promises are mostly kept."""

import json

import numpy as np
import pytest
from scipy.stats import binom

from nlpxfer.errors import CheckpointError, ConfigError
from nlpxfer.evaluate.calibration import load_abstain_rule, load_temperature, save_calibration
from nlpxfer.evaluate.selective import (
    AbstainRule,
    abstain_checks,
    answered_scores,
    find_rule,
    lower_bound,
    refuse_unprovable,
    risk_coverage,
    risk_coverage_area,
    rows_needed,
)

RULE = AbstainRule(precision=0.9, confidence=0.95, min_probability=0.7, coverage=0.5)


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
    rule = find_rule(sure, right, 0.8)
    assert rule.min_probability == slow_threshold(sure, right, 0.8)
    assert rule.min_probability is not None
    assert rule.coverage == pytest.approx(np.mean(sure >= rule.min_probability))


def test_by_hand():
    """59 right rows at 0.9 show 0.95 just so; with the row at 0.8, which is wrong, they do not."""
    sure, right = [0.9] * 59 + [0.8], [True] * 59 + [False]
    rule = find_rule(sure, right, 0.95)
    assert rule == AbstainRule(precision=0.95, confidence=0.95, min_probability=0.9, coverage=59 / 60)
    assert find_rule(sure[1:], right[1:], 0.95) == AbstainRule(
        precision=0.95, confidence=0.95, min_probability=None, coverage=0.0
    )
    assert answered_scores(rule, [0.95, 0.9, 0.89, 0.5], [True, False, True, True]) == {
        "rows": 2,
        "coverage": 0.5,
        "precision": 0.5,
    }


def test_a_few_lucky_rows_are_no_proof():
    sure, right = np.linspace(1, 0.5, 100), np.arange(100) < 10
    assert find_rule(sure, right, 0.9).min_probability is None


def test_the_promise_is_kept_about_as_often_as_it_says():
    """Of 400 models whose probabilities tell right from wrong, few answer less precisely than promised."""
    random = np.random.default_rng(0)
    many = np.sort(random.beta(5, 1, 100_000))
    beyond = np.cumsum(many[::-1])[::-1] / np.arange(len(many), 0, -1)  # precision of answering from here on
    broken = 0
    for _ in range(400):
        sure = random.choice(many, 300)
        rule = find_rule(sure, random.random(300) < sure, 0.9)
        if rule.min_probability is not None:
            broken += beyond[np.searchsorted(many, rule.min_probability)] < 0.9
    assert broken / 400 < 0.09


def test_without_a_threshold_nothing_is_answered(caplog):
    answers = {"validation": (np.full(40, 0.6), np.arange(40) % 2 == 0), "test": (np.full(9, 0.9), np.ones(9, bool))}
    found = abstain_checks(answers, 0.9)["abstain"]
    nothing = {"rows": 0, "coverage": 0.0, "precision": None}
    assert (found["min_probability"], found["validation"], found["test"]) == (None, nothing, nothing)
    assert "no threshold gives answers of which 0.9 are right" in caplog.text
    assert abstain_checks(answers, None) == {}


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
