"""Rows of delimited files are what they would be in JSON lines or parquet; a damaged row costs only itself."""

import csv
import gzip
import io
import json
import tempfile
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm3.config.data_schema import SourceConfig
from llm3.data import tokenizer
from llm3.data.cache import cache
from llm3.data.formats import BadRow
from llm3.data.sources import lines
from llm3.data.sources import split as sources
from llm3.errors import UserError
from tests.helpers.tiny_records import files
from tests.helpers.tiny_sources import open_split, read, texts

BYTES = tokenizer.train([], 260)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(text, name="rows.csv"):
    Path(name).write_bytes(text.encode() if isinstance(text, str) else text)


def labelled(text, **fields):
    """[(number, text and label, or the reason why not)] of a file with the columns text and label."""
    write(text)
    rows = read(path="csv", data_files="rows.csv", label="label", **fields)
    return [(n, str(row) if isinstance(row, BadRow) else (row["text"], *row["labels"])) for n, row in rows]


def good(text, **fields):
    return [row for _, row in labelled(text, **fields)]


# What pandas, spreadsheets and databases take for something else than text, and what needs quotes.
GUESSED = ["001", "01", "1", "1.0", "1e5", "NA", "None", "null", "nan", "inf", "True", "2020-01-01", "", " ", " pos"]
QUOTED = ["a,b", "a;b", "a\tb", 'say "so"', '"', '""', "two\nlines", "two\r\nlines", "\n", "\r", "'", "#no", "\\n"]
CELLS = st.one_of(
    st.sampled_from(GUESSED), st.sampled_from(QUOTED), st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
)
COLUMNS = ("text", 'a, "b"; c', "label")
ROWS = st.lists(st.tuples(CELLS, CELLS, CELLS), min_size=1, max_size=30)


def delimited(rows, delimiter, quoting):
    written = io.StringIO(newline="")
    writer = csv.DictWriter(written, list(rows[0]), delimiter=delimiter, quoting=quoting)
    writer.writeheader()
    writer.writerows(rows)
    return written.getvalue().encode()


def write_formats(rows, folder, delimiter=",", quoting=csv.QUOTE_MINIMAL):
    """The same rows in three files; an empty cell is a null."""
    (folder / "rows.csv").write_bytes(delimited(rows, delimiter, quoting))
    nulls = [{name: cell or None for name, cell in row.items()} for row in rows]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in nulls))
    schema = pa.schema([(name, pa.string()) for name in rows[0]])
    pa.parquet.write_table(pa.Table.from_pylist(nulls, schema), folder / "rows.parquet")
    return {"csv": "rows.csv", "json": "rows.jsonl", "parquet": "rows.parquet"}


def records_name(path):
    return {"csv": b"csv rows.csv", "json": b"json rows.jsonl", "parquet": b"parquet rows.parquet"}[path]


@settings(max_examples=12, deadline=None)
@given(ROWS, st.sampled_from(",;\t|"), st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]), st.booleans())
def test_csv_json_lines_and_parquet_of_the_same_rows_are_the_same_records(cells, delimiter, quoting, given):
    rows = [dict(zip(COLUMNS, each, strict=True)) for each in cells]
    with tempfile.TemporaryDirectory() as name:
        found = {}
        for path, file in write_formats(rows, Path(name), delimiter, quoting).items():
            fields = dict(delimiter=delimiter) if path == "csv" and given else {}
            source = SourceConfig(path, data_files=f"{name}/{file}", label="label", **fields)
            opened = sources.open_split(source, "train", cache_dir=Path(name))
            records = [row for part in opened.parts() for row in opened.read_part(part)]
            found[path] = [(n, (str(row), row.start) if isinstance(row, BadRow) else row) for n, row in records]
    assert found["csv"] == found["json"] == found["parquet"]
    assert [number for number, _ in found["csv"]] == list(range(len(rows)))


def test_the_token_cache_of_csv_is_that_of_json_lines_and_parquet_byte_for_byte(tmp_path):
    cells = [cell for cell in GUESSED + QUOTED if cell.strip()]
    rows = [{"text": f"{cell} {i}", "label": cells[i % 5]} for i, cell in enumerate([*cells, *cells])]
    rows[3]["label"] = ""
    built = {}
    for path, file in write_formats(rows, tmp_path).items():
        source = SourceConfig(path, data_files=file, label="label", bad_rows=0.1)
        records = sources.open_split(source, "train", cache_dir=tmp_path)
        built[path] = cache.build_cache(records, "text", BYTES, tmp_path / path, max_bad_share=0.1)
    assert built["csv"].label_names == sorted(set(cells[:5]))
    assert built["csv"].fingerprint == built["json"].fingerprint == built["parquet"].fingerprint
    contents = {}
    for path in built:
        [folder] = (tmp_path / path).iterdir()
        found = {name: content for name, content in files(folder).items() if not name.endswith(".json")}  # digests
        found["bad_rows.jsonl"] = found["bad_rows.jsonl"].replace(records_name(path), b"the source")
        found.pop("shard-000000/bad_rows.jsonl")
        contents[path] = found
    assert contents["csv"] == contents["json"] == contents["parquet"]


def test_every_cell_is_a_text_and_only_an_empty_one_is_null():
    assert good("text,label\n1,001\n2,01\n3.0,1\nNA,None\nx,NA\n4,\n,a\n") == [
        ("1", "001"),
        ("2", "01"),
        ("3.0", "1"),
        ("NA", "None"),
        ("x", "NA"),
        "label is null",
        "text is null",
    ]


def test_a_word_after_ten_thousand_numbers_is_one_more_text():
    write("text,n\n" + "".join(f"{i},{i}\n" for i in range(10_001)) + "word,word\n")
    assert texts(path="csv", data_files="rows.csv")[-2:] == ["10000", "word"]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_ragged_rows_and_unclosed_quotes_cost_only_themselves(end):
    content = [
        "text,label",
        "one,a",
        "two,b,",
        "three",
        "fo,ur,a",
        '"five,b',
        'six "6",a',
        'seven,"b',
        '"eight" ,a',
        "nine,b",
    ]
    unclosed, more, fewer = "a quote is not closed, or text follows it", "more cells than", "fewer cells than"
    expected = [("one", "a"), more, fewer, more, unclosed, ('six "6"', "a"), unclosed, unclosed, ("nine", "b")]
    found = good(end.join(content) + end)
    assert [each if isinstance(each, tuple) else each.removesuffix(" the header") for each in found] == expected


def test_blank_lines_are_no_rows_and_a_cell_may_hold_them():
    assert labelled('\n\ntext,label\n\none,a\n\r\n"two\n\nlines",b\n\n') == [
        (0, ("one", "a")),
        (1, ("two\n\nlines", "b")),
    ]


@pytest.mark.parametrize("size", [1, 60, 1 << 20])
def test_a_file_is_cut_between_records_only(size, monkeypatch):
    monkeypatch.setattr(lines, "PART_BYTES", size)
    rows = [{"text": f"row {i}" + '\nline, "so"' * (i % 4), "n": str(i)} for i in range(50)]
    content = delimited(rows, ",", csv.QUOTE_MINIMAL).replace(b"row 20,", b'"row 20,')
    half = content.index(b'"row 25')
    write(content[:half], "1.csv")
    write(b"n,text\n" + b"".join(b"%d,last %d\n" % (i, i) for i in range(5)), "2.csv")
    opened = open_split(path="csv", data_files=["1.csv", "2.csv"])
    parts = opened.parts()
    assert len(parts) > 20 if size == 1 else len(parts) >= 2
    found = [row for part in parts for row in opened.read_part(part)]
    expected = [row["text"] for row in rows[:25]] + [f"last {i}" for i in range(5)]
    assert [n for n, _ in found] == list(range(30))
    assert [row["text"] for n, row in found if n != 20] == [text for n, text in enumerate(expected) if n != 20]
    assert isinstance(found[20][1], BadRow)


@pytest.mark.parametrize("opener", [gzip.open, zipfile.ZipFile], ids=lambda each: each.__module__)
@pytest.mark.parametrize("streaming", [False, True])
def test_compressed_and_streamed_files_read_like_plain_ones(opener, streaming):
    content = 'text;label\n001;01\n"a\nb";NA\nx;y;z\n'
    if opener is gzip.open:
        with gzip.open("rows.csv.gz", "wb") as file:
            file.write(content.encode())
    else:
        with zipfile.ZipFile("rows.csv.gz", "w") as archive:
            archive.writestr("rows.csv", content)
    found = read(path="csv", data_files="rows.csv.gz", label="label", streaming=streaming)
    assert [str(row) for _, row in found] == [
        "{'text': '001', 'labels': ['01']}",
        "{'text': 'a\\nb', 'labels': ['NA']}",
        "more cells than the header",
    ]


def test_a_part_or_a_sum_of_splits_has_the_same_cells():
    write("text,label\n" + "".join(f"{i:03},NA\n" for i in range(100)))
    write("text,label\n" + "".join(f"{i:03},NA\n" for i in range(100, 110)), "more.csv")
    both = {"train": "rows.csv", "more": "more.csv"}
    for split, expected in (
        ("train[10%:20%]", range(10, 20)),
        ("train[-5:]+more[:50%]", range(95, 105)),
        ("more+train[:2]", [*range(100, 110), 0, 1]),
        ("all", range(110)),
    ):
        found = read(path="csv", data_files=both, train=split, label="label")
        assert found == [(n, {"text": f"{i:03}", "labels": ["NA"]}) for n, i in enumerate(expected)]
    with pytest.raises(UserError, match="unknown split 'mor': did you mean 'more'"):
        open_split(path="csv", data_files=both, train="mor[:5]")


@pytest.mark.parametrize(
    ("content", "fields", "expected"),
    [
        ("text;label\na, b;1\n", {}, ("a, b", "1")),
        ("text\tlabel\na, b;\t1\n", {}, ("a, b;", "1")),
        ("text|label\na, b;|1\n", {}, ("a, b;", "1")),
        ("label;text;a, b\n1;a, b, c;x\n", {}, ("a, b, c", "1")),
        ('text\tlabel\n"a\tb\t"c\n', dict(quote="", label=""), None),
        ("text::label\na::1\n", dict(delimiter="::"), ("a", "1")),
        ('text\tlabel\n"a\tb\n', dict(delimiter="\\t", quote=""), ('"a', "b")),
        ("text , label\n a ,b \n", {}, (" a ", "b ")),
        ("text,label,\na,b,\n", {}, ("a", "b")),
    ],
)
def test_the_delimiter_is_found_or_given(content, fields, expected):
    if expected is None:
        assert [row for _, row in read_text(content, **fields)] == ["more cells than the header"]
    else:
        assert good(content, **fields) == [expected]


def read_text(content, **fields):
    write(content)
    return [(n, str(row)) for n, row in read(path="csv", data_files="rows.csv", **fields)]


@pytest.mark.parametrize(
    ("content", "fields", "message"),
    [
        (
            "text,a;label\nx,y;1\n",
            {},
            r"rows\.csv: its cells may be separated by ',' or ';': set sources\.\*\.delimiter",
        ),
        ("text,text\n1,2\n", {}, r"rows\.csv: its header has the column 'text' twice"),
        ('text,"label\n1,2\n', {}, r"rows\.csv: its header cannot be read: a quote is not closed"),
        ("text,label\n1,2\n".encode("utf-16"), {}, r"rows\.csv is UTF-16; expected UTF-8"),
        (b"te\xff,label\n1,2\n", {}, r"rows\.csv: its header is not UTF-8"),
        ("text,label\r1,2\r", {}, r"rows\.csv: its lines end in \\r; expected"),
        ("text,label\n", {}, "its train split has no rows"),
        ("text;label\n1;2\n", dict(delimiter=","), r"unknown field 'text': .*valid: text;label"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(content, fields, message):
    write(content)
    with pytest.raises(UserError, match=message):
        open_split(path="csv", data_files="rows.csv", **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(delimiter=""), r"sources\.\*\.delimiter=''"),
        (dict(delimiter='"'), r"sources\.\*\.delimiter='\"'"),
        (dict(quote="''"), r"sources\.\*\.quote=\"''\": expected one character"),
        (dict(sample_by="page"), r"sources\.\*\.sample_by='page'.*valid: .*document"),
        (dict(sample_by="line"), r"sample_by='line': its files are csv; expected text files"),
    ],
)
def test_a_wrong_field_is_refused(fields, message):
    write("text,label\n1,2\n")
    with pytest.raises(UserError, match=message):
        open_split(path="csv", data_files="rows.csv", **fields)
    write('{"text": "x"}\n', "rows.jsonl")
    with pytest.raises(UserError, match="delimiter=';': its files are json; expected csv"):
        open_split(data_files="rows.jsonl", delimiter=";")


def test_a_long_record_is_unusable_and_the_next_one_is_read():
    rows = read_text("text,n\n" + "x" * 50 + ",1\n" + '"' + "y\n" * 30 + '",2\nshort,3\n', max_row_bytes=40)
    assert rows[0] == (0, "longer than 40 bytes") and rows[-1][1] == "{'text': 'short'}"


def test_a_folder_that_declares_its_columns_is_read_with_them():
    Path("described").mkdir()
    card = (
        "---\ndataset_info:\n  features:\n  - name: text\n    dtype: string\n  - name: label\n    dtype: int64\n---\n"
    )
    Path("described/README.md").write_text(card)
    write("text,label\n001,2\nNA,3\n", "described/train.csv")
    assert [row for _, row in read(path="described", label="label")] == [
        {"text": "001", "labels": ["2"]},
        {"text": "NA", "labels": ["3"]},
    ]
    Path("described/README.md").write_text("# Only words")
    assert read(path="described", label="label")[1] == (1, {"text": "NA", "labels": ["3"]})


def test_a_file_behind_an_address_is_downloaded_or_streamed(folder):
    write("text;label\n001;NA\n")
    for streaming in (False, True):
        opened = open_split(path="csv", data_files=f"file://{folder}/rows.csv", label="label", streaming=streaming)
        assert [row for part in opened.parts() for row in opened.read_part(part)] == [
            (0, {"text": "001", "labels": ["NA"]})
        ]


def test_a_folder_that_declares_how_to_read_its_file_but_no_columns_has_texts_in_every_cell(folder):
    Path("folder").mkdir()
    write("skipped\ntext,label\n'a, b',001\nNA,1\n3,\né,None\n", "folder/train.csv")
    options = 'configs:\n- config_name: default\n  skiprows: 1\n  quotechar: "\'"'
    Path("folder/README.md").write_text(f"---\n{options}\n---\n")
    rows = read(path="folder", label="label")
    found = [str(row) if isinstance(row, BadRow) else (row["text"], *row["labels"]) for _, row in rows]
    assert found == [("a, b", "001"), ("NA", "1"), "label is null", ("é", "None")]
