"""Places in llm3 where a process of `tiny_run` sends itself a signal, kills others, or hangs."""

import functools
import gc
import itertools
import os
import pathlib
import signal
import time
import types
from collections.abc import Callable
from contextlib import suppress

VICTIMS = "LLM3_TEST_VICTIMS"  # process numbers to kill in place of the process itself, which is 0


def die_at(point: str) -> None:
    """Patch llm3 so that this process sends itself a signal at SIGNAL@WHAT[:STAGE:STEP] (HANG: hangs). WHAT is one of

    step: so many steps have been made, over all stages; computing: the devices are at this step; data: the batch of a
    step is read, in any stage; log: a line of metrics has been written; evaluating: a step is about to be evaluated;
    batch: so many batches of the evaluation for a row have been done; row: a stage is trained and its row is about to
    be measured and written;
    tokenizer: it is about to be trained; tokens: so many texts have been encoded; shard: a part of a cache is
    built, and not in its place; file (file:END OF ITS PATH): this file is written, and not in its place;
    saving: a save has begun, in the background; part: its files are written, none of its parts is in place;
    commit: all are, and the checkpoint itself is not; committed: it is, and no older one is deleted; saved: all is done
    (saving_base, saved_base: of the base of a stage; the others: with step 0);
    reading: the parent of a stage has been read, but not judged; handed: what a stage begins with is on the devices.

    With `VICTIMS` in the environment, these processes are killed, at once and once, and this one may go on.
    """
    name, _, rest = point.partition("@")
    what, stage, step = (*rest.split(":"), "", "")[:3]
    victims = [int(each) for each in os.environ.get(VICTIMS, "").split(",") if each]

    def die() -> None:
        if name == "HANG":
            hang()
        if VICTIMS in os.environ:
            while victims:
                with suppress(ProcessLookupError):  # it has ended by itself
                    os.kill(victims.pop(0) or os.getpid(), signal.Signals[name])
            return
        os.kill(os.getpid(), signal.Signals[name])
        if "LLM3_PROCESS" in os.environ:
            wait_until_all_have_heard()
            os.kill(os.getpid(), signal.Signals[name])  # once more, as some schedulers do

    if what in WHILE:
        return WHILE[what](stage, int(step), die)
    owner, attribute, applies, before = places(stage, int(step or 0))[what]
    original = getattr(owner, attribute)

    @functools.wraps(original)
    def patched(*args, **kwargs):
        result = None if before else original(*args, **kwargs)
        if applies(*args):
            die()
        return original(*args, **kwargs) if before else result

    setattr(owner, attribute, patched)


def wait_until_all_have_heard() -> None:
    """Wait for all processes to know of this one's SIGTERM: they look for it now and then, a step is short."""
    from llm3.distributed import processes

    end = time.monotonic() + 60
    while len(processes.published("at")) < processes.count() and time.monotonic() < end:
        time.sleep(0.1)


def hang() -> None:
    """Do nothing until all others are further; then let the watchdog's clock run ahead of any limit."""
    from llm3.distributed import processes, watchdog

    own = next(each for each in gc.get_objects() if isinstance(each, watchdog.Watchdog))

    def others_wait() -> bool:  # what is published may be old: the others are there at least
        places = {process: watchdog.Place(*place) for process, place in processes.published("place").items()}
        places[processes.index()] = own.place()
        return len(places) == processes.count() and watchdog.late(places) == [processes.index()]

    while not others_wait():
        time.sleep(0.1)
    watchdog.time = types.SimpleNamespace(monotonic=lambda: time.monotonic() + 10**6, sleep=time.sleep)
    time.sleep(3600)


def places(stage: str, step: int) -> dict[str, tuple[object, str, Callable[..., bool], bool]]:
    """{WHAT: the function, as an owner and a name; whether a call of it is the one; whether to die before it}."""
    from llm3.checkpoints import stage_checkpoints
    from llm3.data import mixture, tokenizer
    from llm3.data.cache import shards
    from llm3.data.formats import text
    from llm3.distributed import preemption
    from llm3.handoff import parent as handoff
    from llm3.report import logs
    from llm3.stages import run_stage, stage_run, validation

    calls = itertools.count(1)

    def of_step(checkpoints, at, *_) -> bool:
        return of_stage(checkpoints) and at == step

    def of_stage(checkpoints, *_) -> bool:
        return checkpoints.directory.parent.name == stage

    def once_done(applies: Callable[..., bool]) -> Callable[..., bool]:
        return lambda checkpoints, *args: applies(checkpoints, *args) and checkpoints.wait() is None

    def of_validation(validation, at, *_) -> bool:
        return validation._stage.name == stage and at == step

    def of_writer(writer, at, *_, **__) -> bool:
        return pathlib.Path(writer._path).parent.name == stage and at == step

    unfinished = f"{stage}/{'checkpoints' if step else stage_checkpoints.BASE}/{step}.orbax-checkpoint-tmp"
    checkpoints = stage_checkpoints.Checkpoints
    return {
        "step": (preemption.StopRequest, "at_step", lambda request: request.steps == step, False),
        "data": (mixture.Mixture, "batch", lambda _, at, *__: at == step, False),
        "log": (logs.MetricsWriter, "write", of_writer, False),
        "evaluating": (validation.Validation, "measure", of_validation, True),
        "saving": (checkpoints, "save", of_step, False),
        "part": (os, "rename", lambda source, _: f"{unfinished}/" in str(source), True),
        "commit": (os, "rename", lambda source, _: str(source).endswith(unfinished), True),
        "committed": (os, "rename", lambda source, _: str(source).endswith(unfinished), False),
        "saved": (checkpoints, "save", once_done(of_step), False),
        "saving_base": (checkpoints, "save_base", of_stage, False),
        "saved_base": (checkpoints, "save_base", once_done(of_stage), False),
        "reading": (handoff, "not_finite", lambda *_: True, True),
        "handed": (stage_run, "first_params", lambda _, of, *__: of.name == stage, False),
        "row": (run_stage, "write_row", lambda _, of, *__: of.name == stage, True),
        "tokenizer": (tokenizer, "train", lambda *_: True, True),
        "tokens": (text, "encode", lambda *_: next(calls) == max(step, 1), False),
        "shard": (shards, "publish", lambda *_: True, True),
        "file": (os, "replace", lambda _, target: str(target).endswith(f"/{stage}"), True),
    }


def die_while_computing(stage: str, step: int, die: Callable[[], None]) -> None:
    """Call `die` when the devices have been given a step of a stage, before anything waits for them."""
    from llm3.stages import run_stage

    compile_step = run_stage.compile_step

    def patched(run, phase, done):
        compiled, steps = compile_step(run, phase, done), itertools.count(done + 1)

        def call(*args):
            result = compiled(*args)
            if next(steps) == step and run.stage.name == stage:
                die()
            return result

        return call

    run_stage.compile_step = patched


def die_while_evaluating(stage: str, batch: int, die: Callable[[], None]) -> None:
    """Call `die` when so many batches of the evaluations for the row of a stage have been done."""
    from llm3.distributed import watchdog
    from llm3.stages import evaluate

    evaluate_subject, alive = evaluate.evaluate_subject, watchdog.Watchdog.alive
    evaluated, batches = [], itertools.count(1)

    def patched(session, subject, *args, **kwargs):
        evaluated.append(subject.name)
        result = evaluate_subject(session, subject, *args, **kwargs)
        evaluated.clear()
        return result

    def patched_alive(dog):
        alive(dog)
        if evaluated == [stage] and next(batches) == batch:
            die()

    evaluate.evaluate_subject, watchdog.Watchdog.alive = patched, patched_alive


WHILE = {"computing": die_while_computing, "batch": die_while_evaluating}
