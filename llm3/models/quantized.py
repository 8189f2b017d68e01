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
# 1 / 127 as a number of 8 bits, with which a code's product is exact, and the rest
HIGH = 2.0**-7 + 2.0**-14
LOW = 1 / 127 - HIGH


@partial(jax.tree_util.register_dataclass, data_fields=("codes", "scales"), meta_fields=("kind", "axis"))
@dataclass(frozen=True)
class Quantized:
    """An array quantised in blocks along `axis`, which counts from the end: a scan may remove the leading axis.

    codes: uint8, in the shape of the array; "nf4" packs two codes a byte, so its `axis` is half as long. The low bits
    of a block's bytes are its first half, since to interleave neighbours again costs an accelerator more than the rest.
    scales: float32, one entry a block along `axis`.
    """

    codes: jax.Array
    scales: jax.Array
    kind: str
    axis: int

    def dequantized(self) -> jax.Array:
        """The dequantised values, float32."""
        axis = self.scales.ndim + self.axis
        before, after = self.scales.shape[:axis], self.scales.shape[axis + 1 :]
        codes = self.codes.reshape(*before, self.scales.shape[axis], -1, *after)
        if self.kind == "nf4":
            codes = jnp.concatenate([codes & 15, codes >> 4], axis=axis + 1)
        units = UNITS[self.kind](codes)
        return (units * jnp.expand_dims(self.scales, axis + 1)).reshape(*before, -1, *after)


def _int8_units(codes: jax.Array) -> jax.Array:
    """CODEBOOKS["int8"][codes], by arithmetic: an accelerator gathers from a table one value at a time.

    The sum rounds once, as a division by 127 would; XLA may replace that by a product, which rounds otherwise.
    """
    steps = codes.astype(jnp.float32) - 127
    return steps * HIGH + steps * LOW


def _nf4_units(codes: jax.Array) -> jax.Array:
    """NF4[codes], by selecting with one bit of the code after another.

    On the bits of the values: `jnp.where` would make an array of each of them, which a loop over layers keeps.
    """
    values: list = [np.uint32(each) for each in NF4.view(np.uint32)]
    for bit in range(4):
        upper = 0 - ((codes >> bit) & 1).astype(jnp.uint32)  # all ones where the bit is 1
        values = [low ^ (upper & (low ^ high)) for low, high in zip(values[::2], values[1::2], strict=True)]
    return jax.lax.bitcast_convert_type(values[0], jnp.float32)


UNITS = {"nf4": _nf4_units, "int8": _int8_units}  # by kind: codes -> their values in the codebook, float32


def block_size(length: int, multiple: int = 1) -> int:
    """The largest divisor of an axis length that is at most `BLOCK`, and a multiple of `multiple`, which divides it."""
    return next(size for size in range(BLOCK, 0, -1) if length % size == 0 and size % multiple == 0)


def quantize(array: jax.Array, kind: str, axis: int) -> Quantized:
    """Quantise to the nearest codes, block by block along `axis`. Raises UserError for nf4 of an odd axis."""
    length = array.shape[axis]
    if kind == "nf4" and length % 2:
        raise UserError(f"frozen='nf4' packs two inputs a byte: expected an even number of inputs, not {length}")
    axis = axis if axis < 0 else axis - array.ndim
    values = jnp.moveaxis(array.astype(jnp.float32), axis, -1)
    blocks = values.reshape(*values.shape[:-1], -1, block_size(length, 2 if kind == "nf4" else 1))
    scales = jnp.abs(blocks).max(axis=-1)
    book = CODEBOOKS[kind]
    unit = blocks / jnp.where(scales > 0, scales, 1)[..., None]
    codes = jnp.searchsorted(jnp.asarray((book[1:] + book[:-1]) / 2), unit).astype(jnp.uint8)
    if kind == "nf4":
        first, second = jnp.split(codes, 2, axis=-1)
        codes = first | (second << 4)
    codes = codes.reshape(*values.shape[:-1], -1)
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
