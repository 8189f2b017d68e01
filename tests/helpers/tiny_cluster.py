"""Several processes of one tiny run, on this machine."""

import json
import os
import pathlib
import socket
import subprocess
import sys
from collections.abc import Mapping
from typing import NamedTuple

from tests.helpers import tiny_run

ENDS_WITHIN = 120  # seconds; jax takes a process that is silent for 30 for dead


class Ended(NamedTuple):
    """How a process ended, and what it said."""

    status: int
    stdout: str
    stderr: str


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def environment(base: pathlib.Path, devices: int) -> dict[str, str]:
    flags = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "PYTHONPATH": str(tiny_run.ROOT),
        "XLA_FLAGS": flags,
        "JAX_COMPILATION_CACHE_DIR": str(base.parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def run(
    base: pathlib.Path, *command: object, processes: int = 2, devices: int = 2, points: Mapping[int, str] | None = None
) -> list[Ended]:
    """Run one command line in `processes` processes of `devices` devices each.

    points: {process: where it gets a signal}, as in `tiny_run.die_at`.
    """
    port, started = free_port(), []
    for index in range(processes):
        several = {
            "LLM3_COORDINATOR": f"127.0.0.1:{port}",
            "LLM3_PROCESSES": str(processes),
            "LLM3_PROCESS": str(index),
        }
        arguments = json.dumps([[str(each) for each in command]])
        started.append(
            subprocess.Popen(
                [sys.executable, tiny_run.__file__, (points or {}).get(index, ""), arguments],
                env=environment(base, devices) | several,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        said = [each.communicate(timeout=ENDS_WITHIN) for each in started]
    finally:
        for each in started:
            each.kill()
    return [Ended(each.returncode, *text) for each, text in zip(started, said, strict=True)]
