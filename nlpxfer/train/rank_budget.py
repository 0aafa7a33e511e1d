"""AdaLoRA's share of a training step: a budget of ranks that shrinks, and goes to the layers that use it.

The adapter of a layer is B diag(e) A, a triplet of each rank. After each step every triplet gets a score, a product of
two running means: of |weight x gradient|, and of how much that varies. The budget falls from 1.5 times the rank per
layer to the rank per layer, by a cubic curve, and the triplets of the lowest scores in all layers together get e = 0.
Their gradients go on, so that one may come back while the budget still falls. The last steps leave the choice as it
is. A penalty on the gradient keeps A and B close to orthogonal, without which a triplet would say little by itself.

peft scores and masks. Its own entry (`update_and_allocate` of its model) is not used: it leaves the mask of the last
step in the adapter's config, by which the weights of the best epoch, another one, would be cut when they are saved.
Triplets that are left out are saved as zeros.

Source: Zhang et al. 2023 (AdaLoRA), arXiv:2303.10512, sections 3.1 to 3.3 and algorithm 1; the penalty as peft has it,
a mean over the matrices of its root.

Shapes: R triplets of a layer.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from nlpxfer.errors import ResumeError
from nlpxfer.train.launch import is_main_process

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.tuners.adalora import AdaLoraConfig

WARM_UP: Final = 0.1
"""Share of the steps before the budget begins to fall."""
SETTLED: Final = 0.3
"""Share of the steps after it has fallen."""
PENALTY: Final = 0.5
"""Weight of the penalty: peft's."""
SCORES_FILE: Final = "ranks.safetensors"
_SCORES: Final = ("exp_avg_ipt", "exp_avg_unc")
_KEPT: Final = "kept"


class RankBudget(TrainerCallback):
    """Scores and prunes the triplets of a model that trains.

    Args:
        model: With an adapter of peft's type ADALORA.

    Attributes:
        kept: Name of each layer's e -> which triplets were kept when the budget was last asked for, bool, shape (R).
    """

    def __init__(self, model: PeftModel) -> None:
        self.model = model
        self.config = cast("AdaLoraConfig", model.active_peft_config)
        self.allocator: Any = cast("Any", model.base_model).rankallocator
        self.kept: dict[str, Tensor] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Spread the budget over the steps of the run."""
        self.config.total_step = state.max_steps
        self.config.tinit, self.config.tfinal = (int(share * state.max_steps) for share in (WARM_UP, SETTLED))

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Score and prune, while the step's gradients are still there; `global_step` counts the steps before it."""
        self.update_(state.global_step + 1)

    @torch.no_grad()
    def update_(self, step: int) -> None:
        """Score all triplets after step `step`, counted from 1, and prune to the budget of that step."""
        if step <= cast("int", self.config.total_step) - self.config.tfinal:
            self.allocator.update_ipt(self.model)
            budget = self.allocator.budget_schedule(step)[0]
            if budget < self.allocator.init_bgt:
                pattern = self.allocator.mask_to_budget(self.model, budget)
                self.kept = {name: torch.tensor(kept) for name, kept in pattern.items()}
        else:
            for name, values_R1 in self.model.named_parameters():
                if name in self.kept:
                    values_R1.masked_fill_(~self.kept[name].to(values_R1.device)[:, None], 0.0)

    def add_gradient_(self) -> None:
        """Add the penalty's gradient to that of a whole optimizer step: the same in all processes."""
        sides = [
            (p, ".lora_A." in name)
            for name, p in self.model.named_parameters()
            if p.grad is not None and (".lora_A." in name or ".lora_B." in name)
        ]
        with torch.enable_grad():
            roots = [_distance(p if rows else p.T) for p, rows in sides]
            gradients = torch.autograd.grad(PENALTY * torch.stack(roots).mean(), [p for p, _ in sides])
        for (parameter, _), gradient in zip(sides, gradients, strict=True):
            cast("Tensor", parameter.grad).add_(gradient)

    def save(self, folder: Path) -> None:
        """Write scores and kept triplets into a checkpoint."""
        from safetensors.torch import save_file

        if is_main_process():
            tensors = {f"{_KEPT}:{name}": kept for name, kept in self.kept.items()}
            for score in _SCORES:
                tensors |= {f"{score}:{name}": value for name, value in getattr(self.allocator, score).items()}
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / SCORES_FILE)

    def load_(self, folder: Path) -> None:
        """Read back what `save` wrote.

        Raises:
            ResumeError: The file is not there, or holds scores of other weights.
        """
        from safetensors.torch import load_file

        if not (folder / SCORES_FILE).is_file():
            raise ResumeError(f"{folder.name} holds no scores of AdaLoRA's ranks.", fix="start anew: --overwrite")
        own = {name: p for name, p in self.model.named_parameters() if p.requires_grad and "lora_" in name}
        parts: dict[str, dict[str, Tensor]] = {name: {} for name in (*_SCORES, _KEPT)}
        for key, tensor in load_file(folder / SCORES_FILE).items():
            part, _, name = key.partition(":")
            if part not in parts or name not in own:
                raise ResumeError(f"{folder.name} holds scores of other weights.", fix="start anew: --overwrite")
            parts[part][name] = tensor.to(own[name].device)
        for score in _SCORES:
            setattr(self.allocator, score, parts[score])
        self.allocator.ipt = {name: torch.zeros_like(value) for name, value in parts[_SCORES[0]].items()}
        self.kept = parts[_KEPT]


def _distance(vectors_RD: Tensor) -> Tensor:
    """How far R vectors are from orthonormal: the Frobenius norm of their products less the identity."""
    apart_RR = vectors_RD @ vectors_RD.T - torch.eye(len(vectors_RD), device=vectors_RD.device)
    distance: Tensor = torch.linalg.vector_norm(apart_RR)
    return distance
