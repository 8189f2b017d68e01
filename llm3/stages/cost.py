"""What a step takes, beside full fine-tuning of the same model: bytes and FLOPs by count, time as measured."""

import hashlib
import json
import statistics
from typing import Any

import jax
from jax.sharding import Mesh

from llm3.optim.optimizer import state_bytes
from llm3.stages.stage import Stage
from llm3.training.phase import Phase
from llm3.training.step import TrainState
from llm3.tree import size


def byte_report(state: TrainState) -> dict[str, int]:
    """The bytes of the parameters as they are stored, of the gradients, and of the optimizer's state (or of shapes)."""
    return {
        "param_bytes": state_bytes(state.trainable) + state_bytes(state.frozen),
        "gradient_bytes": state_bytes(state.trainable),
        "moment_bytes": state_bytes(state.opt),
    }


def savings(
    stage: Stage, phase: Phase, mesh: Mesh, temp_bytes: int | None = None, metrics: list[dict] | None = None
) -> dict[str, Any]:
    """The keys of a row that say what a step takes; `full_*` are those of training all of the plain model.

    metrics: the stage's log lines; `step_seconds` is the median over those of this phase.
    """
    full, tokens = stage.full_training().phases(mesh)[0], stage.step_tokens
    forward, backward = phase.flops
    seconds = [line["step_seconds"] for line in metrics or () if line["step"] > phase.first]
    full_bytes = byte_report(full.abstract_state)
    return {
        "trainable_params": size(phase.abstract_state.trainable),
        **byte_report(phase.abstract_state),
        "temp_bytes": temp_bytes,
        "forward_flops_per_token": forward / tokens,
        "backward_flops_per_token": backward / tokens,
        "step_seconds": statistics.median(seconds) if seconds else None,
        "full_param_bytes": full_bytes["param_bytes"],
        "full_gradient_bytes": full_bytes["gradient_bytes"],
        "full_moment_bytes": full_bytes["moment_bytes"],
        "full_flops_per_token": full.flops_per_step / tokens,
    }


def recipe(stage: Stage) -> str:
    """What a stage computes but for its seed, as a short digest."""
    own = {key: value for key, value in stage.record["stage"].items() if key != "seed"}
    record = stage.record | {"stage": own, "devices": jax.device_count()}
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:12]


def with_full_step_seconds(rows: list[dict], shapes: dict[str, Any], full: set[str]) -> list[dict]:
    """The rows with `full_step_seconds`, where a stage of the run that trains all takes steps of the same shape.

    shapes: {stage: what decides the size of a step besides what trains}. full: the stages that train all.
    """

    def of_full(row: dict) -> float | None:
        alike = [
            other for other in rows if other["stage"] in full and shapes[other["stage"]] == shapes.get(row["stage"])
        ]
        seconds = [other["step_seconds"] for other in alike if other.get("step_seconds")]
        return statistics.mean(seconds) if seconds else None

    return [row | {"full_step_seconds": of_full(row)} for row in rows]
