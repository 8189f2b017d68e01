"""One pure train step for every stage and objective."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from llm3.data.batch import Batch
from llm3.distributed.sharding import sum_over_data
from llm3.objectives import Sums
from llm3.training.guard import Guard, judge

LossFunction = Callable[[Any, Batch, jax.Array], Sums]


class TrainState(NamedTuple):
    """step: int32 scalar. trainable, frozen: segmented trees of parameters. opt: optax state of the trainable tree.

    guard: the guard's memory of the steps before.
    """

    step: jax.Array
    trainable: dict
    frozen: dict
    opt: Any
    guard: Guard


def _over_micro_batches(
    gradient: Callable, micro_batches: int, trainable: dict, frozen: dict, key: jax.Array, batch: Batch
) -> tuple[dict, Sums]:
    """The sums of `gradient` over a batch, one micro-batch after another."""
    # strided, so that each device keeps its own rows
    cut = jax.tree.map(lambda x: x.reshape(-1, micro_batches, *x.shape[1:]).swapaxes(0, 1), batch)

    def body(total: tuple[dict, Sums], micro: tuple[Batch, jax.Array]) -> tuple[tuple[dict, Sums], None]:
        part = gradient(trainable, frozen, micro[0], micro[1])
        return jax.tree.map(jnp.add, total, part), None

    keys = jax.random.split(key, micro_batches)
    shapes = jax.eval_shape(gradient, trainable, frozen, jax.tree.map(lambda x: x[0], cut), key)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(body, zeros, (cut, keys))[0]


def _make_gradients(
    graph: nnx.GraphDef, loss: LossFunction, micro_batches: int
) -> Callable[[TrainState, Batch, jax.Array], tuple[dict, Sums]]:
    """summed(state, batch, key) -> (gradients of the trainable tree, sums of the loss), both summed over the batch."""

    def sums(trainable: dict, frozen: dict, batch: Batch, key: jax.Array) -> tuple[jax.Array, Sums]:
        result = loss(nnx.merge(graph, trainable, frozen), batch, key)
        return result.loss, result

    gradient = jax.grad(sums, has_aux=True)
    # jitted, so that its shapes and the loop over it need a single trace
    accumulated = partial(_over_micro_batches, jax.jit(gradient, inline=True), micro_batches)

    def summed(state: TrainState, batch: Batch, key: jax.Array) -> tuple[dict, Sums]:
        if micro_batches == 1:
            return gradient(state.trainable, state.frozen, batch, key)
        return sum_over_data(accumulated, (state.trainable, state.frozen), key, batch)

    return summed


# the metrics of a step besides those of the objective
STEP_METRICS = ("loss", "grad_norm", "weight", "tokens", "skipped", "new_level", "non_finite_in_a_row")


def make_train_step(
    graph: nnx.GraphDef,
    loss: LossFunction,
    transform: optax.GradientTransformation,
    *,
    seed: int,
    micro_batches: int = 1,
    deviations: float = 0.0,
    accept_after: int = 8,
    restarts: tuple[int, ...] = (),
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """train_step(state, batch) -> (state, metrics); jit it with the state donated.

    Only the trainable tree gets gradients, summed over `micro_batches` and divided once by the global sum of weights.
    The random key is folded from (seed, step), so a resumed run draws the same keys. A skipped step (see `judge`, also
    for `deviations` and `accept_after`) changes neither parameters nor moments nor the schedule. restarts: the steps
    before which the guard's window starts anew.

    metrics: float32 scalars loss (nats per unit weight), grad_norm, weight, tokens, skipped, new_level (of the guard),
    non_finite_in_a_row, and the metrics of the objective.
    """

    summed = _make_gradients(graph, loss, micro_batches)
    judged = partial(judge, deviations=deviations, accept_after=accept_after)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        # for products of the objective and of the update rule, such as Muon's; the kernels set their own
        with jax.default_matmul_precision("float32"):
            gradients, total = summed(state, batch, key)
            scale = 1 / jnp.where(total.weight > 0, total.weight, 1)
            gradients = jax.tree.map(lambda g: g * scale, gradients)
            updates, opt = transform.update(gradients, state.opt, state.trainable)
        norm, mean = optax.tree.norm(gradients), total.loss * scale
        restart = jnp.isin(state.step, jnp.asarray(restarts, jnp.int32))
        verdict, guard = judged(state.guard, mean, norm, total.weight, restart=restart)
        keep = lambda new, old: jnp.where(verdict.accept, new, old)  # noqa: E731
        trainable = jax.tree.map(keep, optax.apply_updates(state.trainable, updates), state.trainable)
        metrics = {name: value * scale for name, value in total.metrics.items()} | {
            "loss": mean,
            "grad_norm": norm,
            "weight": total.weight,
            "tokens": jnp.sum(batch.segments > 0).astype(jnp.float32),
            "skipped": 1.0 - verdict.accept,
            "new_level": verdict.new_level.astype(jnp.float32),
            "non_finite_in_a_row": guard.in_a_row.astype(jnp.float32),
        }
        return TrainState(state.step + 1, trainable, state.frozen, jax.tree.map(keep, opt, state.opt), guard), metrics

    return train_step
