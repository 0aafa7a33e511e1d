"""Losses as pure functions on tensors: no I/O, no configuration, no state."""

from nlpxfer.losses.classification import (
    binary_label_loss,
    binary_soft_target_loss,
    gold_loss,
    label_loss,
    labelled,
    number_loss,
    soft_target_loss,
    teacher_loss,
)

__all__ = [
    "binary_label_loss",
    "binary_soft_target_loss",
    "gold_loss",
    "label_loss",
    "labelled",
    "number_loss",
    "soft_target_loss",
    "teacher_loss",
]
