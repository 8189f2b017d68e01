"""The metrics of the loop, and how it ends."""

import math
import types

import numpy as np
import pytest

from llm3.distributed.preemption import StopRequest
from llm3.distributed.watchdog import Watchdog
from llm3.errors import Diverged
from llm3.training.loop import Hooks, Verdict, train
from llm3.training.metrics import Cost, Meter


def metrics(loss, weight, skipped=0.0, tokens=8.0, in_a_row=0.0):
    named = {"loss": loss, "weight": weight, "skipped": skipped, "tokens": tokens, "grad_norm": loss / 2}
    return named | {"non_finite_in_a_row": in_a_row, "new_level": 0.0}


def test_mfu_counts_model_flops_and_hfu_what_is_computed_again_as_well():
    meter = Meter(Cost(), flops_per_step=30.0, hardware_flops_per_step=40.0, peak_flops=1000.0)
    meter.pending = [metrics(2.0, 3.0)]
    line = meter.log_line()
    assert line["mfu"] == pytest.approx(30 / line["step_seconds"] / 1000) and meter.cost.flops == 30
    assert line["hfu"] == pytest.approx(line["mfu"] * 4 / 3)
    assert line["flops_per_second"] == pytest.approx(line["hardware_flops_per_second"] * 3 / 4)


def test_a_log_line_weights_steps_by_their_targets_and_ignores_skipped_steps():
    meter = Meter(Cost(), flops_per_step=10.0, hardware_flops_per_step=10.0, peak_flops=None)
    meter.pending = [metrics(2.0, 3.0), metrics(math.nan, 5.0, skipped=1.0), metrics(4.0, 1.0)]
    line = meter.log_line()
    assert line["loss"] == pytest.approx((3 * 2.0 + 1 * 4.0) / 4)
    assert line["gradient_norm"] == 2.0 and line["skipped_steps"] == 1
    assert (meter.cost.tokens, meter.cost.flops, meter.cost.skipped_steps) == (24, 30.0, 1)


def test_the_first_line_alone_has_the_time_until_the_first_step_was_computed(monkeypatch):
    monkeypatch.setattr("time.perf_counter", lambda: 100.0)
    meter = Meter(Cost(), flops_per_step=1.0, hardware_flops_per_step=1.0, peak_flops=None, began=60.0)
    lines = []
    for _ in range(2):
        meter.pending, meter.since = [metrics(2.0, 1.0)], 99.0
        meter.first_step()
        lines.append(meter.log_line())
    assert [line.get("first_step_seconds") for line in lines] == [40.0, None]


def test_a_log_line_of_skipped_steps_only_has_no_loss():
    meter = Meter(Cost(), flops_per_step=10.0, hardware_flops_per_step=10.0, peak_flops=None)
    meter.pending = [metrics(math.nan, 0.0, skipped=1.0)]
    line = meter.log_line()
    assert line["loss"] is None and line["gradient_norm"] is None and line["skipped_steps"] == 1


def run(start=0, stop=10, request=None, ask_at=None, bad_from=None, evaluate=None, every=0, saves=()):
    """The steps at which a loop logged and saved, its batches, and its last step."""
    logged, saved, batches, request = [], [], [], request or StopRequest()
    run.seen = logged, saved

    def step(state, batch):
        batches.append(batch)
        if len(batches) == ask_at:
            request.signal = 15
        in_a_row = max(0, len(batches) - bad_from) if bad_from is not None else 0
        return state + 1, metrics(np.float64(1.0), 1.0, skipped=float(in_a_row > 0), in_a_row=float(in_a_row))

    hooks = Hooks(
        log_every=3,
        save_every=4,
        evaluates=lambda done: bool(every) and done % every == 0,
        on_log=lambda done, line: logged.append(done),
        on_eval=lambda done, state: evaluate(done),
        on_save=lambda done, state: saved.append(done),
        request=request,
        watchdog=Watchdog(0),
        saves=lambda done: done in saves,
    )
    _, end = train(step, 0, lambda i: i, Meter(Cost(), 1.0, 1.0, None), (start, stop), hooks, stop_after=3)
    return logged, saved, batches, end


def test_the_loop_logs_and_saves_on_its_multiples_and_at_the_end():
    assert run() == ([3, 4, 6, 8, 9, 10], [4, 8, 10], list(range(10)), 10)


def test_the_loop_also_saves_where_it_is_asked_to_and_logs_before_that():
    assert run(saves={5, 8}) == ([3, 4, 5, 6, 8, 9, 10], [4, 5, 8, 10], list(range(10)), 10)


def test_a_resumed_loop_reads_the_remaining_batches():
    assert run(start=8) == ([9, 10], [10], [8, 9], 10)
    assert run(start=10) == ([], [], [], 10)


def test_a_requested_stop_saves_after_the_step_in_flight():
    assert run(ask_at=6) == ([3, 4, 6], [4, 6], list(range(6)), 6)


def test_the_loop_logs_evaluates_and_then_saves_where_an_evaluation_asks_for_it():
    seen = []

    def evaluate(done):
        seen.append((done, list(run.seen[0]), list(run.seen[1])))
        return Verdict(save=done == 5)

    assert run(every=5, evaluate=evaluate) == ([3, 4, 5, 6, 8, 9, 10], [4, 5, 8, 10], list(range(10)), 10)
    assert seen == [(5, [3, 4, 5], [4]), (10, [3, 4, 5, 6, 8, 9, 10], [4, 5, 8])]


def test_an_evaluation_ends_the_loop_with_a_save():
    assert run(every=3, evaluate=lambda done: Verdict(stop=done == 6)) == ([3, 4, 6], [4, 6], list(range(6)), 6)


def test_a_stop_that_is_requested_during_an_evaluation_saves_its_step():
    request = StopRequest()

    def evaluate(done):
        request.signal = 15
        return Verdict()

    assert run(every=5, evaluate=evaluate, request=request) == ([3, 4, 5], [4, 5], list(range(5)), 5)


def test_step_times_exclude_evaluations(monkeypatch):
    clock = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr("time.perf_counter", lambda: clock.now)
    lines = []

    def step(state, batch):
        clock.now += 1.0
        return state, metrics(np.float64(1.0), 1.0)

    def evaluate(done, state):
        assert watchdog.place()[:2] == (done, "evaluating")
        clock.now += 1000.0
        return Verdict()

    watchdog = Watchdog(0)
    hooks = Hooks(
        log_every=3,
        save_every=100,
        evaluates=lambda done: done % 2 == 0,
        on_log=lambda _, line: lines.append(line),
        on_eval=evaluate,
        on_save=lambda *_: None,
        request=StopRequest(),
        watchdog=watchdog,
    )
    train(step, 0, lambda i: i, Meter(Cost(), 1.0, 1.0, None), (0, 6), hooks, stop_after=3)
    assert [line["step_seconds"] for line in lines] == [1.0] * len(lines) and len(lines) == 4


def test_a_loop_with_too_many_non_finite_steps_in_a_row_ends_without_another_save():
    with pytest.raises(Diverged, match=r"^step 8: .* of 3 steps in a row was not finite \(guard\.stop_after=3\)"):
        run(bad_from=5)
    assert run.seen == ([3, 4, 6, 8], [4])


def test_steps_skipped_now_and_then_do_not_end_a_loop():
    assert run(bad_from=8)[3] == 10
