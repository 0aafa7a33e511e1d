"""Saving: complete or not at all, without paths of this machine, and never over foreign files."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from tiny import FAMILIES, LABELS
from transformers import pipeline

from nlpxfer.checkpoint import (
    ensure_output_folder,
    load_classifier,
    load_teacher,
    save_classifier,
    tokenizer_fingerprint,
)
from nlpxfer.checkpoint.own_files import mark_unfinished, remove_own
from nlpxfer.checkpoint.save import check_free_space, held, refuse_inputs_below
from nlpxfer.data.schema import LabelSchema
from nlpxfer.errors import CheckpointError, LabelError, NoSpaceError, NotFiniteError, OutputExistsError
from nlpxfer.train.checkpoints import RunIdentity, seal

SCHEMA = LabelSchema(LABELS)
TEXTS = ["the goal of the match", "bread and cheese", "we took the train to the airport"]


@pytest.fixture
def load(tiny_checkpoint):
    return lambda family="bert": load_classifier(str(tiny_checkpoint(family)), schema=SCHEMA)


@pytest.mark.parametrize("family", FAMILIES)
def test_pipeline_loads_what_was_saved(load, family, tmp_path):
    checkpoint = load(family)
    folder = save_classifier(checkpoint.model, checkpoint.tokenizer, SCHEMA, tmp_path / "out")
    classify = pipeline("text-classification", model=str(folder), top_k=None)
    found = classify(TEXTS, batch_size=3)
    batch = checkpoint.tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        shares = checkpoint.model(**batch).logits.softmax(-1)
    for row, scores in enumerate(found):
        assert {score["label"] for score in scores} == set(LABELS)
        for score in scores:
            expected = shares[row, SCHEMA.encode(score["label"])].item()
            assert score["score"] == pytest.approx(expected, abs=1e-5)
    again = load_teacher(str(folder), schema=SCHEMA)
    assert again.weights_sha256 == checkpoint.weights_sha256
    assert again.tokenizer_sha256 == tokenizer_fingerprint(checkpoint.tokenizer)


def test_folder_holds_the_promised_files_and_no_paths(load, tmp_path):
    checkpoint = load()
    folder = save_classifier(checkpoint.model, checkpoint.tokenizer, SCHEMA, tmp_path / "out")
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "labels.json"}
    config = json.loads((folder / "config.json").read_text())
    assert config["id2label"] == {str(index): name for index, name in enumerate(LABELS)}
    assert config["label2id"] == {name: index for index, name in enumerate(LABELS)}
    assert config["problem_type"] == "single_label_classification"
    assert LabelSchema.load(folder) == SCHEMA
    for path in folder.glob("*.json"):
        assert str(checkpoint.folder.parent) not in path.read_text()
        assert "/tmp" not in path.read_text()


def test_whoever_may_read_one_file_may_read_all(load, tmp_path):
    checkpoint = load()
    (tmp_path / "new").write_text("")
    folder = save_classifier(checkpoint.model, checkpoint.tokenizer, SCHEMA, tmp_path / "out")
    assert {path.stat().st_mode for path in folder.iterdir()} == {(tmp_path / "new").stat().st_mode}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite_weights_are_not_saved(load, tmp_path, value):
    checkpoint = load()
    with torch.no_grad():
        checkpoint.model.bert.pooler.dense.bias[3] = value
    with pytest.raises(NotFiniteError, match=r"bert.pooler.dense.bias"):
        save_classifier(checkpoint.model, checkpoint.tokenizer, SCHEMA, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_wrong_size_and_wrapped_models_are_refused(load, tmp_path):
    checkpoint = load()
    with pytest.raises(LabelError, match="4 outputs, the schema 2 names"):
        save_classifier(checkpoint.model, checkpoint.tokenizer, LabelSchema(("a", "b")), tmp_path / "out")
    with pytest.raises(CheckpointError, match="no plain transformers model"):
        save_classifier(torch.nn.DataParallel(checkpoint.model), checkpoint.tokenizer, SCHEMA, tmp_path / "out")


def test_other_files_stay_and_stale_shards_go(load, tmp_path):
    checkpoint = load()
    folder = tmp_path / "out"
    (folder / "checkpoints" / "checkpoint-1").mkdir(parents=True)
    (folder / "report.json").write_text("{}")
    (folder / "model.safetensors.index.json").write_text("{}")
    (folder / "model-00001-of-00002.safetensors").write_text("old")
    save_classifier(checkpoint.model, checkpoint.tokenizer, SCHEMA, folder)
    assert (folder / "checkpoints" / "checkpoint-1").is_dir()
    assert (folder / "report.json").exists()
    assert not (folder / "model.safetensors.index.json").exists()
    assert not (folder / "model-00001-of-00002.safetensors").exists()


@pytest.mark.parametrize("step", range(6))
def test_interruption_leaves_nothing_that_looks_complete(load, tmp_path, monkeypatch, step):
    """Stop before the n-th rename: the folder either has no config.json, or is complete."""
    checkpoint = load()
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "config.json").write_text('{"old": true}')
    real, done = Path.replace, []

    def replace(path, target):
        if Path(target).parent == folder:
            if len(done) == step:
                raise KeyboardInterrupt
            done.append(Path(target).name)
        return real(path, target)

    monkeypatch.setattr(Path, "replace", replace)
    if step < 5:
        with pytest.raises(KeyboardInterrupt):
            save_classifier(checkpoint.model, checkpoint.tokenizer, SCHEMA, folder)
        assert not (folder / "config.json").exists()
    else:
        save_classifier(checkpoint.model, checkpoint.tokenizer, SCHEMA, folder)
        assert done[-1] == "config.json"
        load_teacher(str(folder), schema=SCHEMA)
    assert not list(folder.glob(".*"))


def test_fault_while_writing_keeps_the_old_model(load, tmp_path, monkeypatch):
    checkpoint = load()
    folder = save_classifier(checkpoint.model, checkpoint.tokenizer, SCHEMA, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(type(checkpoint.tokenizer), "save_pretrained", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_classifier(checkpoint.model, checkpoint.tokenizer, SCHEMA, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_saving_is_quiet(load, tmp_path, capfd, caplog):
    checkpoint = load()
    with caplog.at_level(logging.INFO):
        save_classifier(checkpoint.model, checkpoint.tokenizer, SCHEMA, tmp_path / "out")
    assert "model shards" not in "".join(capfd.readouterr())
    assert "Saved BertForSequenceClassification with 4 labels." in caplog.text


def test_output_folder_is_made_or_refused(tmp_path):
    folder = tmp_path / "a" / "out"
    assert ensure_output_folder(folder) == folder
    assert folder.is_dir()
    ensure_output_folder(folder)
    (folder / "config.json").write_text("{}")
    with pytest.raises(OutputExistsError, match="is not empty"):
        ensure_output_folder(folder)
    with pytest.raises(OutputExistsError, match="is a file"):
        ensure_output_folder(folder / "config.json", overwrite=True)


RUN = json.dumps({"recipe": "finetune", "config": {}})


def written(folder, *names, **contents):
    """A folder with these files, of which `run_json` and the like have a content of their own."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    for name, content in contents.items():
        (folder / name.replace("_", ".")).write_text(content)
    return folder


def everything(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_overwrite_clears_own_files_only(tmp_path):
    folder = tmp_path / "out"
    (folder / "checkpoints" / "checkpoint-5").mkdir(parents=True)
    written(folder, "config.json", "model.safetensors", "model-00001-of-00002.safetensors", run_json=RUN)
    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputExistsError, match=r"holds thesis.tex, which nlpxfer did not write"):
        ensure_output_folder(folder, overwrite=True)
    assert len(list(folder.iterdir())) == 6
    (folder / "thesis.tex").unlink()
    ensure_output_folder(folder, overwrite=True)
    assert list(folder.iterdir()) == []


OWN = [
    "README.md",
    "adapter/adapter_model.safetensors",
    "checkpoints/distilled-42/checkpoint-10/model.safetensors",
    "checkpoints/distilled-42/checkpoint-10/optimizer_0/__0_0.distcp",
    "checkpoints/distilled-42/finished/.nlpxfer-staging-ab12/anything",
    "checkpoints/distilled-42/finished/adapter/base.json",
    "checkpoints/ladder/2-layers/checkpoint-3/optimizer.pt",
    "checkpoints/search/study.log",
    "checkpoints/search/trial-3/checkpoint-7/rng_state_1.pth",
    "onnx/model_int8.onnx",
    "predictions/.0123456789ab.out_of_fold.jsonl",
    "predictions/test.jsonl",
    "tensorboard/teacher-1/events.out.tfevents.1.host.2.0",
]


def test_what_a_run_can_have_written_is_overwritten(tmp_path):
    folder = written(tmp_path, *OWN, run_json=RUN)
    ensure_output_folder(folder, overwrite=True)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    "name",
    [
        "adapter/notes.txt",
        "checkpoints/distilled-42/checkpoint-10/notes.txt",
        "checkpoints/distilled-42/model.safetensors",
        "checkpoints/mine/weights.pt",
        "int8/old/config.json",
        "onnx/model.py",
        "predictions/my_labelled.csv",
        "teacher/thesis.tex",
        "tensorboard/notes.md",
    ],
)
def test_overwrite_looks_into_folders(name, tmp_path):
    folder = written(tmp_path, *OWN, name, run_json=RUN)
    before = everything(folder)
    with pytest.raises(OutputExistsError, match=f"it holds {name}, which nlpxfer did not write"):
        ensure_output_folder(folder, overwrite=True)
    assert everything(folder) == before


@pytest.mark.parametrize("name", ["run.json", "report.json", "labels.json"])
@pytest.mark.parametrize("content", ["x", "[]", "{}", '{"recipe": "soup"}'])
def test_known_names_alone_do_not_make_a_folder_a_run(name, content, tmp_path):
    """A model's folder has them too, downloaded or somebody's own."""
    folder = written(tmp_path, "config.json", "model.safetensors", "tokenizer.json", "README.md")
    (folder / name).write_text(content)
    before = everything(folder)
    with pytest.raises(OutputExistsError, match="nothing in it shows that a run of nlpxfer wrote it"):
        ensure_output_folder(folder, overwrite=True)
    assert everything(folder) == before


def test_a_saved_model_is_overwritten(load, tmp_path):
    checkpoint = load()
    folder = save_classifier(checkpoint.model, checkpoint.tokenizer, SCHEMA, tmp_path / "out")
    ensure_output_folder(folder, overwrite=True)
    assert list(folder.iterdir()) == []


def test_what_a_manifest_lists_is_overwritten_and_what_it_does_not_is_not(tmp_path):
    """Names that are not known beforehand: a later transformers may write others."""
    folder, place = tmp_path, "checkpoints/teacher-1/checkpoint-2"
    written(folder, f"{place}/later.bin")
    seal(folder / place, RunIdentity({}, {}), 2)
    (folder / place / "notes.txt").write_text("years of work")
    with pytest.raises(OutputExistsError, match=f"holds {place}/notes.txt, which"):
        ensure_output_folder(folder, overwrite=True)
    (folder / place / "notes.txt").unlink()
    ensure_output_folder(folder, overwrite=True)
    assert list(folder.iterdir()) == []


def test_links_in_folders_are_not_removed(tmp_path):
    folder = written(tmp_path / "out", *OWN, run_json=RUN)
    (tmp_path / "mine").mkdir()
    (folder / "checkpoints" / "far-1").symlink_to(tmp_path / "mine")
    with pytest.raises(OutputExistsError, match="holds checkpoints/far-1, which"):
        ensure_output_folder(folder, overwrite=True)


def test_overwrite_does_not_follow_links(tmp_path):
    target = tmp_path / "real"
    (target / "checkpoints").mkdir(parents=True)
    (tmp_path / "out").symlink_to(target)
    with pytest.raises(OutputExistsError, match="it is a link"):
        ensure_output_folder(tmp_path / "out", overwrite=True)
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "checkpoints").symlink_to(target)
    with pytest.raises(OutputExistsError, match="holds checkpoints"):
        ensure_output_folder(folder, overwrite=True)
    assert (target / "checkpoints").is_dir()


@pytest.mark.parametrize(
    "names",
    [
        ["README.md", "config.json", "model.safetensors"],
        ["checkpoints/mine/weights.pt"],
        ["checkpoints/checkpoint-500/model.safetensors", "checkpoints/checkpoint-500/trainer_state.json"],
        ["checkpoints/unfinished.json"],  # somebody else's: it holds an x
        ["slurm-12.out"],
    ],
    ids=lambda names: names[0],
)
def test_resuming_needs_an_unfinished_run(names, tmp_path):
    folder = written(tmp_path, *names)
    before = everything(folder)
    with pytest.raises(OutputExistsError, match="is not empty and holds no unfinished run"):
        ensure_output_folder(folder, resume=True)
    assert everything(folder) == before


def test_an_empty_folder_and_an_unfinished_run_are_resumed(tmp_path):
    ensure_output_folder(tmp_path / "new", resume=True)
    ensure_output_folder(tmp_path / "new", resume=True)
    marked = written(tmp_path / "marked", "slurm-12.out", "checkpoints/teacher-1/checkpoint-2/optimizer.pt")
    mark_unfinished(marked, "distill")
    ensure_output_folder(marked, resume=True)
    before_marks = written(tmp_path / "earlier", "checkpoints/teacher-1/checkpoint-2/optimizer.pt")
    seal(before_marks / "checkpoints/teacher-1/checkpoint-2", RunIdentity({}, {}), 2)
    ensure_output_folder(before_marks, resume=True)
    assert len(everything(marked)) == 3
    assert len(everything(before_marks)) == 2


def test_a_folder_that_holds_the_mark_alone_is_as_good_as_empty(tmp_path):
    mark_unfinished(tmp_path, "features")
    ensure_output_folder(tmp_path)
    (tmp_path / "checkpoints" / "notes.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match="is not empty"):
        ensure_output_folder(tmp_path)
    with pytest.raises(OutputExistsError, match="holds checkpoints/notes.txt, which nlpxfer did not write"):
        ensure_output_folder(tmp_path, overwrite=True)
    (tmp_path / "checkpoints" / "notes.txt").unlink()
    (tmp_path / "checkpoints" / "teacher-1" / "checkpoint-2").mkdir(parents=True)  # of a loss that was not finite
    ensure_output_folder(tmp_path)
    (tmp_path / "checkpoints" / "teacher-1" / "checkpoint-2" / "optimizer.pt").write_text("")
    with pytest.raises(OutputExistsError, match="is not empty"):
        ensure_output_folder(tmp_path)
    ensure_output_folder(tmp_path, overwrite=True)
    assert list(tmp_path.iterdir()) == []


def test_one_run_at_a_time_keeps_a_folder(tmp_path):
    with held(tmp_path):
        with pytest.raises(OutputExistsError, match="Another run is writing"), held(tmp_path):
            pass
        other = [sys.executable, "-c", f"from nlpxfer.checkpoint.save import held\nwith held({str(tmp_path)!r}): pass"]
        assert "Another run is writing" in subprocess.run(other, capture_output=True, text=True).stderr
    with held(tmp_path):
        assert list(tmp_path.iterdir()) == []


def test_a_folder_that_knows_no_locks_is_used_all_the_same(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOTSUP, "not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with held(tmp_path), held(tmp_path):
        pass


@pytest.mark.parametrize("below", [".", "teacher", "predictions/test.jsonl"])
def test_what_a_run_reads_is_not_in_its_output_folder(below, tmp_path):
    folder = written(tmp_path / "out", *OWN, "teacher/config.json", run_json=RUN)
    for base in (folder, tmp_path / "elsewhere" / ".." / "out"):
        inputs = {"teacher_name_or_path": ["all-MiniLM-L6-v2", str(base / below)], "dataset_name": ["out"]}
        (tmp_path / "elsewhere").mkdir(exist_ok=True)
        with pytest.raises(OutputExistsError, match=r"holds what the run reads: --teacher_name_or_path\.\n"):
            refuse_inputs_below(folder, inputs)
    (tmp_path / "link").symlink_to(folder / below)
    with pytest.raises(OutputExistsError, match="holds what the run reads"):
        refuse_inputs_below(folder, {"model_name_or_path": [str(tmp_path / "link")]})
    refuse_inputs_below(folder / "below", {"model_name_or_path": [str(folder)]})
    refuse_inputs_below(tmp_path / "new", {"model_name_or_path": [str(tmp_path / "new")]})


def test_only_own_files_are_removed(tmp_path):
    folder = written(tmp_path, *OWN, "checkpoints/mine/weights.pt", "checkpoints/search/notes.txt", "onnx/mine.bin")
    mark_unfinished(folder, "distill")
    assert remove_own(folder, "checkpoints") == ["checkpoints/mine/weights.pt", "checkpoints/search/notes.txt"]
    left = {name for name in OWN if not name.startswith("checkpoints/")}
    assert set(everything(folder)) == left | {
        "checkpoints/mine/weights.pt",
        "checkpoints/search/notes.txt",
        "onnx/mine.bin",
    }
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"mine", "search"}


def test_free_space(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 9 * 10**8, 10**8) if path.exists() else 1 / 0)
    check_free_space(tmp_path / "not" / "yet", 10**8)
    with pytest.raises(NoSpaceError, match=r"0.10 GB free; this run writes about 0.50 GB"):
        check_free_space(tmp_path / "not" / "yet", 5 * 10**8)


def test_what_calls_left_in_a_tokenizer_is_not_saved(tiny_checkpoint, tmp_path):
    """A call cuts and pads by settings of the tokenizer itself, which would go into tokenizer.json."""
    schema = LabelSchema(LABELS)
    checkpoint = load_classifier(str(tiny_checkpoint("bert", kind="classifier")), schema=schema)
    save_classifier(checkpoint.model, checkpoint.tokenizer, schema, tmp_path / "before")
    checkpoint.tokenizer(["a book", "a long word in the garden"], truncation=True, max_length=4, padding=True)
    save_classifier(checkpoint.model, checkpoint.tokenizer, schema, tmp_path / "after")
    before, after = ((tmp_path / name / "tokenizer.json").read_text() for name in ("before", "after"))
    assert before == after
    assert json.loads(after)["truncation"] is None
