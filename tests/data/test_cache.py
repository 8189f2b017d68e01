"""A token cache holds every document once, in an order by content, and is never read when it is damaged."""

import dataclasses
import functools
import hashlib
import itertools
import json
import os
import re
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm3.data import tokenizer
from llm3.data.cache import build as cache_build
from llm3.data.cache import cache, holds, progress
from llm3.data.formats import BadRow
from llm3.data.tokenizer import Tokenizer
from llm3.errors import UserError
from tests.helpers.tiny_records import TEXTS, ListRecords, contents, numbered, texts_in_parts, trained


def labelled(texts, labels):
    return tuple({"text": text, "labels": [label]} for text, label in zip(texts, labels, strict=True))


def build(texts, directory, row_labels=None, **options):
    records = texts_in_parts(texts)
    if row_labels:
        records = ListRecords((labelled(texts, row_labels),))
    return cache.build_cache(records, "text", trained, directory, **options)


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
    assert built.document(0).dtype == np.uint16
    assert [TEXTS[row] for row in built.rows] == contents(built)


def digest(content):
    return hashlib.sha256(content).digest()


@pytest.mark.parametrize("labels", [None, ["yes", "no"]])
def test_the_documents_of_one_part_are_in_the_order_of_their_digests(labels, tmp_path):
    texts = [*TEXTS, *TEXTS[:20], *TEXTS[:5], "", "中文", "é\n"]
    row_labels = [labels[i % 2] for i in range(len(texts))] if labels else None
    copies, expected = {}, []
    for row in zip(texts, row_labels or [""] * len(texts), strict=True):
        words = digest(json.dumps(list(row)).encode())
        copies[words] = copies.get(words, -1) + 1
        if copies[words]:
            words = digest(words + copies[words].to_bytes(8, "big"))
        expected.append((words[24:], words[16:24], words[8:16], words[:8], row))
    expected = [row for *_, row in sorted(expected)]
    built = build(texts, tmp_path, row_labels)
    found = [built.label_names[label] for label in built.labels] if labels else [""] * built.documents
    assert list(zip(contents(built), found, strict=True)) == expected


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
    monkeypatch.setattr(Tokenizer, "encode_batch", lambda *_: pytest.fail("encoded again"))
    monkeypatch.setattr(ListRecords, "read_part", lambda *_: pytest.fail("read again"))
    again = build(TEXTS, tmp_path)
    assert (again.read_tokens(0, again.tokens) == first.read_tokens(0, first.tokens)).all()
    assert isinstance(again.document(0).base.base, np.memmap)
    assert not again.document(0).flags.writeable


def test_the_fingerprint_depends_on_texts_labels_class_order_tokenizer_and_template(tmp_path):
    other = tokenizer.train(TEXTS, 290)
    labels = ["a", "b"] * 30
    prints = [
        build(TEXTS, tmp_path).fingerprint,
        build([*TEXTS[:-1], "changed"], tmp_path).fingerprint,
        build(TEXTS, tmp_path, labels).fingerprint,
        build(TEXTS, tmp_path, [*labels[1:], "b"]).fingerprint,
        build(TEXTS, tmp_path, labels, labels=["b", "a"]).fingerprint,
        build(TEXTS, tmp_path, template="{{ messages }}").fingerprint,
        cache.build_cache(texts_in_parts(TEXTS), "text", other, tmp_path).fingerprint,
    ]
    assert len(set(prints)) == len(prints)


def test_labels_follow_their_texts_and_classes_are_sorted_or_as_given(tmp_path):
    labels = [f"class {i % 3}" for i in range(len(TEXTS))]
    for names in (None, ["class 2", "class 9", "class 0", "class 1"]):
        built = build(TEXTS, tmp_path, labels, labels=names)
        assert list(built.label_names) == (names or ["class 0", "class 1", "class 2"])
        assert built.labels.dtype == np.int32
        assert built.label_sets is None
        found = {text: built.label_names[label] for text, label in zip(contents(built), built.labels, strict=True)}
        assert found == dict(zip(TEXTS, labels, strict=True))
    assert len(list(tmp_path.glob("tokens-*"))) == 1  # encoding does not depend on class names


def test_documents_of_an_unknown_class_are_unusable_rows_and_the_first_is_named(tmp_path, capsys):
    labels = ["cat", "catt", "dog", *["cat"] * 57]
    message = (
        r"source fake: 1 of 60 rows of its validation split have a class that its train split does not have, the "
        r"first: row 1 \(counted from 0\), class 'catt': did you mean 'cat'\? valid: cat, dog"
    )
    records = ListRecords((labelled(TEXTS, labels),), split="validation")
    build_labelled = functools.partial(cache.build_cache, records, "text", trained, tmp_path, labels=["dog", "cat"])
    with pytest.raises(UserError, match=message + "; more unusable rows than bad_rows=0.01"):
        build_labelled()
    built = build_labelled(max_bad_share=0.02)
    assert re.search(message, capsys.readouterr().err)
    assert built.bad == {"class is not in the train split": 1} and built.rows_read == 60
    assert sorted(contents(built)) == sorted([TEXTS[0], *TEXTS[2:]])
    assert built.class_counts() == {"cat": 58, "dog": 1}
    several = ListRecords((tuple(row | {"several": True} for row in records.batches[0]),), split="validation")
    built = cache.build_cache(several, "text", trained, tmp_path, labels=["dog", "cat"], max_bad_share=0.02)
    assert built.documents == 59 and built.label_sets == [[0], [1]]


NONE_OR_ONE = [("none", []), ("one", ["b"]), ("other", ["a"])]


@pytest.mark.parametrize("several", [True, None])
@pytest.mark.parametrize("rows", [NONE_OR_ONE, [("both", ["b", "a"]), ("one", ["b"]), ("same", ["a", "b"])]])
def test_documents_with_several_labels_or_none_have_sets_of_labels(rows, several, tmp_path):
    records = [{"text": text, "labels": labels, **({"several": True} if several else {})} for text, labels in rows]
    for names in (None, ["b", "x", "a"]):
        built = cache.build_cache(ListRecords((tuple(records),)), "text", trained, tmp_path, labels=names)
        assert built.label_sets == sorted(built.label_sets)
        assert len(built.label_sets) == len({tuple(sorted(labels)) for _, labels in rows})
        sets = [sorted(built.label_names[number] for number in built.label_sets[label]) for label in built.labels]
        assert dict(zip(contents(built), sets, strict=True)) == {text: sorted(labels) for text, labels in rows}


def test_a_multi_label_source_has_sets_even_if_each_document_has_one_label(tmp_path):
    rows = tuple({"text": str(i), "labels": ["ab"[i % 2]], "several": True} for i in range(4))
    built = cache.build_cache(ListRecords((rows,)), "text", trained, tmp_path, labels=["b", "a"])
    assert built.label_sets == [[0], [1]]
    assert [built.label_names[built.label_sets[k][0]] for k in built.labels] == [
        "ab"[int(text) % 2] for text in contents(built)
    ]


def _flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


TURNS = [[["user", f"how are you, {i}?"], ["assistant", f"well, {i * 7}"]] for i in range(20)]
DIALOGUES = tuple({"turns": turns, "references": [turns[1][1], "fine"]} for turns in TURNS)
FILES = ["answered.bin", "documents.npy", "note_ends.npy", "notes.jsonl", "shard.json", "stream.bin", "bad_rows.jsonl"]
JOINED = ["bad_rows.jsonl", "document_bytes.npy", "keys.npy", "labels.npy", "manifest.json", "offsets.npy", "rows.npy"]
EVERY_FILE = [f"shard-000000/{name}" for name in FILES] + JOINED


def build_dialogues(directory):
    records = ListRecords(((*DIALOGUES, BadRow("question is null", '{"question": null}')),))
    return cache.build_cache(records, "dialogue", trained, directory, max_bad_share=0.5)


@pytest.mark.parametrize("name", EVERY_FILE)
@pytest.mark.parametrize("damage", [_flip_a_byte, _halve, lambda path: path.unlink()])
def test_a_damaged_cache_is_rebuilt_with_a_warning(name, damage, tmp_path, capsys):
    build_dialogues(tmp_path)
    [directory] = tmp_path.iterdir()
    before = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    assert sorted(str(path.relative_to(directory)) for path in before) == sorted([*EVERY_FILE, holds.SOURCE])
    damage(directory / name)
    capsys.readouterr()
    build_dialogues(tmp_path)
    assert {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()} == before
    missing_manifest = name == "manifest.json" and not damage.__name__.startswith("_")
    assert missing_manifest or re.search(r"damaged .*rebuilding it", capsys.readouterr().err)


def test_only_the_file_sizes_of_a_large_cache_are_verified(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cache, "MAX_VERIFIED_BYTES", 1000)
    build(TEXTS, tmp_path)
    [stream] = tmp_path.glob("*/*/stream.bin")
    _flip_a_byte(stream)
    capsys.readouterr()
    build(TEXTS, tmp_path)
    assert not capsys.readouterr().err
    _halve(stream)
    assert sorted(contents(build(TEXTS, tmp_path))) == sorted(TEXTS)
    assert "damaged" in capsys.readouterr().err


def test_a_cache_that_stays_damaged_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_build.shards, "check_files", lambda *_, **__: (_ for _ in ()).throw(ValueError("worn")))
    with pytest.raises(UserError, match="damaged again"):
        build(TEXTS, tmp_path)


def test_answer_masks_and_notes_belong_to_their_documents(tmp_path):
    built = build_dialogues(tmp_path)
    for i in range(built.documents):
        turns = DIALOGUES[built.rows[i]]["turns"]
        assert trained.decode(built.document(i)[built.answer_mask(i)]) == turns[1][1]
        assert built.answer_mask(i).dtype == bool
        assert built.note(i) == {"references": [turns[1][1], "fine"]}
    plain = build(TEXTS, tmp_path)
    assert plain.answer_mask(3).all()
    assert len(plain.answer_mask(3)) == len(plain.document(3))
    assert plain.note(3) == {}
    assert not list(plain.reader._directory.rglob("answered.bin"))


def test_an_interrupted_build_leaves_no_incomplete_files_and_the_next_one_succeeds(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "encode_batch", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            build(TEXTS, tmp_path)
    assert not list(tmp_path.iterdir())
    assert sorted(contents(build(TEXTS, tmp_path))) == sorted(TEXTS)


def test_files_of_a_killed_build_are_removed_after_a_day_and_files_of_a_running_build_are_kept(tmp_path):
    now = time.time()
    for name, directory_hours, stream_hours in (("dead", 30, 30), ("slow", 30, 1), ("new", 1, 1)):
        directory = tmp_path / f"tokens-0123456789abcdef.{name}"
        shard = directory / "shard-000000"
        shard.mkdir(parents=True)
        (shard / "stream.bin").write_bytes(b"x")
        for path, hours in ((shard / "stream.bin", stream_hours), (shard, directory_hours), (directory, 30)):
            os.utime(path, (now - 3600 * hours,) * 2)
    build(TEXTS, tmp_path)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == ["", ".new", ".slow"]


def test_documents_have_equal_hashes_if_and_only_if_their_texts_are_equal(tmp_path):
    one, other = build(["same", "same", "", "mine"], tmp_path), build(["yours", "same", ""], tmp_path)
    hashes = [dict(zip(contents(each), each.document_hashes().tolist(), strict=True)) for each in (one, other)]
    assert hashes[0].items() & hashes[1].items() == {(text, hashes[0][text]) for text in ("same", "")}
    assert len({*hashes[0].values(), *hashes[1].values()}) == 4
    assert len(set(one.document_hashes().tolist())) == 3


def test_a_sample_has_the_documents_with_the_smallest_keys_however_the_source_is_cut(tmp_path):
    whole = build(TEXTS, tmp_path)
    for parts in ([TEXTS], [TEXTS[:13], [], TEXTS[13:50], TEXTS[50:]]):
        built = cache.build_cache(texts_in_parts(*parts), "text", trained, tmp_path)
        for documents in (0, 1, 7, len(TEXTS), 1000):
            assert contents(built.first(documents))[:documents] == (
                contents(whole)[:documents] if documents < len(TEXTS) else contents(built)
            )
    assert whole.first(7).fingerprint != whole.first(8).fingerprint
    assert whole.first(7).first(3).rows.tolist() == whole.rows[:3].tolist()


@pytest.fixture(scope="module")
def four_parts(tmp_path_factory):
    records = dataclasses.replace(numbered(4), batches=(*numbered(4).batches[:2], (), *numbered(4).batches[2:], ()))
    built = cache.build_cache(records, "text", trained, tmp_path_factory.mktemp("cache"))
    return built, np.concatenate([built.document(i) for i in range(built.documents)])


@settings(deadline=None, max_examples=80)
@given(data=st.data())
def test_any_range_of_the_stream_equals_the_documents_end_to_end(four_parts, data):
    built, _ = four_parts
    indices = data.draw(st.none() | st.lists(st.integers(0, built.documents - 1), max_size=12))
    chosen = built
    if indices is not None:
        chosen = built.subset(np.array(indices, np.int64))
        if data.draw(st.booleans()):
            chosen = chosen.first(data.draw(st.integers(0, 5)))
    pieces = [chosen.document(i) for i in range(chosen.documents)]
    stream = np.concatenate([*pieces, np.empty(0, np.uint16)])
    assert chosen.offsets.tolist() == [0, *np.cumsum([len(piece) for piece in pieces]).tolist()]
    assert chosen.tokens == len(stream)
    start, stop = data.draw(st.integers(0, len(stream) + 3)), data.draw(st.integers(0, len(stream) + 3))
    assert chosen.read_tokens(start, stop).tolist() == stream[start:stop].tolist()
    assert chosen.read_tokens(start, stop).dtype == np.uint16


def test_the_stream_of_all_parts_is_read_across_their_borders(four_parts):
    built, stream = four_parts
    assert (built.read_tokens(0, built.tokens) == stream).all()
    texts = [row["text"] for batch in numbered(4).batches for row in batch]
    assert [texts[row] for row in built.rows] == contents(built)
    for start in range(0, built.tokens, 7):
        assert (built.read_tokens(start, start + 300) == stream[start : start + 300]).all()


def test_an_index_out_of_range_is_an_error(four_parts):
    built, _ = four_parts
    for call in (built.document, built.note, lambda i: built.subset([i]), built.subset([0]).answer_mask):
        for index in (-1, built.documents):
            with pytest.raises(IndexError):
                call(index)


def test_progress_is_one_line_without_a_terminal_and_a_bar_on_demand(tmp_path, capsys):
    build(TEXTS, tmp_path / "a")
    assert capsys.readouterr().err == "tokens: encoding fake\n"
    cache.build_cache(numbered(3), "text", trained, tmp_path / "b")
    assert capsys.readouterr().err == "tokens: encoding fake: 3 of 3 parts\n"
    build(TEXTS, tmp_path / "c", progress=True)
    assert "tokens: encoding fake\n" not in capsys.readouterr().err


@pytest.mark.parametrize("workers", [1, 2])
def test_progress_counts_the_documents_and_bytes_of_all_processes(workers, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0)
    built = cache.build_cache(numbered(3), "text", trained, tmp_path, workers=workers)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"tokens: encoding fake: 3 of 3 parts: {built.documents} documents, {built.text_bytes / 1e6:.1f} MB"


def test_the_manifest_counts_documents_tokens_bytes_and_rows(tmp_path):
    built = build(TEXTS, tmp_path)
    (path,) = tmp_path.glob("tokens-*/manifest.json")
    manifest = json.loads(path.read_text())
    assert (manifest["documents"], manifest["tokens"]) == (built.documents, built.tokens)
    assert manifest["text_bytes"] == built.text_bytes
    assert manifest["rows_read"] == built.rows_read == len(TEXTS)


@pytest.mark.parametrize("batches", [[], [[]], [[], []]])
def test_a_source_without_documents_is_an_error_that_names_it(batches, tmp_path):
    with pytest.raises(UserError, match=r"source fake: .*no rows"):
        cache.build_cache(texts_in_parts(*batches), "text", trained, tmp_path)
