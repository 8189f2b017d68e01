"""One tokenized part of a source: a directory that is written complete or not at all, and that detects damage."""

import array
import collections
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from llm3.data.formats import BadRow, Document
from llm3.data.round_trip import RoundTrip, compare
from llm3.data.tokenizer import Tokenizer

OFFSETS = "offsets.npy"  # offsets of all documents, beside the shards
SHARD = "shard.json"  # metadata of a shard, with the digests of its files; written last
STREAM = "stream.bin"  # tokens, uint16 or uint32, documents end to end
ANSWER_MASK = "answered.bin"  # bool, one per token; only if a document has an answer mask
NOTES, NOTE_ENDS = "notes.jsonl", "note_ends.npy"  # only if a document has a note
DOCUMENTS = "documents.npy"
BAD_ROWS = "bad_rows.jsonl"  # only if there are unusable rows
FIELDS = np.dtype([("tokens", "<i8"), ("bytes", "<i8"), ("row", "<i8"), ("key", "<u8"), ("labels", "<i4")])

ROWS_AT_A_TIME, CHARACTERS_AT_A_TIME = 1024, 2**20  # rows are encoded, and counted, in batches of about this size


class BatchEncoder:
    """A tokenizer that encodes a batch of texts, with all threads, when the first unknown one is asked for."""

    def __init__(self, tokenizer: Tokenizer, texts: Iterable[str], known: Mapping[str, list[int]] | None = None):
        self._tokenizer, self._known = tokenizer, dict(known or {})
        self._texts = [text for text in dict.fromkeys(texts) if text not in self._known]

    def encode(self, text: str) -> list[int]:
        if text not in self._known and self._texts:
            self._known |= zip(self._texts, self._tokenizer.encode_batch(self._texts), strict=True)
            self._texts = []
        ids = self._known.get(text)
        return self._tokenizer.encode(text) if ids is None else ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


class _ShardBuilder:
    """Collects the documents of a part. It keeps little but tokens, so memory is proportional to the tokens."""

    def __init__(self, source: str, dtype: np.dtype):
        self._source, self._dtype = source, dtype
        self._digests, self._stream, self._answer_mask = bytearray(), bytearray(), bytearray()
        self._fields = {name: array.array("q") for name in ("tokens", "bytes", "row", "labels")}
        self._label_sets: dict[tuple[str, ...], int] = {}
        self._notes: dict[int, bytes] = {}
        self._bad: list[dict[str, Any]] = []
        self._rows_read, self._several, self._has_answer_mask = 0, False, False
        self.round_trip: RoundTrip | None = None  # None: the tokenizer loses nothing

    def add(self, row: int, record: dict[str, Any], document: Document) -> None:
        labels = tuple(sorted(set(document.labels)))
        number = self._label_sets.setdefault(labels, len(self._label_sets))
        values = (len(document.tokens), document.text_bytes, row, number)
        if document.note is not None:
            self._notes[len(self._fields["row"])] = json.dumps(document.note).encode() + b"\n"
        for numbers, value in zip(self._fields.values(), values, strict=True):
            numbers.append(value)
        self._digests += hashlib.sha256(content(record)).digest()
        self._stream += np.asarray(document.tokens).astype(self._dtype).tobytes()
        mask = np.ones(len(document.tokens), bool) if document.answer_mask is None else document.answer_mask
        self._answer_mask += mask.astype(bool).tobytes()
        self._has_answer_mask |= document.answer_mask is not None
        self._several |= bool(record.get("several")) or len(labels) > 1
        self._rows_read += 1

    def add_bad(self, row: int, bad: BadRow) -> None:
        self._bad.append({"source": self._source, "row": row, "reason": str(bad), "start": bad.start})
        self._rows_read += 1

    def save(self, directory: Path) -> None:
        """Write the files: documents sorted by digest (as good as random), unusable rows in their order."""
        digests = _without_copies(np.frombuffer(self._digests, ">u8").reshape(-1, 4))
        order = np.lexsort(digests.T)
        label_sets = sorted(self._label_sets)
        documents = np.empty(len(order), FIELDS)
        for name, numbers in self._fields.items():
            documents[name] = np.frombuffer(numbers, np.int64)[order]
        places = {labels: place for place, labels in enumerate(label_sets)}
        documents["labels"] = np.array([places[labels] for labels in self._label_sets], np.int32)[documents["labels"]]
        documents["key"] = digests[order, 3]
        np.save(directory / DOCUMENTS, documents)
        self._save_tokens(directory, order)
        if self._notes:
            lengths = [len(self._notes.get(place, b"")) for place in order.tolist()]
            np.save(directory / NOTE_ENDS, np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]))
            (directory / NOTES).write_bytes(b"".join(self._notes.get(place, b"") for place in order.tolist()))
        if self._bad:
            (directory / BAD_ROWS).write_text("".join(json.dumps(entry) + "\n" for entry in self._bad), "ascii")
        reasons = collections.Counter(entry["reason"] for entry in self._bad)
        metadata = {
            "content": hashlib.sha256(digests[order].tobytes()).hexdigest(),
            "documents": len(order),
            "tokens": int(documents["tokens"].sum()),
            "text_bytes": int(documents["bytes"].sum()),
            "dtype": self._dtype.name,
            "label_sets": label_sets,
            "several": self._several,
            "rows_read": self._rows_read,
            "bad": dict(sorted(reasons.items())),
            **({} if self.round_trip is None else {"round_trip": self.round_trip}),
            "files": {path.name: digest_and_size(path) for path in sorted(directory.iterdir())},
        }
        write_with_digest(directory / SHARD, metadata)

    def _save_tokens(self, directory: Path, order: np.ndarray) -> None:
        ends = np.cumsum(np.frombuffer(self._fields["tokens"], np.int64))
        kinds = [(STREAM, self._stream, self._dtype)]
        if self._has_answer_mask:
            kinds.append((ANSWER_MASK, self._answer_mask, np.dtype(bool)))
        for name, buffer, dtype in kinds:
            values = np.frombuffer(buffer, dtype).data
            with open(directory / name, "wb") as file:
                for place in order.tolist():
                    file.write(values[ends[place - 1] if place else 0 : ends[place]])


def write_shard(
    directory: Path,
    records: Any,
    part: Any,
    row_format: ModuleType,
    tokenizer: Tokenizer,
    template: str,
    known: Callable[[int], list[list[int]]] = lambda row: [],
    count: Callable[[int, int], None] = lambda documents, text_bytes: None,
) -> None:
    """Tokenize a part into an empty directory: the same bytes for the same part, on any machine.

    known: the tokens of the texts of a row, as far as another cache has them. count: called now and then with the
    number of documents encoded since its last call, and their UTF-8 bytes.
    """
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    shard = _ShardBuilder(records.name, dtype)
    shard.round_trip = None if tokenizer.lossless else RoundTrip()
    for rows in _together(records.read_part(part), row_format):
        usable = [(row, row_format.texts(record)) for row, record in rows if not isinstance(record, BadRow)]
        found: dict[str, list[int]] = {}
        for row, texts in usable:
            if len(encoded := known(row)) == len(texts):
                found |= zip(texts, encoded, strict=True)
        encoder = BatchEncoder(tokenizer, (text for _, texts in usable for text in texts), found)
        documents = text_bytes = 0
        for row, record in rows:
            if isinstance(record, BadRow):
                shard.add_bad(row, record)
                continue
            try:
                document = row_format.encode(record, encoder, template)
            except BadRow as bad:
                shard.add_bad(row, BadRow(str(bad), json.dumps(record, ensure_ascii=False)))
            else:
                shard.add(row, record, document)
                documents, text_bytes = documents + 1, text_bytes + document.text_bytes
                if shard.round_trip is not None:
                    texts = row_format.texts(record)
                    shard.round_trip = shard.round_trip.plus(
                        compare(texts, [tokenizer.decode(ids) for ids in encoder.encode_batch(texts)])
                    )
        count(documents, text_bytes)
    shard.save(directory)


def _together(rows: Iterable[tuple[int, Any]], row_format: ModuleType) -> Iterator[list[tuple[int, Any]]]:
    """Yield the rows in lists of bounded size."""
    together, characters = [], 0
    for row, record in rows:
        together.append((row, record))
        if not isinstance(record, BadRow):
            characters += sum(map(len, row_format.texts(record)))
        if len(together) >= ROWS_AT_A_TIME or characters >= CHARACTERS_AT_A_TIME:
            yield together
            together, characters = [], 0
    yield together


def content(record: dict[str, Any]) -> bytes:
    """The bytes whose digest orders and identifies a document. Plain texts keep their original encoding."""
    if set(record) <= {"text", "labels"} and len(record.get("labels", ())) <= 1:
        return json.dumps([record["text"], *(record.get("labels") or [""])]).encode()
    return json.dumps(record, sort_keys=True).encode()


def _without_copies(digests: np.ndarray) -> np.ndarray:
    """The digests, with a new one for every repeated digest, so that copies of a document are scattered."""
    order = np.lexsort(digests.T)
    ordered = digests[order]
    first = np.concatenate([[True], (ordered[1:] != ordered[:-1]).any(axis=1)])[: len(ordered)]
    copies = np.arange(len(ordered)) - np.flatnonzero(first)[np.cumsum(first) - 1]
    changed = digests.copy()
    for place in np.flatnonzero(copies):
        copy = hashlib.sha256(ordered[place].tobytes() + int(copies[place]).to_bytes(8, "big"))
        changed[order[place]] = np.frombuffer(copy.digest(), ">u8")
    return changed


def folder(number: int) -> str:
    """The directory of a shard inside its cache."""
    return f"shard-{number:06d}"


def check_shard(directory: Path) -> None:
    """Raise OSError, ValueError or KeyError if a file of a shard is missing or not as it was written."""
    check_files(directory, read_with_digest(directory / SHARD)["files"])


def check_files(directory: Path, files: dict[str, list], digests: bool = True) -> None:
    """Raise OSError or ValueError unless all files have the given `digest_and_size` (digests=False: the given size)."""
    for name, expected in files.items():
        found = digest_and_size(directory / name) if digests else [expected[0], (directory / name).stat().st_size]
        if found != list(expected):
            raise ValueError(f"{name} is not as it was written")


def digest_and_size(path: Path) -> list:
    """[sha256, bytes] of a file."""
    with open(path, "rb") as file:
        return [hashlib.file_digest(file, "sha256").hexdigest(), os.fstat(file.fileno()).st_size]


def write_with_digest(path: Path, metadata: dict[str, Any]) -> None:
    """Write JSON that contains its own digest."""
    path.write_text(json.dumps({"seal": _digest_of(metadata), **metadata}, indent=1), "ascii")


def read_with_digest(path: Path) -> dict[str, Any]:
    """Read a file of `write_with_digest`. Raises OSError, ValueError or KeyError if it is damaged."""
    metadata = json.loads(path.read_text("ascii"))
    if metadata.pop("seal") != _digest_of(metadata):
        raise ValueError(f"{path.name} is not as it was written")
    return metadata


def _digest_of(metadata: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(metadata).encode()).hexdigest()


def publish(made: Path, target: Path) -> None:
    """Rename a directory to its final name, unless another process has already put the same content there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.rename(made, target)
    except OSError:
        if not target.is_dir():
            raise
