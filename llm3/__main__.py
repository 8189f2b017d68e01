"""The command line: `python -m llm3 VERB --config=FILE --workdir=DIR [--config.field=value ...]`."""

import gc
import signal

from llm3.distributed import allocator

if __name__ == "__main__":
    allocator.keep_freed_pages()
    gc.disable()  # until a verb is imported: see `function_of`
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `main` handles it, Ctrl-C ends the process without a traceback

import importlib
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from llm3 import remote
from llm3.ablation.load import load_ablation
from llm3.cli import checks
from llm3.cli.arguments import parser as parser  # for those who check commands
from llm3.cli.arguments import read_arguments
from llm3.cli.flags import PROCESSES, Verb
from llm3.cli.output import ReaderGone, watched_output
from llm3.cli.verbs import VERBS
from llm3.distributed import command_time, interrupts
from llm3.errors import NotWritten, UserError, to_stderr
from llm3.files import shown
from llm3.stages.origin import load_config


def main(arguments: list[str] | None = None) -> int:
    """Run one verb; the exit status is one of `errors.Exit`, or 128 + the number of a signal that ended it."""
    alone = __name__ == "__main__"
    command_time.begin(of_process=alone)
    arguments = sys.argv[1:] if arguments is None else arguments
    trains = arguments[:1] in (["run"], ["ablate"])
    try:
        with watched_output(goes_on=trains):
            if threading.current_thread() is not threading.main_thread():  # only the main thread can handle signals
                return call_verb(arguments)
            of_scheduler = interrupts.OF_SCHEDULERS if trains or arguments[:1] == ["data"] else ()
            resumes = of_scheduler or (arguments[:1] == ["predict"] and "--out=-" not in arguments)
            farewell = "stopped" + "; rerun the command to resume" * bool(resumes)
            with interrupts.Interrupts(farewell).watching(*of_scheduler, last=alone) as watched:
                try:
                    return call_verb(arguments)
                except KeyboardInterrupt:
                    return watched.end()
    except ReaderGone:
        return 128 + signal.SIGPIPE
    except NotWritten as error:  # of the output itself
        return failed(error)


def call_verb(arguments: list[str]) -> int:
    """Parse the command line and run its verb; a UserError is printed. Returns the exit status."""
    name = ""
    try:
        name, options, overrides = read_arguments(arguments)
        verb = VERBS[name]
        if overrides and not options.get("config"):
            raise UserError(f"--config.{overrides[0]}: expected --config=FILE as well")
        if name == "ablate":
            options["config"] = load_ablation(options["config"], overrides)
        elif options.get("config"):
            workdir = options["dirs"][0] if "dirs" in options else options.get("workdir", Path())
            options["config"] = load_config(options["config"], overrides, workdir, only_planned=name == "plan")
        checks.check(name, options)
        cluster = [options.pop(each[2:]) for each, _ in PROCESSES] if verb.clustered else None
        with (
            joined(*cluster) if cluster else nullcontext(),
            kept_programs(options["workdir"] if verb.compiles else None),
            pushed_copies(verb.clustered),
        ):
            return function_of(verb)(**options)
    except UserError as error:
        return failed(error)
    except (RuntimeError, MemoryError) as error:  # jax raises RuntimeErrors
        from llm3.distributed import memory

        if not memory.is_exhausted(error):
            raise
        fields = ("a smaller batch_size", "a smaller sequence_length", "config.mesh.fsdp (more devices)")
        return failed(memory.exhausted(name, memory.asked_bytes(error), memory.device_bytes(), fields))


def failed(error: UserError) -> int:
    """Print an error; returns the exit status."""
    to_stderr(f"llm3: {shown(error)}")
    return error.exit


@contextmanager
def joined(*cluster: Any) -> Iterator[None]:
    """Join the other processes of a run, if there are any, until the context ends."""
    from llm3.distributed import ending, processes

    with ending.joined(*cluster) as found:
        if processes.count() > 1 and processes.is_first():
            print(f"llm3: {found}", file=sys.stderr)
        yield


@contextmanager
def pushed_copies(clustered: bool) -> Iterator[None]:
    """Upload what this command writes to runs in buckets: the first process does it. Raises NotWritten."""

    def push() -> None:
        if clustered and remote.copies():
            from llm3.distributed import processes  # starts the devices, which only these verbs use

            if not processes.is_first():
                return
        remote.push()

    try:
        yield
    except BaseException:
        with suppress(NotWritten):
            push()
        raise
    push()


@contextmanager
def kept_programs(workdir: Path | None) -> Iterator[None]:
    """Keep what the devices' compiler makes in a workdir, for later commands; None: do not."""
    if workdir is None:
        yield
        return
    from llm3.distributed import compiled

    with compiled.kept_in(workdir):
        yield


def function_of(verb: Verb) -> Callable[..., int]:
    """The function of a verb, imported late so that bad arguments fail fast."""
    module, name = verb.call.split(":")
    found = getattr(importlib.import_module(f"llm3.{module}"), name)
    if not gc.isenabled():  # a command of its own: searches for garbage need not look at what is imported, which stays
        gc.freeze()
        gc.set_threshold(50_000, 20, 20)  # tracing makes many objects and little garbage
        gc.enable()
    return found


if __name__ == "__main__":
    sys.exit(main())
