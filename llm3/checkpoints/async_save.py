"""A save that Orbax goes on with in the background, and the errors of its threads.

Where a save fails, every thread that has a part in it says so, with a traceback. All but one line of that is noise:
it is kept back here, and the error is raised to whoever waits for the save.
"""

import logging
import sys
import time
import traceback
import warnings
from typing import Any

import jax

POLL_SECONDS = 2.0


class _Failures(logging.Filter):
    """Keeps back what threads of Orbax log of their errors, and remembers the last one."""

    last: BaseException | None = None

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        files = [record.pathname, *(frame.filename for frame in traceback.extract_tb(error and error.__traceback__))]
        if record.levelno < logging.WARNING or not any("orbax" in file for file in files):
            return True
        self.last = error or self.last
        return False


_failures = _Failures()
for _name in ("absl", "asyncio"):
    logging.getLogger(_name).addFilter(_failures)
warnings.filterwarnings("ignore", "coroutine '.*' was never awaited", RuntimeWarning)
_tell = sys.unraisablehook


def _tell_others(unraisable: Any) -> None:
    if str(unraisable.exc_value) != "Event loop is closed":  # what TensorStore meets with that comes too late
        _tell(unraisable)


sys.unraisablehook = _tell_others


class Stuck(Exception):
    """A thread of a save has failed, and another one waits for a process that waits for this one."""


class Pending:
    """A save of `step`, to be made before it begins; `response` is Orbax's, once it has begun."""

    def __init__(self, step: int):
        self.step, self.response = step, None
        _failures.last = None

    def wait(self) -> Any:
        """Return when the save is finished. Raises what Orbax raises, and Stuck, from the cause."""
        failed = None
        while jax.process_count() > 1:
            started = time.monotonic()
            try:
                return self.response.result(POLL_SECONDS)
            except TimeoutError:
                if time.monotonic() - started < POLL_SECONDS:  # one of the save's own
                    raise
            if failed is not None:
                raise Stuck from failed
            failed = _failures.last
        return self.response.result()
