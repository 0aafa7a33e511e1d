"""Several teachers as one: averaged probabilities, calibrated, with weights that can be checked by hand."""

import numpy as np
import pytest

from nlpxfer.errors import ConfigError
from nlpxfer.evaluate.calibration import fit_temperature, probabilities
from nlpxfer.evaluate.mixture import Mixture, fit_mixture, learnt_weights, loss_weights
from nlpxfer.problem import MULTI_LABEL, REGRESSION, SINGLE_LABEL


def mixture(kind, weights, temperatures=None):
    count = len(weights)
    return Mixture(
        problem_type=kind,
        weights=tuple(weights),
        temperatures=tuple(temperatures or [1.0] * count),
        losses=(None,) * count,
        how="given",
    )


def logit(p):
    return np.log(p) - np.log1p(-p)


def test_probabilities_are_averaged_and_not_logits():
    """0.25 * (0.8, 0.2) + 0.75 * (0.1, 0.9) = (0.275, 0.725)."""
    first, second = np.log([[0.8, 0.2]]), np.log([[0.1, 0.9]])
    mixed = mixture(SINGLE_LABEL, [0.25, 0.75]).logits([first + 5, second - 3])
    np.testing.assert_allclose(np.exp(mixed), [[0.275, 0.725]], rtol=1e-6)
    assert mixed.dtype == np.float32


def test_each_teacher_has_its_temperature():
    sharp = np.array([[4.0, 0.0]])
    mixed = mixture(SINGLE_LABEL, [0.5, 0.5], [4.0, 1.0]).logits([sharp, sharp])
    expected = (1 / (1 + np.exp(-1.0)) + 1 / (1 + np.exp(-4.0))) / 2
    np.testing.assert_allclose(np.exp(mixed[0, 0]), expected, rtol=1e-6)


def test_labels_of_a_row_are_averaged_one_by_one():
    first, second = logit(np.array([[0.9, 0.2]])), logit(np.array([[0.5, 0.4]]))
    mixed = mixture(MULTI_LABEL, [0.5, 0.5]).logits([first, second])
    np.testing.assert_allclose(1 / (1 + np.exp(-mixed)), [[0.7, 0.3]], rtol=1e-6)


def test_numbers_are_averaged_as_they_are():
    assert mixture(REGRESSION, [0.25, 0.75]).logits([np.array([[4.0]]), np.array([[8.0]])]).tolist() == [[7.0]]


def test_rows_that_a_teacher_leaves_out_are_the_others():
    silent = np.full((1, 2), np.nan)
    first, second, third = (np.log([[p, 1 - p]]) for p in (0.8, 0.1, 0.5))
    mixed = mixture(SINGLE_LABEL, [0.5, 0.3, 0.2]).logits([np.vstack([first, silent, silent]),
                                                           np.vstack([silent, second, silent]),
                                                           np.vstack([third, third, silent])])  # fmt: skip
    np.testing.assert_allclose(np.exp(mixed[0, 0]), (0.5 * 0.8 + 0.2 * 0.5) / 0.7, rtol=1e-6)
    np.testing.assert_allclose(np.exp(mixed[1, 0]), (0.3 * 0.1 + 0.2 * 0.5) / 0.5, rtol=1e-6)
    assert np.isnan(mixed[2]).all()


def test_what_is_impossible_to_all_stays_finite():
    sure = np.array([[900.0, 0.0]])
    for kind in (SINGLE_LABEL, MULTI_LABEL):
        assert np.isfinite(mixture(kind, [0.5, 0.5]).logits([sure, sure])).all()


def test_many_rows_go_in_pieces(monkeypatch):
    rng = np.random.default_rng(0)
    answers = [rng.normal(size=(50, 3)) for _ in range(2)]
    whole = mixture(SINGLE_LABEL, [0.4, 0.6]).logits(answers)
    monkeypatch.setattr("nlpxfer.evaluate.mixture.CHUNK", 7)
    room = np.empty((50, 3), dtype=np.float32)
    assert mixture(SINGLE_LABEL, [0.4, 0.6]).logits(answers, room) is room
    np.testing.assert_array_equal(room, whole)


def noisy(rng, labels, classes, strength):
    logits = rng.normal(size=(len(labels), classes))
    logits[np.arange(len(labels)), labels] += strength
    return logits


@pytest.fixture
def panel():
    """A good teacher, a sharpened copy of a worse one, and one that guesses."""
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 3, size=400)
    return [noisy(rng, labels, 3, 2.5), 6 * noisy(rng, labels, 3, 1.5), noisy(rng, labels, 3, 0.0)], labels


def test_temperatures_are_those_of_calibration(panel):
    answers, labels = panel
    found = fit_mixture(SINGLE_LABEL, answers, labels, "uniform", tau=0.1)
    assert found.weights == (1 / 3,) * 3
    np.testing.assert_allclose(found.temperatures, [fit_temperature(logits, labels) for logits in answers])
    assert found.temperatures[1] > 4 * found.temperatures[0]
    assert found.losses[0] < found.losses[1] < found.losses[2]


def test_weights_from_validation_losses(panel):
    answers, labels = panel
    found = fit_mixture(SINGLE_LABEL, answers, labels, "validation_loss", tau=0.2)
    expected = np.exp(-np.array(found.losses) / 0.2)
    np.testing.assert_allclose(found.weights, expected / expected.sum(), rtol=1e-6)
    np.testing.assert_allclose(loss_weights([0.3, 0.3], 1e-3), [0.5, 0.5])
    assert max(fit_mixture(SINGLE_LABEL, answers, labels, "validation_loss", tau=1e-3).weights) > 0.999


def expectation_maximisation(given_RK, rounds=20000):
    """An independent way to the same weights: EM for the shares of a mixture of fixed distributions."""
    weights = np.full(given_RK.shape[1], 1 / given_RK.shape[1])
    for _ in range(rounds):
        joint = given_RK * weights
        weights = (joint / joint.sum(axis=1, keepdims=True)).mean(axis=0)
    return weights


def test_learnt_weights_are_those_of_expectation_maximisation(panel):
    answers, labels = panel
    found = fit_mixture(SINGLE_LABEL, answers, labels, "learnt", tau=0.1)
    shares = [probabilities(a, t) for a, t in zip(answers, found.temperatures, strict=True)]
    given = np.stack([share[np.arange(len(labels)), labels] for share in shares], axis=1)
    np.testing.assert_allclose(found.weights, expectation_maximisation(given), atol=2e-3)
    assert sum(found.weights) == pytest.approx(1)
    assert found.weights[2] < 0.05


def test_learnt_weights_of_labels_and_numbers():
    rng = np.random.default_rng(5)
    gold = (rng.random((300, 4)) < 0.4).astype(np.float32)
    answers = [rng.normal(size=gold.shape) + strength * (2 * gold - 1) for strength in (1.2, 0.9)]
    shares = [1 / (1 + np.exp(-a)) for a in answers]
    given = np.stack([np.where(gold > 0.5, s, 1 - s).ravel() for s in shares], axis=1)
    np.testing.assert_allclose(
        learnt_weights(MULTI_LABEL, answers, gold), expectation_maximisation(given, 3000), atol=2e-3
    )
    numbers = rng.normal(size=500)
    noises = rng.normal(size=(2, 500)) * np.array([[1.0], [2.0]])
    given = [(numbers + noise)[:, None] for noise in noises]
    first, second = noises  # least squares on a line: the best share of the first
    best = float((second * (second - first)).sum() / ((second - first) ** 2).sum())
    np.testing.assert_allclose(learnt_weights(REGRESSION, given, numbers), [best, 1 - best], atol=1e-4)


def test_a_learnt_mixture_is_not_worse_than_any_other(panel):
    answers, labels = panel
    loss = {}
    for how in ("learnt", "uniform", "validation_loss", (1.0, 0.0, 0.0)):
        mixed = fit_mixture(SINGLE_LABEL, answers, labels, how, tau=0.1).logits(answers)
        loss[how] = -mixed[np.arange(len(labels)), labels].astype(np.float64).mean()
    assert loss["learnt"] <= min(loss.values()) + 1e-6


def test_weights_cannot_be_found_without_rows(panel):
    answers, labels = panel
    silent = np.full_like(answers[0], np.nan)
    for how in ("learnt", "validation_loss"):
        with pytest.raises(ConfigError, match=f"teacher_weights: {how} needs validation rows"):
            fit_mixture(SINGLE_LABEL, [answers[0], silent], labels, how, tau=0.1)
    found = fit_mixture(SINGLE_LABEL, [answers[0], silent], labels, "uniform", tau=0.1)
    assert found.temperatures[1] == 1.0
    assert found.losses[1] is None
