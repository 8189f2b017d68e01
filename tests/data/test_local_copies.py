"""Local copies of sources are read instead of the hub."""

import dataclasses
import json
from pathlib import Path

import pytest

from llm3.config.data_schema import SourceConfig
from llm3.data.sources import split as sources
from llm3.errors import UserError


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(name, rows):
    Path(name).write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")


HUB = SourceConfig("some/questions", text="body", label="kind", local="medical/questions", train="train[:90%]")


def copies(*splits, folder="copies/medical/questions"):
    """Local copies of these splits, of 3, 2 and 1 documents."""
    Path(folder).mkdir(parents=True)
    for split in splits:
        count = {"train": 3, "validation": 2, "test": 1}[split]
        write(f"{folder}/{split}.jsonl", [{"body": f"{split} {i}", "kind": "x"} for i in range(count)])


def read(source, split):
    return list(sources.open_split(source, split, cache_dir=Path("cache")).texts())


def test_with_a_data_dir_a_source_is_read_from_its_local_files_by_split():
    copies("train", "validation", "test")
    local = sources.use_local_copy(HUB, "copies")
    assert {split: len(read(local, split)) for split in ("train", "validation", "test")} == {
        "train": 3,
        "validation": 2,
        "test": 1,
    }
    assert read(local, "test") == ["test 0"]
    assert (local.text, local.label) == ("body", "kind")


def test_without_a_data_dir_or_a_local_folder_a_source_is_unchanged():
    copies("train")
    assert sources.use_local_copy(HUB, "") is HUB
    builtin = SourceConfig("builtin:python")
    assert sources.use_local_copy(builtin, "copies") is builtin


def test_local_copies_without_a_validation_file_hold_out_the_share():
    copies("train")
    write("copies/medical/questions/train.jsonl", [{"body": f"document {i}", "kind": "x"} for i in range(300)])
    local = sources.use_local_copy(dataclasses.replace(HUB, validation="", validation_share=0.3), "copies")
    train, validation = read(local, "train"), read(local, "validation")
    assert len(train) + len(validation) == 300
    assert len(validation) == pytest.approx(90, abs=30)
    with pytest.raises(UserError, match="validation_share=0"):
        read(sources.use_local_copy(HUB, "copies"), "validation")
    with pytest.raises(UserError, match=r"unknown split 'test'.*valid: train"):
        read(local, "test")


@pytest.mark.parametrize(
    ("data_dir", "message"),
    [
        ("copy", r"config\.data_dir='copy'.*copy/medical/questions/train\.jsonl does not exist: .*mean 'copies'"),
        ("copies/medicine", r"medicine/medical/questions/train\.jsonl.*did you mean 'medical'"),
        ("copies", r"copies/medical/questions/train\.jsonl does not exist: .*did you mean 'trian\.jsonl'"),
        ("rows.jsonl", r"rows\.jsonl is not a folder"),
    ],
)
def test_a_missing_local_copy_names_the_field_the_file_and_the_nearest_name(data_dir, message):
    copies()
    write("rows.jsonl", [{"body": "x"}])
    write("copies/medical/questions/trian.jsonl", [{"body": "x"}])
    with pytest.raises(UserError, match=message):
        sources.use_local_copy(HUB, data_dir)
