"""N-grams that an evaluation shares with the training data are found, and no others, wherever they lie."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm3.data import contamination
from llm3.data.contamination import Contamination, contamination_sentence, find_contamination, ngrams_found
from llm3.errors import UserError
from tests.helpers.tiny_tokens import BOS, EOS, TokensInMemory, make_documents

# Few different tokens, so that n-grams coincide by chance, and texts of all lengths around n.
texts = st.lists(st.lists(st.integers(3, 5), max_size=9), max_size=8)


def cache_of(texts, **options):
    return TokensInMemory([[BOS, *text, EOS] for text in texts], **options)


def by_definition(evaluation, training, n):
    """(number of n-grams, number of n-grams in the training data) of each text, by sets of tuples."""

    def grams(text, size):
        return [tuple(text[i : i + size]) for i in range(len(text) - size + 1)] if size else []

    counts = []
    for text in evaluation:
        size = min(n, len(text))
        known = set(itertools.chain.from_iterable(grams(other, size) for other in itertools.chain(*training)))
        wanted = grams(text, size)
        counts.append((len(wanted), sum(gram in known for gram in wanted)))
    return counts


@pytest.mark.parametrize("chunk", [1, 7, 1 << 16])
@given(evaluation=texts, training=st.lists(texts, max_size=2), n=st.integers(1, 6))
@settings(max_examples=100, deadline=None)
def test_shared_ngrams_follow_the_definition_for_any_chunk_size(chunk, evaluation, training, n):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contamination, "CHUNK", chunk)
        grams, found = ngrams_found(cache_of(evaluation), [cache_of(each) for each in training], n)
    assert list(zip(grams.tolist(), found.tolist(), strict=True)) == by_definition(evaluation, training, n)


@given(evaluation=texts, training=st.lists(texts, max_size=2))
@settings(max_examples=100, deadline=None)
def test_contamination_counts_documents_by_the_share_of_their_ngrams(evaluation, training):
    rows = [100 + i for i in range(len(evaluation))]
    found = find_contamination(cache_of(evaluation, rows=rows), [cache_of(each) for each in training], n=4)
    counts = by_definition(evaluation, training, 4)
    shares = [part / total if total else 0 for total, part in counts]
    assert found.documents == sum(map(bool, evaluation))
    assert found.exact == sum(bool(text) and any(text in each for each in training) for text in evaluation)
    assert found.near == sum(share >= 0.5 for share in shares)
    assert found.any == sum(share > 0 for share in shares)
    assert found.share == pytest.approx(sum(part for _, part in counts) / max(sum(total for total, _ in counts), 1))
    assert [share for _, share in found.worst] == pytest.approx(sorted(filter(None, shares), reverse=True)[:5])
    assert all(share == pytest.approx(shares[row - 100]) for row, share in found.worst)


def test_a_document_inside_a_longer_one_is_a_near_duplicate_and_a_changed_one_is_too():
    written = [document[1:-1] for document in make_documents(40, least=42, most=60)]
    changed = [*written[1][:20], 999, *written[1][21:]]
    evaluation = cache_of([written[0], changed, written[2][:13] + written[30], written[31]])
    found = find_contamination(evaluation, [cache_of([written[5] + written[0] + written[6], *written[1:5]])])
    assert found[:4] == (4, 0, 2, 3)
    assert [row for row, _ in found.worst] == [0, 1, 2]


def test_no_ngram_crosses_the_end_of_a_document():
    found = find_contamination(cache_of([[3, 4, 5, 6]]), [cache_of([[7, 3, 4], [5, 6, 7]])], n=4)
    assert not found.any
    assert find_contamination(cache_of([[3, 4, 5, 6]]), [cache_of([[7, 3, 4, 5, 6, 7]])], n=4).any


def test_the_parts_of_one_document_may_lie_in_several_training_sources():
    training = [cache_of([list(range(10, 30))]), cache_of([list(range(30, 50))])]
    assert ngrams_found(cache_of([list(range(10, 50))]), training, 5)[1].tolist() == [32]


def test_hashes_of_different_ngrams_do_not_collide():
    """N-grams of few different tokens, on which weak hashes fail."""
    grams = np.array(list(itertools.product(range(4), repeat=9)), np.uint64)
    scrambled = contamination._scrambled(np.concatenate([grams.ravel(), np.zeros(9, np.uint64)]))
    assert len(np.unique(contamination._rolling(scrambled, [9], grams.size)[9][::9])) == len(grams)


def test_without_training_data_or_documents_nothing_is_shared():
    empty = Contamination(0, 0, 0, 0, 0.0, (), 13)
    assert find_contamination(cache_of([]), [cache_of([[3, 4]])]) == empty
    assert find_contamination(cache_of([[3, 4], []]), []) == empty._replace(documents=1)


def test_a_sentence_counts_copies_near_duplicates_and_shared_ngrams():
    found = Contamination(815, 3, 10, 45, 0.0123, ((12, 1.0), (7, 0.504)), 13)
    assert contamination_sentence("medical_test", found) == (
        "medical_test: of 815 documents 3 are in the training data, 10 by half or more of their 13-grams, "
        "45 by at least one"
    )
    assert "none of its 2 documents" in contamination_sentence("x", Contamination(2, 0, 0, 0, 0.0, (), 13))


def test_ngrams_without_tokens_are_refused():
    with pytest.raises(UserError, match="n=0"):
        find_contamination(cache_of([[3]]), [], n=0)


def test_a_result_is_computed_once_and_again_only_if_its_file_is_damaged(tmp_path, monkeypatch):
    evaluation, training = cache_of([[3, 4, 5, 6]]), [cache_of([[7, 3, 4], [5, 6, 7]])]
    first = contamination.cached_contamination(evaluation, training, tmp_path, n=2)
    assert first == find_contamination(evaluation, training, n=2)
    monkeypatch.setattr(contamination, "find_contamination", lambda *_: pytest.fail("computed again"))
    assert contamination.cached_contamination(evaluation, training, tmp_path, n=2) == first
    (file,) = tmp_path.iterdir()
    file.write_text("{")  # damaged
    monkeypatch.setattr(contamination, "find_contamination", lambda *_: first._replace(any=9))
    assert contamination.cached_contamination(evaluation, training, tmp_path, n=2).any == 9
