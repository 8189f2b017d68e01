"""A kernel on a mesh: each device calls it with its own rows, queries and heads, since XLA cannot cut a kernel."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from llm3.distributed.sharding import spec
from llm3.models.attention.pattern import Pattern, Places

Kernel = Callable[[jax.Array, jax.Array, jax.Array, Pattern], jax.Array]


def on_shards(kernel: Kernel, query: jax.Array, key: jax.Array, value: jax.Array, pattern: Pattern) -> jax.Array:
    """kernel(query, key, value, pattern) on the active mesh, as `spec` cuts the arrays; a row keeps all its keys."""
    mesh = jax.sharding.get_abstract_mesh()
    free = frozenset() if mesh.empty else frozenset(mesh.axis_names) - frozenset(mesh.manual_axes)
    if all(mesh.shape[axis] == 1 for axis in free):
        return kernel(query, key, value, pattern)

    def cut(x: jax.Array, *axes: str | None) -> PartitionSpec:
        return spec(axes, x.shape, mesh)

    queries, keys = cut(query, "batch", "length", "heads", None), cut(key, "batch", "keys", "kv_heads", None)
    of_queries: Any = PartitionSpec(*queries[:2])  # Any: a spec stands where the pattern has an array
    of_keys: Any = PartitionSpec(*keys[:2])
    pattern = dataclasses.replace(pattern, in_order=pattern.in_order and queries[1] is None)
    patterns = dataclasses.replace(
        pattern,
        queries=Places(of_queries, of_queries),
        keys=Places(of_keys, of_keys),
        prefix=None if pattern.prefix is None else of_keys,
    )
    groups = query.shape[2] // key.shape[2]

    def local(query: jax.Array, key: jax.Array, value: jax.Array, pattern: Pattern) -> jax.Array:
        if keys[2] != queries[2]:  # the mesh cuts the heads but not those of keys, of which it divides too few
            first = jax.lax.axis_index(queries[2]) * query.shape[2]
            own = (first + jnp.arange(query.shape[2])) // groups
            own = own[:1] if groups % query.shape[2] == 0 else own
            key, value = (jnp.take(each, own, axis=2) for each in (key, value))
        return kernel(query, key, value, pattern)

    specs = (queries, keys, keys, patterns)
    return jax.shard_map(local, in_specs=specs, out_specs=queries, axis_names=free, check_vma=False)(
        query, key, value, pattern
    )
