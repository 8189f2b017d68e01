"""Trains the stage runs of an ablation on this machine, each in a process of its own, some at a time."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from llm3.ablation.graph import NODE, Node, directory
from llm3.ablation.slots import Slot, slots
from llm3.distributed import interrupts
from llm3.distributed.lock import Holder, holder
from llm3.errors import Exit
from llm3.files import write_json
from llm3.report.units import duration

LOG = "log.txt"  # in the folder of a stage run: what it printed
FAILED = "failed.json"  # in the folder of an ablation: {stage run: why it failed}
STOPPED = (Exit.PREEMPTED, 128 + signal.SIGINT)
POLL_SECONDS = 0.05


class Running(NamedTuple):
    """A stage run under way."""

    node: Node
    process: subprocess.Popen
    since: float
    slot: Slot


def command(folder: Path) -> list[str]:
    """The arguments of llm3 that train the stage run in this folder, or resume it."""
    return ["run", f"--config={folder / NODE}", f"--workdir={folder}", "--bare"]


def start_process(folder: Path, slot: Slot) -> subprocess.Popen:
    """A process that trains the stage run in this folder; what it prints is added to its log."""
    arguments, variables = [sys.executable, "-m", "llm3", *command(folder)], os.environ | slot.variables
    with open(folder / LOG, "ab") as log:
        process = subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=variables)
    with suppress(ProcessLookupError):
        os.sched_setaffinity(process.pid, slot.cores)
    return process


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
        self._workdir, self._slots, self._console = workdir, slots(jobs), console
        self._prepare, self._result = prepare, result
        self._running: list[Running] = []
        self._waiting: dict[str, Node] = {}
        self._failed: dict[str, str] = {}
        self._in_use: set[str] = set()
        self._ended = self._total = 0
        self._signal: int | None = None

    def train(self, nodes: Iterable[Node]) -> int:
        """Train the nodes, parents first, that are not finished; returns the exit status.

        A node that fails stops only those that start from it; `failed.json` says why. A node that another process
        trains, such as one of an `ablate` that was killed, is waited for. The first Ctrl-C or signal reaches the
        running nodes, which save and end; then this returns its status.
        """
        self._waiting = {each.name: each for each in nodes if self._result(each) is None}
        self._total = len(self._waiting)
        write_json(self._workdir / FAILED, self._failed)
        with self._listening():
            try:
                self._train()
            except BaseException:
                for each in self._running:
                    each.process.send_signal(signal.SIGTERM)
                raise
        if self._signal is not None:
            self._console.print("Stopped; everything is saved. Rerun the command to resume.")
            return interrupts.exit_status(self._signal)
        return Exit.PARTIAL if self._failed else 0

    def _train(self) -> None:
        while self._running or (self._waiting and self._signal is None):
            self._start_some()
            for each in [each for each in self._running if each.process.poll() is not None]:
                self._running.remove(each)
                self._end(each)
            time.sleep(POLL_SECONDS)

    def _start_some(self) -> None:
        """Start the next nodes whose parents are finished; drop those whose parents failed."""
        waiting, busy = self._waiting, {each.node.name for each in self._running}
        for node in list(waiting.values()):
            if node.parent in self._failed:
                self._fail(waiting.pop(node.name), f"its parent {node.parent} failed")
            elif self._signal is not None or len(busy) >= len(self._slots) or node.parent in {*waiting, *busy}:
                continue
            elif other := self._holder(node):
                if node.name not in self._in_use:
                    self._console.print(f"{node.name}: {other} trains it, and is waited for")
                self._in_use.add(node.name)
            elif node.name in self._in_use and (result := self._result(node)) is not None:
                self._say(waiting.pop(node.name), result)
            else:
                slot = next(each for each in self._slots if each not in [other.slot for other in self._running])
                process = start_process(self._prepare(node), slot)
                self._running.append(Running(waiting.pop(node.name), process, time.monotonic(), slot))
                busy.add(node.name)
                if self._signal is not None:  # which came while the process was started
                    process.send_signal(self._signal)

    def _end(self, ended: Running) -> None:
        node, status = ended.node, ended.process.returncode
        if self._signal is not None and status in (*STOPPED, -self._signal):
            return
        if status and self._holder(node):  # another process was faster
            self._waiting[node.name] = node
        elif status == 0 and (result := self._result(node)) is not None:
            self._say(node, f"{result}, {duration(time.monotonic() - ended.since)}")
        else:
            self._fail(node, f"exit {status}: {last_line(directory(self._workdir, node.name) / LOG)}")

    def _holder(self, node: Node) -> Holder | None:
        return holder(directory(self._workdir, node.name) / node.stage)

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

        watched.step, watched.stop, watched.trains = lambda: "the step of each stage run under way", stop, True
        try:
            yield
        finally:
            watched.stop, watched.trains = None, False


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
