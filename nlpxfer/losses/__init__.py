"""Losses as pure functions on tensors: no I/O, no configuration, no state."""

from nlpxfer.losses.classification import label_loss, soft_target_loss

__all__ = ["label_loss", "soft_target_loss"]
