"""The verb `bench-data`: build the token cache of a generated file with all cores, sample memory, and read batches.

The same run compares the build with `datasets.map`, with the same tokenizer on a part of the text. Does not import jax.
"""

import functools
import itertools
import json
import os
import random
import shutil
import tempfile
import time
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
from llm3.distributed import host_memory

VOCAB_SIZE = 8192
COMPARED_BYTES = 100_000_000  # max bytes of text in the comparison with `datasets.map`
TIMES = 2  # number of alternating runs of both; the fastest counts
BATCH_SIZE, SEQUENCE_LENGTH, BATCHES = 16, 256, 500


def bench_data(workdir: Path, gigabytes: float = 0.1) -> int:
    """Print the metrics of `measure_cache` as JSON."""
    print(json.dumps(measure_cache(gigabytes, workdir), indent=1))
    return 0


def measure_cache(gigabytes: float, workdir: Path) -> dict[str, Any]:
    """Generate text inside `workdir`, measure, remove the text, and return the metrics.

    peak_rss_bytes: memory of this process and its children, sampled during the build (None without /proc).
    rss_before_bytes: the same before the build. tokens_per_second: speed of the build, from the file to an open cache.
    compared: tokens per second of both builds on the same text. batch_tokens_per_second: speed of reading batches of
    16 random windows of 256 tokens.
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
        with host_memory.peak_of(host_memory.resident_bytes) as memory:
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
            "rss_before_bytes": memory.before,
            "peak_rss_bytes": memory.peak,
            "batch_tokens_per_second": _batch_speed(built),
            "compared": _compared(part, trained, directory),
        }
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def write_text(path: Path, documents: list[str], size: int) -> int:
    """Write documents as JSON Lines up to `size` bytes; each repetition shuffles the lines of a document."""
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
    built = cache.build_cache(records, source.row_format, trained, directory)
    assert built is not None  # only a build of one shard returns None
    return built


def _batch_speed(built: cache.TokenCache) -> float:
    """Tokens per second of reading random windows."""
    mixture = Mixture({"text": WindowTable(built, SEQUENCE_LENGTH)}, [(0, {"text": 1.0})], BATCH_SIZE, seed=0)
    before = time.perf_counter()
    for step in range(BATCHES):
        mixture.batch(step)
    return BATCHES * BATCH_SIZE * SEQUENCE_LENGTH / (time.perf_counter() - before)


def _compared(part: Path, trained: Tokenizer, directory: Path) -> dict[str, float]:
    """Tokens per second of `cache.build_cache` and `datasets.map`, which does not have to read the file."""
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
        "cpu_seconds": cpu_seconds,  # over all cores; other load on the machine hardly changes it
        "datasets_map_cpu_seconds": map_cpu_seconds,
    }


def _clocks() -> np.ndarray:
    """[wall seconds, CPU seconds of this process and its finished children]"""
    used = os.times()
    return np.array([time.perf_counter(), used.user + used.system + used.children_user + used.children_system])


def _map(rows: datasets.Dataset, directory: Path, number: int) -> None:
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process per core, as in our build
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
    return {"tokens": [[*trained.starts, *ids, trained.eos_id] for ids in trained.encode_batch(rows["text"])]}


@functools.lru_cache(maxsize=1)
def _loaded(file: Path) -> Tokenizer:
    return Tokenizer.load(file)
