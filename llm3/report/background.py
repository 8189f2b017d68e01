"""A tracker on a thread of its own, so that it can neither delay nor end a run."""

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

from llm3.errors import root_cause
from llm3.report.trackers import Tracker

CLOSE_SECONDS = 30.0  # to wait for a tracker at the end of a stage


class Background:
    """Passes calls on in their order. After an error, which is said, the tracker gets no more of this session.

    make: builds the tracker. name: the tracker's, for messages. say: prints a line for the user; called on the thread.
    """

    def __init__(self, make: Callable[[], Tracker], name: str, say: Callable[[str], None]):
        self._make, self._name, self._say = make, name, say
        self._calls: SimpleQueue[tuple[str, tuple] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def metrics(self, *arguments: Any) -> None:
        self._calls.put(("metrics", arguments))

    def samples(self, *arguments: Any) -> None:
        self._calls.put(("samples", arguments))

    def result(self, *arguments: Any) -> None:
        self._calls.put(("result", arguments))

    def close(self) -> None:
        """Wait until the tracker has got everything, but no longer than CLOSE_SECONDS."""
        self._calls.put(None)
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            self._say(f"{self._name}: not done after {CLOSE_SECONDS:g} s; the run goes on without it")

    def _run(self) -> None:
        try:
            tracker = self._make()
            while (call := self._calls.get()) is not None:
                name, arguments = call
                getattr(tracker, name)(*arguments)
            tracker.close()
        except BaseException as error:  # also a library's sys.exit: here it would end only this thread, and say nothing
            self._say(f"{self._name}: {root_cause(error)}. It gets no more metrics of this session; the run goes on")
