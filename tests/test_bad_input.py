"""What a user can get wrong: exit code 2, a message that names what is needed, no traceback, nothing half done."""

import json
import shutil
from collections import namedtuple

import pytest
import torch
from recipe_runs import KEYS, QUICK, call, files, refused, tiny_words
from tiny import LABELS, make_rows, write_csv

each_recipe = pytest.mark.parametrize("key", KEYS)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NLPXFER_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def bert(tiny_checkpoint):
    return tiny_checkpoint("bert")


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def with_train(data, path, model):
    """Options with another training file."""
    named = files(data)
    named[named.index("--train_file") + 1] = str(path)
    return [*QUICK, *named, "--model_name_or_path", str(model)]


def rows_of(count=40):
    return make_rows(count, seed=9)


# --- data files ---------------------------------------------------------------------------------------------------


@each_recipe
def test_a_missing_file(key, tiny_data, bert, out):
    near = tiny_data.train.with_name("trian.csv")
    message = refused(key, out, *with_train(tiny_data, near, bert))
    assert "trian.csv" in message
    assert "train.csv" in message.replace("trian.csv", "")


@each_recipe
def test_a_missing_column(key, tiny_data, bert, out):
    message = refused(key, out, *tiny_words(tiny_data, bert, key=key), "--text_column", "txt")
    assert "'txt'" in message
    assert "text" in message.replace("'txt'", "")


FILES = {
    "empty file": (b"", ["empty"]),
    "header only": (b"text,label\n", ["no rows"]),
    "NUL byte": (b"text,label\nbread,food\nche\x00ese,food\ngoal,sport\n", ["NUL", "line 3"]),
    "broken UTF-8": (b"text,label\nbread,food\nche\xffese,food\ngoal,sport\n", ["UTF-8", "line 3"]),
    "label is a fraction": (b"text,label\nbread,0.5\ncheese,1.0\ngoal,2.25\n", ["0.5", "row 1", "regression"]),
    "label is missing": (b"text,label\nbread,food\ncheese,\ngoal,sport\n", ["'label'", "row 2", "line 3"]),
    "label is blank": (b"text,label\nbread,food\ncheese,  \ngoal,sport\n", ["'label'", "row 2"]),
    "text is blank": (b"text,label\nbread,food\n   ,food\ngoal,sport\n", ["'text'", "row 2"]),
    "one class": (b"text,label\nbread,food\ncheese,food\nsoup,food\n", ["one label", "'food'"]),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_cannot_be_used(name, tiny_data, bert, out, tmp_path):
    content, needles = FILES[name]
    path = tmp_path / "mine.csv"
    path.write_bytes(content)
    for key in KEYS:
        message = refused(key, out, *with_train(tiny_data, path, bert))
        assert "mine.csv" in message
        for needle in needles:
            assert needle in message


def test_labels_of_jsonl_that_are_null_or_fractions(tiny_data, bert, out, tmp_path):
    path = tmp_path / "mine.jsonl"
    for value, needle in ((None, "is missing"), (0.25, "0.25")):
        lines = [{"text": "bread", "label": "food"}, {"text": "goal", "label": value}]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        message = refused("finetune", out, *with_train(tiny_data, path, bert))
        assert needle in message
        assert "row 2" in message


@each_recipe
def test_a_class_with_one_row_and_splits_to_carve(key, bert, out, tmp_path):
    path = write_csv(tmp_path / "mine.csv", [*rows_of(), {"text": "a rare bird", "label": "animals"}])
    message = refused(key, out, *QUICK, "--train_file", str(path), "--model_name_or_path", str(bert))
    assert "'animals' has 1, row 41" in message
    assert "each class needs 3 rows" in message


@each_recipe
@pytest.mark.parametrize("split", ["validation", "test"])
def test_labels_that_training_does_not_have(key, split, tiny_data, bert, out, tmp_path):
    path = write_csv(tmp_path / "mine.csv", [*rows_of(), {"text": "a match", "label": "sports"}])
    words = tiny_words(tiny_data, bert, key=key)
    words[words.index(f"--{split}_file") + 1] = str(path)
    message = refused(key, out, *words)
    assert "mine.csv, row 41" in message
    assert "'sport' in place of 'sports'" in message


def test_unlabelled_texts_that_are_all_in_the_test_file(tiny_data, bert, out, tmp_path):
    import csv

    with tiny_data.test.open(newline="") as file:
        texts = [row["text"] for row in csv.DictReader(file)]
    path = tmp_path / "texts.txt"
    path.write_text("".join(text + "\n" for text in texts))
    words = [*tiny_words(tiny_data, bert), "--unlabelled_file", str(path)]
    assert "all 80 rows also stand in train, validation or test" in refused("distill", out, *words)


# --- checkpoints --------------------------------------------------------------------------------------------------


@each_recipe
def test_a_checkpoint_that_does_not_exist(key, tiny_data, tmp_path, out):
    message = refused(key, out, *tiny_words(tiny_data, tmp_path / "berd", key=key))
    assert "does not exist" in message


def damaged(folder, how):
    weights = folder / "model.safetensors"
    if how == "no weights":
        weights.unlink()
    elif how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "pickle only":
        weights.unlink()
        torch.save({}, folder / "pytorch_model.bin")
    elif how == "remote code":
        config = json.loads((folder / "config.json").read_text())
        config["model_type"] = "own"
        config["auto_map"] = {"AutoModelForSequenceClassification": "modeling_own.Own"}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "modeling_own.py").write_text("raise SystemExit('this code must never run')\n")
    elif how == "no tokenizer":
        (folder / "tokenizer.json").unlink()
    return folder


DAMAGES = {
    "no weights": "holds no weights",
    "truncated": "bytes, but its header promises",
    "pickle only": "only pytorch_model.bin",
    "remote code": "asks to run its own code",
    "no tokenizer": "has no tokenizer",
}


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("role", ["model", "teacher", "student"])
def test_a_checkpoint_that_cannot_be_used(how, role, tiny_data, bert, tiny_copy, out):
    folder = damaged(tiny_copy("bert", kind="classifier"), how)
    words = tiny_words(tiny_data, folder if role == "model" else bert)
    words += [] if role == "model" else [f"--{role}_name_or_path", str(folder)]
    assert DAMAGES[how] in refused("distill", out, *words)
    if role == "model":
        assert DAMAGES[how] in refused("finetune", out, *tiny_words(tiny_data, folder))


def test_a_teacher_with_other_labels(tiny_data, tiny_checkpoint, out):
    teacher = tiny_checkpoint("bert", kind="classifier", labels=("animals", *LABELS[1:]))
    message = refused("distill", out, *tiny_words(tiny_data), "--teacher_name_or_path", str(teacher))
    assert "only in teacher (1): animals" in message
    assert "only in data (1): food" in message


def test_a_teacher_that_was_never_fine_tuned(tiny_data, bert, out):
    message = refused("distill", out, *tiny_words(tiny_data), "--teacher_name_or_path", str(bert))
    assert "is not a classifier" in message


def test_a_teacher_whose_labels_have_no_names(tiny_data, tiny_checkpoint, out):
    teacher = tiny_checkpoint("bert", kind="classifier", labels=tuple(f"LABEL_{i}" for i in range(4)))
    message = refused("distill", out, *tiny_words(tiny_data), "--teacher_name_or_path", str(teacher))
    assert "placeholder names" in message


@each_recipe
def test_texts_longer_than_the_model_can_read(key, tiny_data, bert, out):
    words = tiny_words(tiny_data, bert, key=key)
    words[words.index("--max_length") + 1] = "65"
    message = refused(key, out, *words)
    assert "max_length: 65 is longer than the 64 tokens" in message
    assert "--max_length 64" in message


def test_texts_longer_than_the_teacher_can_read(tiny_data, tiny_checkpoint, out):
    teacher = tiny_checkpoint("bert", kind="classifier", max_position_embeddings=24)
    words = [*tiny_words(tiny_data), "--student_name_or_path", str(tiny_checkpoint("gpt2"))]
    message = refused("distill", out, *words, "--teacher_name_or_path", str(teacher))
    assert "max_length: 32 is longer than the 24 tokens" in message


def test_mean_pooling_of_a_family_that_cannot(tiny_data, tiny_checkpoint, out):
    message = refused("finetune", out, *tiny_words(tiny_data, tiny_checkpoint("gpt2")), "--pooling", "mean")
    assert "cannot be read as a mean" in message


# --- options ------------------------------------------------------------------------------------------------------

OPTIONS = {
    "unknown": (["--temprature", "2"], ["temprature", "unknown option"]),
    "wrong type": (["--num_seeds", "two"], ["num_seeds", "two"]),
    "not finite": (["--learning_rate", "nan"], ["learning_rate", "nan"]),
    "value missing": (["--seed"], ["seed"]),
    "twice": (["--seed", "1", "--seed", "2"], ["seed: given twice"]),
    "not supported": (["--hub_token", "secret"], ["hub_token", "HF_TOKEN"]),
    "out of range": (["--num_train_epochs", "0"], ["num_train_epochs", "not positive"]),
    "not one of": (["--pooling", "max"], ["pooling", "mean"]),
    "all at once": (["--num_seeds", "0", "--max_length", "1", "--wrong", "1"], ["num_seeds", "max_length", "wrong"]),
    "no such file": (["--report_to", "carrier_pigeon"], ["carrier_pigeon", "none"]),
    "not installed": (["--report_to", "tensorboard"], ["tensorboard", "pip install tensorboard"]),
}


@each_recipe
@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_that_cannot_be_used(key, name, tmp_path, monkeypatch, out):
    monkeypatch.setattr("transformers.integrations.get_available_reporting_integrations", lambda: [])
    words, needles = OPTIONS[name]
    if key == "features" and "--report_to" in words:
        needles = ["report_to: has no effect here"]
    message = refused(key, out, *words)
    for needle in needles:
        assert needle in message
    assert not out.exists()


DISTILLING = {
    "temperature 0": (["--temperature", "0"], "temperature: 0.0 is not above 0"),
    "kd_weight 2": (["--kd_weight", "2"], "kd_weight: 2.0 is not between 0 and 1"),
    "two students": (["--student_name_or_path", "x", "--student_num_layers", "2"], "cannot be combined"),
    "teacher without epochs": (["--teacher_num_train_epochs", "0"], "teacher_num_train_epochs: 0.0 is not positive"),
}


@pytest.mark.parametrize("name", DISTILLING)
def test_an_option_of_distilling(name, out):
    words, needle = DISTILLING[name]
    assert needle in refused("distill", out, *words)


LAYERS = {
    "too many": (["--student_num_layers", "5"], "cannot be cut from 4"),
    "none": (["--student_num_layers", "0"], "student_num_layers: 0 is below 1"),
    "not there": (["--student_layers", "0,4"], "0 to 3"),
    "not ascending": (["--student_layers", "2,0"], "must ascend"),
    "no numbers": (["--student_layers", "top"], "bottom"),
    "contradiction": (["--student_layers", "0,1", "--student_num_layers", "3"], "2 layers, but 3"),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_that_cannot_be_cut(name, tiny_data, bert, out):
    words, needle = LAYERS[name]
    assert needle in refused("distill", out, *tiny_words(tiny_data, bert), *words)


def test_a_configuration_file_that_is_wrong(tmp_path, out):
    path = tmp_path / "mine.yaml"
    path.write_text("learning_rate: fast\nkd_wieght: 0.5\n")
    ended = call_with_file(path, out)
    assert ended.code == 2
    assert "kd_wieght" in ended.err
    assert "did you mean kd_weight" in ended.err
    assert "learning_rate" in ended.err


def call_with_file(path, out):
    """The YAML file comes first on the command line."""
    import contextlib
    import io

    from recipe_runs import Ended

    from nlpxfer.cli import run_main
    from nlpxfer.recipes import load_recipe

    err = io.StringIO()
    with contextlib.redirect_stderr(err), pytest.raises(SystemExit) as left:
        run_main(load_recipe("distill").main, [str(path), "--output_dir", str(out)])
    return Ended(left.value.code, "", err.getvalue(), out)


# --- places -------------------------------------------------------------------------------------------------------


@each_recipe
@pytest.mark.parametrize("words", [[], ["--overwrite", "true"]])
def test_a_folder_with_files_of_somebody_else(key, words, tiny_data, bert, out):
    out.mkdir()
    (out / "thesis.tex").write_text("ten years of work")
    message = refused(key, out, *tiny_words(tiny_data, bert, key=key), *words)
    assert "thesis.tex" in message
    assert [path.name for path in out.iterdir()] == ["thesis.tex"]


@each_recipe
def test_no_space_on_the_disk(key, tiny_data, bert, out, monkeypatch):
    usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 10**5, 10**5))
    message = refused(key, out, *tiny_words(tiny_data, bert, key=key))
    assert "0.00 GB free" in message
    assert not out.exists() or not list(out.iterdir())


# --- training -----------------------------------------------------------------------------------------------------


@each_recipe
@pytest.mark.parametrize("accumulation", ["1", "3"])
def test_a_loss_that_is_not_finite_stops_the_run(key, accumulation, tiny_data, bert, out):
    words = tiny_words(tiny_data, bert, rate="1e30", epochs=2, key=key)
    if key == "features":
        words += ["--per_device_train_batch_size", "60"]  # several steps: a saturated layer bears the first
    else:
        words += ["--gradient_accumulation_steps", accumulation, "--warmup_steps", "0"]
    message = refused(key, out, *words)
    assert "learning_rate" in message
    assert not list(out.rglob("*.safetensors"))


def test_a_gradient_that_is_not_finite_stops_the_run(tiny_data, bert, out, monkeypatch):
    """The loss is fine and its gradient is not: the step must not be taken, or all weights are lost."""
    from nlpxfer.losses import classification

    plain = classification.gold_loss

    def steep(*arguments, **options):
        rows_B = plain(*arguments, **options)
        zero_B = (rows_B - rows_B.detach()).clamp(min=0)
        return rows_B + zero_B.sqrt()  # 0, with an infinite slope

    monkeypatch.setattr("nlpxfer.methods.finetune.gold_loss", steep)
    message = refused("finetune", out, *tiny_words(tiny_data, bert))
    assert "gradient" in message
    assert not list(out.rglob("*.safetensors"))


def test_a_fault_of_the_program_is_not_hidden(tiny_data, bert, out, monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("a bug")

    monkeypatch.setattr("nlpxfer.methods.finetune.gold_loss", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        call("finetune", out, *tiny_words(tiny_data, bert))
    assert not (out / "report.json").exists()
