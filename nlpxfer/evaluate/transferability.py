"""How well frozen features suit a task, without training on them.

Shapes: N rows, D features, C targets.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

Array = np.ndarray[Any, Any]
RATIOS: Final = (-8.0, 6.0)
"""Decades of the ratio of the precisions, relative to the largest squared singular value."""
POINTS: Final = 57
"""Ratios that are looked at: a quarter of a decade apart, then as many around the best one."""


def logme(features_ND: Array, targets_NC: Array) -> float:
    """LogME: how likely linear regression on the features makes the targets, the mean over these.

    It is the log evidence of Bayesian linear regression per degree of freedom, at the precisions of prior and noise
    that maximise it. Targets are a number, several labels of 0 and 1, or one column per class; those that do not vary
    are left out. Larger is better; comparable among features of the same rows.

    Unlike the source's, features and targets are centred, which leaves N - 1 degrees of freedom; the rank of the
    features stands for their number, without which noise can rank above signal where there are fewer rows than
    features; and the maximum is looked for along the one ratio that it depends on, as a fixed point can stop far from
    it.

    Raises:
        ValueError: Shapes do not fit, there are fewer than two rows, or no target varies.

    Source: You et al. 2021, LogME, arXiv:2102.11005, section 4.
    """
    if features_ND.ndim != 2 or targets_NC.ndim != 2 or len(features_ND) != len(targets_NC) or len(features_ND) < 2:
        raise ValueError(f"logme got features {features_ND.shape} and targets {targets_NC.shape}")
    x_ND = features_ND.astype(np.float64) - features_ND.mean(axis=0, dtype=np.float64)
    varying_NC = targets_NC[:, np.ptp(targets_NC, axis=0) > 0].astype(np.float64)
    if not varying_NC.shape[1]:
        raise ValueError("no target varies")
    y_NC = varying_NC - varying_NC.mean(axis=0)
    freedom = len(x_ND) - 1
    left, sizes, _ = np.linalg.svd(x_ND, full_matrices=False)
    kept = sizes > sizes[0] * max(x_ND.shape) * np.finfo(np.float32).eps
    variances_R, along_RC = np.square(sizes[kept]), np.square(left[:, kept].T @ y_NC)
    outside_C = np.maximum(np.square(y_NC).sum(axis=0) - along_RC.sum(axis=0), 0.0)
    largest = float(np.square(sizes[0])) or 1.0  # features that do not vary: any ratio
    logs, step = np.linspace(*RATIOS, POINTS, retstep=True)
    coarse_PC = _evidences(freedom, variances_R, along_RC, outside_C, largest * 10**logs)
    best = []
    for c, place in enumerate(logs[coarse_PC.argmax(axis=0)]):
        ratios_P = largest * 10 ** np.linspace(place - step, place + step, POINTS)
        best.append(_evidences(freedom, variances_R, along_RC[:, [c]], outside_C[[c]], ratios_P).max())
    return float(np.mean(best)) / freedom


def _evidences(freedom: int, variances_R: Array, along_RC: Array, outside_C: Array, ratios_P: Array) -> Array:
    """Log evidence for P ratios of the precisions (prior over noise), each with the best precision of the noise.

    With the ratio t the covariance of a target is (I + X X^T / t) / noise, diagonal along the singular vectors.

    Args:
        freedom: Dimensions of the centred targets, N - 1.
        variances_R: Squared singular values of the features.
        along_RC: Squared coordinates of the targets along their directions.
        outside_C: Squared length of what is left of the targets.
        ratios_P: t.

    Returns:
        evidences_PC.
    """
    shares_PR = ratios_P[:, None] / (variances_R + ratios_P[:, None])
    lengths_PC = shares_PR @ along_RC + outside_C
    spread_P1 = np.log(shares_PR).sum(axis=1, keepdims=True)
    return np.asarray(0.5 * (spread_P1 - freedom * (np.log(2 * np.pi * lengths_PC / freedom) + 1)))
