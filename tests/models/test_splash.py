"""The TPU's attention kernel as it is traced inside a train step."""

import jax
import jax.numpy as jnp
import pytest
from jax.lax import Precision

from llm3.models.attention import splash
from llm3.models.attention.pattern import Pattern, Places
from tests.helpers.tiny_jaxpr import programs


@pytest.mark.parametrize(
    ("dtype", "precision"), [("bfloat16", {None, Precision.DEFAULT}), ("float32", {Precision.HIGHEST})]
)
def test_the_products_of_both_passes_have_the_precision_of_their_operands(dtype, precision):
    """The TPU's compiler refuses products of bfloat16 in float32, which a step asks for by default."""
    length, heads, size = 128, 2, 128
    query, key = (jnp.ones((1, length, each, size), dtype) for each in (heads, 1))
    places = Places(jnp.arange(length)[None], jnp.ones((1, length), jnp.int32))
    pattern = Pattern(places, places, None, True, 0, True)

    def both(query, key):
        y, pull_back = jax.vjp(lambda query, key: splash.attend(query, key, key, pattern), query, key)
        return pull_back(y)

    with jax.default_matmul_precision("float32"):
        program = jax.make_jaxpr(both)(query, key).jaxpr
    found = [each for part in programs(program) for each in part.eqns if each.primitive.name == "dot_general"]
    assert len(found) >= 2 + 5, "scores and values, and their gradients"
    of = [each.params["precision"] for each in found]
    assert {each for pair in of for each in (pair if isinstance(pair, tuple) else (pair,))} <= precision
