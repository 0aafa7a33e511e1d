"""Start a new classification head from the solution of a linear probe on frozen features.

A random head sends noise into the pretrained weights during its first steps. Here the layers between the pooled state
and the last linear layer are made transparent (a scaled identity), the features that the last layer then reads are
computed once, and multinomial logistic regression on them gives its weights. The start is exact: the model's first
predictions are those of the probe.

Source: Kumar et al. 2022, arXiv:2202.10054 (LP-FT).

Shapes: N rows, H features, C classes.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from nlpxfer.checkpoint.head import features, head_of, make_transparent_, pooled_moments, set_final_
from nlpxfer.data.tokenise import Collator, TokenisedRows
from nlpxfer.errors import DataError
from nlpxfer.methods.base import model_inputs
from nlpxfer.train.predict import predict

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

Array = np.ndarray[Any, Any]
PENALTIES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""Inverse L2 strengths (scikit-learn's C), weakest last, each fitted from the solution of the one before."""
ITERATIONS = 40
"""Of L-BFGS per strength. Validation accuracy settles long before the solution does."""
HEAD_SIZE = 0.5
"""Standard deviation of the states inside the transparent head: small enough that tanh is close to a straight line."""
SAMPLE_ROWS = 256
"""Training rows that the moments of the pooled state are taken from: their deviation is known to 4 %."""


@dataclass(frozen=True)
class Probe:
    """Result of a linear probe.

    Attributes:
        validation_accuracy: Share of validation rows it gets right.
        penalty: The C chosen.
        seconds: Features and fitting together.
    """

    validation_accuracy: float
    penalty: float
    seconds: float


def start_from_linear_probe_(
    model: PreTrainedModel,
    train_rows: TokenisedRows,
    validation_rows: TokenisedRows,
    collator: Collator,
    *,
    bf16: bool = False,
    quiet: bool = True,
) -> Probe:
    """Set the head of `model` in place to the solution of a linear probe.

    Args:
        model: A sequence classifier of any family that `head_of` knows.
        train_rows: Rows with `labels`; those with -100 are left out.
        validation_rows: Rows that choose the penalty.
        collator: Pads a batch.
        bf16: Compute features in bfloat16.
        quiet: No progress bar.

    Raises:
        DataError: The training rows have labels of fewer than two classes.
    """
    start = time.perf_counter()
    labels_N = train_rows.columns["labels"]
    if len(np.unique(labels_N[labels_N >= 0])) < 2:
        raise DataError(
            "The training rows have fewer than two classes.", fix="more labelled rows, or --linear_probe false"
        )
    head = head_of(model)
    if head.transforms:
        make_transparent_(model, pooled_moments(model, _sample(model, train_rows, collator)), size=HEAD_SIZE)
    labelled = train_rows.select(labels_N >= 0)
    both = [
        predict(model, rows, collator, bf16=bf16, output=_features, description="features", quiet=quiet)
        for rows in (labelled, validation_rows)
    ]
    weight_CH, bias_C, accuracy, penalty = fit_probe(
        both[0],
        labelled.columns["labels"],
        both[1],
        validation_rows.columns["labels"],
        classes=head.final.out_features,
        intercept=head.has_bias,
    )
    set_final_(model, torch.from_numpy(weight_CH), torch.from_numpy(bias_C) if head.has_bias else None)
    probe = Probe(accuracy, penalty, time.perf_counter() - start)
    logger.info("linear probe: validation accuracy %.4f with C = %g, %.1f s", accuracy, penalty, probe.seconds)
    return probe


def _features(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return features(cast("PreTrainedModel", model), inputs)


def _sample(model: PreTrainedModel, rows: TokenisedRows, collator: Collator) -> Iterator[dict[str, torch.Tensor]]:
    device = next(model.parameters()).device
    chosen = np.linspace(0, len(rows) - 1, min(SAMPLE_ROWS, len(rows))).astype(int)
    chosen = chosen[np.argsort(rows.lengths[chosen], kind="stable")]
    for start in range(0, len(chosen), 64):
        batch = collator([rows[int(i)] for i in chosen[start : start + 64]])
        yield {name: tensor.to(device) for name, tensor in model_inputs(batch).items()}


def fit_probe(
    train_NH: Array,
    train_labels_N: Array,
    validation_MH: Array,
    validation_labels_M: Array,
    *,
    classes: int,
    intercept: bool,
) -> tuple[Array, Array, float, float]:
    """Multinomial logistic regression; the penalty with the lowest validation loss.

    The loss tells strengths apart that the accuracy of a few hundred rows does not, and a probe that is too sure of
    itself is a bad start for training.

    Returns:
        Weights (C, H) and bias (C) float32 on the raw features, the validation accuracy, and the C chosen. A class
        without a training row gets weights 0 and the lowest bias.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    mean_H = train_NH.mean(axis=0) if intercept else np.zeros(train_NH.shape[1], dtype=train_NH.dtype)
    deviation_H = train_NH.std(axis=0)
    # a feature that hardly varies (MiniLM has a dead one) must not get a weight that any training step blows up
    scale_H = np.maximum(deviation_H, 0.1 * np.median(deviation_H)) + 1e-6
    standard_NH, standard_MH = (train_NH - mean_H) / scale_H, (validation_MH - mean_H) / scale_H
    best = (np.inf, 0.0, 0.0, np.zeros((0, 0)), np.zeros(0))
    fitted = LogisticRegression(fit_intercept=intercept, max_iter=ITERATIONS, tol=1e-5, warm_start=True)
    for penalty in PENALTIES:
        fitted.set_params(C=penalty)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # see ITERATIONS
            fitted.fit(standard_NH, train_labels_N)
        weight_CH, bias_C = _rows_per_class(fitted, classes)
        logits_MC = standard_MH @ weight_CH.T + bias_C
        loss = float(functional.cross_entropy(torch.from_numpy(logits_MC), torch.from_numpy(validation_labels_M)))
        if loss >= best[0]:
            break  # the loss has one minimum over the strengths
        accuracy = float(np.mean(np.argmax(logits_MC, axis=1) == validation_labels_M))
        best = (loss, accuracy, penalty, weight_CH, bias_C)
    _, accuracy, penalty, weight_CH, bias_C = best
    weight_CH = weight_CH / scale_H
    return weight_CH.astype(np.float32), (bias_C - weight_CH @ mean_H).astype(np.float32), accuracy, penalty


def _rows_per_class(fitted: Any, classes: int) -> tuple[Array, Array]:  # noqa: ANN401 - a scikit-learn estimator
    """Weights and bias with a row for each class; two classes are one row in scikit-learn."""
    coefficients, intercepts = fitted.coef_, np.broadcast_to(fitted.intercept_, len(fitted.coef_))
    if len(coefficients) == 1:
        coefficients = np.concatenate([-coefficients / 2, coefficients / 2])
        intercepts = np.concatenate([-intercepts / 2, intercepts / 2])
    weight = np.zeros((classes, coefficients.shape[1]))
    bias = np.full(classes, float(intercepts.min()) - 1.0)
    weight[fitted.classes_], bias[fitted.classes_] = coefficients, intercepts
    return weight, bias
