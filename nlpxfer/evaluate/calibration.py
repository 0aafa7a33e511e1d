"""How far a classifier's probabilities can be taken at their word, and one number that mends most of it.

Shapes: N rows, C classes.

Sources: temperature scaling and expected calibration error, Guo et al. 2017, arXiv:1706.04599 (sections 2 and 4.2);
Brier score over all classes, Brier 1950.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nlpxfer.errors import CheckpointError
from nlpxfer.evaluate.metrics import cross_entropy
from nlpxfer.strict_json import write_json_whole

CALIBRATION_FILE: Final = "calibration.json"
BINS: Final = 15
RANGE: Final = (0.05, 20.0)
"""Temperatures that are looked at."""


@dataclass(frozen=True)
class Calibration:
    """Temperature of a classifier, and what it does to its probabilities on rows it was not fitted on.

    Attributes:
        temperature: T; probabilities are softmax(logits / T).
        before: `ece`, `brier` and `loss` of the plain probabilities.
        after: The same with T.
    """

    temperature: float
    before: dict[str, float]
    after: dict[str, float]


def probabilities(logits_NC: ArrayLike, temperature: float = 1.0) -> NDArray[np.float64]:
    """softmax(logits / temperature) in float64, shape (N, C).

    >>> probabilities([[0.0, 0.0]]).tolist()
    [[0.5, 0.5]]
    """
    scaled_NC = np.asarray(logits_NC, dtype=np.float64) / temperature
    shares_NC = np.exp(scaled_NC - scaled_NC.max(axis=1, keepdims=True))
    return np.asarray(shares_NC / shares_NC.sum(axis=1, keepdims=True))


def fit_temperature(logits_NC: ArrayLike, labels_N: ArrayLike) -> float:
    """The T in [0.05, 20] with the lowest mean cross-entropy of softmax(logits / T).

    The loss is convex in 1/T, so a bounded search finds its one minimum. Rows that are all right, or all wrong, have
    none; the end of the range is returned for them.

    Raises:
        DataError, LabelError, NotFiniteError: See `cross_entropy`.
    """
    from scipy.optimize import minimize_scalar

    logits = np.asarray(logits_NC, dtype=np.float64)
    low, high = (1 / end for end in reversed(RANGE))
    found = minimize_scalar(
        lambda inverse: cross_entropy(logits * inverse, labels_N), bounds=(low, high), options={"xatol": 1e-5}
    )
    return float(1 / found.x)


def expected_calibration_error(shares_NC: ArrayLike, labels_N: ArrayLike, *, bins: int = BINS) -> float:
    """Mean distance between confidence and accuracy over equally wide bins of confidence, weighted by their rows.

    >>> expected_calibration_error([[0.75, 0.25]] * 4, [0, 0, 0, 1])
    0.0
    >>> expected_calibration_error([[1.0, 0.0]] * 4, [0, 0, 1, 1])
    0.5
    """
    shares = np.asarray(shares_NC, dtype=np.float64)
    sure_N, right_N = shares.max(axis=1), shares.argmax(axis=1) == np.asarray(labels_N)
    bin_N = np.minimum((sure_N * bins).astype(int), bins - 1)
    gaps = [abs(sure_N[bin_N == b].sum() - right_N[bin_N == b].sum()) for b in np.unique(bin_N)]
    return float(sum(gaps) / len(sure_N))


def brier_score(shares_NC: ArrayLike, labels_N: ArrayLike) -> float:
    """Mean squared distance between probabilities and the gold class, summed over classes: 0 to 2.

    >>> brier_score([[1.0, 0.0], [0.5, 0.5]], [0, 0])
    0.25
    """
    shares = np.asarray(shares_NC, dtype=np.float64)
    gold_NC = np.eye(shares.shape[1])[np.asarray(labels_N)]
    return float(((shares - gold_NC) ** 2).sum(axis=1).mean())


def calibrate(
    validation_logits_MC: ArrayLike, validation_labels_M: ArrayLike, logits_NC: ArrayLike, labels_N: ArrayLike
) -> Calibration:
    """Fit the temperature on validation rows and measure on others."""
    temperature = fit_temperature(validation_logits_MC, validation_labels_M)
    return Calibration(temperature, _scores(logits_NC, labels_N, 1.0), _scores(logits_NC, labels_N, temperature))


def _scores(logits_NC: ArrayLike, labels_N: ArrayLike, temperature: float) -> dict[str, float]:
    shares = probabilities(logits_NC, temperature)
    return {
        "ece": expected_calibration_error(shares, labels_N),
        "brier": brier_score(shares, labels_N),
        "loss": cross_entropy(np.asarray(logits_NC) / temperature, labels_N),
    }


def save_temperature(folder: str | Path, temperature: float) -> Path:
    """Write `calibration.json` into a model's folder."""
    return write_json_whole(Path(folder) / CALIBRATION_FILE, {"temperature": temperature})


def load_temperature(folder: str | Path | None) -> float:
    """The temperature of a model's folder; 1 where there is none.

    Raises:
        CheckpointError: `calibration.json` holds no positive temperature.
    """
    file = None if folder is None else Path(folder) / CALIBRATION_FILE
    if file is None or not file.is_file():
        return 1.0
    try:
        found: Any = json.loads(file.read_text(encoding="utf-8"))["temperature"]
        temperature = float(found)
    except (ValueError, KeyError, TypeError):
        temperature = 0.0
    if not 0 < temperature < np.inf:
        raise CheckpointError(f"{file} holds no positive temperature.", fix="remove the file, or train again")
    return temperature
