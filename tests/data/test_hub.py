"""Datasets laid out as on the hub are read by configuration and split; a stream is cached like any other source."""

import functools
from pathlib import Path

import datasets
import pytest

from llm3.config.data_schema import SourceConfig
from llm3.data.cache import cache
from llm3.data.sources import lines, tables
from llm3.data.sources import split as sources
from tests.helpers.tiny_records import contents, files, trained

TEXTS = {"news": [f"news {i} " + "so " * (i % 5) for i in range(100)], "laws": [f"law {i}" for i in range(60)]}
CARD = """---
configs:
- config_name: news
  data_files: [{split: learn, path: "news/*.parquet"}]
- config_name: laws
  data_files: [{split: learn, path: "laws/*.parquet"}, {split: dev, path: "laws-dev.parquet"}]
---
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A repository of a dataset, with two configs of files of its own."""
    monkeypatch.chdir(tmp_path)
    for name, texts in TEXTS.items():
        Path("corpus", name).mkdir(parents=True)
        for start in range(0, len(texts), 40):
            part = datasets.Dataset.from_dict({"text": texts[start : start + 40]})
            part.to_parquet(f"corpus/{name}/{start:03}.parquet", batch_size=20)
    datasets.Dataset.from_dict({"text": ["law of dev"]}).to_parquet("corpus/laws-dev.parquet")
    Path("corpus/README.md").write_text(CARD)
    return tmp_path


def records(split="train", cache_dir="cache", **fields):
    return sources.open_split(SourceConfig(**{"train": "learn"} | fields), split, cache_dir=Path(cache_dir))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_is_read_by_the_name_of_its_config_and_split(streaming):
    read = functools.partial(records, path="corpus", streaming=streaming)
    assert list(read(name="news").texts()) == TEXTS["news"]
    assert list(read(name="laws").texts()) == TEXTS["laws"]
    assert list(read("validation", name="laws", validation="dev").texts()) == ["law of dev"]
    assert len({read(name=name).key for name in TEXTS}) == 2


def test_a_slice_of_a_split_is_read_by_its_name():
    assert list(records(path="corpus", name="news", train="learn[10%:20%]").texts()) == TEXTS["news"][10:20]


def test_several_processes_and_shares_build_the_same_bytes_from_a_stream(monkeypatch, tmp_path):
    monkeypatch.setattr(tables, "STREAM_PART_ROWS", 30)
    monkeypatch.setattr(lines, "PART_BYTES", 1000)
    opened = records(path="corpus", name="news", streaming=True)
    assert [part.first for part in opened.parts()] == [0, 30, 60, 90]
    build = functools.partial(cache.build_cache, opened, "text", trained)
    alone = build(tmp_path / "alone", workers=1)
    assert sorted(contents(alone)) == sorted(TEXTS["news"])
    assert [TEXTS["news"][row] for row in alone.rows] == contents(alone)
    build(tmp_path / "two", workers=2)
    assert files(tmp_path / "two") == files(tmp_path / "alone")
    shares = [build(tmp_path / "shares", workers=1, shard=(i, 3)) for i in (3, 1, 2)]
    assert [each is None for each in shares] == [True, True, False]
    assert files(tmp_path / "shares") == files(tmp_path / "alone")
    whole = cache.build_cache(records(path="corpus", name="news"), "text", trained, tmp_path / "table")
    assert sorted(contents(whole)) == sorted(contents(alone))
