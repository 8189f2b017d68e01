"""Which settings a sweep tries, in what order, and what it says of those that do not fit. Without a device."""

import io
from types import SimpleNamespace

import pytest
from jax.sharding import AbstractMesh

from llm3.cli.bench import sweep as sweeping
from llm3.cli.bench.sweep import Combination, best_of, combinations, other_attentions
from llm3.cli.bench.text import sweep_table
from llm3.config.load import load
from llm3.stages.stage import plan_stage


@pytest.fixture(scope="module")
def stage():
    return plan_stage(load("configs/bench/cpu_small.py"), "pretrain")


def test_attention_that_nobody_has_seen_running_is_not_tried(stage, monkeypatch):
    monkeypatch.setattr(sweeping, "platform", lambda: "gpu")
    session = SimpleNamespace(mesh=AbstractMesh((1, 1), ("data", "context")))
    assert other_attentions(session, stage) == ["pallas", "blockwise"]


def test_combinations_begin_with_the_configs_own_and_divide_the_rows_of_a_device(stage):
    session = SimpleNamespace(mesh=AbstractMesh((1, 1), ("data", "context")))
    others = other_attentions(session, stage)
    assert others == ["blockwise"]  # besides plain, which the config's "auto" chooses
    found = combinations(stage, 4, others)
    assert found[0] == Combination("none", 1, 8, "auto") and len(set(found)) == len(found) == 3 * 3 * 3 * 2
    assert {each.micro_batches for each in found} == {1, 2, 4}
    assert {each.scan_unroll for each in found} == {1, 4, 8}
    changed = found[1].of(stage)
    assert (changed.model.remat, changed.model.scan_unroll, changed.config.micro_batches) == ("full", 1, 4)
    assert found[-1].of(stage).model.attention == "blockwise"


def test_what_needs_more_memory_than_one_that_does_not_fit_is_not_tried_and_the_fastest_that_fits_is_named(
    stage, monkeypatch
):
    tried = []

    def timed(session, chosen, batch, peak):
        tried.append(sweeping.configured(chosen))
        if chosen.model.remat == "none" and chosen.config.micro_batches == 2:
            return {"error": "does not fit: a device has 1.00 GiB", "device_bytes": 2**31}
        seconds = 1.0 if chosen.model.remat == "full" else 0.5
        speed = {"tokens_per_second": 1 / seconds, "mfu": 0.5, "device_bytes": 2**30}
        return {"step_seconds": seconds, "step_seconds_min": seconds, "step_seconds_max": seconds} | speed

    monkeypatch.setattr(sweeping, "_timed", timed)
    monkeypatch.setattr(sweeping, "fed", lambda *_: None)
    monkeypatch.setattr(sweeping, "matmul_peak", lambda _: SimpleNamespace(flops_per_second=1.0))
    monkeypatch.setattr(sweeping, "axis_size", lambda *_: 4)
    monkeypatch.setattr(sweeping, "other_attentions", lambda *_: [])
    session = SimpleNamespace(mesh=None, console=SimpleNamespace(print=lambda text: print(text, file=io.StringIO())))
    rows = sweeping.swept(session, stage)
    assert len(rows) == 27 and len(set(tried)) == len(tried)
    # of each unroll one with a single micro-batch is skipped; with 8, it was tried first, as the config's own
    assert {each for each in combinations(stage, 4, []) if each not in tried} == {
        Combination("none", 1, 1, "auto"),
        Combination("none", 1, 4, "auto"),
    }
    best = best_of(rows, stage)
    assert "--config.model.remat=" in best and "--config.stages.pretrain.micro_batches=" in best
    shown = sweep_table(rows, best).splitlines()
    assert sum("not tried" in line for line in shown) == 2 and sum("does not fit: a" in line for line in shown) == 3
    assert best_of([{"error": "does not fit"}], stage) == "none of them fits"
