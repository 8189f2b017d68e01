"""Files of a run are written completely or not at all."""

import functools
import json
import os

import pytest

from llm3.errors import NotWritten, UserError
from llm3.files import read_json, write_atomic, write_json


def test_json_is_written_completely_or_not_at_all(tmp_path):
    path = tmp_path / "a" / "b.json"
    write_json(path, {"x": 1})
    with pytest.raises(TypeError):
        write_json(path, {"x": object()})
    assert read_json(path) == {"x": 1} and json.loads(path.read_text()) == {"x": 1}
    assert read_json(tmp_path / "none.json") is None


def test_a_file_is_on_the_disk_before_it_takes_its_place(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        done = functools.partial(lambda name, call, *given: (calls.append(name), call(*given)), name, getattr(os, name))
        monkeypatch.setattr(os, name, done)
    write_json(tmp_path / "row.json", {})
    assert calls == ["fsync", "replace"]


def test_a_damaged_record_is_named(tmp_path):
    (tmp_path / "record.json").write_text("{")
    with pytest.raises(UserError, match=r"record\.json cannot be read"):
        read_json(tmp_path / "record.json")


def test_a_file_that_cannot_be_written_stays_as_it_was_and_leaves_no_other_file(tmp_path):
    path = tmp_path / "row.json"
    write_json(path, {"x": 1})
    with pytest.raises(UnicodeEncodeError):
        write_atomic(path, "\ud800")
    (tmp_path / "folder").mkdir()
    with pytest.raises(NotWritten, match="folder was not written"):
        write_json(tmp_path / "folder", {})
    assert {each.name for each in tmp_path.iterdir()} == {"row.json", "folder"} and read_json(path) == {"x": 1}
