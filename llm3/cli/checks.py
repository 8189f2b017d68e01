"""Checks of the flags, the config and the names of files, made before jax is imported, which takes seconds."""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm3.ablation.arms import chain_config, variants
from llm3.ablation.schema import AblationConfig
from llm3.cli.bench_checks import DTYPES, check_bench, check_bench_model
from llm3.cli.serve_checks import check_serve
from llm3.config.data_schema import SourceConfig
from llm3.config.sampling import Sampling
from llm3.config.schema import RunConfig
from llm3.data.sources.split_names import expanded, source_name, with_named_splits
from llm3.errors import UserError, nearest
from llm3.files import CHECKPOINTS, PLAN, SESSIONS, local_path
from llm3.registry import check_installed, declared, plugin_names
from llm3.stages import rules
from llm3.stages.amend import planned, stage_to_go_back
from llm3.stages.origin import complete
from llm3.stages.parents import first_rows
from llm3.stages.trackers import check_trackers

LAUNCHERS = ("local", "slurm")
PREDICTED = (".jsonl", ".csv", ".parquet")
EXPORT_FORMATS = ("merged", "base", "adapters")


def check(verb: str, options: Mapping[str, Any]) -> None:
    """Raise UserError for a command line that cannot succeed. options: the flags, with `config` read."""
    if verb == "ablate":
        return check_ablation(options)
    config: RunConfig | None = options.get("config")
    workdir: Path = options.get("workdir") or Path()
    if config is not None:
        check_config(verb, config, options["dirs"][0] if verb == "report" else workdir, options)
    if verb == "generate":
        check_generate(options)
    elif verb == "predict":
        check_predict(options)
    elif verb == "serve":
        check_serve(options)
        for each in options["workdirs"]:
            check_workdir(each, None)
    elif verb == "export":
        check_export(options)
    elif verb == "bench-model":
        check_bench_model(options)
    elif verb == "plan":
        check_plan(options)
    elif verb == "data" and options["shard"]:
        shard_of(options["shard"])
    elif verb == "overlap":
        if options["show"] < 0:
            raise UserError(f"--show={options['show']}: expected at least 0")
        if options["drop"] is not None and options["drop"].exists():
            raise UserError(f"--drop={options['drop']}: exists already; expected the name of a new file")
    elif verb == "cache":
        check_cache(options)
    elif verb in ("run", "eval"):
        check_evaluations(config, options)
    if verb == "report":
        check_report(options)
    if verb in ("generate", "export", "lineage", "eval", "predict"):
        for name in (options["stages"] if options.get("tasks") else None) or [options.get("stage")]:
            check_workdir(workdir, name)
    for run in options.get("runs", ()) if verb == "compare" else ():
        check_workdir(run, None, "")


def check_ablation(options: Mapping[str, Any]) -> None:
    """Raise UserError for flags of `ablate` that are out of range, and for arms that cannot run."""
    config: AblationConfig = options["config"]
    if options["jobs"] < 1:
        raise UserError(f"--jobs={options['jobs']}: expected at least 1")
    if (launcher := options["launcher"]) not in LAUNCHERS:
        raise UserError(f"--launcher={launcher}: {nearest(launcher, LAUNCHERS)}")
    if options.get("sbatch") and launcher != "slurm":
        raise UserError(f"--sbatch={options['sbatch']}: needs --launcher=slurm")
    if launcher == "slurm" and options["jobs"] > 1:
        raise UserError(f"--jobs={options['jobs']}: has no effect with --launcher=slurm, whose limits decide")
    if launcher == "slurm" and not options["plan"]:
        check_slurm()
    try:
        base = complete(config.base)
        rules.check(base)
        check_trackers(base)
    except UserError as error:
        raise UserError(re.sub(r"^config\.", "config.base.", str(error))) from None
    for each in variants(config):
        try:
            own = chain_config(each.values, each.stage)
            rules.check(own)
            rules.check_metric(own, own.stages[each.stage], config.metric, "config.metric")
            for name, comparison in config.comparisons.items():
                if each.arm in (comparison.ours, comparison.theirs):
                    where, stage = f"config.comparisons.{name}", comparison.stage or each.stage
                    if stage not in own.stages:
                        raise UserError(f"{where}.stage={stage!r}: no such stage; {nearest(stage, own.stages)}")
                    rules.check_metric(own, own.stages[stage], comparison.metric or config.metric, f"{where}.metric")
        except UserError as error:
            raise UserError(f"{each.name}: {error}") from None


def check_config(verb: str, config: RunConfig, workdir: Path, options: Mapping[str, Any]) -> None:
    """Raise UserError for a config that the verb cannot use: its stages, files, template and saved records."""
    names = rules.chosen(config, options.get("stages"))
    if verb == "bench":
        if (stage := options["stage"]) not in names:
            raise UserError(f"--stage={stage}: no such stage; {nearest(stage, names)}")
        check_bench(config, options)
    for source in config.sources.values():
        if not (config.data_dir and source.local):
            check_split_names(source)
    if "{%" in (template := config.tokenizer.chat_template):
        from llm3.data.chat_templates import load_template  # needs jinja

        load_template(template)
    if verb == "run":
        check_trackers(config)
    if verb in ("run", "report"):
        back, why = options.get("from_step"), options.get("why", "")
        stage = stage_to_go_back(workdir, names, back)
        for name in [*first_rows(config, workdir), *names]:
            planned(workdir, config, name, why, back if name == stage else None)


def check_plan(options: Mapping[str, Any]) -> None:
    """Raise UserError for flags of `plan` that name no machine or price."""
    if options["price"] is not None and not options["price"] >= 0:
        raise UserError(f"--price={options['price']}: expected the price of a device-hour, at least 0")
    if options["topology"]:
        from llm3.distributed import machines  # needs numpy

        machines.parse(options["topology"], measure=False)
    elif options["aot"]:
        raise UserError("--aot: expected --topology=NAME as well, a TPU")


def check_slurm() -> None:
    """Raise UserError unless jobs can be submitted from here."""
    if not shutil.which("sbatch"):
        raise UserError("--launcher=slurm: no sbatch here: run this on a SLURM cluster")
    if not Path("launch/slurm.sbatch").is_file():
        raise UserError(
            f"--launcher=slurm: no launch/slurm.sbatch in {Path.cwd()}: run this from the repository's root"
        )


def check_split_names(source: SourceConfig) -> None:
    """Raise UserError for files of several splits that a source does not tell apart."""
    given = expanded(source)
    with_named_splits(given, source_name(given))


def check_workdir(workdir: Path, stage: str | None, flag: str = "--workdir=") -> None:
    """Raise UserError unless the run has stages that began to train, and the given one among them."""
    if not workdir.is_dir():
        raise UserError(f"{flag}{workdir}: no such directory; expected one that `run` wrote")
    found = [each.parent.name for each in workdir.glob(f"*/{CHECKPOINTS}")]
    if not found:
        raise UserError(f"{workdir} holds no trained stage yet")
    if stage is not None and stage not in found:
        raise UserError(f"{workdir} holds no stage {stage!r}; {nearest(stage, found)}")


def check_report(options: Mapping[str, Any]) -> None:
    """Raise UserError for flags of `report` that do not fit together."""
    dirs: list[Path] = options["dirs"]
    out: Path | None = options["out"]
    ablations = [each for each in dirs if (each / PLAN).is_file()]
    if ablations and len(dirs) > 1:
        raise UserError(f"report: {ablations[0]} is an ablation; expected it alone, or several runs")
    if ablations and options["config"] is not None:
        raise UserError("--config: expected none; the report of an ablation is written from the config that it keeps")
    for run in dirs if not ablations else []:
        check_workdir(run, None, "")
    if len(dirs) == 1:
        if out is not None:
            raise UserError(f"--out={out}: expected several runs; the report of one run is written in {dirs[0]}")
        return
    if options["config"] is not None:
        raise UserError("--config: expected one run; several runs are compared by the configs that they keep")
    if out is None:
        raise UserError("report: expected --out=DIR as well, for the report of several runs")
    if (out / SESSIONS).exists() or out.is_file():
        what = "a file" if out.is_file() else "a run, whose report would be lost"
        raise UserError(f"--out={out}: it is {what}; expected another folder")


def check_new_folder(out: Path, workdir: Path) -> None:
    """Raise UserError unless `out` can be written without a change of the run or of any file."""
    if out.resolve().is_relative_to(workdir.resolve()):
        raise UserError(f"--out={out}: it is in the run {workdir}, which stays as it is; expected another folder")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out={out}: it is a file; expected a new or an empty folder")
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"--out={out}: it is not empty; expected a new or an empty folder")


def check_evaluations(config: RunConfig | None, options: Mapping[str, Any]) -> None:
    """Raise UserError for flags of `eval` that do not fit together, and for a library that is not installed."""
    if (out := options.get("out")) is not None:
        check_new_folder(out, options["workdir"])
    if tasks := options.get("tasks"):
        check_installed(declared("evals", "harness"), f"--tasks={','.join(tasks)}")
        for flag in ("batch_size", "sequence_length"):
            if options[flag] is not None and options[flag] < 1:
                raise UserError(f"--{flag}={options[flag]}: expected at least 1")
        return
    for flag in ("include_path", "num_fewshot", "limit", "apply_chat_template", "batch_size", "sequence_length"):
        if options.get(flag):
            raise UserError(f"--{flag}={options[flag]}: expected --tasks=NAME as well")
    if config is None:
        raise UserError("eval: expected --config=FILE, or --tasks=NAME for tasks of lm-eval")
    for name, evaluation in config.evaluations.items():
        check_installed(declared("evals", evaluation.kind), f"config.evaluations.{name}.kind={evaluation.kind!r}")


def check_generate(options: Mapping[str, Any]) -> None:
    """Raise UserError for flags of `generate` that are out of range, or that do not go together."""
    asked = [name for name in ("prompt", "chat", "prompts") if options[name] not in (None, False)]
    if len(asked) != 1:
        found = " and ".join(f"--{name}" for name in asked) or "nothing to answer"
        raise UserError(f"generate: {found}: expected one of --prompt=TEXT, --chat and --prompts=FILE")
    if (options["out"] is not None) != (options["prompts"] is not None):
        raise UserError("generate: expected --prompts=FILE and --out=FILE together")
    if asked != ["prompt"] and not options["stage"]:
        raise UserError(f"generate: --{asked[0]}: expected --stage=NAME")
    if not options["max_tokens"] >= 1:
        raise UserError(f"--max_tokens={options['max_tokens']}: expected at least 1")
    Sampling(**{name: options[name] for name in Sampling._fields if name in options}).check("--{}")


def check_predict(options: Mapping[str, Any]) -> None:
    """Raise UserError for flags of `predict` that are out of range, and for an output of an unknown kind."""
    if (given := options["input"]) != "-":
        local_path(given, "--in")
    if (out := options["out"]) != "-":
        path = local_path(out, "--out")
        if path.suffix not in PREDICTED:
            raise UserError(f"--out={out}: {nearest(path.suffix, PREDICTED)}, or '-' for standard output")
        if path.is_dir():
            raise UserError(f"--out={out} is a folder: expected a file in it")
    for flag in ("batch_size", "sequence_length"):
        if options[flag] is not None and options[flag] < 1:
            raise UserError(f"--{flag}={options[flag]}: expected at least 1")
    if (what := options.get("what")) is not None:
        declared_kinds = plugin_names("predict/kinds")
        if what not in declared_kinds:
            raise UserError(f"--what={what}: {nearest(what, declared_kinds)}")


def check_export(options: Mapping[str, Any]) -> None:
    """Raise UserError for flags of `export` that do not fit together."""
    form, base, step = options["form"], options["base"], options["step"]
    for flag, value, valid in (("format", form, EXPORT_FORMATS), ("dtype", options["dtype"], DTYPES)):
        if value not in valid:
            raise UserError(f"--{flag}={value}: {nearest(value, valid)}")
    if base is not None and form != "adapters":
        raise UserError(f"--base={base}: only --format=adapters names a base model; {form} writes a full model")
    if step != "latest" and not step.isdecimal():
        raise UserError(f"--step={step}: expected a step number or 'latest'")
    if not re.fullmatch(r"\d+(\.\d+)?[KMGT]B", size := options["max_shard_size"]):
        raise UserError(f"--max_shard_size={size}: expected a number and KB, MB, GB or TB, as in 5GB")


def check_cache(options: Mapping[str, Any]) -> None:
    """Raise UserError for flags of `cache` that are unknown, out of range or missing."""
    action, limits = options["action"], ("older_than", "max_gb", "everything")
    if action not in ("ls", "prune"):
        raise UserError(f"cache {action}: {nearest(action, ('ls', 'prune'))}")
    given = [flag for flag in (*limits, "dry_run") if options[flag] is not None and options[flag] is not False]
    if action == "ls" and given:
        raise UserError(f"cache ls: --{given[0].replace('everything', 'all')} is a flag of `cache prune`")
    if action == "prune" and not set(given) & set(limits):
        raise UserError("cache prune: expected --older_than=30d, --max_gb=100 or --all, perhaps with --dry_run")
    if options["older_than"] is not None:
        seconds_of(options["older_than"])
    if options["max_gb"] is not None and not options["max_gb"] >= 0:
        raise UserError(f"--max_gb={options['max_gb']}: expected a number of at least 0")


def seconds_of(age: str) -> float:
    """The seconds of an age like "30d", "12h" or "2w". Raises UserError."""
    units = {"m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
    if not (found := re.fullmatch(r"(\d+(?:\.\d+)?)([mhdw])", age)):
        raise UserError(f"--older_than={age}: expected a number and m, h, d or w (minutes to weeks), as in 30d")
    return float(found[1]) * units[found[2]]


def shard_of(shard: str) -> tuple[int, int]:
    """(I, N) of the flag --shard=I/N. Raises UserError."""
    number, _, of = shard.partition("/")
    if not (number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
        raise UserError(f"--shard={shard}: expected I/N with I from 1 to N, as in --shard=3/8")
    return int(number), int(of)
