"""Rows of JSON values as CSV and Parquet: columns of one type keep it, others become texts."""

import csv

import pyarrow as pa
import pyarrow.parquet as pq

from llm3.predict import tables

ROWS = [
    {"id": 1, "mixed": 1, "list": [], "number": 1, "nothing": None, "object": {}, "label": None, "error": "x\ny"},
    {"id": 2, "mixed": "a", "list": [1], "number": 0.5, "object": {"a": 1}, "late": "数", "label": "b", "error": None},
    {"id": 3, "mixed": True, "list": None, "number": None, "object": None, "label": "c", "error": None},
]


def test_a_column_of_parquet_has_the_type_of_all_its_values_over_all_row_groups(tmp_path, monkeypatch):
    for size in (1, 10):
        monkeypatch.setattr(tables, "ROWS_AT_A_TIME", size)
        tables.write_parquet(tmp_path / "out.parquet", lambda: iter(ROWS), {"label": pa.large_string()})
        table = pq.read_table(tmp_path / "out.parquet")
        names = ["id", "mixed", "list", "number", "nothing", "object", "label", "late", "error"]
        assert table.column_names == names
        columns = {name: table[name].to_pylist() for name in names}
        assert columns["id"] == [1, 2, 3] and columns["number"] == [1.0, 0.5, None]
        assert columns["mixed"] == ["1", "a", "true"] and columns["nothing"] == [None] * 3
        assert columns["list"] == [[], [1], None]
        assert columns["late"] == [None, "数", None] and columns["error"] == ["x\ny", None, None]
        assert table.schema.field("label").type == pa.large_string()


def test_a_cell_of_csv_is_a_text_or_json(tmp_path):
    tables.write_csv(tmp_path / "out.csv", lambda: iter(ROWS))
    with open(tmp_path / "out.csv", newline="", encoding="utf-8") as file:
        first, second, third = csv.DictReader(file)
    assert (first["error"], first["list"], first["nothing"], second["late"]) == ("x\ny", "[]", "", "数")
    assert (second["object"], third["mixed"], third["object"]) == ('{"a": 1}', "true", "")
