"""Models without any pretrained weights: the control arms of fine-tuning, and the floor that a report shows.

Shapes: B rows, C classes.

Both return logits (log-probabilities for one class per row), so that every arm goes through the same metrics.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nlpxfer.errors import DataError, LabelError
from nlpxfer.evaluate.task import task_metrics
from nlpxfer.problem import BEST, LOWER_IS_BETTER, MULTI_LABEL, REGRESSION, SINGLE_LABEL, ProblemType

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
        logits: Split name -> (rows, classes), in schema order: natural logarithms of probabilities for one class per
            row, log-odds for multi-label, the number for a regression.
        strength: The chosen C, scikit-learn's inverse regularisation strength.
        validation_scores: The task's score (`nlpxfer.problem.BEST`) on validation of each C that was tried.
        parameters: Weights and intercepts of the classifier.
        seconds: Wall-clock time of everything, search included.
        converged: Whether the chosen fit reached its tolerance before the iteration limit.
    """

    logits: dict[str, NDArray[np.float64]]
    strength: float
    validation_scores: dict[float, float]
    parameters: int
    seconds: float
    converged: bool


def majority(
    train_labels: ArrayLike, *, classes: int, rows: int, problem_type: ProblemType = SINGLE_LABEL
) -> NDArray[np.float64]:
    """The same answer for every row, the best constant: the log of each class's share of the training rows.

    The most frequent class wins (the first of equals). One row is added to each class, so that a class without
    training rows has a finite loss. For multi-label the log-odds of each label, for a regression the mean.

    Args:
        train_labels: Class indices of the training rows, or what `LabelSchema.array` gives.
        classes: C, the number of classes of the schema.
        rows: B, the number of rows to answer.
        problem_type: What the labels are.

    Returns:
        Logits of shape (rows, classes).

    Raises:
        DataError: No training labels.
        LabelError: A label outside 0..C-1.
    """
    labels = _training_labels(train_labels, classes, problem_type)
    if problem_type == SINGLE_LABEL:
        counts_C = np.bincount(labels, minlength=classes) + 1.0
        constant_C = np.log(counts_C / counts_C.sum())
    elif problem_type == MULTI_LABEL:
        share_C = (labels.sum(axis=0) + 1.0) / (len(labels) + 2.0)
        constant_C = np.log(share_C / (1 - share_C))
    else:
        constant_C = labels.mean(keepdims=True)
    return np.tile(constant_C, (rows, 1))


def tfidf_arm(
    train_texts: Sequence[str],
    train_labels: ArrayLike,
    texts: Mapping[str, Sequence[str]],
    *,
    validation_labels: ArrayLike,
    classes: int,
    problem_type: ProblemType = SINGLE_LABEL,
) -> TfidfArm:
    """Bag of words and logistic regression (ridge for numbers): what the labelled rows give without pretraining.

    Features are TF-IDF of words and word pairs and of 3 to 5 characters inside words, the most frequent 20,000 of
    each. The strength C is chosen from 1, 10, 100 by the task's score on validation, then by loss. Nothing is random.

    Args:
        train_texts: Texts to learn from; join the two texts of a pair first.
        train_labels: Their class indices, or what `LabelSchema.array` gives.
        texts: Split name -> texts to answer; must hold `validation`.
        validation_labels: Labels of `texts["validation"]`.
        classes: C, the number of classes of the schema; a class without training rows gets probability 1e-12.
        problem_type: What the labels are.

    Raises:
        DataError: No `validation` split, rows and labels that do not fit, fewer than two classes in training, or
            training texts without a single word.
        LabelError: A label outside 0..C-1.
    """
    start = time.perf_counter()
    labels = _training_labels(train_labels, classes, problem_type)
    _check_rows(train_texts, labels, texts, problem_type)
    features, answers = _features(train_texts, texts)
    best, sign = BEST[problem_type], -1 if BEST[problem_type] in LOWER_IS_BETTER else 1
    fits = []
    for strength in _STRENGTHS:
        model = _MODELS[problem_type](features, labels, strength, classes)
        metrics = task_metrics(problem_type, model.logits(answers["validation"]), validation_labels)
        fits.append((sign * metrics[best], -metrics["loss"], strength, model, metrics[best]))
    _, _, strength, model, _ = max(fits, key=lambda fit: fit[:2])
    return TfidfArm(
        logits={name: model.logits(matrix) for name, matrix in answers.items()},
        strength=strength,
        validation_scores={tried: score for *_, tried, _, score in fits},
        parameters=model.parameters,
        seconds=time.perf_counter() - start,
        converged=model.converged,
    )


def _training_labels(labels: ArrayLike, classes: int, problem_type: ProblemType) -> NDArray[Any]:
    found = np.asarray(labels)
    shape = (len(found), classes) if problem_type == MULTI_LABEL else (len(found),)
    if found.shape != shape or not len(found):
        raise DataError(f"Training labels of shape {found.shape} cannot be learnt from: need one per row")
    if problem_type != SINGLE_LABEL:
        return found.astype(np.float64)
    if not np.issubdtype(found.dtype, np.integer) or found.min() < 0 or found.max() >= classes:
        raise LabelError(
            f"Training labels must be class indices from 0 to {classes - 1}",
            why=f"they are {found.dtype} from {found.min()} to {found.max()}",
        )
    return found.astype(np.int64)


def _check_rows(
    train_texts: Sequence[str], labels: NDArray[Any], texts: Mapping[str, Sequence[str]], problem_type: ProblemType
) -> None:
    if len(train_texts) != len(labels):
        raise DataError(f"{len(train_texts)} training texts, but {len(labels)} labels")
    if "validation" not in texts:
        raise DataError("tfidf_arm needs the split `validation` to choose its strength", available=texts)
    if problem_type == SINGLE_LABEL and len(np.unique(labels)) < 2:
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


class _Softmax:
    """Multinomial logistic regression."""

    def __init__(self, features: Any, labels_B: NDArray[Any], strength: float, classes: int) -> None:  # noqa: ANN401
        self.model, self.classes = _logistic(features, labels_B, strength), classes
        self.parameters = int(self.model.coef_.size + self.model.intercept_.size)
        self.converged = bool(self.model.n_iter_.max() < _MAX_ITERATIONS)

    def logits(self, matrix: Any) -> NDArray[np.float64]:  # noqa: ANN401 - a sparse matrix
        """Columns in schema order; classes that the model never saw get the floor."""
        probabilities_BC = np.full((matrix.shape[0], self.classes), _FLOOR)
        probabilities_BC[:, self.model.classes_] = np.maximum(self.model.predict_proba(matrix), _FLOOR)
        log_BC: NDArray[np.float64] = np.log(probabilities_BC / probabilities_BC.sum(axis=1, keepdims=True))
        return log_BC


class _Sigmoids:
    """A logistic regression per label; a label that all or no training rows have is answered so."""

    def __init__(self, features: Any, labels_BC: NDArray[Any], strength: float, classes: int) -> None:  # noqa: ANN401
        varied = [label for label in range(classes) if 0 < labels_BC[:, label].sum() < len(labels_BC)]
        self.models = {label: _logistic(features, labels_BC[:, label] > 0.5, strength) for label in varied}
        self.constant_C = np.where(labels_BC.mean(axis=0) > 0.5, -np.log(_FLOOR), np.log(_FLOOR))
        self.parameters = sum(int(model.coef_.size + 1) for model in self.models.values())
        self.converged = all(bool(model.n_iter_.max() < _MAX_ITERATIONS) for model in self.models.values())

    def logits(self, matrix: Any) -> NDArray[np.float64]:  # noqa: ANN401 - a sparse matrix
        """Log-odds."""
        found_BC = np.tile(self.constant_C, (matrix.shape[0], 1))
        for label, model in self.models.items():
            found_BC[:, label] = model.decision_function(matrix)
        return found_BC


class _Number:
    """Ridge regression."""

    def __init__(self, features: Any, numbers_B: NDArray[Any], strength: float, classes: int) -> None:  # noqa: ANN401
        from sklearn.linear_model import Ridge

        self.model = Ridge(alpha=1 / strength, solver="lsqr", tol=_TOLERANCE).fit(features, numbers_B)
        self.parameters = int(self.model.coef_.size + 1)
        self.converged = True

    def logits(self, matrix: Any) -> NDArray[np.float64]:  # noqa: ANN401 - a sparse matrix
        """The numbers, shape (rows, 1)."""
        return np.asarray(self.model.predict(matrix), dtype=np.float64)[:, None]


_MODELS: Final[Mapping[ProblemType, Any]] = {SINGLE_LABEL: _Softmax, MULTI_LABEL: _Sigmoids, REGRESSION: _Number}


def _logistic(features: Any, labels: NDArray[Any], strength: float) -> Any:  # noqa: ANN401 - scikit-learn is untyped
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=strength, tol=_TOLERANCE, max_iter=_MAX_ITERATIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # not lost: see TfidfArm.converged
        model.fit(features, labels)
    logger.debug("TF-IDF with C = %g: %d iterations", strength, model.n_iter_.max())
    return model
