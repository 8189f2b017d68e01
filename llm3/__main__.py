"""The command line: `python -m llm3 VERB --config=FILE --workdir=DIR [--config.field=value ...]`."""

import argparse
import json
import sys
from pathlib import Path

from llm3.config.load import load
from llm3.config.schema import RunConfig
from llm3.errors import UserError

VERBS = {
    "run": "train and evaluate the stages; the same line again resumes",
    "eval": "evaluate the checkpoints of a run again",
    "generate": "sample from a stage, or from every stage of a run",
    "export": "write a stage as a directory that transformers or PEFT loads",
    "bench": "time the step of one stage",
    "data": "show the texts of each stage as the model will see them, or tokenize a shard of them",
    "overlap": "show what of the evaluations is in the training data",
    "bench-data": "time the token cache on a generated file, beside datasets.map, with its memory",
    "plan": "show what each stage trains and costs, before anything runs",
    "lineage": "show where the stages of a run come from",
}
CLUSTERED = ("run", "eval", "bench")  # what several processes can do together
WORKDIR_IS_OPTIONAL = ("bench", "bench-data", "plan", "data", "overlap")  # they write only a token cache


def parser() -> argparse.ArgumentParser:
    """The arguments of all verbs."""
    top = argparse.ArgumentParser(prog="llm3", description="Language models in three stages.")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb, text in VERBS.items():
        epilog = "--config.FIELD=VALUE sets a field of the config"
        add = verbs.add_parser(verb, help=text, description=text, allow_abbrev=False, epilog=epilog).add_argument
        if verb not in ("lineage", "export", "bench-data"):
            add("--config", required=verb != "generate", metavar="FILE", help="a config file, as in configs/")
        default = "runs/bench" if verb in WORKDIR_IS_OPTIONAL else None
        add("--workdir", required=not default, default=default, type=Path, metavar="DIR", help="the run's files")
        if verb in CLUSTERED:
            add("--coordinator", metavar="HOST:PORT", help="of process 0, where several processes are one run")
            add("--processes", type=int, metavar="N", help="how many (SLURM, Open MPI and TPUs tell it themselves)")
            add("--process", type=int, metavar="I", help="which of them this is, from 0")
        if verb in ("run", "eval", "plan", "data", "overlap"):
            add("--stages", metavar="A,B", help="only these stages (default: all)")
        if verb == "plan":
            machine = "what a step takes of v5p:8x8x8, h100x64, ... or cpu, without having it and without texts"
            add("--topology", metavar="NAME", help=machine)
            add(
                "--aot", action="store_true", help="with what the TPU's compiler says: minutes a stage, needs llm3[aot]"
            )
        if verb == "bench-data":
            add("--gigabytes", type=float, default=0.1, help="the size of the file (default: 0.1)")
        if verb == "data":
            add("--shard", metavar="I/N", help="only tokenize shard I of N of the training texts into the cache")
        if verb == "bench":
            add("--stage", required=True, help="the stage whose step is timed")
            add("--json", action="store_true", help="one line of JSON")
            add("--alone", action="store_true", help="without full training beside it, where that does not fit")
        if verb == "generate":
            add("--stage", help="one stage (default: every stage, one under another)")
            add("--prompt", required=True)
            add("--max_tokens", type=int, default=64)
            add("--temperature", type=float, default=0.8, help="0: always the most likely token")
            add("--top_k", type=int, default=0, help="0: all")
            add("--top_p", type=float, default=1.0)
            add("--seed", type=int, default=0)
        if verb == "export":
            add("--stage", required=True)
            add("--to", required=True, type=Path, metavar="DIR", help="a new directory")
            add("--format", default="merged", help="merged (default), base: without adapters, or adapters: for PEFT")
            add("--step", default="latest", help="of the checkpoint (default: the latest)")
            add("--base", help="the model that the adapters name as theirs, for --format=adapters")
    return top


def main(arguments: list[str] | None = None) -> int:
    """Run one verb; the exit status is one of `errors.Exit`, or 130 after Ctrl-C."""
    arguments = sys.argv[1:] if arguments is None else arguments
    overrides = [each.removeprefix("--config.") for each in arguments if each.startswith("--config.")]
    args = parser().parse_args([each for each in arguments if not each.startswith("--config.")])
    try:
        if overrides and not getattr(args, "config", None):
            raise UserError(f"--config.{overrides[0]}: there is no --config=FILE that it could change")
        config = load(args.config, overrides) if getattr(args, "config", None) else None
        return cluster(args, config) if args.verb in CLUSTERED else dispatch(args, config)
    except UserError as error:
        print(f"llm3: {error}", file=sys.stderr)
        return error.exit
    except KeyboardInterrupt:
        return 130


def cluster(args: argparse.Namespace, config: RunConfig) -> int:
    """Call the verb together with the other processes, if there are any."""
    from llm3.distributed import processes

    with processes.joined(args.coordinator, args.processes, args.process) as found:
        if processes.count() > 1 and processes.is_first():
            print(f"llm3: {found}", file=sys.stderr)
        return dispatch(args, config)


def dispatch(args: argparse.Namespace, config: RunConfig | None) -> int:
    """Call the verb. Imports come late, so that bad arguments are answered at once."""
    names = args.stages.split(",") if getattr(args, "stages", None) else None
    if args.verb == "run":
        from llm3.cli.run import run

        return run(config, args.workdir, names)
    if args.verb == "eval":
        from llm3.cli.run import evaluate

        return evaluate(config, args.workdir, names)
    if args.verb == "bench":
        from llm3.cli.bench import bench

        return bench(config, args.workdir, args.stage, args.json, args.alone)
    if args.verb == "bench-data":
        from llm3.cli.bench_data import data_bench

        print(json.dumps(data_bench(args.gigabytes, args.workdir), indent=1))
        return 0
    if args.verb in ("data", "overlap"):
        from llm3.cli import data as describe_data

        if args.verb == "overlap":
            return describe_data.overlaps(config, args.workdir, names)
        if args.shard:
            return describe_data.build_shard(config, args.workdir, names, args.shard)
        return describe_data.data(config, args.workdir, names)
    if args.verb == "plan":
        from llm3.cli import plan as describe

        if args.aot and not args.topology:
            raise UserError("--aot: expected --topology=NAME beside it, a TPU")
        if args.topology:
            return describe.plan_on(config, args.workdir, names, args.topology, args.aot)
        return describe.plan(config, args.workdir, names)
    if args.verb == "lineage":
        from llm3.cli.plan import lineage

        return lineage(args.workdir)
    if args.verb == "export":
        from llm3.cli.export import export

        return export(args.workdir, args.stage, args.to, args.format, args.step, args.base)
    from llm3.cli.generate import generate

    options = {key: getattr(args, key) for key in ("max_tokens", "temperature", "top_k", "top_p", "seed")}
    return generate(config, args.workdir, args.stage, args.prompt, **options)


if __name__ == "__main__":
    sys.exit(main())
