"""A run of a recipe, from options to measured arms: what every recipe does alike.

    with start_run("finetune", data_options, options, model_options) as run:
        arms = run.train("finetuned", build, method)
        finish(run, arms, ...)

`start_run` and `begin` refuse what cannot work before anything is computed or removed; `nlpxfer.result.finish` writes
the folder.
"""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import numpy as np

from nlpxfer.checkpoint.adapters import is_adapted
from nlpxfer.checkpoint.fingerprint import tokenizer_fingerprint, weights_fingerprint
from nlpxfer.checkpoint.load import Checkpoint
from nlpxfer.checkpoint.own_files import is_unfinished, mark_unfinished, unfinished_recipe
from nlpxfer.checkpoint.save import check_free_space, ensure_output_folder, held, save_classifier
from nlpxfer.checkpoint.tokenizer import max_positions
from nlpxfer.config import DataOptions, RunOptions, default_learning_rate
from nlpxfer.config.label_loss import LabelLossOptions
from nlpxfer.config.long_texts import LongTexts
from nlpxfer.config.options import plain_value
from nlpxfer.config.ranges import Plan, with_values
from nlpxfer.data.folds import Folds
from nlpxfer.data.load import TextData
from nlpxfer.data.tokenise import Collator, TokenisedRows, check_windows, tokenise
from nlpxfer.data.windows import length_facts, tell_lengths
from nlpxfer.errors import ConfigError, ResumeError
from nlpxfer.evaluate.arms import Splits, TrainedArm, topology, train_arm
from nlpxfer.evaluate.baselines import majority, tfidf_arm
from nlpxfer.evaluate.cost import (
    alternate_rates,
    inference_run,
    parameter_count,
    stored_bytes,
)
from nlpxfer.evaluate.folds import OutOfFold, predict_out_of_fold
from nlpxfer.evaluate.interval import paired_gain
from nlpxfer.evaluate.retention import Answers
from nlpxfer.evaluate.task import row_scores, task_metrics
from nlpxfer.evaluate.trials import TrialArm, make_trials
from nlpxfer.methods.base import Method, model_inputs
from nlpxfer.methods.finetune import FineTune, finetune_method
from nlpxfer.problem import GAIN, LOWER_IS_BETTER, MULTI_LABEL, REGRESSION, SINGLE_LABEL, ProblemType
from nlpxfer.report.report import (
    Arm,
    SeedResult,
    Verdict,
    mean_metrics,
)
from nlpxfer.report.run import write_run
from nlpxfer.train.checkpoints import RunIdentity
from nlpxfer.train.launch import is_main_process, on_main
from nlpxfer.train.precision import Precision
from nlpxfer.train.predict import predict
from nlpxfer.train.search import Search
from nlpxfer.train.study import SearchPlan
from nlpxfer.train.trainer import Sampling, check_training

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Array = np.ndarray[Any, Any]
Result = TypeVar("Result")

OF_TRAINING = frozenset(
    "gradient_accumulation_steps lr_scheduler_type max_steps num_train_epochs optim "
    "per_device_train_batch_size".split()
)
"""Options that may be searched, and that decide whether others fit."""
NOT_PART_OF_THE_RUN = frozenset(
    "output_dir overwrite resume_from_checkpoint allow_topology_change disable_tqdm num_threads save_predictions "
    "push_to_hub hub_model_id hub_private_repo report_to run_name project logging_strategy logging_steps "
    "logging_first_step log_level log_level_replica log_on_each_node save_total_limit use_cpu bf16 num_seeds "
    "per_device_train_batch_size gradient_accumulation_steps per_device_eval_batch_size teacher_cache "
    "error_report num_folds abstain_precision search_timeout min_retention min_class_retention disagreements "
    "student_int8".split()
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
        started: Clock at the start, in seconds; earlier by what earlier attempts took that is taken over.
        checks: What was verified, for the report.
        folds: Of the training rows, if the run trains on folds too.
        out_of_fold: What the fold models say; from `train_on_folds`.
        lengths: Tokenizer -> split -> how much of the rows is read.
        tried: While trials are made: their rows by tokenizer and split (`trials`).
        found: The search, for the report; None if there was none.
        answers: Name of an arm -> its logits, one for each training seed.
        results: What `once` has computed.
        held: Keeps the output folder for this run, from `begin` on.
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
    tried: dict[tuple[str, str], TokenisedRows] | None = None
    found: dict[str, Any] | None = None
    answers: dict[str, list[Answers]] = field(default_factory=dict)
    results: dict[tuple[str, ...], Any] = field(default_factory=dict)
    held: ExitStack = field(default_factory=ExitStack)

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
        """One split, of those that `data` has, as a tokenizer sees it; no test row in trials."""
        if self.tried is None:
            return self._tokenised(tokenizer, split)
        if split == "test":
            none = self.data.schema.unlabelled(0)
            return tokenise(tokenizer, [], max_length=self.data_options.max_length, labels=none)
        key = tokenizer_fingerprint(tokenizer), split
        if key not in self.tried:
            self.tried[key] = self._tokenised(tokenizer, split)
        return self.tried[key]

    @contextmanager
    def trials(self) -> Iterator[None]:
        """While trials are made there are no test rows, and the others are tokenised once for each tokenizer."""
        self.tried = {}
        try:
            yield
        finally:
            self.tried = None

    def _tokenised(self, tokenizer: PreTrainedTokenizerBase, split: str) -> TokenisedRows:
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
        identity = {**self.facts(), **changes, **(facts or {})}
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
            self.started -= arm.seconds_before
            arms.append(arm)
        return arms

    def facts(self) -> dict[str, Any]:
        """What a resumed run must share: options and data."""
        shared = {key: value for key, value in self.config.items() if key not in NOT_PART_OF_THE_RUN}
        return {**shared, "bf16": self.options.bf16, "data_fingerprint": self.data.fingerprint}

    def probe_size(self, **training: Any) -> float | None:  # noqa: ANN401 - values of options
        """Size of the probe that a head starts from on the labelled rows; None without a probe.

        Args:
            training: Options in which the training differs from that of the run.
        """
        options = changed(self.options, **training)
        if not options.linear_probe or "linear_probe_size" in options.idle:
            return None
        return options.probe_size(self.problem_type, len(self.data.train))

    def starts_large(self, checkpoint: Checkpoint, **training: Any) -> bool:  # noqa: ANN401 - see `probe_size`
        """Whether the head is large from the start: it comes with the checkpoint, or from a probe of its own size."""
        return checkpoint.head_kept or self.probe_size(**training) == 0

    def start_of_training(self, checkpoint: Checkpoint, **training: Any) -> dict[str, Any]:  # noqa: ANN401
        """Learning rate and size of the probe: those that were asked for, or else those of such a model.

        They go together, and both follow from the steps that the labelled rows make. All weights learn.

        Args:
            checkpoint: Untrained.
            training: See `probe_size`.
        """
        gently, static = self.starts_large(checkpoint, **training), checkpoint.is_static
        default = default_learning_rate(checkpoint.hidden_size, gently=gently, static=static)
        rate = self.options.learning_rate_or(default)
        return {"learning_rate": rate, "linear_probe_size": self.probe_size(**training)}

    @property
    def as_many_steps(self) -> str:
        """How the steps of an arm relate to those of the one that it was planned after, for its description."""
        return "up to as many steps" if self.options.early_stopping_patience else "the same number of steps"

    def settle(self, **chosen: Any) -> None:  # noqa: ANN401 - values of options
        """Take these values for the run, and into its record."""
        for name, value in chosen.items():
            setattr(self.options, name, value)
            if name not in self.options.idle:
                self.config[name] = value

    def label_method(self, plan: LabelLossOptions) -> FineTune:
        """The loss with the gold labels, with weights and offsets counted on the training rows.

        Raises:
            ConfigError: An option means nothing for this kind of task.
        """
        smoothing = self.options.label_smoothing_factor
        return finetune_method(plan, self.labels("train"), len(self.data.schema), self.problem_type, smoothing)

    def search(
        self,
        name: str,
        arm_of: Callable[[Plan], Mapping[str, Any]],
        plan: Plan,
        *,
        defaults: Mapping[str, Any] | None = None,
    ) -> Plan:
        """Search the options that are given as ranges, by trials of an arm; the best hold for the rest of the run.

        Trials are trained with the first seed and scored on the validation rows. Without ranges nothing happens.

        Args:
            name: Name of the arm that the options are for.
            arm_of: From the recipe's own options to the arguments of `train` for this arm: `build`, `method`, `split`,
                `facts`, `sampling`, and options that differ. `self.options` are then those of the trial.
            plan: The recipe's own options.
            defaults: What of these without a value stands for; the first trial gets it where it lies in the range.

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
        fixed = {key: value for key, value in self.facts().items() if key not in ranges}
        drawn = {f"range of {key}": found.plain() for key, found in ranges.items()}
        first = arm_of(plan)
        of_training = {key: first[key] for key in ("learning_rate", "linear_probe_size") if key in first}
        parents = first.get("facts") or {}
        search = Search(
            SearchPlan.of(options, plan, {**of_training, **(defaults or {})}),
            self.folder / "checkpoints" / "search",
            identity=RunIdentity({**fixed, **drawn, **parents, "arm": name}, topology(options)),
            resume=options.resume,
            allow_topology_change=options.allow_topology_change,
        )

        def trial(values: Mapping[str, Any]) -> TrialArm:
            self.options, tried = with_values(options, plan, values)
            self.options.ranges = {}
            return self.trial_arm(arm_of(tried), {key: plain_value(value) for key, value in values.items()})

        try:
            with self.trials():
                make_trials(search, trial, quiet=bool(options.disable_tqdm))
        finally:
            self.options = options
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
        parts["facts"] = {**self.facts(), **(drawn or {}), **changes, **parts["facts"]}
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

        self.train_on_folds(train, split)

    def train_on_folds(
        self,
        train: Callable[[str, Callable[[PreTrainedTokenizerBase], Splits]], TrainedArm],
        split: Callable[[PreTrainedTokenizerBase], Splits] | None = None,
    ) -> None:
        """As `cross_validate`, for arms that `train` does not make.

        Args:
            train: From a name and the splits of one fold to the trained arm.
            split: As for `cross_validate`.
        """
        if self.folds is not None:
            labels, split = self.labels("train"), split or self.split
            self.out_of_fold = predict_out_of_fold(self.folds, labels, split, train, self.problem_type)
            self.checks["cross_validation"] = self.out_of_fold.scores() | {"seed": self.seeds[0]}

    def _log_scores(self, arm: TrainedArm) -> None:
        scores = self.scores(arm.validation_logits, "validation")
        shown = ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
        logger.info(
            "%s, seed %d: validation %s; %d steps, %.0f s", arm.name, arm.seed, shown, arm.steps, arm.train_seconds
        )
        if arm.probe is None or self.problem_type == MULTI_LABEL or self._trades_accuracy:
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
    def _trades_accuracy(self) -> bool:
        """Whether a lower accuracy may be what was asked for: rare classes count more, or another score is best."""
        asked = self.config
        rare = "balanced" in (asked.get("class_weights"), asked.get("sampling")) or asked.get("logit_adjustment")
        best = str(self.options.metric_for_best_model).removeprefix("eval_")
        return self.problem_type == SINGLE_LABEL and bool(rare or best != "accuracy")

    @property
    def problem_type(self) -> ProblemType:
        """What a row's label is."""
        return self.data.schema.problem_type

    def labels(self, split: str) -> Array:
        """Gold labels of a split, as `LabelSchema.array` gives them."""
        return self.data.schema.array(getattr(self.data, split)["label"][:])

    def scores(self, logits: Array, split: str, rows: Array | None = None) -> dict[str, float]:
        """Scores of predictions for a split, or for some of its rows."""
        labels = self.labels(split)
        part = slice(None) if rows is None else rows
        return task_metrics(self.problem_type, logits[part], labels[part])

    def metrics(self, validation_logits: Array, test_logits: Array) -> dict[str, dict[str, float]]:
        """Scores of predictions on both evaluation splits."""
        return {
            "validation": self.scores(validation_logits, "validation"),
            "test": self.scores(test_logits, "test"),
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

    def begin(
        self,
        *planned: Planned,
        arms: int,
        asked: Sequence[Checkpoint] = (),
        checkpoints: bool = True,
    ) -> None:
        """Start to write: the last call that refuses what cannot work, and the first that changes the output folder.

        Args:
            planned: Models that will be trained.
            arms: Models that will be kept per seed.
            asked: Models that will only be asked. The largest of all decides about the space needed: its weights that
                learn, and twice as much for Adam's moments, in each checkpoint.
            checkpoints: Whether models are trained by steps, and checkpoints written meanwhile.

        Raises:
            ConfigError: `max_length` is more than a model can read, or the training cannot be done as asked for.
            NoSpaceError: Says how much is free and how much is needed.
            OutputExistsError: Another run writes to the output folder.
        """
        models = [*(each.model for each in planned), *asked]
        for model in models:
            self.check_length(model)
        on_folds = [] if self.folds is None else [replace(each, rows=self.folds.fewest_learnt) for each in planned]
        for each in [*planned, *on_folds] if checkpoints else ():
            self._check_training(each)
        weights = max(stored_bytes(checkpoint.model) for checkpoint in models)
        learning = [_trained_bytes(model.model) if is_adapted(model.model) else weights for model in models]
        kept = (self.options.save_total_limit or 10) + 1 if checkpoints else 0
        whole_models = arms * len(self.seeds) + self.options.num_folds
        check_free_space(self.folder, max(learning) * 3 * kept + weights * whole_models)
        begun = unfinished_recipe(self.folder) if self.options.resume else None
        if begun not in (None, self.recipe):
            raise ResumeError(f"{self.folder} holds an unfinished run of {begun}, not of {self.recipe}.")
        if self.options.resume and not is_unfinished(self.folder):
            logger.warning("there is nothing to resume in %s: training from the start", self.folder)
        on_main(self._take_folder)

    def _take_folder(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.held.enter_context(held(self.folder))
        ensure_output_folder(self.folder, overwrite=self.options.overwrite, resume=self.options.resume)
        mark_unfinished(self.folder, self.recipe)

    def _check_training(self, planned: Planned) -> None:
        """Refuse a training that cannot be done with any of the values that are searched; a trial looks for itself."""
        ranges, rows = self.options.ranges, len(self.data.train) if planned.rows is None else planned.rows
        searched = [name for name in ranges if name in OF_TRAINING]
        highest = {"learning_rate": max(ranges["learning_rate"].ends)} if "learning_rate" in ranges else {}
        fault: ConfigError | None = None
        for values in itertools.product(*(ranges[name].ends for name in searched)):
            tried = dict(zip(searched, values, strict=True)) | dict(planned.changes) | highest
            try:
                check_training(planned.model.model, changed(self.options, **tried), rows)
            except ConfigError as error:
                fault = error
            else:
                return
        if fault is not None:
            raise fault

    def parent_facts(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """What run.json says about a parent of the model."""
        weights, fresh = checkpoint.weights_sha256, checkpoint.fresh
        return {
            "name": checkpoint.name,
            "revision": checkpoint.revision,
            "weights": weights,
            "loaded_weights": weights_fingerprint(checkpoint.model, without=fresh) if fresh else weights,
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

    def keep_beside(
        self,
        name: str,
        arm: TrainedArm,
        *,
        as_name: str,
        parent: Checkpoint,
        recipe: str,
        options: Mapping[str, Any],
    ) -> Checkpoint:
        """Save a trained model in a folder of its own in the output folder, with a run.json, and freeze it.

        Args:
            name: Of the folder.
            arm: The model.
            as_name: What the checkpoint is called in messages.
            parent: What it started from, untrained.
            recipe: What would train it alone.
            options: In which that differs from this run.
        """

        def save() -> None:
            save_classifier(arm.model, arm.tokenizer, self.data.schema, self.folder / name)
            known = {each.name for kind in (DataOptions, RunOptions) for each in fields(kind)}
            write_run(
                self.folder / name,
                recipe=recipe,
                config={key: value for key, value in self.config.items() if key in known} | dict(options),
                seeds=self.seeds[:1],
                data_fingerprint=self.data.fingerprint,
                parents={"model": self.parent_facts(parent)},
            )

        on_main(save)
        arm.model.requires_grad_(False)
        return Checkpoint(
            model=arm.model, tokenizer=arm.tokenizer, name=as_name, folder=self.folder / name, fresh=(), head_kept=True
        )


@dataclass(frozen=True)
class Planned:
    """A model that is going to be trained.

    Attributes:
        model: As it is before.
        changes: Options in which its training differs from that of the run.
        rows: Its training rows; None for those with labels.
    """

    model: Checkpoint
    changes: Mapping[str, Any] = field(default_factory=dict)
    rows: int | None = None


def changed(options: RunOptions, **changes: Any) -> RunOptions:  # noqa: ANN401 - values of options
    """A copy of options with some of them changed."""
    copied = copy.copy(options)
    for key, value in changes.items():
        setattr(copied, key, value)
    return copied


def _trained_bytes(model: PreTrainedModel) -> int:
    return sum(value.numel() * value.element_size() for value in model.parameters() if value.requires_grad)


def _joined(texts: Sequence[str], pairs: Sequence[str] | None) -> list[str]:
    return list(texts) if pairs is None else [f"{text} {pair}" for text, pair in zip(texts, pairs, strict=True)]
