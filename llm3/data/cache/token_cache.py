"""Tokens on disk, memory-mapped: the documents of a source, or some of them."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from llm3.data.cache.reader import ShardReader
from llm3.data.round_trip import RoundTrip

KEYS_AT_A_TIME = 2**20


@dataclasses.dataclass(frozen=True)
class TokenCache:
    """Tokenized documents: one stream of tokens, document after document, in an order that depends on content only.

    offsets: int64 [documents + 1], where each document starts in the stream, and its end
    document_bytes: int64 [documents], UTF-8 bytes of each document
    rows: int64 [documents], the row of each document in the source
    keys: uint64 [documents], pseudo-random; samples take the smallest keys
    labels: int32 [documents], indices of `label_sets`, or of `label_names` if `label_sets` is None; None: no labels
    label_sets: lists of indices of `label_names`, for documents with any number of labels; None: one label each
    fingerprint: sha256 of contents, label names, tokenizer and template
    starts, eos_id: the number of special tokens at the start of a document, 0 or 1, and the last token of each text
    round_trip: how much of the texts their tokens hold; None: all, by construction
    rows_read, bad: number of rows read from the source, and of unusable rows by reason
    bad_rows_file: JSON lines of the unusable rows; None: there are none
    chosen: int64 [documents], indices of stored documents; None: all, in stored order
    """

    reader: ShardReader
    offsets: np.ndarray
    document_bytes: np.ndarray
    rows: np.ndarray
    keys: np.ndarray
    labels: np.ndarray | None
    label_names: list[str]
    label_sets: list[list[int]] | None
    fingerprint: str
    starts: int
    eos_id: int
    round_trip: RoundTrip | None
    rows_read: int
    bad: dict[str, int]
    bad_rows_file: Path | None
    chosen: np.ndarray | None = None

    @property
    def documents(self) -> int:
        return len(self.offsets) - 1

    @property
    def tokens(self) -> int:
        """The number of tokens, [bos] and [eos] of each document included."""
        return int(self.offsets[-1])

    @property
    def text_bytes(self) -> int:
        """The UTF-8 bytes of all documents."""
        return int(self.document_bytes.sum())

    def class_counts(self) -> dict[str, int]:
        """{class: number of its documents}, the most frequent first; {} without labels."""
        if self.labels is None:
            return {}
        counts = np.zeros(len(self.label_names), np.int64)
        for number, count in enumerate(np.bincount(self.labels, minlength=1)):
            counts[self.label_sets[number] if self.label_sets is not None else number] += count
        return {self.label_names[k]: int(counts[k]) for k in np.argsort(-counts, kind="stable")}

    def document(self, index: int) -> np.ndarray:
        """The tokens of a document, [bos] and [eos] included: uint16 or uint32 [n], a read-only view."""
        return self.reader.tokens(*self._place(index))

    def answer_mask(self, index: int) -> np.ndarray:
        """bool [n], True at the tokens of answers; all True if the row format marks no answers."""
        return self.reader.answer_mask(*self._place(index))

    def note(self, index: int) -> dict[str, Any]:
        """The note of a document (see `llm3.data.formats.Document`); {} if it has none."""
        return self.reader.note(self._stored_index(index))

    def read_tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of the stream, clipped as a slice: uint16 or uint32, perhaps read-only."""
        start, stop, _ = slice(start, stop).indices(self.tokens)
        if self.chosen is None or start >= stop:
            return self.reader.tokens(start, max(start, stop)) if self.tokens else self.reader.tokens(0, 0)
        first, last = np.searchsorted(self.offsets, [start, stop - 1], side="right") - 1
        documents = [self.document(index) for index in range(first, last + 1)]
        documents[-1] = documents[-1][: stop - self.offsets[last]]
        documents[0] = documents[0][start - self.offsets[first] :]
        return documents[0] if len(documents) == 1 else np.concatenate(documents)

    def _stored_index(self, index: int) -> int:
        if not 0 <= index < self.documents:
            raise IndexError(f"document {index} of {self.documents}")
        return int(index if self.chosen is None else self.chosen[index])

    def _place(self, index: int) -> tuple[int, int]:
        document = self._stored_index(index)
        return int(self.reader.offsets[document]), int(self.reader.offsets[document + 1])

    def document_hashes(self) -> np.ndarray:
        """64 bits of blake2b of each document's tokens: uint64 [documents]. Equal documents have equal hashes."""
        hashes = np.empty(self.documents, np.uint64)
        for index in range(self.documents):
            digest = hashlib.blake2b(self.document(index).data, digest_size=8).digest()
            hashes[index] = int.from_bytes(digest, "little")
        return hashes

    def first(self, documents: int) -> "TokenCache":
        """A fixed sample: the documents with the smallest keys, in the order of their keys; all, if there are fewer.

        A source of a single part is stored in this order.
        """
        if documents >= self.documents:
            return self
        smallest = np.empty(0, np.int64)
        for start in range(0, self.documents, KEYS_AT_A_TIME):
            candidates = np.concatenate([smallest, np.arange(start, min(start + KEYS_AT_A_TIME, self.documents))])
            smallest = candidates[np.argsort(self.keys[candidates], kind="stable")[:documents]]
        return self.subset(smallest)

    def subset(self, indices: np.ndarray) -> "TokenCache":
        """The documents at `indices`, int [n], in this order."""
        indices = np.asarray(indices, np.int64)
        if len(indices) and not (indices.min() >= 0 and indices.max() < self.documents):
            raise IndexError(f"documents {indices.min()} to {indices.max()} of {self.documents}")
        lengths = self.offsets[indices + 1] - self.offsets[indices]
        return dataclasses.replace(
            self,
            offsets=np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]),
            document_bytes=self.document_bytes[indices],
            rows=self.rows[indices],
            keys=self.keys[indices],
            labels=None if self.labels is None else self.labels[indices],
            fingerprint=hashlib.sha256(self.fingerprint.encode() + indices.tobytes()).hexdigest(),
            chosen=indices if self.chosen is None else self.chosen[indices],
        )
