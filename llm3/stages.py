"""The three stages side by side: each one's laws, and the trainer that all of them share."""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llm3 import evals, objectives, optim
from llm3 import partition as partitions
from llm3.config import ModelConfig, RunConfig, StageConfig
from llm3.errors import UserError, nearest
from llm3.flops import step_flops
from llm3.handoff import INIT
from llm3.models.transformer import abstract, canonical
from llm3.sharding import check_batch, named, tree_shardings
from llm3.step import TrainState, make_train_step
from llm3.tree import flatten


def pretrain(stage: StageConfig, where: str) -> None:
    """Builds general knowledge from unlabelled text, from nothing."""
    if stage.start is not None:
        raise UserError(f"{where}.start={stage.start!r}: a pretrain stage starts from nothing; did you mean posttrain?")
    if objectives.load(stage.objective).LABELLED:
        raise UserError(f"{where}.objective={stage.objective!r}: a pretrain stage learns from unlabelled text")
    if stage.train != "all":
        raise UserError(f"{where}.train={stage.train!r}: a pretrain stage trains 'all'")


def posttrain(stage: StageConfig, where: str) -> None:
    """Adds a domain, from a parent."""
    if stage.start is None:
        raise UserError(f"{where}.start: a posttrain stage needs a parent: start='pretrain', or dict(run=, stage=)")


def finetune(stage: StageConfig, where: str) -> None:
    """Fits one task with few labels, from a parent; as a baseline, from the untrained model."""
    if stage.start is None:
        raise UserError(f"{where}.start: a finetune stage needs a parent: start='posttrain', or dict(run=, stage=)")
    if not objectives.load(stage.objective).LABELLED:
        raise UserError(f"{where}.objective={stage.objective!r}: a finetune stage fits a labelled task (classify)")


LAWS: dict[str, Callable[[StageConfig, str], None]] = {
    "pretrain": pretrain,
    "posttrain": posttrain,
    "finetune": finetune,
}


def parent_name(stage: StageConfig) -> str | None:
    """The stage of the same run that this one starts from, if any."""
    if isinstance(stage.start, dict):
        return None if stage.start.get("run") else stage.start.get("stage")
    return stage.start


def _known(field: str, name: str, options: Collection[str]) -> None:
    if name not in options:
        raise UserError(f"{field}={name!r}: {nearest(name, options)}")


def parent_label(stage: StageConfig) -> str:
    """What a stage starts from, in a word: "init", a stage of the same run, or RUN/STAGE."""
    if isinstance(stage.start, dict) and stage.start.get("run"):
        return f"{stage.start['run']}/{stage.start['stage']}"
    return parent_name(stage) or INIT


def check(config: RunConfig) -> list[str]:
    """Hold every stage to its laws; the names of the stages, parents first. Raises UserError."""
    stages, ordered = config.stages, []
    if not stages:
        raise UserError("config.stages is empty: expected {name: stage}")
    for name, evaluation in config.evaluations.items():
        where = f"config.evaluations.{name}"
        _known(f"{where}.kind", evaluation.kind, evals.names())
        _known(f"{where}.source", evaluation.source, config.sources)
    for name, stage in stages.items():
        where = f"config.stages.{name}"
        if name == INIT or "/" in name:
            raise UserError(f"{where}: {name!r} cannot be a stage's name")
        _known(f"{where}.objective", stage.objective, objectives.names())
        for source in stage.data:
            _known(f"{where}.data", source, config.sources)
        rules = [stage.train] if isinstance(stage.train, str) else stage.train
        if not (isinstance(rules, list | tuple) and rules and all(isinstance(rule, str) for rule in rules)):
            raise UserError(f"{where}.train={stage.train!r}: expected a rule, or a list of rules")
        LAWS[stage.kind](stage, where)
        parent = parent_name(stage)
        if parent == INIT and not stage.baseline:
            raise UserError(f"{where}.start='{INIT}': only a baseline (baseline=True) starts from the untrained model")
        if parent not in (None, INIT, *stages):
            raise UserError(f"{where}.start={parent!r}: no such stage in this config; {nearest(parent, stages)}")
    while len(ordered) < len(stages):
        ready = [n for n in stages if n not in ordered and parent_name(stages[n]) in (None, INIT, *ordered)]
        if not ready:
            rest = sorted(set(stages) - set(ordered))
            raise UserError(f"config.stages: {', '.join(rest)} start from one another in a circle")
        # a stage of the main chain goes before the baselines
        ordered.append(min(ready, key=lambda n: (stages[n].baseline, list(LAWS).index(stages[n].kind), n)))
    return ordered


def chosen(config: RunConfig, names: list[str] | None) -> list[str]:
    """The stages to run, parents first. Raises UserError for one that the config does not have."""
    order = check(config)
    for name in names or ():
        if name not in order:
            raise UserError(f"--stages={name}: no such stage; {nearest(name, order)}")
    return [name for name in order if not names or name in names]


class Trainer(NamedTuple):
    """All that a stage runs with. `train_step` is jitted, its state donated."""

    model: ModelConfig
    partition: partitions.Partition
    optimizer: optim.Optimizer
    train_step: Callable
    init_opt: Callable[[dict], Any]
    abstract_params: dict  # canonical shapes with shardings
    abstract_state: TrainState
    flops_per_step: float
    notes: list[str]  # what a user may not expect of what trains

    def state(self, params: dict, opt: Any = None, step: int = 0) -> TrainState:
        """The state at `step` from canonical parameters, with a fresh optimizer unless `opt` is given."""
        trainable, frozen = self.partition.split(params)
        opt = self.init_opt(trainable) if opt is None else opt
        return TrainState(jax.device_put(np.int32(step), self.abstract_state.step.sharding), trainable, frozen, opt)

    def params(self, state: TrainState) -> dict:
        """The canonical parameters of a state."""
        return self.partition.join(state.trainable, state.frozen)


def with_sharding(shapes: Any, shardings: Any) -> Any:
    """Shapes that carry their shardings."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


@contextmanager
def _inside(where: str) -> Iterator[None]:
    """Say which stage a UserError is about."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def tied_notes(model: ModelConfig, partition: partitions.Partition, head: str) -> list[str]:
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


def build(stage: StageConfig, model: ModelConfig, mesh: Mesh, *, seed: int, where: str) -> Trainer:
    """The trainer of a stage on a mesh, without allocating anything. Raises UserError for what does not fit."""
    check_batch(mesh, stage.batch_size, stage.micro_batches, where)
    objective = objectives.load(stage.objective)
    whole = abstract(model)
    shapes, axes = canonical(whole.shapes), canonical(whole.axes)
    shardings = tree_shardings(mesh, shapes, axes)
    with _inside(f"{where}.train"):
        partition = partitions.make(shapes, stage.train, model.layers)
    cut = abstract(model, partition.segments)
    trainable, frozen = partition.divide(cut.shapes)
    trainable_shardings, frozen_shardings = partition.divide(tree_shardings(mesh, cut.shapes, cut.axes))
    with _inside(where):
        optimizer = optim.make(trainable, steps=stage.steps, **vars(stage.optimizer))
    opt = jax.eval_shape(optimizer.transform.init, trainable)
    opt_shardings = optim.state_shardings(opt, trainable, trainable_shardings, named(mesh))
    abstract_state = TrainState(
        jax.ShapeDtypeStruct((), jnp.int32, sharding=named(mesh)),
        with_sharding(trainable, trainable_shardings),
        with_sharding(frozen, frozen_shardings),
        with_sharding(opt, opt_shardings),
    )
    state_shardings = jax.tree.map(lambda x: x.sharding, abstract_state)
    step = make_train_step(cut.graph, objective.loss, optimizer.transform, seed=seed, micro_batches=stage.micro_batches)
    head = "task" if objective.NEEDS_HEAD else "lm"
    return Trainer(
        model=model,
        partition=partition,
        optimizer=optimizer,
        train_step=jax.jit(step, donate_argnums=0, out_shardings=(state_shardings, named(mesh))),
        init_opt=jax.jit(optimizer.transform.init, out_shardings=opt_shardings),
        abstract_params=with_sharding(shapes, shardings),
        abstract_state=abstract_state,
        flops_per_step=step_flops(
            model, stage.batch_size, stage.sequence_length, head, partition.segments, partition.trainable
        ),
        notes=tied_notes(model, partition, head),
    )
