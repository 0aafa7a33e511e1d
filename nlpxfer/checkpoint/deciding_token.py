"""Prompt tuning on decoders: classify by the last token of the text, not by padding.

peft hands the prompt and the text to the model as embeddings. transformers' decoders find the token that decides by
looking for the pad id, which embeddings do not have, and take the last position instead: with several rows in a batch
that is padding for all but the longest. (2026-11, peft 0.21.2: on tiny models logits differ by 1 to 2 between a row
alone and the same row in a batch.) Here the final layer gets the state of the right token, whatever the padding.

Shapes: B batch, L tokens, H hidden.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from nlpxfer.checkpoint.head import deciding_token, head_of

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


class _LastTextToken:
    """Notes where each row's text ends when the whole model is called, and picks that state before the final layer.

    An object and not two closures: a copy of the model then copies it too, once for both of its hooks.
    """

    def __init__(self, virtual_tokens: int, pad: int) -> None:
        self.virtual_tokens, self.pad = virtual_tokens, pad
        self.last_B: torch.Tensor | None = None

    def note(self, model: nn.Module, arguments: tuple[Any, ...], inputs: Mapping[str, Any]) -> None:
        self.last_B = deciding_token(inputs["input_ids"], self.pad) + self.virtual_tokens

    def pick(self, final: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        states_BLH, last_B = inputs[0], self.last_B
        if last_B is None:
            return inputs
        rows_B = torch.arange(len(last_B), device=states_BLH.device)
        return (states_BLH[rows_B, last_B.to(states_BLH.device)].unsqueeze(1), *inputs[1:])


class _Settled(logging.Filter):
    """Drops transformers' warning about the very thing that is put right here."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "will not detect padding tokens in `inputs_embeds`" not in record.getMessage()


_SETTLED = _Settled()


def read_last_text_token_(model: PeftModel) -> None:
    """Make a decoder with a learnt prompt classify by the last token that is not padding; others stay as they are."""
    config: Any = model.active_peft_config
    plain = cast("PreTrainedModel", model.get_base_model())
    decides_by_last = head_of(plain).final_name == "score"
    if not decides_by_last or config.peft_type not in ("PROMPT_TUNING", "P_TUNING"):
        return
    for name in ("transformers.modeling_layers", type(plain).__module__):
        logging.getLogger(name).addFilter(_SETTLED)
    token = _LastTextToken(config.num_virtual_tokens, plain.config.get_text_config().pad_token_id)
    model.register_forward_pre_hook(token.note, with_kwargs=True)
    head_of(plain).final.register_forward_pre_hook(token.pick)
