"""What a stage runs with: its partition, optimizer and jitted step, built without allocating anything."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from llm3 import objectives
from llm3.config.schema import ModelConfig, StageConfig
from llm3.distributed.sharding import axis_size, check_batch, named, tree_shardings, with_sharding
from llm3.errors import UserError
from llm3.models.flops import step_flops
from llm3.models.transformer import abstract, abstract_params
from llm3.optim.frozen import Storage, dequantized, make_storage, rounded
from llm3.optim.optimizer import Optimizer, averaged, carry_state, make_optimizer, state_shardings
from llm3.optim.partition import Partition, make_partitions
from llm3.registry import load_plugin
from llm3.segments import canonical, canonical_path
from llm3.training.guard import Guard, new_guard
from llm3.training.step import TrainState, make_train_step
from llm3.tree import flatten, unflatten


class Phase(NamedTuple):
    """All that a stage runs with from step `first` to step `stop`. `train_step` is jitted, its state donated."""

    first: int
    stop: int
    model: ModelConfig
    partition: Partition
    optimizer: Optimizer
    train_step: Callable
    init_opt: Callable[[dict], Any]
    init_guard: Callable[[], Guard]
    storage: Storage  # of what is frozen
    abstract_params: dict  # canonical shapes with shardings
    abstract_state: TrainState
    flops: tuple[float, float]  # of a step, forward and backward
    notes: list[str]  # what a user may not expect of what trains

    @property
    def flops_per_step(self) -> float:
        return sum(self.flops)

    def state(self, params: dict, saved: Any = None, step: int = 0) -> TrainState:
        """The state at `step` from canonical parameters; saved: as `saved_opt` gave it, None: a fresh optimizer."""
        trainable, frozen = self.partition.split(params)
        if saved is None:
            opt, guard = self.init_opt(trainable), self.init_guard()
        else:
            opt, guard, trainable = saved["opt"], saved["guard"], saved.get("trainable", trainable)
        count = jax.device_put(np.int32(step), self.abstract_state.step.sharding)
        return TrainState(count, trainable, self.storage.store(frozen), opt, guard)

    def trained(self, state: TrainState) -> dict:
        """What the trainable tree has become: the running mean of its weights where the optimizer keeps one."""
        mean = averaged(state.opt)
        return state.trainable if mean is None else mean

    def params(self, state: TrainState) -> dict:
        """The canonical parameters that a state stands for."""
        return self.partition.join(self.trained(state), dequantized(state.frozen))

    def saved_opt(self, state: TrainState) -> Any:
        """What a checkpoint needs besides the parameters, so that training goes on as if it had not stopped."""
        saved = {"opt": state.opt, "guard": state.guard}
        return saved | ({"trainable": state.trainable} if self._averages() else {})

    def rounded(self, params: dict) -> dict:
        """Canonical parameters with the leaves that are stored quantised replaced by what their codes stand for."""
        trainable, frozen = self.partition.split(params)
        return self.partition.join(trainable, rounded(frozen, self.storage))

    def following(self, before: "Phase", state: TrainState, base: dict) -> TrainState:
        """The state of the phase `before`, with more leaves that train from here on; base: where these come from."""
        params = before.partition.join(state.trainable, before.partition.split(base)[1])
        trainable, frozen = self.partition.split(params)
        opt = carry_state(state.opt, self.init_opt(trainable))
        return TrainState(state.step, trainable, self.storage.store(frozen), opt, state.guard)

    def _averages(self) -> bool:
        return averaged(self.abstract_state.opt) is not None


@contextmanager
def _inside(where: str) -> Iterator[None]:
    """Say which stage a UserError is about."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def tied_head_notes(model: ModelConfig, partition: Partition, head: str) -> list[str]:
    """That the LM head is the embedding, where some leaves are frozen and the two might be taken for separate."""
    every = len(flatten(abstract(model, partition.segments).shapes))
    if not model.tie_embeddings or head != "lm" or len(partition.trainable) == every:
        return []
    trains = "embed/embedding" in partition.trainable
    return [
        "embed/embedding trains, and with it the LM head, which is tied to it"
        if trains
        else "the LM head is frozen: it is tied to embed/embedding"
    ]


def build(
    stage: StageConfig,
    model: ModelConfig,
    mesh: Mesh,
    *,
    task: objectives.Task,
    fresh: Callable[[str], bool],
    seed: int,
    where: str,
) -> list[Phase]:
    """The phases of a stage on a mesh, one for each phase of unfreezing, without allocating anything.

    task: what the objective is given besides batches. fresh: whether a leaf, by its canonical path, comes from no
    parent. Raises UserError for what does not fit.
    """
    check_batch(mesh, stage.batch_size, stage.sequence_length, stage.micro_batches, where)
    idle = tuple(f"/lora/{name}/" for name, each in model.adapters if not each.active)
    shapes = flatten(canonical(abstract(model).shapes))
    at_work = unflatten({path: leaf for path, leaf in shapes.items() if not any(each in path for each in idle)})
    with _inside(f"{where}.train"):
        phases = make_partitions(at_work, stage.train, stage.unfreeze, model.layers)
    leaves = flatten(abstract(model, phases[0].segments).shapes)
    if stage.frozen != "float32" and len(phases[0].trainable) == len(leaves):
        raise UserError(f"{where}.frozen={stage.frozen!r}: nothing is frozen")
    for name in (name for name, each in model.adapters if each.active):
        own = [path for path in flatten(at_work) if f"/lora/{name}/" in path]
        trains = any(f"/lora/{name}/" in path for path in list(phases.values())[-1].trainable)
        if own and all(fresh(path) for path in own) and not trains:
            raise UserError(f"{where}.adapters.{name}: it is new, and no rule of train={stage.train!r} trains it")
    groups = None
    if len(phases) > 1:
        order = list(phases.values())
        groups = {path: [path in each.trainable for each in order].index(True) for path in order[-1].trainable}
    starts = list(phases)
    return [
        _phase(stage, model, mesh, partition, groups, (first, stop), task=task, fresh=fresh, seed=seed, where=where)
        for (first, partition), stop in zip(phases.items(), [*starts[1:], stage.steps], strict=True)
    ]


def _phase(
    stage: StageConfig,
    model: ModelConfig,
    mesh: Mesh,
    partition: Partition,
    groups: dict[str, int] | None,
    steps: tuple[int, int],
    *,
    task: objectives.Task,
    fresh: Callable[[str], bool],
    seed: int,
    where: str,
) -> Phase:
    objective = load_plugin(objectives, stage.objective_name)
    cut = abstract(model, partition.segments)
    shardings = tree_shardings(mesh, cut.shapes, cut.axes)
    trainable, frozen = partition.divide(cut.shapes)
    trainable_shardings, frozen_shardings = partition.divide(shardings)
    new = frozenset(path for path in partition.trainable if fresh(canonical_path(path)))
    shape = {"steps": stage.steps, "layers": model.layers, "fresh": new, "groups": groups}
    with _inside(where):
        dora = frozenset(name for _, each in model.adapters if each.active and each.dora for name in each.targets)
        storage = make_storage(frozen, frozen_shardings, stage.frozen, model.compute_dtype, dora)
        optimizer = make_optimizer(trainable, **shape, **vars(stage.optimizer))
    opt = jax.eval_shape(optimizer.transform.init, trainable)
    opt_shardings = state_shardings(opt, trainable, trainable_shardings, named(mesh))
    empty_guard = partial(new_guard, stage.guard.deviations, stage.guard.window)
    guard = jax.eval_shape(empty_guard)
    abstract_state = TrainState(
        jax.ShapeDtypeStruct((), jnp.int32, sharding=named(mesh)),
        with_sharding(trainable, trainable_shardings),
        storage.abstract,
        with_sharding(opt, opt_shardings),
        with_sharding(guard, jax.tree.map(lambda _: named(mesh), guard)),
    )
    loss = partial(objective.loss, task=task)
    step = make_train_step(
        cut.graph,
        loss,
        optimizer.transform,
        seed=seed,
        micro_batches=stage.micro_batches,
        deviations=stage.guard.deviations,
    )
    head = "task" if objective.HEAD else "lm"
    size = (stage.batch_size, stage.sequence_length, head)
    return Phase(
        first=steps[0],
        stop=steps[1],
        model=model,
        partition=partition,
        optimizer=optimizer,
        train_step=jax.jit(step, donate_argnums=0, out_shardings=(_shardings(abstract_state), named(mesh))),
        init_opt=jax.jit(optimizer.transform.init, out_shardings=opt_shardings),
        init_guard=jax.jit(empty_guard, out_shardings=named(mesh)),
        storage=storage,
        abstract_params=abstract_params(model, mesh),
        abstract_state=abstract_state,
        flops=step_flops(model, *size, partition.segments, partition.trainable, context=axis_size(mesh, "length")),
        notes=tied_head_notes(model, partition, head),
    )


def _shardings(state: TrainState) -> NamedSharding:
    return jax.tree.map(lambda x: x.sharding, state)
