"""Losses on logits, one number per row, so that the caller alone decides what they are divided by.

For each problem type one with gold labels (`label_loss`, `binary_label_loss`, `number_loss`) and one with a teacher's
logits (`soft_target_loss`, `binary_soft_target_loss`, `number_loss`).

Shapes: B batch rows, C classes.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from nlpxfer.problem import MULTI_LABEL, REGRESSION, ProblemType

KdLoss = Literal["kl", "mse"]
"""How logits of student and teacher are compared: by T^2 * KL, or by the squared error."""

IGNORED_LABEL = -100
"""Class index of a row without a label; its loss is 0 and it is not counted. Where labels are floats, NaN is."""


def labelled(labels: Tensor) -> Tensor:
    """Which rows have a label; bool, shape B.

    Args:
        labels: Class indices (B), zeros and ones per label (B, C), or numbers (B).
    """
    if not labels.is_floating_point():
        return labels.ne(IGNORED_LABEL)
    known = ~labels.isnan()
    return known.all(dim=1) if known.dim() > 1 else known


def label_loss(
    logits_BC: Tensor,
    labels_B: Tensor,
    *,
    label_smoothing: float = 0.0,
    focal_gamma: float = 0.0,
    class_weights_C: Tensor | None = None,
    offsets_C: Tensor | None = None,
) -> Tensor:
    """Cross-entropy with the gold label, in nats; shape B, 0 where the label is -100.

    Args:
        logits_BC: Class logits of any float type; computed in float32 or above.
        labels_B: Class indices, or -100 for a row without a label.
        label_smoothing: Share of the target spread evenly over all classes, in [0, 1).
        focal_gamma: Each row counts (1 - p)^gamma, with p the probability of its gold label.
        class_weights_C: Each row counts the weight of its gold label.
        offsets_C: Added to the logits first: tau times the log of the class shares is logit adjustment.

    Sources: Szegedy et al. 2016, arXiv:1512.00567, section 7 (smoothing); Lin et al. 2017, arXiv:1708.02002,
    equation 4 (focal); Menon et al. 2021, arXiv:2007.07314, equation 10 (logit adjustment).

    >>> label_loss(torch.tensor([[0.0, 0.0], [3.0, 1.0]]), torch.tensor([0, -100]))
    tensor([0.6931, 0.0000])
    >>> label_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([0]), focal_gamma=2.0)  # a quarter of 0.6931
    tensor([0.1733])
    """
    logits_BC = at_least_float32(logits_BC)
    if offsets_C is not None:
        logits_BC = logits_BC + offsets_C
    loss_B = functional.cross_entropy(
        logits_BC, labels_B, ignore_index=IGNORED_LABEL, reduction="none", label_smoothing=label_smoothing
    )
    gold_B = labels_B.clamp(min=0)
    if focal_gamma:
        share_B = functional.softmax(logits_BC, dim=-1).gather(1, gold_B[:, None])[:, 0]
        # away from 1, where the power has no gradient for a gamma below 1
        loss_B = loss_B * (1 - share_B).clamp(min=1e-6) ** focal_gamma
    if class_weights_C is not None:
        loss_B = loss_B * class_weights_C[gold_B]
    return loss_B


def r_drop_loss(first_BC: Tensor, second_BC: Tensor) -> Tensor:
    """(KL(p || q) + KL(q || p)) / 2 of two answers to the same rows, p = softmax(first), in nats; shape B.

    Both sides receive the gradient. R-Drop adds alpha times this to the mean of the two label losses, as the authors'
    code has it. Equation 4 of the paper has the sum of the two label losses instead, so its alpha is twice as large
    for the same ratio, and its loss as a whole too.

    Args:
        first_BC: Logits of one pass with dropout.
        second_BC: Logits of another.

    Raises:
        ValueError: The shapes differ.

    Source: Liang, Wu et al. 2021, arXiv:2106.14448, equations 1 to 4.

    >>> r_drop_loss(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]]))  # 2 (p - q) = 2 tanh(1)
    tensor([1.5232])
    """
    _check_shapes(first_BC, second_BC)
    first_log_BC = functional.log_softmax(at_least_float32(first_BC), dim=-1)
    second_log_BC = functional.log_softmax(at_least_float32(second_BC), dim=-1)
    # the sum of the two divergences, of which each alone may lose its digits near 0
    return ((first_log_BC.exp() - second_log_BC.exp()) * (first_log_BC - second_log_BC)).sum(dim=-1) / 2


def soft_target_loss(student_BC: Tensor, teacher_BC: Tensor, *, temperature: float) -> Tensor:
    """T^2 * KL(teacher || student) of the distributions softened by T, in nats; shape B.

    Summed over classes, never averaged over them. T^2 keeps the size of the gradient about constant over T.

    Args:
        student_BC: Student logits; receives the gradient.
        teacher_BC: Teacher logits, columns in the student's label order.
        temperature: T, above 0 and finite.

    Raises:
        ValueError: `temperature` is not positive and finite, or the shapes differ.

    Source: Hinton, Vinyals and Dean 2015, arXiv:1503.02531, section 2.

    >>> soft_target_loss(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]]), temperature=2.0)
    tensor([1.8485])
    >>> soft_target_loss(torch.tensor([[2.0, 0.0]]), torch.tensor([[2.0, 0.0]]), temperature=5.0)
    tensor([0.])
    """
    _check_soft(student_BC, teacher_BC, temperature)
    student_log_BC = functional.log_softmax(at_least_float32(student_BC) / temperature, dim=-1)
    teacher_log_BC = functional.log_softmax(at_least_float32(teacher_BC) / temperature, dim=-1)
    divergence_BC = functional.kl_div(student_log_BC, teacher_log_BC, log_target=True, reduction="none")
    return temperature**2 * divergence_BC.sum(dim=-1)


def logit_loss(student_BC: Tensor, teacher_BC: Tensor) -> Tensor:
    """Squared error between logits, averaged over the classes; shape B.

    For large T and logits of mean 0, T^2 * KL of `soft_target_loss` goes to half of this. Unlike that, this one also
    moves the mean of a row's logits towards the teacher's.

    Args:
        student_BC: Student logits; receives the gradient.
        teacher_BC: Teacher logits, columns in the student's label order.

    Raises:
        ValueError: The shapes differ.

    Source: Kim et al. 2021, arXiv:2105.08919, section 3, as their code averages it.

    >>> logit_loss(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]]))  # (4 + 1) / 2
    tensor([2.5000])
    """
    _check_shapes(student_BC, teacher_BC)
    return (at_least_float32(student_BC) - at_least_float32(teacher_BC)).square().mean(dim=-1)


def binary_r_drop_loss(first_BC: Tensor, second_BC: Tensor) -> Tensor:
    """`r_drop_loss` of each label's yes or no, p = sigmoid(first), in nats, averaged over the labels; shape B.

    Raises:
        ValueError: The shapes differ.

    >>> binary_r_drop_loss(torch.tensor([[2.0, 5.0]]), torch.tensor([[-2.0, 5.0]]))  # (2 (p - q) + 0) / 2
    tensor([0.7616])
    """
    _check_shapes(first_BC, second_BC)
    first_BC, second_BC = (at_least_float32(logits) for logits in (first_BC, second_BC))
    # log p - log (1 - p) is the logit itself, so the two divergences together are (p - q) times the difference
    return ((torch.sigmoid(first_BC) - torch.sigmoid(second_BC)) * (first_BC - second_BC)).mean(dim=1) / 2


def binary_label_loss(
    logits_BC: Tensor,
    labels_BC: Tensor,
    *,
    label_smoothing: float = 0.0,
    focal_gamma: float = 0.0,
    positive_weights_C: Tensor | None = None,
) -> Tensor:
    """Binary cross-entropy of each label, in nats, averaged over the labels; shape B, 0 where the labels are NaN.

    Args:
        logits_BC: Logits of any float type; computed in float32 or above.
        labels_BC: 1 for each label of a row, else 0; NaN in all labels of a row without any known.
        label_smoothing: Share of each target that is moved to one half.
        focal_gamma: Each label counts (1 - p)^gamma, with p the probability of what it is.
        positive_weights_C: A label counts so much where it is 1.

    Sources: Lin et al. 2017, arXiv:1708.02002, equation 4 (focal).

    >>> binary_label_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 0.0]]))
    tensor([0.6931])
    """
    logits_BC = at_least_float32(logits_BC)
    known_B = labelled(labels_BC)
    gold_BC = torch.where(known_B[:, None], labels_BC, 0.0).to(logits_BC.dtype)
    target_BC = gold_BC * (1 - label_smoothing) + label_smoothing / 2
    loss_BC = functional.binary_cross_entropy_with_logits(
        logits_BC, target_BC, pos_weight=positive_weights_C, reduction="none"
    )
    if focal_gamma:
        wrong_BC = torch.sigmoid(torch.where(gold_BC > 0.5, -logits_BC, logits_BC))
        loss_BC = loss_BC * wrong_BC.clamp(min=1e-6) ** focal_gamma
    return torch.where(known_B, loss_BC.mean(dim=1), 0.0)


def number_loss(outputs_B1: Tensor, numbers_B: Tensor) -> Tensor:
    """Half the squared error; shape B, 0 where the number is NaN.

    Half, because Gaussian noise of deviation 1 has this for its negative log-likelihood, less a constant.

    >>> number_loss(torch.tensor([[3.0], [1.0]]), torch.tensor([1.0, float("nan")]))
    tensor([2., 0.])
    """
    known_B = labelled(numbers_B)
    error_B = at_least_float32(outputs_B1)[:, 0] - torch.where(known_B, numbers_B, 0.0)
    return torch.where(known_B, error_B**2 / 2, 0.0)


def binary_soft_target_loss(student_BC: Tensor, teacher_BC: Tensor, *, temperature: float) -> Tensor:
    """T^2 * KL(teacher || student) of each label's softened yes or no, in nats, averaged over the labels; shape B.

    Args:
        student_BC: Student logits; receives the gradient.
        teacher_BC: Teacher logits, columns in the student's label order.
        temperature: T, above 0 and finite.

    Raises:
        ValueError: `temperature` is not positive and finite, or the shapes differ.

    >>> binary_soft_target_loss(torch.tensor([[2.0, 0.0]]), torch.tensor([[2.0, 0.0]]), temperature=3.0)
    tensor([0.])
    """
    _check_soft(student_BC, teacher_BC, temperature)
    student_BC, teacher_BC = (at_least_float32(logits) / temperature for logits in (student_BC, teacher_BC))
    yes_BC = torch.sigmoid(teacher_BC)
    divergence_BC = yes_BC * (functional.logsigmoid(teacher_BC) - functional.logsigmoid(student_BC)) + (1 - yes_BC) * (
        functional.logsigmoid(-teacher_BC) - functional.logsigmoid(-student_BC)
    )
    return temperature**2 * divergence_BC.mean(dim=1)


def gold_loss(
    problem_type: ProblemType,
    logits_BC: Tensor,
    labels: Tensor,
    *,
    label_smoothing: float = 0.0,
    focal_gamma: float = 0.0,
    class_weights_C: Tensor | None = None,
    offsets_C: Tensor | None = None,
) -> Tensor:
    """The loss with gold labels that fits the task: `label_loss`, `binary_label_loss` or `number_loss`; shape B.

    Args:
        problem_type: What `labels` are.
        logits_BC: Logits, for a regression (B, 1).
        labels: Class indices (B), zeros and ones (B, C), or numbers (B).
        label_smoothing: See there; 0 for a regression.
        focal_gamma: Likewise.
        class_weights_C: Weight of the rows of a class; for multi-label of the rows that have it.
        offsets_C: Only for single-label tasks.
    """
    if problem_type == REGRESSION:
        return number_loss(logits_BC, labels)
    if problem_type == MULTI_LABEL:
        how = {"label_smoothing": label_smoothing, "focal_gamma": focal_gamma}
        return binary_label_loss(logits_BC, labels, positive_weights_C=class_weights_C, **how)
    return label_loss(
        logits_BC,
        labels,
        label_smoothing=label_smoothing,
        focal_gamma=focal_gamma,
        class_weights_C=class_weights_C,
        offsets_C=offsets_C,
    )


def teacher_loss(
    problem_type: ProblemType,
    student_BC: Tensor,
    teacher_BC: Tensor,
    *,
    temperature: float = 1.0,
    kd_loss: KdLoss = "kl",
) -> Tensor:
    """The loss with a teacher's logits that fits the task; shape B.

    Args:
        problem_type: What the logits are.
        student_BC: Student logits; receives the gradient.
        teacher_BC: Teacher logits.
        temperature: T of "kl"; "mse" and a regression have none.
        kd_loss: "kl", or "mse" for `logit_loss`; a regression has one loss only.
    """
    if problem_type == REGRESSION:
        return number_loss(student_BC, teacher_BC[:, 0])
    if kd_loss == "mse":
        return logit_loss(student_BC, teacher_BC)
    if problem_type == MULTI_LABEL:
        return binary_soft_target_loss(student_BC, teacher_BC, temperature=temperature)
    return soft_target_loss(student_BC, teacher_BC, temperature=temperature)


def agreement_loss(problem_type: ProblemType, first_BC: Tensor, second_BC: Tensor) -> Tensor:
    """How far two answers to the same rows are apart: `r_drop_loss`, for multi-label `binary_r_drop_loss`; shape B."""
    return (binary_r_drop_loss if problem_type == MULTI_LABEL else r_drop_loss)(first_BC, second_BC)


def _check_shapes(first_BC: Tensor, second_BC: Tensor) -> None:
    if first_BC.shape != second_BC.shape:
        raise ValueError(f"the two answers differ in shape: {tuple(first_BC.shape)}, {tuple(second_BC.shape)}")


def _check_soft(student_BC: Tensor, teacher_BC: Tensor, temperature: float) -> None:
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be above 0 and finite, got {temperature}")
    if student_BC.shape != teacher_BC.shape:
        raise ValueError(f"student {tuple(student_BC.shape)} and teacher {tuple(teacher_BC.shape)} differ in shape")


def at_least_float32(logits: Tensor) -> Tensor:
    """The same numbers in float32, or in float64 if they are."""
    return logits if logits.dtype == torch.float64 else logits.float()
