"""One stage from its start (resumed, handed over, or from nothing) to its last checkpoint and its row."""

import math
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax

from llm3 import evals
from llm3.checkpoints.best import scored
from llm3.checkpoints.orbax_store import DamagedCheckpoint
from llm3.checkpoints.stage_checkpoints import Checkpoints, Restored, Wanted
from llm3.config.schema import StageConfig
from llm3.data.batch import Batch
from llm3.distributed import memory, processes
from llm3.distributed.sharding import named, place_rows, rows_of_process
from llm3.distributed.watchdog import Watchdog
from llm3.errors import Diverged, UserError, nearest
from llm3.handoff.parent import CHECKPOINTS, Parent
from llm3.report.console import Progress
from llm3.report.logs import MetricsWriter, read_metrics
from llm3.report.units import count, duration
from llm3.stages.cost import recipe, savings
from llm3.stages.rules import parent_label
from llm3.stages.session import Session
from llm3.stages.start import base_meta, check_ancestry, check_same_data, find_parent, first_params
from llm3.stages.workdir import RECORD, stage_record, write_json
from llm3.training.loop import Cost, Meter, StopRequest, train
from llm3.training.phase import Trainer
from llm3.training.step import TrainState
from llm3.tree import flatten, size


def preflight(session: Session, name: str, in_this_run: list[str]) -> None:
    """Everything about a stage that can be wrong, found before any stage trains. Raises UserError."""
    stage, where = session.config.stages[name], f"config.stages.{name}"
    parent = find_parent(session.experiment, name, in_this_run)
    for trainer in session.phases(name):
        try:
            jax.eval_shape(trainer.train_step, trainer.abstract_state, abstract_batch(session, name))
        except (TypeError, ValueError) as error:
            raise UserError(f"{where}: its step cannot be built: {error}") from error
    if stage.best:
        best_sign(session, name)
    checkpoints = Checkpoints(session.workdir / name / CHECKPOINTS, read_only=True)
    for step in reversed(checkpoints.steps()):
        with suppress(DamagedCheckpoint):
            return check_same_data(session.experiment, name, checkpoints.meta(step))
    if parent is not None:
        parent.verify(f"{where}.start")


@dataclass
class StageRun:
    """A stage under way: where it is saved, and what it has cost so far."""

    session: Session
    name: str
    checkpoints: Checkpoints
    meta: dict = field(default_factory=dict)
    cost: Cost = field(default_factory=Cost)
    temp_bytes: int | None = None  # of the step, by the compiler's count
    complete: dict | None = None  # the parameters of a stage that was at its end when it was taken up

    @property
    def stage(self) -> StageConfig:
        return self.session.config.stages[self.name]

    @property
    def phases(self) -> list[Trainer]:
        return self.session.phases(self.name)

    @property
    def rests_on_base(self) -> bool:
        """Whether something is frozen, which is then written once, at the start."""
        return bool(flatten(self.phases[0].abstract_state.frozen))

    def trainer_of(self, done: int) -> Trainer:
        """The trainer that made step `done`, counted from 1."""
        return next(each for each in self.phases if done <= each.stop)

    def begin(self, parent: Parent | None) -> tuple[TrainState, int]:
        """The state to go on from, and its step: the stage's own newest, else its parent's parameters, else new."""

        def wanted(step: int) -> Wanted:
            trainer = self.trainer_of(step)
            return Wanted(trainer.abstract_params, trainer.saved_opt(trainer.abstract_state))

        if own := self.checkpoints.load_newest(wanted):
            return self.resume(own)
        trainer = self.phases[0]
        params, said = first_params(self.session, self.name, parent, trainer)
        self.meta = base_meta(self.session.experiment, self.name, parent) | said
        if self.rests_on_base:
            self.checkpoints.save_base(params, self.meta)
        return trainer.state(params), 0

    def resume(self, own: Restored) -> tuple[TrainState, int]:
        """Take up the stage's own checkpoint."""
        say, trainer = self.session.console.print, self.trainer_of(own.step)
        for line in own.skipped:
            say(f"{self.name}: {line}", style="bold red")
        self.meta, self.cost = own.meta, Cost(**own.meta["cost"])
        self.temp_bytes = own.meta["temp_bytes"]
        self.complete = own.params if own.step == self.stage.steps else None
        check_same_data(self.session.experiment, self.name, self.meta)
        say(f"{self.name}: resumes at step {own.step}")
        if (before := self.meta["model"]["compute_dtype"]) != trainer.model.compute_dtype:
            say(f"{self.name}: computed in {before} so far, in {trainer.model.compute_dtype} from here on")
        if self.rests_on_base and own.step < self.stage.steps:
            self.checkpoints.save_base(own.params, self.meta, trainer.partition.split(own.params)[0])
        return trainer.state(own.params, own.opt, own.step), own.step

    def whole(self, trainer: Trainer, state: TrainState) -> dict:
        """The canonical parameters that a state stands for, with what is frozen as the stage began with it."""
        if self.complete is not None:
            return self.complete
        if self.stage.frozen == "float32" or not self.rests_on_base:
            return trainer.params(state)
        return trainer.partition.join(trainer.trained(state), trainer.partition.split(self.base())[1])

    def base(self) -> dict:
        """The canonical parameters that the stage began with."""
        return self.checkpoints.base(self.phases[0].abstract_params)

    def save(self, trainer: Trainer, done: int, state: TrainState) -> None:
        """Begin to write a checkpoint of step `done`, with the stage's best figure where the config names one."""
        metrics, value, best = None, None, self.stage.best
        if best:
            _, evaluation = best_sign(self.session, self.name)
            value = self.session.figures(trainer.params(state), self.name, evaluation)[0][best]
            value = None if value is None else best_sign(self.session, self.name)[0] * value
            metrics = {best: math.inf if value is None else value}
        self.cost.peak_bytes = max(memory.peak_bytes() or 0, self.cost.peak_bytes)
        finished = done == self.stage.steps
        cost = {"cost": dict(vars(self.cost)), "temp_bytes": self.temp_bytes}
        meta = self.meta | scored(best, value) | {"step": done, "finished": finished} | cost
        rests = self.rests_on_base and not finished
        params = trainer.trained(state) if rests else self.whole(trainer, state)
        self.checkpoints.save(done, params, trainer.saved_opt(state), meta, metrics, partial=rests)

    def train(
        self, trainer: Trainer, state: TrainState, done: int, writer: MetricsWriter | None, request: StopRequest
    ) -> tuple[TrainState, int]:
        """Go on from step `done` to the end of a phase, or to a stop request; the state and the step reached.

        writer: of the first process; None on the others.
        """
        session, stage, cost = self.session, self.stage, self.cost
        step, mixture = compile_step(self, trainer, done), session.experiment.mixture(self.name)
        rows = rows_of_process(session.mesh, stage.batch_size)
        with Progress(stage.steps, done, self.name) if writer else nullcontext() as progress:

            def on_log(done: int, line: dict) -> None:
                if writer is None:
                    return
                rate = float(trainer.optimizer.schedule(done - 1 - cost.skipped_steps))
                epochs = {f"epochs_{source}": seen for source, seen in mixture.epochs(done).items()}
                line = {"learning_rate": rate} | line | epochs
                writer.write(done, line)
                progress.log(done, line)
                if skipped := line["skipped_steps"]:
                    session.console.print(f"{self.name}: skipped {skipped} steps: no label, no finite loss, or a spike")

            try:
                return train(
                    state,
                    step,
                    lambda i: place_rows(session.mesh, stage.batch_size, mixture.batch(i, rows)),
                    Meter(cost, trainer.flops_per_step, session.peak_flops),
                    start=done,
                    stop=trainer.stop,
                    log_every=stage.log_every,
                    save_every=stage.save_every,
                    stop_after=stage.guard.stop_after,
                    on_log=on_log,
                    on_save=partial(self.save, trainer),
                    request=request,
                    watchdog=Watchdog(session.config.hang_seconds),
                )
            except Diverged as error:
                raise Diverged(f"{self.name}: {error}") from None


def run_stage(session: Session, name: str, request: StopRequest) -> bool:
    """Train a stage to its end and evaluate it; False where a signal asked to stop (all is saved then)."""
    stage, directory = session.config.stages[name], session.workdir / name
    check_ancestry(session.workdir, [name])
    parent = find_parent(session.experiment, name, [])
    memory.reset_peak()
    with Checkpoints(directory / CHECKPOINTS, keep=stage.keep, best=stage.best or None) as checkpoints:
        run = StageRun(session, name, checkpoints)
        state, done = run.begin(parent)
        if processes.is_first():  # once a parent has been read whole: a refused stage leaves nothing
            write_json(directory / RECORD, stage_record(session.config, name))
        trainer = run.trainer_of(done)
        with MetricsWriter(directory, done or None) if processes.is_first() else nullcontext() as writer:
            for phase in run.phases:
                if request.signal or done >= phase.stop or done < phase.first:
                    continue
                if phase.first and done == phase.first:
                    state = phase.following(trainer, state, run.base())
                trainer = phase
                state, done = run.train(trainer, state, done, writer, request)
        checkpoints.wait()
        if done < stage.steps:
            return False
        params = run.whole(trainer, state)
    lines = read_metrics(directory) if processes.is_first() else []
    takes = savings(session, name, trainer, run.temp_bytes, lines)
    seed = session.experiment.given_seed(name)
    epochs = session.experiment.mixture(name).epochs(stage.steps)
    told = {"steps": stage.steps, "parent": parent_label(stage), "seed": seed, "recipe": recipe(session, name)}
    told["epochs"] = epochs
    session.write_row(name, params, vars(run.cost) | takes | told)
    return True


def best_sign(session: Session, name: str) -> tuple[int, str]:
    """1 where less of the stage's `best` figure is better, else -1, and the evaluation that gives it.

    Raises UserError for a figure that the stage does not have.
    """
    sign = {}
    for evaluation, config in session.config.evaluations.items():
        peer = evals.load(config.kind)
        if session.experiment.applies(evaluation, name):
            for figure, way in peer.BETTER.items():
                sign[f"{evaluation}_{figure}"] = (1 if way == "lower" else -1, evaluation)
    if (best := session.config.stages[name].best) not in sign:
        raise UserError(f"config.stages.{name}.best={best!r}: no such figure of this stage; {nearest(best, sign)}")
    return sign[best]


def compile_step(run: StageRun, trainer: Trainer, done: int) -> Any:
    """The compiled step of a phase, from step `done` on; says what it will take."""
    session, name, stage = run.session, run.name, run.stage
    compiled = trainer.train_step.lower(trainer.abstract_state, abstract_batch(session, name)).compile()
    analysis = compiled.memory_analysis()
    run.temp_bytes = analysis.temp_size_in_bytes
    bytes_ = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes
    left = trainer.flops_per_step * (trainer.stop - done)
    steps = f"steps {trainer.first} to {trainer.stop}" if len(run.phases) > 1 else f"{stage.steps} steps"
    session.console.print(
        f"{name}: {count(size(trainer.abstract_state.trainable))} of {count(size(trainer.abstract_params))} parameters "
        f"train, {count(stage.batch_size * stage.sequence_length)} tokens a step, {steps}; "
        f"about {bytes_ / 2**20:.0f} MiB a device and {duration(left / session.flops_per_second())}"
    )
    if trainer is run.phases[0]:
        for source, facts in session.experiment.data_facts(name).items():
            session.console.print(f"  {source}: " + ", ".join(facts))
        for note in trainer.notes:
            session.console.print(f"  {note}")
    return compiled


def abstract_batch(session: Session, name: str) -> Batch:
    """The shapes of a stage's batch on the mesh."""
    stage = session.config.stages[name]
    sharding = named(session.mesh, "batch", "length")
    example = session.experiment.mixture(name).batch(0, [0])
    shape = (stage.batch_size, stage.sequence_length)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(shape, x.dtype, sharding=sharding), example)
