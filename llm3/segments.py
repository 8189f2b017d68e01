"""The layer stack: cut it into segments, and join them again.

The canonical tree has one stack: the leaf "layers/mlp/up/kernel" holds all layers on its first axis. A segment is a run
of layers (first, stop); in a segmented tree, "layers/6:8/mlp/up/kernel" holds layers 6 and 7. Leaves outside the stack
have the same path in both trees.
"""

import re
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from llm3.tree import flatten, unflatten

STACK = "layers"  # leaves below this name have a leading layer axis
Segments = tuple[tuple[int, int], ...]


def in_stack(path: str) -> bool:
    """Whether the leaf at a path (of either tree) has a leading layer axis."""
    return path.startswith(f"{STACK}/")


def runs(patterns: Sequence[Any]) -> Segments:
    """The longest runs of layers with equal patterns. patterns: one for each layer."""
    starts = [i for i, pattern in enumerate(patterns) if i == 0 or pattern != patterns[i - 1]]
    return tuple(zip(starts, [*starts[1:], len(patterns)], strict=True))


def segment_name(first: int, stop: int) -> str:
    """The path component of a segment."""
    return f"{first}:{stop}"


def segment_bounds(name: str) -> tuple[int, int]:
    """(first, stop) of a segment: the inverse of `segment_name`."""
    first, stop = name.split(":")
    return int(first), int(stop)


def segment_path(path: str, first: int, stop: int) -> str:
    """A canonical path within a segment: layers/mlp/... becomes layers/6:8/mlp/...; other paths do not change."""
    return path.replace(f"{STACK}/", f"{STACK}/{segment_name(first, stop)}/", 1) if in_stack(path) else path


def locate(path: str) -> tuple[str, range | None]:
    """(canonical path, layers of the leaf) of a segmented path. The layers are None for a leaf outside the stack."""
    if found := re.fullmatch(rf"{STACK}/(\d+:\d+)/(.+)", path):
        return f"{STACK}/{found[2]}", range(*segment_bounds(found[1]))
    return path, None


def canonical_path(path: str) -> str:
    """The canonical path of a segmented leaf: layers/6:8/mlp/... becomes layers/mlp/..."""
    return locate(path)[0]


def canonical(params: dict) -> dict:
    """The parameters with the segments of the stack joined: layers/<name> instead of layers/<a:b>/<name>."""
    stacks = sorted(params[STACK].items(), key=lambda item: segment_bounds(item[0]))
    flat = [flatten(stack) for _, stack in stacks]
    joined = {
        path: leaf if len(flat) == 1 else jnp.concatenate([each[path] for each in flat])
        for path, leaf in flat[0].items()
    }
    return {**params, STACK: unflatten(joined)}


def segmented(params: dict, segments: Segments) -> dict:
    """The canonical parameters with the stack cut into segments: the inverse of `canonical`."""
    flat = flatten(params[STACK])
    cut = {
        segment_name(a, b): unflatten({path: leaf if len(segments) == 1 else leaf[a:b] for path, leaf in flat.items()})
        for a, b in segments
    }
    return {**params, STACK: cut}
