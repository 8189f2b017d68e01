"""What a jaxpr does in low precision, found by walking all of its equations."""

import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, JaxprEqn, Literal

LOW = (jnp.bfloat16, jnp.float16)
SUMS = {"reduce_sum", "cumsum", "reduce_window_sum", "scatter-add", "add_any_scatter", "psum", "reduce_scatter"}


def bodies(eqn: JaxprEqn) -> list[Jaxpr]:
    """The jaxprs in the parameters of an equation."""
    flat = [each for value in eqn.params.values() for each in (value if isinstance(value, tuple | list) else [value])]
    plain = [getattr(each, "jaxpr", each) for each in flat]
    return [each for each in plain if isinstance(each, Jaxpr)]


def programs(jaxpr: Jaxpr) -> Iterator[Jaxpr]:
    """A jaxpr and all those that it calls."""
    yield jaxpr
    for eqn in jaxpr.eqns:
        for body in bodies(eqn):
            yield from programs(body)


def is_low(variable) -> bool:
    return getattr(variable.aval, "dtype", None) in LOW


def contracted(eqn: JaxprEqn) -> set[int]:
    """The sizes of the axes that a dot_general sums over."""
    (axes, _), _ = eqn.params["dimension_numbers"]
    return {eqn.invars[0].aval.shape[axis] for axis in axes}


def low_precision(jaxpr: Jaxpr, tokens: set[int]) -> list[str]:
    """The equations that sum in low precision, or round what they are about to sum.

    tokens: the sizes of axes of tokens and rows. Exceptions: a product over other axes, those of features, may leave
    its sum in low precision, since accelerators add up in float32 and round once; so may a scatter-add at distinct
    indices, which adds nothing up.
    """
    found = []
    for program in programs(jaxpr):
        makers = {out: eqn for eqn in program.eqns for out in eqn.outvars}
        for eqn in program.eqns:
            name, low = eqn.primitive.name, is_low(eqn.outvars[0]) if eqn.outvars else False
            if low and name in SUMS and not eqn.params.get("unique_indices"):
                found.append(f"{name} in low precision: {eqn}")
            if low and name == "dot_general" and contracted(eqn) & tokens:
                found.append(f"product over tokens in low precision: {eqn}")
            if low and name in ("mul", "div") and any(map(is_rounded, eqn.invars)):
                found.append(f"factor rounded to low precision: {eqn}")
            if name == "reduce_sum" and is_rounded_product(eqn.invars[0], makers):
                found.append(f"products rounded before their sum: {eqn}")
    return found


def is_rounded(variable) -> bool:
    """Whether it is a constant in low precision that is no power of 2, and so perhaps a rounded number."""
    return (
        isinstance(variable, Literal) and is_low(variable) and abs(math.frexp(float(variable.val))[0]) not in (0, 0.5)
    )


def is_rounded_product(variable, makers: dict) -> bool:
    """Whether it is a product that was computed in low precision, then cast."""
    cast = None if isinstance(variable, Literal) else makers.get(variable)
    if cast is None or cast.primitive.name != "convert_element_type":
        return False
    product = None if isinstance(cast.invars[0], Literal) else makers.get(cast.invars[0])
    return product is not None and product.primitive.name == "mul" and is_low(product.outvars[0])


def inexact_products(jaxpr: Jaxpr) -> list[str]:
    """The products of float32 arrays that an accelerator may round to TF32 or bfloat16."""
    highest = jax.lax.Precision.HIGHEST
    return [
        str(eqn)
        for program in programs(jaxpr)
        for eqn in program.eqns
        if eqn.primitive.name == "dot_general"
        and eqn.invars[0].aval.dtype == jnp.float32
        and eqn.params["precision"] not in (highest, (highest, highest))
    ]


def dtypes_of_axis(jaxpr: Jaxpr, size: int) -> set[str]:
    """The dtypes of products with an axis of this size, such as the vocabulary's of logits."""
    eqns = (eqn for program in programs(jaxpr) for eqn in program.eqns if eqn.primitive.name == "dot_general")
    return {eqn.outvars[0].aval.dtype.name for eqn in eqns if size in eqn.outvars[0].aval.shape}


def largest_with_axis(jaxpr: Jaxpr, size: int) -> int:
    """The elements of the largest array with an axis of this size that any equation makes; 0: none makes one."""
    outs = (out for program in programs(jaxpr) for eqn in program.eqns for out in eqn.outvars)
    shapes = (getattr(out.aval, "shape", ()) for out in outs)
    return max((math.prod(shape) for shape in shapes if size in shape), default=0)
