"""The cost of a step compared with full training of the same model: counted bytes and FLOPs, measured time."""

import hashlib
import json
import statistics
from typing import Any

import jax
from jax.sharding import Mesh

from llm3.config.schema import ModelConfig
from llm3.distributed.sharding import axis_size
from llm3.models.cross_entropy import blocks
from llm3.optim.optimizer import state_bytes
from llm3.stages.amendments import without_reasons
from llm3.stages.stage import Stage
from llm3.training.phase import Phase
from llm3.training.step import TrainState
from llm3.tree import size

SMALL_BLOCK = 1024  # tokens of the vocabulary: smaller blocks save little more memory, and cost time


def byte_report(state: TrainState) -> dict[str, int]:
    """Bytes of the stored parameters, of the gradients and of the optimizer state; `state` may be abstract."""
    return {
        "param_bytes": state_bytes(state.trainable) + state_bytes(state.frozen),
        "gradient_bytes": state_bytes(state.trainable),
        "moment_bytes": state_bytes(state.opt),
    }


def step_cost(
    stage: Stage, phase: Phase, mesh: Mesh, temp_bytes: int | None = None, metrics: list[dict] | None = None
) -> dict[str, Any]:
    """The cost of a step, as keys of a row; `full_*` is the cost of training all parameters of the plain model.

    metrics: the stage's log lines; `step_seconds` is the median over the lines of this phase, `first_step_seconds` that
    of the last command that trained the stage.
    """
    full, tokens = stage.full_training().phases(mesh)[0], stage.step_tokens
    forward, backward = phase.flops
    seconds = [line["step_seconds"] for line in metrics or () if line["step"] > phase.first and "step_seconds" in line]
    starts = [line["first_step_seconds"] for line in metrics or () if "first_step_seconds" in line]
    full_bytes = byte_report(full.abstract_state)
    return {
        "trainable_params": size(phase.abstract_state.trainable),
        **byte_report(phase.abstract_state),
        "temp_bytes": temp_bytes,
        "forward_flops_per_token": forward / tokens,
        "backward_flops_per_token": backward / tokens,
        "step_seconds": statistics.median(seconds) if seconds else None,
        "first_step_seconds": starts[-1] if starts else None,
        "full_param_bytes": full_bytes["param_bytes"],
        "full_gradient_bytes": full_bytes["gradient_bytes"],
        "full_moment_bytes": full_bytes["moment_bytes"],
        "full_flops_per_token": full.flops_per_step / tokens,
    }


def memory_fields(stage: Stage, state: TrainState, mesh: Mesh, limit: float | None) -> list[str]:
    """Three fields of a config that lower the memory of a step, the most helpful first.

    That depends on what fills a device of `limit` bytes: parameters, gradients and moments of `state`, the attention
    scores of a single window, or all activations together.
    """
    if limit is not None and sum(byte_report(state).values()) / mesh.size > 0.8 * limit:
        smaller = "config.model (a smaller one)"
        return ["config.mesh.fsdp (more devices)", f"{stage.where}.train (fewer parameters)", smaller]
    own, model, rows = stage.config, stage.model, stage.config.batch_size // axis_size(mesh, "batch")
    length = f"{stage.where}.sequence_length (now {own.sequence_length})"
    if limit is not None and scores_bytes(model, 1, own.sequence_length, mesh) > limit:
        return [length, "config.mesh.context (more devices)", "config.mesh.tensor (more devices)"]
    fields = [f"{stage.where}.micro_batches (now {own.micro_batches}, up to {rows})"] * (own.micro_batches < rows)
    fields += ["config.model.remat='full'"] * (model.remat != "full")
    block = blocks(model.padded_vocab_size // axis_size(mesh, "vocab"), model.vocab_block)[1]
    fields += [f"config.model.vocab_block={SMALL_BLOCK}"] * (stage.head == "lm" and block > SMALL_BLOCK)
    return [*fields, length, "config.mesh.fsdp (more devices)", "config.model (a smaller one)"][:3]


def scores_bytes(model: ModelConfig, rows: int, length: int, mesh: Mesh) -> float:
    """Less bytes than any pass over [rows, length] tokens needs on a device: a quarter of one layer's attention scores.

    Queries without a gradient are computed in up to four blocks.
    """
    return 2.0 * rows * model.heads * length**2 / 4 / (axis_size(mesh, "heads") * axis_size(mesh, "length"))


def recipe(stage: Stage) -> str:
    """A short digest of everything that decides the result of a stage except its seeds."""
    own = {key: value for key, value in stage.record["stage"].items() if key not in ("seed", "order_seed")}
    record = without_reasons(stage.record) | {"stage": own, "devices": jax.device_count()}
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:12]


def chain_cost(lineage: list[dict], own: dict[str, Any]) -> dict[str, Any]:
    """The training of a stage and of all its ancestors: "tokens", "flops" and "seconds".

    "stages" are the names of the ancestors, the first one first; "unknown" those whose cost nobody recorded, which are
    not in the sums. lineage: of a checkpoint. own: the cost of the stage.
    """
    known = [link["cost"] for link in lineage if link.get("cost")]
    return {
        "stages": [link["stage"] if "stage" in link else link["model"] for link in lineage],
        "unknown": [link.get("stage") or link["model"] for link in lineage if not link.get("cost")],
        **{key: sum(each[key] for each in [*known, own]) for key in ("tokens", "flops", "seconds")},
    }
