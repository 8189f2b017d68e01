"""The cross-entropy of an LM head in blocks of the vocabulary, with a hand-written backward pass.

Logits [B, T, V] are often the largest array of a step. Here only a block of their columns exists at a time: the forward
pass keeps a running maximum and sum (Milakov and Gimelshein 2018, "Online normalizer calculation for softmax"), and the
backward pass computes each block again from the logarithm of that sum, as Dao et al. 2022 (FlashAttention, section 3.1)
do for attention. Positions stay where they are: neither batch nor length is flattened or cut.

On a mesh, each device computes on its own positions and its own part of the vocabulary. The kernel is gathered once
for all blocks of both passes. Its gradient is reduced once, block by block and in float32, so that a device holds its
own shard only.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from llm3.distributed.sharding import constrain, cut_along
from llm3.models.kernels import dot

WHOLE, BLOCK = 8192, 4096  # tokens: a vocabulary is computed at once up to WHOLE, else in blocks of at most BLOCK
TILE = 128  # columns that the matrix units of accelerators compute together
LOWEST = -1e30  # instead of the logits of columns that do not count; finite, as infinity less infinity is no number


class Head(NamedTuple):
    """The head besides its arrays.

    axis: the axis of the vocabulary in the kernel. vocab: the number of tokens; further columns of the kernel only fill
    it up. block: max tokens of a block; 0: see `blocks`. softcap: 0: none; see `Transformer.logits`.
    """

    axis: int
    vocab: int
    block: int = 0
    softcap: float = 0.0


def blocks(columns: int, block: int = 0) -> tuple[int, int]:
    """(number, size) of the blocks of so many columns of logits; the last block ends with the last column.

    So it may overlap the block before it. block: max size; 0: `columns` up to `WHOLE`, else `BLOCK`.
    """
    largest = block or (BLOCK if columns > WHOLE else columns)
    count = -(-columns // largest)
    even = -(-columns // count)
    return count, min(largest, columns, -(-even // TILE) * TILE)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def cross_entropy(
    head: Head, x: jax.Array, kernel: jax.Array, bias: jax.Array | None, targets: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The cross-entropy of the targets in nats, float32 [B, T], and the likeliest tokens, int32 [B, T].

    x: [B, T, D] in the compute dtype. kernel: [V, D] if `head.axis` is 0, else [D, V]. bias: float32 [V] or None.
    targets: int32 [B, T]. Of tokens that are equally likely, the first one is the likeliest. Logits are float32.
    """
    nats, likeliest, _ = _forward(head, x, _gathered(head, kernel, x.dtype), bias, targets)
    return nats, likeliest


def _vjp_forward(head: Head, *arguments: Any) -> tuple[tuple[jax.Array, jax.Array], tuple]:
    x, kernel, bias, targets = jax.custom_derivatives.custom_vjp_primal_tree_values(arguments)
    # the backward pass makes only the gradients that are wanted: () stands for True, as a saved flag would be an array
    wanted = tuple(() if each is not None and each.perturbed else None for each in arguments[:3])
    gathered = _gathered(head, kernel, x.dtype)
    nats, likeliest, total = _forward(head, x, gathered, bias, targets)
    return (nats, likeliest), (x, gathered, bias, targets, total, kernel, wanted)


def _vjp_backward(head: Head, saved: tuple, cotangents: tuple) -> tuple:
    x, gathered, bias, targets, total, kernel, wanted = saved
    wanted = tuple(each is not None for each in wanted)
    dx, dkernel, dbias = _backward(head, wanted, x, gathered, bias, targets, total, cotangents[0])
    return dx, None if dkernel is None else dkernel.astype(kernel.dtype), dbias, None


cross_entropy.defvjp(_vjp_forward, _vjp_backward, symbolic_zeros=True)


class _Cuts(NamedTuple):
    """The axes of the mesh that shard each axis of the arrays. embed: those that the gradient is scattered along."""

    batch: tuple[str, ...] = ()
    length: tuple[str, ...] = ()
    vocab: tuple[str, ...] = ()
    embed: tuple[str, ...] = ()

    @property
    def rows(self) -> tuple[str, ...]:
        return (*self.batch, *self.length)


def _cuts(head: Head, x: jax.Array, kernel: jax.Array) -> _Cuts:
    batch, length = cut_along("batch", x.shape[0]), cut_along("length", x.shape[1])
    rows = (*batch, *length)
    vocab = tuple(axis for axis in cut_along("vocab", kernel.shape[head.axis]) if axis not in rows)
    return _Cuts(batch, length, vocab, tuple(axis for axis in cut_along("embed", x.shape[2]) if axis in rows))


def _gathered(head: Head, kernel: jax.Array, dtype: Any) -> jax.Array:
    """The kernel in the compute dtype, gathered over fsdp."""
    return constrain(kernel.astype(dtype), *_kernel_axes(head))


def _on_shards(cuts: _Cuts, function: Any, in_axes: tuple, out_axes: tuple) -> Any:
    """`function` on the shards of its arguments. in_axes, out_axes: a field of `_Cuts`, or None, for each axis."""
    if not any(cuts):
        return function
    specs = [
        tuple(PartitionSpec(*(getattr(cuts, axis) or None if axis else None for axis in axes)) for axes in each)
        for each in (in_axes, out_axes)
    ]
    mesh = jax.sharding.get_abstract_mesh()
    free = set(mesh.axis_names) - set(mesh.manual_axes)
    return jax.shard_map(function, in_specs=specs[0], out_specs=specs[1], axis_names=free, check_vma=False)


POSITIONS, ROWS = ("batch", "length"), ("batch", "length", None)


def _kernel_axes(head: Head, embed: str | None = None) -> tuple[str | None, ...]:
    return ("vocab", embed) if head.axis == 0 else (embed, "vocab")


class _Block(NamedTuple):
    """A block of the vocabulary.

    start: its first column of the device. kernel: in the compute dtype. logits: float32 [B, T, block], soft-capped.
    tokens: int32 [block]. counts: bool [block], False in columns that the block before has too, or that only fill up.
    """

    start: jax.Array
    kernel: jax.Array
    logits: jax.Array
    tokens: jax.Array
    counts: jax.Array


def _block(
    head: Head, number: jax.Array, first: jax.Array | int, x: jax.Array, kernel: jax.Array, bias: jax.Array | None
) -> _Block:
    """Block number `number`. first: the token of the device's first column."""
    columns = kernel.shape[head.axis]
    size = blocks(columns, head.block)[1]
    start = jnp.minimum(number * size, columns - size)
    part = jax.lax.dynamic_slice_in_dim(kernel, start, size, head.axis)
    logits = dot(x, part, ((2,), (1 - head.axis,)), jnp.float32)
    if bias is not None:
        logits += jax.lax.dynamic_slice_in_dim(bias, start, size)
    if head.softcap:
        logits = head.softcap * jnp.tanh(logits / head.softcap)
    own = start + jnp.arange(size)
    return _Block(start, part, logits, first + own, (own >= number * size) & (first + own < head.vocab))


def _first_token(head: Head, kernel: jax.Array, vocab: tuple[str, ...]) -> jax.Array | int:
    return jax.lax.axis_index(vocab) * kernel.shape[head.axis] if vocab else 0


def _forward(
    head: Head, x: jax.Array, kernel: jax.Array, bias: jax.Array | None, targets: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Nats, the likeliest tokens, and the logarithm of the sum of the exponentials of the logits: [B, T] each."""
    cuts = _cuts(head, x, kernel)

    def local(x: jax.Array, kernel: jax.Array, bias: jax.Array | None, targets: jax.Array) -> tuple:
        first = _first_token(head, kernel, cuts.vocab)

        def body(sums: tuple, number: jax.Array) -> tuple[tuple, None]:
            highest, total, chosen, likeliest = sums
            block = _block(head, number, first, x, kernel, bias)
            logits = jnp.where(block.counts, block.logits, LOWEST)
            best = logits.max(axis=-1)
            likeliest = jnp.where(best > highest, block.tokens[jnp.argmax(logits, axis=-1)], likeliest)
            before, highest = highest, jnp.maximum(highest, best)
            total = total * _exp(before - highest) + _exp(logits - highest[..., None]).sum(axis=-1)
            column = targets - block.tokens[0]
            inside = jnp.clip(column, 0, len(block.tokens) - 1)
            logit = jnp.take_along_axis(logits, inside[..., None], axis=-1, mode="clip")[..., 0]
            chosen = jnp.where((column == inside) & block.counts[inside], logit, chosen)
            return (highest, total, chosen, likeliest), None

        zeros = jnp.zeros(targets.shape, jnp.float32)
        start = zeros + LOWEST, zeros, zeros, jnp.zeros(targets.shape, jnp.int32)
        count = blocks(kernel.shape[head.axis], head.block)[0]
        highest, total, chosen, likeliest = jax.lax.scan(body, start, jnp.arange(count))[0]
        if cuts.vocab:
            own, highest = highest, jax.lax.pmax(highest, cuts.vocab)
            total, chosen = jax.lax.psum((total * _exp(own - highest), chosen), cuts.vocab)
            likeliest = jax.lax.pmin(jnp.where(own == highest, likeliest, head.vocab), cuts.vocab)
        total = highest + _log(total)
        return total - chosen, likeliest, total

    arguments = ROWS, _kernel_axes(head), ("vocab",), POSITIONS
    return _on_shards(cuts, local, arguments, (POSITIONS,) * 3)(x, kernel, bias, targets)


def _backward(
    head: Head,
    wanted: tuple[bool, ...],
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    targets: jax.Array,
    total: jax.Array,
    dnats: jax.Array,
) -> tuple[jax.Array | None, jax.Array | None, jax.Array | None]:
    """The gradients of x, kernel and bias, where `wanted`; those of kernel and bias are float32."""
    cuts = _cuts(head, x, kernel)
    scattered = math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in cuts.embed)

    def local(x: jax.Array, kernel: jax.Array, bias: Any, targets: jax.Array, total: Any, dnats: Any) -> tuple:
        first, columns = _first_token(head, kernel, cuts.vocab), kernel.shape[head.axis]

        def body(gradients: tuple, number: jax.Array) -> tuple[tuple, None]:
            dx, dkernel, dbias = gradients
            block = _block(head, number, first, x, kernel, bias)
            dlogits = _dlogits(head, block, targets, total) * dnats[..., None]
            low = dlogits.astype(x.dtype)
            if dx is not None:
                dx += dot(low, block.kernel, ((2,), (head.axis,)), jnp.float32)
            if dkernel is not None:
                part = dot(x, low, ((0, 1), (0, 1)), jnp.float32)  # x on the left: no transposed copy of logits
                part = _reduced(part.T if head.axis == 0 else part, cuts, 1 - head.axis)
                dkernel = jax.lax.dynamic_update_slice_in_dim(dkernel, part, block.start, head.axis)
            if dbias is not None:
                part = dlogits.sum(axis=(0, 1))
                dbias = jax.lax.dynamic_update_slice_in_dim(dbias, part, block.start, 0)
            return (dx, dkernel, dbias), None

        width = x.shape[2] // scattered
        shapes = x.shape, (columns, width) if head.axis == 0 else (width, columns), (columns,)
        zeros = tuple(jnp.zeros(each) if want else None for each, want in zip(shapes, wanted, strict=True))
        numbers = jnp.arange(blocks(columns, head.block)[0])
        # from the last block to the first: a block overwrites what the next one has left of their common columns
        dx, dkernel, dbias = jax.lax.scan(body, zeros, numbers, reverse=True)[0]
        dx = None if dx is None else jax.lax.psum(dx.astype(x.dtype), cuts.vocab)
        return dx, dkernel, None if dbias is None else jax.lax.psum(dbias, cuts.rows)

    arguments = ROWS, _kernel_axes(head), ("vocab",), POSITIONS, POSITIONS, POSITIONS
    results = ROWS, _kernel_axes(head, "embed"), ("vocab",)
    return _on_shards(cuts, local, arguments, results)(x, kernel, bias, targets, total, dnats)


def _dlogits(head: Head, block: _Block, targets: jax.Array, total: jax.Array) -> jax.Array:
    """The derivative of the nats by the logits of a block before the soft cap, float32 [B, T, block]."""
    is_target = block.tokens == targets[..., None]
    dlogits = jnp.where(block.counts, _exp(block.logits - total[..., None]) - is_target, 0)
    return dlogits * (1 - jnp.square(block.logits / head.softcap)) if head.softcap else dlogits


def _reduced(part: jax.Array, cuts: _Cuts, axis: int) -> jax.Array:
    """The sum over the positions of all devices, of which each keeps its part along `axis`."""
    if cuts.embed:
        part = jax.lax.psum_scatter(part, cuts.embed, scatter_dimension=axis, tiled=True)
    return jax.lax.psum(part, tuple(each for each in cuts.rows if each not in cuts.embed))


def _exp(x: jax.Array) -> jax.Array:
    """Accurate also on TPUs, whose own exponential is off by up to 1e-4."""
    return jax.lax.exp(x, accuracy=jax.lax.AccuracyMode.HIGHEST)


def _log(x: jax.Array) -> jax.Array:
    return jax.lax.log(x, accuracy=jax.lax.AccuracyMode.HIGHEST)
