"""Tokens on disk, memory-mapped: each text is tokenized once, and what changed or broke is tokenized again."""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import numpy as np
import rich.console
import rich.progress

from llm3.data.tokenizer import Tokenizer
from llm3.errors import UserError, nearest

FORMAT = 1  # part of the key: raise it when the files or their meaning change
MANIFEST = "manifest.json"  # written last: a directory without it is half-built
ROWS_AT_A_TIME = 1024
ABANDONED_SECONDS = 24 * 3600  # a half-built directory that nobody wrote to for so long


@dataclasses.dataclass(frozen=True)
class TokenCache:
    """Tokenized documents, in a fixed pseudo-random order that depends on their content only.

    stream: uint16 or uint32 [tokens], all documents end to end, each as [bos] tokens [eos].
    offsets: int64 [documents + 1], where they start in the stream. document_bytes: int64 [documents], UTF-8 bytes of
    their texts. labels: int32 [documents], indices of `label_names`, or None. fingerprint: sha256 of texts, labels,
    label names, tokenizer and format; the order of the rows given to `build` plays no part in it.
    """

    stream: np.ndarray
    offsets: np.ndarray
    document_bytes: np.ndarray
    labels: np.ndarray | None
    label_names: list[str]
    fingerprint: str

    @property
    def documents(self) -> int:
        return len(self.offsets) - 1

    @property
    def tokens(self) -> int:
        """All tokens, [bos] and [eos] of each document included."""
        return len(self.stream)

    @property
    def text_bytes(self) -> int:
        """The UTF-8 bytes of all texts."""
        return int(self.document_bytes.sum())

    def document(self, index: int) -> np.ndarray:
        """The tokens of one document, [bos] and [eos] included: a read-only view."""
        return self.stream[self.offsets[index] : self.offsets[index + 1]]

    def document_hashes(self) -> np.ndarray:
        """64 bits of the blake2b of each document's tokens: uint64 [documents]. Equal texts have equal hashes."""
        stream = memoryview(self.stream)
        documents = (stream[start:stop] for start, stop in itertools.pairwise(self.offsets.tolist()))
        digests = b"".join(hashlib.blake2b(document, digest_size=8).digest() for document in documents)
        return np.frombuffer(digests, np.uint64)

    def first(self, documents: int) -> "TokenCache":
        """The first documents only: a sample that does not change, since the order is fixed and pseudo-random."""
        if documents >= self.documents:
            return self
        return dataclasses.replace(
            self,
            stream=self.stream[: self.offsets[documents]],
            offsets=self.offsets[: documents + 1],
            document_bytes=self.document_bytes[:documents],
            labels=None if self.labels is None else self.labels[:documents],
            fingerprint=f"{self.fingerprint}[:{documents}]",
        )


def build(
    dataset: datasets.Dataset,
    tokenizer: Tokenizer,
    cache_dir: Path,
    *,
    workers: int | None = None,
    progress: bool | None = None,
    labels: list[str] | None = None,
) -> TokenCache:
    """The token cache of a dataset with a column "text" and perhaps "label"; found in `cache_dir`, or built there.

    workers: threads that tokenize (None: one a core). progress: a bar (None: on a terminal only; otherwise one line).
    labels: the classes in order (None: those of the dataset, sorted). Every file is verified by its sha256; a cache
    that is damaged is built again, said on stderr. Raises UserError for a label that is not in `labels`.
    """
    label_names = _label_names(dataset, labels)
    digests = _row_digests(dataset)
    order = _by_digest(digests)
    fingerprint = _fingerprint(digests[order], label_names, tokenizer)
    target = Path(cache_dir) / f"tokens-{fingerprint[:16]}"
    if target.exists():
        try:
            return _open(target, fingerprint)
        except (OSError, ValueError, KeyError) as error:
            print(f"tokens: {target} is damaged ({error}); building it again", file=sys.stderr)
            shutil.rmtree(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(target.parent)
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=target.name + "."))
    try:
        _write(dataset, order, tokenizer, label_names, fingerprint, temporary, workers, progress)
        with contextlib.suppress(OSError):  # another process has finished the same cache first
            os.rename(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return _open(target, fingerprint)


def _remove_abandoned(cache_dir: Path) -> None:
    """Remove what killed processes left half-built."""
    for directory in cache_dir.glob("tokens-*.*"):
        with contextlib.suppress(OSError):  # another process may remove or rename it meanwhile
            written = max(path.stat().st_mtime for path in (directory, *directory.iterdir()))
            if time.time() - written > ABANDONED_SECONDS:
                shutil.rmtree(directory)


def _label_names(dataset: datasets.Dataset, labels: list[str] | None) -> list[str]:
    if "label" not in dataset.column_names:
        return []
    found = sorted(set(dataset.unique("label")))
    if labels is None:
        return found
    for label in found:
        if label not in labels:
            raise UserError(f"data: unknown label {label!r}: {nearest(label, labels)}")
    return list(labels)


def _columns(dataset: datasets.Dataset, order: np.ndarray | None = None) -> Iterator[tuple[list[str], list[str]]]:
    """Yield (texts, labels) of bounded numbers of rows; labels are "" where there are none."""
    for start in range(0, len(dataset), ROWS_AT_A_TIME):
        stop = min(start + ROWS_AT_A_TIME, len(dataset))
        rows = dataset[start:stop] if order is None else dataset[order[start:stop]]
        yield rows["text"], rows.get("label", [""] * (stop - start))


def _row_digests(dataset: datasets.Dataset) -> np.ndarray:
    """The sha256 of each row's text and label, uint64 [rows, 4]; the n-th copy of a row has a digest of its own."""
    digests = np.empty((len(dataset), 4), ">u8")
    rows = (row for columns in _columns(dataset) for row in zip(*columns, strict=True))
    for index, row in enumerate(rows):
        digests[index] = _words(json.dumps(row).encode())
    order = _by_digest(digests)
    ordered = digests[order]
    first = np.concatenate([[True], (ordered[1:] != ordered[:-1]).any(axis=1)])[: len(ordered)]
    copies = np.arange(len(ordered)) - np.flatnonzero(first)[np.cumsum(first) - 1]
    for place in np.flatnonzero(copies):
        digests[order[place]] = _words(ordered[place].tobytes() + int(copies[place]).to_bytes(8, "big"))
    return digests


def _words(content: bytes) -> np.ndarray:
    return np.frombuffer(hashlib.sha256(content).digest(), ">u8")


def _by_digest(digests: np.ndarray) -> np.ndarray:
    """The rows in an order as good as random, in which neighbours have nothing to do with each other."""
    return np.lexsort(digests.T)


def _fingerprint(digests: np.ndarray, label_names: list[str], tokenizer: Tokenizer) -> str:
    settings = json.dumps([FORMAT, tokenizer.hash, label_names])
    return hashlib.sha256(settings.encode() + digests.tobytes()).hexdigest()


def _write(dataset, order, tokenizer, label_names, fingerprint, directory, workers, progress) -> None:
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    classes = {name: index for index, name in enumerate(label_names)}
    lengths, byte_counts, label_ids = [], [], []
    with (
        open(directory / "stream.bin", "wb") as stream,
        ThreadPoolExecutor(workers or os.cpu_count()) as threads,
        _progress(len(dataset), progress) as advance,
    ):
        for texts, labels in _columns(dataset, order):
            for tokens in threads.map(lambda text: _document(text, tokenizer, dtype), texts):
                stream.write(tokens.tobytes())
                lengths.append(len(tokens))
            byte_counts.extend(len(text.encode()) for text in texts)
            label_ids.extend(classes[label] for label in labels if classes)
            advance(len(texts))
    np.save(directory / "offsets.npy", np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]))
    np.save(directory / "document_bytes.npy", np.array(byte_counts, np.int64))
    if label_names:
        np.save(directory / "labels.npy", np.array(label_ids, np.int32))
    files = {path.name: _sha256(path) for path in sorted(directory.iterdir())}
    manifest = {
        "fingerprint": fingerprint,
        "documents": len(lengths),
        "tokens": sum(lengths),
        "text_bytes": sum(byte_counts),
        "dtype": dtype.name,
        "label_names": label_names,
        "files": files,
    }
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=1))


def _document(text: str, tokenizer: Tokenizer, dtype: np.dtype) -> np.ndarray:
    return np.array([tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id], dtype)


def _open(directory: Path, fingerprint: str) -> TokenCache:
    """Raises OSError, ValueError or KeyError if anything is missing or is not what was written."""
    manifest = json.loads((directory / MANIFEST).read_text())
    if manifest["fingerprint"] != fingerprint:
        raise ValueError(f"{MANIFEST} belongs to another cache")
    for name, digest in manifest["files"].items():
        if _sha256(directory / name) != digest:
            raise ValueError(f"{name} is not as it was written")
    # An empty file cannot be mapped.
    stream = (
        np.memmap(directory / "stream.bin", manifest["dtype"], "r") if manifest["tokens"] else np.empty(0, np.uint16)
    )
    return TokenCache(
        stream=stream,
        offsets=np.load(directory / "offsets.npy"),
        document_bytes=np.load(directory / "document_bytes.npy"),
        labels=np.load(directory / "labels.npy") if manifest["label_names"] else None,
        label_names=manifest["label_names"],
        fingerprint=fingerprint,
    )


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _progress(documents: int, bar: bool | None):
    """Yield a function that counts documents: a bar on a terminal, one plain line elsewhere."""
    console = rich.console.Console(stderr=True)
    if bar is None:
        bar = console.is_terminal
    if not bar:
        print(f"tokens: encoding {documents:,} documents", file=sys.stderr)
        yield lambda count: None
        return
    columns = (*rich.progress.Progress.get_default_columns(), rich.progress.MofNCompleteColumn())
    with rich.progress.Progress(*columns, console=console, transient=True) as shown:
        task = shown.add_task("encoding documents", total=documents)
        yield lambda count: shown.advance(task, count)
