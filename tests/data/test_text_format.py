"""Running text and pairs become tokens and back, in any script, without loss."""

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm3.config.data_schema import SourceConfig
from llm3.data import tokenizer
from llm3.data.formats import BadRow, text
from llm3.data.sources import split as sources

FIXTURES = Path(__file__).parent / "fixtures"
SCRIPTS = (
    "中文没有空格。词与词之间不分开。混合 mixed 文字",
    "👩‍👩‍👧‍👦 🏳️‍🌈 🇺🇳 emoji",
    "e\u0301 n\u0303 Z̷̢͎a̴l̶g̸o combining, NFC é",
    "def f(x):\n\treturn {**x, 'a': [1]}  # code\r\n",
    "עברית العَرَبِيَّة \u202eright to left",
    "ไทยไม่มีช่องว่าง हिन्दी 한국어 ひらがな",
    "<|bos|><|eos|><|pad|> \x00 \u2028 \ufeff \U0010ffff",
)


@pytest.fixture(scope="module")
def trained():
    return tokenizer.train(SCRIPTS[:3], 400)


def record_of(row, **fields):
    return text.read_row(row, SourceConfig("x", **fields))


def test_a_text_may_be_a_template_over_columns():
    row = {"title": "A {curly} name", "body": "text"}
    assert record_of(row, text="# {title}\n\n{body}") == {"text": "# A {curly} name\n\ntext"}


@pytest.mark.parametrize(
    ("label", "names"),
    [("yes", ["yes"]), (3, ["3"]), (True, ["true"]), (["b", "a", "b", 2], ["2", "a", "b"]), ([], []), ("[a]", ["[a]"])],
)
def test_labels_become_names_and_a_list_of_labels_is_several(label, names):
    record = record_of({"text": "x", "kind": label}, label="kind")
    assert record == {"text": "x", "labels": names} | ({"several": True} if isinstance(label, list) else {})
    if isinstance(label, list):
        assert record_of({"text": "x", "kind": json.dumps(label)}, label="kind") == record


def test_a_tag_is_the_one_label_of_a_row():
    assert record_of({"text": "x", "site": "wiki"}, tag="site") == {"text": "x", "labels": ["wiki"]}


@pytest.mark.parametrize(
    ("label", "fields", "reason"),
    [
        (None, dict(label="kind"), "kind is null"),
        ("", dict(label="kind"), "kind is empty"),
        (["a", None], dict(label="kind"), "kind holds a null"),
        (1.5, dict(label="kind"), "kind is of type float, not a class name"),
        ("\ud800", dict(label="kind"), "kind is not valid Unicode"),
        ({}, dict(label="kind"), "kind is of type dict, not a class name"),
        (["a"], dict(tag="kind"), "kind is of type list, not a class name"),
        (5, dict(pair="kind"), "kind is of type int, not a text"),
        ("", dict(pair="kind"), "kind is empty"),
        ("x", dict(pair="other"), "no field 'other'"),
    ],
)
def test_a_label_or_pair_that_cannot_be_used_is_a_bad_row(label, fields, reason):
    with pytest.raises(BadRow) as error:
        record_of({"text": "x", "kind": label}, **fields)
    assert str(error.value) == reason


def test_a_text_stands_between_bos_and_eos_and_each_text_of_a_pair_has_its_own_end(trained):
    bos, eos = trained.bos_id, trained.eos_id
    document = text.encode({"text": "né", "labels": ["a", "b"]}, trained, "")
    assert document.tokens.tolist() == [bos, *trained.encode("né"), eos]
    assert (document.text_bytes, document.labels, document.answer_mask) == (3, ("a", "b"), None)
    pair = text.encode({"text": "né", "pair": "ab"}, trained, "")
    assert pair.tokens.tolist() == [bos, *trained.encode("né"), eos, *trained.encode("ab"), eos]
    assert (pair.text_bytes, pair.labels, pair.tokens.dtype) == (5, (), "int32")
    assert text.texts({"text": "né", "pair": "ab"}) == ["né", "ab"]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.one_of(st.text(max_size=60), st.sampled_from(SCRIPTS)), max_size=20), st.booleans())
def test_decoded_bytes_equal_the_bytes_of_the_text_in_any_script(trained, texts, escaped):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.jsonl")
        rows = [json.dumps({"text": each}, ensure_ascii=escaped) for each in ["first", *texts]]
        path.write_bytes("\n".join(rows).encode())
        records = sources.open_split(SourceConfig("json", data_files=str(path)), "train", cache_dir=Path(folder))
        read = [(number, record) for part in records.parts() for number, record in records.read_part(part)]
    assert [number for number, _ in read] == list(range(len(rows)))
    for (_, record), expected in zip(read, ["first", *texts], strict=True):
        if isinstance(record, BadRow):
            assert str(record) == "text is empty"
            assert not expected.strip()
        else:
            document = text.encode(record, trained, "")
            assert trained.decode(document.tokens).encode() == expected.encode()
            assert document.text_bytes == len(expected.encode())
            assert document.tokens.max() < trained.vocab_size


def test_a_chinese_corpus_has_sensible_bytes_per_token_with_and_without_spaces():
    folder = FIXTURES / "reading/cmrc2018"
    files = {split: str(folder / f"{split}.jsonl") for split in ("train", "test")}
    source = SourceConfig("json", data_files=files, text="context")
    with tempfile.TemporaryDirectory() as cache:
        train, test = (
            list(dict.fromkeys(sources.open_split(source, split, cache_dir=Path(cache)).texts()))
            for split in ("train", "test")
        )
    trained = tokenizer.train(train, 4096)
    for texts in (test, ["".join(each.split()) for each in test]):
        tokens = sum(len(ids) for ids in trained.encode_batch(texts))
        assert sum(len(each.encode()) for each in texts) / tokens >= 2.5  # a character has 3 bytes; measured: 2.73
    words = [piece for piece in map(trained.decode, ([i] for i in range(trained.vocab_size))) if "中" in piece]
    assert any(len(word) > 1 for word in words)
