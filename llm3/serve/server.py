"""The server of the API: its socket, the engine's thread, and how it ends."""

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from llm3.distributed import interrupts
from llm3.errors import UserError
from llm3.serve.engine import Engine
from llm3.serve.guard import LARGEST_HEAD

LEAVE_SECONDS = 10  # for clients to take their answers, once all are made
IDLE_SECONDS = 30  # until a connection without a request is closed
MOST_CONNECTIONS = 512
REPEAT_SECONDS = 0.2  # a signal within this time of the first one is the same: some launchers send each twice


def bind(host: str, port: int) -> socket.socket:
    """A socket that does not listen yet. Raises UserError if the address cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = socket.socket(family, kind, protocol)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError as error:
        hint = "; expected another --port, or 0 for any free one" if port else ""
        raise UserError(f"--host={host} --port={port}: {error.strerror or error}{hint}") from None
    return found


def address_of(bound: socket.socket) -> str:
    """The URL of a socket."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Server(uvicorn.Server):
    """A server that ends when the thread of the engine has. listening: called when requests can come."""

    def __init__(self, config: uvicorn.Config, engine: threading.Thread, listening: Callable[[], None]):
        super().__init__(config)
        self._engine, self._listening = engine, listening

    def capture_signals(self) -> AbstractContextManager[None]:  # type: ignore[override]
        return nullcontext()  # see `_draining`

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._listening()

    async def on_tick(self, counter: int) -> bool:
        """Whether to end, asked ten times a second."""
        return await super().on_tick(counter) or not self._engine.is_alive()


def run(app: Starlette, engine: Engine, bound: socket.socket, listening: Callable[[], None]) -> None:
    """Serve until SIGTERM or Ctrl-C, and then until all requests are answered; those that come later get 503.

    listening: called when requests can come. A second signal ends the process at once.
    """
    config = uvicorn.Config(
        app,
        http="h11",  # it bounds the headers
        loop="asyncio",  # uvloop would take the signals away from those who watch for them
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=MOST_CONNECTIONS,
        timeout_keep_alive=IDLE_SECONDS,
        timeout_graceful_shutdown=LEAVE_SECONDS,
        h11_max_incomplete_event_size=LARGEST_HEAD,
    )
    thread = threading.Thread(target=engine.run, name="engine", daemon=True)
    thread.start()
    try:
        with _draining(engine):
            _Server(config, thread, listening).run(sockets=[bound])
        if not engine.ending:
            raise RuntimeError("the thread of the engine has died")
    finally:
        engine.end()
        thread.join(LEAVE_SECONDS)


@contextmanager
def _draining(engine: Engine) -> Iterator[None]:
    """Let signals end the engine while this context lasts; outside of the main thread, there are none."""
    watched = interrupts.current()
    if watched is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    first = 0.0

    def end(number: int, _: FrameType | None = None) -> None:
        nonlocal first
        if first and time.monotonic() - first > REPEAT_SECONDS:
            os._exit(interrupts.exit_status(number))
        if not first:
            first = time.monotonic()
            # in a thread: the signal may have interrupted a method that holds the lock of the engine
            threading.Thread(target=engine.end, daemon=True).start()

    before = signal.signal(signal.SIGTERM, end)
    watched.stop, watched.activity = end, "the requests that have begun are answered"
    try:
        yield
    finally:
        # nothing but the end of the process follows, which has its exit status
        signal.signal(signal.SIGTERM, signal.SIG_IGN if first else before)
