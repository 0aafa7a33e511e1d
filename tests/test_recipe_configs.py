"""The YAML files beside the recipes say what the code does, and one stem runs through the project."""

import dataclasses
import re
import shlex

import pytest
import yaml
from processes import ROOT
from recipe_runs import KEYS, option_classes
from transformers import TrainingArguments

from nlpxfer.config import REFUSED_OPTIONS, parse
from nlpxfer.methods import REGISTRY
from nlpxfer.recipes import load_recipe

LINE = re.compile(r"(?P<key>\w+): (?P<value>[^#]+?)  # (?P<help>.+)")


def yaml_of(key):
    return ROOT / "recipes" / "configs" / f"{key}.yaml"


def own_options(key):
    """The recipe's options without those that it takes over from TrainingArguments as they are, or refuses."""
    fields = {}
    for cls in option_classes(key):
        ours = [base for base in cls.__mro__ if base.__module__ != TrainingArguments.__module__]
        declared = {name for base in ours for name in base.__dict__.get("__annotations__", {})}
        declared -= REFUSED_OPTIONS.keys() | getattr(cls, "without_effect", {}).keys()
        fields |= {f.name: f for f in dataclasses.fields(cls) if f.name in declared}
    return fields


@pytest.mark.parametrize("key", KEYS)
def test_each_line_is_an_option_with_its_default_and_its_help(key):
    fields = own_options(key)
    lines = [line for line in yaml_of(key).read_text().splitlines() if line and not line.startswith("#")]
    found = {}
    for line in lines:
        match = LINE.fullmatch(line)
        assert match, line
        found[match["key"]] = (yaml.safe_load(match["value"]), match["help"])
    assert found == {name: (f.default, f.metadata["help"]) for name, f in fields.items()}


@pytest.mark.parametrize("key", KEYS)
def test_the_file_is_accepted_and_changes_nothing(key, tmp_path):
    classes = option_classes(key)
    words = ["--output_dir", str(tmp_path)]
    with_file, without = (parse(classes, [*first, *words]) for first in ([str(yaml_of(key))], []))
    for one, other in zip(with_file, without, strict=True):
        names = {f.name for f in dataclasses.fields(one)} - {"accelerator_config"}
        assert {name: getattr(one, name) for name in names} == {name: getattr(other, name) for name in names}


@pytest.mark.parametrize("key", KEYS)
def test_the_commands_in_the_header_can_be_read(key):
    classes = option_classes(key)
    commands = re.findall(r"^#     (.+)$", yaml_of(key).read_text(), flags=re.MULTILINE)
    assert len(commands) >= 2
    for command in commands:
        words = shlex.split(command)
        script = words.index(f"recipes/{key}.py")
        assert words[:2] == ["accelerate", "launch"]
        assert words[script + 1] == f"recipes/configs/{key}.yaml"
        parse(classes, [str(yaml_of(key)), *words[script + 2 :]])


@pytest.mark.parametrize("row", REGISTRY, ids=lambda row: row.key)
def test_one_stem_everywhere(row):
    assert row.target.partition(":")[0] == f"nlpxfer.methods.{row.key}"
    for path in (f"nlpxfer/methods/{row.key}.py", f"recipes/{row.key}.py", f"recipes/configs/{row.key}.yaml"):
        assert (ROOT / path).is_file(), path
    rows = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("|")]
    assert any(f"`{row.key}`" in line.split("|")[1] for line in rows), f"README.md has no table row for `{row.key}`"


def test_no_recipe_without_a_method():
    stems = {path.stem for path in (ROOT / "recipes").glob("*.py")}
    configs = {path.stem for path in (ROOT / "recipes" / "configs").glob("*.yaml")}
    assert stems == configs == set(KEYS)


def test_main_uses_the_same_options_as_this_test(monkeypatch, tmp_path):
    """The classes found by name are those that `main` parses."""
    for key in KEYS:
        classes = option_classes(key)
        asked = []

        def stop(types, argv, asked=asked):
            asked.append(types)
            raise SystemExit(9)

        monkeypatch.setattr(load_recipe(key), "parse", stop)
        with pytest.raises(SystemExit):
            load_recipe(key).main([])
        assert set(asked[0]) == set(classes)
