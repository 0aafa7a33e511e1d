from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from nlpxfer.data import stratified_sample, stratified_split
from nlpxfer.errors import DataError

LABELS = ["a"] * 60 + ["b"] * 30 + ["c"] * 10
KEYS = [f"text {i}" for i in range(100)]


def test_shares_of_the_classes_are_kept():
    kept, taken = stratified_split(LABELS, KEYS, share=0.2, seed=1)
    assert Counter(LABELS[i] for i in taken) == {"a": 12, "b": 6, "c": 2}
    assert sorted(kept + taken) == list(range(100))
    assert kept == sorted(kept)
    assert taken == sorted(taken)


def test_another_seed_draws_other_rows():
    first = stratified_split(LABELS, KEYS, share=0.2, seed=1)
    assert first == stratified_split(LABELS, KEYS, share=0.2, seed=1)
    assert first != stratified_split(LABELS, KEYS, share=0.2, seed=2)


def test_order_of_the_rows_does_not_matter():
    _, taken = stratified_split(LABELS, KEYS, share=0.2, seed=1)
    _, reverse = stratified_split(LABELS[::-1], KEYS[::-1], share=0.2, seed=1)
    assert {KEYS[i] for i in taken} == {KEYS[::-1][i] for i in reverse}


def test_other_processes_draw_the_same_rows():
    code = (
        "from nlpxfer.data import stratified_split as s;import sys;"
        "sys.stdout.write(str(s(['a', 'b'] * 20, [str(i) for i in range(40)], share=0.3, seed=5)[1]))"
    )
    out = []
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
        command = [sys.executable, "-c", code]
        out.append(subprocess.run(command, env=environment, capture_output=True, check=True).stdout)
    _, here = stratified_split(["a", "b"] * 20, [str(i) for i in range(40)], share=0.3, seed=5)
    assert out == [str(here).encode()] * 2


def test_equal_texts_stay_on_one_side():
    keys = [f"text {i // 4}" for i in range(100)]
    labels = ["a", "b", "a", "b"] * 25  # each text with both labels
    kept, taken = stratified_split(labels, keys, share=0.2, seed=0)
    assert not {keys[i] for i in kept} & {keys[i] for i in taken}
    assert Counter(labels[i] for i in taken) == {"a": 10, "b": 10}


def test_each_class_has_a_row_on_both_sides():
    labels = ["a"] * 50 + ["b"] * 2 + ["c"] * 4
    keys = [f"t{i}" for i in range(52)] + ["same"] * 3 + ["other"]
    kept, taken = stratified_split(labels, keys, share=0.1, seed=0)
    assert {labels[i] for i in kept} == {labels[i] for i in taken} == {"a", "b", "c"}
    assert [i for i in taken if labels[i] == "c"] == [55]  # the smaller group of the class


def test_class_that_stands_beside_another_in_every_text():
    labels = ["a", "b"] * 2 + ["a"] * 2
    keys = ["x", "x", "y", "y", "z", "z"]  # b only ever stands beside a; a text of two rows exceeds the wanted one
    kept, taken = stratified_split(labels, keys, share=0.1, seed=0)
    assert {labels[i] for i in kept} == {labels[i] for i in taken} == {"a", "b"}
    assert not {keys[i] for i in kept} & {keys[i] for i in taken}


def test_class_held_out_along_with_another():
    labels, keys = ["a", "a", "b", "b"] * 2, ["x"] * 4 + ["y"] * 4
    assert len(stratified_split(labels, keys, share=0.1, seed=0)[1]) == 4


@pytest.mark.parametrize(("labels", "keys"), [("aab", "xyz"), ("aabb", "xyzz")])
def test_class_that_cannot_be_on_both_sides_is_named(labels, keys):
    with pytest.raises(DataError, match="Class 'b' cannot be split"):
        stratified_split(list(labels), list(keys), share=0.5, seed=0)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="2 labels but 1 keys"):
        stratified_split(["a", "b"], ["x"], share=0.5, seed=0)
    with pytest.raises(ValueError, match="between 0 and 1"):
        stratified_split(["a", "b"], ["x", "y"], share=1.0, seed=0)


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (50, {"a": 30, "b": 15, "c": 5}),
        (10, {"a": 6, "b": 3, "c": 1}),
        (5, {"a": 3, "b": 1, "c": 1}),
        (4, {"a": 2, "b": 1, "c": 1}),
        (3, {"a": 1, "b": 1, "c": 1}),
        (99, {"a": 59, "b": 30, "c": 10}),
        (100, {"a": 60, "b": 30, "c": 10}),
        (1000, {"a": 60, "b": 30, "c": 10}),
    ],
)
def test_sample_sizes(count, expected):
    drawn = stratified_sample(LABELS, KEYS, count=count, seed=3)
    assert Counter(LABELS[i] for i in drawn) == expected
    assert drawn == sorted(set(drawn))


def test_sample_takes_from_the_large_classes_what_the_small_ones_need():
    labels = ["a"] * 97 + ["b", "c", "d"]  # shares of 5: 4.85, 0.05, 0.05, 0.05
    drawn = stratified_sample(labels, KEYS, count=5, seed=3)
    assert Counter(labels[i] for i in drawn) == {"a": 2, "b": 1, "c": 1, "d": 1}


def test_ties_in_a_sample_do_not_follow_the_order_of_the_file():
    for labels in (["a", "b"] * 10, ["b", "a"] * 10):
        drawn = stratified_sample(labels, KEYS[:20], count=7, seed=3)
        assert Counter(labels[i] for i in drawn) == {"a": 4, "b": 3}


def test_sample_is_drawn_by_the_seed():
    assert stratified_sample(LABELS, KEYS, count=20, seed=3) == stratified_sample(LABELS, KEYS, count=20, seed=3)
    assert stratified_sample(LABELS, KEYS, count=20, seed=3) != stratified_sample(LABELS, KEYS, count=20, seed=4)


def test_sample_smaller_than_the_number_of_classes():
    with pytest.raises(DataError, match="2 training rows were asked for, but there are 3 classes"):
        stratified_sample(LABELS, KEYS, count=2, seed=3)
