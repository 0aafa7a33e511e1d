"""Several teachers as one: their probabilities, each at its own temperature, averaged with weights.

Probabilities are averaged, not logits: the mean of logits lets a teacher that is sure drown all others, whatever its
weight, and depends on how each one scales its logits. The temperature of each teacher is the one that calibrates it on
the validation rows, so that the teachers mean the same by a probability. The logarithm of the mean is then the logits
that the student learns from. A regression's numbers are averaged as they are.

Weights that are learnt minimise the validation loss of the mixture over all weights that are at least 0 and sum to 1;
this problem is convex. Validation rows choose them, so the validation scores of the mixture are a little too good.

Rows that a teacher says nothing about (NaN) are answered by the others, whose weights keep their proportions.

Shapes: K teachers, N rows, M validation rows, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nlpxfer.config.teachers import LEARNT, UNIFORM, VALIDATION_LOSS
from nlpxfer.errors import ConfigError
from nlpxfer.evaluate.calibration import fit_temperature, probabilities
from nlpxfer.evaluate.task import task_metrics
from nlpxfer.problem import MULTI_LABEL, REGRESSION, ProblemType

Array = NDArray[Any]
FLOOR: Final = 1e-12
"""Least probability, so that its logarithm is finite."""
CHUNK: Final = 65536
"""Rows that are averaged at once."""


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """How K teachers make one.

    Attributes:
        problem_type: What their logits are.
        temperatures: T of each; 1 in a regression, and where no validation row could be asked.
        weights: Of each; they sum to 1.
        losses: Validation loss of each at its temperature; None where no validation row could be asked.
        how: How the weights came about.
    """

    problem_type: ProblemType
    temperatures: tuple[float, ...]
    weights: tuple[float, ...]
    losses: tuple[float | None, ...]
    how: str

    def logits(self, answers: Sequence[Array], out: Array | None = None) -> Array:
        """The logits of the mixture, float32 (N, C); NaN where no teacher with a weight says anything.

        Args:
            answers: Logits (N, C) of each teacher, NaN in rows that it says nothing about.
            out: Where to put them.
        """
        found = np.empty(answers[0].shape, dtype=np.float32) if out is None else out
        for start in range(0, len(found), CHUNK):
            part = slice(start, start + CHUNK)
            found[part] = self._mixed([logits[part] for logits in answers])
        return found

    def _mixed(self, answers: Sequence[Array]) -> Array:
        total_NC = np.zeros(answers[0].shape)
        weight_N1 = np.zeros((len(total_NC), 1))
        for logits, weight, temperature in zip(answers, self.weights, self.temperatures, strict=True):
            known_N = answered(logits)
            shares_NC = shares(np.where(known_N[:, None], logits, 0.0), temperature, self.problem_type)
            total_NC += weight * np.where(known_N[:, None], shares_NC, 0.0)
            weight_N1 += weight * known_N[:, None]
        nobody_N1 = weight_N1 == 0
        mean_NC = total_NC / np.where(nobody_N1, 1.0, weight_N1)
        if self.problem_type == MULTI_LABEL:
            sure_NC = np.clip(mean_NC, FLOOR, 1 - FLOOR)
            mean_NC = np.log(sure_NC) - np.log1p(-sure_NC)
        elif self.problem_type != REGRESSION:
            mean_NC = np.log(np.maximum(mean_NC, FLOOR))
        return np.where(nobody_N1, np.nan, mean_NC)


def answered(logits_NC: Array) -> NDArray[np.bool_]:
    """Which rows a teacher says something about."""
    return np.asarray(~np.isnan(logits_NC).any(axis=1))


def shares(logits_NC: ArrayLike, temperature: float, problem_type: ProblemType) -> Array:
    """What is averaged: probabilities, or the numbers of a regression."""
    if problem_type == REGRESSION:
        return np.asarray(logits_NC, dtype=np.float64)
    return probabilities(logits_NC, temperature, problem_type)


def fit_mixture(
    problem_type: ProblemType,
    answers: Sequence[Array],
    labels: Array,
    how: str | Sequence[float],
    *,
    tau: float,
) -> Mixture:
    """Fit temperatures and weights of K teachers on validation rows.

    Args:
        problem_type: What the logits are.
        answers: Logits (M, C) of each teacher, NaN in rows that it says nothing about.
        labels: Of the validation rows.
        how: "uniform", "validation_loss", "learnt", or the weights.
        tau: Of softmax(-validation loss / tau).

    Raises:
        ConfigError: The weights are to be found on the validation rows, and there is none that all teachers answer.
    """
    known = [answered(logits) for logits in answers]
    temperatures = [
        fit_temperature(logits[rows], labels[rows], problem_type) if rows.any() and problem_type != REGRESSION else 1.0
        for logits, rows in zip(answers, known, strict=True)
    ]
    scaled = [logits / temperature for logits, temperature in zip(answers, temperatures, strict=True)]
    losses = [
        task_metrics(problem_type, logits[rows], labels[rows])["loss"] if rows.any() else None
        for logits, rows in zip(scaled, known, strict=True)
    ]
    shared = np.logical_and.reduce(known)
    if how in (VALIDATION_LOSS, LEARNT) and not shared.any():
        raise ConfigError(
            f"teacher_weights: {how} needs validation rows that all teachers answer; there are none.",
            why="a teacher_file does not hold the validation texts",
            fix="--teacher_weights uniform, or numbers",
        )
    if how == UNIFORM:
        weights = np.full(len(answers), 1 / len(answers))
    elif how == VALIDATION_LOSS:
        common = [task_metrics(problem_type, logits[shared], labels[shared])["loss"] for logits in scaled]
        weights = loss_weights(common, tau)
    elif how == LEARNT:
        weights = learnt_weights(problem_type, [logits[shared] for logits in scaled], labels[shared])
    else:
        weights = np.asarray(how, dtype=np.float64)
    return Mixture(
        problem_type=problem_type,
        temperatures=tuple(temperatures),
        weights=tuple(weights.tolist()),
        losses=tuple(losses),
        how=how if isinstance(how, str) else "given",
    )


def loss_weights(losses: Sequence[float], tau: float) -> Array:
    """softmax(-loss / tau), shape K.

    >>> loss_weights([0.5, 0.5 + 0.1 * np.log(3)], 0.1).round(4).tolist()
    [0.75, 0.25]
    """
    return np.asarray(probabilities([[-loss for loss in losses]], tau)[0])


def learnt_weights(problem_type: ProblemType, answers: Sequence[Array], labels: Array) -> Array:
    """The weights with the lowest loss of the mixture on these rows, shape K: at least 0, and they sum to 1.

    Args:
        problem_type: What the logits are.
        answers: Logits (M, C) of each teacher, at its temperature; none of them NaN.
        labels: Of the rows.
    """
    from scipy.optimize import minimize

    found = [shares(logits, 1.0, problem_type) for logits in answers]
    if problem_type == REGRESSION:
        given_RK = np.stack([numbers[:, 0] for numbers in found], axis=1)
    elif problem_type == MULTI_LABEL:
        gold = np.asarray(labels) > 0.5
        given_RK = np.stack([np.where(gold, share, 1 - share).ravel() for share in found], axis=1)
    else:
        given_RK = np.stack([share[np.arange(len(share)), labels] for share in found], axis=1)

    def loss(weights_K: Array) -> tuple[float, Array]:
        mixed_R = given_RK @ weights_K
        if problem_type == REGRESSION:
            error_R = mixed_R - labels
            return float((error_R**2).mean() / 2), given_RK.T @ error_R / len(error_R)
        sure_R = np.maximum(mixed_R, FLOOR)
        return float(-np.log(sure_R).mean()), -(given_RK / sure_R[:, None]).mean(axis=0)

    count = len(answers)
    best = minimize(
        loss,
        np.full(count, 1 / count),
        jac=True,
        method="SLSQP",
        bounds=[(0.0, 1.0)] * count,
        constraints={"type": "eq", "fun": lambda weights: weights.sum() - 1, "jac": lambda weights: np.ones(count)},
        options={"ftol": 1e-10, "maxiter": 500},
    )
    weights_K = np.clip(best.x, 0, None)
    return np.asarray(weights_K / weights_K.sum())
