"""Texts that stand on both sides of a split, exactly or nearly.

Exact: equal once normalised (`normalise_text`). Near: the Jaccard similarity of the two texts' sets of 5-word shingles
reaches the threshold; a text of fewer than 5 words has the set of its words instead. Words are runs of letters and
digits, so that punctuation does not count; a text without any is its blank-separated parts. A language written without
blanks has few and long words: there, hardly anything but exact repeats is found.

All pairs that reach the threshold are found, none is missed: prefix filtering over the rarest shingles instead of
MinHash (datasketch), which misses some, asks for a random seed, and would be one more dependency.

Source: Xiao et al. 2008, "Efficient similarity joins for near duplicate detection" (prefix and length filters); Broder
1997, "On the resemblance and containment of documents" (shingles).

Shape suffixes: N shingles or words of all texts, T texts, P places in prefixes, C candidate pairs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from nlpxfer.data.rows import PAIR_MARK

NEAR_THRESHOLD: Final = 0.9
SHINGLE_WORDS: Final = 5
CANDIDATES_AT_ONCE: Final = 2_000_000
ROUNDING: Final = 1e-9  # 0.9 * 10 must not count as a little more than 9
_WORD: Final = re.compile(r"\w+")

Integers = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]


@dataclass(frozen=True, kw_only=True)
class Leaks:
    """Which checked rows also stand in the reference (indices from 0).

    Args:
        exact: Checked rows whose normalised text stands in the reference.
        near: Checked rows that are not exact, but nearly a text of the reference.
        reference_rows: Reference rows that any of those meet: the ones to drop.
        checked: How many rows were checked.
        near_threshold: Jaccard similarity from which two texts are near.
    """

    exact: tuple[int, ...]
    near: tuple[int, ...]
    reference_rows: tuple[int, ...]
    checked: int
    near_threshold: float

    @property
    def rows(self) -> list[int]:
        """All leaking checked rows, exact and near, ascending."""
        return sorted((*self.exact, *self.near))

    def as_dict(self) -> dict[str, Any]:
        """Counts, share of the checked rows that leak, and their indices."""
        return {
            "exact": len(self.exact),
            "near": len(self.near),
            "near_threshold": self.near_threshold,
            "share": len(self.rows) / self.checked if self.checked else 0.0,
            "rows": self.rows,
        }


def find_leaks(reference: Sequence[str], checked: Sequence[str], *, near_threshold: float = NEAR_THRESHOLD) -> Leaks:
    """Find the checked texts that also stand in the reference, exactly or nearly.

    Args:
        reference: Normalised texts (see `normalise_text`), for example of the training rows.
        checked: Normalised texts, for example of the test rows.
        near_threshold: Jaccard similarity from which two texts are near, above 0 and at most 1.

    Raises:
        ValueError: The threshold is out of range.
    """
    if not 0 < near_threshold <= 1:
        raise ValueError(f"near_threshold must lie above 0 and at most at 1, not {near_threshold}")
    known, asked = set(reference), set(checked)
    exact = {index for index, key in enumerate(checked) if key in known}
    met = {index for index, key in enumerate(reference) if key in asked}
    left, right = _near_rows(reference, checked, near_threshold)
    return Leaks(
        exact=tuple(sorted(exact)),
        near=tuple(sorted(right - exact)),
        reference_rows=tuple(sorted(met | left)),
        checked=len(checked),
        near_threshold=near_threshold,
    )


def _near_rows(reference: Sequence[str], checked: Sequence[str], threshold: float) -> tuple[set[int], set[int]]:
    """The reference rows and the checked rows that reach the threshold with a row of the other side."""
    if not reference or not checked:
        return set(), set()
    sets, owners_T = _distinct_sets([*reference, *checked])
    left_T, right_T = owners_T[: len(reference)], owners_T[len(reference) :]
    sides = np.zeros((len(sets), 2), dtype=bool)
    sides[left_T, 0] = True
    sides[right_T, 1] = True
    met = np.zeros_like(sides)
    for left, right in _similar_sets(sets, sides, threshold):
        met[left, 0] = True
        met[right, 1] = True
    return set(np.flatnonzero(met[left_T, 0]).tolist()), set(np.flatnonzero(met[right_T, 1]).tolist())


def _shingles(texts: Sequence[str]) -> tuple[Hashes, Integers]:
    """The hashed shingles of all texts (N) and the text of each (N), repeats inside a text included."""
    numbers: dict[str, int] = {}
    words: list[int] = []
    lengths: list[int] = []
    owners: list[int] = []
    for index, text in enumerate(texts):
        # The two sides of a pair are shingled apart; those of the second side are marked by the side's number.
        for side, part in enumerate(text.split(PAIR_MARK)):
            found = _WORD.findall(part) or part.split()
            words += [numbers.setdefault(f"{side}\x1f{word}" if side else word, len(numbers)) for word in found]
            lengths.append(len(found))
            owners.append(index)
    words_N = np.asarray(words, dtype=np.uint64)
    lengths_S = np.asarray(lengths, dtype=np.int64)
    owner_N = np.repeat(np.asarray(owners, dtype=np.int64), lengths_S)
    left_N = np.repeat(np.cumsum(lengths_S), lengths_S) - np.arange(len(words_N))  # words to the end of the part
    short_N = np.repeat(lengths_S < SHINGLE_WORDS, lengths_S)
    factors = _mix(np.arange(SHINGLE_WORDS, dtype=np.uint64)) | np.uint64(1)
    mixed_N = _mix(words_N)
    hashes_N = mixed_N * factors[0]
    for step in range(1, SHINGLE_WORDS):
        hashes_N[:-step] += mixed_N[step:] * factors[step]
    hashes_N = np.where(short_N, mixed_N, _mix(hashes_N))
    whole_N = short_N | (left_N >= SHINGLE_WORDS)
    return hashes_N[whole_N], owner_N[whole_N]


def _mix(values_N: Hashes) -> Hashes:
    """Spread 64-bit numbers over the whole range (the finaliser of splitmix64)."""
    mixed_N = values_N + np.uint64(0x9E3779B97F4A7C15)
    mixed_N = (mixed_N ^ (mixed_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed_N = (mixed_N ^ (mixed_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed_N ^ (mixed_N >> np.uint64(31))


def _distinct_sets(texts: Sequence[str]) -> tuple[list[Integers], Integers]:
    """The distinct shingle sets, rarest shingle first, and for each text the number of its set (T)."""
    hashes_N, owner_N = _shingles(texts)
    order_N = np.lexsort((hashes_N, owner_N))
    hashes_N, owner_N = hashes_N[order_N], owner_N[order_N]
    fresh_N = np.ones(len(hashes_N), dtype=bool)
    fresh_N[1:] = (hashes_N[1:] != hashes_N[:-1]) | (owner_N[1:] != owner_N[:-1])
    hashes_N, owner_N = hashes_N[fresh_N], owner_N[fresh_N]
    _, inverse_N, counts = np.unique(hashes_N, return_inverse=True, return_counts=True)
    rank = np.empty(len(counts), dtype=np.int64)
    rank[np.lexsort((np.arange(len(counts)), counts))] = np.arange(len(counts))
    ranks_N = rank[inverse_N]
    ranks_N = ranks_N[np.lexsort((ranks_N, owner_N))]
    ends = np.cumsum(np.bincount(owner_N, minlength=len(texts)))
    numbers: dict[bytes, int] = {}
    sets: list[Integers] = []
    owners_T = np.empty(len(texts), dtype=np.int64)
    for text, members in enumerate(np.split(ranks_N, ends[:-1])):
        number = numbers.setdefault(members.tobytes(), len(sets))
        if number == len(sets):
            sets.append(members)
        owners_T[text] = number
    return sets, owners_T


def _similar_sets(
    sets: Sequence[Integers], sides: npt.NDArray[np.bool_], threshold: float
) -> Iterator[tuple[int, int]]:
    """Pairs (set of the reference, set of the checked) whose Jaccard similarity reaches the threshold."""
    sizes_T = np.asarray([len(members) for members in sets], dtype=np.int64)
    filled_T = sizes_T > 0
    # A set of s shingles and another that reaches the threshold t share one of the first s - ceil(t*s) + 1 of each.
    prefix_T = np.where(filled_T, sizes_T - np.ceil(threshold * sizes_T - ROUNDING).astype(np.int64) + 1, 0)
    key_P = np.concatenate([members[:length] for members, length in zip(sets, prefix_T.tolist(), strict=True)])
    owner_P = np.repeat(np.arange(len(sets)), prefix_T)
    left_P, right_P = sides[owner_P, 0], sides[owner_P, 1]
    frozen: dict[int, frozenset[int]] = {}

    def members_of(number: int) -> frozenset[int]:
        if number not in frozen:
            frozen[number] = frozenset(sets[number].tolist())
        return frozen[number]

    for left_C, right_C in _candidates(key_P[left_P], owner_P[left_P], key_P[right_P], owner_P[right_P]):
        small_C = np.minimum(sizes_T[left_C], sizes_T[right_C])
        large_C = np.maximum(sizes_T[left_C], sizes_T[right_C])
        fits_C = small_C >= threshold * large_C - ROUNDING
        pairs = np.unique(np.stack([left_C[fits_C], right_C[fits_C]], axis=1), axis=0)
        for left, right in pairs.tolist():
            shared = len(members_of(left) & members_of(right))
            union = int(sizes_T[left] + sizes_T[right]) - shared
            if shared >= threshold * union - ROUNDING:
                yield left, right


def _candidates(
    left_key_P: Integers, left_owner_P: Integers, right_key_P: Integers, right_owner_P: Integers
) -> Iterator[tuple[Integers, Integers]]:
    """Pairs of owners that share a key, some millions at a time; a pair may come more than once."""
    order_P = np.argsort(right_key_P, kind="stable")
    right_key_P, right_owner_P = right_key_P[order_P], right_owner_P[order_P]
    first_P = np.searchsorted(right_key_P, left_key_P, side="left")
    count_P = np.searchsorted(right_key_P, left_key_P, side="right") - first_P
    total_P = np.cumsum(count_P)
    start = 0
    while start < len(count_P):
        before = total_P[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(total_P, before + CANDIDATES_AT_ONCE, side="right")))
        count = count_P[start:stop]
        if count.any():
            within = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
            yield (
                np.repeat(left_owner_P[start:stop], count),
                right_owner_P[np.repeat(first_P[start:stop], count) + within],
            )
        start = stop
