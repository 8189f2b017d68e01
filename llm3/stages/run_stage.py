"""Runs one stage from its start (resumed, from a parent, or untrained) to its last checkpoint and its row."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax

from llm3.checkpoints.metadata import scored
from llm3.checkpoints.orbax_store import DamagedCheckpoint
from llm3.checkpoints.stage_checkpoints import Checkpoints, Restored, Wanted
from llm3.data.batch import Batch
from llm3.distributed import interrupts, memory, processes
from llm3.distributed.preemption import StopRequest
from llm3.distributed.sharding import place_rows, rows_of_process
from llm3.distributed.watchdog import Watchdog
from llm3.errors import Diverged, UserError, counted, together
from llm3.files import CHECKPOINTS, RECORD, write_json
from llm3.handoff.parent import Parent
from llm3.report.console import WARNING, Progress
from llm3.report.logs import MetricsWriter, read_metrics
from llm3.report.units import count, duration, words
from llm3.stages.cost import chain_cost, recipe, step_cost
from llm3.stages.evaluate import write_row
from llm3.stages.evaluation import subject_of
from llm3.stages.parents import parent_labels
from llm3.stages.samples import drop_samples, take_samples
from llm3.stages.session import Session
from llm3.stages.stage import Stage
from llm3.stages.start import base_meta, check_ancestry, check_same_data, find_parent, first_params
from llm3.stages.stopwatch import Stopwatch
from llm3.stages.trackers import open_writer
from llm3.stages.validation import Validation
from llm3.training.loop import Hooks, Verdict, train
from llm3.training.metrics import Cost, Meter
from llm3.training.phase import Phase
from llm3.training.step import STEP_METRICS, TrainState
from llm3.tree import flatten, size


def check_before_training(session: Session, stage: Stage, in_this_run: list[str]) -> None:
    """Check a stage as far as possible before any stage trains. Raises UserError."""
    experiment, directory = session.experiment, session.workdir / stage.name
    parent = find_parent(experiment, stage, in_this_run)
    for phase in session.phases(stage):
        try:
            jax.eval_shape(phase.train_step, phase.abstract_state, stage.abstract_batch(session.mesh))
        except (TypeError, ValueError) as error:
            raise UserError(f"{stage.where}: the train step cannot be built: {error}") from error
    Validation(session, stage)
    checkpoints = Checkpoints(directory / CHECKPOINTS, read_only=True)
    for step in reversed(checkpoints.steps()):
        with suppress(DamagedCheckpoint):
            return check_same_data(directory, stage, experiment.tokenizer.hash, checkpoints.meta(step))
    if parent is not None:
        parent.verify(f"{stage.where}.start")


def check_all_before_training(session: Session, names: list[str]) -> None:
    """Check all stages to train. Raises UserError with the problems of all of them."""
    problems = []
    for name in names:
        try:
            check_before_training(session, session.experiment.stages[name], names)
        except UserError as error:
            problems.append(error)
    if problems:
        raise together(problems)


@dataclass
class StageRun:
    """A running stage, with its checkpoints and its cost so far."""

    session: Session
    stage: Stage
    checkpoints: Checkpoints
    meta: dict = field(default_factory=dict)
    cost: Cost = field(default_factory=Cost)
    temp_bytes: int | None = None  # temporary memory of the step, as counted by the compiler
    complete: dict | None = None  # the stage's result, if it was loaded from a checkpoint
    validation: Validation = field(init=False)

    def __post_init__(self) -> None:
        self.validation = Validation(self.session, self.stage)

    @property
    def directory(self) -> Path:
        return self.session.workdir / self.stage.name

    @property
    def phases(self) -> list[Phase]:
        return self.session.phases(self.stage)

    @property
    def saves_deltas(self) -> bool:
        """Whether parameters are frozen; checkpoints then hold the trainable ones only, and a base holds the rest."""
        return bool(flatten(self.phases[0].abstract_state.frozen))

    @property
    def finished(self) -> bool:
        """Whether the stage has ended, at its last step or early, and its result is saved."""
        return self.meta.get("finished", False)

    def phase_of(self, done: int) -> Phase:
        """The phase of step `done`, counted from 1."""
        return next(each for each in self.phases if done <= each.stop)

    def begin(self, parent: Parent | None) -> tuple[TrainState, int]:
        """The first state and its step: from the stage's newest checkpoint, else from the parent, else initialized."""

        def wanted(step: int) -> Wanted:
            phase = self.phase_of(step)
            return Wanted(phase.abstract_params, phase.saved_opt(phase.abstract_state))

        if own := self.checkpoints.load_newest(wanted):
            return self.resume(own)
        phase = self.phases[0]
        params, provenance = first_params(self.session, self.stage, parent, phase)
        self.meta = base_meta(self.session.experiment, self.stage, parent) | provenance
        if self.saves_deltas:
            self.checkpoints.save_base(params, self.meta)
        return phase.state(params), 0

    def resume(self, own: Restored) -> tuple[TrainState, int]:
        """Resume from a checkpoint of the stage."""
        say, name, phase = self.session.console.print, self.stage.name, self.phase_of(own.step)
        for line in own.skipped:
            say(f"{name}: {line}", style="bold red")
        self.meta, self.cost = own.meta, Cost(**own.meta["cost"])
        self.temp_bytes = own.meta["temp_bytes"]
        self.session.watch.add(own.meta.get("wall_seconds", {}))
        self.complete = own.params if self.finished else None
        self.validation = Validation(self.session, self.stage, own.meta.get("validation"))
        check_same_data(self.directory, self.stage, self.session.experiment.tokenizer.hash, self.meta)
        say(f"{name}: resumes at step {own.step}")
        if (before := self.meta["model"]["compute_dtype"]) != phase.model.compute_dtype:
            say(f"{name}: compute dtype changes from {before} to {phase.model.compute_dtype}")
        if self.saves_deltas and not self.finished:
            self.checkpoints.save_base(own.params, self.meta, phase.partition.split(own.params)[0])
        return phase.state(own.params, own.opt, own.step), own.step

    def full_params(self, phase: Phase, state: TrainState) -> dict:
        """The canonical parameters of a state, with the frozen parameters as they were before quantization."""
        if self.complete is not None:
            return self.complete
        if self.stage.config.frozen == "float32" or not self.saves_deltas:
            return phase.params(state)
        return phase.partition.join(phase.trained(state), phase.partition.split(self.base())[1])

    def base(self) -> dict:
        """The canonical parameters that the stage began with."""
        return self.checkpoints.base(self.phases[0].abstract_params)

    def save(self, alive: Callable[[], None], phase: Phase, done: int, state: TrainState) -> None:
        """Begin to write a checkpoint of step `done`, scored by the config's `best` metric if it was measured.

        The last checkpoint of a stage holds its result. alive: called after each batch of an evaluation.
        """
        best, value = self.stage.config.best, self.validation.score(done, lambda: phase.params(state), alive)
        metrics = None if value is None else {best: value}
        if done == self.stage.config.steps or self.validation.stops:
            self.meta |= {"finished": True} | self.validation.result(done)
            if (taken := self.meta.get("early_stopping", {}).get("result_step", done)) != done:
                self.complete, value = self.best_params(taken, phase), self.validation.best.value
                metrics = None  # so that the checkpoint of the best step is kept as the best
        self.cost.peak_bytes = max(memory.peak_bytes() or 0, self.cost.peak_bytes)
        cost = {
            "cost": dict(vars(self.cost)),
            "temp_bytes": self.temp_bytes,
            "wall_seconds": self.session.watch.seconds,
        }
        meta = self.meta | scored(best, value) | {"step": done, "finished": self.finished} | cost
        meta |= self.validation.state
        delta = self.saves_deltas and not self.finished
        params = phase.trained(state) if delta else self.full_params(phase, state)
        self.checkpoints.save(done, params, phase.saved_opt(state), meta, metrics, delta=delta)

    def best_params(self, step: int, phase: Phase) -> dict:
        """The canonical parameters of the best step. Raises UserError if its checkpoint cannot be read."""
        self.checkpoints.wait()
        try:
            return self.checkpoints.load_params(step, phase.abstract_params)
        except UserError as error:
            raise UserError(
                f"{self.stage.where}: the parameters of its best step cannot be read: {error}: restore that checkpoint "
                f"from a copy, or move {self.directory} away to train the stage again"
            ) from error

    def batch(self, step: int) -> Batch:
        """The batch of a step on the devices; each process reads its own rows."""
        mesh, size = self.session.mesh, self.stage.config.batch_size
        return place_rows(mesh, size, self.stage.data.mixture.batch(step, rows_of_process(mesh, size)))

    @contextmanager
    def hooks(self, phase: Phase, done: int, writer: MetricsWriter | None, request: StopRequest) -> Iterator[Hooks]:
        """The loop's hooks for a phase from step `done` on. writer: None on all processes but the first."""
        config, mixture, console = self.stage.config, self.stage.data.mixture, self.session.console
        watchdog, validation = Watchdog(self.session.config.hang_seconds), self.validation
        extra = {name: words(name) for name in self.own_metrics(phase)} | validation.labels
        shown = Progress(config.steps, done, self.stage.name, console, extra=extra) if writer else nullcontext()
        with shown as progress:

            def on_log(done: int, line: dict) -> None:
                if writer is None or progress is None:
                    return
                rate = float(phase.optimizer.schedule(done - 1 - self.cost.skipped_steps))
                epochs = {f"epochs_{source}": seen for source, seen in mixture.epochs(done).items()}
                line = {"learning_rate": rate} | line | epochs
                writer.write(done, line)
                progress.log(done, line | validation.shown)
                if skipped := line["skipped_steps"]:
                    why = "no labels, or non-finite or spiking loss or gradient"
                    console.print(f"{self.stage.name}: skipped {counted(skipped, 'step')} ({why})")
                if line["new_levels"]:
                    spikes = f"{config.guard.accept_after} spikes in a row"
                    console.print(f"{self.stage.name}: the guard accepts a new level after {spikes}")

            def on_eval(done: int, state: TrainState) -> Verdict:
                metrics = validation.measure(done, phase.params(state), partial(watchdog.at, done, "evaluating"))
                if writer is not None:
                    writer.write(done, metrics, group="eval")
                console.print(validation.sentence(done))
                return validation.verdict(done)

            def on_save(done: int, state: TrainState) -> None:
                with interrupts.doing(f"saving step {done}"), self.session.watch.part("save"):
                    self.save(partial(watchdog.at, done, "saving"), phase, done, state)

            def sampled(done: int) -> bool:  # after the last step, the stage's result is sampled
                return bool(config.sample_every) and done % config.sample_every == 0 and done < config.steps

            def on_sample(done: int, state: TrainState) -> None:
                with self.session.watch.part("evaluate"):
                    self.sample(done, phase.params(state), writer)

            called = (validation.due, on_log, on_eval, on_save)
            try:
                yield Hooks(config.log_every, config.save_every, *called, request, watchdog, sampled, on_sample)
            except Diverged as error:
                raise Diverged(f"{self.stage.name}: {error}. {self.advice(error.first)}") from None

    def sample(self, done: int, params: dict, writer: MetricsWriter | None) -> None:
        """Continue the config's prompts with canonical parameters after a step."""
        template = self.session.experiment.library.template if self.meta["chat_template"] else ""
        take_samples(self.session, subject_of(self.stage), params, done, template, writer)

    def own_metrics(self, phase: Phase) -> list[str]:
        """The metrics that the objective computes besides the loss."""
        batch = self.stage.abstract_batch(self.session.mesh)
        _, metrics = jax.eval_shape(phase.train_step, phase.abstract_state, batch)
        return [name for name in metrics if name not in STEP_METRICS]

    def advice(self, first: int) -> str:
        """What a user can do about a stage that diverged at step `first`, and whose config must not change."""
        name, kind = self.stage.name, self.stage.config.kind
        kind = "posttrain" if kind == "pretrain" else kind  # a pretrain stage has no start
        self.checkpoints.wait()
        # the last update before the first bad step may be what went wrong
        step = max((step for step in self.checkpoints.steps() if step < first - 1), default=None)
        if step is None:
            return f"No checkpoint is from before: move {self.directory} away to train with a lower learning_rate"
        return (
            f"Checkpoint {step} is intact. Rerun with a higher guard.stop_after to skip more such steps. Or change the "
            f"learning rate or the data from there: add a stage with kind={kind!r}, "
            f"start=dict(stage={name!r}, step={step}) and otherwise the fields of this one; name it in --stages"
        )


def run_stage(stage: Stage, session: Session, request: StopRequest) -> bool:
    """Train and evaluate a stage; False if a signal stopped it, with its state saved. Raises UserError."""
    with memory.explained(stage.where, session.memory_fields(stage)):
        return _run_stage(stage, session, request)


def _run_stage(stage: Stage, session: Session, request: StopRequest) -> bool:
    config, directory = stage.config, session.workdir / stage.name
    check_ancestry(session.workdir, [stage.name])
    parent = find_parent(session.experiment, stage, [])
    memory.reset_peak()
    with Checkpoints(directory / CHECKPOINTS, keep=config.keep, best=config.best or None) as checkpoints:
        run = StageRun(session, stage, checkpoints)
        watch = session.watch = Stopwatch()
        with watch.part("prepare"):
            state, done = run.begin(parent)
        if processes.is_first():  # after the parent is loaded: a rejected stage leaves no files
            write_json(directory / RECORD, stage.record)
            drop_samples(directory, after=done)
        phase = run.phase_of(done)
        said = session.console.print
        opened = partial(open_writer, session.config, session.workdir, stage.name, done or None, said)
        with opened() if processes.is_first() else nullcontext() as writer:
            for each in run.phases:
                if request.signal or run.finished or done >= each.stop or done < each.first:
                    continue
                if each.first and done == each.first:
                    state = each.following(phase, state, run.base())
                phase = each
                with watch.part("compile"):
                    step = compile_step(run, phase, done)
                meter = Meter(run.cost, phase.flops_per_step, phase.hardware_flops_per_step, session.peak_flops)
                with run.hooks(phase, done, writer, request) as hooks, watch.part("train"):
                    steps = (done, phase.stop)
                    state, done = train(step, state, run.batch, meter, steps, hooks, config.guard.stop_after)
            with watch.part("save"):
                checkpoints.wait()
            if request.signal or not run.finished:
                return False
            params = run.full_params(phase, state)
            with watch.part("evaluate"):
                run.sample(done, params, writer)
            if ended := run.meta.get("early_stopping"):
                session.console.print(f"{stage.name}: the result is step {ended['result_step']}: {ended['why']}")
            write_row(session, subject_of(stage), params, row_facts(run, phase, done), writer)
    return True


def row_facts(run: StageRun, phase: Phase, done: int) -> dict[str, Any]:
    """The keys of a row besides metrics: cost and provenance of a stage that ended at step `done`."""
    stage, session = run.stage, run.session
    parent = parent_labels(session.config, session.workdir)[stage.name]
    ended = {key: run.meta[key] for key in ("early_stopping",) if key in run.meta}
    lines = read_metrics(run.directory) if processes.is_first() else []
    return (
        vars(run.cost)
        | step_cost(stage, phase, session.mesh, run.temp_bytes, lines)
        | {"steps": done, "parent": parent, "seed": stage.given_seed}
        | {"recipe": recipe(stage), "epochs": stage.data.mixture.epochs(done)}
        | {"wall_seconds": session.watch.seconds, "chain": chain_cost(run.meta["lineage"], vars(run.cost))}
        | ended
    )


def compile_step(run: StageRun, phase: Phase, done: int) -> Any:
    """The compiled step of a phase from step `done` on; prints its expected cost."""
    session, stage = run.session, run.stage
    with interrupts.doing(f"compiling the step of {stage.name}"):
        compiled = phase.train_step.lower(phase.abstract_state, stage.abstract_batch(session.mesh)).compile()
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
        for note in phase.notes:
            session.console.print(f"  {note}")
    return compiled
