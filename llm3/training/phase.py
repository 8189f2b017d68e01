"""A phase of a stage: its partition, optimizer and jitted step, built without allocating arrays."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.stages import Wrapped

from llm3 import objectives
from llm3.config.model_schema import ModelConfig, check_length
from llm3.config.schema import StageConfig
from llm3.data.batch import Batch
from llm3.distributed.compiler_options import step_options
from llm3.distributed.memory import check_host
from llm3.distributed.sharding import axis_size, check_batch, named, tree_shardings, whole_axis_note, with_sharding
from llm3.errors import UserError, within
from llm3.models.flops import model_flops, step_flops
from llm3.models.transformer import abstract, abstract_params
from llm3.optim.frozen import Storage, dequantized, make_storage, rounded
from llm3.optim.optimizer import Optimizer, averaged, carry_state, make_optimizer, state_shardings
from llm3.optim.partition import Partition, make_partitions
from llm3.registry import load_plugin
from llm3.segments import canonical, canonical_path
from llm3.training.guard import Guard, new_guard
from llm3.training.step import LossFunction, TrainState, make_train_step
from llm3.tree import flatten, unflatten


class Phase(NamedTuple):
    """A stage from step `first` to step `stop`, with a fixed set of trainable parameters.

    `train_step` is jitted and donates its state.
    """

    first: int
    stop: int
    batch_size: int
    model: ModelConfig
    partition: Partition
    optimizer: Optimizer
    train_step: Wrapped
    init_opt: Callable[[dict], Any]
    init_guard: Callable[[], Guard]
    storage: Storage  # how frozen parameters are stored
    abstract_params: dict  # shapes and shardings of the canonical parameters
    abstract_state: TrainState
    flops: tuple[float, float]  # model FLOPs of the forward and of the backward pass of a step
    hardware_flops_per_step: float  # also counts what the backward pass computes again
    notes: list[str]  # notes for the user about the parameters and the guard

    @property
    def flops_per_step(self) -> float:
        """Model FLOPs of a step."""
        return sum(self.flops)

    def state(self, params: dict, saved: Any = None, step: int = 0) -> TrainState:
        """The state at `step` from canonical parameters. saved: from `saved_opt`; None: a fresh optimizer."""
        trainable, frozen = self.partition.split(params)
        if saved is None:
            opt, guard = self.init_opt(trainable), self.init_guard()
        else:
            opt, guard, trainable = saved["opt"], saved["guard"], saved.get("trainable", trainable)
        count = jax.device_put(np.int32(step), self.abstract_state.step.sharding)
        return TrainState(count, trainable, self.storage.store(frozen), opt, guard)

    def trained(self, state: TrainState) -> dict:
        """The trained parameters: the optimizer's average of the weights if it keeps one, else the weights."""
        average = averaged(state.opt)
        return state.trainable if average is None else average

    def params(self, state: TrainState) -> dict:
        """The canonical parameters of a state."""
        return self.partition.join(self.trained(state), dequantized(state.frozen))

    def saved_opt(self, state: TrainState) -> Any:
        """What a checkpoint needs besides the parameters for training to resume exactly."""
        saved = {"opt": state.opt, "guard": state.guard}
        return saved | ({"trainable": state.trainable} if self._averages() else {})

    def rounded(self, params: dict) -> dict:
        """Canonical parameters, with the leaves that are stored quantized rounded to their dequantized values."""
        trainable, frozen = self.partition.split(params)
        return self.partition.join(trainable, rounded(frozen, self.storage))

    def following(self, before: "Phase", state: TrainState, base: dict) -> TrainState:
        """The state at the end of the phase `before`, with more trainable leaves, whose values come from `base`."""
        params = before.partition.join(state.trainable, before.partition.split(base)[1])
        trainable, frozen = self.partition.split(params)
        opt = carry_state(state.opt, self.init_opt(trainable))
        return TrainState(state.step, trainable, self.storage.store(frozen), opt, state.guard)

    def _averages(self) -> bool:
        return averaged(self.abstract_state.opt) is not None


@contextmanager
def _naming(where: str) -> Iterator[None]:
    """Prefix a UserError with the stage that it is about."""
    try:
        yield
    except UserError as error:
        raise within(where, error) from None


def tied_head_notes(model: ModelConfig, partition: Partition, head: str) -> list[str]:
    """A note that the LM head is tied to the embedding, if some leaves are frozen."""
    leaves = len(flatten(abstract(model, partition.segments).shapes))
    if not model.tie_embeddings or head != "lm" or len(partition.trainable) == leaves:
        return []
    if "embed/embedding" in partition.trainable:
        return ["embed/embedding is trainable, and so is the LM head, which is tied to it"]
    return ["the LM head is frozen: it is tied to embed/embedding"]


def build(
    stage: StageConfig,
    model: ModelConfig,
    mesh: Mesh,
    *,
    task: objectives.Task,
    fresh: Callable[[str], bool],
    seed: int,
    where: str,
    span: tuple[int, int] | None = None,
) -> list[Phase]:
    """The phases of a stage on a mesh, one for each step of unfreezing, without allocating arrays.

    task: the objective's arguments besides model and batch. fresh: whether a leaf, by its canonical path, comes from no
    parent. span: only the steps from one to another. Raises UserError if the stage does not fit the model or the mesh.
    """
    check_length(model, stage.sequence_length, f"{where}.sequence_length")
    check_batch(mesh, stage.batch_size, stage.sequence_length, stage.micro_batches, where)
    if model.remat == "offload":
        check_host(mesh, "config.model.remat='offload'")
    inactive = tuple(f"/lora/{name}/" for name, each in model.adapters if not each.active)
    shapes = flatten(canonical(abstract(model).shapes))
    active = unflatten({path: leaf for path, leaf in shapes.items() if not any(each in path for each in inactive)})
    with _naming(f"{where}.train"):
        phases = make_partitions(active, stage.train, stage.unfreeze, model.layers)
    leaves = flatten(abstract(model, phases[0].segments).shapes)
    if stage.frozen != "float32" and len(phases[0].trainable) == len(leaves):
        raise UserError(f"{where}.frozen={stage.frozen!r}: nothing is frozen")
    if stage.frozen_memory == "host":
        check_host(mesh, f"{where}.frozen_memory='host'")
        if model.remat == "none":
            raise UserError(f"{where}.frozen_memory='host': needs model.remat: the backward pass would keep all layers")
    for name in (name for name, each in model.adapters if each.active):
        own = [path for path in flatten(active) if f"/lora/{name}/" in path]
        trainable = any(f"/lora/{name}/" in path for path in list(phases.values())[-1].trainable)
        if own and all(fresh(path) for path in own) and not trainable:
            raise UserError(f"{where}.adapters.{name}: it is new, and no rule of train={stage.train!r} trains it")
    groups = None
    if len(phases) > 1:
        order = list(phases.values())
        groups = {path: [path in each.trainable for each in order].index(True) for path in order[-1].trainable}
    low, high = span or (0, stage.steps)
    bounds = [min(max(step, low), high) for step in (*phases, stage.steps)]
    return [
        _phase(stage, model, mesh, partition, groups, (first, stop), task=task, fresh=fresh, seed=seed, where=where)
        for partition, (first, stop) in zip(phases.values(), itertools.pairwise(bounds), strict=True)
        if first < stop
    ]


def guard_restarts(stage: StageConfig) -> tuple[int, ...]:
    """The steps from which losses and gradients cannot be compared with those before, in order.

    Each phase of `unfreeze` and each mixture of `data_schedule` begins at one.
    """
    return tuple(sorted({step for step, _ in [*stage.unfreeze, *stage.data_schedule]}))


def guard_notes(stage: StageConfig, steps: tuple[int, int]) -> list[str]:
    """A note if the guard's window is never full between these steps, so that it cannot detect a spike."""
    first, stop = steps
    cuts = [first, *(step for step in guard_restarts(stage) if first < step < stop), stop]
    longest = max(later - earlier for earlier, later in itertools.pairwise(cuts))
    if not stage.guard.deviations or longest > stage.guard.window:
        return []
    return [f"the guard sees no spikes here: guard.window={stage.guard.window} is never full in {longest} steps"]


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
    with _naming(where):
        storage = _storage(stage, model, frozen, frozen_shardings)
        placed = with_sharding(trainable, trainable_shardings)
        optimizer = _optimizer(stage, model, partition, placed, groups, fresh)
    empty_guard = partial(new_guard, stage.guard.deviations, stage.guard.window)
    abstract_state = _abstract_state(mesh, (trainable, trainable_shardings), storage, optimizer, empty_guard)
    step = _train_step(stage, cut.graph, partial(objective.loss, task=task), optimizer, seed)
    options, shardings_of_results = step_options(mesh), (_shardings(abstract_state), named(mesh))
    head = "task" if objective.HEAD else "lm"
    cost = (model, stage.batch_size, stage.sequence_length, head, partition.segments, partition.trainable)
    return Phase(
        first=steps[0],
        stop=steps[1],
        batch_size=stage.batch_size,
        model=model,
        partition=partition,
        optimizer=optimizer,
        train_step=jax.jit(
            step, donate_argnums=0, out_shardings=shardings_of_results, compiler_options=options.used or None
        ),
        init_opt=jax.jit(optimizer.transform.init, out_shardings=_shardings(abstract_state.opt)),
        init_guard=jax.jit(empty_guard, out_shardings=named(mesh)),
        storage=storage,
        abstract_params=abstract_params(model, mesh),
        abstract_state=abstract_state,
        flops=model_flops(*cost),
        hardware_flops_per_step=sum(
            step_flops(*cost, context=axis_size(mesh, "length"), vocab=axis_size(mesh, "vocab"))
        ),
        notes=[
            *tied_head_notes(model, partition, head),
            *whole_axis_note(mesh, "kv_heads", model.kv_heads),
            *guard_notes(stage, steps),
            *options.notes,
        ],
    )


def _storage(stage: StageConfig, model: ModelConfig, frozen: dict, shardings: dict) -> Storage:
    """How the frozen parameters of a phase are stored."""
    dora = frozenset(name for _, each in model.adapters if each.active and each.dora for name in each.targets)
    in_host = stage.frozen_memory == "host"
    return make_storage(frozen, shardings, stage.frozen, model.compute_dtype, dora, in_host)


def _optimizer(
    stage: StageConfig,
    model: ModelConfig,
    partition: Partition,
    trainable: dict,
    groups: dict[str, int] | None,
    fresh: Callable[[str], bool],
) -> Optimizer:
    """The optimizer of a phase. groups: see `make_optimizer`. fresh: see `build`."""
    new = frozenset(path for path in partition.trainable if fresh(canonical_path(path)))
    return make_optimizer(
        trainable, steps=stage.steps, layers=model.layers, fresh=new, groups=groups, **vars(stage.optimizer)
    )


def _train_step(
    stage: StageConfig, graph: nnx.GraphDef, loss: LossFunction, optimizer: Optimizer, seed: int
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """The step of a phase, to be jitted."""
    return make_train_step(
        graph,
        loss,
        optimizer.transform,
        seed=seed,
        micro_batches=stage.micro_batches,
        deviations=stage.guard.deviations,
        accept_after=stage.guard.accept_after,
        restarts=guard_restarts(stage),
    )


def _abstract_state(
    mesh: Mesh,
    trainable: tuple[dict, dict],
    storage: Storage,
    optimizer: Optimizer,
    empty_guard: Callable[[], Guard],
) -> TrainState:
    """The shapes and shardings of a phase's state. trainable: shapes and shardings of the trainable tree."""
    opt, guard = jax.eval_shape(optimizer.transform.init, trainable[0]), jax.eval_shape(empty_guard)
    return TrainState(
        with_sharding(jax.ShapeDtypeStruct((), jnp.int32), named(mesh)),
        with_sharding(*trainable),
        storage.abstract,
        with_sharding(opt, state_shardings(opt, *trainable, named(mesh))),
        with_sharding(guard, jax.tree.map(lambda _: named(mesh), guard)),
    )


def _shardings(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.sharding, tree)
