"""Only whole checkpoints of the same run are resumed."""

import json
import logging

import pytest

from nlpxfer.errors import ResumeError
from nlpxfer.strict_json import write_json_whole
from nlpxfer.train.checkpoints import (
    MANIFEST,
    RunIdentity,
    damage,
    newest_verified,
    require_same_run,
    seal,
    sha256_of,
)

FACTS = {"learning_rate": 1e-4, "seed": 1, "model": "abc", "labels": ["a", "b"]}
TOPOLOGY = {"processes": 2, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
IDENTITY = RunIdentity(FACTS, TOPOLOGY)


def write(folder, step, identity=IDENTITY, *, optimizer=True):
    """A checkpoint with two files, one in a folder of its own."""
    checkpoint = folder / f"checkpoint-{step}"
    (checkpoint / "inner").mkdir(parents=True)
    (checkpoint / "model.safetensors").write_bytes(bytes(range(200)))
    (checkpoint / "inner" / MANIFEST).write_bytes(b"{}")
    if optimizer:
        (checkpoint / "optimizer.pt").write_bytes(b"moments of Adam")
    seal(checkpoint, identity, step)
    return checkpoint


def flip_bit(path, position=100):
    content = bytearray(path.read_bytes())
    content[position % len(content)] ^= 1
    path.write_bytes(bytes(content))


def test_sha256_by_a_known_number(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256_of(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    (tmp_path / "big").write_bytes(b"a" * (2 * (1 << 22) + 5))
    import hashlib

    assert sha256_of(tmp_path / "big") == hashlib.sha256(b"a" * (2 * (1 << 22) + 5)).hexdigest()


def test_json_is_strict_and_written_whole(tmp_path):
    path = tmp_path / "x.json"
    write_json_whole(path, {"name": "ä"})
    assert path.read_text(encoding="utf-8") == '{\n  "name": "ä"\n}\n'
    with pytest.raises(ValueError, match="JSON"):
        write_json_whole(path, {"loss": float("nan")})
    assert json.loads(path.read_text(encoding="utf-8")) == {"name": "ä"}
    write_json_whole(path, {"name": "b"})
    assert [entry.name for entry in tmp_path.iterdir() if not entry.name.startswith(".")] == ["x.json"]


def test_manifest_lists_every_file(tmp_path):
    checkpoint = write(tmp_path, 7)
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    assert (manifest["step"], manifest["facts"], manifest["topology"]) == (7, FACTS, TOPOLOGY)
    assert set(manifest["files"]) == {"model.safetensors", "optimizer.pt", f"inner/{MANIFEST}"}
    assert manifest["files"]["model.safetensors"]["bytes"] == 200
    assert damage(checkpoint) == ""


@pytest.mark.parametrize(
    ("harm", "fault"),
    [
        (lambda c: (c / "model.safetensors").write_bytes(bytes(range(199))), "model.safetensors was changed"),
        (lambda c: (c / "model.safetensors").write_bytes(b""), "model.safetensors was changed"),
        (lambda c: flip_bit(c / "model.safetensors"), "model.safetensors was changed"),
        (lambda c: flip_bit(c / "inner" / MANIFEST), f"inner/{MANIFEST} was changed"),
        (lambda c: (c / "optimizer.pt").unlink(), "optimizer.pt is missing"),
        (lambda c: (c / MANIFEST).unlink(), "it has no manifest"),
        (lambda c: (c / MANIFEST).write_text('{"files": {'), "its manifest cannot be read"),
        (lambda c: (c / MANIFEST).write_text("{}"), "its manifest cannot be read"),
        (lambda c: (c / MANIFEST).write_text("[1, 2]"), "its manifest cannot be read"),
        (lambda c: (c / MANIFEST).write_text('{"files": [1]}'), "its manifest cannot be read"),
        (lambda c: (c / MANIFEST).write_text('{"files": {"model.safetensors": {}}}'), "its manifest cannot be read"),
        (lambda c: (c / MANIFEST).write_bytes(b"\xff\xfe"), "its manifest cannot be read"),
    ],
)
def test_damage_is_found_and_the_older_checkpoint_taken(tmp_path, caplog, harm, fault):
    older, newest = write(tmp_path, 9), write(tmp_path, 10)
    assert newest_verified(tmp_path, IDENTITY) == newest
    harm(newest)
    assert damage(newest).startswith(fault)
    caplog.set_level(logging.WARNING, "nlpxfer")
    assert newest_verified(tmp_path, IDENTITY) == older
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith(f"skipping checkpoint-10: {fault}")


def test_steps_are_compared_as_numbers(tmp_path):
    write(tmp_path, 9)
    newest = write(tmp_path, 100)
    write(tmp_path, 20)
    assert newest_verified(tmp_path, IDENTITY) == newest


def test_without_optimizer_state_it_cannot_be_resumed(tmp_path, caplog):
    older = write(tmp_path, 1)
    write(tmp_path, 2, optimizer=False)
    assert newest_verified(tmp_path, IDENTITY) == older
    assert "checkpoint-2: it holds no optimizer state" in caplog.text


def test_all_damaged(tmp_path):
    for step in (1, 2):
        flip_bit(write(tmp_path, step) / "model.safetensors")
    with pytest.raises(ResumeError, match="None of the 2 checkpoints") as caught:
        newest_verified(tmp_path, IDENTITY)
    assert "--overwrite" in str(caught.value)


def test_what_was_not_written_to_the_end_is_no_checkpoint(tmp_path, caplog):
    """As a kill leaves the first checkpoint of an arm; with a damaged one beside it, the run is not trained anew."""
    (write(tmp_path, 2) / MANIFEST).unlink()
    assert newest_verified(tmp_path, IDENTITY) is None
    assert "skipping checkpoint-2: it has no manifest" in caplog.text
    flip_bit(write(tmp_path, 1) / "model.safetensors")
    with pytest.raises(ResumeError, match="None of the 1 checkpoints"):
        newest_verified(tmp_path, IDENTITY)


def test_no_checkpoint_at_all(tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "checkpoint-new").mkdir()
    (tmp_path / "checkpoint-5").write_text("a file")
    (tmp_path / "checkpoint-7-tmp").mkdir()
    assert newest_verified(tmp_path, IDENTITY) is None
    assert newest_verified(tmp_path / "nowhere", IDENTITY) is None


def test_another_run_is_refused_and_the_differences_are_listed(tmp_path):
    write(tmp_path, 3)
    others = {"learning_rate": 2e-4, "seed": 1, "model": "xyz", "labels": ("a", "b"), "temperature": 2.0}
    with pytest.raises(ResumeError) as caught:
        newest_verified(tmp_path, RunIdentity(others, TOPOLOGY), allow_topology_change=True)
    message = str(caught.value)
    assert "checkpoint-3 belongs to another run" in message
    for line in (
        "learning_rate: was 0.0001, is 0.0002",
        "model: was 'abc', is 'xyz'",
        "temperature: was None, is 2.0",
    ):
        assert f"  - {line}\n" in message
    assert "seed" not in message
    assert "labels" not in message  # a tuple and a list are the same


def test_a_fact_that_is_no_longer_there_is_a_difference(tmp_path):
    write(tmp_path, 3)
    facts = {key: value for key, value in FACTS.items() if key != "model"}
    with pytest.raises(ResumeError, match="model: was 'abc', is None"):
        newest_verified(tmp_path, RunIdentity(facts, TOPOLOGY))


def test_an_older_checkpoint_is_no_way_around_another_run(tmp_path):
    write(tmp_path, 3)
    write(tmp_path, 4, RunIdentity({**FACTS, "seed": 2}, TOPOLOGY))
    with pytest.raises(ResumeError, match="checkpoint-4 belongs to another run"):
        newest_verified(tmp_path, IDENTITY)


@pytest.mark.parametrize("name", sorted(TOPOLOGY))
def test_another_topology_needs_a_word(tmp_path, name):
    checkpoint = write(tmp_path, 3)
    moved = RunIdentity(FACTS, {**TOPOLOGY, name: 16})
    with pytest.raises(ResumeError) as caught:
        newest_verified(tmp_path, moved)
    assert f"{name}: was {TOPOLOGY[name]}, is 16" in str(caught.value)
    assert "--allow_topology_change" in str(caught.value)
    assert newest_verified(tmp_path, moved, allow_topology_change=True) == checkpoint
    require_same_run(checkpoint, moved, True)
