"""The flags of the command line that several verbs have, and what a verb is."""

import argparse
from functools import partial
from typing import Any, NamedTuple

from llm3.errors import UserError
from llm3.files import local_path
from llm3.remote import workdir_path

Flag = tuple[str, dict[str, Any]]


class Verb(NamedTuple):
    """A verb of the command line. call: "module:function"; the function gets the flags as keyword arguments."""

    call: str
    help: str
    flags: tuple[Flag, ...]
    clustered: bool = False  # several processes can run it together
    compiles: bool = False  # programs for the devices, which the workdir keeps


def flag(name: str, **options: Any) -> Flag:
    """One command-line flag, with the options of `argparse`."""
    return name, options


def path_flag(name: str, **options: Any) -> Flag:
    """A flag for a directory or a file on this machine."""
    return flag(name, type=partial(local_path, where=name), **{"metavar": "DIR"} | options)


def workdir_flag(name: str = "--workdir", **options: Any) -> Flag:
    """A flag for the directory of a run, or of several, on this machine or in a bucket."""
    return flag(name, type=partial(workdir_path, where=name), metavar="DIR", **options)


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
WORKDIR = workdir_flag(required=True, help="the run's files: a folder, gs://BUCKET/RUN or s3://BUCKET/RUN")
RUN = workdir_flag(default="runs/unnamed", help="a run, if it has begun: its tokenizer and checkpoints")
SCRATCH = path_flag("--workdir", default="runs/bench", help="where files are generated, and removed again")
STAGES = flag("--stages", type=names, metavar="A,B", help="only these stages (default: all)")
STAGE = flag("--stage", type=one_name, required=True)
PLANNED = (CONFIG, RUN, STAGES)  # what the verbs read that show a run before it begins
STEP = flag("--step", default="latest", help="step of the checkpoint (default: the latest)")
DTYPE = flag("--dtype", default="float32", help="float32 (default), bfloat16 or float16")
AS_JSON = flag("--json", action="store_true", dest="as_json", help="one line of JSON for each stage")
WINDOWS = (
    flag("--batch_size", type=int, metavar="N", help="windows in a batch (default: 16)"),
    flag("--sequence_length", type=int, metavar="N", help="max tokens of a window (default: as trained)"),
)
FILTERS = tuple(  # of the sampled tokens; only those that are given, see `Sampling` for the others
    flag(name, type=float, default=argparse.SUPPRESS, metavar="X", help=help_)
    for name, help_ in (
        ("--top_p", "sample from the likeliest tokens that reach this share (default: 1)"),
        ("--min_p", "leave out tokens below this share of the likeliest one (default: 0)"),
        ("--repetition_penalty", "above 1: avoid tokens of the text (default: 1)"),
    )
)
PROCESSES = (
    flag("--coordinator", metavar="HOST:PORT", help="address of process 0, if several processes run together"),
    flag("--processes", type=int, metavar="N", help="number of processes (SLURM, Open MPI and TPUs set it)"),
    flag("--process", type=int, metavar="I", help="index of this process, from 0"),
)
