"""Files that name splits are never mixed into the train split: they are split by name, which is said, or refused."""

import re
from pathlib import Path

import datasets
import pytest

from llm3.data.sources.split_names import WORDS, splits_of
from llm3.errors import UserError, say
from tests.helpers.tiny_sources import as_json, open_split, texts


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    say.cache_clear()


def write(*names):
    """Files whose only text is their name."""
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(as_json([name]))


def found(split, **fields):
    return sorted(texts(split, **fields))


def test_the_words_are_those_of_the_datasets_library():
    assert {split: set(words) for split, words in WORDS.items()} == {
        str(split): set(words) for split, words in datasets.data_files.SPLIT_KEYWORDS.items()
    }
    named = {name: set(splits_of(name)) for name in ("a/train-01.jsonl", "my_dev.json", "Test.csv", "x/valid/1.txt")}
    assert list(named.values()) == [{"train"}, {"validation"}, {"test"}, {"validation"}]
    assert not any(map(splits_of, ("latest.csv", "retrain.csv", "devices/a.csv", "value.csv", "contest-1.csv")))


@pytest.mark.parametrize(
    "data_files", ["d/*.jsonl", ["d/a-train.jsonl", "d/b-train.jsonl", "d/val.jsonl", "d/test.jsonl"]]
)
def test_files_of_several_splits_are_split_by_their_names_which_is_said(data_files, capsys):
    write("d/a-train.jsonl", "d/b-train.jsonl", "d/val.jsonl", "d/test.jsonl")
    splits = {split: found(split, data_files=data_files) for split in WORDS}
    assert splits == {
        "train": ["d/a-train.jsonl", "d/b-train.jsonl"],
        "validation": ["d/val.jsonl"],
        "test": ["d/test.jsonl"],
    }
    said = capsys.readouterr().err
    line = (
        "split by the names of its files: train: a-train.jsonl, b-train.jsonl; validation: val.jsonl; test: test.jsonl"
    )
    assert said.count(line) == 1
    explicit = {"train": "d/*-train.jsonl", "validation": "d/val.jsonl", "test": "d/test.jsonl"}
    assert open_split(data_files=data_files).key == open_split(data_files=explicit).key, "and is cached once"


def test_folders_name_splits_but_not_those_above_all_files():
    write("test/d/train/1.jsonl", "test/d/eval/1.jsonl")
    assert found("train", data_files="test/d/*/*.jsonl") == ["test/d/train/1.jsonl"]
    assert found("test", path="test", data_files="d/*/*.jsonl") == ["test/d/eval/1.jsonl"]
    assert found("train", data_dir="test/d", data_files="*/*.jsonl") == ["test/d/train/1.jsonl"]


@pytest.mark.parametrize(
    "names", [["d/1.jsonl", "d/2.jsonl"], ["d/train-1.jsonl", "d/2.jsonl"], ["d/test-1.jsonl", "d/test-2.jsonl"]]
)
def test_files_of_one_split_or_of_none_are_all_for_training(names, capsys):
    write(*names)
    assert found("train", data_files="d/*.jsonl", validation="") == sorted(names)
    assert "split by" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("names", "unclear", "line"),
    [
        (
            ["d/1.jsonl", "d/2.jsonl", "d/test.jsonl"],
            "d/1.jsonl names no split, like 1 more, but other files do (d/test.jsonl)",
            "data_files=dict(train=['d/1.jsonl', 'd/2.jsonl'], test='d/test.jsonl')",
        ),
        (
            ["d/train-dev.jsonl", "d/train.jsonl"],
            "d/train-dev.jsonl names train and validation",
            "data_files=dict(train=['d/train-dev.jsonl', 'd/train.jsonl'])",
        ),
    ],
)
def test_names_that_leave_a_split_open_are_refused_with_the_line_to_paste(names, unclear, line):
    write(*names)
    with pytest.raises(UserError, match=re.escape(unclear)) as refused:
        open_split(data_files="d/*.jsonl")
    assert str(refused.value).endswith(line)
    pasted = eval(line.removeprefix("data_files="))
    assert sorted(each for split in pasted for each in found(split, data_files=pasted)) == names


def test_a_document_of_a_pattern_of_plain_text_is_still_a_file(capsys):
    for split in ("train", "test"):
        Path(f"{split}.txt").write_text(f"one {split}\ntwo\n")
    assert texts("test", path="text", data_files="*.txt") == ["one test\ntwo\n"]
    assert "each file is a document" in capsys.readouterr().err


def test_the_splits_of_a_folder_are_said_and_a_file_that_would_not_be_read_is_refused(capsys):
    write("d/train.jsonl", "d/dev.jsonl")
    for fields in ({"path": "d"}, {"data_dir": "d"}):
        assert found("validation", **fields) == ["d/dev.jsonl"]
        assert "train: train.jsonl; validation: dev.jsonl" in capsys.readouterr().err
    write("d/more.jsonl")
    line = "data_files=dict(train=['train.jsonl', 'more.jsonl'], validation='dev.jsonl')"
    for fields in ({"path": "d"}, {"data_dir": "d"}):
        with pytest.raises(UserError, match=r"more\.jsonl names no split, but other files do") as refused:
            open_split(**fields)
        assert str(refused.value).endswith(line)
        pasted = eval(line.removeprefix("data_files="))
        assert found("train", **fields, data_files=pasted) == ["d/more.jsonl", "d/train.jsonl"]
    Path("d/README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: train.jsonl\n---\n")
    assert found("train", path="d") == ["d/train.jsonl"], "its README says so"


def test_names_in_capitals_are_not_mixed_in_a_folder():
    write("d/Train.jsonl", "d/Test.jsonl")
    with pytest.raises(UserError, match=r"data_files=dict\(train='Train.jsonl', test='Test.jsonl'\)"):
        open_split(path="d")
    assert found("test", data_files="d/*.jsonl") == ["d/Test.jsonl"]
