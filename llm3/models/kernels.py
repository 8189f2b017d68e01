"""Linear layers and the embedding, with hand-written backward passes.

The backward passes that XLA derives on CPU make transposed copies of activations. On two cores, the weight gradient
below is 2.5 times as fast as the derived one.

Sums over tokens, among them the gradients of all parameters, are float32 in any compute dtype, and so are logits. Only
products over features leave their sum in the compute dtype: it is rounded once, and where `tensor` shards the features,
the all-reduce of activations moves half the bytes. Float32 operands are multiplied as float32 on accelerators too,
which by default round them to TF32 or bfloat16.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from llm3.distributed.sharding import constrain, cut_along
from llm3.models.low_precision import low_precision_dot


def dot(a: jax.Array, b: jax.Array, axes: tuple, dtype: Any = None) -> jax.Array:
    """The product of two arrays of one dtype, contracted over `axes` = (axes of a, axes of b).

    dtype: of the sums and the result; None: the dtype of the operands.
    """
    kind = dtype or a.dtype
    return jax.lax.dot_general(a, b, (axes, ((), ())), precision=precision(a), preferred_element_type=kind)


def precision(operand: jax.Array) -> jax.lax.Precision:
    return jax.lax.Precision.HIGHEST if operand.dtype == jnp.float32 else jax.lax.Precision.DEFAULT


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def linear(x: jax.Array, kernel: jax.Array, dtype: Any = None, matmul: str = "compute") -> jax.Array:
    """x @ kernel. x: [B, T, inputs], kernel: [inputs, outputs], result [B, T, outputs] in `dtype` (None: that of x).

    matmul: as in `ModelConfig`. The kernel's gradient is computed in x's dtype, whatever it is.
    """
    return _linear_forward(x, kernel, dtype, matmul)[0]


def _product(x: jax.Array, kernel: jax.Array, axes: tuple, matmul: str, dtype: Any = None) -> jax.Array:
    if matmul == "compute":
        return dot(x, kernel.astype(x.dtype), axes, dtype)
    return low_precision_dot(x, kernel, axes, matmul, dtype or x.dtype)


def _linear_forward(x: jax.Array, kernel: jax.Array, dtype: Any, matmul: str) -> tuple[jax.Array, tuple]:
    # does not call `linear`: a remat policy for dots does not look inside a custom_vjp
    return _product(x, kernel, ((2,), (0,)), matmul, dtype), (x, kernel)


def _linear_backward(dtype: Any, matmul: str, saved: tuple, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    dy = dy.astype(x.dtype)
    dx = _product(dy, kernel, ((2,), (1,)), matmul)
    dkernel = dot(x, dy, ((0, 1), (0, 1)), jnp.float32)  # x on the left: no transposed copy
    return dx, dkernel.astype(kernel.dtype)


linear.defvjp(_linear_forward, _linear_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def embed(table: jax.Array, tokens: jax.Array, dtype: Any, axis: str | None = "vocab") -> jax.Array:
    """The rows of the table [V, D] for the tokens, int32 [B, T]: [B, T, D] in `dtype`, with a float32 gradient.

    axis: the logical axis of the rows.
    """
    return _gathered(table, dtype, axis)[tokens]


def _gathered(table: jax.Array, dtype: Any, axis: str | None = "vocab") -> jax.Array:
    """The table in the compute dtype, gathered over fsdp, whose sharding of rows does not match the batch."""
    return constrain(table.astype(dtype), axis, None)


def _embed_forward(table: jax.Array, tokens: jax.Array, dtype: Any, axis: str | None) -> tuple[jax.Array, tuple]:
    return _gathered(table, dtype, axis)[tokens], (table, tokens)


def _embed_backward(dtype: Any, axis: str | None, saved: tuple, dy: jax.Array) -> tuple[jax.Array, None]:
    table, tokens = saved
    return _added_rows(table.shape, tokens, dy.astype(jnp.float32), axis).astype(table.dtype), None


embed.defvjp(_embed_forward, _embed_backward)


def _added_rows(shape: tuple[int, int], tokens: jax.Array, dy: jax.Array, axis: str | None) -> jax.Array:
    """Zeros of this shape [V, D] with dy [B, T, D] added to the rows of the tokens.

    Each device adds up its own positions, and the sums are reduced once, along fsdp to the shards of the table: XLA
    would all-reduce the whole table over all devices.
    """
    batch, length = cut_along("batch", tokens.shape[0]), cut_along("length", tokens.shape[1])
    own = (*batch, *length)
    vocab = tuple(each for each in (cut_along(axis, shape[0]) if axis else ()) if each not in own)
    embed = tuple(each for each in cut_along("embed", shape[1]) if each in own)
    mesh = jax.sharding.get_abstract_mesh()
    size = shape[0] // math.prod(mesh.shape[each] for each in vocab)

    def local(tokens: jax.Array, dy: jax.Array) -> jax.Array:
        row = tokens - jax.lax.axis_index(vocab) * size if vocab else tokens
        row = jnp.where(row < 0, size, row)  # of another device: left out
        part = jnp.zeros((size, shape[1])).at[row].add(dy, mode="drop")
        part = jax.lax.psum_scatter(part, embed, scatter_dimension=1, tiled=True) if embed else part
        return jax.lax.psum(part, tuple(each for each in own if each not in embed))

    if not (own or vocab):
        return jnp.zeros(shape, jnp.float32).at[tokens].add(dy)
    rows = PartitionSpec(batch or None, length or None)
    free = set(mesh.axis_names) - set(mesh.manual_axes)
    result = PartitionSpec(vocab or None, embed or None)
    return jax.shard_map(local, in_specs=(rows, rows), out_specs=result, axis_names=free, check_vma=False)(tokens, dy)


@jax.custom_vjp
def unembed(x: jax.Array, table: jax.Array) -> jax.Array:
    """The logits x @ table^T, float32 [B, T, V]. x: [B, T, D], table: [V, D]; the product is in x's dtype."""
    return _unembed_forward(x, table)[0]


def _unembed_forward(x: jax.Array, table: jax.Array) -> tuple[jax.Array, tuple]:
    gathered = _gathered(table, x.dtype)
    return dot(x, gathered, ((2,), (1,)), jnp.float32), (x, gathered, table)


def _unembed_backward(saved: tuple, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, gathered, table = saved
    dy = dy.astype(x.dtype)
    dtable = dot(dy, x, ((0, 1), (0, 1)), jnp.float32)
    return dot(dy, gathered, ((2,), (0,))), constrain(dtable, "vocab", None).astype(table.dtype)


unembed.defvjp(_unembed_forward, _unembed_backward)
