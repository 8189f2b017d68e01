"""The guard skips steps whose loss or gradient is not finite or spikes.

Its memory is part of the train state: saved and restored with it, and the same on every process.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Guard(NamedTuple):
    """window: float32 [W, 2], losses and gradient norms of the last accepted steps; None: spikes are not checked.

    taken: int32, number of accepted steps. in_a_row: int32, number of steps skipped since the last accepted one, not
    counting steps without labels.
    """

    window: jax.Array | None
    taken: jax.Array
    in_a_row: jax.Array


def new_guard(deviations: float, window: int) -> Guard:
    """A guard before the first step."""
    recent = jnp.zeros((window, 2), jnp.float32) if deviations else None
    return Guard(recent, jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))


def judge(
    guard: Guard, loss: jax.Array, norm: jax.Array, weight: jax.Array, deviations: float
) -> tuple[jax.Array, Guard]:
    """Whether to accept a step (bool scalar), and the guard after it.

    A spike is a loss or a gradient norm more than `deviations` standard deviations above the mean of a full window, as
    in OLMo 2 (2024, section 3.2). Skipped steps do not enter the window. A step without labels (weight 0) is skipped
    too, but does not count toward `in_a_row`.
    """
    healthy = jnp.isfinite(loss) & jnp.isfinite(norm)
    window = guard.window
    if window is not None:
        latest = jnp.stack([loss, norm]).astype(jnp.float32)
        highest = window.mean(axis=0) + deviations * window.std(axis=0)
        healthy &= ~((guard.taken >= len(window)) & jnp.any(latest > highest))
    accept = healthy & (weight > 0)
    if window is not None:
        window = jnp.where(accept, window.at[guard.taken % len(window)].set(latest), window)
    in_a_row = jnp.where(accept, 0, guard.in_a_row + (weight > 0))
    return accept, Guard(window, guard.taken + accept, in_a_row)
