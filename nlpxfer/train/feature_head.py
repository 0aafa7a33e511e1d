"""Fit the head of a classifier on frozen features: logistic regression, or a network with one hidden layer.

Both write into the checkpoint's own head. Logistic regression makes the layer before the final one transparent, as
the linear probe does. The network is that layer and the final one, trained by AdamW on features that are scaled to
mean 0 and deviation 1; the scaling is folded into the layer's weights afterwards, so nothing but a plain checkpoint
is left. Weight decay and number of passes are those with the lowest validation loss.

AdamW on minibatches was chosen over L-BFGS on all rows because stopping early is half of the regularisation, and one
pass over ten thousand rows of 384 numbers takes a tenth of a second.

Shapes: N training rows, M validation rows, W windows of them, H hidden, C classes, B batch rows.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from nlpxfer.checkpoint.head import PooledMoments, head_features, head_logits, head_of, make_transparent_
from nlpxfer.data.tokenise import WINDOWS_PER_ROW
from nlpxfer.errors import DataError, NotFiniteError
from nlpxfer.losses.classification import labelled
from nlpxfer.methods.base import mean_by_row
from nlpxfer.methods.features import POOLED, FeatureBased, require_hidden_layer
from nlpxfer.problem import SINGLE_LABEL, ProblemType
from nlpxfer.train.linear_probe import HEAD_SIZE, Probe, fit_final_
from nlpxfer.train.predict import mean_of_windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from nlpxfer.data.tokenise import TokenisedRows

logger = logging.getLogger(__name__)

Array = np.ndarray[Any, Any]
WEIGHT_DECAYS: Final = (0.1, 1.0, 5.0)
"""Of AdamW, tried in turn where the user names none."""
CHUNK_ROWS: Final = 8192
"""Rows that go through the head at once where there is no gradient."""


@dataclass(frozen=True, kw_only=True)
class MlpPlan:
    """How the network is trained.

    Attributes:
        learning_rate: Of AdamW, constant.
        weight_decays: Tried in turn, each from the same start; the one with the lowest validation loss is kept.
        epochs: Most passes over the training rows.
        patience: Passes without a lower validation loss that end a trial; 0: never.
        batch_size: Rows per step.
        seed: Of the order of the rows.
    """

    learning_rate: float = 3e-4
    weight_decays: Sequence[float] = WEIGHT_DECAYS
    epochs: int = 50
    patience: int = 5
    batch_size: int = 256
    seed: int = 42


@dataclass(frozen=True, kw_only=True)
class MlpFit:
    """Result of training the network.

    Attributes:
        validation_loss: Mean cross-entropy of the weights that were kept, in nats.
        weight_decay: That of these weights; None if no pass improved on the start.
        epochs: Passes after which they were reached.
        steps: Optimizer steps of all trials.
        seconds: Of all trials.
        history: Weight decay, epoch, training and validation loss of each pass.
    """

    validation_loss: float
    weight_decay: float | None
    epochs: int
    steps: int
    seconds: float
    history: list[dict[str, float]] = field(default_factory=list)


def fit_logistic_head_(
    model: PreTrainedModel,
    train_NH: Array,
    train_labels: Array,
    validation_MH: Array,
    validation_labels: Array,
    *,
    problem_type: ProblemType = SINGLE_LABEL,
    windows: Sequence[TokenisedRows] | None = None,
) -> Probe:
    """Set the head in place to a probe of pooled states (`fit_probe`); the penalty with the lowest validation loss.

    Of rows in several windows the probe reads the mean over them of what the final layer reads: as that layer is
    linear, its logits are the mean of the windows' logits.

    Args:
        model: A sequence classifier of any family that `head_of` knows.
        train_NH: Pooled states of the training rows; at least two.
        train_labels: Their labels, as `LabelSchema.array` gives them; rows with -100 or NaN are left out.
        validation_MH: Pooled states of the validation rows.
        validation_labels: Their labels.
        problem_type: What the labels are.
        windows: The training and the validation rows, if the states are those of their windows.

    Raises:
        DataError: All labelled training rows have the same label.
    """
    start = time.perf_counter()
    if windows is None:
        train_NH, train_labels, _ = _labelled(train_NH, train_labels)
    if head_of(model).transforms:
        make_transparent_(model, _moments(train_NH), size=HEAD_SIZE)
    read = [_in_chunks(model, states, head_features) for states in (train_NH, validation_MH)]
    if windows is not None:
        read = [mean_of_windows(states, rows) for states, rows in zip(read, windows, strict=True)]
        read[0], train_labels, _ = _labelled(read[0], train_labels)
    fitted = fit_final_(model, read[0], train_labels, read[1], validation_labels, problem_type=problem_type)
    return Probe(fitted.loss, fitted.accuracy, fitted.penalty, time.perf_counter() - start)


def fit_mlp_head_(
    model: PreTrainedModel,
    method: FeatureBased,
    train_NH: Array,
    train_labels_N: Array,
    validation_MH: Array,
    validation_labels_M: Array,
    *,
    plan: MlpPlan,
    windows: Sequence[TokenisedRows] | None = None,
    quiet: bool = True,
) -> MlpFit:
    """Train the whole head in place on pooled states, from where it stands.

    The logits of a row in several windows are the mean of theirs, in the loss as in the classifier's answers.

    Args:
        model: A sequence classifier whose head has a hidden layer.
        method: What is minimised.
        train_NH: Pooled states of the training rows.
        train_labels_N: Their classes; rows with -100 are left out.
        validation_MH: Pooled states of the validation rows.
        validation_labels_M: Their classes.
        plan: How.
        windows: The training and the validation rows, if the states are those of their windows.
        quiet: No progress bar.

    Raises:
        ConfigError: The head has no hidden layer.
        DataError: The training rows have labels of fewer than two classes.
        NotFiniteError: The loss became NaN or infinite.
    """
    started = time.perf_counter()
    require_hidden_layer(model)
    train_windows_N, validation_windows_M = (None, None) if windows is None else (w.windows_per_row for w in windows)
    train_NH, train_labels_N, train_windows_N = _labelled(train_NH, train_labels_N, train_windows_N)
    moments = _moments(train_NH)
    with _reading_standardised(model, moments) as standardise:
        train = _Rows.of(standardise(train_NH), train_labels_N, train_windows_N)
        held_out = _Rows.of(standardise(validation_MH), validation_labels_M, validation_windows_M)
        trainer = _Trials(model, method, plan, train, held_out)
        bar = tqdm(total=len(plan.weight_decays) * plan.epochs, desc="mlp", disable=quiet, leave=False)
        with bar:
            for weight_decay in plan.weight_decays:
                for _ in trainer.passes(weight_decay):
                    bar.update()
        trainer.keep_best_()
    return MlpFit(
        validation_loss=trainer.lowest,
        weight_decay=trainer.weight_decay,
        epochs=trainer.epochs,
        steps=trainer.steps,
        seconds=time.perf_counter() - started,
        history=trainer.history,
    )


@dataclass(frozen=True, eq=False)
class _Rows:
    """States of rows or of their windows, labels, and how many windows each row has; None: one, and W is N."""

    states_WH: Tensor
    labels_N: Tensor
    windows_N: Tensor | None

    @classmethod
    def of(cls, states_WH: Tensor, labels_N: Array, windows_N: Array | None) -> _Rows:
        device = states_WH.device
        counts = None if windows_N is None else torch.from_numpy(windows_N).to(device)
        return cls(states_WH, torch.from_numpy(labels_N).to(device), counts)

    def batch(self, chosen_B: Tensor) -> dict[str, Tensor]:
        """Some rows as a method reads them."""
        labels = {"labels": self.labels_N[chosen_B]}
        if self.windows_N is None:
            return labels | {POOLED: self.states_WH[chosen_B]}
        states_WH = torch.cat([self._by_row[row] for row in chosen_B.tolist()])
        return labels | {POOLED: states_WH, WINDOWS_PER_ROW: self.windows_N[chosen_B]}

    @cached_property
    def _by_row(self) -> tuple[Tensor, ...]:
        """Views of each row's windows."""
        return torch.split(self.states_WH, 1 if self.windows_N is None else self.windows_N.tolist())


class _Trials:
    """Training runs of one head from one start, one per weight decay; remembers the best weights of all."""

    def __init__(
        self,
        model: PreTrainedModel,
        method: FeatureBased,
        plan: MlpPlan,
        train: _Rows,
        validation: _Rows,
    ) -> None:
        self.model, self.method, self.plan = model, method, plan
        self.train, self.validation = train, validation
        self.parameters = method.trained_parameters(model)
        self.start = self._copy()
        self.best = self.start
        self.lowest = self._validation_loss()
        self.weight_decay: float | None = None
        self.epochs = self.steps = 0
        self.history: list[dict[str, float]] = []

    def passes(self, weight_decay: float) -> Iterator[int]:
        """Train from the start with one weight decay; yields after each pass."""
        self._set_(self.start)
        matrices = [p for p in self.parameters.values() if p.dim() > 1]
        vectors = [p for p in self.parameters.values() if p.dim() == 1]
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=self.plan.learning_rate)
        order = torch.Generator().manual_seed(self.plan.seed)
        lowest, waited = float("inf"), 0
        for epoch in range(1, self.plan.epochs + 1):
            loss = self._pass(optimizer, order)
            validation_loss = self._validation_loss()
            self.history.append(
                {"weight_decay": weight_decay, "epoch": epoch, "loss": loss, "eval_loss": validation_loss}
            )
            if validation_loss < self.lowest:
                self.lowest, self.best = validation_loss, self._copy()
                self.weight_decay, self.epochs = weight_decay, epoch
            waited = 0 if validation_loss < lowest else waited + 1
            lowest = min(lowest, validation_loss)
            yield epoch
            if self.plan.patience and waited >= self.plan.patience:
                return

    def keep_best_(self) -> None:
        """Put the weights with the lowest validation loss into the model."""
        self._set_(self.best)

    def _pass(self, optimizer: torch.optim.Optimizer, order: torch.Generator) -> float:
        labels_N = self.train.labels_N
        total = torch.zeros((), device=labels_N.device)
        shuffled = torch.randperm(len(labels_N), generator=order).to(labels_N.device)
        for chosen in torch.split(shuffled, self.plan.batch_size):
            batch = self.train.batch(chosen)
            loss = sum(
                (term.weight * term.rows_B.sum() for term in self.method.loss_terms(self.model, batch).values()),
                start=torch.zeros((), device=total.device),
            ) / len(chosen)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            total += loss.detach() * len(chosen)
            self.steps += 1
        mean = float(total) / len(shuffled)
        if not np.isfinite(mean):
            raise NotFiniteError(
                f"The loss of the mlp became {mean}; nothing of it was saved.",
                why="the learning rate is too high",
                fix=f"--learning_rate {self.plan.learning_rate / 10:g}",
            )
        return mean

    def _validation_loss(self) -> float:
        with torch.no_grad():
            logits_MC = head_logits(self.model, self.validation.states_WH)
            if self.validation.windows_N is not None:
                logits_MC = mean_by_row(logits_MC, self.validation.windows_N)
            return float(self.method.row_losses(logits_MC, self.validation.labels_N).mean())

    def _copy(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    def _set_(self, weights: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(weights[name])


@contextmanager
def _reading_standardised(model: PreTrainedModel, moments: PooledMoments) -> Iterator[Any]:
    """Let the hidden layer read (x - m) / s instead of x; yields what computes that, and folds it back at the end.

    W x + b = (W s) ((x - m) / s) + (b + W m). A layer without a bias (ModernBERT) cannot take m: it reads x / s.
    """
    dense = next(iter(head_of(model).transforms.values()))
    device = dense.weight.device
    floor = 0.1 * float(moments.deviation_H.median()) + 1e-6
    scale_H = moments.deviation_H.clamp(min=floor).to(device)
    mean_H = torch.zeros_like(scale_H) if dense.bias is None else moments.mean_H.to(device)
    _fold_(dense, shift_H=mean_H, scale_H=scale_H)
    yield lambda states: (torch.from_numpy(states).to(device) - mean_H) / scale_H
    _fold_(dense, shift_H=-mean_H / scale_H, scale_H=1 / scale_H)


def _fold_(dense: nn.Linear, *, shift_H: Tensor, scale_H: Tensor) -> None:
    """Rewrite the layer for inputs u with x = scale u + shift; computed in float64."""
    with torch.no_grad():
        weight = dense.weight.double()
        if dense.bias is not None:
            dense.bias.copy_(dense.bias.double() + weight @ shift_H.double())
        dense.weight.copy_(weight * scale_H.double())


def _labelled(states_WH: Array, labels: Array, windows_N: Array | None = None) -> tuple[Array, Array, Array | None]:
    """The states of labelled rows or of their windows, the labels, and how many windows each has."""
    known_N = labelled(torch.from_numpy(labels)).numpy()
    if len(np.unique(labels[known_N], axis=0)) < 2:
        raise DataError("All labelled training rows have the same label.", fix="more labelled rows")
    if windows_N is None:
        return states_WH[known_N], labels[known_N], None
    return states_WH[np.repeat(known_N, windows_N)], labels[known_N], windows_N[known_N]


def _moments(states_NH: Array) -> PooledMoments:
    deviation_H, mean_H = torch.std_mean(torch.from_numpy(states_NH), dim=0)
    return PooledMoments(mean_H, deviation_H)


def _in_chunks(model: PreTrainedModel, states_NH: Array, output: Any) -> Array:  # noqa: ANN401 - a function of head.py
    """What `head_features` or `head_logits` makes of pooled states, as float32."""
    device = next(model.parameters()).device
    with torch.no_grad():
        parts = [
            output(model, torch.from_numpy(states_NH[start : start + CHUNK_ROWS]).to(device)).float().cpu().numpy()
            for start in range(0, len(states_NH), CHUNK_ROWS)
        ]
    return np.concatenate(parts)


def logits_of_features(model: PreTrainedModel, states_NH: Array) -> Array:
    """Logits (N, C) float32 of pooled states, without the body."""
    return _in_chunks(model, states_NH, head_logits)
