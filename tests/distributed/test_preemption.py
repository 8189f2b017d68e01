"""Several processes stop for the signal of one of them, after a step that none of them has passed."""

import math
import signal
import threading
import time

import pytest

from llm3.distributed import interrupts, preemption, processes


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        ([(1, 7), (1, 9), (1, 8)], [10, 10, 10]),  # in one loop: after a step that none has passed
        ([(2, 9), (2, 9)], [None, None]),  # between two loops: at once
        ([(2, 9), (3, 9)], [None, None]),  # the second waits for the first, in a loop of which no step can end
        (
            [(1, 9), (2, 9)],
            [math.inf, None],
        ),  # the first has the last save of its loop to do, for which the other waits
        ([(1, 9), (3, 9)], [math.inf, None]),  # as well, and the other is in the next loop
    ],
)
def test_all_stop_where_nothing_that_was_trained_is_lost(places, expected):
    assert [preemption.last_step(places, len(places), own) for own, _ in places] == expected


def test_without_word_from_a_process_no_save_can_end():
    assert preemption.last_step([(1, 7)], 2, 1) is None


def test_no_step_is_counted_while_the_processes_agree_and_all_take_the_step_that_is_agreed_on(monkeypatch):
    """This process at step 1, another one, which has the signal, at step 2: both end after step 3."""
    others: dict[int, list[int]] = {}
    request, own, asked = preemption.StopRequest(), [], threading.Event()
    monkeypatch.setattr(preemption, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(processes, "count", lambda: 2)
    monkeypatch.setattr(processes, "published_once", lambda name: signal.SIGUSR1)
    monkeypatch.setattr(processes, "publish", lambda name, value: (own.append(value), asked.set()))
    monkeypatch.setattr(processes, "published", lambda name: others)
    with interrupts.Interrupts().watching(*interrupts.OF_SCHEDULERS) as watched, request.listening():
        watched.silent = True
        assert not request.at_step()
        with request.shared(watched):
            asked.wait()
            step = threading.Thread(target=request.at_step)
            step.start()
            time.sleep(0.05)
            assert request.steps == 1 and own == [(1, 1)]
            others |= {0: [1, 1], 1: [1, 2]}
            step.join()
            assert (request.steps, request.signal) == (2, None)
            assert request.at_step() and request.exit == 75 and request.name == "SIGUSR1"
