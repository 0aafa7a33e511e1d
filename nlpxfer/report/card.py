"""The model card: what the model is, how to use it, and what was measured, honestly.

The metadata goes through huggingface_hub's `ModelCardData` and `EvalResult`, so that the Hub reads the same names and
numbers as a person does; the YAML is never pasted together. Whatever a user or a data set named is escaped, so that a
label with a pipe or a tag in it stays a label.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from nlpxfer.problem import MULTI_LABEL, REGRESSION, SINGLE_LABEL, ProblemType
from nlpxfer.report.markdown import escape_markdown, short_count
from nlpxfer.report.privacy import scrub, scrub_text
from nlpxfer.report.report import METRIC_WORDS, Arm, Report
from nlpxfer.report.retention import retention_section
from nlpxfer.strict_json import write_text_whole

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

CARD_FILE: Final = "README.md"
_BUNDLED: Final = {"all-MiniLM-L6-v2": "sentence-transformers/all-MiniLM-L6-v2"}
_FOLDED_LABELS: Final = 20
_F1: Final = {name: ("f1", f"{name.capitalize()}-F1", {"average": name}) for name in ("micro", "macro")}
_SHOWN: Final[Mapping[ProblemType, Mapping[str, tuple[str, str, Mapping[str, str]]]]] = {
    SINGLE_LABEL: {"accuracy": ("accuracy", "Accuracy", {}), "macro_f1": _F1["macro"]},
    MULTI_LABEL: {"micro_f1": _F1["micro"], "macro_f1": _F1["macro"]},
    REGRESSION: {
        "mean_absolute_error": ("mae", "Mean absolute error", {}),
        "spearman": ("spearmanr", "Spearman correlation", {}),
    },
}
"""Metrics that tables and the card's metadata show: name -> the Hub's name, title and arguments."""

_KNOWS: Final[Mapping[ProblemType, str]] = {
    SINGLE_LABEL: (
        "The model knows the labels above and no others: any text gets one of them, also one that fits none."
    ),
    MULTI_LABEL: (
        "The model knows the labels above and no others. A label with a probability above 0.5 counts as given; "
        "`calibration.json` holds thresholds that were fitted on the validation rows."
    ),
    REGRESSION: "Any text gets a number, also one that is unlike the training texts.",
}

Kind = Literal["hub", "bundled", "folder"]


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What the card says beside the report.

    Attributes:
        model_name: Short name of the model, the title.
        labels: Label names in schema order.
        description: What the model is and how it was made, one or two sentences of plain text.
        hub_model_id: Where the model will be on the Hub; the snippet loads it from there, or else from its folder.
        base_model: Name of the checkpoint it was made from.
        base_model_kind: Where `base_model` was found; only Hub ids get into the metadata.
        dataset_name: Name of the data for a reader.
        dataset_id: Its Hub id, if it has one.
        language: ISO codes of the texts' languages.
        license: Identifier of the model's licence.
        tags: For searching on the Hub, beside those that nlpxfer sets.
        text_pairs: Whether the model reads two texts at once.
        problem_type: What the model gives for a text.
        options: Training options worth showing: name -> value.
        limits: Further limits that the method or the data brings, one sentence each.
        is_adapter: Whether the folder holds an adapter in place of a whole model.
        is_static: Whether it holds a static model, which model2vec reads and transformers alone does not.
    """

    model_name: str
    labels: Sequence[str]
    description: str
    hub_model_id: str | None = None
    base_model: str | None = None
    base_model_kind: Kind | None = None
    dataset_name: str = "own data"
    dataset_id: str | None = None
    language: Sequence[str] = ()
    license: str | None = None
    tags: Sequence[str] = ()
    text_pairs: bool = False
    problem_type: ProblemType = SINGLE_LABEL
    options: Mapping[str, Any] = field(default_factory=dict)
    limits: Sequence[str] = ()
    is_adapter: bool = False
    is_static: bool = False


def hub_model_id(name: str | None, kind: Kind | None) -> str | None:
    """The Hub id of a checkpoint, or None if it has none (a local folder).

    Args:
        name: Hub id, bundled name, or folder.
        kind: Where it was found.

    >>> hub_model_id("all-MiniLM-L6-v2", "bundled")
    'sentence-transformers/all-MiniLM-L6-v2'
    >>> hub_model_id("runs/teacher", "folder")
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, but not in __all__

    if name is None or kind not in ("hub", "bundled"):
        return None
    if kind == "bundled":
        return _BUNDLED.get(name)
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def build_card(report: Report, facts: CardFacts) -> ModelCard:
    """The model card of a finished run.

    Args:
        report: As written to report.json.
        facts: What the report does not know.

    Returns:
        The card; `str(card)` is the content of README.md.
    """
    from huggingface_hub import ModelCard

    parts = [
        f"# {escape_markdown(facts.model_name)}",
        escape_markdown(scrub_text(facts.description)),
        _usage(facts),
        _results(report),
        retention_section(report),
        _labels(facts.labels),
        _data(report, facts),
        _training(report, facts),
        _limits(report, facts),
    ]
    body = "\n\n".join(part for part in parts if part)
    return ModelCard(f"---\n{_metadata(report, facts).to_yaml()}\n---\n\n{body}\n", ignore_metadata_errors=False)


def write_card(folder: str | Path, report: Report, facts: CardFacts) -> Path:
    """Write the card as `README.md` into `folder`, whole or not at all."""
    return write_text_whole(Path(folder) / CARD_FILE, str(build_card(report, facts)))


def _metadata(report: Report, facts: CardFacts) -> ModelCardData:
    from huggingface_hub import ModelCardData

    return ModelCardData(
        pipeline_tag="text-classification",
        library_name="peft" if facts.is_adapter else "model2vec" if facts.is_static else "transformers",
        base_model=hub_model_id(facts.base_model, facts.base_model_kind),
        tags=list(dict.fromkeys(["nlpxfer", report.recipe.replace("_", "-"), *facts.tags])),
        language=list(facts.language) or None,
        license=facts.license,
        datasets=[facts.dataset_id] if facts.dataset_id else None,
        metrics=[kind for kind, _, _ in _SHOWN[facts.problem_type].values()],
        model_name=facts.model_name,
        eval_results=_eval_results(report, facts),
    )


def _eval_results(report: Report, facts: CardFacts) -> list[EvalResult]:
    from huggingface_hub import EvalResult

    shared: dict[str, Any] = {
        "task_type": "text-classification",
        "task_name": "Text classification",
        "dataset_type": facts.dataset_id or "custom",
        "dataset_name": scrub_text(facts.dataset_name),
        "dataset_split": "test",
    }
    test = report.metrics["test"]
    return [
        EvalResult(
            metric_type=kind,
            metric_name=title,
            metric_value=float(test[name]),
            metric_args=dict(how) or None,
            **shared,
        )
        for name, (kind, title, how) in _SHOWN[facts.problem_type].items()
    ]


def _usage(facts: CardFacts) -> str:
    if facts.hub_model_id:
        source, remark = repr(facts.hub_model_id), ""
    else:
        source, remark = '"."', "  # the folder of this file"
    if facts.is_adapter:
        return _adapter_usage(facts, source, remark)
    if facts.is_static:
        return _static_usage(facts, source, remark)
    text = '{"text": "First text.", "text_pair": "Second text."}' if facts.text_pairs else '"A text to classify."'
    every = ", top_k=None" if facts.problem_type == MULTI_LABEL else ""  # a sigmoid per label
    return (
        "## How to use\n\n```python\nfrom transformers import pipeline\n\n"
        f'classify = pipeline("text-classification", model={source}{every}){remark}\n'
        f"print(classify({text}))\n```"
    )


def _static_usage(facts: CardFacts, source: str, remark: str) -> str:
    answers = "predict" if facts.problem_type == REGRESSION else "predict_proba"
    return (
        "## How to use\n\nThis is a static model: token vectors, their mean, and a small head.\n\n"
        "```python\nfrom model2vec.inference import StaticModelPipeline\n\n"
        f"classifier = StaticModelPipeline.from_pretrained({source}){remark}\n"
        f'print(classifier.classes_, classifier.{answers}(["A text to classify."]))\n```\n\n'
        "`nlpxfer predict` and `nlpxfer.Classifier` read it too, with its calibrated temperature."
    )


def _adapter_usage(facts: CardFacts, source: str, remark: str) -> str:
    base = "" if hub_model_id(facts.base_model, facts.base_model_kind) else ', base="FOLDER"'
    answers = "logits" if facts.problem_type == REGRESSION else "probabilities"
    texts = '["First text."], ["Second text."]' if facts.text_pairs else '["A text to classify."]'
    return (
        "## How to use\n\nThis is an adapter: it needs the checkpoint that it was trained on.\n\n"
        "```python\nfrom nlpxfer.classify import Classifier\n\n"
        f"classifier = Classifier.load({source}{base}){remark}\n"
        f"print(classifier.{answers}({texts}))\n```"
    )


def _results(report: Report) -> str:
    titles = [METRIC_WORDS[name] for name in shown_metrics(report.arms)]
    header = f"| arm | {' | '.join(titles)} | parameters | size | rows/s on CPU |\n|---|---:|---:|---:|---:|---:|"
    rows = [f"| {escape_markdown(arm.name)} | {' | '.join(arm_cells(arm))} |" for arm in report.arms]
    notes = [
        f"- {escape_markdown(arm.name)}: {escape_markdown(scrub_text(arm.description))}"
        for arm in report.arms
        if arm.description
    ]
    parts = ["## Results on the test rows", "\n".join([header, *rows])]
    if any(len(arm.per_seed) > 1 for arm in report.arms):
        parts.append("Mean ± standard deviation over the training seeds.")
    if notes:
        parts.append("\n".join(notes))
    parts.append(f"Did the transfer help? **{escape_markdown(report.verdict.sentence())}**")
    return "\n\n".join(parts)


def shown_metrics(arms: Sequence[Arm]) -> tuple[str, ...]:
    """The two metrics that a table of these arms shows; the arms' own metrics tell the kind of task."""
    have = arms[0].metrics["test"]
    if "micro_f1" in have:
        return tuple(_SHOWN[MULTI_LABEL])
    return tuple(_SHOWN[REGRESSION if "mean_absolute_error" in have else SINGLE_LABEL])


def arm_cells(arm: Arm) -> list[str]:
    """Two scores, parameters, size, rows per second of an arm for a table; `-` where nothing is known.

    Scores have the standard deviation over training seeds if there are several.
    """
    scores = []
    for metric in shown_metrics([arm]):
        deviation = arm.deviation(metric)
        score = f"{arm.metrics['test'][metric]:.4f}"
        scores.append(score if deviation is None else f"{score} ± {deviation:.4f}")
    return [
        *scores,
        "-" if arm.parameters is None else short_count(arm.parameters),
        "-" if arm.bytes is None else f"{short_count(arm.bytes)}B",
        "-" if arm.rows_per_second is None else f"{arm.rows_per_second:,.0f}",
    ]


def _labels(labels: Sequence[str]) -> str:
    rows = "\n".join(f"| {index} | {escape_markdown(name)} |" for index, name in enumerate(labels))
    table = f"| id | label |\n|---:|---|\n{rows}"
    if len(labels) > _FOLDED_LABELS:
        table = f"<details>\n<summary>All {len(labels)} labels</summary>\n\n{table}\n\n</details>"
    return f"## Labels\n\n{table}"


def _data(report: Report, facts: CardFacts) -> str:
    data = report.to_dict()["data"]
    lines = [f"Data: {escape_markdown(scrub_text(facts.dataset_name))}."]
    lines += [f"- {_words(name)}: {_shown(data[name])}" for name in ("rows", "classes", "leaks")]
    return "## Data\n\n" + lines[0] + "\n\n" + "\n".join(lines[1:])


def _training(report: Report, facts: CardFacts) -> str:
    cost = report.cost
    text = (
        f"## Training\n\nMethod: `{report.recipe}`. {cost.train_seconds:,.0f} s of training "
        f"({cost.total_seconds:,.0f} s in all), {cost.tokens:,} tokens, "
        f"memory peak {short_count(cost.peak_memory_bytes)}B."
    )
    if facts.options:
        options = scrub(dict(facts.options))
        rows = "\n".join(f"| {escape_markdown(name)} | {_shown(value)} |" for name, value in options.items())
        text += f"\n\n| option | value |\n|---|---|\n{rows}"
    return text


def _limits(report: Report, facts: CardFacts) -> str:
    limits = [
        _KNOWS[facts.problem_type],
        "The scores hold for texts like the test rows; measure again on your own before relying on it.",
        "It may repeat biases of its training texts and of the checkpoint that it was made from.",
    ]
    if report.verdict.gain is None:
        limits.append("No control arm was trained, so nothing is known about what the transfer itself brought.")
    limits += [escape_markdown(scrub_text(limit)) for limit in facts.limits]
    return "## Limits\n\n" + "\n".join(f"- {limit}" for limit in limits)


def _words(name: str) -> str:
    return name.replace("_", " ")


def _shown(value: object) -> str:
    """A JSON value in one line of Markdown."""
    if isinstance(value, Mapping):
        items = []
        for key, item in value.items():
            shown = f"({_shown(item)})" if isinstance(item, Mapping) else _shown(item)
            items.append(f"{escape_markdown(_words(str(key)))} {shown}")
        return ", ".join(items) or "none"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_shown, value)) or "none"
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    return escape_markdown(f"{value:,}" if isinstance(value, int) else str(value))
