"""One optimizer step of TransferTrainer and the gradient it took, for the gradient tests and their two processes.

Started as a program by torchrun, it computes the cases of `CASES` and the first process writes their gradients.
"""

import gc
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import torch
from tiny import build_checkpoint, build_tokenizer, make_rows
from transformers import AutoModelForSequenceClassification, TrainerCallback

from nlpxfer.config import RunOptions
from nlpxfer.config.long_texts import LongTexts
from nlpxfer.config.states import StatesPlan
from nlpxfer.data.tokenise import TokenisedRows, tokenise
from nlpxfer.evaluate.metrics import classification_metrics
from nlpxfer.methods.distill import Distill
from nlpxfer.methods.finetune import FineTune
from nlpxfer.methods.states import StatesGuide
from nlpxfer.train.checkpoints import RunIdentity
from nlpxfer.train.launch import is_main_process, world
from nlpxfer.train.trainer import TransferTrainer

STATES = StatesPlan(
    hidden_weight=0.5, relation_weight=2.0, num_relation_heads=4, similarity_weight=0.3, similarity_temperature=0.5
)
METHODS = {
    "finetune": FineTune(),
    "distill": Distill(temperature=3.0, kd_weight=0.7),
    "r_drop": FineTune(r_drop_weight=2.0),
}
LABELLED = {
    "all": [True] * 8,
    # over micro-batches of two: 2, 1, 0 and 0 labelled rows, if the rows come in this order
    "uneven": [True, True, True, False, False, False, False, False],
}
# name -> method, which rows have a label, rows in all, rows per process and micro-batch, micro-batches.
# In "windows" the rows are several windows each, in "balanced" they are drawn so that classes come equally often.
CASES = {
    "finetune": ("finetune", "all", 8, 2, 2),
    "distill": ("distill", "uneven", 8, 2, 2),
    "ragged": ("distill", "uneven", 7, 2, 2),
    "one row over": ("finetune", "all", 5, 4, 1),
    "idle process": ("distill", "all", 4, 4, 1),
    "windows": ("distill", "uneven", 7, 2, 2),
    "balanced": ("finetune", "all", 8, 2, 2),
    "two passes": ("r_drop", "all", 7, 2, 2),  # without dropout: they agree, and the gradient is that of one
}
WINDOWS = LongTexts(policy="sliding_window", window_overlap=1)


def step_rows(family: str = "bert", labelled: str = "all", count: int = 8, *, windows: bool = False) -> TokenisedRows:
    """Rows of unlike lengths with labels (-100: none) and teacher logits that are the same in every process.

    windows: Of six tokens; the rows have one to four of them.
    """
    made = make_rows(8, seed=3)
    names = sorted({row["label"] for row in made})
    gold = [names.index(row["label"]) if known else -100 for row, known in zip(made, LABELLED[labelled], strict=True)]
    reading = {"max_length": 6, "long_texts": WINDOWS} if windows else {"max_length": 32}
    rows = tokenise(step_tokenizer(family), [row["text"] for row in made], labels=gold, **reading)
    logits = np.random.default_rng(5).normal(size=(8, 4)).astype(np.float32)
    return rows.with_columns(teacher_logits=3 * logits).select(range(count))


def state_rows(**options) -> TokenisedRows:
    """`step_rows` with sentence states of a teacher."""
    rows = step_rows(**options)
    states = np.random.default_rng(6).normal(size=(8, 32)).astype(np.float32)
    return rows.with_columns(teacher_states=states[: len(rows)])


def guided(teacher_folder: Path, others_KH: torch.Tensor) -> Distill:
    """Distilling with all terms on states; the teacher is a classifier in a folder."""
    teacher = AutoModelForSequenceClassification.from_pretrained(teacher_folder).requires_grad_(False)
    return Distill(
        kd_weight=0.7, temperature=3.0, states=StatesGuide(plan=STATES, teacher=teacher, others_KH=others_KH)
    )


def other_states() -> torch.Tensor:
    """Sentence states that rows are compared with."""
    return torch.from_numpy(np.random.default_rng(7).normal(size=(5, 32)).astype(np.float32))


def rare_class(rows: TokenisedRows) -> TokenisedRows:
    """The rows with other labels: six of one class and one each of two others, of eight rows."""
    return rows.with_columns(labels=np.array([0, 0, 0, 2, 0, 0, 3, 0])[: len(rows)])


def step_tokenizer(family: str):
    tokenizer = build_tokenizer(family)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def step_trainer(
    model, method, options: RunOptions, rows: TokenisedRows, family: str, sampling: str = "natural"
) -> TransferTrainer:
    """A Trainer that trains and scores on the same rows."""
    return TransferTrainer(
        model,
        method,
        options,
        train_rows=rows,
        validation_rows=rows,
        tokenizer=step_tokenizer(family),
        metrics=classification_metrics,
        identity=RunIdentity({}, {}),
        sampling=sampling,
    )


class KeepGradient(TrainerCallback):
    """Copies the gradient just before the first optimizer step."""

    def __init__(self) -> None:
        self.gradient: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        for name, parameter in model.named_parameters():
            if not self.gradient.get(name, torch.zeros(0)).numel() and parameter.grad is not None:
                self.gradient[name.removeprefix("module.")] = parameter.grad.detach().clone()


def gradient_of(
    model_folder: Path,
    output: Path,
    method: str | Distill,
    rows: TokenisedRows,
    batch: int,
    micro_batches: int,
    family: str = "bert",
    sampling: str = "natural",
    prepare=lambda model: None,
    **changes,
) -> tuple[dict[str, torch.Tensor], float]:
    """Gradient and logged loss of one step."""
    options = RunOptions(
        output_dir=str(output),
        use_cpu=True,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=micro_batches,
        max_steps=1,
        max_grad_norm=0.0,
        train_sampling_strategy="random",
        eval_strategy="no",
        save_strategy="no",
        load_best_model_at_end=False,
        logging_steps=1,
        disable_tqdm=True,
        **changes,
    )
    model = AutoModelForSequenceClassification.from_pretrained(model_folder)
    prepare(model)
    chosen = METHODS[method] if isinstance(method, str) else method
    trainer = step_trainer(chosen.adapt(model, ()), chosen, options, rows, family, sampling)
    keep = KeepGradient()
    trainer.add_callback(keep)
    trainer.fit()
    loss = next(line["loss"] for line in trainer.state.log_history if "loss" in line)
    trainer.model_wrapped = trainer.model  # a DDP wrapper must not outlive the process group
    trainer.accelerator.free_memory()
    return keep.gradient, loss


def averaged(model_folder: Path, output: Path, batch: int, decay: float = 0.8) -> dict[str, torch.Tensor]:
    """How far the weights that a student ends with, which teaches itself, are from its start; after two epochs."""
    options = RunOptions(
        output_dir=str(output),
        use_cpu=True,
        per_device_train_batch_size=batch,
        num_train_epochs=2,
        warmup_steps=0,
        learning_rate=0.1,
        optim="sgd",
        eval_strategy="no",
        save_strategy="no",
        load_best_model_at_end=False,
        disable_tqdm=True,
    )
    model = AutoModelForSequenceClassification.from_pretrained(model_folder)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    rows = step_rows(labelled="uneven", count=7)
    trainer = step_trainer(model, Distill(kd_weight=0.5, ema_decay=decay), options, rows, "bert")
    trainer.fit()
    trainer.model_wrapped = trainer.model
    trainer.accelerator.free_memory()
    return {name: value - start[name] for name, value in model.state_dict().items()}


def main(output: Path) -> None:
    gc.freeze()  # as a recipe does
    if is_main_process():
        build_checkpoint(output / "model", "bert", kind="classifier")
        build_checkpoint(output / "teacher", "bert", kind="classifier", seed=1)
    RunOptions(output_dir=str(output), use_cpu=True).device  # noqa: B018 - starts the process group
    torch.distributed.barrier()
    found = {}
    for name, (method, labelled, count, batch, micro_batches) in CASES.items():
        rows = step_rows(labelled=labelled, count=count, windows=name == "windows")
        sampling = "natural"
        if name == "balanced":
            rows, sampling = rare_class(rows), "balanced"
        found[name] = gradient_of(output / "model", output, method, rows, batch, micro_batches, sampling=sampling)
    taught = guided(output / "teacher", other_states())
    found["states"] = gradient_of(output / "model", output, taught, state_rows(labelled="uneven", count=7), 2, 2)
    average = averaged(output / "model", output, 2)
    if is_main_process():
        torch.save({"average": average, "processes": world()[1], "cases": found}, output / "gradients.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
