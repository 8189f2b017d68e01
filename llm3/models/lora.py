"""Low-rank adapters of the projections of a layer.

y = x W + scale (dropout(x) A) B with B = 0 at the start (Hu et al. 2022, LoRA, section 4.1); scale is alpha / rank, or
alpha / sqrt(rank) (rsLoRA, Kalajdzievski 2023). DoRA (Liu et al. 2024, section 4.1) trains the magnitude of each column
of the adapted kernel as well: W' = magnitude * (W + scale A B) / |W + scale A B|. The norm has no gradient
(section 4.3).
"""

import math
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from llm3.config.model_schema import AdapterConfig
from llm3.models.kernels import linear
from llm3.tree import flatten, unflatten

Adapters = tuple[tuple[str, AdapterConfig], ...]


def scale_of(config: AdapterConfig) -> float:
    """The factor of A B."""
    return config.alpha / (math.sqrt(config.rank) if config.rslora else config.rank)


class LoRA(nnx.Module):
    """One adapter of one projection. a: [*inputs, r], uniform as in PEFT; b: [r, *outputs]; magnitude: [*outputs].

    Adapters draw from their own random stream, so the rest of a model has the same values with and without them.
    """

    def __init__(self, inputs: dict[Any, int], outputs: dict[Any, int], config: AdapterConfig, rngs: nnx.Rngs):
        self.config = config
        self.rows: nnx.Param | None = nnx.data(None)  # see `restrict`
        bound, shape = math.prod(inputs.values()) ** -0.5, (*inputs.values(), config.rank)
        self.a = nnx.Param(jax.random.uniform(rngs.lora(), shape, minval=-bound, maxval=bound), axes=(*inputs, None))
        self.b = nnx.Param(jnp.zeros((config.rank, *outputs.values())), axes=(None, *outputs))
        # a placeholder: `with_magnitudes` sets it from the kernel
        self.magnitude = nnx.Param(jnp.ones(tuple(outputs.values())), axes=tuple(outputs)) if config.dora else None

    def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        """The adapter's addition to x W, in x's dtype. x: [B, T, inputs], result [B, T, outputs]. key: for dropout.

        Both factors are float32, as in `merged`: in bfloat16, alpha / sqrt(rank) would be off by up to 0.4 %.
        """
        dtype = x.dtype
        if key is not None and self.config.dropout:
            kept = jax.random.bernoulli(key, 1 - self.config.dropout, x.shape)
            x = jnp.where(kept, x.astype(jnp.float32) / (1 - self.config.dropout), 0).astype(dtype)
        a, b = self.a[...].reshape(-1, self.config.rank), self.b[...].reshape(self.config.rank, -1)
        y = (linear(linear(x, a), b).astype(jnp.float32) * scale_of(self.config)).astype(dtype)
        return y if self.rows is None else jnp.where(self.rows[...][:, None, None], y, 0)

    def gain(self, kernel: jax.Array) -> jax.Array:
        """DoRA's factor of each output: magnitude / |W + scale A B|. kernel: float32 [inputs, outputs]."""
        assert self.magnitude is not None  # `Projection` asks adapters with a magnitude only
        a, b = self.a[...].reshape(-1, self.config.rank), self.b[...].reshape(self.config.rank, -1)
        length = column_norms(kernel + scale_of(self.config) * jnp.matmul(a, b, precision="highest"), 1)
        return self.magnitude[...].reshape(-1) / jax.lax.stop_gradient(length)


def restrict(model: nnx.Module, rows: dict[str, jax.Array]) -> None:
    """Let each adapter add to some rows of a batch only: stages with adapters of one base can then share the batch.

    rows: {adapter: bool [B]}. `model`, with stacked layers, is changed in place.
    """
    for path, module in nnx.iter_modules(model):
        if isinstance(module, LoRA):
            own = rows[str(path[-1])]
            module.rows = nnx.Param(jnp.broadcast_to(own, (len(module.a[...]), len(own))))


def column_norms(kernel: jax.Array, inputs: int) -> jax.Array:
    """The Euclidean norm over the first `inputs` axes."""
    return jnp.sqrt(jnp.sum(jnp.square(kernel), axis=tuple(range(inputs))))


def with_magnitudes(params: dict, fresh: Collection[str]) -> dict:
    """Canonical parameters with every fresh DoRA magnitude set to the norms of its kernel's columns."""
    flat = dict(flatten(params))
    for path in fresh:
        if path.endswith("/magnitude"):
            kernel = flat[f"{path.split('/lora/')[0]}/kernel"]
            inputs = kernel.ndim - flat[path].ndim  # a kernel and its magnitude both have the axis of layers
            norms = jax.vmap(lambda each, inputs=inputs: column_norms(each, inputs))(kernel.astype(jnp.float32))
            flat[path] = norms
    return unflatten(flat)


def merged(params: dict, adapters: Adapters) -> dict:
    """Canonical parameters with all active adapters merged into their kernels, without adapter leaves."""
    flat, configs = flatten(params), dict(adapters)
    result = {path: leaf for path, leaf in flat.items() if "/lora/" not in path}
    for path in flat:
        projection, in_adapter, rest = path.partition("/lora/")
        name = rest.removesuffix("/a")
        if not in_adapter or name == rest or not configs[name].active:
            continue
        a, b = (flat[f"{projection}/lora/{name}/{leaf}"].astype(jnp.float32) for leaf in ("a", "b"))
        kernel = result[f"{projection}/kernel"].astype(jnp.float32)
        product = jax.vmap(lambda a, b: jnp.tensordot(a, b, axes=1, precision="highest"))(a, b)
        kernel = kernel + scale_of(configs[name]) * product
        if configs[name].dora:
            magnitude = flat[f"{projection}/lora/{name}/magnitude"]
            inputs = kernel.ndim - magnitude.ndim
            norms = jax.vmap(lambda each, inputs=inputs: column_norms(each, inputs))(kernel)
            shape = (kernel.shape[0], *(1,) * inputs, *magnitude.shape[1:])
            kernel = kernel * (magnitude / norms).reshape(shape)
        result[f"{projection}/kernel"] = kernel
    return unflatten(result)
