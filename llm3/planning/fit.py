"""Whether the steps of a run fit into the memory of its devices, by the estimate of `trace`, before they exist."""

import bisect
from collections.abc import Iterable, Sequence
from dataclasses import replace

import jax
from jax.sharding import Mesh

from llm3 import evals
from llm3.config.schema import EvaluationConfig, RunConfig
from llm3.distributed import memory, processes
from llm3.distributed.sharding import axis_size, check_batch
from llm3.errors import OutOfMemory
from llm3.planning import trace
from llm3.planning.plan import on_abstract_mesh
from llm3.registry import load_plugin
from llm3.stages.cost import memory_fields, scores_bytes
from llm3.stages.evaluate import evaluation_fields
from llm3.stages.experiment import chosen_dtype
from llm3.stages.stage import Stage, plan_stage

SLACK = 1.5  # the estimate of a step may exceed what the compiler uses, by 38 % for a step that trains the top layer


def check_fits(config: RunConfig, names: Iterable[str], limit: float | None = None) -> None:
    """Raise OutOfMemory, with the nearest settings that fit, for a stage whose step a device cannot hold.

    Also for an evaluation whose attention scores alone do not fit: the config of a run holds its evaluations too.
    limit: bytes of a device; None: as this machine's devices state it. Reads no data: the vocabulary is that of the
    config. Estimates only what a simple upper bound does not prove to fit, and rejects nothing within `SLACK` of the
    limit: a run compares what the compiler counts, before it trains.
    """
    if not config.check_memory:
        return
    limit = limit or processes.broadcast_from_first(memory.device_bytes)
    stages = [plan_stage(config, name).computed_in(chosen_dtype(config)) for name in names]
    if limit is None or not stages:
        return
    with on_abstract_mesh(config.mesh, jax.device_count()) as mesh:
        for name, each in config.evaluations.items():
            rows = each.batch_size // axis_size(mesh, "batch") * _computes_windows(each, stages)
            if (least := scores_bytes(config.model, rows, each.sequence_length, mesh)) > limit:
                raise memory.exhausted(f"config.evaluations.{name}", least, limit, evaluation_fields(name))
        for stage in stages:
            own = stage.config
            check_batch(mesh, own.batch_size, own.sequence_length, own.micro_batches, stage.where)
            if not fits(stage, mesh, limit, SLACK):
                raise _too_large(stage, mesh, limit)


def _computes_windows(evaluation: EvaluationConfig, stages: Sequence[Stage]) -> bool:
    """Whether an evaluation computes windows of its `sequence_length`, before these stages or after one of them.

    Choices, generated answers and requests of tasks are computed at their own length, which only the data has; and an
    evaluation of a task head is computed only after a stage that trains this head.
    """
    plugin = load_plugin(evals, evaluation.kind)
    applies = not plugin.HEAD or any(plugin.HEAD == stage.objective.HEAD for stage in stages)
    return applies and bool({*plugin.WINDOWS.values()} - {"dialogue"})


def fits(stage: Stage, mesh: Mesh, limit: float, slack: float = 1.0) -> bool:
    """Whether a device of `limit` bytes holds a step. The bounds answer at once; only between them a trace decides.

    slack: up to this many times the limit, the estimate of the trace counts as fitting.
    """
    if lower_bound(stage, mesh) > limit:
        return False
    return upper_bound(stage, mesh) <= limit or step_bytes(stage, mesh) <= slack * limit


def lower_bound(stage: Stage, mesh: Mesh) -> float:
    """Less bytes than a step needs on any device."""
    own = stage.config
    rows = own.batch_size // own.micro_batches // axis_size(mesh, "batch")
    return scores_bytes(stage.model, rows, own.sequence_length, mesh)


def upper_bound(stage: Stage, mesh: Mesh) -> float:
    """More bytes than a step needs on any device: the state eight times, and every activation of every layer."""
    own, model = stage.config, stage.model
    rows, length = own.batch_size // own.micro_batches // axis_size(mesh, "batch"), own.sequence_length
    d, ff, heads = model.d_model, model.d_ff, model.heads * model.head_dim
    ranks = sum(adapter.rank for _, adapter in model.adapters)
    layer = 4 * d * heads + 3 * d * ff + 12 * d + 2 * ff + 8 * heads + 8 * ranks * (d + ff + heads)
    widths = 32 * d + 12 * ff + 24 * heads + (8 if model.attention_softcap else 6) * model.heads * length
    tables = 2 * model.padded_vocab_size + model.max_positions + model.position_offset + model.token_types
    state = 32.0 * (model.layers * layer + (tables + 2 * d) * d)
    return state + 4.0 * rows * length * (model.layers * widths + 8 * model.padded_vocab_size + 8 * d)


def step_bytes(stage: Stage, mesh: Mesh) -> float:
    """Estimated peak bytes on one device of a step of the last phase, which trains most."""
    phases = stage.phases(mesh)
    return trace.stored(phases[-1], stage, mesh).arguments + trace.step(stage, mesh, len(phases) - 1).temporary


def _too_large(stage: Stage, mesh: Mesh, limit: float) -> OutOfMemory:
    if smaller := _that_fit(stage, mesh, limit):
        help_ = f"Any of these would fit: {', '.join(smaller)}"
    else:
        state = stage.phases(mesh)[-1].abstract_state
        help_ = f"What helps, in this order: {', '.join(memory_fields(stage, state, mesh, limit))}"
    needed, there_is = memory.gibibytes(step_bytes(stage, mesh)), memory.gibibytes(limit)
    return OutOfMemory(
        f"{stage.where}: a step needs about {needed} of memory per device; a device has {there_is}. {help_}. "
        "To try it anyway: --config.check_memory=False"
    )


def _that_fit(stage: Stage, mesh: Mesh, limit: float) -> list[str]:
    """Changes of one field each that fit, as near as possible; first those that change no result."""
    own, rows = stage.config, stage.config.batch_size // axis_size(mesh, "batch")

    def first(field: str, values: Iterable[int]) -> list[str]:
        """The change to the first of these values that fits; each needs less memory than the one before."""
        valid = list(values)
        others = lambda n: fits(replace(stage, config=replace(own, **{field: n})), mesh, limit)  # noqa: E731
        found = bisect.bisect_left(valid, True, key=others)
        return [f"{stage.where}.{field}={valid[found]}"] if found < len(valid) else []

    found = first("micro_batches", (n for n in range(own.micro_batches + 1, rows + 1) if rows % n == 0))
    if stage.model.remat != "full" and fits(replace(stage, model=replace(stage.model, remat="full")), mesh, limit):
        found.append("config.model.remat='full'")
    powers = (2**power for power in range(own.sequence_length.bit_length(), 3, -1))
    pieces = axis_size(mesh, "length")
    return found + first("sequence_length", (n for n in powers if n < own.sequence_length and n % pieces == 0))
