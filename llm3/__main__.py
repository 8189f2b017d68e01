"""The command line: `python -m llm3 VERB --config=FILE --workdir=DIR [--config.field=value ...]`."""

import argparse
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from llm3.config.load import load
from llm3.errors import UserError

Flag = tuple[str, dict[str, Any]]


class Verb(NamedTuple):
    """A verb of the command line: `call` names its function, which gets the flags as arguments, by name."""

    call: str
    help: str
    flags: tuple[Flag, ...]
    clustered: bool = False  # several processes can do it together


def flag(name: str, **options: Any) -> Flag:
    """One command-line flag, with the options of `argparse`."""
    return name, options


CONFIG = flag("--config", required=True, metavar="FILE", help="a config file, as in configs/")
OPTIONAL_CONFIG = flag("--config", metavar="FILE", help="the run's config file: refuse a run of another config")
WORKDIR = flag("--workdir", required=True, type=Path, metavar="DIR", help="the run's files")
CACHE_ONLY = flag("--workdir", default="runs/bench", type=Path, metavar="DIR", help="where a token cache is written")
STAGES = flag("--stages", type=lambda names: names.split(","), metavar="A,B", help="only these stages (default: all)")
STAGE = flag("--stage", required=True)
PROCESSES = (
    flag("--coordinator", metavar="HOST:PORT", help="process 0, where several processes are one run"),
    flag("--processes", type=int, metavar="N", help="their number (SLURM, Open MPI and TPUs set it themselves)"),
    flag("--process", type=int, metavar="I", help="which of them this is, from 0"),
)

VERBS = {
    "run": Verb(
        "cli.run:run", "train and evaluate the stages; the same line again resumes", (CONFIG, WORKDIR, STAGES), True
    ),
    "eval": Verb("cli.run:evaluate", "evaluate the checkpoints of a run again", (CONFIG, WORKDIR, STAGES), True),
    "generate": Verb(
        "cli.generate:generate",
        "sample from a stage, or from every stage of a run",
        (
            OPTIONAL_CONFIG,
            WORKDIR,
            flag("--stage", help="one stage (default: every stage, one under another)"),
            flag("--prompt", required=True),
            flag("--max_tokens", type=int, default=64),
            flag("--temperature", type=float, default=0.8, help="0: always the most likely token"),
            flag("--top_k", type=int, default=0, help="0: all"),
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
            flag("--to", required=True, type=Path, metavar="DIR", help="a new directory"),
            flag(
                "--format",
                dest="form",
                default="merged",
                help="merged (default), base: without adapters, or adapters: for PEFT",
            ),
            flag("--step", default="latest", help="step of the checkpoint (default: the latest)"),
            flag("--base", help="the base model that the adapters name, for --format=adapters"),
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
            flag("--alone", action="store_true", help="without full training for comparison, where that does not fit"),
        ),
        True,
    ),
    "data": Verb(
        "cli.data:data",
        "show the documents of each stage as the model will see them, or tokenize a shard of them",
        (
            CONFIG,
            CACHE_ONLY,
            STAGES,
            flag("--shard", metavar="I/N", help="only tokenize shard I of N of the training documents into the cache"),
        ),
    ),
    "overlap": Verb(
        "cli.data:overlap", "show what of the evaluations is in the training data", (CONFIG, CACHE_ONLY, STAGES)
    ),
    "bench-data": Verb(
        "cli.bench_data:bench_data",
        "time the token cache on a generated file, compared with datasets.map, with its memory",
        (CACHE_ONLY, flag("--gigabytes", type=float, default=0.1, help="the size of the file (default: 0.1)")),
    ),
    "plan": Verb(
        "cli.plan:plan",
        "show what each stage trains and costs, before anything runs",
        (
            CONFIG,
            CACHE_ONLY,
            STAGES,
            flag("--topology", metavar="NAME", help="memory, FLOPs and step time on v5p:8x8x8, h100x64, ... or cpu"),
            flag("--aot", action="store_true", help="compile for that TPU as well: minutes a stage, needs llm3[aot]"),
        ),
    ),
    "lineage": Verb("cli.plan:lineage", "show where the stages of a run come from", (WORKDIR,)),
}


def parser() -> argparse.ArgumentParser:
    """The arguments of all verbs."""
    top = argparse.ArgumentParser(prog="llm3", description="Language models in three stages.")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, verb in VERBS.items():
        epilog = "--config.FIELD=VALUE sets a field of the config"
        own = verbs.add_parser(name, help=verb.help, description=verb.help, allow_abbrev=False, epilog=epilog)
        for flag_name, options in (*verb.flags, *(PROCESSES if verb.clustered else ())):
            own.add_argument(flag_name, **options)
    return top


def main(arguments: list[str] | None = None) -> int:
    """Run one verb; the exit status is one of `errors.Exit`, or 130 after Ctrl-C."""
    arguments = sys.argv[1:] if arguments is None else arguments
    overrides = [each.removeprefix("--config.") for each in arguments if each.startswith("--config.")]
    options = vars(parser().parse_args([each for each in arguments if not each.startswith("--config.")]))
    verb = VERBS[options.pop("verb")]
    try:
        if overrides and not options.get("config"):
            raise UserError(f"--config.{overrides[0]}: there is no --config=FILE that it could change")
        if options.get("config"):
            options["config"] = load(options["config"], overrides)
        cluster = [options.pop(name[2:]) for name, _ in PROCESSES] if verb.clustered else None
        with joined(*cluster) if cluster else nullcontext():
            return function_of(verb)(**options)
    except UserError as error:
        print(f"llm3: {error}", file=sys.stderr)
        return error.exit
    except KeyboardInterrupt:
        return 130


@contextmanager
def joined(*cluster: Any) -> Iterator[None]:
    """One of several processes, if there are any, for as long as the context lasts."""
    from llm3.distributed import processes

    with processes.joined(*cluster) as found:
        if processes.count() > 1 and processes.is_first():
            print(f"llm3: {found}", file=sys.stderr)
        yield


def function_of(verb: Verb) -> Callable[..., int]:
    """The function of a verb. It is imported late, so that bad arguments are answered at once."""
    module, name = verb.call.split(":")
    return getattr(importlib.import_module(f"llm3.{module}"), name)


if __name__ == "__main__":
    sys.exit(main())
