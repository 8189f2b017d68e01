"""The text of an answer while it is made, and the part of each of its tokens."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm3.data.prompts import Prompt
from llm3.models.decoding import Scores
from llm3.serve.choices import Given, _Choice
from llm3.serve.engine import Update
from llm3.serve.text import INCOMPLETE, TextStream, TokenTexts, token_name
from tests.helpers.tiny_export import tokenizer
from tests.helpers.tiny_foreign import foreign

texts = st.lists(st.sampled_from(["漢字", "🙂", "é", "fox", " ", "a", "数学", "\n"]), min_size=1, max_size=12).map(
    "".join
)
STOPS = ["字🙂", "ox ", "aaa"]


def streamed(tokens: list[int], steps: list[int], stops: list[str]) -> tuple[list[str], TextStream]:
    stream, parts, made = TextStream(tokenizer().decode, stops), [], 0
    while made < len(tokens):
        made = min(len(tokens), made + steps[made % len(steps)])
        parts.append(stream.add(tokens[:made], made == len(tokens)))
    return parts, stream


@given(texts, st.lists(st.integers(1, 4), min_size=1, max_size=5))
@settings(max_examples=50, deadline=None)
def test_a_stream_has_whole_characters_only_and_nothing_of_a_stop(text, steps):
    parts, stream = streamed(tokenizer().encode(text), steps, STOPS)
    places = [place for stop in STOPS if (place := text.find(stop)) >= 0]
    assert "".join(parts) == text[: min(places, default=len(text))]
    assert INCOMPLETE not in "".join(parts) and stream.ended == bool(places)


@given(texts, st.lists(st.integers(1, 4), min_size=1, max_size=5))
@settings(max_examples=50, deadline=None)
def test_each_character_belongs_to_the_token_that_completes_it(text, steps):
    tokens, found = tokenizer().encode(text), TokenTexts(tokenizer())
    parts = [part for token in tokens for part in found.add([token])]
    assert "".join(parts) == text
    written = [tokenizer().token_bytes[token] for token in tokens]
    for place in range(len(tokens) + 1):
        assert "".join(parts[:place]) == b"".join(written[:place]).decode(errors="ignore")


@pytest.mark.parametrize("kind", ["gemma", "llama2", "unigram", "qwen"])
def test_the_parts_of_tokens_of_others_join_to_what_they_add_to_a_text(kind):
    own = foreign(kind)
    before, tokens = own.encode("The quick"), own.encode(" brown fox, naïve 漢字 cat.")
    parts = TokenTexts(own, before).add(tokens, complete=True)
    assert "".join(parts) == own.continuation(before, tokens)
    assert sum(map(bool, parts)) > len(parts) // 3


def test_incomplete_characters_are_named_by_their_bytes():
    tokens = tokenizer().encode("🙂")
    assert len(tokens) > 1
    assert "".join(token_name(tokenizer(), each) for each in tokens).replace("bytes:", "") == r"\xf0\x9f\x99\x82"
    assert token_name(tokenizer(), tokenizer().eos_id) == "<|eos|>"
    assert token_name(tokenizer(), tokenizer().encode("fox")[0]) == "fox"


@given(texts, st.lists(st.integers(1, 4), min_size=1, max_size=5))
@settings(max_examples=50, deadline=None)
def test_the_tokens_of_a_stream_are_those_of_the_whole_answer_in_their_places(text, steps):
    tokens = tokenizer().encode(text)
    for stops in ([], STOPS):
        streams = [_parts(tokens, each, stops) for each in (steps, [len(tokens)])]
        joined = [[token for part in parts for token in part.tokens] for parts in streams]
        whole = "".join(part.text for part in streams[1])
        assert joined[0] == joined[1] and "".join(part.text for part in streams[0]) == whole
        assert [each.token for each in joined[0]] == tokens[: len(joined[0])]
        assert [each.logprob for each in joined[0]] == [-float(n) for n in range(len(joined[0]))]
        assert all(whole[: each.offset] == text[: each.offset] for each in joined[0])


def _scores(count: int) -> Scores:
    return Scores(-np.arange(count), np.zeros((count, 1), int), np.zeros((count, 1)))


def _parts(tokens: list[int], steps: list[int], stops: list[str]) -> list:
    """The parts of a choice, as the engine's updates make them."""
    choice = _Choice(0, tokenizer(), Given(Prompt([1], [], False, "")))
    stream, made, parts = TextStream(tokenizer().decode, stops), 0, []
    while made < len(tokens) and not stream.ended:
        made = min(len(tokens), made + steps[made % len(steps)])
        now, text = tokens[:made], stream.add(tokens[:made], made == len(tokens))
        now = now[: stream.covered(now)] if stream.ended else now
        finish = "stop" if stream.ended else "length" if made == len(tokens) else ""
        parts.append(choice.add(Update(text, now, _scores(len(now)), finish)))
    return parts
