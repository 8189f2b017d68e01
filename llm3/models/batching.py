"""Continuous batching: many prompts, a fixed number of rows at a time; a finished row takes the next prompt."""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llm3.config.model_schema import ModelConfig, check_length
from llm3.config.sampling import GREEDY, Sampling
from llm3.distributed.sharding import axis_size
from llm3.errors import UserError
from llm3.models.decoding import ANY, NEVER, Kept, Scores, admit, advance, no_rows
from llm3.models.sampling import Needs, arrays, needs_of
from llm3.models.transformer import abstract
from llm3.segments import Segments, segmented

MIN_WIDTH = 32  # least tokens of a padded row of prompts


class Request(NamedTuple):
    """A prompt, the max tokens of its answer, the runs of tokens that end it, the seed of draws, and their settings.

    variant: of the model, see `Shape`.
    """

    prompt: Sequence[int]
    limit: int
    stops: Sequence[Sequence[int]] = ()
    seed: int = 0
    sampling: Sampling = GREEDY
    variant: int = 0


def padded_width(length: int, max_width: int | None = None, least: int = MIN_WIDTH) -> int:
    """The next power of two, at least `least`, capped at `max_width` (None: not capped)."""
    width = max(least, 1 << max(length - 1, 0).bit_length())
    return width if max_width is None else min(max_width, width)


def width_groups(lengths: Sequence[int], max_width: int, rows: int) -> Iterator[tuple[int, list[int]]]:
    """Yield (width, numbers) of prompts that are padded to the same width, at most `rows` at a time.

    The width is a `padded_width`; it depends on the prompt's own length only.
    """
    found: dict[int, list[int]] = collections.defaultdict(list)
    for number, length in enumerate(lengths):
        found[padded_width(length, max_width)].append(number)
    for width, numbers in sorted(found.items()):
        for first in range(0, len(numbers), rows):
            yield width, numbers[first : first + rows]


def left_aligned(prompts: Sequence[Sequence[int]], width: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Prompts from the first column on, int32 [rows, width], and their lengths, int32 [rows]; other rows are empty."""
    tokens, lengths = np.zeros((rows, width), np.int32), np.zeros(rows, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)], lengths[row] = prompt, len(prompt)
    return tokens, lengths


class Shape(NamedTuple):
    """The sizes of a compiled batch: rows, tokens of a prompt and of an answer, and (number, tokens) of its stops.

    capacity: tokens of a prompt with its answer; 0: width + max_tokens. alternatives: likeliest tokens that are kept of
    each place of an answer, with their log probabilities; 0: none. penalties: whether repetition can be penalised.
    variants: the adapters of each variant of the model that a request can ask for; (): there is one, with all.
    """

    rows: int
    width: int
    max_tokens: int
    stops: tuple[int, int] = (1, 1)
    capacity: int = 0
    alternatives: int = 0
    penalties: bool = False
    variants: tuple[tuple[str, ...], ...] = ()


class Progress(NamedTuple):
    """What a row has decoded. tokens: so far, without the stop that ended them. stop: the tokens of that stop, or none.

    scores: of these tokens and of the stop, numpy arrays without the axis of rows.
    """

    number: int
    tokens: list[int]
    complete: bool
    stop: list[int]
    scores: Scores


def stop_sizes(requests: Sequence[Request]) -> tuple[int, int]:
    """The number of stops that a request has at most, and the tokens of one."""
    stops = [each.stops for each in requests]
    return max([1, *map(len, stops)]), max([1, *(len(stop) for each in stops for stop in each)])


@dataclasses.dataclass
class Decoder:
    """A batch of rows on the devices, and the request in each row.

    jit: turns a function(model, rows, *arrays) -> (rows, result) into one of (rows, *arrays), which donates the rows
    and replicates the result. place: puts numpy arrays with a first axis of rows on the devices. steps: between two
    looks of the host at the answers; 0: as many as an answer has. needs: of all requests that will come; None: the
    functions are compiled for what the requests of the moment need.
    """

    jit: Callable[[partial], Callable]
    place: Callable[[Any], Any]
    config: ModelConfig
    segments: Segments
    shape: Shape
    steps: int = 0
    needs: Needs | None = None

    def __post_init__(self) -> None:
        rows, width, max_tokens, stops, capacity, alternatives, penalties, variants = self.shape
        self._kept = Kept(max_tokens, alternatives, penalties, variants)
        self._rows = no_rows(self.config, self.segments, rows, capacity or width + max_tokens, stops, self._kept)
        self._compiled: dict[tuple[Callable, Needs], Callable] = {}
        self.requests: list[tuple[int, Request] | None] = [None] * rows
        # prompts are read so many at a time, a number that the mesh divides
        pieces = axis_size(jax.sharding.get_abstract_mesh(), "batch")
        self.fill = rows if rows % pieces else pieces * max(1, rows // pieces // 4)

    @property
    def free(self) -> int:
        """The number of rows without a request."""
        return self.requests.count(None)

    def _call(self, function: Callable, requests: Iterable[Request], *arguments: Any, **options: Any) -> Any:
        needs = self.needs or needs_of(each.sampling for each in requests)
        if (function, needs) not in self._compiled:
            self._compiled[function, needs] = self.jit(partial(function, needs=needs, **options))
        self._rows, result = self._compiled[function, needs](self._rows, *arguments)
        return result

    def admit(self, requests: Sequence[tuple[int, Request]]) -> None:
        """Put up to `fill` numbered requests into rows that have none.

        They are padded to the `padded_width` of the longest: for an answer that depends on its own request only, their
        prompts have the same one. Raises UserError for a penalty that the shape does not allow.
        """
        rows, width, _, stops, *_ = self.shape
        free = [row for row, each in enumerate(self.requests) if each is None]
        places, limits, seeds, variants = np.full(self.fill, rows, np.int32), *np.zeros((3, self.fill), np.int32)
        ends = np.full((self.fill, *stops), NEVER, np.int32)
        for place, (row, numbered) in enumerate(zip(free, requests, strict=False)):
            self.requests[row], (_, request) = numbered, numbered
            places[place], limits[place], seeds[place] = row, request.limit, request.seed
            variants[place] = request.variant
            for end, stop in zip(ends[place], filter(None, request.stops), strict=False):
                end[:] = [ANY] * (len(end) - len(stop)) + list(stop)
        asked = [request for _, request in requests]
        if not self.shape.penalties and needs_of(each.sampling for each in asked).penalises:
            raise UserError("repetition_penalty: this batch keeps no record of the tokens of its rows")
        padded = padded_width(max((len(each.prompt) for each in asked), default=width), width)
        prompts = left_aligned([each.prompt for each in asked], padded, self.fill)
        settings = arrays([*(each.sampling for each in asked), *[GREEDY] * (self.fill - len(asked))])
        placed = self.place((*prompts, places, limits, seeds, ends, settings, variants))
        self._call(admit, asked, *placed, kept=self._kept)

    def advance(self, fewest: int = 0, steps: int = 0) -> Iterator[Progress]:
        """Decode, and yield the progress of each request.

        fewest: stop when at most this many rows go on. steps: tokens of each; 0: see the class.
        """
        going = np.array([each is not None for each in self.requests])
        asked = [each[1] for each in self.requests if each is not None]
        most = np.int32(steps or self.steps or self.shape.max_tokens)
        found = self._call(advance, asked, self.place(going), np.int32(fewest), most, kept=self._kept)
        found = jax.device_get(found)
        for row, numbered in enumerate([*self.requests]):
            if numbered is None:
                continue
            number, request = numbered
            made, active = found["answer"][row, : found["length"][row]].tolist(), bool(found["active"][row])
            if not active:
                self.requests[row] = None
            tokens = made if active else without_stop(made, request.stops)
            scores = Scores(*(each[row, : len(made)] for each in found["scores"]))
            yield Progress(number, tokens, not active, made[len(tokens) :], scores)

    def cancel(self, number: int) -> None:
        """Free the row of a request whose answer is not complete."""
        self.requests = [None if each is not None and each[0] == number else each for each in self.requests]

    def answers(
        self, requests: Iterable[tuple[int, Request]], ended: Callable[[int, list[int]], bool] | None = None
    ) -> Iterator[tuple[int, list[int]]]:
        """Yield (number, tokens of the answer, without the stop that ended it) as the answers are complete.

        requests: with different numbers. ended(number, tokens so far): whether an answer is complete already, asked
        every `steps` tokens.
        """
        waiting = collections.deque(requests)
        while waiting or any(self.requests):
            free = self.free
            while waiting and free >= min(self.fill, len(waiting)):
                chosen = [waiting.popleft() for _ in range(min(self.fill, len(waiting)))]
                self.admit(chosen)
                free -= len(chosen)
            fewest = self.shape.rows - min(self.fill, len(waiting)) if waiting else 0
            for number, tokens, complete, *_ in self.advance(fewest):
                if complete or (ended is not None and ended(number, tokens)):
                    self.cancel(number)
                    yield number, tokens


def without_stop(tokens: list[int], stops: Sequence[Sequence[int]]) -> list[int]:
    """The tokens without the longest stop at their end."""
    lengths = [len(stop) for stop in stops if stop and tokens[-len(stop) :] == list(stop)]
    return tokens[: len(tokens) - max(lengths, default=0)]


@cache
def _jitted(config: ModelConfig, segments: Segments, function: Callable, **options: Any) -> Callable:
    graph = abstract(config, segments).graph
    return jax.jit(
        lambda params, rows, *arrays: function(nnx.merge(graph, params), rows, *arrays, **options), donate_argnums=1
    )


def decoder_of(
    leaves: dict, config: ModelConfig, segments: Segments, shape: Shape, *, steps: int = 0, needs: Needs | None = None
) -> Decoder:
    """A decoder of parameters that are cut into `segments`. steps, needs: see `Decoder`."""

    def jit(function: partial) -> Callable:
        return partial(_jitted(config, segments, function.func, **function.keywords), leaves)

    return Decoder(jit, partial(jax.tree.map, jnp.asarray), config, segments, shape, steps, needs)


def local_decoder(
    params: dict, config: ModelConfig, shape: Shape, *, segments: Segments | None = None, steps: int = 0
) -> Decoder:
    """A decoder of canonical parameters. segments: default: one for each layer, whose kernels are then read in place.

    The loop over the layers of a longer segment compiles faster, but on CPU it copies each layer's kernels and cache
    before it reads them.
    """
    cut = segments or tuple((layer, layer + 1) for layer in range(config.layers))
    return decoder_of(segmented(params, cut), config, cut, shape, steps=steps)


def sample(
    params: dict,
    config: ModelConfig,
    prompt: Sequence[int],
    *,
    max_tokens: int,
    seed: int = 0,
    stops: Sequence[Sequence[int]] = (),
    **sampling: Any,
) -> list[int]:
    """Up to `max_tokens` tokens after the prompt, up to the first of `stops`, runs of tokens. params: canonical.

    sampling: fields of `Sampling`; temperature: default 1. Raises UserError if a model with learned positions has none
    for so many tokens.
    """
    check_length(config, len(prompt) + max_tokens, "prompt and max_tokens")
    settings = Sampling(**{"temperature": 1.0} | sampling)
    request = Request(prompt, max_tokens, stops, seed, settings)
    sizes = padded_width(len(prompt)), padded_width(max_tokens), stop_sizes([request])
    decoder = local_decoder(params, config, Shape(1, *sizes, penalties=needs_of([settings]).penalises))
    ((_, tokens),) = decoder.answers([(0, request)])
    return tokens
