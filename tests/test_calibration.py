"""Calibration: known temperatures are found, errors are those counted by hand, and a folder keeps its temperature."""

import json

import numpy as np
import pytest
from sklearn.metrics import brier_score_loss

from nlpxfer.errors import CheckpointError
from nlpxfer.evaluate.calibration import (
    RANGE,
    brier_score,
    calibrate,
    expected_calibration_error,
    fit_temperature,
    load_temperature,
    probabilities,
    save_calibration,
)


def drawn(rows, classes, temperature, seed=0):
    """Logits that are too sure of themselves by `temperature`, with labels drawn from the true probabilities."""
    random = np.random.default_rng(seed)
    true = random.normal(size=(rows, classes)) * 2
    shares = probabilities(true)
    labels = np.array([random.choice(classes, p=share) for share in shares])
    return true * temperature, labels


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_temperature_that_was_put_in_is_found(temperature):
    logits, labels = drawn(20_000, 5, temperature)
    assert fit_temperature(logits, labels) == pytest.approx(temperature, rel=0.05)


def test_it_is_the_minimum_of_the_loss():
    logits, labels = drawn(500, 4, 2.0)
    found = fit_temperature(logits, labels)
    losses = {t: -np.log(probabilities(logits, t)[range(500), labels]).mean() for t in np.linspace(0.5, 6, 200)}
    assert found == pytest.approx(min(losses, key=losses.get), abs=0.03)


def without_a_prior(logits, labels):
    """The T with the lowest mean loss, by trying many."""
    tried = np.geomspace(*RANGE, 4000)
    return tried[np.argmin([-np.log(probabilities(logits, t)[range(len(labels)), labels]).mean() for t in tried])]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("seed", range(3))
def test_the_prior_is_not_noticed_in_hundreds_of_rows(temperature, seed):
    logits, labels = drawn(300, 4, temperature, seed)
    assert (logits.argmax(axis=1) != labels).sum() > 30
    assert fit_temperature(logits, labels) == pytest.approx(without_a_prior(logits, labels), rel=0.02)


def test_rows_that_are_all_right_do_not_make_it_sure_of_everything():
    """20 of them: at b = 1/T the slope of the loss is -20 (0.5 - E[z]), that of the prior 1 - 1/b; their sum is 0."""
    logits = np.tile([0.5, 0.3, 0.1, 0.0], (20, 1))
    temperature = fit_temperature(logits, [0] * 20)
    share = probabilities(logits, temperature)[0]
    assert 20 * (0.5 - share @ logits[0]) == pytest.approx(1 - temperature, abs=1e-3)
    assert 0.7 < share[0] < 0.9
    fewer = probabilities(logits[:1], fit_temperature(logits[:2], [0] * 2))[0, 0]
    assert 0.25 < fewer < 0.5


def test_a_sure_model_that_is_always_right_stays_as_sure_as_it_is():
    logits = np.tile(5 * np.eye(3), (10, 1))
    assert fit_temperature(logits, [0, 1, 2] * 10) == pytest.approx(1.0, abs=0.4)


def test_few_rows_that_are_all_wrong_do_not_take_all_of_its_sureness():
    assert 2 < fit_temperature(5 * np.eye(3), [1, 2, 0]) < RANGE[1] / 2


def test_an_end_of_the_range_is_told(caplog):
    logits, labels = drawn(300, 3, 1.0)
    fit_temperature(logits, labels)
    assert caplog.text == ""
    assert fit_temperature(-logits, labels) == pytest.approx(RANGE[1], rel=0.01)
    assert "the temperature ended at 20" in caplog.text
    caplog.clear()
    assert fit_temperature(logits / 50, labels) == pytest.approx(RANGE[0], rel=0.01)
    assert "the temperature ended at 0.05" in caplog.text


def test_error_of_bins_by_hand():
    sure = [0.95, 0.95, 0.95, 0.55]
    shares = [[s, 1 - s] for s in sure]
    # the three in the last bin: two right of 2.85 expected; the one at 0.55: right
    assert expected_calibration_error(shares, [0, 0, 1, 0]) == pytest.approx((0.85 + 0.45) / 4)


def test_brier_score_is_twice_that_of_scikit_learn_for_two_classes():
    logits, labels = drawn(300, 2, 1.5)
    shares = probabilities(logits)
    assert brier_score(shares, labels) == pytest.approx(2 * brier_score_loss(labels, shares[:, 1]))


def test_probabilities_of_large_logits():
    shares = probabilities([[1e4, 0.0], [-1e4, 0.0]])
    assert shares.tolist() == [[1.0, 0.0], [0.0, 1.0]]


def test_calibrating_mends_what_is_too_sure():
    found = calibrate(*drawn(2000, 4, 4.0, seed=1), *drawn(2000, 4, 4.0, seed=2))
    assert found.temperature == pytest.approx(4.0, rel=0.15)
    for name in ("ece", "brier", "loss"):
        assert found.after[name] < found.before[name]
    assert found.after["ece"] < 0.04


def test_a_folder_keeps_its_temperature(tmp_path):
    assert load_temperature(tmp_path) == 1.0
    assert load_temperature(None) == 1.0
    save_calibration(tmp_path, 1.7)
    assert load_temperature(tmp_path) == 1.7


@pytest.mark.parametrize("content", ["{}", "[]", "no", '{"temperature": 0}', '{"temperature": "hot"}'])
def test_a_damaged_file_is_refused(content, tmp_path):
    (tmp_path / "calibration.json").write_text(content)
    with pytest.raises(CheckpointError, match="holds no positive temperature"):
        load_temperature(tmp_path)


def test_the_file_is_plain(tmp_path):
    assert json.loads(save_calibration(tmp_path, 2.0).read_text()) == {"temperature": 2.0}
