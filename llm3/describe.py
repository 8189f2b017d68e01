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
from llm3.flops import forward_flops, step_flops
from llm3.handoff import CHECKPOINTS, trained_stages
from llm3.objectives import load
from llm3.optim import state_bytes
from llm3.report.units import count, percent
from llm3.session import Session
from llm3.tree import flatten, size


def plan(config: RunConfig, workdir: Path, names: list[str] | None) -> int:
    """Print for each stage its leaves, which of them train, and what a step costs beside full training.

    The texts are read (for the vocabulary and the classes) and cached; nothing is trained or allocated.
    """
    order = stages.chosen(config, names)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    session = Session(prepare(config, workdir, order), console)
    for name in order:
        trainer = session.trainer(name)
        console.print(f"\n{name}: train={config.stages[name].train!r}")
        console.print(leaf_table(trainer))
        for line in [*summary(session, name, trainer), *(f"  {note}" for note in trainer.notes)]:
            console.print(line)
    return 0


def leaf_table(trainer: stages.Trainer) -> Table:
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


def training_layers(trainer: stages.Trainer, path: str) -> bool | list[int]:
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


def summary(session: Session, name: str, trainer: stages.Trainer) -> list[str]:
    """Parameters, bytes for one device's worth of the whole state, and FLOPs a token, beside full training."""
    stage, state = session.config.stages[name], trainer.abstract_state
    head = "task" if load(stage.objective).NEEDS_HEAD else "lm"
    tokens = stage.batch_size * stage.sequence_length
    shape = (trainer.model, stage.batch_size, stage.sequence_length, head)
    full, forward = step_flops(*shape), forward_flops(*shape)
    trainable, every = size(state.trainable), size(state.trainable) + size(state.frozen)
    mebibytes = [state_bytes(each) / 2**20 for each in (trainer.abstract_params, state.trainable, state.opt)]
    return [
        f"  parameters {count(every)}, trainable {count(trainable)} ({percent(trainable / every)})",
        "  MiB: parameters {:.1f}, gradients {:.1f}, moments {:.1f}".format(*mebibytes),
        f"  FLOPs a token: forward {count(forward / tokens)}, backward "
        f"{count((trainer.flops_per_step - forward) / tokens)}; a step is {percent(trainer.flops_per_step / full)} "
        f"of full training's",
        f"  {count(tokens)} tokens a step, {stage.steps} steps, {count(trainer.flops_per_step * stage.steps)}FLOP",
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
            fresh = "" if not depth or not link.get("fresh") else f", fresh: {', '.join(link['fresh'])}"
            console.print(
                f"  {'  ' * depth}{link['run']}/{link['stage']} step {link['step']} ({link['kind']}, "
                f"{count(cost['tokens'])} tokens, parameters {link['params_digest'][:12]}{fresh})"
            )
    return 0
