"""Checkpoints of trainable weights only, as slices that patch a full base checkpoint.

A slice is a leaf of a segmented tree: "layers/6:8/mlp/up/kernel" holds layers 6 and 7 of "layers/mlp/up/kernel" in the
base. A path outside the layer stack holds the complete leaf.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from llm3.errors import UserError, counted
from llm3.segments import canonical_path, locate


def check_slices(where: str, slices: Mapping[str, Any], base: Mapping[str, tuple]) -> None:
    """Raise UserError for a slice whose path, layers, shape or dtype does not fit `base`, {path: (shape, dtype)}."""
    wrong = []
    for path, leaf in slices.items():
        canonical, layers = locate(path)
        if canonical not in base:
            wrong.append(f"{path}: not in the base")
            continue
        shape, dtype = base[canonical]
        if layers is not None:
            shape = (len(layers), *shape[1:])
        if layers is not None and not 0 <= layers.start < layers.stop <= base[canonical][0][0]:
            wrong.append(f"{path}: the base has {counted(base[canonical][0][0], 'layer')}")
        elif (tuple(leaf.shape), np.dtype(leaf.dtype)) != (shape, dtype):
            wrong.append(f"{path}: {leaf.dtype} {tuple(leaf.shape)}, the base expects {dtype} {shape}")
    if wrong:
        raise UserError("\n  ".join([f"{where} does not fit its base:", *wrong]))


def abstract_slices(abstract: Mapping[str, Any], saved: Mapping[str, tuple]) -> dict[str, jax.ShapeDtypeStruct]:
    """The `saved` slices, {path: (shape, dtype)}, with the dtype and sharding of their canonical leaves.

    The sharding of a leaf also fits its slices, because the layer axis is never sharded.
    """
    leaves = {path: abstract[canonical_path(path)] for path in saved}
    return {
        path: jax.ShapeDtypeStruct(saved[path][0], leaf.dtype, sharding=leaf.sharding) for path, leaf in leaves.items()
    }


def patch(base: dict[str, Any], slices: Mapping[str, Any]) -> dict[str, Any]:
    """`base` patched by the slices, {canonical path: leaf}; jax arrays of the base are donated, numpy ones are mutated.

    Base and slices are either all numpy arrays or all on devices. The result keeps the shardings of the base.
    """
    if not slices:
        return base
    if all(isinstance(leaf, np.ndarray) for leaf in base.values()):
        return base | _patched(base, slices)
    touched = {path: base[path] for path in map(canonical_path, slices)}
    shardings = {path: leaf.sharding for path, leaf in touched.items()}
    return base | jax.jit(_patched, out_shardings=shardings, donate_argnums=0)(touched, dict(slices))


def _patched(base: Mapping[str, Any], slices: Mapping[str, Any]) -> dict[str, Any]:
    changed: dict[str, Any] = {}
    for path, values in slices.items():
        canonical, layers = locate(path)
        leaf = changed.get(canonical, base[canonical])
        if layers is None:
            changed[canonical] = values
        elif isinstance(leaf, np.ndarray):
            leaf[layers.start : layers.stop] = values
            changed[canonical] = leaf
        else:
            changed[canonical] = leaf.at[layers.start : layers.stop].set(values)
    return changed
