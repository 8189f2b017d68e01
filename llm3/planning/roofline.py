"""The roofline model of a step (Williams, Waterman and Patterson 2009).

Its time is its FLOPs, memory traffic and collectives over the rates of the machine. The size of a collective is the
size on one device of the full result (all-gather) or operand (reduce-scatter, all-reduce).
"""

import math
from typing import Any, NamedTuple

import jax
import numpy as np

from llm3.config.schema import ModelConfig, StageConfig
from llm3.distributed.machines import Link, Topology
from llm3.distributed.sharding import axis_size, shards, spec, sums_over_data_once
from llm3.optim.frozen import computed_low
from llm3.segments import in_stack, locate
from llm3.stages.stage import Stage
from llm3.training.phase import Phase
from llm3.tree import flatten

EFFICIENCY = 0.6  # share of a chip's peak FLOP/s that large matmuls reach
USABLE = 0.9  # share of a chip's memory for arrays; the rest is for the runtime and fragmentation


class Collective(NamedTuple):
    """An all-gather, reduce-scatter or all-reduce of `size` bytes along a mesh axis, `times` times per step."""

    axis: str
    what: str
    kind: str
    size: float
    times: float

    @property
    def bytes(self) -> float:
        return self.size * self.times


class Times(NamedTuple):
    """Seconds per step of each resource on its own. collectives: {mesh axis: seconds}."""

    compute: float
    memory: float
    collectives: dict[str, float]

    @property
    def overlapped(self) -> float:
        """Seconds per step if everything overlaps: the longest of the parts."""
        return max(self.compute, self.memory, *self.collectives.values(), 0.0)

    @property
    def sequential(self) -> float:
        """Seconds per step if nothing overlaps: the sum of the parts."""
        return self.compute + self.memory + sum(self.collectives.values())


def times(flops: float, moved: float, sent: list[Collective], topology: Topology, links: dict[str, Link]) -> Times:
    """The seconds of a step. flops, moved: FLOPs and bytes of memory traffic of one device."""
    chip, seconds = topology.chip, dict.fromkeys(links, 0.0)
    for each in sent:
        passes = 2 if each.kind == "all-reduce" else 1
        seconds[each.axis] += each.times * passes * links[each.axis].gather_seconds(each.size)
    return Times(flops / (chip.peak * EFFICIENCY), moved / chip.bandwidth, {k: v for k, v in seconds.items() if v})


def collectives(stage: Stage, phase: Phase, mesh: Any) -> list[Collective]:
    """The collectives of a step.

    Parameters that are sharded along a batch axis are all-gathered for the forward and the backward pass, and their
    gradients reduce-scattered. Along the other batch axes, gradients are all-reduced. Sharded heads and hidden layers
    gather and reduce-scatter activations twice per layer and pass (Korthikanti et al. 2022, section 4.2.2), and once
    each for the embedding and the logits. Sharded windows all-gather keys and values. Each micro-batch repeats all of
    it; but along `data`, micro-batches are reduced once a step where `sum_over_data` can.
    """
    config, model = stage.config, stage.model
    found: list[Collective] = []
    state, first = phase.abstract_state, lowest_layer(phase)
    for trainable, tree in ((True, state.trainable), (False, state.frozen)):
        for path, leaf in flatten(tree).items():
            for part in jax.tree.leaves(leaf):  # a quantized leaf has codes and scales
                found += _of_leaf(path, part, trainable, config, model, first, mesh)
    return [each for each in (*found, *_of_activations(config, model, phase, mesh)) if each.times]


def lowest_layer(phase: Phase) -> int:
    """The first layer that has a backward pass; the number of layers if none has one."""
    trainable, layers = phase.partition.trainable, phase.model.layers
    if any(path.startswith("embed/") for path in trainable):
        return 0
    return min((_layers_of(path).start for path in trainable if in_stack(path)), default=layers)


def _layers_of(path: str) -> range:
    """The layers of a stacked leaf."""
    layers = locate(path)[1]
    assert layers is not None, path
    return layers


def _axes(*names: str) -> list[str]:
    """The mesh axes that logical axes are sharded along."""
    cuts = [(cut,) if isinstance(cut, str) else cut or () for cut in spec(names)]
    return [axis for cut in cuts for axis in cut]


def _of_leaf(
    path: str, leaf: Any, trainable: bool, stage: StageConfig, model: ModelConfig, first: int, mesh: Any
) -> list[Collective]:
    """The collectives of a parameter and its gradient; a stacked leaf counts all of its layers."""
    over = [axis for axis in _axes("batch", "length") if mesh.shape[axis] > 1]
    along = [axis for names in leaf.sharding.spec for axis in ((names,) if isinstance(names, str) else names or ())]
    elements = math.prod(leaf.shape) / math.prod(mesh.shape[axis] for axis in along if axis not in over)
    low = np.dtype(model.compute_dtype).itemsize
    size = elements * (low if computed_low(path) and leaf.dtype == np.float32 else leaf.dtype.itemsize)
    used = 1 + (in_stack(path) and _layers_of(path).stop > first)  # the backward pass gathers a layer again
    gradient = elements * 4.0
    found = []
    for axis in over:
        if axis in along:
            found.append(Collective(axis, path, "all-gather", size, used * stage.micro_batches))
    for axis in sorted(over, key=lambda axis: axis not in along):
        kind = "reduce-scatter" if axis in along else "all-reduce"
        once = axis == "data" and stage.micro_batches > 1 and sums_over_data_once(mesh)
        reductions = 1 if once else stage.micro_batches
        found.append(Collective(axis, path, kind, gradient, trainable * reductions))
        gradient /= mesh.shape[axis] if axis in along else 1
    return found


def _of_activations(stage: StageConfig, model: ModelConfig, phase: Phase, mesh: Any) -> list[Collective]:
    """The activations of the `tensor` axis, and the keys and values of the `context` axis."""
    rows = stage.batch_size / stage.micro_batches / axis_size(mesh, "batch")
    low = np.dtype(model.compute_dtype).itemsize
    differentiated = model.layers - lowest_layer(phase)
    recomputed = differentiated * (model.remat != "none")
    activations = rows * stage.sequence_length / axis_size(mesh, "length") * model.d_model * low
    kv_heads = model.kv_heads / shards(mesh, "kv_heads", model.kv_heads)
    keys = rows * stage.sequence_length * kv_heads * model.head_dim * low
    found = []
    for axis in (axis for axis in _axes("heads") if mesh.shape[axis] > 1):
        sums = 2 * model.layers + 2 * differentiated + 2  # + 2: the lookup and the gradient of the final norm
        gathers = sums + 2 * recomputed  # what the matmuls read, whose gradients they need
        sums += differentiated * (model.remat == "full")  # attention is recomputed
        found.append(Collective(axis, "activations", "all-gather", activations, gathers * stage.micro_batches))
        found.append(Collective(axis, "activations", "reduce-scatter", activations, sums * stage.micro_batches))
    for axis in (axis for axis in _axes("length") if mesh.shape[axis] > 1):
        gathers, scatters = (model.layers + recomputed) * stage.micro_batches, differentiated * stage.micro_batches
        found.append(Collective(axis, "keys and values", "all-gather", 2 * keys, gathers))
        found.append(Collective(axis, "keys and values", "reduce-scatter", 2 * keys, scatters))
    return found
