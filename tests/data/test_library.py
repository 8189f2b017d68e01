"""Sources by name: tokenized once, labelled like their train split, in a cache directory that can be written."""

import json

import pytest

from llm3.config.data_schema import SourceConfig
from llm3.data import tokenizer
from llm3.data.library import Library, trained_tokenizer
from llm3.data.sources import readers, selection
from llm3.data.sources import split as sources
from llm3.errors import UserError
from tests.helpers import tiny_records

SIZES = {"vocab_size": 270, "train_bytes": 1000}
SPLITS = {
    "news": {"train": ["a b", "c d", "c d"], "validation": ["c d", "A b", "e f"], "test": ["x y"]},
    "laws": {"train": ["e f", "g h"], "validation": ["i j", "c d "]},
}
trained = tokenizer.train([text for splits in SPLITS.values() for texts in splits.values() for text in texts], 270)


@pytest.fixture
def configs(tmp_path):
    def file(name, split, texts):
        path = tmp_path / f"{name}-{split}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        return str(path)

    return {
        name: SourceConfig("json", data_files={split: file(name, split, texts) for split, texts in splits.items()})
        for name, splits in SPLITS.items()
    }


@pytest.fixture
def library(configs, tmp_path):
    return Library(configs, trained, tmp_path / "cache")


def test_caches_and_windows_are_opened_once(library, monkeypatch):
    first = library.cache("news", "train"), library.windows("pieces", "news", "train", 8)
    monkeypatch.setattr(sources, "open_split", lambda *_, **__: pytest.fail("read again"))
    assert (library.cache("news", "train"), library.windows("pieces", "news", "train", 8)) == first


def test_a_share_is_built_alone_and_the_last_share_completes_the_cache(library):
    assert library.build_split("news", "train", shard=(2, 2)) is None
    whole = library.build_split("news", "train", shard=(1, 2))
    assert whole.documents == 3 and whole.fingerprint == library.cache("news", "train").fingerprint


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("x", "its 3 rows all have the label 'x': expected two classes"),
        (["x", "y"], "label 'x', 'y'"),
        ([], "no class"),
    ],
)
def test_rows_that_all_have_the_same_label_are_refused(label, message, tmp_path):
    rows = "".join(json.dumps({"text": text, "label": label}) + "\n" for text in "abc")
    (tmp_path / "train.jsonl").write_text(rows)
    source = SourceConfig("json", data_files=str(tmp_path / "train.jsonl"), label="label")
    with pytest.raises(UserError, match=message):
        Library({"t": source}, trained, tmp_path / "cache").labels("t")


def test_documents_that_are_all_too_long_are_not_taken_for_an_empty_source(tmp_path):
    (tmp_path / "train.jsonl").write_text(json.dumps({"q": "why " * 20, "a": "so"}) + "\n")
    source = SourceConfig("json", data_files=str(tmp_path / "train.jsonl"), prompt="q", answer="a")
    library = Library({"t": source}, trained, tmp_path / "cache")
    with pytest.raises(UserError, match=r"train split: none of its 1 document has a target within 9 tokens: .*length"):
        library.windows("dialogue", "t", "train", 9)


def test_class_numbers_are_those_of_the_train_split(tmp_path):
    rows = {"train": [("a", "x"), ("b", "y"), ("c", "z")], "validation": [("d", "z")]}
    for split, pairs in rows.items():
        lines = "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in pairs)
        (tmp_path / f"{split}.jsonl").write_text(lines)
    files = {split: str(tmp_path / f"{split}.jsonl") for split in rows}
    library = Library({"t": SourceConfig("json", data_files=files, label="label")}, trained, tmp_path / "cache")
    assert library.cache("t", "validation").label_names == library.labels("t") == ["x", "y", "z"]
    assert library.cache("t", "validation").labels.tolist() == [2]


def test_a_cache_directory_that_cannot_be_written_is_refused_by_name(configs, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    refused = [tmp_path / "file", tmp_path / "file" / "cache"]
    for cache_dir in refused:
        with pytest.raises(UserError, match=f"cache_dir='{cache_dir}' cannot be created or written to"):
            Library(configs, trained, cache_dir)
        for source in (configs["news"], SourceConfig("builtin:python")):
            with pytest.raises(UserError, match=f"cache_dir='{cache_dir}'"):
                trained_tokenizer({"news": source}, ["news"], cache_dir, **SIZES)


def test_a_read_only_cache_is_used_if_it_is_complete_and_else_refused_by_what_it_lacks(configs, tmp_path, monkeypatch):
    first = Library(configs, trained, tmp_path).cache("news", "train")
    before = tiny_records.files(tmp_path)
    monkeypatch.setattr("os.access", lambda *_: False)  # what a read-only folder answers, also to root
    readers._writable.cache_clear()
    library = Library(configs, trained, tmp_path)
    assert library.cache("news", "train").fingerprint == first.fingerprint
    with pytest.raises(UserError, match=r"cache_dir=.*read-only, and does not hold the tokens of source json .*"):
        library.cache("news", "validation")
    with pytest.raises(UserError, match=r"cache_dir=.*read-only, and does not hold the tokenizer yet"):
        trained_tokenizer(configs, ["news"], tmp_path, **SIZES)
    assert tiny_records.files(tmp_path) == before


def test_a_damaged_tokenizer_in_the_cache_is_trained_again(configs, tmp_path, capsys):
    expected = trained_tokenizer(configs, ["news"], tmp_path, **SIZES).hash
    (file,) = tmp_path.glob("tokenizer-*.json")
    whole = file.read_bytes()
    for damaged in (b"", whole[:100]):
        file.write_bytes(damaged)
        assert trained_tokenizer(configs, ["news"], tmp_path, **SIZES).hash == expected and file.read_bytes() == whole
        assert f"{file} cannot be read" in (said := capsys.readouterr().err) and "it is trained again" in said


def test_a_tokenizer_is_trained_once_on_a_sample_of_at_most_train_bytes(configs, tmp_path, monkeypatch):
    seen, plain = [], tokenizer.train
    monkeypatch.setattr(tokenizer, "train", lambda texts, size: plain(seen.append(list(texts)) or seen[-1], size))

    def trained_on(cache_dir="cache", **sizes):
        return trained_tokenizer(configs, ["news", "laws"], tmp_path / cache_dir, **SIZES | sizes)

    whole = trained_on()
    monkeypatch.setattr(sources.Records, "texts", lambda *_: pytest.fail("read again"))
    assert trained_on().hash == whole.hash
    monkeypatch.undo()
    monkeypatch.setattr(tokenizer, "train", lambda texts, size: plain(seen.append(list(texts)) or seen[-1], size))
    trained_on(train_bytes=9)
    trained_on("other", train_bytes=9)
    assert seen[0] == ["a b", "c d", "c d", "e f", "g h"]
    smallest = sorted(range(5), key=lambda i: (selection.hash_of(seen[0][i]), i))[:3]
    assert seen[1:] == [[seen[0][i] for i in sorted(smallest)]] * 2
    with pytest.raises(UserError, match="'lawz': did you mean 'laws'"):
        trained_tokenizer(configs, ["lawz"], tmp_path, **SIZES)
