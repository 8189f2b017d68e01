"""The token cache, measured: a generated text file, its cache built with all cores, memory sampled, batches read.

Beside it, in the same run, `datasets.map` with the same tokenizer on a part of the same text. Nothing here imports jax.
"""

import contextlib
import functools
import itertools
import json
import os
import random
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from llm3.config.data_schema import SourceConfig
from llm3.data import tokenizer
from llm3.data.cache import cache
from llm3.data.cache.build import available_cores
from llm3.data.mixture import Mixture
from llm3.data.sources import corpus
from llm3.data.sources import split as sources
from llm3.data.tokenizer import Tokenizer
from llm3.data.windows.stream import WindowTable

VOCAB_SIZE = 8192
COMPARED_BYTES = 100_000_000  # of the text at most, that `datasets.map` encodes as well
TIMES = 2  # that both do it, in turns; the faster time counts
BATCH_SIZE, SEQUENCE_LENGTH, BATCHES = 16, 256, 500
SAMPLE_SECONDS = 0.05


def bench_data(workdir: Path, gigabytes: float = 0.1) -> int:
    """Print the figures of `measure_cache` as JSON."""
    print(json.dumps(measure_cache(gigabytes, workdir), indent=1))
    return 0


def measure_cache(gigabytes: float, workdir: Path) -> dict[str, Any]:
    """Generate so much text inside `workdir`, measure, and remove it again. Returns the figures.

    peak_rss_bytes: of this process and its children together, sampled while the cache is built (None without /proc);
    rss_before_bytes: before that. tokens_per_second: of the whole build, from the file to an open cache.
    compared: tokens per second of both on the same part of the text. batch_tokens_per_second: random windows of 256
    tokens, 16 a batch, from the cache.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(dir=workdir, prefix="data-bench."))
    try:
        documents = corpus.load_corpus("python", "train", directory)["text"][:]
        trained = tokenizer.train(documents, VOCAB_SIZE)
        trained.save(directory / "tokenizer.json")
        file, part = directory / "text.jsonl", directory / "part.jsonl"
        size = write_text(file, documents, int(gigabytes * 1e9))
        write_text(part, documents, min(size, COMPARED_BYTES))
        del documents
        with _peak_rss() as memory:
            before = time.perf_counter()
            built = _build(file, trained, directory / "cache")
            seconds = time.perf_counter() - before
        return {
            "file_bytes": size,
            "text_bytes": built.text_bytes,
            "documents": built.documents,
            "tokens": built.tokens,
            "processes": available_cores(),
            "seconds": seconds,
            "tokens_per_second": built.tokens / seconds,
            "rss_before_bytes": memory["before"],
            "peak_rss_bytes": memory["peak"],
            "batch_tokens_per_second": _batch_speed(built),
            "compared": _compared(part, trained, directory),
        }
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def write_text(path: Path, documents: list[str], size: int) -> int:
    """Write documents as JSON Lines, again and again, each time with its lines in another order, up to `size` bytes."""
    written = 0
    with open(path, "w", encoding="utf-8") as file:
        for number in itertools.count():
            lines = documents[number % len(documents)].splitlines()
            if number >= len(documents):
                random.Random(number).shuffle(lines)
            row = json.dumps({"text": "\n".join(lines)}) + "\n"
            if written + len(row) > size:
                return written
            written += file.write(row)
    return written


def _build(file: Path, trained: Tokenizer, directory: Path) -> cache.TokenCache:
    source = SourceConfig(path="json", data_files=str(file), validation="")
    records = sources.open_split(source, "train", cache_dir=directory)
    return cache.build_cache(records, source.row_format, trained, directory)


def _batch_speed(built: cache.TokenCache) -> float:
    """Tokens per second, of windows from all over the cache."""
    mixture = Mixture({"text": WindowTable(built, SEQUENCE_LENGTH)}, [(0, {"text": 1.0})], BATCH_SIZE, seed=0)
    before = time.perf_counter()
    for step in range(BATCHES):
        mixture.batch(step)
    return BATCHES * BATCH_SIZE * SEQUENCE_LENGTH / (time.perf_counter() - before)


def _compared(part: Path, trained: Tokenizer, directory: Path) -> dict[str, float]:
    """Tokens per second of `cache.build_cache` and of `datasets.map`, which has read the file into Arrow before."""
    datasets.disable_progress_bars()
    rows = datasets.load_dataset("json", data_files=str(part), split="train", cache_dir=str(directory / "datasets"))
    tokens, ours, theirs = 0, [], []
    for i in range(TIMES):
        before = _clocks()
        tokens = _build(part, trained, directory / f"cache-{i}").tokens
        ours.append(_clocks() - before)
        before = _clocks()
        _map(rows, directory, i)
        theirs.append(_clocks() - before)
    (seconds, cpu_seconds), (map_seconds, map_cpu_seconds) = np.min(ours, axis=0), np.min(theirs, axis=0)
    return {
        "file_bytes": part.stat().st_size,
        "tokens_per_second": tokens / seconds,
        "datasets_map_tokens_per_second": tokens / map_seconds,
        "ratio": map_seconds / seconds,
        "cpu_seconds": cpu_seconds,  # of all cores: what a busy machine leaves nearly as it is
        "datasets_map_cpu_seconds": map_cpu_seconds,
    }


def _clocks() -> np.ndarray:
    """[seconds of the wall clock, CPU seconds of this process and of its children that have ended]"""
    used = os.times()
    return np.array([time.perf_counter(), used.user + used.system + used.children_user + used.children_system])


def _map(rows: datasets.Dataset, directory: Path, number: int) -> None:
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a process a core, as in our build
    try:
        rows.map(
            functools.partial(_encode, file=directory / "tokenizer.json"),
            batched=True,
            num_proc=available_cores(),
            remove_columns=rows.column_names,
            features=datasets.Features({"tokens": datasets.Sequence(datasets.Value("int32"))}),
            new_fingerprint=f"bench{number}",
        )
    finally:
        os.environ.pop("TOKENIZERS_PARALLELISM")
        if before is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def _encode(rows: dict[str, list[str]], file: Path) -> dict[str, list[list[int]]]:
    trained = _loaded(file)
    return {"tokens": [[trained.bos_id, *ids, trained.eos_id] for ids in trained.encode_batch(rows["text"])]}


@functools.lru_cache(maxsize=1)
def _loaded(file: Path) -> Tokenizer:
    return Tokenizer.load(file)


@contextlib.contextmanager
def _peak_rss() -> Iterator[dict[str, int | None]]:
    """Yield {"before", "peak"}: bytes of this process and all below it; the peak is there at the end."""
    known = Path("/proc/self/statm").exists()
    memory = {"before": _rss(os.getpid()) if known else None, "peak": None}
    ended = threading.Event()

    def sample() -> None:
        while not ended.wait(SAMPLE_SECONDS):
            memory["peak"] = max(memory["peak"] or 0, _rss(os.getpid()))

    thread = threading.Thread(target=sample)
    if known:
        thread.start()
    try:
        yield memory
    finally:
        ended.set()
        if known:
            thread.join()


def _rss(process: int) -> int:
    """Bytes of memory of a process and its children, what they share counted for each. A process that ended has 0."""
    try:
        pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
        threads = list(Path(f"/proc/{process}/task").iterdir())
        children = [int(child) for thread in threads for child in (thread / "children").read_text().split()]
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE") + sum(map(_rss, children))
