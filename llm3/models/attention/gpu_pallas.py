"""Attention on NVIDIA GPUs by the Pallas kernel that comes with jax, which reads documents.

It has no grouped queries: the keys and values of a group are repeated.
"""

import warnings

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.gpu import attention as kernels

from llm3.models.attention.pattern import Pattern

BLOCK = 128  # queries and keys of a block, by default


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    pattern: Pattern,
    scale: float = 0.0,
    softcap: float = 0.0,
    interpret: bool = False,
) -> jax.Array:
    """softmax(scale q k^T) v where the pattern allows; arguments and result as of `plain.attend`.

    The pattern is in order, without a prefix and a window, there is no soft cap, and the length is a multiple of
    `BLOCK`. interpret: run it on a CPU.
    """
    assert not softcap
    groups = query.shape[2] // key.shape[2]
    key, value = (jnp.repeat(each, groups, axis=2) for each in (key, value))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return kernels.mha(
            query,
            key,
            value,
            segment_ids=pattern.queries.segments,
            sm_scale=scale or query.shape[-1] ** -0.5,
            causal=pattern.causal,
            interpret=interpret,
        )
