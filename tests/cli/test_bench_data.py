"""The bench of the token cache writes the text that it is asked for, measures, and leaves nothing behind."""

import json

from llm3.cli import bench_data as data_bench

DOCUMENTS = [f"title {i}\n" + "".join(f"line {k} of document {i}\n" for k in range(20)) for i in range(30)]


def test_the_text_repeats_the_documents_with_their_lines_in_other_orders(tmp_path):
    for name in "ab":
        size = data_bench.write_text(tmp_path / name, DOCUMENTS, 40_000)
        assert 39_000 < size == (tmp_path / name).stat().st_size <= 40_000
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    rows = [json.loads(line)["text"] for line in (tmp_path / "a").read_text().splitlines()]
    assert len(rows) > 2 * len(DOCUMENTS)
    assert len(set(rows)) == len(rows)
    assert [sorted(text.split("\n")) for text in rows[30:60]] == [sorted(text.splitlines()) for text in DOCUMENTS]


def test_the_bench_measures_both_and_cleans_up(tmp_path, monkeypatch):
    monkeypatch.setattr(data_bench.corpus, "load", lambda *_: {"text": DOCUMENTS})
    for name, value in (("VOCAB_SIZE", 300), ("TIMES", 1), ("BATCHES", 2), ("cores", lambda: 1)):
        monkeypatch.setattr(data_bench, name, value)
    figures = data_bench.measure_cache(1e-4, tmp_path)
    assert figures["peak_rss_bytes"] is None or figures["peak_rss_bytes"] >= figures["rss_before_bytes"] > 1e7
    assert figures["text_bytes"] < figures["file_bytes"] <= 1e5
    assert figures["tokens_per_second"] > 0 < figures["batch_tokens_per_second"]
    compared = figures["compared"]
    assert (
        abs(compared["ratio"] * compared["datasets_map_tokens_per_second"] / compared["tokens_per_second"] - 1) < 1e-6
    )
    assert compared["cpu_seconds"] > 0 < compared["datasets_map_cpu_seconds"]
    json.dumps(figures)
    assert not list(tmp_path.iterdir())
