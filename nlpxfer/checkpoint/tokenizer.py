"""Load the tokenizer of a checkpoint, give it a pad token, and know the longest text it may produce."""

from __future__ import annotations

import copy
import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Final

from torch import nn

from nlpxfer.checkpoint.student import embedding_rows
from nlpxfer.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

VOCABULARY_FILES: Final = frozenset(
    "tokenizer.json vocab.txt vocab.json tokenizer.model spiece.model sentencepiece.bpe.model spm.model bpe.codes "
    "tekken.json".split()
)
"""One of these makes a tokenizer."""
TOKENIZER_FILES: Final = VOCABULARY_FILES | frozenset(
    "tokenizer_config.json special_tokens_map.json added_tokens.json merges.txt entity_vocab.json "
    "chat_template.jinja".split()
)
# Tokenizers that read bytes or characters and have no vocabulary file.
WITHOUT_VOCABULARY: Final = ("ByT5Tokenizer", "CanineTokenizer", "PerceiverTokenizer")
# Length for families that have no limit of their own (T5, XLNet): what their checkpoints were trained on.
DEFAULT_LENGTH: Final = 512
_NO_LIMIT: Final = 10**9
_PROBE_TEXTS: Final = ("The quick brown fox jumps over the lazy dog.", "where is my card payment of 12.50", "hello")
_PROBE_TOKENS: Final = 1000


def load_tokenizer(folder: Path, *, name: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint folder; it pads on the right, as training does.

    Raises:
        CheckpointError: The folder has no tokenizer, it cannot be read, or the class that transformers picks for the
            model family turns tokens of tokenizer.json into unknown ones (the class rebuilds the pre-tokenizer of its
            family instead of reading the one in the file).
    """
    from transformers import AutoTokenizer

    config = folder / "tokenizer_config.json"
    without = config.is_file() and any(kind in config.read_text(encoding="utf-8") for kind in WITHOUT_VOCABULARY)
    if not without and not any((folder / file).is_file() for file in VOCABULARY_FILES):
        raise CheckpointError(
            f"{name} has no tokenizer.",
            why="Only the model was saved.",
            fix="copy the tokenizer of its base checkpoint into the folder: "
            f"AutoTokenizer.from_pretrained(BASE).save_pretrained({str(folder)!r})",
            available=sorted(entry.name for entry in folder.iterdir()),
        )
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001 - the tokenizers library raises bare Exception for a broken file
        raise CheckpointError(
            f"The tokenizer of {name} cannot be read: {error}",
            why="A tokenizer file is damaged, or needs a package that is not installed.",
        ) from error
    _compare_with_file(tokenizer, folder, name)
    # with padding on the left, the positions of most families shift with the longest row of the batch
    tokenizer.padding_side = "right"
    return tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Write the tokenizer's files without what calls left behind.

    A call sets truncation and padding of the backend, and transformers saves them: the files would depend on what the
    tokenizer was last used for, and cut the texts of whoever reads tokenizer.json without transformers.

    A tokenizer in Python writes what it read again, and is read anew to see that it tokenises alike: that of BERTweet
    writes merges which it cannot read (2026-11, transformers 5.23), so the files that it came from are copied.

    Raises:
        CheckpointError: What was written tokenises otherwise.
    """
    plain = copy.deepcopy(tokenizer)
    backend = getattr(plain, "backend_tokenizer", None)
    if backend is not None:
        backend.no_truncation()
        backend.no_padding()
    plain.save_pretrained(folder)
    if backend is None:
        _copy_sources(plain, Path(folder))
        _compare_with_saved(plain, Path(folder))


def _copy_sources(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Copy the vocabulary files that a tokenizer says it was made from."""
    for attribute, name in getattr(tokenizer, "vocab_files_names", {}).items():
        source = getattr(tokenizer, attribute, None)
        if isinstance(source, str) and Path(source).is_file() and Path(source).resolve() != (folder / name).resolve():
            shutil.copyfile(source, folder / name)


def _compare_with_saved(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    saved = type(tokenizer).from_pretrained(folder)
    vocabulary = " ".join(token for token, _ in zip(tokenizer.get_vocab(), range(_PROBE_TOKENS), strict=False))
    for text in (*_PROBE_TEXTS, vocabulary):
        if saved(text)["input_ids"] != tokenizer(text)["input_ids"]:
            raise CheckpointError(
                f"{type(tokenizer).__name__} does not save itself whole: read anew, it tokenises otherwise.",
                why="That is a fault of its class in transformers.",
                fix="another version of transformers",
            )


def _compare_with_file(tokenizer: PreTrainedTokenizerBase, folder: Path, name: str) -> None:
    """Refuse or report a tokenizer that reads probe texts otherwise than the tokenizer.json beside it."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        return
    from tokenizers import Tokenizer

    stored = Tokenizer.from_file(str(file))
    stored.no_padding()
    stored.no_truncation()
    differs = unknown = False
    for text in _PROBE_TEXTS:
        expected = stored.encode(text, add_special_tokens=False).ids
        found = tokenizer(text, add_special_tokens=False)["input_ids"]
        differs |= found != expected
        unk = tokenizer.unk_token_id
        unknown |= len(found) == 0 or found.count(unk) / max(len(found), 1) > expected.count(unk) / len(expected)
    if differs and unknown:
        raise CheckpointError(
            f"{name}: transformers reads its tokenizer as {type(tokenizer).__name__}, which loses tokens that "
            "tokenizer.json knows.",
            why="That class rebuilds the pre-tokenizer of its family; this tokenizer.json is of another kind.",
            fix="use the tokenizer that belongs to this model family",
        )
    if differs:
        logger.warning(
            "%s: %s splits texts otherwise than the tokenizer.json in the folder; pipeline() will do the same.",
            name,
            type(tokenizer).__name__,
        )


def align_pad_token_(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, name: str) -> None:
    """Give tokenizer and config one pad token (eos where there is none), and check that all ids have an embedding.

    GPT-2 and Llama have no pad token, and a batch of more than one row then raises. The eos token is used, so the
    vocabulary does not change. Decoders pool at the last token that is not `config.pad_token_id`, so the config
    follows the tokenizer.

    Raises:
        CheckpointError: There is neither a pad nor an eos token, or an id is beyond the embedding table.
    """
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise CheckpointError(
                f"The tokenizer of {name} has neither a pad nor an eos token, so rows cannot be batched.",
                fix="set pad_token in its tokenizer_config.json to one of its special tokens",
                available=tokenizer.all_special_tokens,
            )
        tokenizer.pad_token = tokenizer.eos_token
        logger.info("%s has no pad token: its eos token %r pads.", name, tokenizer.eos_token)
    if model.config.pad_token_id != tokenizer.pad_token_id:
        if any(module.padding_idx is not None for _, module in _position_embeddings(model)):
            raise CheckpointError(
                f"{name}: config.pad_token_id is {model.config.pad_token_id}, its tokenizer pads with "
                f"{tokenizer.pad_token_id}.",
                why="This family counts positions from the pad id, so the tokenizer belongs to another model.",
            )
        logger.info("%s: config.pad_token_id is now %d, as in the tokenizer.", name, tokenizer.pad_token_id)
        model.config.pad_token_id = tokenizer.pad_token_id
    rows = embedding_rows(model)
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest >= rows:
        raise CheckpointError(
            f"The tokenizer of {name} has ids up to {highest}, its model has embeddings for {rows} only.",
            why="The tokenizer belongs to another model, or tokens were added without resizing the embeddings.",
        )


def max_positions(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """The largest usable `max_length` in tokens, special tokens included.

    The smaller of what the model has positions for and what the tokenizer claims. RoBERTa counts positions from
    `padding_idx + 1`, so its 514 positions hold 512 tokens. Without any limit (T5): DEFAULT_LENGTH. The virtual tokens
    of an adapter are taken off.
    """
    limits = [tokenizer.model_max_length] if tokenizer.model_max_length < _NO_LIMIT else []
    configured = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(configured, int) and configured > 0:
        limits.append(configured)
    for _, module in _position_embeddings(model):
        offset = 0 if module.padding_idx is None else module.padding_idx + 1
        limits.append(module.num_embeddings - offset)
    # a learnt prompt takes up positions too
    taken = getattr(getattr(model, "active_peft_config", None), "num_virtual_tokens", 0)
    return int(min(limits, default=DEFAULT_LENGTH)) - taken


def _position_embeddings(model: nn.Module) -> list[tuple[str, nn.Embedding]]:
    return [
        (name, module)
        for name, module in model.named_modules()
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding)
    ]
