"""Sources by name: what an evaluation shares with the training texts is counted, and the cache can be written."""

import json

import pytest

from llm3.config import SourceConfig
from llm3.data import sources, tokenizer
from llm3.data.library import Library, training_texts
from llm3.errors import UserError

SPLITS = {
    "news": {"train": ["a b", "c d", "c d", ""], "validation": ["c d", "A b", "e f", "", "c d"], "test": ["x y"]},
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


@pytest.mark.parametrize(
    ("name", "split", "training", "shared"),
    [
        ("news", "validation", ["news"], 2),
        ("news", "validation", ["laws"], 1),
        ("news", "validation", ["laws", "news"], 3),
        ("news", "validation", [], 0),
        ("news", "test", ["laws", "news"], 0),
        ("laws", "validation", ["laws", "news"], 0),
        ("laws", "train", ["news"], 0),
        ("news", "train", ["laws", "news"], 0),
    ],
)
def test_the_documents_of_an_evaluation_that_were_trained_on_are_counted(library, name, split, training, shared):
    assert library.overlap(name, split, training) == shared


def test_what_was_counted_once_is_not_read_again(library, monkeypatch):
    library.overlap("news", "validation", ["news"])
    monkeypatch.setattr(sources, "load", lambda *_, **__: pytest.fail("read again"))
    monkeypatch.setattr(type(library.cache("news", "train")), "document_hashes", lambda _: pytest.fail("hashed again"))
    assert library.overlap("news", "validation", iter(["news"])) == 2


def test_a_cache_directory_that_cannot_be_written_is_refused_by_name(configs, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    refused = [tmp_path / "file", tmp_path / "file" / "cache"]
    for cache_dir in refused:
        with pytest.raises(UserError, match=f"cache_dir='{cache_dir}' cannot be created or written to"):
            Library(configs, trained, cache_dir)
        for source in (configs["news"], SourceConfig("builtin:python")):
            with pytest.raises(UserError, match=f"cache_dir='{cache_dir}'"):
                next(training_texts({"news": source}, ["news"], cache_dir))
    monkeypatch.setattr("os.access", lambda *_: False)  # what a read-only folder answers, also to root
    with pytest.raises(UserError, match=r"cache_dir=.*: permission denied"):
        Library(configs, trained, tmp_path / "read-only")
