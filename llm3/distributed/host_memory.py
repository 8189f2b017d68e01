"""The memory of this process on its host, and the peak of it during some work. Nothing here imports jax."""

import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

SAMPLE_SECONDS = 0.05


@dataclass
class Peak:
    """Bytes before some work, and the most that was seen since; None where the system does not tell."""

    before: int | None
    peak: int | None

    @property
    def grown(self) -> int | None:
        """The peak above the bytes before."""
        return None if self.before is None or self.peak is None else self.peak - self.before


@contextmanager
def peak_of(measure: Callable[[], int | None], seconds: float = SAMPLE_SECONDS) -> Iterator[Peak]:
    """Call `measure` every so many seconds, in a thread; the yielded peak is final after the context."""
    before = measure()
    found, ended = Peak(before, before), threading.Event()

    def sample() -> None:
        if found.peak is not None and (now := measure()) is not None:
            found.peak = max(found.peak, now)

    def repeat() -> None:
        while not ended.wait(seconds):
            sample()

    thread = threading.Thread(target=repeat)
    if before is not None:
        thread.start()
    try:
        yield found
    finally:
        ended.set()
        if before is not None:
            thread.join()
            sample()


def anonymous_bytes() -> int | None:
    """Memory of this process without pages of files, which the system can drop; None if unknown (Linux: man 5 proc)."""
    try:
        found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def resident_bytes() -> int | None:
    """Memory of this process and its descendants, shared pages counted for each; None if unknown."""
    return _resident(os.getpid()) if Path("/proc/self/statm").exists() else None


def _resident(process: int) -> int:
    """Memory of a process and its descendants in bytes; 0 for an ended process."""
    try:
        pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
        threads = list(Path(f"/proc/{process}/task").iterdir())
        children = [int(child) for thread in threads for child in (thread / "children").read_text().split()]
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE") + sum(map(_resident, children))
