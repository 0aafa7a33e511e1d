"""The same rows give the same gradient: whole, in micro-batches, and over two processes.

Each is compared with a loop written by hand, in float64, one row at a time and without the Trainer.
"""

import copy

import numpy as np
import pytest
import torch
from gradients import (
    CASES,
    METHODS,
    STATES,
    averaged,
    gradient_of,
    guided,
    other_states,
    rare_class,
    state_rows,
    step_rows,
    step_tokenizer,
)
from processes import run, torchrun
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

from nlpxfer.data.tokenise import Collator
from nlpxfer.train.balanced import BalancedDraws

SPLITS = [(8, 1), (4, 2), (2, 4), (3, 3), (5, 2)]


def distance(found, expected):
    """Norm of the difference over the norm of what is expected."""
    assert found.keys() == expected.keys()
    difference = sum(((found[name].double() - expected[name].double()) ** 2).sum() for name in expected)
    return float((difference / sum((value.double() ** 2).sum() for value in expected.values())) ** 0.5)


def by_hand(folder, method, rows):
    """Loss and gradient in float64: label term over labelled rows, teacher term over all rows.

    The logits of a row are the mean over its windows.
    """
    model = AutoModelForSequenceClassification.from_pretrained(folder).double().eval()
    settings = METHODS[method]
    share = getattr(settings, "kd_weight", 0.0)
    temperature = getattr(settings, "temperature", 1.0)
    labelled = sum(int(rows[i]["labels"] >= 0) for i in range(len(rows)))
    loss = torch.zeros((), dtype=torch.float64)
    for i in range(len(rows)):
        row = rows[i]
        ends = np.cumsum(row.get("window_lengths", [len(row["input_ids"])]))[:-1]
        windows = [torch.tensor(part.astype("int64"))[None] for part in np.split(row["input_ids"], ends)]
        logits = sum(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0] for ids in windows)
        logits = logits / len(windows)
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


@pytest.mark.parametrize("method", ["finetune", "distill"])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_windows_of_a_row_count_as_one_row(family, method, tiny_checkpoint, tmp_path):
    """Rows of more and of fewer windows weigh the same, in whatever micro-batch they come."""
    folder = tiny_checkpoint(family, kind="classifier")
    rows = step_rows(family, "uneven", windows=True)
    assert len(set(rows.windows_per_row)) >= 2
    expected, loss = by_hand(folder, method, rows)
    for batch, micro_batches in SPLITS:
        found, logged = gradient_of(folder, tmp_path, method, rows, batch, micro_batches, family)
        assert distance(found, expected) <= 1e-5, (batch, micro_batches)
        assert logged == pytest.approx(loss, rel=1e-5)


def by_hand_with_states(folder, method, rows):
    """As `by_hand`, with the terms on states: row by row, token by token and head by head, in float64.

    Student and teacher have four layers each, so each is compared with the one of its number. All projections are
    the identity; their gradient is that of a matrix of its own for each place.
    """
    student = AutoModelForSequenceClassification.from_pretrained(folder).double().eval()
    teacher = copy.deepcopy(method.states.teacher).double().eval()
    names = [f"student_states.hidden.{i}.weight" for i in range(4)] + ["student_states.similarity.0.weight"]
    projections = {name: torch.eye(32, dtype=torch.float64, requires_grad=True) for name in names}
    labelled = sum(int(rows[i]["labels"] >= 0) for i in range(len(rows)))
    total = torch.zeros((), dtype=torch.float64)

    def states_of(model, ids):
        kept, layer = {}, model.bert.encoder.layer[3].attention.self
        for part in ("query", "key", "value"):
            getattr(layer, part).register_forward_hook(lambda m, a, output, part=part: kept.update({part: output[0]}))
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True)
        return output.logits[0], [states[0] for states in output.hidden_states[1:]], kept

    for i in range(len(rows)):
        row, loss = rows[i], torch.zeros((), dtype=torch.float64)
        ids = torch.tensor(row["input_ids"].astype("int64"))[None]
        logits, mine, parts = states_of(student, ids)
        with torch.no_grad():
            _, theirs, taught = states_of(teacher, ids)
        if row["labels"] >= 0:
            loss = loss - 0.3 * torch.log_softmax(logits, 0)[int(row["labels"])] * len(rows) / labelled
        p = torch.softmax(torch.tensor(row["teacher_logits"]).double() / 3, 0)
        loss = loss + 0.7 * 9 * (p * (p.log() - torch.log_softmax(logits / 3, 0))).sum()
        for layer in range(4):
            for t in range(ids.shape[1]):
                error = projections[names[layer]] @ mine[layer][t] - theirs[layer][t]
                loss = loss + STATES.hidden_weight * (error @ error) / 32 / ids.shape[1] / 4
        for part in ("query", "key", "value"):
            for head in range(4):
                a, b = (side[part][:, 8 * head : 8 * head + 8] for side in (parts, taught))
                for t in range(ids.shape[1]):
                    q, p = (torch.softmax(x @ x[t] / 8**0.5, 0) for x in (a, b))
                    divergence = (p * (p.log() - q.log())).sum()
                    loss = loss + STATES.relation_weight * divergence / 3 / 4 / ids.shape[1]
        own = torch.tensor(row["teacher_states"]).double()
        sentence = projections[names[4]] @ mine[3][0]
        compared = torch.stack([own, *method.states.others_KH.double()])
        cosines = torch.stack([torch.cosine_similarity(sentence, other, dim=0) for other in compared])
        loss = loss - STATES.similarity_weight * torch.log_softmax(cosines / 0.5, 0)[0]
        total = total + loss / len(rows)
    total.backward()
    named = {**dict(student.named_parameters()), **projections}
    return {name: p.grad for name, p in named.items() if p.grad is not None}, total.item()


def test_micro_batches_do_not_change_the_gradient_of_states(tiny_checkpoint, tmp_path):
    """Also not of the sentence states, which are compared with the same rows in every micro-batch."""
    folder = tiny_checkpoint("bert", kind="classifier")
    method = guided(tiny_checkpoint("bert", kind="classifier", seed=1), other_states())
    rows = state_rows(labelled="uneven")
    expected, loss = by_hand_with_states(folder, method, rows)
    for batch, micro_batches in SPLITS:
        found, logged = gradient_of(folder, tmp_path, method, rows, batch, micro_batches)
        assert distance(found, expected) <= 1e-5, (batch, micro_batches)
        assert logged == pytest.approx(loss, rel=1e-5)


def test_windows_of_a_row_count_as_one_row_for_states(tiny_checkpoint, tmp_path):
    folder = tiny_checkpoint("bert", kind="classifier")
    method = guided(tiny_checkpoint("bert", kind="classifier", seed=1), other_states())
    rows = state_rows(windows=True)
    expected, loss = gradient_of(folder, tmp_path, method, rows, 8, 1)
    for batch, micro_batches in SPLITS[2:4]:
        found, logged = gradient_of(folder, tmp_path, method, rows, batch, micro_batches)
        assert distance(found, expected) <= 1e-5, (batch, micro_batches)
        assert logged == pytest.approx(loss, rel=1e-5)


def unlike_passes(model):
    """In place of dropout: the second half of a batch, which R-Drop adds, answers 1.5 times as loud."""

    def louder(module, inputs, output):
        first, second = output.logits.chunk(2)
        output.logits = torch.cat([first, 1.5 * second])
        return output

    model.register_forward_hook(louder)


@pytest.mark.parametrize("windows", [False, True])
def test_micro_batches_do_not_change_the_gradient_of_r_drop(windows, tiny_checkpoint, tmp_path):
    folder = tiny_checkpoint("bert", kind="classifier")
    rows = step_rows(labelled="uneven", windows=windows)
    model = AutoModelForSequenceClassification.from_pretrained(folder).double().eval()
    loss = torch.zeros((), dtype=torch.float64)
    for i in range(8):
        each = rows.select([i]).each_window()
        ids = [torch.tensor(each[j]["input_ids"].astype("int64"))[None] for j in range(len(each))]
        first = torch.cat([model(input_ids=window, attention_mask=torch.ones_like(window)).logits for window in ids])
        first = first.mean(dim=0)
        log_p, log_q = torch.log_softmax(first, 0), torch.log_softmax(1.5 * first, 0)
        gold = int(rows[i]["labels"])
        if gold >= 0:
            loss = loss - (log_p[gold] + log_q[gold]) / 2 / 3  # three labelled rows
        divergence = (log_p.exp() * (log_p - log_q)).sum() + (log_q.exp() * (log_q - log_p)).sum()
        loss = loss + 2.0 * divergence / 2 / 8
    loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for batch, micro_batches in SPLITS:
        found, logged = gradient_of(folder, tmp_path, "r_drop", rows, batch, micro_batches, prepare=unlike_passes)
        assert distance(found, expected) <= 1e-5, (batch, micro_batches)
        assert logged == pytest.approx(loss.item(), rel=1e-5)


def test_balanced_draws_are_what_is_trained_on(tiny_checkpoint, tmp_path):
    """Eight draws of rows with six, one and one of a class: each class comes two or three times."""
    folder = tiny_checkpoint("bert", kind="classifier")
    rows = rare_class(step_rows())
    drawn = rows.select(BalancedDraws(rows.columns["labels"], seed=42).of_epoch(0))
    assert np.bincount(drawn.columns["labels"]).tolist() == [3, 0, 3, 2]
    expected, loss = by_hand(folder, "finetune", drawn)
    assert distance(by_hand(folder, "finetune", rows)[0], expected) > 0.1
    for batch, micro_batches in SPLITS:
        found, logged = gradient_of(folder, tmp_path, "finetune", rows, batch, micro_batches, sampling="balanced")
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
    """Also where the rows do not divide by two, and where the second process has none at all.

    A student that teaches itself ends with the same average of its weights; with that of no other decay.
    """
    done = run(torchrun("tests/gradients.py", tmp_path))
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "gradients.pt")
    assert found["processes"] == 2
    for name, (method, labelled, count, _, _) in CASES.items():
        rows = step_rows(labelled=labelled, count=count, windows=name == "windows")
        if name == "balanced":
            rows = rare_class(rows)
            rows = rows.select(BalancedDraws(rows.columns["labels"], seed=42).of_epoch(0))
        expected, loss = by_hand(tmp_path / "model", method, rows)
        gradient, logged = found["cases"][name]
        assert distance(gradient, expected) <= 1e-5, name
        assert logged == pytest.approx(loss, rel=1e-5), name
    method, rows = guided(tmp_path / "teacher", other_states()), state_rows(labelled="uneven", count=7)
    expected, loss = by_hand_with_states(tmp_path / "model", method, rows)
    gradient, logged = found["cases"]["states"]
    assert distance(gradient, expected) <= 1e-5
    assert logged == pytest.approx(loss, rel=1e-5)
    assert distance(found["average"], averaged(tmp_path / "model", tmp_path, 4)) <= 1e-5
    assert distance(found["average"], averaged(tmp_path / "model", tmp_path, 4, decay=0.0)) > 0.1
