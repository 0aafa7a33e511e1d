"""The benchmarks at smoke size on tiny data: that they run, resume and write what the tables need."""

from __future__ import annotations

import csv
import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from conftest import TinyData

from nlpxfer.classify import Classifier
from nlpxfer.errors import ConfigError

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
pytestmark = pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="benchmarks/ is not part of this distribution")


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """A benchmark script as a module; its neighbours are importable while the test runs."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def module(name: str) -> ModuleType:
        if name in ("data_sets", "measuring", "peers"):
            return importlib.import_module(name)
        key = f"nlpxfer_benchmark_{name}"
        spec = importlib.util.spec_from_file_location(key, BENCHMARKS / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[key] = loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
        return loaded

    return module


@pytest.fixture
def sets(tiny_data: TinyData) -> dict[str, dict[str, Any]]:
    return {
        "tiny": {
            "train_file": str(tiny_data.train),
            "validation_file": str(tiny_data.validation),
            "test_file": str(tiny_data.test),
            "max_length": 32,
        }
    }


@pytest.fixture
def words(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> list[str]:
    folders = ["--results", str(tmp_path / "results"), "--work", str(tmp_path / "work")]
    return ["--smoke", "--model", str(tiny_checkpoint("bert")), *folders]


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def test_finetune_measures_all_cells(load, sets, words):
    path = load("finetune").main(words, sets=sets)
    found = read(path)
    cells = found["cells"]
    assert {key.split("/")[1] for key in cells} == {"steps", "sweep", "nlpxfer", "stock", "probe", "ablation"}
    assert found["skipped"] == {}
    ratios = cells["tiny/steps"]["ratio"]["values"]
    seconds = cells["tiny/steps"]["seconds"]
    assert ratios == pytest.approx(np.divide(seconds["stock"], seconds["nlpxfer"]), rel=1e-4)
    assert len(cells["tiny/ablation"]["milliseconds_per_step"]) == 9
    curve = cells["tiny/nlpxfer/42"]["curve"]
    assert [point["epoch"] for point in curve] == [0, 1]
    assert 0 < curve[0]["seconds"] < curve[1]["seconds"] < cells["tiny/nlpxfer/42"]["train_seconds"]
    assert cells["tiny/nlpxfer/42"]["probe"]["validation_accuracy"] == curve[0]["validation_accuracy"]
    assert len(cells["tiny/stock/42"]["curve"]) == 2
    assert cells["tiny/stock/42"]["learning_rate"] in (1e-4, 3e-4, 1e-3)
    summary = found["summary"]["tiny"]
    assert summary["nlpxfer"]["test_accuracy"]["mean"] == pytest.approx(
        np.mean([cells[f"tiny/nlpxfer/{seed}"]["test_accuracy"] for seed in (42, 43)]), rel=1e-5
    )
    assert "_correct" not in cells["tiny/nlpxfer/42"]
    assert "| tiny |" in load("table").main([str(path)])


def test_methods_side_by_side(load, sets, words):
    bench = load("finetune_methods")
    only = [word for name in ("lp-ft", "stock", "lora", "features", "r-drop", "taught") for word in ("--only", name)]
    path = bench.main([*words, *only], sets=sets)
    found = read(path)
    methods = found["summary"]["tiny"]["methods"]
    assert list(methods) == ["lp-ft", "features", "lora", "r-drop", "lora-r-drop", "taught", "stock"]
    assert methods["lora"]["trained_parameters"] < methods["lp-ft"]["trained_parameters"]
    accuracies = [found["cells"][f"tiny/lora/{seed}"]["metrics"]["test"]["accuracy"] for seed in (42, 43)]
    assert methods["lora"]["test"]["accuracy"]["mean"] == pytest.approx(np.mean(accuracies), rel=1e-5)
    targets = found["summary"]["tiny"]["targets"]
    assert set(targets) == {"features: points lost", "LoRA: points lost", "features: share of stock's time"}
    assert "| LoRA |" in load("table").main([str(path)])


def test_methods_may_be_of_several_machines(load, sets, words, monkeypatch):
    bench, measuring = load("finetune_methods"), load("measuring")
    monkeypatch.setattr(bench, "SMOKE", replace(bench.SMOKE, methods=("features",)))
    first = read(bench.main([*words, "--only", "stock"], sets=sets))
    other = measuring.machine() | {"processor": "another one", "cores": 64}
    monkeypatch.setattr(measuring, "machine", lambda: other)
    ran = []  # in this process: starting another takes seconds
    monkeypatch.setattr(bench, "most_memory", lambda run, *v, **n: ran.append(run(*v, **n)) or 10**9 * len(ran))
    path = bench.main([*words, "--only", "memory", "--only", "features"], sets=sets)
    found = read(path)
    assert found["machine"] == first["machine"]
    assert found["cells"]["tiny/memory"]["peak_bytes"] == {"features": 10**9, "stock": 2 * 10**9}
    methods = found["summary"]["tiny"]["methods"]
    assert [item["peak_bytes"] for item in methods.values()] == [10**9, 2 * 10**9]
    assert [name for name, item in methods.items() if item["elsewhere"]] == ["features"]
    assert "features: share of stock's time" not in found["summary"]["tiny"]["targets"]
    table = load("table").main([str(path)])
    assert "| frozen features, logistic regression † |" in table
    assert "| 1000 MB |" in table


def test_memory_is_that_of_a_process_of_its_own(load):
    most_memory = load("measuring").most_memory
    held = np.ones(10**8)  # 800 MB of this process
    small, large = (most_memory(exec, f"bytearray(b'x') * {size}") for size in (10, 10**9))
    assert small < held.nbytes
    assert 10**9 < large < small + 10**9


def test_students_side_by_side(load, sets, words):
    path = load("students").main(words, sets=sets)
    found = read(path)
    keys = {key.removeprefix("tiny/") for key in found["cells"]}
    own = {"teacher", "2 layers", "static", "speed"}
    others = {"model2vec", "textbrewer", "sentence-transformers", "int8"}  # as far as they are installed
    others |= {"more-textbrewer", "more-sentence-transformers"}
    assert own | {f"few-{key}" for key in own - {"speed"}} | {"more-static", "mixed-static"} == keys - others
    assert keys & others == others - {key.removeprefix("tiny/").partition(":")[0] for key in found["skipped"]}
    summary = found["summary"]["tiny"]
    static, teacher = summary["students"]["static"], found["cells"]["tiny/teacher"]
    accuracies = [arm["test_accuracy"]["mean"] for arm in (static["distilled"], static["teacher"])]
    assert static["teacher"]["test_accuracy"]["mean"] == pytest.approx(teacher["test_accuracy"]["mean"], abs=1e-5)
    assert static["kept"]["value"] == pytest.approx(accuracies[0] / accuracies[1], rel=1e-4)
    for prefix in ("few-", "more-"):
        assert summary[f"{prefix}students"]["static"]["rows"]["unlabelled"] > 0
    assert 80 < summary["mixed-students"]["static"]["rows"]["mixed"] <= 96
    assert summary["static_speed"]["value"] > 0
    tables = load("table").main([str(path)])
    assert "| tiny | 96 | static |" in tables
    if "tiny/int8" not in found["skipped"]:
        cell = summary["int8"]
        assert (cell["student"], set(cell["ratios"])) == ("2 layers", {"float32", "int8"})
        assert cell["accuracy"]["float32"] == pytest.approx(
            summary["students"]["2 layers"]["distilled"]["test_accuracy"]["mean"], abs=1e-5
        )
        assert 0.5 < cell["same_label"] <= 1
        assert "| tiny | 2 layers | " in tables


def test_students_of_another_machine_say_so(load, sets, words, tmp_path, monkeypatch):
    """Each cell has its own teacher's scores; the teacher, whose folder stayed behind, is trained again."""
    bench, measuring = load("students"), load("measuring")
    first = read(bench.main([*words, "--only", "tiny/teacher", "--only", "tiny/static"], sets=sets))
    assert not any("machine" in cell for cell in first["cells"].values())
    shutil.rmtree(tmp_path / "work")
    other = measuring.machine() | {"processor": "another one", "cores": 64}
    monkeypatch.setattr(measuring, "machine", lambda: other)
    path = bench.main([*words, "--only", "mixed-"], sets=sets)
    second = read(path)
    assert second["machine"] == first["machine"]
    assert second["versions"] == first["versions"]
    new = second["cells"].pop("tiny/mixed-static")
    assert second["cells"] == first["cells"]
    assert new["machine"] == other
    assert (tmp_path / "work" / "students-smoke-tiny" / "teacher" / "report.json").is_file()
    tables = load("table").main([str(path)])
    assert "| tiny | 96 | static † |" in tables
    assert "| tiny | 96 | static |" in tables
    assert "; † 64 cores, another one, " in tables
    third = read(bench.main([*words, "--only", "mixed-"], sets=sets))
    assert third["cells"]["tiny/mixed-static"] == new, "finished"


def test_seconds_of_another_machine_are_refused(load, sets, words, monkeypatch):
    bench, measuring = load("finetune"), load("measuring")
    only = ["--only", "sweep/0.0001"]
    bench.main([*words, *only], sets=sets)
    other = measuring.machine() | {"processor": "another one"}
    monkeypatch.setattr(measuring, "machine", lambda: other)
    with pytest.raises(ConfigError, match="measured with other machine: processor"):
        bench.main([*words, *only], sets=sets)


def test_unknown_data_are_named(load, words):
    with pytest.raises(ConfigError, match="'bank' is not known"):
        load("finetune").main([*words, "--data", "bank"])


def test_finished_cells_are_not_measured_again(load, sets, words):
    bench = load("finetune")
    only = ["--only", "sweep/0.0001", "--only", "sweep/0.0003"]
    first = read(bench.main([*words, *only[:2]], sets=sets))
    second = read(bench.main([*words, *only], sets=sets))
    assert list(first["cells"]) == ["tiny/sweep/0.0001"]
    assert list(second["cells"]) == ["tiny/sweep/0.0001", "tiny/sweep/0.0003"]
    assert second["cells"]["tiny/sweep/0.0001"] == first["cells"]["tiny/sweep/0.0001"]
    assert "results" not in second["command"]
    assert "--only sweep/0.0001" in second["command"]


def test_finished_cells_of_other_rows_are_refused(load, sets, words):
    bench = load("finetune")
    bench.main([*words, "--only", "sweep/0.0001"], sets=sets)
    other = {"tiny": sets["tiny"] | {"train_file": sets["tiny"]["validation_file"]}}
    with pytest.raises(ConfigError, match="other rows"):
        bench.main([*words, "--only", "sweep/0.0001"], sets=other)


def test_distill_measures_all_cells(load, sets, words):
    path = load("distill").main([*words, "--only", "teacher", "--only", "nlpxfer", "--only", "control",
                                 "--only", "trainer", "--only", "speed", "--only", "cost"], sets=sets)  # fmt: skip
    found = read(path)
    assert {key.split("/")[1] for key in found["cells"]} == {
        "teacher", "sweep-trainer", "nlpxfer", "trainer", "control", "speed", "cost",
    }  # fmt: skip
    for student in ("3 layers", "2 layers", "static", "3 layers, larger teacher"):
        cached, each_step = (found["cells"][f"tiny/cost/{student}/{kind}"] for kind in ("cached", "each step"))
        assert cached["steps"] == each_step["steps"] == 15
        assert found["summary"]["tiny"]["cost"][student]["value"] == pytest.approx(
            cached["seconds"] / each_step["seconds"], rel=1e-4
        )
    treated, control = found["cells"]["tiny/nlpxfer/42"], found["cells"]["tiny/control/42"]
    assert treated["steps"] == control["steps"]
    assert treated["seconds"] > treated["train_seconds"]
    summary = found["summary"]["tiny"]
    teacher = found["cells"]["tiny/teacher"]["test_accuracy"]
    assert summary["retention"]["value"] == pytest.approx(
        summary["nlpxfer"]["test_accuracy"]["mean"] / teacher, rel=1e-4
    )
    gains = [
        found["cells"][f"tiny/{arm}/{seed}"]["test_accuracy"] for arm in ("nlpxfer", "control") for seed in (42, 43)
    ]
    assert summary["gain"]["gain"] == pytest.approx(np.mean(gains[:2]) - np.mean(gains[2:]), abs=1e-4)
    assert summary["time_ratio"]["trainer"]["value"] == pytest.approx(
        summary["nlpxfer"]["seconds"]["median"] / summary["trainer"]["seconds"]["median"], rel=1e-4
    )
    assert "| tiny |" in load("table").main([str(path)])


def test_predict_measures_speed_and_memory(load, sets, words, tiny_data, tmp_path):
    bench = load("predict")
    sweeps = [f"sweep/{precision}/{batch}" for precision in ("float32", "bfloat16") for batch in (1, 8, 32, 128)]
    only = ["sweep", "rates", "memory/int8"]
    path = bench.main([*words, *(word for cell in only for word in ("--only", cell))], sets=sets)
    found = read(path)
    assert sorted(found["cells"]) == sorted(f"tiny/{cell}" for cell in (*sweeps, "rates", "memory/int8"))
    rates = found["cells"]["tiny/rates"]
    best = max((found["cells"][f"tiny/{cell}"] for cell in sweeps[:4]), key=lambda cell: cell["rows_per_second"])
    assert rates["batch_sizes"]["float32"] == best["batch_size"]
    assert rates["same_label_as_pipeline"]["onnx"] == 1
    rows = list(csv.DictReader(tiny_data.test.read_text(encoding="utf-8").splitlines()))[::2][:32]
    classifier = Classifier.load(str(tmp_path / "work" / "predict-smoke-tiny" / "whole" / "model"), bf16=False)
    right = classifier.logits([row["text"] for row in rows]).argmax(axis=1) == [
        classifier.schema.encode(row["label"]) for row in rows
    ]
    assert rates["accuracy"]["onnx"] == rates["accuracy"]["pipeline float32"] == pytest.approx(right.mean())
    assert found["summary"]["tiny"]["speed"]["int8"]["value"] == rates["ratios"]["int8"]["median"]
    memory = found["cells"]["tiny/memory/int8"]
    assert memory["rows"] == 3000
    assert len(memory["samples"]) > 5
    assert memory["growth"] == pytest.approx(memory["late_bytes"] / memory["early_bytes"], rel=1e-4)
    tables = load("table").main([str(path)])
    assert "| tiny | predict, ONNX int8 |" in tables
    assert f"batches of {best['batch_size']} |" in tables


def test_a_row_out_of_its_place_is_noticed(load, tmp_path):
    bench = load("predict")
    lines = ["row,text,predicted_label", "0,a,x", "1,b,x", "2,a,x"]
    labelled = tmp_path / "out.csv"
    for changed, message in (
        (lines, None),
        ([lines[0], lines[2], lines[1], lines[3]], "row 0 of out.csv"),
        (lines[:-1], "2 rows instead of 3"),
        ([*lines[:3], "2,a,"], "row 2 of out.csv"),
    ):
        labelled.write_text("\n".join(changed) + "\n")
        if message is None:
            bench.check_rows(labelled, ["a", "b"], 3)
            continue
        with pytest.raises(RuntimeError, match=message):
            bench.check_rows(labelled, ["a", "b"], 3)


def test_memory_is_compared_between_parts_of_the_time(load):
    bench = load("predict")
    samples = [(float(second), 100 if second < 2 else 300 + second) for second in range(11)]
    assert (bench.fifth(samples, 0), bench.fifth(samples, 1), bench.fifth(samples, 4)) == (302, 304, 310)
    with pytest.raises(RuntimeError, match="exit code 3"):
        bench.watch([sys.executable, "-c", "raise SystemExit(3)"], every=0.01)


def test_peer_that_is_missing_is_named(load, sets, words, monkeypatch):
    monkeypatch.setitem(sys.modules, "textbrewer", None)
    only = ["--only", "teacher", "--only", "sweep-textbrewer/0.0001"]
    found = read(load("distill").main([*words, *only], sets=sets))
    assert "textbrewer cannot be imported" in found["skipped"]["tiny/sweep-textbrewer/0.0001"]


def test_teacher_in_the_loop_has_the_loss_of_nlpxfer(load, tiny_checkpoint, tmp_path):
    import torch
    from transformers import AutoModelForSequenceClassification

    from nlpxfer.methods.distill import Distill

    peers = load("peers")
    teacher, student = (
        AutoModelForSequenceClassification.from_pretrained(
            tiny_checkpoint("bert", kind="classifier", seed=seed)
        ).eval()
        for seed in (1, 2)
    )
    ids = torch.randint(5, 60, (4, 7))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([0, 1, 2, 3])}
    trainer = peers.TeacherInTheLoop(
        student,
        peers.stock_arguments(tmp_path, learning_rate=1e-4, epochs=1, seed=0),
        teacher=teacher,
        temperature=3.0,
        kd_weight=0.7,
    )
    with torch.no_grad():
        theirs = trainer.compute_loss(student, batch)
        batch["teacher_logits"] = teacher(ids).logits
        terms = Distill(temperature=3.0, kd_weight=0.7).loss_terms(student, batch)
    ours = sum(term.weight * term.rows_B.mean() for term in terms.values())
    assert theirs.item() == pytest.approx(ours.item(), rel=1e-5)


def test_banking77_validation_rows_are_chosen_by_hash(load, tmp_path, monkeypatch):
    source = tmp_path / "banking77"
    source.mkdir()
    texts = [f"text {number}" for number in range(40)]
    lines = "".join(f"{text},label\n" for text in texts)
    for name in ("train", "test"):
        (source / f"{name}.csv").write_text("text,label\n" + lines, encoding="utf-8")
    monkeypatch.setenv("NLPXFER_DATA", str(tmp_path))
    found = load("data_sets").data_sets(["banking77"], tmp_path / "work")["banking77"]
    held = Path(found["validation_file"]).read_text(encoding="utf-8").splitlines()[1:]
    kept = Path(found["train_file"]).read_text(encoding="utf-8").splitlines()[1:]
    digests = [
        subprocess.run(["sha1sum"], input=t.encode(), capture_output=True, check=True).stdout[:40] for t in texts
    ]
    expected = [f"{t},label" for t, digest in zip(texts, digests, strict=True) if int(digest, 16) % 10 == 0]
    assert held == expected
    assert sorted(held + kept) == sorted(f"{text},label" for text in texts)


def test_evaluation_rows_can_be_a_stratified_sample(load, tmp_path, monkeypatch):
    source = tmp_path / "scicite"
    source.mkdir()
    for name in ("train", "validation", "test"):
        lines = "".join(f"{name} {number},{'ab'[number % 4 == 0]}\n" for number in range(40))
        (source / f"{name}.csv").write_text("text,label\n" + lines, encoding="utf-8")
    monkeypatch.setenv("NLPXFER_DATA", str(tmp_path))
    values = load("data_sets").data_sets(["scicite"], tmp_path / "work", {"validation": 100, "test": 12})["scicite"]
    rows = {
        name: Path(values[f"{name}_file"]).read_text(encoding="utf-8").splitlines()[1:]
        for name in ("train", "validation", "test")
    }
    assert {name: len(lines) for name, lines in rows.items()} == {"train": 40, "validation": 40, "test": 12}
    assert sum(line.endswith(",b") for line in rows["test"]) == 3


def test_no_data_is_said(load, monkeypatch, tmp_path):
    monkeypatch.delenv("NLPXFER_DATA", raising=False)
    with pytest.raises(ConfigError, match="no data"):
        load("data_sets").data_sets(["banking77"], tmp_path)


def test_a_target_missed_by_less_than_is_shown_says_so(load):
    table = load("table")
    judged = load("measuring").judged
    assert table.verdict(judged(0.9299, 0.93), table.percent) == "just below 93.0 % (missed: ≥ 93.0 %)"
    assert table.verdict(judged(0.93, 0.93), table.percent) == "93.0 % (met: ≥ 93.0 %)"
    assert table.verdict(judged(0.928, 0.93), table.percent) == "92.8 % (missed: ≥ 93.0 %)"
    assert table.verdict(judged(0.0504, 0.05, at_most=True), table.percent) == "just above 5.0 % (missed: ≤ 5.0 %)"


def test_tables_take_the_place_of_those_of_a_page(load, tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("# Title\n\nText.\n\n### old, small\n\nfigures\n", encoding="utf-8")
    tables = load("table").main(["--page", str(page)])
    assert page.read_text(encoding="utf-8") == f"# Title\n\nText.\n\n{tables}"
    page.write_text("# Title\n", encoding="utf-8")
    with pytest.raises(SystemExit):
        load("table").main(["--page", str(page)])
    assert "no heading" in capsys.readouterr().err
    assert page.read_text(encoding="utf-8") == "# Title\n"


def test_gpu_benchmark_refuses_without_a_gpu(load, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match="GPU"):
        load("gpu").main([])


def test_figures_of_the_pages_are_those_of_the_results(load: Callable[[str], ModuleType]) -> None:
    """docs/measured.md holds the tables as they are made from benchmarks/results, the README some of their rows."""
    tables = load("table").main([])
    page = (BENCHMARKS.parent / "docs" / "measured.md").read_text(encoding="utf-8")
    assert page.endswith(f"\n{tables}"), "python benchmarks/table.py --page docs/measured.md"
    readme = (BENCHMARKS.parent / "README.md").read_text(encoding="utf-8")
    measured = readme.partition("## Measured")[2].partition("\nMore: ")[0]
    rows = [line for line in measured.splitlines() if line.startswith("|")]
    assert rows
    assert set(rows) <= set(tables.splitlines())
