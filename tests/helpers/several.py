"""Several processes as threads of this one, for what they tell each other; they compute nothing together."""

import collections
import threading
from collections.abc import Callable
from typing import Any

from llm3.distributed import processes


class Alone(Exception):
    """Another process has ended, and this one would wait for it."""


def together(monkeypatch: Any, function: Callable[[int], Any], count: int = 2) -> list[Any]:
    """What `function(index)` returns in each of `count` processes, or the exception that it raises there."""
    own, changed, ended = threading.local(), threading.Condition(), set[int]()
    exchanges: dict[int, dict[int, Any]] = collections.defaultdict(dict)
    results: list[Any] = [None] * count

    def exchange(value: Any) -> list[Any]:
        own.exchanges += 1
        with changed:
            values = exchanges[own.exchanges]
            values[own.index] = value
            changed.notify_all()
            changed.wait_for(lambda: len(values) == count or ended)
            if len(values) < count:
                raise Alone
            return [values[process] for process in range(count)]

    def run(index: int) -> None:
        own.index, own.exchanges = index, 0
        try:
            results[index] = function(index)
        except Exception as error:
            results[index] = error
        with changed:
            ended.add(index)
            changed.notify_all()

    fakes = {
        "count": lambda: count,
        "index": lambda: own.index,
        "is_first": lambda: own.index == 0,
        "exchange": exchange,
        "broadcast_from_first": lambda make: exchange(make() if own.index == 0 else None)[0],
    }
    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    with monkeypatch.context() as patched:
        for name, fake in fakes.items():
            patched.setattr(processes, name, fake)
        for each in threads:
            each.start()
        for each in threads:
            each.join()
    return results
