"""Static students through the whole recipe."""

import pytest
from recipe_runs import finished, refused, tiny_words


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NLPXFER_CACHE", str(tmp_path / "cache"))


def test_it_trains(tiny_checkpoint, tiny_data, tmp_path):
    words = tiny_words(tiny_data, tiny_checkpoint("bert"))
    run = finished(
        "distill",
        tmp_path / "out",
        *words,
        "--student",
        "static",
        "--static_dim",
        "16",
        "--unlabelled_file",
        str(tiny_data.unlabelled),
    )
    print(run.out, run.report["checks"]["int8"], run.report["checks"]["speed_ratio"])
    print(sorted(p.name for p in (tmp_path / "out").iterdir()))
