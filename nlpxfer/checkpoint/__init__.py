"""Checkpoints: find, check, load, shrink and save a model with its tokenizer and labels."""

from nlpxfer.checkpoint.fingerprint import tokenizer_fingerprint, weights_fingerprint
from nlpxfer.checkpoint.load import Checkpoint, load_classifier, load_teacher
from nlpxfer.checkpoint.pooling import use_mean_pooling
from nlpxfer.checkpoint.resolve import ResolvedCheckpoint, resolve_checkpoint
from nlpxfer.checkpoint.safety import check_folder
from nlpxfer.checkpoint.save import ensure_output_folder, save_classifier
from nlpxfer.checkpoint.static import StaticConfig, StaticForSequenceClassification
from nlpxfer.checkpoint.student import choose_layers, model_layers, slice_layers
from nlpxfer.checkpoint.tokenizer import max_positions

__all__ = [
    "Checkpoint",
    "ResolvedCheckpoint",
    "StaticConfig",
    "StaticForSequenceClassification",
    "check_folder",
    "choose_layers",
    "ensure_output_folder",
    "load_classifier",
    "load_teacher",
    "max_positions",
    "model_layers",
    "resolve_checkpoint",
    "save_classifier",
    "slice_layers",
    "tokenizer_fingerprint",
    "use_mean_pooling",
    "weights_fingerprint",
]
