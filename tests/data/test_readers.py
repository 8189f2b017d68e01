"""Rows are read in parts whose cut depends on the data only, and a damaged row costs only itself."""

import bz2
import gzip
import json
import lzma
import tracemalloc
import zipfile
from pathlib import Path

import datasets
import pytest

from llm3.data.formats import BadRow
from llm3.data.sources import lines
from llm3.errors import UserError
from tests.helpers.tiny_sources import TEXTS, as_json, open_split, read, texts


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


BAD_LINES = {
    b'{"text": null}': "text is null",
    b'{"text": ""}': "text is empty",
    b'{"text": " \\n\\t\\u3000"}': "text is empty",
    b'{"text": 5}': "text is of type int, not a text",
    b'{"text": ["a"]}': "text is of type list, not a text",
    b'{"text": "caf\xe9"}': "not UTF-8",
    b'{"text": "' + b"x" * 1000 + b'"}': "longer than 1,000 bytes",
    b'{"text": "cut': "not JSON",
    b"plain words": "not JSON",
    b"[" * 400_000: "longer than 1,000 bytes",
    b"[" * 999: "not JSON",
    b'["text"]': "not a JSON object",
    b'"text"': "not a JSON object",
    b"null": "not a JSON object",
    b'{"texts": "x"}': "no field 'text'",
    b'{"text": "\\ud800"}': "text is not valid Unicode",
}


def test_every_bad_row_has_its_reason_its_number_and_its_start():
    good = b'{"text": "fine"}'
    Path("rows.jsonl").write_bytes(b"\n".join(each for line in BAD_LINES for each in (good, b"", line)))
    rows = read(data_files="rows.jsonl", max_row_bytes=1000)
    assert [number for number, _ in rows] == [i for i in range(3 * len(BAD_LINES)) if i % 3 != 1]
    assert all(row == {"text": "fine"} for _, row in rows[::2])
    assert [str(row) for _, row in rows[1::2]] == list(BAD_LINES.values())
    for (_, row), line in zip(rows[1::2], BAD_LINES, strict=True):
        assert isinstance(row, BadRow)
        assert row.start[:8].encode() == line[:8]
        assert len(row.start) <= 200
        json.dumps(row.start).encode("ascii")
    again = read(data_files="rows.jsonl", max_row_bytes=1000)
    assert [(number, str(row)) for number, row in rows] == [(number, str(row)) for number, row in again]


@pytest.mark.parametrize("line", [b'{"text": "\xff"}', b'{"text": 3}', b'{"text": "' + b"x" * 2000 + b'"}', b"{{"])
@pytest.mark.parametrize("block", [1, 7, 64, 1 << 20])
def test_a_bad_line_costs_only_itself_for_any_block_size(line, block, monkeypatch):
    monkeypatch.setattr(lines, "BLOCK", block)
    Path("rows.jsonl").write_bytes(as_json(["a", "é"]) + line + b"\n" + as_json(["中", "b"]))
    assert texts(data_files="rows.jsonl", max_row_bytes=1000) == ["a", "é", "中", "b"]


@pytest.mark.parametrize("block", [7, 1 << 20])
def test_lines_of_up_to_max_row_bytes_are_read_and_no_others(block, monkeypatch):
    monkeypatch.setattr(lines, "BLOCK", block)
    Path("rows.txt").write_text("\n".join("x" * length for length in range(1, 40)))
    rows = [row for _, row in read(path="text", data_files="rows.txt", max_row_bytes=14)]
    assert rows[:14] == [{"text": "x" * length} for length in range(1, 15)]
    assert [str(row) for row in rows[14:]] == ["longer than 14 bytes"] * 25


def test_rows_of_a_table_have_the_same_limit_of_bytes():
    datasets.Dataset.from_dict({"text": ["short", "é" * 11, "é" * 10]}).to_parquet("rows.parquet")
    rows = read(path="parquet", data_files="rows.parquet", max_row_bytes=20)
    assert [str(row) for _, row in rows] == ["{'text': 'short'}", "longer than 20 bytes", str({"text": "é" * 10})]


@pytest.mark.parametrize("open_file", [open, gzip.open])
def test_a_line_of_fifty_megabytes_is_skipped_in_little_memory(open_file):
    with open_file("rows.jsonl", "wb") as file:
        file.write(as_json(["before"]) + b'{"text": "')
        for _ in range(50):
            file.write(b"x" * 1_000_000)
        file.write(b'"}\n' + as_json(["after"]))
    tracemalloc.start()
    try:
        rows = read(data_files="rows.jsonl", max_row_bytes=1_000_000)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert [(number, str(row)) for number, row in rows] == [
        (0, "{'text': 'before'}"),
        (1, "longer than 1,000,000 bytes"),
        (2, "{'text': 'after'}"),
    ]
    assert peak < 12_000_000


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_text_file_has_one_row_per_line_that_is_not_blank(end):
    content = ["first", "", " second ", "\t", "third\rof it", "last"]
    Path("rows.txt").write_bytes(end.join(content).encode())
    assert read(path="text", data_files="rows.txt") == [
        (number, {"text": line}) for number, line in enumerate(content) if line.strip()
    ]


def test_a_byte_order_mark_is_no_part_of_the_first_object():
    Path("rows.jsonl").write_bytes(lines.BOM + as_json(["a", "b"]))
    assert texts(data_files="rows.jsonl") == ["a", "b"]


@pytest.mark.parametrize("size", [1, 100, 1000, 1 << 20])
@pytest.mark.parametrize("block", [13, 1 << 20])
def test_parts_are_cut_at_line_ends_and_hold_every_row_once_under_its_own_number(size, block, monkeypatch):
    monkeypatch.setattr(lines, "BLOCK", block)
    monkeypatch.setattr(lines, "PART_BYTES", size)
    content = as_json(TEXTS[:100]).replace(b"\n", b"\n\n\n", 7)
    Path("a.jsonl").write_bytes(content)
    Path("b.jsonl").write_bytes(as_json(TEXTS[100:200]).rstrip(b"\n"))
    Path("c.jsonl").write_bytes(as_json(TEXTS[200:]))
    opened = open_split(data_files=["a.jsonl", "b.jsonl", "c.jsonl"])
    parts = opened.parts()
    by_part = [list(opened.read_part(part)) for part in reversed(parts)][::-1]
    rows = [row for part in by_part for row in part]
    expected, number = [], 0
    for name in ("a", "b", "c"):
        for line in Path(f"{name}.jsonl").read_bytes().splitlines():
            expected += [(number, json.loads(line))] if line else []
            number += 1
    assert rows == expected
    sizes = [part.place[2] - part.place[1] for part in parts]
    longest_line = max(map(len, as_json(TEXTS).splitlines())) + 1
    assert max(sizes) < size + longest_line
    assert len(parts) >= sum(Path(f"{name}.jsonl").stat().st_size for name in "abc") / (size + longest_line)
    for part, inside in zip(parts, by_part, strict=True):
        assert all(number >= part.first for number, _ in inside)


@pytest.mark.parametrize("path", ["json", "text"])
@pytest.mark.parametrize("opener", [gzip.open, bz2.open, lzma.open, zipfile.ZipFile], ids=lambda each: each.__module__)
def test_compressed_files_read_like_plain_ones(path, opener):
    content = as_json(TEXTS) if path == "json" else "\n".join(TEXTS).encode()
    if opener is zipfile.ZipFile:
        with zipfile.ZipFile("rows.zip", "w") as archive:
            archive.writestr("rows.jsonl", content)
        files = ["rows.zip"]
    else:
        half = content.index(b"\n", len(content) // 2) + 1
        for name, piece in (("rows.1", content[:half]), ("rows.2", content[half:])):
            with opener(name, "wb") as file:
                file.write(piece)
        files = ["rows.1", "rows.2"]
    assert read(path=path, data_files=files) == [(number, {"text": text}) for number, text in enumerate(TEXTS)]


def test_a_damaged_compressed_file_is_an_error_that_names_it():
    Path("rows.jsonl.gz").write_bytes(gzip.compress(as_json(TEXTS))[:-500])
    with pytest.raises(UserError, match=r"rows\.jsonl\.gz cannot be decompressed"):
        read(data_files="rows.jsonl.gz")


def test_json_arrays_data_documents_and_lines_give_the_same_rows():
    rows = [{"text": text} for text in TEXTS]
    Path("array.json").write_text(json.dumps(rows, indent=1))
    Path("data.json").write_text(json.dumps({"data": rows}))
    Path("lines.json").write_bytes(as_json(TEXTS))
    for name in ("array.json", "data.json", "lines.json"):
        assert texts(data_files=name) == TEXTS, name


@pytest.mark.parametrize("size", [1, 100, 1 << 20])
def test_a_json_array_is_cut_between_rows_whose_columns_need_no_common_type(size, monkeypatch):
    monkeypatch.setattr(lines, "PART_BYTES", size)
    kinds = [2**70, 1.5, "x", None, [1], {"a": 2**70}, True, "\ud800"]
    rows = [{"text": f"é {i}", "n": kinds[i % 8]} if i % 9 else [i] for i in range(40)]
    content = json.dumps(rows, ensure_ascii=False, indent=1).encode(errors="surrogatepass")
    Path("rows.json").write_bytes(lines.BOM + content.replace("é 3".encode(), b"\xff 3", 1))
    Path("more.json").write_text(json.dumps({"data": [{"text": "last", "n": -(2**70)}], "n": 1}))
    opened = open_split(data_files=["rows.json", "more.json"])
    parts = opened.parts()
    assert (len(parts) > 30) == (size == 1)
    found = [(n, str(row)) for part in reversed(parts) for n, row in opened.read_part(part)]
    good = {n: str({"text": row["text"]}) for n, row in enumerate(rows) if isinstance(row, dict)}
    bad = {n: "not a JSON object" for n in range(0, 40, 9)} | {3: "text is not valid Unicode"}
    assert sorted(found) == sorted((good | bad | {40: str({"text": "last"})}).items())
    assert texts(data_files="rows.json", train="train[1:3]") == ["é 1", "é 2"]
    Path("folder").mkdir()
    Path("rows.json").rename("folder/train.json")
    Path("folder/README.md").write_text("# Words")
    assert len(texts(path="folder", bad_rows=1.0)) == 34


@pytest.mark.parametrize("content", ['[{"text": "a"}, {"text": b}]', '[{"text": "a"}, {"text": "b"}', "[" * 100_000])
def test_an_array_that_is_not_json_is_named(content):
    Path("rows.json").write_text(content)
    with pytest.raises(UserError, match=r"rows\.json (is not JSON at|ends before its array does)"):
        open_split(data_files="rows.json").parts()


def test_folders_globs_and_splits_by_file_name_are_read():
    Path("data/more").mkdir(parents=True)
    Path("data/train-1.jsonl").write_bytes(as_json(TEXTS[:10]))
    Path("data/more/train-2.jsonl").write_bytes(as_json(TEXTS[10:20]) + b"{{\n")
    Path("data/test.jsonl").write_bytes(as_json(TEXTS[20:25]))
    for fields in (dict(path="data"), dict(data_dir="data")):
        assert sorted(texts(**fields)) == sorted(TEXTS[:20])
        assert texts("test", **fields) == TEXTS[20:25]
    assert sorted(texts(data_files="data/**/train*.jsonl")) == sorted(TEXTS[:20])
    assert texts(data_dir="data", data_files={"train": "test.jsonl"}) == TEXTS[20:25]


@pytest.mark.parametrize("file", ["rows[0-1]*?.jsonl", "rows[0-1]*?.json", "rows[0-1]*?.csv", "rows[0-1]*?.parquet"])
def test_the_name_of_an_existing_file_is_no_pattern(folder, monkeypatch, file):
    """Nor is the folder that it is in, the current one, or that of the cache."""
    place = folder / "lr[1e-3]"
    place.mkdir()
    monkeypatch.chdir(place)
    Path("data[1]").mkdir()
    for name, text in ((file, "literal"), (file.replace("[0-1]*?", "0ab"), "pattern")):
        table, path = datasets.Dataset.from_dict({"text": [text]}), Path("data[1]", name)
        {".csv": table.to_csv, ".parquet": table.to_parquet}.get(path.suffix, lambda _: None)(path)
        if path.suffix.startswith(".json"):
            path.write_text(json.dumps({"text": text} if path.suffix == ".jsonl" else [{"text": text}]))
    kind = {"jsonl": "json"}.get(file.rpartition(".")[2], file.rpartition(".")[2])
    names = (f"data[1]/{file}", str(place / "data[1]" / file), [f"data[1]/{file}"], {"train": f"data[1]/{file}"})
    for data_files in names:
        assert texts(path=kind, data_files=data_files) == ["literal"], data_files
    assert texts(path=kind, data_dir="data[1]", data_files=file) == ["literal"]
    assert texts(path="data[1]", data_files=file) == ["literal"]
    assert texts(path=kind, data_dir="data[1]", data_files=file.replace("[0-1]*?", "[0]a?")) == ["pattern"]
    for fields in (dict(path="data[1]"), dict(path=kind, data_dir="data[1]")):
        with pytest.raises(UserError, match=r"reads \*, \? and \[ in the folder .*data\[1\] as wildcards: rename it"):
            texts(**fields)


def test_local_lines_need_no_copy_on_disk_whether_they_stream_or_not():
    Path("rows.jsonl").write_bytes(as_json(TEXTS))
    assert texts(data_files="rows.jsonl", streaming=True) == texts(data_files="rows.jsonl") == TEXTS
    assert not list(Path("cache").rglob("*.arrow"))


def test_a_large_corpus_has_enough_parts_for_many_cores_and_none_too_large_for_memory():
    million, billion = 10**6, 10**9
    assert lines.part_bytes(30 * million) == 32 << 20, "one part"
    for total in (34 * million, 100 * million, billion, 100 * billion):
        size = lines.part_bytes(total)
        assert 1 << 20 <= size <= 32 << 20
        assert total / size > 32, "two, or thirty-two, cores end at nearly the same time"


def test_arrays_and_lines_may_stand_side_by_side():
    Path("a.json").write_text(json.dumps([{"text": "one", "n": 2**70}, {"text": "two", "n": "x"}]))
    Path("b.jsonl").write_text('{"text": "three", "n": [1]}\n\n["four"]\n{"text": "five"}')
    Path("c.json").write_text('{"data": [{"text": "six"},]}')
    rows = read(data_files=["a.json", "b.jsonl", "c.json"])
    assert [(n, row if isinstance(row, dict) else str(row)) for n, row in rows] == [
        (0, {"text": "one"}),
        (1, {"text": "two"}),
        (2, {"text": "three"}),
        (4, "not a JSON object"),
        (5, {"text": "five"}),
        (6, {"text": "six"}),
    ]


@pytest.mark.parametrize(
    "content",
    [
        '[{"text": "a"}]\n[{"text": "b"}]\n',
        '[{"text": "a"}] {"text": "b"}',
        '{"data": [{"text": "a"}]}\n{"data": [{"text": "b"}]}\n',
        '{"data": [{"text": "a"}]',
        '{"data": [{"text": "a"}], "n": }',
    ],
)
def test_what_follows_an_array_is_not_lost_silently(content):
    Path("rows.json").write_text(content)
    with pytest.raises(UserError, match=r"rows\.json goes on after its array, at .*: expected one array in a file"):
        open_split(data_files="rows.json").parts()
