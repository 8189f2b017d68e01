"""Frozen kernels in 8 or 4 bits: block-wise codes and scales, and the linear layer that uses them.

A value is codebook[code] * scale; the scale of a block is its largest magnitude (Dettmers et al. 2022, 8-bit
optimizers, section 2.1). Both codebooks contain -1 or 1, so dequantised values quantise to the same codes and scales
again: a checkpoint of dequantised values holds exactly the numbers that the model computed with.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from llm3.errors import UserError
from llm3.models.kernels import dot

BLOCK = 64  # max inputs that share a scale: Dettmers et al. 2023, QLoRA, section 3

# NormalFloat4: quantiles of a normal distribution, with an exact zero. QLoRA, appendix E.
NF4 = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)
CODEBOOKS = {"nf4": NF4, "int8": (np.arange(-127, 128) / 127).astype(np.float32)}


@partial(jax.tree_util.register_dataclass, data_fields=("codes", "scales"), meta_fields=("kind", "axis"))
@dataclass(frozen=True)
class Quantized:
    """An array quantised in blocks along `axis`, which counts from the end: a scan may remove the leading axis.

    codes: uint8, in the shape of the array; "nf4" packs two codes a byte, so its `axis` is half as long.
    scales: float32, one entry a block along `axis`.
    """

    codes: jax.Array
    scales: jax.Array
    kind: str
    axis: int

    def dequantized(self) -> jax.Array:
        """The dequantised values, float32."""
        codes = jnp.moveaxis(self.codes, self.axis, -1)
        if self.kind == "nf4":
            codes = jnp.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:-1], -1)
        scales = jnp.moveaxis(self.scales, self.axis, -1)
        blocks = jnp.asarray(CODEBOOKS[self.kind])[codes].reshape(*scales.shape, -1) * scales[..., None]
        return jnp.moveaxis(blocks.reshape(codes.shape), -1, self.axis)


def block_size(length: int) -> int:
    """The largest divisor of an axis length that is at most `BLOCK`."""
    return next(size for size in range(min(BLOCK, length), 0, -1) if length % size == 0)


def quantize(array: jax.Array, kind: str, axis: int) -> Quantized:
    """Quantise to the nearest codes, block by block along `axis`. Raises UserError for nf4 of an odd axis."""
    length = array.shape[axis]
    if kind == "nf4" and length % 2:
        raise UserError(f"frozen='nf4' packs two inputs a byte: expected an even number of inputs, not {length}")
    axis = axis if axis < 0 else axis - array.ndim
    values = jnp.moveaxis(array.astype(jnp.float32), axis, -1)
    blocks = values.reshape(*values.shape[:-1], -1, block_size(length))
    scales = jnp.abs(blocks).max(axis=-1)
    book = CODEBOOKS[kind]
    unit = blocks / jnp.where(scales > 0, scales, 1)[..., None]
    codes = jnp.searchsorted(jnp.asarray((book[1:] + book[:-1]) / 2), unit.reshape(values.shape)).astype(jnp.uint8)
    if kind == "nf4":
        codes = codes[..., ::2] | (codes[..., 1::2] << 4)
    return Quantized(jnp.moveaxis(codes, -1, axis), jnp.moveaxis(scales, -1, axis), kind, axis)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def quantized_linear(x: jax.Array, kernel: Quantized, outputs: int) -> jax.Array:
    """x @ kernel in x's dtype. x: [B, T, inputs]; kernel: [*inputs, *outputs]; outputs: the product of its output axes.

    The backward pass keeps only the codes and dequantises again. The kernel gets no gradient.
    """
    return _forward(x, kernel, outputs)[0]


def _forward(x: jax.Array, kernel: Quantized, outputs: int) -> tuple[jax.Array, Quantized]:
    # does not call `quantized_linear`: a remat policy for dots does not look inside a custom_vjp
    dense = kernel.dequantized().astype(x.dtype).reshape(-1, outputs)
    return dot(x, dense, ((2,), (0,))), kernel


def _backward(outputs: int, kernel: Quantized, dy: jax.Array) -> tuple[jax.Array, None]:
    dense = kernel.dequantized().astype(dy.dtype).reshape(-1, outputs)
    return dot(dy, dense, ((2,), (1,))), None


quantized_linear.defvjp(_forward, _backward)
