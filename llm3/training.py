"""One stage from its start (resumed, handed over, or from nothing) to its last checkpoint and its row."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import jax

from llm3 import __version__, evals, handoff, memory, stages
from llm3.checkpoint import Checkpoints, DamagedCheckpoint
from llm3.config import RunConfig, StageConfig, as_dict
from llm3.data.batch import Batch
from llm3.errors import UserError, nearest
from llm3.experiment import Experiment
from llm3.handoff import CHECKPOINTS, INIT, Parent, Start
from llm3.loop import Cost, Meter, StopRequest, train
from llm3.models.transformer import abstract, canonical, init
from llm3.report.console import Progress
from llm3.report.logs import MetricsWriter
from llm3.report.units import count, duration
from llm3.session import ROW, Session
from llm3.sharding import named, place_batch
from llm3.stages import parent_label
from llm3.step import TrainState
from llm3.tree import flatten, size, unflatten
from llm3.workdir import RECORD, read_json, stage_record, write_json


def locate_parent(
    config: RunConfig, workdir: Path, name: str, in_this_run: list[str]
) -> tuple[Start | None, Parent | None]:
    """Where a stage starts from, and the parent's checkpoint, None where it is yet to come. Raises UserError.

    (None, None) for a stage that resumes or starts from nothing: a stage's own checkpoints beat `start`.
    """
    stage, where = config.stages[name], f"config.stages.{name}.start"
    start = handoff.read_start(stage.start, workdir, where)
    resumes = bool(Checkpoints(workdir / name / CHECKPOINTS, read_only=True).steps())
    if resumes or start is None or start.stage == INIT:
        return None, None
    if start.run != workdir or start.stage not in in_this_run:
        return start, handoff.find_parent(start, where)
    if start.step != "latest":
        kept = kept_steps(config.stages[start.stage])
        if start.step not in kept and not config.stages[start.stage].best:
            raise UserError(
                f"{where}.step={start.step}: stage {start.stage!r} will keep the steps {', '.join(map(str, kept))} "
                f"(its steps, save_every and keep)"
            )
    return start, None


def check_ancestry(workdir: Path, names: list[str]) -> None:
    """Raise UserError where a stage was trained from other parameters than its parent in this run has now."""
    for name in names:
        checkpoints = Checkpoints(workdir / name / CHECKPOINTS, read_only=True)
        metas = []
        for step in checkpoints.steps()[-1:]:
            with suppress(DamagedCheckpoint):  # resuming falls back to an older one, and says so
                metas.append(checkpoints.meta(step))
        for parent in (meta["parent"] for meta in metas if meta["parent"]):
            row = read_json(workdir / parent["stage"] / ROW)
            own = Path(parent["run"]) == workdir.resolve()
            if own and row and parent["step"] == row["steps"] and parent["params_digest"] != row["params_digest"]:
                raise UserError(
                    f"{workdir / name} was trained from other parameters of {parent['stage']!r} than there are now "
                    f"({parent['params_digest'][:12]} then, {row['params_digest'][:12]} now): move {workdir / name} "
                    f"away to train it anew, or use another --workdir"
                )


def kept_steps(stage: StageConfig) -> list[int]:
    """The steps whose checkpoints are there once a stage is finished, beside the best one."""
    saved = sorted({*range(stage.save_every, stage.steps, stage.save_every), stage.steps})
    return saved[-stage.keep :]


def preflight(session: Session, name: str, in_this_run: list[str]) -> None:
    """Everything about a stage that can be wrong, found before any stage trains. Raises UserError."""
    experiment, stage = session.experiment, session.config.stages[name]
    find_parent(experiment, name, in_this_run)
    trainer = session.trainer(name)
    try:
        jax.eval_shape(trainer.train_step, trainer.abstract_state, abstract_batch(session, name))
    except (TypeError, ValueError) as error:
        raise UserError(f"config.stages.{name}: its step cannot be built: {error}") from error
    if stage.best:
        best_sign(session, name)
    checkpoints = Checkpoints(session.workdir / name / CHECKPOINTS, read_only=True)
    for step in reversed(checkpoints.steps()):
        with suppress(DamagedCheckpoint):
            return check_same_data(session, name, checkpoints.meta(step))


def check_same_data(session: Session, name: str, meta: dict) -> None:
    """Raise UserError where a stage was begun with another tokenizer or on other texts."""
    now = {"tokenizer_hash": session.experiment.tokenizer.hash, "data": session.experiment.fingerprints(name)}
    for key, value in now.items():
        if meta[key] != value:
            raise UserError(
                f"{session.workdir / name} was trained on other data ({key}: {meta[key]} there, {value} now): "
                f"bring the data back, or use another --workdir"
            )


def find_parent(experiment: Experiment, name: str, in_this_run: list[str]) -> Parent | None:
    """The parent of a stage, found and accounted for leaf by leaf. Raises UserError.

    None for a stage that resumes or starts from nothing, and for a parent in `in_this_run`: its checkpoint is yet to
    come, but its shapes are known and checked.
    """
    where = f"config.stages.{name}.start"
    start, parent = locate_parent(experiment.config, experiment.workdir, name, in_this_run)
    if start is None:
        return None
    if parent is None:
        leaves = _shapes(experiment, start.stage)
    else:
        handoff.check_tokenizer(parent, experiment.tokenizer.hash, where)
        leaves = parent.shapes()
    account = handoff.account(_shapes(experiment, name), leaves, start, where)
    if "head/kernel" in account.loaded:
        known = parent.meta["labels"] if parent else experiment.labels(start.stage)
        handoff.check_labels(known, experiment.labels(name), where)
    return parent


def _shapes(experiment: Experiment, name: str) -> dict[str, tuple[int, ...]]:
    shapes = canonical(abstract(experiment.model(name)).shapes)
    return {path: leaf.shape for path, leaf in flatten(shapes).items()}


def run_stage(session: Session, name: str, request: StopRequest) -> bool:
    """Train a stage to its end and evaluate it; False where a signal asked to stop (all is saved then)."""
    experiment, stage = session.experiment, session.config.stages[name]
    check_ancestry(session.workdir, [name])
    directory = session.workdir / name
    parent = find_parent(experiment, name, [])
    trainer = session.trainer(name)
    memory.reset_peak()
    write_json(directory / RECORD, stage_record(session.config, name))
    with Checkpoints(directory / CHECKPOINTS, keep=stage.keep, best=stage.best or None) as checkpoints:
        state, cost, meta = start(session, name, parent, trainer, checkpoints)
        first = int(state.step)
        step = compile_step(session, name, trainer, cost)
        mixture = experiment.mixture(name)

        def on_save(done: int, state: TrainState) -> None:
            save(session, name, trainer, checkpoints, meta, cost, done, state)

        with MetricsWriter(directory, first or None) as writer, Progress(stage.steps, first, name) as progress:

            def on_log(done: int, line: dict) -> None:
                line = {"learning_rate": float(trainer.optimizer.schedule(done - 1 - cost.skipped_steps))} | line
                writer.write(done, line)
                progress.log(done, line)
                if line["skipped_steps"]:
                    session.console.print(f"{name}: skipped {line['skipped_steps']} steps: no label, or no finite loss")

            state, done = train(
                state,
                step,
                lambda i: place_batch(session.mesh, mixture.batch(i)),
                Meter(cost, trainer.flops_per_step, session.peak_flops),
                start=first,
                stop=stage.steps,
                log_every=stage.log_every,
                save_every=stage.save_every,
                on_log=on_log,
                on_save=on_save,
                request=request,
            )
        checkpoints.wait()
    if done < stage.steps:
        return False
    trainable = size(trainer.abstract_state.trainable)
    session.write_row(
        name,
        trainer.params(state),
        vars(cost) | {"trainable_params": trainable, "steps": stage.steps, "parent": parent_label(stage)},
    )
    return True


def save(
    session: Session,
    name: str,
    trainer: stages.Trainer,
    checkpoints: Checkpoints,
    meta: dict,
    cost: Cost,
    done: int,
    state: TrainState,
) -> None:
    """Begin to write a checkpoint of step `done`, with the stage's best figure where the config names one."""
    stage, params, scored = session.config.stages[name], trainer.params(state), None
    if stage.best:
        scored = {stage.best: best_sign(session, name) * session.figures(params, name)[stage.best]}
    cost.peak_bytes = max(memory.peak_bytes() or 0, cost.peak_bytes)
    saved = meta | {"step": done, "finished": done == stage.steps, "cost": dict(vars(cost))}
    checkpoints.save(done, params, state.opt, saved, scored)


def best_sign(session: Session, name: str) -> int:
    """1 where less of the stage's `best` figure is better, else -1. Raises UserError for one that it does not have."""
    sign = {}
    for evaluation, config in session.config.evaluations.items():
        peer = evals.load(config.kind)
        if not peer.NEEDS_HEAD or session.experiment.labels(name):
            sign |= {f"{evaluation}_{figure}": 1 if way == "lower" else -1 for figure, way in peer.BETTER.items()}
    if (best := session.config.stages[name].best) not in sign:
        raise UserError(f"config.stages.{name}.best={best!r}: no such figure of this stage; {nearest(best, sign)}")
    return sign[best]


def compile_step(session: Session, name: str, trainer: stages.Trainer, cost: Cost) -> Any:
    """The compiled step; says what it will take."""
    stage = session.config.stages[name]
    compiled = trainer.train_step.lower(trainer.abstract_state, abstract_batch(session, name)).compile()
    analysis = compiled.memory_analysis()
    bytes_ = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes
    trainable, frozen = size(trainer.abstract_state.trainable), size(trainer.abstract_state.frozen)
    left = trainer.flops_per_step * stage.steps - cost.flops
    session.console.print(
        f"{name}: {count(trainable)} of {count(trainable + frozen)} parameters train, "
        f"{count(stage.batch_size * stage.sequence_length)} tokens a step, {stage.steps} steps; "
        f"about {bytes_ / 2**20:.0f} MiB a device and {duration(left / session.flops_per_second())}"
    )
    for source, facts in session.experiment.data_facts(name).items():
        session.console.print(f"  {source}: " + ", ".join(facts))
    for note in trainer.notes:
        session.console.print(f"  {note}")
    return compiled


def abstract_batch(session: Session, name: str) -> Batch:
    """The shapes of a stage's batch on the mesh."""
    stage = session.config.stages[name]
    sharding = named(session.mesh, "batch", "length")
    example = session.experiment.mixture(name).batch(0, slice(0, 1))
    shape = (stage.batch_size, stage.sequence_length)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(shape, x.dtype, sharding=sharding), example)


def start(
    session: Session, name: str, parent: Parent | None, trainer: stages.Trainer, checkpoints: Checkpoints
) -> tuple[TrainState, Cost, dict]:
    """Resume from the stage's own newest checkpoint; else start from the parent; else from nothing."""
    base = base_meta(session, name, parent)
    own = checkpoints.load_newest(trainer.abstract_params, trainer.abstract_state.opt)
    if own is None:
        params, said = first_params(session, name, parent, trainer)
        return trainer.state(params), Cost(), base | said
    step, params, opt, meta, skipped = own
    for line in skipped:
        session.console.print(f"{name}: {line}", style="bold red")
    check_same_data(session, name, meta)
    session.console.print(f"{name}: resumes at step {step}")
    if (before := meta["model"]["compute_dtype"]) != trainer.model.compute_dtype:
        session.console.print(f"{name}: computed in {before} so far, in {trainer.model.compute_dtype} from here on")
    return trainer.state(params, opt, step), Cost(**meta["cost"]), meta


def first_params(session: Session, name: str, parent: Parent | None, trainer: stages.Trainer) -> tuple[dict, dict]:
    """The canonical parameters that a stage starts with, and what the metadata says of them."""
    seed = session.experiment.seed(INIT)
    if parent is None:
        return init(trainer.model, seed, session.mesh), {"fresh": sorted(flatten(trainer.abstract_params))}
    params, account = handoff.load(parent, trainer.abstract_params, f"config.stages.{name}.start")
    if account.fresh:
        fresh = init(trainer.model, seed, session.mesh, only=account.fresh)
        params = unflatten(flatten(params) | flatten(fresh))
    said = {"fresh": list(account.fresh), "dropped": list(account.dropped)}
    extra = "".join(f"; {key}: {', '.join(paths)}" for key, paths in said.items() if paths)
    session.console.print(
        f"{name}: starts from {parent.start.run / parent.start.stage} step {parent.step}, "
        f"{len(account.loaded)} leaves loaded{extra}"
    )
    return params, said


def base_meta(session: Session, name: str, parent: Parent | None) -> dict:
    """What every checkpoint of a stage says of where it comes from."""
    experiment, stage = session.experiment, session.config.stages[name]
    return {
        "stage": name,
        "kind": stage.kind,
        "steps": stage.steps,
        "seed": session.config.seed,
        "parent": parent and parent.describe(),
        "lineage": handoff.lineage(parent),
        "reset": ["step", "optimizer", "schedule", "data"],
        "tokenizer_hash": experiment.tokenizer.hash,
        "data": experiment.fingerprints(name),
        "labels": experiment.labels(name),
        "model": as_dict(experiment.model(name)),
        "config": stage_record(session.config, name),
        "version": __version__,
    }
