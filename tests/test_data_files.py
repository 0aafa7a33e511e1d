from __future__ import annotations

import csv
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, List, Value

from nlpxfer.data.files import read_table
from nlpxfer.data.formats import csv_rows
from nlpxfer.errors import DataError, DataNotFoundError

COLUMNS = ["text", "label"]
TRICKY = [
    "N/A",
    "None",
    "null",
    "NA",
    "n/a",
    "NaN",
    "",
    "007",
    "1e3",
    "True",
    'a "quoted", text',
    "two\nlines",
    "ü\u2028x",
]


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def write_rows(path, texts):
    rows = [{"text": text, "label": "a"} for text in texts]
    if path.suffix in (".csv", ".tsv"):
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)


def fault(path, columns=COLUMNS, kind=DataError, **options):
    with pytest.raises(kind) as caught:
        read_table(path, columns, **options)
    text = str(caught.value)
    assert path.name in text
    return text


@pytest.mark.parametrize("extension", ["csv", "tsv", "json", "jsonl", "parquet", "CSV"])
def test_texts_survive_every_format_as_they_are(tmp_path, extension):
    path = tmp_path / f"train.{extension.lower()}"
    write_rows(path, TRICKY)
    path = path.rename(tmp_path / f"rows.{extension}")
    table = read_table(path, COLUMNS)
    assert table.columns["text"] == TRICKY
    assert set(table.columns) == set(COLUMNS)
    assert table.name == path.name


def test_lines_are_those_of_the_file(tmp_path):
    path = write(tmp_path, "a.csv", 'text,label\r\n"one\r\ntwo",a\r\n\r\nthree,b\r\n')
    table = read_table(path, COLUMNS)
    assert table.lines == [2, 5]
    assert table.place(1) == "row 2 (line 5)"
    path = write(tmp_path, "a.jsonl", '{"text": "x", "label": "a"}\n\n{"text": "y", "label": "b"}\n')
    assert read_table(path, COLUMNS).place(1) == "row 2 (line 3)"


def test_byte_order_mark_is_no_part_of_the_first_column(tmp_path):
    path = write(tmp_path, "a.csv", b"\xef\xbb\xbftext,label\nx,a\n")
    assert read_table(path, COLUMNS).columns["text"] == ["x"]


def test_long_field_is_read_and_the_limit_of_csv_is_put_back(tmp_path):
    before = csv.field_size_limit()
    path = write(tmp_path, "a.csv", "text,label\n" + "x" * 200_000 + ",a\n")
    assert len(read_table(path, COLUMNS).columns["text"][0]) == 200_000
    assert csv.field_size_limit() == before


@pytest.mark.parametrize("first_ends", [True, False])
def test_long_fields_of_two_files_at_once(first_ends, tmp_path):
    before = csv.field_size_limit()
    lines = ["text,label\n", "x" * 200_000 + ",a\n", "x" * 300_000 + ",a\n"]
    both = [csv_rows(tmp_path / "a.csv", lines, ","), csv_rows(tmp_path / "b.csv", lines, ",")]
    for rows in both:
        next(rows)
    both[not first_ends].close()
    assert [len(fields[0]) for _, fields in both[first_ends]] == [200_000, 300_000]
    assert csv.field_size_limit() == before


def test_class_names_in_parquet_are_found(tmp_path):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["z", "a"])})
    Dataset.from_dict({"text": ["x", "y"], "label": [0, 1]}, features=features).to_parquet(tmp_path / "a.parquet")
    assert read_table(tmp_path / "a.parquet", COLUMNS).class_names == {"label": ("z", "a")}


def test_class_names_of_lists_in_parquet_are_found(tmp_path):
    features = Features({"text": Value("string"), "label": List(ClassLabel(names=["z", "a"]))})
    Dataset.from_dict({"text": ["x", "y"], "label": [[0], [1, 0]]}, features=features).to_parquet(
        tmp_path / "a.parquet"
    )
    assert read_table(tmp_path / "a.parquet", COLUMNS).class_names == {"label": ("z", "a")}


def test_parquet_whose_columns_datasets_does_not_know(tmp_path, caplog):
    columns = pa.table(
        {"text": ["x"], "label": ["a"], "more": pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int64()))}
    )
    pq.write_table(columns, tmp_path / "map.parquet")
    assert read_table(tmp_path / "map.parquet", COLUMNS).columns["label"] == ["a"]
    assert not caplog.text
    for number, damaged in enumerate(("{", '{"info": {"features": {"label": {"_type": "Unknown"}}}}')):
        path = tmp_path / f"{number}.parquet"
        pq.write_table(
            pa.table({"text": ["x"], "label": ["a"]}).replace_schema_metadata({"huggingface": damaged}), path
        )
        assert read_table(path, COLUMNS).columns["label"] == ["a"]
        assert caplog.text.count("names of class numbers, if there are any, cannot be read") == number + 1


def test_missing_file_names_the_nearest(tmp_path):
    write(tmp_path, "training.csv", "text,label\nx,a\n")
    text = fault(tmp_path / "trainin.csv", kind=DataNotFoundError)
    assert f"Try: {tmp_path / 'training.csv'}" in text
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere"):
        read_table(tmp_path / "nowhere" / "a.csv", COLUMNS)
    (tmp_path / "folder.csv").mkdir()
    assert "is a folder" in fault(tmp_path / "folder.csv", kind=DataNotFoundError)


def test_unknown_extensions_list_the_known_ones(tmp_path):
    text = fault(write(tmp_path, "a.xlsx", "x"))
    assert "'.xlsx'" in text
    assert "Available: .csv, .json, .jsonl, .parquet, .tsv" in text
    assert "no extension" in fault(write(tmp_path, "train", "x"))
    assert "holds no labels" in fault(write(tmp_path, "a.txt", "x\n"))


def test_missing_column_lists_columns_and_the_nearest(tmp_path):
    text = fault(write(tmp_path, "a.csv", "Text,category,label\nx,y,z\n"), ["text", "label"])
    assert "has no column 'text'" in text
    assert "Available: Text, category, label" in text
    assert "'Text' in place of 'text'" in text
    text = fault(write(tmp_path, "a.jsonl", '{"sentence": "x", "label": 1}\n'))
    assert "has no column 'text'" in text
    pq.write_table(pa.table({"text": ["x"], "lable": ["a"]}), tmp_path / "a.parquet")
    assert "'lable' in place of 'label'" in fault(tmp_path / "a.parquet")


def test_wrong_separator_is_guessed(tmp_path):
    assert "separated by ';'" in fault(write(tmp_path, "a.csv", "text;label\nx;a\n"))
    told = fault(write(tmp_path, "b.csv", 'text;label\n"x, y";a\n'))
    assert "Likely reason: its fields are separated by ';'" in told
    assert "doubled" not in told


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.json", "a.jsonl", "a.parquet"])
def test_empty_files(tmp_path, name):
    assert "is empty" in fault(write(tmp_path, name, ""))


def test_files_without_rows(tmp_path):
    assert "has no rows" in fault(write(tmp_path, "a.csv", "text,label\n"))
    assert "has no rows" in fault(write(tmp_path, "a.json", "[]"))
    pq.write_table(
        pa.table({"text": pa.array([], pa.string()), "label": pa.array([], pa.string())}), tmp_path / "a.parquet"
    )
    assert "has no rows" in fault(tmp_path / "a.parquet")


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.json", "a.jsonl"])
def test_bytes_that_are_no_text_name_the_line(tmp_path, name):
    assert "line 2: holds a NUL byte" in fault(write(tmp_path, name, b"text,label\nx\0y,a\n"))
    assert "line 3: byte 0xe9 is not valid UTF-8" in fault(write(tmp_path, name, b"text,label\nx,a\ncaf\xe9,b\n"))
    assert "line 2: byte 0xe9" in fault(write(tmp_path, name, b"\xef\xbb\xbftext,label\ncaf\xe9,b\n"))
    assert "UTF-16" in fault(write(tmp_path, name, "text,label\nx,a\n".encode("utf-16")))


def test_lines_that_end_with_a_carriage_return_are_counted(tmp_path):
    assert "line 3: byte 0xff" in fault(write(tmp_path, "a.csv", b"text,label\rx,a\ry\xff,b\r"))
    assert "line 4: byte 0xff" in fault(write(tmp_path, "a.csv", b"text,label\r\nx,a\n\ry\xff,b\r"))


def test_malformed_csv_rows_are_listed_with_row_and_line(tmp_path):
    text = fault(write(tmp_path, "a.csv", "text,label\nx,a\ny, z,a\nw\n"))
    assert "2 faults" in text
    assert "row 2 (line 3): 3 fields where the header has 2" in text
    assert "row 3 (line 4): 1 fields" in text


def test_broken_quotes_name_the_row(tmp_path):
    text = fault(write(tmp_path, "a.csv", 'text,label\nx,a\n"open,b\nz,c\n'))
    assert "row 2 (line 3) cannot be read" in text
    text = fault(write(tmp_path, "b.csv", 'text,label\n"said" he,a\n'))
    assert "row 1 (line 2) cannot be read" in text


def test_only_five_faults_are_spelled_out(tmp_path):
    text = fault(write(tmp_path, "a.csv", "text,label\n" + "x\n" * 8))
    assert "8 faults" in text
    assert "row 5 (line 6)" in text
    assert "row 6" not in text
    assert "and 3 more" in text


def test_malformed_json(tmp_path):
    text = fault(write(tmp_path, "a.jsonl", '{"text": "x", "label": "a"}\n{"text": \n["x"]\n'))
    assert "row 2 (line 2): not valid JSON" in text
    assert "row 3 (line 3): holds one array, an object is needed" in text
    assert "line 2: not valid JSON" in fault(write(tmp_path, "a.json", '[{"text": "x"},\n{]'))
    assert "row 2: holds one string" in fault(write(tmp_path, "b.json", '[{"text": "x"}, "y"]'))
    assert "holds one object" in fault(write(tmp_path, "c.json", '{"data": []}'))
    assert "rename it to d.jsonl" in fault(write(tmp_path, "d.json", '{"text": "x"}\n{"text": "y"}\n'))
    assert "f.json: Exceeds the limit" in fault(write(tmp_path, "f.json", f'[{{"text": "x", "n": {"1" * 5000}}}]'))
    assert "rename it to e.json " in fault(write(tmp_path, "e.jsonl", "[\n1,\n2]\n"))


def test_unreadable_file(tmp_path, monkeypatch):
    path = write(tmp_path, "a.csv", "text,label\nx,a\n")

    def refuse(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(path), "read_bytes", refuse)
    assert "cannot be read: Permission denied" in fault(path)


def test_damaged_parquet(tmp_path):
    assert "cannot be read as parquet" in fault(write(tmp_path, "a.parquet", "PAR1 this is none"))


def test_duplicate_columns(tmp_path):
    assert "more than one column named 'text'" in fault(write(tmp_path, "a.csv", "text,label,text\nx,a,y\n"))
    assert "row 1 (line 1)" in fault(write(tmp_path, "a.jsonl", '{"text": "x", "text": "y", "label": "a"}\n'))
    assert "'text' stands twice" in fault(write(tmp_path, "a.json", '[{"text": "x", "text": "y", "label": "a"}]'))
    assert "a.csv has 3 columns without a name." in fault(write(tmp_path, "a.csv", ",,text,\n1,2,x,\n"))
    text = fault(write(tmp_path, "a.csv", ",,text,text\n1,2,x,y\n"))
    assert "a.csv has more than one column named 'text', and 2 columns without a name." in text
    pq.write_table(pa.Table.from_arrays([pa.array(["x"])] * 2, names=["text", "text"]), tmp_path / "a.parquet")
    assert "more than one column named 'text'" in fault(tmp_path / "a.parquet")


def test_txt_holds_one_text_per_line(tmp_path):
    path = write(tmp_path, "a.txt", "one, two\r\n\n  \nN/A\nthr\u2028ee")
    table = read_table(path, ["text"], texts_only=True)
    assert table.columns["text"] == ["one, two", "N/A", "thr\u2028ee"]
    assert table.lines == [1, 4, 5]
    assert "text pairs are asked for" in fault(path, ["text", "pair"], texts_only=True)
    assert "is empty" in fault(write(tmp_path, "b.txt", "\n \n"), ["text"], texts_only=True)
