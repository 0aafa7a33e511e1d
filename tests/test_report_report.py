"""report.json and run.json: the contract, strict JSON, atomic files, no machine paths and no tokens."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import stat
import tempfile
from pathlib import Path

import numpy as np
import pytest

from nlpxfer.errors import ConfigError, DataError, NotFiniteError
from nlpxfer.evaluate import Cost, paired_gain
from nlpxfer.report import (
    Arm,
    SeedResult,
    Verdict,
    build_report,
    mean_metrics,
    scrub,
    scrub_text,
    validate_report,
    write_report,
    write_run,
)


def metrics(accuracy: float, macro_f1: float = 0.5, loss: float = 0.7):
    values = {"accuracy": accuracy, "macro_f1": macro_f1, "loss": loss}
    return {"validation": values, "test": values}


def example(**changes):
    seeds = [SeedResult(seed=1, metrics=metrics(0.8)), SeedResult(seed=2, metrics=metrics(0.9))]
    arms = [
        Arm(name="distilled", metrics=mean_metrics(seeds), seconds=10.0, parameters=100, bytes=400, per_seed=seeds),
        Arm(name="control", metrics=metrics(0.7), seconds=9.5, parameters=100),
    ]
    parts = {
        "verdict": Verdict.of(
            paired_gain([np.ones(50)] * 2, [np.zeros(50)] * 2), treated="distilled", versus="control"
        ),
        "cost": Cost(
            train_seconds=1.5, total_seconds=2.0, tokens=30, tokens_per_second=20.0, peak_memory_bytes=1_000_000
        ),
        "data": {"rows": {"train": 5, "test": 3}, "classes": 2, "leaks": {"test": np.int64(1)}},
        "checks": {"labels_match": True},
    }
    return build_report("distill", arms, **{**parts, **changes})


def strictly(text: str):
    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_report_keeps_the_contract(tmp_path: Path):
    path = write_report(tmp_path, example())
    assert path == tmp_path / "report.json"
    report = strictly(path.read_text(encoding="utf-8"))
    assert list(report) == ["schema_version", "recipe", "metrics", "arms", "verdict", "cost", "data", "checks"]
    assert report["recipe"] == "distill"
    assert report["metrics"]["test"]["accuracy"] == pytest.approx(0.85)
    assert {"accuracy", "macro_f1", "loss"} == set(report["metrics"]["validation"])
    assert [arm["name"] for arm in report["arms"]] == ["distilled", "control"]
    assert report["arms"][0]["per_seed"][1]["seed"] == 2
    assert (report["verdict"]["gain"], report["verdict"]["call"]) == (1.0, "positive")
    assert report["verdict"]["versus"] == "control"
    assert report["cost"]["tokens"] == 30
    assert report["data"]["leaks"] == {"test": 1}
    assert validate_report(report) == []
    assert os.listdir(tmp_path) == ["report.json"]


def test_the_saved_arm_gives_the_metrics():
    arms = example().arms
    report = dataclasses.asdict(example())
    assert build_report("x", arms, treated="control", **_parts(report)).metrics == metrics(0.7)
    with pytest.raises(ConfigError, match=r"No arm is named other\n.*distilled, control"):
        build_report("x", arms, treated="other", **_parts(report))
    with pytest.raises(ConfigError, match="different names"):
        build_report("x", [arms[0], arms[0]], **_parts(report))


def _parts(report):
    return {name: report[name] for name in ("verdict", "cost", "data", "checks")}


def test_a_run_without_control_keeps_the_shape_of_the_verdict(tmp_path: Path):
    write_report(tmp_path, example(verdict=Verdict.unmeasured("no control arm was asked for")))
    verdict = strictly((tmp_path / "report.json").read_text(encoding="utf-8"))["verdict"]
    assert (verdict["gain"], verdict["low"], verdict["high"], verdict["call"]) == (None, None, None, "unclear")
    assert verdict["reason"] == "no control arm was asked for"


@pytest.mark.parametrize("bad", [math.nan, math.inf, np.float32("nan")])
def test_a_score_that_is_not_finite_is_refused(tmp_path: Path, bad):
    broken = dataclasses.replace(example(), metrics=metrics(0.5, loss=bad))
    with pytest.raises(NotFiniteError, match=r"report\.metrics\.validation\.loss is (nan|inf)"):
        write_report(tmp_path, broken)
    assert os.listdir(tmp_path) == []


def test_everything_that_is_missing_is_listed(tmp_path: Path):
    faults = validate_report(
        {
            "schema_version": 2,
            "metrics": {"test": {"accuracy": 1.0}},
            "arms": [{"name": "a", "metrics": {}}],
            "verdict": {"gain": None, "low": None, "high": None, "call": "good"},
            "cost": {},
            "data": {"rows": 1},
        }
    )
    assert set(faults) >= {
        "report.recipe is missing",
        "report.checks is missing",
        "schema_version is 2, not 1",
        "metrics.validation is missing",
        "metrics.test.loss is missing",
        "arms[0].seconds is missing",
        "arms[0].metrics.test is missing",
        "verdict.call is 'good', not one of positive, unclear, negative",
        "verdict has neither a gain nor a reason",
        "cost.tokens is missing",
        "data.leaks is missing",
    }
    assert validate_report({"arms": [], "verdict": None, "metrics": 3})[-3:] == [
        "metrics is not an object",
        "arms is not a list with at least one arm",
        "verdict is not an object",
    ]
    with pytest.raises(ConfigError, match=r"data\.rows is missing(.|\n)*data\.leaks is missing"):
        write_report(tmp_path, example(data={"classes": 2}))


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_report(tmp_path, example())
    before = (tmp_path / "report.json").read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report(tmp_path, example(checks={"new": True}))
    assert (tmp_path / "report.json").read_bytes() == before
    assert os.listdir(tmp_path) == ["report.json"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
def test_files_have_the_rights_that_the_user_set(tmp_path: Path):
    old = os.umask(0o027)
    try:
        path = write_report(tmp_path, example())
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_mean_metrics():
    seeds = [SeedResult(seed=0, metrics=metrics(0.25)), SeedResult(seed=1, metrics=metrics(0.75))]
    assert mean_metrics(seeds) == metrics(0.5)
    with pytest.raises(DataError, match="No seeds"):
        mean_metrics([])
    with pytest.raises(ConfigError, match="measured differently"):
        mean_metrics([seeds[0], SeedResult(seed=1, metrics={"test": {"accuracy": 1.0}})])


def test_deviation_needs_two_seeds():
    assert example().arms[0].deviation("accuracy") == pytest.approx(0.1 / math.sqrt(2))
    assert example().arms[1].deviation("accuracy") is None


def test_verdict_sentence():
    verdict = Verdict(
        call="negative", gain=-0.0123, low=-0.02, high=-0.001, metric="macro_f1", versus="teacher", level=0.9, seeds=1
    )
    assert verdict.sentence() == (
        "negative: -1.2 points of macro-F1 over teacher (90 % interval -2.0 to -0.1, 1 seed)"
    )
    assert Verdict.unmeasured("no control").sentence() == "unclear: no control"
    few = Verdict.of(paired_gain([[1, 1, 1]], [[0, 0, 1]]), treated="distilled", versus="control")
    assert few.sentence().startswith("unclear: +66.7 points of accuracy over control (95 % interval ")
    assert few.sentence().endswith(", 1 seed): they differ on 2 of the test rows, and fewer than 6 cannot tell")


def test_the_sentence_of_an_error_says_which_way():
    shared = {"metric": "mean_absolute_error", "versus": "control", "level": 0.95, "seeds": 1}
    better = Verdict(call="positive", gain=0.25, low=0.125, high=0.5, **shared).sentence()
    assert better == (
        "positive: mean absolute error smaller by 0.25 than that of control (95 % interval 0.125 to 0.5, 1 seed)"
    )
    worse = Verdict(call="negative", gain=-0.25, low=-0.5, high=-0.125, **shared).sentence()
    assert worse == (
        "negative: mean absolute error larger by 0.25 than that of control (95 % interval 0.125 to 0.5, 1 seed)"
    )


def test_run_json_holds_what_a_repeat_needs_and_nothing_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    home = tmp_path / "home" / "alice"
    home.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))
    work = tmp_path / "project"
    work.mkdir()
    monkeypatch.chdir(work)
    path = write_run(
        work / "out",
        recipe="distill",
        config={
            "output_dir": str(work / "out"),
            "train_file": "/data/private/train.csv",
            "learning_rate": 2e-5,
            "hub_token": "secret",
            "note": f"read {home}/x/y.csv, then hf_abcdefghijklmnopqrstuvwxyz",
            "hub_model_id": "team/model",
            "pad_token": "[PAD]",
        },
        seeds=[1, 2],
        data_fingerprint="abc",
        parents={"teacher": {"name": str(home / "models" / "big"), "sha256": "0f"}},
        facts={"processes": 1},
    )
    text = path.read_text(encoding="utf-8")
    run = strictly(text)
    assert run["config"] == {
        "output_dir": "out",
        "train_file": "train.csv",
        "learning_rate": 2e-5,
        "hub_token": "<removed>",
        "note": "read y.csv, then <removed>",
        "hub_model_id": "team/model",
        "pad_token": "[PAD]",
    }
    assert run["parents"]["teacher"] == {"name": "big", "sha256": "0f"}
    assert (run["seeds"], run["data_fingerprint"]) == ([1, 2], "abc")
    assert {"python", "torch", "transformers", "datasets", "accelerate", "peft", "evaluate", "nlpxfer"} <= set(
        run["versions"]
    )
    assert run["versions"]["torch"]
    for private in ("alice", str(tmp_path), "secret", "hf_abc"):
        assert private not in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://huggingface.co/a/b", "https://huggingface.co/a/b"),
        ("https://me:pass@example.org/a", "https://example.org/a"),
        ("sentence-transformers/all-MiniLM-L6-v2", "sentence-transformers/all-MiniLM-L6-v2"),
        ("and/or", "and/or"),
        ("a / b", "a / b"),
        ("~/models/x", "x"),
        ("see ~bob/models/x, please", "see x, please"),
        (r"C:\Users\bob\x.csv", "x.csv"),
        ("file:///srv/models/x", "x"),
        ("/srv/models/x y.csv", "x y.csv"),
        ("/", "/"),
    ],
)
def test_scrubbed_texts(text, expected):
    assert scrub_text(text) == expected


def test_scrub_knows_the_folders_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    temporary, home = tempfile.gettempdir(), Path.home()
    assert scrub_text(str(tmp_path / "runs" / "a")) == "runs/a"
    assert scrub_text(str(tmp_path)) == "."
    assert scrub_text(f"from {tmp_path}/runs/a to {temporary}/b/c.csv") == "from runs/a to c.csv"
    assert scrub_text(f"{tmp_path}/../x") == "x"
    assert scrub_text(str(home)) == "<removed>"
    assert scrub_text(f"runs{temporary}/x") == f"runs{temporary}/x"  # a relative path, not the folder
    assert scrub({str(tmp_path / "k"): [str(tmp_path / "v")]}) == {"k": ["v"]}


def test_label_names_in_a_report_are_left_alone():
    report = example(data={"rows": {}, "classes": {"/r/books": 3, "/r/films": 2}, "leaks": 0})
    assert report.to_dict()["data"]["classes"] == {"/r/books": 3, "/r/films": 2}


def test_a_value_that_json_cannot_hold_is_named():
    with pytest.raises(
        ConfigError, match=r"report\.checks\.folder is a PosixPath|report\.checks\.folder is a Windows"
    ):
        example(checks={"folder": Path("x")}).to_dict()
