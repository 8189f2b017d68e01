"""What the training loop calls for a stage: log lines, evaluations, samples and saves; and advice on a divergence."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import jax

from llm3.distributed import interrupts, processes
from llm3.distributed.preemption import StopRequest
from llm3.errors import Diverged, counted
from llm3.report.console import Progress
from llm3.report.logs import MetricsWriter
from llm3.report.units import words
from llm3.stages.evaluation import subject_of
from llm3.stages.samples import take_samples
from llm3.stages.stage_run import StageRun
from llm3.training.loop import Hooks, Verdict
from llm3.training.phase import Phase
from llm3.training.step import STEP_METRICS, TrainState


@contextmanager
def make_hooks(
    run: StageRun, phase: Phase, done: int, writer: MetricsWriter | None, request: StopRequest
) -> Iterator[Hooks]:
    """The loop's hooks for a phase from step `done` on. writer: None on all processes but the first."""
    config, mixture, console = run.stage.config, run.stage.data.mixture, run.session.console
    watchdog, validation = run.session.watchdog, run.validation
    last_save = [time.monotonic()]
    extra = {name: words(name) for name in own_metrics(run, phase)} | validation.labels
    shown = Progress(config.steps, done, run.stage.name, console, extra=extra) if writer else nullcontext()
    with shown as progress:

        def on_log(done: int, line: dict) -> None:
            if writer is None or progress is None:
                return
            rate = float(phase.optimizer.schedule(done - 1 - run.cost.skipped_steps))
            epochs = {f"epochs_{source}": seen for source, seen in mixture.epochs(done).items()}
            line = {"learning_rate": rate} | line | epochs
            writer.write(done, line)
            progress.log(done, line | validation.shown)
            if skipped := line["skipped_steps"]:
                why = "no labels, or non-finite or spiking loss or gradient"
                console.print(f"{run.stage.name}: skipped {counted(skipped, 'step')} ({why})")
            if line["new_levels"]:
                spikes = f"{config.guard.accept_after} spikes in a row"
                console.print(f"{run.stage.name}: the guard accepts a new level after {spikes}")

        def on_eval(done: int, state: TrainState) -> Verdict:
            metrics = validation.measure(done, phase.params(state), watchdog.alive)
            if writer is not None:
                writer.write(done, metrics, group="eval")
            console.print(validation.sentence(done))
            return validation.verdict(done)

        def on_save(done: int, state: TrainState) -> None:
            with interrupts.doing(f"saving step {done}"), run.session.watch.part("save"):
                run.save(watchdog.alive, phase, done, state)
            last_save[0] = time.monotonic()

        def saves(done: int) -> bool:
            if config.keep_every and done % config.keep_every == 0:
                return True
            return bool(config.save_minutes) and done % config.log_every == 0 and minutes_passed()

        def minutes_passed() -> bool:  # by the clock of the first process: all of them save at the same step
            seconds = 60 * config.save_minutes
            return processes.broadcast_from_first(lambda: time.monotonic() - last_save[0] >= seconds)

        def sampled(done: int) -> bool:  # after the last step, the stage's result is sampled
            return bool(config.sample_every) and done % config.sample_every == 0 and done < config.steps

        def on_sample(done: int, state: TrainState) -> None:
            with run.session.watch.part("evaluate"):
                sample(run, done, phase.params(state), writer)

        called = (validation.due, on_log, on_eval, on_save)
        try:
            yield Hooks(config.log_every, config.save_every, *called, request, watchdog, sampled, on_sample, saves)
        except Diverged as error:
            raise Diverged(f"{run.stage.name}: {error}. {advice(run, error.first)}") from None


def sample(run: StageRun, done: int, params: dict, writer: MetricsWriter | None) -> None:
    """Continue the config's prompts with canonical parameters after a step."""
    template = run.session.experiment.library.template if run.meta["chat_template"] else ""
    take_samples(run.session, subject_of(run.stage), params, done, template, writer)


def own_metrics(run: StageRun, phase: Phase) -> list[str]:
    """The metrics that the objective computes besides the loss."""
    batch = run.stage.abstract_batch(run.session.mesh, phase.batch_size)
    _, metrics = jax.eval_shape(phase.train_step, phase.abstract_state, batch)
    return [name for name in metrics if name not in STEP_METRICS]


def advice(run: StageRun, first: int) -> str:
    """What a user can do about a stage that diverged at step `first`."""
    name, kind = run.stage.name, run.stage.config.kind
    kind = "posttrain" if kind == "pretrain" else kind  # a pretrain stage has no start
    run.checkpoints.wait()
    # the last update before the first bad step may be what went wrong
    step = max((step for step in run.checkpoints.steps() if step < first - 1), default=None)
    if step is None:
        return f"No checkpoint is from before: move {run.directory} away to train with a lower learning_rate"
    return (
        f"Checkpoint {step} is intact. Rerun with a higher guard.stop_after to skip more such steps. Or go back to it "
        f'with --stages={name} --from_step={step} --amend="why" and a lower learning_rate, other data, or skip_steps '
        f"that leave out the batches from step {first} on. Or add a stage with kind={kind!r}, "
        f"start=dict(stage={name!r}, step={step}) and otherwise the fields of this one; name it in --stages"
    )
