"""The tokenizer is lossless and deterministic, and no text can spell a special token."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm3.data import tokenizer
from llm3.data.tokenizer import Tokenizer
from llm3.errors import UserError

TEXTS = [
    "the quick brown fox jumps over the lazy dog <|eos|> <|eos|>",
    "Ünïcödé 漢字 🙂 the the the",
    "x = [1, 2]\n\ty",
] * 5
SPECIAL_IDS = {0, 1, 2, 3}
trained = tokenizer.train(TEXTS, 330)


@given(st.text())
@settings(max_examples=300, deadline=None)
def test_any_text_survives_encoding_and_decoding(text):
    assert trained.decode(trained.encode(text)) == text


@given(st.text())
@settings(max_examples=200, deadline=None)
def test_byte_lengths_add_up_to_the_bytes_of_the_text(text):
    assert trained.byte_lengths[trained.encode(text)].sum() == len(text.encode())


@pytest.mark.parametrize("text", ["<|eos|>", "a<|bos|>b <|pad|><|mask|>", " <|eos|>\n"])
def test_a_text_that_spells_a_special_token_is_plain_text(text, tmp_path):
    trained.save(tmp_path / "tokenizer.json")
    for each in (trained, Tokenizer.load(tmp_path / "tokenizer.json")):
        assert not SPECIAL_IDS & set(each.encode(text))
        assert each.decode(each.encode(text)) == text


def test_special_tokens_have_the_first_ids_no_bytes_and_are_skipped_by_decode():
    assert (trained.pad_id, trained.bos_id, trained.eos_id, trained.mask_id) == (0, 1, 2, 3)
    assert trained.byte_lengths.dtype == np.int32
    assert trained.byte_lengths.shape == (trained.vocab_size,)
    assert not trained.byte_lengths[:4].any()
    assert trained.byte_lengths[4:].all()
    assert trained.decode([1, *trained.encode("fox"), 3, 2, 0]) == "fox"


def test_encoding_a_batch_equals_encoding_each_text():
    assert trained.encode_batch(TEXTS) == [trained.encode(text) for text in TEXTS]


def test_training_twice_gives_the_same_tokenizer_and_another_text_another():
    assert tokenizer.train(iter(TEXTS), 330).hash == trained.hash
    assert tokenizer.train([*TEXTS, "zzz zzz zzz"], 330).hash != trained.hash


def test_the_hash_does_not_depend_on_how_the_json_is_written(tmp_path):
    path = tmp_path / "tokenizer.json"
    trained.save(path)
    content = json.loads(path.read_text(encoding="utf-8"))
    content["model"]["vocab"] = dict(reversed(content["model"]["vocab"].items()))
    path.write_text(json.dumps(content, indent=2))
    assert Tokenizer.load(path).hash == trained.hash


def test_a_vocabulary_that_the_text_cannot_fill_stays_small():
    small = tokenizer.train(["ab ab ab"], 5000)
    assert 260 < small.vocab_size < 270
    assert small.decode(small.encode("quite other bytes: é")) == "quite other bytes: é"


def test_a_vocabulary_without_room_for_all_bytes_is_refused():
    with pytest.raises(UserError, match="at least 260"):
        tokenizer.train(TEXTS, 259)


def test_a_saved_tokenizer_loads_as_the_same_and_leaves_no_other_file(tmp_path):
    trained.save(tmp_path / "new folder" / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "new folder" / "tokenizer.json")
    assert loaded.hash == trained.hash
    assert loaded.encode(TEXTS[1]) == trained.encode(TEXTS[1])
    assert [path.name for path in (tmp_path / "new folder").iterdir()] == ["tokenizer.json"]


def test_a_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nothing\.json does not exist"):
        Tokenizer.load(tmp_path / "nothing.json")


def _without_specials(text):
    content = json.loads(text)
    content["added_tokens"] = []
    content["model"]["vocab"] = {token: i for i, token in enumerate(sorted(content["model"]["vocab"]))}
    return json.dumps(content)


@pytest.mark.parametrize("damage", [lambda text: text[:500], lambda text: "[]", lambda text: "", _without_specials])
def test_a_damaged_or_foreign_tokenizer_is_refused(damage, tmp_path):
    path = tmp_path / "tokenizer.json"
    trained.save(path)
    path.write_text(damage(path.read_text()))
    with pytest.raises(UserError, match="is not a tokenizer that llm3 wrote"):
        Tokenizer.load(path)
