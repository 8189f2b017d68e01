"""The tokenizer is lossless and deterministic, and no text can spell a special token."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm3.config.data_schema import TokenizerConfig
from llm3.data import tokenizer
from llm3.data.tokenizer import Tokenizer
from llm3.errors import UserError
from llm3.stages.model import planned_size

TEXTS = [
    "the quick brown fox jumps over the lazy dog <|eos|> <|eos|>",
    "Ünïcödé 漢字 🙂 the the the",
    "x = [1, 2]\n\ty",
] * 5
SPECIAL_IDS = {0, 1, 2, 3}
trained = tokenizer.train(TEXTS, 330)
# "naïve" and "Ġx" are made of characters that a byte-level vocabulary uses for single bytes
ADDED = [
    "acetaminophen",
    "naïve",
    "漢字漢",
    " lead",
    "trail\n",
    "<x>",
    "acetamin",
    "Ġx",
    "ion",
    "\r\n\r\n",
    "🙂🙂",
    "\u0301é",
]
extended = trained.extended(ADDED)
texts_with_added = st.lists(st.one_of(st.sampled_from(ADDED), st.text(max_size=8), st.sampled_from(" sX9é<"))).map(
    "".join
)


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


def test_training_twice_gives_the_same_tokenizer_and_other_texts_a_different_one():
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


def test_a_missing_tokenizer_is_an_error_that_names_the_file(tmp_path):
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
    with pytest.raises(UserError, match=r"cannot be read as a tokenizer\.json|nothing names the token that ends"):
        Tokenizer.load(path)


@given(texts_with_added)
@settings(max_examples=400, deadline=None)
def test_any_text_around_added_tokens_survives_and_its_bytes_are_counted(text):
    ids = extended.encode(text)
    assert extended.decode(ids) == text
    assert extended.byte_lengths[ids].sum() == len(text.encode())


@given(st.lists(st.integers(0, trained.vocab_size - 1), max_size=12))
@settings(max_examples=300, deadline=None)
def test_any_ids_decode_as_the_tokenizers_library_decodes_them(ids):
    assert trained.decode(ids) == trained._backend.decode(ids, skip_special_tokens=True)


def test_added_tokens_have_the_next_ids_in_the_given_order_and_the_old_ones_keep_theirs():
    assert extended.vocab_size == trained.vocab_size + len(ADDED)
    for place, token in enumerate(ADDED):
        assert extended.encode(token) == [trained.vocab_size + place]
        assert extended.byte_lengths[trained.vocab_size + place] == len(token.encode())
    np.testing.assert_array_equal(extended.byte_lengths[: trained.vocab_size], trained.byte_lengths)
    untouched = "the quick brown fox <|eos|> x = [1, 2]"
    assert extended.encode(untouched) == trained.encode(untouched)


def test_a_word_is_found_as_a_whole_word_and_the_longest_of_several_is():
    first, _, _, lead, *_, ion = range(trained.vocab_size, trained.vocab_size + ADDED.index("ion") + 1)
    assert extended.encode("(acetaminophen)")[1:-1] == [first]
    assert extended.encode("acetaminophen-acetaminophen").count(first) == 2
    assert first not in extended.encode("acetaminophens") and ion not in extended.encode("lions, million, 3ion")
    assert lead in extended.encode("mis leading")  # a token that does not begin with a letter matches anywhere
    assert trained.vocab_size + ADDED.index("漢字漢") in extended.encode("此漢字漢此")


def test_an_extended_tokenizer_can_be_saved_extended_again_and_reduced_to_the_original(tmp_path):
    extended.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    text = "naïve acetaminophen"
    assert loaded.hash == extended.hash != trained.hash
    assert loaded.encode(text) == extended.encode(text) and loaded.decode(loaded.encode(text)) == text
    again = loaded.extended(["ibuprofen"])
    assert again.encode("ibuprofen") == [extended.vocab_size]
    assert again.without(["ibuprofen"]).hash == extended.hash
    assert again.without([*ADDED, "ibuprofen"]).hash == trained.extended([]).hash == trained.hash
    assert trained.extended(ADDED).hash == extended.hash != trained.extended(ADDED[::-1]).hash


@pytest.mark.parametrize("tokens", [["aspirin"], [*ADDED, "aspirin"], [*ADDED[1:], ADDED[0]], ["<|mask|>", *ADDED]])
def test_only_the_last_tokens_can_be_removed(tokens):
    with pytest.raises(UserError, match=r"tokenizer\.add=.*the last tokens of the vocabulary are"):
        extended.without(tokens)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (["aspirin", ""], r"tokenizer\.add\[1\]='': expected at least one character"),
        (["aspirin", "ibuprofen", "aspirin"], r"\[2\]='aspirin': named twice"),
        (["<|eos|>"], r"'<\|eos\|>': already a special token \(id 2\)"),
        (["e"], "'e': already a token of the vocabulary"),
        ([" "], "' ': already a token of the vocabulary"),
        ([" the"], "' the': already a token of the vocabulary"),  # as "Ġthe"
        (["Ġthe"], "'Ġthe': already a token of the vocabulary"),  # the library would take it for " the"
        (["a\ud800"], "not a valid Unicode text"),
    ],
)
def test_a_token_that_cannot_be_added_is_refused(tokens, message):
    with pytest.raises(UserError, match=message):
        trained.extended(tokens)


def test_a_token_that_an_earlier_extension_added_is_refused():
    with pytest.raises(UserError, match=f"'naïve': already a token of the vocabulary .id {trained.vocab_size + 1}"):
        extended.extended(["naïve"])


def test_a_tokenizer_whose_added_tokens_also_match_spaces_is_refused(tmp_path):
    content = json.loads(extended._json)
    content["added_tokens"][-1]["lstrip"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="also matches the spaces around it"):
        Tokenizer.load(tmp_path / "tokenizer.json")


def test_the_planned_vocabulary_is_that_of_the_file_as_soon_as_it_exists(tmp_path):
    config = TokenizerConfig(vocab_size=4096, path=str(tmp_path / "tokenizer.json"), add=["acetaminophen"])
    assert planned_size(config) == 4097
    trained.save(tmp_path / "tokenizer.json")
    assert planned_size(config) == trained.extended(config.add).vocab_size == trained.vocab_size + 1
