"""The verbs that only read: `plan`, what each stage would train and cost, and `lineage`, where a run comes from."""

import sys
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from llm3 import stages
from llm3.checkpoint import Checkpoints
from llm3.config import RunConfig
from llm3.experiment import prepare
from llm3.handoff import CHECKPOINTS, changes, trained_stages
from llm3.report.units import count, percent
from llm3.savings import savings
from llm3.session import Session
from llm3.trainer import Trainer
from llm3.tree import flatten, size


def plan(config: RunConfig, workdir: Path, names: list[str] | None) -> int:
    """Print for each stage its leaves, which of them train, and what a step costs beside full training.

    The texts are read (for the vocabulary and the classes) and cached; nothing is trained or allocated.
    """
    order = stages.chosen(config, names)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    session = Session(prepare(config, workdir, order), console)
    for name in order:
        stage = config.stages[name]
        for trainer in session.phases(name):
            added = [rule for step, rule in stage.unfreeze if step <= trainer.first]
            later = f", and {added!r} from step {trainer.first}" if added else ""
            console.print(f"\n{name}: train={stage.train!r}{later}")
            console.print(leaf_table(trainer))
            for line in [*summary(session, name, trainer), *(f"  {note}" for note in trainer.notes)]:
                console.print(line)
    return 0


def leaf_table(trainer: Trainer) -> Table:
    """One row a leaf of the canonical tree: its shape, parameters, bytes, and which of it trains."""
    table = Table("leaf", "shape", "trains", box=None, header_style="bold")
    for column in ("parameters", "trainable", "MiB"):
        table.add_column(column, justify="right")
    for path, leaf in flatten(trainer.abstract_params).items():
        chosen = training_layers(trainer, path)
        per_layer = int(np.prod(leaf.shape)) // trainer.model.layers
        trainable = int(np.prod(leaf.shape)) if chosen is True else per_layer * len(chosen or ())
        trains = "yes" if chosen is True else "no" if not chosen else f"layers {', '.join(map(str, chosen))}"
        mebibytes = f"{np.prod(leaf.shape) * leaf.dtype.itemsize / 2**20:.2f}"
        table.add_row(path, str(list(leaf.shape)), trains, count(np.prod(leaf.shape)), count(trainable), mebibytes)
    return table


def training_layers(trainer: Trainer, path: str) -> bool | list[int]:
    """Whether a canonical leaf trains: True or False, or the layers of it that do where only some of them do."""
    partition = trainer.partition
    if not path.startswith("layers/"):
        return path in partition.trainable
    chosen = [
        layer
        for first, last in partition.segments
        for layer in range(first, last)
        if path.replace("layers/", f"layers/{first}:{last}/", 1) in partition.trainable
    ]
    return len(chosen) == trainer.model.layers or chosen


def summary(session: Session, name: str, trainer: Trainer) -> list[str]:
    """Parameters, bytes for one device's worth of the whole state, and FLOPs a token, beside full training."""
    stage, takes = session.config.stages[name], savings(session, name, trainer)
    trainable, every = takes["trainable_params"], size(trainer.abstract_params)
    tokens, steps = stage.batch_size * stage.sequence_length, trainer.stop - trainer.first

    def mebibytes(key: str) -> str:
        full = takes.get(f"full_{key}")
        return f"{takes[key] / 2**20:.1f}" + (f" ({percent(takes[key] / full)} of full training's)" if full else "")

    forward, backward = takes["forward_flops_per_token"], takes["backward_flops_per_token"]
    of_full = percent((forward + backward) / takes["full_flops_per_token"])
    return [
        f"  parameters {count(every)}, trainable {count(trainable)} ({percent(trainable / every)})",
        f"  MiB: parameters {mebibytes('param_bytes')}, gradients {mebibytes('gradient_bytes')}, "
        f"moments {mebibytes('moment_bytes')}",
        f"  FLOPs a token: forward {count(forward)}, backward {count(backward)}; {of_full} of full training's",
        f"  {count(tokens)} tokens a step, {steps} steps, {count(trainer.flops_per_step * steps)}FLOP",
    ]


def lineage(workdir: Path) -> int:
    """Print where each stage of a run comes from, from the metadata of its newest checkpoint alone."""
    console = Console(highlight=False, soft_wrap=True)
    for name in trained_stages(workdir):
        checkpoints = Checkpoints(workdir / name / CHECKPOINTS, read_only=True)
        step = checkpoints.latest()
        meta = checkpoints.meta(step)
        own = {"run": str(workdir.resolve()), "stage": name, **meta}
        console.print(f"\n{name}")
        for depth, link in enumerate([*meta["lineage"], own]):
            cost = link["cost"]
            differs = "".join(f", {line}" for line in changes(link)) if depth else ""
            console.print(
                f"  {'  ' * depth}{link['run']}/{link['stage']} step {link['step']} ({link['kind']}, "
                f"{count(cost['tokens'])} tokens, parameters {link['params_digest'][:12]}{differs})"
            )
    return 0
