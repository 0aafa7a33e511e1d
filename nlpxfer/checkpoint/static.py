"""Static classifiers: token vectors, their mean, and a small head; no attention, no layers.

`StaticForSequenceClassification` is an ordinary transformers model, so training, saving and `pipeline` treat it as any
other once `nlpxfer.checkpoint` is imported. Its folder is also one of model2vec's, whose `StaticModelPipeline` reads
it without this package, and one of sentence-transformers' `StaticEmbedding`: the table is stored as `embeddings`, the
head once more in `head.safetensors`, and `config.json` has the keys of all three. One folder was chosen over a second
one beside it because the table is nearly all of the model.

The special tokens and the unknown one take no part in the mean, as in model2vec: where a mean is all there is, special
tokens add the same to every text.

With int8 the table holds int8 numbers and a scale per token, which model2vec calls the token's weight.

Sources: Iyyer et al. 2015, "Deep Unordered Composition Rivals Syntactic Methods for Text Classification" (deep
averaging networks); model2vec, https://github.com/MinishLab/model2vec.

Shapes: B rows, L tokens of a padded row, T tokens of all rows, V vocabulary, D numbers per token, C classes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import SequenceClassifierOutput

from nlpxfer.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

STATIC: Final = "nlpxfer-static"
"""The family's name in config.json."""
TABLE: Final = "embeddings"
STATIC_BODY: Final = (TABLE, "weights")
"""Names of the weights outside of the head."""
INT8_FOLDER: Final = "int8"
"""Beside a static classifier: the same with an int8 table."""
HEAD_FILE: Final = "head.safetensors"
MODULES_FILE: Final = "modules.json"
_ACTIVATIONS: Final = {"multi_label_classification": "sigmoid", "regression": "identity"}
_ADDED_KEYS: Final = ("head_config", "embedding_dtype", "max_length")
_CHUNK_TOKENS: Final = 1 << 17


class StaticConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]  # __init_subclass__ has no types
    """Config of a static classifier.

    Args:
        vocab_size: V.
        hidden_size: D.
        hidden_layer: Whether the head has a layer of D units with ReLU before the final one.
        normalize: Whether the mean is scaled to length 1.
        ignored_token_ids: Tokens that take no part in the mean.
        max_tokens: Tokens after which model2vec cuts a text, special tokens not counted; None: never.
        table_dtype: "float32" or "int8".
        kwargs: What all configs have.
    """

    model_type = STATIC

    def __init__(
        self,
        vocab_size: int = 2,
        hidden_size: int = 256,
        hidden_layer: bool = False,
        normalize: bool = False,
        ignored_token_ids: Sequence[int] = (),
        max_tokens: int | None = None,
        table_dtype: str = "float32",
        pad_token_id: int | None = None,
        **kwargs: Any,  # noqa: ANN401 - as in transformers
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.hidden_layer = hidden_layer
        self.normalize = normalize
        self.ignored_token_ids = list(ignored_token_ids)
        self.max_tokens = max_tokens
        self.table_dtype = table_dtype
        self.num_hidden_layers = 0
        plain = {key: value for key, value in kwargs.items() if key not in (*_ADDED_KEYS, "num_hidden_layers")}
        super().__init__(**plain)
        self.pad_token_id = pad_token_id

    def to_dict(self) -> dict[str, Any]:
        """All fields, and those that model2vec reads."""
        known: dict[str, Any] = super().to_dict()
        names = {int(key): name for key, name in (self.id2label or {}).items()}
        head = {
            "n_layers": 2 if self.hidden_layer else 1,
            "activation": _ACTIVATIONS.get(str(self.problem_type), "softmax"),
            "classes": [names[key] for key in sorted(names)],
        }
        return known | {"head_config": head, "embedding_dtype": self.table_dtype, "max_length": self.max_tokens}


class StaticForSequenceClassification(PreTrainedModel):  # type: ignore[no-untyped-call]
    """logits = head(mean of the token vectors); see the module.

    Attributes:
        embeddings: The table, shape (V, D); int8 and a buffer where `config.table_dtype` is int8.
        weights: Scale of each row, shape V; with int8 only.
        pre_classifier: The head's hidden layer, if it has one.
        classifier: Its final layer.
    """

    config_class = StaticConfig
    base_model_prefix = "static"
    main_input_name = "input_ids"
    embeddings: Tensor
    weights: Tensor

    def __init__(self, config: StaticConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        shape = (config.vocab_size, config.hidden_size)
        if config.table_dtype == "int8":
            self.register_buffer(TABLE, torch.zeros(shape, dtype=torch.int8))
            self.register_buffer("weights", torch.ones(config.vocab_size))
        else:
            self.embeddings = nn.Parameter(torch.zeros(shape))
        if config.hidden_layer:
            self.pre_classifier = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(0.0)
        self.classifier = nn.Linear(config.hidden_size, int(config.num_labels or 0))
        self.post_init()  # type: ignore[no-untyped-call]

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[no-untyped-call]
        if module is self and self.config.table_dtype != "int8":
            init.normal_(self.embeddings, mean=0.0, std=0.02)

    @property
    def is_int8(self) -> bool:
        """Whether the table holds int8 numbers."""
        return bool(self.config.table_dtype == "int8")

    def train(self, mode: bool = True) -> StaticForSequenceClassification:
        """Raises CheckpointError: the table holds int8 numbers."""
        if mode and self.is_int8:
            raise CheckpointError("A static model in int8 cannot be trained.", fix="use the folder in float32")
        super().train(mode)
        return self

    def get_input_embeddings(self) -> nn.Module:
        """The table as an embedding layer; it shares the weights of a float table."""
        table = self.embeddings if not self.is_int8 else self.embeddings * self.weights[:, None]
        return nn.Embedding(len(table), table.shape[1], _weight=table, _freeze=self.is_int8)

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Raises CheckpointError: the table is no layer that could be replaced."""
        raise CheckpointError("The table of a static model cannot be replaced.")

    def counts(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """1.0 for each token that takes part in the mean, else 0.0; in the shape of `input_ids`."""
        ignored = torch.tensor(self.config.ignored_token_ids, device=input_ids.device, dtype=input_ids.dtype)
        kept = ~(input_ids[..., None] == ignored).any(dim=-1)
        if attention_mask is not None:
            kept = kept & attention_mask.bool()
        return kept.to(self.classifier.weight.dtype)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,  # noqa: ANN401 - as in transformers
    ) -> SequenceClassifierOutput | tuple[Tensor, ...]:
        """Logits (B, C) of padded rows (B, L), and with labels their loss.

        Args:
            input_ids: Tokens.
            attention_mask: 0 for padding.
            token_type_ids: Not used: which of two texts a token is in makes no difference.
            labels: As for any transformers classifier.
            return_dict: False for a tuple.
            kwargs: Not used.
        """
        kept_BL = self.counts(input_ids, attention_mask)
        if self.is_int8:
            sums_BD = torch.einsum("bld,bl->bd", self._rows(input_ids), kept_BL)
        else:
            table_VD = self.embeddings
            sums_BD = functional.embedding_bag(input_ids, table_VD, mode="sum", per_sample_weights=kept_BL)
        logits_BC = self.head(sums_BD, kept_BL.sum(dim=1))
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits_BC, config=self.config)
        if return_dict is False:
            return (logits_BC,) if loss is None else (loss, logits_BC)
        return SequenceClassifierOutput(loss=loss, logits=logits_BC)

    def head(self, sums_BD: Tensor, counts_B: Tensor) -> Tensor:
        """Logits (B, C) from sums of token vectors and how many there are; no token: a mean of 0."""
        pooled_BD = sums_BD / counts_B.clamp(min=1)[:, None]
        if self.config.normalize:
            pooled_BD = functional.normalize(pooled_BD)
        pooled_BD = self.dropout(pooled_BD)
        if self.config.hidden_layer:
            pooled_BD = torch.relu(self.pre_classifier(pooled_BD))
        logits_BC: Tensor = self.classifier(pooled_BD)
        return logits_BC

    @torch.inference_mode()
    def flat_logits(self, tokens_T: Tensor, starts_B: Tensor) -> Tensor:
        """Logits (B, C) of rows that stand one after the other without padding: what predicts quickest.

        Args:
            tokens_T: Token ids of all rows.
            starts_B: Where each row begins; a row ends where the next one begins.
        """
        ends_B = torch.cat([starts_B[1:], starts_B.new_tensor([len(tokens_T)])])
        parts, begin = [self.classifier.weight.new_empty(0, self.classifier.out_features)], 0
        while begin < len(starts_B):
            # so many tokens at a time that a copy of their vectors stays small
            end = max(begin + 1, int(torch.searchsorted(ends_B, starts_B[begin] + _CHUNK_TOKENS, right=True)))
            first, last = int(starts_B[begin]), int(ends_B[end - 1])
            parts.append(self._flat_part(tokens_T[first:last], starts_B[begin:end] - first))
            begin = end
        return torch.cat(parts)

    def _flat_part(self, tokens_T: Tensor, starts_B: Tensor) -> Tensor:
        kept_T = self.counts(tokens_T)
        lengths_B = torch.diff(starts_B, append=starts_B.new_tensor([len(tokens_T)]))
        counts_B = torch.segment_reduce(kept_T, "sum", lengths=lengths_B)
        table = self.embeddings
        if self.is_int8:  # each token's vector is made once
            used, tokens_T = torch.unique(tokens_T, return_inverse=True)
            table = self._rows(used)
        sums_BD = functional.embedding_bag(tokens_T, table, starts_B, mode="sum", per_sample_weights=kept_T)
        return self.head(sums_BD, counts_B)

    def _rows(self, ids: Tensor) -> Tensor:
        """Token vectors of an int8 table, as float32."""
        rows: Tensor = self.embeddings[ids].float() * self.weights[ids][..., None]
        return rows

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """As in transformers, with the files that model2vec and sentence-transformers want beside."""
        super().save_pretrained(save_directory, *args, **kwargs)
        state = kwargs.get("state_dict") or self.state_dict()
        names = ["pre_classifier", "classifier"] if self.config.hidden_layer else ["classifier"]
        head = {
            f"head.{index}.{part}": state[f"{name}.{part}"].detach().cpu().contiguous().clone()
            for index, name in enumerate(names)
            for part in ("weight", "bias")
        }
        folder = Path(save_directory)
        save_file(head, folder / HEAD_FILE)
        kind = "sentence_transformers.models"
        modules = [{"idx": 0, "name": "0", "path": "", "type": f"{kind}.StaticEmbedding"}]
        if self.config.normalize:
            modules.append({"idx": 1, "name": "1", "path": "1_Normalize", "type": f"{kind}.Normalize"})
        (folder / MODULES_FILE).write_text(json.dumps(modules, indent=2) + "\n", encoding="utf-8")


def is_static(model: nn.Module) -> bool:
    """Whether a model is a static classifier."""
    return isinstance(model, StaticForSequenceClassification)


def static_int8(model: StaticForSequenceClassification) -> StaticForSequenceClassification:
    """The same classifier with an int8 table, a quarter of the size; the head stays in float32.

    Each row is divided by its largest number over 127 and rounded, so that a token's vector is off by at most 0.4 % of
    its largest number.

    Raises:
        ConfigError: It holds int8 numbers already.
    """
    if model.is_int8:
        raise ConfigError("The static model is in int8 already.")
    config = StaticConfig.from_dict(model.config.to_dict() | {"table_dtype": "int8"})
    small = StaticForSequenceClassification(config)
    table_VD = model.embeddings.detach().float().cpu()
    scale_V = (table_VD.abs().amax(dim=1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    head = {name: value for name, value in model.state_dict().items() if name != TABLE}
    rounded_VD = (table_VD / scale_V[:, None]).round().to(torch.int8)
    small.load_state_dict({**head, TABLE: rounded_VD, "weights": scale_V})
    small.requires_grad_(False)
    nn.Module.eval(small)
    return small


AutoConfig.register(STATIC, StaticConfig, exist_ok=True)
AutoModelForSequenceClassification.register(StaticConfig, StaticForSequenceClassification, exist_ok=True)
