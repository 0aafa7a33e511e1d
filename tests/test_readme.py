"""What the README tells to type works, and what it names is there."""

import csv
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from processes import ROOT
from recipe_runs import KEYS, QUICK, call, option_classes

import nlpxfer
from nlpxfer.cli import _parser
from nlpxfer.config import parse
from nlpxfer.errors import ConfigError

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(text, language=""):
    """Fenced blocks of a language, and with none named the indented ones."""
    if language:
        return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    return re.findall(
        r"(?:^    .+\n)+", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE
    )


def commands(text):
    """Commands of all blocks, with continued lines joined and comments taken off."""
    lines = "".join([*blocks(text, "sh"), *blocks(text)]).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def recipe_commands(text):
    """(recipe, words after it) of every command that starts one."""
    found = []
    for words in commands(text):
        for key in KEYS:
            if f"recipes/{key}.py" in words:
                found.append((key, words[words.index(f"recipes/{key}.py") + 1 :]))
            elif ["nlpxfer", "run", key] == words[:3]:
                found.append((key, words[3:]))
    return found


def test_each_make_target_exists():
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    named = {words[1] for words in commands(README) if words[0] == "make"}
    assert named == {"demo", "test"}
    assert named <= set(targets)
    assert {name for page in PAGES for name in re.findall(r"`make (\w+)", page.read_text())} <= set(targets)


def test_every_command_is_of_a_kind_that_is_tested_here():
    kinds = {words[0] for words in commands(README)}
    assert kinds <= {"make", "accelerate", "nlpxfer", "pip"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_each_recipe_is_called_with_options_that_it_has(page, monkeypatch):
    monkeypatch.chdir(ROOT)  # a YAML file is named from there
    for key, words in recipe_commands(page.read_text(encoding="utf-8")):
        parse(option_classes(key), words)


@pytest.mark.parametrize("key", KEYS)
def test_the_first_lines_of_a_recipe_are_commands_that_work(key, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = (ROOT / "recipes" / f"{key}.py").read_text().split('"""')[1]
    found = recipe_commands(text)
    assert {name for name, _ in found} == {key}
    assert len(found) >= 2
    for _, words in found:
        parse(option_classes(key), words)


def test_each_nlpxfer_command_can_be_read():
    found = [words[1:] for words in commands(README) if words[0] == "nlpxfer" and words[1] != "run"]
    assert found
    for words in found:
        _parser().parse_args(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_each_link_to_a_file_leads_there(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_the_numbers_of_the_bundled_data():
    folder = ROOT / "data" / "debian-sections"
    rows = [json.loads(line) for path in folder.glob("*.jsonl") for line in path.read_text().splitlines()]
    rows_said, sections_said = re.search(r"([\d,]+) Debian package descriptions, (\d+) sections", README).groups()
    assert int(rows_said.replace(",", "")) == len(rows)
    assert int(sections_said) == len({row["label"] for row in rows})


def test_a_team_can_follow_it_from_its_files_to_a_student(tiny_data, tiny_checkpoint, tmp_path, monkeypatch):
    """The commands under 'Your own task' as they stand, with a tiny checkpoint added; then its Python blocks."""
    monkeypatch.setenv("NLPXFER_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for source, name in (
        (tiny_data.train, "train.csv"),
        (tiny_data.test, "test.csv"),
        (tiny_data.unlabelled, "more.txt"),
    ):
        shutil.copy(source, tmp_path / name)
    section = README.split("## Your own task")[1].split("\n## ")[0]
    found = recipe_commands(section)
    assert [key for key, _ in found] == ["finetune", "distill"]
    tiny = [*QUICK, "--num_train_epochs", "1", "--control_arm", "false"]
    for key, words in found:
        folder = words[words.index("--output_dir") + 1]
        model = ["--model_name_or_path", str(tiny_checkpoint("bert"))]
        if "--output_dir" in words:
            at = words.index("--output_dir")
            words = words[:at] + words[at + 2 :]
        ended = call(key, Path(folder), *words, *tiny, *model)
        assert ended.code == 0, ended.err
        assert ended.report["recipe"] == key
    assert json.loads(Path("runs/student/config.json").read_text())["num_hidden_layers"] == 3
    push = next(words for words in commands(section) if words[:2] == ["nlpxfer", "push"])
    assert Path(push[2], "report.json").is_file(), "what is pushed is what was made"


def test_the_python_of_the_readme_does_what_the_commands_do(tiny_data, tiny_checkpoint, tmp_path, monkeypatch, capsys):
    """As it stands, with a tiny checkpoint and few steps added to each recipe."""
    monkeypatch.setenv("NLPXFER_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for source, name in ((tiny_data.train, "train.csv"), (tiny_data.test, "test.csv"), (tiny_data.test, "new.csv")):
        shutil.copy(source, tmp_path / name)
    quick = {word.removeprefix("--"): value for word, value in zip(QUICK[::2], QUICK[1::2], strict=True)}
    tiny = {**quick, "num_train_epochs": 1, "model_name_or_path": tiny_checkpoint("bert")}
    whole = nlpxfer.run_recipe
    monkeypatch.setattr(
        nlpxfer, "run_recipe", lambda name, **options: whole(name, **{**tiny, **options}), raising=False
    )
    (block,) = blocks(README, "python")
    exec(compile(block, "README.md", "exec"), {})
    assert "points of accuracy over control" in capsys.readouterr().out
    with Path("labelled.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 80
    assert {row["abstained"] for row in rows} <= {"True", "False", "true", "false"}
    with pytest.raises(ConfigError, match="did you mean num_train_epochs"):
        nlpxfer.run_recipe("finetune", num_train_epoch=1)
    with pytest.raises(ConfigError, match="Did you mean 'finetune'"):
        nlpxfer.run_recipe("fintune")
