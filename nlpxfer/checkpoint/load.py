"""Load a classifier or a teacher so that labels fit by name and nothing random goes unnoticed.

The weights are always read in the checkpoint's own label space first; only then is the final layer permuted to the
order of the schema (same names) or replaced (other names). This is chosen over `from_pretrained(num_labels=...)`
because that call keeps a final layer by mere coincidence of its size, also one of a token classifier, and because
`id2label=` there renames the columns without moving them.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import torch
from torch import nn

from nlpxfer.checkpoint.fingerprint import model_fingerprint, tokenizer_fingerprint, weights_fingerprint
from nlpxfer.checkpoint.head import head_of, replace_final_
from nlpxfer.checkpoint.narrow import Kept, narrow_model
from nlpxfer.checkpoint.pooling import compute_mean_once_, is_mean_encoder
from nlpxfer.checkpoint.quantised import Bits, check_quantised, quantised_loading
from nlpxfer.checkpoint.quiet import quiet_transformers
from nlpxfer.checkpoint.resolve import ResolvedCheckpoint, resolve_checkpoint
from nlpxfer.checkpoint.safety import check_folder
from nlpxfer.checkpoint.static import STATIC, STATIC_BODY, is_static
from nlpxfer.checkpoint.student import slice_layers
from nlpxfer.checkpoint.tokenizer import align_pad_token_, load_tokenizer
from nlpxfer.data.schema import LabelSchema
from nlpxfer.errors import CheckpointError, ConfigError, LabelError
from nlpxfer.problem import REGRESSION, SINGLE_LABEL, ProblemType

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_PLACEHOLDER = re.compile(r"LABEL_\d+")

READ_PADDING: Final = frozenset(("fnet", "funnel"))
"""Families that mix padding into the text (2026-11, transformers 5.23)."""
SEE_PADDING: Final = frozenset(("convbert", "nystromformer", "yoso"))
"""Families in which a convolution or an approximation of attention reaches into the padding."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Checkpoint:
    """A model with its tokenizer, and what is known about its origin.

    Attributes:
        model: A plain transformers classifier; its columns are in the order of the schema it was loaded for.
        tokenizer: Its tokenizer, with a pad token.
        name: The name that was asked for (Hub id, folder or bundled name).
        folder: The local folder that it was read from.
        fresh: Names of the parameters that are newly initialised, in the order of the model.
        head_kept: Whether the final layer comes from the checkpoint (matched by label names).
        revision: The commit of a Hub checkpoint.
        is_mean_encoder: Whether its folder says that it is a sentence encoder read by the mean of its tokens.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    folder: Path | None
    fresh: tuple[str, ...]
    head_kept: bool
    revision: str | None = None
    is_mean_encoder: bool = False

    @property
    def weights_sha256(self) -> str:
        """sha256 over names, types, shapes and bytes of the model's present weights."""
        return weights_fingerprint(self.model)

    @property
    def model_sha256(self) -> str:
        """sha256 over all that the logits of given tokens depend on: weights, and the config beside names."""
        return model_fingerprint(self.model)

    @property
    def tokenizer_sha256(self) -> str:
        """sha256 over what decides how the tokenizer maps a text to ids."""
        return tokenizer_fingerprint(self.tokenizer)

    @property
    def is_static(self) -> bool:
        """Whether the model is a static one, with token vectors and no layers."""
        return is_static(self.model)

    @property
    def hidden_size(self) -> int:
        """Numbers per token between the layers."""
        return int(self.model.config.get_text_config().hidden_size)


def load_classifier(
    name: str,
    *,
    schema: LabelSchema,
    dtype: torch.dtype = torch.float32,
    head: Literal["auto", "new"] = "auto",
    seed: int = 42,
    revision: str | None = None,
    quantised: Bits | None = None,
) -> Checkpoint:
    """Load `name` as a classifier over the labels of `schema`, in eval mode, with trainable parameters.

    A checkpoint that already classifies into the same label names keeps its final layer, with the rows permuted to
    the order of the schema. Any other label set, and placeholder names (LABEL_0, ...), get a new final layer: columns
    are never matched by position. The global random state is left as it was.

    Args:
        name: Hub id, local folder or bundled name.
        schema: The label names, in the order of the logits that the model shall return.
        dtype: Type of the weights; float32 for training, whatever the checkpoint stores.
        head: "auto" as above, "new" always starts the final layer anew.
        seed: Seed of every newly initialised parameter.
        revision: Branch, tag or commit of a Hub checkpoint.
        quantised: Load the linear layers of the body in 8 or 4 bits, on the GPU, to train an adapter on them.

    Raises:
        ConfigError: `quantised`, and there is no GPU or no bitsandbytes.
        CheckpointNotFoundError: The checkpoint does not exist or cannot be reached.
        UnsafeCheckpointError: It asks for remote code, pickled weights, or files outside its folder.
        CheckpointError: It is damaged, has no classifier class, or misses weights of its body.
    """
    if head not in ("auto", "new"):
        raise ConfigError(f"head={head!r} is not known.", available=("auto", "new"))
    resolved, config = _open(name, revision)
    if quantised:
        check_quantised(quantised)
    model, missing = _load_model(resolved, config, dtype=dtype, seed=seed)
    if quantised:
        how = quantised_loading(quantised, model)
        del model  # which is large
        model, missing = _load_model(resolved, config, dtype=dtype, seed=seed, how=how)
    tokenizer = load_tokenizer(resolved.folder, name=name)
    align_pad_token_(model, tokenizer, name=name)
    kept = head == "auto" and _keeps_head(config, schema, name=name)
    final_name = head_of(model).final_name
    if kept:
        _refuse_missing_head(missing, name)
        _permute_final_(model, [_label_names(config).index(label) for label in schema.names])
    else:
        with _seeded(seed):
            replace_final_(model, len(schema.names))
    _set_labels_(model, schema.names, schema.problem_type)
    replaced = set() if kept else {f"{final_name}.{key}" for key, _ in head_of(model).final.named_parameters()}
    fresh = tuple(key for key, _ in model.named_parameters() if key in missing or key in replaced)
    logger.info("%s: %d newly initialised parameters: %s", name, len(fresh), ", ".join(fresh) or "none")
    model.eval()  # type: ignore[no-untyped-call]
    return Checkpoint(
        model=compute_mean_once_(model),
        tokenizer=tokenizer,
        name=name,
        folder=resolved.folder,
        fresh=fresh,
        head_kept=kept,
        revision=resolved.revision,
        is_mean_encoder=is_mean_encoder(resolved.folder),
    )


def layer_student(source: Checkpoint, keep: Sequence[int], *, seed: int = 42) -> Checkpoint:
    """A student that keeps some layers of `source`, with a new final layer; `source` is untouched.

    The final layer of the source read other layers, so it is drawn anew (and usually set by a linear probe).

    Args:
        source: Classifier whose embeddings and layers are kept.
        keep: Ascending indices of layers.
        seed: Seed of the new final layer.

    Raises:
        ConfigError, CheckpointError: See `slice_layers`.
    """
    return _with_new_final(source, slice_layers(source.model, keep), seed)


def narrow_student(source: Checkpoint, kept: Kept, *, seed: int = 42) -> Checkpoint:
    """A student that keeps some entries, heads and neurons of `source`, with a new final layer; `source` is untouched.

    Raises:
        ConfigError, CheckpointError: See `narrow_model`.
    """
    return _with_new_final(source, narrow_model(source.model, kept), seed)


def _with_new_final(source: Checkpoint, model: PreTrainedModel, seed: int) -> Checkpoint:
    names = _label_names(source.model.config)
    with _seeded(seed):
        replace_final_(model, len(names))
    _set_labels_(model, names, _problem_type(source.model.config))
    model.requires_grad_(True)
    nn.Module.eval(model)
    final = head_of(model)
    fresh = tuple(f"{final.final_name}.{key}" for key, _ in final.final.named_parameters())
    return replace(source, model=model, fresh=fresh, head_kept=False)


def label_names(model: PreTrainedModel) -> tuple[str, ...]:
    """Names of a classifier's outputs, in their order."""
    return tuple(_label_names(model.config))


def stored_schema(name: str, *, revision: str | None = None) -> LabelSchema:
    """Labels of a trained classifier, in the order of its logits, and its kind of task.

    Raises:
        CheckpointError: It is no classifier; or see `load_classifier`.
    """
    _, config = _open(name, revision)
    return _schema(name, config)


def _schema(name: str, config: PreTrainedConfig) -> LabelSchema:
    if not _is_classifier(config):
        raise CheckpointError(f"{name} is not a classifier (architectures: {config.architectures}).")
    return LabelSchema(tuple(_label_names(config)), _problem_type(config))


def _problem_type(config: PreTrainedConfig) -> ProblemType:
    """The kind of task; transformers takes a single output without one for a regression."""
    found: ProblemType | None = config.problem_type
    return found or (REGRESSION if len(config.id2label or {}) == 1 else SINGLE_LABEL)


@dataclass(frozen=True, kw_only=True, eq=False)
class Description:
    """What a classifier's folder says beside its weights.

    Attributes:
        config: Its config.json.
        schema: Its labels, in the order of the logits, and its kind of task.
        tokenizer: Its tokenizer.
        folder: Where these were read from.
    """

    config: PreTrainedConfig
    schema: LabelSchema
    tokenizer: PreTrainedTokenizerBase
    folder: Path


def load_description(name: str) -> Description:
    """Read a classifier's folder that holds its weights as something else than safetensors, after the same checks.

    Raises:
        CheckpointError: It is no classifier; or see `load_classifier`.
    """
    resolved, config = _open(name, None, weights=False)
    return Description(
        config=config,
        schema=_schema(name, config),
        tokenizer=load_tokenizer(resolved.folder, name=name),
        folder=resolved.folder,
    )


def load_teacher(
    name: str, *, schema: LabelSchema, dtype: torch.dtype = torch.float32, revision: str | None = None
) -> Checkpoint:
    """Load a trained classifier whose label names are those of `schema`: columns in its order, frozen, in eval mode.

    Raises:
        LabelError: The label names differ as sets, or are mere placeholders (both sides are listed).
        CheckpointError: It is no classifier, or one for another kind of task; or as for `load_classifier`.
    """
    _, config = _open(name, revision)
    if not _is_classifier(config):
        raise CheckpointError(
            f"The teacher {name} is not a classifier (architectures: {config.architectures}).",
            why="A teacher must be fine-tuned on the labels first.",
            fix="train it on the same labels and pass its output folder as --teacher_name_or_path",
        )
    if _problem_type(config) != schema.problem_type:
        raise CheckpointError(
            f"The teacher {name} was trained with problem_type={_problem_type(config)!r}, "
            f"the data need {schema.problem_type!r}.",
            why="Its logits mean something else.",
            fix="use a teacher trained on the same kind of task",
        )
    names = _label_names(config)
    if sorted(names) != sorted(schema.names):
        only_teacher = sorted(set(names) - set(schema.names))
        only_data = sorted(set(schema.names) - set(names))
        raise LabelError(
            f"The labels of teacher {name} and data differ.\n"
            f"  only in teacher ({len(only_teacher)}): {_shown(only_teacher)}\n"
            f"  only in data ({len(only_data)}): {_shown(only_data)}",
            why="The teacher was trained on other label names, or its config.json holds placeholders."
            if not _are_placeholders(names)
            else "The config.json of the teacher holds placeholder names; positions are never trusted.",
            fix="rename the labels of the data, or write the true names to id2label and label2id of its config.json",
        )
    teacher = load_classifier(name, schema=schema, dtype=dtype, revision=revision)
    teacher.model.requires_grad_(False)
    return teacher


def _shown(names: Sequence[str], limit: int = 40) -> str:
    more = f", and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(names[:limit]) or "none") + more


def width_and_kind(name: str) -> tuple[int, bool]:
    """Numbers per token, and whether it is static, from a checkpoint's config alone; raises as `load_classifier`."""
    config = _open(name, None)[1]
    return int(config.get_text_config().hidden_size), config.model_type == STATIC


def _open(name: str, revision: str | None, *, weights: bool = True) -> tuple[ResolvedCheckpoint, PreTrainedConfig]:
    """Resolve, check and read the config; refuses a family that has no classifier class."""
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, AutoConfig

    resolved = resolve_checkpoint(name, revision=revision)
    check_folder(resolved.folder, weights=weights)
    try:
        config = AutoConfig.from_pretrained(resolved.folder, trust_remote_code=False)
    except (ValueError, KeyError, OSError, TypeError) as error:
        raise CheckpointError(
            f"The config.json of {name} cannot be read: {str(error).splitlines()[0]}",
            why="It names a model family that this version of transformers does not know, or is damaged.",
        ) from error
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        known = sorted(known.model_type for known in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING)
        raise CheckpointError(
            f"{name} is of the family {config.model_type!r}, which has no sequence classification class.",
            fix="use a checkpoint of a family with one",
            available=known,
        )
    if config.model_type in READ_PADDING:
        raise CheckpointError(
            f"{name} is of the family {config.model_type!r}, which reads padding like words.",
            why="Its layers take no attention mask into account, so its answer would depend on the texts beside it.",
            fix="use a checkpoint of another family",
        )
    if config.model_type in SEE_PADDING:
        logger.warning(
            "%s is of the family %r, in which padding shines through: answers depend a little on other texts",
            name,
            config.model_type,
        )
    if getattr(config, "summary_type", None) == "last":
        raise CheckpointError(
            f"{name} is of the family {config.model_type!r}, whose classifier reads the last position of the batch.",
            why="Behind a shorter text that is padding, so its answer would depend on the texts beside it.",
            fix="use a checkpoint of another family",
        )
    return resolved, config


def _load_model(
    resolved: ResolvedCheckpoint,
    config: PreTrainedConfig,
    *,
    dtype: torch.dtype,
    seed: int,
    how: Mapping[str, Any] | None = None,
) -> tuple[PreTrainedModel, frozenset[str]]:
    """The model in the checkpoint's own label space, and the names of its missing parameters."""
    from transformers import AutoModelForSequenceClassification

    try:
        with quiet_transformers(), _seeded(seed):
            model, info = AutoModelForSequenceClassification.from_pretrained(
                resolved.folder,
                config=config,
                dtype=dtype,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
                **(how or {}),
            )
    except (RuntimeError, ValueError, OSError) as error:
        raise CheckpointError(
            f"The weights of {resolved.name} do not fit its config.json: {_last_line(error)}",
            why="The folder mixes files of two models, or was not written completely.",
        ) from error
    missing = frozenset(info["missing_keys"])
    _refuse_missing_body(model, missing, resolved.name)
    if info["unexpected_keys"]:
        logger.info("%s: weights that a classifier does not use: %s", resolved.name, sorted(info["unexpected_keys"]))
    return model, missing


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _refuse_missing_body(model: PreTrainedModel, missing: frozenset[str], name: str) -> None:
    prefix = model.base_model_prefix + "."
    body = sorted(key for key in missing if (key.startswith(prefix) and ".pooler." not in key) or key in STATIC_BODY)
    if body:
        raise CheckpointError(
            f"{name} holds no weights for {len(body)} parameters of its body: {_shown(body, 5)}.",
            why="config.json asks for more layers than the weights hold, or the weights are of another model.",
            fix="repair num_hidden_layers in config.json, or use the intact checkpoint",
        )


def _refuse_missing_head(missing: frozenset[str], name: str) -> None:
    if missing:
        raise CheckpointError(
            f"{name} calls itself a classifier but holds no weights for: {_shown(sorted(missing), 5)}.",
            why="The head was not saved with it.",
            fix='load_classifier(..., head="new") starts a new final layer on purpose',
        )


def _is_classifier(config: PreTrainedConfig) -> bool:
    return any(item.endswith("ForSequenceClassification") for item in config.architectures or ())


def _label_names(config: PreTrainedConfig) -> list[str]:
    """Label names by id; ids are compared as numbers (as text, '10' would stand before '2')."""
    by_id: dict[int, Any] = {int(key): value for key, value in (config.id2label or {}).items()}
    return [str(by_id[key]) for key in sorted(by_id)]


def _are_placeholders(names: Sequence[str]) -> bool:
    return all(_PLACEHOLDER.fullmatch(name) for name in names)


def _keeps_head(config: PreTrainedConfig, wanted: LabelSchema, *, name: str) -> bool:
    """Whether the final layer may be kept; logs why, either way."""
    names = _label_names(config)
    if not _is_classifier(config):
        logger.info("%s is no classifier: new final layer.", name)
    elif _problem_type(config) != wanted.problem_type:
        logger.info("%s was trained with problem_type=%s: new final layer.", name, _problem_type(config))
    elif sorted(names) == sorted(wanted.names):
        logger.info("%s already has these %d labels: its final layer is kept, matched by name.", name, len(names))
        return True
    elif _are_placeholders(names):
        logger.info("%s names its labels LABEL_0, ...: positions are not trusted, new final layer.", name)
    else:
        logger.info("%s has other labels (%s): new final layer.", name, _shown(names, 10))
    return False


def _permute_final_(model: PreTrainedModel, order: Sequence[int]) -> None:
    final = head_of(model).final
    with torch.no_grad():
        for parameter in final.parameters():
            parameter.copy_(parameter[list(order)].clone())


def _set_labels_(model: PreTrainedModel, names: Sequence[str], problem_type: ProblemType) -> None:
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {label: index for index, label in enumerate(names)}
    model.config.problem_type = problem_type
    setattr(model, "num_labels", len(names))  # noqa: B010 - read by the loss; nn.Module's types allow no int


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the CPU generator for a while; weights are initialised on the CPU."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)
