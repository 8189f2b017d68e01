"""A token cache in memory: documents given as lists of tokens."""

import hashlib

import numpy as np

BOS, EOS = 1, 2


class TokensInMemory:
    """The part of a token cache that windows and contamination use. labels: a class number per document."""

    starts, eos_id = 1, EOS

    def __init__(self, documents, labels=None, rows=None):
        self._documents = [np.array(document, np.uint16) for document in documents]
        self._stream = np.concatenate([np.empty(0, np.uint16), *self._documents])
        self.documents, self.tokens = len(self._documents), len(self._stream)
        self.offsets = np.concatenate([[0], np.cumsum([len(each) for each in self._documents], dtype=np.int64)])
        self.fingerprint = hashlib.sha256(repr(documents).encode()).hexdigest()
        self.labels = None if labels is None else np.array(labels, np.int32)
        self.rows = np.arange(self.documents) if rows is None else np.array(rows, np.int64)

    def read_tokens(self, start, stop):
        assert 0 <= start <= stop <= self.tokens
        return self._stream[start:stop]

    def document(self, index):
        return self._documents[index]

    def document_hashes(self):
        digests = [hashlib.blake2b(each.tobytes(), digest_size=8).digest() for each in self._documents]
        return np.frombuffer(b"".join(digests), np.uint64)


def make_documents(count, seed=0, least=3, most=40, vocabulary=200):
    """Lists of `least` to `most` random tokens, <bos> and <eos> included."""
    random = np.random.default_rng(seed)
    return [
        [BOS, *random.integers(3, vocabulary, random.integers(least, most + 1) - 2).tolist(), EOS] for _ in range(count)
    ]
