"""Evaluations: the metrics that are computed after each stage. Each file here is a plugin, found by its name.

A plugin has
- `WINDOWS`: {row format: kind of windows}, see `llm3.data.formats` and `llm3.data.windows`; empty: it has no source;
- `HEAD`, the task head that it reads, as in `llm3.objectives`;
- `CAUSAL`: the attention that it needs (None: either);
- `BETTER`: {metric by which the best checkpoint can be chosen: "higher" or "lower"};
- `PER_TOKEN` (optional): True if its metrics depend on the tokenizer, so that other tokenizers cannot be compared;
- `Options` (optional): a frozen dataclass;
- `check_tokenizer(tokenizer, options)` (optional): raises UserError if the tokenizer lacks a token that it needs;
- `evaluate(context) -> {name: float or int (a metric), None (it does not apply), dict or list (details for the
  report)}`. `<metric>_stderr` is the standard error of a metric. The entry "predictions" has the results of single
  documents as columns, from which the metrics can be computed: see `llm3.report.predictions` and docs/evaluation.md.
  An evaluation of several tasks has such columns for each, as {task: columns}.

Optional, for a plugin without a source: `REQUIRES`, {package that it imports: the extra of llm3 that installs it};
`prepare(config, options, template)`, called once, before any device is used, for `EvalContext.prepared`; and
`better(prepared)`, the `BETTER` that is only known then.

A metric is a ratio of global sums or is computed from results of single documents, so it does not depend on batch size,
packing, padding or device count.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llm3.config.schema import EvaluationConfig, ModelConfig
from llm3.data import windows
from llm3.data.batch import Batch
from llm3.data.cache.token_cache import TokenCache
from llm3.data.mixture import finite_batch, prefetch
from llm3.data.packing import Windows
from llm3.data.tokenizer import Tokenizer
from llm3.distributed.sharding import constrain
from llm3.models.batching import width_groups
from llm3.models.transformer import abstract
from llm3.registry import load_plugin
from llm3.segments import STACK, segment_bounds

T = TypeVar("T")
Compiled = dict[tuple, Callable]
IN_FLIGHT = 2  # batches that the devices are given ahead of the one whose results are read
# counting(total, unit): a context with a function that is told how many more of the total are done
Counting = Callable[[int, str], AbstractContextManager[Callable[[int], None]]]


def uncounted(total: int, unit: str) -> AbstractContextManager[Callable[[int], None]]:
    """A `Counting` that shows nothing."""
    return nullcontext(lambda number: None)


class OwnRows(NamedTuple):
    """The rows of a batch that this process reads, and how it puts them on the mesh: see `sharding.place_rows`."""

    rows: list[int]
    place: Callable[[Any], Any]


def overlapped(results: Iterable[tuple[T, Any]]) -> Iterator[tuple[T, Any]]:
    """Yield (what, its results as numpy arrays), in order, while the devices compute up to `IN_FLIGHT` later ones."""
    waiting: collections.deque[tuple[T, Any]] = collections.deque()
    for what, arrays in results:
        for array in jax.tree.leaves(arrays):
            array.copy_to_host_async()
        waiting.append((what, arrays))
        if len(waiting) > IN_FLIGHT:
            first, done = waiting.popleft()
            yield first, jax.device_get(done)
    for what, arrays in waiting:
        yield what, jax.device_get(arrays)


def segment_sums(values: jax.Array, batch: Batch, segments: int) -> jax.Array:
    """The sums of values [B, T] over the segments 1 to `segments` of each window: [B, segments].

    Sums of masked values, unlike scattered ones, are added in the same order on every run.
    """
    inside = batch.segments[:, None, :] == jnp.arange(1, segments + 1)[:, None]
    return jnp.sum(jnp.where(inside, values[:, None, :], 0), axis=-1)


def by_item(columns: Mapping[str, np.ndarray | list[Any]], rows: np.ndarray) -> dict[str, Any]:
    """Columns as predictions: with `item`, the row of each document in its source, and in that order.

    rows: int64 [items], of the documents of the columns (`TokenCache.rows`).
    """
    order = np.argsort(rows, kind="stable")
    sorted_columns = {
        name: values[order] if isinstance(values, np.ndarray) else [values[place] for place in order]
        for name, values in columns.items()
    }
    return {"item": np.asarray(rows, np.int64)[order]} | sorted_columns


@dataclasses.dataclass(frozen=True)
class EvalContext:
    """A model, and the documents to evaluate it on.

    params: on the devices, in any segments. kind: the kind of windows. place: puts a batch of numpy arrays on
    the mesh. compiled: the jitted functions of earlier evaluations, see `jit`. template: the run's chat template or "".
    prepared: the result of the plugin's `prepare`. counting: shows how many windows or documents are done. own: the
    rows of each batch that this process reads; None: all of them.
    """

    params: dict
    model: ModelConfig
    config: EvaluationConfig
    options: Any
    kind: str
    cache: TokenCache
    tokenizer: Tokenizer
    place: Callable[[Any], Any]
    compiled: Compiled
    template: str = ""
    prepared: Any = None
    counting: Counting = uncounted
    own: OwnRows | None = None

    def table(self, cache: TokenCache | None = None, kind: str = "") -> Windows:
        """The documents (of `cache`, if given) cut into windows."""
        return load_plugin(windows, kind or self.kind).WindowTable(cache or self.cache, self.config.sequence_length)

    def jit(self, function: Callable[..., Any], *, stateful: bool = False) -> Callable[..., Any]:
        """function(model, *arrays), jitted, as a function of the arrays. Compiled once for each function and model.

        `function` must be a module-level function, or a partial of one with hashable arguments. Every process gets all
        of the result. stateful: function(model, state, *arrays) -> (state, result); the state, which stays as it is
        placed, is donated.
        """
        segments = tuple(sorted(map(segment_bounds, self.params[STACK])))
        own = (getattr(function, "func", function), tuple(getattr(function, "keywords", {}).items()))
        key = (*own, self.model, segments)
        if key not in self.compiled:
            graph = abstract(self.model, segments).graph

            def on_every_host(params: dict, *arrays: Any) -> Any:
                with jax.default_matmul_precision("float32"):  # for products of the plugin; the kernels set their own
                    result = function(nnx.merge(graph, params), *arrays)
                state, result = result if stateful else (None, result)
                result = jax.tree.map(lambda x: constrain(x, *(None,) * jnp.ndim(x)), result)
                return (state, result) if stateful else result

            self.compiled[key] = jax.jit(on_every_host, donate_argnums=(1,) if stateful else ())
        return lambda *arrays: self.compiled[key](self.params, *arrays)

    def each(
        self,
        function: Callable[..., dict[str, jax.Array]],
        *arrays: Any,
        table: Windows | None = None,
        change: Callable[[Batch], Batch] | None = None,
    ) -> Iterator[tuple[Batch, dict[str, np.ndarray]]]:
        """Yield (batch, function(model, batch, *arrays)), as numpy arrays, for each batch of the table.

        `change` is applied to each batch on the host, some batches ahead. `function`: see `jit`.
        """
        return self._results(function, *arrays, table=table, change=change)

    def _results(
        self,
        function: Callable[..., dict[str, jax.Array]],
        *arrays: Any,
        table: Windows | None,
        change: Callable[[Batch], Batch] | None,
        own: OwnRows | None = None,
    ) -> Iterator[tuple[Batch, dict[str, np.ndarray]]]:
        """As `each`; a thread reads and places the next batches. own: of each batch, read and yield only these rows."""
        run, table = self.jit(function), self.table() if table is None else table
        rows, windows = self.config.batch_size, len(table)

        def read(number: int) -> tuple[Batch, Any]:
            batch = finite_batch(table, rows, number, own and own.rows)
            batch = batch if change is None else change(batch)
            return batch, (self.place if own is None else own.place)(batch)

        with self.counting(windows, "windows") as advance, closing(prefetch(read, 0, -(-windows // rows))) as batches:
            computed = ((batch, run(placed, *arrays)) for batch, placed in batches)
            for number, done in enumerate(overlapped(computed)):
                yield done
                advance(min(rows, windows - number * rows))

    def groups(
        self, lengths: Sequence[int], max_width: int, unit: str = "documents"
    ) -> Iterator[tuple[int, list[int]]]:
        """Yield (width, numbers) of prompts of these lengths, a batch at a time: see `batching.width_groups`."""
        with self.counting(len(lengths), unit) as advance:
            for width, numbers in width_groups(lengths, max_width, self.config.batch_size):
                yield width, numbers
                advance(len(numbers))

    def by_document(
        self,
        function: Callable[..., dict[str, jax.Array]],
        *arrays: Any,
        table: Windows | None = None,
        change: Callable[[Batch], Batch] | None = None,
    ) -> dict[str, np.ndarray]:
        """The results of `function` for the documents of the cache, summed over their pieces: float64 [documents, ...].

        `function(..., segments=S)` returns arrays [B, S, ...]: of the segments 1 to S of each window, as by
        `segment_sums`. Other arguments: see `each`.
        """
        table, rows = self.table() if table is None else table, self.config.batch_size
        # a power of two, so that evaluations of like documents share their compiled function
        run = functools.partial(function, segments=1 << (max(table.max_pieces, 1) - 1).bit_length())
        totals: dict[str, np.ndarray] = {}
        own = self.own if change is None else None  # a change may look at all rows
        for number, (_, result) in enumerate(self._results(run, *arrays, table=table, change=change, own=own)):
            found = [(row, segment, document) for row, segment, document, _ in self.pieces(table, number * rows)]
            row, segment, document = np.array(found).T
            for name, value in result.items():
                total = totals.setdefault(name, np.zeros((self.cache.documents, *value.shape[2:])))
                np.add.at(total, document, value[row, segment - 1].astype(np.float64))
        return totals

    def pieces(self, table: Windows, first: int) -> Iterator[tuple[int, int, int, tuple[int, int]]]:
        """The pieces of documents in the batch that begins with window `first`.

        Yields (row of the batch, segment, document, (first, stop) token of the document).
        """
        for row in range(min(self.config.batch_size, len(table) - first)):
            for segment, document, span in table.documents_of(first + row):
                yield row, segment, document, span

    def notes(self) -> list[dict[str, Any]]:
        """The note of each document, empty if it has none."""
        return [self.cache.note(index) or {} for index in range(self.cache.documents)]

    def sums(
        self,
        function: Callable[..., dict[str, jax.Array]],
        *arrays: Any,
        table: Windows | None = None,
        change: Callable[[Batch], Batch] | None = None,
    ) -> dict[str, np.ndarray]:
        """The results of `function`, summed over all batches in float64. Arguments: see `each`."""
        totals: dict[str, np.ndarray] = {}
        for _, result in self.each(function, *arrays, table=table, change=change):
            for name, value in result.items():
                totals[name] = totals.get(name, 0) + np.asarray(value, np.float64)
        return totals
