"""Multi-label tasks and regressions, from the file to the answer, beside tasks with one class per row."""

import csv
import json
import random
from dataclasses import replace
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sklearn.metrics
import torch
from recipe_runs import QUICK, finished, refused, tiny_words
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from tiny import FILLER, TOPICS, write_csv
from transformers import AutoModelForSequenceClassification, pipeline

from nlpxfer.classify import Classifier, evaluate_file, predict_file
from nlpxfer.cli import main
from nlpxfer.data.load import DataRequest, load_data
from nlpxfer.data.schema import LabelSchema
from nlpxfer.data.splits import iterative_sample, iterative_split, quantile_bins
from nlpxfer.errors import CheckpointError, ConfigError, DataError, LabelError
from nlpxfer.evaluate.calibration import fit_temperature, fit_thresholds, load_thresholds
from nlpxfer.evaluate.interval import paired_gain
from nlpxfer.evaluate.task import row_scores, task_metrics
from nlpxfer.losses import (
    binary_label_loss,
    binary_soft_target_loss,
    gold_loss,
    label_loss,
    labelled,
    number_loss,
    teacher_loss,
)
from nlpxfer.methods.finetune import FineTune
from nlpxfer.problem import BEST, METRICS, MULTI_LABEL, PROBLEM_TYPES, REGRESSION
from nlpxfer.report.out_of_fold import prediction
from nlpxfer.train.linear_probe import fit_probe

NAN = float("nan")


def topic_rows(count, *, seed=0):
    """Rows {text, labels, score}: texts on none to three topics, and how many topics there are."""
    chooser, rows = random.Random(seed), []
    for _ in range(count):
        topics = chooser.sample(sorted(TOPICS), chooser.choice([0, 1, 1, 1, 2, 2, 3]))
        words = chooser.choices(FILLER, k=chooser.randint(3, 8))
        for topic in topics:
            for word in chooser.choices(TOPICS[topic][:3], k=2):
                words.insert(chooser.randint(0, len(words)), word)
        rows.append({"text": " ".join(words), "labels": "|".join(sorted(topics)), "score": str(len(topics))})
    return list({row["text"]: row for row in rows}.values())


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("topics")
    rows = topic_rows(420, seed=3)
    parts = {"train": rows[:260], "validation": rows[260:330], "test": rows[330:]}
    return {name: write_csv(folder / f"{name}.csv", part) for name, part in parts.items()}


def words_for(files, model, *words):
    """Options of a quick run; those given replace the usual ones."""
    usual = tiny_words(type("Files", (), files), model)
    for option in words[::2]:
        if option in usual:
            del usual[usual.index(option) : usual.index(option) + 2]
    return [*usual, *words]


def file_words(files):
    return [word for name, path in files.items() for word in (f"--{name}_file", path)]


MULTI = ["--label_column", "labels", "--label_separator", "|"]
LEARN = ["--num_train_epochs", "12", "--learning_rate", "1e-3", "--freeze_embeddings", "false"]
NUMBERS = ["--label_column", "score", "--problem_type", "regression"]


# -- losses


def test_binary_loss_by_hand():
    logits = torch.tensor([[0.0, 2.0], [1.0, -1.0], [5.0, 5.0]])
    gold = torch.tensor([[1.0, 0.0], [1.0, 0.0], [NAN, NAN]])
    expected = [(np.log(2) + np.log1p(np.exp(2))) / 2, np.log1p(np.exp(-1)), 0.0]
    assert binary_label_loss(logits, gold).tolist() == pytest.approx(expected, rel=1e-6)
    assert labelled(gold).tolist() == [True, True, False]
    assert labelled(torch.tensor([1.0, NAN])).tolist() == [True, False]
    assert labelled(torch.tensor([2, -100])).tolist() == [True, False]


def test_binary_loss_options_by_hand():
    logits, gold = torch.tensor([[1.0, -2.0]]), torch.tensor([[1.0, 0.0]])
    p, q = expit(1.0), expit(-2.0)
    plain = np.array([-np.log(p), -np.log(1 - q)])
    assert binary_label_loss(logits, gold, focal_gamma=2.0).item() == pytest.approx(
        (plain * [(1 - p) ** 2, q**2]).mean(), rel=1e-5
    )
    weighted = binary_label_loss(logits, gold, positive_weights_C=torch.tensor([3.0, 7.0]))
    assert weighted.item() == pytest.approx((plain * [3, 1]).mean(), rel=1e-5)
    smooth = [-(0.9 * np.log(p) + 0.1 * np.log(1 - p)), -(0.1 * np.log(q) + 0.9 * np.log(1 - q))]
    assert binary_label_loss(logits, gold, label_smoothing=0.2).item() == pytest.approx(np.mean(smooth), rel=1e-5)


def test_binary_loss_of_one_label_is_the_loss_of_two_classes():
    logits = torch.randn(6, 1, dtype=torch.float64)
    gold = torch.tensor([0, 1, 1, 0, 1, 0])
    two = label_loss(torch.cat([torch.zeros_like(logits), logits], dim=1), gold)
    assert torch.allclose(binary_label_loss(logits, gold[:, None].double()), two)


def test_rows_without_labels_get_no_gradient():
    logits = torch.randn(3, 2, requires_grad=True)
    gold = torch.tensor([[1.0, 0.0], [NAN, NAN], [0.0, 1.0]])
    binary_label_loss(logits, gold, focal_gamma=1.0).sum().backward()
    assert torch.isfinite(logits.grad).all()
    assert logits.grad[1].abs().sum() == 0 < logits.grad[0].abs().sum()
    outputs = torch.randn(2, 1, requires_grad=True)
    number_loss(outputs, torch.tensor([NAN, 1.0])).sum().backward()
    assert outputs.grad[0].item() == 0
    assert outputs.grad[1].item() == pytest.approx(outputs[1].item() - 1)


def test_binary_soft_targets_by_hand():
    student, teacher = torch.tensor([[0.0, 1.0]]), torch.tensor([[2.0, 1.0]])
    p, q = expit(1.0), expit(0.0)  # at T = 2
    expected = 4 * (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))) / 2
    assert binary_soft_target_loss(student, teacher, temperature=2.0).item() == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match="temperature"):
        binary_soft_target_loss(student, teacher, temperature=0.0)


def test_soft_targets_of_saturated_teachers_are_finite():
    student = torch.tensor([[0.5, -0.5]], requires_grad=True)
    loss = binary_soft_target_loss(student, torch.tensor([[200.0, -200.0]]), temperature=1.0)
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert torch.isfinite(student.grad).all()


def test_gradient_size_of_soft_targets_hardly_depends_on_temperature():
    sizes = []
    for temperature in (4.0, 8.0, 16.0):
        student = torch.tensor([[0.3, -0.2, 0.1]], requires_grad=True)
        teacher = torch.tensor([[1.0, -1.0, 0.5]])
        binary_soft_target_loss(student, teacher, temperature=temperature).sum().backward()
        sizes.append(student.grad.norm().item())
    assert max(sizes) / min(sizes) < 1.05


@pytest.mark.parametrize("kind", PROBLEM_TYPES)
def test_each_kind_of_task_has_its_losses(kind):
    logits = torch.randn(4, 1 if kind == REGRESSION else 3, dtype=torch.float64, requires_grad=True)
    gold = {MULTI_LABEL: torch.ones(4, 3).double(), REGRESSION: torch.ones(4).double()}
    gold = gold.get(kind, torch.tensor([0, 1, 2, 0]))
    assert gold_loss(kind, logits, gold).shape == (4,)
    assert torch.autograd.gradcheck(lambda x: gold_loss(kind, x, gold), logits)
    teacher = torch.randn_like(logits)
    assert torch.autograd.gradcheck(lambda x: teacher_loss(kind, x, teacher, temperature=3.0), logits)
    assert teacher_loss(kind, logits, logits.detach(), temperature=3.0).abs().max() < 1e-12


def test_options_that_mean_nothing_are_refused():
    with pytest.raises(ConfigError, match="logit_adjustment: is for tasks with one class per row"):
        FineTune(problem_type=MULTI_LABEL, offsets=(0.0, 1.0))
    with pytest.raises(ConfigError) as caught:
        FineTune(problem_type=REGRESSION, label_smoothing=0.1, focal_gamma=1.0, class_weights=(1.0,))
    assert len(caught.value.faults) == 3


# -- metrics


def test_label_set_metrics_against_scikit_learn():
    generator = np.random.default_rng(0)
    logits, gold = generator.normal(size=(60, 5)), generator.integers(0, 2, size=(60, 5))
    gold[:, 4] = 0
    logits[:, 4] = -1.0  # neither true nor predicted: no F1
    logits[0], gold[0] = -1.0, 0  # an empty row, got right
    found, given = task_metrics(MULTI_LABEL, logits, gold), logits > 0
    f1 = sklearn.metrics.f1_score
    assert found["accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(gold, given))
    assert found["micro_f1"] == pytest.approx(f1(gold, given, average="micro"))
    assert found["macro_f1"] == pytest.approx(f1(gold[:, :4], given[:, :4], average="macro"))
    assert found["sample_f1"] == pytest.approx(f1(gold, given, average="samples", zero_division=1.0))
    assert found["loss"] == pytest.approx(sklearn.metrics.log_loss(gold.ravel(), expit(logits).ravel()))
    assert row_scores(MULTI_LABEL, logits, gold).mean() == pytest.approx(found["sample_f1"])
    assert tuple(found) == METRICS[MULTI_LABEL]


def test_scores_of_a_scale_do_not_look_at_its_ends():
    """A prediction beyond the numbers of a split is wrong, and as far from them as it is."""
    assert task_metrics(REGRESSION, [[1.5], [9.2]], [3.0, 3.0])["accuracy"] == 0
    gold, found = np.array([1.0, 2, 4, 5, 5, 1]), np.array([[1.2], [2.6], [4.4], [7.1], [4.6], [-1.0]])
    expected = sklearn.metrics.cohen_kappa_score(
        gold.astype(int), [1, 3, 4, 7, 5, -1], labels=range(-1, 8), weights="quadratic"
    )
    assert task_metrics(REGRESSION, found, gold)["quadratic_kappa"] == pytest.approx(expected)


def test_number_metrics_by_hand():
    found = task_metrics(REGRESSION, [[1.0], [2.0], [4.4]], [1.0, 3.0, 4.0])
    assert found["mean_absolute_error"] == pytest.approx(1.4 / 3)
    assert found["mean_squared_error"] == pytest.approx(1.16 / 3)
    assert found["loss"] == pytest.approx(1.16 / 6)
    assert found["spearman"] == pytest.approx(1.0)
    assert found["accuracy"] == pytest.approx(2 / 3)  # rounded: 1, 2, 4
    assert 0 < found["quadratic_kappa"] < 1
    assert row_scores(REGRESSION, np.array([[1.0], [3.0]]), np.array([2.0, 3.0])).tolist() == [-1.0, 0.0]
    assert "accuracy" not in task_metrics(REGRESSION, [[1.0], [2.0]], [1.5, 2.0])
    constant = task_metrics(REGRESSION, [[1.0], [1.0]], [1.0, 2.0])
    assert (constant["pearson"], constant["spearman"]) == (0.0, 0.0)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(DataError, match="cannot be scored"):
        task_metrics(MULTI_LABEL, [[1.0, 2.0]], [1])
    with pytest.raises(DataError, match="cannot be scored"):
        task_metrics(REGRESSION, [[1.0, 2.0]], [1.0])


def test_gain_in_any_score_per_row():
    generator = np.random.default_rng(1)
    control = generator.uniform(size=400)
    gain = paired_gain([control + 0.05], [control], metric="mean_absolute_error")
    assert (gain.call, gain.metric) == ("positive", "mean_absolute_error")
    assert gain.low == pytest.approx(0.05)
    with pytest.raises(DataError, match="finite"):
        paired_gain([[NAN]], [[0.0]], metric="sample_f1")


def test_thresholds_against_all_cuts():
    generator = np.random.default_rng(2)
    gold = generator.integers(0, 2, size=(80, 3))
    gold[:, 2] = 0
    gold[:3, 2] = 1  # too few rows to tell by
    shares = np.clip(0.3 * gold + generator.uniform(0, 0.6, size=gold.shape), 0, 1)
    found = fit_thresholds(shares, gold)
    assert found[2] == 0.5
    for label in (0, 1):
        f1 = [sklearn.metrics.f1_score(gold[:, label], shares[:, label] > cut) for cut in np.unique(shares[:, label])]
        mine = sklearn.metrics.f1_score(gold[:, label], shares[:, label] > found[label])
        everything = sklearn.metrics.f1_score(gold[:, label], np.ones(80))
        assert mine == pytest.approx(max(*f1, everything))


def test_equal_probabilities_are_not_parted():
    shares = np.array([[0.4]] * 10 + [[0.2]] * 10)
    gold = np.array([[1]] * 8 + [[0]] * 12)
    assert 0.2 < fit_thresholds(shares, gold)[0] < 0.4


def test_temperature_of_sigmoids():
    generator = np.random.default_rng(4)
    logits = generator.normal(scale=2, size=(4000, 3))
    gold = generator.uniform(size=logits.shape) < expit(logits)
    assert fit_temperature(3 * logits, gold, MULTI_LABEL) == pytest.approx(3.0, rel=0.1)


# -- splits


def test_each_label_keeps_its_share():
    generator = random.Random(0)
    rows = [frozenset(name for name, share in zip("abcd", (0.6, 0.3, 0.1, 0.03), strict=True)
                      if generator.random() < share) for _ in range(1000)]  # fmt: skip
    keys = [f"text {i // 2}" for i in range(1000)]  # every text twice
    kept, taken = iterative_split(rows, keys, share=0.2, seed=1)
    assert sorted(kept + taken) == list(range(1000))
    assert not {keys[i] for i in kept} & {keys[i] for i in taken}
    assert len(taken) == pytest.approx(200, abs=10)
    for name in "abcd":
        total = sum(name in row for row in rows)
        assert sum(name in rows[i] for i in taken) == pytest.approx(0.2 * total, abs=max(2, 0.02 * total))
    assert iterative_split(rows, keys, share=0.2, seed=1)[1] == taken
    assert iterative_split(rows, keys, share=0.2, seed=2)[1] != taken
    assert len(iterative_sample(rows, keys, count=300, seed=1)) == 300


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("count", [2, 4, 12, 40])
def test_both_sides_of_a_split_have_rows(count, share):
    for seed in range(10):
        generator = random.Random(seed)
        rows = [frozenset(generator.sample("abcd", generator.choice([1, 1, 2]))) for _ in range(count)]
        kept, taken = iterative_split(rows, [f"text {i}" for i in range(count)], share=share, seed=seed)
        assert kept
        assert taken
        assert sorted(kept + taken) == list(range(count))


def test_a_row_held_out_so_that_there_is_one_takes_no_label_along():
    rows = [frozenset("a"), frozenset("b"), frozenset("ab"), frozenset("bc"), frozenset("c")]
    for seed in range(10):
        kept, taken = iterative_split(rows, list("vwxyz"), share=0.01, seed=seed)
        assert len(taken) == 1
        assert {name for i in kept for name in rows[i]} == set("abc")


def test_small_numbers_keep_their_digits():
    assert prediction(REGRESSION, ["score"], 2e-8, np.array([-3.4567e-7])) == {"label": 2e-8, "predicted": -3.4567e-7}


def test_one_text_cannot_be_split():
    with pytest.raises(DataError, match="2 rows have one text"):
        iterative_split([frozenset("a")] * 2, ["text"] * 2, share=0.5, seed=1)


@pytest.mark.parametrize(
    "values",
    [[1] * 50 + [2] * 30 + [3] * 19 + [4], [0] * 20 + [5] * 78 + [6] * 2, [1] * 95 + [2, 3, 4, 5, 6], list(range(37))],
)
def test_bins_of_a_scale_have_as_many_rows_as_promised(values):
    bins = quantile_bins([float(value) for value in values])
    assert np.bincount(bins).min() >= 10
    assert [*bins] == sorted(bins)  # as the values are
    assert len({(value, found) for value, found in zip(values, bins, strict=True)}) == len(set(values))


def test_bins_hold_about_equally_many_numbers():
    bins = quantile_bins(np.random.default_rng(0).normal(size=500).tolist())
    counts = np.bincount(bins)
    assert len(counts) == 10
    assert counts.min() >= 49
    assert set(quantile_bins([1.0] * 30)) == {0}


# -- data


def test_a_scale_with_a_rare_end_is_carved_and_sampled(tmp_path):
    path = tmp_path / "train.jsonl"
    stars = [1] * 50 + [2] * 30 + [3] * 19 + [4]
    path.write_text("".join(json.dumps({"text": f"text {i}", "label": star}) + "\n" for i, star in enumerate(stars)))
    request = DataRequest(train_file=str(path), problem_type=REGRESSION)
    data = load_data(request)
    assert (len(data.train), len(data.validation), len(data.test)) == (80, 10, 10)
    assert len(load_data(replace(request, max_train_samples=2)).train) == 2


def test_a_label_without_a_training_row_is_told(tmp_path):
    path = tmp_path / "train.jsonl"
    rows = [{"text": f"text {i}", "label": ["a", "b"][: i % 3] or ["c"]} for i in range(60)]
    rows += [{"text": "the only one", "label": ["a", "rare"]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = [load_data(DataRequest(train_file=str(path), max_train_samples=n, seed=n)).warnings for n in range(6, 14)]
    assert any("train has no row of 1 classes: rare" in line for lines in found for line in lines)


def test_shares_of_splits_that_are_there_are_refused(tmp_path):
    for name, count in (("train", 40), ("test", 10)):
        rows = [{"text": f"{name} {i}", "label": "ab"[i % 2]} for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = DataRequest(dataset_name=str(tmp_path), validation_share=0.2)
    assert len(load_data(asked).validation) == 8
    with pytest.raises(ConfigError, match="test_share: does nothing: .* has a test split"):
        load_data(replace(asked, test_share=0.3))


def test_decimals_of_parquet_are_numbers(tmp_path):
    values = [Decimal(f"{i}.25") for i in range(40)]
    pq.write_table(pa.table({"text": [f"text {i}" for i in range(40)], "label": values}), tmp_path / "train.parquet")
    data = load_data(DataRequest(train_file=str(tmp_path / "train.parquet"), problem_type=REGRESSION))
    assert sorted([*data.train["label"][:], *data.validation["label"][:], *data.test["label"][:]])[:2] == [0.25, 1.25]


def test_numbers_beyond_all_doubles_are_named(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text("".join(f'{{"text": "text {i}", "label": {10**i}}}\n' for i in (0, 1, 400)))
    with pytest.raises(DataError, match="row 3 .*is NaN or infinite"):
        load_data(DataRequest(train_file=str(path), problem_type=REGRESSION))
    path.write_text("".join(f'{{"text": "text {i}", "label": {i}e38}}\n' for i in range(5)))
    with pytest.raises(DataError, match=r"row 5 .*'label' is 4e\+38, which is beyond the numbers of a model"):
        load_data(DataRequest(train_file=str(path), problem_type=REGRESSION))


@pytest.mark.parametrize("kind", [int, bool, float, lambda bit: str(int(bit))])
def test_vectors_of_zeros_and_ones_are_no_lists_of_names(kind, tmp_path):
    path = tmp_path / "train.jsonl"
    rows = [{"text": f"text {i}", "label": [kind(i >> bit & 1) for bit in range(3)]} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"(?s)row 1 .*holds a vector of zeros and ones.*of \[0, 0, 0\], write"):
        load_data(DataRequest(train_file=str(path)))
    joined = [{**row, "label": "|".join(str(int(bit)) for bit in row["label"])} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in joined))
    with pytest.raises(DataError, match=r"(?s)row 1 .*holds a vector of zeros and ones"):
        load_data(DataRequest(train_file=str(path), label_separator="|"))
    rows = [{"text": f"text {i}", "label": [[0, 1], [1], [0]][i % 3]} for i in range(40)]  # numbers of labels
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert load_data(DataRequest(train_file=str(path))).schema.names == ("0", "1")


def test_lists_mean_multi_label(tmp_path):
    path = tmp_path / "train.jsonl"
    rows = [{"text": f"text {i}", "label": ["a", "b"][: i % 3]} for i in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = load_data(DataRequest(train_file=str(path)))
    assert data.schema == LabelSchema(("a", "b"), MULTI_LABEL)
    assert data.facts()["class_rows"]["train"]["a"] + data.facts()["class_rows"]["test"]["a"] + data.facts()[
        "class_rows"]["validation"]["a"] == 40  # fmt: skip
    hot = data.schema.array(data.test["label"][:])
    assert hot.dtype == np.float32
    assert hot.shape == (len(data.test), 2)
    again = load_data(DataRequest(train_file=str(path)))
    assert again.fingerprint == data.fingerprint


def test_rare_labels_are_left_out_of_all_splits(tmp_path):
    rows = [{"text": f"text {i}", "label": "a" if i % 2 else "a b"} for i in range(40)]
    test = [{"text": "unseen one", "label": "a rare"}, {"text": "unseen two", "label": ""}]
    train_file = str(write_csv(tmp_path / "train.csv", [*rows, {"text": "seldom", "label": "c"}]))
    test_file = str(write_csv(tmp_path / "test.csv", test))
    request = {"train_file": train_file, "test_file": test_file, "label_separator": " "}
    with pytest.raises(LabelError, match="'rare'"):
        load_data(DataRequest(**request))
    data = load_data(DataRequest(**request, min_label_rows=5))
    assert data.schema.names == ("a", "b")
    assert data.test["label"][:] == [[0], []]
    assert any("1 labels with fewer than 5 rows" in line for line in data.warnings)


def test_faults_of_labels_name_their_rows(tmp_path):
    lines = [{"text": "a", "label": ["x"]}, {"text": "b", "label": None}, {"text": "c", "label": "x"}]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in lines))
    with pytest.raises(DataError) as caught:
        load_data(DataRequest(train_file=str(path)))
    assert "row 2 (line 2): 'label' is missing" in str(caught.value)
    assert "row 3 (line 3): 'label' is a text, a list of labels is needed" in str(caught.value)
    numbers = str(write_csv(tmp_path / "n.csv", [{"text": "a", "label": "1.5"}, {"text": "b", "label": "much"}]))
    with pytest.raises(DataError, match=r"row 2 \(line 3\): 'label' is no number"):
        load_data(DataRequest(train_file=numbers, problem_type="regression"))


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"problem_type": "ordinal"}, "problem_type: 'ordinal' is not one of auto, single_label"),
        ({"problem_type": "regression", "label_separator": "|"}, "label_separator: needs multi-label data"),
        ({"min_label_rows": 0}, "min_label_rows: 0 is below 1"),
        ({"min_label_rows": 2}, "min_label_rows: is for multi-label data"),
    ],
)
def test_requests_that_mean_nothing(options, fault, tmp_path):
    path = write_csv(tmp_path / "train.csv", [{"text": f"t {i}", "label": "ab"[i % 2]} for i in range(30)])
    with pytest.raises(ConfigError, match=fault):
        load_data(DataRequest(train_file=str(path), **options))


def test_a_schema_keeps_its_kind(tmp_path):
    for schema in (LabelSchema(("a", "b"), MULTI_LABEL), LabelSchema(("score",), REGRESSION)):
        schema.save(tmp_path)
        assert LabelSchema.load(tmp_path) == schema
    (tmp_path / "labels.json").write_text('{"schema_version": 1, "names": ["x", "y"]}')  # as older folders have it
    assert LabelSchema.load(tmp_path) == LabelSchema(("x", "y"))
    with pytest.raises(LabelError, match="one output"):
        LabelSchema(("a", "b"), REGRESSION)
    assert np.isnan(LabelSchema(("a", "b"), MULTI_LABEL).unlabelled(3)).all()


# -- linear probe


def test_probe_per_label_against_scikit_learn(monkeypatch):
    monkeypatch.setattr("nlpxfer.train.linear_probe.PENALTIES", (0.1,))
    monkeypatch.setattr("nlpxfer.train.linear_probe.ITERATIONS", 400)
    generator = np.random.default_rng(0)
    rows = generator.normal(size=(200, 4)).astype(np.float32)
    gold = (rows @ generator.normal(size=(4, 3)) + generator.normal(size=(200, 3)) > 0.4).astype(np.float32)
    found = fit_probe(rows, gold, rows, gold, classes=3, intercept=True, problem_type=MULTI_LABEL)
    scale = np.maximum(rows.std(axis=0), 0.1 * np.median(rows.std(axis=0))) + 1e-6
    standard = (rows - rows.mean(axis=0)) / scale
    for label in range(3):
        fitted = LogisticRegression(C=0.1, tol=1e-8, max_iter=1000).fit(standard, gold[:, label])
        expected = fitted.decision_function(standard)
        assert rows @ found.weight_CH[label] + found.bias_C[label] == pytest.approx(expected, abs=2e-3)
    assert found.accuracy is None


def test_probe_of_numbers():
    generator = np.random.default_rng(0)
    rows = generator.normal(size=(300, 5)).astype(np.float32)
    gold = (rows @ [1.0, -2.0, 0.0, 0.5, 0.0] + 7).astype(np.float32)
    found = fit_probe(
        rows[:200], gold[:200], rows[200:], gold[200:], classes=1, intercept=True, problem_type=REGRESSION
    )
    assert found.weight_CH.shape == (1, 5)
    assert rows[200:] @ found.weight_CH[0] + found.bias_C[0] == pytest.approx(gold[200:], abs=0.05)


# -- recipes


def test_labels_are_smoothed_and_nothing_else_is_said(files, tiny_checkpoint, tmp_path, recwarn):
    words = [*words_for(files, tiny_checkpoint("bert"), *MULTI), "--control_arm", "false"]
    losses = [
        finished("finetune", tmp_path / size, *words, "--label_smoothing_factor", size).report["metrics"]
        for size in ("0.0", "0.4")
    ]
    assert losses[0] != losses[1]
    assert not [each for each in recwarn if "smoothing" in str(each.message)]


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_multi_label_from_file_to_answer(family, files, tiny_checkpoint, tmp_path):
    words = words_for(files, tiny_checkpoint(family), *MULTI, *LEARN, "--abstain_precision", "0.75")
    run = finished("finetune", tmp_path / "out", *words, "--save_predictions", "true")
    test = run.report["metrics"]["test"]
    assert set(METRICS[MULTI_LABEL]) <= set(test)
    floor = run.arm("majority class")["metrics"]["test"]
    assert test["micro_f1"] > 0.8 > floor["micro_f1"]
    assert run.report["verdict"]["metric"] == "sample_f1"
    assert run.run["config"]["metric_for_best_model"] == BEST[MULTI_LABEL]
    thresholds = run.report["checks"]["thresholds"]
    assert set(thresholds["by_label"]) == set(TOPICS)
    assert thresholds["test"]["micro_f1"] > 0.8
    assert not (run.folder / "confusion.png").exists()
    assert (run.folder / "per_class.png").exists()
    assert "micro-F1" in run.out
    assert "top_k=None" in (run.folder / "README.md").read_text()

    model = AutoModelForSequenceClassification.from_pretrained(run.folder)
    assert model.config.problem_type == "multi_label_classification"
    with open(files["test"], encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    answers = pipeline("text-classification", model=str(run.folder), top_k=None)([rows[0]["text"]])[0]
    classifier = Classifier.load(str(run.folder), bf16=False)
    shares = expit(classifier.logits([rows[0]["text"]])[0])
    assert {one["label"]: one["score"] for one in answers} == pytest.approx(
        dict(zip(classifier.schema.names, shares.tolist(), strict=True)), abs=1e-5
    )

    predict_file(classifier, files["test"], tmp_path / "labelled.csv", all_probabilities=True)
    with open(tmp_path / "labelled.csv", encoding="utf-8") as file:
        labelled_rows = list(csv.DictReader(file))
    assert [row["text"] for row in labelled_rows] == [row["text"] for row in rows]
    cut = load_thresholds(run.folder, classifier.schema.names)
    rule = run.report["checks"]["abstain"]
    assert 0 < rule["test"]["coverage"] <= 1
    assert rule["test"]["precision"] > 0.7
    for row in labelled_rows:
        over = [
            name
            for name, at in zip(classifier.schema.names, cut, strict=True)
            if float(row[f"probability_{name}"]) > at
        ]
        assert row["predicted_labels"] == "|".join(over)
        unsure = [name for name in over if float(row[f"probability_{name}"]) < rule["min_probability"] - 1e-6]
        assert row["abstained_labels"] == "|".join(unsure)
        shares = [float(row[f"probability_{name}"]) for name in over]
        assert [float(share) for share in row["probabilities"].split("|") if share] == pytest.approx(shares)
    scores = evaluate_file(classifier, files["test"], label_column="labels")
    assert scores["micro_f1"] == pytest.approx(test["micro_f1"])
    assert scores["with_thresholds"]["micro_f1"] == pytest.approx(thresholds["test"]["micro_f1"])
    assert scores["answered"] == pytest.approx({"min_probability": rule["min_probability"], **rule["test"]})
    lines = [json.loads(line) for line in (run.folder / "predictions" / "test.jsonl").read_text().splitlines()]
    assert [sorted(line["label"]) for line in lines] == [
        row["labels"].split("|") if row["labels"] else [] for row in rows
    ]
    assert all(0.5 < p <= 1 for line in lines for p in line["predicted"].values())


def test_numbers_from_file_to_answer(files, tiny_checkpoint, tmp_path):
    words = words_for(files, tiny_checkpoint("bert"), *NUMBERS, *LEARN)
    run = finished("finetune", tmp_path / "out", *words, "--save_predictions", "true")
    test = run.report["metrics"]["test"]
    assert set(METRICS[REGRESSION]) | {"accuracy", "quadratic_kappa"} <= set(test)
    floor = run.arm("mean number")["metrics"]["test"]
    assert test["mean_absolute_error"] < 0.7 * floor["mean_absolute_error"]
    assert test["spearman"] > 0.6
    assert "mean absolute error" in run.out
    assert run.report["verdict"]["metric"] == "mean_absolute_error"
    assert not (run.folder / "calibration.json").exists()
    classifier = Classifier.load(str(run.folder), bf16=False)
    assert classifier.schema == LabelSchema(("score",), REGRESSION)
    texts = [row["text"] for row in csv.DictReader(files["test"].read_text(encoding="utf-8").splitlines())]
    logits = classifier.logits(texts)[:, 0]
    lines = [json.loads(line) for line in (run.folder / "predictions" / "test.jsonl").read_text().splitlines()]
    assert np.allclose([line["predicted"] for line in lines], logits, rtol=1e-5, atol=0)
    predict_file(classifier, files["test"], tmp_path / "labelled.csv")
    with open(tmp_path / "labelled.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    error = np.mean([abs(float(row["predicted_number"]) - float(row["score"])) for row in rows])
    assert error == pytest.approx(test["mean_absolute_error"], abs=1e-4)
    assert evaluate_file(classifier, files["test"], label_column="score")["spearman"] == pytest.approx(
        test["spearman"]
    )
    one = pipeline("text-classification", model=str(run.folder))([rows[0]["text"]])[0]
    assert one["score"] == pytest.approx(float(rows[0]["predicted_number"]), abs=1e-4)
    for options in ({"min_probability": 0.5}, {"all_probabilities": True}):
        with pytest.raises(ConfigError, match=f"{next(iter(options))}: the model gives numbers"):
            predict_file(classifier, files["test"], tmp_path / "more.csv", **options)
    with pytest.raises(ConfigError, match="no probabilities"):
        classifier.probabilities(["a text"])


@pytest.mark.parametrize("kind", ["layers", "static"])
def test_labels_that_int8_changes_are_counted_at_the_thresholds(kind, files, tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("NLPXFER_CACHE", str(tmp_path / "cache"))
    own = ["--student", "static", "--static_dim", "8"] if kind == "static" else ["--student_num_layers", "1"]
    own += ["--num_threads", "1", "--control_arm", "false", "--student_int8", "true"]
    run = finished("distill", tmp_path / "out", *words_for(files, tiny_checkpoint("bert"), *MULTI, *LEARN, *own))
    assert max(abs(value - 0.5) for value in run.report["checks"]["thresholds"]["by_label"].values()) > 0.05
    small = run.folder if kind == "static" else run.folder / "onnx"
    with open(files["validation"], encoding="utf-8") as file:
        texts = [row["text"] for row in csv.DictReader(file)]
    models = Classifier.load(str(run.folder), bf16=False), Classifier.load(str(small), int8=True)
    given, coarse = (model.probabilities(texts) > model.thresholds_C for model in models)
    changed = (given != coarse).any(axis=1).sum()
    if kind == "static":
        assert run.report["checks"]["int8"]["changed"] == changed
        return
    assert run.report["checks"]["int8"]["changed"] == pytest.approx(changed, abs=2), "a scale for each batch"
    with pytest.raises(SystemExit, match="0"):
        main(["export", str(run.folder), str(tmp_path / "again"), "--int8"])
    found = [json.loads((folder / "export.json").read_text()) for folder in (small, tmp_path / "again")]
    assert found[0]["parity"]["int8"]["changed"] == found[1]["parity"]["int8"]["changed"]


@pytest.mark.parametrize(("task", "score"), [(MULTI, "micro_f1"), (NUMBERS, "spearman")], ids=["labels", "numbers"])
def test_distilling(task, score, files, tiny_checkpoint, tiny_data, tmp_path):
    """With unlabelled rows, whose labels are NaN."""
    words = words_for(files, tiny_checkpoint("bert"), *task, *LEARN)
    run = finished("distill", tmp_path / "out", *words, "--unlabelled_file", tiny_data.unlabelled)
    assert run.arm("distilled")["metrics"]["test"][score] > 0.5
    assert run.report["checks"]["teacher"]["retention"] == pytest.approx(
        run.arm("distilled")["metrics"]["test"][score] / run.arm("teacher")["metrics"]["test"][score]
    )
    for kept in run.report["checks"]["retention"]["students"].values():
        assert kept["score"]["metric"] == score
        assert {"per_class", "worst_class", "calibration"} & kept.keys() == (
            set() if score == "spearman" else {"per_class", "worst_class", "calibration"}
        )
        assert ("mean_absolute_error" in kept) == (score == "spearman")


@pytest.mark.parametrize(("task", "score"), [(MULTI, "micro_f1"), (NUMBERS, "spearman")], ids=["labels", "numbers"])
@pytest.mark.parametrize("classifier", ["logistic", "mlp"])
def test_frozen_features(classifier, task, score, files, tiny_checkpoint, tmp_path):
    words = [*file_words(files), "--model_name_or_path", tiny_checkpoint("bert"), *task, "--classifier", classifier]
    run = finished("features", tmp_path / "out", *words, *QUICK, "--feature_cache", tmp_path / "cache")
    floor = run.report["arms"][-1]["metrics"]["test"][score]
    assert run.report["metrics"]["test"][score] > max(0.2, floor)
    assert run.report["checks"]["features"]["logits_difference"] < 1e-4


@pytest.mark.parametrize(("task", "score"), [(MULTI, "micro_f1"), (NUMBERS, "spearman")], ids=["labels", "numbers"])
def test_adapters(task, score, files, tiny_checkpoint, tmp_path):
    """The bundle answers as the merged model does."""
    words = words_for(files, tiny_checkpoint("bert"), *task, "--num_train_epochs", "4", "--learning_rate", "3e-3")
    run = finished("adapters", tmp_path / "out", *words)
    merged = Classifier.load(str(run.folder), bf16=False)
    bundle = Classifier.load(str(run.folder / "adapter"), bf16=False, base=str(tiny_checkpoint("bert")))
    assert bundle.schema == merged.schema
    assert bundle.thresholds_C.tolist() == merged.thresholds_C.tolist()
    texts = ["bread and cheese", "the concert of the singer"]
    assert bundle.logits(texts) == pytest.approx(merged.logits(texts), abs=1e-5)
    scores = evaluate_file(bundle, files["test"], label_column=task[1])
    assert scores[score] == pytest.approx(run.report["metrics"]["test"][score], abs=1e-6)


def test_a_head_of_another_kind_is_not_kept(files, tiny_checkpoint, tmp_path):
    """The same label names with a softmax: neither a start for sigmoids, nor a teacher of them."""
    single = tiny_checkpoint("bert", "classifier", tuple(sorted(TOPICS)))
    run = finished("finetune", tmp_path / "out", *words_for(files, single, *MULTI))
    assert run.arm("fine-tuned")["details"]["linear_probe"] is not None
    message = refused("distill", tmp_path / "two", *words_for(files, single, *MULTI, "--teacher_name_or_path", single))
    assert "problem_type='single_label_classification'" in message


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        ([*MULTI, "--logit_adjustment", "1"], "logit_adjustment: is for tasks with one class per row"),
        ([*NUMBERS, "--class_weights", "balanced"], "class_weights: means nothing for a regression"),
        ([*NUMBERS, "--abstain_precision", "0.5"], "abstain_precision: is for tasks with labels"),
        ([*NUMBERS, "--linear_probe_size", "0.1"], "linear_probe_size: is for tasks with one label per row"),
        ([*NUMBERS, "--metric_for_best_model", "accuracy"], "has no accuracy"),
        ([*MULTI, "--metric_for_best_model", "spearman"], "has no spearman"),
    ],
)
def test_options_of_other_tasks_are_refused(words, fault, files, tiny_checkpoint, tmp_path):
    assert fault in refused("finetune", tmp_path / "out", *words_for(files, tiny_checkpoint("bert"), *words))


@pytest.mark.parametrize(
    ("recipe", "task", "ranges"),
    [
        ("finetune", NUMBERS, {"class_weights": "none, balanced", "label_smoothing_factor": "0.0, 0.1"}),
        ("finetune", MULTI, {"logit_adjustment": "0.0, 1.0"}),
        ("adapters", NUMBERS, {"focal_gamma": "0.0, 2.0"}),
        ("distill", NUMBERS, {"kd_loss": "kl, mse", "label_smoothing_factor": "0.0, 0.1"}),
    ],
)
def test_ranges_of_other_tasks_are_refused(recipe, task, ranges, files, tiny_checkpoint, tmp_path):
    """Not as trials that fail one after the other."""
    words = [word for name, choices in ranges.items() for word in (f"--{name}", f"{{choices: [{choices}]}}")]
    message = refused(
        recipe, tmp_path / "out", *words_for(files, tiny_checkpoint("bert"), *task), *words, "--num_trials", "2"
    )
    assert all(f"{name}: " in message for name in ranges)
    assert not (tmp_path / "out").exists()


def test_balanced_weights_of_rare_labels(files, tiny_checkpoint, tmp_path):
    words = words_for(files, tiny_checkpoint("bert"), *MULTI, "--class_weights", "balanced", "--focal_gamma", "1")
    assert finished("finetune", tmp_path / "out", *words).report["metrics"]["test"]["micro_f1"] > 0.3


def test_a_damaged_threshold_is_refused(tmp_path):
    (tmp_path / "calibration.json").write_text('{"temperature": 1.0, "thresholds": {"a": 0.3}}')
    assert load_thresholds(tmp_path, ["a"]).tolist() == [0.3]
    with pytest.raises(CheckpointError, match="threshold"):
        load_thresholds(tmp_path, ["a", "b"])
