"""What hangs is noticed: where, and who is late."""

import subprocess
import sys

import pytest

from llm3.distributed.watchdog import Place, Watchdog, late
from llm3.errors import Exit
from tests.helpers import tiny_run

PROGRAM = """
import time
from llm3.distributed.watchdog import Watchdog

def a_read_that_hangs():
    time.sleep({sleep})

with Watchdog({seconds}).watching() as watchdog:
    for step in range(1, 4):
        watchdog.at(step, "computing")
        time.sleep(0.3)
    watchdog.at(4, "reading data")
    a_read_that_hangs()
time.sleep(0.8)  # nobody watches any more
print("ended")
"""


def outcome(seconds: float, sleep: float) -> subprocess.CompletedProcess:
    program = PROGRAM.format(seconds=seconds, sleep=sleep)
    environment = {"PYTHONPATH": str(tiny_run.ROOT), "JAX_PLATFORMS": "cpu"}
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=60)


def test_a_phase_that_takes_too_long_ends_the_process_with_its_stacks():
    done = outcome(seconds=0.6, sleep=30)
    assert done.returncode == Exit.HUNG and "ended" not in done.stdout
    assert "process 0 of 1: reading data of step 4 for 1 s: longer than hang_seconds=0.6" in done.stderr
    assert "a_read_that_hangs" in done.stderr, "the stack says where"


@pytest.mark.parametrize(("seconds", "sleep"), [(0.6, 0.1), (0, 1)])
def test_phases_that_end_in_time_are_left_alone(seconds, sleep):
    """All phases together take longer than the limit; 0 is none."""
    done = outcome(seconds, sleep)
    assert (done.returncode, done.stdout) == (0, "ended\n"), done.stderr


def test_the_processes_that_are_behind_the_others_are_late():
    computing, saving = Place(7, "computing", 9.0), Place(7, "saving", 9.0)
    assert late({0: computing, 1: Place(7, "reading data", 10.0), 2: computing}) == [1]
    assert late({0: saving, 1: computing, 2: computing}) == [1, 2]
    assert late({0: Place(8, "reading data", 1.0), 1: saving}) == [1]
    assert late({0: computing, 1: computing}) == []
    assert late({0: computing}) == []


def test_a_watchdog_knows_where_the_loop_is():
    watchdog = Watchdog(0)
    assert watchdog.place() is None
    watchdog.at(3, "saving")
    assert watchdog.place()[:2] == (3, "saving")
    assert str(Place(3, "saving", 61.4)) == "saving of step 3 for 61 s"
