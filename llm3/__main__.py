"""The command line: `python -m llm3 VERB --config=FILE --workdir=DIR [--config.field=value ...]`."""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `main` handles it, Ctrl-C ends the process without a traceback

import argparse
import importlib
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

from llm3.cli import checks
from llm3.cli.output import ReaderGone, watched_output
from llm3.distributed import interrupts
from llm3.errors import NotWritten, UserError
from llm3.files import local_path
from llm3.stages.origin import load_config

Flag = tuple[str, dict[str, Any]]


class Verb(NamedTuple):
    """A verb of the command line. call: "module:function"; the function gets the flags as keyword arguments."""

    call: str
    help: str
    flags: tuple[Flag, ...]
    clustered: bool = False  # several processes can run it together


def flag(name: str, **options: Any) -> Flag:
    """One command-line flag, with the options of `argparse`."""
    return name, options


def path_flag(name: str, **options: Any) -> Flag:
    """A flag for a directory on this machine."""
    return flag(name, type=partial(local_path, where=name), metavar="DIR", **options)


def names(text: str) -> list[str]:
    """The names that a flag lists."""
    return text.split(",")


CONFIG = flag("--config", required=True, metavar="FILE", help="a config file, as in configs/")
OPTIONAL_CONFIG = flag("--config", metavar="FILE", help="the run's config file: reject a run with another config")
WORKDIR = path_flag("--workdir", required=True, help="the run's files")
CACHE_ONLY = path_flag("--workdir", default="runs/bench", help="where a token cache is written")
STAGES = flag("--stages", type=names, metavar="A,B", help="only these stages (default: all)")
STAGE = flag("--stage", required=True)
PROCESSES = (
    flag("--coordinator", metavar="HOST:PORT", help="address of process 0, if several processes run together"),
    flag(
        "--processes",
        type=int,
        metavar="N",
        help="number of processes (SLURM, Open MPI and TPUs set it)",
    ),
    flag("--process", type=int, metavar="I", help="index of this process, from 0"),
)

VERBS = {
    "run": Verb(
        "cli.run:run", "train and evaluate the stages; run it again to resume", (CONFIG, WORKDIR, STAGES), True
    ),
    "eval": Verb(
        "cli.evaluate:evaluate",
        "evaluate the newest checkpoints of a run, by its config or by tasks of lm-eval",
        (
            flag("--config", metavar="FILE", help="the run's config file (with --tasks: only for its mesh)"),
            WORKDIR,
            STAGES,
            flag("--tasks", type=names, metavar="A,B", help="tasks of lm-eval, instead of the config's evaluations"),
            path_flag("--include_path", help="a folder with YAML files of tasks"),
            flag("--num_fewshot", type=int, metavar="N", help="examples before each question (default: the task's)"),
            flag("--limit", type=float, metavar="N", help="documents of each task, or, below 1, their share"),
            flag("--apply_chat_template", action="store_true", help="write prompts with the chat template"),
            flag("--batch_size", type=int, metavar="N", help="requests in a batch (default: 16)"),
            flag("--sequence_length", type=int, metavar="N", help="max tokens of a request (default: as trained)"),
        ),
        True,
    ),
    "generate": Verb(
        "cli.generate:generate",
        "sample from a stage, or from every stage of a run",
        (
            OPTIONAL_CONFIG,
            WORKDIR,
            flag("--stage", help="one stage (default: every stage)"),
            flag("--prompt", required=True),
            flag("--raw", action="store_true", help="continue the prompt: do not write it with the chat template"),
            flag("--max_tokens", type=int, default=64),
            flag("--temperature", type=float, default=0.8, help="0: always the most likely token"),
            flag("--top_k", type=int, default=0, help="sample from this many likeliest tokens; 0: all"),
            flag("--top_p", type=float, default=1.0),
            flag("--seed", type=int, default=0),
        ),
    ),
    "export": Verb(
        "cli.export:export",
        "write a stage as a directory that transformers or PEFT loads",
        (
            WORKDIR,
            STAGE,
            path_flag("--to", required=True, help="a new directory"),
            flag(
                "--format",
                dest="form",
                default="merged",
                help="merged (default), base (without adapters) or adapters (for PEFT)",
            ),
            flag("--step", default="latest", help="step of the checkpoint (default: the latest)"),
            flag("--base", help="the base model that the adapters name, for --format=adapters"),
            flag("--dtype", default="float32", help="float32 (default), bfloat16 or float16"),
            flag("--max_shard_size", default="5GB", help="write several files of at most this size (default: 5GB)"),
            flag("--push", metavar="NAME", help="then upload the directory to this repository on the Hugging Face Hub"),
        ),
    ),
    "bench": Verb(
        "cli.bench:bench",
        "time the step of one stage",
        (
            CONFIG,
            CACHE_ONLY,
            flag("--stage", required=True, help="the stage whose step is timed"),
            flag("--json", action="store_true", dest="as_json", help="one line of JSON"),
            flag("--alone", action="store_true", help="do not compare with full training"),
        ),
        True,
    ),
    "data": Verb(
        "cli.data:data",
        "show the documents of each stage as the model sees them, or tokenize a shard of them",
        (
            CONFIG,
            CACHE_ONLY,
            STAGES,
            flag("--shard", metavar="I/N", help="only tokenize shard I of N of the training documents into the cache"),
        ),
    ),
    "overlap": Verb(
        "cli.data:overlap", "show the overlap of the evaluations with the training data", (CONFIG, CACHE_ONLY, STAGES)
    ),
    "bench-data": Verb(
        "cli.bench_data:bench_data",
        "measure the token cache on a generated file, compared with datasets.map",
        (CACHE_ONLY, flag("--gigabytes", type=float, default=0.1, help="the size of the file (default: 0.1)")),
    ),
    "bench-model": Verb(
        "cli.bench_model:bench_model",
        "measure reading and writing a pretrained model",
        (
            CACHE_ONLY,
            flag("--model", metavar="NAME", help="a folder, or a name on the Hub (default: a generated model)"),
            flag("--gigabytes", type=float, default=2, help="the size of the generated model (default: 2)"),
            flag("--fsdp", type=int, default=1, metavar="N", help="the devices that share each leaf (default: 1)"),
            flag("--dtype", default="float32", help="float32 (default), bfloat16 or float16"),
        ),
    ),
    "plan": Verb(
        "cli.plan:plan",
        "show what each stage trains and costs, without running it",
        (
            CONFIG,
            CACHE_ONLY,
            STAGES,
            flag("--topology", metavar="NAME", help="memory, FLOPs and step time on v5p:8x8x8, h100x64, ... or cpu"),
            flag(
                "--aot", action="store_true", help="also compile for that TPU: takes minutes per stage, needs llm3[aot]"
            ),
        ),
    ),
    "lineage": Verb(
        "cli.lineage:lineage",
        "show the parents of the stages of a run",
        (
            WORKDIR,
            flag(
                "--runs",
                type=lambda names: [local_path(each, "--runs") for each in names.split(",")],
                default=(),
                metavar="DIR,...",
                help="folders in which to look for parents that were moved",
            ),
        ),
    ),
}


def parser() -> argparse.ArgumentParser:
    """The parser of all verbs and their flags."""
    top = argparse.ArgumentParser(prog="llm3", description="Language models in three stages.")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, verb in VERBS.items():
        epilog = "--config.FIELD=VALUE sets a field of the config"
        own = verbs.add_parser(name, help=verb.help, description=verb.help, allow_abbrev=False, epilog=epilog)
        for flag_name, options in (*verb.flags, *(PROCESSES if verb.clustered else ())):
            own.add_argument(flag_name, **options)
    return top


def main(arguments: list[str] | None = None) -> int:
    """Run one verb; the exit status is one of `errors.Exit`, or 128 + the number of a signal that ended it."""
    arguments = sys.argv[1:] if arguments is None else arguments
    trains = arguments[:1] == ["run"]
    try:
        with watched_output(goes_on=trains):
            if threading.current_thread() is not threading.main_thread():  # only the main thread can handle signals
                return call_verb(arguments)
            farewell = "stopped" + "; rerun the command to resume" * trains
            with interrupts.Interrupts(farewell).watching(*[signal.SIGTERM] * trains) as watched:
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
    overrides = [each.removeprefix("--config.") for each in arguments if each.startswith("--config.")]
    try:
        options = vars(parser().parse_args([each for each in arguments if not each.startswith("--config.")]))
        verb = VERBS[name := options.pop("verb")]
        if overrides and not options.get("config"):
            raise UserError(f"--config.{overrides[0]}: expected --config=FILE as well")
        if options.get("config"):
            options["config"] = load_config(
                options["config"], overrides, options["workdir"], only_planned=name == "plan"
            )
        checks.check(name, options)
        cluster = [options.pop(each[2:]) for each, _ in PROCESSES] if verb.clustered else None
        with joined(*cluster) if cluster else nullcontext():
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
    """Print an error on one line; returns the exit status."""
    print(f"llm3: {error}", file=sys.stderr)
    return error.exit


@contextmanager
def joined(*cluster: Any) -> Iterator[None]:
    """Join the other processes of a run, if there are any, until the context ends."""
    from llm3.distributed import processes

    with processes.joined(*cluster) as found:
        if processes.count() > 1 and processes.is_first():
            print(f"llm3: {found}", file=sys.stderr)
        yield


def function_of(verb: Verb) -> Callable[..., int]:
    """The function of a verb, imported late so that bad arguments fail fast."""
    module, name = verb.call.split(":")
    return getattr(importlib.import_module(f"llm3.{module}"), name)


if __name__ == "__main__":
    sys.exit(main())
