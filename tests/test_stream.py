"""Rows in windows: every format in, every format out, faults named by row, and never a part of an output."""

import csv
import datetime
import json

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nlpxfer.data.files import read_table
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
    return [row for window in RowReader(path).windows(2) for row in window.rows]


def copy(reader, path):
    with row_writer(path, reader, {"label": str}) as writer:
        for window in reader.windows(1):
            writer.write(window, [{"label": "a"}] * len(window.rows))


@pytest.mark.parametrize("kind", KINDS)
def test_windows_hold_all_rows_in_order(kind, tmp_path):
    reader = RowReader(write(tmp_path / f"rows{kind}"))
    windows = [window.rows for window in reader.windows(2)]
    assert [len(rows) for rows in windows] == [2, 2, 1]
    assert [row for rows in windows for row in rows] == ROWS
    assert reader.bytes_read == reader.size
    assert [row for window in reader.windows(100) for row in window.rows] == ROWS, "a second pass starts anew"


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
            writer.write(window, [{"label": "a", "share": 0.5, "flag": True}] * len(window.rows))
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
            writer.write(window, [{"label": None}])
    before, after = pq.read_table(source), pq.read_table(tmp_path / "out.parquet")
    assert after.drop_columns(["label"]).equals(before)
    assert after.schema.field("label").type == pa.string()


FAR = pa.array([3 * 10**17, 5, None], pa.timestamp("us"))  # a year that Python's datetime does not know
FARTHER = pa.array([10**18, 5, None], pa.timestamp("us"))  # and one that Arrow does not write as text


def table_of(**columns):
    return pa.table({"text": ["a", None, "c"]} | columns)


@pytest.mark.parametrize("rows_in_a_group", [1, 2, 3])
def test_columns_that_python_has_no_objects_for_stay_as_they_are(rows_in_a_group, tmp_path):
    before = table_of(
        nanoseconds=pa.array([1, 2, None], pa.time64("ns")),
        far=FAR,
        days=pa.array([5_000_000, 0, None], pa.date32()),
        listed=pa.array([[10**18], [], None], pa.list_(pa.timestamp("us"))),
        sorts=pa.array(["x", "y", "x"]).dictionary_encode(),
        within=pa.array([{"at": 1}, {"at": None}, None], pa.struct([("at", pa.time64("ns"))])),
        binary=pa.array([b"\xff", b"", None]),
    ).replace_schema_metadata({"mine": "kept"})
    source = tmp_path / "in.parquet"
    pq.write_table(before, source, row_group_size=rows_in_a_group)
    reader = RowReader(source)
    with row_writer(tmp_path / "out.parquet", reader, {"label": str}) as writer:
        for window in reader.windows(2, ["text"]):
            writer.write(window, [{"label": row["text"]} for row in window.rows])
    after = pq.read_table(tmp_path / "out.parquet")
    assert after.column("label").to_pylist() == ["a", None, "c"]
    kept = after.drop_columns(["label"])
    assert kept.equals(before)
    assert kept.schema.metadata == before.schema.metadata
    assert pq.ParquetFile(tmp_path / "out.parquet").num_row_groups == 2, "windows do not follow the groups of the file"


@pytest.mark.parametrize(("kind", "missing"), [(".csv", ""), (".jsonl", None)])
def test_times_that_python_has_no_objects_for_become_text(kind, missing, tmp_path):
    source = tmp_path / "in.parquet"
    pq.write_table(table_of(far=FAR, nanoseconds=pa.array([1, 2, None], pa.time64("ns"))), source)
    copy(RowReader(source), tmp_path / f"out{kind}")
    found = read(tmp_path / f"out{kind}")
    assert [row["far"] for row in found] == ["11476-08-15 05:20:00.000000", "1970-01-01 00:00:00.000005", missing]
    assert [row["nanoseconds"] for row in found] == ["00:00:00.000000001", "00:00:00.000000002", missing]


@pytest.mark.parametrize("times", [FARTHER, pa.array([[10**18], [], None], pa.list_(pa.timestamp("us")))])
def test_times_that_no_text_is_known_for_need_parquet(times, tmp_path):
    source = tmp_path / "in.parquet"
    pq.write_table(table_of(far=times), source)
    with pytest.raises(DataError, match=r"column far .*\n.*--output_file out\.parquet"):
        copy(RowReader(source), tmp_path / "out.csv")


def test_only_the_columns_asked_for_become_objects(tmp_path):
    source = tmp_path / "in.parquet"
    pq.write_table(table_of(far=FAR), source)
    (window,) = RowReader(source).windows(3, ["text"])
    assert window.rows == [{"text": "a"}, {"text": None}, {"text": "c"}]
    with pytest.raises(DataError, match=r"no column other.*\n.*text, far"):
        next(RowReader(source).windows(3, ["text", "other"]))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", b"text,label\na,b\nc\n", r"row 2 \(line 3\): 1 fields, the header has 2"),
        ("x.csv", b'text,label\n"a,b\n', r"row 1 \(line 2\) cannot be read"),
        ("x.csv", b"text,text\na,b\n", "x.csv has more than one column named 'text'"),
        ("x.csv", b",,text\n1,2,a\n", "x.csv has 2 columns without a name"),
        ("x.csv", b"text,label\ra,b\rc\xff,d\r", "line 3: byte 0xff is not valid UTF-8"),
        ("x.csv", b"text,label\ra,b\rc\r", r"row 2 \(line 3\): 1 fields, the header has 2"),
        ("x.csv", b"text\na\nb\0\n", "line 3: holds a NUL byte"),
        ("x.tsv", b"text\na\n\xff\n", "line 3: byte 0xff is not valid UTF-8"),
        ("x.jsonl", b'{"text": "a"}\n\n{"text": \n', r"row 2 \(line 3\): not valid JSON"),
        (
            "x.jsonl",
            b'{"a": 1}\n{"b": {"c": 1, "c": 2}}\n',
            r"row 2 \(line 2\): not valid JSON: the key 'c' stands twice",
        ),
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


@pytest.mark.parametrize("kind", [".csv", ".tsv"])
def test_fields_with_line_ends_of_any_kind_are_quoted(kind, tmp_path):
    rows = [{"text": mark.join("ab"), "note": "x"} for mark in ("\r", "\n", "\r\n", "\t", ",", '"')]
    copy(RowReader(write(tmp_path / "in.parquet", rows)), tmp_path / f"out{kind}")
    written = (tmp_path / f"out{kind}").read_bytes()
    mark = "\t" if kind == ".tsv" else ","
    assert written.startswith(f'text{mark}note{mark}label\n"a\rb"{mark}x{mark}a\n"a\nb"'.encode())
    assert read(tmp_path / f"out{kind}") == [{**row, "label": "a"} for row in rows]
    found = pd.read_csv(tmp_path / f"out{kind}", sep=mark)
    assert found["text"].tolist() == [row["text"] for row in rows]


@pytest.mark.parametrize("kind", [".jsonl", ".parquet"])
def test_jsonl_is_written_without_the_numbers_that_json_lacks(kind, tmp_path):
    rows = [
        {"text": "a", "share": 1.5, "found": [1.0], "more": {"x": 2.0}},
        {"text": "b", "share": float("nan"), "found": [float("inf"), 3.0], "more": {"x": float("-inf")}},
    ]
    copy(RowReader(write(tmp_path / f"in{kind}", rows)), tmp_path / "out.jsonl")
    found = [
        json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "out.jsonl").read_text().splitlines()
    ]
    empty = {"text": "b", "share": None, "found": [None, 3.0], "more": {"x": None}}
    assert found == [{**row, "label": "a"} for row in (rows[0], empty)]


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
    path.write_text("\ntext,note\n\n" + "a" * 300_000 + ",b\n\n")
    assert [len(row["text"]) for row in read(path)] == [300_000]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_blank_line_of_one_column_is_a_row(tmp_path, end):
    path = tmp_path / "x.csv"
    path.write_bytes(end.join(["", "text", "a", "", "", "b", "", "", ""]).encode())  # those at the end are none
    assert [row["text"] for row in read(path)] == ["a", "", "", "b"] == read_table(path, ["text"]).columns["text"]
    assert read_table(path, ["text"]).lines == [3, 4, 5, 6]


@pytest.mark.parametrize("kind", [".csv", ".tsv"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_end_in_any_of_three_ways(tmp_path, kind, end):
    mark = "\t" if kind == ".tsv" else ","
    lines = [f"text{mark}note", f"a\u2028\x85b\u0085{mark}x", f'"c{end}d"{mark}y']
    path = tmp_path / f"x{kind}"
    path.write_bytes(end.join(["\ufeff" + lines[0], *lines[1:], ""]).encode())
    found = read(path)
    assert found == [{"text": "a\u2028\x85b\u0085", "note": "x"}, {"text": f"c{end}d", "note": "y"}]
    assert read_table(path, ["text"]).columns["text"] == [row["text"] for row in found]
    reader = RowReader(path)
    assert len(list(reader.windows(1))) == 2
    assert reader.bytes_read == reader.size


def test_columns_of_jsonl_are_those_of_all_first_rows(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1}\n{"b": 1, "a": 2}\n')
    assert RowReader(path).names() == ["a", "b"]


def test_another_separator_is_guessed(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("text;label\na;b\n")
    with pytest.raises(DataError, match=r"no column text\.\n  Likely reason: its fields are separated by ';'"):
        next(RowReader(path).windows(3, ["text"]))
