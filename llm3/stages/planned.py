"""A stage before there are texts or devices: its model, its trainers on any mesh, and the shapes of its batch."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from llm3 import objectives
from llm3.config.schema import ModelConfig, RunConfig, StageConfig
from llm3.data.batch import Batch
from llm3.distributed.sharding import named
from llm3.handoff.parent import INIT, read_start
from llm3.objectives import Task
from llm3.training.phase import Trainer, build


def stage_task(stage: StageConfig, where: str) -> Task:
    """What the objective is given besides batches, without a tokenizer."""
    options = objectives.read_options(objectives.load(stage.objective_name), stage.objective_options, where)
    return Task(options, None, stage.sequence_length)


def stage_model(config: RunConfig, name: str, dtype: str) -> ModelConfig:
    """The model of a stage as its config alone tells it. dtype: in which it computes where the config says "auto".

    The vocabulary is as large as `tokenizer.vocab_size` says; of a head for labels, which only texts tell, one class is
    counted.
    """
    stage, where = config.stages[name], f"config.stages.{name}"
    peer = objectives.load(stage.objective_name)
    most = peer.most(stage_task(stage, where)) if hasattr(peer, "most") and config.mesh.context == 1 else 0
    return replace(
        config.model,
        vocab_size=config.tokenizer.vocab_size + len(config.tokenizer.add),
        classes=1 if peer.HEAD == "labels" else len(peer.HEAD),
        compute_dtype=dtype if config.model.compute_dtype == "auto" else config.model.compute_dtype,
        adapters=tuple(stage.adapters.items()),
        read_out=most,
    )


def stage_trainers(config: RunConfig, name: str, stage: StageConfig, model: ModelConfig, mesh: Mesh) -> list[Trainer]:
    """The trainers of a stage (or of a variant of it) on a mesh, which may be abstract. Raises UserError."""
    where = f"config.stages.{name}"
    start = read_start(stage.start, None, f"{where}.start")

    def fresh(path: str) -> bool:
        from_nothing = start is None or start.stage == INIT
        return from_nothing or any(re.fullmatch(rule, path) for rule in start.fresh)

    return build(stage, model, mesh, task=stage_task(stage, where), fresh=fresh, seed=0, where=where)


def abstract_batch(stage: StageConfig, mesh: Mesh | None) -> Batch:
    """The shapes of a stage's batch; without a mesh, not sharded."""
    sharding = None if mesh is None else named(mesh, "batch", "length")
    shape = (stage.batch_size, stage.sequence_length)
    kinds = {"weights": jnp.float32}
    return Batch(
        *(jax.ShapeDtypeStruct(shape, kinds.get(name, jnp.int32), sharding=sharding) for name in Batch._fields)
    )
