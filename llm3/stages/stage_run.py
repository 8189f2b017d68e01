"""A running stage: its first state (resumed, from a parent, or initialized), its batches, and its checkpoints."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from llm3.checkpoints.metadata import scored
from llm3.checkpoints.stage_checkpoints import Checkpoints, Restored, Wanted
from llm3.data.batch import Batch
from llm3.distributed import memory
from llm3.distributed.sharding import place_rows, rows_of_process
from llm3.errors import UserError
from llm3.handoff.parent import Parent
from llm3.stages.amendments import amendments_in
from llm3.stages.session import Session
from llm3.stages.stage import Stage
from llm3.stages.start import base_meta, changed_evaluations, check_same_data, first_params, now_meta
from llm3.stages.validation import Validation
from llm3.training.metrics import Cost
from llm3.training.phase import Phase
from llm3.training.step import TrainState
from llm3.tree import flatten


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
        return self.session.run_phases(self.stage)

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
        if self.finished and any(own.step == first for first, _ in self.stage.history[1:]):
            self.meta |= {"finished": False}  # an amendment has given it more steps
            self.meta.pop("early_stopping", None)
        self.complete = own.params if self.finished else None
        self.validation = Validation(self.session, self.stage, own.meta.get("validation"))
        check_same_data(self.directory, self.stage, self.session.experiment.tokenizer.hash, self.meta)
        say(f"{name}: resumes at step {own.step}")
        for each in self.validation.names & {*changed_evaluations(self.stage, own.meta)}:
            say(f"{name}: evaluation {each} has other documents now: its values up to step {own.step} do not compare")
        if (before := self.meta["model"]["compute_dtype"]) != phase.model.compute_dtype:
            say(f"{name}: compute dtype changes from {before} to {phase.model.compute_dtype}")
        self.meta |= now_meta(self.stage)
        for amendment in amendments_in(self.meta):
            say(f"{name}: {amendment.line}")
        if self.saves_deltas and not self.finished:
            self.checkpoints.save_base(own.params, self.meta, phase.partition.split(own.params)[0])
        return phase.state(own.params, own.opt, own.step), own.step

    def enter(self, phase: Phase, before: Phase, state: TrainState) -> TrainState:
        """The state with which a phase begins: of its trainable parameters, and a new guard after an amendment."""
        if phase.partition.trainable != before.partition.trainable:
            state = phase.following(before, state, self.base())
        if any(phase.first == first for first, _ in self.stage.history[1:]):
            state = state._replace(guard=phase.init_guard())
        return state

    @property
    def is_result(self) -> bool:
        """Whether the parameters that the last step computes with are the stage's result, bit for bit."""
        return self.complete is None and (self.stage.config.frozen == "float32" or not self.saves_deltas)

    def full_params(self, phase: Phase, state: TrainState) -> dict:
        """The canonical parameters of a state, with the frozen parameters as they were before quantization."""
        if self.complete is not None:
            return self.complete
        if self.is_result:
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
        mesh, mixture = self.session.mesh, self.stage.data.mixture
        size = mixture.batch_size(step)
        return place_rows(mesh, size, mixture.batch(step, rows_of_process(mesh, size)))
