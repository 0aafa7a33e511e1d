"""Which learning rate an arm has where none was asked for, and how large its head starts."""

from types import SimpleNamespace

import pytest
from gradients import step_rows
from recipe_runs import finished, tiny_words
from tiny import LABELS, make_rows

import nlpxfer.run
from nlpxfer.checkpoint.adapter_kinds import KINDS
from nlpxfer.checkpoint.head import head_of
from nlpxfer.checkpoint.load import load_classifier
from nlpxfer.config import RunOptions, default_learning_rate
from nlpxfer.data.schema import LabelSchema
from nlpxfer.evaluate import arms
from nlpxfer.methods.distill import Distill
from nlpxfer.methods.finetune import FineTune
from nlpxfer.problem import MULTI_LABEL, REGRESSION, SINGLE_LABEL
from nlpxfer.run import Run
from nlpxfer.train.checkpoints import RunIdentity

SCHEMA = LabelSchema(tuple(sorted(LABELS)))


@pytest.mark.parametrize(
    ("width", "rate"), [(128, 3e-4), (512, 3e-4), (513, 5e-5), (768, 5e-5), (1024, 2e-5), (4096, 2e-5)]
)
def test_the_wider_the_lower(width, rate):
    assert default_learning_rate(width) == rate
    assert default_learning_rate(width, gently=True) == pytest.approx(rate / 10)


@pytest.mark.parametrize(
    ("given", "problem_type", "size"),
    [
        ({}, SINGLE_LABEL, 0.02),
        ({}, MULTI_LABEL, 0),
        ({}, REGRESSION, 0),
        ({"num_trained_layers": 0}, SINGLE_LABEL, 0),
        ({"num_trained_layers": 1}, SINGLE_LABEL, 0.02),
        ({"linear_probe_size": 0.0}, SINGLE_LABEL, 0),
        ({"linear_probe_size": 0.5, "num_trained_layers": 0}, SINGLE_LABEL, 0.5),
    ],
)
def test_how_large_a_probe_starts(given, problem_type, size):
    assert RunOptions(**given).probe_size(problem_type, rows=10_000) == size


@pytest.mark.parametrize(
    ("given", "rows", "small"),
    [
        ({"num_train_epochs": 2.0}, 30 * 32, True),
        ({"num_train_epochs": 2.0}, 29 * 32, False),
        ({"num_train_epochs": 2.0}, 29 * 32 + 1, True),
        ({"num_train_epochs": 2.0, "dataloader_drop_last": True}, 29 * 32 + 1, False),
        ({"num_train_epochs": 2.0, "gradient_accumulation_steps": 2}, 30 * 32, False),
        ({"max_steps": 59}, 10_000, False),
        ({"max_steps": 60}, 10, True),
    ],
)
def test_few_steps_start_from_a_sure_probe(given, rows, small):
    assert RunOptions(**given).probe_size(SINGLE_LABEL, rows) == (0.02 if small else 0)


@pytest.mark.parametrize(
    ("given", "problem_type", "head_kept", "rate"),
    [
        ({"linear_probe_size": 0.02}, SINGLE_LABEL, False, 3e-4),
        ({"linear_probe_size": 0.02}, SINGLE_LABEL, True, 3e-5),
        ({"linear_probe": False, "linear_probe_size": None}, MULTI_LABEL, False, 3e-4),
        ({"linear_probe_size": 0.0}, SINGLE_LABEL, False, 3e-5),
        ({"learning_rate": 0.5, "linear_probe_size": 0.0}, SINGLE_LABEL, True, 0.5),
    ],
)
def test_a_large_head_wants_a_low_rate(given, problem_type, head_kept, rate):
    run = Run.__new__(Run)
    run.options, run.data = (
        RunOptions(**given),
        SimpleNamespace(train=range(1000), schema=SimpleNamespace(problem_type=problem_type)),
    )
    start = SimpleNamespace(hidden_size=384, head_kept=head_kept, is_static=False)
    assert run.start_of_training(start)["learning_rate"] == rate
    start.is_static = True
    assert run.start_of_training(start)["learning_rate"] == run.options.learning_rate_or(0.01)


@pytest.mark.parametrize(
    ("width", "gently", "rate"),
    [(384, False, 2e-3), (384, True, 6e-4), (513, False, 1e-3), (768, True, 3e-4), (2048, True, 9e-5)],
)
def test_rates_of_adapters(width, gently, rate):
    assert KINDS["lora"].learning_rate_for(width, gently=gently) == rate
    assert KINDS["bitfit"].learning_rate_for(width, gently=gently) == min(rate, 3e-4 if gently else 1e-3)


@pytest.fixture
def rates(monkeypatch):
    """Learning rate of each arm that is trained, by its name."""
    seen = {}

    def train_arm(name, *, options, **rest):
        seen[name] = options.learning_rate
        return arms.train_arm(name, options=options, **rest)

    monkeypatch.setattr(nlpxfer.run, "train_arm", train_arm)
    return seen


@pytest.mark.parametrize(
    ("recipe", "own", "expected"),
    [
        ("finetune", [], {"fine-tuned": 3e-4}),
        ("adapters", ["--adapter", "lora", "--full_arm", "true"], {"adapter": 2e-3, "full": 3e-4}),
        ("distill", ["--student_num_layers", "1"], {"teacher": 3e-4, "distilled": 3e-4, "control": 3e-4}),
        ("distill", ["--student", "static"], {"teacher": 3e-4, "distilled": 0.01, "control": 0.01}),
        ("distill", ["--self_distillation", "ema"], {"distilled": 3e-4, "control": 3e-4}),
    ],
)
def test_the_rate_that_is_told_is_the_one_that_was_used(
    recipe, own, expected, rates, tiny_data, tiny_checkpoint, tmp_path, monkeypatch
):
    monkeypatch.setenv("NLPXFER_CACHE", str(tmp_path / "cache"))
    words = [*tiny_words(tiny_data, tiny_checkpoint("bert"), steps=2), *own]
    at = words.index("--learning_rate")
    rest = ["--linear_probe_size", "0.02"]
    run = finished(recipe, tmp_path / "out", *words[:at], *words[at + 2 :], *rest)
    assert rates == expected
    assert run.run["config"]["linear_probe_size"] == 0.02
    told = next(name for name in ("distilled", "adapter", "fine-tuned") if name in expected)
    assert run.run["config"]["learning_rate"] == expected[told]


def test_a_student_of_many_texts_starts_small_where_its_teacher_of_few_labels_does_not(
    tiny_data, tiny_checkpoint, tmp_path, monkeypatch
):
    """16 labelled rows are 8 steps for the teacher; the student takes more than 60, and so does its control."""
    monkeypatch.setenv("NLPXFER_CACHE", str(tmp_path / "cache"))
    sizes, plain = [], arms.start_from_linear_probe_

    def start(*arguments, size, **rest):
        sizes.append(size)
        return plain(*arguments, size=size, **rest)

    monkeypatch.setattr(arms, "start_from_linear_probe_", start)
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(f"{row['text']} {number}" for number, row in enumerate(make_rows(150, seed=8))))
    words = tiny_words(tiny_data, tiny_checkpoint("bert", layers=2), epochs=2)
    own = ["--student_num_layers", "1", "--max_train_samples", "16", "--per_device_train_batch_size", "4"]
    finished("distill", tmp_path / "out", *words, *own, "--unlabelled_file", str(file))
    assert sizes == [0.0, 0.02, 0.02]


def test_a_static_checkpoint_goes_on_at_its_rate(rates, tiny_data, tiny_checkpoint, tmp_path, monkeypatch):
    """At the rate of its width, with a head that is large already, it would hardly learn."""
    monkeypatch.setenv("NLPXFER_CACHE", str(tmp_path / "cache"))
    teacher = [*tiny_words(tiny_data, tiny_checkpoint("bert", "classifier"), steps=2)]
    at = teacher.index("--learning_rate")
    words = [*teacher[:at], *teacher[at + 2 :]]
    static = finished("distill", tmp_path / "static", *words, "--student", "static").folder
    rates.clear()
    start = words.index("--model_name_or_path")
    finished("finetune", tmp_path / "more", *words[:start], *words[start + 2 :], "--model_name_or_path", static)
    assert rates == {"fine-tuned": 0.01}
    finished("distill", tmp_path / "taught", *words, "--student_name_or_path", static)
    assert rates["distilled"] == rates["control"] == 0.01


@pytest.mark.parametrize(
    ("method", "given", "small"),
    [
        (FineTune(), {"max_steps": 60}, True),
        (FineTune(), {"max_steps": 59}, False),
        (Distill(), {"linear_probe_size": 0.02}, True),
        (Distill(kd_loss="mse"), {"linear_probe_size": 0.02}, False),
    ],
)
def test_a_probe_is_scaled_down_where_sizes_do_not_matter(method, given, small, tiny_checkpoint, tmp_path):
    shared = {"use_cpu": True, "bf16": False, "disable_tqdm": True, "output_dir": str(tmp_path)}
    rows = step_rows("bert")
    prepared = arms.prepare_arm(
        build=lambda: load_classifier(str(tiny_checkpoint("bert")), schema=SCHEMA),
        method=method,
        split=lambda tokenizer: arms.Splits(rows, rows, rows),
        schema=SCHEMA,
        options=RunOptions(**shared, **given),
        identity=RunIdentity({}, {}),
        sampling="natural",
    )
    weight = head_of(prepared.trainer.model).final.weight
    size = weight.detach().square().mean().sqrt().item()
    assert size == pytest.approx(0.02, rel=1e-3) if small else size > 0.05
