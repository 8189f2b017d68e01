"""The parts of a transformer layer other than attention: projections, norms and the MLP.

Shapes: B batch, T length, S keys, D d_model, H heads, K kv heads, h head_dim. Every parameter carries the names of its
axes as metadata; `llm3.distributed.sharding` maps them to axes of the mesh.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from llm3.config.model_schema import PROJECTIONS, ModelConfig
from llm3.distributed.sharding import gathered
from llm3.models.kernels import linear
from llm3.models.lora import Adapters, LoRA
from llm3.models.quantized import Quantized, quantized_linear


def small_init(d_model: int) -> Callable:
    """Normal with standard deviation sqrt(2 / (5 D)): Nguyen and Salazar 2019, section 3, as in GPT-NeoX-20B."""
    return nnx.initializers.normal(math.sqrt(2 / (5 * d_model)))


def residual_init(layers: int, d_model: int) -> Callable:
    """Normal with standard deviation 2 / (L sqrt(D)), for projections that write to the residual stream.

    Black et al. 2022 (GPT-NeoX-20B), section 2.1.
    """
    return nnx.initializers.normal(2 / (layers * math.sqrt(d_model)))


class Projection(nnx.Module):
    """A linear map from the axes of x after [B, T] to `outputs`, plus its adapters.

    kernel: float32 [*inputs, *outputs]; a frozen kernel as `llm3.optim.frozen` stores it. matmul: as in `ModelConfig`.
    """

    def __init__(
        self,
        inputs: dict[Any, int],
        outputs: dict[Any, int],
        *,
        init: Callable,
        bias: bool = False,
        adapters: Adapters = (),
        matmul: str = "compute",
        rngs: nnx.Rngs,
    ):
        self.outputs, self.matmul = tuple(outputs.values()), matmul
        shape = (*inputs.values(), *outputs.values())
        self.kernel = nnx.Param(init(rngs.params(), shape), axes=(*inputs, *outputs))
        self.bias = nnx.Param(jnp.zeros(tuple(outputs.values())), axes=tuple(outputs)) if bias else None
        lora = {name: LoRA(inputs, outputs, config, rngs) for name, config in adapters}
        self.lora = nnx.Dict(lora) if lora else None

    def __call__(self, x: jax.Array, key: jax.Array | None = None, dtype: Any = None) -> jax.Array:
        """x: [B, T, *inputs], result [B, T, *outputs] in `dtype` (None: that of x). key: for dropout of the adapters.

        Gains and biases are applied in float32, so that their gradients, sums over tokens, are float32 too.
        """
        kernel, outputs = self.kernel.get_value(), math.prod(self.outputs)
        flat = x.reshape(*x.shape[:2], -1)
        if quantized := isinstance(kernel, Quantized):
            y = quantized_linear(flat, kernel, outputs)
        else:
            y = linear(flat, kernel.reshape(-1, outputs), dtype, self.matmul)
        for index, adapter in enumerate(self._active()):
            y = y + adapter(flat, None if key is None else jax.random.fold_in(key, index))
            if adapter.magnitude is not None:
                dense = kernel.dequantized() if quantized else kernel
                gain = adapter.gain(dense.astype(jnp.float32).reshape(-1, outputs))
                y = (y.astype(jnp.float32) * gain).astype(y.dtype)
        y = y.reshape(*x.shape[:2], *self.outputs)
        return y if self.bias is None else (y.astype(jnp.float32) + self.bias[...]).astype(y.dtype)

    def _active(self) -> list[LoRA]:
        return [each for each in (self.lora or {}).values() if each.config.active]


def adapters_of(config: ModelConfig, projection: str) -> Adapters:
    """The adapters of the projection of this name."""
    return tuple((name, each) for name, each in config.adapters if projection in each.targets)


def projection_key(key: jax.Array | None, projection: str) -> jax.Array | None:
    """The random key of one projection of a layer."""
    return None if key is None else jax.random.fold_in(key, PROJECTIONS.index(projection))


class Norm(nnx.Module):
    """RMSNorm (Zhang and Sennrich 2019) or LayerNorm (Ba et al. 2016) over the last axes, computed in float32.

    With `norm_unit_offset`, the factor is 1 + scale (Gemma: Mesnard et al. 2024, reference code).
    """

    def __init__(self, config: ModelConfig, axes: dict[Any, int]):
        sizes, names = tuple(axes.values()), tuple(axes)
        self.kind, self.epsilon, self.axes = config.norm, config.norm_epsilon, tuple(range(-len(axes), 0))
        self.offset = config.norm_unit_offset
        self.scale = nnx.Param(jnp.zeros(sizes) if self.offset else jnp.ones(sizes), axes=names)
        self.bias = nnx.Param(jnp.zeros(sizes), axes=names) if config.norm == "layernorm" else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        if self.kind != "rmsnorm":
            y = y - y.mean(axis=self.axes, keepdims=True)
        scale = 1 + self.scale[...] if self.offset else self.scale[...]
        y = y * jax.lax.rsqrt(jnp.square(y).mean(axis=self.axes, keepdims=True) + self.epsilon) * scale
        return (y if self.bias is None else y + self.bias[...]).astype(x.dtype)


def at_positions(x: jax.Array, positions: jax.Array | None, axis: int) -> jax.Array:
    """x [B, ...] at `positions` [B, N] of an axis, distinct in each row; None: all positions."""
    if positions is None:
        return x
    before = (slice(None),) * (axis - 1)
    return jax.vmap(lambda row, at: row.at[(*before, at)].get(unique_indices=True))(x, positions)


# Sigmoid linear unit; Gaussian error linear unit (Hendrycks and Gimpel 2016), exact and with tanh (its equation 2).
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
}


class MLP(nnx.Module):
    """down(activation(gate(x)) * up(x)), e.g. SwiGLU (Shazeer 2020); without a gate, down(activation(up(x)))."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        c, small = config, small_init(config.d_model)
        # with biases in float32, so that what the gradient of a bias sums over tokens is not rounded before
        self.activation, self.dtype = c.activation, jnp.float32 if c.mlp_bias else None
        model, hidden = {"embed": c.d_model}, {"mlp": c.d_ff}

        def projection(name: str, inputs: dict, outputs: dict, init: Callable) -> Projection:
            make = partial(Projection, bias=c.mlp_bias, adapters=adapters_of(c, name), matmul=c.matmul)
            return make(inputs, outputs, init=init, rngs=rngs)

        self.gate = projection("gate", model, hidden, small) if c.gated_mlp else None
        self.up = projection("up", model, hidden, small)
        self.down = projection("down", hidden, model, residual_init(c.layers, c.d_model))

    def __call__(self, x: jax.Array, random: jax.Array | None) -> jax.Array:
        activation, up = ACTIVATIONS[self.activation], projection_key(random, "up")
        if self.gate is None:
            hidden = activation(self.up(x, up, self.dtype))
        else:
            gate = self.gate(x, projection_key(random, "gate"), self.dtype)
            hidden = activation(gate) * self.up(x, up, self.dtype)
        return self.down(gathered(hidden.astype(x.dtype), "mlp"), projection_key(random, "down"))
