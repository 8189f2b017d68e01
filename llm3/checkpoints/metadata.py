"""The metadata of a checkpoint: digests and shapes of all leaves, a digest of the metadata itself, and a score.

The score is the metric that selects the best checkpoint of a stage.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm3.checkpoints.digests import DIFFERS, DIGEST_FORMAT, digests_of
from llm3.errors import UserError, listed
from llm3.files import FORMAT
from llm3.tree import combine_digests


def by_path(tree: Any) -> dict[str, Any]:
    """Any pytree as {path: leaf}, in leaf order."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(keys, simple=True, separator="/"): leaf for keys, leaf in leaves}


def as_arrays(leaves: dict[str, Any]) -> dict[str, Any]:
    """The leaves as arrays: jax arrays stay, anything else becomes a numpy array."""
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


def json_digest(value: Any) -> str:
    """SHA-256 of a JSON value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def with_digests(meta: dict, parts: dict[str, dict[str, Any]]) -> dict:
    """`meta` after a round trip through JSON, with the digests and shapes of all leaves and a digest of itself.

    In a delta checkpoint, `meta["base"]` is the digest of the base, and `params_digest` covers it as well.
    """
    meta = json.loads(json.dumps(meta)) | {"format": FORMAT}
    meta.pop("meta_digest", None)
    meta["digest_format"] = DIGEST_FORMAT
    meta["digests"], meta["opt_digests"] = (digests_of(parts[name]) for name in ("params", "opt"))
    both = meta["digests"] | meta["opt_digests"]
    if wrong := [path for path, digest in both.items() if digest == DIFFERS]:
        raise RuntimeError(f"the processes do not have the same replicas of {listed(wrong)}")
    meta["params_digest"] = combine_digests(meta["digests"] | ({"base": meta["base"]} if "base" in meta else {}))
    meta["shapes"] = {
        name: {path: [list(leaf.shape), leaf.dtype.name] for path, leaf in leaves.items()}
        for name, leaves in parts.items()
    }
    return meta | {"meta_digest": json_digest(meta)}


def saved_shapes(meta: dict, part: str) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """{path: (shape, dtype)} of a part, "params" or "opt", as recorded in the metadata."""
    return {path: (tuple(shape), jnp.dtype(dtype)) for path, (shape, dtype) in meta["shapes"][part].items()}


def array_mismatches(arrays: dict[str, Any], saved: dict[str, tuple]) -> list[str]:
    """One line for each path where dtype or shape on disk differ from the `saved` {path: (shape, dtype)}."""
    found = {path: f"{array.dtype} {tuple(array.shape)}" for path, array in arrays.items()}
    expected = {path: f"{dtype} {shape}" for path, (shape, dtype) in saved.items()}
    return [
        f"{path} is {found.get(path, 'missing')}, but {expected.get(path, 'nothing')} was saved"
        for path in sorted(found.keys() | expected.keys())
        if found.get(path) != expected.get(path)
    ]


def check_shapes(where: str, abstract: dict[str, Any], saved: dict[str, tuple]) -> None:
    """Raise UserError that lists every leaf whose path or shape differs between the checkpoint and `abstract`."""
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
    """The metadata field for the metric that selects the best checkpoint, signed so that lower is better.

    Its value is None if the metric is missing or not finite: such a checkpoint cannot be the best.
    """
    if signed is None or not math.isfinite(signed):
        return {"scored": None}
    return {"scored": {"name": name, "value": float(signed)}}


def best_step(metas: Mapping[int, dict], stage: str, where: str) -> int:
    """The step with the lowest score in {step: metadata}; of equal scores, the later step.

    Only scores of the same metric as the latest score are compared. Raises UserError if no step has a score.
    """
    scores = {step: meta["scored"] for step, meta in metas.items() if meta.get("scored")}
    if not scores:
        raise UserError(
            f"{where}.step='best': no checkpoint of the parent has a metric to choose by: set stages.{stage}.best in "
            f"the parent's config, as in best='EVALUATION_bits_per_byte', or name a step "
            f"(available: {', '.join(map(str, metas))})"
        )
    name = scores[max(scores)]["name"]
    comparable = [step for step in scores if scores[step]["name"] == name]
    return min(comparable, key=lambda step: (scores[step]["value"], -step))
