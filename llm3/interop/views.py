"""Where a leaf of one layer lies in a tensor of a file: transposed, flattened, or fused with other leaves.

Files hold matrices [out, in] (or [in, out], as GPT-2) whose axes may be several axes of llm3 flattened, and they may
fuse leaves along an axis, one after the other or interleaved. A `View` computes which slices of the tensor a slice of
the leaf needs, so that a shard is read without the rest of the tensor.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Dim:
    """One axis of a tensor: some axes of the leaf, flattened, those after `outer` as a part of a fused block.

    axes: axes of the leaf, the slowest first. outer: how many of them lie outside the block. start, total: where the
    part begins in the block, and the size of the block.
    """

    axes: tuple[int, ...]
    outer: int
    start: int
    total: int


@dataclasses.dataclass(frozen=True)
class View:
    """A leaf of `shape` inside a tensor; dims: the axes of the tensor. Together they have every axis of the leaf."""

    shape: tuple[int, ...]
    dims: tuple[Dim, ...]

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """The shape of the tensor."""
        return tuple(math.prod(self.shape[axis] for axis in dim.axes[: dim.outer]) * dim.total for dim in self.dims)

    @property
    def order(self) -> tuple[int, ...]:
        """The axes of the leaf in the order of the tensor."""
        return tuple(axis for dim in self.dims for axis in dim.axes)

    def read(self, at: Callable[[tuple[slice, ...]], np.ndarray], ranges: tuple[range, ...]) -> np.ndarray:
        """The slice `ranges` of the leaf, an array of their lengths. at: reads a slice of the tensor.

        Each call of `at` reads only elements of the result.
        """
        piece = _joined(at, [list(_runs(dim, self.shape, ranges)) for dim in self.dims])
        piece = piece.reshape([len(ranges[axis]) for axis in self.order])
        return piece.transpose(np.argsort(self.order)) if self.order else piece

    def write(self, tensor: np.ndarray, leaf: np.ndarray) -> None:
        """Put a whole leaf at its place in a contiguous tensor of `tensor_shape`."""
        sizes: list[int] = []
        index: list[Any] = []
        for dim in self.dims:
            outer = [self.shape[axis] for axis in dim.axes[: dim.outer]]
            inner = math.prod(self.shape[axis] for axis in dim.axes[dim.outer :])
            sizes += [*outer, dim.total]
            index += [*(slice(None) for _ in outer), slice(dim.start, dim.start + inner)]
        place = tensor.reshape(sizes)[tuple(index)]
        place[...] = leaf.transpose(self.order).reshape(place.shape)


def _runs(dim: Dim, shape: tuple[int, ...], ranges: tuple[range, ...]) -> Iterator[slice]:
    """The contiguous pieces of an axis of the tensor that hold these ranges of the leaf's axes, in their order."""
    stride, length, begin, whole = 1, 1, dim.start, True
    loops: list[list[int]] = []
    for place in reversed(range(len(dim.axes))):
        if place == dim.outer - 1:  # from here on, one step skips a whole block
            whole, stride = whole and stride == dim.total, dim.total
        size, wanted = shape[dim.axes[place]], ranges[dim.axes[place]]
        begin += wanted.start * stride
        if whole:
            length = stride * len(wanted)
            whole = len(wanted) == size
        else:
            loops.append([i * stride for i in range(len(wanted))])
        stride *= size
    for steps in itertools.product(*reversed(loops)):
        first = begin + sum(steps)
        yield slice(first, first + length)


def _joined(at: Callable[[tuple[slice, ...]], np.ndarray], runs: list[list[slice]]) -> np.ndarray:
    """All combinations of runs along each axis of a tensor, as one array."""

    def part(axis: int, index: tuple[slice, ...]) -> np.ndarray:
        if axis == len(runs):
            return at(index)
        parts = [part(axis + 1, (*index, run)) for run in runs[axis]]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis)

    return part(0, ())
