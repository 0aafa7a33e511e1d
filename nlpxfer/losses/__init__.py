"""Losses as pure functions on tensors: no I/O, no configuration, no state."""

from nlpxfer.losses.classification import (
    agreement_loss,
    binary_label_loss,
    binary_r_drop_loss,
    binary_soft_target_loss,
    gold_loss,
    label_loss,
    labelled,
    logit_loss,
    number_loss,
    r_drop_loss,
    soft_target_loss,
    teacher_loss,
)
from nlpxfer.losses.states import contrastive_loss, hidden_loss, relation_loss, relational_loss

__all__ = [
    "agreement_loss",
    "binary_label_loss",
    "binary_r_drop_loss",
    "binary_soft_target_loss",
    "contrastive_loss",
    "gold_loss",
    "hidden_loss",
    "label_loss",
    "labelled",
    "logit_loss",
    "number_loss",
    "r_drop_loss",
    "relation_loss",
    "relational_loss",
    "soft_target_loss",
    "teacher_loss",
]
