"""Intervals against scipy and theory, and verdicts on gains that are known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import f1_score

from nlpxfer.errors import ConfigError, DataError, NotFiniteError
from nlpxfer.evaluate import bootstrap_interval, mean_and_spread, paired_gain
from nlpxfer.evaluate.interval import rows_to_decide


def _random_run(seed: int, rows: int = 120, classes: int = 4, skill: float = 0.6):
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, size=rows)
    guesses = generator.integers(0, classes, size=rows)
    return np.where(generator.random(rows) < skill, labels, guesses), labels


def test_accuracy_interval_agrees_with_scipy():
    predictions, labels = _random_run(0, rows=300)
    correct = predictions == labels
    ours = bootstrap_interval(correct, resamples=20_000)
    theirs = stats.bootstrap(
        (correct.astype(float),), np.mean, method="percentile", n_resamples=20_000, rng=np.random.default_rng(1)
    ).confidence_interval
    assert ours.value == correct.mean()
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.005)
    # The exact distribution of the resampled mean is binomial.
    exact = stats.binom.ppf([0.025, 0.975], 300, correct.mean()) / 300
    assert (ours.low, ours.high) == pytest.approx(exact, abs=0.004)


def test_macro_f1_interval_agrees_with_scipy_on_the_scikit_learn_metric():
    predictions, labels = _random_run(2)
    ours = bootstrap_interval((predictions, labels), metric="macro_f1", resamples=4000)

    def statistic(predicted, true):
        return f1_score(true, predicted, average="macro", zero_division=0)

    theirs = stats.bootstrap(
        (predictions, labels),
        statistic,
        paired=True,
        vectorized=False,
        method="percentile",
        n_resamples=1000,
        rng=np.random.default_rng(3),
    ).confidence_interval
    assert ours.value == pytest.approx(statistic(predictions, labels), abs=1e-12)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.02)


def test_paired_gain_of_one_seed_agrees_with_scipy():
    labels = np.random.default_rng(4).integers(0, 3, size=400)
    treated = np.where(np.random.default_rng(5).random(400) < 0.8, labels, 2)
    control = np.where(np.random.default_rng(6).random(400) < 0.7, labels, 0)
    ours = paired_gain([(treated, labels)], [(control, labels)], resamples=20_000)
    difference = (treated == labels).astype(float) - (control == labels)
    theirs = stats.bootstrap(
        (difference,), np.mean, method="percentile", n_resamples=20_000, rng=np.random.default_rng(7)
    ).confidence_interval
    assert ours.gain == pytest.approx(difference.mean(), abs=1e-12)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.005)
    from_correctness = paired_gain([treated == labels], [control == labels], resamples=20_000)
    assert from_correctness == ours


def test_seeds_widen_the_interval_by_the_right_amount():
    # Each seed gains the same on every row pattern, so only the draw of seeds matters: the resampled mean of
    # S - 1 = 4 draws from 5 seeds has the variance (population variance of the gains) / 4 = (sample variance) / 5.
    gains = np.array([0.0, 0.1, 0.2, 0.3, 0.4])
    rows = 100_000
    treated = [np.arange(rows) < rows * (0.5 + gain) for gain in gains]
    control = [np.arange(rows) < rows * 0.5] * 5
    result = paired_gain(treated, control, resamples=4000, level=0.6827)
    deviation = gains.std(ddof=1) / np.sqrt(5)
    assert result.gain == pytest.approx(0.2)
    assert (result.high - result.low) / 2 == pytest.approx(deviation, rel=0.12)
    assert result.seeds == 5


def test_interval_covers_the_truth_about_as_often_as_it_says():
    generator = np.random.default_rng(8)
    hits = 0
    for trial in range(300):
        interval = bootstrap_interval(generator.random(200) < 0.8, resamples=300, seed=trial)
        hits += interval.low <= 0.8 <= interval.high
    assert 0.90 <= hits / 300 <= 0.98


def test_false_alarms_without_any_gain_are_rare():
    generator = np.random.default_rng(9)
    calls = []
    for trial in range(200):
        hard = generator.random(300) < 0.2
        arms = [[(generator.random(300) < 0.97) & ~hard for _ in range(3)] for _ in range(2)]
        calls.append(paired_gain(*arms, resamples=300, seed=trial).call)
    assert calls.count("unclear") >= 185


def test_calls():
    labels = np.zeros(1000, dtype=int)
    good, bad = labels.copy(), labels.copy()
    bad[:200] = 1
    good[:100] = 1
    positive = paired_gain([(good, labels)] * 3, [(bad, labels)] * 3)
    assert (positive.call, positive.gain) == ("positive", pytest.approx(0.1))
    negative = paired_gain([(bad, labels)] * 3, [(good, labels)] * 3)
    assert (negative.call, negative.gain) == ("negative", pytest.approx(-0.1))
    assert (negative.low, negative.high) == pytest.approx((-positive.high, -positive.low))
    nothing = paired_gain([(good, labels)], [(good, labels)])
    assert (nothing.gain, nothing.low, nothing.high, nothing.call) == (0.0, 0.0, 0.0, "unclear")


@pytest.mark.parametrize("metric", ["accuracy", "macro_f1"])
def test_a_handful_of_rows_decides_nothing_however_narrow_its_interval(metric):
    def gain(differing, alike=30, **options):
        labels = np.zeros(differing + alike, dtype=int)
        wrong = (np.arange(len(labels)) < differing).astype(int)
        return paired_gain([(labels, labels)], [(wrong, labels)], metric=metric, **options)

    five, six = gain(5, resamples=4000), gain(6, resamples=4000)
    assert min(five.low, six.low) > 0
    assert (five.call, five.differing_rows, five.needed_rows) == ("unclear", 5, 6)
    assert (six.call, six.differing_rows, six.needed_rows) == ("positive", 6, 6)
    assert gain(4, alike=0).call == "unclear"  # its interval has no width
    assert gain(5, level=0.9).call == "positive"


@pytest.mark.parametrize("level", [0.5, 0.6827, 0.9, 0.95, 0.99])
def test_rows_to_decide_is_the_first_number_that_a_sign_test_finds_significant(level):
    needed = rows_to_decide(level)
    assert stats.binomtest(needed, needed).pvalue <= 1 - level < stats.binomtest(needed - 1, needed - 1).pvalue


def test_macro_f1_gain_by_hand():
    labels = np.array([0, 0, 1, 1])
    treated, control = labels, np.array([0, 0, 0, 0])
    result = paired_gain([(treated, labels)], [(control, labels)], metric="macro_f1")
    # Control: F1 of class 0 = 2*2/(2+4) = 2/3, of class 1 = 0.
    assert result.gain == pytest.approx(1 - 1 / 3)


def test_a_class_that_a_resample_lacks_does_not_count_as_zero():
    interval = bootstrap_interval(([0, 1], [0, 1]), metric="macro_f1")
    assert (interval.low, interval.value, interval.high) == (1.0, 1.0, 1.0)


def test_same_seed_same_interval_and_order_of_rows_does_not_matter():
    predictions, labels = _random_run(10)
    first = bootstrap_interval((predictions, labels), metric="macro_f1", seed=5)
    order = np.random.default_rng(0).permutation(len(labels))
    assert bootstrap_interval((predictions[order], labels[order]), metric="macro_f1", seed=5) == first
    assert bootstrap_interval((predictions, labels), metric="macro_f1", seed=6) != first


def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch):
    predictions, labels = _random_run(11)
    whole = bootstrap_interval((predictions, labels), metric="macro_f1")
    monkeypatch.setattr("nlpxfer.evaluate.interval._CHUNK_CELLS", 100)
    assert bootstrap_interval((predictions, labels), metric="macro_f1") == whole


@pytest.mark.parametrize(
    ("treated", "control", "options", "error", "message"),
    [
        ([[1, 0]], [], {}, DataError, "1 treated and 0 control"),
        ([], [], {}, DataError, "0 treated"),
        ([[1, 0]], [[1, 0, 1]], {}, DataError, "different numbers of rows: 2, 3"),
        ([[]], [[]], {}, DataError, "at least one row"),
        ([[2, 0]], [[1, 0]], {}, DataError, "true or false per test row"),
        ([([0, 1], [0, 1])], [([0, 1], [1, 1])], {}, DataError, "different labels"),
        ([[1, 0]], [[1, 0]], {"metric": "macro_f1"}, DataError, "correctness alone"),
        ([([0, 1], [0])], [([0, 1], [0, 1])], {}, DataError, "do not fit"),
        ([([0.5, 1], [0, 1])], [([0, 1], [0, 1])], {}, DataError, "must be class indices"),
        ([[1, 0]], [[1, 0]], {"metric": "f1"}, ConfigError, "'f1' is unknown"),
        ([[1, 0]], [[1, 0]], {"level": 95}, ConfigError, "between 0 and 1"),
        ([[1, 0]], [[1, 0]], {"resamples": 10}, ConfigError, "use 40 or more"),
    ],
)
def test_bad_input_is_refused(treated, control, options, error, message):
    with pytest.raises(error, match=message):
        paired_gain(treated, control, **options)


def test_mean_and_spread():
    spread = mean_and_spread([0.8, 0.9, 1.0])
    assert (spread.mean, spread.deviation, spread.count) == (pytest.approx(0.9), pytest.approx(0.1), 3)
    assert mean_and_spread([0.5]).deviation is None
    with pytest.raises(DataError, match="No values"):
        mean_and_spread([])
    with pytest.raises(NotFiniteError, match="nan"):
        mean_and_spread([0.5, float("nan")])
