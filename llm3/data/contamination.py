"""What of an evaluation's texts is in the training data: equal documents, near-duplicates, shared n-grams of tokens."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llm3.data.cache.cache import TokenCache
from llm3.errors import UserError
from llm3.files import write_whole

FORMAT = 1  # raise it when a result changes its meaning
NEAR = 0.5  # the share of its n-grams from which on a document is called a near-duplicate
WORST = 5  # documents that are named
CHUNK = 1 << 16  # positions of a stream that are hashed together: their arrays stay in a core's cache
BASE = 0x9E3779B97F4A7C15  # odd; a polynomial in it, modulo 2 ** 64, is the hash of an n-gram
FILTER_BITS = 26  # of the table that holds most n-grams off the sorted search, at most


class Contamination(NamedTuple):
    """Counts of an evaluation's documents that have text.

    exact: those that are equal to a training document. near: those with at least half of their n-grams in the training
    data, the equal ones among them. any: those with at least one. share: of all their n-grams. worst: (row of the
    source, share of its n-grams) of at most five, those with the most.
    """

    documents: int
    exact: int
    near: int
    any: int
    share: float
    worst: tuple[tuple[int, float], ...]
    n: int


def find_contamination(evaluation: TokenCache, training: Iterable[TokenCache], n: int = 13) -> Contamination:
    """What of an evaluation is in the training data, all tokenized alike. Time is linear in both.

    An n-gram is n tokens of one document (13 as in Brown et al. 2020, appendix C, of words there), without the
    document's <bos> and <eos>; a document that is shorter than n is one n-gram. They are compared by 64 bits of hash:
    one in 2 ** 64 pairs of different ones counts as equal. Memory grows with the evaluation only.
    Raises UserError if n < 1.
    """
    training = list(training)
    filled = np.diff(evaluation.offsets) > 2
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
    """`overlap`, found in `directory` where it was computed of the same texts before."""
    training = list(training)
    texts = [FORMAT, n, evaluation.fingerprint, *sorted(each.fingerprint for each in training)]
    file = directory / f"contamination-{hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]}.json"
    try:
        known = json.loads(file.read_text())
        return Contamination(**known | {"worst": tuple((row, share) for row, share in known["worst"])})
    except (OSError, ValueError, TypeError, KeyError):  # not there, or damaged: it is computed again
        found = find_contamination(evaluation, training, n)
        write_whole(file, json.dumps(found._asdict()))
        return found


def contamination_sentence(name: str, found: Contamination) -> str:
    """An overlap in words, for a report."""
    if not found.any:
        return f"{name}: none of its {found.documents:,} documents shares {found.n} tokens with the training data"
    return (
        f"{name}: of {found.documents:,} documents {found.exact:,} are in the training data, {found.near:,} by half or "
        f"more of their {found.n}-grams, {found.any:,} by at least one"
    )


def ngrams_found(evaluation: TokenCache, training: Iterable[TokenCache], n: int) -> tuple[np.ndarray, np.ndarray]:
    """For each document of an evaluation how many n-grams it has, and how many of them are in the training data.

    Both int64 [documents]; an n-gram counts as often as it stands in the document. Raises UserError if n < 1.
    """
    if n < 1:
        raise UserError(f"contamination: n={n}: expected at least 1")
    sizes = np.diff(evaluation.offsets) - 2
    lengths = sorted({min(int(size), n) for size in np.unique(sizes) if size > 0})
    wanted = {length: _Wanted(evaluation, length, sizes >= n if length == n else sizes == length) for length in lengths}
    for cache in training if lengths else ():
        for _, valid, hashes in _hashed(cache, lengths):
            for length in lengths:
                wanted[length].look_for(hashes[length], valid[length])
    grams, found = np.zeros(evaluation.documents, np.int64), np.zeros(evaluation.documents, np.int64)
    for each in wanted.values():
        grams += each.count(np.ones_like(each.found))
        found += each.count(each.found)
    return grams, found


class _Wanted:
    """The n-grams of one length of an evaluation, and which of them have been found."""

    def __init__(self, cache: TokenCache, length: int, chosen: np.ndarray):
        """chosen: bool [documents], those whose n-grams are wanted."""
        hashes, documents = [], []
        for places, valid, hashed in _hashed(cache, [length]):
            document = np.searchsorted(cache.offsets, places[valid[length]], side="right") - 1
            hashes.append(hashed[length][valid[length]][chosen[document]])
            documents.append(document[chosen[document]])
        self._documents, self._count = np.concatenate(documents), cache.documents
        self._hashes, self._inverse = np.unique(np.concatenate(hashes), return_inverse=True)
        self.found = np.zeros(len(self._hashes), bool)
        # Sixteen places a hash: all but one in sixteen of the others are told apart by one look.
        self._shift = np.uint64(64 - min(max(4 + len(self._hashes).bit_length(), 10), FILTER_BITS))
        self._maybe = np.zeros(1 << (64 - int(self._shift)), bool)
        self._maybe[self._hashes >> self._shift] = True

    def look_for(self, hashes: np.ndarray, valid: np.ndarray) -> None:
        """Mark those of the n-grams that are among these hashes, where they are valid."""
        hashes = hashes[self._maybe[(hashes >> self._shift).astype(np.intp)] & valid]
        places = np.minimum(np.searchsorted(self._hashes, hashes), len(self._hashes) - 1)
        self.found[places[self._hashes[places] == hashes]] = True

    def count(self, marked: np.ndarray) -> np.ndarray:
        """How many n-grams of each document are marked: int64 [documents]."""
        return np.bincount(self._documents[marked[self._inverse]], minlength=self._count)


def _hashed(
    cache: TokenCache, lengths: list[int]
) -> Iterator[tuple[np.ndarray, dict[int, np.ndarray], dict[int, np.ndarray]]]:
    """Yield, chunk by chunk, places in the stream, and for each length which of them start an n-gram, and its hash."""
    most = max(lengths)
    for start in range(0, cache.tokens, CHUNK):
        stop = min(start + CHUNK, cache.tokens)
        tokens = np.zeros(stop - start + most, np.uint64)
        read = cache.read_tokens(start, min(stop + most, cache.tokens))
        tokens[: len(read)] = read
        hashes = _rolling(_scrambled(tokens), lengths, stop - start)
        first = np.searchsorted(cache.offsets, start, side="left")
        ends = cache.offsets[first : np.searchsorted(cache.offsets, stop + most, side="right")]
        valid = {length: _starts(ends - start, length, stop - start) for length in lengths}
        yield np.arange(start, stop), valid, hashes


def _starts(ends: np.ndarray, length: int, size: int) -> np.ndarray:
    """bool [size]: places from which `length` tokens meet no <eos>, which precedes each end, and no <bos>, on it."""
    starts = np.ones(size, bool)
    blocked = (ends[:, None] - np.arange(length + 1)).ravel()
    starts[blocked[(blocked >= 0) & (blocked < size)]] = False
    return starts


def _scrambled(tokens: np.ndarray) -> np.ndarray:
    """A hash of 64 bits for each token number (splitmix64, Steele et al. 2014); uint64, in place."""
    tokens += np.uint64(BASE)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        tokens ^= tokens >> np.uint64(shift)
        tokens *= np.uint64(factor)
    tokens ^= tokens >> np.uint64(31)
    return tokens


def _rolling(hashes: np.ndarray, lengths: list[int], size: int) -> dict[int, np.ndarray]:
    """For each length m the hashes of the m tokens from each of the first `size` places, from those of the tokens.

    h(x y) = h(x) * BASE ** len(y) + h(y), modulo 2 ** 64 (Karp and Rabin 1987), by doubling.
    """
    found: dict[int, np.ndarray] = {}
    power = 1
    while True:
        for length in lengths:
            if length & power:
                after = length % power  # tokens that are hashed already: they follow the others
                found[length] = _joined(hashes, power, found[length], after) if after else hashes
        if 2 * power > max(lengths):
            return {length: found[length][:size] for length in lengths}
        hashes = _joined(hashes, power, hashes, power)
        power *= 2


def _joined(left: np.ndarray, left_tokens: int, right: np.ndarray, right_tokens: int) -> np.ndarray:
    """At each place the hash of `left_tokens` tokens and of the `right_tokens` tokens behind them."""
    places = min(len(left), len(right) - left_tokens)
    return left[:places] * np.uint64(pow(BASE, right_tokens, 2**64)) + right[left_tokens : left_tokens + places]
