"""The one training loop: transformers' Trainer with gradients that do not depend on how the rows are split.

What differs from the stock Trainer, and why:

- The loss is a sum over rows divided by the rows of the whole optimizer step, over all micro-batches and processes.
  The stock Trainer is off by the accumulation steps times the number of processes for classification heads
  (transformers issue 47688), and batch means are off wherever micro-batches hold unlike numbers of labelled rows.
- Batches hold rows of like length, in an order that only depends on seed and epoch; no row counts more often in an
  epoch than it was drawn: once, or with balanced sampling as its class needs.
- Validation goes through `predict`, and its loss is the mean over rows.
- A loss or gradient that is not finite stops the run before the step is taken, and before anything is saved.
- Checkpoints are sealed with a manifest; SIGTERM, SIGINT and SIGHUP save one and end the run with `Interrupted`.
- No `training_args.bin` is written: it would hold the Hub token.
- A method may be taught by the moving average of the weights, which is then what is scored and what the run ends with.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import math
import signal
import threading
import time
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
from accelerate.utils import TorchDynamoPlugin
from torch import Tensor, nn
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    get_scheduler,
)
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils.import_utils import is_liger_kernel_available

from nlpxfer.checkpoint.adapters import is_adapted
from nlpxfer.checkpoint.quiet import quiet_transformers
from nlpxfer.checkpoint.save import refuse_not_finite
from nlpxfer.config import RunOptions
from nlpxfer.config.options import SCHEDULES_BY_LOSS
from nlpxfer.data.tokenise import Collator, TokenisedRows
from nlpxfer.errors import ConfigError, Interrupted, NotFiniteError
from nlpxfer.methods.base import Batch, Method
from nlpxfer.strict_json import write_json_whole
from nlpxfer.train.balanced import BalancedDraws
from nlpxfer.train.checkpoints import RunIdentity, load_trained_, newest_verified, save_trained, seal
from nlpxfer.train.even import COUNTS, EvenSampler, GapCollator, RowsWithGaps
from nlpxfer.train.launch import is_main_process, on_all, wait_for_everyone, world
from nlpxfer.train.layerwise import (
    DEPTH,
    StartPenalty,
    check_depth,
    is_layerwise,
    parameter_depths,
    split_groups_by_depth_,
    unfreeze_gradually_,
)
from nlpxfer.train.moving_average import MovingAverage
from nlpxfer.train.precision import autocast_type, padding_multiple
from nlpxfer.train.predict import predict
from nlpxfer.train.preflight import preflight
from nlpxfer.train.rank_budget import RankBudget
from nlpxfer.train.regime import float32_head, training_attention
from nlpxfer.train.sampler import LengthGroupedSampler

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

ONE_REQUEST = 3.0
"""Seconds in which several signals are one request: torchrun passes on what its processes may have got themselves."""

TOKENS = "tokens"
"""What is counted beside the rows of each loss term."""

COST_FILE = "cost.json"
"""In a checkpoint: what the run had cost when it was saved, so that a resumed run reports the whole."""

PREFLIGHT_FILE = "preflight.json"
"""In a checkpoint: what was found before the first step."""

GO_ON = "the same command with --resume_from_checkpoint true"
"""What to do after a run was asked to stop."""

Sampling = Literal["natural", "balanced"]
"""Whether every row comes once an epoch, or every class equally often."""

Metrics = Callable[[np.ndarray[Any, Any], np.ndarray[Any, Any]], dict[str, float]]


def check_training(model: PreTrainedModel, options: RunOptions, rows: int) -> None:
    """Refuse what a model cannot be trained with, before anything is written.

    Args:
        model: That is to be trained.
        options: How.
        rows: Training rows.

    Raises:
        ConfigError: The optimizer cannot be had, the learning rate's schedule cannot be made, a package is missing,
            there is no whole batch, or there are fewer layers than are to be trained.
        CheckpointError: Depths are to be trained differently in a model that has none.
    """
    if is_layerwise(options) or options.num_trained_layers is not None:
        check_depth(model, options.num_trained_layers or 0)
    weight = torch.zeros(1, requires_grad=True)
    try:
        kind, values = Trainer.get_optimizer_cls_and_kwargs(options, model)
        if kind.__module__.startswith("torch."):
            kind([weight], **values)
    except (ImportError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f"optim: {options.optim} cannot be made: {str(error).splitlines()[0]}") from error
    unused = torch.optim.SGD([weight], lr=float(options.learning_rate or 1.0))
    name, own = options.lr_scheduler_type, options.lr_scheduler_kwargs
    own = own if isinstance(own, dict) else {}
    try:
        get_scheduler(name, unused, num_warmup_steps=1, num_training_steps=2, scheduler_specific_kwargs=own)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"lr_scheduler_type, lr_scheduler_kwargs: {str(error).splitlines()[0]}") from error
    faults = _idle_optimizer_options(options, model, values)
    if faults:
        raise ConfigError.from_faults(faults)
    if options.torch_compile:
        try:
            TorchDynamoPlugin(backend=options.torch_compile_backend, mode=options.torch_compile_mode)
        except ValueError as error:
            raise ConfigError(f"torch_compile_backend, torch_compile_mode: {error}") from error
    if options.use_liger_kernel and not is_liger_kernel_available():
        raise ConfigError("use_liger_kernel: the package liger-kernel is not installed.")
    _check_delay(options, rows)
    batch = options.per_device_train_batch_size * world()[1]
    if options.dataloader_drop_last and rows < batch:
        raise ConfigError(
            f"dataloader_drop_last: {rows} training rows make no whole batch of {batch}.",
            fix="a smaller --per_device_train_batch_size, or --dataloader_drop_last false",
        )


def _check_delay(options: RunOptions, rows: int) -> None:
    """Refuse a first evaluation that comes after the last step: no weights would be the best, and none stop early.

    Raises:
        ConfigError: Says when the training ends.
    """
    keeps = options.load_best_model_at_end or options.early_stopping_patience
    if not options.eval_delay or not keeps or options.eval_strategy == "no":
        return
    each = options.steps_per_epoch(rows)
    epochs = options.max_steps / each if options.max_steps > 0 else options.num_train_epochs
    end = epochs * each if options.eval_strategy == "steps" else epochs
    if options.eval_delay > end:
        raise ConfigError(
            f"eval_delay: {options.eval_delay:g} is beyond the end of the training, after {end:g} "
            f"{'steps' if options.eval_strategy == 'steps' else 'epochs'}.",
            why="the best weights are chosen by evaluations, and there would be none",
            fix="a shorter --eval_delay, or --load_best_model_at_end false",
        )


def _idle_optimizer_options(options: RunOptions, model: PreTrainedModel, values: Mapping[str, Any]) -> list[str]:
    """Options that the optimizer does not read, a sentence each."""
    faults, name = [], str(getattr(options.optim, "value", options.optim))
    if options.optim_args:
        without = copy.copy(options)
        without.optim_args = None
        plain = Trainer.get_optimizer_cls_and_kwargs(without, model)[1]
        if {key: str(value) for key, value in plain.items()} == {key: str(value) for key, value in values.items()}:
            faults.append(f"optim_args: {options.optim_args!r} has no effect on {name}")
    if options.optim_target_modules and not any(kind in name for kind in ("galore", "apollo", "lomo")):
        faults.append(f"optim_target_modules: has no effect on {name}")
    return faults


class TransferTrainer(Trainer):
    """Trains a model with a transfer method.

    Args:
        model: Model to train.
        method: What is minimised.
        options: How to train; `output_dir` receives the checkpoints.
        train_rows: Training rows with the columns that the method reads.
        validation_rows: Rows with `labels`.
        tokenizer: Saved beside the weights; its padding token and side pad the batches.
        metrics: From logits (N, C) and labels (N) to scores by name, without prefix; must hold `loss`.
        identity: What a resumed run must have in common with the interrupted one.
        sampling: "balanced" draws all classes equally often.

    Raises:
        DataError: Balanced sampling is asked for, and a training row has no label.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: PreTrainedModel,
        method: Method,
        options: RunOptions,
        *,
        train_rows: TokenisedRows,
        validation_rows: TokenisedRows,
        tokenizer: PreTrainedTokenizerBase,
        metrics: Metrics,
        identity: RunIdentity,
        sampling: Sampling = "natural",
    ) -> None:
        self.method = method
        self.options = options
        self.rows = train_rows
        self.identity = identity
        self.score = metrics
        self.tokens_seen = 0
        self.step_loss = torch.zeros((), device=options.device)
        self.seconds_before = 0.0
        self.losses_before: dict[str, Any] = {}
        self.preflight: dict[str, Any] | None = None
        self.order_seed = options.seed if options.data_seed is None else options.data_seed
        balanced = sampling == "balanced"
        self.draws = BalancedDraws(train_rows.columns["labels"], seed=self.order_seed) if balanced else None
        multiple = padding_multiple(options.device, bf16=bool(options.bf16))
        longest = int(train_rows.each_window().lengths.max())
        collator = Collator.for_tokenizer(tokenizer, multiple_of=multiple, rounded_to=longest)
        with warnings.catch_warnings():
            # the loss is the method's, which smooths several labels per row as well
            warnings.filterwarnings("ignore", "Label smoothing is not compatible")
            super().__init__(
                model=model,
                args=options,
                train_dataset=RowsWithGaps(train_rows),
                eval_dataset=validation_rows,
                data_collator=GapCollator(collator, train_rows[0]),
                processing_class=tokenizer,
            )
        self.pad = collator
        self.average = self._moving_average(model)
        self.step_flops = 6 * sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.depths = parameter_depths(model) if is_layerwise(options) else {}
        self.penalty = self._start_penalty(model)
        self.ranks = RankBudget(cast("PeftModel", model)) if method.adapter == "adalora" else None
        self.remove_callback(PrinterCallback)
        if not options.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(ProgressBar)
        self.add_callback(EpochOrder(self))
        self.add_callback(LossesBefore(self))
        self.add_callback(AlreadyEnded(self))
        if self.average is not None:
            self.add_callback(AverageWeights(self, self.average))
        if self.ranks is not None:
            self.add_callback(self.ranks)
        self.stop = StopOnSignal()
        self.add_callback(self.stop)
        if options.early_stopping_patience:
            self.add_callback(EarlyStoppingCallback(options.early_stopping_patience))

    def fit(self, *, resume: bool = False) -> None:
        """Train, from the newest verified checkpoint if resuming and there is one.

        After a signal that came when the last step was done, `stop.asked` is set: what was trained is to be kept.

        Raises:
            Interrupted: A signal that came before asked to stop; a checkpoint was saved.
            NotFiniteError: The loss became NaN or infinite.
            ResumeError: No checkpoint can be trusted, or it belongs to another run.
        """
        folder = Path(str(self.args.output_dir))
        checkpoint = None
        if resume and folder.is_dir():
            allowed = self.options.allow_topology_change
            checkpoint = newest_verified(folder, self.identity, allow_topology_change=allowed)
            if checkpoint is not None:
                logger.warning("resuming from %s", checkpoint.name)
                self._restore_cost(checkpoint)
            else:
                logger.warning("no checkpoint to resume from: training from the start")
        self.args.restore_callback_states_from_checkpoint = (
            checkpoint is not None
        )  # how patient early stopping still is
        self.started = time.perf_counter()
        attention = training_attention(self.network, bf16=bool(self.args.bf16), device=self.args.device)
        mixed = bool(self.args.bf16 or self.args.fp16)
        models = [self.network] if self.average is None else [self.network, self.average.model]
        with self.stop.listening(), attention, contextlib.ExitStack() as heads:
            for model in models:
                heads.enter_context(float32_head(model, enabled=mixed))
            self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if self.stop.stopping:
            raise Interrupted(
                f"The run was asked to stop at step {self.state.global_step} of {self.state.max_steps}; "
                "a checkpoint is saved.",
                fix=GO_ON,
            )
        self.stop.agree(self.args)
        if self.average is not None:
            self.average.copy_to_(self.network)

    @property
    def network(self) -> PreTrainedModel:
        """The model as it is now: its weights may lie in shards."""
        return cast("PreTrainedModel", self.model)

    @property
    def seconds(self) -> float:
        """Time spent in training, over all runs that this one resumes."""
        return self.seconds_before + time.perf_counter() - self.started

    def _restore_cost(self, checkpoint: Path) -> None:
        cost = json.loads((checkpoint / COST_FILE).read_text(encoding="utf-8"))
        self.tokens_seen, self.seconds_before = int(cost["tokens"]), float(cost["seconds"])
        self.losses_before = cost.get("losses", {})
        if (checkpoint / PREFLIGHT_FILE).is_file():
            self.preflight = json.loads((checkpoint / PREFLIGHT_FILE).read_text(encoding="utf-8"))

    def _moving_average(self, model: PreTrainedModel) -> MovingAverage | None:
        """The average that teaches, if the method asks for one."""
        if self.method.ema_decay is None:
            return None
        return MovingAverage(model, decay=self.method.ema_decay, autocast=autocast_type(self.options))

    def _taught(self, inputs: Batch) -> Batch:
        """A batch with the logits of the average, if there is one."""
        return inputs if self.average is None else {**inputs, "teacher_logits": self.average.logits(inputs)}

    def _look_at_loss(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        """The check before the first step; sharded weights cannot be asked for a term alone."""
        if self.preflight is not None or self.state.global_step or not self.method.has_preflight:
            return
        if self.is_fsdp_enabled:
            self.preflight = {"left_out": "weights are sharded (FSDP)"}
            return
        plain = self.accelerator.unwrap_model(model)
        plain.train()
        batch = self._taught(self._prepare_inputs(inputs))
        look = partial(preflight, self.method, plain, batch, pad_token_id=self.pad.pad_token_id)
        self.preflight = on_all(look)  # each has rows of its own

    def _start_penalty(self, model: PreTrainedModel) -> StartPenalty | None:
        weight, head_weight = self.options.l2_sp_weight, self.options.l2_sp_head_weight
        if not weight and not head_weight:
            return None
        if self.is_fsdp_enabled:
            raise ConfigError("l2_sp_weight: does not work with FSDP, which shards the weights.")
        return StartPenalty(model, weight=weight, head_weight=head_weight)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:  # noqa: ANN401 - as in transformers
        """The optimizer, with a parameter group per depth where depths are trained differently."""
        optimizer = super().create_optimizer(model)
        if self.depths and not any(DEPTH in group for group in optimizer.param_groups):
            named = (self.network if model is None else model).named_parameters()
            split_groups_by_depth_(optimizer, named, self.depths, decay=self.options.layer_decay)
        return optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """The scheduler; with gradual unfreezing, a layer's rate is 0 until its turn.

        One that follows the scores is told which of them are better, and that a rate below 0.001 (the least of
        transformers' `greedy`) may fall too.
        """
        made = self.lr_scheduler is None
        if self.options.lr_scheduler_type in SCHEDULES_BY_LOSS:
            own = cast("dict[str, Any] | None", self.options.lr_scheduler_kwargs) or {}
            mode = "max" if self.options.greater_is_better else "min"
            self.options.lr_scheduler_kwargs = {"mode": mode, "min_lr": 0.0, **own}
        rising = self.options.get_warmup_steps(num_training_steps)
        if made and 0 < num_training_steps <= rising:
            told = num_training_steps, self.options.learning_rate
            logger.warning("warmup_steps: the learning rate rises in all %d steps and never reaches %g", *told)
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        share = self.options.gradual_unfreezing
        if made and share:
            unfreeze_gradually_(scheduler, top=max(self.depths.values()), steps=share * num_training_steps)
        return scheduler

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - as in transformers
        """As in transformers, but a resumed training that had ended takes no step."""
        if not self.control.should_training_stop:
            super()._run_epoch(*args, **kwargs)  # type: ignore[no-untyped-call]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,  # noqa: ANN401 - the counts by term of `get_batch_samples`
    ) -> Tensor:
        """The step's share of the loss: row losses over the rows of the whole step."""
        terms = self.method.loss_terms(model, self._taught(inputs))
        total = torch.zeros((), device=next(iter(terms.values())).rows_B.device)
        for name, term in terms.items():
            total = total + term.weight * term.rows_B.sum() / num_items_in_batch[name].clamp(min=1)
        # gradients are averaged over processes, and the counts are of all processes together
        share: Tensor = total * inputs[COUNTS] * self.accelerator.num_processes
        return share

    def get_batch_samples(  # type: ignore[override]  # the counts go to `compute_loss` alone
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], dict[str, Tensor] | None]:
        """The micro-batches of one optimizer step, and how many rows each loss term counts in all of them."""
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        if not batches:
            return batches, None
        table = [self._counts(batch) for batch in batches]
        names = sorted(table[0])
        summed = torch.stack([torch.stack([row[name].to(device) for name in names]) for row in table]).sum(dim=0)
        if world()[1] > 1:
            torch.distributed.all_reduce(summed)
        totals = dict(zip(names, summed, strict=True))
        self.tokens_seen += int(totals.pop(TOKENS))
        return batches, totals

    def _counts(self, batch: Batch) -> dict[str, Tensor]:
        """Rows per loss term, and tokens; all 0 for a batch that only stands in."""
        counts = {**self.method.counts(batch), TOKENS: batch["attention_mask"].sum()}
        return {name: count * batch[COUNTS] for name, count in counts.items()}

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Any = None,  # noqa: ANN401
    ) -> Tensor:
        """One forward and backward pass.

        Raises:
            NotFiniteError: The loss is NaN or infinite.
        """
        self._look_at_loss(model, inputs)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._require_finite(loss)
        if self.accelerator.sync_gradients:
            if self.penalty is not None:
                self.penalty.add_gradient_(self.network)
            if self.ranks is not None:
                self.ranks.add_gradient_()
        return loss

    def _require_finite(self, loss: Tensor) -> None:
        """Refuse a loss that is not finite; with several processes by all together, at the step's last micro-batch."""
        if world()[1] > 1:
            self.step_loss = self.step_loss + loss
            if not self.accelerator.sync_gradients:
                return
            loss, self.step_loss = self.step_loss, torch.zeros_like(loss)
            torch.distributed.all_reduce(loss)
        if not torch.isfinite(loss):
            raise NotFiniteError(
                f"The loss became {loss.item()} after step {self.state.global_step}; nothing of it was saved.",
                why="the learning rate is too high for this model",
                fix=f"--learning_rate {self.args.learning_rate / 10:g}",
            )

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:  # noqa: ANN401 - a number or a tensor
        """The gradient norm, before the optimizer takes the step; with fp16 the scaler deals with overflows itself."""
        norm = super()._get_grad_norm(model, grad_norm)  # type: ignore[no-untyped-call]
        if not self.args.fp16 and not math.isfinite(norm):
            raise NotFiniteError(
                f"The gradient became {float(norm)} after step {self.state.global_step}; nothing of it was saved.",
                why="the learning rate is too high for this model, or a weight is close to overflowing",
                fix=f"--learning_rate {self.args.learning_rate / 10:g}",
            )
        return norm

    def floating_point_ops(self, inputs: Mapping[str, Any]) -> int:
        """6 x trained parameters x tokens; counted once instead of at every step."""
        return int(self.step_flops * inputs["input_ids"].numel())

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthGroupedSampler | EvenSampler:  # noqa: ANN401
        a_round = self.args.train_batch_size * world()[1]
        together = a_round * self.args.gradient_accumulation_steps
        grouped = self.args.train_sampling_strategy == "group_by_length"
        self.sampler = LengthGroupedSampler(
            self.rows.lengths, together, seed=self.order_seed, grouped=grouped, draws=self.draws
        )
        uneven = world()[1] > 1 and not self.args.dataloader_drop_last
        return EvenSampler(self.sampler, a_round) if uneven else self.sampler

    def evaluation_loop(
        self,
        dataloader: Any,  # noqa: ANN401
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Scores of all rows of the data loader's data set, from whole predictions."""
        rows: TokenisedRows = dataloader.dataset
        logits = predict(
            self.network if self.average is None else self.average.model,
            rows,
            self.pad,
            batch_size=self.args.per_device_eval_batch_size,
            bf16=self.args.bf16,
            description="validation",
            quiet=bool(self.args.disable_tqdm),
        )
        labels = rows.columns["labels"]
        scores = {f"{metric_key_prefix}_{name}": value for name, value in self.score(logits, labels).items()}
        shown = ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
        logger.info("  epoch %.2f, step %d: %s", self.state.epoch or 0, self.state.global_step, shown)
        return EvalLoopOutput(predictions=logits, label_ids=labels, metrics=scores, num_samples=len(rows))

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:  # noqa: ANN401
        """As in transformers, but a run that stops saves its last score, the best or not."""
        return super()._determine_best_metric(metrics, trial) or self.stop.stopping

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:  # noqa: ANN401
        refuse_not_finite(self.network)
        with quiet_transformers():
            super()._save_checkpoint(model, trial)
        losses = {
            "total": self._total_loss_scalar,
            "not_logged": float(self.accelerator.gather(self._tr_loss).mean()),
            "logged_at": self._globalstep_last_logged,
        }
        wait_for_everyone()
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        if is_main_process() and folder.is_dir():
            cost = {"tokens": self.tokens_seen, "seconds": self.seconds, "losses": losses}
            write_json_whole(folder / COST_FILE, cost)
            if self.preflight is not None:
                write_json_whole(folder / PREFLIGHT_FILE, self.preflight)
            if self.average is not None:
                self.average.save(folder)
            if self.ranks is not None:
                self.ranks.save(folder)
            seal(folder, self.identity, self.state.global_step)

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """As in transformers, but the mean loss of a resumed run is that of all its steps."""
        if "train_loss" in logs:
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 1)
        super().log(logs, start_time)

    def _load_callback_state(self) -> None:
        """As in transformers, but what is restored keeps its place: others ask what it has decided."""
        callbacks = self.callback_handler.callbacks
        order = [type(callback) for callback in callbacks]
        super()._load_callback_state()
        callbacks.sort(key=lambda callback: order.index(type(callback)))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        if is_adapted(self.network):
            if self.args.should_save:
                save_trained(self.network, folder)
            return
        super()._save(output_dir, state_dict)
        (folder / "training_args.bin").unlink(missing_ok=True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:  # noqa: ANN401
        if is_adapted(self.network):
            load_trained_(self.network, Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.average is not None:
            self.average.load_(Path(resume_from_checkpoint))
        if self.ranks is not None:
            self.ranks.load_(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        if is_adapted(self.network):
            load_trained_(self.network, Path(str(self.state.best_model_checkpoint)))
        else:
            super()._load_best_model()
        if self.average is not None:
            self.average.load_(Path(str(self.state.best_model_checkpoint)))


class ProgressBar(ProgressCallback):
    """The stock bar with its estimate of the time left, without the log lines in between."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: object,
    ) -> None:
        """Print nothing: scores are logged by `evaluation_loop`, losses go to `report_to`."""


class EpochOrder(TrainerCallback):
    """Tells the sampler which epoch is next, also in a resumed run."""

    def __init__(self, trainer: TransferTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Set the sampler's epoch."""
        self.trainer.sampler.set_epoch(int(state.epoch or 0))


class LossesBefore(TrainerCallback):
    """Gives a resumed run the sum of the losses before the interruption, which transformers starts anew."""

    def __init__(self, trainer: TransferTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Restore them."""
        if losses := self.trainer.losses_before:
            self.trainer._total_loss_scalar = losses["total"]
            self.trainer._tr_loss += losses["not_logged"]
            self.trainer._globalstep_last_logged = losses["logged_at"]


class AlreadyEnded(TrainerCallback):
    """Stops a resumed training that had ended, by its steps or early: transformers would take a step, or an epoch."""

    def __init__(self, trainer: TransferTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> TrainerControl:
        """Ask the steps, and early stopping for its patience."""
        early = [one for one in self.trainer.callback_handler.callbacks if isinstance(one, EarlyStoppingCallback)]
        waited = any(one.early_stopping_patience_counter >= one.early_stopping_patience for one in early)
        control.should_training_stop = waited or state.global_step >= state.max_steps
        return control


class AverageWeights(TrainerCallback):
    """Takes the weights after each step into the moving average, before anything is saved or scored."""

    def __init__(self, trainer: TransferTrainer, average: MovingAverage) -> None:
        self.trainer, self.average = trainer, average

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Update the average."""
        self.average.update_(self.trainer.network, state.global_step)


class StopOnSignal(TrainerCallback):
    """On SIGTERM, SIGINT or SIGHUP: finish the step, save a checkpoint, stop. A second request stops at once.

    SIGHUP is left alone where it is ignored, as under nohup, or does not exist.
    """

    def __init__(self) -> None:
        self.asked = self.stopping = False

    def listening(self) -> _Listening:
        """A context in which signals are caught; does nothing outside the main thread."""
        return _Listening(self)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> TrainerControl:
        """Ask the Trainer to stop, in all processes at the same step; it then comes to the end of the epoch."""
        if self.agree(args):
            self.stopping = True
            control.should_training_stop = True
        return control

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> TrainerControl:
        """Save, after the scores; an epoch that was broken off has none, which an uninterrupted run would not take."""
        if self.stopping:
            broken_off = state.global_step < state.max_steps and not float(state.epoch or 0).is_integer()
            if broken_off:
                control.should_evaluate = control.should_log = False
            control.should_save = True
        return control

    def agree(self, args: TrainingArguments) -> bool:
        """Whether any process is asked to stop; then all are."""
        if world()[1] == 1:
            return self.asked
        flag = torch.tensor(int(self.asked), device=args.device)
        torch.distributed.all_reduce(flag)
        if flag.item():
            self.asked = True
        return bool(flag.item())


class _Listening:
    def __init__(self, stop: StopOnSignal) -> None:
        self.stop = stop
        self.asked_at = 0.0
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            numbers = [signal.SIGTERM, signal.SIGINT]
            if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
                numbers.append(signal.SIGHUP)
            for number in numbers:
                self.previous[number] = signal.signal(number, self._handle)

    def _handle(self, number: int, frame: types.FrameType | None) -> None:
        now = time.monotonic()
        if self.stop.asked and now - self.asked_at > ONE_REQUEST:
            raise KeyboardInterrupt
        if not self.stop.asked:
            self.stop.asked, self.asked_at = True, now
            logger.warning("stopping after this step; once more to stop at once, without a checkpoint")

    def __exit__(self, *exc: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
