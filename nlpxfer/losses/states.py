"""Losses on what a teacher computes before its logits: token states, relations between tokens, sentence states.

One number per row, so that the caller alone decides what they are divided by. Padding never counts: what stands there,
NaN included, changes neither a loss nor a gradient.

Shapes: B batch rows (or windows of them), L tokens, H hidden, K rows that sentence states are compared with.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from nlpxfer.losses.classification import at_least_float32

_LEFT_OUT = -1e9
"""Score of what takes no part in a softmax; finite, since differences of infinities are NaN."""
_SAME = 1 - 1e-6
"""Cosine from which two sentence states are those of the same text."""


def hidden_loss(student_BLH: Tensor, teacher_BLH: Tensor, mask_BL: Tensor) -> Tensor:
    """Squared error between token states, averaged over hidden units and over the tokens of a row; shape B.

    Args:
        student_BLH: States of the student, already projected to the teacher's width; receives the gradient.
        teacher_BLH: States of the teacher.
        mask_BL: 1 for a token, 0 for padding; at least one token per row.

    Raises:
        ValueError: The shapes do not fit.

    Source: Jiao et al. 2020 (TinyBERT), arXiv:1909.10351, equation 8.

    >>> states = torch.tensor([[[1.0, 3.0], [9.0, 9.0]]])
    >>> hidden_loss(states, torch.zeros(1, 2, 2), torch.tensor([[1, 0]]))  # (1 + 9) / 2
    tensor([5.])
    """
    _check_tokens(student_BLH, teacher_BLH, mask_BL)
    if student_BLH.shape[-1] != teacher_BLH.shape[-1]:
        raise ValueError(f"the states are {student_BLH.shape[-1]} and {teacher_BLH.shape[-1]} wide")
    real_BL = mask_BL.bool()
    difference_BLH = at_least_float32(student_BLH) - at_least_float32(teacher_BLH)
    error_BL = torch.where(real_BL[..., None], difference_BLH, 0.0).square().mean(dim=-1)
    return error_BL.sum(dim=1) / real_BL.sum(dim=1)


def relation_loss(student_BLH: Tensor, teacher_BLH: Tensor, mask_BL: Tensor, *, num_relation_heads: int) -> Tensor:
    """KL(teacher || student) of the relations between the tokens of a row, in nats; shape B.

    A relation is softmax(A A' / sqrt(d)) with A the queries, the keys or the values of a layer, split anew into
    `num_relation_heads` parts of d numbers each. The divergence is averaged over these heads and the row's tokens.

    Args:
        student_BLH: Queries, keys or values of the student; receives the gradient. Of any width.
        teacher_BLH: The same of the teacher, of any width.
        mask_BL: 1 for a token, 0 for padding; at least one token per row.
        num_relation_heads: A_r of the paper; divides both widths.

    Raises:
        ValueError: The shapes do not fit, or a width is not divisible.

    Source: Wang et al. 2021 (MiniLMv2), arXiv:2012.15828, section 3.

    >>> states = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    >>> relation_loss(states, states, torch.ones(1, 2), num_relation_heads=1)
    tensor([0.])
    """
    _check_tokens(student_BLH, teacher_BLH, mask_BL)
    student_log = _relations(student_BLH, mask_BL, num_relation_heads)
    teacher_log = _relations(teacher_BLH, mask_BL, num_relation_heads)
    divergence_BL = (teacher_log.exp() * (teacher_log - student_log)).sum(dim=-1).mean(dim=1)
    real_BL = mask_BL.bool()
    return torch.where(real_BL, divergence_BL, 0.0).sum(dim=1) / real_BL.sum(dim=1)


def _relations(states_BLH: Tensor, mask_BL: Tensor, heads: int) -> Tensor:
    """Log of the relations: (B, heads, L, L), the last axis normalised over the row's tokens."""
    batch, length, width = states_BLH.shape
    if width % heads:
        raise ValueError(f"{width} numbers cannot be split into {heads} relation heads")
    real_BL = mask_BL.bool()
    states_BLH = torch.where(real_BL[..., None], at_least_float32(states_BLH), 0.0)
    split = states_BLH.view(batch, length, heads, width // heads).transpose(1, 2)
    scores = split @ split.transpose(-1, -2) / math.sqrt(width // heads)
    return functional.log_softmax(scores.masked_fill(~real_BL[:, None, None, :], _LEFT_OUT), dim=-1)


def contrastive_loss(student_BH: Tensor, teacher_BH: Tensor, others_KH: Tensor, *, temperature: float) -> Tensor:
    """InfoNCE: the student's sentence state must find its own teacher state among those of K other rows; in nats, B.

    -log softmax over [own, others] of cosine / tau, at its own place. Others that equal the row's own state (the same
    text) are left out.

    The negatives are the teacher's states of the same K rows at every step, chosen over the other rows of the batch:
    so the loss of a row does not depend on what it shares a micro-batch with, and the gradient is the same however
    a step is split. As in the memory buffer of CRD, negatives cost no forward pass.

    Args:
        student_BH: Sentence states of the student, projected to the teacher's width; receives the gradient.
        teacher_BH: Those of the teacher for the same rows.
        others_KH: Those of the teacher for K other rows.
        temperature: tau, above 0.

    Raises:
        ValueError: The widths differ, or `temperature` is not positive and finite.

    Sources: Tian et al. 2020 (CRD), arXiv:1910.10699, section 3; the form of the loss: Oord et al. 2018,
    arXiv:1807.03748, equation 4.

    >>> one, other = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    >>> contrastive_loss(one, one, other, temperature=1.0)  # log(1 + exp(-1))
    tensor([0.3133])
    """
    student_BK, _ = _similarities(student_BH, teacher_BH, others_KH, temperature)
    return -functional.log_softmax(student_BK, dim=-1)[:, 0]


def relational_loss(student_BH: Tensor, teacher_BH: Tensor, others_KH: Tensor, *, temperature: float) -> Tensor:
    """KL(teacher || student) of how similar a row is to K other rows and to itself, in nats; shape B.

    Each side is a softmax over the cosines / tau with the teacher's states of [own, others]. As in `contrastive_loss`
    the rows compared with are the same at every step.

    Args:
        student_BH: Sentence states of the student, projected to the teacher's width; receives the gradient.
        teacher_BH: Those of the teacher for the same rows.
        others_KH: Those of the teacher for K other rows.
        temperature: tau of both sides, above 0.

    Raises:
        ValueError: The widths differ, or `temperature` is not positive and finite.

    Source: Fang et al. 2021 (SEED), arXiv:2101.04731, section 3, less the teacher's entropy.

    >>> one, other = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    >>> relational_loss(one, one, other, temperature=0.1)
    tensor([0.])
    """
    student_BK, teacher_BK = _similarities(student_BH, teacher_BH, others_KH, temperature)
    student_log, teacher_log = (functional.log_softmax(scores, dim=-1) for scores in (student_BK, teacher_BK))
    return (teacher_log.exp() * (teacher_log - student_log)).sum(dim=-1)


def _similarities(
    student_BH: Tensor, teacher_BH: Tensor, others_KH: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Cosines / tau of both sides with the teacher's states of [own, others]: (B, 1 + K) each."""
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be above 0 and finite, got {temperature}")
    if student_BH.shape != teacher_BH.shape or others_KH.shape[-1] != teacher_BH.shape[-1]:
        shapes = [tuple(states.shape) for states in (student_BH, teacher_BH, others_KH)]
        raise ValueError(f"the sentence states do not fit together: {shapes}")
    student_BH, teacher_BH, others_KH = (
        functional.normalize(at_least_float32(states), dim=-1) for states in (student_BH, teacher_BH, others_KH)
    )
    same_BK = teacher_BH @ others_KH.T >= _SAME
    found = []
    for states_BH in (student_BH, teacher_BH):
        own_B1 = (states_BH * teacher_BH).sum(dim=-1, keepdim=True) / temperature
        others_BK = (states_BH @ others_KH.T / temperature).masked_fill(same_BK, _LEFT_OUT)
        found.append(torch.cat([own_B1, others_BK], dim=1))
    return found[0], found[1]


def _check_tokens(student_BLH: Tensor, teacher_BLH: Tensor, mask_BL: Tensor) -> None:
    if student_BLH.shape[:2] != teacher_BLH.shape[:2] or student_BLH.shape[:2] != mask_BL.shape:
        shapes = [tuple(tensor.shape) for tensor in (student_BLH, teacher_BLH, mask_BL)]
        raise ValueError(f"states of student and teacher and their mask differ in rows or tokens: {shapes}")
