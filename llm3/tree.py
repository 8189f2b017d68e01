"""Parameter trees: paths of leaves, and digests of their contents.

A tree is a plain nested dict of arrays. The path of a leaf is its keys joined by "/".
"""

import hashlib
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

MOST_BLOCKS, MOST_PARTS = 2**12, 2**6  # of a leaf, of one of its axes
LEAST_BLOCK_BYTES = 2**14


def flatten(tree: dict, prefix: str = "") -> dict[str, Any]:
    """{path: leaf} of a nested dict, sorted by path."""
    flat: dict[str, Any] = {}
    for key in tree:
        path = f"{prefix}/{key}" if prefix else str(key)
        if isinstance(tree[key], dict):
            flat |= flatten(tree[key], path)
        else:
            flat[path] = tree[key]
    return dict(sorted(flat.items()))


def unflatten(flat: dict[str, Any]) -> dict:
    """The nested dict of {path: leaf}: the inverse of `flatten`."""
    tree: dict = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def map_with_path(function: Callable[..., Any], tree: dict, *others: dict) -> dict:
    """The tree of `function(path, leaf, *leaves of the other trees at the same path)`."""
    flat = [flatten(each) for each in (tree, *others)]
    return unflatten({path: function(path, *(each[path] for each in flat)) for path in flat[0]})


def size(tree: dict) -> int:
    """The number of parameters."""
    return sum(int(np.prod(leaf.shape)) for leaf in flatten(tree).values())


def block_shape(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """The shape of the blocks in which a leaf of this shape is hashed; each axis is cut into equal parts.

    It depends on nothing but the leaf, so that its digest is the same on any mesh. The longest axis is cut, by its
    smallest prime factor, as long as no axis has more than MOST_PARTS parts, there are no more than MOST_BLOCKS blocks,
    and no block has fewer than LEAST_BLOCK_BYTES. So few shards end inside a block.
    """
    block, blocks, bytes_ = list(shape), 1, math.prod(shape) * itemsize
    while cuts := [
        (size, -axis, factor)
        for axis, size in enumerate(block)
        if size > 1 and shape[axis] // size * (factor := smallest_factor(size)) <= MOST_PARTS
        if blocks * factor <= MOST_BLOCKS and bytes_ >= factor * LEAST_BLOCK_BYTES
    ]:
        _, axis, factor = max(cuts)
        block[-axis] //= factor
        blocks, bytes_ = blocks * factor, bytes_ // factor
    return tuple(block)


def smallest_factor(number: int) -> int:
    """The smallest prime factor of a number above 1."""
    return next((each for each in range(2, math.isqrt(number) + 1) if number % each == 0), number)


def block_digest(block: np.ndarray) -> bytes:
    """SHA-256 over the bytes of an array in C order."""
    return hashlib.sha256(np.ascontiguousarray(block).reshape(-1).view(np.uint8).data).digest()


def digest_of_blocks(shape: tuple[int, ...], dtype: np.dtype, digests: bytes) -> str:
    """The digest of a leaf: SHA-256 over its dtype, its shape, that of its blocks, and all `block_digest`s in C order.

    A tree of hashes, so two leaves with one digest are as hard to find as two blocks with one SHA-256. A sum of the
    digests of blocks would be easier to collect, but not as hard to forge.
    """
    header = f"{dtype.name}{shape} in blocks of {block_shape(shape, dtype.itemsize)}"
    return hashlib.sha256(header.encode() + digests).hexdigest()


def leaf_digests(tree: dict) -> dict[str, str]:
    """{path: `digest_of_blocks`}. All arrays must be fully addressable."""
    digests = {}
    for path, leaf in flatten(tree).items():
        array = np.asarray(leaf)
        block = block_shape(array.shape, array.itemsize)
        starts = itertools.product(*(range(0, size, part or 1) for size, part in zip(array.shape, block, strict=True)))
        boxes = (tuple(slice(at, at + size) for at, size in zip(start, block, strict=True)) for start in starts)
        digests[path] = digest_of_blocks(array.shape, array.dtype, b"".join(block_digest(array[box]) for box in boxes))
    return digests


def whole_leaf_digest(leaf: np.ndarray) -> str:
    """The digest of a leaf in checkpoints before blocks: SHA-256 over dtype, shape and bytes in C order."""
    array = np.ascontiguousarray(leaf)  # turns a scalar into a vector: the shape below is the leaf's own
    digest = hashlib.sha256(f"{array.dtype.name}{np.shape(leaf)}".encode())
    digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def combine_digests(digests: dict[str, str]) -> str:
    """One SHA-256 over {path: digest}, in the order of paths."""
    text = "".join(f"{path} {digest}\n" for path, digest in sorted(digests.items()))
    return hashlib.sha256(text.encode()).hexdigest()


def params_digest(tree: dict) -> str:
    """One SHA-256 over all leaves of a tree of parameters."""
    return combine_digests(leaf_digests(tree))
