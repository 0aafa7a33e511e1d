"""On a GPU: both recipes' engine on a model of BERT-base's size, bfloat16: rows per second and share of the GEMM peak.

    python benchmarks/gpu.py

Weights and token ids are random: speed does not depend on them. Rows are 16 to 128 tokens long. Cells: `finetune`
(training), `teacher` (inference for the cache of logits), `distill` (training a student of 6 of the 12 layers from
cached logits). It refuses where there is no GPU.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import measuring
import numpy as np
import torch
from measuring import Results, median_and_range
from peers import epoch_seconds
from tokenizers import Tokenizer, models
from transformers import BertConfig, BertForSequenceClassification, PreTrainedModel, PreTrainedTokenizerFast

from nlpxfer.checkpoint.head import embedding_parameters
from nlpxfer.checkpoint.student import slice_layers
from nlpxfer.cli import run_main
from nlpxfer.config import RunOptions
from nlpxfer.data.tokenise import Collator, TokenisedRows
from nlpxfer.errors import ConfigError
from nlpxfer.evaluate.cost import embedding_parameter_count, gemm_peak_flops, parameter_count
from nlpxfer.evaluate.metrics import classification_metrics
from nlpxfer.methods.base import Method
from nlpxfer.methods.distill import Distill
from nlpxfer.methods.finetune import FineTune
from nlpxfer.train.checkpoints import RunIdentity
from nlpxfer.train.predict import predict
from nlpxfer.train.trainer import TransferTrainer

CLASSES, ROWS, BATCH, REPEATS, GEMM = 16, 8192, 64, 3, 8192


def model_and_tokenizer() -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A classifier of BERT-base's size with random weights, and a tokenizer that only knows how to pad."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(num_labels=CLASSES))
    words = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1}, unk_token="[UNK]"))
    return model, PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")


def random_rows(vocabulary: int) -> TokenisedRows:
    """Rows of 16 to 128 random tokens with random labels and teacher logits."""
    random = np.random.default_rng(0)
    lengths = random.integers(16, 129, ROWS)
    tokens = random.integers(2, vocabulary, lengths.sum()).astype(np.int32)
    rows = TokenisedRows(tokens, None, np.concatenate([[0], np.cumsum(lengths)]))
    logits = random.normal(size=(ROWS, CLASSES)).astype(np.float32)
    return rows.with_columns(labels=random.integers(0, CLASSES, ROWS), teacher_logits=logits)


class Bench:
    """The measurements."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.model, self.tokenizer = model_and_tokenizer()
        self.rows = random_rows(self.model.config.vocab_size)
        self.peak = gemm_peak_flops(torch.bfloat16, size=GEMM, device="cuda")

    def train(self, model: PreTrainedModel, method: Method) -> dict[str, Any]:
        """Epochs of nlpxfer's Trainer with its defaults, embeddings frozen; the first is not counted."""
        seconds = []
        for repeat in range(REPEATS + 1):
            trained = copy.deepcopy(model)
            for _, parameter in embedding_parameters(trained):
                parameter.requires_grad_(False)
            options = RunOptions(
                output_dir=str(self.work / "gpu"),
                num_train_epochs=1,
                seed=repeat,
                bf16=True,
                per_device_train_batch_size=BATCH,
                eval_strategy="no",
                save_strategy="no",
                load_best_model_at_end=False,
                disable_tqdm=True,
            )
            trainer = TransferTrainer(
                trained.to(options.device),
                method,
                options,
                train_rows=self.rows,
                validation_rows=self.rows,
                tokenizer=self.tokenizer,
                metrics=classification_metrics,
                identity=RunIdentity({}, {}),
            )
            seconds.append(epoch_seconds(trainer))
        return self._cell(model, seconds[1:], passes=6)

    def teacher(self) -> dict[str, Any]:
        """Logits of all rows, as the cache asks for them; the first pass is not counted."""
        model = copy.deepcopy(self.model).to("cuda")
        collator = Collator.for_tokenizer(self.tokenizer, multiple_of=8)
        seconds = []
        for _ in range(REPEATS + 1):
            start = time.perf_counter()
            predict(model, self.rows, collator, batch_size=256, bf16=True)
            seconds.append(time.perf_counter() - start)
        return self._cell(self.model, seconds[1:], passes=2)

    def distill(self) -> dict[str, Any]:
        """Train the six bottom layers from logits that are at hand."""
        return self.train(slice_layers(self.model, range(6)), Distill())

    def _cell(self, model: PreTrainedModel, seconds: Sequence[float], *, passes: int) -> dict[str, Any]:
        """Rates; `passes` x weights x real tokens are the operations: 6 for training, 2 for inference."""
        weights = parameter_count(model) - embedding_parameter_count(model)
        flops = passes * weights * int(self.rows.lengths.sum())
        return {
            "rows_per_second": median_and_range(ROWS / each for each in seconds),
            "tflops": flops / float(np.median(seconds)) / 1e12,
            "gemm_peak_tflops": self.peak / 1e12,
            "share_of_peak": flops / float(np.median(seconds)) / self.peak,
            "non_embedding_parameters": weights,
        }


def main(argv: Sequence[str] | None = None) -> Path:
    """Measure and write the results file.

    Raises:
        ConfigError: There is no GPU.
    """
    parser = argparse.ArgumentParser(prog="gpu.py", description="Both recipes' engine on a GPU.")
    parser.add_argument("--only", action="append", metavar="CELL")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--work", type=Path, default=Path("runs/benchmarks"))
    parser.add_argument("--anew", action="store_true")
    words = list(sys.argv[1:] if argv is None else argv)
    asked = parser.parse_args(words, argparse.Namespace(words=words, scale="full"))
    if not torch.cuda.is_available():
        raise ConfigError(
            "This benchmark needs a GPU, and torch sees none.", fix="benchmarks/finetune.py runs on CPUs"
        )
    measuring.show_log()
    settings = {"rows": ROWS, "batch_size": BATCH, "tokens": "16 to 128", "precision": "bfloat16", "gemm_size": GEMM}
    results = Results("gpu", asked, settings)
    bench = Bench(asked.work)
    cells = {
        "finetune": lambda: bench.train(bench.model, FineTune()),
        "teacher": bench.teacher,
        "distill": bench.distill,
    }
    results.measure(cells)
    return results.write({})


if __name__ == "__main__":
    run_main(main)
