"""Losses on class logits, one number per row, so that the caller alone decides what they are divided by.

Shapes: B batch rows, C classes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

IGNORED_LABEL = -100
"""Label of a row without a label; its loss is 0 and it is not counted."""


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
    logits_BC = _at_least_float32(logits_BC)
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
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be above 0 and finite, got {temperature}")
    if student_BC.shape != teacher_BC.shape:
        raise ValueError(f"student {tuple(student_BC.shape)} and teacher {tuple(teacher_BC.shape)} differ in shape")
    student_log_BC = functional.log_softmax(_at_least_float32(student_BC) / temperature, dim=-1)
    teacher_log_BC = functional.log_softmax(_at_least_float32(teacher_BC) / temperature, dim=-1)
    divergence_BC = functional.kl_div(student_log_BC, teacher_log_BC, log_target=True, reduction="none")
    return temperature**2 * divergence_BC.sum(dim=-1)


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
