"""The content of files decides whether a source is read again: not their names, and not their times alone."""

import json
import os
import time
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from llm3.config.data_schema import SourceConfig
from llm3.data.cache import cache
from llm3.data.sources import digests
from llm3.data.sources import split as sources
from tests.helpers.tiny_records import contents, trained

EARLIER = time.time_ns() - 3600 * 10**9


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(digests, "SETTLED_SECONDS", 0.0)


@pytest.fixture
def hashed(monkeypatch):
    """The names of the files that were read to hash them."""
    names, plain = [], digests._hash
    monkeypatch.setattr(digests, "_hash", lambda path: names.append(Path(path).name) or plain(path))
    return names


def write(name, text):
    """Write a file in place, with the modification time that it always has."""
    with open(name, "r+" if os.path.exists(name) else "w") as file:
        file.write(text)
    os.utime(name, ns=(EARLIER, EARLIER))


def tokenized(path, name):
    source = SourceConfig(path, data_files=name, validation="")
    records = sources.open_split(source, "train", cache_dir=Path("cache"))
    return cache.build_cache(records, "text", trained, Path("cache"), workers=1, progress=False)


KINDS = [
    ("json", "rows.jsonl", '{"text": "one a"}\n{"text": "two a"}\n'),
    ("text", "rows.txt", "one a\ntwo a\n"),
    ("csv", "rows.csv", "text,n\none a,1\ntwo a,2\n"),
    ("json", "rows.json", json.dumps([{"text": "one a"}, {"text": "two a"}])),
]


@pytest.mark.parametrize(("path", "name", "text"), KINDS, ids=[name for _, name, _ in KINDS])
def test_a_change_in_place_with_the_same_size_and_time_is_seen_and_a_touch_costs_no_tokenizing(path, name, text):
    write(name, text)
    first = tokenized(path, name)
    write(name, text.replace("one a", "one b"))
    changed = tokenized(path, name)
    assert sorted(contents(first)) == ["one a", "two a"] and sorted(contents(changed)) == ["one b", "two a"]
    built = {file.name: file.stat().st_mtime_ns for file in Path("cache").glob("tokens-*/manifest.json")}
    os.utime(name)
    assert tokenized(path, name).fingerprint == changed.fingerprint
    os.rename(name, f"moved-{name}")
    assert tokenized(path, f"moved-{name}").fingerprint == changed.fingerprint
    assert {file.name: file.stat().st_mtime_ns for file in Path("cache").glob("tokens-*/manifest.json")} == built


def test_a_file_is_hashed_again_only_after_a_change_of_size_inode_or_times(hashed):
    write("a", "x" * 100)
    write("b", "y" * 100)
    known = digests.content_digest(["a", "b"], Path("cache"))
    assert digests.content_digest(["a", "b"], Path("cache")) == known and sorted(hashed) == ["a", "b"]
    assert digests.content_digest(["b", "a"], Path("cache")) != known, "the order of files is content"
    os.utime("a")
    assert digests.content_digest(["a", "b"], Path("cache")) == known and hashed[2:] == ["a"]
    write("b", "z" * 100)
    assert digests.content_digest(["a", "b"], Path("cache")) != known and hashed[3:] == ["b"]


@pytest.mark.parametrize("index", ["{", "[]", None])
def test_a_damaged_or_missing_index_and_a_recent_change_cost_another_reading_only(hashed, monkeypatch, index):
    monkeypatch.setattr(digests, "SETTLED_SECONDS", 0.0 if index else 60.0)
    write("a", "x")
    known = digests.content_digest(["a"], Path("cache"))
    if index:
        (Path("cache") / digests.INDEX).write_text(index)
    assert digests.content_digest(["a"], Path("cache")) == known and hashed == ["a", "a"]


def test_an_archive_that_changed_is_unpacked_again():
    for text in ("one", "two"):
        with zipfile.ZipFile("rows.zip", "w") as archive:
            archive.writestr("rows.jsonl", json.dumps({"text": text}))
        assert contents(tokenized("json", "rows.zip")) == [text]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_readme_that_changes_how_files_are_read_is_seen(kind):
    Path("folder").mkdir()
    if kind == "csv":
        Path("folder/train.csv").write_text("a|text|n;text;x\n1|one|2;two;3\n")
        options = ["sep: '|'", "sep: ';'"]
    else:
        pa.parquet.write_table(pa.table({"n": ["one", "two"], "text": ["a", "b"]}), "folder/train.parquet")
        options = ["columns: [text]", "columns: [n, text]"]
    keys = []
    for option in options:
        Path("folder/README.md").write_text(f"---\nconfigs:\n- config_name: default\n  {option}\n---\n")
        source = SourceConfig("folder", validation="")
        keys.append(sources.open_split(source, "train", cache_dir=Path("cache")).key)
    assert keys[0] != keys[1]
