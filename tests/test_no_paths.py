"""Nothing that a run writes names a folder of this machine, wherever its checkpoints lie."""

import json

import pytest
from recipe_runs import finished, tiny_words

QUICKLY = ["--max_train_samples", "32"]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path_factory, monkeypatch):
    """The folder of temporary files is as unknown as /srv is: only what is a path by itself can be cut."""
    monkeypatch.setattr("nlpxfer.report.privacy._roots", list)
    monkeypatch.setenv("NLPXFER_CACHE", str(tmp_path_factory.mktemp("cache")))


def written(folder):
    """Texts of a run by name."""
    known = (".json", ".md", ".csv", ".jsonl")
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.suffix in known}


def named_places(run, *places):
    return [(name, str(place)) for name, text in written(run.folder).items() for place in places if str(place) in text]


@pytest.mark.parametrize("recipe", ["finetune", "adapters", "features"])
def test_a_checkpoint_goes_by_its_own_name(recipe, tiny_data, tiny_checkpoint, tmp_path):
    base = tiny_checkpoint("bert", layers=2)
    run = finished(recipe, tmp_path / "out", *tiny_words(tiny_data, base, key=recipe), *QUICKLY)
    assert named_places(run, base.parent) == []
    assert any(arm["description"].startswith(f"{base.name}, ") for arm in run.report["arms"])


def test_several_teachers_are_recorded_each_by_its_name(tiny_data, tiny_checkpoint, tmp_path):
    base = tiny_checkpoint("bert", layers=2)
    teachers = [tiny_checkpoint("bert", "classifier"), tiny_checkpoint("gpt2", "classifier")]
    words = [*tiny_words(tiny_data), *QUICKLY, "--student_name_or_path", str(base)]
    run = finished("distill", tmp_path / "out", *words, "--teacher_name_or_path", ",".join(map(str, teachers)))
    assert named_places(run, base.parent, *(teacher.parent for teacher in teachers)) == []
    recorded = json.loads((run.folder / "run.json").read_text())["config"]["teacher_name_or_path"]
    assert recorded == [teacher.name for teacher in teachers]
    facts = run.report["checks"]["teacher"]["teachers"]
    assert [fact["name"] for fact in facts] == [teacher.name for teacher in teachers]


def test_a_student_of_a_teacher_elsewhere(tiny_data, tiny_checkpoint, tmp_path):
    base, teacher = tiny_checkpoint("bert"), tiny_checkpoint("bert", "classifier")
    words = [*tiny_words(tiny_data, base), *QUICKLY, "--student_num_layers", "2"]
    run = finished("distill", tmp_path / "out", *words, "--teacher_name_or_path", str(teacher))
    assert named_places(run, base.parent, teacher.parent) == []
    assert f"distilled from {teacher.name}" in (run.folder / "README.md").read_text().replace("\\", "")
