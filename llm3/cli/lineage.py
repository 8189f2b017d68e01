"""The verb `lineage`: the parents of the stages of a run, back to the first, and where they are now."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from llm3.checkpoints.load import trained_stages
from llm3.checkpoints.stage_checkpoints import Checkpoints
from llm3.errors import UserError
from llm3.files import CHECKPOINTS
from llm3.handoff.account import changes
from llm3.handoff.checkpoint import holds
from llm3.report.console import new_console
from llm3.report.units import count


def lineage(workdir: Path, runs: Sequence[Path] = ()) -> int:
    """Print the parents of each stage of a run, from the metadata of its newest checkpoint.

    runs: folders with runs, to look for parents that were moved. Raises UserError for one that does not exist.
    """
    for each in runs:
        if not each.is_dir():
            raise UserError(f"--runs={each}: no such folder; expected a run, or a folder with runs")
    console = new_console(soft_wrap=True)
    for name in trained_stages(workdir):
        checkpoints = Checkpoints(workdir / name / CHECKPOINTS, read_only=True)
        step = checkpoints.latest()
        assert step is not None, f"{name}: no checkpoint"
        meta = checkpoints.meta(step)
        console.print(f"\n{name}")
        for depth, link in enumerate([*meta["lineage"], {"run": ".", "stage": name, **meta}]):
            console.print(f"  {'  ' * depth}{line(workdir, link, runs, depth)}")
    return 0


def line(workdir: Path, link: dict, runs: Sequence[Path], depth: int) -> str:
    """An ancestor on one line: a pretrained model, or a stage with what differs from its own parent."""
    if "model" in link and "stage" not in link:
        revision = f" at {link['revision']}" if link["revision"] else ""
        return f"{link['model']}{revision} (pretrained {link['family']}, files {link['params_digest'][:12]})"
    differs = "".join(f", {each}" for each in changes(link)) if depth else ""
    run, note = place(workdir, link, runs)
    ended = link.get("early_stopping")
    taken = f", the parameters of step {ended['result_step']}" if ended else ""
    return (
        f"{run}/{link['stage']} step {link['step']}{taken} ({link['kind']}, "
        f"{count(link['cost']['tokens'])} tokens, parameters {link['params_digest'][:12]}{differs}){note}"
    )


def place(workdir: Path, link: dict, runs: Sequence[Path]) -> tuple[Path, str]:
    """The run that holds an ancestor now, found by its digest if it was moved, and a note if it was.

    In the lineage of a checkpoint, "." is the run of the checkpoint.
    """
    recorded = (workdir / link["run"]).resolve()
    if recorded == workdir.resolve():
        return recorded, ""
    for run in _candidates(workdir, recorded, runs):
        if holds(run, link):
            return run, "" if run == recorded else f"; it was at {recorded}"
    if (recorded / link["stage"] / CHECKPOINTS).is_dir():
        return recorded, "; this step is no longer there"
    return recorded, "; it is no longer there: --runs=DIR looks for it in DIR"


def _candidates(workdir: Path, recorded: Path, runs: Sequence[Path]) -> Iterator[Path]:
    """Where a run may be: a copied run before the one it was copied from, then runs side by side."""
    yield workdir.resolve()
    yield recorded
    for folder in (workdir.resolve().parent, *(each.resolve() for each in runs)):
        yield folder
        yield from (each for each in sorted(folder.iterdir()) if each.is_dir())
