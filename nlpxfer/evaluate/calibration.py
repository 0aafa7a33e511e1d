"""How far a classifier's probabilities can be taken at their word, and one number that mends most of it.

Shapes: N rows, C classes.

Sources: temperature scaling and expected calibration error, Guo et al. 2017, arXiv:1706.04599 (sections 2 and 4.2);
Brier score over all classes, Brier 1950; a weakly informative prior where the rows alone decide nothing, Gelman et al.
2008, arXiv:0901.4011.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nlpxfer.errors import CheckpointError
from nlpxfer.evaluate.metrics import cross_entropy
from nlpxfer.evaluate.selective import AbstainRule
from nlpxfer.evaluate.task import binary_cross_entropy
from nlpxfer.problem import MULTI_LABEL, SINGLE_LABEL, ProblemType
from nlpxfer.strict_json import write_json_whole

logger = logging.getLogger(__name__)

CALIBRATION_FILE: Final = "calibration.json"
BINS: Final = 15
RANGE: Final = (0.05, 20.0)
"""Temperatures that are looked at."""
THRESHOLD_ROWS: Final = 5
"""Validation rows with and without a label that its threshold needs."""


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


def probabilities(
    logits_NC: ArrayLike, temperature: float = 1.0, problem_type: ProblemType = SINGLE_LABEL
) -> NDArray[np.float64]:
    """softmax(logits / temperature) in float64, shape (N, C); for multi-label the sigmoid of each.

    >>> probabilities([[0.0, 0.0]]).tolist()
    [[0.5, 0.5]]
    """
    scaled_NC = np.asarray(logits_NC, dtype=np.float64) / temperature
    if problem_type == MULTI_LABEL:
        return np.exp(-np.logaddexp(0, -scaled_NC))
    shares_NC = np.exp(scaled_NC - scaled_NC.max(axis=1, keepdims=True))
    return np.asarray(shares_NC / shares_NC.sum(axis=1, keepdims=True))


def fit_temperature(logits_NC: ArrayLike, labels: ArrayLike, problem_type: ProblemType = SINGLE_LABEL) -> float:
    """The T in [0.05, 20] with the lowest loss and a weak prior, of softmax(logits / T) or of each label's sigmoid.

    Without a prior, rows that are all right (or all wrong) have no best T: a smaller (or larger) one is always better.
    So b = 1/T has the Gamma prior b exp(-b), with the mode T = 1 and 95 % between T = 0.18 and 4.1: b - log(b) is
    added to the summed cross-entropy once. That is the remedy of Gelman et al. 2008 for separation, a weakly
    informative prior; with hundreds of rows and errors among them it moves T by a percent or so. The sum is convex in
    b, so a bounded search finds its one minimum. It may still lie at an end of the range, which a warning tells.

    Raises:
        DataError, LabelError, NotFiniteError: See `cross_entropy`.
    """
    from scipy.optimize import minimize_scalar

    logits = np.asarray(logits_NC, dtype=np.float64)
    low, high = (1 / end for end in reversed(RANGE))
    count = np.size(labels)  # of what the loss is the mean of

    def mean_loss(inverse: float) -> float:
        return _loss(logits * inverse, labels, problem_type) + (inverse - float(np.log(inverse))) / count

    temperature = float(1 / minimize_scalar(mean_loss, bounds=(low, high), options={"xatol": 1e-5}).x)
    end = min(RANGE, key=lambda end: abs(np.log(temperature / end)))
    if abs(temperature / end - 1) < 0.01:
        told = "the temperature ended at %g, the end of its range: do not trust the probabilities of this model"
        logger.warning(told, end)
    return temperature


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
    validation_logits_MC: ArrayLike,
    validation_labels: ArrayLike,
    logits_NC: ArrayLike,
    labels: ArrayLike,
    problem_type: ProblemType = SINGLE_LABEL,
) -> Calibration:
    """Fit the temperature on validation rows and measure on others.

    In a multi-label task each label of each row counts as a choice between two classes.
    """
    temperature = fit_temperature(validation_logits_MC, validation_labels, problem_type)
    before, after = (_scores(logits_NC, labels, T, problem_type) for T in (1.0, temperature))
    return Calibration(temperature, before, after)


def _loss(logits_NC: ArrayLike, labels: ArrayLike, problem_type: ProblemType) -> float:
    return binary_cross_entropy(logits_NC, labels) if problem_type == MULTI_LABEL else cross_entropy(logits_NC, labels)


def _scores(
    logits_NC: ArrayLike, labels: ArrayLike, temperature: float, problem_type: ProblemType
) -> dict[str, float]:
    shares = probabilities(logits_NC, temperature, problem_type)
    loss = _loss(np.asarray(logits_NC) / temperature, labels, problem_type)
    gold = np.asarray(labels)
    if problem_type == MULTI_LABEL:
        shares = np.stack([1 - shares.ravel(), shares.ravel()], axis=1)
        gold = (gold.ravel() > 0.5).astype(np.int64)
    return {"ece": expected_calibration_error(shares, gold), "brier": brier_score(shares, gold), "loss": loss}


def fit_thresholds(shares_NC: ArrayLike, gold_NC: ArrayLike) -> NDArray[np.float64]:
    """The threshold of each label's probability with the best F1, shape C; halfway between two rows' probabilities.

    A label with fewer than 5 rows that have it, or fewer than 5 that do not, keeps 0.5: too few to tell by.

    >>> fit_thresholds([[0.1]] * 5 + [[0.3]] * 5, [[0]] * 5 + [[1]] * 5).round(2)
    array([0.2])
    """
    shares, gold = np.asarray(shares_NC, dtype=np.float64), np.asarray(gold_NC) > 0.5
    thresholds_C = np.full(shares.shape[1], 0.5)
    for label in range(shares.shape[1]):
        having = int(gold[:, label].sum())
        if min(having, len(gold) - having) < THRESHOLD_ROWS:
            continue
        order_N = np.argsort(-shares[:, label], kind="stable")
        sorted_N = shares[order_N, label]
        hits_N = np.cumsum(gold[order_N, label])
        f1_N = 2 * hits_N / (np.arange(1, len(gold) + 1) + having)
        following_N = np.append(sorted_N[1:], 0.0)
        f1_N[sorted_N == following_N] = -1  # equal probabilities cannot be parted
        best = int(f1_N.argmax())
        thresholds_C[label] = (sorted_N[best] + following_N[best]) / 2
    return thresholds_C


def label_cuts(temperature: float, thresholds_C: ArrayLike) -> NDArray[np.float64]:
    """The logit of each label above which it is given, shape C.

    >>> label_cuts(2.0, [0.5, 0.25]).round(3)
    array([ 0.   , -2.197])

    Args:
        temperature: T of the probabilities.
        thresholds_C: Thresholds of these.
    """
    from scipy.special import logit

    return np.asarray(temperature * logit(np.asarray(thresholds_C, dtype=np.float64)))


def save_calibration(
    folder: str | Path,
    temperature: float,
    thresholds: Mapping[str, float] | None = None,
    abstain: AbstainRule | None = None,
) -> Path:
    """Write `calibration.json` into a model's folder.

    Args:
        folder: Of the model.
        temperature: T of its probabilities.
        thresholds: Multi-label: the threshold of each label.
        abstain: When it answers, if there is a rule for that.
    """
    content: dict[str, Any] = {"temperature": temperature}
    content |= {} if thresholds is None else {"thresholds": dict(thresholds)}
    content |= {} if abstain is None else {"abstain": vars(abstain)}
    return write_json_whole(Path(folder) / CALIBRATION_FILE, content)


def load_thresholds(folder: str | Path | None, names: Sequence[str]) -> NDArray[np.float64]:
    """The threshold of each label's calibrated probability, in the order of `names`; 0.5 where there is none.

    Raises:
        CheckpointError: `calibration.json` has thresholds of other labels, or none between 0 and 1.
    """
    file = _calibration_file(folder)
    if file is None:
        return np.full(len(names), 0.5)
    try:
        found = json.loads(file.read_text(encoding="utf-8")).get("thresholds")
        thresholds_C = np.full(len(names), 0.5) if found is None else np.array([float(found[name]) for name in names])
    except (ValueError, KeyError, TypeError, AttributeError):
        thresholds_C = np.full(1, np.nan)
    if not ((thresholds_C >= 0) & (thresholds_C <= 1)).all():
        raise CheckpointError(
            f"{file} does not hold a threshold between 0 and 1 for each label.",
            fix="remove the file, or train again",
            available=names,
        )
    return thresholds_C


def load_temperature(folder: str | Path | None) -> float:
    """The temperature of a model's folder; 1 where there is none.

    Raises:
        CheckpointError: `calibration.json` holds no positive temperature.
    """
    file = _calibration_file(folder)
    if file is None:
        return 1.0
    try:
        found: Any = json.loads(file.read_text(encoding="utf-8"))["temperature"]
        temperature = float(found)
    except (ValueError, KeyError, TypeError):
        temperature = 0.0
    if not 0 < temperature < np.inf:
        raise CheckpointError(f"{file} holds no positive temperature.", fix="remove the file, or train again")
    return temperature


def load_abstain_rule(folder: str | Path | None) -> AbstainRule | None:
    """The rule for abstaining of a model's folder, if it has one.

    Raises:
        CheckpointError: `calibration.json` holds one that cannot be used.
    """
    file = _calibration_file(folder)
    if file is None:
        return None
    try:
        found: Any = json.loads(file.read_text(encoding="utf-8")).get("abstain")
        return None if found is None else AbstainRule.from_plain(found)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{file} holds no usable rule for abstaining.", fix="remove 'abstain' from it, or train again"
        ) from error


def _calibration_file(folder: str | Path | None) -> Path | None:
    file = None if folder is None else Path(folder) / CALIBRATION_FILE
    return file if file is not None and file.is_file() else None
