"""Start a new classification head from the solution of a linear probe on frozen features.

A random head sends noise into the pretrained weights during its first steps. Here the layers between the pooled state
and the last linear layer are made transparent (a scaled identity), the features that the last layer then reads are
computed once, and multinomial logistic regression on them gives its weights; for multi-label one logistic regression
per label, for numbers a ridge regression. The start is exact: the model's first classes are those of the probe, and at
the probe's own size its first logits too.

A probe's weights are many times as large as those of a random head, and the larger they are, the less the features
have to change until all training rows are right: little is learnt, and the model is too sure (Tomihari and Sato 2024,
section 4). Where layers learn, a head of classes therefore starts with the probe's weights at the size of a random
head's. Not so one of several labels or of numbers, whose answers depend on the size.

Sources: Kumar et al. 2022, arXiv:2202.10054 (LP-FT); Tomihari and Sato 2024, arXiv:2405.16747.

Shapes: N rows, H features, C classes.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from nlpxfer.checkpoint.head import features, head_of, make_transparent_, pooled_moments, set_final_
from nlpxfer.data.tokenise import Collator, TokenisedRows
from nlpxfer.errors import DataError, NotFiniteError
from nlpxfer.losses.classification import gold_loss
from nlpxfer.losses.classification import labelled as rows_with_labels
from nlpxfer.methods.base import model_inputs
from nlpxfer.problem import MULTI_LABEL, REGRESSION, SINGLE_LABEL, ProblemType
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
"""Training rows, or their windows, that the moments of the pooled state are taken from: known to 4 %."""


@dataclass(frozen=True)
class Probe:
    """Result of a linear probe.

    Attributes:
        validation_loss: In nats, for a regression half the squared error.
        validation_accuracy: Share of validation rows it gets right; None where a row has not one class.
        penalty: The C chosen.
        seconds: Features and fitting together.
    """

    validation_loss: float
    validation_accuracy: float | None
    penalty: float
    seconds: float

    def __str__(self) -> str:
        """The validation score and the penalty."""
        right = self.validation_accuracy
        score = f"loss {self.validation_loss:.4f}" if right is None else f"accuracy {right:.4f}"
        return f"validation {score} with C = {self.penalty:g}"


def start_from_linear_probe_(
    model: PreTrainedModel,
    train_rows: TokenisedRows,
    validation_rows: TokenisedRows,
    collator: Collator,
    *,
    problem_type: ProblemType = SINGLE_LABEL,
    size: float = 0.0,
    batch_size: int = 64,
    bf16: bool = False,
    quiet: bool = True,
) -> Probe:
    """Set the head of `model` in place to the solution of a linear probe.

    Args:
        model: A sequence classifier of any family that `head_of` knows.
        train_rows: Rows with `labels`; those with -100 or NaN are left out.
        validation_rows: Rows that choose the penalty.
        collator: Pads a batch.
        problem_type: What the labels are.
        size: Root mean square that the final layer's weights are scaled down to (`FittedProbe.of_size`); 0: they stay.
        batch_size: As for `predict`.
        bf16: Compute features in bfloat16.
        quiet: No progress bar.

    Raises:
        DataError: The training rows have labels of fewer than two classes.
    """
    start = time.perf_counter()
    labelled = train_rows.select(rows_with_labels(torch.from_numpy(train_rows.columns["labels"])).numpy())
    if len(np.unique(labelled.columns["labels"], axis=0)) < 2:
        raise DataError(
            "All labelled training rows have the same label.", fix="more labelled rows, or --linear_probe false"
        )
    head = head_of(model)
    if head.transforms:
        sample = sample_batches(model, train_rows, collator, batch_size=batch_size)
        make_transparent_(model, pooled_moments(model, sample), size=HEAD_SIZE)
    what: dict[str, Any] = {"output": _features, "description": "features", "quiet": quiet}
    both = [
        predict(model, rows, collator, batch_size=batch_size, bf16=bf16, **what)
        for rows in (labelled, validation_rows)
    ]
    fitted = fit_final_(
        model,
        both[0],
        labelled.columns["labels"],
        both[1],
        validation_rows.columns["labels"],
        problem_type=problem_type,
        size=size,
    )
    probe = Probe(fitted.loss, fitted.accuracy, fitted.penalty, time.perf_counter() - start)
    logger.info("linear probe: %s, %.1f s", probe, probe.seconds)
    return probe


def fit_final_(
    model: PreTrainedModel,
    train_NH: Array,
    train_labels: Array,
    validation_MH: Array,
    validation_labels: Array,
    *,
    problem_type: ProblemType = SINGLE_LABEL,
    size: float = 0.0,
) -> FittedProbe:
    """Set the final layer of `model` to `fit_probe` of what it reads, scaled down to `size`; returns it whole."""
    head = head_of(model)
    fitted = fit_probe(
        train_NH,
        train_labels,
        validation_MH,
        validation_labels,
        classes=head.final.out_features,
        intercept=head.has_bias,
        problem_type=problem_type,
    )
    start = fitted.of_size(size) if size else fitted
    set_final_(model, torch.from_numpy(start.weight_CH), torch.from_numpy(start.bias_C) if head.has_bias else None)
    return fitted


def _features(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return features(cast("PreTrainedModel", model), inputs)


def sample_batches(
    model: PreTrainedModel, rows: TokenisedRows, collator: Collator, *, batch_size: int = 64
) -> Iterator[dict[str, torch.Tensor]]:
    """Inputs of up to `SAMPLE_ROWS` evenly spread rows or windows, on the model's device."""
    device = next(model.parameters()).device
    rows = rows.each_window()  # whose states the head reads
    chosen = np.linspace(0, len(rows) - 1, min(SAMPLE_ROWS, len(rows))).astype(int)
    chosen = chosen[np.argsort(rows.lengths[chosen], kind="stable")]
    for start in range(0, len(chosen), batch_size):
        batch = collator([rows[int(i)] for i in chosen[start : start + batch_size]])
        yield {name: tensor.to(device) for name, tensor in model_inputs(batch).items()}


@dataclass(frozen=True, eq=False)
class FittedProbe:
    """A linear layer on raw features, with the penalty that had the lowest validation loss.

    Attributes:
        weight_CH: float32.
        bias_C: float32.
        loss: Validation loss.
        accuracy: Validation accuracy; None where a row has not one class.
        penalty: The C chosen.
    """

    weight_CH: Array
    bias_C: Array
    loss: float
    accuracy: float | None
    penalty: float

    def of_size(self, size: float) -> FittedProbe:
        """The same probe with weights and bias scaled down: the same classes, less sure.

        Args:
            size: Root mean square of the weights; a probe whose weights are no larger stays as it is.
        """
        share = min(1.0, size / max(float(np.sqrt(np.mean(np.square(self.weight_CH)))), 1e-12))
        return replace(self, weight_CH=share * self.weight_CH, bias_C=share * self.bias_C)


def fit_probe(
    train_NH: Array,
    train_labels: Array,
    validation_MH: Array,
    validation_labels: Array,
    *,
    classes: int,
    intercept: bool,
    problem_type: ProblemType = SINGLE_LABEL,
) -> FittedProbe:
    """Logistic regression, multinomial or per label, or ridge regression; the penalty has the lowest validation loss.

    The loss tells strengths apart that the accuracy of a few hundred rows does not, and a probe that is too sure of
    itself is a bad start for training.

    Args:
        train_NH: Features of the training rows.
        train_labels: As `LabelSchema.array` gives them.
        validation_MH: Features of the validation rows.
        validation_labels: Likewise.
        classes: C. A class without a training row gets weights 0 and the lowest bias.
        intercept: Whether the layer has a bias.
        problem_type: What the labels are.
    """
    mean_H = train_NH.mean(axis=0) if intercept else np.zeros(train_NH.shape[1], dtype=train_NH.dtype)
    deviation_H = train_NH.std(axis=0)
    # a feature that hardly varies (MiniLM has a dead one) must not get a weight that any training step blows up
    scale_H = np.maximum(deviation_H, 0.1 * np.median(deviation_H)) + 1e-6
    standard_NH, standard_MH = (train_NH - mean_H) / scale_H, (validation_MH - mean_H) / scale_H
    solver = {SINGLE_LABEL: _softmax_solver, MULTI_LABEL: _sigmoid_solver, REGRESSION: _ridge_solver}[problem_type]
    solve = solver(standard_NH, train_labels, classes, intercept)
    gold = torch.from_numpy(np.asarray(validation_labels))
    best: FittedProbe | None = None
    for penalty in PENALTIES:
        weight_CH, bias_C = solve(penalty)
        logits_MC = standard_MH @ weight_CH.T + bias_C
        loss = float(gold_loss(problem_type, torch.from_numpy(logits_MC), gold).mean())
        if best is not None and loss >= best.loss:
            break  # the loss has one minimum over the strengths
        right = float(np.mean(np.argmax(logits_MC, axis=1) == validation_labels)) if gold.dim() == 1 else 0.0
        accuracy = right if problem_type == SINGLE_LABEL else None
        best = FittedProbe(weight_CH, bias_C, loss, accuracy, penalty)
    if best is None or not np.isfinite(best.loss):
        raise NotFiniteError("The linear probe has no finite validation loss.", why="a feature is NaN or infinite")
    weight_CH = best.weight_CH / scale_H
    bias_C = best.bias_C - weight_CH @ mean_H
    return replace(best, weight_CH=weight_CH.astype(np.float32), bias_C=bias_C.astype(np.float32))


Solver = Callable[[float], tuple[Array, Array]]
"""From an inverse L2 strength to weights (C, H) and bias (C); starts from the solution before."""


def _softmax_solver(features_NH: Array, labels_N: Array, classes: int, intercept: bool) -> Solver:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    fitted = LogisticRegression(fit_intercept=intercept, max_iter=ITERATIONS, tol=1e-5, warm_start=True)

    def solve(penalty: float) -> tuple[Array, Array]:
        fitted.set_params(C=penalty)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # see ITERATIONS
            fitted.fit(features_NH, labels_N)
        return _rows_per_class(fitted, classes)

    return solve


def _sigmoid_solver(features_NH: Array, labels_NC: Array, classes: int, intercept: bool) -> Solver:
    """All labels in one L-BFGS: a hundred labels cost a few matrix products each step, not a hundred fits."""
    x_NH, gold_NC = torch.from_numpy(features_NH).double(), torch.from_numpy(labels_NC).double()
    weight_CH = torch.zeros(classes, x_NH.shape[1], dtype=torch.float64, requires_grad=True)
    share_C = gold_NC.mean(dim=0).clamp(1 / (2 * len(x_NH)), 1 - 1 / (2 * len(x_NH)))
    bias_C = torch.logit(share_C) if intercept else torch.zeros(classes, dtype=torch.float64)
    learnt = [weight_CH, bias_C.requires_grad_(True)] if intercept else [weight_CH]

    def solve(penalty: float) -> tuple[Array, Array]:
        optimizer = torch.optim.LBFGS(learnt, max_iter=ITERATIONS, line_search_fn="strong_wolfe")

        def loss() -> torch.Tensor:
            optimizer.zero_grad()
            cells = functional.binary_cross_entropy_with_logits(x_NH @ weight_CH.T + bias_C, gold_NC, reduction="sum")
            # per row, so that the tolerances of L-BFGS mean the same for any number of rows
            total = (cells + weight_CH.square().sum() / (2 * penalty)) / len(x_NH)
            total.backward()  # type: ignore[no-untyped-call]
            return total

        optimizer.step(loss)  # type: ignore[no-untyped-call]
        return weight_CH.detach().numpy().copy(), bias_C.detach().numpy().copy()

    return solve


def _ridge_solver(features_NH: Array, numbers_N: Array, classes: int, intercept: bool) -> Solver:
    from sklearn.linear_model import Ridge

    def solve(penalty: float) -> tuple[Array, Array]:
        # strengths per row: those of squared errors are about as large as the number of rows
        fitted = Ridge(alpha=len(features_NH) * 0.01 / penalty, fit_intercept=intercept).fit(features_NH, numbers_N)
        return np.asarray(fitted.coef_)[None], np.atleast_1d(np.asarray(fitted.intercept_, dtype=np.float64))

    return solve


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
