"""What a user would run instead of nlpxfer: the stock Trainer, a Trainer with the teacher in its loop, TextBrewer."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from measuring import Skipped
from torch import nn
from torch.nn import functional
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    get_linear_schedule_with_warmup,
)

from nlpxfer.checkpoint.load import Checkpoint, load_classifier
from nlpxfer.checkpoint.pooling import has_mean_layer
from nlpxfer.checkpoint.quiet import quiet_transformers
from nlpxfer.checkpoint.resolve import resolve_checkpoint
from nlpxfer.checkpoint.student import model_layers, slice_layers
from nlpxfer.config import DataOptions, RunOptions
from nlpxfer.data.tokenise import Collator, TokenisedRows
from nlpxfer.evaluate.task import task_metrics
from nlpxfer.start import start_run
from nlpxfer.train.launch import seed_everything
from nlpxfer.train.predict import predict
from nlpxfer.train.trainer import TransferTrainer

LEARNING_RATES = (1e-4, 3e-4, 1e-3)
WARM_UP = 0.1
CLIP = 1.0
STOCK_LEARNING_RATE = 3e-4
"""The best of `LEARNING_RATES` on validation rows in `finetune.py`."""
STOCK = (
    "transformers.Trainer with DataCollatorWithPadding: random batches of 32 padded to their longest row, float32, "
    "fused AdamW, linear schedule with 10 % warm-up, gradient norm 1, new random head, all weights trained"
)


def stock_model(name: str, classes: int, seed: int) -> PreTrainedModel:
    """A checkpoint with a new random head, as `from_pretrained` makes it."""
    seed_everything(seed)
    with quiet_transformers():
        return AutoModelForSequenceClassification.from_pretrained(
            resolve_checkpoint(name).folder, num_labels=classes, dtype=torch.float32
        )


def stock_arguments(
    folder: Path, *, learning_rate: float, epochs: float, seed: int, **changes: Any
) -> TrainingArguments:
    """Stock settings without evaluation and checkpoints, which would count as training time."""
    values = {
        "per_device_train_batch_size": 32,
        "warmup_steps": WARM_UP,
        "max_grad_norm": CLIP,
        "eval_strategy": "no",
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "use_cpu": not torch.cuda.is_available(),
        "disable_tqdm": True,
    }
    return TrainingArguments(
        output_dir=str(folder), learning_rate=learning_rate, num_train_epochs=epochs, seed=seed, **(values | changes)
    )


def stock_trainer(
    model: PreTrainedModel,
    arguments: TrainingArguments,
    rows: TokenisedRows,
    tokenizer: PreTrainedTokenizerBase,
    kind: type[Trainer] = Trainer,
    **more: Any,
) -> Trainer:
    """A Trainer on rows with dynamic padding."""
    trainer = kind(
        model=model,
        args=arguments,
        train_dataset=stock_rows(rows),
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        **more,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def stock_rows(rows: TokenisedRows, *, labels: bool = True) -> Dataset:
    """The same rows as a `datasets.Dataset`, as a tokenising `map` leaves them."""
    columns: dict[str, list[Any]] = {"input_ids": [], "attention_mask": []} | ({"labels": []} if labels else {})
    if rows.token_types is not None:
        columns["token_type_ids"] = []
    for row in (rows[i] for i in range(len(rows))):
        columns["input_ids"].append(row["input_ids"].tolist())
        columns["attention_mask"].append([1] * len(row["input_ids"]))
        if labels:
            columns["labels"].append(int(row["labels"]))
        if rows.token_types is not None:
            columns["token_type_ids"].append(row["token_type_ids"].tolist())
    return Dataset.from_dict(columns)


class EpochTime(TrainerCallback):
    """Seconds from the start of an epoch to the end of its last step."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.start = self.seconds = 0.0

    def _clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self.start = self._clock()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self.seconds = self._clock() - self.start


def train_stock(
    values: Mapping[str, Any], folder: Path, model: str, seed: int, epochs: int
) -> tuple[str, dict[str, Any]]:
    """The stock Trainer on a data set: the fingerprint of its rows, then seconds, trained parameters and scores.

    Args:
        values: Values of `DataOptions`.
        folder: A new one.
        model: The checkpoint.
        seed: Of head, batches and dropout.
        epochs: Over the training rows.
    """
    with start_run("finetune", DataOptions(**values), RunOptions(output_dir=str(folder))) as run:
        tokenizer = load_classifier(model, schema=run.data.schema).tokenizer
        splits = run.split(tokenizer)
        stock = stock_model(model, len(run.data.schema), seed)
        rate = STOCK_LEARNING_RATE
        arguments = stock_arguments(folder / "stock", learning_rate=rate, epochs=epochs, seed=seed)
        seconds = stock_trainer(stock, arguments, splits.train, tokenizer).train().metrics["train_runtime"]
        collator = Collator.for_tokenizer(tokenizer)
        metrics = {
            split: task_metrics(run.problem_type, predict(stock, rows, collator), run.labels(split))
            for split, rows in (("validation", splits.validation), ("test", splits.test))
        }
        trained = sum(p.numel() for p in stock.parameters())
        found = {"seed": seed, "train_seconds": seconds, "trained_parameters": trained, "metrics": metrics}
        return run.data.fingerprint, found


def epoch_seconds(trainer: Trainer) -> float:
    """Train for one epoch and return its seconds: batches, forward, backward, optimizer."""
    clock = EpochTime(trainer.args.device)
    trainer.add_callback(clock)
    if isinstance(trainer, TransferTrainer):
        trainer.fit()
    else:
        trainer.train()
    return clock.seconds


class Curve(TrainerCallback):
    """Scores after each epoch; the time they take does not count as training time."""

    def __init__(self, score: Callable[[], dict[str, float]]) -> None:
        self.score = score
        self.points: list[dict[str, float]] = []
        self.start = self.pause = 0.0

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        at = time.perf_counter()
        self.points.append({"epoch": round(state.epoch or 0), "seconds": at - self.start - self.pause, **self.score()})
        self.pause += time.perf_counter() - at

    def train(self, trainer: Trainer) -> float:
        """Train, and return the seconds without the pauses."""
        trainer.add_callback(self)
        self.start = time.perf_counter()
        trainer.train()
        return time.perf_counter() - self.start - self.pause


class TeacherInTheLoop(Trainer):
    """Distilling as it is usually written: the teacher runs on each batch, inside `compute_loss`."""

    def __init__(self, *args: Any, teacher: nn.Module, temperature: float, kd_weight: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.teacher = teacher.eval()
        self.temperature, self.kd_weight = temperature, kd_weight

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(**inputs)
        with torch.no_grad():
            teacher_logits = self.teacher(**inputs).logits
        soft = functional.kl_div(
            functional.log_softmax(outputs.logits / self.temperature, dim=-1),
            functional.softmax(teacher_logits / self.temperature, dim=-1),
            reduction="batchmean",
        )
        loss = self.kd_weight * self.temperature**2 * soft + (1 - self.kd_weight) * outputs.loss
        return (loss, outputs) if return_outputs else loss


def textbrewer_seconds(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    rows: TokenisedRows,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    learning_rate: float,
    epochs: int,
    temperature: float,
    kd_weight: float,
    cached: bool,
    seed: int,
) -> float:
    """Train `student` with TextBrewer's loop; returns seconds. With a `kd_weight` of 1 the rows need no labels.

    Its distillation loss is the cross-entropy of the softened distributions without T^2, so the weight carries it: the
    gradient is then that of nlpxfer and of the Trainer above. `cached` turns on its own cache of teacher logits, which
    also fixes the batches: each epoch sees the same ones in another order.

    Raises:
        Skipped: TextBrewer is not installed or cannot be imported.
    """
    try:
        brewer = importlib.import_module("textbrewer")
    except Exception as error:
        raise Skipped(f"textbrewer cannot be imported: {type(error).__name__}: {error}") from error
    seed_everything(seed)
    device = next(student.parameters()).device
    pad = DataCollatorWithPadding(tokenizer)
    loader = torch.utils.data.DataLoader(
        stock_rows(rows, labels=kd_weight < 1),  # type: ignore[arg-type]
        batch_size=32,
        shuffle=True,
        collate_fn=lambda batch: dict(pad(batch)),
    )
    steps = len(loader) * epochs
    distiller = brewer.BasicDistiller(
        train_config=brewer.TrainingConfig(output_dir=str(folder), device=device),
        distill_config=brewer.DistillationConfig(
            temperature=temperature,
            kd_loss_weight=kd_weight * temperature**2,
            hard_label_weight=1 - kd_weight,
            is_caching_logits=cached,
        ),
        model_T=teacher,
        model_S=student,
        adaptor_T=lambda batch, outputs: {"logits": outputs.logits},
        adaptor_S=lambda batch, outputs: (
            {"logits": outputs.logits} | ({} if outputs.loss is None else {"losses": outputs.loss})
        ),
    )
    optimizer = torch.optim.AdamW(student.parameters(), lr=learning_rate, weight_decay=0.0, fused=True)
    schedule = {"num_warmup_steps": int(np.ceil(WARM_UP * steps)), "num_training_steps": steps}
    start = time.perf_counter()
    with distiller:
        distiller.train(
            optimizer,
            loader,
            num_epochs=epochs,
            scheduler_class=get_linear_schedule_with_warmup,
            scheduler_args=schedule,
            max_grad_norm=CLIP,
        )
    return time.perf_counter() - start


def embedding_student(
    teacher: Checkpoint, student: Checkpoint, texts: Sequence[str], folder: Path, *, learning_rate: float, epochs: int
) -> tuple[Callable[[Sequence[str]], Any], float]:
    """Train the body of `student` to give the sentence vectors of the teacher's, as sentence-transformers does it.

    That is its layer reduction: the squared error between the means of the token states, on the texts alone.

    Returns:
        From texts to vectors, and the seconds of the training.

    Raises:
        Skipped: sentence-transformers is not installed or cannot be imported.
    """
    try:
        package = importlib.import_module("sentence_transformers")
        modules = importlib.import_module("sentence_transformers.sentence_transformer.modules")
        losses = importlib.import_module("sentence_transformers.sentence_transformer.losses")
    except ImportError as error:
        raise Skipped(f"sentence-transformers cannot be imported: {error}") from error

    def encoder(checkpoint: Checkpoint, name: str) -> Any:  # noqa: ANN401 - an optional package's model
        model, place = checkpoint.model, folder / name
        total = len(model_layers(model)[1]) - has_mean_layer(model)  # it takes the mean itself
        body = slice_layers(model, range(total)).base_model
        body.save_pretrained(place)
        checkpoint.tokenizer.save_pretrained(place)
        word = modules.Transformer(str(place))
        pooling = modules.Pooling(word.get_embedding_dimension(), pooling_mode="mean")
        return package.SentenceTransformer(modules=[word, pooling], device="cpu")

    seed_everything(42)
    source, learner = encoder(teacher, "teacher"), encoder(student, "student")
    start = time.perf_counter()
    rows = Dataset.from_dict({"sentence": [*texts], "label": source.encode([*texts]).tolist()})
    arguments = package.SentenceTransformerTrainingArguments(
        output_dir=str(folder / "trainer"),
        num_train_epochs=epochs,
        per_device_train_batch_size=32,
        learning_rate=learning_rate,
        warmup_steps=WARM_UP,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=42,
    )
    trainer = package.SentenceTransformerTrainer(
        model=learner, args=arguments, train_dataset=rows, loss=losses.MSELoss(learner)
    )
    trainer.train()
    seconds = time.perf_counter() - start
    return lambda more: learner.encode([*more]), seconds
