"""What a stage optimises. A plugin is one file here, found by its name.

A plugin has `WINDOWS`, which forms of source it learns from and how each is cut ({form: kind}, see `llm3.data.formats`
and `llm3.data.windows`), `HEAD`, the task head that it needs ("" for none; "labels": one logit a class; or the names of
its outputs), `LABELLED`, whether it learns from labels, `CAUSAL`, which attention it needs (None: either), and

    loss(model, batch, key, task) -> Sums

which turns a batch into *sums*: the step divides global sum by global sum, so that gradients do not depend on how a
batch was cut into micro-batches or devices. Where it has options, they are a frozen dataclass `Options`. What is random
in a batch itself is drawn on the host, window by window, where a plugin has

    corrupt(window, rng, task) -> Batch                  of the stage's length, from a window of `raw_length`
    raw_length(task) -> int                              (optional; else the stage's length)

and where it reads the model in few places of a window, `most(task) -> int` says in how many at most: the last layer is
computed there only.
"""

from typing import Any, NamedTuple

import jax
import numpy as np

from llm3.data.tokenizer import Tokenizer


class Sums(NamedTuple):
    """Scalars, float32: the sum of losses in nats, the sum of weights, and sums of further figures per unit weight."""

    loss: jax.Array
    weight: jax.Array
    metrics: dict[str, jax.Array]


class Task(NamedTuple):
    """What an objective knows besides the batch.

    options: an instance of its `Options`, or None. tokenizer: the run's. length: T of the stage's windows. label_sets:
    float32 [S, C], which classes each of the targets 0 ... S - 1 stands for, where a document may have several labels;
    None where a target is a class.
    """

    options: Any
    tokenizer: Tokenizer
    length: int
    label_sets: np.ndarray | None = None
