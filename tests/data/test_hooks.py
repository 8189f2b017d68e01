"""Transforms and filters that a config names are applied to rows."""

import hashlib
import json
import sys
from pathlib import Path

import pytest

from llm3.config.data_schema import SourceConfig
from llm3.data.formats import BadRow
from llm3.data.sources import hooks
from llm3.data.sources import split as sources
from llm3.errors import UserError

HOOKS = """
from llm3.data.formats import BadRow
def is_even(row): return int(row["body"].split()[1]) % 2 == 0
def is_low(row): return int(row["body"].split()[1]) < 10
def shout(row): return row | {"loud": row["body"].upper()}
def twice(row): return row | {"loud": 2 * row["loud"]}
def fails(row): return {"body": 1 / (len(row["body"]) - 11)}
def refuses(row): raise BadRow("too dull")
def forgets(row): row["loud"] = "x"
number = 5
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("rows.jsonl").write_text("\n".join(json.dumps({"body": f"document {i % 40}"}) for i in range(200)))
    Path("rows_of_test.py").write_text(HOOKS)
    yield
    sys.modules.pop("rows_of_test", None)
    hooks._load_function.cache_clear()


def open_split(text="body", **fields):
    source = SourceConfig("json", data_files="rows.jsonl", text=text, **fields)
    return sources.open_split(source, "train", cache_dir=Path("cache"))


def read(**fields):
    opened = open_split(**fields)
    return [row for part in opened.parts() for row in opened.read_part(part)]


def texts(**fields):
    return list(open_split(**fields).texts())


def test_transforms_run_in_order_before_filters_and_fields_name_their_results():
    names = dict(transforms=["rows_of_test:shout", "rows_of_test:twice"], filters=["rows_of_test:is_even"])
    assert texts(text="loud", **names)[:2] == ["DOCUMENT 0DOCUMENT 0", "DOCUMENT 2DOCUMENT 2"]
    assert (
        texts(filters=["rows_of_test:is_even", "rows_of_test:is_low"]) == [f"document {i}" for i in range(0, 9, 2)] * 5
    )
    with pytest.raises(UserError, match=r"unknown field 'lout': did you mean 'loud'"):
        open_split(text="lout", **names)


def test_filtered_rows_keep_their_numbers_and_are_not_bad():
    assert [number for number, _ in read(filters=["rows_of_test:is_even"])] == list(range(0, 200, 2))


def test_a_transform_may_set_a_row_aside():
    rows = [row for _, row in read(transforms=["rows_of_test:refuses"])]
    assert all(isinstance(row, BadRow) for row in rows)
    assert [str(row) for row in rows] == ["too dull"] * 200


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(filters=["is_even"]), r"sources\.\*\.filters='is_even': expected 'module:function'"),
        (dict(filters=["rows_of_tests:is_even"]), r"no module 'rows_of_tests': did you mean 'rows_of_test'\?"),
        (dict(filters=["llm3.dats.batch:x"]), r"no module 'llm3\.dats': did you mean 'llm3\.data'"),
        (dict(transforms=["rows_of_test:is_evn"]), r"transforms=.*no function 'is_evn': did you mean 'is_even' or"),
        (dict(filters=["rows_of_test:number"]), r"filters=.*of type int, expected a function"),
        (dict(filters=["broken_rows:x"]), r"importing 'broken_rows' raised ZeroDivisionError"),
        (dict(filters=["needy_rows:x"]), r"its module needs 'no_such_library', which is not installed"),
    ],
)
def test_a_function_that_cannot_be_found_is_an_error_with_the_nearest_name(fields, message):
    Path("broken_rows.py").write_text("1 / 0")
    Path("needy_rows.py").write_text("import no_such_library")
    with pytest.raises(UserError, match=message):
        open_split(**fields)


def test_a_function_that_fails_is_an_error_that_names_it_and_the_row():
    with pytest.raises(UserError, match=r"row 10: transforms: 'rows_of_test:fails' raised ZeroDivisionError"):
        read(transforms=["rows_of_test:fails"])
    with pytest.raises(UserError, match=r"row 0: transforms: 'rows_of_test:forgets' returned NoneType, expected a row"):
        open_split(transforms=["rows_of_test:forgets"])


def test_texts_are_held_out_by_their_transformed_content():
    options = dict(text="loud", transforms=["rows_of_test:shout"], validation="", validation_share=0.3)
    below = int(0.3 * 2**64).to_bytes(8, "big")
    assert {hashlib.sha256(text.encode()).digest()[:8] >= below for text in texts(**options)} == {True}


def test_the_key_changes_with_the_functions_and_with_their_file():
    keys = [open_split(**names).key for names in ({}, dict(filters=["rows_of_test:is_even"]))]
    keys.append(open_split(filters=["rows_of_test:is_low"]).key)
    Path("rows_of_test.py").write_text(HOOKS + "# changed")
    keys.append(open_split(filters=["rows_of_test:is_low"]).key)
    assert len(set(keys)) == 4
