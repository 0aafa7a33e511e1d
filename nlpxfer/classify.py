"""Use a finished classifier: label a file of any length, or score it against a labelled one.

    nlpxfer predict runs/finetune new.csv --output_file labelled.csv
    nlpxfer evaluate runs/finetune test.csv

Rows are read, sorted by length and answered in windows, so memory does not grow with the file and little padding is
computed; the output keeps the order and the other columns. bfloat16 is used where it was measured to be faster, which
moves probabilities in the third digit; `--bf16 false` keeps float32.

Shapes: N rows, C classes.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from nlpxfer.checkpoint.load import Checkpoint, load_teacher, stored_labels
from nlpxfer.checkpoint.tokenizer import max_positions
from nlpxfer.data.schema import LabelSchema
from nlpxfer.data.stream import Row, RowReader, row_writer
from nlpxfer.data.tokenise import Collator, tokenise
from nlpxfer.errors import CheckpointError, ConfigError, DataError, LabelError
from nlpxfer.evaluate.calibration import load_temperature, probabilities
from nlpxfer.evaluate.metrics import classification_metrics
from nlpxfer.train.launch import use_threads
from nlpxfer.train.precision import choose_precision, padding_multiple
from nlpxfer.train.predict import predict

logger = logging.getLogger(__name__)

Array = np.ndarray[Any, Any]

WINDOW = 8192
"""Rows that are sorted by length and answered together."""
LABEL, PROBABILITY, ABSTAINED = "predicted_label", "probability", "abstained"
DEFAULT_LENGTH = 128


@dataclass(frozen=True, kw_only=True)
class Classifier:
    """A classifier ready to answer.

    Attributes:
        checkpoint: Model on its device, and tokenizer.
        schema: Its labels.
        max_length: Tokens that are read of each text.
        bf16: Whether it computes in bfloat16.
        temperature: T of its probabilities, softmax(logits / T); fitted on the validation rows of the training.
        batch_size: Rows of the longest length per batch.
    """

    checkpoint: Checkpoint
    schema: LabelSchema
    max_length: int
    bf16: bool
    temperature: float = 1.0
    batch_size: int = 64

    @classmethod
    def load(
        cls, model: str, *, max_length: int | None = None, bf16: bool | None = None, batch_size: int = 64
    ) -> Classifier:
        """Load a folder or Hub id.

        Args:
            model: Output folder of a recipe, or any classifier.
            max_length: Default: that of the training, from run.json, else 128; never more than the model can read.
            bf16: Default: measured.
            batch_size: Rows of the longest length per batch.

        Raises:
            CheckpointError: It is no single-label classifier, or damaged.
            ConfigError: `max_length` is more than the model can read.
        """
        if batch_size < 1:
            raise ConfigError(f"batch_size: {batch_size} is below 1")
        use_threads(None)
        schema = LabelSchema(tuple(stored_labels(model)))
        if len(schema) < 2:
            raise CheckpointError(f"{model} has a single output: it gives a number, not a class.")
        checkpoint = load_teacher(model, schema=schema)
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        device = device or torch.device("cpu")
        checkpoint.model.to(device)  # type: ignore[arg-type]  # its decorator hides self
        limit = max_positions(checkpoint.model, checkpoint.tokenizer)
        if max_length is not None and not 4 <= max_length <= limit:
            raise ConfigError(
                f"max_length: {max_length} is not between 4 and the {limit} tokens that {model} can read."
            )
        length = max_length or min(limit, _trained_length(checkpoint.folder))
        return cls(
            checkpoint=checkpoint,
            schema=schema,
            max_length=length,
            bf16=choose_precision(bf16, device).bf16,
            temperature=load_temperature(checkpoint.folder),
            batch_size=batch_size,
        )

    def logits(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> Array:
        """Class logits, shape (N, C), float32, columns in the order of `schema`."""
        model, tokenizer = self.checkpoint.model, self.checkpoint.tokenizer
        rows = tokenise(tokenizer, texts, pairs, max_length=self.max_length)
        multiple = padding_multiple(model.device, bf16=self.bf16)
        collator = Collator.for_tokenizer(tokenizer, multiple_of=multiple, rounded_to=self.max_length)
        return predict(model, rows, collator, batch_size=self.batch_size, bf16=self.bf16)

    def probabilities(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> Array:
        """Calibrated class probabilities, shape (N, C), float64; each row sums to 1."""
        return probabilities(self.logits(texts, pairs), self.temperature)


@dataclass(frozen=True)
class Predicted:
    """What `predict_file` did.

    Attributes:
        rows: Rows read and written.
        without_text: Rows whose text is missing or blank: they got no label.
        abstained: Rows whose best probability is below the least.
    """

    rows: int
    without_text: int
    abstained: int


def predict_file(
    classifier: Classifier,
    source: str | Path,
    output: str | Path,
    *,
    text_column: str = "text",
    text_pair_column: str | None = None,
    min_probability: float | None = None,
    all_probabilities: bool = False,
    quiet: bool = True,
) -> Predicted:
    """Label the rows of a file: `predicted_label` and `probability` beside the columns that are there.

    A row whose text is missing or blank gets neither. Nothing is written where `output` is until all rows are done.

    Args:
        classifier: See `Classifier.load`.
        source: csv, tsv, jsonl or parquet.
        output: Where the result goes; its ending names the format.
        text_column: Column with the text.
        text_pair_column: Column with the second text, for tasks on pairs.
        min_probability: Least probability of a label; below it, `abstained` is true and the label stays a guess.
        all_probabilities: Also a column `probability_<label>` per label.
        quiet: No progress bar.

    Raises:
        DataError: A row cannot be read, named with its line; or a column is missing.
        ConfigError: `output` cannot hold the rows, exists, or `min_probability` is not between 0 and 1.
    """
    if min_probability is not None and not 0 < min_probability <= 1:
        raise ConfigError(f"min_probability: {min_probability} is not above 0 and up to 1")
    if Path(output).exists():
        raise ConfigError(f"output_file: {output} exists.", fix="choose another --output_file, or remove it")
    reader = RowReader(source)
    each = [f"{PROBABILITY}_{name}" for name in classifier.schema.names] if all_probabilities else []
    new: dict[str, type] = {LABEL: str, PROBABILITY: float} | dict.fromkeys(each, float)
    if min_probability is not None:
        new[ABSTAINED] = bool
    rows = blank = abstained = 0
    with row_writer(output, reader, new) as writer:
        for window in _windows(reader, quiet):
            texts, pairs, known = _texts(reader, window, rows, text_column, text_pair_column)
            shares_NC = classifier.probabilities(texts, pairs) if texts else np.zeros((0, len(classifier.schema)))
            answers = iter(shares_NC)
            for row, has_text in zip(window, known, strict=True):
                if not has_text:
                    row.update(dict.fromkeys(new))
                    blank += 1
                    continue
                shares_C = next(answers)
                best = int(shares_C.argmax())
                row[LABEL], row[PROBABILITY] = classifier.schema.names[best], round(float(shares_C[best]), 6)
                row.update(zip(each, (round(float(share), 6) for share in shares_C), strict=False))
                if min_probability is not None:
                    row[ABSTAINED] = bool(shares_C[best] < min_probability)
                    abstained += row[ABSTAINED]
            writer.write(window)
            rows += len(window)
        if not rows:
            raise DataError(f"{source} has no rows.")
    if blank:
        logger.warning("%s: %d of %d rows have no text and got no label", source, blank, rows)
    return Predicted(rows, blank, abstained)


def evaluate_file(
    classifier: Classifier,
    source: str | Path,
    *,
    text_column: str = "text",
    text_pair_column: str | None = None,
    label_column: str = "label",
    quiet: bool = True,
) -> dict[str, Any]:
    """Scores of a classifier on a labelled file: `rows`, `accuracy`, `macro_f1` and `loss`.

    Raises:
        DataError: A row has no text, or cannot be read; or a column is missing.
        LabelError: A label is none of the classifier's.
    """
    reader = RowReader(source)
    logits, labels, seen = [], [], 0
    for window in _windows(reader, quiet):
        texts, pairs, known = _texts(reader, window, seen, text_column, text_pair_column)
        if not all(known):
            raise DataError(f"{source}, row {seen + known.index(False) + 1}: there is no text.")
        for number, row in enumerate(window, start=seen + 1):
            if label_column not in row:
                raise DataError(f"{source}, row {number}: there is no column {label_column}.", available=sorted(row))
            if str(row[label_column]) not in classifier.schema.names:
                raise LabelError(
                    f"{source}, row {number}: the label {row[label_column]!r} is none of the classifier's.",
                    available=classifier.schema.names,
                )
            labels.append(classifier.schema.encode(str(row[label_column])))
        logits.append(classifier.logits(texts, pairs))
        seen += len(window)
    if not seen:
        raise DataError(f"{source} has no rows.")
    return {"rows": seen, **classification_metrics(np.concatenate(logits), np.asarray(labels))}


def _windows(reader: RowReader, quiet: bool) -> Iterator[list[Row]]:
    """Windows of rows, with progress in the bytes of the file."""
    with tqdm(total=reader.size, unit="B", unit_scale=True, desc=reader.path.name, disable=quiet) as bar:
        for window in reader.windows(WINDOW):
            yield window
            bar.update(reader.bytes_read - bar.n)


def _texts(
    reader: RowReader, window: Sequence[Row], before: int, text_column: str, text_pair_column: str | None
) -> tuple[list[str], list[str] | None, list[bool]]:
    """Texts of the rows that have one, their second texts, and which rows have one."""
    columns = [text_column] if text_pair_column is None else [text_column, text_pair_column]
    found: list[list[str]] = [[] for _ in columns]
    known = []
    for number, row in enumerate(window, start=before + 1):
        values = []
        for column in columns:
            if column not in row:
                raise DataError(f"{reader.path}, row {number}: there is no column {column}.", available=sorted(row))
            value = row[column]
            if value is not None and not isinstance(value, str):
                raise DataError(
                    f"{reader.path}, row {number}: {column} holds a {type(value).__name__}, a text is needed."
                )
            values.append(value or "")
        known.append(all(value.strip() for value in values))
        if known[-1]:
            for part, value in zip(found, values, strict=True):
                part.append(value)
    return found[0], found[1] if len(found) > 1 else None, known


def _trained_length(folder: Path | None) -> int:
    """`max_length` of the training, if the folder says."""
    file = None if folder is None else folder / "run.json"
    if file is None or not file.is_file():
        return DEFAULT_LENGTH
    length = json.loads(file.read_text(encoding="utf-8")).get("config", {}).get("max_length")
    return int(length) if isinstance(length, int) else DEFAULT_LENGTH


def is_quiet() -> bool:
    """No progress bar where standard error is no terminal."""
    return not sys.stderr.isatty()
