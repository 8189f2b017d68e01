"""Checkpoints of what trains alone: its leaves as pieces that are laid over a complete base.

A piece is a leaf of a segmented tree: "layers/6:8/mlp/up/kernel" holds layers 6 and 7 of the base's
"layers/mlp/up/kernel"; a path outside the stack stands for the whole leaf.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from llm3.errors import UserError
from llm3.segments import canonical_path, locate


def check_pieces(where: str, pieces: Mapping[str, Any], base: Mapping[str, tuple]) -> None:
    """Raise UserError where a piece does not fit into `base`, {path: (shape, dtype)}."""
    wrong = []
    for path, piece in pieces.items():
        canonical, layers = locate(path)
        if canonical not in base:
            wrong.append(f"{path}: not in the base")
            continue
        shape, dtype = base[canonical]
        if layers is not None:
            shape = (len(layers), *shape[1:])
        if layers is not None and not 0 <= layers.start < layers.stop <= base[canonical][0][0]:
            wrong.append(f"{path}: the base has {base[canonical][0][0]} layers")
        elif (tuple(piece.shape), np.dtype(piece.dtype)) != (shape, dtype):
            wrong.append(f"{path}: {piece.dtype} {tuple(piece.shape)}, the base expects {dtype} {shape}")
    if wrong:
        raise UserError("\n  ".join([f"{where} does not fit its base:", *wrong]))


def pieces_like(abstract: Mapping[str, Any], saved: Mapping[str, tuple]) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of the `saved` pieces, {path: (shape, dtype)}, in dtype and sharding of the canonical leaves.

    A sharding fits the piece of a leaf as well, for the axis of the layers is never cut.
    """
    leaves = {path: abstract[canonical_path(path)] for path in saved}
    return {
        path: jax.ShapeDtypeStruct(saved[path][0], leaf.dtype, sharding=leaf.sharding) for path, leaf in leaves.items()
    }


def overlay(base: dict[str, Any], pieces: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the pieces laid over it, {canonical path: leaf}; the base's arrays are donated, or changed in place.

    Both are numpy arrays or both on devices; the result has the shardings of the base.
    """
    if all(isinstance(leaf, np.ndarray) for leaf in base.values()):
        return base | _laid_over(base, pieces)
    touched = {path: base[path] for path in map(canonical_path, pieces)}
    shardings = {path: leaf.sharding for path, leaf in touched.items()}
    return base | jax.jit(_laid_over, out_shardings=shardings, donate_argnums=0)(touched, dict(pieces))


def _laid_over(base: Mapping[str, Any], pieces: Mapping[str, Any]) -> dict[str, Any]:
    changed: dict[str, Any] = {}
    for path, piece in pieces.items():
        canonical, layers = locate(path)
        leaf = changed.get(canonical, base[canonical])
        if layers is None:
            changed[canonical] = piece
        elif isinstance(leaf, np.ndarray):
            leaf[layers.start : layers.stop] = piece
            changed[canonical] = leaf
        else:
            changed[canonical] = leaf.at[layers.start : layers.stop].set(piece)
    return changed
