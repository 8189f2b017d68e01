"""Tokens on disk, memory-mapped: each text is tokenized once, and what changed or broke is tokenized again."""

import dataclasses
import hashlib
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from llm3.data.cache import build as cache_build
from llm3.data.cache import shards
from llm3.data.cache.build import LABELS, MANIFEST
from llm3.data.cache.reader import ShardReader
from llm3.data.tokenizer import Tokenizer
from llm3.errors import UserError, nearest

FORMAT = 3  # part of the key: raise it when the files or their meaning change
MAX_VERIFIED_BYTES = 2**30  # larger caches are opened by the sizes of their files, without computing digests
ATTEMPTS = 3  # to build what is damaged
KEYS_AT_A_TIME = 2**20


@dataclasses.dataclass(frozen=True)
class TokenCache:
    """Tokenized documents: a stream of tokens, document after document, in an order that depends on their content.

    offsets: int64 [documents + 1], where documents start in the stream. document_bytes: int64 [documents], UTF-8 bytes
    of their texts. rows: int64 [documents], their rows in the source. keys: uint64 [documents], pseudo-random, by which
    samples are drawn. labels: int32 [documents], indices of `label_sets`, or, where that is None, of `label_names`;
    None without labels. label_sets: lists of indices of `label_names`, where a document may have several labels or
    none. fingerprint: sha256 of contents, label names and all that they are encoded by. rows_read, bad: how many rows
    of the source were read, and how many could not be used, by reason; the file that holds them, or None.
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
    rows_read: int
    bad: dict[str, int]
    bad_rows_file: Path | None
    chosen: np.ndarray | None = None  # int64 [documents], of those that are stored; None: all, in their order

    @property
    def documents(self) -> int:
        return len(self.offsets) - 1

    @property
    def tokens(self) -> int:
        """All tokens, [bos] and [eos] of each document included."""
        return int(self.offsets[-1])

    @property
    def text_bytes(self) -> int:
        """The UTF-8 bytes of all texts."""
        return int(self.document_bytes.sum())

    def document(self, index: int) -> np.ndarray:
        """The tokens of one document, [bos] and [eos] included: uint16 or uint32, a read-only view."""
        return self.reader.tokens(*self._place(index))

    def answer_mask(self, index: int) -> np.ndarray:
        """Which tokens of a document are labelled, bool [n]; all, where its source tells no answers apart."""
        return self.reader.answer_mask(*self._place(index))

    def note(self, index: int) -> dict[str, Any] | None:
        """What an evaluation needs besides the tokens of a document."""
        return self.reader.note(self._stored_index(index))

    def read_tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens start to stop - 1 of the stream, clipped to it as a slice is: uint16 or uint32, perhaps read-only."""
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
        """64 bits of the blake2b of each document's tokens: uint64 [documents]. Equal texts have equal hashes."""
        hashes = np.empty(self.documents, np.uint64)
        for index in range(self.documents):
            digest = hashlib.blake2b(self.document(index), digest_size=8).digest()
            hashes[index] = int.from_bytes(digest, "little")
        return hashes

    def first(self, documents: int) -> "TokenCache":
        """A sample that does not change: the documents of the smallest keys, in their order. All, if there are fewer.

        The documents of a source of one part lie in this order from the start.
        """
        if documents >= self.documents:
            return self
        smallest = np.empty(0, np.int64)
        for start in range(0, self.documents, KEYS_AT_A_TIME):
            candidates = np.concatenate([smallest, np.arange(start, min(start + KEYS_AT_A_TIME, self.documents))])
            smallest = candidates[np.argsort(self.keys[candidates], kind="stable")[:documents]]
        return self.subset(smallest)

    def subset(self, indices: np.ndarray) -> "TokenCache":
        """These documents, in this order. indices: int [n]."""
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


def build_cache(
    records: Any,
    row_format: str,
    tokenizer: Tokenizer,
    cache_dir: Path,
    *,
    template: str = "",
    max_bad_share: float = 0.01,
    workers: int | None = None,
    progress: bool | None = None,
    labels: list[str] | None = None,
    shard: tuple[int, int] | None = None,
) -> TokenCache | None:
    """The token cache of the records of a source (`sources.open_split`), found in `cache_dir`, or built there.

    Each part of the source becomes a shard, whole or not at all, so that a build that was killed goes on where it was.
    max_bad_share: the share of rows that may be bad. workers: processes that encode (None: one a core, or none).
    progress: a bar (None: on a terminal only; otherwise one line). labels: the classes in order (None: those found,
    sorted). shard: (i, n) builds the i-th of n shares of the parts only, i from 1, and gives None while parts lack.

    When a cache is opened, the digests of all files are verified, or if they have more than 1 GiB together, only their
    sizes; what is damaged is built again, said on stderr. Raises UserError where more rows are bad than may be, for a
    source without a document, and for a label that is not in `labels`.
    """
    key = _key(records, row_format, tokenizer, template)
    target = Path(cache_dir) / f"tokens-{key[:16]}"
    for _ in range(ATTEMPTS):
        if (target / MANIFEST).exists():
            try:
                return _open(target, key, records.name, labels, max_bad_share)
            except cache_build.DAMAGE_ERRORS as error:
                cache_build.warn_damaged(target, error)
        if not _build_missing(records, row_format, tokenizer, template, target, key, workers, progress, shard):
            return None
    raise UserError(f"tokens: {target} was built {ATTEMPTS} times, and is damaged again: is its disk in order?")


def _key(records: Any, row_format: str, tokenizer: Tokenizer, template: str) -> str:
    settings = json.dumps([records.key, row_format, tokenizer.hash, template, FORMAT])
    return hashlib.sha256(settings.encode()).hexdigest()


def _build_missing(records, row_format, tokenizer, template, target, key, workers, progress, shard) -> bool:
    """Build what lacks, or the share `shard` of it. Returns whether all is there."""
    parts = list(records.parts())
    if not parts:
        raise UserError(f"source {records.name}: it has no rows")
    share, shares = shard or (1, 1)
    target.parent.mkdir(parents=True, exist_ok=True)
    cache_build.remove_abandoned(target.parent)
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=target.name + "."))
    try:
        tokenizer.save(temporary / "tokenizer.json")
        job = cache_build.Job(records, row_format, temporary / "tokenizer.json", template, target, temporary)
        metadata = cache_build.build_shards(job, parts, range(share - 1, len(parts), shares), workers, progress)
        if metadata is not None:
            settings = json.dumps([FORMAT, tokenizer.hash, row_format, template])
            cache_build.join_shards(job, metadata, {"key": key, "settings": settings})
        return metadata is not None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _open(directory: Path, key: str, source: str, labels: list[str] | None, max_bad_share: float) -> TokenCache:
    """Raises what is in `cache_build.DAMAGE_ERRORS` if anything is missing or is not what was written."""
    manifest = shards.read_with_digest(directory / MANIFEST)
    if manifest["key"] != key:
        raise ValueError(f"{MANIFEST} belongs to another cache")
    files = manifest["files"]
    shards.check_files(directory, files, digests=sum(size for _, size in files.values()) <= MAX_VERIFIED_BYTES)
    _check_rows(directory, manifest, source, max_bad_share)
    names, label_sets, numbers = _labels(directory, manifest, labels)
    contents = [each["content"] for each in manifest["shards"]]
    arrays = {
        field: np.asarray(np.load(directory / f"{field}.npy", mmap_mode="r"))
        for field in ("document_bytes", "rows", "keys")
    }
    reader = ShardReader(directory, manifest)
    return TokenCache(
        reader=reader,
        offsets=reader.offsets,
        **arrays,
        labels=numbers,
        label_names=names,
        label_sets=label_sets,
        fingerprint=hashlib.sha256(json.dumps([manifest["settings"], names, contents]).encode()).hexdigest(),
        rows_read=manifest["rows_read"],
        bad=manifest["bad"],
        bad_rows_file=directory / shards.BAD_ROWS if manifest["bad"] else None,
    )


def _check_rows(directory: Path, manifest: dict[str, Any], source: str, max_bad_share: float) -> None:
    """Say how many rows are bad. Raises UserError if they are more than may be, or if nothing is left."""
    bad, read = sum(manifest["bad"].values()), manifest["rows_read"]
    if bad:
        file = directory / shards.BAD_ROWS
        reasons = ", ".join(f"{reason}: {count:,}" for reason, count in manifest["bad"].items())
        counts = f"source {source}: {bad:,} of {read:,} rows ({bad / read:.2%}) cannot be used ({reasons})"
        if bad > max_bad_share * read:
            with open(file, encoding="ascii") as lines:
                first = json.loads(next(lines))
            raise UserError(
                f"{counts}, and bad_rows={max_bad_share:g} may be; they are in {file}, the first: row {first['row']} "
                f"(counted from 0), {first['reason']}: {first['start']!r}"
            )
        print(f"tokens: {counts}: set aside in {file}", file=sys.stderr)
    if not manifest["documents"]:
        raise UserError(
            f"source {source}: it has no documents: " + ("all its rows are bad" if bad else "it has no rows")
        )


def _labels(directory: Path, manifest: dict[str, Any], labels: list[str] | None):
    """The names of all classes, the sets of them that documents have (None: each has one), and each document's."""
    found = sorted({name for names in manifest["label_sets"] for name in names})
    if not (found or manifest["several"]):
        return [], None, None
    names = list(labels) if labels is not None else found
    for name in found:
        if name not in names:
            raise UserError(f"data: unknown label {name!r}: {nearest(name, names)}")
    number = {name: index for index, name in enumerate(names)}
    sets = [sorted(number[name] for name in each) for each in manifest["label_sets"]]
    ordered = sorted(sets) if manifest["several"] else [[index] for index in range(len(names))]
    place = {tuple(each): index for index, each in enumerate(ordered)}
    numbers = np.asarray(np.load(directory / LABELS, mmap_mode="r"))
    changed = np.array([place[tuple(each)] for each in sets], np.int32)
    if (changed != np.arange(len(changed))).any():
        numbers = changed[numbers]
    return names, ordered if manifest["several"] else None, numbers
