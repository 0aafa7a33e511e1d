#!/usr/bin/env python3
"""Rebuild the Debian sections data from Debian's own package index.

Two index files go in: `Packages` (section, source and debtags of every package) and `Translation-en` (the English
descriptions), component main, architecture amd64. Four files come out: train.jsonl, validation.jsonl, test.jsonl and
unlabelled.txt. The same index gives the same bytes. SOURCE.md tells what the rows mean and which index was used.

    python data/debian-sections/prepare.py --fetch --index INDEX --output data/debian-sections
    python data/debian-sections/prepare.py --index INDEX --output data/debian-sections --check

`--fetch` runs apt-get with a state folder of its own under INDEX, so that the machine's own lists stay as they are;
the package sources are those of the machine. `--check` writes nothing and compares a rebuild with the files there.
Exit codes: 0 done, 1 `--check` found a difference, 2 a fault in the call or in the index.

Only the standard library is used, so that the data can be rebuilt without installing the project.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import logging
import lzma
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger("debian-sections")

SECTIONS = (
    "admin",
    "database",
    "editors",
    "electronics",
    "fonts",
    "games",
    "graphics",
    "hamradio",
    "mail",
    "math",
    "net",
    "science",
    "sound",
    "text",
    "video",
    "web",
)
# Not for unlabelled.txt either: their descriptions speak about packaging, not about a program.
PACKAGING_SECTIONS = frozenset(
    ("debug", "doc", "introspection", "libdevel", "localization", "metapackages", "oldlibs", "tasks")
)
COMPANION_SUFFIXES = ("-common", "-data", "-dbg", "-dbgsym", "-dev", "-doc", "-docs", "-examples")
# "transitional package", "dummy transitional package", "transition meta-package", but not "double dummy solver".
DUMMY = re.compile(
    r"\b(?:transition(?:al)?|transit\.|dummy)(?:[\s-]+(?:transitional|dummy|meta))*[\s-]*(?:meta)?(?:package|pkg)\b",
    re.I,
)
MIN_CHARS = 30  # below that stand headings such as "Features include:"
UNLABELLED_BYTES = 3_000_000
SPLITS = ("train", "validation", "test")
OUTPUTS = ("train.jsonl", "validation.jsonl", "test.jsonl", "unlabelled.txt")
COMPRESSIONS = ("", ".gz", ".xz", ".lz4")
# The names under which apt, or a plain download from the archive, stores the two files.
INDEX_NAMES = {
    "Packages": r"(?:.*_dists_bookworm_main_binary-amd64_)?Packages",
    "Translation-en": r"(?:.*_dists_bookworm_main_i18n_)?Translation-en",
}
APT_GET_SECONDS = 900

Stanza = dict[str, str]


class PrepareError(Exception):
    """A fault of the call or of the index; its message is for the user."""


@dataclass(frozen=True)
class Package:
    """One binary package of the index.

    Attributes:
        name: Binary package name.
        source: Name of the source package it is built from.
        section: Archive section, without a component.
        synopsis: Short description.
        text: First paragraph of the long description, on one line.
        tags: Debtags, sorted.
        dummy: Whether the description calls it a transitional or dummy package.
    """

    name: str
    source: str
    section: str
    synopsis: str
    text: str
    tags: tuple[str, ...]
    dummy: bool


# ---------------------------------------------------------------------------------------------------------------------
# Reading the index
# ---------------------------------------------------------------------------------------------------------------------


def fetch_index(index: Path) -> None:
    """Download the index with apt-get into `index`, leaving the machine's own package lists alone.

    Raises:
        PrepareError: If apt-get is missing, fails or takes too long.
    """
    index = index.resolve()
    for folder in ("state", "lists/partial", "cache/archives/partial"):
        (index / folder).mkdir(parents=True, exist_ok=True)
    options = {
        "Dir::State": index / "state",
        "Dir::State::Lists": index / "lists",
        "Dir::Cache": index / "cache",
        "APT::Architecture": "amd64",
        "APT::Architectures": "amd64",
        "APT::Sandbox::User": "",  # apt's own user often may not enter the folder
        "Acquire::Languages": "en",
        "Acquire::GzipIndexes": "false",
    }
    command = ["apt-get", *(part for key, value in options.items() for part in ("-o", f"{key}={value}")), "update"]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=APT_GET_SECONDS,
            env={**os.environ, "LC_ALL": "C"},
        )
    except FileNotFoundError:
        raise PrepareError(
            "apt-get is not on this machine: use --fetch on a Debian system, or --index alone"
        ) from None
    except subprocess.TimeoutExpired:
        raise PrepareError(f"apt-get update took more than {APT_GET_SECONDS} seconds") from None
    if done.returncode:
        raise PrepareError(f"apt-get update failed with {done.returncode}:\n{(done.stderr or done.stdout).strip()}")


def find_index_file(index: Path, kind: str) -> Path:
    """Find one of the two index files, plain or compressed, in `index` or in its folder lists/.

    Args:
        index: Folder given by the user.
        kind: A key of `INDEX_NAMES`.

    Raises:
        PrepareError: If there is no such file, or several that are not just compressions of one.
    """
    if not index.is_dir():
        raise PrepareError(f"no such folder: {index} (make it with --fetch)")
    pattern = re.compile(f"({INDEX_NAMES[kind]})(\\.gz|\\.xz|\\.lz4|)")
    found = [
        (path, match)
        for folder in (index, index / "lists")
        if folder.is_dir()
        for path in sorted(folder.iterdir())
        if path.is_file() and (match := pattern.fullmatch(path.name))
    ]
    if not found:
        raise PrepareError(
            f"no {kind} file of bookworm/main (amd64) in {index}. Expected {kind} or *_dists_bookworm_main_*{kind}, "
            "plain, .gz, .xz or .lz4; --fetch brings it if the machine's apt sources hold the suite bookworm."
        )
    stems = {path.parent / match[1] for path, match in found}
    if len(stems) > 1:
        raise PrepareError(f"several {kind} files in {index}, keep one: {', '.join(sorted(p.name for p in stems))}")
    return min(found, key=lambda item: COMPRESSIONS.index(item[1][2]))[0]


def read_index_file(path: Path) -> bytes:
    """Return the uncompressed content of an index file.

    Python has no lz4 module of its own; for .lz4 the program `lz4` is used, which apt's default of compressed lists
    may ask for (`--fetch` does not).

    Raises:
        PrepareError: If the file cannot be read or decompressed, or is empty.
    """
    try:
        if path.suffix == ".gz":
            content = gzip.decompress(path.read_bytes())
        elif path.suffix == ".xz":
            content = lzma.decompress(path.read_bytes())
        elif path.suffix == ".lz4":
            content = subprocess.run(["lz4", "-dc", str(path)], check=True, capture_output=True).stdout
        else:
            content = path.read_bytes()
    except FileNotFoundError as error:
        raise PrepareError(f"cannot read {path}: {error.filename or 'file'} is missing") from None
    except (OSError, EOFError, zlib.error, lzma.LZMAError, subprocess.CalledProcessError) as error:
        raise PrepareError(f"cannot read {path}: {error}") from None
    if not content.strip():
        raise PrepareError(f"{path} is empty")
    return content


def parse_stanzas(content: bytes, name: str) -> Iterator[Stanza]:
    """Yield the stanzas of a Debian control file.

    Args:
        content: The file's bytes (UTF-8).
        name: File name for error messages.

    Yields:
        One dict per stanza, field name to value; continuation lines keep their line break and first blank.

    Raises:
        PrepareError: If a line is neither a field, nor a continuation, nor empty, or if the bytes are not UTF-8.
    """
    try:
        lines = content.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise PrepareError(f"{name} is not UTF-8: {error}") from None
    stanza: dict[str, list[str]] = {}
    field: list[str] | None = None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            if stanza:
                yield {key: "\n".join(parts) for key, parts in stanza.items()}
            stanza, field = {}, None
        elif line[0] in " \t":
            if field is None:
                raise PrepareError(f"{name}, line {number}: a continuation line without a field: {line[:60]!r}")
            field.append(line)
        else:
            key, colon, value = line.partition(":")
            if not colon or not key or " " in key:
                raise PrepareError(f"{name}, line {number}: expected 'Field: value', found {line[:60]!r}")
            field = stanza[key] = [value.strip()]
    if stanza:
        yield {key: "\n".join(parts) for key, parts in stanza.items()}


def required_field(stanza: Stanza, key: str, name: str) -> str:
    """Return a field that each stanza must have.

    Raises:
        PrepareError: If it is missing or empty.
    """
    if value := stanza.get(key):
        return value
    raise PrepareError(f"{name}: the stanza of {stanza.get('Package', '?')} has no field {key}")


# ---------------------------------------------------------------------------------------------------------------------
# From stanzas to rows
# ---------------------------------------------------------------------------------------------------------------------


def fold(text: str) -> str:
    """Fold every run of white space and control characters to one blank."""
    return " ".join(re.sub(r"[\x00-\x1f\x7f-\x9f]", " ", text).split())


def normalise(text: str) -> str:
    """Return the form in which two texts are compared: lower case, white space folded."""
    return fold(text.lower())


def split_description(description: str) -> tuple[str, str]:
    r"""Split a description into synopsis and first paragraph, each on one line.

    >>> split_description("a tool\n Does\n things.\n .\n More.")
    ('a tool', 'Does things.')
    """
    synopsis, *lines = description.split("\n")
    paragraph: list[str] = []
    for line in lines:
        if line.strip() != ".":
            paragraph.append(line)
        elif paragraph:
            break
    return fold(synopsis), fold(" ".join(paragraph))


def make_package(stanza: Stanza, description: str) -> Package | None:
    """Build a package from its stanza in `Packages`; None if it is of another component than main."""
    component, _, section = required_field(stanza, "Section", "Packages").rpartition("/")
    if component not in ("", "main"):
        return None
    name = stanza["Package"]
    synopsis, text = split_description(description)
    return Package(
        name=name,
        source=(stanza.get("Source") or name).split()[0],  # "name (version)" where the versions differ
        section=section,
        synopsis=synopsis,
        text=text,
        tags=tuple(sorted({tag for part in stanza.get("Tag", "").split(",") if (tag := part.strip())})),
        dummy=bool(DUMMY.search(fold(description))),
    )


def load_packages(packages: bytes, translation: bytes) -> list[Package]:
    """Join the two index files.

    Raises:
        PrepareError: If a file is malformed, or if not one description fits.
    """
    descriptions = {
        (required_field(s, "Package", "Translation-en"), required_field(s, "Description-md5", "Translation-en")): (
            required_field(s, "Description-en", "Translation-en")
        )
        for s in parse_stanzas(translation, "Translation-en")
    }
    loaded = []
    missing = 0
    for stanza in parse_stanzas(packages, "Packages"):
        key = (required_field(stanza, "Package", "Packages"), stanza.get("Description-md5", ""))
        if key not in descriptions:
            missing += 1
        elif (package := make_package(stanza, descriptions[key])) is not None:
            loaded.append(package)
    if not loaded:
        raise PrepareError("not one package of Packages has its description in Translation-en: not the same index?")
    if missing:
        logger.warning("%d packages without an English description were left out", missing)
    return loaded


def choose_package(packages: Sequence[Package]) -> Package | None:
    """Choose the package that stands for its group: the one named like its source, else the shortest name.

    Companions (-data, -dev, ...) and dummy packages are never chosen. Ties go by the alphabet.
    """
    real = [p for p in packages if not p.dummy and not p.name.endswith(COMPANION_SUFFIXES)]
    return min(real, key=lambda p: (p.name != p.source, len(p.name), p.name, p.text), default=None)


def choose_labelled(packages: Iterable[Package]) -> list[Package]:
    """Return the labelled rows, by name: one per source and section, long enough, no text twice.

    Of rows with the same text and section the alphabetically first is kept; a text with several sections is dropped.
    """
    groups = defaultdict(list)
    for package in packages:
        if package.section in SECTIONS:
            groups[package.source, package.section].append(package)
    chosen = [p for group in groups.values() if (p := choose_package(group)) and len(p.text) >= MIN_CHARS]
    by_text = defaultdict(list)
    for package in sorted(chosen, key=lambda p: p.name):
        by_text[normalise(package.text)].append(package)
    return sorted((g[0] for g in by_text.values() if len({p.section for p in g}) == 1), key=lambda p: p.name)


def source_number(source: str) -> int:
    """Return the number that places a source package: its SHA-1, as an integer."""
    return int(hashlib.sha1(source.encode("utf-8"), usedforsecurity=False).hexdigest(), 16)


def split_of(source: str) -> str:
    """Return the split of a source package: by SHA-1 modulo 10, 0-1 test, 2 validation, 3-9 train.

    >>> split_of("0ad")
    'train'
    """
    return ("test", "test", "validation", *["train"] * 7)[source_number(source) % 10]


def choose_unlabelled(packages: Iterable[Package], labelled: Iterable[Package]) -> list[str]:
    """Return unlabelled texts of the other sections, in the order of the source's hash, within the size limit.

    One text per source package, only of sources of the training part, distinct, without a web address (a line may be
    about little else), and none that is also a labelled text. The order is random in effect: the first n lines are a
    fair sample of the whole.
    """
    groups = defaultdict(list)
    for package in packages:
        if package.section not in SECTIONS and package.section not in PACKAGING_SECTIONS:
            if split_of(package.source) == "train":
                groups[package.source].append(package)
    seen = {normalise(p.text) for p in labelled}
    texts = []
    size = 0
    for source in sorted(groups, key=lambda s: (source_number(s), s)):
        chosen = choose_package(groups[source])
        if chosen is None or len(chosen.text) < MIN_CHARS or "://" in chosen.text or normalise(chosen.text) in seen:
            continue
        size += len(chosen.text.encode("utf-8")) + 1
        if size > UNLABELLED_BYTES:
            break
        seen.add(normalise(chosen.text))
        texts.append(chosen.text)
    return texts


def row_json(package: Package) -> str:
    """Return one line of a .jsonl file."""
    row = {
        "text": package.text,
        "synopsis": package.synopsis,
        "label": package.section,
        "tags": package.tags,
        "package": package.name,
        "source": package.source,
    }
    return json.dumps(row, ensure_ascii=False) + "\n"


def build_files(packages: bytes, translation: bytes) -> dict[str, str]:
    """Build all files.

    Args:
        packages: Content of the index file `Packages`.
        translation: Content of the index file `Translation-en`.

    Returns:
        The content of each file of `OUTPUTS`.

    Raises:
        PrepareError: If the index is malformed or a split would be empty.
    """
    loaded = load_packages(packages, translation)
    labelled = choose_labelled(loaded)
    files = {f"{s}.jsonl": "".join(row_json(p) for p in labelled if split_of(p.source) == s) for s in SPLITS}
    if empty := [name for name, content in files.items() if not content]:
        raise PrepareError(f"the index gives no rows for {', '.join(empty)}: is it the whole of bookworm/main?")
    files["unlabelled.txt"] = "".join(text + "\n" for text in choose_unlabelled(loaded, labelled))
    return files


# ---------------------------------------------------------------------------------------------------------------------
# Writing, checking, command line
# ---------------------------------------------------------------------------------------------------------------------


def write_files(files: dict[str, str], output: Path) -> None:
    """Write all files beside their places first, then move them there, so that no half file is ever seen.

    Raises:
        PrepareError: If the folder cannot be written to.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=".part-", dir=output))
        try:
            for name, content in files.items():
                (part / name).write_bytes(content.encode("utf-8"))
            for name in files:
                os.replace(part / name, output / name)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    except OSError as error:
        raise PrepareError(f"cannot write to {output}: {error}") from None


def compare_files(files: dict[str, str], output: Path) -> list[str]:
    """Return one line for each file in `output` that is missing or differs from the rebuild.

    Raises:
        PrepareError: If a file is there but cannot be read.
    """
    faults = []
    for name, content in files.items():
        try:
            if (output / name).read_bytes() != content.encode("utf-8"):
                faults.append(f"{name}: differs")
        except FileNotFoundError:
            faults.append(f"{name}: missing")
        except OSError as error:
            raise PrepareError(f"cannot read {output / name}: {error}") from None
    return faults


def compare_digests(digests: dict[str, str], source_page: Path) -> list[str]:
    """Return one line for each index file whose SHA-256 is not recorded in SOURCE.md (nothing if there is no page)."""
    if not source_page.is_file():
        return []
    recorded = source_page.read_text(encoding="utf-8")
    return [
        f"{kind}: sha256 {digest} is not the one in {source_page.name}: an index of another date, the files may differ"
        for kind, digest in digests.items()
        if digest not in recorded
    ]


def count_table(files: dict[str, str]) -> str:
    """Return a Markdown table of rows per class and split."""
    counts = {s: Counter(json.loads(row)["label"] for row in files[f"{s}.jsonl"].splitlines()) for s in SPLITS}
    lines = [f"| class | {' | '.join(SPLITS)} | all |", "|---|---|---|---|---|"]
    for section in SECTIONS:
        row = [counts[s][section] for s in SPLITS]
        lines.append(f"| {section} | {' | '.join(map(str, row))} | {sum(row)} |")
    total = [sum(counts[s].values()) for s in SPLITS]
    lines.append(f"| **all** | {' | '.join(map(str, total))} | {sum(total)} |")
    return "\n".join(lines) + "\n"


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Rebuild the Debian sections data from Debian's package index.")
    parser.add_argument(
        "--index", type=Path, required=True, metavar="DIR", help="folder of Packages and Translation-en"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the four data files")
    parser.add_argument("--fetch", action="store_true", help="first download the index into --index with apt-get")
    parser.add_argument("--check", action="store_true", help="write nothing; compare a rebuild with the files there")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> int:
    """Do what the command line asks.

    Returns:
        0, or 1 if `--check` found a difference.

    Raises:
        PrepareError: On any fault of the call or of the index.
    """
    if options.fetch:
        fetch_index(options.index)
    paths = {kind: find_index_file(options.index, kind) for kind in INDEX_NAMES}
    contents = {kind: read_index_file(path) for kind, path in paths.items()}
    digests = {kind: hashlib.sha256(content).hexdigest() for kind, content in contents.items()}
    files = build_files(contents["Packages"], contents["Translation-en"])
    if options.check:
        for line in compare_digests(digests, options.output / "SOURCE.md"):
            logger.warning("%s", line)
        faults = compare_files(files, options.output)
        sys.stdout.write("".join(f"{line}\n" for line in faults) or "all files are as rebuilt\n")
        return 1 if faults else 0
    write_files(files, options.output)
    for kind, digest in digests.items():
        sys.stdout.write(f"{kind}: sha256 {digest}\n")
    sys.stdout.write(count_table(files))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; a user's fault is one message and exit code 2."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.INFO)
    try:
        return run(parse_arguments(arguments))
    except PrepareError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main())
