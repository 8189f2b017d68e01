"""The verb `ablate`: train the arms of an ablation over its seeds, from stages that they share, and compare them."""

import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from llm3 import config_folder
from llm3.ablation.arms import variants
from llm3.ablation.costs import EQUAL, Cost, Priced, Prices, difference, price_all, reference_arm, reference_of
from llm3.ablation.graph import Graph, Node, build, row_of, write_node
from llm3.ablation.local import Trainer
from llm3.ablation.report import write_report
from llm3.ablation.schema import AblationConfig
from llm3.ablation.slurm import Jobs
from llm3.ablation.study import write_plan
from llm3.ablation.terminal import print_summary
from llm3.cli.plan_totals import plan_console, time_text
from llm3.config.load import FOLDER
from llm3.config.schema import RunConfig, as_dict
from llm3.distributed.lock import lock
from llm3.errors import Exit, UserError, counted
from llm3.files import read_json, write_json
from llm3.report.console import new_console
from llm3.report.units import count

STEP_SECONDS = "step_seconds.json"  # {key of a program: seconds of a step}, as measured where budgets match in seconds


def ablate(
    config: AblationConfig, workdir: Path, plan: bool = False, launcher: str = "local", jobs: int = 1, sbatch: str = ""
) -> int:
    """Plan the stage runs of all arms and seeds, train those that are not finished, and write the report.

    plan: only print the stage runs and their cost. sbatch: options of the jobs, with launcher="slurm", which submits
    the stage runs and returns; called again, it says how they stand. Returns the exit status, `Exit.PARTIAL` if a stage
    run failed. Raises UserError for an arm that cannot run.
    """
    jax.config.update("jax_platforms", "cpu")  # a plan needs no devices, which the stage runs take
    console = plan_console()
    prices = Prices(workdir, partial(timed, workdir) if config.match == "seconds" else partial(known, workdir))
    priced = price_all(variants(config), config, prices)
    graph = build(priced, config)
    print_plan(config, priced, graph, workdir, console)
    if plan:
        return 0
    with lock(workdir):
        write_plan(workdir, config, priced, graph, shlex.join(["python", "-m", "llm3", *sys.argv[1:]]))
        libraries = {each.variant.name: each.library for each in priced}

        def prepared(node: Node) -> Path:
            return write_node(workdir, node, libraries[node.uses[0][0]])

        def result(node: Node) -> str | None:
            return None if (row := row_of(workdir, node)) is None else phrase(row, config.metric)

        output, nodes = new_console(), list(graph.nodes.values())
        if finished := all(result(each) is not None for each in nodes):
            output.print(f"Nothing left to train: {counted(len(nodes), 'stage run is', 'stage runs are')} finished.")
        if launcher == "slurm":
            status = Jobs(workdir, output, prepared, result, shlex.split(sbatch), config.seeds).submit(nodes)
        else:
            status = Trainer(workdir, jobs, output, prepared, result).train(nodes)
        if status in (0, Exit.PARTIAL) and (finished or launcher == "local"):
            print_summary(write_report(workdir), output)
        return status


def phrase(row: Mapping[str, Any], metric: str) -> str:
    """The deciding metric of a row, if it has it."""
    value = row.get(metric)
    return "trained" if value is None else f"{metric} {value:.4g}"


def print_plan(config: AblationConfig, priced: list[Priced], graph: Graph, workdir: Path, console: Console) -> None:
    """Print what each arm costs, over the points of the grid, and what has to be trained."""
    new = {each.name: each for each in graph.nodes.values() if row_of(workdir, each) is None}
    console.print(arms_table(config, priced, graph, new))
    for note in [*unequal(config, priced), *adjustments(config, priced)]:
        console.print(f"  {note}")
    total = sum((each.cost for each in new.values()), Cost())
    points = counted(len({tuple(each.variant.cell.items()) for each in priced}), "point") + " of the grid, "
    time = f", about {time_text(total.seconds)} of steps" if total.seconds else ""
    console.print(
        f"{counted(len(graph.chains), 'chain')} of stages ({counted(len(by_arm(priced)), 'arm')}, "
        f"{points * bool(config.grid)}{counted(len(config.seeds), 'seed')}) are "
        f"{counted(len(graph.nodes), 'stage run')}, of which {len(new)} are to be trained: "
        f"{count(total.tokens)} tokens, {count(total.flops)}FLOP{time}"
    )
    console.print(f"  the seed changes: {', '.join(config.vary)}")


def by_arm(priced: list[Priced]) -> dict[str, list[Priced]]:
    """{arm: its variants}"""
    found: dict[str, list[Priced]] = {}
    for each in priced:
        found.setdefault(each.variant.arm, []).append(each)
    return found


def arms_table(config: AblationConfig, priced: list[Priced], graph: Graph, new: Mapping[str, Node]) -> Table:
    """One row per arm: its stages, its budget, and how many of its stage runs are to be trained."""
    table = Table("arm", box=None, header_style="bold")
    for head in ("stages", "tokens", "FLOPs", "to be trained"):
        table.add_column(head, justify="right")
    for arm, group in by_arm(priced).items():
        own = {name for each in group for seed in config.seeds for name in graph.chains[each.variant.name, seed]}
        stages = " or ".join(dict.fromkeys(" > ".join(each.chain) for each in group))
        tokens, flops = ([getattr(each.budget, unit) for each in group] for unit in ("tokens", "flops"))
        table.add_row(
            arm, stages, spread(tokens, count), spread(flops, count), f"{len(own & new.keys())} of {len(own)}"
        )
    return table


def spread(values: Sequence[float], text: Callable[[float], str]) -> str:
    """One value, or the least and the greatest."""
    ends = dict.fromkeys((text(min(values)), text(max(values))))
    return " to ".join(ends)


def unequal(config: AblationConfig, priced: list[Priced]) -> Iterator[str]:
    """A sentence on the arms that do not use as much of what is matched as the reference."""
    found = []
    for arm, group in by_arm(priced).items():
        each_one = [difference(each, reference_of(each, priced, config), config.match) for each in group]
        if off := [each for each in each_one if each is not None and abs(each) > EQUAL]:
            found.append(f"{arm} ({spread(off, lambda share: f'{100 * share:+.1f} %')})")
    if found:
        yield f"not equal in {config.match} to {reference_arm(config)}, by more than 1 %: {', '.join(found)}"


def adjustments(config: AblationConfig, priced: list[Priced]) -> Iterator[str]:
    """A sentence on each arm whose steps were adjusted."""
    for arm, group in by_arm(priced).items():
        if found := [each.adjusted for each in group if each.adjusted]:
            steps = spread([now for _, _, now in found], lambda number: f"{number:,}")
            before = spread([before for _, before, _ in found], lambda number: f"{number:,}")
            yield f"{arm}: {found[0][0]} trains {steps} steps instead of {before}, to match {config.match}"


def known(workdir: Path, config: RunConfig, name: str, key: str) -> float | None:
    """The seconds of a step of a program, if they were measured."""
    return (read_json(workdir / STEP_SECONDS) or {}).get(key)


def timed(workdir: Path, config: RunConfig, name: str, key: str) -> float:
    """The seconds of a step of a program; measured once, so that the same plan comes out again."""
    if (seconds := known(workdir, config, name, key)) is not None:
        return seconds
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.json"
        write_json(file, as_dict(config) | {FOLDER: config_folder.current()})
        flags = [f"--config={file}", f"--workdir={workdir}", f"--stage={name}", "--alone", "--json"]
        done = subprocess.run([sys.executable, "-m", "llm3", "bench", *flags], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"timing {name}: {done.stderr.strip().rpartition(chr(10))[2].removeprefix('llm3: ')}")
    seconds = json.loads(done.stdout.splitlines()[-1])["step_seconds"]
    write_json(workdir / STEP_SECONDS, (read_json(workdir / STEP_SECONDS) or {}) | {key: seconds})
    return seconds
