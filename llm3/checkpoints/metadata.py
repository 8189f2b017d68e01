"""What a checkpoint says of itself: digests and shapes of all leaves, a digest over all of that, and its score.

The score is the metric by which the best checkpoint of a stage is chosen.
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from llm3.errors import UserError
from llm3.tree import combine_digests, leaf_digests


def by_path(tree: Any) -> dict[str, Any]:
    """{path: leaf} of any pytree, in the order of its leaves."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(keys, simple=True, separator="/"): leaf for keys, leaf in leaves}


def as_arrays(leaves: dict[str, Any]) -> dict[str, Any]:
    """The leaves as arrays, of jax or of numpy."""
    return {path: leaf if isinstance(leaf, jax.Array) else np.asarray(leaf) for path, leaf in leaves.items()}


@jax.jit
def _finite(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {path: jnp.isfinite(leaf).all() for path, leaf in leaves.items()}


def not_finite(leaves: dict[str, Any]) -> list[str]:
    """The paths of leaves that hold a NaN or an infinity."""
    floating = {path: leaf for path, leaf in leaves.items() if jnp.issubdtype(leaf.dtype, jnp.inexact)}
    on_device = {path: leaf for path, leaf in floating.items() if isinstance(leaf, jax.Array)}
    good = jax.device_get(_finite(on_device))
    good |= {path: np.isfinite(leaf).all() for path, leaf in floating.items() if path not in on_device}
    return [path for path in floating if not good[path]]


def on_host(leaf: Any) -> np.ndarray:
    """A leaf as a numpy array, also one that is spread over processes: all of them have to ask for it."""
    if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
        leaf = multihost_utils.process_allgather(leaf, tiled=True)
    return np.asarray(leaf)


def digests_of(leaves: dict[str, Any]) -> dict[str, str]:
    """`leaf_digests` in parallel, also of arrays that are spread over processes."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        each = pool.map(leaf_digests, ({path: on_host(leaf)} for path, leaf in leaves.items()))
        return {path: digest for one in each for path, digest in one.items()}


def json_digest(value: Any) -> str:
    """SHA-256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def sealed(meta: dict, parts: dict[str, dict[str, Any]]) -> dict:
    """`meta` as JSON gives it back, with the digests and shapes of all leaves, and its own digest.

    Where `meta["base"]` names the digest of other parameters that these are laid over, `params_digest` covers them too.
    """
    meta = json.loads(json.dumps(meta))
    meta.pop("meta_digest", None)
    meta["digests"], meta["opt_digests"] = (digests_of(parts[name]) for name in ("params", "opt"))
    meta["params_digest"] = combine_digests(meta["digests"] | ({"base": meta["base"]} if "base" in meta else {}))
    meta["shapes"] = {
        name: {path: [list(leaf.shape), leaf.dtype.name] for path, leaf in leaves.items()}
        for name, leaves in parts.items()
    }
    return meta | {"meta_digest": json_digest(meta)}


def saved_shapes(meta: dict, part: str) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """{path: (shape, dtype)} of a part, "params" or "opt", from its metadata."""
    return {path: (tuple(shape), jnp.dtype(dtype)) for path, (shape, dtype) in meta["shapes"][part].items()}


def other_arrays(arrays: dict[str, Any], saved: dict[str, tuple]) -> list[str]:
    """What is wrong with the arrays found, by path, where {path: (shape, dtype)} was saved."""
    found = {path: f"{array.dtype} {tuple(array.shape)}" for path, array in arrays.items()}
    expected = {path: f"{dtype} {shape}" for path, (shape, dtype) in saved.items()}
    return [
        f"{path} is {found.get(path, 'missing')}, but {expected.get(path, 'nothing')} was saved"
        for path in sorted(found.keys() | expected.keys())
        if found.get(path) != expected.get(path)
    ]


def check_shapes(where: str, abstract: dict[str, Any], saved: dict[str, tuple]) -> None:
    """Raise UserError, with the whole difference, where a checkpoint does not have these leaves and shapes."""
    wrong = [f"{path}: not in the checkpoint" for path in abstract if path not in saved]
    wrong += [f"{path}: only in the checkpoint" for path in saved if path not in abstract]
    wrong += [
        f"{path}: {saved[path][0]} in the checkpoint, {tuple(leaf.shape)} expected"
        for path, leaf in abstract.items()
        if path in saved and saved[path][0] != tuple(leaf.shape)
    ]
    if wrong:
        raise UserError("\n  ".join([f"{where} does not fit:", *wrong]))


def scored(name: str, signed: float | None) -> dict:
    """The field of a checkpoint's metadata for a figure, signed so that lower is better.

    It is empty without a figure, and for one that is not finite: that checkpoint cannot be the best.
    """
    known = signed is not None and math.isfinite(signed)
    return {"scored": {"name": name, "value": float(signed)} if known else None}


def best_step(metas: Mapping[int, dict], stage: str, where: str) -> int:
    """Of {step: metadata} of a stage, the step with the lowest figure, the later one of equals.

    Only figures of the name that the latest one has are compared. Raises UserError where none has a figure.
    """
    figures = {step: meta["scored"] for step, meta in metas.items() if meta.get("scored")}
    if not figures:
        raise UserError(
            f"{where}.step='best': no checkpoint of the parent has a figure to choose by: set stages.{stage}.best in "
            f"the parent's config, as in best='EVALUATION_bits_per_byte', or name a step "
            f"(there: {', '.join(map(str, metas))})"
        )
    name = figures[max(figures)]["name"]
    comparable = [step for step in figures if figures[step]["name"] == name]
    return min(comparable, key=lambda step: (figures[step]["value"], -step))
