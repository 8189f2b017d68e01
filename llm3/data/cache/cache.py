"""Opening the token cache of a source: it is tokenized once, and again only after a change or damage."""

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from llm3.data.cache import build as cache_build
from llm3.data.cache import holds, shards
from llm3.data.cache.build import MANIFEST
from llm3.data.cache.labels import UNKNOWN, check_unknown, read_labels
from llm3.data.cache.reader import ShardReader
from llm3.data.cache.token_cache import TokenCache
from llm3.data.round_trip import RoundTrip
from llm3.data.tokenizer import Tokenizer
from llm3.distributed import interrupts
from llm3.errors import UserError, counted, to_stderr

FORMAT = 3  # part of the key; raise it when the files or their meaning change
MAX_VERIFIED_BYTES = 2**30  # of larger caches, only the sizes of files are verified, not the digests
ATTEMPTS = 3  # builds before a damaged cache is given up


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
    """The token cache of a source's records (from `sources.split.open_split`), opened or built in `cache_dir`.

    max_bad_share: max share of unusable rows
    workers: processes that encode; None: one per core, or this process alone for a small source
    progress: whether to show a progress bar or print one line; None: a bar on a terminal only
    labels: class names in order; None: the names found, sorted
    shard: (i, n) builds only share i of n of the parts, i from 1; the result is None while other parts are missing

    Each part becomes a shard, complete or not at all, so that a killed build resumes. Opening a cache verifies the
    digests of its files (of more than 1 GiB together, only the sizes); damaged files are rebuilt, with a warning on
    stderr. Documents with a class that is not in `labels` count as unusable rows. Raises UserError for too many
    unusable rows, and for no document.
    """
    key = _key(records, row_format, tokenizer, template)
    target = Path(cache_dir) / f"tokens-{key[:16]}"
    for _ in range(ATTEMPTS):
        if (target / MANIFEST).exists():
            try:
                return _open(target, key, records, tokenizer, labels, max_bad_share)
            except cache_build.DAMAGE_ERRORS as error:
                cache_build.warn_damaged(target, error)
        if not _build_missing(records, row_format, tokenizer, template, target, key, workers, progress, shard):
            return None
    raise UserError(f"tokens: {target} was built {ATTEMPTS} times and is damaged again; check its disk")


def check_writable(cache_dir: Path, what: str) -> None:
    """Raise UserError if the cache directory is read-only. what: what has to be written."""
    if cache_dir.is_dir() and not os.access(cache_dir, os.W_OK | os.X_OK):
        raise UserError(
            f"config.cache_dir={str(cache_dir)!r} cannot be created or written to: it is read-only, and does not hold "
            f"{what} yet"
        )


def _key(records: Any, row_format: str, tokenizer: Tokenizer, template: str) -> str:
    return _digest([records.key, row_format, tokenizer.hash, template, FORMAT])


def _digest(settings: Any) -> str:
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()


def _build_missing(
    records: Any,
    row_format: str,
    tokenizer: Tokenizer,
    template: str,
    target: Path,
    key: str,
    workers: int | None,
    progress: bool | None,
    shard: tuple[int, int] | None,
) -> bool:
    """Build the missing shards, or the share `shard` of them, and join them. Returns whether the cache is complete."""
    check_writable(target.parent, f"the tokens of source {records.name}")
    parts = list(records.parts())
    if not parts:
        raise UserError(f"source {records.name}: it has no rows")
    share, shares = shard or (1, 1)
    texts = _digest([records.texts_key, row_format, tokenizer.hash, template, FORMAT])
    made_of = {"source": records.name, "split": records.split, "folder": os.getcwd(), "texts": texts}
    held = holds.begin(target, made_of)
    cache_build.remove_abandoned(target.parent)
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=target.name + "."))
    try:
        tokenizer.save(temporary / "tokenizer.json")
        job = cache_build.Job(
            records, row_format, temporary / "tokenizer.json", template, target, temporary, same_texts(target, texts)
        )
        mine = range(share - 1, len(parts), shares)
        with interrupts.doing(f"tokenizing {records.name}; finished parts are kept"):
            metadata = cache_build.build_shards(job, parts, mine, workers, progress)
        if metadata is not None:
            settings = json.dumps([FORMAT, tokenizer.hash, row_format, template])
            cache_build.join_shards(job, metadata, {"key": key, "settings": settings})
        return metadata is not None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if held is not None:
            held.close()
        if not any(target.glob("shard-*")):  # nothing was built
            holds.removed(target, target)


def same_texts(target: Path, texts: str) -> tuple[Path, ...]:
    """Other entries of the cache with the same texts and tokenizer, and other labels or another choice of rows."""
    others = (each for each in sorted(target.parent.glob("tokens-*")) if each != target and not each.suffix)
    return tuple(each for each in others if holds.read_source(each).get("texts") == texts)


def _open(
    directory: Path, key: str, records: Any, tokenizer: Tokenizer, labels: list[str] | None, max_bad_share: float
) -> TokenCache:
    """Open a complete cache. Raises `cache_build.DAMAGE_ERRORS` for missing or damaged files."""
    held = holds.hold(directory)
    manifest = shards.read_with_digest(directory / MANIFEST)
    if manifest["key"] != key:
        raise ValueError(f"{MANIFEST} belongs to another cache")
    files = manifest["files"]
    shards.check_files(directory, files, digests=sum(size for _, size in files.values()) <= MAX_VERIFIED_BYTES)
    _check_rows(directory, manifest, records, max_bad_share)
    names, label_sets, numbers = read_labels(directory, manifest, labels)
    contents = [each["content"] for each in manifest["shards"]]
    arrays = {
        field: np.asarray(np.load(directory / f"{field}.npy", mmap_mode="r"))
        for field in ("document_bytes", "rows", "keys")
    }
    reader = ShardReader(directory, manifest, held)
    opened = TokenCache(
        reader=reader,
        offsets=reader.offsets,
        **arrays,
        labels=numbers,
        label_names=names,
        label_sets=label_sets,
        fingerprint=hashlib.sha256(json.dumps([manifest["settings"], names, contents]).encode()).hexdigest(),
        starts=len(tokenizer.starts),
        eos_id=tokenizer.eos_id,
        round_trip=RoundTrip(*manifest["round_trip"]) if "round_trip" in manifest else None,
        rows_read=manifest["rows_read"],
        bad=manifest["bad"],
        bad_rows_file=directory / shards.BAD_ROWS if manifest["bad"] else None,
    )
    if numbers is None or not (unknown := np.flatnonzero(numbers == UNKNOWN)).size:
        return opened
    reason = check_unknown(unknown, opened.rows, names, directory, manifest, records, max_bad_share)
    known = opened.subset(np.flatnonzero(numbers != UNKNOWN))
    return dataclasses.replace(known, bad=known.bad | {reason: len(unknown)})


def _check_rows(directory: Path, manifest: dict[str, Any], records: Any, max_bad_share: float) -> None:
    """Print how many rows are unusable. Raises UserError if there are too many, or if no document is left."""
    bad, read = sum(manifest["bad"].values()), manifest["rows_read"]
    if bad:
        file = directory / shards.BAD_ROWS
        reasons = ", ".join(f"{reason}: {count:,}" for reason, count in manifest["bad"].items())
        of = f"{bad:,} of {counted(read, 'row')} ({bad / read:.2%})"
        counts = f"source {records.name}: {of} cannot be used ({reasons})"
        if any(reason.startswith("longer than") for reason in manifest["bad"]):
            counts += ", see sources.*.max_row_bytes"
        if bad > max_bad_share * read:
            with open(file, encoding="ascii") as lines:
                first = json.loads(next(lines))
            raise UserError(
                f"{counts}, more than bad_rows={max_bad_share:g}; they are in {file}, the first: row {first['row']} "
                f"(counted from 0), {first['reason']}: {first['start']!r}"
            )
        to_stderr(f"tokens: {counts}: set aside in {file}")
    if not manifest["documents"]:
        why = f"all its rows are bad ({reasons})" if bad else records.why_empty()
        raise UserError(f"source {records.name}: it has no documents: {why}")
