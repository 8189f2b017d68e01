"""Matrix products in 8 bits: both operands are scaled and rounded to int8 or to float8 (e4m3).

Each row of an operand that is contracted has its own scale, its largest magnitude: a token has one, and so has each
input or output of a kernel. So a result does not depend on how a batch is cut. Products over tokens, the gradients of
kernels, are not computed like this: with one scale for all tokens, the small ones would be rounded to 0 (Wortsman et
al. 2023, "Stable and low-precision training for large-scale vision-language models", section 2.2, SwitchBack). As each
token has a scale, gradients need no wider exponent than e4m3 (DeepSeek-AI 2024, DeepSeek-V3, section 3.3.2).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llm3.distributed.memory import HOST
from llm3.registry import check_package

FORMATS = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn}
PRODUCT = "product"  # the name of the products, for policies of remat


def low_precision_dot(a: jax.Array, b: jax.Array, axes: tuple, matmul: str, dtype: Any) -> jax.Array:
    """The product of two arrays, contracted over `axes` = (axes of a, axes of b), in `dtype`.

    matmul: a key of `FORMATS`; sums are int32 or float32. Raises UserError if qwix is not installed.
    """
    check_package("qwix", "qwix", f"config.model.matmul={matmul!r}")
    import qwix

    def rounded(array: jax.Array, contracted: tuple[int, ...]) -> Any:
        kept = [axis for axis in range(array.ndim) if axis not in contracted]
        return qwix.quantize(array.astype(jnp.float32), FORMATS[matmul], channelwise_axes=kept)

    y = qwix.dot_general(
        rounded(a, axes[0]),
        rounded(b, axes[1]),
        (axes, ((), ())),
        precision=jax.lax.Precision.DEFAULT,  # the operands are exact in any
        preferred_element_type=jnp.float32,
    )
    return checkpoint_name(y.astype(dtype), PRODUCT)


def saves_products(primitive: Any, *operands: Any, **parameters: Any) -> bool:
    """A remat policy: keep products over features, but not the products of 8 bits before they are scaled."""
    if _is_unscaled(primitive, operands):
        return False
    policies = jax.checkpoint_policies
    dots, named = policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(PRODUCT)
    return dots(primitive, *operands, **parameters) or named(primitive, *operands, **parameters)


def offloads_products(primitive: Any, *operands: Any, **parameters: Any) -> Any:
    """A remat policy: keep what `saves_products` keeps, in the host's memory until the backward pass."""
    policies, to = jax.checkpoint_policies, ("device", HOST)
    dots = policies.offload_dot_with_no_batch_dims(*to)
    named = policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[], names_which_can_be_offloaded=[PRODUCT], offload_src=to[0], offload_dst=to[1]
    )
    unscaled = _is_unscaled(primitive, operands) or primitive.name == "name"
    return (named if unscaled else dots)(primitive, *operands, **parameters)


def _is_unscaled(primitive: Any, operands: tuple) -> bool:
    return primitive.name == "dot_general" and operands[0].dtype.itemsize == 1
