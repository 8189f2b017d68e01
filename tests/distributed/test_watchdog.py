"""The watchdog reports where a run hangs and which process is late."""

import subprocess
import sys
import types

import pytest

from llm3.config.schema import HANG_KINDS
from llm3.distributed import processes, watchdog
from llm3.distributed.watchdog import Place, Watchdog, late
from llm3.errors import Exit
from tests.helpers import tiny_run

# The watchdog's clock is moved by hand, and the main thread waits until it has been looked at.
PROGRAM = """
import threading, time, types
from llm3.distributed import watchdog as module

now, looks = 0.0, threading.Semaphore(0)

def monotonic():
    if threading.current_thread().name == "watchdog":
        looks.release()
    return now

def a_read_that_takes(seconds):
    global now
    now += seconds
    while looks.acquire(blocking=False):
        pass
    for _ in range(2 if {limit} else 0):
        looks.acquire()

module.time = types.SimpleNamespace(monotonic=monotonic, sleep=time.sleep)
with module.Watchdog({limit}).watching() as watchdog:
    for step in range(1, 4):
        watchdog.at(step, "computing")
        a_read_that_takes(0.3)
    watchdog.at(4, "reading data")
    a_read_that_takes({seconds})
now += 100  # nobody watches any more
print("ended")
"""


def outcome(limit: float, seconds: float) -> subprocess.CompletedProcess:
    program = PROGRAM.format(limit=limit, seconds=seconds)
    environment = {"PYTHONPATH": str(tiny_run.ROOT), "JAX_PLATFORMS": "cpu"}
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=600)


def test_a_phase_that_takes_too_long_ends_the_process_with_its_stacks():
    done = outcome(limit=0.6, seconds=1)
    assert done.returncode == Exit.HUNG and "ended" not in done.stdout
    assert "process 0 of 1: reading data of step 4 for 1 s: longer than hang_seconds=0.6" in done.stderr
    assert "a_read_that_takes" in done.stderr, "the stack says where"


@pytest.mark.parametrize(("limit", "seconds"), [(0.6, 0.1), (0, 1)])
def test_phases_that_end_in_time_do_not_end_the_process(limit, seconds):
    """All phases together exceed the limit, none alone does; 0: no limit."""
    done = outcome(limit, seconds)
    assert (done.returncode, done.stdout) == (0, "ended\n"), done.stderr


def test_the_processes_that_are_behind_the_others_are_late():
    computing, saving = Place(7, "computing", 9.0), Place(7, "saving", 9.0)
    assert late({0: computing, 1: Place(7, "reading data", 10.0), 2: computing}) == [1]
    assert late({0: saving, 1: computing, 2: computing}) == [1, 2]
    assert late({0: Place(8, "reading data", 1.0), 1: saving}) == [1]
    assert late({0: computing, 1: computing}) == []
    assert late({0: computing}) == []


def test_each_kind_of_phase_has_its_limit_and_the_longer_ones_have_an_hour():
    assert {*watchdog.PHASES.values()} == {*HANG_KINDS}
    hour = dict.fromkeys(("wait", "load", "compile"), 3600.0)
    assert Watchdog(600)._limits == dict.fromkeys(HANG_KINDS, 600) | hour
    assert Watchdog(7200)._limits == dict.fromkeys(HANG_KINDS, 7200)
    assert Watchdog(0, {"save": 9})._limits == dict.fromkeys(HANG_KINDS, 0) | {"save": 9}


def test_a_stage_that_is_behind_is_late_whatever_its_step():
    assert late({0: Place(0, "loading", 1.0, stage=2), 1: Place(9, "evaluating the result", 1.0, stage=1)}) == [1]
    assert late({0: Place(9, "evaluating the result", 1.0), 1: Place(9, "saving", 1.0)}) == [1]


def test_a_batch_of_an_evaluation_renews_the_limit_of_its_phase(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(watchdog, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    watched = Watchdog(0)
    watched.alive()
    assert watched.place() is None
    watched.at(3, "evaluating")
    now[0] = 50.0
    assert watched.place() == Place(3, "evaluating", 50.0, 0)
    watched.alive()
    assert watched.place() == Place(3, "evaluating", 0.0, 0)
    watched.rest()
    assert watched.place() is None


def test_a_coordinator_that_does_not_answer_is_said_once_and_the_process_is_still_watched(monkeypatch, capsys):
    def lost(*_):
        raise RuntimeError("UNAVAILABLE")

    monkeypatch.setattr(processes, "publish", lost)
    monkeypatch.setattr(processes, "published", lost)
    monkeypatch.setattr(watchdog.faulthandler, "dump_traceback", lambda **_: None)
    ended = []
    monkeypatch.setattr(watchdog.os, "_exit", lambda status: (ended.append(status), watched._ended.set()))
    watched = Watchdog(0.02)
    with watched.watching():
        watched.at(3, "saving")
        watched._ended.wait(60)
    assert ended == [Exit.HUNG]
    error = capsys.readouterr().err
    assert error.count("cannot reach the others: UNAVAILABLE") == 1 and "saving of step 3" in error


def test_a_watchdog_knows_where_the_loop_is():
    watched = Watchdog(0)
    assert watched.place() is None
    watched.at(3, "saving")
    assert watched.place()[:2] == (3, "saving")
    assert str(Place(3, "saving", 61.4)) == "saving of step 3 for 61 s"
