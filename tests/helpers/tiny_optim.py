"""A small tree to optimize, and what optimizers do to it, by hand."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from llm3.optim.optimizer import Optimizer, make_optimizer
from llm3.segments import canonical, segmented
from llm3.tree import flatten, unflatten

L, D, H, K, V = 3, 8, 2, 4, 16
SETTINGS = {
    "name": "adamw",
    "learning_rate": 0.01,
    "schedule": "cosine",
    "steps": 10,
    "warmup_steps": 2,
    "decay_steps": 0,
    "final_fraction": 0.1,
    "weight_decay": 0.0,
    "clip_norm": 0.0,
    "layer_decay": 1.0,
    "learning_rates": [],
    "l2_sp": 0.0,
    "ema": 0.0,
    "moments": "float32",
    "options": {},
    "layers": L,
    "fresh": frozenset(),
    "groups": None,
}
NAMES = ["adamw", "adafactor", "lion", "muon", "sgd"]


def tree(seed: int, scale: float = 1.0, size: int = D, segment: str = "0:3/", layers: slice = slice(None)) -> dict:
    """Random arrays under the canonical paths of a small transformer."""
    random = np.random.default_rng(seed)
    shapes = {
        "embed/embedding": (V, size),
        "final_norm/scale": (size,),
        "head/bias": (5,),
        "head/kernel": (size, 5),
        f"layers/{segment}attention/out/kernel": (L, H, K, size),
        f"layers/{segment}attention/query/bias": (L, H, K),
        f"layers/{segment}attention/query/kernel": (L, size, H, K),
        f"layers/{segment}mlp/up/kernel": (L, size, 2 * size),
    }
    leaves = {path: scale * random.standard_normal(shape) for path, shape in shapes.items()}
    cut = {path: leaf[layers] if path.startswith("layers") else leaf for path, leaf in leaves.items()}
    return unflatten({path: jnp.asarray(leaf, jnp.float32) for path, leaf in cut.items()})


def make(params: dict, **changes) -> Optimizer:
    return make_optimizer(params, **(SETTINGS | changes))


def cut(params: dict, *segments: tuple[int, int]) -> dict:
    """The same leaves with the stack cut at other places."""
    return segmented(canonical(params), segments)


def step_of(optimizer: Optimizer) -> Callable[[dict, object, dict], tuple[dict, object]]:
    """step(params, state, gradient) -> the next params and state."""

    def step(params: dict, state: object, gradient: dict) -> tuple[dict, object]:
        updates, state = optimizer.transform.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    return step


def train(optimizer: Optimizer, params: dict, gradients: list[dict]) -> tuple[dict, object]:
    step, state = jax.jit(step_of(optimizer)), jax.jit(optimizer.transform.init)(params)
    for gradient in gradients:
        params, state = step(params, state, gradient)
    return params, state


def expected_rate(name: str, step: int, peak: float, steps: int, warmup: int, decay: int, final: float) -> float:
    """The learning rate of update `step`, piece by piece."""
    if step < warmup:
        return peak * (step + 1) / warmup
    last = steps - 1
    top = max(warmup - 1, 0)
    if name == "wsd":
        top = max(top, last - (decay or max(1, steps // 10)))
    if name == "constant" or step <= top or last <= top:
        return peak
    done = min((step - top) / (last - top), 1.0)
    if name == "cosine":
        return peak * (final + (1 - final) * (1 + np.cos(np.pi * done)) / 2)
    return peak * (final + (1 - final) * (1 - done))


def adamw_in_float64(params, gradients, rates, weight_decay, clip_norm, b1, b2, eps, pull=()) -> dict[str, np.ndarray]:
    """AdamW (Loshchilov and Hutter 2019, algorithm 2) with clipping, leaf by leaf. pull: {path: L2-SP}."""
    start = {path: np.asarray(leaf, np.float64) for path, leaf in flatten(params).items()}
    values, pull = dict(start), dict(pull)
    first = {path: np.zeros_like(value) for path, value in values.items()}
    second = {path: np.zeros_like(value) for path, value in values.items()}
    for t, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        flat = {
            path: np.asarray(leaf, np.float64) + pull.get(path, 0) * (values[path] - start[path])
            for path, leaf in flatten(gradient).items()
        }
        norm = np.sqrt(sum(float((leaf**2).sum()) for leaf in flat.values()))
        for path, value in values.items():
            g = flat[path] * min(1.0, clip_norm / norm)
            first[path] = b1 * first[path] + (1 - b1) * g
            second[path] = b2 * second[path] + (1 - b2) * g**2
            change = (first[path] / (1 - b1**t)) / (np.sqrt(second[path] / (1 - b2**t)) + eps)
            decay = weight_decay if path.endswith(("/kernel", "/embedding")) else 0.0
            values[path] = value - rate * (change + decay * value)
    return values
