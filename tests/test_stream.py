"""Rows in windows: every format in, every format out, faults named by row, and never a part of an output."""

import csv
import datetime
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nlpxfer.data.stream import RowReader, row_writer
from nlpxfer.errors import ConfigError, DataError, DataNotFoundError

ROWS = [
    {"id": "1", "text": 'a "quoted", text', "note": "N/A"},
    {"id": "007", "text": "two\nlines", "note": ""},
    {"id": "3", "text": "ünï\u2028cödé", "note": "x"},
    {"id": "4", "text": "last", "note": "y"},
    {"id": "5", "text": "very last", "note": "z"},
]
KINDS = [".csv", ".tsv", ".jsonl", ".parquet"]


def write(path, rows=ROWS):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


def read(path):
    return [row for window in RowReader(path).windows(2) for row in window]


def copy(reader, path):
    with row_writer(path, reader, {"label": str}) as writer:
        for window in reader.windows(1):
            writer.write([{**row, "label": "a"} for row in window])


@pytest.mark.parametrize("kind", KINDS)
def test_windows_hold_all_rows_in_order(kind, tmp_path):
    reader = RowReader(write(tmp_path / f"rows{kind}"))
    windows = list(reader.windows(2))
    assert [len(window) for window in windows] == [2, 2, 1]
    assert [row for window in windows for row in window] == ROWS
    assert reader.bytes_read == reader.size
    assert [row for window in reader.windows(100) for row in window] == ROWS, "a second pass starts anew"


@pytest.mark.parametrize("source", KINDS)
@pytest.mark.parametrize("target", KINDS)
def test_every_format_to_every_format(source, target, tmp_path):
    reader = RowReader(write(tmp_path / f"in{source}"))
    new = {"label": str, "share": float, "flag": bool}
    if source == ".jsonl" and target != ".jsonl":
        with (
            pytest.raises(ConfigError, match=r"same columns in all rows.*\n.*out\.jsonl"),
            row_writer(tmp_path / f"out{target}", reader, new),
        ):
            pytest.fail("a format without promised columns was taken")
        return
    with row_writer(tmp_path / f"out{target}", reader, new) as writer:
        for window in reader.windows(2):
            writer.write([{**row, "label": "a", "share": 0.5, "flag": True} for row in window])
    found = read(tmp_path / f"out{target}")
    text = target in (".csv", ".tsv")
    more = {"label": "a", "share": "0.5" if text else 0.5, "flag": "True" if text else True}
    assert found == [{**row, **more} for row in ROWS]


def test_parquet_keeps_its_types(tmp_path):
    at = datetime.datetime(2026, 1, 2, tzinfo=datetime.timezone.utc)
    rows = [
        {"text": "a", "number": 3, "at": at, "tags": ["x", "y"]},
        {"text": None, "number": None, "at": None, "tags": []},
    ]
    source = write(tmp_path / "in.parquet", rows)
    reader = RowReader(source)
    with row_writer(tmp_path / "out.parquet", reader, {"label": str}) as writer:
        for window in reader.windows(1):
            writer.write([{**row, "label": None} for row in window])
    before, after = pq.read_table(source), pq.read_table(tmp_path / "out.parquet")
    assert after.drop_columns(["label"]).equals(before)
    assert after.schema.field("label").type == pa.string()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", b"text,label\na,b\nc\n", r"row 2 \(line 3\): 1 fields, the header has 2"),
        ("x.csv", b'text,label\n"a,b\n', r"row 1 \(line 2\) cannot be read"),
        ("x.csv", b"text,text\na,b\n", "the header has text twice"),
        ("x.csv", b"text\na\nb\0\n", "line 3: holds a NUL byte"),
        ("x.tsv", b"text\na\n\xff\n", "line 3: byte 0xff is not valid UTF-8"),
        ("x.jsonl", b'{"text": "a"}\n\n{"text": \n', r"row 2 \(line 3\): not valid JSON"),
        ("x.jsonl", b'["a"]\n', r"row 1 \(line 1\): an object is needed"),
        ("x.parquet", b"PAR1 no", "cannot be read as parquet"),
        ("x.json", b"[]", "cannot be read row by row"),
        ("x.csv", b"", "is empty"),
    ],
)
def test_faults_name_their_place(name, content, message, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(path)


def test_no_such_file(tmp_path):
    with pytest.raises(DataNotFoundError, match="is no file"):
        RowReader(tmp_path / "none.csv")


def test_a_fault_leaves_no_output(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("text\na\nb,c\n")
    with pytest.raises(DataError):
        copy(RowReader(path), tmp_path / "out.csv")
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.csv"]


@pytest.mark.parametrize(
    ("name", "new", "message"),
    [("out.xlsx", {}, "has no known ending"), ("out.csv", {"note": str}, "already has note")],
)
def test_an_output_that_cannot_be_written(name, new, message, tmp_path):
    reader = RowReader(write(tmp_path / "rows.csv"))
    with pytest.raises(ConfigError, match=message), row_writer(tmp_path / name, reader, new):
        pytest.fail("was taken")
    assert not (tmp_path / name).exists()


def test_a_byte_order_mark_is_no_part_of_the_first_name(tmp_path):
    path = tmp_path / "x.csv"
    path.write_bytes(b"\xef\xbb\xbftext\na\n")
    assert read(path) == [{"text": "a"}]


def test_long_fields_and_blank_lines(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("text\n\n" + "a" * 300_000 + "\n\n")
    assert [len(row["text"]) for row in read(path)] == [300_000]
