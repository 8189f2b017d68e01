"""A stage, resolved once: from the config and its data or, for a plan, from the config alone."""

import hashlib
import re
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llm3 import objectives
from llm3.checkpoints.commit import saved_steps
from llm3.config.schema import ModelConfig, RunConfig, StageConfig
from llm3.data.batch import Batch
from llm3.data.library import Library
from llm3.data.packing import Windows
from llm3.data.tokenizer import Tokenizer
from llm3.distributed.sharding import axis_size, named
from llm3.errors import UserError
from llm3.files import CHECKPOINTS, INIT
from llm3.handoff.start import AnyStart, Start, read_start
from llm3.models.attention.choice import Call
from llm3.models.attention.of_layers import attention_notes, calls_of
from llm3.objectives import Task
from llm3.registry import load_plugin, read_options
from llm3.stages.amendments import REPLAYED, history, with_amendments
from llm3.stages.model import has_lm_head, init_model, planned_vocabulary, vocabulary_size
from llm3.stages.records import read_amendments, read_record
from llm3.stages.stage_data import StageData, read_data
from llm3.stages.workdir import stage_record
from llm3.training.phase import Phase, build


@dataclass(frozen=True)
class Stage:
    """One stage, resolved; code below takes this object instead of looking a stage up by name.

    task: the objective's arguments besides model and batch. seed: seed of the data order and dropout. given_seed: the
    seed in the config. labels: the outputs of the task head. lm_head: whether an LM head was trained, or is untrained
    like the rest of the model. record: the part of the config that decides the result. history: pairs (first step, the
    config of the steps from there on), the last with `config`, one for each amendment. read: the training data; None in
    a plan without data.
    """

    name: str
    config: StageConfig
    model: ModelConfig
    objective: ModuleType
    task: Task
    start: AnyStart | None
    seed: int
    given_seed: int
    labels: list[str]
    record: dict
    lm_head: bool = True
    history: list[tuple[int, StageConfig]] = field(default_factory=list)
    read: StageData | None = None

    @property
    def data(self) -> StageData:
        """The training data. A stage that was planned from the config alone has none."""
        assert self.read is not None, f"{self.where} was planned without its data"
        return self.read

    @property
    def where(self) -> str:
        """The name of the stage in error messages."""
        return f"config.stages.{self.name}"

    @property
    def head(self) -> str:
        """The head that the loss reads: "task" or "lm"."""
        return "task" if self.objective.HEAD else "lm"

    @property
    def step_tokens(self) -> int:
        """Positions per batch, including padding."""
        return self.config.batch_size * self.config.sequence_length

    @property
    def fresh_seed(self) -> int:
        """The seed of the fresh leaves of this stage."""
        return folded_seed(self.given_seed, INIT)

    def is_fresh(self, path: str) -> bool:
        """Whether a canonical leaf is initialized instead of loaded from a parent."""
        start = self.start
        if start is None or (isinstance(start, Start) and start.stage == INIT):
            return True
        return any(re.fullmatch(rule, path) for rule in start.fresh)

    def computed_in(self, dtype: str) -> "Stage":
        """This stage with a concrete compute dtype instead of "auto"."""
        return replace(self, model=replace(self.model, compute_dtype=dtype))

    def full_training(self) -> "Stage":
        """Full training of the plain model on the same batches, for comparison."""
        plain = replace(self.config.optimizer, learning_rates=[])
        config = replace(self.config, train="all", unfreeze=[], adapters={}, frozen="float32", optimizer=plain)
        return replace(self, config=config, model=replace(self.model, adapters=()))

    def phases(self, mesh: Mesh, own: StageConfig | None = None, span: tuple[int, int] | None = None) -> list[Phase]:
        """The phases of the stage on a mesh, which may be abstract. Raises UserError if the stage does not fit it.

        own: another config than that of now. span: only the steps of these phases from one step to another.
        """
        return build(
            own or self.config,
            self.model,
            mesh,
            task=self.task,
            fresh=self.is_fresh,
            seed=self.seed,
            where=self.where,
            span=span,
        )

    def phases_of_history(self, mesh: Mesh) -> list[Phase]:
        """The phases with which a run trains the stage: at each amendment begins another one."""
        stops = [*(first for first, _ in self.history[1:]), self.config.steps]
        return [
            phase
            for (first, own), stop in zip(self.history, stops, strict=True)
            for phase in self.phases(mesh, own, (first, stop))
        ]

    def attention_calls(self, mesh: Mesh, platform: str) -> dict[int, Call]:
        """The calls of attention in a step on a mesh of cpu, gpu or tpu devices, by the window of a layer."""
        prefix, cut = getattr(self.objective, "PREFIX", False), axis_size(mesh, "length") > 1
        return calls_of(self.model, self.config.sequence_length, platform, prefix, cut)

    def attention_notes(self, mesh: Mesh, platform: str) -> list[str]:
        """What computes them, and why."""
        return attention_notes(self.attention_calls(mesh, platform), self.model.attention)

    def abstract_batch(self, mesh: Mesh | None, rows: int | None = None) -> Batch:
        """The shapes of a batch, sharded if there is a mesh. rows: if not `batch_size`, as before an amendment."""
        sharding = None if mesh is None else named(mesh, "batch", "length")
        shape, dtypes = (rows or self.config.batch_size, self.config.sequence_length), {"weights": jnp.float32}
        fields = (jax.ShapeDtypeStruct(shape, dtypes.get(each, jnp.int32), sharding=sharding) for each in Batch._fields)
        return Batch(*fields)


def folded_seed(given: int, name: str) -> int:
    """A seed for one use, derived from the given seed and the name of the use."""
    return int.from_bytes(hashlib.sha256(f"{given}/{name}".encode()).digest()[:4], "little") >> 1


def plan_stage(config: RunConfig, name: str, workdir: Path = Path()) -> Stage:
    """The stage from the config alone, without reading data. Raises UserError.

    Assumes the rows of the model to start from, else the vocabulary of `tokenizer.path`, or of `tokenizer.vocab_size`
    tokens where there is no such file (yet), and, since only the data has labels, a single label.
    """
    stage, where = config.stages[name], f"config.stages.{name}"
    objective = load_plugin(objectives, stage.objective_name)
    labels = ["unknown"] if objective.HEAD == "labels" else list(objective.HEAD)
    options = read_options(objective, stage.objective_options, f"{where}.objective")
    task = Task(options, None, stage.sequence_length)  # type: ignore[arg-type]  # only the data has a tokenizer
    own_seed = config.seed if stage.seed is None else stage.seed
    order_seed = own_seed if stage.order_seed is None else stage.order_seed
    explicit = (stage.seed, stage.order_seed) != (None, None)
    amendments = read_amendments(workdir, name)
    model = replace(
        init_model(config, planned_vocabulary(config, workdir)),
        classes=len(labels),
        adapters=tuple(stage.adapters.items()),
        max_output_positions=_max_output_positions(config, objective, task, {}),
    )
    return Stage(
        name=name,
        config=stage,
        model=model,
        objective=objective,
        task=task,
        start=read_start(stage.start, workdir, f"{where}.start"),
        # stages of one kind with equal explicit seeds see the same batches, so that their results can be paired
        seed=folded_seed(order_seed, stage.kind if explicit else name),
        given_seed=own_seed,
        labels=labels,
        record=with_amendments(stage_record(config, name), amendments),
        history=history(stage, amendments, where),
    )


def read_stage(config: RunConfig, name: str, workdir: Path, library: Library) -> Stage:
    """The planned stage with its data read, tokenized and packed. Raises UserError."""
    planned = plan_stage(config, name, workdir)
    stage, objective = planned.config, planned.objective
    labels = _read_labels(planned, library)
    task = planned.task._replace(tokenizer=library.tokenizer, label_sets=_label_sets(planned, labels, library))
    check_tokenizer(objective, library.tokenizer, task.options, f"{planned.where}.objective={stage.objective_name!r}")
    length = objective.raw_length(task) if hasattr(objective, "raw_length") else stage.sequence_length
    kinds, corrupt = objective.WINDOWS, partial(objective.corrupt, task=task) if hasattr(objective, "corrupt") else None
    begun = read_record(workdir, name) if saved_steps(workdir / name / CHECKPOINTS) else None
    kept = (begun or {}).get(REPLAYED)
    data = read_data(config, name, library, kinds, length, planned.seed, corrupt, planned.history, kept)
    record = planned.record | ({REPLAYED: dict(data.replayed)} if data.replayed else {})
    model = replace(
        planned.model,
        vocab_size=vocabulary_size(config, library.tokenizer),
        classes=len(labels),
        max_output_positions=_max_output_positions(config, objective, task, data.tables),
    )
    lm_head = has_lm_head(config, name, workdir, model)
    return replace(planned, model=model, task=task, labels=labels, lm_head=lm_head, record=record, read=data)


def check_tokenizer(plugin: ModuleType, tokenizer: Tokenizer, options: Any, where: str) -> None:
    """Raise UserError, starting with `where`, if the tokenizer lacks a token that an objective or evaluation needs."""
    try:
        if hasattr(plugin, "check_tokenizer"):
            plugin.check_tokenizer(tokenizer, options)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _max_output_positions(config: RunConfig, objective: ModuleType, task: Task, tables: dict[str, Windows]) -> int:
    """Max positions per window whose output the loss uses; 0: unknown.

    A window that is split over devices computes all of its positions.
    """
    if config.mesh.context != 1:
        return 0
    if hasattr(objective, "max_output_positions"):
        return objective.max_output_positions(task)
    if objective.HEAD != "labels" or config.model.pool != "last":
        return 0
    return max((table.max_pieces for table in tables.values()), default=0)


def _read_labels(stage: Stage, library: Library) -> list[str]:
    """The outputs of the task head, [] without one. Raises UserError if the sources have different labels."""
    if stage.objective.HEAD != "labels":
        return stage.labels
    labels = {source: library.labels(source) for source in stage.config.data}
    first, names = next(iter(labels.items()))
    for source, each in labels.items():
        if each != names:
            only = ", ".join(f"{name!r} of {first if name in names else source}" for name in sorted({*names} ^ {*each}))
            raise UserError(f"{stage.where}.data: the sources {first} and {source} have different labels: {only}")
    return names


def _label_sets(stage: Stage, labels: list[str], library: Library) -> np.ndarray | None:
    """The set of classes of each target, float32 [S, C]; None if targets are classes."""
    if stage.objective.HEAD != "labels":
        return None
    sets = [library.cache(source, "train").label_sets for source in stage.config.data]
    if any(each != sets[0] for each in sets):
        raise UserError(f"{stage.where}.data: sources with several labels a document cannot be mixed")
    if sets[0] is None:
        return None
    matrix = np.zeros((len(sets[0]), len(labels)), np.float32)
    for target, classes in enumerate(sets[0]):
        matrix[target, classes] = 1
    return matrix
