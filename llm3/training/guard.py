"""Which steps are left out: those whose loss or gradient is not finite, and spikes of either.

All that the guard remembers is a part of the train state: it is saved and restored with it, and is the same on every
process.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Guard(NamedTuple):
    """window: float32 [W, 2], losses and gradient norms of the last steps that were taken; None: spikes are taken too.

    taken: int32, how many steps were. in_a_row: int32, how many were left out since, those without any label apart.
    """

    window: jax.Array | None
    taken: jax.Array
    in_a_row: jax.Array


def new_guard(deviations: float, window: int) -> Guard:
    """A guard that has seen nothing."""
    kept = jnp.zeros((window, 2), jnp.float32) if deviations else None
    return Guard(kept, jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))


def judge(
    guard: Guard, loss: jax.Array, norm: jax.Array, weight: jax.Array, deviations: float
) -> tuple[jax.Array, Guard]:
    """Whether a step is to be taken, bool scalar, and the guard after it.

    A spike is a loss or a gradient norm more than `deviations` standard deviations above the mean of a full window, as
    in OLMo 2 (2024, section 3.2). A step that is left out does not enter the window. One without any label (weight 0)
    has nothing to learn from: it is not taken either, and says nothing of the run.
    """
    good = jnp.isfinite(loss) & jnp.isfinite(norm)
    window = guard.window
    if window is not None:
        seen = jnp.stack([loss, norm]).astype(jnp.float32)
        highest = window.mean(axis=0) + deviations * window.std(axis=0)
        good &= ~((guard.taken >= len(window)) & jnp.any(seen > highest))
    take = good & (weight > 0)
    if window is not None:
        window = jnp.where(take, window.at[guard.taken % len(window)].set(seen), window)
    in_a_row = jnp.where(take, 0, guard.in_a_row + (weight > 0))
    return take, Guard(window, guard.taken + take, in_a_row)
