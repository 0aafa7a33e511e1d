"""From training to deployment: fine-tune an adapter, save, reload in a new process, merge, export, same answers."""

import csv
import json

import numpy as np
import pytest
from processes import python
from processes import run as run_program
from recipe_runs import finished, tiny_words
from test_problem_types import topic_rows
from tiny import make_rows, write_csv

from nlpxfer.classify import Classifier, predict_file
from nlpxfer.cli import main

RELOAD = """
import json, sys
import numpy as np
from nlpxfer.classify import Classifier
merged, bundle, base, rows, out = sys.argv[1:]
with open(rows) as file:
    texts, pairs = json.load(file)
found = [Classifier.load(folder, base=on, bf16=False) for folder, on in ((merged, None), (bundle, base))]
np.save(out, np.stack([classifier.logits(texts, pairs) for classifier in found]))
"""


def pair_rows(count, seed):
    """Whether two texts are of one topic."""
    rows = make_rows(2 * count, seed=seed)
    return [
        {"text": one["text"], "second": two["text"], "label": str(one["label"] == two["label"])}
        for one, two in zip(rows[::2], rows[1::2], strict=True)
    ]


CASES = {
    "pairs": ("bert", pair_rows, ["--text_pair_column", "second"]),
    "multi-label": ("bert", lambda count, seed: topic_rows(count, seed=seed),
                    ["--label_column", "labels", "--label_separator", "|"]),
    "gpt2": ("gpt2", lambda count, seed: make_rows(count, seed=seed), []),
    "llama": ("llama", lambda count, seed: make_rows(count, seed=seed), []),
}  # fmt: skip


def command(*words):
    """Call `nlpxfer` in this process."""
    with pytest.raises(SystemExit) as left:
        main([str(word) for word in words])
    assert left.value.code == 0


def answers(classifier, source, out, pair_column):
    predict_file(classifier, source, out, text_pair_column=pair_column, all_probabilities=True)
    with out.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("case", CASES)
def test_train_save_reload_merge_export(case, tiny_checkpoint, tmp_path, capsys):
    family, rows_of, words = CASES[case]
    base = tiny_checkpoint(family)
    parts = {"train": rows_of(160, 1), "validation": rows_of(60, 2), "test": rows_of(60, 3)}
    files = {name: write_csv(tmp_path / f"{name}.csv", rows) for name, rows in parts.items()}
    run = finished("adapters", tmp_path / "run", *tiny_words(type("Files", (), files), base), *words)
    pair_column = "second" if case == "pairs" else None
    texts = [row["text"] for row in parts["test"]]
    pairs = [row["second"] for row in parts["test"]] if pair_column else None
    here = Classifier.load(str(run.folder), bf16=False)
    expected_NC = here.logits(texts, pairs)
    assert expected_NC.std() > 0.01

    (tmp_path / "rows.json").write_text(json.dumps([texts, pairs]))
    program = ["-W", "ignore", "-c", RELOAD]
    bundle = run.folder / "adapter"
    ended = run_program(python(*program, run.folder, bundle, base, tmp_path / "rows.json", tmp_path / "logits.npy"))
    assert ended.returncode == 0, ended.stderr
    for reloaded_NC in np.load(tmp_path / "logits.npy"):
        assert reloaded_NC == pytest.approx(expected_NC, abs=1e-5)

    command("merge", bundle, tmp_path / "merged", "--base", base)
    again = Classifier.load(str(tmp_path / "merged"), bf16=False)
    assert again.logits(texts, pairs) == pytest.approx(expected_NC, abs=1e-5)

    given = ["--texts", files["test"], *(["--text_pair_column", pair_column] if pair_column else [])]
    command("export", tmp_path / "merged", tmp_path / "onnx", *given)
    exported = Classifier.load(str(tmp_path / "onnx"))
    assert exported.logits(texts, pairs) == pytest.approx(expected_NC, abs=1e-4)
    torch_rows = answers(again, files["test"], tmp_path / "torch.csv", pair_column)
    onnx_rows = answers(exported, files["test"], tmp_path / "onnx.csv", pair_column)
    column = "predicted_labels" if case == "multi-label" else "predicted_label"
    assert [row[column] for row in onnx_rows] == [row[column] for row in torch_rows]
    capsys.readouterr()
