"""Instruction tuning: the loss covers the tokens and the ends of answers (Ouyang et al. 2022, section 3.4).

In plain text, the loss covers every token, as in `causal`.
"""

import jax
import jax.numpy as jnp

from llm3.data.batch import Batch
from llm3.models.transformer import Transformer
from llm3.objectives import Sums, Task

WINDOWS = {"dialogue": "dialogue", "choice": "dialogue", "text": "stream"}
HEAD = ""
LABELLED = True
CAUSAL = True


def loss(model: Transformer, batch: Batch, key: jax.Array, task: Task) -> Sums:
    """The sum of the losses of the answers' tokens, weighted by token, and `accuracy` of the most likely token."""
    del task
    hidden = model(batch.tokens, batch.positions, batch.segments, key=key)
    nats, correct = model.score(hidden, batch.targets)
    metrics = {"accuracy": jnp.sum(correct * batch.weights)}
    return Sums(jnp.sum(nats * batch.weights), jnp.sum(batch.weights), metrics)
