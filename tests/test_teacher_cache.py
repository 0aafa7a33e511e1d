"""Teacher logits from disk are those of the text asked for, by the teacher asked for."""

import json
import multiprocessing
import os
import signal
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from cache_processes import ask_together, die_in_the_third_part
from processes import TIMEOUT
from safetensors.numpy import load_file
from tiny import LABELS, edit_json, make_rows

from nlpxfer.checkpoint import load_teacher
from nlpxfer.data.schema import LabelSchema
from nlpxfer.errors import NotFiniteError, StaleCacheError
from nlpxfer.train import row_cache, teacher_cache
from nlpxfer.train.teacher_cache import (
    TeacherIdentity,
    cached_logits,
    default_cache_folder,
    teacher_logits,
    text_key_array,
    text_keys,
)

IDENTITY = TeacherIdentity(
    weights="w" * 64, tokenizer="t" * 64, labels=("a", "b", "c"), max_length=32, precision="float32"
)
TEXTS = [f"text {index}" for index in range(20)]


def logits_of(text):
    """Three numbers that belong to a text and to no other."""
    value = sum(ord(letter) * 31**index for index, letter in enumerate(text)) % 1000003
    return np.array([value, -value, value / 7], dtype=np.float32)


class Teacher:
    """Computes `logits_of`, and counts what it is asked for; fails in the call number `fails_in`."""

    def __init__(self, texts, fails_in=None):
        self.texts, self.calls, self.fails_in = texts, [], fails_in

    def __call__(self, rows):
        self.calls.append([self.texts[int(row)] for row in rows])
        if len(self.calls) == self.fails_in:
            raise KeyboardInterrupt
        return np.stack([logits_of(text) for text in self.calls[-1]])

    @property
    def computed(self):
        return [text for call in self.calls for text in call]


def ask(folder, texts, identity=IDENTITY, **options):
    teacher = Teacher(texts, **options)
    logits, computed = cached_logits(folder, identity, text_keys(texts), teacher)
    assert logits.dtype == np.float32
    np.testing.assert_array_equal(logits, [logits_of(text) for text in texts])
    assert computed == len(teacher.computed)
    return teacher.computed


def parts_in(folder):
    return sorted(folder.glob("part-*.safetensors"))


# -- alignment


def test_logits_follow_their_texts(tmp_path):
    folder = tmp_path / "cache"
    assert ask(folder, TEXTS) == TEXTS
    assert ask(folder, TEXTS) == []
    assert ask(folder, TEXTS[::-1]) == []
    assert ask(folder, list(np.random.default_rng(0).permutation(TEXTS))) == []
    assert ask(folder, TEXTS[3:7]) == []
    assert ask(folder, [TEXTS[5]] * 3 + [TEXTS[0]]) == []


def test_further_rows_alone_are_computed(tmp_path):
    ask(tmp_path / "cache", TEXTS[:5])
    assert ask(tmp_path / "cache", [TEXTS[9], *TEXTS[:3], TEXTS[7], TEXTS[9]]) == [TEXTS[9], TEXTS[7]]
    assert ask(tmp_path / "cache", TEXTS[:10]) == [TEXTS[5], TEXTS[6], TEXTS[8]]


def test_equal_texts_are_computed_once(tmp_path):
    assert ask(tmp_path / "cache", ["x", "y", "x", "x", "y"]) == ["x", "y"]


def test_no_texts(tmp_path):
    logits, computed = cached_logits(tmp_path / "cache", IDENTITY, [], Teacher([]))
    assert logits.shape == (0, 3)
    assert computed == 0


def test_keys_differ_wherever_the_input_differs():
    keys = [
        *text_keys(["ab", "a", "", "2\0abc", "ab\0c", "a\0bc"]),
        *text_keys(["ab", "a", "", "abc", "a\0"], ["c", "bc", "abc", "", "bc"]),
    ]
    assert len(set(keys)) == len(keys)
    assert {len(key) for key in keys} == {32}
    assert text_keys(["x", "y", "x"])[0] == text_keys(["x"])[0] == text_keys(["y", "x"])[1]


def test_no_text_can_pass_for_a_pair():
    """Whatever is hashed for a pair, as a single text it has another key."""
    seen = []

    class Recorder:
        def __init__(self, content):
            seen.append(content)

        def digest(self):
            return b""

    original, teacher_cache.hashlib.sha256 = teacher_cache.hashlib.sha256, Recorder
    try:
        text_keys(["ab"], ["c"])
        text_keys(["ab"])
    finally:
        teacher_cache.hashlib.sha256 = original
    pair, single = seen
    assert text_keys([pair.decode()]) != text_keys(["ab"], ["c"])
    assert single != pair


# -- interruption


def test_interrupted_run_keeps_finished_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(teacher_cache, "PART_ROWS", 8)
    folder = tmp_path / "cache"
    teacher = Teacher(TEXTS, fails_in=2)
    with pytest.raises(KeyboardInterrupt):
        cached_logits(folder, IDENTITY, text_keys(TEXTS), teacher)
    assert len(parts_in(folder)) == 1
    assert ask(folder, TEXTS) == TEXTS[8:]
    assert len(parts_in(folder)) == 3
    assert ask(folder, TEXTS) == []


def test_interruption_before_the_manifest_leaves_a_usable_folder(tmp_path):
    folder = tmp_path / "cache"
    folder.mkdir()
    (folder / ".manifest.json.tmp").write_text('{"version"')
    (folder / ".part-0123.tmp").write_bytes(b"half")
    assert ask(folder, TEXTS) == TEXTS
    assert ask(folder, TEXTS) == []


def test_a_complete_cache_is_only_read(tmp_path):
    folder = tmp_path / "cache"
    ask(folder, TEXTS)
    before = {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in folder.iterdir()}
    ask(folder, TEXTS)
    assert {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in folder.iterdir()} == before


# -- what is refused


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"weights": "v" * 64}, "weights: cached '" + "w" * 64 + "', now '" + "v" * 64 + "'"),
        ({"tokenizer": "u" * 64}, "tokenizer: cached"),
        ({"labels": ("a", "c", "b")}, "labels: cached ['a', 'b', 'c'], now ['a', 'c', 'b']"),
        ({"max_length": 64}, "max_length: cached 32, now 64"),
        ({"precision": "bfloat16"}, "precision: cached 'float32', now 'bfloat16'"),
    ],
)
def test_another_teacher_is_refused(tmp_path, change, told):
    folder = tmp_path / "cache"
    ask(folder, TEXTS)
    other = replace(IDENTITY, **change)
    teacher = Teacher(TEXTS)
    with pytest.raises(StaleCacheError) as caught:
        cached_logits(folder, other, text_keys(TEXTS), teacher)
    assert f"  - {told}" in str(caught.value)
    assert str(caught.value).count("  - ") == 1
    assert "--teacher_cache" in str(caught.value)
    assert teacher.calls == []
    assert other.key != IDENTITY.key
    assert ask(folder, TEXTS) == []


def truncate(path):
    path.write_bytes(path.read_bytes()[:-10])


def flip_last_bit(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("harm", [truncate, flip_last_bit, lambda path: path.write_bytes(b"")])
def test_damaged_part_is_refused_by_name(tmp_path, harm):
    ask(tmp_path / "cache", TEXTS)
    (part,) = parts_in(tmp_path / "cache")
    harm(part)
    with pytest.raises(StaleCacheError, match="damaged") as caught:
        cached_logits(tmp_path / "cache", IDENTITY, text_keys(TEXTS), Teacher(TEXTS))
    assert f"delete {part.name}" in str(caught.value)
    part.unlink()
    assert ask(tmp_path / "cache", TEXTS) == TEXTS


def test_every_bit_of_a_part_counts(tmp_path):
    ask(tmp_path / "cache", TEXTS)
    (part,) = parts_in(tmp_path / "cache")
    content = load_file(part)
    sound = part.read_bytes()
    header = len(sound) - sum(array.nbytes for array in content.values())
    for position in range(header, len(sound), 97):  # a change in keys or logits
        damaged = bytearray(sound)
        damaged[position] ^= 4
        part.write_bytes(bytes(damaged))
        with pytest.raises(StaleCacheError, match="damaged"):
            cached_logits(tmp_path / "cache", IDENTITY, text_keys(TEXTS), Teacher(TEXTS))


@pytest.mark.parametrize("content", ["{", "[]", '"x"', "\ud800"])
def test_damaged_manifest_is_refused(tmp_path, content):
    ask(tmp_path / "cache", TEXTS)
    (tmp_path / "cache" / "manifest.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(StaleCacheError, match=r"manifest.json cannot be read"):
        cached_logits(tmp_path / "cache", IDENTITY, text_keys(TEXTS), Teacher(TEXTS))


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(StaleCacheError, match="is no teacher cache"):
        cached_logits(tmp_path, IDENTITY, text_keys(TEXTS), Teacher(TEXTS))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    (tmp_path / "manifest.json").write_text(json.dumps({"files": {}}))
    with pytest.raises(StaleCacheError, match="made from something else"):
        cached_logits(tmp_path, IDENTITY, text_keys(TEXTS), Teacher(TEXTS))


def test_the_cache_folder_may_not_be_a_file(tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(StaleCacheError, match="is no folder"):
        cached_logits(tmp_path / "cache", IDENTITY, text_keys(TEXTS), Teacher(TEXTS))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_not_kept(tmp_path, value):
    def compute(rows):
        return np.full((len(rows), 3), value, dtype=np.float32)

    with pytest.raises(NotFiniteError, match="teacher"):
        cached_logits(tmp_path / "cache", IDENTITY, text_keys(TEXTS), compute)
    assert parts_in(tmp_path / "cache") == []


def test_logits_of_another_shape_are_not_kept(tmp_path):
    with pytest.raises(ValueError, match=r"\(20, 2\) for 20 rows of 3"):
        cached_logits(tmp_path / "cache", IDENTITY, text_keys(TEXTS), lambda rows: np.zeros((len(rows), 2)))
    assert parts_in(tmp_path / "cache") == []


# -- with a model


@pytest.fixture
def teacher(tiny_checkpoint):
    return load_teacher(str(tiny_checkpoint("bert", "classifier")), schema=LabelSchema(LABELS))


TINY_TEXTS = [row["text"] for row in make_rows(30, seed=4)]


def test_cached_logits_equal_fresh_ones(teacher, tmp_path):
    options = {"labels": LABELS, "max_length": 32, "batch_size": 4}
    fresh, facts = teacher_logits(teacher, TINY_TEXTS, folder=tmp_path / "a", **options)
    assert facts["rows"] == 30
    assert facts["computed"] == len(set(TINY_TEXTS))
    encoded = teacher.tokenizer(TINY_TEXTS[7], return_tensors="pt")
    np.testing.assert_allclose(fresh[7], teacher.model(**encoded).logits[0].detach(), atol=1e-5)
    cached, facts = teacher_logits(teacher, TINY_TEXTS, folder=tmp_path / "a", **options)
    assert facts["computed"] == 0
    np.testing.assert_array_equal(cached, fresh)
    order = np.random.default_rng(0).permutation(30)
    shuffled, _ = teacher_logits(teacher, [TINY_TEXTS[i] for i in order], folder=str(tmp_path / "a"), **options)
    np.testing.assert_array_equal(shuffled, fresh[order])


def test_pairs_and_texts_share_a_folder(teacher, tmp_path):
    options = {"labels": LABELS, "max_length": 32, "folder": tmp_path / "a"}
    texts, pairs = ["the goal", "the goal"], ["bread", "guitar"]
    both, _ = teacher_logits(teacher, texts, pairs, **options)
    alone, facts = teacher_logits(teacher, texts, **options)
    assert facts["computed"] == 1
    assert np.abs(both[0] - both[1]).max() > 1e-4
    assert np.abs(both[0] - alone[0]).max() > 1e-4
    again, facts = teacher_logits(teacher, texts, pairs, **options)
    assert facts["computed"] == 0
    np.testing.assert_array_equal(again, both)


def test_each_teacher_has_a_folder_of_its_own(teacher, tiny_checkpoint, tmp_path):
    """Whatever the logits depend on makes it another one; all lie side by side, and none is computed twice."""
    shared = {"labels": LABELS, "max_length": 32, "folder": tmp_path / "a"}
    other = load_teacher(str(tiny_checkpoint("bert", "classifier", seed=1)), schema=LabelSchema(LABELS))
    asked = [(teacher, {}), (other, {})]
    asked += [(teacher, change) for change in ({"max_length": 8}, {"bf16": True}, {"labels": LABELS[::-1]})]
    for computed in (len(set(TINY_TEXTS)), 0):
        told = [teacher_logits(model, TINY_TEXTS, **shared | change)[1] for model, change in asked]
        assert [facts["computed"] for facts in told] == [computed] * 5
        assert sorted(os.listdir(tmp_path / "a")) == sorted(facts["key"] for facts in told)
        assert len(os.listdir(tmp_path / "a")) == 5


def test_a_changed_config_makes_it_another_teacher(teacher, tiny_copy, tmp_path):
    options = {"labels": LABELS, "max_length": 32, "folder": tmp_path / "a"}
    before, _ = teacher_logits(teacher, TINY_TEXTS, **options)
    folder = tiny_copy("bert", "classifier")
    edit_json(folder / "config.json", hidden_dropout_prob=0.3, transformers_version="4.0.0")
    same, facts = teacher_logits(load_teacher(str(folder), schema=LabelSchema(LABELS)), TINY_TEXTS, **options)
    assert facts["computed"] == 0
    np.testing.assert_array_equal(same, before)
    edit_json(folder / "config.json", hidden_act="relu")
    other, facts = teacher_logits(load_teacher(str(folder), schema=LabelSchema(LABELS)), TINY_TEXTS, **options)
    assert facts["computed"] == len(set(TINY_TEXTS))
    assert np.abs(other - before).max() > 1e-4


def test_default_folder(teacher, tmp_path, monkeypatch):
    monkeypatch.setenv("NLPXFER_CACHE", str(tmp_path / "mine"))
    _, facts = teacher_logits(teacher, TINY_TEXTS[:3], labels=LABELS, max_length=32)
    assert sorted(os.listdir(tmp_path / "mine" / "teacher")) == [facts["key"]]
    teacher_logits(teacher, TINY_TEXTS[:3], labels=LABELS, max_length=16)
    assert len(os.listdir(tmp_path / "mine" / "teacher")) == 2
    monkeypatch.delenv("NLPXFER_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_cache_folder(IDENTITY) == tmp_path / "home" / ".cache" / "nlpxfer" / "teacher" / IDENTITY.key


# -- large, and shared


def test_shuffled_subset_and_repeated_rows_have_their_own_logits(tmp_path, monkeypatch):
    """Many parts, values on disk, and draws with repetition: as an independent look-up by text has it."""
    monkeypatch.setattr(teacher_cache, "PART_ROWS", 7)
    monkeypatch.setattr(row_cache, "IN_MEMORY", 0)
    rng = np.random.default_rng(11)
    known = []
    for size in (30, 55, 4, 200):
        texts = [f"text {index}" for index in rng.integers(0, 90, size=size)]
        computed = ask(tmp_path / "cache", texts)
        assert len(computed) == len(set(computed))
        assert set(computed) == set(texts) - set(known)
        known += computed
    logits, _ = cached_logits(tmp_path / "cache", IDENTITY, text_keys(known), Teacher(known))
    assert isinstance(logits, np.memmap)
    assert [path.name for path in (tmp_path / "cache").iterdir() if "tmp" in path.name] == []


def test_keys_as_bytes_and_as_an_array(tmp_path):
    texts, pairs = ["a", "b", "a"], ["x", "y", "x"]
    for second in (None, pairs):
        array = text_key_array(texts, second)
        assert array.shape == (3, 32)
        assert [row.tobytes() for row in array] == text_keys(texts, second)
    ask(tmp_path / "cache", texts)
    logits, computed = cached_logits(tmp_path / "cache", IDENTITY, text_key_array(texts), Teacher(texts))
    assert computed == 0
    np.testing.assert_array_equal(logits, [logits_of(text) for text in texts])


def test_two_jobs_at_once_agree(tmp_path, monkeypatch):
    """A second job, which rounds otherwise, fills the folder while the first computes: who wrote first is right."""
    monkeypatch.setattr(teacher_cache, "PART_ROWS", 4)
    folder, others = tmp_path / "cache", []

    def second(rows):
        return np.stack([logits_of(TEXTS[int(row)]) for row in rows]) + 0.5

    class First(Teacher):
        def __call__(self, rows):
            if not self.calls:
                others.append(cached_logits(folder, IDENTITY, text_keys(TEXTS[2:10]), lambda r: second(r + 2)))
            return super().__call__(rows)

    first = First(TEXTS)
    mine, computed = cached_logits(folder, IDENTITY, text_keys(TEXTS), first)
    theirs, _ = others[0]
    np.testing.assert_array_equal(mine[2:10], theirs)
    np.testing.assert_array_equal(mine[[0, 1]], [logits_of(text) for text in TEXTS[:2]])
    assert first.computed == [*TEXTS[:4], *TEXTS[10:]], "what the other job wrote meanwhile is not computed again"
    assert computed == 14
    again, computed = cached_logits(folder, IDENTITY, text_keys(TEXTS), Teacher(TEXTS))
    assert computed == 0
    np.testing.assert_array_equal(again, mine)
    kept = [key.tobytes() for part in parts_in(folder) for key in load_file(part)["keys"]]
    assert sorted(kept) == sorted(text_keys(TEXTS)), "each text is kept once"


def test_a_job_of_another_teacher_cannot_slip_in(tmp_path):
    """Both saw an empty folder; the slower one must not take the folder over."""
    folder, other = tmp_path / "cache", replace(IDENTITY, weights="v" * 64)
    slower = row_cache.RowCache(
        folder=folder,
        manifest=other.as_manifest(),
        width=3,
        values="logits",
        owner="teacher",
        option="--teacher_cache",
        part_rows=8,
    )
    ask(folder, TEXTS[:5])
    with pytest.raises(StaleCacheError, match="weights: cached"):
        slower._begin([], 5)
    assert ask(folder, TEXTS[:5]) == []


def test_a_part_of_another_teacher_is_damage(tmp_path):
    ask(tmp_path / "a", TEXTS[:5])
    ask(tmp_path / "b", TEXTS[5:9], identity=replace(IDENTITY, weights="v" * 64))
    (part,) = parts_in(tmp_path / "b")
    part.rename(tmp_path / "a" / part.name)
    with pytest.raises(StaleCacheError, match="was changed after it was written"):
        cached_logits(tmp_path / "a", IDENTITY, text_keys(TEXTS), Teacher(TEXTS))


def forkserver():
    """Starts processes that have imported everything already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cache_processes"])
    return context


@pytest.mark.processes
def test_a_killed_job_leaves_its_finished_parts(tmp_path):
    folder = tmp_path / "cache"
    process = forkserver().Process(target=die_in_the_third_part, args=(folder, IDENTITY, text_keys(TEXTS)))
    process.start()
    process.join(TIMEOUT)
    assert process.exitcode == -signal.SIGKILL
    assert len(parts_in(folder)) == 2
    teacher = Teacher(TEXTS)
    logits, computed = cached_logits(folder, IDENTITY, text_keys(TEXTS), teacher)
    assert teacher.computed == TEXTS[12:]
    assert computed == 8
    np.testing.assert_array_equal(logits[:12], np.ones((12, 3)))


@pytest.mark.processes
def test_two_processes_share_the_work(teacher, tiny_checkpoint, tmp_path):
    texts, folder = [*TINY_TEXTS, *TINY_TEXTS[:5]], str(tmp_path / "cache")
    context = forkserver()
    words = (folder, str(tiny_checkpoint("bert", "classifier")), texts, LABELS)
    both = [context.Process(target=ask_together, args=(rank, *words)) for rank in (0, 1)]
    for process in both:
        process.start()
    for process in both:
        process.join(TIMEOUT)
        process.kill()
    assert [process.exitcode for process in both] == [0, 0]
    facts = [json.loads((tmp_path / f"cache-{rank}.json").read_text()) for rank in (0, 1)]
    distinct = len(set(texts))
    assert [found["computed"] for found in facts] == [distinct, distinct]
    forward = [found["forward"] for found in facts]
    assert min(forward) > 0.3 * distinct
    assert sum(forward) <= distinct + 2 * 8, "each text once, but for a batch that keeps the processes in step"
    alone, told = teacher_logits(teacher, texts, labels=LABELS, max_length=32, folder=tmp_path / "alone")
    assert told["computed"] == distinct
    for rank in (0, 1):
        np.testing.assert_allclose(np.load(tmp_path / f"cache-{rank}.npy"), alone, atol=1e-5)
    cached, told = teacher_logits(teacher, texts, labels=LABELS, max_length=32, folder=folder)
    assert told["computed"] == 0
    np.testing.assert_array_equal(cached, np.load(tmp_path / "cache-0.npy"))


def test_memory_does_not_hold_the_values(tmp_path, monkeypatch):
    """20,000 rows of 256 numbers, 20 MB; what is held for a row are keys and places."""
    monkeypatch.setattr(row_cache, "IN_MEMORY", 0)
    monkeypatch.setattr(teacher_cache, "PART_ROWS", 1024)
    identity = replace(IDENTITY, labels=tuple(map(str, range(256))))
    keys = text_key_array([str(number) for number in range(20_000)])

    def compute(rows):
        return np.repeat(rows[:, None].astype(np.float32), 256, axis=1)

    for expected in (20_000, 0):
        tracemalloc.start()
        logits, computed = cached_logits(tmp_path / "cache", identity, keys, compute)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert computed == expected
        assert (logits[:, 7] == np.arange(20_000)).all()
        assert peak < 0.5 * logits.nbytes
