"""Runs one stage from its start (resumed, from a parent, or untrained) to its last checkpoint and its row."""

from contextlib import nullcontext
from functools import partial
from typing import Any

import jax

from llm3.checkpoints.stage_checkpoints import Checkpoints
from llm3.distributed import agreement, command_time, interrupts, memory, processes
from llm3.distributed.preemption import StopRequest
from llm3.errors import UserError, counted, together
from llm3.files import CHECKPOINTS, DATA_SAMPLE, write_json
from llm3.models.attention.choice import platform
from llm3.report.console import WARNING
from llm3.report.logs import read_metrics
from llm3.report.units import count, duration
from llm3.stages.agreement import see_checkpoints
from llm3.stages.amendments import KEY, amendments_in
from llm3.stages.ancestry import check_ancestry
from llm3.stages.cost import chain_cost, recipe, step_cost
from llm3.stages.data_sample import data_sample
from llm3.stages.evaluate import write_row
from llm3.stages.evaluation import subject_of
from llm3.stages.hooks import make_hooks, sample
from llm3.stages.locks import check_parents
from llm3.stages.parents import parent_labels
from llm3.stages.records import write_record
from llm3.stages.samples import drop_samples
from llm3.stages.session import Session
from llm3.stages.stage import Stage
from llm3.stages.stage_run import StageRun
from llm3.stages.start import check_same_data, find_parent
from llm3.stages.stopwatch import Stopwatch
from llm3.stages.trackers import open_writer
from llm3.stages.validation import Validation
from llm3.training.loop import train
from llm3.training.metrics import Meter
from llm3.training.phase import Phase
from llm3.tree import size

DATA_WINDOWS = 3  # of each stage, kept for the report


def check_before_training(session: Session, stage: Stage, in_this_run: list[str]) -> None:
    """Check a stage as far as possible before any stage trains. Raises UserError."""
    experiment, directory = session.experiment, session.workdir / stage.name
    parent = find_parent(experiment, stage, in_this_run)
    for phase in session.run_phases(stage):
        try:
            jax.eval_shape(phase.train_step, phase.abstract_state, stage.abstract_batch(session.mesh, phase.batch_size))
        except (TypeError, ValueError) as error:
            raise UserError(f"{stage.where}: the train step cannot be built: {error}") from error
    Validation(session, stage)
    if (meta := Checkpoints(directory / CHECKPOINTS, read_only=True).newest_meta()) is not None:
        check_same_data(directory, stage, experiment.tokenizer.hash, meta)
        return
    if parent is not None:
        parent.verify(f"{stage.where}.start")


def check_all_before_training(session: Session, names: list[str]) -> None:
    """Check all stages to train. Raises UserError with the problems of all of them."""
    problems = []
    for name in names:
        try:
            check_before_training(session, session.experiment.stages[name], names)
        except UserError as error:
            if processes.count() > 1:  # another one may not have it, and waits
                raise
            problems.append(error)
    if problems:
        raise together(problems)


def run_stage(stage: Stage, session: Session, request: StopRequest) -> bool:
    """Train and evaluate a stage; False if a signal stopped it, with its state saved. Raises UserError."""
    with memory.explained(stage.where, session.memory_fields(stage)):
        return _run_stage(stage, session, request)


def _run_stage(stage: Stage, session: Session, request: StopRequest) -> bool:
    config, directory, watchdog = stage.config, session.workdir / stage.name, session.watchdog
    began: float | None = command_time.take()
    watchdog.begin_stage()
    watchdog.at(0, "waiting for the others")
    see_checkpoints(session.config, session.workdir, [stage.name])
    check_ancestry(session.config, session.workdir, [stage.name])
    processes.broadcast_from_first(lambda: check_parents(session.config, session.workdir, [stage.name]))
    parent = find_parent(session.experiment, stage, [])
    memory.reset_peak()
    best, every = config.best or None, config.keep_every
    with Checkpoints(directory / CHECKPOINTS, keep=config.keep, best=best, every=every) as checkpoints:
        run = StageRun(session, stage, checkpoints)
        watch = session.watch = Stopwatch()
        watchdog.at(0, "loading")
        with watch.part("prepare"):
            state, done = run.begin(parent)
        agreement.compare({f"step of {stage.name} to resume": done})
        if processes.is_first():  # after the parent is loaded: a rejected stage leaves no files
            write_record(session.workdir, stage.name, stage.record)
            write_json(directory / DATA_SAMPLE, data_sample(stage, DATA_WINDOWS))
            drop_samples(directory, after=done)
        phase = run.phase_of(done)
        said = session.console.print
        opened = partial(open_writer, session.config, session.workdir, stage.name, done or None, said)
        with opened() if processes.is_first() else nullcontext() as writer:
            for each in run.phases:
                if request.signal or run.finished or done >= each.stop or done < each.first:
                    continue
                if each.first and done == each.first:
                    state = run.enter(each, phase, state)
                phase = each
                watchdog.at(done, "compiling")
                with watch.part("compile"):
                    step = compile_step(run, phase, done)
                flops = phase.flops_per_step, phase.hardware_flops_per_step
                meter, began = Meter(run.cost, *flops, session.peak_flops, began=began), None
                with make_hooks(run, phase, done, writer, request) as hooks, watch.part("train"):
                    steps = (done, phase.stop)
                    state, done = train(step, state, run.batch, meter, steps, hooks, config.guard.stop_after)
            watchdog.at(done, "saving")
            with watch.part("save"):
                checkpoints.wait()
            if request.signal or not run.finished:
                return False
            watchdog.at(done, "loading the result")
            params = run.full_params(phase, state)
            watchdog.at(done, "evaluating the result")
            with watch.part("evaluate"):
                sample(run, done, params, writer)
            if ended := run.meta.get("early_stopping"):
                session.console.print(f"{stage.name}: the result is step {ended['result_step']}: {ended['why']}")
            known = run.validation.results(done) if run.is_result else {}
            write_row(session, subject_of(stage), params, row_facts(run, phase, done), writer, known)
    watchdog.rest()
    return True


def row_facts(run: StageRun, phase: Phase, done: int) -> dict[str, Any]:
    """The keys of a row besides metrics: cost and provenance of a stage that ended at step `done`."""
    stage, session = run.stage, run.session
    parent = parent_labels(session.config, session.workdir)[stage.name]
    ended = {key: run.meta[key] for key in ("early_stopping",) if key in run.meta}
    lines = read_metrics(run.directory) if processes.is_first() else []
    ended |= {KEY: amended} if (amended := [each.line for each in amendments_in(run.meta)]) else {}
    return (
        vars(run.cost)
        | step_cost(stage, phase, session.mesh, run.temp_bytes, lines)
        | {"steps": done, "parent": parent, "seed": stage.given_seed}
        | {"recipe": recipe(stage), "epochs": stage.data.mixture.epochs(done)}
        # as its children record it: of a checkpoint from an older llm3, in an older format of digests
        | {"params_digest": run.checkpoints.meta(done)["params_digest"]}
        | {"wall_seconds": session.watch.seconds, "chain": chain_cost(run.meta["lineage"], vars(run.cost))}
        | ended
    )


def compile_step(run: StageRun, phase: Phase, done: int) -> Any:
    """The compiled step of a phase from step `done` on; prints its expected cost."""
    session, stage = run.session, run.stage
    with interrupts.doing(f"compiling the step of {stage.name}"):
        compiled = phase.train_step.lower(
            phase.abstract_state, stage.abstract_batch(session.mesh, phase.batch_size)
        ).compile()
    analysis = compiled.memory_analysis()
    assert analysis is not None  # XLA reports memory on all supported devices
    run.temp_bytes = analysis.temp_size_in_bytes
    bytes_, limit = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes, memory.device_bytes()
    # the compiler of a TPU rejects what does not fit, and may count more temporary bytes than a step uses
    checked = session.config.check_memory and jax.default_backend() != "tpu"
    if checked and limit is not None and bytes_ > limit:
        raise memory.exhausted(stage.where, bytes_, limit, session.memory_fields(stage))
    left = phase.hardware_flops_per_step * (phase.stop - done)
    steps = f"steps {phase.first} to {phase.stop}" if len(run.phases) > 1 else counted(stage.config.steps, "step")
    session.console.print(
        f"{stage.name}: {count(size(phase.abstract_state.trainable))} of {count(size(phase.abstract_params))} "
        f"parameters trainable, {count(stage.step_tokens)} tokens per step, {steps}; "
        f"about {bytes_ / 2**20:.0f} MiB per device and {duration(left / session.flops_per_second())}"
    )
    if phase is run.phases[0]:
        for source, facts in stage.data.facts(stage.config.steps).items():
            session.console.print(f"  {source}: " + ", ".join(facts))
        for warning in stage.data.warnings(f"{stage.where}.sequence_length"):
            session.console.print(warning, style=WARNING)
        for note in [*stage.attention_notes(session.mesh, platform()), *phase.notes]:
            session.console.print(f"  {note}")
    return compiled
