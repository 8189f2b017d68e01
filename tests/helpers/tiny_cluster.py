"""Several processes of one tiny run, on this machine."""

import json
import socket
from collections.abc import Mapping
from typing import NamedTuple

from tests.helpers import forks

ENDS_WITHIN = 900  # seconds, on however busy a machine; jax takes a process that is silent for 30 for dead


class Ended(NamedTuple):
    """How a process ended, and what it said."""

    status: int
    stdout: str
    stderr: str


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def variables(port: int, index: int, processes: int = 2) -> dict[str, str]:
    """What tells a process its place among the processes of a run."""
    return {
        "LLM3_COORDINATOR": f"127.0.0.1:{port}",
        "LLM3_PROCESSES": str(processes),
        "LLM3_PROCESS": str(index),
    }


def run(
    *command: object,
    processes: int = 2,
    devices: int = 2,
    points: Mapping[int, str] | None = None,
    caches: Mapping[int, str] | None = None,
    flags: Mapping[int, str] | None = None,
) -> list[Ended]:
    """Run one command line in `processes` processes of `devices` devices each.

    points: {process: where it gets a signal}, as in `tiny_deaths`. caches: {process: its LLM3_CACHE_DIR}.
    flags: {process: a flag that it alone has}.
    """
    port, started = free_port(), []
    for index in range(processes):
        several = variables(port, index, processes) | ({"LLM3_CACHE_DIR": caches[index]} if caches else {})
        own = [flags[index]] if flags and index in flags else []
        arguments = json.dumps([[*(str(each) for each in command), *own]])
        started.append(forks.Fork([(points or {}).get(index, ""), arguments], several, devices))
    try:
        said = [each.communicate(timeout=ENDS_WITHIN) for each in started]
    finally:
        for each in started:
            each.kill()
    return [Ended(each.returncode, *text) for each, text in zip(started, said, strict=True)]
