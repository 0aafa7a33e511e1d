"""Use a finished classifier: label a file of any length, or score it against a labelled one.

    nlpxfer predict runs/finetune new.csv --output_file labelled.csv
    nlpxfer evaluate runs/finetune test.csv

The model is a folder of a recipe, a classifier of the Hub, or a folder of `nlpxfer export` (see nlpxfer/backends.py).

Rows are read, sorted by length and answered in windows, so memory does not grow with the file and little padding is
computed; the output keeps the order and the other columns. bfloat16 is used where it was measured to be faster, which
moves probabilities in the third digit; `--bf16 false` keeps float32.

Shapes: N rows, C classes.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from tqdm.auto import tqdm

from nlpxfer.backends import Backend, StaticBackend, open_backend
from nlpxfer.config.long_texts import LongTexts
from nlpxfer.config.options import DataOptions
from nlpxfer.data.files import Table
from nlpxfer.data.formats import other_separator
from nlpxfer.data.rows import HALF_CHARACTER, encodable, read_labels
from nlpxfer.data.schema import LabelSchema, written_otherwise
from nlpxfer.data.stream import Row, RowReader, Window, refuse_taken, row_writer
from nlpxfer.data.tokenise import TokenisedRows, check_windows, tokenise
from nlpxfer.errors import ConfigError, DataError, LabelError, NotFiniteError
from nlpxfer.evaluate.calibration import load_abstain_rule, load_temperature, load_thresholds, probabilities
from nlpxfer.evaluate.selective import AbstainRule, answered_scores, best_answers, label_answers
from nlpxfer.evaluate.task import label_f1s, task_metrics
from nlpxfer.problem import MULTI_LABEL, REGRESSION, SINGLE_LABEL, ProblemType
from nlpxfer.strict_json import require_new

logger = logging.getLogger(__name__)

Array = np.ndarray[Any, Any]

WINDOW = 8192
"""Rows that are sorted by length and answered together."""
LABEL, PROBABILITY, ABSTAINED, LABELS_ABSTAINED = "predicted_label", "probability", "abstained", "abstained_labels"
LABELS, PROBABILITIES, NUMBER = "predicted_labels", "probabilities", "predicted_number"
SEPARATOR = "|"
"""Between the labels of a multi-label row, in and out."""
DEFAULT_LENGTH = 128
DIGITS = 7
"""Significant digits of a regression's numbers: about as many as float32 holds."""


@dataclass(frozen=True, kw_only=True)
class Classifier:
    """A classifier ready to answer.

    Attributes:
        backend: What computes its logits, and its tokenizer.
        schema: Its labels.
        max_length: Tokens that are read of each text.
        temperature: T of its probabilities, softmax(logits / T) or sigmoid(logits / T); fitted on the validation rows.
        thresholds_C: Multi-label: the probability above which a label is given; fitted likewise.
        batch_size: Rows of the longest length per batch; windows of long texts count as rows. None: the backend's own.
        abstain: When it answers, if its training found a rule for that.
        long_texts: What is read of texts of more than `max_length` tokens; as in the training.
    """

    backend: Backend
    schema: LabelSchema
    max_length: int
    temperature: float
    thresholds_C: Array
    batch_size: int | None = None
    abstain: AbstainRule | None = None
    long_texts: LongTexts = LongTexts()

    @classmethod
    def load(
        cls,
        model: str | Path,
        *,
        base: str | Path | None = None,
        max_length: int | None = None,
        bf16: bool | None = None,
        int8: bool = False,
        batch_size: int | None = None,
    ) -> Classifier:
        """Load a folder or Hub id. Threads may share it and take turns; torch keeps the number of cores that it uses.

        Args:
            model: Output folder of a recipe or of `nlpxfer export`, any classifier, or an adapter bundle.
            base: The base of an adapter, where it was a local folder.
            max_length: Default: that of the training, from run.json, else 128; never more than the model can read.
            bf16: Compute in bfloat16; not for an exported model. Default: measured.
            int8: Take the int8 weights of an exported model.
            batch_size: Rows of the longest length per batch. Default: 64, for an exported model 16; a static model
                has no batches.

        Raises:
            CheckpointError: It is no classifier, or damaged; an adapter without its base; or has no int8 weights.
            ConfigError: `base` is given for a whole model, or `bf16` for an exported one; or `max_length` is more than
                the model can read, or too little for the windows of the training.
        """
        if batch_size is not None and batch_size < 1:
            raise ConfigError(f"batch_size: {batch_size} is below 1")
        backend = open_backend(str(model), base=None if base is None else str(base), int8=int8, bf16=bf16)
        if batch_size is not None and isinstance(backend, StaticBackend):
            raise ConfigError(f"batch_size: {model} is static, which has no batches.", fix="leave --batch_size out")
        limit = backend.max_positions
        if max_length is not None and not 4 <= max_length <= limit:
            raise ConfigError(
                f"max_length: {max_length} is not between 4 and the {limit} tokens that {model} can read."
            )
        return cls.of(backend, max_length=max_length, batch_size=batch_size)

    @classmethod
    def of(cls, backend: Backend, *, max_length: int | None = None, batch_size: int | None = None) -> Classifier:
        """The classifier that a backend and its folder make. Args and raises: see `load`."""
        known = backend.trained.get("max_length")
        length = max_length or min(backend.max_positions, known if isinstance(known, int) else DEFAULT_LENGTH)
        long_texts = LongTexts.from_options(backend.trained)
        pairs = backend.trained.get("text_pair_column") is not None
        check_windows(backend.tokenizer, long_texts, length, pairs=pairs)
        return cls(
            backend=backend,
            schema=backend.schema,
            max_length=length,
            temperature=load_temperature(backend.folder),
            thresholds_C=load_thresholds(backend.folder, backend.schema.names),
            batch_size=batch_size,
            abstain=load_abstain_rule(backend.folder),
            long_texts=long_texts,
        )

    def rows(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> TokenisedRows:
        """N texts as the model reads them.

        Raises:
            DataError: There is no list of texts, or something else than a text in it; or the model was trained on
                pairs of texts and gets none, or the other way round; see also `tokenise`.
        """
        texts = _listed("texts", texts)
        pairs = None if pairs is None else _listed("pairs", pairs)
        second = self.backend.trained.get("text_pair_column", "")
        if second is None and pairs:
            raise DataError("The model was trained to read one text for each row, not pairs.", fix="leave pairs out")
        if second and pairs is None:
            raise DataError(
                f"The model was trained to read a second text, {second}, beside each text.", fix="pairs=[second text]"
            )
        return tokenise(self.backend.tokenizer, texts, pairs, max_length=self.max_length, long_texts=self.long_texts)

    def logits(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> Array:
        """Logits, shape (N, C), float32, columns in the order of `schema`; of a regression the number.

        Raises:
            NotFiniteError: The model gives a logit that is NaN or infinite.
        """
        with self.backend.alone:
            rows = self.rows(texts, pairs)
            logits_NC = self.backend.logits(rows, max_length=self.max_length, batch_size=self.batch_size)
        bad = int((~np.isfinite(logits_NC).all(axis=1)).sum())
        if bad:
            raise NotFiniteError(
                f"The model gives logits that are NaN or infinite for {bad} of {len(logits_NC)} rows.",
                why="Its weights are damaged, or too large for the precision it computes in.",
                fix="--bf16 false; if that is no help, train it again",
            )
        return logits_NC

    def probabilities(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> Array:
        """Calibrated probabilities, shape (N, C), float64; each row sums to 1, but not those of a multi-label task.

        Raises:
            ConfigError: The model gives numbers.
        """
        if self.schema.problem_type == REGRESSION:
            raise ConfigError("A regression has no probabilities.", fix="logits(texts)[:, 0] are its numbers")
        return probabilities(self.logits(texts, pairs), self.temperature, self.schema.problem_type)


def _listed(name: str, given: object) -> list[str]:
    """Texts as a list, whatever numbers its owner counts them by.

    Raises:
        DataError: It has no order or is one text; or something in it is no text, or half of a character.
    """
    unordered = isinstance(given, AbstractSet | Mapping)
    if not isinstance(given, Sized) or isinstance(given, str) or unordered:  # a text is a sequence of its characters
        shown = "one text" if isinstance(given, str) else f"a {type(given).__name__}"
        shown = "None" if given is None else shown
        raise DataError(f"{name} is {shown}, a list of texts is needed.", fix=f"{name}=[text]")
    found = list(cast("Iterable[Any]", given))
    for number, text in enumerate(found):
        if not isinstance(text, str):
            raise DataError(f"{name}: number {number}, from 0, is a {type(text).__name__}, a text is needed.")
        if not encodable(text):
            raise DataError(f"{name}: number {number}, from 0, {HALF_CHARACTER}.")
    return found


class AnswerColumns:
    """The columns that a prediction adds to a row, and their values.

    Args:
        schema: The kind of task, and the labels.
        thresholds_C: Multi-label: the probability above which a label is given.
        min_probability: What is below it is abstained from: rows, in multi-label tasks each label by itself.
        all_probabilities: A column for each label.
        label_separator: Between the labels of a multi-label row.

    Raises:
        ConfigError: An option means nothing for the kind of task, or a label or probability may hold the separator.
    """

    def __init__(
        self,
        schema: LabelSchema,
        thresholds_C: Array,
        *,
        min_probability: float | None = None,
        all_probabilities: bool = False,
        label_separator: str = SEPARATOR,
    ) -> None:
        self.schema, self.thresholds_C, self.separator = schema, thresholds_C, label_separator
        self.min_probability = min_probability
        kind, faults = self.schema.problem_type, []
        if min_probability is not None and kind == REGRESSION:
            faults.append("min_probability: the model gives numbers")
        if all_probabilities and kind == REGRESSION:
            faults.append("all_probabilities: the model gives numbers")
        ambiguous = [name for name in self.schema.names if label_separator in name]
        if kind == MULTI_LABEL and ambiguous:
            faults.append(f"label_separator: {label_separator!r} stands in the label {ambiguous[0]!r}; choose another")
        elif kind == MULTI_LABEL and {*label_separator} <= {*"0123456789."}:
            faults.append(f"label_separator: {label_separator!r} may stand in a probability; choose another")
        if faults:
            raise ConfigError.from_faults(faults)
        self.each = [f"{PROBABILITY}_{name}" for name in self.schema.names] if all_probabilities else []
        own: dict[ProblemType, dict[str, type]] = {
            SINGLE_LABEL: {LABEL: str, PROBABILITY: float},
            MULTI_LABEL: {LABELS: str, PROBABILITIES: str},
            REGRESSION: {NUMBER: float},
        }
        self.types = own[kind] | dict.fromkeys(self.each, float)
        if min_probability is not None:
            self.types |= {LABELS_ABSTAINED: str} if kind == MULTI_LABEL else {ABSTAINED: bool}

    def row(self, shares_C: Array) -> dict[str, Any]:
        """The values for one row, from its calibrated probabilities; of a regression from its number, shape (1,)."""
        if self.schema.problem_type == REGRESSION:
            return {NUMBER: float(f"{shares_C[0]:.{DIGITS}g}")}
        row = self._label(shares_C) if self.schema.problem_type == SINGLE_LABEL else self._labels(shares_C)
        return row | {name: round(float(share), 6) for name, share in zip(self.each, shares_C, strict=False)}

    def _label(self, shares_C: Array) -> dict[str, Any]:
        best = int(shares_C.argmax())
        row = {LABEL: self.schema.names[best], PROBABILITY: round(float(shares_C[best]), 6)}
        if self.min_probability is not None:
            row[ABSTAINED] = bool(shares_C[best] < self.min_probability)
        return row

    def _labels(self, shares_C: Array) -> dict[str, Any]:
        given = np.flatnonzero(shares_C > self.thresholds_C)
        row = {LABELS: self._joined(given), PROBABILITIES: self.separator.join(f"{shares_C[i]:.6f}" for i in given)}
        if self.min_probability is not None:
            row[LABELS_ABSTAINED] = self._joined(given[shares_C[given] < self.min_probability])
        return row

    def _joined(self, labels: Array) -> str:
        return self.separator.join(self.schema.names[index] for index in labels)


def second_column(asked: str | None, source: str | Path, *models: Classifier) -> str | None:
    """The column with the second texts: the one that is asked for, else that of the models' training, if it had one.

    Raises:
        DataError: It is that of the training, and the file has none of that name.
    """
    known = [model.backend.trained.get("text_pair_column") for model in models]
    trained: str | None = next((name for name in known if name is not None), None)
    if asked is not None or trained is None:
        return asked
    names = RowReader(source).names()
    if trained not in names:
        raise DataError(
            f"{source}: there is no column {trained}, which the model was trained to read beside the text.",
            why=other_separator(names),
            fix="--text_pair_column NAME, the column with the second text",
            available=names,
        )
    return trained


def trained_column(option: str, asked: str | None, source: str | Path, *models: Classifier) -> str:
    """The column of texts or labels: the one that is asked for, else that of the models' training, else the usual one.

    Args:
        option: "text_column" or "label_column".
        asked: What was asked for.
        source: The file; what the training read is looked for only if it has such a column.
        models: Their folders may say what their training read.

    Raises:
        DataError: The file has no header that can be read.
    """
    if asked is not None:
        return asked
    usual = DataOptions.__dataclass_fields__[option].default
    trained = [name for model in models if (name := model.backend.trained.get(option))]
    if all(name == usual for name in trained):
        return str(usual)
    names = RowReader(source).names()
    return str(next((name for name in trained if name in names), usual))


def separator_of(asked: str | None, *models: Classifier) -> str:
    """What stands between the labels of a row: what is asked for, else that of the models' training, else "|".

    Raises:
        ConfigError: What is asked for is empty, or the models give one answer to each row.
    """
    if asked is not None and models[0].schema.problem_type != MULTI_LABEL:
        raise ConfigError("label_separator: the model gives one answer to each row", fix="leave it out")
    if asked == "":
        raise ConfigError("label_separator: it is empty, so labels would run into each other")
    trained = (model.backend.trained.get("label_separator") for model in models)
    return asked or next((separator for separator in trained if separator), SEPARATOR)


def text_columns(
    text: str | None, pair: str | None, source: str | Path, *models: Classifier
) -> tuple[str, str | None]:
    """`trained_column` of the texts, and `second_column`."""
    return trained_column("text_column", text, source, *models), second_column(pair, source, *models)


@dataclass(frozen=True)
class Predicted:
    """What `predict_file` did.

    Attributes:
        rows: Rows read and written.
        without_text: Rows whose text is missing or blank: they got no label.
        abstained: Rows whose best probability is below the least; with several labels per row, that of one of them.
    """

    rows: int
    without_text: int
    abstained: int


def predict_file(
    classifier: Classifier,
    source: str | Path,
    output: str | Path,
    *,
    text_column: str | None = None,
    text_pair_column: str | None = None,
    min_probability: float | None = None,
    all_probabilities: bool = False,
    label_separator: str | None = None,
    quiet: bool = True,
) -> Predicted:
    """Label the rows of a file, in new columns beside those that are there.

    The columns are `predicted_label` and `probability`; of a multi-label model `predicted_labels` and `probabilities`
    (of these labels, in their order), of a regression `predicted_number`. A row whose text is missing or blank gets
    nothing in them. Nothing is written where `output` is until all rows are done.

    Args:
        classifier: See `Classifier.load`.
        source: csv, tsv, jsonl or parquet.
        output: Where the result goes; its ending names the format.
        text_column: Column with the text. Default: that of the training where the file has it, else "text".
        text_pair_column: Column with the second text, for tasks on pairs. Default: that of the training.
        min_probability: Least probability of a label; below it the label stays a guess: `abstained` is true, or of a
            multi-label model `abstained_labels` holds it. Default: that of the classifier's own rule, if it has one.
        all_probabilities: Also a column `probability_<label>` per label.
        label_separator: Between the labels of a multi-label row. Default: that of the training, else "|".
        quiet: No progress bar.

    Raises:
        DataError: A row cannot be read, named with its line; or a column is missing.
        ConfigError: `output` cannot hold the rows, exists, `min_probability` is not between 0 and 1, or an option
            means nothing for this kind of model.
    """
    if min_probability is not None and not 0 < min_probability <= 1:
        raise ConfigError(f"min_probability: {min_probability} is not above 0 and up to 1")
    least = _least_probability(classifier) if min_probability is None else min_probability
    columns = AnswerColumns(
        classifier.schema,
        classifier.thresholds_C,
        min_probability=least,
        all_probabilities=all_probabilities,
        label_separator=separator_of(label_separator, classifier),
    )
    abstained = 0

    def answers(texts: Sequence[str], pairs: Sequence[str] | None) -> Iterator[dict[str, Any]]:
        nonlocal abstained
        numbers = classifier.schema.problem_type == REGRESSION
        for found_C in (classifier.logits if numbers else classifier.probabilities)(texts, pairs):
            answer = columns.row(found_C)
            abstained += bool(answer.get(ABSTAINED) or answer.get(LABELS_ABSTAINED))
            yield answer

    texts_in = text_columns(text_column, text_pair_column, source, classifier)
    rows, blank = label_rows(source, output, answers, columns.types, texts_in, quiet=quiet)
    return Predicted(rows, blank, abstained)


Answers = Callable[[Sequence[str], Sequence[str] | None], Iterable[Row]]
"""From texts and their second texts to the new columns of each."""


def label_rows(
    source: str | Path,
    output: str | Path,
    answers: Answers,
    types: Mapping[str, type],
    columns: tuple[str, str | None],
    *,
    quiet: bool,
) -> tuple[int, int]:
    """Write the rows of a file with new columns beside those that are there; memory does not grow with the file.

    The output appears whole at the end or not at all.

    Args:
        source: csv, tsv, jsonl or parquet.
        output: Where the result goes; its ending names the format.
        answers: Gives the new columns of rows with a text; those of other rows are empty.
        types: The new columns and their types.
        columns: With the text, and the second text if there is one.
        quiet: No progress bar.

    Returns:
        How many rows there are, and how many without a text.

    Raises:
        DataError: There is no row, or one cannot be read, named with its line; or a column is missing.
        ConfigError: `output` exists or cannot hold the rows, or a row already has one of the new columns.
    """
    require_new(output)
    reader = RowReader(source)
    rows = blank = 0
    with row_writer(output, reader, types) as writer:
        for window in windows(reader, columns, quiet):
            if reader.columns is None:  # else `row_writer` has looked
                for number, row in enumerate(window.rows, start=rows + 1):
                    refuse_taken(f"{reader.path}, row {number}", row, types)
            texts, pairs, known = texts_of(reader, window.rows, rows, *columns)
            found = iter(answers(texts, pairs) if texts else ())
            writer.write(window, [next(found) if has_text else dict.fromkeys(types) for has_text in known])
            blank += known.count(False)
            rows += len(known)
        if not rows:
            raise DataError(f"{source} has no rows.")
    if blank:
        logger.warning("%s: %d of %d rows have no text and got no label", source, blank, rows)
    return rows, blank


def _least_probability(classifier: Classifier) -> float | None:
    """The threshold of the classifier's own rule; infinite where none keeps the precision it was to keep."""
    rule = classifier.abstain
    if rule is None or rule.min_probability is not None:
        return None if rule is None else rule.min_probability
    logger.warning(
        "all answers are abstained from: no threshold was found in training that gives answers of which %g are right; "
        "--min_probability overrides this",
        rule.precision,
    )
    return math.inf


def evaluate_file(
    classifier: Classifier,
    source: str | Path,
    *,
    text_column: str | None = None,
    text_pair_column: str | None = None,
    label_column: str | None = None,
    label_separator: str | None = None,
    quiet: bool = True,
) -> dict[str, Any]:
    """Scores of a classifier on a labelled file: `rows`, and the metrics of its kind of task (`problem.METRICS`).

    For a multi-label model also `with_thresholds`: micro-F1 and macro-F1 with the thresholds fitted on validation.

    With a rule for abstaining also `answered`: its `min_probability`, and how many `answers` it gives (rows, or labels
    of a multi-label model), their `coverage` and `precision`. The columns are found as `predict_file` finds them, that
    of the labels and what is between several likewise.

    Raises:
        DataError: A row has no text or label, or cannot be read; or a column is missing.
        LabelError: A label is none of the classifier's.
    """
    schema, logits, labels = classifier.schema, [], []
    texts_in = text_columns(text_column, text_pair_column, source, classifier)
    columns = (*texts_in, trained_column("label_column", label_column, source, classifier))
    separator = separator_of(label_separator, classifier)
    for texts, pairs, gold in labelled_windows(schema, source, columns, separator, quiet):
        labels += gold
        logits.append(classifier.logits(texts, pairs))
    found_NC = np.concatenate(logits)
    scores: dict[str, Any] = {"rows": len(labels), **task_metrics(schema.problem_type, found_NC, schema.array(labels))}
    if schema.problem_type == REGRESSION:
        return scores
    shares_NC, gold_N = probabilities(found_NC, classifier.temperature, schema.problem_type), schema.array(labels)
    if schema.problem_type == MULTI_LABEL:
        micro, macro = label_f1s(shares_NC > classifier.thresholds_C, gold_N)
        scores["with_thresholds"] = {"micro_f1": micro, "macro_f1": macro}
    if classifier.abstain is not None:
        if schema.problem_type == MULTI_LABEL:
            answers = label_answers(shares_NC, gold_N, classifier.thresholds_C)
        else:
            answers = best_answers(shares_NC, gold_N)
        threshold = classifier.abstain.min_probability
        scores["answered"] = {"min_probability": threshold, **answered_scores(classifier.abstain, answers)}
    return scores


def _no_key(reader: RowReader, number: int, row: Row, column: str) -> DataError:
    """A row of a jsonl file has no value for a column; other formats are refused by their header."""
    return DataError(
        f"{reader.path}, row {number}: there is no column {column}.",
        fix=f"give each row a {column!r}, or name another column",
        available=sorted(row),
    )


def _gold_labels(
    schema: LabelSchema, reader: RowReader, window: Sequence[Row], before: int, column: str, separator: str
) -> list[Any]:
    """The labels of a window's rows, as `LabelSchema.array` takes them."""
    for number, row in enumerate(window, start=before + 1):
        if column not in row:
            raise _no_key(reader, number, row, column)
    table = Table(
        source=str(reader.path),
        name=reader.path.name,
        columns={column: [row[column] for row in window]},
        class_names=reader.class_names(column),
    )
    split = separator if any(isinstance(row[column], str) for row in window) else None
    found, faults = read_labels(table, column, schema.problem_type, split, schema)
    if faults:
        index, fault = faults[0]
        raise DataError(f"{reader.path}, row {before + 1 + index}: {fault}.")
    if schema.problem_type == REGRESSION:
        return found
    several = schema.problem_type == MULTI_LABEL
    for number, names in enumerate(found, start=before + 1):
        unknown = [name for name in (names if several else [names]) if name not in schema]
        if unknown:
            raise LabelError(
                f"{reader.path}, row {number}: the label {unknown[0]!r} is none of the classifier's.",
                why=written_otherwise(unknown[:1], schema.names),
                available=schema.names,
            )
    if several:
        return [[schema.encode(name) for name in names] for names in found]
    return [schema.encode(name) for name in found]


def labelled_windows(
    schema: LabelSchema, source: str | Path, columns: tuple[str, str | None, str], separator: str, quiet: bool
) -> Iterator[tuple[list[str], list[str] | None, list[Any]]]:
    """Texts, second texts and gold labels of a labelled file, window by window.

    Args:
        schema: Labels that there may be.
        source: csv, tsv, jsonl or parquet.
        columns: With the text, the second text if there is one, and the label.
        separator: Between the labels of a multi-label row that are one text.
        quiet: No progress bar.

    Raises:
        DataError: There is no row, or one has no text or label, or cannot be read; or a column is missing.
        LabelError: A label is none of the schema's.
    """
    reader, seen, (text, pair, label) = RowReader(source), 0, columns
    for window in windows(reader, columns, quiet):
        texts, pairs, known = texts_of(reader, window.rows, seen, text, pair)
        if not all(known):
            index = known.index(False)
            blank = next(name for name in (text, pair) if name and not (window.rows[index][name] or "").strip())
            raise DataError(f"{source}, row {seen + index + 1}: there is no text in the column {blank}.")
        yield texts, pairs, _gold_labels(schema, reader, window.rows, seen, label, separator)
        seen += len(known)
    if not seen:
        raise DataError(f"{source} has no rows.")


def windows(reader: RowReader, columns: Sequence[str | None], quiet: bool) -> Iterator[Window]:
    """Windows of rows and their values in some columns, with progress in the bytes of the file."""
    with tqdm(total=reader.size, unit="B", unit_scale=True, desc=reader.path.name, disable=quiet) as bar:
        for window in reader.windows(WINDOW, [name for name in columns if name is not None]):
            yield window
            bar.update(reader.bytes_read - bar.n)


def texts_of(
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
                raise _no_key(reader, number, row, column)
            value = row[column]
            if value is not None and not isinstance(value, str):
                raise DataError(
                    f"{reader.path}, row {number}: {column} holds a {type(value).__name__}, a text is needed."
                )
            if value and not encodable(value):
                raise DataError(f"{reader.path}, row {number}: {column!r} {HALF_CHARACTER}.")
            values.append(value or "")
        known.append(all(value.strip() for value in values))
        if known[-1]:
            for part, value in zip(found, values, strict=True):
                part.append(value)
    return found[0], found[1] if len(found) > 1 else None, known


def is_quiet() -> bool:
    """No progress bar where standard error is no terminal."""
    return not sys.stderr.isatty()
