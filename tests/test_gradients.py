"""The same rows give the same gradient: whole, in micro-batches, and over two processes.

Each is compared with a loop written by hand, in float64, one row at a time and without the Trainer.
"""

import pytest
import torch
from gradients import CASES, METHODS, gradient_of, step_rows, step_tokenizer
from processes import run, torchrun
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

from nlpxfer.data.tokenise import Collator

SPLITS = [(8, 1), (4, 2), (2, 4), (3, 3), (5, 2)]


def distance(found, expected):
    """Norm of the difference over the norm of what is expected."""
    assert found.keys() == expected.keys()
    difference = sum(((found[name].double() - expected[name].double()) ** 2).sum() for name in expected)
    return float((difference / sum((value.double() ** 2).sum() for value in expected.values())) ** 0.5)


def by_hand(folder, method, rows):
    """Loss and gradient in float64: label term over labelled rows, teacher term over all rows."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).double().eval()
    settings = METHODS[method]
    share = getattr(settings, "kd_weight", 0.0)
    temperature = getattr(settings, "temperature", 1.0)
    labelled = sum(int(rows[i]["labels"] >= 0) for i in range(len(rows)))
    loss = torch.zeros((), dtype=torch.float64)
    for i in range(len(rows)):
        row = rows[i]
        ids = torch.tensor(row["input_ids"].astype("int64"))[None]
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
        if row["labels"] >= 0:
            loss = loss - (1 - share) * torch.log_softmax(logits, 0)[int(row["labels"])] / labelled
        if share:
            p = torch.softmax(torch.tensor(row["teacher_logits"]).double() / temperature, 0)
            q = torch.softmax(logits / temperature, 0)
            loss = loss + share * temperature**2 * (p * (p.log() - q.log())).sum() / len(rows)
    loss.backward()
    gradient = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return gradient, loss.item()


@pytest.mark.parametrize("labelled", ["all", "uneven"])
@pytest.mark.parametrize("method", ["finetune", "distill"])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_micro_batches_do_not_change_the_gradient(family, method, labelled, tiny_checkpoint, tmp_path):
    folder = tiny_checkpoint(family, kind="classifier")
    rows = step_rows(family, labelled)
    expected, loss = by_hand(folder, method, rows)
    for batch, micro_batches in SPLITS:
        found, logged = gradient_of(folder, tmp_path, method, rows, batch, micro_batches, family)
        assert distance(found, expected) <= 1e-5, (batch, micro_batches)
        assert logged == pytest.approx(loss, rel=1e-5)


def test_a_gradient_that_is_twice_as_large_would_be_noticed(tiny_checkpoint):
    expected, _ = by_hand(tiny_checkpoint("bert", kind="classifier"), "finetune", step_rows())
    assert distance({name: 2 * value for name, value in expected.items()}, expected) == pytest.approx(1)


def test_stock_trainer_is_still_off_by_the_number_of_micro_batches(tiny_checkpoint, tmp_path):
    """A guard, 2026-11: when this fails, transformers issue 47688 is mended and `compute_loss` may be thinned."""
    folder = tiny_checkpoint("bert", kind="classifier")
    rows = step_rows()
    expected, _ = by_hand(folder, "finetune", rows)
    right = float(sum((value**2).sum() for value in expected.values()) ** 0.5)
    norms = {}
    for batch, micro_batches in ((8, 1), (2, 4)):
        options = TrainingArguments(
            output_dir=str(tmp_path),
            use_cpu=True,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=micro_batches,
            max_steps=1,
            logging_steps=1,
            save_strategy="no",
            disable_tqdm=True,
        )
        model = AutoModelForSequenceClassification.from_pretrained(folder)
        without_teacher = [
            {key: row[key] for key in ("input_ids", "labels")} for row in map(rows.__getitem__, range(8))
        ]
        trainer = Trainer(
            model, options, train_dataset=without_teacher, data_collator=Collator.for_tokenizer(step_tokenizer("bert"))
        )
        trainer.train()
        norms[micro_batches] = next(line["grad_norm"] for line in trainer.state.log_history if "grad_norm" in line)
    assert norms[1] == pytest.approx(right, rel=1e-4)
    assert norms[4] == pytest.approx(4 * right, rel=1e-4)


@pytest.mark.processes
def test_two_processes_give_the_gradient_of_one(tiny_checkpoint, tmp_path):
    """Also where the rows do not divide by two, and where the second process has none at all."""
    done = run(torchrun("tests/gradients.py", tmp_path))
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "gradients.pt")
    assert found["processes"] == 2
    for name, (method, labelled, count, _, _) in CASES.items():
        expected, loss = by_hand(tmp_path / "model", method, step_rows(labelled=labelled, count=count))
        gradient, logged = found["cases"][name]
        assert distance(gradient, expected) <= 1e-5, name
        assert logged == pytest.approx(loss, rel=1e-5), name
