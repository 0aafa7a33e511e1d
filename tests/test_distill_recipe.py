"""recipes/distill.py with losses on states, between unlike models, and with a student that teaches itself."""

import json

import pytest
from recipe_runs import finished, refused, tiny_words
from safetensors.torch import load_file
from test_resume import RESUME, assert_same, interrupted
from transformers import AutoModelForSequenceClassification, pipeline

STATES = ["--hidden_weight", "1", "--relation_weight", "0.5", "--similarity_weight", "0.1"]
ALONE = ["--control_arm", "false"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("NLPXFER_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def words(tiny_data):
    return [*tiny_words(tiny_data), "--max_train_samples", "60"]


@pytest.fixture
def bert(tiny_checkpoint):
    return tiny_checkpoint("bert", "classifier")


@pytest.fixture
def gpt2(tiny_checkpoint):
    return tiny_checkpoint("gpt2", "classifier")


def test_states_of_a_given_teacher(words, bert, tmp_path, tiny_data):
    own = ["--teacher_name_or_path", bert, *STATES, "--unlabelled_file", tiny_data.unlabelled, *ALONE]
    run = finished("distill", tmp_path / "out", *words, *own)
    found = run.report["checks"]["preflight"]
    assert found["terms"].keys() == {"label", "soft_target", "hidden", "relation", "similarity"}
    assert all(term["gradient_norm"] > 0 for term in found["terms"].values())
    assert found["hidden_layers"] == ["0:0", "1:3"]
    assert found["labels"] == ["food", "music", "sport", "travel"]
    plain = AutoModelForSequenceClassification.from_config(
        AutoModelForSequenceClassification.from_pretrained(run.folder).config
    )
    assert load_file(run.folder / "model.safetensors").keys() == plain.state_dict().keys()
    assert not (run.folder / "checkpoints").exists()
    assert pipeline("text-classification", str(run.folder))("the goal of the match")[0]["label"] in found["labels"]


@pytest.mark.parametrize(
    ("teacher", "student", "more"),
    [
        ("gpt2", "bert", ["--kd_loss", "mse"]),
        ("bert", "gpt2", ["--similarity_weight", "1", "--similarity_loss", "relational"]),
    ],
)
def test_between_encoder_and_decoder(teacher, student, more, words, request, tmp_path):
    """Logits and sentence states go between any two models, states of tokens do not."""
    models = [request.getfixturevalue(name) for name in (teacher, student)]
    own = [*words, "--teacher_name_or_path", models[0], "--student_name_or_path", models[1], *ALONE]
    own += ["--teacher_cache", tmp_path / "cache"]
    terms = finished("distill", tmp_path / "out", *own, *more).report["checks"]["preflight"]["terms"]
    assert terms.keys() == {"label", "soft_target"} | ({"similarity"} if "--similarity_weight" in more else set())
    assert all(term["gradient_norm"] > 0 for term in terms.values())
    assert len([*(tmp_path / "cache").iterdir()]) == 1 + ("similarity" in terms), "logits, and sentence states"
    for weight in ("hidden_weight", "relation_weight"):
        message = refused("distill", tmp_path / weight, *own, f"--{weight}", "1")
        assert "have different tokenizers" in message
        assert "similarity_weight" in message
        assert not (tmp_path / weight).exists()


@pytest.mark.parametrize("own", ["states", "ema"])
def test_an_interrupted_run_goes_on_bit_for_bit(own, words, tiny_checkpoint, tmp_path, monkeypatch):
    """Projections that learn, the average, dropout, micro-batches, and the best weights of three epochs."""
    model = tiny_checkpoint("bert", "classifier", dropout=0.1)
    how = {
        "states": ["--teacher_name_or_path", model, *STATES],
        "ema": ["--model_name_or_path", model, "--self_distillation", "ema", "--ema_decay", "0.8"],
    }[own]
    batches = ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2", "--dropout", "0.1"]
    plan = [*words, *how, *batches, *ALONE]
    plan[plan.index("--num_train_epochs") + 1] = "3"
    whole = finished("distill", tmp_path / "whole", *plan)
    checkpoint = interrupted("distill", tmp_path / "out", plan, monkeypatch, 10, "distilled")
    stored = load_file(checkpoint / "model.safetensors")
    assert any(name.startswith("student_states.") for name in stored) == (own == "states")
    assert (checkpoint / "average.safetensors").is_file() == (own == "ema")
    resumed = finished("distill", tmp_path / "out", *plan, *RESUME)
    assert_same(resumed, whole)
    assert resumed.report["checks"]["preflight"] == whole.report["checks"]["preflight"]
    layers = json.loads((whole.folder / "config.json").read_text())["num_hidden_layers"]
    assert layers == (2 if own == "states" else 4)


def test_a_student_that_teaches_itself(words, bert, tmp_path, tiny_data):
    own = [
        "--model_name_or_path",
        bert,
        "--self_distillation",
        "ema",
        "--kd_weight",
        "0.5",
        "--student_num_layers",
        "2",
    ]
    run = finished("distill", tmp_path / "out", *words, *own, "--unlabelled_file", tiny_data.unlabelled)
    report = run.report
    assert [arm["name"] for arm in report["arms"]] == ["control", "distilled", "majority class"]
    assert json.loads((run.folder / "config.json").read_text())["num_hidden_layers"] == 2
    assert report["checks"]["preflight"]["terms"]["soft_target"]["rows"] > 0
    assert report["checks"]["preflight"]["warnings"] == []
    assert "teacher" not in report["checks"]
    for name in ("control", "distilled"):
        found = run.arm(name)["latency"]
        assert (found["one_row"]["rows"], found["batched"]["rows"]) == (1, 32)
        assert 0 < found["one_row"]["p50_ms"] < found["one_row"]["total_p50_ms"]
    assert run.arm("majority class")["latency"] is None
    assert "\nms a row: control " in run.out
    steps = {arm["name"]: arm["details"].get("steps") for arm in report["arms"]}
    assert steps["control"] == steps["distilled"] == 6  # 60 labelled and 120 unlabelled rows


@pytest.mark.parametrize(
    ("own", "told"),
    [
        (["--self_distillation", "ema", "--teacher_name_or_path", "x"], "teacher_name_or_path: needs another teacher"),
        (["--self_distillation", "ema", "--hidden_weight", "1"], "hidden_weight: needs another teacher"),
        (["--self_distillation", "ema", "--min_retention", "0.9"], "min_retention: needs another teacher"),
        (
            ["--search", "true", "--hidden_weight", "1", "--hidden_layers", "0:0"],
            "hidden_layers: search tries students",
        ),
        (["--student", "static", "--relation_weight", "1"], "relation_weight: a static student has no layers"),
        (["--student", "static", "--self_distillation", "ema"], "student: a static student starts from a teacher"),
        (["--ema_decay", "0.5"], "ema_decay: does nothing without self_distillation ema"),
        (["--self_distillation", "ema", "--ema_decay", "1"], "ema_decay: 1.0 is not in [0, 1)"),
        (["--kd_loss", "mse", "--temperature", "3"], "temperature: means nothing for the squared error"),
        (["--kd_loss", "huber"], "kd_loss"),
        (["--num_relation_heads", "4"], "num_relation_heads: does nothing without relation_weight"),
        (["--hidden_weight", "-1", "--kd_weight", "2"], "kd_weight: 2.0 is not between 0 and 1"),
    ],
)
def test_options_that_are_refused(own, told, words, tmp_path):
    assert told in refused("distill", tmp_path / "out", *words, *own)
    assert not (tmp_path / "out").exists()


def test_what_does_not_fit_is_refused_before_anything_is_written(words, bert, tiny_checkpoint, tmp_path, tiny_data):
    own = [*words, "--teacher_name_or_path", bert]
    cases = {
        "hidden_layers: 0:9 names layers that do not exist": ["--hidden_weight", "1", "--hidden_layers", "0:9"],
        "num_relation_heads: 5 does not divide": ["--relation_weight", "1", "--num_relation_heads", "5"],
        "sentence states are those of whole texts": ["--similarity_weight", "1", "--long_texts", "sliding_window"],
    }
    cases["activation_checkpointing: does not go together with hidden_weight"] = [
        *("--hidden_weight", "1", "--activation_checkpointing", "true")
    ]
    for told, more in cases.items():
        assert told in refused("distill", tmp_path / "out", *own, *more)
        assert not (tmp_path / "out").exists()


def test_numbers_have_one_loss_only(words, bert, tmp_path, tiny_data):
    rows = [f"{i / 10}" for i in range(60)]
    for name in ("train", "validation", "test"):
        lines = [f"text number {i} of {name},{row}" for i, row in enumerate(rows)]
        (tmp_path / f"{name}.csv").write_text("\n".join(["text,label", *lines]))
    files = [word for name in ("train", "validation", "test") for word in (f"--{name}_file", tmp_path / f"{name}.csv")]
    own = [
        *files,
        "--problem_type",
        "regression",
        "--model_name_or_path",
        bert,
        "--kd_loss",
        "mse",
        "--use_cpu",
        "true",
    ]
    message = refused("distill", tmp_path / "out", *own)
    assert "kd_loss: means nothing for a regression" in message


def test_a_searched_weight_reads_what_its_greatest_value_needs(words, bert, gpt2, tmp_path):
    own = [*words, "--teacher_name_or_path", gpt2, "--student_name_or_path", bert, "--num_trials", "2"]
    searched = ["--hidden_weight", "{choices: [0, 1]}"]
    assert "have different tokenizers" in refused("distill", tmp_path / "out", *own, *searched)
