"""The verbs of the command line with their flags. Their functions are imported when they are called."""

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from llm3.errors import UserError
from llm3.files import local_path

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
    """A flag for a directory or a file on this machine."""
    return flag(name, type=partial(local_path, where=name), **{"metavar": "DIR"} | options)


def names(text: str) -> list[str]:
    """The names that a flag lists."""
    return text.split(",")


def one_name(text: str) -> str:
    """The name in a list of one. Raises UserError for more."""
    if len(found := names(text)) > 1:
        raise UserError(f"--stage={text}: expected one stage; run the command once for each of {', '.join(found)}")
    return found[0]


CONFIG = flag("--config", required=True, metavar="FILE", help="a config file, as in configs/")
OPTIONAL_CONFIG = flag("--config", metavar="FILE", help="the run's config file: reject a run with another config")
WORKDIR = path_flag("--workdir", required=True, help="the run's files")
RUN = path_flag("--workdir", default="runs/unnamed", help="a run, if it has begun: its tokenizer and checkpoints")
SCRATCH = path_flag("--workdir", default="runs/bench", help="where files are generated, and removed again")
STAGES = flag("--stages", type=names, metavar="A,B", help="only these stages (default: all)")
STAGE = flag("--stage", type=one_name, required=True)
PROCESSES = (
    flag("--coordinator", metavar="HOST:PORT", help="address of process 0, if several processes run together"),
    flag("--processes", type=int, metavar="N", help="number of processes (SLURM, Open MPI and TPUs set it)"),
    flag("--process", type=int, metavar="I", help="index of this process, from 0"),
)

VERBS = {
    "init": Verb(
        "cli.init:init",
        "write a config for your own files",
        (
            flag("--template", default="", help="pretrain, domain, classify or chat (default: as the files suggest)"),
            flag("--general", metavar="PATH", help="general text: a file, a folder, or builtin:python"),
            flag("--domain", metavar="PATH", help="text of a domain: a file or a folder"),
            flag("--task", metavar="PATH", help="labelled texts, questions with answers, or conversations"),
            flag("--label", default="", metavar="COLUMN", help="the column of --task with the classes"),
            flag("--text", default="", metavar="COLUMN", help="its column with the text, or '{one} {another}'"),
            flag("--out", type=partial(local_path, where="--out"), default=Path("my_config.py"), metavar="FILE"),
        ),
    ),
    "run": Verb(
        "cli.run:run",
        "train and evaluate the stages; run it again to resume",
        (
            CONFIG,
            WORKDIR,
            STAGES,
            flag(
                "--bare", action="store_true", help="measure only these stages, not their parents, and write no report"
            ),
        ),
        True,
    ),
    "ablate": Verb(
        "cli.ablate:ablate",
        "compare arms of an experiment over seeds; run it again to resume",
        (
            CONFIG,
            path_flag("--workdir", required=True, help="the ablation's files"),
            flag("--plan", action="store_true", help="only print what is to be trained, and what it costs"),
            flag("--launcher", default="local", help="local (default) or slurm"),
            flag("--jobs", type=int, default=1, metavar="N", help="local: stage runs at a time (default: 1)"),
            flag("--sbatch", default="", metavar="OPTIONS", help="slurm: of sbatch, as in '--partition=gpu --nodes=1'"),
        ),
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
            flag("--json", action="store_true", dest="as_json", help="a line of JSON for each stage"),
            path_flag("--out", help="a new directory for the rows, with details and predictions"),
        ),
        True,
    ),
    "report": Verb(
        "cli.report:report",
        "write the report of a run again, without devices, or one that compares several runs",
        (
            flag(
                "dirs",
                nargs="+",
                type=partial(local_path, where="report"),
                metavar="DIR",
                help="the files of a run, or of an ablation",
            ),
            OPTIONAL_CONFIG,
            path_flag("--out", help="where to write the report of several runs"),
        ),
    ),
    "compare": Verb(
        "cli.compare:compare",
        "show two runs side by side, and what differs between them",
        (flag("runs", nargs=2, type=partial(local_path, where="compare"), metavar="DIR", help="the files of a run"),),
    ),
    "generate": Verb(
        "cli.generate:generate",
        "sample from a stage, or from every stage of a run",
        (
            OPTIONAL_CONFIG,
            WORKDIR,
            flag("--stage", type=one_name, help="one stage (default: every stage)"),
            flag("--prompt", required=True),
            flag("--raw", action="store_true", help="continue the prompt: do not write it with the chat template"),
            flag("--max_tokens", type=int, default=64),
            flag("--temperature", type=float, default=0.8, help="0: always the most likely token"),
            flag("--top_k", type=int, default=0, help="sample from this many likeliest tokens; 0: all"),
            flag("--top_p", type=float, default=1.0),
            flag("--seed", type=int, default=0),
        ),
    ),
    "predict": Verb(
        "cli.predict:predict",
        "apply a stage to the rows of a file; run it again to resume",
        (
            flag("--config", metavar="FILE", help="a config file, for its mesh and for transforms beside it"),
            WORKDIR,
            STAGE,
            flag("--in", required=True, dest="input", metavar="FILE", help=".jsonl, .csv, .parquet, .txt or '-'"),
            flag("--out", required=True, metavar="FILE", help=".jsonl, .csv, .parquet or '-'"),
            flag("--what", metavar="KIND", help="labels, answers, spans, ... (default: by the stage)"),
            flag("--source", metavar="NAME", help="the stage's source whose fields name the columns"),
            flag("--text", metavar="COLUMN", help="column with the text or context, or a template over columns"),
            flag("--pair", metavar="COLUMN", help="column with the second text of a pair"),
            flag("--prompt", metavar="COLUMN", help="column with the question or instruction"),
            flag("--messages", metavar="COLUMN", help="column with the turns of a dialogue"),
            flag("--no_transforms", action="store_true", help="do not apply the transforms of the source"),
            flag("--keep", default="all", metavar="A,B", help="columns to pass on: all (default), none or names"),
            flag("--probabilities", action="store_true", help="labels: also the probabilities of all classes"),
            flag("--max_tokens", type=int, metavar="N", help="answers: the longest one (default: 64)"),
            flag("--temperature", type=float, metavar="T", help="answers: 0 (default): the likeliest tokens"),
            flag("--seed", type=int, metavar="N", help="answers: of draws (default: 0)"),
            flag("--top_k", type=int, metavar="K", help="proposals: for each mask token (default: 5)"),
            flag("--mask", metavar="TEXT", help="proposals: the mask token in texts (default: its name)"),
            flag("--max_answer_tokens", type=int, metavar="N", help="spans: the longest one (default: 64)"),
            flag(
                "--no_answer_threshold",
                type=float,
                metavar="X",
                help="spans: lower: fewer answers (default: 0)",
            ),
            flag("--step", default="latest", help="step of the checkpoint (default: the latest)"),
            flag("--batch_size", type=int, metavar="N", help="windows in a batch (default: 16)"),
            flag("--sequence_length", type=int, metavar="N", help="max tokens of a window (default: as trained)"),
        ),
        True,
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
            RUN,
            flag("--stage", type=one_name, required=True, help="the stage whose step is timed"),
            flag("--json", action="store_true", dest="as_json", help="one line of JSON"),
            flag("--alone", action="store_true", help="do not compare with full training"),
            flag("--decode", action="store_true", help="time decoding, compared with recomputation without a cache"),
        ),
        True,
    ),
    "data": Verb(
        "cli.data:data",
        "show the documents of each stage as the model sees them, or tokenize a shard of them",
        (
            CONFIG,
            RUN,
            STAGES,
            flag("--shard", metavar="I/N", help="only tokenize shard I of N of the training documents into the cache"),
        ),
    ),
    "overlap": Verb(
        "cli.overlap:overlap",
        "show the overlap of the evaluations with the training data",
        (
            CONFIG,
            RUN,
            STAGES,
            flag("--show", type=int, default=3, metavar="N", help="passages per evaluation (default: 3)"),
            path_flag("--drop", metavar="FILE", help="write the training documents to leave out, for sources.*.drop"),
        ),
    ),
    "cache": Verb(
        "cli.cache:cache",
        "list what the cache of all runs holds (ls), or remove what no process uses (prune)",
        (
            flag("action", metavar="ls|prune"),
            path_flag("--cache_dir", help="another cache than the user's (see config.cache_dir)"),
            flag("--older_than", metavar="AGE", help="remove what was not used for so long, as in 30d, 12h or 2w"),
            flag("--max_gb", type=float, metavar="N", help="then remove the least recently used above N GB"),
            flag("--all", action="store_true", dest="everything", help="remove all"),
            flag("--dry_run", action="store_true", help="only say what would be removed"),
        ),
    ),
    "bench-data": Verb(
        "cli.bench_data:bench_data",
        "measure the token cache on a generated file, compared with datasets.map",
        (SCRATCH, flag("--gigabytes", type=float, default=0.1, help="the size of the file (default: 0.1)")),
    ),
    "bench-model": Verb(
        "cli.bench_model:bench_model",
        "measure reading and writing a pretrained model",
        (
            SCRATCH,
            flag("--model", metavar="NAME", help="a folder, or a name on the Hub (default: a generated model)"),
            flag("--gigabytes", type=float, default=2, help="the size of the generated model (default: 2)"),
            flag("--fsdp", type=int, default=1, metavar="N", help="the devices that share each leaf (default: 1)"),
            flag("--dtype", default="float32", help="float32 (default), bfloat16 or float16"),
        ),
    ),
    "plan": Verb(
        "cli.plan:plan",
        "show what each stage trains and costs, and what `run` would refuse, without running it",
        (
            CONFIG,
            RUN,
            STAGES,
            flag("--topology", metavar="NAME", help="memory, FLOPs and step time on v5p:8x8x8, h100x64, ... or cpu"),
            flag("--price", type=float, metavar="N", help="of a device for an hour: what the stages cost"),
            flag(
                "--aot", action="store_true", help="also compile for that TPU: takes minutes per stage, needs llm3[aot]"
            ),
        ),
    ),
    "check-plugin": Verb(
        "cli.check_plugin:check_plugin",
        "check that a plugin holds to what llm3's own plugins hold to",
        (
            flag("name", help="as a config names it: my_package.losses:entropy"),
            flag("--kind", default="", help="objective or evaluation (default: as its names say)"),
            flag("--options", default="", help="its options, as a Python dict"),
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
