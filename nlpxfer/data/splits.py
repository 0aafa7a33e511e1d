"""Splits, folds and samples that keep the shares of the classes and never part equal texts.

Rows are drawn by a hash of the seed and the row's own text, not by a random generator: the same rows are drawn in any
process, on any platform and with any version of numpy, and the order of the file does not matter.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Hashable, Sequence

import numpy as np

from nlpxfer.errors import DataError


def draw_order(key: str, seed: int) -> bytes:
    """A place in a random but fixed order: a hash of seed and key."""
    return hashlib.blake2b(f"{seed}\x1f{key}".encode(), digest_size=16).digest()


def stratified_split(
    labels: Sequence[Hashable], keys: Sequence[str], *, share: float, seed: int
) -> tuple[list[int], list[int]]:
    """Split rows in two so that each class keeps its share and equal texts stay on one side.

    Args:
        labels: One label per row.
        keys: One key per row (see `normalise_text`); rows with the same key stay together.
        share: Part of each class that is held out, between 0 and 1; at least one row of each class is.
        seed: Another seed draws other rows.

    Returns:
        (kept, held out): row indices in ascending order, together all of them.

    Raises:
        DataError: A class cannot have a row on both sides, because all of its rows have the same text.
        ValueError: Lengths differ, or the share is not between 0 and 1.
    """
    if len(labels) != len(keys):
        raise ValueError(f"{len(labels)} labels but {len(keys)} keys")
    if not 0 < share < 1:
        raise ValueError(f"share must lie between 0 and 1, not {share}")
    groups = _groups(keys, seed)
    totals = Counter(labels)
    wanted = {label: min(max(1, round(share * total)), total - 1) for label, total in totals.items()}
    held: Counter[Hashable] = Counter()
    chosen: set[int] = set()
    for number, group in enumerate(groups):
        counts = Counter(labels[index] for index in group)
        if all(held[label] + count <= wanted[label] for label, count in counts.items()):
            held.update(counts)
            chosen.add(number)
    _hold_out_rest(groups, labels, totals, held, chosen)
    taken = sorted(index for number in chosen for index in groups[number])
    out = set(taken)
    return [index for index in range(len(labels)) if index not in out], taken


def stratified_folds(labels: Sequence[Hashable], keys: Sequence[str], *, folds: int, seed: int) -> list[int]:
    """Deal rows out to folds so that each class is spread evenly and equal texts stay together.

    Groups of equal texts are dealt from the largest to the smallest, each to the fold that has the fewest rows of its
    classes, and of these to the smallest fold. So if no text repeats, a class's rows in two folds differ by one at
    most; and no fold is empty as long as there are as many different texts.

    Args:
        labels: One label per row.
        keys: One key per row (see `normalise_text`); rows with the same key share a fold.
        folds: How many, at least 2.
        seed: Another seed deals other rows together.

    Returns:
        The fold of each row, from 0.

    Raises:
        ValueError: Lengths differ, there are fewer than 2 folds, or fewer different keys than folds.
    """
    if len(labels) != len(keys):
        raise ValueError(f"{len(labels)} labels but {len(keys)} keys")
    groups = sorted(_groups(keys, seed), key=len, reverse=True)
    if not 2 <= folds <= len(groups):
        raise ValueError(f"folds must lie between 2 and the {len(groups)} different texts, not be {folds}")
    held: list[Counter[Hashable]] = [Counter() for _ in range(folds)]
    sizes = [0] * folds
    found = [0] * len(labels)
    for group in groups:
        counts = Counter(labels[index] for index in group)
        costs = [(sum(count * of[label] for label, count in counts.items()), sizes[n], n) for n, of in enumerate(held)]
        fold = min(costs)[2]
        held[fold].update(counts)
        sizes[fold] += len(group)
        for index in group:
            found[index] = fold
    return found


def _groups(keys: Sequence[str], seed: int) -> list[list[int]]:
    """Rows with equal keys, the groups in the drawn order."""
    rows: dict[str, list[int]] = {}
    for index, key in enumerate(keys):
        rows.setdefault(key, []).append(index)
    return [rows[key] for key in sorted(rows, key=lambda key: (draw_order(key, seed), key))]


def _hold_out_rest(
    groups: Sequence[Sequence[int]],
    labels: Sequence[Hashable],
    totals: Counter[Hashable],
    held: Counter[Hashable],
    chosen: set[int],
) -> None:
    """Give each class that has no row held out its smallest group that leaves rows of every class behind."""
    missing = [label for label in totals if not held[label]]
    if not missing:
        return
    counts = [Counter(labels[index] for index in group) for group in groups]
    for label in missing:
        if held[label]:  # came along with another class's text
            continue
        fits = [
            number
            for number, inside in enumerate(counts)
            if inside[label] and all(held[name] + count < totals[name] for name, count in inside.items())
        ]
        if not fits:
            raise DataError(
                f"Class {str(label)!r} cannot be split: its {totals[label]} rows do not have two different texts "
                "of which one could be held out.",
                fix="add rows of this class, or give the validation and test files",
            )
        best = min(fits, key=lambda number: sum(counts[number].values()))
        held.update(counts[best])
        chosen.add(best)


def stratified_sample(labels: Sequence[Hashable], keys: Sequence[str], *, count: int, seed: int) -> list[int]:
    """Draw `count` rows so that each class keeps its share, and at least one row.

    Args:
        labels: One label per row.
        keys: One key per row, from which the drawing order comes.
        count: How many rows; all rows if there are no more than that.
        seed: Another seed draws other rows.

    Returns:
        Row indices in ascending order.

    Raises:
        DataError: Fewer rows are asked for than there are classes.
    """
    totals = Counter(labels)
    if count >= len(labels):
        return list(range(len(labels)))
    if count < len(totals):
        raise DataError(
            f"{count} training rows were asked for, but there are {len(totals)} classes, each of which needs one.",
            fix=f"--max_train_samples {len(totals)} or more",
        )
    quota = _quotas(totals, count)
    order = sorted(range(len(labels)), key=lambda index: (draw_order(keys[index], seed), index))
    taken: list[int] = []
    for index in order:
        if quota[labels[index]]:
            quota[labels[index]] -= 1
            taken.append(index)
    return sorted(taken)


def _quotas(totals: Counter[Hashable], count: int) -> dict[Hashable, int]:
    """Rows per class by largest remainder, each class at least one; ties go by name."""
    everything = sum(totals.values())
    by_name = sorted(totals.items(), key=lambda item: str(item[0]))
    exact = {label: count * total / everything for label, total in by_name}
    quota = {label: max(1, int(part)) for label, part in exact.items()}
    while sum(quota.values()) < count:
        quota[max(exact, key=lambda label: exact[label] - quota[label])] += 1
    while sum(quota.values()) > count:
        rich = [label for label in exact if quota[label] > 1]
        quota[max(rich, key=lambda label: quota[label] - exact[label])] -= 1
    return quota


def iterative_split(
    label_sets: Sequence[Collection[Hashable]], keys: Sequence[str], *, share: float, seed: int
) -> tuple[list[int], list[int]]:
    """Split rows with any number of labels each, so that each label keeps its share and equal texts stay together.

    The rarest label is dealt out first: each of its rows goes to the side that lacks this label most.

    Args:
        label_sets: The labels of each row; may be empty.
        keys: One key per row (see `normalise_text`).
        share: Part of the rows, and of each label's rows, that is held out, between 0 and 1.
        seed: Another seed draws other rows.

    Returns:
        (kept, held out): row indices in ascending order, together all of them; both have rows. A label of one row is
        on one side only.

    Raises:
        DataError: All rows have the same text.
        ValueError: The share is not between 0 and 1.

    Source: Sechidis, Tsoumakas and Vlahavas 2011, On the Stratification of Multi-Label Data, algorithm 1; a side that
    it leaves empty gets the smallest group of equal texts whose labels the other side keeps, if there is one.
    """
    if not 0 < share < 1:
        raise ValueError(f"share must lie between 0 and 1, not {share}")
    side = _dealt_out(label_sets, keys, shares=(1 - share, share), seed=seed)
    if len(set(side)) == 1:
        empty = 1 - side[0]
        for index in _spare_group(label_sets, keys, seed):
            side[index] = empty
    return [index for index, out in enumerate(side) if not out], [index for index, out in enumerate(side) if out]


def _spare_group(label_sets: Sequence[Collection[Hashable]], keys: Sequence[str], seed: int) -> list[int]:
    """The rows of the text that is missed least: first those whose labels stand elsewhere too, then few rows."""
    groups = _groups(keys, seed)
    if len(groups) < 2:
        raise DataError(
            f"Its {len(keys)} rows have one text, so that none could be held out.",
            fix="more rows, or give the validation and test files",
        )
    totals = Counter(label for labels in label_sets for label in labels)

    def missed(group: list[int]) -> tuple[bool, int]:
        inside = Counter(label for index in group for label in label_sets[index])
        return any(totals[label] == count for label, count in inside.items()), len(group)

    return min(groups, key=missed)


def iterative_folds(
    label_sets: Sequence[Collection[Hashable]], keys: Sequence[str], *, folds: int, seed: int
) -> list[int]:
    """Deal rows with any number of labels each out to folds; see `iterative_split` and `stratified_folds`.

    Returns:
        The fold of each row, from 0.
    """
    return _dealt_out(label_sets, keys, shares=[1 / folds] * folds, seed=seed)


def _dealt_out(
    label_sets: Sequence[Collection[Hashable]], keys: Sequence[str], *, shares: Sequence[float], seed: int
) -> list[int]:
    """The part of each row, from 0, so that each part has its share of the rows and of each label's rows."""
    groups = _groups(keys, seed)
    counts = [Counter(label for index in group for label in label_sets[index]) for group in groups]
    totals = sum(counts, Counter())
    lacking = [{label: share * total for label, total in totals.items()} for share in shares]
    rows_lacking = [share * len(keys) for share in shares]
    holders: dict[Hashable, list[int]] = {label: [] for label in totals}
    for number, inside in enumerate(counts):
        for label in inside:
            holders[label].append(number)
    found = [0] * len(keys)
    open_groups = dict.fromkeys(range(len(groups)))

    def deal(number: int, label: Hashable | None) -> None:
        wishes = [(rows if label is None else of[label], rows) for of, rows in zip(lacking, rows_lacking, strict=True)]
        part = max(range(len(shares)), key=wishes.__getitem__)
        for name, count in counts[number].items():
            lacking[part][name] -= count
        rows_lacking[part] -= len(groups[number])
        for index in groups[number]:
            found[index] = part
        del open_groups[number]

    for label in sorted(totals, key=lambda label: (totals[label], str(label))):
        for number in holders[label]:
            if number in open_groups:
                deal(number, label)
    for number in list(open_groups):
        deal(number, None)
    return found


def iterative_sample(
    label_sets: Sequence[Collection[Hashable]], keys: Sequence[str], *, count: int, seed: int
) -> list[int]:
    """Draw `count` rows with any number of labels each, so that each label about keeps its share (`iterative_split`).

    Returns:
        Row indices in ascending order; all rows if there are no more than `count`.
    """
    if count >= len(keys):
        return list(range(len(keys)))
    kept, taken = iterative_split(label_sets, keys, share=count / len(keys), seed=seed)

    def drawn(rows: Sequence[int]) -> list[int]:
        return sorted(rows, key=lambda index: (draw_order(keys[index], seed), index))

    return sorted((drawn(taken) + drawn(kept))[:count])


def quantile_bins(values: Sequence[float], *, bins: int = 10, rows: int = 10) -> list[int]:
    """The bin of each number, with about equally many rows in each: classes to stratify a regression by.

    Equal numbers are in one bin; a bin that would have too few rows is joined with the one above, the last with the
    one below.

    Args:
        values: N numbers.
        bins: Most bins.
        rows: Fewest rows per bin, where there are so many at all.

    >>> quantile_bins([3.0, 1.0, 2.0, 4.0], bins=2, rows=1)
    [1, 0, 0, 1]
    """
    count = max(1, min(bins, len(values) // rows))
    edges = np.quantile(values, np.linspace(0, 1, count + 1)[1:-1])
    bin_N = np.searchsorted(edges, values, side="left")
    joined, number, inside = [], 0, 0
    for size in np.bincount(bin_N, minlength=count).tolist():
        joined.append(number)
        inside += size
        if inside >= rows:
            number, inside = number + 1, 0
    last = max(0, number - 1)
    return [min(joined[place], last) for place in bin_N]
