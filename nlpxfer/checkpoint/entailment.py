"""An entailment (NLI) model as a scorer of labels: which of its columns means yes, found by name.

Checkpoints disagree about the order of their columns, so a name decides: the one that holds "entail" and no negation.
A model without such a name is refused, never taken by position.

Source: Yin, Hay and Roth 2019, arXiv:1909.00161 (section 4).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nlpxfer.checkpoint.load import Checkpoint, load_classifier, stored_schema
from nlpxfer.data.schema import LabelSchema
from nlpxfer.errors import CheckpointError, ConfigError, DataNotFoundError, LabelError
from nlpxfer.problem import MULTI_LABEL, REGRESSION, SINGLE_LABEL, ProblemType

_NEGATION = re.compile(r"(?:^|[^a-z])(?:not|non|no)(?:$|[^a-z])|^(?:not|non)entail")


@dataclass(frozen=True, kw_only=True, eq=False)
class Entailment:
    """An entailment model.

    Attributes:
        checkpoint: Frozen, in eval mode; columns as it stores them.
        entails: The column that says that the first text entails the second.
        against: The one that says that it does not: contradiction, or the other of two. None if there is none.
    """

    checkpoint: Checkpoint
    entails: int
    against: int | None


def entailment_columns(names: Sequence[str]) -> tuple[int, int | None]:
    """Which column says yes, and which says no, if any.

    >>> entailment_columns(["CONTRADICTION", "neutral", "Entailment"]), entailment_columns(["entail", "not_entail"])
    ((2, 0), (0, 1))

    Raises:
        CheckpointError: None or several say yes.
    """
    entail = [index for index, name in enumerate(names) if "entail" in name.lower()]
    yes = [index for index in entail if not _NEGATION.search(names[index].lower())]
    if len(yes) != 1:
        raise CheckpointError(
            f"{len(yes)} of the labels {', '.join(names)} mean entailment; one is needed.",
            why="it is no entailment model, or its config.json holds placeholders; positions are never trusted",
            fix="a model trained on natural language inference, with its labels named in id2label and label2id",
        )
    no = [index for index, name in enumerate(names) if "contradict" in name.lower()]
    if not no and len(names) == 2:
        no = [1 - yes[0]]
    return yes[0], no[0] if len(no) == 1 else None


def load_entailment(name: str, *, problem_type: ProblemType) -> Entailment:
    """Load an entailment model to score the labels of a task of some kind.

    Raises:
        ConfigError: The task is a regression.
        CheckpointError: It is none, or, for multi-label, has no column that says no; or see `load_classifier`.
    """
    if problem_type == REGRESSION:
        raise ConfigError("zero_shot_teacher: scores labels; a regression has none.")
    schema = stored_schema(name)
    try:
        entails, against = entailment_columns(schema.names)
    except CheckpointError as error:
        raise CheckpointError(f"zero_shot_teacher: {name}: {error}") from None
    if problem_type == MULTI_LABEL and against is None:
        raise CheckpointError(
            f"zero_shot_teacher: {name} has no label that means contradiction: {', '.join(schema.names)}.",
            why="whether a text has a label at all is weighed against it",
        )
    checkpoint = load_classifier(name, schema=LabelSchema(schema.names, SINGLE_LABEL))
    checkpoint.model.requires_grad_(False)
    return Entailment(checkpoint=checkpoint, entails=entails, against=against)


def hypotheses(template: str, names: Sequence[str], file: str | None = None) -> tuple[str, ...]:
    """What an entailment model is asked for each label.

    Args:
        template: Holds one {}.
        names: Label names.
        file: JSON object of a description for each label. Default: the names, with blanks for underscores.

    >>> hypotheses("This text is about {}.", ["lost_card"])
    ('This text is about lost card.',)

    Raises:
        DataNotFoundError: No such file.
        LabelError: The file is no such object, or its names are not the labels.
    """
    described = {name: name.replace("_", " ") for name in names}
    if file is not None:
        described = _read_descriptions(Path(file), names)
    return tuple(template.replace("{}", described[name]) for name in names)


def _read_descriptions(path: Path, names: Sequence[str]) -> dict[str, str]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataNotFoundError(f"label_descriptions: {path} does not exist.") from None
    except (OSError, ValueError) as error:
        raise LabelError(f"label_descriptions: {path} cannot be read as JSON: {error}") from None
    shape = '{"label": "description", ...}'
    if not isinstance(found, dict) or not all(isinstance(value, str) and value.strip() for value in found.values()):
        raise LabelError(f"label_descriptions: {path} is no object of label names and descriptions.", fix=shape)
    missing, unknown = [name for name in names if name not in found], [name for name in found if name not in names]
    if missing or unknown:
        raise LabelError(
            f"label_descriptions: the names in {path} are not the labels of the data.\n"
            f"  only in the file: {', '.join(unknown) or 'none'}\n  only in the data: {', '.join(missing) or 'none'}",
            fix=shape,
        )
    return dict(found)
