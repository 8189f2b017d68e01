"""How several processes end as one: with one exit status, and the first one, which the others need, last.

A process that ends by itself leaves the others waiting inside a computation, where no exception reaches them, until jax
aborts them with another status. So it publishes its status first, and a thread of each other process ends that one.
"""

import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial

from llm3.distributed import interrupts, processes
from llm3.errors import Unreachable, UserError

POLL_SECONDS = 1.0  # how soon a process hears of the end of another one
OWN_SECONDS = 3.0  # for its main thread to end by itself then
LEAVING_SECONDS = 10.0  # for all of them to hear of it
STOPPING_SECONDS = 3.0  # the same after a signal
LAST_SECONDS = 2.0  # the first process ends so much later than the others
# What a computation raises if another process is gone, before jax itself notices it: of Gloo, NCCL and gRPC.
LOST = re.compile(r"Gloo \w+ failed|NCCL .*remote process|(closed|reset) by peer|Broken pipe|UNAVAILABLE")


@contextmanager
def joined(coordinator: str | None = None, count: int | None = None, process: int | None = None) -> Iterator[str]:
    """`processes.start`, as a context. With several processes, an error or a signal in one of them ends all of them."""
    found, watched = processes.start(coordinator, count, process), interrupts.current()
    if processes.count() == 1:
        yield found
        return
    if watched is not None:
        watched.silent, watched.leave = not processes.is_first(), partial(leave_together, STOPPING_SECONDS)
    left = threading.Event()
    threading.Thread(target=_end_with_another, args=(left,), name="ending", daemon=True).start()
    try:
        yield found
    except BaseException as raised:
        left.set()
        error = _as_unreachable(raised)
        _say(error)
        stopped = isinstance(error, KeyboardInterrupt)
        own = watched.end() if stopped and watched is not None else _status(error)
        why = "" if isinstance(error, processes.RemoteError) or stopped else _in_words(error)
        _end(processes.publish_once("ended", [processes.index(), own, why])[1], stopped)
    finally:
        left.set()


def leave_together(seconds: float) -> None:
    """Return once all processes are here, or after `seconds`; the first one, whose end ends the others, a bit later."""
    if processes.count() == 1:
        return
    until = time.monotonic() + seconds
    with suppress(Exception):  # the coordinator may be gone
        processes.publish("leaving", True)
        while len(processes.published("leaving")) < processes.count() and time.monotonic() < until:
            time.sleep(0.1)
        time.sleep(LAST_SECONDS * processes.is_first())


def _end_with_another(left: threading.Event) -> None:
    """End this process with the status of another one that ends, unless its main thread does it by itself."""
    found = None
    while found is None:
        if left.wait(POLL_SECONDS):
            return
        with suppress(Exception):  # jax ends a process whose coordinator is gone
            found = processes.published_once("ended")
    if left.wait(OWN_SECONDS):
        return
    process, status, why = found
    if processes.is_first() and why:  # its own log tells as well, but there may be one for each process
        with suppress(OSError):
            print(f"llm3: process {process} has ended: {why}", file=sys.stderr)
    _end(status, stopped=not why)


def _end(status: int, stopped: bool) -> None:
    leave_together(STOPPING_SECONDS if stopped else LEAVING_SECONDS)
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def _as_unreachable(error: BaseException) -> BaseException:
    """An error of a lost connection in words, with its exit status; any other one as it is."""
    if not (isinstance(error, RuntimeError | ValueError) and LOST.search(str(error))):  # jax raises both
        return error
    first = str(error).partition("\n")[0]
    return Unreachable(f"the connection to another process was lost, which may have been killed: {first}")


def _say(error: BaseException) -> None:
    """Print an error of this process; that of another one is printed there."""
    where = f"llm3: process {processes.index()} of {processes.count()}:"
    with suppress(OSError):  # stderr may be closed, e.g. after a lost connection
        if isinstance(error, processes.RemoteError | KeyboardInterrupt):
            return
        if isinstance(error, UserError):
            print(f"{where} {error}", file=sys.stderr)
        else:
            print(where, file=sys.stderr)
            traceback.print_exception(error)


def _status(error: BaseException) -> int:
    return 128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else int(getattr(error, "exit", 1))


def _in_words(error: BaseException) -> str:
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
