"""When this command began, to measure the time until its first step."""

import os
import time
from pathlib import Path

_began: float | None = None


def begin(of_process: bool) -> None:
    """The command begins now or, if the process is the command, began with it (Linux; elsewhere now)."""
    global _began
    _began = time.perf_counter() - (process_age() if of_process else 0.0)


def take() -> float:
    """When the command began, by `time.perf_counter`; at all later calls: now."""
    global _began
    began, _began = _began, None
    return time.perf_counter() if began is None else began


def process_age(stat: Path = Path("/proc/self/stat")) -> float:
    """Seconds since this process started, to a hundredth; 0 where the system does not say (man 5 proc_pid_stat)."""
    try:
        ticks = int(stat.read_text().rpartition(")")[2].split()[19])
        return max(time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"), 0.0)
    except (OSError, AttributeError, ValueError, IndexError):
        return 0.0
