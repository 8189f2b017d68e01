"""The guard skips steps whose loss or gradient is not finite or spikes.

Its memory is part of the train state: saved and restored with it, and the same on every process.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Guard(NamedTuple):
    """window: float32 [W, 2], losses and gradient norms of the last accepted steps; None: spikes are not checked.

    taken: int32, number of accepted steps since the window began. in_a_row: int32, number of non-finite steps since the
    last accepted one, spikes: int32, number of spikes since then, or None without a window. Steps without labels count
    toward none of them.
    """

    window: jax.Array | None
    taken: jax.Array
    in_a_row: jax.Array
    spikes: jax.Array | None


class Verdict(NamedTuple):
    """accept: whether to apply the update of a step. new_level: whether it was a spike that is accepted as a new level.

    Both are bool scalars.
    """

    accept: jax.Array
    new_level: jax.Array


def new_guard(deviations: float, window: int) -> Guard:
    """A guard before the first step."""
    recent = jnp.zeros((window, 2), jnp.float32) if deviations else None
    zero = jnp.zeros((), jnp.int32)
    return Guard(recent, zero, zero, zero if deviations else None)


def judge(
    guard: Guard,
    loss: jax.Array,
    norm: jax.Array,
    weight: jax.Array,
    *,
    deviations: float,
    accept_after: int,
    restart: jax.Array,
) -> tuple[Verdict, Guard]:
    """The verdict on a step, and the guard after it.

    A spike is a loss or a gradient norm more than `deviations` standard deviations above the mean of a full window, as
    in OLMo 2 (2024, section 3.2). Skipped steps do not enter the window. The window starts anew
    - before a step with `restart` (bool scalar): its loss or gradient cannot be compared with those before, and
    - with the spike number `accept_after` since the last accepted step: a level that lasts is no spike. It is accepted.
    A step without labels (weight 0) is skipped too, but counts neither as a spike nor as non-finite.
    """
    finite, counts = jnp.isfinite(loss) & jnp.isfinite(norm), weight > 0
    bad = counts & ~finite
    if guard.window is None or guard.spikes is None:
        accept, new_level = finite & counts, jnp.zeros((), bool)
        in_a_row = jnp.where(accept, 0, guard.in_a_row + bad)
        return Verdict(accept, new_level), guard._replace(taken=guard.taken + accept, in_a_row=in_a_row)
    window, taken = guard.window, jnp.where(restart, 0, guard.taken)
    latest = jnp.stack([loss, norm]).astype(jnp.float32)
    highest = window.mean(axis=0) + deviations * window.std(axis=0)
    spike = finite & counts & (taken >= len(window)) & jnp.any(latest > highest)
    new_level = spike & (guard.spikes + 1 >= accept_after)
    accept = finite & counts & (new_level | ~spike)
    taken = jnp.where(new_level, 0, taken)
    window = jnp.where(accept, window.at[taken % len(window)].set(latest), window)
    in_a_row, spikes = (
        jnp.where(accept, 0, before + one) for before, one in ((guard.in_a_row, bad), (guard.spikes, spike))
    )
    return Verdict(accept, new_level), Guard(window, taken + accept, in_a_row, spikes)
