"""The passages that evaluation and training documents share, and the training documents to leave out for them."""

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from llm3.data.cache.token_cache import TokenCache
from llm3.data.contamination import Wanted, hashed, ngrams_found


class Passage(NamedTuple):
    """The longest passage that an evaluation document shares with one of the training documents.

    document: index in the evaluation's cache. share: share of its n-grams that are in the training data
    source, training_document: the training document that has most of its n-grams, as an index in the source's cache
    start, training_start, length: where the passage begins in the two documents, and its length, in tokens
    """

    document: int
    share: float
    source: str
    training_document: int
    start: int
    training_start: int
    length: int


class Overlapping(NamedTuple):
    """Training documents that share an n-gram with an evaluation, or are equal to one of its shorter documents.

    documents: {source: indices in its cache, ascending: int64}
    kept: evaluation documents shorter than n tokens that are parts of longer training documents, which are not listed
    """

    documents: dict[str, np.ndarray]
    kept: int


def find_overlapping(evaluation: TokenCache, training: Mapping[str, TokenCache], n: int = 13) -> Overlapping:
    """The training documents to leave out for an evaluation (Brown et al. 2020, appendix C, with tokens for words).

    A document shorter than n tokens, such as a word, is in many others, and makes only its copies leave.
    """
    sizes = np.diff(evaluation.offsets) - evaluation.starts - 1
    hashes = evaluation.document_hashes()
    wanted = Wanted(evaluation, n, sizes >= n) if (sizes >= n).any() else None
    copies = np.zeros(evaluation.documents, bool)
    documents = {}
    for source, cache in training.items():
        theirs = cache.document_hashes()
        copies |= np.isin(hashes, theirs)
        chosen = np.isin(theirs, hashes[sizes > 0])
        for places, valid, grams in hashed(cache, [n]) if wanted else ():
            hits, _ = wanted.hits(grams[n], valid[n])  # type: ignore[union-attr]
            chosen[np.searchsorted(cache.offsets, places[hits], side="right") - 1] = True
        documents[source] = np.flatnonzero(chosen)
    _, found = ngrams_found(evaluation, training.values(), n)
    return Overlapping(documents, int(((sizes < n) & (found > 0) & ~copies).sum()))


def find_passages(evaluation: TokenCache, training: Mapping[str, TokenCache], most: int, n: int = 13) -> list[Passage]:
    """The passages of the `most` evaluation documents with the highest shares of n-grams in the training data."""
    grams, found = ngrams_found(evaluation, training.values(), n)
    shares = found / np.maximum(grams, 1)
    order = [int(i) for i in np.argsort(-shares, kind="stable")[:most] if found[i]]
    passages = []
    for index in order:
        document = _text_tokens(evaluation, index)
        source, other = _most_similar(evaluation, index, training, min(n, len(document)))
        theirs = _text_tokens(training[source], other)
        run = _longest_run(document.tolist(), theirs.tolist(), min(n, len(document)))
        passages.append(Passage(index, float(shares[index]), source, other, *run))
    return passages


def _text_tokens(cache: TokenCache, index: int) -> np.ndarray:
    """The tokens of a document without the special ones at its start and end."""
    return cache.document(index)[cache.starts : -1]


def _most_similar(
    evaluation: TokenCache, index: int, training: Mapping[str, TokenCache], length: int
) -> tuple[str, int]:
    """The (source, document) of the training data with most n-grams of an evaluation document, the first of equals."""
    wanted = Wanted(evaluation, length, np.arange(evaluation.documents) == index)
    shared: Counter[tuple[str, int]] = Counter()
    for source, cache in training.items():
        for places, valid, hashes in hashed(cache, [length]):
            hits, grams = wanted.hits(hashes[length], valid[length])
            documents = np.searchsorted(cache.offsets, places[hits], side="right") - 1
            once = np.unique(np.stack([documents, grams]), axis=1)[0]
            for document, count in zip(*np.unique(once, return_counts=True), strict=True):
                shared[source, int(document)] += int(count)
    return max(shared, key=shared.__getitem__)


def _longest_run(one: list[int], other: list[int], n: int) -> tuple[int, int, int]:
    """(start in one, start in the other, tokens) of the longest common run that begins with the first equal n-gram."""
    starts: dict[tuple[int, ...], int] = {}
    for place in range(len(one) - n + 1):
        starts.setdefault(tuple(one[place : place + n]), place)
    best, place = (0, 0, 0), 0
    while place + n <= len(other):
        start = starts.get(tuple(other[place : place + n]))
        if start is None:
            place += 1
            continue
        length = n
        most = min(len(one) - start, len(other) - place)
        while length < most and one[start + length] == other[place + length]:
            length += 1
        best = max(best, (start, place, length), key=lambda run: run[2])
        place += length - n + 1
    return best
