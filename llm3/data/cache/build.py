"""Building a token cache: each part of a source becomes a shard, in several processes; then the shards are joined.

A part always becomes the same bytes, whichever process or machine builds it. Nothing here imports jax, so that worker
processes start quickly.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np

from llm3 import config_folder
from llm3.data import formats
from llm3.data.cache import shards
from llm3.data.cache.known import known_tokens
from llm3.data.cache.progress import Counts, show_progress
from llm3.data.tokenizer import Tokenizer
from llm3.distributed import interrupts
from llm3.errors import UserError
from llm3.files import sync
from llm3.registry import load_plugin

MANIFEST = "manifest.json"  # written last: a cache without it is incomplete
JOINED = {"document_bytes.npy": "bytes", "rows.npy": "row", "keys.npy": "key"}
LABELS = "labels.npy"
DAMAGE_ERRORS = (OSError, ValueError, KeyError)  # raised by reading damaged files
INLINE_SECONDS = 1.0  # build in this process for so long, before starting others (which takes about as long)
ABANDONED_SECONDS = 24 * 3600  # age of the last write, from which on a temporary directory is removed


@dataclasses.dataclass(frozen=True)
class Job:
    """A cache to build in `target`, and what reading and encoding its parts needs. It is sent to worker processes.

    same_texts: caches of the same rows with the same tokenizer, e.g. for other labels, whose tokens are taken over
    """

    records: Any
    row_format: str
    tokenizer_file: Path
    template: str
    target: Path
    temporary: Path
    same_texts: tuple[Path, ...] = ()


def build_shards(
    job: Job, parts: list[Any], mine: range, workers: int | None, progress: bool | None
) -> list[dict[str, Any]] | None:
    """Build missing or damaged shards among `mine`. Returns the metadata of all shards; None while some are missing."""
    left = [number for number in mine if not _is_intact(_shard(job, number))]
    if left:
        of = "" if len(parts) == 1 else f": {len(left):,} of {len(parts):,} parts"
        done = Counts(len(parts))
        with show_progress(f"tokens: encoding {job.records.name}{of}", len(left), done, progress) as advance:
            for _ in _build(job, parts, left, workers, done):
                advance()
    others = [number for number in range(len(parts)) if number not in mine]
    if not all(_shard(job, number).exists() for number in range(len(parts))):
        return None
    if not all([_is_intact(_shard(job, number)) for number in others]):
        return None
    return [shards.read_with_digest(_shard(job, number) / shards.SHARD) for number in range(len(parts))]


def _shard(job: Job, number: int) -> Path:
    return job.target / shards.folder(number)


def _is_intact(directory: Path) -> bool:
    """Whether a shard exists and is intact. A damaged one is removed, with a warning."""
    if not directory.exists():
        return False
    try:
        shards.check_shard(directory)
        return True
    except DAMAGE_ERRORS as error:
        warn_damaged(directory, error)
        shutil.rmtree(directory, ignore_errors=True)
        return False


def warn_damaged(path: Path, error: Exception) -> None:
    """Print one line to stderr."""
    print(f"tokens: {path} is damaged ({error}); rebuilding it", file=sys.stderr)


def _build(job: Job, parts: list[Any], numbers: list[int], workers: int | None, done: Counts) -> Iterator[int]:
    """Build shards and yield the number of each one built. Few or small ones are built in this process."""
    left = collections.deque(numbers)
    wanted = workers or available_cores()
    started = time.monotonic()
    alone = workers is None or wanted == 1
    while left and (len(left) == 1 or wanted == 1 or (alone and time.monotonic() - started < INLINE_SECONDS)):
        yield _build_shard(job, left[0], parts[left.popleft()], done)
    if left:
        yield from _in_processes(job, {number: parts[number] for number in left}, min(wanted, len(left)), done)


def _in_processes(job: Job, parts: dict[int, Any], workers: int, done: Counts) -> Iterator[int]:
    context = multiprocessing.get_context("spawn")  # a fork would copy the locks of jax's threads
    arguments = (job, config_folder.current(), done)
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, initializer=_init_worker, initargs=arguments)
    try:
        with _without_signals():
            futures = [pool.submit(_build_in_worker, number, part) for number, part in parts.items()]
        for future in concurrent.futures.as_completed(futures):
            yield future.result()
    except BrokenProcessPool:
        raise UserError(
            f"source {job.records.name}: a process that encodes it was killed, perhaps for lack of memory; "
            "finished shards are kept; rerun the command to resume"
        ) from None
    except (KeyboardInterrupt, GeneratorExit):
        for process in multiprocessing.active_children():  # do not wait for their parts
            process.kill()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def _without_signals() -> Iterator[None]:
    """Start processes that never get Ctrl-C, which would print a traceback in each, nor what a scheduler sends to all.

    This process ends them: one that a signal ends by itself looks as if it had failed.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, *interrupts.OF_SCHEDULERS})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_job: Job  # the job of this worker process; sent once, since it may hold a long list of parts
_done: Counts


def _init_worker(job: Job, folder: str, done: Counts) -> None:
    global _job, _done
    _job, _done = job, done
    config_folder.enter(folder)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process per core already
    threading.Thread(target=_exit_with, args=(multiprocessing.parent_process(),), daemon=True).start()


def _exit_with(parent: Any) -> None:
    parent.join()
    os._exit(1)  # the pool of a killed owner would wait forever


def _build_in_worker(number: int, part: Any) -> int:
    return _build_shard(_job, number, part, _done)


def available_cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _build_shard(job: Job, number: int, part: Any, done: Counts) -> int:
    target = _shard(job, number)
    if target.exists():  # another process that builds the same cache was faster
        return number
    made = job.temporary / target.name
    made.mkdir()
    row_format, tokenizer = load_plugin(formats, job.row_format), _tokenizer(job.tokenizer_file)
    known = known_tokens([each / target.name for each in job.same_texts], row_format, tokenizer)
    counted = functools.partial(done.add, number)
    shards.write_shard(made, job.records, part, row_format, tokenizer, job.template, known, counted)
    shards.publish(made, target)
    return number


@functools.lru_cache(maxsize=1)
def _tokenizer(file: Path) -> Tokenizer:
    return Tokenizer.load(file)


def join_shards(job: Job, metadata: list[dict[str, Any]], settings: dict[str, Any]) -> None:
    """Write the arrays over all shards, and the manifest last. Several processes may do so at once."""
    made = job.temporary / "joined"
    made.mkdir()
    directories = [_shard(job, number) for number in range(len(metadata))]
    label_sets = sorted({tuple(names) for each in metadata for names in each["label_sets"]})
    documents = sum(each["documents"] for each in metadata)
    for name, field in JOINED.items():
        _save_joined(made / name, documents, (_field(directory, field) for directory in directories))
    _save_joined(
        made / shards.OFFSETS, documents + 1, _offsets(_field(directory, "tokens") for directory in directories)
    )
    places = {names: place for place, names in enumerate(label_sets)}
    numbers = ([places[tuple(names)] for names in each["label_sets"]] for each in metadata)
    labels = (np.array(n, np.int32)[_field(d, "labels")] for n, d in zip(numbers, directories, strict=True))
    _save_joined(made / LABELS, documents, labels)
    if any(each["bad"] for each in metadata):
        with open(made / shards.BAD_ROWS, "wb") as file:
            for directory, each in zip(directories, metadata, strict=True):
                file.write((directory / shards.BAD_ROWS).read_bytes() if each["bad"] else b"")
    bad = sum((collections.Counter(each["bad"]) for each in metadata), collections.Counter())
    files = {path.name: shards.digest_and_size(path) for path in sorted(made.iterdir())}
    for directory, each in zip(directories, metadata, strict=True):
        inside = {shards.SHARD: shards.digest_and_size(directory / shards.SHARD), **each["files"]}
        files |= {f"{directory.name}/{name}": entry for name, entry in inside.items()}
    manifest = {
        **settings,
        "rows_read": sum(each["rows_read"] for each in metadata),
        "bad": dict(sorted(bad.items())),
        "documents": documents,
        "tokens": sum(each["tokens"] for each in metadata),
        "text_bytes": sum(each["text_bytes"] for each in metadata),
        "label_sets": label_sets,
        "several": any(each["several"] for each in metadata) or (len(label_sets) > 1 and () in label_sets),
        **_summed_round_trip(metadata),
        "shards": [{name: each[name] for name in ("documents", "tokens", "dtype", "content")} for each in metadata],
        "files": files,
    }
    shards.write_with_digest(made / MANIFEST, manifest)
    for path in sorted(made.iterdir(), key=lambda path: path.name == MANIFEST):
        sync(path)
        os.replace(path, job.target / path.name)


def _summed_round_trip(metadata: list[dict[str, Any]]) -> dict[str, Any]:
    """{"round_trip": counts of all shards}; {} if the tokenizer loses nothing."""
    counts = [each["round_trip"] for each in metadata if "round_trip" in each]
    return {"round_trip": [sum(each) for each in zip(*counts, strict=True)]} if counts else {}


def _field(directory: Path, name: str) -> np.ndarray:
    return np.load(directory / shards.DOCUMENTS)[name]


def _offsets(lengths: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    end = np.zeros(1, np.int64)
    yield end
    for each in lengths:
        ends = end[-1] + np.cumsum(each, dtype=np.int64)
        yield ends
        end = np.append(end, ends)[-1:]


def _save_joined(path: Path, length: int, arrays: Iterable[np.ndarray]) -> None:
    """Save arrays end to end as one .npy file, with one array in memory at a time."""
    arrays = iter(arrays)
    first = next(arrays)
    header = {"descr": np.lib.format.dtype_to_descr(first.dtype), "fortran_order": False, "shape": (length,)}
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        file.write(first.tobytes())
        for array in arrays:
            file.write(array.tobytes())


def remove_abandoned(cache_dir: Path) -> None:
    """Remove the temporary directories that killed processes left."""
    for directory in cache_dir.glob("tokens-*.*"):
        with contextlib.suppress(OSError):  # another process may remove or rename it meanwhile
            written = max(path.stat().st_mtime for path in (directory, *directory.rglob("*")))
            if time.time() - written > ABANDONED_SECONDS:
                shutil.rmtree(directory)
