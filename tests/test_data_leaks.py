from __future__ import annotations

import random
import re
import time

import pytest

from nlpxfer.data import find_leaks, normalise_text


def slow_set(key):
    """The definition, written plainly: per side of a pair, 5-word shingles or else the words."""
    found = set()
    for side, part in enumerate(key.split("\x1f")):
        words = re.findall(r"\w+", part) or part.split()
        parts = [(w,) for w in words] if len(words) < 5 else [tuple(words[i : i + 5]) for i in range(len(words) - 4)]
        found |= {(side, *part) for part in parts}
    return found


def slow_leaks(reference, checked, threshold):
    left, right = [slow_set(k) for k in reference], [slow_set(k) for k in checked]
    pairs = [
        (i, j)
        for i, a in enumerate(left)
        for j, b in enumerate(right)
        if a and b and len(a & b) >= threshold * len(a | b) - 1e-9
    ]
    exact = [j for j, key in enumerate(checked) if key in set(reference)]
    near = sorted({j for _, j in pairs} - set(exact))
    met = sorted({i for i, _ in pairs} | {i for i, key in enumerate(reference) if key in set(checked)})
    return exact, near, met


def mutated(rng, words, vocabulary):
    words = list(words)
    for _ in range(rng.choice([0, 0, 1, 1, 2, 5])):
        place = rng.randrange(len(words))
        how = rng.choice(["swap", "drop", "add", "punctuate"])
        if how == "swap":
            words[place] = rng.choice(vocabulary)
        elif how == "drop" and len(words) > 1:
            del words[place]
        elif how == "add":
            words.insert(place, rng.choice(vocabulary))
        else:
            words[place] += rng.choice(["!", ",", " -"])
    return words


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.9, 1.0])
@pytest.mark.parametrize("pairs", [False, True])
def test_agrees_with_comparing_every_pair(threshold, pairs):
    rng = random.Random(f"{threshold} {pairs}")
    vocabulary = [f"w{i}" for i in range(40)]
    originals = [rng.choices(vocabulary, k=rng.choice([1, 2, 4, 5, 6, 12, 40, 80])) for _ in range(120)]
    originals += [["!!!"], ["?", "!!!"]]
    second = [" ".join(rng.choices(vocabulary, k=3)) if pairs else None for _ in originals]

    def side(share):
        drawn = rng.sample(range(len(originals)), int(share * len(originals)))
        return [normalise_text(" ".join(mutated(rng, originals[i], vocabulary)), second[i]) for i in drawn]

    reference, checked = side(0.9), side(0.8)
    exact, near, met = slow_leaks(reference, checked, threshold)
    found = find_leaks(reference, checked, near_threshold=threshold)
    assert (list(found.exact), list(found.near), list(found.reference_rows)) == (exact, near, met)
    assert exact
    assert near


def test_numbers_by_hand():
    words = [f"w{i}" for i in range(25)]  # 21 shingles
    reference = [" ".join(words), "my card", "lost my card", "other"]
    checked = [
        " ".join(words[1:]),  # 20 of 21 shingles: 0.952
        " ".join(words[3:]),  # 18 of 21: 0.857
        "my card",
        "my card!",
        "card lost my",
        "nothing of this",
    ]
    found = find_leaks(reference, checked)
    assert found.as_dict() == {"exact": 1, "near": 3, "near_threshold": 0.9, "share": 4 / 6, "rows": [0, 2, 3, 4]}
    assert found.reference_rows == (0, 1, 2)
    assert find_leaks(reference, checked, near_threshold=0.85).near == (0, 1, 3, 4)


def test_threshold_is_reached_when_equal():
    words = [f"w{i}" for i in range(14)]  # 10 shingles
    assert find_leaks([" ".join(words)], [" ".join(words[1:])], near_threshold=0.9).near == (0,)


def test_a_pair_swapped_round_is_another_text():
    assert not find_leaks([normalise_text("a b", "c d")], [normalise_text("c d", "a b")]).rows
    assert find_leaks([normalise_text("a b", "c d")], [normalise_text("a b", "c d!")]).near == (0,)


def test_texts_without_words_and_empty_sides():
    assert find_leaks(["!!!"], ["!!!", "??"]).rows == [0]
    assert find_leaks([], ["a"]).rows == []
    assert find_leaks(["a"], []).as_dict()["share"] == 0.0


@pytest.mark.parametrize("threshold", [0, -1, 1.1])
def test_threshold_out_of_range(threshold):
    with pytest.raises(ValueError, match="near_threshold"):
        find_leaks(["a"], ["b"], near_threshold=threshold)


def test_many_rows_that_look_alike_stay_fast():
    # 20,000 x 3,000 rows from one template would be 60 million pairs if frequent shingles were looked up.
    reference = [f"please send the order number {i} to our office in town number {i % 7}" for i in range(20_000)]
    checked = [f"please send the order number {i + 10**6} to our office in town number {i % 7}" for i in range(3_000)]
    start = time.perf_counter()
    assert find_leaks(reference, checked).rows == []
    assert time.perf_counter() - start < 20
