"""Memory, traffic and FLOPs of a step on one device, from a trace in the shapes of that device, without compiling.

The stored bytes follow exactly from the shardings of the state. The computation is traced as if the device were alone
with its share of the heads, the hidden layers and the vocabulary. The number of traced rows is a prime that divides no
other axis, which identifies the arrays that grow with the batch.
"""

import math
from dataclasses import replace
from typing import Any, NamedTuple, cast

import jax
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh

from llm3.config.schema import ModelConfig, StageConfig
from llm3.distributed.memory import HOST
from llm3.distributed.mesh_axes import MESH_AXES
from llm3.distributed.sharding import axis_size, shards
from llm3.models.attention.blockwise import BLOCK
from llm3.models.attention.choice import platform
from llm3.models.attention.of_layers import attentions
from llm3.models.cross_entropy import blocks
from llm3.models.transformer import abstract
from llm3.optim.frozen import computed_low
from llm3.planning import liveness
from llm3.segments import in_stack
from llm3.stages.stage import Stage
from llm3.training.phase import Phase
from llm3.tree import flatten

POLICIES = ("none", "dots", "full")  # remat policies, the fastest first
PRIMES = (11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73, 79, 83, 89, 97, 101, 103, 107, 109, 113)


class Stored(NamedTuple):
    """Bytes that one device stores between steps, and the bytes of its gradients."""

    parameters: float
    gradients: float
    moments: float
    batch: float

    @property
    def arguments(self) -> float:
        """Bytes of the arguments of the compiled step."""
        return self.parameters + self.moments + self.batch


class Step(NamedTuple):
    """A step on one device under one remat policy.

    kept: bytes of activations kept for the backward pass. temporary: peak bytes besides the arguments, including
    gradients and gathered parameters. largest: {array: bytes} at the peak. moved: bytes read and written. flops: FLOPs
    including recomputation.
    """

    kept: float
    temporary: float
    largest: dict[str, float]
    moved: float
    flops: float


def device_bytes(tree: Any) -> float:
    """Bytes on one device of a tree of shapes with shardings; what is in the memory of the host has none."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if leaf.sharding.memory_kind != HOST]
    shards = ((leaf.sharding.shard_shape(leaf.shape), leaf.dtype.itemsize) for leaf in leaves)
    return float(sum(math.prod(shape) * size for shape, size in shards))


def stored(phase: Phase, stage: Stage, mesh: Any) -> Stored:
    """Bytes that a stage stores on each device of a mesh."""
    state = phase.abstract_state
    trainable = device_bytes(state.trainable)
    moments = device_bytes((state.opt, state.guard, state.step))
    batch = device_bytes(stage.abstract_batch(mesh))
    return Stored(trainable + device_bytes(state.frozen), trainable, moments, batch)


def step(stage: Stage, mesh: Any, index: int = 0, of_platform: str | None = None) -> Step:
    """The cost on one device of a mesh of a step of phase number `index` of a stage.

    of_platform: cpu, gpu or tpu, where the step is to run; None: here. Blocks of attention in XLA stand for kernels,
    which hold as little.
    """
    config, model = stage.config, stage.model
    calls = stage.attention_calls(mesh, of_platform or platform())
    attention = "plain" if attentions(calls, model.attention) == {"plain"} else "blockwise"
    share = replace(device_model(model, mesh), attention=attention)
    rows = _traced_rows(share, config)
    one = AbstractMesh((1,) * len(MESH_AXES), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
    alone = cast(Mesh, one)
    traced = replace(stage, config=replace(config, batch_size=rows * config.micro_batches), model=share)
    phase = traced.phases(alone)[index]
    own_rows = config.batch_size / config.micro_batches / axis_size(mesh, "batch")
    context = axis_size(mesh, "length")
    shares = liveness.Shares(rows, own_rows, context, axis_size(mesh, "embed"), _rounds(stage, context))
    state, batch = _bare(phase.abstract_state), _bare(traced.abstract_batch(alone))
    program = jax.make_jaxpr(phase.train_step)(state, batch)
    live = liveness.measure(program.jaxpr, shares)
    gathered = _gathered_keys(share, config, own_rows, context)
    layers = model.layers if model.remat == "none" else 0
    one_micro_batch = replace(traced, config=replace(config, batch_size=rows, micro_batches=1))
    kept = _kept(one_micro_batch, phase, shares) + layers * gathered
    extra = _casts(phase, model, axis_size(mesh, "embed")) + max(layers, 1) * gathered
    return Step(kept, live.peak + extra, live.largest, live.moved, live.flops * shares.share)


def _rounds(stage: Stage, context: int) -> float:
    """The blocks of keys, on average, that a block of queries of one long document meets."""
    count = -(-stage.config.sequence_length // BLOCK)
    return (count + 1) / 2 if stage.model.causal and context == 1 else count


def device_model(model: ModelConfig, mesh: Any) -> ModelConfig:
    """The transformer on one device: its share of heads, hidden layers and vocabulary."""
    heads = model.heads // axis_size(mesh, "heads")
    kv_heads = math.gcd(heads, model.kv_heads // shards(mesh, "kv_heads", model.kv_heads))
    return replace(
        model,
        heads=heads,
        kv_heads=kv_heads,
        d_ff=model.d_ff // axis_size(mesh, "mlp"),
        vocab_size=model.padded_vocab_size // axis_size(mesh, "vocab"),
        vocab_multiple=1,
    )


def _traced_rows(model: ModelConfig, stage: StageConfig) -> int:
    """A prime that divides no axis except batch axes."""
    sizes = {size for leaf in flatten(abstract(model).shapes).values() for size in leaf.shape}
    sizes |= {stage.sequence_length, model.max_output_positions, stage.micro_batches}
    sizes |= {*blocks(model.padded_vocab_size, model.vocab_block)}
    sizes |= {model.heads // model.kv_heads, model.rotary_dim, model.rotary_dim // 2, model.head_dim - model.rotary_dim}
    return next(prime for prime in PRIMES if all(size % prime for size in sizes if size))


def _bare(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def _kept(stage: Stage, phase: Phase, shares: liveness.Shares) -> float:
    """Bytes of activations that jax.vjp keeps for the backward pass."""
    graph = abstract(phase.model, phase.partition.segments).graph
    state, batch = _bare(phase.abstract_state), _bare(stage.abstract_batch(None))

    def forward(trainable: dict, frozen: dict, batch: Any) -> Any:
        key = jax.random.key(0)
        merged = lambda p: nnx.merge(graph, p, frozen)  # noqa: E731
        return jax.vjp(lambda p: stage.objective.loss(merged(p), batch, key, stage.task).loss, trainable)[1]

    program = liveness.read(jax.make_jaxpr(forward)(state.trainable, state.frozen, batch).jaxpr, shares)
    kept = {value for value in program.results if not value.given and shares.batched(value)}
    return sum(shares.full_bytes(value) for value in kept)


def _gathered_keys(model: ModelConfig, stage: StageConfig, rows: float, context: int) -> float:
    """Bytes of a layer's keys and values that a device gathers from other devices."""
    size = 2 * rows * stage.sequence_length * model.kv_heads * model.head_dim * np.dtype(model.compute_dtype).itemsize
    return size * (1 - 1 / context)


def _casts(phase: Phase, model: ModelConfig, pieces: int) -> float:
    """Bytes of the layers' kernels in the compute dtype: XLA casts all layers before it loops over them.

    It does so for TPUs; for other devices it may cast layer by layer and need less memory.
    """
    total = 0.0
    dtype = np.dtype(model.compute_dtype)
    for tree in (phase.abstract_state.trainable, phase.abstract_state.frozen):
        for path, leaf in flatten(tree).items():
            if in_stack(path) and computed_low(path) and getattr(leaf, "dtype", dtype) != dtype:
                total += math.prod(leaf.shape) * dtype.itemsize / pieces
    return total
