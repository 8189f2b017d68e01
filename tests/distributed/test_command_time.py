"""When a command began: with its process, if it is one, and only once."""

import os
import time

import pytest

from llm3.distributed import command_time


def test_a_command_that_is_a_process_began_with_it(tmp_path):
    now, ticks = time.clock_gettime(time.CLOCK_BOOTTIME), os.sysconf("SC_CLK_TCK")
    stat = tmp_path / "stat"
    stat.write_text(f"7 (a name) with ) R {' '.join('0' * 18)} {int((now - 5) * ticks)} 0 0\n")
    assert command_time.process_age(stat) == pytest.approx(5, abs=1)
    assert command_time.process_age(tmp_path / "missing") == 0


def test_the_first_stage_counts_from_the_command_and_a_later_one_from_its_own_start(monkeypatch):
    monkeypatch.setattr(command_time, "process_age", lambda: 40.0)
    monkeypatch.setattr(time, "perf_counter", lambda: 100.0)
    command_time.begin(of_process=True)
    assert [command_time.take(), command_time.take()] == [60.0, 100.0]
    command_time.begin(of_process=False)
    assert command_time.take() == 100.0
