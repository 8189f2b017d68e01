"""What is measured after each stage. A plugin is one file here, found by its name.

A plugin has `WINDOWS`, which forms of source it takes and how each is cut ({form: kind}, see `llm3.data.formats` and
`llm3.data.windows`), `HEAD`, the task head that it reads (as of an objective), `CAUSAL`, which attention it needs
(None: either), `BETTER`, which figures a checkpoint can be the best by, and whether "higher" or "lower" is better, and

    figures(context) -> {name: float, int, or (details for the report) dict or list}

A figure is a ratio of global sums, or computed from what each document gave: it does not depend on batch size, packing,
padding or device count. Where a plugin has options, they are a frozen dataclass `Options`.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llm3.config.schema import EvaluationConfig, ModelConfig
from llm3.data import windows
from llm3.data.batch import Batch
from llm3.data.cache.cache import TokenCache
from llm3.data.mixture import finite_batches
from llm3.data.packing import Windows
from llm3.data.tokenizer import Tokenizer
from llm3.distributed.sharding import constrain
from llm3.models.transformer import abstract
from llm3.registry import load_plugin

Compiled = dict[tuple, Callable]


@dataclasses.dataclass(frozen=True)
class EvalContext:
    """A model, and the documents to test it on.

    params: cut as one segment, on the devices. kind: of windows, as the plugin's WINDOWS says. place: puts a batch of
    numpy arrays on the mesh. compiled: what was compiled for an earlier test is found here.
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

    def table(self, cache: TokenCache | None = None, kind: str = "") -> Windows:
        """The documents (or those of `cache`) cut into windows."""
        return load_plugin(windows, kind or self.kind).WindowTable(cache or self.cache, self.config.sequence_length)

    def jit(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """function(model, *arrays), jitted, as a function of the arrays; compiled once for each function and model.

        `function` must be at the top of its file, or a partial of such a one with hashable arguments.
        """
        key = (getattr(function, "func", function), tuple(getattr(function, "keywords", {}).items()), self.model)
        if key not in self.compiled:
            graph = abstract(self.model).graph

            def on_every_host(params: dict, *arrays: Any) -> Any:
                result = function(nnx.merge(graph, params), *arrays)
                return jax.tree.map(lambda x: constrain(x, *(None,) * jnp.ndim(x)), result)

            self.compiled[key] = jax.jit(on_every_host)
        return lambda *arrays: self.compiled[key](self.params, *arrays)

    def each(
        self,
        function: Callable[..., dict[str, jax.Array]],
        *arrays: Any,
        table: Windows | None = None,
        change: Callable[[Batch], Batch] = lambda batch: batch,
    ) -> Iterator[tuple[Batch, dict[str, np.ndarray]]]:
        """What function(model, batch, *arrays) gives for each batch of the table, beside the batch (numpy arrays).

        `change` is applied to each batch on the host. `function` as for `jit`.
        """
        run = self.jit(function)
        for batch in finite_batches(self.table() if table is None else table, self.config.batch_size):
            batch = change(batch)
            yield batch, jax.device_get(run(self.place(batch), *arrays))

    def sums(self, function, *arrays, table=None, change=lambda batch: batch) -> dict[str, np.ndarray]:
        """What `function` gives, added up over all batches in float64. Arguments as of `each`."""
        totals: dict[str, np.ndarray] = {}
        for _, result in self.each(function, *arrays, table=table, change=change):
            for name, value in result.items():
                totals[name] = totals.get(name, 0) + np.asarray(value, np.float64)
        return totals
