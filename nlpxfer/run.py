"""A run of a recipe, from options to a finished folder: what every recipe does alike.

    with start_run("finetune", data_options, options, model_options) as run:
        arms = run.train("finetuned", build, method)
        run.finish(arms, ...)

`start_run` and `begin` refuse what cannot work before anything is computed or removed; `finish` writes the folder by
the contract, with `report.json` last, so that its presence means a whole run.
"""

from __future__ import annotations

import copy
import json
import logging
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

import numpy as np
import torch

from nlpxfer.checkpoint.adapters import BUNDLE_FOLDER, add_to_bundle, is_adapted
from nlpxfer.checkpoint.load import Checkpoint
from nlpxfer.checkpoint.resolve import ResolvedCheckpoint
from nlpxfer.checkpoint.save import check_free_space, ensure_output_folder, save_classifier
from nlpxfer.checkpoint.static import INT8_FOLDER, StaticForSequenceClassification, is_static, static_int8
from nlpxfer.checkpoint.tokenizer import max_positions
from nlpxfer.config import DataOptions, RunOptions
from nlpxfer.config.long_texts import LongTexts
from nlpxfer.config.options import plain_value
from nlpxfer.config.ranges import Plan, with_values
from nlpxfer.data.folds import Folds
from nlpxfer.data.load import TextData
from nlpxfer.data.tokenise import Collator, TokenisedRows, check_windows, tokenise
from nlpxfer.data.windows import length_facts, tell_lengths
from nlpxfer.errors import ConfigError, TargetMissedError
from nlpxfer.evaluate.arms import Splits, TrainedArm, topology, train_arm
from nlpxfer.evaluate.baselines import majority, tfidf_arm
from nlpxfer.evaluate.calibration import calibrate, fit_thresholds, probabilities, save_calibration
from nlpxfer.evaluate.cost import (
    Cost,
    alternate_rates,
    inference_run,
    parameter_count,
    peak_memory_bytes,
    stored_bytes,
)
from nlpxfer.evaluate.folds import OutOfFold, predict_out_of_fold
from nlpxfer.evaluate.interval import bootstrap_interval, paired_gain
from nlpxfer.evaluate.metrics import ClassScores, per_class_table, per_label_table
from nlpxfer.evaluate.parity import parity
from nlpxfer.evaluate.retention import Answers
from nlpxfer.evaluate.selective import AbstainRule, abstain_checks, best_and_right, risk_coverage
from nlpxfer.evaluate.task import label_f1s, row_scores, task_metrics
from nlpxfer.evaluate.trials import TrialArm, make_trials
from nlpxfer.hub import push_folder
from nlpxfer.methods.base import Method, model_inputs
from nlpxfer.problem import GAIN, LOWER_IS_BETTER, MULTI_LABEL, REGRESSION, SINGLE_LABEL, ProblemType
from nlpxfer.report.card import CardFacts, write_card
from nlpxfer.report.error_report import error_summary, write_error_report
from nlpxfer.report.out_of_fold import LABEL_ERRORS_FILE, write_label_errors, write_out_of_fold
from nlpxfer.report.plots import confusion_plot, per_class_plot
from nlpxfer.report.report import (
    Arm,
    Report,
    SeedResult,
    Verdict,
    build_report,
    mean_metrics,
    write_report,
)
from nlpxfer.report.retention import retention_lines
from nlpxfer.report.run import write_run
from nlpxfer.report.table import arms_text
from nlpxfer.train.checkpoints import RunIdentity
from nlpxfer.train.launch import is_main_process, wait_for_everyone, world
from nlpxfer.train.precision import Precision
from nlpxfer.train.predict import predict
from nlpxfer.train.search import Search
from nlpxfer.train.study import SearchPlan
from nlpxfer.train.trainer import Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Array = np.ndarray[Any, Any]
Result = TypeVar("Result")

NOT_PART_OF_THE_RUN = frozenset(
    "output_dir overwrite resume_from_checkpoint allow_topology_change disable_tqdm num_threads save_predictions "
    "push_to_hub hub_model_id hub_private_repo report_to run_name project logging_strategy logging_steps "
    "logging_first_step log_level log_level_replica log_on_each_node save_total_limit use_cpu bf16 num_seeds "
    "per_device_train_batch_size gradient_accumulation_steps per_device_eval_batch_size teacher_cache "
    "error_report num_folds abstain_precision search_timeout min_retention min_class_retention disagreements".split()
)
"""Options in which an interrupted run and its continuation may differ (batches are compared as topology)."""

SPEED_ROWS = 192
"""Test rows that inference speed is measured on, in batches of 32 rows of like length."""


_CONSTANT: Final[Mapping[ProblemType, tuple[str, str]]] = {
    SINGLE_LABEL: ("majority class", "the most frequent training label"),
    MULTI_LABEL: ("majority class", "the labels that most training rows have"),
    REGRESSION: ("mean number", "the mean of the training rows"),
}
"""Name and description of the arm that always gives the same answer."""


@dataclass
class Run:
    """A run under way.

    Attributes:
        recipe: Name of the method.
        folder: Output folder.
        data: The rows.
        data_options: Where they came from.
        options: How to train; `bf16` is decided.
        precision: How it was decided.
        config: All options, flat.
        started: Clock at the start, in seconds.
        checks: What was verified, for the report.
        folds: Of the training rows, if the run trains on folds too.
        out_of_fold: What the fold models say; from `cross_validate`.
        lengths: Tokenizer -> split -> how much of the rows is read.
        searching: Whether trials are being made: then there are no test rows.
        found: The search, for the report; None if there was none.
        answers: Name of an arm -> its logits, one for each training seed.
        results: What `once` has computed.
    """

    recipe: str
    folder: Path
    data: TextData
    data_options: DataOptions
    options: RunOptions
    precision: Precision
    config: dict[str, Any]
    started: float
    checks: dict[str, Any] = field(default_factory=dict)
    folds: Folds | None = None
    out_of_fold: OutOfFold | None = None
    lengths: dict[PreTrainedTokenizerBase, dict[str, dict[str, float]]] = field(default_factory=dict)
    searching: bool = False
    found: dict[str, Any] | None = None
    answers: dict[str, list[Answers]] = field(default_factory=dict)
    results: dict[tuple[str, ...], Any] = field(default_factory=dict)

    @property
    def seeds(self) -> list[int]:
        """Training seeds."""
        return [self.options.seed + i for i in range(self.options.num_seeds)]

    def once(self, key: tuple[str, ...], compute: Callable[[], Result]) -> Result:
        """What `compute` gives, computed at the first call with this key and kept for the run."""
        if key not in self.results:
            self.results[key] = compute()
        found: Result = self.results[key]
        return found

    def tokenise(self, tokenizer: PreTrainedTokenizerBase, split: str) -> TokenisedRows:
        """One split (`train`, `validation`, `test` or `unlabelled`) as a tokenizer sees it; no test row in trials."""
        if self.searching and split == "test":
            none = self.data.schema.unlabelled(0)
            return tokenise(tokenizer, [], max_length=self.data_options.max_length, labels=none)
        texts, pairs = self.texts(split)
        rows = getattr(self.data, split)
        labels = self.labels(split) if "label" in rows.column_names else self.data.schema.unlabelled(len(rows))
        length = self.data_options.max_length
        found = tokenise(tokenizer, texts, pairs, max_length=length, long_texts=self.long_texts, labels=labels)
        known = self.lengths.setdefault(tokenizer, {})
        if split not in known:
            known[split] = length_facts(found)
            if split == "train":
                tell_lengths(found, self.long_texts, length, batch_size=self.options.per_device_train_batch_size)
        return found

    @property
    def long_texts(self) -> LongTexts:
        """What is read of texts of more than `max_length` tokens."""
        return LongTexts.from_options(vars(self.data_options))

    def texts(self, split: str) -> tuple[list[str], list[str] | None]:
        """Texts of a split, and their second texts where the task is on pairs."""
        rows = getattr(self.data, split)
        return rows["text"][:], rows["text_pair"][:] if "text_pair" in rows.column_names else None

    def split(self, tokenizer: PreTrainedTokenizerBase) -> Splits:
        """The labelled splits as a tokenizer sees them."""
        return Splits(*(self.tokenise(tokenizer, name) for name in ("train", "validation", "test")))

    def train(
        self,
        name: str,
        build: Callable[[int], Checkpoint],
        method: Method,
        *,
        split: Callable[[PreTrainedTokenizerBase], Splits] | None = None,
        seeds: Sequence[int] | None = None,
        max_steps: int | None = None,
        facts: Mapping[str, Any] | None = None,
        sampling: Sampling = "natural",
        **changes: Any,  # noqa: ANN401 - values of RunOptions
    ) -> list[TrainedArm]:
        """Train an arm once per seed.

        Args:
            name: Name of the arm.
            build: From a seed to an untrained model.
            method: What is minimised.
            split: Tokenised rows; default `self.split`.
            seeds: Default all seeds of the run.
            max_steps: Optimizer steps, instead of epochs.
            facts: Further values that a resumed run must share.
            sampling: "balanced" draws all classes equally often.
            changes: Options that differ in this arm.
        """
        options = changed(self.options, **changes, **({} if max_steps is None else {"max_steps": max_steps}))
        identity = {**self._facts(), **changes, **(facts or {})}
        arms = []
        for seed in self.seeds if seeds is None else seeds:
            logger.info("%s, seed %d", name, seed)
            build_one = self._checked(build, seed)
            arm = train_arm(
                name,
                build=build_one,
                method=method,
                split=split or self.split,
                schema=self.data.schema,
                options=options,
                seed=seed,
                facts=identity,
                sampling=sampling,
            )
            self._log_scores(arm)
            arms.append(arm)
        return arms

    def _facts(self) -> dict[str, Any]:
        """What a resumed run must share: options and data."""
        shared = {key: value for key, value in self.config.items() if key not in NOT_PART_OF_THE_RUN}
        return {**shared, "bf16": self.options.bf16, "data_fingerprint": self.data.fingerprint}

    def search(self, name: str, arm_of: Callable[[Plan], Mapping[str, Any]], plan: Plan) -> Plan:
        """Search the options that are given as ranges, by trials of an arm; the best hold for the rest of the run.

        Trials are trained with the first seed and scored on the validation rows. Without ranges nothing happens.

        Args:
            name: Name of the arm that the options are for.
            arm_of: From the recipe's own options to the arguments of `train` for this arm: `build`, `method`, `split`,
                `facts`, `sampling`, and options that differ. `self.options` are then those of the trial.
            plan: The recipe's own options.

        Returns:
            The recipe's own options with the best values; `self.options` and `self.config` have theirs too.

        Raises:
            SearchError: All trials failed.
            Interrupted: As in `train`; finished trials are kept.
        """
        options, ranges = self.options, self.options.ranges
        if not ranges:
            return plan
        logger.info("%s: searching %s in %d trials", name, ", ".join(ranges), options.num_trials)
        fixed = {key: value for key, value in self._facts().items() if key not in ranges}
        drawn = {f"range of {key}": found.plain() for key, found in ranges.items()}
        parents = arm_of(plan).get("facts") or {}
        search = Search(
            SearchPlan.of(options, plan),
            self.folder / "checkpoints" / "search",
            identity=RunIdentity({**fixed, **drawn, **parents, "arm": name}, topology(options)),
            resume=options.resume,
            allow_topology_change=options.allow_topology_change,
        )

        def trial(values: Mapping[str, Any]) -> TrialArm:
            self.options, tried = with_values(options, plan, values)
            return self.trial_arm(arm_of(tried), {key: plain_value(value) for key, value in values.items()})

        self.searching = True
        try:
            make_trials(search, trial, quiet=bool(options.disable_tqdm))
        finally:
            self.searching, self.options = False, options
        best = search.best_values()
        self.options, plan = with_values(options, plan, best)
        self.options.ranges = {}
        self.config.update({key: plain_value(value) for key, value in best.items()})
        self.found = search.result()
        self.started -= search.seconds_before
        return plan

    def trial_arm(self, arm: Mapping[str, Any], drawn: Mapping[str, Any] | None = None) -> TrialArm:
        """An arm as trials take it: of the first seed, with the options in which it differs.

        Args:
            arm: The arguments of `train` for it.
            drawn: Values of this trial that `self.config` does not hold.
        """
        parts = {"split": self.split, "facts": {}, **arm}
        changes = {key: parts.pop(key) for key in [*parts] if hasattr(self.options, key)}
        parts["facts"] = {**self._facts(), **(drawn or {}), **changes, **parts["facts"]}
        parts["build"] = self._checked(parts["build"], self.options.seed)
        return TrialArm(schema=self.data.schema, options=changed(self.options, **changes), **parts)

    def cross_validate(
        self,
        build: Callable[[int], Checkpoint],
        method: Method,
        *,
        split: Callable[[PreTrainedTokenizerBase], Splits] | None = None,
        **training: Any,  # noqa: ANN401 - as for `train`
    ) -> None:
        """With `--num_folds`: train a model per fold, of the first seed; `finish` writes what they say. Else nothing.

        Args:
            build: As for `train`; called once per fold.
            method: As for `train`.
            split: As for `train`; its training rows must be those of the data, in their order.
            training: Further arguments of `train`, but `seeds`.
        """
        if self.folds is None:
            return

        def unseen(seed: int) -> Checkpoint:
            checkpoint = build(seed)
            if checkpoint.head_kept:
                logger.warning(
                    "%s already classifies into these labels: if it was trained on these rows, then out-of-fold "
                    "predictions are not those of a model that has not seen them",
                    checkpoint.name,
                )
            return checkpoint

        def train(name: str, part: Callable[[PreTrainedTokenizerBase], Splits]) -> TrainedArm:
            return self.train(name, unseen, method, split=part, seeds=self.seeds[:1], **training)[0]

        self.out_of_fold = predict_out_of_fold(self.folds, self.labels("train"), split or self.split, train)
        self.checks["cross_validation"] = self.out_of_fold.scores() | {"seed": self.seeds[0]}

    def _log_scores(self, arm: TrainedArm) -> None:
        scores = self._scores(arm.validation_logits, "validation")
        shown = ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
        logger.info(
            "%s, seed %d: validation %s; %d steps, %.0f s", arm.name, arm.seed, shown, arm.steps, arm.train_seconds
        )
        if arm.probe is None or self.problem_type == MULTI_LABEL:
            return
        name, start = "loss", arm.probe.validation_loss
        if self.problem_type == SINGLE_LABEL:
            name, start = "accuracy", float(arm.probe.validation_accuracy or 0.0)
        if scores[name] > start if name in LOWER_IS_BETTER else scores[name] < start:
            logger.warning(
                "%s ended with a worse %s than the linear probe it started from (%.4f): "
                "try a lower learning rate, or more epochs",
                arm.name,
                name,
                start,
            )

    @property
    def problem_type(self) -> ProblemType:
        """What a row's label is."""
        return self.data.schema.problem_type

    def labels(self, split: str) -> Array:
        """Gold labels of a split, as `LabelSchema.array` gives them."""
        return self.data.schema.array(getattr(self.data, split)["label"][:])

    def _scores(self, logits: Array, split: str, rows: Array | None = None) -> dict[str, float]:
        """Scores of predictions for a split, or for some of its rows."""
        labels = self.labels(split)
        part = slice(None) if rows is None else rows
        return task_metrics(self.problem_type, logits[part], labels[part])

    def metrics(self, validation_logits: Array, test_logits: Array) -> dict[str, dict[str, float]]:
        """Scores of predictions on both evaluation splits."""
        return {
            "validation": self._scores(validation_logits, "validation"),
            "test": self._scores(test_logits, "test"),
        }

    def majority_arm(self) -> Arm:
        """The arm that always gives the same answer: the most frequent training label, or the mean number."""
        counts = {split: len(self.labels(split)) for split in ("validation", "test")}
        labels, classes = self.labels("train"), len(self.data.schema)
        logits = {
            split: majority(labels, rows=rows, classes=classes, problem_type=self.problem_type)
            for split, rows in counts.items()
        }
        metrics = self.metrics(logits["validation"], logits["test"])
        name, description = _CONSTANT[self.problem_type]
        return Arm(name=name, metrics=metrics, seconds=0.0, description=description)

    def arm(self, trained: Sequence[TrainedArm], description: str, *, name: str | None = None) -> Arm:
        """A report's arm from the repetitions of a trained one."""
        first = trained[0]
        self.answers[name or first.name] = [Answers(arm.validation_logits, arm.test_logits) for arm in trained]
        per_seed = [
            SeedResult(seed=arm.seed, metrics=self.metrics(arm.validation_logits, arm.test_logits)) for arm in trained
        ]
        return Arm(
            name=name or first.name,
            metrics=mean_metrics(per_seed),
            seconds=sum(arm.train_seconds for arm in trained),
            parameters=parameter_count(first.model),
            bytes=stored_bytes(first.model),
            description=description,
            per_seed=per_seed if len(per_seed) > 1 else (),
            details={
                "steps": first.steps,
                "tokens": sum(arm.tokens for arm in trained),
                "trained_parameters": first.trained_parameters,
                "linear_probe": vars(first.probe) if first.probe else None,
                "history": first.history,
            },
        )

    def no_transfer_arm(self) -> tuple[Arm, Array]:
        """Control arm without any pretrained model, TF-IDF and logistic or ridge regression, and its test logits."""
        texts = {split: _joined(*self.texts(split)) for split in ("train", "validation", "test")}
        found = tfidf_arm(
            texts.pop("train"),
            self.labels("train"),
            texts,
            validation_labels=self.labels("validation"),
            classes=len(self.data.schema),
            problem_type=self.problem_type,
        )
        logits = found.logits
        regression = "ridge" if self.problem_type == REGRESSION else "logistic"
        arm = Arm(
            name="no transfer (TF-IDF)",
            metrics=self.metrics(logits["validation"], logits["test"]),
            seconds=found.seconds,
            parameters=found.parameters,
            description=f"TF-IDF of words and characters with {regression} regression: no pretrained model",
            details={"strength": found.strength, "converged": found.converged},
        )
        return arm, logits["test"]

    def against_no_transfer(self, trained: Sequence[TrainedArm], arms: Sequence[Arm]) -> tuple[list[Arm], Verdict]:
        """The arms with their floor and, if asked for, the control arm without a pretrained model; and the verdict."""
        floor = self.majority_arm()
        if not self.options.control_arm:
            return [*arms, floor], Verdict.unmeasured("the control arm was switched off")
        control, logits = self.no_transfer_arm()
        return [*arms, control, floor], self.gain(trained, [logits] * len(trained), versus=control.name)

    def predict(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, split: str) -> Array:
        """float32 logits of a model for a split."""
        collator = Collator.for_tokenizer(tokenizer)
        size, quiet = self.options.per_device_eval_batch_size, bool(self.options.disable_tqdm)
        return predict(model, self.tokenise(tokenizer, split), collator, batch_size=size, quiet=quiet)

    def gain(self, treated: Sequence[TrainedArm], control: Sequence[Array], *, versus: str) -> Verdict:
        """Verdict on what was gained on the test rows over a control arm's logits, one array per seed.

        The gain is in accuracy, for multi-label in the mean F1 of the rows, for numbers in the mean absolute error.
        """
        labels = self.labels("test")
        ours = [row_scores(self.problem_type, arm.test_logits, labels) for arm in treated]
        theirs = [row_scores(self.problem_type, logits, labels) for logits in control]
        found = paired_gain(ours, theirs, metric=GAIN[self.problem_type])
        return Verdict.of(found, treated=treated[0].name, versus=versus)

    def with_speed(self, arms: Sequence[Arm], models: Mapping[str, TrainedArm | Checkpoint]) -> list[Arm]:
        """The arms with their rows per second on the CPU in float32, measured in turns on the same test rows."""
        if not is_main_process() or not models:
            return list(arms)
        runs = {}
        sample = np.linspace(0, len(self.data.test) - 1, min(SPEED_ROWS, len(self.data.test))).astype(int)
        for name, arm in models.items():
            rows = self.tokenise(arm.tokenizer, "test").select(sample)
            collator = Collator.for_tokenizer(arm.tokenizer)
            ordered = np.argsort(rows.lengths, kind="stable")
            parts = [ordered[start : start + 32] for start in range(0, len(ordered), 32)]
            batches = [model_inputs(collator([rows[int(i)] for i in part])) for part in parts]
            runs[name] = inference_run(copy.deepcopy(arm.model).cpu(), batches)
        measured = alternate_rates(runs, len(sample), repeats=3)
        self.checks["speed_ratio"] = {name: vars(ratio) for name, ratio in measured.ratios.items()}
        speeds = {name: rate.rows_per_second for name, rate in measured.rates.items()}
        return [replace(arm, rows_per_second=speeds.get(arm.name, arm.rows_per_second)) for arm in arms]

    def check_length(self, checkpoint: Checkpoint) -> Checkpoint:
        """The checkpoint, if it can read texts of `max_length` tokens, and longer ones as asked for.

        Raises:
            ConfigError: Says how many tokens it can read, or why `long_texts` cannot be followed.
        """
        limit, asked = max_positions(checkpoint.model, checkpoint.tokenizer), self.data_options.max_length
        if asked > limit:
            raise ConfigError(
                f"max_length: {asked} is longer than the {limit} tokens that {checkpoint.name} can read.",
                fix=f"--max_length {limit}",
            )
        pairs = self.data_options.text_pair_column is not None
        check_windows(checkpoint.tokenizer, self.long_texts, asked, pairs=pairs)
        return checkpoint

    def _checked(self, build: Callable[[int], Checkpoint], seed: int) -> Callable[[], Checkpoint]:
        return lambda: self.check_length(build(seed))

    def begin(self, *models: Checkpoint, arms: int, checkpoints: bool = True) -> None:
        """Start to write: the last call that refuses what cannot work, and the first that changes the output folder.

        Args:
            models: Those that will be trained or asked; the largest decides about the space needed: its weights that
                learn, and twice as much for Adam's moments, in each checkpoint.
            arms: Models that will be kept per seed.
            checkpoints: Whether any are written while training.

        Raises:
            ConfigError: `max_length` is more than a model can read.
            NoSpaceError: Says how much is free and how much is needed.
        """
        for model in models:
            self.check_length(model)
        weights = max(stored_bytes(checkpoint.model) for checkpoint in models)
        learning = [_trained_bytes(model.model) if is_adapted(model.model) else weights for model in models]
        kept = (self.options.save_total_limit or 10) + 1 if checkpoints else 0
        whole_models = arms * len(self.seeds) + self.options.num_folds
        check_free_space(self.folder, max(learning) * 3 * kept + weights * whole_models)
        if self.options.resume and not (self.folder / "checkpoints").is_dir():
            logger.warning("there is nothing to resume in %s: training from the start", self.folder)
        if is_main_process():
            ensure_output_folder(self.folder, overwrite=self.options.overwrite, resume=self.options.resume)
        wait_for_everyone()

    def parent_facts(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """What run.json says about a parent of the model."""
        return {
            "name": checkpoint.name,
            "revision": checkpoint.revision,
            "weights": checkpoint.weights_sha256,
            "tokenizer": checkpoint.tokenizer_sha256,
        }

    def answering_arm(
        self,
        name: str,
        logits: Sequence[Array],
        seconds: float,
        description: str,
        *,
        checkpoint: Checkpoint | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> Arm:
        """The arm of somebody who was only asked: logits of the validation and of the test rows.

        Args:
            name: Of the arm.
            logits: Of both splits.
            seconds: What asking took.
            description: One sentence.
            checkpoint: The model that answered, if it was one.
            details: Anything else for the report.
        """
        self.answers[name] = [Answers(*logits)]
        return Arm(
            name=name,
            metrics=self.metrics(*logits),
            seconds=seconds,
            parameters=None if checkpoint is None else parameter_count(checkpoint.model),
            bytes=None if checkpoint is None else stored_bytes(checkpoint.model),
            description=description,
            details=details or {},
        )

    def keep_beside(self, name: str, arm: TrainedArm, *, as_name: str) -> Checkpoint:
        """Save a trained model in a folder of its own in the output folder, and freeze it."""
        if is_main_process():
            save_classifier(arm.model, arm.tokenizer, self.data.schema, self.folder / name)
        wait_for_everyone()
        arm.model.requires_grad_(False)
        return Checkpoint(
            model=arm.model, tokenizer=arm.tokenizer, name=as_name, folder=self.folder / name, fresh=(), head_kept=True
        )

    def finish(
        self,
        treated: Sequence[TrainedArm],
        arms: Sequence[Arm],
        verdict: Verdict,
        *,
        description: str,
        base_model: ResolvedCheckpoint,
        parents: Mapping[str, Mapping[str, Any]],
        tags: Sequence[str] = (),
        missed: Sequence[str] = (),
    ) -> Report:
        """Write the output folder, push it if asked to, and print the table of arms.

        The model of the first seed is saved, never the best of several. `report.json` is written last.

        Args:
            treated: Repetitions of the arm that is the result; its name names its `Arm`.
            arms: Rows of the table.
            verdict: On the transfer.
            description: One sentence for the model card.
            base_model: Checkpoint that the weights come from.
            parents: Role -> name and fingerprint of what went in.
            tags: Further tags of the model card.
            missed: Targets that the result falls short of, one sentence each; then nothing is pushed.

        Raises:
            TargetMissedError: After everything is written, if any target is missed.
        """
        report = build_report(
            self.recipe,
            arms,
            verdict=verdict,
            cost=self._cost(treated, arms),
            data=self.data.facts()
            | {"leaking_rows": _leaking_rows(self.data), "long_texts": self._length_facts(treated[0].tokenizer)},
            checks=self._all_checks(treated),
            treated=treated[0].name,
            search=self.found,
        )
        if is_main_process():
            self._write(treated[0], report, description, base_model, parents, tags)
            if self.options.push_to_hub and not missed:
                pushed = push_folder(self.folder, str(self.options.hub_model_id), private=is_private(self.options))
                logger.warning("pushed to %s", pushed.url)
            table = arms_text(arms, verdict)
            table += "".join(f"{line}\n" for line in retention_lines(report))
            sys.stdout.write(f"\n{table}model:  {self.folder}\nreport: {self.folder / 'report.json'}\n")
            sys.stdout.flush()
        wait_for_everyone()
        if missed:
            pushed_not = " Nothing was pushed." if self.options.push_to_hub else ""
            listed = "".join(f"\n  - {fault}" for fault in missed)
            raise TargetMissedError(f"The run is finished, but misses its target:{listed}\n{self.folder}{pushed_not}")
        return report

    def _length_facts(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """What was read of long texts, by split, as the tokenizer of the result counts."""
        length = self.data_options.max_length
        reading = {"policy": self.long_texts.describe(length), "max_length": length}
        return reading | self.lengths.get(tokenizer, {})

    def _cost(self, treated: Sequence[TrainedArm], arms: Sequence[Arm]) -> Cost:
        seconds = sum(arm.train_seconds for arm in treated)
        tokens = sum(arm.tokens for arm in treated)
        return Cost(
            train_seconds=seconds,
            total_seconds=time.perf_counter() - self.started,
            tokens=tokens,
            tokens_per_second=tokens / seconds if seconds else 0.0,
            peak_memory_bytes=peak_memory_bytes(self.options.device),
            search_seconds=self.found["seconds"] if self.found else 0.0,
        )

    def _all_checks(self, treated: Sequence[TrainedArm]) -> dict[str, Any]:
        """What was verified or decided, and how sure the test score is."""
        logits, labels, kind = treated[0].test_logits, self.labels("test"), self.problem_type
        size = np.abs(row_scores(kind, logits, labels).astype(np.float64))  # of an error its size
        interval = bootstrap_interval(size, metric=GAIN[kind])
        clean = np.setdiff1d(np.arange(len(labels)), sorted(_leaking_test_rows(self.data)))
        checks: dict[str, Any] = {
            "precision": vars(self.precision),
            "processes": world()[1],
            "threads": torch.get_num_threads(),
            f"test_{GAIN[kind]}_interval": vars(interval),
            "test_without_leaks": self._scores(logits, "test", clean) if len(clean) else None,
        }
        if is_static(treated[0].model):
            checks["int8"] = self._int8_check(treated[0])
        if kind != REGRESSION:
            validation_labels = self.labels("validation")
            found = calibrate(treated[0].validation_logits, validation_labels, logits, labels, kind)
            checks["calibration"] = vars(found)
        if kind == SINGLE_LABEL:
            checks |= self._selective_checks(treated[0], found.temperature)
        if kind == MULTI_LABEL:
            checks["thresholds"] = self._threshold_check(treated[0], found.temperature)
        return checks | self.checks

    def _int8_of(self, arm: TrainedArm) -> PreTrainedModel:
        """The static student with an int8 table, made once."""
        return self.once(("int8",), lambda: static_int8(cast("StaticForSequenceClassification", arm.model)))

    def _int8_check(self, arm: TrainedArm) -> dict[str, Any]:
        """Size of the static student's int8 form, and how far it answers the validation rows as the student does."""
        small = self._int8_of(arm)
        found = parity(arm.validation_logits, self.predict(small, arm.tokenizer, "validation"), self.problem_type)
        return vars(found) | {"bytes": stored_bytes(small), "float32_bytes": stored_bytes(arm.model)}

    def _selective_checks(self, arm: TrainedArm, temperature: float) -> dict[str, Any]:
        """How well probabilities tell right from wrong, and the rule for abstaining that was asked for."""
        answers = {
            split: best_and_right(probabilities(logits, temperature), self.labels(split))
            for split, logits in (("validation", arm.validation_logits), ("test", arm.test_logits))
        }
        risks = {split: risk_coverage(*found) for split, found in answers.items()}
        return {"risk_coverage": risks, **abstain_checks(answers, self.options.abstain_precision)}

    def _threshold_check(self, arm: TrainedArm, temperature: float) -> dict[str, Any]:
        """A threshold per label, fitted on the validation rows, and the test scores with them."""
        shares = [
            probabilities(logits, temperature, MULTI_LABEL) for logits in (arm.validation_logits, arm.test_logits)
        ]
        thresholds_C = fit_thresholds(shares[0], self.labels("validation"))
        micro, macro = label_f1s(shares[1] > thresholds_C, self.labels("test") > 0.5)
        by_label = dict(zip(self.data.schema.names, thresholds_C.tolist(), strict=True))
        return {"by_label": by_label, "test": {"micro_f1": micro, "macro_f1": macro}}

    def _write(
        self,
        arm: TrainedArm,
        report: Report,
        description: str,
        base_model: ResolvedCheckpoint,
        parents: Mapping[str, Mapping[str, Any]],
        tags: Sequence[str],
    ) -> None:
        names, labels = self.data.schema.names, self.labels("test")
        if arm.adapter is not None:
            shutil.copytree(arm.adapter, self.folder / BUNDLE_FOLDER, dirs_exist_ok=True)
            add_to_bundle(self.folder / BUNDLE_FOLDER, max_length=self.data_options.max_length)
        merges = not is_adapted(arm.model)
        if merges:
            save_classifier(arm.model, arm.tokenizer, self.data.schema, self.folder)
        if self.problem_type != REGRESSION:
            thresholds = report.checks.get("thresholds", {}).get("by_label")
            temperature, rule = report.checks["calibration"]["temperature"], report.checks.get("abstain")
            abstain = None if rule is None else AbstainRule.from_plain(rule)
            save_calibration(self.folder, temperature, thresholds, abstain)
            per_class_plot(self.per_class(arm.test_logits, "test"), self.folder / "per_class.png")
        if self.problem_type == SINGLE_LABEL:
            confusion_plot(labels, np.argmax(arm.test_logits, axis=1), names, self.folder / "confusion.png")
        if self.options.save_predictions:
            for split, logits in (("validation", arm.validation_logits), ("test", arm.test_logits)):
                self._write_predictions(split, logits)
        if self.options.error_report:
            self._write_error_report(arm, report.checks["calibration"]["temperature"])
        if self.out_of_fold is not None:
            self._write_out_of_fold(self.out_of_fold)
        write_run(
            self.folder,
            recipe=self.recipe,
            config=self.config,
            seeds=self.seeds,
            data_fingerprint=self.data.fingerprint,
            parents=parents,
            facts={"processes": world()[1], "device": self.options.device.type}
            | ({"ranges": self.found["ranges"]} if self.found else {}),
        )
        if is_static(arm.model):
            self._write_int8(arm)
        facts = CardFacts(
            model_name=self.options.hub_model_id or self.folder.name,
            labels=names,
            description=description,
            hub_model_id=self.options.hub_model_id if self.options.push_to_hub else None,
            base_model=base_model.name,
            base_model_kind=base_model.kind,
            dataset_name=self.data_options.dataset_name or str(self.data_options.train_file),
            text_pairs=self.data_options.text_pair_column is not None,
            problem_type=self.problem_type,
            tags=tags,
            limits=[
                self.long_texts.remark(self.data_options.max_length),
                *_search_limits(self.found),
                *(["It reads a text without the order of its words."] if is_static(arm.model) else []),
            ],
            options={key: value for key, value in self.config.items() if value is not None},
            is_static=is_static(arm.model),
        )
        write_card(self.folder, report, facts if merges else replace(facts, is_adapter=True))
        if arm.adapter is not None:
            self._complete_bundle(report, replace(facts, is_adapter=True))
        write_report(self.folder, report)
        shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)

    def _write_int8(self, arm: TrainedArm) -> None:
        """The static student with an int8 table, in a folder that predicts as this one does."""
        small = self._int8_of(arm)
        folder = save_classifier(small, arm.tokenizer, self.data.schema, self.folder / INT8_FOLDER)
        for name in ("run.json", "calibration.json"):
            if (self.folder / name).is_file():
                shutil.copy(self.folder / name, folder / name)

    def per_class(self, logits: Array, split: str) -> list[ClassScores]:
        """Precision, recall and F1 of each class or label."""
        names, labels = self.data.schema.names, self.labels(split)
        if self.problem_type == MULTI_LABEL:
            return per_label_table(logits > 0, labels > 0.5, names)
        return per_class_table(logits, labels, names)

    def _complete_bundle(self, report: Report, facts: CardFacts) -> None:
        """Put into the bundle what makes it a folder of its own, which can be used and pushed alone."""
        bundle = self.folder / BUNDLE_FOLDER
        for name in ("run.json", "calibration.json", "confusion.png", "per_class.png"):
            if (self.folder / name).is_file():  # which of them there are depends on the kind of task
                shutil.copy(self.folder / name, bundle / name)
        write_card(bundle, report, facts)
        write_report(bundle, report)

    def _write_predictions(self, split: str, logits: Array) -> None:
        """One JSON object per row: its number in the file, the gold label or labels or number, and the prediction."""
        folder = self.folder / "predictions"
        folder.mkdir(exist_ok=True)
        names, numbers = self.data.schema.names, getattr(self.data, split)["row"][:]
        temporary = folder / f".{split}.jsonl.tmp"
        with temporary.open("w", encoding="utf-8") as file:
            for number, gold, row in zip(numbers, self.labels(split), logits, strict=True):
                line = {"row": number, **_prediction(self.problem_type, names, gold, row)}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        temporary.replace(folder / f"{split}.jsonl")

    def _write_error_report(self, arm: TrainedArm, temperature: float) -> None:
        splits = {}
        for split, logits in (("validation", arm.validation_logits), ("test", arm.test_logits)):
            shares = probabilities(logits, temperature)
            numbers = getattr(self.data, split)["row"][:]
            names = self.data.schema.names
            splits[split] = error_summary(shares, self.labels(split), names, numbers, *self.texts(split))
        write_error_report(self.folder, splits)

    def _write_out_of_fold(self, found: OutOfFold) -> None:
        names, numbers = self.data.schema.names, self.data.train["row"][:]
        write_out_of_fold(self.folder, found, names, numbers)
        write_label_errors(self.folder, found, names, numbers, *self.texts("train"))
        logger.info("%d training labels look wrong: %s", len(found.label_errors), self.folder / LABEL_ERRORS_FILE)


def _prediction(problem_type: ProblemType, names: Sequence[str], gold: Any, logits_C: Array) -> dict[str, Any]:  # noqa: ANN401
    """The gold and the predicted label, labels or number of one row, and the probability."""
    if problem_type == REGRESSION:
        return {"label": round(float(gold), 6), "predicted": round(float(logits_C[0]), 6)}
    shares_C = probabilities(logits_C[None], problem_type=problem_type)[0]
    if problem_type == MULTI_LABEL:
        predicted = {name: round(float(p), 6) for name, p in zip(names, shares_C, strict=True) if p > 0.5}
        return {"label": [name for name, one in zip(names, gold, strict=True) if one], "predicted": predicted}
    best = int(shares_C.argmax())
    return {"label": names[gold], "predicted": names[best], "probability": round(float(shares_C[best]), 6)}


def changed(options: RunOptions, **changes: Any) -> RunOptions:  # noqa: ANN401 - values of options
    """A copy of options with some of them changed."""
    copied = copy.copy(options)
    for key, value in changes.items():
        setattr(copied, key, value)
    return copied


def is_private(options: RunOptions) -> bool:
    """Whether a new repository on the Hub is private: yes, unless the user says otherwise."""
    return True if options.hub_private_repo is None else bool(options.hub_private_repo)


def _search_limits(found: Mapping[str, Any] | None) -> list[str]:
    if found is None:
        return []
    names, trials = ", ".join(found["ranges"]), len(found["trials"])
    return [
        f"{names}: chosen by the validation {found['metric']} of {trials} trials, which makes the validation scores "
        "look better than they are. No trial saw the test rows."
    ]


def _trained_bytes(model: PreTrainedModel) -> int:
    return sum(value.numel() * value.element_size() for value in model.parameters() if value.requires_grad)


def _joined(texts: Sequence[str], pairs: Sequence[str] | None) -> list[str]:
    return list(texts) if pairs is None else [f"{text} {pair}" for text, pair in zip(texts, pairs, strict=True)]


def _leaking_test_rows(data: TextData) -> set[int]:
    return set(data.leaks.get("train_test", {}).get("rows", []))


def _leaking_rows(data: TextData) -> int:
    return len(_leaking_test_rows(data))
