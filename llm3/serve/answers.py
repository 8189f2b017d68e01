"""The answers of the engine's thread to one client, as the loop of the server waits for them."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from functools import partial
from typing import Any

from llm3.serve.engine import Ask, Busy, Engine, Update
from llm3.serve.errors import ApiError

SECONDS = 600.0  # until a call of the engine is given up
FAILURES = {  # {why the engine ended an answer: (status, message)}
    "late": (504, "the request was not answered in time"),
    "cancelled": (499, "the request was cancelled"),
    "failed": (500, "the answer failed; the log of the server says why"),
}


class Answers:
    """Everything that one client waits for. `close` ends what is not complete, so it must be called."""

    def __init__(self, engine: Engine):
        self._engine, self._loop = engine, asyncio.get_running_loop()
        self._changed = asyncio.Event()
        self._open: dict[int, int] = {}  # {number of the answer: that of the engine's request}
        self._new: dict[int, Update] = {}
        self._calls: list[asyncio.Future] = []

    @property
    def queue(self) -> int:
        """The most answers that can wait."""
        return self._engine.queue

    def ask(self, asks: Iterable[Ask]) -> None:
        """Begin answers, numbered from 0. Raises ApiError, 503, if there are too many."""
        for number, ask in enumerate(asks):
            with _busy():
                self._open[number] = self._engine.submit(ask, partial(self._listen, number))

    def call(self, function: Callable[[], Any]) -> asyncio.Future:
        """Begin a call in the engine's thread. Raises ApiError."""
        with _busy():
            self._calls.append(asyncio.wrap_future(self._engine.call(function)))
        return self._calls[-1]

    async def updates(self) -> AsyncIterator[tuple[int, Update]]:
        """Yield (number of the answer, what is new of it) until all are complete. Raises ApiError if one fails."""
        while self._open:
            await self._changed.wait()
            self._changed.clear()
            new, self._new = self._new, {}
            for number, update in sorted(new.items()):
                if update.finish:
                    del self._open[number]
                if update.finish in FAILURES:
                    raise failure(update.finish)
                yield number, update

    def close(self) -> None:
        """End what is not complete."""
        for number in self._open.values():
            self._engine.cancel(number)
        self._open.clear()
        for call in self._calls:
            call.cancel()

    def _listen(self, number: int, update: Update) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._take, number, update)

    def _take(self, number: int, update: Update) -> None:
        """Keep the newest state only: a slow client holds no more than a fast one."""
        if number in self._open:
            text = self._new[number].text if number in self._new else ""
            self._new[number] = update._replace(text=text + update.text)
            self._changed.set()


async def result(call: asyncio.Future) -> Any:
    """The result of a call. Raises ApiError if it is late."""
    try:
        async with asyncio.timeout(SECONDS):
            return await call
    except TimeoutError:
        raise failure("late") from None


def failure(finish: str) -> ApiError:
    """The error for an answer that ended without success."""
    status, message = FAILURES[finish]
    return ApiError(message, status=status, code=finish)


@contextlib.contextmanager
def _busy() -> Iterator[None]:
    try:
        yield
    except Busy as error:
        raise ApiError(str(error), status=503, code="busy", retry_after=error.retry_after) from None
