"""Tokenizers of others: every kind is read with its special tokens, no text spells one, and no byte is uncounted."""

import json
import shutil

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend

from llm3.config.data_schema import TokenizerConfig
from llm3.data.formats import text as text_format
from llm3.data.special_tokens import find_specials
from llm3.data.tokenizer import Tokenizer
from llm3.errors import UserError
from llm3.stages.model import planned_size
from tests.helpers import tiny_foreign
from tests.helpers.tiny_foreign import KINDS, foreign

each_kind = pytest.mark.parametrize("kind", KINDS)
SPELLED = sorted({token for kind in KINDS for token in foreign(kind).specials})
AROUND = st.sampled_from([*SPELLED, "\U00100000", "\U00100001", "\U0010ff01", " ", "The", "漢", "▁", "##", "<0x41>"])
SPELLING = st.lists(st.one_of(AROUND, st.text(max_size=4)), max_size=6).map("".join)
NAMES = {  # bos, eos, mask, ends
    "qwen": (None, "<|im_end|>", None, ["<|im_end|>", "<|endoftext|>"]),
    "llama3": ("<|begin_of_text|>", "<|eot_id|>", None, ["<|eot_id|>", "<|end_of_text|>"]),
    "gemma": ("<bos>", "<eos>", "<mask>", ["<eos>", "<end_of_turn>"]),
    "llama2": ("<s>", "</s>", None, ["</s>"]),
    "unigram": ("<s>", "</s>", "<mask>", ["</s>"]),
    "bert": ("[CLS]", "[SEP]", "[MASK]", ["[SEP]"]),
}


@each_kind
def test_the_special_tokens_of_a_folder_are_found(kind):
    found = foreign(kind)
    named = [None if i is None else found.tokens[i] for i in (found.bos_id, found.eos_id, found.mask_id)]
    assert (*named, [found.tokens[i] for i in found.end_ids]) == NAMES[kind]
    assert found.starts == ([] if kind == "qwen" else [found.bos_id])
    assert found.prefix_id == (found.eos_id if kind == "qwen" else found.bos_id)
    assert found.lossless == (kind == "llama3")


@each_kind
@settings(max_examples=60, deadline=None)
@given(text=SPELLING)
def test_no_text_spells_a_special_token(kind, text):
    found = foreign(kind)
    special = set(found.specials.values()) - set(np.flatnonzero(found.is_text).tolist())
    assert not special & set(found.encode(text))
    assert not special & set(found.encode_spans([text]).ids)


@each_kind
@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs", "Co"]), max_size=20))
def test_a_text_has_the_tokens_that_the_tokenizers_library_gives_it(kind, text):
    assume(not any(token in text for token in SPELLED))
    assert foreign(kind).encode(text) == library(kind).encode(text, add_special_tokens=False).ids


def library(kind, cache={}):  # noqa: B006 - a cache
    if kind not in cache:
        cache[kind] = Backend.from_str(foreign(kind).files()["tokenizer.json"])
        cache[kind].no_truncation()
        cache[kind].no_padding()
    return cache[kind]


@each_kind
@settings(max_examples=60, deadline=None)
@given(text=SPELLING.filter(str.strip))
def test_the_bytes_of_a_document_are_those_of_its_text_but_for_a_first_token_that_nothing_predicts(kind, text):
    found, document = foreign(kind), text_format.encode({"text": text}, foreign(kind), "")
    assert document.tokens.tolist() == [*found.starts, *found.encode(text), found.eos_id]
    size = len(text.encode())
    if found.starts:
        assert document.text_bytes == size
    else:
        end = found.encode_spans([text]).ends[0]
        covered = len(text[:end].encode())
        first = found.token_bytes[document.tokens[0]]
        assert size - document.text_bytes in (covered, len(first) if text.encode().startswith(first) else covered)


@settings(max_examples=60, deadline=None)
@given(text=SPELLING)
def test_a_lossless_tokenizer_of_others_gives_any_text_back(text):
    found = foreign("llama3")
    assert found.decode(found.encode(text)) == text
    assert found.byte_lengths[found.encode(text)].sum() == len(text.encode())


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        ("qwen", "cafe\u0301 <|im_end|>", "café <|im_end|>"),
        ("gemma", "The dog\n漢🙂", "The dog\n漢🙂"),
        ("unigram", "the ﬁsh is </s>", "the fish is s"),
        ("bert", "The FOX isn't  [MASK] é", "the fox isn't mask e"),
    ],
)
def test_what_a_normalizer_changes_stays_changed_and_special_tokens_are_not_decoded(kind, text, expected):
    found = foreign(kind)
    ids = [*found.starts, *found.encode(text), *found.end_ids]
    assert found.decode(ids).replace(" ' ", "'") == expected


@each_kind
def test_the_saved_file_alone_holds_ids_template_and_files(kind, tmp_path):
    found = Tokenizer.load(KINDS[kind](tmp_path / "folder"))
    found.save(tmp_path / "tokenizer.json")
    again = Tokenizer.load(tmp_path / "tokenizer.json")
    for name in ("pad_id", "bos_id", "eos_id", "mask_id", "end_ids", "vocab_size", "hash", "chat_template", "specials"):
        assert getattr(again, name) == getattr(found, name), name
    assert again.encode("The fox") == found.encode("The fox") and again.files() == found.files()
    shutil.copytree(tmp_path / "folder", tmp_path / "copy")
    assert found.hash == Tokenizer.load(tmp_path / "copy" / "tokenizer.json").hash


@each_kind
def test_an_export_has_the_files_as_they_came_and_what_was_added(kind, tmp_path):
    folder = KINDS[kind](tmp_path)
    files = Tokenizer.load(folder).extended(["ibuprofen"]).files()
    assert set(files) == {path.name for path in folder.iterdir()} - {"generation_config.json", "config.json"}
    came, written = (
        json.loads(each) for each in ((folder / "tokenizer.json").read_text(), files.pop("tokenizer.json"))
    )
    *old, new = written["added_tokens"]
    assert written | {"added_tokens": old} == came and new["content"] == "ibuprofen"
    assert all((folder / name).read_text() == text for name, text in files.items())
    library = Backend.from_str(json.dumps(written))
    assert library.token_to_id("ibuprofen") == foreign(kind).vocab_size


def test_the_hash_covers_the_special_tokens_and_not_the_rest_of_the_config(tmp_path):
    folder = tiny_foreign.qwen(tmp_path)
    one, file = Tokenizer.load(folder), folder / "tokenizer_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"name_or_path": "elsewhere"}))
    assert Tokenizer.load(folder).hash == one.hash
    file.write_text(json.dumps(config | {"eos_token": "<|endoftext|>"}))
    assert Tokenizer.load(folder).hash != one.hash
    assert Tokenizer.load(folder, {"eos": "<|im_end|>"}).hash == one.hash


@each_kind
def test_added_tokens_get_the_next_ids_and_can_be_removed(kind, tmp_path):
    found, new = foreign(kind), ["ibuprofen", "β-blocker"]
    more = found.extended(new)
    for place, token in enumerate(new):
        ids = more.encode(f"the {token}")
        assert ids[-1] == found.vocab_size + place and token in more.decode(ids)
    assert more.encode("the dog") == found.encode("the dog") and more.end_ids == found.end_ids
    assert more.hash != found.hash == more.without(new).hash
    with pytest.raises(UserError, match=r"tokenizer\.add\[0\]=.*already a special token"):
        found.extended([found.tokens[found.eos_id]])


def test_the_planned_vocabulary_is_that_of_the_folder_and_new_tokens(tmp_path):
    folder = tiny_foreign.bert(tmp_path)
    assert planned_size(TokenizerConfig(path=str(folder), add=["x1", "x2"])) == foreign("bert").vocab_size + 2


IDS = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": 4, "<end>": 5}
AROUND_TEXT = {"type": "RobertaProcessing", "cls": ["<s>", 0], "sep": ["</s>", 2]}


@pytest.mark.parametrize(
    ("files", "processor", "expected"),
    [
        ({"tokenizer_config.json": {"model_max_length": 8}, "config.json": {"bos_token_id": 5, "eos_token_id": 5}},
         None, (5, 5, 5, 4, (5,))),  # GPT-2: only the model's config names them
        ({"tokenizer_config.json": {}}, AROUND_TEXT, (2, 0, 2, 4, (2,))),  # BERT: only the post-processor does
        ({"tokenizer_config.json": {"eos_token": "</s>"}, "config.json": {"bos_token_id": 5, "pad_token_id": -1}},
         None, (2, None, 2, 4, (2,))),  # Qwen: a tokenizer that names an end and no beginning has none
        ({"tokenizer_config.json": {"cls_token": "<s>", "sep_token": "</s>", "pad_token": "<pad>", "mask_token": None}},
         None, (1, 0, 2, None, (2,))),
        ({"special_tokens_map.json": {"bos_token": {"content": "<s>"}, "eos_token": "</s>"},
          "generation_config.json": {"eos_token_id": [5, 2, 99]}, "config.json": {"pad_token_id": 1}},
         None, (1, 0, 2, 4, (2, 5))),
    ],
)  # fmt: skip
def test_special_tokens_come_from_the_first_file_that_names_them(files, processor, expected):
    assert find_specials(files, {"post_processor": processor}, IDS, {}, "x") == expected


def test_the_config_names_special_tokens_where_no_file_does_and_before_all_files(tmp_path):
    folder = tiny_foreign.llama3(tmp_path)
    given = {"bos": "", "eos": "<|end_of_text|>", "mask": "<|start_header_id|>", "ends": ["<|eot_id|>"]}
    found = Tokenizer.load(folder, given)
    names = [found.tokens[i] for i in (found.eos_id, found.need_mask(), *found.end_ids)]
    assert found.bos_id is None and names == [given["eos"], given["mask"], given["eos"], "<|eot_id|>"]
    for name in ("tokenizer_config.json", "generation_config.json"):
        (folder / name).unlink()
    with pytest.raises(UserError, match=r"nothing names the token that ends a text: .*tokenizer\.special=dict\(eos"):
        Tokenizer.load(folder / "tokenizer.json")
    assert Tokenizer.load(folder / "tokenizer.json", {"eos": "<|eot_id|>"}).bos_id == foreign("llama3").bos_id


@pytest.mark.parametrize(
    ("special", "message"),
    [
        (
            {"eos": "<|eot|>"},
            r"tokenizer\.special\.eos='<\|eot\|>': the vocabulary has no such token; did you mean",
        ),
        ({"eso": "<|eot_id|>"}, r"tokenizer\.special\.eso: no such field; did you mean 'eos'"),
    ],
)
def test_a_special_token_that_is_not_there_is_refused_with_the_nearest(special, message, tmp_path):
    with pytest.raises(UserError, match=message):
        Tokenizer.load(tiny_foreign.llama3(tmp_path), special)
    with pytest.raises(UserError, match=r"needs tokenizer\.path"):
        TokenizerConfig(special={"eos": "x"})


@pytest.mark.parametrize("name", ["spiece.model", "tokenizer.model", "vocab.txt", "vocab.json", "tokenizer.pkl"])
def test_a_folder_with_another_format_only_is_refused_with_the_way_to_convert(name, tmp_path):
    (tmp_path / name).write_bytes(b"\x80\x04x")
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(UserError, match=rf"{name}.*convert it once: python -c .*save_pretrained"):
            Tokenizer.load(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", '{"model": ', "cannot be read as a tokenizer.json"),
        ("tokenizer.json", '{"model": {"type": "New"}}', "cannot be read as a tokenizer.json"),
        ("tokenizer.json", "[]", "cannot be read as a tokenizer.json"),
        ("tokenizer_config.json", "{", "tokenizer_config.json cannot be read"),
        ("generation_config.json", "[1]", "it holds no JSON object"),
    ],
)
def test_a_damaged_file_is_named(name, content, message, tmp_path):
    folder = tiny_foreign.qwen(tmp_path)
    (folder / name).write_text(content)
    with pytest.raises(UserError, match=message):
        Tokenizer.load(folder)


def test_a_path_with_nothing_there_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"tokenizer\.json does not exist"):
        Tokenizer.load(tmp_path)
