"""Epochs in which all classes come equally often."""

import numpy as np
import pytest
from recipe_runs import finished, refused, tiny_words
from tiny import LABELS, make_rows, write_csv

from nlpxfer.errors import DataError
from nlpxfer.methods.finetune import FineTune
from nlpxfer.train.balanced import BalancedDraws
from nlpxfer.train.even import EMPTY, EvenSampler
from nlpxfer.train.sampler import LengthGroupedSampler
from nlpxfer.train.trainer import TransferTrainer

RARE = np.random.default_rng(0).permutation(np.repeat([0, 1, 3], [90, 7, 4]))  # no row of class 2


@pytest.mark.parametrize(
    "labels", [RARE, np.array([5]), np.array([0, 0, 1]), np.arange(7), np.repeat([0, 1], [50, 1])]
)
def test_each_class_comes_equally_often(labels):
    draws = BalancedDraws(labels, seed=3)
    for epoch in (0, 1, 7):
        drawn = draws.of_epoch(epoch)
        assert len(drawn) == len(labels)
        counts = np.bincount(labels[drawn])[np.unique(labels)]
        assert counts.max() - counts.min() <= 1


def test_rows_of_a_class_come_equally_often_over_the_epochs():
    draws = BalancedDraws(RARE, seed=3)
    seen = np.zeros(len(RARE), dtype=int)
    for epoch in range(8):
        drawn = np.bincount(draws.of_epoch(epoch), minlength=len(RARE))
        assert drawn[RARE == 0].max() == 1, "a row of a frequent class comes once an epoch at most"
        seen += drawn
        for label in (0, 1, 3):
            for counts in (drawn, seen):
                assert np.ptp(counts[RARE == label]) <= 1, (epoch, label)
    assert seen[RARE == 0].min() >= 2
    assert seen[RARE == 3].min() >= 66


def test_draws_depend_on_seed_and_epoch_only():
    first = BalancedDraws(RARE, seed=3)
    late = first.of_epoch(5).tolist()
    np.random.seed(1)  # noqa: NPY002
    assert BalancedDraws(RARE, seed=3).of_epoch(5).tolist() == late
    assert first.of_epoch(4).tolist() != late
    assert BalancedDraws(RARE, seed=4).of_epoch(5).tolist() != late


def test_rows_without_a_label_are_refused():
    with pytest.raises(DataError, match="needs a label for each training row"):
        BalancedDraws(np.array([0, 1, -100]), seed=1)


@pytest.mark.parametrize("grouped", [True, False])
def test_draws_are_shuffled_and_grouped_by_length(grouped):
    lengths = np.random.default_rng(1).integers(3, 100, size=len(RARE))
    sampler = LengthGroupedSampler(lengths, 8, seed=3, grouped=grouped, draws=BalancedDraws(RARE, seed=3))
    orders = []
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
        assert sorted(orders[-1]) == sorted(BalancedDraws(RARE, seed=3).of_epoch(epoch).tolist())
        assert len(orders[-1]) == len(sampler) == len(RARE)
    assert orders[0] != orders[1]
    batches = [orders[0][start : start + 8] for start in range(0, 96, 8)]
    spread = np.mean([np.ptp(lengths[batch]) for batch in batches])
    assert spread < 20 if grouped else spread > 50
    # classes are mixed within the epoch, not one after the other
    assert min(len(set(RARE[orders[0][start : start + 33]])) for start in (0, 33, 66)) == 3


def test_all_processes_together_see_the_draws_and_no_more():
    sampler = LengthGroupedSampler(np.ones(len(RARE)), 8, seed=3, draws=BalancedDraws(RARE, seed=3))
    even = list(EvenSampler(sampler, 8))
    assert len(even) == 104
    assert even.count(EMPTY) == 3
    assert np.ptp(np.bincount(RARE[[i for i in even if i != EMPTY]])[[0, 1, 3]]) <= 1


@pytest.fixture(scope="module")
def unequal(tmp_path_factory):
    """Rows of four classes: 60, 6, 6 and 6 in training."""
    folder = tmp_path_factory.mktemp("unequal")
    made = {row["text"]: row for row in make_rows(700, seed=5)}.values()
    by_label = {label: [row for row in made if row["label"] == label] for label in LABELS}
    parts = {"train": (0, (60, 6, 6, 6)), "validation": (60, (15,) * 4), "test": (80, (15,) * 4)}
    words = []
    for split, (start, counts) in parts.items():
        rows = [row for label, n in zip(LABELS, counts, strict=True) for row in by_label[label][start : start + n]]
        words += [f"--{split}_file", str(write_csv(folder / f"{split}.csv", rows))]
    return words


SHARED = "--bf16 false --num_threads 1 --use_cpu true --max_length 32 --control_arm false".split()


@pytest.mark.parametrize("key", ["finetune", "adapters"])
def test_the_recipe_trains_on_equal_classes(key, unequal, tiny_checkpoint, tmp_path, monkeypatch):
    seen = []
    plain = TransferTrainer.training_step

    def training_step(self, model, inputs, *rest):
        seen.append(np.bincount(inputs["labels"].numpy(), minlength=4))
        return plain(self, model, inputs, *rest)

    monkeypatch.setattr(TransferTrainer, "training_step", training_step)
    words = [*SHARED, *unequal, "--model_name_or_path", str(tiny_checkpoint("bert")), "--num_train_epochs", "2"]
    run = finished(key, tmp_path / "balanced", *words, "--sampling", "balanced")
    counts = np.sum(seen, axis=0)
    assert counts.sum() == 2 * 78
    assert counts.max() - counts.min() <= 2
    assert run.run["config"]["sampling"] == "balanced"


@pytest.mark.parametrize("key", ["finetune", "adapters"])
def test_the_recipe_weighs_classes(key, unequal, tiny_checkpoint, tmp_path, monkeypatch):
    """60, 6, 6 and 6 rows: weights 78 / (4 * 60) and 78 / (4 * 6)."""
    seen = set()
    plain = FineTune.loss_terms

    def loss_terms(self, *rest):
        seen.add((self.class_weights, self.focal_gamma, self.label_smoothing))
        return plain(self, *rest)

    monkeypatch.setattr(FineTune, "loss_terms", loss_terms)
    words = [*SHARED, *unequal, "--model_name_or_path", str(tiny_checkpoint("bert")), "--max_steps", "1"]
    words += ["--class_weights", "balanced", "--focal_gamma", "1.5", "--label_smoothing_factor", "0.1"]
    finished(key, tmp_path / "out", *words)
    ((weights, gamma, smoothing),) = seen
    assert sorted(weights) == pytest.approx([0.325, 3.25, 3.25, 3.25])
    assert (gamma, smoothing) == (1.5, 0.1)


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["--class_weights", "balanced"], "class_weights, sampling: both"),
        (["--logit_adjustment", "1"], "sampling, logit_adjustment: both"),
        (["--class_weights", "balanced", "--logit_adjustment", "1"], "class_weights, sampling, logit_adjustment: all"),
    ],
)
@pytest.mark.parametrize("key", ["finetune", "adapters"])
def test_two_ways_to_the_same_are_refused(key, words, names, tiny_data, tmp_path):
    told = refused(key, tmp_path / "out", *tiny_words(tiny_data), "--sampling", "balanced", *words)
    assert f"{names} make rare classes count more; use one of them" in told
