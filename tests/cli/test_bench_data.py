"""The bench of the token cache generates text, measures, and removes its files."""

import json
import os

import datasets
import numpy as np
import pytest

from llm3.cli import bench_data
from llm3.data import tokenizer

DOCUMENTS = [f"title {i}\n" + "".join(f"line {k} of document {i}\n" for k in range(20)) for i in range(30)]


@pytest.fixture(autouse=True)
def same_environment(monkeypatch):
    """`datasets.Dataset.map` with processes leaves a copy of os.environ in its place, which rich would not see."""
    monkeypatch.setattr(os, "environ", os.environ)


def test_the_text_repeats_the_documents_with_their_lines_in_other_orders(tmp_path):
    for name in "ab":
        size = bench_data.write_text(tmp_path / name, DOCUMENTS, 40_000)
        assert 39_000 < size == (tmp_path / name).stat().st_size <= 40_000
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    rows = [json.loads(line)["text"] for line in (tmp_path / "a").read_text().splitlines()]
    assert len(rows) > 2 * len(DOCUMENTS)
    assert len(set(rows)) == len(rows)
    assert [sorted(text.split("\n")) for text in rows[30:60]] == [sorted(text.splitlines()) for text in DOCUMENTS]


def test_the_bench_measures_both_and_cleans_up(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_data.corpus, "load_corpus", lambda *_: {"text": DOCUMENTS})
    for name, value in (("VOCAB_SIZE", 300), ("TIMES", 1), ("BATCHES", 2), ("available_cores", lambda: 1)):
        monkeypatch.setattr(bench_data, name, value)
    metrics = bench_data.measure_cache(1e-4, tmp_path)
    assert metrics["peak_rss_bytes"] is None or metrics["peak_rss_bytes"] >= metrics["rss_before_bytes"] > 1e7
    assert metrics["text_bytes"] < metrics["file_bytes"] <= 1e5
    assert metrics["tokens_per_second"] > 0 < metrics["batch_tokens_per_second"]
    assert metrics["compared"]["cpu_seconds"] > 0 < metrics["compared"]["datasets_map_cpu_seconds"]
    json.dumps(metrics)
    assert not list(tmp_path.iterdir())


def test_what_is_compared_are_the_tokens_of_both_and_the_faster_time_of_each(tmp_path, monkeypatch):
    """On a fake clock: building takes 4 s, then 2 s; mapping 16 s, then 8 s; CPU time is half of that."""
    clock, seconds, kept = np.zeros(2), iter([4, 16, 2, 8]), []
    monkeypatch.setattr(bench_data, "_clocks", lambda: clock.copy())
    build, map_ = bench_data._build, datasets.Dataset.map

    def timed(function, keep):
        def call(*args, **kwargs):
            result = function(*args, **kwargs)
            kept.append(keep(result))
            clock[:] += np.array([1, 0.5]) * next(seconds)
            return result

        return call

    monkeypatch.setattr(bench_data, "_build", timed(build, lambda cache: cache.tokens))
    monkeypatch.setattr(datasets.Dataset, "map", timed(map_, lambda rows: sum(map(len, rows["tokens"]))))
    monkeypatch.setattr(bench_data, "available_cores", lambda: 1)
    trained = tokenizer.train(DOCUMENTS, 300)
    trained.save(tmp_path / "tokenizer.json")
    size = bench_data.write_text(tmp_path / "part.jsonl", DOCUMENTS, 20_000)
    compared = bench_data._compared(tmp_path / "part.jsonl", trained, tmp_path)
    tokens, *others = kept
    assert others == [tokens] * 3, "both encode the same text to the same tokens"
    assert compared == {
        "file_bytes": size,
        "tokens_per_second": tokens / 2,
        "datasets_map_tokens_per_second": tokens / 8,
        "ratio": 4,
        "cpu_seconds": 1,
        "datasets_map_cpu_seconds": 4,
    }
