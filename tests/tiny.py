"""Tiny real checkpoints and a learnable data set, built on the fly without any network.

Each checkpoint is a folder as a user would have it: `config.json`, `model.safetensors` and tokenizer files, made by
the plain transformers class of the family from random weights. Import from here (`from tiny import build_checkpoint`)
or use the fixtures of conftest.py, which cache the folders for the session.
"""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
)

TOPICS = {
    "food": "bread cheese soup pepper kitchen recipe dinner butter".split(),
    "music": "guitar piano melody concert singer drum violin chorus".split(),
    "sport": "goal match player referee stadium league coach medal".split(),
    "travel": "airport hotel passport luggage train island tourist harbour".split(),
}
LABELS = tuple(TOPICS)
FILLER = (
    "the a an and or of to in on at for with from by about into over under after before we you they he she it this "
    "that these those is was are were be been has have had do did will would can could may might must some any many "
    "more most few all each both other another such no not only same so than too very just now then here there when "
    "where why how good new old first last long little big small great high large next early young important public "
    "bad able day week month year time man woman child world life hand part place case point company number group "
    "problem fact thing people way house room water money story night morning city street book word friend door "
    "light paper table window garden river road car game minute hour letter"
).split()
WORDS = sorted(set(FILLER) | {word for words in TOPICS.values() for word in words})

ENCODERS = ("bert", "roberta", "xlm-roberta", "electra", "distilbert", "deberta-v2", "modernbert", "albert")
DECODERS = ("gpt2", "qwen2", "llama", "gpt_neox")
FAMILIES = ENCODERS + DECODERS
MAIN_FAMILIES = ("bert", "roberta", "distilbert", "modernbert", "gpt2", "qwen2")

HIDDEN, LAYERS, HEADS, INNER, POSITIONS = 32, 4, 4, 64, 64

_BERT_SPECIALS = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
_ROBERTA_SPECIALS = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
_SPECIALS = {
    "roberta": {**_ROBERTA_SPECIALS, "cls_token": "<s>", "sep_token": "</s>", "mask_token": "<mask>"},
    "gpt2": {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"},
    "llama": {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
    "qwen2": {"pad_token": "<|endoftext|>", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>"},
}
_SPECIALS["xlm-roberta"] = _SPECIALS["roberta"]
_SPECIALS["gpt_neox"] = _SPECIALS["gpt2"]


def specials_of(family: str) -> dict[str, str]:
    """Special tokens of a family, in the order of their ids (pad is 0, RoBERTa: 1; GPT-2 and Llama have none)."""
    return _SPECIALS.get(family, {**_BERT_SPECIALS, "mask_token": "[MASK]"})


def _byte_level_tokenizer(specials: dict[str, str]) -> Qwen2Tokenizer:
    """A byte-level tokenizer as Qwen2 has it: its class rebuilds this pipeline and would mangle any other."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(dict.fromkeys(specials.values())),
        show_progress=False,
    )
    trained.train_from_iterator([f"{word} {word}" for word in WORDS], trainer)
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    return Qwen2Tokenizer(vocab=model["vocab"], merges=merges, model_max_length=POSITIONS, **specials)


def build_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """A lower-casing word tokenizer over WORDS (Qwen2: byte-level), with the family's special tokens and template."""
    specials = specials_of(family)
    if family == "qwen2":
        return _byte_level_tokenizer(specials)
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys([*specials.values(), *WORDS]))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=specials["unk_token"]))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if "cls_token" in specials:
        cls, sep = specials["cls_token"], specials["sep_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{cls}:0 $A:0 {sep}:0",
            pair=f"{cls}:0 $A:0 {sep}:0 $B:1 {sep}:1" if family == "bert" else f"{cls}:0 $A:0 {sep}:0 $B:0 {sep}:0",
            special_tokens=[(cls, vocabulary[cls]), (sep, vocabulary[sep])],
        )
    names = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=POSITIONS,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"] if family == "bert" else names,
        **specials,
    )


def _family_options(family: str, layers: int, dropout: float) -> dict[str, object]:
    common = {
        "hidden_size": HIDDEN,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "intermediate_size": INNER,
        "max_position_embeddings": POSITIONS,
    }
    bert_dropouts = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    own: dict[str, dict[str, object]] = {
        "bert": {**bert_dropouts, "type_vocab_size": 2},
        "roberta": {**bert_dropouts, "max_position_embeddings": POSITIONS + 2, "type_vocab_size": 1},
        "xlm-roberta": {**bert_dropouts, "max_position_embeddings": POSITIONS + 2, "type_vocab_size": 1},
        "electra": {**bert_dropouts, "embedding_size": 16},
        "albert": {**bert_dropouts, "embedding_size": 16, "classifier_dropout_prob": dropout},
        "deberta-v2": {
            **bert_dropouts,
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "norm_rel_ebd": "layer_norm",
            "position_buckets": 16,
            "share_att_key": True,
            "position_biased_input": False,
            "type_vocab_size": 0,
            "pooler_hidden_size": HIDDEN,
            "pooler_dropout": 0.0,
        },
        "distilbert": {"dropout": dropout, "attention_dropout": dropout, "seq_classif_dropout": dropout},
        "modernbert": {"local_attention": 8, "classifier_dropout": dropout, "mlp_dropout": dropout},
        "gpt2": {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout},
        "qwen2": {"num_key_value_heads": 2, "attention_dropout": dropout},
        "llama": {"num_key_value_heads": 2, "attention_dropout": dropout},
        "gpt_neox": {"hidden_dropout": dropout, "attention_dropout": dropout},
    }
    renamed = {
        "distilbert": {"hidden_size": "dim", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads",
                       "intermediate_size": "hidden_dim"},
        "gpt2": {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
                 "intermediate_size": "n_inner", "max_position_embeddings": "n_positions"},
    }.get(family, {})  # fmt: skip
    return {**{renamed.get(key, key): value for key, value in common.items()}, **own[family]}


def build_config(
    family: str, tokenizer: PreTrainedTokenizerFast, *, layers: int = LAYERS, dropout: float = 0.0, **options: object
) -> object:
    """The config of a tiny model of the family; `options` override single fields."""
    fields = _family_options(family, layers, dropout)
    for name in ("pad", "bos", "eos", "cls", "sep"):
        fields[f"{name}_token_id"] = getattr(tokenizer, f"{name}_token_id")
    if family not in ("modernbert",):
        fields = {key: value for key, value in fields.items() if key[:3] not in ("cls", "sep")}
    # Wider than the usual 0.02, so that 32 hidden units tell texts apart and learn within a few steps.
    fields.update(vocab_size=len(tokenizer), initializer_range=0.1, **options)
    return AutoConfig.for_model(family, **fields)


def build_checkpoint(
    folder: str | Path,
    family: str,
    *,
    kind: str = "base",
    labels: Sequence[str] = LABELS,
    layers: int = LAYERS,
    dropout: float = 0.0,
    seed: int = 0,
    **options: object,
) -> Path:
    """Write a tiny checkpoint and its tokenizer to `folder`.

    `kind` is "base" (AutoModel), "classifier" (with `labels` as id2label) or "mlm" (the family's pretraining head:
    masked for encoders, causal for decoders). `options` override fields of the config.
    """
    tokenizer = build_tokenizer(family)
    if kind == "classifier":
        options = {"id2label": dict(enumerate(labels)), "label2id": {n: i for i, n in enumerate(labels)}, **options}
        if tokenizer.pad_token is None:
            options = {"pad_token_id": tokenizer.eos_token_id, **options}
            tokenizer.pad_token = tokenizer.eos_token
    config = build_config(family, tokenizer, layers=layers, dropout=dropout, **options)
    pretraining = AutoModelForCausalLM if family in DECODERS else AutoModelForMaskedLM
    auto = {"base": AutoModel, "classifier": AutoModelForSequenceClassification, "mlm": pretraining}[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto.from_config(config)
        # Zero biases and unit LayerNorm weights would hide a swap of two of them: make every vector differ.
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)


def make_rows(count: int, *, labels: Sequence[str] = LABELS, seed: int = 0, words: int = 12) -> list[dict[str, str]]:
    """`count` rows {text, label}, classes in turn; one or two words of a row's own topic give its label away."""
    chooser = random.Random(seed)
    rows = []
    for index in range(count):
        label = labels[index % len(labels)]
        text = chooser.choices(FILLER, k=chooser.randint(3, words))
        for _ in range(chooser.randint(1, 2)):
            text.insert(chooser.randint(0, len(text)), chooser.choice(TOPICS[label]))
        rows.append({"text": " ".join(text), "label": label})
    chooser.shuffle(rows)
    return rows


def write_csv(path: Path, rows: Sequence[dict[str, str]]) -> Path:
    """Write rows of equal keys as a csv file with a header."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def edit_json(path: Path, **changes: object) -> None:
    """Change entries of a JSON file, which need not be there; None takes an entry out."""
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    kept = {key: value for key, value in {**content, **changes}.items() if value is not None}
    path.write_text(json.dumps(kept), encoding="utf-8")
