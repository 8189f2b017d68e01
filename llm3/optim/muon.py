"""Muon (Jordan et al. 2024) with its Newton-Schulz iteration spread over the devices of a mesh.

The iteration needs whole matrices, and costs more FLOPs than the rest of an optimizer. On a mesh, each device takes
the whole matrices of some layers, so that none is computed twice (as in Liu et al. 2025, "Muon is scalable for LLM
training", section 2.3).
"""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec
from optax.contrib import MuonDimensionNumbers, MuonState, scale_by_muon

from llm3.tree import flatten, map_with_path, unflatten

Axes = tuple[tuple[int, ...], tuple[int, ...]]
Iteration = Callable[[jax.Array], jax.Array]


class Matrices(NamedTuple):
    """A leaf [L, *in, *out] as one matrix per layer. axes: (input axes, output axes). spec: how the mesh cuts it."""

    shape: tuple[int, ...]
    axes: Axes
    spec: PartitionSpec

    @property
    def sides(self) -> tuple[int, int]:
        """The numbers of inputs and of outputs."""
        inputs, outputs = (math.prod(self.shape[axis] for axis in each) for each in self.axes)
        return inputs, outputs

    @property
    def turned(self) -> bool:
        """Whether the transposes are orthogonalised, whose rows are fewer than their columns."""
        return self.sides[0] > self.sides[1]

    @property
    def contiguous(self) -> PartitionSpec:
        """The cuts that leave contiguous pieces of the matrices: those of the first input and output axis."""
        first = [each[0] for each in self.axes]
        return PartitionSpec(*(cut if axis in first else None for axis, cut in enumerate(self.spec)))

    def cuts(self, mesh: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The mesh axes that cut the rows and the columns of what is orthogonalised."""
        parts = dict(enumerate(self.contiguous))
        names = [parts.get(each[0]) or () for each in self.axes]
        cuts = [(each,) if isinstance(each, str) else tuple(each) for each in names]
        rows, columns = (tuple(axis for axis in cut if mesh.shape[axis] > 1) for cut in cuts)
        return (columns, rows) if self.turned else (rows, columns)

    def wide(self, piece: jax.Array) -> jax.Array:
        """A piece of the leaf as [L, rows, columns] of what is orthogonalised."""
        rows = math.prod(piece.shape[axis] for axis in self.axes[0])
        matrices = piece.reshape(len(piece), rows, -1)
        return matrices.swapaxes(1, 2) if self.turned else matrices


def muon(params: dict, axes: Mapping[str, Axes], options: dict) -> optax.GradientTransformation:
    """`optax.contrib.muon` at a learning rate of 1, with the same state; on one device, it is that function.

    params: the tree, of arrays or shapes, with their shardings. axes: {path: (input axes, output axes)} of its leaves
    with one matrix per layer. options: of the optax function.
    """
    numbers = map_with_path(lambda path, _: MuonDimensionNumbers(*axes[path]) if path in axes else None, params)
    on_one_device = optax.contrib.muon(1.0, muon_weight_dimension_numbers=numbers, **options)
    bound = inspect.signature(optax.contrib.muon).bind(1.0, **options)
    bound.apply_defaults()
    given, example = bound.arguments, flatten(params)
    specs = {path: getattr(getattr(example[path], "sharding", None), "spec", PartitionSpec()) for path in axes}
    leaves = {path: Matrices(example[path].shape, axes[path], specs[path]) for path in axes}

    def update(gradients: dict, state: Any, params: dict | None = None) -> tuple[dict, Any]:
        updates, after = on_one_device.update(gradients, state, params)
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or mesh.size == 1:
            return updates, after
        # of optax's updates, those of matrices are not used, and so not computed
        before: MuonState = state.inner_states["muon"].inner_state[0]
        flat, mu = flatten(gradients), flatten(before.mu)
        momenta = {path: _momentum(flat[path], mu[path], before.count, given) for path in leaves}
        found = _orthogonalized(momenta, leaves, _iteration(given, before.ns_coeffs))
        if given["adaptive"]:
            found = {path: jnp.sum(momenta[path] * each) * each for path, each in found.items()}
        scaled = {path: -_scale(*leaves[path].sides, given["consistent_rms"]) * each for path, each in found.items()}
        return unflatten(flatten(updates) | scaled), after

    return optax.GradientTransformation(on_one_device.init, update)


def _momentum(gradient: jax.Array, mu: jax.Array, count: jax.Array, given: Mapping[str, Any]) -> jax.Array:
    """What is orthogonalised: the momentum without its bias, by Nesterov's rule if it is on."""
    beta, step = given["beta"], optax.safe_increment(count)
    mu = optax.tree.update_moment(gradient, mu, beta, 1)
    if not given["nesterov"]:
        return optax.tree.bias_correction(mu, beta, step)
    ahead = optax.tree.bias_correction(mu, beta, optax.safe_increment(step))
    return beta * ahead + (1 - beta) * optax.tree.bias_correction(gradient, beta, step)


def _iteration(given: Mapping[str, Any], coefficients: jax.Array) -> Iteration:
    """iteration(matrices [N, m, n]) -> the orthogonalised matrices: optax's rule without momentum."""
    rule = scale_by_muon(
        beta=0.0,
        nesterov=False,
        weight_dimension_numbers=MuonDimensionNumbers(1, 2),
        **{name: given[name] for name in ("ns_steps", "eps", "preconditioning")},
    )

    def iteration(matrices: jax.Array) -> jax.Array:
        state = MuonState(jnp.zeros((), jnp.int32), jnp.zeros_like(matrices), coefficients)
        return rule.update(matrices, state)[0]

    return iteration


def _scale(inputs: int, outputs: int, consistent_rms: float | None) -> float:
    """The factor of the updates of a leaf: by width (Jordan), or for the RMS of all to be equal (Liu, section 2.2)."""
    if consistent_rms is None:
        return max(1.0, outputs / inputs) ** 0.5
    return max(inputs, outputs) ** 0.5 * consistent_rms


def _orthogonalized(
    momenta: dict[str, jax.Array], leaves: Mapping[str, Matrices], iteration: Iteration
) -> dict[str, jax.Array]:
    """The momenta with every matrix orthogonalised, each on one device of the active mesh.

    Matrices of one shape, or of its transpose, are one stack: fewer layers than devices then serve more of them.
    """
    mesh = jax.sharding.get_abstract_mesh()

    def local(pieces: dict[str, jax.Array]) -> dict[str, jax.Array]:
        stacks: dict[Any, dict[str, jax.Array]] = {}
        for path, piece in pieces.items():
            wide = leaves[path].wide(piece)
            stacks.setdefault((leaves[path].cuts(mesh), wide.shape[1:], wide.dtype), {})[path] = wide
        found = {}
        for (cuts, _, _), stack in stacks.items():
            done = _shared(jnp.concatenate(list(stack.values())), cuts, mesh, iteration)
            ends = np.cumsum([len(each) for each in stack.values()])
            for path, part in zip(stack, jnp.split(done, ends[:-1]), strict=True):
                found[path] = (part.swapaxes(1, 2) if leaves[path].turned else part).reshape(pieces[path].shape)
        return found

    specs = {path: leaves[path].contiguous for path in momenta}
    return jax.shard_map(local, in_specs=(specs,), out_specs=specs, check_vma=False)(momenta)


def _shared(pieces: jax.Array, cuts: tuple[tuple[str, ...], ...], mesh: Any, iteration: Iteration) -> jax.Array:
    """A device's pieces [N, m, n] of N orthogonalised matrices, of which it computes its share.

    cuts: the mesh axes that cut m and n. Along them, the devices exchange pieces of all matrices for whole ones.
    """
    count, cut = len(pieces), [axis for axes in cuts for axis in axes]
    copies = tuple(axis for axis in mesh.axis_names if axis not in cut and mesh.shape[axis] > 1)
    full = jnp.pad(pieces, ((0, -count % mesh.size), (0, 0), (0, 0)))  # the iteration leaves zeros as they are
    size = len(full) // math.prod(mesh.shape[axis] for axis in copies)
    own = jax.lax.dynamic_slice_in_dim(full, jax.lax.axis_index(copies) * size, size) if copies else full
    exchanged = [(axes, side) for side, axes in enumerate(cuts, start=1) if axes]
    for axes, side in exchanged:
        own = jax.lax.all_to_all(own, axes, 0, side, tiled=True)
    own = iteration(own)
    for axes, side in reversed(exchanged):
        own = jax.lax.all_to_all(own, axes, side, 0, tiled=True)
    return (jax.lax.all_gather(own, copies, tiled=True) if copies else own)[:count]
