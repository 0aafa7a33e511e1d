"""Tests of data/debian-sections: the files that lie there, and the script that rebuilds them."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import json
import lzma
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "data" / "debian-sections"
SPLITS = ("train", "validation", "test")
COLUMNS = ["text", "synopsis", "label", "tags", "package", "source"]


def load_module(name: str) -> ModuleType:
    """Import a script of the data folder, whose name is no module name."""
    spec = importlib.util.spec_from_file_location(f"debian_sections_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


prepare = load_module("prepare")
measure = load_module("measure")


@pytest.fixture(scope="module")
def splits() -> dict[str, list[dict]]:
    """Rows by split."""
    rows = {}
    for split in SPLITS:
        with (FOLDER / f"{split}.jsonl").open(encoding="utf-8", newline="\n") as lines:
            rows[split] = [json.loads(line) for line in lines]
    return rows


@pytest.fixture(scope="module")
def unlabelled() -> list[str]:
    """Lines of unlabelled.txt."""
    content = (FOLDER / "unlabelled.txt").read_bytes().decode("utf-8")
    assert content.endswith("\n")
    return content[:-1].split("\n")


# --- the files lying there -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS)
def test_rows_have_the_columns_and_clean_values(splits: dict[str, list[dict]], split: str) -> None:
    """Each row has all columns in order, one-line texts and a list of distinct tags."""
    for row in splits[split]:
        assert list(row) == COLUMNS
        for column in COLUMNS:
            if column != "tags":
                assert isinstance(row[column], str)
                assert row[column]
                assert row[column] == prepare.fold(row[column])
        assert len(row["text"]) >= prepare.MIN_CHARS
        assert isinstance(row["tags"], list)
        assert row["tags"] == sorted(set(row["tags"]))
        assert all(re.fullmatch(r"[a-z0-9-]+::\S+", tag) for tag in row["tags"])
    names = [row["package"] for row in splits[split]]
    assert names == sorted(names)


def test_each_split_holds_all_sixteen_sections(splits: dict[str, list[dict]]) -> None:
    """No class is missing anywhere."""
    assert len(prepare.SECTIONS) == 16
    for rows in splits.values():
        assert {row["label"] for row in rows} == set(prepare.SECTIONS)


def test_no_source_package_straddles_the_splits(splits: dict[str, list[dict]]) -> None:
    """The split is the one of the source's hash, so siblings stay together; a pair (source, section) occurs once."""
    table = {0: "test", 1: "test", 2: "validation"}
    pairs = []
    for split, rows in splits.items():
        for row in rows:
            number = int(hashlib.sha1(row["source"].encode()).hexdigest(), 16) % 10
            assert table.get(number, "train") == split == prepare.split_of(row["source"])
            pairs.append((row["source"], row["label"]))
    assert len(pairs) == len(set(pairs))


def test_no_text_occurs_twice(splits: dict[str, list[dict]], unlabelled: list[str]) -> None:
    """Neither inside a split, nor across splits, nor in the unlabelled texts."""
    texts = [prepare.normalise(row["text"]) for rows in splits.values() for row in rows]
    texts += [prepare.normalise(text) for text in unlabelled]
    assert [text for text, count in Counter(texts).items() if count > 1] == []


def test_unlabelled_is_within_its_size(unlabelled: list[str]) -> None:
    """At most 3 MB, each line a folded text."""
    assert (FOLDER / "unlabelled.txt").stat().st_size <= 3_000_000
    assert len(unlabelled) > 10_000
    assert all(len(text) >= prepare.MIN_CHARS and text == prepare.fold(text) for text in unlabelled)


def test_source_page_tells_the_counts_of_the_files(splits: dict[str, list[dict]], unlabelled: list[str]) -> None:
    """The table in SOURCE.md is the one that prepare.py prints, and the totals are named."""
    page = (FOLDER / "SOURCE.md").read_text(encoding="utf-8")
    files = {f"{split}.jsonl": (FOLDER / f"{split}.jsonl").read_text(encoding="utf-8") for split in SPLITS}
    assert prepare.count_table(files) in page
    counts = {split: Counter(row["label"] for row in rows) for split, rows in splits.items()}
    for section in prepare.SECTIONS:
        row = [counts[split][section] for split in SPLITS]
        assert f"| {section} | {row[0]} | {row[1]} | {row[2]} | {sum(row)} |" in page
    assert f"{sum(map(len, splits.values())):,} rows" in page
    assert f"{len(unlabelled):,} lines" in page
    assert len(re.findall(r"\b[0-9a-f]{64}\b", page)) == 2


# --- prepare.py on a synthetic index ---------------------------------------------------------------------------------


def source_in(split: str, stem: str) -> str:
    """Return a source name with the given stem that falls into the given split."""
    return next(name for i in range(1000) if prepare.split_of(name := f"{stem}{i}") == split)


TRAIN, VALIDATION, TEST = (source_in(split, "tool") for split in SPLITS)
OTHER, HELD_OUT, TWIN = source_in("train", "other"), source_in("test", "other"), source_in("test", "twin")
# name, source, section, description, Tag field
SYNTHETIC = [
    (
        TRAIN,
        TRAIN,
        "games",
        f"a game\n {TRAIN} is a game of\n   two lines, naïve and short.\n .\n More.",
        "b::x,\n a::y",
    ),
    (f"{TRAIN}-data", TRAIN, "games", "data\n This sibling is not chosen since it is a companion.", ""),
    (f"z-{VALIDATION}", VALIDATION, "main/net", "net\n This is a network program without a tag.", ""),
    (f"aa-{VALIDATION}", VALIDATION, "net", "net\n This is the longer name and thus not chosen.", ""),
    (TEST, TEST, "mail", "mail (transitional package)\n This dummy package helps upgrades go smoothly.", ""),
    (f"{TEST}-real", TEST, "mail", "mail\n A mail reader with a text that is long enough.", "use::mail"),
    (TWIN, TWIN, "games", f"game\n {TRAIN} is a  GAME of two lines, naïve and short.", ""),
    (f"{TWIN}-a", TWIN, "text", "one text\n The same words stand under two different sections.", ""),
    (f"{TWIN}-b", TWIN, "web", "one text\n The same words stand under two different sections.", ""),
    (f"{TWIN}-short", TWIN, "video", "short\n Too short.", ""),
    (f"{TWIN}-main", TWIN, "math", "twin\n Kept, and the last by name of the test rows.", ""),
    (f"{TWIN}-free", TWIN, "contrib/math", "of another component\n Not of the component main, so left out.", ""),
    (OTHER, OTHER, "python", "other\n An unlabelled text of a training source.", ""),
    (f"{OTHER}-doc", f"{OTHER}-doc", "doc", "doc\n A text about documentation is not taken.", ""),
    (HELD_OUT, HELD_OUT, "python", "held out\n The source of this text belongs to the test split.", ""),
]


def write_index(folder: Path, rows: list[tuple[str, str, str, str, str]] = SYNTHETIC) -> Path:
    """Write a Packages and a Translation-en file as Debian's archive does."""
    packages, translation = [], []
    for name, source, section, description, tags in rows:
        digest = hashlib.md5(description.encode()).hexdigest()
        synopsis = description.split("\n")[0]
        lines = [f"Package: {name}", f"Section: {section}", f"Description: {synopsis}", f"Description-md5: {digest}"]
        if source != name:
            lines.insert(1, f"Source: {source} (1.0-1)")
        if tags:
            lines.append(f"Tag: {tags}")
        packages.append("\n".join(lines) + "\n")
        translation.append(f"Package: {name}\nDescription-md5: {digest}\nDescription-en: {description}\n")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "Packages").write_text("\n".join(packages), encoding="utf-8")
    (folder / "Translation-en").write_text("\n".join(translation), encoding="utf-8")
    return folder


def command_line(index: Path, output: Path, *more: str) -> list[str]:
    """Return the arguments of prepare.py."""
    return ["--index", str(index), "--output", str(output), *more]


def read_all(folder: Path) -> dict[str, bytes]:
    """Return all files of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_prepare_gives_the_expected_rows(tmp_path: Path) -> None:
    """Choice, unwrapping, dropping, splits and order on an index made by hand."""
    output = tmp_path / "out"
    assert prepare.main(command_line(write_index(tmp_path / "index"), output)) == 0
    assert sorted(read_all(output)) == sorted(prepare.OUTPUTS)
    assert (output / "validation.jsonl").read_text(encoding="utf-8") == (
        '{"text": "This is a network program without a tag.", "synopsis": "net", "label": "net", "tags": [], '
        f'"package": "z-{VALIDATION}", "source": "{VALIDATION}"}}\n'
    )
    (train,) = (json.loads(line) for line in (output / "train.jsonl").read_text(encoding="utf-8").splitlines())
    assert list(train) == COLUMNS
    assert list(train.values()) == [
        f"{TRAIN} is a game of two lines, naïve and short.",
        "a game",
        "games",
        ["a::y", "b::x"],
        TRAIN,
        TRAIN,
    ]
    assert "naïve" in (output / "train.jsonl").read_text(encoding="utf-8")
    test = [json.loads(line) for line in (output / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(row["package"], row["label"]) for row in test] == [(f"{TEST}-real", "mail"), (f"{TWIN}-main", "math")]
    assert (output / "unlabelled.txt").read_text(encoding="utf-8") == "An unlabelled text of a training source.\n"


def test_prepare_repeats_byte_for_byte(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same index gives the same bytes, in any stanza order and compression, and --check agrees."""
    first, second = tmp_path / "first", tmp_path / "second"
    index = write_index(tmp_path / "index")
    turned = write_index(tmp_path / "turned" / "lists", SYNTHETIC[::-1])
    for name, compressed in (
        ("Packages", gzip.compress((turned / "Packages").read_bytes())),
        ("Translation-en", lzma.compress((turned / "Translation-en").read_bytes())),
    ):
        (turned / name).unlink()
        ending = {"Packages": "binary-amd64_Packages.gz", "Translation-en": "i18n_Translation-en.xz"}[name]
        (turned / f"a_dists_bookworm_main_{ending}").write_bytes(compressed)
    (turned / "a_dists_bookworm-updates_main_binary-amd64_Packages").write_text("another suite, not read")
    assert prepare.main(command_line(index, first)) == 0
    assert prepare.main(command_line(turned.parent, second)) == 0
    assert read_all(first) == read_all(second)
    assert prepare.main(command_line(index, first)) == 0
    assert read_all(first) == read_all(second)

    capsys.readouterr()
    assert prepare.main(command_line(index, first, "--check")) == 0
    (first / "test.jsonl").write_text("changed\n")
    (first / "unlabelled.txt").unlink()
    assert prepare.main(command_line(index, first, "--check")) == 1
    assert capsys.readouterr().out == "all files are as rebuilt\ntest.jsonl: differs\nunlabelled.txt: missing\n"
    assert (first / "test.jsonl").read_text() == "changed\n"


def spoil_packages(content: bytes) -> Callable[[Path], object]:
    """Return a spoiler that overwrites Packages."""
    return lambda index: (index / "Packages").write_bytes(content)


def spoil_gzip(index: Path) -> None:
    """Cut a compressed Packages short."""
    (index / "Packages.gz").write_bytes(gzip.compress((index / "Packages").read_bytes())[:-20])
    (index / "Packages").unlink()


def spoil_section(index: Path) -> None:
    """Give one text two sections, which leaves the training split empty."""
    write_index(index, [(*row[:2], "sound", *row[3:]) if row[0] == TWIN else row for row in SYNTHETIC])


def add_second(index: Path) -> None:
    """Put the same file there twice under different names."""
    (index / "b_dists_bookworm_main_binary-amd64_Packages").write_bytes((index / "Packages").read_bytes())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (shutil.rmtree, "no such folder"),
        (lambda index: (index / "Translation-en").unlink(), "no Translation-en file"),
        (spoil_packages(b""), "is empty"),
        (spoil_packages(b"Package: a\nno field here\n"), "Packages, line 2: expected 'Field: value'"),
        (spoil_packages(b" floating\n"), "line 1: a continuation line without a field"),
        (spoil_packages(b"Package: \xff\n"), "Packages is not UTF-8"),
        (spoil_packages(b"Version: 1\n"), "has no field Package"),
        (spoil_packages(b"Package: a\nDescription-md5: 0\nSection: net\n"), "not the same index?"),
        (spoil_gzip, "cannot read"),
        (spoil_section, "gives no rows for train.jsonl"),
        (add_second, "several Packages files"),
    ],
)
def test_prepare_refuses_a_bad_index(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil: Callable[[Path], object], message: str
) -> None:
    """One message, exit code 2, nothing written and nothing replaced."""
    index = write_index(tmp_path / "index")
    spoil(index)
    output = tmp_path / "out"
    assert prepare.main(command_line(index, output)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert not output.exists()


def test_prepare_refuses_an_output_that_is_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The place of the output folder is taken."""
    (tmp_path / "out").write_text("mine")
    assert prepare.main(command_line(write_index(tmp_path / "index"), tmp_path / "out")) == 2
    assert "cannot write to" in capsys.readouterr().err
    assert (tmp_path / "out").read_text() == "mine"


def test_prepare_as_a_program_shows_no_traceback(tmp_path: Path) -> None:
    """The same through a real process, as a user starts it."""
    command = [sys.executable, str(FOLDER / "prepare.py"), *command_line(tmp_path / "none", tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: no such folder")
    assert "Traceback" not in done.stderr


def test_prepare_fetch_calls_apt_with_folders_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--fetch leaves the machine's lists alone; a failing apt-get is a plain error."""
    calls = []

    def fake_run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        return subprocess.CompletedProcess(command, 100, stdout="", stderr="E: no network\n")

    monkeypatch.setattr(prepare.subprocess, "run", fake_run)
    with pytest.raises(prepare.PrepareError, match="failed with 100:\nE: no network"):
        prepare.fetch_index(tmp_path / "index")
    (command,) = calls
    assert command[0] == "apt-get"
    assert command[-1] == "update"
    for option in ("Dir::State", "Dir::State::Lists", "Dir::Cache"):
        assert any(part.startswith(f"{option}={tmp_path.resolve()}") for part in command)


@pytest.mark.parametrize(
    ("description", "dummy"),
    [
        ("a (transitional package)\n x", True),
        ("a\n This is a transitional\n dummy package.", True),
        ("Transition Package, a to b\n x", True),
        ("a\n x\n .\n This transitional meta-package ...", True),
        ("bridge double dummy solver\n It solves double dummy problems.", False),
        ("a\n Helps with the transition from a to b; this package ...", False),
    ],
)
def test_dummy_packages_are_known_by_their_text(description: str, dummy: bool) -> None:
    """The words in whatever order and line, but not the word dummy alone."""
    stanza = {"Package": "a", "Section": "net"}
    assert prepare.make_package(stanza, description).dummy is dummy


# --- measure.py ------------------------------------------------------------------------------------------------------


def test_near_duplicates_by_hand() -> None:
    """Ten words have six shingles; one more word at the end makes seven: similarity 6/7."""
    text = "a b c d e f g h i j"
    found = measure.near_duplicates(["something else of five words", text], [f"{text} k", "a b", text.upper()])
    assert found == [(1, 0, pytest.approx(6 / 7)), (1, 2, 1.0)]
    assert measure.near_duplicates(["A b!"], ["a b"]) == [(0, 0, 1.0)]
    assert measure.near_duplicates([text], ["v w x y z"]) == []


def test_near_duplicates_are_as_few_as_the_source_page_says(splits: dict[str, list[dict]]) -> None:
    """The near duplicates between the splits are those named in SOURCE.md."""
    page = (FOLDER / "SOURCE.md").read_text(encoding="utf-8")
    held_out = splits["validation"] + splits["test"]
    found = Counter()
    for left, right in ((splits["train"], held_out), (splits["validation"], splits["test"])):
        for i, j, _ in measure.near_duplicates([row["text"] for row in left], [row["text"] for row in right]):
            found[prepare.split_of(left[i]["source"]), prepare.split_of(right[j]["source"])] += 1
            assert f"`{left[i]['package']}` / `{right[j]['package']}`" in page
    for left, right in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert f"| {left} / {right} | 0 | {found[left, right]} |" in page
