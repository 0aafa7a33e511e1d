"""What a run leaves: the output folder by the contract, the table of arms, and the model on the Hub if asked for.

`finish` writes `report.json` last, so that its presence means a whole run.
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from nlpxfer.checkpoint.adapters import BUNDLE_FOLDER, add_to_bundle, is_adapted
from nlpxfer.checkpoint.own_files import STAGING_PREFIX, remove_own
from nlpxfer.checkpoint.resolve import ResolvedCheckpoint
from nlpxfer.checkpoint.safety import ADAPTER_CONFIG
from nlpxfer.checkpoint.save import move_staged, save_classifier
from nlpxfer.checkpoint.static import INT8_FOLDER, StaticForSequenceClassification, is_static, static_int8
from nlpxfer.errors import TargetMissedError
from nlpxfer.evaluate.arms import TrainedArm
from nlpxfer.evaluate.calibration import (
    calibrate,
    fit_temperature,
    fit_thresholds,
    label_cuts,
    probabilities,
    save_calibration,
)
from nlpxfer.evaluate.cost import Cost, peak_memory_bytes, stored_bytes
from nlpxfer.evaluate.folds import OutOfFold
from nlpxfer.evaluate.interval import bootstrap_interval
from nlpxfer.evaluate.metrics import ClassScores, per_class_table, per_label_table
from nlpxfer.evaluate.parity import parity
from nlpxfer.evaluate.selective import AbstainRule, abstain_checks, best_answers, label_answers, risk_coverage
from nlpxfer.evaluate.task import label_f1s, row_scores
from nlpxfer.hub import push_folder
from nlpxfer.problem import GAIN, MULTI_LABEL, REGRESSION, SINGLE_LABEL
from nlpxfer.report.card import CardFacts, write_card
from nlpxfer.report.error_report import (
    error_summary,
    label_set_error_summary,
    number_error_summary,
    write_error_report,
)
from nlpxfer.report.out_of_fold import LABEL_ERRORS_FILE, prediction, write_label_errors, write_out_of_fold
from nlpxfer.report.plots import confusion_plot, per_class_plot
from nlpxfer.report.report import Arm, Report, SeedResult, Verdict, build_report, mean_metrics, write_report
from nlpxfer.report.retention import retention_lines
from nlpxfer.report.run import write_run
from nlpxfer.report.table import arms_text
from nlpxfer.run import Run
from nlpxfer.train.launch import on_main, world

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Array = np.ndarray[Any, Any]

_WEIGHTS = (".onnx", ".safetensors", ".data")
"""Endings of the files without which nothing loads."""


def finish(
    run: Run,
    treated: Sequence[TrainedArm],
    arms: Sequence[Arm],
    verdict: Verdict,
    *,
    description: str,
    base_model: ResolvedCheckpoint,
    parents: Mapping[str, Mapping[str, Any]],
    tags: Sequence[str] = (),
    missed: Sequence[str] = (),
    folders: Mapping[str, Path] = MappingProxyType({}),
) -> Report:
    """Write the output folder, push it if asked to, and print the table of arms.

    The model of the first seed is saved, never the best of several. `report.json` is written last.

    Args:
        run: The run, all its arms trained.
        treated: Repetitions of the arm that is the result; its name names its `Arm`.
        arms: Rows of the table.
        verdict: On the transfer.
        description: One sentence for the model card.
        base_model: Checkpoint that the weights come from.
        parents: Role -> name and fingerprint of what went in.
        tags: Further tags of the model card.
        folders: Name -> where a folder lies that becomes part of the output; it gets calibration.json and run.json.
        missed: Targets that the result falls short of, one sentence each; then nothing is pushed.

    Raises:
        TargetMissedError: After everything is written, if any target is missed.
    """
    report = build_report(
        run.recipe,
        arms,
        verdict=verdict,
        cost=_cost(run, treated, arms),
        data=run.data.facts()
        | {"leaking_rows": len(_leaking_test_rows(run)), "long_texts": _length_facts(run, treated[0].tokenizer)},
        checks=_all_checks(run, treated),
        treated=treated[0].name,
        search=run.found,
    )

    def leave() -> None:
        _write(run, treated[0], report, description, base_model, parents, tags, folders)
        if run.options.push_to_hub and not missed:
            pushed = push_folder(run.folder, str(run.options.hub_model_id), private=run.options.is_private)
            logger.warning("pushed to %s", pushed.url)
        table = arms_text(arms, verdict)
        table += "".join(f"{line}\n" for line in retention_lines(report))
        sys.stdout.write(f"\n{table}model:  {run.folder}\nreport: {run.folder / 'report.json'}\n")
        sys.stdout.flush()

    on_main(leave)
    if missed:
        pushed_not = " Nothing was pushed." if run.options.push_to_hub else ""
        listed = "".join(f"\n  - {fault}" for fault in missed)
        raise TargetMissedError(f"The run is finished, but misses its target:{listed}\n{run.folder}{pushed_not}")
    return report


def _length_facts(run: Run, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What was read of long texts, by split, as the tokenizer of the result counts."""
    length = run.data_options.max_length
    reading = {"policy": run.long_texts.describe(length), "max_length": length}
    return reading | run.lengths.get(tokenizer, {})


def _cost(run: Run, treated: Sequence[TrainedArm], arms: Sequence[Arm]) -> Cost:
    seconds = sum(arm.train_seconds for arm in treated)
    tokens = sum(arm.tokens for arm in treated)
    return Cost(
        train_seconds=seconds,
        total_seconds=time.perf_counter() - run.started,
        tokens=tokens,
        tokens_per_second=tokens / seconds if seconds else 0.0,
        peak_memory_bytes=peak_memory_bytes(run.options.device),
        search_seconds=run.found["seconds"] if run.found else 0.0,
    )


def _all_checks(run: Run, treated: Sequence[TrainedArm]) -> dict[str, Any]:
    """What was verified or decided, and how sure the test score is."""
    logits, labels, kind = treated[0].test_logits, run.labels("test"), run.problem_type
    size = np.abs(row_scores(kind, logits, labels).astype(np.float64))  # of an error its size
    interval = bootstrap_interval(size, metric=GAIN[kind])
    clean = np.setdiff1d(np.arange(len(labels)), sorted(_leaking_test_rows(run)))
    checks: dict[str, Any] = {
        "precision": vars(run.precision),
        "processes": world()[1],
        "threads": torch.get_num_threads(),
        f"test_{GAIN[kind]}_interval": vars(interval),
        "test_without_leaks": _mean_scores(run, treated, clean) if len(clean) else None,
    }
    if is_static(treated[0].model):
        checks["int8"] = _int8_check(run, treated[0])
    if kind != REGRESSION:
        validation_labels = run.labels("validation")
        found = calibrate(treated[0].validation_logits, validation_labels, logits, labels, kind)
        checks["calibration"] = vars(found)
    if kind == SINGLE_LABEL:
        checks |= _selective_checks(run, treated[0], found.temperature)
    if kind == MULTI_LABEL:
        checks |= _threshold_checks(run, treated[0], found.temperature)
    return checks | run.checks


def _mean_scores(run: Run, treated: Sequence[TrainedArm], rows: Array) -> dict[str, float]:
    """The scores on some test rows, the mean over the seeds as everywhere."""
    found = [SeedResult(seed=arm.seed, metrics={"test": run.scores(arm.test_logits, "test", rows)}) for arm in treated]
    return mean_metrics(found)["test"]


def int8_table_of(run: Run, arm: TrainedArm) -> PreTrainedModel:
    """The static student with an int8 table, made once."""
    return run.once(("int8",), lambda: static_int8(cast("StaticForSequenceClassification", arm.model)))


def _int8_check(run: Run, arm: TrainedArm) -> dict[str, Any]:
    """Size of the static student's int8 form, and how far it answers the validation rows as the student does."""
    small = int8_table_of(run, arm)
    return int8_facts(run, arm, run.predict(small, arm.tokenizer, "validation"), stored_bytes(small))


def int8_facts(run: Run, arm: TrainedArm, small_logits: Array, size: int) -> dict[str, Any]:
    """For the report: how far an int8 form of an arm answers the validation rows as the arm does, and both sizes."""
    cuts_C = label_cuts(*_label_rule(run, arm)) if run.problem_type == MULTI_LABEL else 0.0
    found = parity(arm.validation_logits, small_logits, run.problem_type, cuts_C)
    return vars(found) | {"bytes": size, "float32_bytes": stored_bytes(arm.model)}


def save_fitted(run: Run, arm: TrainedArm, folder: Path) -> None:
    """Write the temperature and the thresholds of an arm into its folder; numbers have neither."""
    names = run.data.schema.names
    if run.problem_type == MULTI_LABEL:
        temperature, thresholds_C = _label_rule(run, arm)
        save_calibration(folder, temperature, dict(zip(names, thresholds_C.tolist(), strict=True)))
    elif run.problem_type == SINGLE_LABEL:
        save_calibration(folder, fit_temperature(arm.validation_logits, run.labels("validation")))


def _label_rule(run: Run, arm: TrainedArm) -> tuple[float, Array]:
    """Temperature and threshold of each label, of a multi-label arm, fitted on the validation rows."""
    temperature = fit_temperature(arm.validation_logits, run.labels("validation"), MULTI_LABEL)
    return temperature, _thresholds(run, arm, temperature)


def _thresholds(run: Run, arm: TrainedArm, temperature: float) -> Array:
    shares = probabilities(arm.validation_logits, temperature, MULTI_LABEL)
    return fit_thresholds(shares, run.labels("validation"))


def _selective_checks(run: Run, arm: TrainedArm, temperature: float) -> dict[str, Any]:
    """How well probabilities tell right from wrong, and the rule for abstaining that was asked for."""
    answers = {
        split: best_answers(probabilities(logits, temperature), run.labels(split))
        for split, logits in (("validation", arm.validation_logits), ("test", arm.test_logits))
    }
    risks = {split: risk_coverage(found.sure_N, found.right_N) for split, found in answers.items()}
    return {"risk_coverage": risks, **abstain_checks(answers, run.options.abstain_precision)}


def _threshold_checks(run: Run, arm: TrainedArm, temperature: float) -> dict[str, Any]:
    """A threshold per label, fitted on the validation rows, and the test scores with them; the rule for abstaining."""
    thresholds_C = _thresholds(run, arm, temperature)
    logits = {"validation": arm.validation_logits, "test": arm.test_logits}
    shares = {split: probabilities(found, temperature, MULTI_LABEL) for split, found in logits.items()}
    labels = {split: run.labels(split) > 0.5 for split in shares}
    micro, macro = label_f1s(shares["test"] > thresholds_C, labels["test"])
    by_label = dict(zip(run.data.schema.names, thresholds_C.tolist(), strict=True))
    answers = {split: label_answers(found, labels[split], thresholds_C) for split, found in shares.items()}
    found = {"by_label": by_label, "test": {"micro_f1": micro, "macro_f1": macro}}
    return {"thresholds": found, **abstain_checks(answers, run.options.abstain_precision)}


def _write(
    run: Run,
    arm: TrainedArm,
    report: Report,
    description: str,
    base_model: ResolvedCheckpoint,
    parents: Mapping[str, Mapping[str, Any]],
    tags: Sequence[str],
    folders: Mapping[str, Path],
) -> None:
    """Write all that a folder needs, the model itself late: what loads of a killed run predicts as it should."""
    names, labels = run.data.schema.names, run.labels("test")
    if run.problem_type != REGRESSION:
        thresholds = report.checks.get("thresholds", {}).get("by_label")
        temperature, rule = report.checks["calibration"]["temperature"], report.checks.get("abstain")
        abstain = None if rule is None else AbstainRule.from_plain(rule)
        save_calibration(run.folder, temperature, thresholds, abstain)
        per_class_plot(_per_class(run, arm.test_logits, "test"), run.folder / "per_class.png")
    if run.problem_type == SINGLE_LABEL:
        confusion_plot(labels, np.argmax(arm.test_logits, axis=1), names, run.folder / "confusion.png")
    if run.options.save_predictions:
        for split, logits in (("validation", arm.validation_logits), ("test", arm.test_logits)):
            _write_predictions(run, split, logits)
    if run.options.error_report:
        _write_error_report(run, arm, report)
    if run.out_of_fold is not None:
        _write_out_of_fold(run, run.out_of_fold)
    write_run(
        run.folder,
        recipe=run.recipe,
        config=run.config,
        seeds=run.seeds,
        data_fingerprint=run.data.fingerprint,
        parents=parents,
        facts={"processes": world()[1], "device": run.options.device.type}
        | ({"ranges": run.found["ranges"]} if run.found else {}),
    )
    for name, place in folders.items():
        remove_own(run.folder, name)  # of an attempt that ended in between
        _copy_into(place, run)
        (run.folder / name).mkdir(exist_ok=True)
        for path in sorted(place.iterdir(), key=lambda path: path.suffix in _WEIGHTS):
            path.replace(run.folder / name / path.name)
    if is_static(arm.model):
        _copy_into(run.folder / INT8_FOLDER, run)
        save_classifier(int8_table_of(run, arm), arm.tokenizer, run.data.schema, run.folder / INT8_FOLDER)
    merges = not is_adapted(arm.model)
    facts = CardFacts(
        model_name=run.options.hub_model_id or run.folder.name,
        labels=names,
        description=description,
        hub_model_id=run.options.hub_model_id if run.options.push_to_hub else None,
        base_model=base_model.name,
        base_model_kind=base_model.kind,
        dataset_name=run.data_options.dataset_name or str(run.data_options.train_file),
        text_pairs=run.data_options.text_pair_column is not None,
        problem_type=run.problem_type,
        tags=tags,
        limits=[
            run.long_texts.remark(run.data_options.max_length, pairs=run.data_options.text_pair_column is not None),
            *_search_limits(run.found),
            *(["It reads a text without the order of its words."] if is_static(arm.model) else []),
        ],
        options={key: value for key, value in run.config.items() if value is not None},
        is_static=is_static(arm.model),
    )
    if arm.adapter is not None:
        pushed = None if merges else facts.hub_model_id  # of a kind that merges, the merged model is what is there
        _write_bundle(run, arm.adapter, report, replace(facts, is_adapter=True, hub_model_id=pushed))
    if merges:
        save_classifier(arm.model, arm.tokenizer, run.data.schema, run.folder)
    write_card(run.folder, report, facts if merges else replace(facts, is_adapter=True))
    write_report(run.folder, report)
    foreign = remove_own(run.folder, "checkpoints")
    if foreign:
        logger.warning("not removed, as nlpxfer did not write it or it is in use: %s", ", ".join(foreign[:10]))


def _copy_into(folder: Path, run: Run) -> None:
    """Make the folder of another form of the model, with what lets it predict as the output folder does."""
    folder.mkdir(exist_ok=True)
    for name in ("run.json", "calibration.json"):
        if (run.folder / name).is_file():
            shutil.copy(run.folder / name, folder / name)


def _per_class(run: Run, logits: Array, split: str) -> list[ClassScores]:
    """Precision, recall and F1 of each class or label."""
    names, labels = run.data.schema.names, run.labels(split)
    if run.problem_type == MULTI_LABEL:
        return per_label_table(logits > 0, labels > 0.5, names)
    return per_class_table(logits, labels, names)


def _write_bundle(run: Run, trained: Path, report: Report, facts: CardFacts) -> None:
    """Put the bundle into the output folder, with what makes it one that can be used and pushed alone.

    Its adapter_config.json comes last: without it nothing loads.
    """
    staging, bundle = run.folder / f"{STAGING_PREFIX}{BUNDLE_FOLDER}", run.folder / BUNDLE_FOLDER
    shutil.rmtree(staging, ignore_errors=True)
    shutil.copytree(trained, staging)
    add_to_bundle(staging, max_length=run.data_options.max_length, long_texts=run.long_texts.options())
    for name in ("run.json", "calibration.json", "confusion.png", "per_class.png"):
        if (run.folder / name).is_file():  # which of them there are depends on the kind of task
            shutil.copy(run.folder / name, staging / name)
    write_card(staging, report, facts)
    write_report(staging, report)
    bundle.mkdir(exist_ok=True)
    move_staged(staging, bundle, last=ADAPTER_CONFIG)
    staging.rmdir()


def _write_predictions(run: Run, split: str, logits: Array) -> None:
    """One JSON object per row: its number in the file, the gold label or labels or number, and the prediction."""
    folder = run.folder / "predictions"
    folder.mkdir(exist_ok=True)
    names, numbers = run.data.schema.names, getattr(run.data, split)["row"][:]
    temporary = folder / f".{split}.jsonl.tmp"
    with temporary.open("w", encoding="utf-8") as file:
        for number, gold, row in zip(numbers, run.labels(split), logits, strict=True):
            line = {"row": number, **prediction(run.problem_type, names, gold, row)}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    temporary.replace(folder / f"{split}.jsonl")


def _write_error_report(run: Run, arm: TrainedArm, report: Report) -> None:
    """By the calibrated probabilities, and in a multi-label task the fitted thresholds, that `predict` uses."""
    kind, names, splits = run.problem_type, run.data.schema.names, {}
    for split, logits in (("validation", arm.validation_logits), ("test", arm.test_logits)):
        labels, rows = run.labels(split), (getattr(run.data, split)["row"][:], *run.texts(split))
        if kind == REGRESSION:
            splits[split] = number_error_summary(logits[:, 0], labels, *rows)
            continue
        shares = probabilities(logits, report.checks["calibration"]["temperature"], kind)
        if kind == MULTI_LABEL:
            by_label = report.checks["thresholds"]["by_label"]
            thresholds_C = np.array([by_label[name] for name in names])
            splits[split] = label_set_error_summary(shares, labels > 0.5, thresholds_C, names, *rows)
        else:
            splits[split] = error_summary(shares, labels, names, *rows)
    write_error_report(run.folder, splits, kind)


def _write_out_of_fold(run: Run, found: OutOfFold) -> None:
    names, numbers = run.data.schema.names, run.data.train["row"][:]
    write_out_of_fold(run.folder, found, names, numbers)
    if found.label_errors is not None:
        write_label_errors(run.folder, found, names, numbers, *run.texts("train"))
        logger.info("%d training labels look wrong: %s", len(found.label_errors), run.folder / LABEL_ERRORS_FILE)


def _search_limits(found: Mapping[str, Any] | None) -> list[str]:
    if found is None:
        return []
    names, trials = ", ".join(found["ranges"]), len(found["trials"])
    return [
        f"{names}: chosen by the validation {found['metric']} of {trials} trials, which makes the validation scores "
        "look better than they are. No trial saw the test rows."
    ]


def _leaking_test_rows(run: Run) -> set[int]:
    return set(run.data.leaks.get("train_test", {}).get("rows", []))
