"""What is measured after each stage. A peer is one file here, found by its name.

A peer has `WINDOWS`, how its documents are cut ("pieces" or "examples"; see `llm3.data.packing`), and

    sums(model, batch, byte_lengths) -> {name: array}     summed over batches
    figures(totals) -> {name: float}                      from the sums over the whole set

so that a figure is a ratio of global sums: it does not depend on batch size, packing, padding or device count.
`NEEDS_HEAD` says whether it needs a task head, and `BETTER` which figures a checkpoint can be the best by, and whether
"higher" or "lower" is better.
"""

import importlib
import pkgutil
from collections.abc import Callable, Iterable
from types import ModuleType

import jax
import numpy as np
from flax import nnx

from llm3.data.batch import Batch
from llm3.errors import UserError, nearest


def names() -> list[str]:
    """The evaluations there are."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str) -> ModuleType:
    """The evaluation of this name. Raises UserError."""
    if name not in names():
        raise UserError(f"evaluation {name!r}: {nearest(name, names())}")
    return importlib.import_module(f"{__name__}.{name}")


def make_eval_step(peer: ModuleType, graph: nnx.GraphDef, byte_lengths: np.ndarray) -> Callable:
    """A jitted eval_step(params, batch) -> sums of the peer. byte_lengths: int32 [V], UTF-8 bytes of each token."""

    @jax.jit
    def eval_step(params: dict, batch: Batch) -> dict[str, jax.Array]:
        return peer.sums(nnx.merge(graph, params), batch, byte_lengths)

    return eval_step


def evaluate(peer: ModuleType, eval_step: Callable, params: dict, batches: Iterable[Batch]) -> dict[str, float]:
    """The figures of `params` over all `batches`, added up in float64."""
    totals: dict[str, np.ndarray] = {}
    for batch in batches:
        for name, value in jax.device_get(eval_step(params, batch)).items():
            totals[name] = totals.get(name, 0) + np.asarray(value, np.float64)
    return peer.figures(totals)
