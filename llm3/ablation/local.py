"""Trains the stage runs of an ablation on this machine, each in a process of its own, some at a time."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from llm3 import config_folder
from llm3.ablation.graph import NODE, Node, directory
from llm3.distributed import interrupts
from llm3.errors import Exit
from llm3.files import write_json
from llm3.report.units import duration

COMPILED = "compiled"  # folder of an ablation: programs that any stage run has compiled
LOG = "log.txt"  # in the folder of a stage run: what it printed
FAILED = "failed.json"  # in the folder of an ablation: {stage run: why it failed}
STOPPED = (Exit.PREEMPTED, 128 + signal.SIGINT)
POLL_SECONDS = 0.05


class Running(NamedTuple):
    """A stage run under way."""

    node: Node
    process: subprocess.Popen
    since: float


def command(folder: Path) -> list[str]:
    """The arguments of llm3 that train the stage run in this folder, or resume it."""
    return ["run", f"--config={folder / NODE}", f"--workdir={folder}", "--bare"]


def environment(workdir: Path) -> dict[str, str]:
    """The variables of a stage run: it finds the functions beside the config, and what others have compiled."""
    paths = [config_folder.current(), *filter(None, [os.environ.get("PYTHONPATH")])]
    compiled = {
        "JAX_COMPILATION_CACHE_DIR": str((workdir / COMPILED).resolve()),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return compiled | os.environ | {"PYTHONPATH": os.pathsep.join(paths)}


class Trainer:
    """Trains the nodes of an ablation in `workdir`, `jobs` at a time.

    prepare: writes the folder of a node. result: a phrase on the result of a node, None if it is not finished.
    """

    def __init__(
        self,
        workdir: Path,
        jobs: int,
        console: Console,
        prepare: Callable[[Node], Path],
        result: Callable[[Node], str | None],
    ):
        self._workdir, self._jobs, self._console = workdir, jobs, console
        self._prepare, self._result = prepare, result
        self._running: list[Running] = []
        self._failed: dict[str, str] = {}
        self._ended = self._total = 0
        self._signal: int | None = None

    def train(self, nodes: Iterable[Node]) -> int:
        """Train the nodes, parents first, that are not finished; returns the exit status.

        A node that fails stops only those that start from it; `failed.json` says why. The first Ctrl-C or SIGTERM
        reaches the running nodes, which save and end; then this returns its status.
        """
        waiting = {each.name: each for each in nodes if self._result(each) is None}
        self._total = len(waiting)
        write_json(self._workdir / FAILED, self._failed)
        with self._listening():
            while self._running or (waiting and self._signal is None):
                self._start_some(waiting)
                for each in [each for each in self._running if each.process.poll() is not None]:
                    self._running.remove(each)
                    self._end(each)
                time.sleep(POLL_SECONDS)
        if self._signal is not None:
            self._console.print("Stopped; everything is saved. Rerun the command to resume.")
            return interrupts.exit_status(self._signal)
        return Exit.PARTIAL if self._failed else 0

    def _start_some(self, waiting: dict[str, Node]) -> None:
        """Start the next nodes whose parents are finished; drop those whose parents failed."""
        busy = {each.node.name for each in self._running}
        for node in list(waiting.values()):
            if node.parent in self._failed:
                self._fail(waiting.pop(node.name), f"its parent {node.parent} failed")
            elif self._signal is None and len(busy) < self._jobs and node.parent not in {*waiting, *busy}:
                self._running.append(self._start(waiting.pop(node.name)))
                busy.add(node.name)

    def _start(self, node: Node) -> Running:
        folder = self._prepare(node)
        with open(folder / LOG, "ab") as log:
            arguments = [sys.executable, "-m", "llm3", *command(folder)]
            process = subprocess.Popen(
                arguments, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment(self._workdir)
            )
        return Running(node, process, time.monotonic())

    def _end(self, ended: Running) -> None:
        node, status = ended.node, ended.process.returncode
        if status in STOPPED and self._signal is not None:
            return
        if status == 0 and (result := self._result(node)) is not None:
            self._say(node, f"{result}, {duration(time.monotonic() - ended.since)}")
        else:
            self._fail(node, f"exit {status}: {last_line(directory(self._workdir, node.name) / LOG)}")

    def _fail(self, node: Node, why: str) -> None:
        self._failed[node.name] = why
        write_json(self._workdir / FAILED, self._failed)
        self._say(node, f"failed: {why}")

    def _say(self, node: Node, what: str) -> None:
        self._ended += 1
        self._console.print(f"[{self._ended}/{self._total}] {node.name}: {what}")

    @contextmanager
    def _listening(self) -> Iterator[None]:
        """Pass the first signal on to the running nodes, which a terminal has done if it was Ctrl-C there."""
        watched = interrupts.current()
        if watched is None:
            yield
            return

        def stop(number: int) -> None:
            self._signal = number
            if not (number == signal.SIGINT and _in_foreground()):
                for each in self._running:
                    each.process.send_signal(number)

        watched.step, watched.stop = lambda: "the step of each stage run under way", stop
        try:
            yield
        finally:
            watched.stop = None


def _in_foreground() -> bool:
    """Whether the terminal sends Ctrl-C to this process and to those that it started."""
    try:
        return os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp()
    except (OSError, ValueError):
        return False


def last_line(log: Path) -> str:
    """The last line of a log that is not empty."""
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.is_file() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")
