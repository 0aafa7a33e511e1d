"""The model card: metadata that the Hub reads, text that shows names as they are, a snippet that runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from nlpxfer.evaluate import Cost
from nlpxfer.report import (
    Arm,
    CardFacts,
    SeedResult,
    Verdict,
    build_card,
    build_report,
    escape_markdown,
    hub_model_id,
    write_card,
)
from nlpxfer.report.markdown import short_count

NASTY = (
    "a|b",
    "<script>x</script>",
    "`tick`",
    "two\nlines",
    "key: - [x] #1",
    "'q\" {%",
    "snake_case",
    "*b* _i_",
    "---",
)


def values(accuracy: float):
    one = {"accuracy": accuracy, "macro_f1": 0.5, "loss": 0.7}
    return {"validation": one, "test": one}


def make_report(**changes):
    arms = [
        Arm(
            name="dis|tilled",
            metrics=values(0.91),
            seconds=1.0,
            parameters=22_700_000,
            bytes=90_800_000,
            rows_per_second=1234.5,
            per_seed=[SeedResult(seed=seed, metrics=values(accuracy)) for seed, accuracy in ((1, 0.9), (2, 0.92))],
            description="three layers",
        ),
        Arm(name="control", metrics=values(0.88), seconds=1.0),
    ]
    parts = {
        "verdict": Verdict(
            call="positive", gain=0.03, low=0.01, high=0.05, metric="accuracy", versus="control", level=0.95, seeds=2
        ),
        "cost": Cost(
            train_seconds=5, total_seconds=9, tokens=1000, tokens_per_second=200, peak_memory_bytes=5 * 10**8
        ),
        "data": {
            "rows": {"train": 1500, "test": 80},
            "classes": 4,
            "leaks": {"test_in_train": {"exact": 3, "near": 0}},
        },
        "checks": {},
    }
    return build_report("distill", arms, **{**parts, **changes})


def make_facts(**changes):
    return CardFacts(**{"model_name": "small", "labels": ["neg", "pos"], "description": "A model.", **changes})


def test_metadata():
    facts = make_facts(
        base_model="all-MiniLM-L6-v2",
        base_model_kind="bundled",
        dataset_name="banking77",
        dataset_id="PolyAI/banking77",
        language=["en"],
        license="apache-2.0",
        tags=["intent"],
    )
    data = build_card(make_report(), facts).data
    assert data.pipeline_tag == "text-classification"
    assert data.library_name == "transformers"
    assert data.base_model == "sentence-transformers/all-MiniLM-L6-v2"
    assert data.tags == ["nlpxfer", "distill", "intent"]
    assert (data.datasets, data.language, data.license) == (["PolyAI/banking77"], ["en"], "apache-2.0")
    found = {(result.metric_type, result.metric_name): result for result in data.eval_results}
    assert found["accuracy", "Accuracy"].metric_value == 0.91
    assert found["f1", "Macro-F1"].metric_value == 0.5
    assert {(r.dataset_type, r.dataset_name, r.dataset_split) for r in data.eval_results} == {
        ("PolyAI/banking77", "banking77", "test")
    }
    assert data.model_name == "small"


def test_metadata_leaves_out_what_the_hub_would_refuse():
    plain = build_card(make_report(), make_facts(base_model="runs/teacher", base_model_kind="folder"))
    raw = yaml.safe_load(plain.content.split("---\n")[1])
    assert not {"base_model", "datasets", "language", "license"} & set(raw)
    assert raw["model-index"][0]["results"][0]["dataset"]["type"] == "custom"


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("google-bert/bert-base-uncased", "hub", "google-bert/bert-base-uncased"),
        ("gpt2", "hub", "gpt2"),
        ("all-MiniLM-L6-v2", "bundled", "sentence-transformers/all-MiniLM-L6-v2"),
        ("unknown", "bundled", None),
        ("org/model", "folder", None),
        ("org/model", None, None),
        ("/home/a/b", "hub", None),
        (None, "hub", None),
    ],
)
def test_hub_model_id(name, kind, expected):
    assert hub_model_id(name, kind) == expected


def test_card_survives_nasty_names(tmp_path: Path):
    nasty = "weird: 'name' | {x}"
    facts = make_facts(model_name=nasty, labels=NASTY, dataset_name="data: |\n# x", options={"a|b": "c|d\ne"})
    path = write_card(tmp_path, make_report(), facts)
    card = ModelCard.load(path)
    assert card.data.model_name == nasty
    assert card.data.eval_results[0].dataset_name == "data: |\n# x"
    body = card.text
    assert "<script" not in body
    table = body.split("## Labels")[1].split("## Data")[0].strip().splitlines()
    assert len(table) == 2 + len(NASTY)
    for line in table:
        assert len(re.findall(r"(?<!\\)\|", line)) == 3
    assert "| 0 | a\\|b |" in table
    assert "| 3 | two lines |" in table
    assert "| 6 | snake_case |" in table
    assert "c\\|d e" in body
    assert os.listdir(tmp_path) == ["README.md"]


def test_markdown_shows_the_names_as_they_are():
    render = pytest.importorskip("markdown_it").MarkdownIt("commonmark").renderInline
    html = __import__("html")
    for name in NASTY:
        shown = re.sub(r"\s+", " ", name).strip()
        assert html.unescape(render(escape_markdown(name)).replace("\\|", "|")) == shown


def test_body_tells_results_honestly():
    body = build_card(make_report(), make_facts(options={"temperature": 2.0}, limits=["Short texts only."])).text
    assert "| dis\\|tilled | 0.9100 ± 0.0141 | 0.5000 ± 0.0000 | 22.7 M | 90.8 MB | 1,234 |" in body
    assert "| control | 0.8800 | 0.5000 | - | - | - |" in body
    assert "+3.0 points of accuracy over control (95 % interval +1.0 to +5.0, 2 seeds)" in body
    assert "- rows: train 1,500, test 80" in body
    assert "- leaks: test in train (exact 3, near 0)" in body
    assert "Mean ± standard deviation" in body
    assert "| temperature | 2.0 |" in body
    assert "- Short texts only." in body
    assert "No control arm" not in body
    without = build_card(make_report(verdict=Verdict.unmeasured("not asked for")), make_facts()).text
    assert "**unclear: not asked for**" in without
    assert "No control arm was trained" in without


def test_many_labels_are_folded():
    body = build_card(make_report(), make_facts(labels=[f"label {index}" for index in range(77)])).text
    assert "<summary>All 77 labels</summary>" in body
    assert "| 76 | label 76 |" in body


def test_no_machine_paths_and_no_tokens():
    temporary = tempfile.gettempdir()
    facts = make_facts(
        description=f"Made in {temporary}/runs/x with hf_abcdefghijklmnopqrst.",
        dataset_name=f"{temporary}/secret/train.csv",
        options={"train_file": "/srv/private/train.csv", "hub_token": "abc"},
        limits=[f"See {temporary}/y/notes."],
    )
    content = str(build_card(make_report(), facts))
    for private in (temporary + "/", "/srv/", "hf_abc", "abc |"):
        assert private not in content
    assert "Made in x with &lt;removed&gt;." in content
    assert "| train_file | train.csv |" in content


@pytest.mark.parametrize("pairs", [False, True])
def test_snippet_runs(tiny_checkpoint, tmp_path: Path, pairs: bool):
    folder = tiny_checkpoint("bert", kind="classifier")
    body = build_card(make_report(), make_facts(text_pairs=pairs)).text
    code = re.search(r"```python\n(.*?)```", body, re.DOTALL).group(1)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "'score':" in result.stdout


def test_snippet_loads_from_the_hub_when_the_place_is_known():
    assert "model='team/small')" in build_card(make_report(), make_facts(hub_model_id="team/small")).text


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 "), (999, "999 "), (1000, "1.00 k"), (12_345, "12.3 k"), (999_600, "1.00 M"), (3 * 10**12, "3000 G")],
)
def test_short_count(number, text):
    assert short_count(number) == text
