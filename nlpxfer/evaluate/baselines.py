"""Classifiers without any pretrained model: the control arms of fine-tuning, and the floor that a report shows.

Shapes: B rows, C classes.

Both return log-probabilities, which are valid logits, so that every arm goes through the same metrics.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nlpxfer.errors import DataError, LabelError
from nlpxfer.evaluate.metrics import classification_metrics

logger = logging.getLogger(__name__)

# Sized so that 10,000 short texts of 77 classes, search included, take less than 30 s on one core.
_MAX_FEATURES = 20_000
_STRENGTHS = (1.0, 10.0, 100.0)
_MAX_ITERATIONS = 100
_TOLERANCE = 3e-4
_FLOOR = 1e-12
_WORD_OR_SIGN = r"(?u)\w+|[^\w\s]"


@dataclass(frozen=True, kw_only=True)
class TfidfArm:
    """Outcome of `tfidf_arm`.

    Attributes:
        log_probabilities: Split name -> (rows, classes), natural logarithms, in schema order.
        strength: The chosen C, scikit-learn's inverse regularisation strength.
        validation_accuracy: Accuracy on validation of each C that was tried.
        parameters: Weights and intercepts of the classifier.
        seconds: Wall-clock time of everything, search included.
        converged: Whether the chosen fit reached its tolerance before the iteration limit.
    """

    log_probabilities: dict[str, NDArray[np.float64]]
    strength: float
    validation_accuracy: dict[float, float]
    parameters: int
    seconds: float
    converged: bool


def majority(train_labels: ArrayLike, *, classes: int, rows: int) -> NDArray[np.float64]:
    """The same answer for every row: the log of each class's share of the training rows.

    The most frequent class wins (the first of equals), and the cross-entropy is that of the best constant guess. One
    row is added to each class, so that a class without training rows has a finite loss.

    Args:
        train_labels: Class indices of the training rows.
        classes: C, the number of classes of the schema.
        rows: B, the number of rows to answer.

    Returns:
        Logits of shape (rows, classes).

    Raises:
        DataError: No training labels.
        LabelError: A label outside 0..C-1.
    """
    counts_C = np.bincount(_class_indices(train_labels, classes), minlength=classes) + 1.0
    return np.tile(np.log(counts_C / counts_C.sum()), (rows, 1))


def tfidf_arm(
    train_texts: Sequence[str],
    train_labels: ArrayLike,
    texts: Mapping[str, Sequence[str]],
    *,
    validation_labels: ArrayLike,
    classes: int,
) -> TfidfArm:
    """Bag of words and logistic regression: what the labelled rows give without a pretrained model.

    Features are TF-IDF of words and word pairs and of 3 to 5 characters inside words, the most frequent 20,000 of
    each. The strength C is chosen from 1, 10, 100 by accuracy on validation, then by loss. Nothing is random.

    Args:
        train_texts: Texts to learn from; join the two texts of a pair first.
        train_labels: Their class indices.
        texts: Split name -> texts to answer; must hold `validation`.
        validation_labels: Class indices of `texts["validation"]`.
        classes: C, the number of classes of the schema; a class without training rows gets probability 1e-12.

    Raises:
        DataError: No `validation` split, rows and labels that do not fit, fewer than two classes in training, or
            training texts without a single word.
        LabelError: A label outside 0..C-1.
    """
    start = time.perf_counter()
    labels = _class_indices(train_labels, classes)
    _check_rows(train_texts, labels, texts)
    features, answers = _features(train_texts, texts)
    fits = []
    for strength in _STRENGTHS:
        model = _fit(features, labels, strength)
        metrics = classification_metrics(_log_probabilities(model, answers["validation"], classes), validation_labels)
        fits.append((metrics["accuracy"], -metrics["loss"], strength, model))
    _, _, strength, model = max(fits, key=lambda fit: fit[:2])
    return TfidfArm(
        log_probabilities={name: _log_probabilities(model, matrix, classes) for name, matrix in answers.items()},
        strength=strength,
        validation_accuracy={tried: accuracy for accuracy, _, tried, _ in fits},
        parameters=int(model.coef_.size + model.intercept_.size),
        seconds=time.perf_counter() - start,
        converged=bool(model.n_iter_.max() < _MAX_ITERATIONS),
    )


def _class_indices(labels: ArrayLike, classes: int) -> NDArray[np.int64]:
    indices = np.asarray(labels)
    if indices.ndim != 1 or not len(indices):
        raise DataError(f"Training labels of shape {indices.shape} cannot be learnt from: need one per row")
    if not np.issubdtype(indices.dtype, np.integer) or indices.min() < 0 or indices.max() >= classes:
        raise LabelError(
            f"Training labels must be class indices from 0 to {classes - 1}",
            why=f"they are {indices.dtype} from {indices.min()} to {indices.max()}",
        )
    return indices.astype(np.int64)


def _check_rows(train_texts: Sequence[str], labels: NDArray[np.int64], texts: Mapping[str, Sequence[str]]) -> None:
    if len(train_texts) != len(labels):
        raise DataError(f"{len(train_texts)} training texts, but {len(labels)} labels")
    if "validation" not in texts:
        raise DataError("tfidf_arm needs the split `validation` to choose its strength", available=texts)
    if len(np.unique(labels)) < 2:
        raise DataError("All training rows have the same label", why="a classifier needs at least two classes")
    if not any(text.strip() for text in train_texts):
        raise DataError("All training texts are empty")


def _features(train_texts: Sequence[str], texts: Mapping[str, Sequence[str]]) -> tuple[Any, dict[str, Any]]:
    """Sparse TF-IDF matrices of the training texts and of each split."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.pipeline import FeatureUnion

    shared: dict[str, Any] = {"sublinear_tf": True, "max_features": _MAX_FEATURES, "dtype": np.float32}
    words = TfidfVectorizer(ngram_range=(1, 2), token_pattern=_WORD_OR_SIGN, **shared)
    characters = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5), **shared)
    union = FeatureUnion([("words", words), ("characters", characters)])
    features = union.fit_transform(list(train_texts))
    return features, {name: union.transform(list(split)) for name, split in texts.items()}


def _fit(features: Any, labels: NDArray[np.int64], strength: float) -> Any:  # noqa: ANN401 - scikit-learn is untyped
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=strength, tol=_TOLERANCE, max_iter=_MAX_ITERATIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # not lost: see TfidfArm.converged
        model.fit(features, labels)
    logger.info("TF-IDF with C = %g: %d iterations", strength, model.n_iter_.max())
    return model


def _log_probabilities(model: Any, matrix: Any, classes: int) -> NDArray[np.float64]:  # noqa: ANN401
    """Columns in schema order; classes that the model never saw get the floor."""
    probabilities_BC = np.full((matrix.shape[0], classes), _FLOOR)
    probabilities_BC[:, model.classes_] = np.maximum(model.predict_proba(matrix), _FLOOR)
    log_BC: NDArray[np.float64] = np.log(probabilities_BC / probabilities_BC.sum(axis=1, keepdims=True))
    return log_BC
