"""Parameter trees: paths of leaves, and digests of their contents.

A tree is a plain nested dict of arrays. The path of a leaf is its keys joined by "/".
"""

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np


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


def leaf_digests(tree: dict) -> dict[str, str]:
    """{path: SHA-256 over dtype, shape and bytes in C order}. All arrays must be fully addressable."""
    digests = {}
    for path, leaf in flatten(tree).items():
        array = np.ascontiguousarray(leaf)  # turns a scalar into a vector: the shape below is the leaf's own
        digest = hashlib.sha256(f"{array.dtype.name}{tuple(np.shape(leaf))}".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
        digests[path] = digest.hexdigest()
    return digests


def combine_digests(digests: dict[str, str]) -> str:
    """One SHA-256 over {path: digest}, in the order of paths."""
    text = "".join(f"{path} {digest}\n" for path, digest in sorted(digests.items()))
    return hashlib.sha256(text.encode()).hexdigest()


def params_digest(tree: dict) -> str:
    """One SHA-256 over all leaves of a tree of parameters."""
    return combine_digests(leaf_digests(tree))
