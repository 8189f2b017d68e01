"""The verb `bench`: one stage's real step on its real batches, timed."""

import json
import statistics
import time
from pathlib import Path

import jax
from rich.console import Console

from llm3 import stages
from llm3.config import RunConfig
from llm3.errors import UserError, nearest
from llm3.experiment import prepare
from llm3.handoff import INIT
from llm3.models.transformer import init
from llm3.session import Session
from llm3.sharding import place_batch
from llm3.training import abstract_batch
from llm3.tree import size

WARM_UP, TIMED = 2, 10


def bench(config: RunConfig, workdir: Path, name: str, as_json: bool) -> int:
    """Compile the step of a stage, warm it up, time 10 steps on its batches from the start, and print the figures."""
    order = stages.check(config)
    if name not in order:
        raise UserError(f"--stage={name}: no such stage; {nearest(name, order)}")
    experiment = prepare(config, workdir, [name])
    session = Session(experiment, Console(stderr=True, highlight=False))
    with jax.set_mesh(session.mesh):
        figures = measure(session, name)
    if as_json:
        print(json.dumps(figures))
    else:
        for key, value in figures.items():
            print(f"{key:<20}{value}")
    return 0


def measure(session: Session, name: str) -> dict:
    """The figures of a stage's step; seconds are wall time, bytes are the compiler's own count for one device."""
    experiment, stage = session.experiment, session.config.stages[name]
    trainer = session.trainer(name)
    before = time.perf_counter()
    compiled = trainer.train_step.lower(trainer.abstract_state, abstract_batch(session, name)).compile()
    compile_seconds = time.perf_counter() - before
    state = trainer.state(init(trainer.model, experiment.seed(INIT), session.mesh))
    trainable, frozen, opt = size(state.trainable), size(state.frozen), jax.tree.leaves(state.opt)
    mixture, seconds = experiment.mixture(name), []
    for i in range(WARM_UP + TIMED):
        batch = jax.block_until_ready(place_batch(session.mesh, mixture.batch(i)))
        before = time.perf_counter()
        state, _ = jax.block_until_ready(compiled(state, batch))
        seconds.append(time.perf_counter() - before)
    timed = seconds[WARM_UP:]
    median, memory = statistics.median(timed), compiled.memory_analysis()
    return {
        "stage": name,
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "step_seconds": median,
        "step_seconds_min": min(timed),
        "step_seconds_max": max(timed),
        "tokens_per_second": stage.batch_size * stage.sequence_length / median,
        "flops_per_step": trainer.flops_per_step,
        "flops_per_second": trainer.flops_per_step / median,
        "mfu": trainer.flops_per_step / median / session.peak_flops if session.peak_flops else None,
        "compile_seconds": compile_seconds,
        "temp_bytes": memory.temp_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "opt_bytes": sum(leaf.nbytes for leaf in opt),
        "params": trainable + frozen,
        "trainable_params": trainable,
    }
