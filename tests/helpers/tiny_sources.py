"""Sources of local files, opened and read in the working directory of a test."""

import json
from pathlib import Path

from llm3.config.data_schema import SourceConfig
from llm3.data.sources import split as sources

TEXTS = [f"text {i} " + "xyz" * (i % 7) for i in range(500)]


def as_json(texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def open_split(split="train", path="json", **fields):
    return sources.open_split(SourceConfig(path, **fields), split, cache_dir=Path("cache"))


def read(*args, **fields):
    opened = open_split(*args, **fields)
    return [row for part in opened.parts() for row in opened.read_part(part)]


def texts(*args, **fields):
    return list(open_split(*args, **fields).texts())
