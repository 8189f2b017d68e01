"""Attention on NVIDIA GPUs since Hopper by cuDNN's packed form, in which each document is a sequence of its own.

cuDNN's other forms have no documents, and whether rows have more than one (padding counts) is not known when a step is
compiled. jax 0.10 places the keys of grouped queries as if they had as many heads as the queries (jax-ml/jax#39521), so
the keys and values of a group are repeated.
"""

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as kernels

from llm3.errors import UserError
from llm3.models.attention import blockwise
from llm3.models.attention.pattern import Pattern

DOCUMENTS = 64  # of a row: cuDNN keeps float32 [B * 64, H, T], as many bytes as a bfloat16 result with head_dim 128
MOST_ELEMENTS = 2**31  # of the queries: cuDNN takes offsets in memory as int32


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    pattern: Pattern,
    scale: float = 0.0,
    softcap: float = 0.0,
    most: int = DOCUMENTS,
) -> jax.Array:
    """softmax(scale q k^T) v where the pattern allows; arguments and result as of `plain.attend`, bfloat16.

    The pattern is in order, without a prefix, and has a window only if it is causal; there is no soft cap. Where a row
    has more documents than `most`, `blockwise` computes all rows. Raises UserError if cuDNN or the GPU cannot.
    """
    assert not softcap and pattern.prefix is None and (pattern.causal or not pattern.window)
    if query.size >= MOST_ELEMENTS:
        raise UserError(f"config.model.attention='cudnn': {query.shape} queries on a device, 2^31 numbers or more")
    groups, masks = query.shape[2] // key.shape[2], kernels.MaskType
    lengths, offsets, fits = documents(pattern.queries.segments, most)

    def packed(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        key, value = (jnp.repeat(each, groups, axis=2) for each in (key, value))
        return kernels.dot_product_attention(
            query,
            key,
            value,
            q_seqlen=lengths,
            kv_seqlen=lengths,
            q_offsets=offsets,
            kv_offsets=offsets,
            scale=scale or query.shape[-1] ** -0.5,
            mask_type=masks.PADDING_CAUSAL if pattern.causal else masks.PADDING,
            sliding_window_length=pattern.window or None,
        )

    @jax.checkpoint  # else each layer keeps, for the backward pass, what only the other branch has computed
    def in_blocks(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return blockwise.attend(query, key, value, pattern, scale)

    try:
        return jax.lax.cond(fits, packed, in_blocks, query, key, value)
    except NotImplementedError as error:
        raise UserError(f"config.model.attention='cudnn': {error}") from error


def documents(segments: jax.Array, most: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The documents of rows, as cuDNN's packed form takes them, and whether no row has more than `most`.

    segments: int32 [B, T]; a run of one number is a document, padding too, so that each place has a result. Returns
    lengths, int32 [B, most], first places, int32 [B, most + 1], both -1 after the last document, and a bool.
    """
    begins = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    first = jax.vmap(lambda row: jnp.nonzero(row, size=most + 1, fill_value=-1)[0])(begins).astype(jnp.int32)
    stop = jnp.where(first[:, 1:] < 0, segments.shape[1], first[:, 1:])
    lengths = jnp.where(first[:, :-1] < 0, -1, stop - first[:, :-1])
    return lengths, first, begins.sum(1).max() <= most


def runs_here() -> bool:
    """Whether the GPUs of this machine, if it has any, run cuDNN's packed form."""
    return jax.default_backend() != "gpu" or (
        kernels.cuda_versions is not None and kernels.check_compute_capability("9.0")
    )
