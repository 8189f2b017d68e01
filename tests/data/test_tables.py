"""Datasets on disk and streamed datasets are read in parts by rows, in any process."""

import itertools
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from llm3.data.formats import BadRow
from llm3.data.sources import lines, tables
from llm3.errors import UserError
from tests.helpers.tiny_sources import TEXTS, as_json, open_split, read, texts


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read_part(records, part):
    return [(number, str(row)) for number, row in records.read_part(part)]


def test_csv_parquet_and_arrow_files_and_parts_of_splits_are_read():
    table = datasets.Dataset.from_dict({"text": TEXTS, "n": list(range(500))})
    table.to_csv("rows.csv")
    table.to_parquet("rows.parquet")
    table.save_to_disk("saved")
    arrow = str(next(Path("saved").glob("*.arrow")))
    for path, file in (("csv", "rows.csv"), ("parquet", "rows.parquet"), ("arrow", arrow)):
        assert read(path=path, data_files=file) == [(number, {"text": text}) for number, text in enumerate(TEXTS)]
    Path("rows.jsonl").write_bytes(as_json(TEXTS).replace(b"\n", b"\n\n", 30) + b'{"text": "last", "n": %d}\n' % 2**70)
    for files in ("rows.jsonl", "rows.parquet"):
        path = files.partition(".")[2].removesuffix("l")
        assert texts(path=path, data_files=files, train="train[10%:20%]") == TEXTS[50:100]
    assert texts(data_files="rows.jsonl", train="train[-1:]+train[:2]") == ["last", *TEXTS[:2]]


@pytest.mark.parametrize("streaming", [False, True])
def test_invalid_utf8_in_a_csv_file_costs_only_its_row(streaming):
    good = b'\xef\xbb\xbftext,n\ncaf\xc3\xa9 \xe4\xb8\xad,1\n"of \xf0\x9f\x99\x82\ntwo lines",2\n'
    Path("rows.csv").write_bytes(good + b"caf\xe9,3\nlast,4\n\xe4\xb8,5\n")
    rows = read(path="csv", data_files="rows.csv", streaming=streaming)
    assert [number for number, _ in rows] == list(range(5))
    found = [str(row) if isinstance(row, BadRow) else row["text"] for _, row in rows]
    assert found == ["café 中", "of 🙂\ntwo lines", "not UTF-8", "last", "not UTF-8"]
    assert rows[2][1].start == "caf\ufffd,3"


def test_class_numbers_become_names_also_in_lists_and_a_row_without_a_class_is_unusable():
    names = datasets.ClassLabel(names=["no", "yes"])
    features = {"text": datasets.Value("string"), "kind": names, "kinds": datasets.List(names)}
    columns = {"text": ["x", "y", "z"], "kind": [1, 0, -1], "kinds": [[1, 0], [], [0]]}
    datasets.Dataset.from_dict(columns, datasets.Features(features)).to_parquet("rows.parquet")
    for streaming in (False, True):
        options = dict(path="parquet", data_files="rows.parquet", streaming=streaming)
        one = [row for _, row in read(label="kind", **options)]
        assert one[:2] == [{"text": "x", "labels": ["yes"]}, {"text": "y", "labels": ["no"]}]
        assert str(one[2]) == "kind is null"
        several = [row["labels"] for _, row in read(label="kinds", **options)]
        assert several == [["no", "yes"], [], ["no"]]


def test_tables_and_streams_come_in_parts_by_rows(monkeypatch):
    table = datasets.Dataset.from_dict({"text": TEXTS})
    table.select(range(320)).to_parquet("rows-1.parquet", batch_size=90)
    table.select(range(320, 500)).to_parquet("rows-2.parquet")
    monkeypatch.setattr(lines, "PART_BYTES", table.data.nbytes // 4)
    monkeypatch.setattr(tables, "STREAM_PART_ROWS", 120)
    monkeypatch.setattr(tables, "ROWS_AT_A_TIME", 50)
    for streaming, firsts in ((False, [0, 125, 250, 375]), (True, [0, 120, 240, 360, 480])):
        files = ["rows-1.parquet", "rows-2.parquet"]
        opened = open_split(path="parquet", data_files=files, streaming=streaming)
        parts = opened.parts()
        assert [part.first for part in parts] == firsts
        pieces = [opened.reader.rows(part.first, part.place) for part in parts]
        in_turn = itertools.zip_longest(*pieces)  # all of them at the same time
        rows = sorted((row for each in in_turn for row in each if row), key=lambda row: row[0])
        assert rows == [(number, {"text": text}) for number, text in enumerate(TEXTS)]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_parquet_file_without_rows_is_passed_over_and_alone_is_an_error_that_says_so(streaming):
    schema = pa.schema([("text", pa.string())])
    with pa.parquet.ParquetWriter("none.parquet", schema) as file:
        file.write_table(schema.empty_table())
    datasets.Dataset.from_dict({"text": TEXTS[:5]}).to_parquet("rows.parquet")
    both = ["none.parquet", "rows.parquet"]
    assert texts(path="parquet", data_files=both, streaming=streaming) == TEXTS[:5]
    with pytest.raises(UserError, match=r"source parquet none\.parquet: .*split .*has no rows"):
        open_split(path="parquet", data_files="none.parquet", streaming=streaming)


def test_an_unknown_split_of_a_stream_is_an_error_with_the_nearest_name():
    datasets.Dataset.from_dict({"text": TEXTS}).to_parquet("rows.parquet")
    with pytest.raises(UserError, match="unknown split 'trian': did you mean 'train'"):
        open_split(path="parquet", data_files="rows.parquet", train="trian", streaming=True)


def test_a_stream_that_breaks_off_is_an_error_that_names_its_source():
    datasets.Dataset.from_dict({"text": TEXTS}).to_parquet("rows.parquet")
    opened = open_split(path="parquet", data_files="rows.parquet", streaming=True)
    Path("rows.parquet").write_bytes(Path("rows.parquet").read_bytes()[:-500])
    with pytest.raises(UserError, match=r"source parquet rows\.parquet: the stream broke off"):
        opened.parts()


def test_local_files_are_opened_without_asking_the_network(monkeypatch):
    asked = []
    monkeypatch.setattr("socket.getaddrinfo", lambda *args, **_: asked.append(args))
    datasets.Dataset.from_dict({"text": TEXTS}).to_csv("rows.csv")
    assert texts(path="csv", data_files="rows.csv") == TEXTS
    assert not asked


def test_another_process_reads_the_same_parts(monkeypatch):
    monkeypatch.setattr(lines, "PART_BYTES", 5000)
    Path("rows.jsonl").write_bytes(as_json(TEXTS))
    datasets.Dataset.from_dict({"text": TEXTS}).to_parquet("rows.parquet")
    parquet = dict(path="parquet", data_files="rows.parquet")
    opened = [open_split(data_files="rows.jsonl", max_documents=300)]
    opened += [open_split(**parquet, streaming=streaming) for streaming in (False, True)]
    opened.append(open_split(**parquet, train="train[50%:]"))
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        for records in opened:
            parts = records.parts()
            there = [row for part in parts for row in process.submit(read_part, records, part).result()]
            assert there == [row for part in parts for row in read_part(records, part)]
            assert len(there) >= 250
