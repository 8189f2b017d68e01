"""The engine: requests of all stages, decoded in batches by one thread that owns the devices.

A request waits until a row of its pool is free. A pool is a batch of rows of one model; which one a request belongs to
depends on the request alone, and so does its answer: the same seed gives the same text whatever else is asked.
"""

import collections
import contextlib
import dataclasses
import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

from llm3.config.sampling import GREEDY, Sampling
from llm3.models.batching import Decoder, Request, Shape, decoder_of, padded_width
from llm3.models.decoding import Scores
from llm3.models.sampling import Needs, needs_of
from llm3.serve.stages import Served
from llm3.serve.text import TextStream

ALTERNATIVES = 20  # likeliest tokens with log probabilities, the most that OpenAI's protocol asks for
STOPS = (8, 16)  # the most stops of tokens of a request, and the most tokens of one
LEAST_CAPACITY = 128  # tokens of a prompt with its answer in the smallest pool
LOOK = 0.1  # seconds between two looks of the host at the answers of a pool


class Busy(Exception):
    """The queue is full, or the engine is ending. retry_after: seconds."""

    def __init__(self, message: str, retry_after: int):
        super().__init__(message)
        self.retry_after = retry_after


class Ask(NamedTuple):
    """A request to a stage. tokens: of the prompt. limit: most tokens of the answer. scored: with log probabilities.

    stop_tokens: runs of tokens, and stop_texts: strings, that end the answer and do not belong to it. decode(tokens of
    the answer): its text. seconds: until the request is given up.
    """

    stage: Served
    tokens: list[int]
    limit: int
    decode: Callable[[list[int]], str]
    sampling: Sampling = GREEDY
    seed: int = 0
    stop_tokens: tuple[tuple[int, ...], ...] = ()
    stop_texts: tuple[str, ...] = ()
    scored: bool = False
    seconds: float = 600.0


class Update(NamedTuple):
    """What is new of an answer.

    text: after the text of the updates before. tokens: of the whole answer so far. stop: the tokens that ended it and
    do not belong to it, or none. scores: of tokens and stop; None if not asked for. finish: "" (it goes on), "stop",
    "length", "cancelled", "late", or "failed".
    """

    text: str
    tokens: list[int]
    scores: Scores | None
    finish: str
    stop: Sequence[int] = ()


class Pool(NamedTuple):
    """What a pool is chosen by: the model, the capacity of its rows, and what its compiled functions do."""

    shared: int
    capacity: int
    orders: bool
    scored: bool
    penalises: bool


@dataclasses.dataclass
class _Running:
    number: int
    ask: Ask
    listen: Callable[[Update], None]
    stream: TextStream
    deadline: float
    pool: Pool


def pool_of(ask: Ask) -> Pool:
    """The pool of a request."""
    needs = needs_of([ask.sampling])
    capacity = padded_width(len(ask.tokens) + ask.limit, least=LEAST_CAPACITY)
    return Pool(id(ask.stage.shared), capacity, needs.orders, ask.scored, needs.penalises)


class Engine:
    """rows: of each pool. queue: the most requests that wait. most_steps: tokens between two looks at a pool, at most.

    All methods but `run` can be called from any thread.
    """

    def __init__(self, rows: int = 8, queue: int = 256, most_steps: int = 64):
        self.rows, self.queue, self._most_steps = rows, queue, most_steps
        self._decoders: dict[Pool, Decoder] = {}
        self._steps: collections.defaultdict[Pool, int] = collections.defaultdict(lambda: 1)
        self._waiting: dict[int, _Running] = {}
        self._running: dict[int, _Running] = {}
        self._cancelled: set[int] = set()
        self._calls: collections.deque[tuple[Future, Callable[[], Any]]] = collections.deque()
        self._numbers = itertools.count()
        self._changed = threading.Condition()
        self._ending = False
        self.counts: collections.Counter[str] = collections.Counter()

    # what other threads call

    def submit(self, ask: Ask, listen: Callable[[Update], None]) -> int:
        """Ask; `listen` is called by the engine's thread. The result is for `cancel`. Raises Busy."""
        with self._changed:
            if self._ending:
                raise Busy("the server is ending", 30)
            if len(self._waiting) >= self.queue:
                raise Busy(f"{len(self._waiting)} requests wait already", 1 + len(self._waiting) // self.rows)
            number, stream = next(self._numbers), TextStream(ask.decode, ask.stop_texts)
            deadline = time.monotonic() + ask.seconds
            self._waiting[number] = _Running(number, ask, listen, stream, deadline, pool_of(ask))
            self.counts["requests"] += 1
            self._changed.notify()
            return number

    def cancel(self, number: int) -> None:
        """End a request, if it is not complete."""
        with self._changed:
            self._cancelled.add(number)
            self._changed.notify()

    def call(self, function: Callable[[], Any]) -> Future:
        """Let the engine's thread call a function between two looks. Raises Busy."""
        with self._changed:
            if self._ending:
                raise Busy("the server is ending", 30)
            if len(self._calls) >= self.queue:
                raise Busy(f"{len(self._calls)} requests wait already", 5)
            future: Future = Future()
            self._calls.append((future, function))
            self.counts["requests"] += 1
            self._changed.notify()
            return future

    def end(self) -> None:
        """Take no more requests; `run` returns when all are answered."""
        with self._changed:
            self._ending = True
            self._changed.notify()

    @property
    def ending(self) -> bool:
        """Whether it takes no more requests."""
        return self._ending

    @property
    def waiting(self) -> int:
        """The requests that wait for a row."""
        return len(self._waiting)

    @property
    def active(self) -> int:
        """The requests that have a row."""
        return len(self._running)

    # the engine's own thread

    def run(self) -> None:
        """Answer requests until `end`."""
        while True:
            with self._changed:
                while not (self._waiting or self._running or self._calls or self._cancelled or self._ending):
                    self._changed.wait()
                if self._ending and not (self._waiting or self._running or self._calls):
                    return
            try:
                self.look()
            except Exception:  # for instance no memory for a new pool
                logging.getLogger(__name__).exception("the engine failed")
                for each in [*self._waiting.values(), *self._running.values()]:
                    self._waiting.pop(each.number, None)
                    self._finish(each, Update("", [], None, "failed"))
                self._decoders.clear()

    def look(self) -> None:
        """One round: calls, then new requests, then the next tokens of each pool."""
        while self._calls:
            future, function = self._calls.popleft()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except Exception as error:
                    future.set_exception(error)
        self._give_up()
        while chosen := self._next_ones():
            with self._changed:
                for each in chosen:
                    self._running[each.number] = self._waiting.pop(each.number)
            with self._failing(chosen[0].pool):
                self._decoders[chosen[0].pool].admit([(each.number, _request(each.ask)) for each in chosen])
        for pool in dict.fromkeys(each.pool for each in self._running.values()):
            with self._failing(pool):
                self._advance(pool)

    def _give_up(self) -> None:
        """End what was cancelled, and what is late."""
        with self._changed:
            ended = dict.fromkeys(self._cancelled, "cancelled")
            self._cancelled.clear()
            everything = self._waiting | self._running
            late = (number for number, each in everything.items() if time.monotonic() > each.deadline)
            ended = dict.fromkeys(late, "late") | ended
            for number in ended:
                self._waiting.pop(number, None)
        for number, reason in ended.items():
            if number in self._running:
                self._decoders[self._running[number].pool].cancel(number)
            if number in everything:
                self._finish(everything[number], Update("", [], None, reason))

    def _next_ones(self) -> list[_Running]:
        """The first request whose pool has a free row, and those of its width, as many as are admitted at once."""
        with self._changed:
            waiting = list(self._waiting.values())
        for first in waiting:
            decoder = self._decoder(first)
            if room := min(decoder.free, decoder.fill):
                return [each for each in waiting if _kind(each) == _kind(first)][:room]
        return []

    def _decoder(self, running: _Running) -> Decoder:
        pool, shared = running.pool, running.ask.stage.shared
        if pool not in self._decoders:
            shape = Shape(
                rows=self.rows,
                width=pool.capacity,
                max_tokens=pool.capacity,
                stops=STOPS,
                capacity=pool.capacity,
                alternatives=ALTERNATIVES if pool.scored else 0,
                penalties=pool.penalises,
                variants=shared.variants,
            )
            needs = Needs(draws=True, orders=pool.orders, penalises=pool.penalises)
            self._decoders[pool] = decoder_of(shared.leaves, shared.config, shared.segments, shape, needs=needs)
        return self._decoders[pool]

    def _advance(self, pool: Pool) -> None:
        decoder, steps = self._decoders[pool], self._steps[pool]
        before = time.monotonic()
        made = list(decoder.advance(steps=steps))
        seconds = time.monotonic() - before
        faster, slower = seconds < LOOK / 2, seconds > LOOK
        self._steps[pool] = min(self._most_steps, 2 * steps) if faster else max(1, steps // 2) if slower else steps
        for number, tokens, complete, stop, scores in made:
            running = self._running[number]
            text = running.stream.add(tokens, complete)
            if running.stream.ended:
                decoder.cancel(number)
                tokens, stop = tokens[: running.stream.covered(tokens)], []
            finish = "stop" if running.stream.ended or stop else "length" if complete else ""
            count = len(tokens) + len(stop)
            kept = Scores(*(each[:count] for each in scores)) if running.ask.scored else None
            update = Update(text, tokens, kept, finish, stop)
            if finish:
                self._finish(running, update)
            else:
                running.listen(update)

    def _finish(self, running: _Running, last: Update) -> None:
        with self._changed:
            self._running.pop(running.number, None)
            prompt, made = len(running.ask.tokens), len(last.tokens)
            self.counts.update({last.finish: 1, "prompt_tokens": prompt, "tokens": made})
        running.listen(last)

    @contextlib.contextmanager
    def _failing(self, pool: Pool) -> Iterator[None]:
        """A failure ends the requests of its pool only; the pool is made again for the next ones."""
        try:
            yield
        except Exception:
            logging.getLogger(__name__).exception("the batch failed")
            del self._decoders[pool]
            for each in [each for each in self._running.values() if each.pool == pool]:
                self._finish(each, Update("", [], None, "failed"))


def _kind(running: _Running) -> tuple[Pool, int]:
    """What requests that are admitted together have in common: see `Decoder.admit`."""
    return running.pool, padded_width(len(running.ask.tokens), running.pool.capacity)


def _request(ask: Ask) -> Request:
    return Request(ask.tokens, ask.limit, ask.stop_tokens, ask.seed, ask.sampling, ask.stage.variant)
