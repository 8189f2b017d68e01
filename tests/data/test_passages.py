"""The passages that documents share, and the training documents to leave out, by definition."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from llm3.data.passages import find_overlapping, find_passages
from tests.helpers.tiny_tokens import BOS, EOS, TokensInMemory

texts = st.lists(st.lists(st.integers(3, 5), max_size=9), max_size=8)


def cache_of(texts, **options):
    return TokensInMemory([[BOS, *text, EOS] for text in texts], **options)


def grams(text, n):
    return {tuple(text[i : i + n]) for i in range(len(text) - n + 1)}


@given(evaluation=texts, training=st.lists(texts, max_size=2), n=st.integers(1, 6))
@settings(max_examples=100, deadline=None)
def test_documents_to_leave_out_share_an_ngram_or_are_copies(evaluation, training, n):
    found = find_overlapping(cache_of(evaluation), {str(i): cache_of(each) for i, each in enumerate(training)}, n)
    wanted = set().union(*(grams(text, n) for text in evaluation))
    for number, each in enumerate(training):
        expected = [i for i, text in enumerate(each) if grams(text, n) & wanted or (text and text in evaluation)]
        assert found.documents[str(number)].tolist() == expected
    every = [text for each in training for text in each]
    inside = [
        t for t in evaluation if 0 < len(t) < n and t not in every and any(tuple(t) in grams(o, len(t)) for o in every)
    ]
    assert found.kept == len(inside)


def test_the_longest_passage_is_found_in_the_document_that_shares_most():
    passage = list(range(100, 120))
    evaluation = cache_of([[1] * 30, [7, 8, *passage, 9], list(range(200, 230))])
    training = {
        "a": cache_of([passage[:15], [3, *passage, 4, 5]]),
        "b": cache_of([[*passage[:14], 3, *range(210, 224), 5]]),
    }
    first, second = find_passages(evaluation, training, most=5, n=13)
    assert first == (1, np.float64(8 / 11), "a", 1, 2, 1, 20)
    assert second[:1] + second[2:] == (2, "b", 0, 10, 15, 14)
    assert find_passages(evaluation, training, most=1, n=13) == [first]


def test_a_short_document_is_a_passage_of_its_own_length():
    (found,) = find_passages(cache_of([[50, 51]]), {"a": cache_of([[9, 50, 51, 9]])}, most=3)
    assert found == (0, 1.0, "a", 0, 0, 1, 2)
