"""What a stage optimises. A peer is one file here, found by its name.

A peer has `WINDOWS`, how its examples are cut ("stream": next-token windows over running text; "examples": whole
documents with a label), `NEEDS_HEAD`, whether the model needs a task head for it, `LABELLED`,
whether it learns from labels, and

    loss(model, batch, key) -> Sums

which turns a batch into *sums*: the step divides global sum by global sum, so that gradients do not depend on how a
batch was cut into micro-batches or devices. For the same reason, what is random in a batch itself is drawn once, for
the whole of it, where a peer has `prepare(batch, key, vocab_size) -> Batch`.
"""

import importlib
import pkgutil
from types import ModuleType
from typing import NamedTuple

import jax

from llm3.errors import UserError, nearest


class Sums(NamedTuple):
    """Scalars, float32: the sum of losses in nats, the sum of weights, and sums of further figures per unit weight."""

    loss: jax.Array
    weight: jax.Array
    metrics: dict[str, jax.Array]


def names() -> list[str]:
    """The objectives there are."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str) -> ModuleType:
    """The objective of this name. Raises UserError."""
    if name not in names():
        raise UserError(f"objective {name!r}: {nearest(name, names())}")
    return importlib.import_module(f"{__name__}.{name}")
