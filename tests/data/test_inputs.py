"""Rows of any kind of file, and of standard input, one for each row and in their order."""

import gzip
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llm3.data.formats import BadRow
from llm3.data.sources.inputs import open_input
from llm3.errors import UserError

ROWS = [{"id": "1", "text": "a, b"}, {"id": "2", "text": "naïve\n数学"}, {"id": "3", "text": "c"}]


def write(path):
    kind = path.name.partition(".")[2]
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    elif kind == "json":
        path.write_text(json.dumps(ROWS))
    elif kind in ("jsonl", "jsonl.gz"):
        content = "\ufeff" + "\n\n".join(json.dumps(row) for row in ROWS)
        with (gzip.open if kind.endswith("gz") else open)(path, "wb") as file:
            file.write(content.encode())
    else:
        mark = "\t" if kind == "tsv" else ";"
        cells = "".join(f'{row["id"]}{mark}"{row["text"]}"\n' for row in ROWS)
        path.write_text(f"id{mark}text\n{cells}")
    return path


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "csv", "tsv", "parquet"])
def test_the_suffix_says_how_a_file_is_read(tmp_path, kind):
    rows = open_input(str(write(tmp_path / f"in.{kind}")))
    assert list(rows.rows()) == ROWS and rows.head(2) == ROWS[:2] and rows.count() == 3
    assert not rows.plain and len(rows.digest) == 64


def test_each_line_of_plain_text_is_a_row_also_a_blank_one(tmp_path, monkeypatch):
    expected = [{"text": text} for text in ("", "a", "", " b", "")]
    content = "\na\r\n\n b\n\n"
    (tmp_path / "in.txt").write_bytes(content.encode())
    assert list(open_input(str(tmp_path / "in.txt")).rows()) == expected
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content.encode())))
    rows = open_input("-")
    assert rows.head(2) == expected[:2] and list(rows.rows()) == expected
    assert rows.plain and rows.count() is None


def test_standard_input_with_a_json_row_holds_json_rows(monkeypatch):
    content = b'\xef\xbb\xbf{"text": "a"}\n\nnot json\n{"text": "b"}\n'
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
    found = list(open_input("-").rows())
    assert found[0] == {"text": "a"} and found[2] == {"text": "b"} and len(found) == 3
    assert isinstance(found[1], BadRow) and str(found[1]) == "not JSON"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("im.jsonl", r"no such file; did you mean 'in.jsonl'\? expected"),
        ("in.doc", r"valid: .csv, .json"),
        ("none/in.jsonl", "no such file"),
        ("broken.parquet", "cannot be read as Parquet"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(tmp_path, name, message):
    for existing in ("in.jsonl", "in.doc", "broken.parquet"):
        (tmp_path / existing).write_text("{}\n")
    with pytest.raises(UserError, match=message):
        list(open_input(str(tmp_path / name)).rows())
