"""`nlpxfer export`: the ONNX folder answers as the torch model, for any batch, without nlpxfer, or does not appear."""

import csv
import json
import logging
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import ROOT, TIMEOUT, environment
from test_readme import blocks
from tiny import DECODERS, FAMILIES, LABELS, make_rows, write_csv
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from nlpxfer import backends
from nlpxfer.backends import OnnxBackend, onnx_session, open_onnx, open_torch
from nlpxfer.cascade import fit_cascade, load_cascade
from nlpxfer.checkpoint import load_classifier, save_classifier, use_mean_pooling
from nlpxfer.classify import Classifier, evaluate_file, predict_file
from nlpxfer.cli import main
from nlpxfer.data.schema import LabelSchema
from nlpxfer.data.tokenise import Collator, tokenise
from nlpxfer.errors import CheckpointError, ConfigError, DataError, ExportError, NotFiniteError, OutputExistsError
from nlpxfer.evaluate.calibration import probabilities, save_calibration
from nlpxfer.evaluate.parity import parity
from nlpxfer.export import ExportRequest, export_classifier
from nlpxfer.export import folder as steps
from nlpxfer.export import graph as graphs
from nlpxfer.export import texts as text_sources
from nlpxfer.methods.base import model_inputs
from nlpxfer.problem import MULTI_LABEL, REGRESSION

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'nlpxfer[onnx]'")

SCHEMA = LabelSchema(LABELS)
CANNOT_BE_EXPORTED: tuple[str, ...] = ()
"""Families of tests/tiny.py that the exporter refuses."""
# few layers, but one of each kind: ModernBERT alternates global and local attention
OPTIONS = {"modernbert": {"layers": 2, "classifier_pooling": "mean"}}
OPSETS = {"albert": 18, "electra": 22}
HEADS = {"distilbert": 2, **dict.fromkeys(DECODERS, 1)}
"""Linear layers of the head: one before the final layer, and none in decoders."""


# --- One graph for all shapes ---


def graph_of(model, tokenizer, opset=None):
    rows = tokenise(tokenizer, steps.TRACED_TEXTS, max_length=steps.TRACED_TOKENS)
    batch = Collator.for_tokenizer(tokenizer)([rows[i] for i in range(3)])
    return graphs.to_graph(model, model_inputs(batch), opset=opset)


def batch_of(tokenizer, rows, tokens, side):
    """Random ids; the first row is full, the others are padded on the given side."""
    draw = np.random.default_rng(rows * 100 + tokens)
    ids = draw.integers(8, len(tokenizer), (rows, tokens))
    mask = np.ones_like(ids)
    for row in range(1, rows):
        kept = int(draw.integers(1, tokens + 1))
        mask[row, kept:] = 0
        if side == "left":
            mask[row] = mask[row, ::-1]
    ids[mask == 0] = tokenizer.pad_token_id
    inputs = {"input_ids": ids, "attention_mask": mask}
    if "token_type_ids" in tokenizer.model_input_names:
        inputs["token_type_ids"] = (np.arange(tokens) > tokens // 2) * mask
    return inputs


def assert_same_logits(session, checkpoint, shapes):
    for rows, tokens, side in shapes:
        inputs = batch_of(checkpoint.tokenizer, rows, tokens, side)
        with torch.no_grad():
            expected = checkpoint.model(**{k: torch.from_numpy(v.copy()) for k, v in inputs.items()}).logits.numpy()
        (found,) = session.run(["logits"], {each.name: inputs[each.name] for each in session.get_inputs()})
        np.testing.assert_allclose(found, expected, rtol=0, atol=5e-6, err_msg=f"{rows} rows, {tokens} tokens, {side}")
        assert rows == 1 or np.ptp(expected, axis=0).max() > 0.05, "rows that all answer alike would hide a mix-up"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_the_same_logits_for_any_shape(family, tiny_checkpoint, tmp_path, capfd):
    folder = tiny_checkpoint(family, "classifier", **OPTIONS.get(family, {"layers": 1}))
    checkpoint = load_classifier(str(folder), schema=SCHEMA)
    if family in CANNOT_BE_EXPORTED:
        with pytest.raises(ExportError, match="cannot be exported"):
            graph_of(checkpoint.model, checkpoint.tokenizer)
        return
    before = (checkpoint.model.config.to_dict(), list(logging.root.handlers), logging.root.manager.disable)
    capfd.readouterr()
    graph = graph_of(checkpoint.model, checkpoint.tokenizer, opset=OPSETS.get(family))
    shown = capfd.readouterr()
    assert (shown.out, shown.err) == ("", ""), "the exporter prints, logs and warns"
    assert before == (checkpoint.model.config.to_dict(), logging.root.handlers, logging.root.manager.disable)
    assert graph.opset_imports[""] == OPSETS.get(family, 20)
    assert len(graphs.head_nodes(graph, checkpoint.model)) == HEADS.get(family, 2)
    graphs.save_graph(graph, tmp_path / "model.onnx")
    session = onnx_session(tmp_path / "model.onnx")
    assert [each.shape for each in session.get_inputs()] == [["batch", "sequence"]] * len(session.get_inputs())
    assert session.get_outputs()[0].shape == ["batch", 4]
    sides = ("right", "left") if family in DECODERS else ("right",)
    shapes = [(rows, tokens, side) for rows in (1, 7) for tokens in (3, 64) for side in sides]
    assert_same_logits(session, checkpoint, [*shapes, (2, 1, "right"), (11, 11, "right")])


def test_a_layer_that_computes_the_mean(tiny_checkpoint, tmp_path):
    checkpoint = load_classifier(str(tiny_checkpoint("distilbert", "classifier", layers=1)), schema=SCHEMA)
    pooled = use_mean_pooling(checkpoint.model)
    graphs.save_graph(graph_of(pooled, checkpoint.tokenizer), tmp_path / "model.onnx")
    checkpoint = type(checkpoint)(**{**vars(checkpoint), "model": pooled})
    shapes = [(1, 3, "right"), (7, 3, "right"), (7, 64, "right")]
    assert_same_logits(onnx_session(tmp_path / "model.onnx"), checkpoint, shapes)


# --- A whole export ---


@pytest.fixture(scope="module")
def trained(tiny_checkpoint, tmp_path_factory):
    """A folder as a run leaves it, whose rows get different labels."""
    checkpoint = load_classifier(str(tiny_checkpoint("bert", layers=2)), schema=SCHEMA)
    texts = [row["text"] for row in make_rows(50, seed=9)]
    with torch.no_grad():
        checkpoint.model.classifier.weight.mul_(50)
        logits = checkpoint.model(**checkpoint.tokenizer(texts, padding=True, return_tensors="pt")).logits
        checkpoint.model.classifier.bias.sub_(logits.mean(dim=0))
    out = save_classifier(checkpoint.model, checkpoint.tokenizer, SCHEMA, tmp_path_factory.mktemp("model") / "run")
    (out / "run.json").write_text(json.dumps({"config": {"max_length": 24}}))
    save_calibration(out, 1.7)
    return out


@pytest.fixture(scope="module")
def rows():
    return [{"id": str(i), **row} for i, row in enumerate(make_rows(60, seed=9))]


@pytest.fixture(scope="module")
def exported(trained, rows, tmp_path_factory):
    """(folder, what the export returned)."""
    folder = tmp_path_factory.mktemp("exported")
    texts = write_csv(folder / "held-out.csv", [*rows, {"id": "blank", "text": " ", "label": "food"}])
    request = ExportRequest(model=str(trained), out=folder / "out" / "onnx", int8=True, texts=texts)
    return request.out, export_classifier(request)


@pytest.fixture
def quick(exported, trained, monkeypatch):
    """Exports of `trained` that take the graph from the file that is there instead of tracing, and few texts."""
    import onnx_ir

    monkeypatch.setattr(steps, "to_graph", lambda *_, **__: onnx_ir.load(str(exported[0] / "model.onnx")))
    monkeypatch.setattr(steps, "SPEED_TURNS", 1)

    def export(out, **options):
        options = {"model": str(trained), "texts": exported[0].parent.parent / "held-out.csv", **options}
        return export_classifier(ExportRequest(out=out, **options))

    return export


def read(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_folder_holds_what_is_promised(exported, trained):
    folder, _ = exported
    assert sorted(path.name for path in folder.iterdir()) == [
        *("calibration.json", "config.json", "export.json", "labels.json", "model.onnx", "model_int8.onnx"),
        *("run.json", "tokenizer.json", "tokenizer_config.json"),
    ]
    for name in ("calibration.json", "labels.json"):
        assert (folder / name).read_bytes() == (trained / name).read_bytes(), name
    tokenizers = [json.loads((place / "tokenizer.json").read_text()) for place in (folder, trained)]
    assert tokenizers[0] == {**tokenizers[1], "truncation": None, "padding": None}, "no call on the way leaves traces"
    assert [path.name for path in folder.parent.iterdir()] == ["onnx"]
    assert json.loads((folder / "calibration.json").read_text()) == {"temperature": 1.7}
    assert json.loads((folder / "labels.json").read_text())["names"] == list(LABELS)
    reference = folder.parent.parent / "plain"
    reference.mkdir()
    assert folder.stat().st_mode == reference.stat().st_mode


def test_the_report_is_what_is_measured(exported, trained, rows):
    folder, returned = exported
    report = json.loads((folder / "export.json").read_text())
    assert report == returned
    torch_backend, texts = open_torch(str(trained), bf16=False), [row["text"] for row in rows]
    tokens = tokenise(torch_backend.tokenizer, texts, max_length=24)
    expected = torch_backend.logits(tokens, max_length=24)
    for name, file in (("fp32", "model.onnx"), ("int8", "model_int8.onnx")):
        again = parity(expected, open_onnx(folder / file).logits(tokens, max_length=24))
        assert report["parity"][name]["changed"] == again.changed
        assert report["parity"][name]["max_difference"] == pytest.approx(again.max_difference, rel=1e-3, abs=1e-5)
        assert report["bytes"][file] == (folder / file).stat().st_size
        assert report["speed"]["rates"][name]["rows_per_second"] > 0
        assert report["speed"]["ratios_to_torch"][name]["repeats"] == 5
    assert report["parity"]["fp32"]["max_difference"] < 1e-4
    assert 1e-3 < report["parity"]["int8"]["max_difference"] < 5
    assert report["texts"] == {"source": "held-out.csv", "rows": 60}
    assert report["speed"]["rows"] == 60
    assert (report["max_length"], report["max_positions"], report["family"]) == (24, 64, "bert")
    assert report["weights_sha256"] == torch_backend.checkpoint.weights_sha256
    assert {"torch", "transformers", "onnx", "onnxscript", "onnxruntime", "python", "nlpxfer"} == {*report["versions"]}


def test_int8_weights_take_a_quarter_of_the_space(exported):
    import onnx

    weights = {}
    for name in ("model.onnx", "model_int8.onnx"):
        tensors = onnx.load(exported[0] / name).graph.initializer
        weights[name] = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in tensors}
    kinds = {name: array.dtype for name, array in weights["model_int8.onnx"].items() if array.size >= 32 * 32}
    head = [name for name, kind in kinds.items() if kind == np.float32]
    assert {str(kind) for name, kind in kinds.items() if name not in head} == {"int8", "uint8"}
    assert len(head) == 1, "the pooler's weights stay as they are; the classifier's are smaller"
    assert np.isin(weights["model_int8.onnx"][head[0]], weights["model.onnx"]["bert.pooler.dense.weight"]).all()


def test_no_file_names_a_path_of_this_machine(exported, trained):
    places = {Path.home(), Path.cwd(), ROOT, Path(sys.prefix), Path(torch.__file__).parent.parent, trained.parent}
    words = [str(place).encode() for place in places if len(place.parts) > 1]
    words += [b"site-packages", b"modeling_bert", b".py"]
    for path in exported[0].iterdir():
        content = path.read_bytes()
        assert not [word for word in words if word in content], path.name


@pytest.mark.parametrize("window", [7, 8192])
def test_predictions_are_those_of_torch(exported, trained, rows, tmp_path, monkeypatch, window):
    monkeypatch.setattr("nlpxfer.classify.WINDOW", window)
    source = write_csv(tmp_path / "in.csv", [*rows[:30], {"id": "blank", "text": "", "label": "food"}, *rows[30:]])
    found = {}
    for name, model, options in (("torch", trained, {"bf16": False}), ("onnx", exported[0], {})):
        classifier = Classifier.load(str(model), **options)
        assert (classifier.max_length, classifier.temperature, classifier.schema) == (24, 1.7, SCHEMA)
        least = 0.6
        done = predict_file(
            classifier, source, tmp_path / f"{name}.csv", min_probability=least, all_probabilities=True
        )
        assert (done.rows, done.without_text) == (61, 1)
        assert 0 < done.abstained < 60
        found[name] = read(tmp_path / f"{name}.csv")
    assert isinstance(classifier.backend, OnnxBackend)
    for ours, theirs in zip(found["onnx"], found["torch"], strict=True):
        assert list(ours) == list(theirs)
        for column, value in theirs.items():
            if column.startswith("probability") and value:
                assert float(ours[column]) == pytest.approx(float(value), abs=3e-6)
            else:
                assert ours[column] == value
    assert len({row["predicted_label"] for row in found["onnx"]}) > 2


def test_scores_are_those_of_torch(exported, trained, rows, tmp_path):
    source = write_csv(tmp_path / "in.csv", rows)
    theirs = evaluate_file(Classifier.load(str(trained), bf16=False), source)
    ours = evaluate_file(Classifier.load(str(exported[0])), source)
    assert ours == pytest.approx(theirs, rel=1e-4)
    coarse = Classifier.load(str(exported[0]), int8=True)
    assert evaluate_file(coarse, source)["loss"] != pytest.approx(theirs["loss"], rel=1e-6)


def test_what_the_folder_holds_decides(exported, trained, tmp_path):
    folder = tmp_path / "both"
    shutil.copytree(exported[0], folder)
    assert open_backend_file(folder) == "model.onnx"
    assert open_backend_file(folder, int8=True) == "model_int8.onnx"
    (folder / "model.onnx").unlink()
    assert open_backend_file(folder) == "model_int8.onnx"
    assert Classifier.load(str(folder)).logits(["bread"]).shape == (1, 4)
    assert Classifier.load(str(folder)).logits([]).shape == (0, 4)
    shutil.copy(trained / "model.safetensors", folder)
    assert open_backend_file(folder) is None
    assert open_backend_file(folder, int8=True) == "model_int8.onnx"
    with pytest.raises(CheckpointError, match="holds no model_int8.onnx"):
        Classifier.load(str(trained), int8=True)


def open_backend_file(folder, **options):
    found = backends.onnx_file(str(folder), **options)
    return None if found is None else found.name


def test_onnxruntime_uses_the_cores_and_does_not_spin(exported, monkeypatch):
    monkeypatch.setattr(backends, "own_cores", lambda: 3)
    options = onnx_session(exported[0] / "model.onnx").get_session_options()
    assert options.intra_op_num_threads == 3
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"


def test_options_that_an_exported_model_cannot_have(exported):
    for bf16 in (True, False):
        with pytest.raises(ConfigError, match="bf16: .* precision that it was written in"):
            Classifier.load(str(exported[0]), bf16=bf16)
    with pytest.raises(ConfigError, match="base: .* is a whole model"):
        Classifier.load(str(exported[0]), base="elsewhere")
    with pytest.raises(ConfigError, match="max_length: 65 is not between 4 and the 64 tokens"):
        Classifier.load(str(exported[0]), max_length=65)
    assert Classifier.load(str(exported[0]), max_length=64).max_length == 64


def test_long_texts_are_read_in_the_windows_of_the_training(exported, trained, tmp_path):
    long = [" ".join(row["text"] for row in make_rows(3, seed=seed)) for seed in range(5)]
    found = []
    for name, source, options in (("torch", trained, {"bf16": False}), ("onnx", exported[0], {})):
        folder = Path(shutil.copytree(source, tmp_path / name))
        config = {"max_length": 12, "long_texts": "sliding_window", "window_overlap": 4}
        (folder / "run.json").write_text(json.dumps({"config": config}))
        classifier = Classifier.load(str(folder), **options)
        assert min(classifier.rows(long).windows_per_row) > 1
        found.append(classifier.logits([*long, "bread"]))
    np.testing.assert_allclose(*found, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("family", "kind"), [("bert", MULTI_LABEL), ("gpt2", REGRESSION)])
def test_other_kinds_of_task(family, kind, rows, tiny_checkpoint, tmp_path):
    names = ("score",) if kind == REGRESSION else LABELS
    source = tmp_path / "run"
    shutil.copytree(tiny_checkpoint(family, "classifier", names, layers=1, problem_type=kind), source)
    logits = open_torch(str(source), bf16=False).logits
    if kind == MULTI_LABEL:  # thresholds amid the probabilities, so that rows differ in their labels
        tokens = tokenise(AutoTokenizer.from_pretrained(source), [row["text"] for row in rows], max_length=64)
        ordered = np.sort(probabilities(logits(tokens, max_length=64), 2.0, MULTI_LABEL), axis=0)
        inner = ordered[len(rows) // 4 : 3 * len(rows) // 4]
        gaps = np.diff(inner, axis=0).argmax(axis=0)  # in the widest gap: no rounding decides about a label
        middle = np.array([inner[gap : gap + 2, label].mean() for label, gap in enumerate(gaps)])
        save_calibration(source, 2.0, dict(zip(names, middle.tolist(), strict=True)))
    texts = write_csv(tmp_path / "in.csv", rows)
    report = export_classifier(ExportRequest(model=str(source), out=tmp_path / "onnx", int8=True, texts=texts))
    assert report["parity"]["fp32"]["max_difference"] < 1e-5
    assert (report["parity"]["int8"]["changed"] > 0) is (kind == MULTI_LABEL)
    for folder, options in ((source, {"bf16": False}), (tmp_path / "onnx", {})):
        predict_file(Classifier.load(str(folder), **options), texts, tmp_path / f"{folder.name}.csv")
    theirs, ours = read(tmp_path / "run.csv"), read(tmp_path / "onnx.csv")
    if kind == MULTI_LABEL:
        shares = [[row.pop("probabilities").split("|") for row in found] for found in (ours, theirs)]
        assert ours == theirs
        for one, other in zip(*shares, strict=True):  # the last digit that is written may differ by one
            assert [float(p) for p in one if p] == pytest.approx([float(p) for p in other if p], rel=0, abs=1.5e-6)
        assert len({row["predicted_labels"] for row in ours}) > 3
    else:
        with pytest.raises(ConfigError, match="max_changed: a regression gives numbers"):
            export_classifier(ExportRequest(model=str(source), out=tmp_path / "no", int8=True, max_changed=0.5))
        assert not (tmp_path / "no").exists()
        numbers = [[float(row["predicted_number"]) for row in found] for found in (ours, theirs)]
        np.testing.assert_allclose(*numbers, rtol=0, atol=3e-6)
        assert np.ptp(numbers) > 0.1


# --- Without nlpxfer ---


def test_the_lines_of_the_page_run_without_nlpxfer(exported, trained, tmp_path):
    """In a process of its own that cannot import nlpxfer or torch."""
    shutil.copytree(exported[0], tmp_path / "runs" / "onnx")
    (block,) = blocks((ROOT / "docs" / "export.md").read_text(encoding="utf-8"), "python")
    guard = "import sys\nsys.modules['nlpxfer'] = None\nsys.modules['torch'] = None\n"
    shown = "\nprint(json.dumps(logits.astype(float).tolist()))\n"
    command = [sys.executable, "-W", "error", "-c", guard + block + shown]
    env = {**environment(), "PYTHONPATH": ""}
    ran = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=TIMEOUT)
    assert ran.returncode == 0, ran.stderr
    labels, logits = ran.stdout.splitlines()
    expected = Classifier.load(str(trained), bf16=False).logits(["a text", "another"])
    np.testing.assert_allclose(json.loads(logits), expected, rtol=0, atol=1e-5)
    assert labels == str([LABELS[best] for best in expected.argmax(axis=1)])


# --- Nothing appears that is not right ---


def left_in(folder):
    return sorted(path.name for path in folder.iterdir())


def damaging(monkeypatch, change):
    """Exports write graphs that `change(initializers)` was called on."""
    import onnx_ir

    save = graphs.save_graph

    def save_damaged(graph, file):
        values = graph.graph.initializers
        value = values["classifier.bias"]
        value.const_value = onnx_ir.tensor(change(value.const_value.numpy()))
        save(graph, file)

    monkeypatch.setattr(steps, "save_graph", save_damaged)


def test_a_model_that_answers_otherwise_does_not_appear(quick, monkeypatch, tmp_path):
    damaging(monkeypatch, lambda bias: bias + np.float32([0, 0, 0.02, 0]))
    with pytest.raises(ExportError, match=r"a logit differs by 0.02 \(allowed: 0.00\d+\)"):
        quick(tmp_path / "out")
    damaging(monkeypatch, lambda bias: bias * np.float32(np.nan))
    with pytest.raises(NotFiniteError, match="the rewritten model"):
        quick(tmp_path / "out")
    assert left_in(tmp_path) == []


def test_an_int8_student_is_not_taken_for_another_one_in_a_cascade(exported, trained, rows, tmp_path):
    source, line = write_csv(tmp_path / "in.csv", rows), tmp_path / "cascade.json"
    teacher = Classifier.load(str(trained), bf16=False)
    student = Classifier.load(str(exported[0]), int8=True)
    found = fit_cascade(student, teacher, source, line, tolerance=None)
    assert found["teacher_accuracy"] <= found["accuracy"]
    cascade = load_cascade(line, Classifier.load(str(exported[0]), int8=True), teacher)
    assert cascade.min_probability == found["min_probability"]
    with pytest.raises(CheckpointError, match="student weights"):
        load_cascade(line, Classifier.load(str(exported[0])), teacher)


def test_a_cascade_with_an_exported_student_takes_bf16_for_the_teacher(exported, trained, rows, tmp_path, capsys):
    source = write_csv(tmp_path / "in.csv", rows)

    def call(student, teacher, *words):
        with pytest.raises(SystemExit) as left:
            main(["cascade", "fit", str(student), str(teacher), str(source), "--output_file", *map(str, words)])
        return left.value.code, capsys.readouterr()

    loaded = {}
    whole = Classifier.load
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Classifier, "load", lambda model, **given: loaded.update({model: given}) or whole(model, **given)
        )
        assert call(exported[0], trained, tmp_path / "one.json", "--bf16", "false", "--int8")[0] == 0
    assert [loaded[str(model)]["bf16"] for model in (exported[0], trained)] == [None, False]
    assert [loaded[str(model)]["int8"] for model in (exported[0], trained)] == [True, False]
    code, said = call(exported[0], exported[0], tmp_path / "two.json", "--bf16", "true")
    assert code == 2
    assert "bf16: neither of the two models has a choice" in said.err


def test_int8_may_be_limited(quick, monkeypatch, tmp_path):
    changed = quick(tmp_path / "first", int8=True)["parity"]["int8"]
    most = 0.5 if torch.cpu._is_vnni_supported() else 1.0  # without VNNI the sums of products saturate
    assert 0 < changed["changed_share"] < most
    least = changed["changed_share"]
    quick(tmp_path / "allowed", int8=True, max_changed=least)
    with pytest.raises(ExportError, match=rf"int8 changes {changed['changed']} of {changed['rows']} predictions"):
        quick(tmp_path / "refused", int8=True, max_changed=least / 2)
    assert left_in(tmp_path) == ["allowed", "first"]


def test_a_family_that_cannot_be_traced_is_refused(tiny_checkpoint, capfd, tmp_path):
    """Longformer's windows depend on the length in a way that `torch.export` cannot follow."""
    source = tmp_path / "longformer"
    shutil.copytree(tiny_checkpoint("roberta", "classifier", layers=1), source)
    tokenizer = AutoTokenizer.from_pretrained(source)
    options = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    ids = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "vocab_size": len(tokenizer)}
    config = AutoConfig.for_model(
        "longformer", attention_window=[8], max_position_embeddings=66, id2label=SCHEMA.id2label, **options, **ids
    )
    save_classifier(AutoModelForSequenceClassification.from_config(config), tokenizer, SCHEMA, source)
    capfd.readouterr()
    with pytest.raises(ExportError, match="LongformerForSequenceClassification cannot be exported: ") as error:
        export_classifier(ExportRequest(model=str(source), out=tmp_path / "out"))
    assert "nlpxfer predict reads it with torch" in str(error.value)
    assert left_in(tmp_path) == ["longformer"]
    assert capfd.readouterr().err == ""


def test_an_interruption_leaves_nothing(quick, monkeypatch, tmp_path):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(steps, "_speed", stop)
    with pytest.raises(KeyboardInterrupt):
        quick(tmp_path / "out", int8=True)
    assert left_in(tmp_path) == []


def test_nothing_is_overwritten(quick, monkeypatch, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputExistsError, match="out exists"):
        quick(tmp_path / "out")
    speed = steps._speed

    def appear(*arguments):
        (tmp_path / "late").mkdir()
        return speed(*arguments)

    monkeypatch.setattr(steps, "_speed", appear)
    with pytest.raises(OutputExistsError, match="appeared while"):
        quick(tmp_path / "late")
    assert left_in(tmp_path) == ["late", "out"]
    assert left_in(tmp_path / "late") == []


def test_all_wrong_options_are_named_at_once(exported, tmp_path):
    request = ExportRequest(
        model=str(exported[0]), out=tmp_path / "out", opset=23, max_changed=2.0, text_column="content"
    )
    with pytest.raises(ConfigError) as error:
        export_classifier(request)
    assert len(error.value.faults) == 5
    for word in ("opset: 23", "max_changed: 2.0", "--int8 is not given", "--texts", "is an exported model already"):
        assert word in str(error.value)


def test_faults_of_the_texts(trained, quick, tmp_path):
    with pytest.raises(DataError, match="is no file"):
        quick(tmp_path / "out", texts=tmp_path / "none.csv")
    texts = tmp_path / "in.jsonl"
    texts.write_text('{"text": " "}\n')
    with pytest.raises(DataError, match="has no row with a text"):
        quick(tmp_path / "out", texts=texts)
    texts.write_text('{"text": "bread"}\n')
    with pytest.raises(DataError, match="there is no column second"):
        quick(tmp_path / "out", texts=texts, text_pair_column="second")
    assert left_in(tmp_path) == ["in.jsonl"]
    texts.write_text('{"text": "bread", "second": "cheese and soup"}\n')
    report = quick(tmp_path / "out", texts=texts, text_pair_column="second")
    assert report["speed"]["tokens"] == len("[CLS] bread [SEP] cheese and soup [SEP]".split())


def test_a_model_of_pairs_is_compared_on_pairs(trained, quick, tmp_path):
    model = Path(shutil.copytree(trained, tmp_path / "model"))
    (model / "run.json").write_text(json.dumps({"config": {"max_length": 24, "text_pair_column": "second"}}))
    texts = tmp_path / "in.jsonl"
    texts.write_text('{"text": "bread"}\n')
    with pytest.raises(DataError, match="no column second"):
        quick(tmp_path / "out", model=str(model), texts=texts)
    texts.write_text('{"text": "bread", "second": "cheese and soup"}\n')
    report = quick(tmp_path / "out", model=str(model), texts=texts)
    assert report["speed"]["tokens"] == len("[CLS] bread [SEP] cheese and soup [SEP]".split())


def test_a_model_of_pairs_needs_no_texts(trained, quick, tmp_path):
    model = Path(shutil.copytree(trained, tmp_path / "model"))
    (model / "run.json").write_text(json.dumps({"config": {"max_length": 24, "text_pair_column": "second"}}))
    report = quick(tmp_path / "out", model=str(model), texts=None)
    assert report["texts"]["source"].endswith("built-in texts")
    second = text_sources.texts_to_compare(AutoTokenizer.from_pretrained(trained), None, "text", "second")
    ((texts, pairs),) = second.windows
    assert sorted(texts) == sorted(pairs)
    assert not any(text == pair for text, pair in zip(texts, pairs, strict=True))


def test_a_damaged_record_of_the_training_is_none(trained, quick, tmp_path):
    model = Path(shutil.copytree(trained, tmp_path / "model"))
    for content in ("{", "[]"):
        (model / "run.json").write_text(content)
        quick(tmp_path / f"out{len(content)}", model=str(model))
        assert json.loads((tmp_path / f"out{len(content)}" / "run.json").read_text()) == {"config": {}}


def test_the_column_of_the_training_is_the_default(trained, quick, tmp_path):
    model = Path(shutil.copytree(trained, tmp_path / "model"))
    (model / "run.json").write_text(json.dumps({"config": {"max_length": 24, "text_column": "words"}}))
    texts = tmp_path / "in.jsonl"
    texts.write_text('{"text": "bread", "words": "cheese and soup"}\n')
    report = quick(tmp_path / "out", model=str(model), texts=texts)
    assert report["speed"]["tokens"] == len("[CLS] cheese and soup [SEP]".split())
    report = quick(tmp_path / "other", model=str(model), texts=texts, text_column="text")
    assert report["speed"]["tokens"] == len("[CLS] bread [SEP]".split())


def test_default_texts(trained, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(trained)
    bundled = text_sources.texts_to_compare(tokenizer, None, "text", None)
    assert bundled.source == "test texts of debian-sections and built-in texts"
    ((texts, pairs),) = bundled.windows
    assert len(texts) == 240 + len(text_sources.VARIED)
    assert len(set(texts)) == len(texts)
    assert pairs is None
    monkeypatch.setattr(text_sources, "bundled_names", lambda: [])
    alone = text_sources.texts_to_compare(tokenizer, None, "text", None)
    assert alone.source == "built-in texts"
    ((texts, _),) = alone.windows
    assert tuple(texts) == text_sources.VARIED
    lengths = tokenise(tokenizer, texts, max_length=64).lengths
    assert (lengths.min(), lengths.max()) == (3, 64)


def test_large_weights_lie_in_a_file_of_their_own(quick, monkeypatch, tmp_path):
    quick(tmp_path / "embedded", int8=True)
    monkeypatch.setattr(graphs, "EMBEDDED_BYTES", 1000)
    report = quick(tmp_path / "out", int8=True)
    assert {"model.onnx", "model.onnx.data", "model_int8.onnx", "model_int8.onnx.data"} == {*report["bytes"]}
    moved = (tmp_path / "out").rename(tmp_path / "moved")
    texts = ["bread and cheese", "a match"]
    for int8 in (False, True):
        ours, theirs = (
            Classifier.load(str(folder), int8=int8).logits(texts) for folder in (moved, tmp_path / "embedded")
        )
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


# --- Damaged folders ---


def damaged(exported, tmp_path, name, change):
    folder = Path(shutil.copytree(exported[0], tmp_path / name))
    change(folder)
    return str(folder)


def test_damaged_folders_are_refused(exported, tmp_path):
    model = (exported[0] / "model.onnx").read_bytes()

    def fewer_labels(folder):
        config = json.loads((folder / "config.json").read_text())
        config["id2label"].pop("3")
        config["label2id"].pop(LABELS[3])
        (folder / "config.json").write_text(json.dumps(config))

    for name, change, message in (
        ("cut", lambda f: (f / "model.onnx").write_bytes(model[: len(model) // 2]), "onnxruntime cannot read"),
        ("report", lambda f: (f / "export.json").unlink(), "holds no readable export.json"),
        ("config", lambda f: (f / "config.json").unlink(), "it has no config.json"),
        ("labels", fewer_labels, "gives 4 logits, its config.json names 3 labels"),
    ):
        with pytest.raises(CheckpointError, match=message):
            Classifier.load(damaged(exported, tmp_path, name, change))


def test_a_file_that_is_no_classifier_is_refused(exported, tmp_path):
    import onnx

    def rename_output(folder):
        model = onnx.load(folder / "model.onnx")
        old = model.graph.output[0].name
        model.graph.node.append(onnx.helper.make_node("Identity", [old], ["scores"]))
        model.graph.output[0].name = "scores"
        onnx.save(model, folder / "model.onnx")

    with pytest.raises(CheckpointError, match="gives scores"):
        Classifier.load(damaged(exported, tmp_path, "other", rename_output))


def test_missing_packages_are_named(exported, trained, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ConfigError, match="needs onnxruntime") as error:
        Classifier.load(str(exported[0]))
    assert 'pip install "nlpxfer[onnx]"' in str(error.value)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ConfigError, match="Exporting needs onnxscript, onnxruntime"):
        export_classifier(ExportRequest(model=str(trained), out=tmp_path / "out"))


# --- Commands ---


def test_commands(quick, trained, rows, tmp_path, capfd, monkeypatch):
    out, source = tmp_path / "onnx", write_csv(tmp_path / "in.csv", rows)
    words = {
        "export": [str(trained), str(out), "--int8", "--texts", str(source), "--max_changed", "1"],
        "predict": [str(out), str(source), "--int8", "--output_file", str(tmp_path / "out.csv")],
        "evaluate": [str(out), str(source)],
    }
    for command, more in words.items():
        with pytest.raises(SystemExit) as left:
            main([command, *more])
        assert left.value.code == 0
    shown = capfd.readouterr()
    assert shown.err == ""
    assert re.search(r"fp32: 0 of 60 predictions changed, .* times the rows per second of torch", shown.out)
    assert re.search(r"int8: \d+ of 60 predictions changed", shown.out)
    assert json.loads(shown.out.splitlines()[-1])["rows"] == 60
    assert len(read(tmp_path / "out.csv")) == 60
    with pytest.raises(SystemExit) as left:
        main(["predict", str(out), str(source), "--output_file", str(tmp_path / "b.csv"), "--bf16", "true"])
    assert left.value.code == 2
    assert "precision that it was written in" in capfd.readouterr().err
