"""A token cache holds every text once, in an order of its own, and is never read when it is damaged."""

import itertools
import json
import os
import re
import time

import numpy as np
import pytest
from datasets import Dataset

from llm3.data import cache, tokenizer
from llm3.data.tokenizer import Tokenizer
from llm3.errors import UserError

TEXTS = [f"document {i} says {'so ' * (i % 7)}é" for i in range(60)] + [""]
trained = tokenizer.train(TEXTS, 300)


def build(texts, directory, row_labels=None, **options):
    columns = {"text": texts} | ({"label": row_labels} if row_labels else {})
    return cache.build(Dataset.from_dict(columns), trained, directory, **options)


def contents(built):
    return [trained.decode(built.document(i)) for i in range(built.documents)]


def test_each_text_is_one_document_between_its_bos_and_eos(tmp_path):
    built = build(TEXTS, tmp_path)
    assert built.documents == len(TEXTS)
    assert sorted(contents(built)) == sorted(TEXTS)
    for i in range(built.documents):
        document = built.document(i).tolist()
        assert document == [trained.bos_id, *trained.encode(contents(built)[i]), trained.eos_id]
    assert built.tokens == sum(len(trained.encode(text)) + 2 for text in TEXTS) == built.offsets[-1]
    assert built.text_bytes == sum(len(text.encode()) for text in TEXTS)
    assert built.document_bytes.tolist() == [len(text.encode()) for text in contents(built)]
    assert built.stream.dtype == np.uint16


def test_the_order_is_shuffled_and_depends_on_the_content_only(tmp_path):
    forward, backward = build(TEXTS, tmp_path / "a"), build(TEXTS[::-1], tmp_path / "b")
    assert forward.fingerprint == backward.fingerprint
    assert contents(forward) == contents(backward)
    assert contents(forward) not in (TEXTS, TEXTS[::-1], sorted(TEXTS))


def test_copies_of_a_text_are_kept_and_scattered(tmp_path):
    texts = contents(build(["copy"] * 100 + [str(i) for i in range(900)], tmp_path))
    assert texts.count("copy") == 100
    neighbours = sum(a == b == "copy" for a, b in itertools.pairwise(texts))
    assert neighbours < 25  # 10 are expected


def test_a_second_build_reads_and_encodes_nothing(tmp_path, monkeypatch):
    first = build(TEXTS, tmp_path)
    monkeypatch.setattr(Tokenizer, "encode", lambda *_: pytest.fail("encoded again"))
    again = build(TEXTS, tmp_path)
    assert (again.stream == first.stream).all()
    assert isinstance(again.stream, np.memmap)


def test_the_fingerprint_tells_texts_labels_class_order_and_tokenizers_apart(tmp_path):
    other = tokenizer.train(TEXTS, 290)
    labels = ["a", "b"] * 30 + ["a"]
    prints = [
        build(TEXTS, tmp_path).fingerprint,
        build([*TEXTS[:-1], "changed"], tmp_path).fingerprint,
        build(TEXTS, tmp_path, labels).fingerprint,
        build(TEXTS, tmp_path, [*labels[1:], "b"]).fingerprint,
        build(TEXTS, tmp_path, labels, labels=["b", "a"]).fingerprint,
        cache.build(Dataset.from_dict({"text": TEXTS}), other, tmp_path).fingerprint,
    ]
    assert len(set(prints)) == len(prints)


def test_labels_follow_their_texts_and_classes_are_sorted_or_as_given(tmp_path):
    labels = [f"class {i % 3}" for i in range(len(TEXTS))]
    for names in (None, ["class 2", "class 9", "class 0", "class 1"]):
        built = build(TEXTS, tmp_path, labels, labels=names)
        assert list(built.label_names) == (names or ["class 0", "class 1", "class 2"])
        assert built.labels.dtype == np.int32
        found = {text: built.label_names[label] for text, label in zip(contents(built), built.labels, strict=True)}
        assert found == dict(zip(TEXTS, labels, strict=True))


def test_a_label_that_is_not_a_class_is_named(tmp_path):
    with pytest.raises(UserError, match=r"unknown label 'catt'.*did you mean 'cat'"):
        build(["x", "y"], tmp_path, ["cat", "catt"], labels=["cat", "dog"])


def _flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("name", ["stream.bin", "offsets.npy", "document_bytes.npy", "labels.npy", "manifest.json"])
@pytest.mark.parametrize("damage", [_flip_a_byte, _halve, lambda path: path.unlink()])
def test_a_damaged_cache_is_built_again_and_said_aloud(name, damage, tmp_path, capsys):
    if (name, damage) == ("manifest.json", _flip_a_byte):
        pytest.skip("some bytes of the manifest are free: its counts")
    labels = ["x"] * len(TEXTS)
    first = build(TEXTS, tmp_path, labels)
    before = contents(first)
    del first
    (path,) = tmp_path.glob(f"tokens-*/{name}")
    damage(path)
    capsys.readouterr()
    assert contents(build(TEXTS, tmp_path, labels)) == before
    assert re.search(r"damaged .*building it again", capsys.readouterr().err)


def test_an_interrupted_build_leaves_nothing_and_the_next_one_succeeds(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "encode", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            build(TEXTS, tmp_path)
    assert not list(tmp_path.iterdir())
    assert sorted(contents(build(TEXTS, tmp_path))) == sorted(TEXTS)


def test_what_a_killed_process_left_is_removed_after_a_day_and_a_running_build_is_not(tmp_path):
    now = time.time()
    for name, directory_hours, stream_hours in (("dead", 30, 30), ("slow", 30, 1), ("new", 1, 1)):
        directory = tmp_path / f"tokens-0123456789abcdef.{name}"
        directory.mkdir()
        (directory / "stream.bin").write_bytes(b"x")
        for path, hours in ((directory / "stream.bin", stream_hours), (directory, directory_hours)):
            os.utime(path, (now - 3600 * hours,) * 2)
    build(TEXTS, tmp_path)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == ["", ".new", ".slow"]


def test_documents_have_equal_hashes_where_their_texts_are_equal(tmp_path):
    one, other = build(["same", "same", "", "mine"], tmp_path), build(["yours", "same", ""], tmp_path)
    hashes = [dict(zip(contents(each), each.document_hashes().tolist(), strict=True)) for each in (one, other)]
    assert hashes[0].items() & hashes[1].items() == {(text, hashes[0][text]) for text in ("same", "")}
    assert len({*hashes[0].values(), *hashes[1].values()}) == 4
    assert len(set(one.document_hashes().tolist())) == 3


def test_a_cache_that_another_process_finished_first_is_used(tmp_path, monkeypatch):
    plain, raced = cache._write, []

    def write_while_another_process_builds(*arguments):
        plain(*arguments)
        if not raced:
            raced.append(True)
            build(TEXTS, tmp_path)

    monkeypatch.setattr(cache, "_write", write_while_another_process_builds)
    assert build(TEXTS, tmp_path).documents == len(TEXTS)
    assert len(list(tmp_path.iterdir())) == 1


def test_the_number_of_threads_changes_nothing(tmp_path):
    one, three = build(TEXTS, tmp_path / "1", workers=1), build(TEXTS, tmp_path / "3", workers=3)
    assert (one.stream == three.stream).all()


def test_progress_is_one_line_without_a_terminal_and_a_bar_on_demand(tmp_path, capsys):
    build(TEXTS, tmp_path / "a")
    assert capsys.readouterr().err == "tokens: encoding 61 documents\n"
    build(TEXTS, tmp_path / "b", progress=True)
    assert "tokens: encoding" not in capsys.readouterr().err


def test_the_manifest_counts_what_is_in_the_cache(tmp_path):
    built = build(TEXTS, tmp_path)
    (path,) = tmp_path.glob("tokens-*/manifest.json")
    manifest = json.loads(path.read_text())
    assert (manifest["documents"], manifest["tokens"]) == (built.documents, built.tokens)
    assert manifest["text_bytes"] == built.text_bytes


def test_an_empty_dataset_makes_an_empty_cache(tmp_path):
    built = cache.build(Dataset.from_dict({"text": []}), trained, tmp_path)
    assert (built.documents, built.tokens, built.text_bytes) == (0, 0, 0)
