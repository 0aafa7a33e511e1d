"""Adapter bundles: save one, load it on its base with one call, fold it into the base.

A bundle is a folder in peft's own format (`adapter_config.json`, `adapter_model.safetensors`) with what peft leaves
out: the tokenizer, the label names in the order of the logits (`labels.json`), the temperature (`calibration.json`),
and `base.json`, which says on which weights and config the adapter was trained. Chosen over `AutoPeftModel…`, which
builds a base with two labels, takes it from a path of somebody else's machine, and never asks whether it is the same.

All that the base checkpoint does not hold lies in the bundle: heads are wrapped by peft's `modules_to_save`, and a
parameter that would be left random is an error, when an adapter is made as when it is loaded.

Shapes: B batch, L tokens, H hidden.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

import torch
from torch import nn

from nlpxfer.checkpoint.adapter_kinds import KINDS
from nlpxfer.checkpoint.deciding_token import read_last_text_token_
from nlpxfer.checkpoint.fingerprint import deciding_config, weights_fingerprint
from nlpxfer.checkpoint.head import head_of
from nlpxfer.checkpoint.load import Checkpoint, load_classifier
from nlpxfer.checkpoint.pooling import with_pooling
from nlpxfer.checkpoint.resolve import BUNDLED, resolve_checkpoint
from nlpxfer.checkpoint.safety import ADAPTER_CONFIG, ADAPTER_WEIGHTS, check_adapter_folder
from nlpxfer.checkpoint.save import move_staged, refuse_not_finite
from nlpxfer.checkpoint.tokenizer import load_tokenizer, save_tokenizer
from nlpxfer.config.long_texts import LongTexts
from nlpxfer.data.schema import LabelSchema
from nlpxfer.errors import CheckpointError, LabelError
from nlpxfer.strict_json import write_json_whole

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

BASE_FILE: Final = "base.json"
BUNDLE_FOLDER: Final = "adapter"
"""Where the output folder of a run holds its bundle."""
_WHOLE_HEADS: Final = ("classifier", "score")
"""Modules that peft always wraps as a whole when a model classifies sequences."""


@dataclass(frozen=True, kw_only=True)
class BaseFacts:
    """What an adapter must know of its base, and of how it was trained.

    Attributes:
        adapter: Kind of adapter.
        name: Hub id, bundled name, or the name of the local folder, without its path.
        kind: "hub", "bundled" or "folder".
        revision: Commit of a Hub checkpoint.
        weights: sha256 of the base's weights as loaded in float32, without those that it does not hold.
        pooling: "own" or "mean": what the head reads.
        max_length: Tokens read of each text; None if not known.
        long_texts: The options by which longer texts were read; None if not known.
        config: The values of the base's config that decide what it computes; None if not known.
    """

    adapter: str
    name: str
    kind: str
    revision: str | None
    weights: str
    pooling: str = "own"
    max_length: int | None = None
    long_texts: Mapping[str, Any] | None = None
    config: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadedAdapter:
    """An adapter on its base, in eval mode, frozen.

    Attributes:
        model: peft's model; `model(**inputs).logits` has its columns in the order of `schema`.
        tokenizer: Of the bundle.
        schema: Its labels.
        base: What it says about its base.
        folder: The bundle.
    """

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    schema: LabelSchema
    base: BaseFacts
    folder: Path

    @property
    def merges(self) -> bool:
        """Whether it can be folded into the weights of its base."""
        return KINDS[self.base.adapter].merges


def base_facts(checkpoint: Checkpoint, *, adapter: str, pooling: str) -> BaseFacts:
    """The facts of a checkpoint that was just loaded: before pooling, adapter or training change it.

    A base that was loaded in 8 or 4 bits is read once more in float32: adapters are always used on such a base.
    """
    name, plain = checkpoint.name, checkpoint
    if getattr(checkpoint.model, "is_quantized", False):
        config = cast("Any", checkpoint.model.config)
        schema = LabelSchema(tuple(config.id2label.values()), config.problem_type)
        plain = load_classifier(name, schema=schema, revision=checkpoint.revision)
    kind = "folder" if Path(name).expanduser().is_dir() else "bundled" if name in BUNDLED else "hub"
    return BaseFacts(
        adapter=adapter,
        name=Path(name).expanduser().resolve().name if kind == "folder" else name,
        kind=kind,
        revision=checkpoint.revision,
        weights=weights_fingerprint(plain.model, without=plain.fresh),
        pooling=pooling,
        config=deciding_config(plain.model),
    )


def head_modules(model: PreTrainedModel, fresh: Sequence[str]) -> list[str]:
    """Modules to train and save beside an adapter: the whole head, and every owner of a newly initialised parameter.

    peft alone knows `classifier` and `score`. It would freeze the pooler of BERT, which a checkpoint of a language
    model does not hold, that of DeBERTa and the head of ModernBERT, all of them random.

    Args:
        model: A plain classifier.
        fresh: Names of its newly initialised parameters.
    """
    parts = head_of(model)
    names = {parts.final_name, *parts.transforms}
    if parts.norm is not None:
        names |= {name for name, module in model.named_modules() if module is parts.norm}
    names |= {name.rpartition(".")[0] for name in fresh}
    whole = {first for first in _WHOLE_HEADS if any(name.split(".")[0] == first for name in names)}
    return sorted({name for name in names if name and name.split(".")[0] not in whole} | whole)


def wrap(model: PreTrainedModel, config: PeftConfig) -> PeftModel:
    """Put an adapter on a plain classifier, in place; what `config` says learns, the rest is frozen."""
    from peft import get_peft_model

    with _quiet_peft():
        wrapped = cast("PeftModel", get_peft_model(model, config))
    read_last_text_token_(wrapped)
    return wrapped


def trained_names(model: nn.Module) -> set[str]:
    """Names of the parameters that learn: those of the head as in the plain model, the others as peft has them."""
    prompt = cast("PeftModel", model).active_peft_config.is_prompt_learning
    prefix = "base_model." if prompt else "base_model.model."
    return {
        name.removeprefix(prefix).replace(".modules_to_save.default.", ".")
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def refuse_frozen_fresh(model: nn.Module, fresh: Sequence[str]) -> None:
    """Raise CheckpointError if a newly initialised parameter of the base would stay as random as it is."""
    frozen = sorted(set(fresh) - trained_names(model))
    if frozen:
        raise CheckpointError(
            f"These parameters are newly initialised and would stay frozen: {', '.join(frozen)}.",
            why="The adapter cannot train them, because no module of their own holds them.",
            fix="fine-tune this checkpoint as a whole: recipes/finetune.py",
        )


def is_adapted(model: nn.Module) -> bool:
    """Whether a model is wrapped by peft."""
    return hasattr(model, "active_peft_config")


@contextmanager
def _quiet_peft() -> Iterator[None]:
    """Without the warnings that say nothing here (2026-11, peft 0.21.2)."""
    checks = torch.sparse.check_sparse_tensor_invariants
    if not checks.is_enabled():  # type: ignore[no-untyped-call]
        # the default, of which torch warns where SHiRA and FRoD rely on it
        checks.disable()  # type: ignore[no-untyped-call]
    with warnings.catch_warnings():
        # reads a name that transformers 5.23 deprecates
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        # LNTuning says so of every kind of norm that is not torch's own layer list
        warnings.filterwarnings("ignore", message="Unsupported layer type .* encountered, proceed at your own risk")
        yield


def save_adapter(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    schema: LabelSchema,
    folder: str | Path,
    *,
    base: BaseFacts,
) -> Path:
    """Write a bundle to `folder`, `adapter_config.json` last; other files in it stay.

    Raises:
        NotFiniteError: A weight is NaN or infinite.
        LabelError: The model has another number of outputs than the schema has names.
    """
    refuse_not_finite(model)
    if model.config.num_labels != len(schema):
        raise LabelError(f"The model has {model.config.num_labels} outputs, the schema {len(schema)} names.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".nlpxfer-staging-", dir=folder))
    try:
        model.active_peft_config.base_model_name_or_path = base.name
        model.active_peft_config.revision = base.revision
        model.save_pretrained(str(staging), save_embedding_layers=False)
        (staging / "README.md").unlink(missing_ok=True)  # peft's card: it names the base's path
        _sort_names(staging / ADAPTER_CONFIG)
        save_tokenizer(tokenizer, staging)
        schema.save(staging)
        write_json_whole(staging / BASE_FILE, {"schema_version": 1, **asdict(base)})
        move_staged(staging, folder, last=ADAPTER_CONFIG)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder


def _sort_names(file: Path) -> None:
    """Sort the sets that peft wrote in whatever order they had: the same adapter shall give the same file."""
    content = json.loads(file.read_text(encoding="utf-8"))
    for key, value in content.items():
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            content[key] = sorted(set(value))
    write_json_whole(file, content)


def add_to_bundle(folder: Path, **changes: Any) -> None:  # noqa: ANN401 - fields of BaseFacts
    """Change `base.json` of a bundle."""
    write_json_whole(folder / BASE_FILE, {"schema_version": 1, **asdict(replace(read_base(folder), **changes))})


def find_bundle(name: str) -> Path | None:
    """The bundle that stands for a name: the folder itself, or the one in an output folder that has no model."""
    folder = resolve_checkpoint(name).folder
    found = _bundle_in(folder)
    return None if found != folder and (folder / "config.json").is_file() else found


def _bundle_in(folder: Path) -> Path | None:
    places = (folder, folder / BUNDLE_FOLDER)
    return next((place for place in places if (place / ADAPTER_CONFIG).is_file()), None)


def read_base(folder: Path) -> BaseFacts:
    """What a bundle says about its base.

    Raises:
        CheckpointError: It has no base.json, or a damaged one.
    """
    file = folder / BASE_FILE
    if not file.is_file():
        raise CheckpointError(
            f"{folder} holds an adapter without {BASE_FILE}.",
            why="nlpxfer did not write it, so nothing says on which weights and labels it was trained.",
            fix="merge it with peft: merge_and_unload(), then save_pretrained with id2label in the config",
        )
    try:
        content: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        facts = BaseFacts(**{key: value for key, value in content.items() if key != "schema_version"})
        texts = [facts.adapter, facts.name, facts.kind, facts.weights, facts.pooling]
        if not all(isinstance(text, str) and text for text in texts):
            raise TypeError("a field is no text")
        if facts.max_length is not None and not isinstance(facts.max_length, int):
            raise TypeError("max_length is no number")
        if not all(value is None or isinstance(value, dict) for value in (facts.config, facts.long_texts)):
            raise TypeError("a field is no object")
        LongTexts.from_options(facts.long_texts or {})
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} is damaged: {error}.", fix="copy the bundle again") from error
    if facts.adapter not in KINDS or facts.pooling not in ("own", "mean"):
        raise CheckpointError(f"{file} names the adapter {facts.adapter!r} with pooling {facts.pooling!r}.",
                              why="A later version of nlpxfer wrote it.", available=KINDS)  # fmt: skip
    return facts


def load_adapter(folder: str | Path, base: str | None = None) -> LoadedAdapter:
    """Load a bundle on its base, in float32 on the CPU.

    Args:
        folder: A bundle, the output folder of a run that holds one, or a Hub id.
        base: Folder or Hub id of the base; needed where it was a local folder, whose path no bundle tells.

    Raises:
        CheckpointError: The bundle is damaged; its base is not given, has other weights (both hashes are shown) or
            computes otherwise by its config (the differences are shown); or a weight of the head is in neither.
        UnsafeCheckpointError: Pickled weights, files outside the folder, or a type of adapter that loads such.
    """
    found = _bundle_in(resolve_checkpoint(str(folder)).folder)
    if found is None:
        raise CheckpointError(f"{folder} holds no adapter: it has no {ADAPTER_CONFIG}.", fix="give an adapter folder")
    check_adapter_folder(found)
    facts = read_base(found)
    schema = LabelSchema.load(found)
    if base is None and facts.kind == "folder":
        raise CheckpointError(
            f"{folder} is an adapter on the local checkpoint {facts.name!r}; its path is not part of the bundle.",
            fix=f"--base FOLDER, with the folder of {facts.name}",
        )
    checkpoint = load_classifier(base or facts.name, schema=schema, revision=None if base else facts.revision)
    weights = weights_fingerprint(checkpoint.model, without=checkpoint.fresh)
    if weights != facts.weights:
        raise CheckpointError(
            f"{folder} was trained on other weights than those of {checkpoint.name}:\n"
            f"  - trained on {facts.name}: sha256 {facts.weights}\n"
            f"  - {checkpoint.name}: sha256 {weights}",
            why="It is another checkpoint or another version of it; the adapter's changes mean nothing there.",
            fix=f"--base FOLDER, with the weights of {facts.name}"
            + (f" at {facts.revision}" if facts.revision else ""),
        )
    _refuse_other_config(facts, checkpoint, folder)
    wrapped = _with_weights(with_pooling(checkpoint, facts.pooling), found)
    _refuse_uncovered(wrapped, checkpoint, found)
    wrapped.requires_grad_(False)
    nn.Module.eval(wrapped)
    logger.info("adapter %s (%s) on %s", folder, facts.adapter, checkpoint.name)
    tokenizer = load_tokenizer(found, name=str(folder))
    return LoadedAdapter(model=wrapped, tokenizer=tokenizer, schema=schema, base=facts, folder=found)


def _refuse_other_config(facts: BaseFacts, checkpoint: Checkpoint, folder: str | Path) -> None:
    """The base must compute as the one of the training: equal weights do not see to its activation or its heads.

    Values that only one of the two configs has are left out: versions of transformers differ in them.
    """
    ours, theirs = deciding_config(checkpoint.model), facts.config or {}
    differing = [key for key in sorted(ours.keys() & theirs.keys()) if ours[key] != theirs[key]]
    if differing:
        listed = "".join(f"\n  - {key}: {theirs[key]!r} there, {ours[key]!r} here" for key in differing)
        raise CheckpointError(
            f"{folder} was trained on {facts.name} with another config than that of {checkpoint.name}:{listed}",
            why="It has the same weights, but computes something else from them.",
            fix=f"--base FOLDER, with the config of {facts.name}",
        )


def _with_weights(model: PreTrainedModel, folder: Path) -> PeftModel:
    """The model with the adapter's weights, all of them and no others."""
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as opened:
        stored = set(opened.keys())
    try:
        with _quiet_peft():
            wrapped = PeftModel.from_pretrained(model, str(folder), is_trainable=False, use_safetensors=True)
        wanted = set(get_peft_model_state_dict(wrapped, save_embedding_layers=False))
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, UserWarning) as error:
        raise CheckpointError(
            f"The adapter in {folder} does not fit its base: {str(error).splitlines()[0]}",
            why="Its files are of two adapters, or one of them was changed.",
        ) from error
    if stored != wanted:
        differing = sorted(stored ^ wanted)
        raise CheckpointError(
            f"{folder / ADAPTER_WEIGHTS} lacks weights or holds others than its config asks for: "
            f"{', '.join(differing[:4])}.",
            why="Its files are of two adapters, or one of them was changed.",
        )
    read_last_text_token_(wrapped)
    return wrapped


def _refuse_uncovered(model: PeftModel, checkpoint: Checkpoint, folder: Path) -> None:
    """Every parameter that the base does not hold must come with the adapter."""
    covered = tuple(f"{name}." for name in model.active_peft_config.modules_to_save or ())
    missing = [name for name in checkpoint.fresh if not name.startswith(covered)]
    if missing:
        raise CheckpointError(f"Neither {folder} nor its base holds weights for: {', '.join(missing)}.")


def merged(adapter: LoadedAdapter) -> PreTrainedModel:
    """The plain classifier with the adapter folded in; `adapter` is used up.

    peft's `merge_and_unload` is not used: in 0.21.2 it fails for (IA)3 on heads of several layers (RoBERTa), and for
    LayerNorm tuning it leaves the wrappers of the head in place.

    Raises:
        CheckpointError: Adapters of this kind cannot be folded into weights; those that can are listed.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

    kind = adapter.base.adapter
    if not adapter.merges:
        raise CheckpointError(
            f"An adapter of the kind {kind} cannot be merged.",
            why="It adds inputs to the layers and changes no weight, so no weights say the same.",
            fix="use the bundle as it is: nlpxfer predict BUNDLE FILE --base FOLDER",
            available=[name for name, row in KINDS.items() if row.merges],
        )
    plain = cast("PreTrainedModel", adapter.model.get_base_model())
    for name, module in list(plain.named_modules()):
        parent, _, child = name.rpartition(".")
        if isinstance(module, BaseTunerLayer):
            module.merge(safe_merge=True)
            setattr(plain.get_submodule(parent), child, module.get_base_layer())
        elif isinstance(module, ModulesToSaveWrapper):
            setattr(plain.get_submodule(parent), child, module.modules_to_save["default"])
    for mark in ("peft_config", "peft_type"):
        vars(plain).pop(mark, None)
    plain.config.architectures = [type(plain).__name__]  # its base may have been no classifier
    plain.requires_grad_(True)
    nn.Module.eval(plain)
    return plain
