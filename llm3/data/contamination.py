"""Evaluation documents in the training data: exact copies, near-duplicates, shared n-grams of tokens."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llm3.data.cache.token_cache import TokenCache
from llm3.errors import UserError
from llm3.files import write_atomic

FORMAT = 1  # part of the key; raise it when the meaning of a result changes
NEAR = 0.5  # a document with this share of its n-grams in the training data is a near-duplicate
WORST = 5  # documents in `Contamination.worst`
CHUNK = 1 << 16  # tokens hashed at once; their arrays fit in a core's cache
BASE = 0x9E3779B97F4A7C15  # odd; the hash of an n-gram is a polynomial in it, modulo 2 ** 64
FILTER_BITS = 26  # log2 of the largest filter, which keeps most n-grams from the sorted search


class Contamination(NamedTuple):
    """How many documents of an evaluation are in the training data; documents without text do not count.

    exact: documents equal to a training document
    near: documents with at least half of their n-grams in the training data, exact copies included
    any: documents with at least one n-gram in the training data
    share: share of all n-grams that are in the training data
    worst: (row of the source, share of its n-grams) of the most contaminated documents, at most five
    """

    documents: int
    exact: int
    near: int
    any: int
    share: float
    worst: tuple[tuple[int, float], ...]
    n: int


def find_contamination(evaluation: TokenCache, training: Iterable[TokenCache], n: int = 13) -> Contamination:
    """Count the documents of an evaluation that are in the training data. All caches must have the same tokenizer.

    An n-gram is n tokens of one document, without <bos> and <eos>; a document shorter than n is one n-gram. (Brown et
    al. 2020, appendix C, use 13 words.) N-grams are compared by 64 bits of hash, so one in 2 ** 64 pairs of different
    n-grams counts as equal. Time is linear in both; memory grows with the evaluation only. Raises UserError if n < 1.
    """
    training = list(training)
    filled = np.diff(evaluation.offsets) > evaluation.starts + 1
    exact = np.zeros(evaluation.documents, bool)
    hashes = evaluation.document_hashes()
    for cache in training:
        exact |= np.isin(hashes, cache.document_hashes())
    grams, found = ngrams_found(evaluation, training, n)
    shares = found / np.maximum(grams, 1)
    order = np.argsort(-shares, kind="stable")[:WORST]
    return Contamination(
        documents=int(filled.sum()),
        exact=int((exact & filled).sum()),
        near=int((shares >= NEAR).sum()),
        any=int((found > 0).sum()),
        share=float(found.sum() / max(grams.sum(), 1)),
        worst=tuple((int(evaluation.rows[i]), float(shares[i])) for i in order if found[i]),
        n=n,
    )


def cached_contamination(
    evaluation: TokenCache, training: Iterable[TokenCache], directory: Path, n: int = 13
) -> Contamination:
    """The result of `find_contamination`, from a file in `directory` if it was computed before."""
    training = list(training)
    rows = hashlib.sha256(np.asarray(evaluation.rows, np.int64).tobytes()).hexdigest()  # which the result names
    texts = [FORMAT, n, evaluation.fingerprint, rows, *sorted(each.fingerprint for each in training)]
    file = directory / f"contamination-{hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]}.json"
    try:
        known = json.loads(file.read_text())
        os.utime(file)  # when it was last used
        return Contamination(**known | {"worst": tuple((row, share) for row, share in known["worst"])})
    except (OSError, ValueError, TypeError, KeyError):  # missing or damaged: compute it again
        found = find_contamination(evaluation, training, n)
        with suppress(OSError):  # a read-only or full disk: compute it again the next time
            write_atomic(file, json.dumps(found._asdict()))
        return found


def contamination_sentence(name: str, found: Contamination) -> str:
    """Contamination in words, for a report."""
    if not found.any:
        return f"{name}: none of its {found.documents:,} documents shares {found.n} tokens with the training data"
    return (
        f"{name}: of {found.documents:,} documents {found.exact:,} are in the training data, {found.near:,} by half or "
        f"more of their {found.n}-grams, {found.any:,} by at least one"
    )


def ngrams_found(evaluation: TokenCache, training: Iterable[TokenCache], n: int) -> tuple[np.ndarray, np.ndarray]:
    """(n-grams of each evaluation document, how many of them are in the training data): both int64 [documents].

    An n-gram counts as often as it occurs in the document. Raises UserError if n < 1.
    """
    if n < 1:
        raise UserError(f"contamination: n={n}: expected at least 1")
    sizes = np.diff(evaluation.offsets) - evaluation.starts - 1
    lengths = sorted({min(int(size), n) for size in np.unique(sizes) if size > 0})
    wanted = {length: Wanted(evaluation, length, sizes >= n if length == n else sizes == length) for length in lengths}
    for cache in training if lengths else ():
        for _, valid, hashes in hashed(cache, lengths):
            for length in lengths:
                wanted[length].look_for(hashes[length], valid[length])
    grams, found = np.zeros(evaluation.documents, np.int64), np.zeros(evaluation.documents, np.int64)
    for each in wanted.values():
        grams += each.count(np.ones_like(each.found))
        found += each.count(each.found)
    return grams, found


class Wanted:
    """The evaluation's n-grams of one length, and which of them have been found in the training data."""

    def __init__(self, cache: TokenCache, length: int, chosen: np.ndarray):
        """chosen: bool [documents], True for documents whose n-grams are wanted."""
        hashes, documents = [], []
        for places, valid, found in hashed(cache, [length]):
            document = np.searchsorted(cache.offsets, places[valid[length]], side="right") - 1
            hashes.append(found[length][valid[length]][chosen[document]])
            documents.append(document[chosen[document]])
        self._documents, self._count = np.concatenate(documents), cache.documents
        self._hashes, self._inverse = np.unique(np.concatenate(hashes), return_inverse=True)
        self.found = np.zeros(len(self._hashes), bool)
        # Sixteen slots per hash, so that one look rejects fifteen of sixteen other hashes.
        self._shift = np.uint64(64 - min(max(4 + len(self._hashes).bit_length(), 10), FILTER_BITS))
        self._maybe = np.zeros(1 << (64 - int(self._shift)), bool)
        self._maybe[self._hashes >> self._shift] = True

    def look_for(self, hashes: np.ndarray, valid: np.ndarray) -> None:
        """Mark the wanted n-grams among these hashes; hashes count only where `valid` is True."""
        self.found[self.hits(hashes, valid)[1]] = True

    def hits(self, hashes: np.ndarray, valid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(places of wanted n-grams among these hashes, their numbers among the distinct wanted ones): int64 [hits]."""
        where = np.flatnonzero(self._maybe[(hashes >> self._shift).astype(np.intp)] & valid)
        found = hashes[where]
        places = np.minimum(np.searchsorted(self._hashes, found), len(self._hashes) - 1)
        same = self._hashes[places] == found
        return where[same], places[same]

    def count(self, marked: np.ndarray) -> np.ndarray:
        """Marked n-grams of each document: int64 [documents]. marked: bool [distinct n-grams]."""
        return np.bincount(self._documents[marked[self._inverse]], minlength=self._count)


def hashed(
    cache: TokenCache, lengths: list[int]
) -> Iterator[tuple[np.ndarray, dict[int, np.ndarray], dict[int, np.ndarray]]]:
    """Yield for each chunk: positions in the stream, and {length: where an n-gram starts}, {length: its hash}."""
    most = max(lengths)
    for start in range(0, cache.tokens, CHUNK):
        stop = min(start + CHUNK, cache.tokens)
        tokens = np.zeros(stop - start + most, np.uint64)
        read = cache.read_tokens(start, min(stop + most, cache.tokens))
        tokens[: len(read)] = read
        hashes = _rolling(_scrambled(tokens), lengths, stop - start)
        first = np.searchsorted(cache.offsets, start, side="left")
        ends = cache.offsets[first : np.searchsorted(cache.offsets, stop + most, side="right")]
        valid = {length: _starts(ends - start, length, stop - start, cache.starts) for length in lengths}
        yield np.arange(start, stop), valid, hashes


def _starts(ends: np.ndarray, length: int, size: int, special: int) -> np.ndarray:
    """bool [size], True where the next `length` tokens lie in one document, between its <bos> and <eos>.

    special: the number of special tokens at the start of a document, 1 or 0.
    """
    starts = np.ones(size, bool)
    blocked = (ends[:, None] - np.arange(1 - special, length + 1)).ravel()
    starts[blocked[(blocked >= 0) & (blocked < size)]] = False
    return starts


def _scrambled(tokens: np.ndarray) -> np.ndarray:
    """A 64-bit hash of each token id (splitmix64, Steele et al. 2014): uint64, in place."""
    tokens += np.uint64(BASE)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        tokens ^= tokens >> np.uint64(shift)
        tokens *= np.uint64(factor)
    tokens ^= tokens >> np.uint64(31)
    return tokens


def _rolling(hashes: np.ndarray, lengths: list[int], size: int) -> dict[int, np.ndarray]:
    """{m: hashes of the m tokens from each of the first `size` positions}, from the hashes of single tokens.

    h(x y) = h(x) * BASE ** len(y) + h(y), modulo 2 ** 64 (Karp and Rabin 1987), by doubling.
    """
    found: dict[int, np.ndarray] = {}
    power = 1
    while True:
        for length in lengths:
            if length & power:
                after = length % power  # tokens hashed so far; they come after the others
                found[length] = _joined(hashes, power, found[length], after) if after else hashes
        if 2 * power > max(lengths):
            return {length: found[length][:size] for length in lengths}
        hashes = _joined(hashes, power, hashes, power)
        power *= 2


def _joined(left: np.ndarray, left_tokens: int, right: np.ndarray, right_tokens: int) -> np.ndarray:
    """At each position, the hash of `left_tokens` tokens followed by `right_tokens` tokens."""
    places = min(len(left), len(right) - left_tokens)
    return left[:places] * np.uint64(pow(BASE, right_tokens, 2**64)) + right[left_tokens : left_tokens + places]
