"""Rows of JSON values as CSV and as Parquet."""

import csv
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

Rows = Callable[[], Iterator[dict[str, Any]]]  # yields the rows anew at each call
ROWS_AT_A_TIME = 4096
WRITTEN = ("error",)  # the last column, in any order of the rows


def write_csv(path: Path, rows: Rows) -> None:
    """Write a header and the rows; lists and objects are written as JSON, null as an empty cell."""
    names = _names(rows)
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(names)
        for row in rows():
            writer.writerow([_cell(row.get(name)) for name in names])


def write_parquet(path: Path, rows: Rows, columns: Mapping[str, pa.DataType]) -> None:
    """Write the rows, compressed. columns: the types of some columns.

    The other columns get the type that all their values have; where there is none, values are texts or JSON.
    """
    names, types = _names(rows), dict[str, pa.DataType]()
    for some in _batched(rows()):
        for name in (each for each in names if each not in columns):
            found = _type([row.get(name) for row in some])
            types[name] = _common(types[name], found) if name in types else found
    schema = pa.schema([(name, columns.get(name, types.get(name))) for name in names])
    as_json = {name for name, kind in types.items() if pa.types.is_string(kind)}
    with pq.ParquetWriter(path, schema, compression="zstd") as file:
        for some in _batched(rows()):
            made = [{name: _text(row, name) if name in as_json else row.get(name) for name in names} for row in some]
            file.write_table(pa.Table.from_pylist(made, schema))


def _names(rows: Rows) -> list[str]:
    """All columns, in the order in which they come first; the error last."""
    names = dict.fromkeys(name for row in rows() for name in row)
    return [*(each for each in names if each not in WRITTEN), *(each for each in WRITTEN if each in names)]


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list | bool) else value


def _text(row: Mapping[str, Any], name: str) -> str | None:
    value = row.get(name)
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _type(values: list[Any]) -> pa.DataType:
    try:
        found = pa.array(values).type
    except (pa.ArrowException, OverflowError):
        return pa.string()
    return pa.string() if pa.types.is_struct(found) and not found.num_fields else found  # Parquet has no empty structs


def _common(one: pa.DataType, other: pa.DataType) -> pa.DataType:
    """The type of both, if there is one; else text."""
    schemas = [pa.schema([("", one)]), pa.schema([("", other)])]
    try:
        return pa.unify_schemas(schemas, promote_options="permissive").field(0).type
    except pa.ArrowException:
        return pa.string()


def _batched(rows: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    while some := list(itertools.islice(rows, ROWS_AT_A_TIME)):
        yield some
