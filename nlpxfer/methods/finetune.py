"""Fine-tuning: all weights of a pretrained model learn the task's labels.

Source: Howard and Ruder 2018, arXiv:1801.06146; start from a linear probe: Kumar et al. 2022, arXiv:2202.10054.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor, nn

from nlpxfer.errors import ConfigError
from nlpxfer.losses.classification import IGNORED_LABEL, label_loss
from nlpxfer.methods.base import Batch, LossTerm, Method, model_inputs


@final
@dataclass(frozen=True, kw_only=True)
class FineTune(Method):
    """Cross-entropy with the gold labels.

    Args:
        label_smoothing: Share of the target spread evenly over the classes, in [0, 1).

    Raises:
        ConfigError: `label_smoothing` is outside [0, 1).
    """

    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ConfigError(f"label_smoothing_factor: {self.label_smoothing} is not in [0, 1)")

    def loss_terms(self, model: nn.Module, batch: Batch) -> dict[str, LossTerm]:
        """Label loss of each row."""
        logits_BC = model(**model_inputs(batch)).logits
        rows_B = label_loss(logits_BC, batch["labels"], label_smoothing=self.label_smoothing)
        return {"label": LossTerm(rows_B, 1.0)}

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Rows with a label."""
        return {"label": batch["labels"].ne(IGNORED_LABEL).sum()}
