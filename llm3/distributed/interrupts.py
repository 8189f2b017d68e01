"""Ctrl-C and the signals of schedulers in every part of a run, from the first second on.

Python delivers a signal as an exception in the main thread, between two of its instructions. That is not enough:
native code (a compilation, the training of a tokenizer) does not look for signals until it ends; an exception in a
callback of the garbage collector, such as jax has, is printed and ignored; and libraries turn it into other errors, or
crash. So the exception is raised in the code of llm3 only. A thread watches as well: it answers at once, and ends the
process if the main thread has not done so within `GRACE_SECONDS`. While training steps run, the first signal only asks
for a stop; see `preemption`. A second Ctrl-C ends the process at once. The signals of a scheduler never do: some send
theirs several times, and SIGKILL once they have waited long enough.
"""

import gc
import os
import signal
import sys
import sysconfig
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from llm3.errors import Exit, to_stderr

GRACE_SECONDS = 1.5  # time for the main thread to end by itself after a signal
CLOSING_SECONDS = 30.0  # the same after the save of a step: old checkpoints are deleted, files are closed
REPEAT_SECONDS = 0.2  # Ctrl-C within this time counts once: `timeout` and some launchers send each signal twice
RETRY_SECONDS = 0.05

LIBRARIES = tuple({sysconfig.get_path(name) for name in ("purelib", "platlib")})
OWN = str(Path(__file__).parents[1])
# What schedulers send before they kill: also the last one, for `sbatch --signal=USR1@300`; SIGHUP: a lost connection.
OF_SCHEDULERS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


class Save(Protocol):
    """A checkpoint that is being written in the background."""

    def wait(self) -> Any: ...


unfinished_saves: set[Save] = set()  # awaited before the process ends after a first signal


def exit_status(number: int) -> int:
    """The exit status of a process that a signal stopped."""
    return Exit.PREEMPTED if number in OF_SCHEDULERS else 128 + number


def name_of(number: int) -> str:
    """SIGTERM and so on; Ctrl-C for SIGINT."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


class Interrupts:
    """The signals of a process, and what the first one does.

    first: its number; None: there was none. stop: takes the number and asks for a stop, after the step under way if
    there is one; None: the main thread gets a KeyboardInterrupt. trains: whether steps are under way. step: says which
    one is. activity: what the main thread does besides steps; see `doing`. heard: called in a thread with the first
    signal. leave: called before a thread ends the process. silent: whether another process answers.
    """

    def __init__(self, farewell: str = "stopped") -> None:
        self.first: int | None = None
        self._farewell = farewell
        self._outermost: FrameType | None = None
        self.stop: Callable[[int], None] | None = None
        self.trains = False
        self.heard: Callable[[int], None] = lambda number: None
        self.leave: Callable[[], None] = lambda: None
        self.step: Callable[[], str] = lambda: "the step under way"
        self.activity = ""
        self.silent = False
        self._due = False  # whether a KeyboardInterrupt is to be raised as soon as it reaches the command
        self._resent = 0
        self._last = 0.0
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        self._ended = threading.Event()
        self._answered = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="interrupts", daemon=True)

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The handler of a signal, called in the main thread."""
        if self.first is not None and number in OF_SCHEDULERS and not self._due:
            return  # sent again
        stop, self.first = self.stop, self.first or number
        if stop is not None:
            stop(number)
        elif not _may_raise(frame, self._outermost):
            self._due = True
            threading.Timer(RETRY_SECONDS, self._resend, (number,)).start()
        else:
            self._due = False
            raise KeyboardInterrupt

    def pass_on(self, number: int) -> None:
        """Take the signal of another process, in a thread, unless this process has one of its own."""
        if not self._last:
            signal.raise_signal(number)

    def interrupt(self, number: int) -> None:
        """Let the main thread get a KeyboardInterrupt for a signal that `stop` may have taken: call it in a thread."""
        self.stop = None
        if self._last:
            self._due = True
            self._resend(number)
        else:
            self.pass_on(number)

    def _resend(self, number: int) -> None:
        if not self._ended.is_set():
            self._resent += 1
            signal.raise_signal(number)

    def _watch(self) -> None:
        """Answer each signal that arrives; the kernel reports it through a pipe, whatever the main thread does."""
        while number := os.read(self._pipe[0], 1)[0]:
            if self._resent:
                self._resent -= 1
                continue
            before, self._last = self._last, time.monotonic()
            if before and (number in OF_SCHEDULERS or self._last - before < REPEAT_SECONDS):
                continue
            if before:
                _end(number, b"\n")  # the prompt of a shell begins on a line of its own
            # in a thread: while it speaks, which may take long, the next signals are read as they arrive
            threading.Thread(target=self._end_soon, args=(number, self.trains), daemon=True).start()

    def _answer(self, number: int, trains: bool) -> str:
        """What happens now, and what a second signal does."""
        name = name_of(number)
        if trains and self.activity:
            will = f"{self.activity}, then finishing {self.step()} and saving it"
        elif trains:
            will = f"finishing {self.step()}, then saving"
        elif unfinished_saves:
            will = "finishing a save, then stopping"
        else:
            will = f"stopping while {self.activity}" if self.activity else "stopping"
        return f"{name}: {will}" + "; press Ctrl-C again to stop now" * (number == signal.SIGINT)

    def _say(self, text: str) -> None:
        if not self.silent:
            _say(text)

    def _end_soon(self, number: int, trains: bool) -> None:
        """Answer, and end the process once the main thread has had its time outside of training steps and saves."""
        self._say(self._answer(number, trains))
        self._answered.set()
        self.heard(number)
        outside, grace = 0.0, CLOSING_SECONDS if trains else GRACE_SECONDS
        while outside < grace:
            if self._ended.wait(RETRY_SECONDS):
                return
            outside = outside + RETRY_SECONDS if self.stop is None else 0.0
            for save in list(unfinished_saves):
                with suppress(Exception):  # the main thread raises it too
                    save.wait()
                unfinished_saves.discard(save)
                outside = 0.0
        self._say(self._farewell)
        self.leave()
        _end(number)

    def end(self) -> int:
        """The exit status of the command, which a KeyboardInterrupt has ended."""
        self._ended.set()
        self._answered.wait(GRACE_SECONDS)  # so that the lines come in this order
        self._say(self._farewell)
        exec("")  # else Python ends as if SIGINT had killed it, if a KeyboardInterrupt has once left an exec
        return exit_status(self.first or signal.SIGINT)

    @contextmanager
    def watching(self, *numbers: int, last: bool = False) -> Iterator["Interrupts"]:
        """Handle SIGINT and the other signals of `numbers` while this context lasts. Call it in the main thread.

        Those that `nohup` lets the process ignore stay ignored. last: nothing but the end of the process follows, which
        signals of schedulers must not kill: it has its exit status.
        """
        global _current
        self._outermost = sys._getframe(2)  # below this context manager and contextlib
        wanted = [each for each in numbers if signal.getsignal(each) != signal.SIG_IGN]
        before = {number: signal.signal(number, self.handle) for number in (signal.SIGINT, *wanted)}
        wakeup = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        outer, _current = _current, self
        self._watcher.start()
        try:
            yield self
        finally:
            self._ended.set()
            _current = outer
            signal.set_wakeup_fd(wakeup)
            for number, handler in before.items():
                signal.signal(number, signal.SIG_IGN if last and number in OF_SCHEDULERS else handler)
            os.write(self._pipe[1], b"\0")
            self._watcher.join()
            for end in self._pipe:
                os.close(end)


_current: Interrupts | None = None


def current() -> Interrupts | None:
    """The signals of this process while a command runs; None in a library call."""
    return _current


@contextmanager
def doing(activity: str) -> Iterator[None]:
    """Name what the main thread does while this context lasts ("saving step 40"), for the answer to a signal."""
    if (watched := _current) is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    before, watched.activity = watched.activity, activity
    try:
        yield
    finally:
        watched.activity = before


def _may_raise(frame: FrameType | None, outermost: FrameType | None) -> bool:
    """Whether an exception in `frame` reaches the command: no callback of Python and no library is in between."""
    callbacks = {getattr(callback, "__code__", None) for callback in gc.callbacks}
    while frame is not None and frame is not outermost:
        code = frame.f_code
        if code in callbacks or code.co_name == "__del__" or code.co_filename == weakref.__file__:
            return False
        if code.co_filename.startswith(LIBRARIES) and not code.co_filename.startswith(OWN):
            return False
        frame = frame.f_back
    return True


def _say(text: str) -> None:
    with suppress(Exception):  # stderr may be closed
        to_stderr(f"llm3: {text}")


def _end(number: int, last: bytes = b"") -> None:
    """End the process. Files are written atomically and the kernel frees locks, so nothing has to be cleaned up."""
    for output in (1, 2):
        with suppress(OSError):  # not through sys.stdout: the main thread may hold its lock
            if os.isatty(output):
                os.write(output, b"\x1b[?25h" + last)  # a progress bar hides the cursor
                last = b""
    os._exit(exit_status(number))
