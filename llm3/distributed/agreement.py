"""What several processes must have in common: compared where they could differ, and said where they do.

All processes call each of these functions at the same place. With one process there is nothing to compare.
"""

import hashlib
import json
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from llm3.distributed import processes
from llm3.distributed.bucket_lock import recorded
from llm3.distributed.lock import Holder
from llm3.errors import UserError, listed

T = TypeVar("T")

SEEN_SECONDS = 40.0  # until a host sees what another one has written: NFS keeps listings for up to 30 s
POLL_SECONDS = 0.5


def compare(facts: Mapping[str, Any]) -> None:
    """Raise UserError on all processes unless they have the same JSON-able facts, by name; it says what differs."""
    if processes.count() == 1:
        return
    own = json.loads(json.dumps(facts))
    digests = processes.exchange({name: _digest(value) for name, value in own.items()})
    names = [name for name in own if any(each.get(name) != digests[0].get(name) for each in digests)]
    if not names:
        return
    all_facts = processes.exchange({name: own[name] for name in names})
    hosts = processes.exchange(socket.gethostname())
    found: dict[str, list[int]] = {}
    for process, others in enumerate(all_facts):
        if lines := [line for name in names for line in _apart(all_facts[0][name], others[name], name)]:
            found.setdefault("\n".join(f"  {line}" for line in lines), []).append(process)
    refuse("\n".join(f"{_called(each, hosts)}, compared with process 0:\n{lines}" for lines, each in found.items()))


def refuse(message: str, kind: type[UserError] = UserError) -> None:
    """Raise an error that all processes have found; the first one prints it."""
    error = kind(f"not all processes are alike: {message}")
    raise error if processes.is_first() else processes.RemoteError(str(error), error.exit)


def all_or_none(make: Callable[[], T], kind: type[UserError]) -> T:
    """Call `make` on all processes; an error of this kind on one of them is raised on all of them.

    `make` must not exchange anything itself.
    """
    if processes.count() == 1:
        return make()
    made: list[T] = []
    error: UserError | None = None
    try:
        made.append(make())
    except kind as raised:
        error = raised
    said = processes.exchange(None if error is None else str(error))
    if error is not None:
        raise error
    if others := [process for process, text in enumerate(said) if text is not None]:
        raise kind(f"process {others[0]}: {said[others[0]]}")
    return made[0]


def until_seen(look: Callable[[], bool], seconds: float = SEEN_SECONDS) -> bool:
    """Whether `look` becomes true within some time; with one process, whether it is."""
    until = time.monotonic() + (seconds if processes.count() > 1 else 0)
    while not (seen := look()) and time.monotonic() < until:
        time.sleep(POLL_SECONDS)
    return seen


def check_shared(workdir: Path) -> None:
    """Raise UserError unless all processes see the lock that the first one holds, so that the workdir is one."""
    if processes.count() == 1:
        return
    held = processes.broadcast_from_first(lambda: recorded(workdir))
    seen = processes.exchange(until_seen(lambda: recorded(workdir) == Holder(*held)))
    hosts = processes.exchange(socket.gethostname())
    if blind := [process for process, each in enumerate(seen) if not each]:
        refuse(
            f"{_called(blind, hosts)}: what process 0 on {hosts[0]} writes to --workdir={workdir} is not seen here: "
            f"expected one directory, on a disk that all hosts share"
        )


def _called(numbers: list[int], hosts: list[str]) -> str:
    """Processes in words, with the host of the first one."""
    return f"process {listed(map(str, numbers))} (on {hosts[numbers[0]]})"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _apart(first: Any, own: Any, where: str) -> list[str]:
    """The fields in which two JSON values differ, as lines "where.field: X, there Y"."""
    if isinstance(first, dict) and isinstance(own, dict):
        keys = sorted(first.keys() | own.keys())
        return [line for key in keys for line in _apart(first.get(key), own.get(key), f"{where}.{key}")]
    return [] if first == own else [f"{where}: {own!r}, there {first!r}"]
