"""Feature-based transfer: a classifier g on frozen features h, f(x) = g(h(x)).

The body h of a pretrained checkpoint is never trained, so its output for a text is computed once. g is the
checkpoint's own head: its final layer alone (multinomial logistic regression), or its hidden layer too (a small
network). The result is therefore an ordinary checkpoint.

Source: Peters, Ruder and Smith 2019, arXiv:1903.05987 (features or fine-tuning).

Shapes: B batch rows, H hidden, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast, final, get_args

import torch
from torch import Tensor, nn

from nlpxfer.checkpoint.head import head_features, head_of, head_parameters, pooled_states
from nlpxfer.data.tokenise import WINDOWS_PER_ROW
from nlpxfer.errors import ConfigError
from nlpxfer.losses.classification import gold_loss, labelled
from nlpxfer.methods.base import Batch, LossTerm, Method, mean_by_row, model_inputs, smoothing_faults
from nlpxfer.problem import SINGLE_LABEL, ProblemType

if TYPE_CHECKING:
    from transformers import PreTrainedModel

POOLED = "pooled_states"
"""Column of a batch with what the head reads, shape (B, H); with it the body is not asked."""

Classifier = Literal["logistic", "mlp"]
CLASSIFIERS: tuple[str, ...] = get_args(Classifier)


@final
@dataclass(frozen=True, kw_only=True)
class FeatureBased(Method):
    """The label loss of a classifier on frozen features: its gradient reaches the head alone.

    Args:
        problem_type: What the labels are.
        classifier: "logistic" trains the final layer, "mlp" the whole head.
        label_smoothing: Share of the target spread evenly over the classes, in [0, 1).

    Raises:
        ConfigError: A value is outside its range; all such values are listed.
    """

    problem_type: ProblemType = SINGLE_LABEL
    classifier: Classifier = "logistic"
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        faults = []
        if self.classifier not in CLASSIFIERS:
            faults.append(f"classifier: {self.classifier!r} is not one of {', '.join(CLASSIFIERS)}")
        faults += smoothing_faults(self.label_smoothing, self.problem_type)
        if faults:
            raise ConfigError.from_faults(faults)

    def loss_terms(self, model: nn.Module, batch: Batch) -> dict[str, LossTerm]:
        """Label loss of each row, from its pooled state if the batch has the column `POOLED`, else from its tokens.

        Of rows in several windows the final layer reads the mean over these of what it reads of each: as it is linear,
        its logits are the mean of theirs.
        """
        classifier = cast("PreTrainedModel", model)
        pooled_BH = batch.get(POOLED)
        if pooled_BH is None:
            with torch.no_grad():
                pooled_BH = pooled_states(classifier, model_inputs(batch))
        hidden_BH = head_features(classifier, pooled_BH)
        if self.classifier == "logistic":
            hidden_BH = hidden_BH.detach()
        if (windows_B := batch.get(WINDOWS_PER_ROW)) is not None:
            hidden_BH = mean_by_row(hidden_BH, windows_B)
        logits_BC = head_of(classifier).final(hidden_BH)
        return {"label": LossTerm(self.row_losses(logits_BC, batch["labels"], self.label_smoothing), 1.0)}

    def row_losses(self, logits_BC: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Loss of each row, shape B."""
        return gold_loss(self.problem_type, logits_BC, labels, label_smoothing=label_smoothing)

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Rows with a label."""
        return {"label": labelled(batch["labels"]).sum()}

    def trained_parameters(self, model: PreTrainedModel) -> dict[str, nn.Parameter]:
        """What it trains, by name: the final layer, or the whole head."""
        parameters = head_parameters(model)
        final_name = head_of(model).final_name
        only = "" if self.classifier == "mlp" else f"{final_name}."
        return {name: parameter for name, parameter in parameters.items() if name.startswith(only)}


def require_hidden_layer(model: PreTrainedModel) -> None:
    """Refuse a family whose head is its final layer alone: there is no hidden layer for an "mlp".

    Raises:
        ConfigError: Names the families that have one.
    """
    if not head_of(model).transforms:
        raise ConfigError(
            f"classifier: the head of {type(model).__name__} has no hidden layer, so it cannot hold an mlp.",
            fix="--classifier logistic, or a checkpoint of a family that has one",
            available=_WITH_HIDDEN_LAYER,
        )


_WITH_HIDDEN_LAYER: Sequence[str] = (
    "BERT",
    "RoBERTa",
    "XLM-RoBERTa",
    "MPNet",
    "ELECTRA",
    "DistilBERT",
    "DeBERTa",
    "ModernBERT",
    "ALBERT",
)
