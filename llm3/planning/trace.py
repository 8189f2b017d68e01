"""What a step takes of one device, by tracing it in the shapes of that device: bytes held, bytes moved, FLOPs.

Nothing is compiled. What a stage stores follows exactly from the shardings of its state. What it computes is traced as
if the device were alone with its share: of the heads, the hidden layer and the vocabulary what `tensor` leaves it, and
the batch as rows of a number that no other axis is a multiple of, so that what grows with the batch can be told.
"""

import math
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, AxisType

from llm3.config.schema import ModelConfig, StageConfig
from llm3.distributed.sharding import MESH_AXES, axis_size
from llm3.models.transformer import abstract
from llm3.optim.frozen import computed_low
from llm3.planning import liveness
from llm3.segments import in_stack
from llm3.stages.stage import Stage
from llm3.training.phase import Phase
from llm3.tree import flatten

POLICIES = ("none", "dots", "full")  # of remat, the fastest first
PRIMES = (11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73, 79, 83, 89, 97, 101, 103, 107, 109, 113)


class Stored(NamedTuple):
    """Bytes of one device from step to step, and of its gradients."""

    parameters: float
    gradients: float
    moments: float
    batch: float

    @property
    def arguments(self) -> float:
        """What the compiled step is given."""
        return self.parameters + self.moments + self.batch


class Step(NamedTuple):
    """A step on one device under one remat policy.

    kept: bytes of activations from the forward to the backward pass. temporary: the most bytes besides the arguments at
    once, gradients and gathered parameters with them. largest: {array: bytes} of that moment. moved: bytes read and
    written. flops: what is computed, with what is computed again.
    """

    kept: float
    temporary: float
    largest: dict[str, float]
    moved: float
    flops: float


def device_bytes(tree: Any) -> float:
    """The bytes that one device has of a tree of shapes with shardings."""
    shards = ((leaf.sharding.shard_shape(leaf.shape), leaf.dtype.itemsize) for leaf in jax.tree.leaves(tree))
    return float(sum(math.prod(shape) * size for shape, size in shards))


def stored(phase: Phase, stage: Stage, mesh: Any) -> Stored:
    """The bytes that a stage stores on each device of a mesh."""
    state = phase.abstract_state
    trainable = device_bytes(state.trainable)
    moments = device_bytes((state.opt, state.guard, state.step))
    batch = device_bytes(stage.abstract_batch(mesh))
    return Stored(trainable + device_bytes(state.frozen), trainable, moments, batch)


def step(stage: Stage, mesh: Any, index: int = 0) -> Step:
    """A step of phase number `phase` of a stage, as the whole mesh computes it."""
    config, model, share = stage.config, stage.model, device_model(stage.model, mesh)
    rows = _traced_rows(share, config)
    alone = AbstractMesh((1,) * len(MESH_AXES), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
    traced = replace(stage, config=replace(config, batch_size=rows * config.micro_batches), model=share)
    phase = traced.phases(alone)[index]
    own_rows = config.batch_size / config.micro_batches / axis_size(mesh, "batch")
    context = axis_size(mesh, "length")
    shares = liveness.Shares(rows, own_rows, context, axis_size(mesh, "embed"))
    state, batch = _bare(phase.abstract_state), _bare(traced.abstract_batch(alone))
    program = jax.make_jaxpr(phase.train_step)(state, batch)
    found = liveness.of(program.jaxpr, shares)
    gathered = _gathered_keys(share, config, own_rows, context)
    layers = model.layers if model.remat == "none" else 0
    one_micro_batch = replace(traced, config=replace(config, batch_size=rows))
    kept = _kept(one_micro_batch, phase, shares) + layers * gathered
    extra = _casts(phase, model, axis_size(mesh, "embed")) + max(layers, 1) * gathered
    return Step(kept, found.peak + extra, found.largest, found.moved, found.flops * shares.share)


def device_model(model: ModelConfig, mesh: Any) -> ModelConfig:
    """The transformer that one device computes: its share of heads, hidden layer and vocabulary."""
    heads = model.heads // axis_size(mesh, "heads")
    kv_heads = math.gcd(heads, max(1, model.kv_heads // axis_size(mesh, "kv_heads")))
    return replace(
        model,
        heads=heads,
        kv_heads=kv_heads,
        d_ff=model.d_ff // axis_size(mesh, "mlp"),
        vocab_size=model.vocab_size // axis_size(mesh, "vocab"),
    )


def _traced_rows(model: ModelConfig, stage: StageConfig) -> int:
    """A prime that divides no axis but those of the batch."""
    sizes = {size for leaf in flatten(abstract(model).shapes).values() for size in leaf.shape}
    sizes |= {stage.sequence_length, model.max_output_positions, model.logit_chunk, stage.micro_batches}
    sizes |= {-(-stage.sequence_length // model.logit_chunk) * model.logit_chunk} if model.logit_chunk else set()
    sizes |= {model.heads // model.kv_heads, model.head_dim // 2}
    return next(prime for prime in PRIMES if all(size % prime for size in sizes if size))


def _bare(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def _kept(stage: Stage, phase: Phase, shares: liveness.Shares) -> float:
    """The bytes of activations that the backward pass finds of the forward pass: what jax.vjp keeps."""
    graph = abstract(phase.model, phase.partition.segments).graph
    state, batch = _bare(phase.abstract_state), _bare(stage.abstract_batch(None))

    def forward(trainable: dict, frozen: dict, batch: Any) -> Any:
        key = jax.random.key(0)
        merged = lambda p: nnx.merge(graph, p, frozen)  # noqa: E731
        return jax.vjp(lambda p: stage.objective.loss(merged(p), batch, key, stage.task).loss, trainable)[1]

    program = liveness.read(jax.make_jaxpr(forward)(state.trainable, state.frozen, batch).jaxpr, shares)
    kept = {value for value in program.results if not value.given and shares.batched(value)}
    return sum(shares.whole(value) for value in kept)


def _gathered_keys(model: ModelConfig, stage: StageConfig, rows: float, context: int) -> float:
    """The bytes of a layer's keys and values that a device has beside those of its own positions."""
    size = 2 * rows * stage.sequence_length * model.kv_heads * model.head_dim * np.dtype(model.compute_dtype).itemsize
    return size * (1 - 1 / context)


def _casts(phase: Phase, model: ModelConfig, pieces: int) -> float:
    """The bytes of the layers' kernels in the compute dtype, which XLA makes of all layers before it loops over them.

    Found in what it compiles for TPUs; elsewhere it may cast them layer by layer, and take less.
    """
    total = 0.0
    dtype = np.dtype(model.compute_dtype)
    for tree in (phase.abstract_state.trainable, phase.abstract_state.frozen):
        for path, leaf in flatten(tree).items():
            if in_stack(path) and computed_low(path) and getattr(leaf, "dtype", dtype) != dtype:
                total += math.prod(leaf.shape) * dtype.itemsize / pieces
    return total
