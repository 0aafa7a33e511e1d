#!/usr/bin/env python3
"""Measure the Debian sections data: the figures of SOURCE.md.

    python data/debian-sections/measure.py
    python data/debian-sections/measure.py --model MODEL

The first prints text lengths, near duplicates between the splits and how often a label stands in its own text; the
standard library is enough for it. The second adds the linear probe on the frozen sentence embeddings of MODEL (a
folder or Hub id that sentence-transformers loads), which needs sentence-transformers and scikit-learn.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SPLITS = ("train", "validation", "test")
SHINGLE_WORDS = 5
NEAR = 0.8
PROBE_C = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)

Row = dict[str, Any]


def load_split(folder: Path, split: str) -> list[Row]:
    """Read one .jsonl file."""
    with (folder / f"{split}.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def shingles(text: str) -> frozenset[tuple[str, ...]]:
    """Return the set of 5-word shingles of a text (all its words as one, if it has fewer)."""
    words = re.findall(r"\w+", text.lower())
    return frozenset(tuple(words[i : i + SHINGLE_WORDS]) for i in range(max(1, len(words) - SHINGLE_WORDS + 1)))


def near_duplicates(left: Sequence[str], right: Sequence[str], minimum: float = NEAR) -> list[tuple[int, int, float]]:
    """Return the pairs of texts whose shingle sets have at least the given Jaccard similarity.

    Exact, not hashed: an inverted index over the shingles of `left` counts the common ones.

    Args:
        left: Texts.
        right: Texts.
        minimum: Least similarity, 0 to 1.

    Returns:
        Tuples of row in `left`, row in `right`, similarity.
    """
    sets = [shingles(text) for text in left]
    holders = defaultdict(list)
    for i, one in enumerate(sets):
        for shingle in one:
            holders[shingle].append(i)
    pairs = []
    for j, text in enumerate(right):
        other = shingles(text)
        for i, common in Counter(i for shingle in other for i in holders[shingle]).items():
            similarity = common / (len(sets[i]) + len(other) - common)
            if similarity >= minimum:
                pairs.append((i, j, similarity))
    return pairs


def describe_lengths(name: str, texts: Sequence[str]) -> str:
    """Return one table row of word counts: median, 95th percentile, maximum."""
    words = sorted(len(text.split()) for text in texts)
    p95 = words[int(0.95 * (len(words) - 1))]
    return f"| {name} | {len(words)} | {statistics.median(words):.0f} | {p95} | {words[-1]} |\n"


def label_word_shares(rows: Sequence[Row], column: str) -> dict[str, float]:
    """Return, per label, the share of rows whose text holds the label as a word (a plural s added or left out)."""
    hits: Counter[str] = Counter()
    total = Counter(row["label"] for row in rows)
    for row in rows:
        stem = row["label"].rstrip("s")
        hits[row["label"]] += bool(re.search(rf"\b{stem}s?\b", row[column], re.I))
    return {label: hits[label] / total[label] for label in sorted(total)}


def probe(model: str, splits: dict[str, list[Row]], column: str) -> dict[str, float]:
    """Fit logistic regression on frozen sentence embeddings; C is chosen on the validation split.

    Args:
        model: Folder or id for sentence-transformers.
        splits: Rows by split.
        column: The column to embed.

    Returns:
        C, validation accuracy, test accuracy, test macro F1 (percent are not used: 0 to 1).
    """
    from sentence_transformers import SentenceTransformer
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import f1_score

    encoder = SentenceTransformer(model, device="cpu")
    x = {s: encoder.encode([r[column] for r in rows], normalize_embeddings=True) for s, rows in splits.items()}
    y = {s: [r["label"] for r in rows] for s, rows in splits.items()}
    fits = [LogisticRegression(C=c, max_iter=2000).fit(x["train"], y["train"]) for c in PROBE_C]
    best = max(fits, key=lambda fit: fit.score(x["validation"], y["validation"]))
    return {
        "C": best.C,
        "validation accuracy": best.score(x["validation"], y["validation"]),
        "test accuracy": best.score(x["test"], y["test"]),
        "test macro F1": f1_score(y["test"], best.predict(x["test"]), average="macro"),
    }


def report_near_duplicates(splits: dict[str, list[Row]], unlabelled: Sequence[str]) -> str:
    """Return the lines on near duplicates between the splits, and between unlabelled.txt and each split."""
    texts = {s: [r["text"] for r in rows] for s, rows in splits.items()}
    lines = []
    for a, b in (("train", "validation"), ("train", "test"), ("validation", "test")):
        pairs = near_duplicates(texts[a], texts[b])
        lines.append(f"{a}/{b}: {len(pairs)} pairs, {len({j for _, j, _ in pairs})} rows of {b}\n")
        lines += [f"    {splits[a][i]['package']} ~ {splits[b][j]['package']} ({sim:.2f})\n" for i, j, sim in pairs]
    for s in SPLITS:
        pairs = near_duplicates(texts[s], unlabelled)
        lines.append(f"unlabelled/{s}: {len(pairs)} pairs, {len({i for i, _, _ in pairs})} rows of {s}\n")
    return "".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Measure the Debian sections data.")
    parser.add_argument("--data", type=Path, default=HERE, metavar="DIR", help="folder of the data files")
    parser.add_argument("--model", help="sentence-transformers folder or id; adds the linear probe")
    options = parser.parse_args(arguments)
    try:
        splits = {split: load_split(options.data, split) for split in SPLITS}
        unlabelled = (options.data / "unlabelled.txt").read_text(encoding="utf-8").splitlines()
    except OSError as error:
        sys.stderr.write(f"error: cannot read the data: {error}\n")
        return 2
    out = sys.stdout.write
    rows = [row for split in splits.values() for row in split]
    for column in ("text", "synopsis"):
        for split in SPLITS:
            out(describe_lengths(f"{split}, {column}", [row[column] for row in splits[split]]))
    out(describe_lengths("unlabelled", unlabelled))
    out(report_near_duplicates(splits, unlabelled))
    for column in ("text", "synopsis"):
        shares = label_word_shares(rows, column)
        total = sum(share * sum(row["label"] == label for row in rows) for label, share in shares.items()) / len(rows)
        out(f"label word in {column}: all {total:.3f}, " + ", ".join(f"{k} {v:.2f}" for k, v in shares.items()) + "\n")
    tags = [len(row["tags"]) for row in rows]
    distinct = Counter(tag for row in rows for tag in row["tags"])
    out(f"tags: {len(distinct)} distinct, {sum(map(bool, tags))} rows with any, {sum(tags)} in all\n")
    out(f"tags on at least 50 rows: {sum(count >= 50 for count in distinct.values())}\n")
    if options.model:
        for column in ("text", "synopsis"):
            out(
                f"probe on {column}: "
                + ", ".join(f"{k} {v:.4g}" for k, v in probe(options.model, splits, column).items())
            )
            out("\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
