"""The verb `lineage`: the parents of the stages of a run, back to the first, and where they are now."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from llm3.checkpoints.load import trained_stages
from llm3.checkpoints.stage_checkpoints import Checkpoints
from llm3.errors import UserError
from llm3.files import CHECKPOINTS
from llm3.handoff.account import changes
from llm3.handoff.checkpoint import holds
from llm3.remote import workdir_path
from llm3.report.console import new_console
from llm3.report.units import count
from llm3.stages.amendments import amendments_in


def lineage(workdir: Path, runs: Sequence[Path] = ()) -> int:
    """Print the parents of each stage of a run, from the metadata of its newest checkpoint.

    runs: folders with runs, to look for parents that were moved. Raises UserError for one that does not exist.
    """
    for each in runs:
        if not each.is_dir():
            raise UserError(f"--runs={each}: no such folder; expected a run, or a folder with runs")
    console = new_console()
    for name in trained_stages(workdir):
        checkpoints = Checkpoints(workdir / name / CHECKPOINTS, read_only=True)
        step = checkpoints.latest()
        assert step is not None, f"{name}: no checkpoint"
        meta = checkpoints.meta(step)
        console.print(f"\n{name}")
        for depth, link in enumerate([*meta["lineage"], {"run": ".", "stage": name, **meta}]):
            text, style = line(workdir, link, runs, depth)
            console.print(f"  {'  ' * depth}{text}", style=style)
            for amendment in amendments_in(link):
                console.print(f"  {'  ' * depth}  {amendment.line}")
    return 0


GONE, EARLY = "bold red", "yellow"  # the styles of what is no longer there, and of a stage that ended before its steps


def line(workdir: Path, link: dict, runs: Sequence[Path], depth: int) -> tuple[str, str]:
    """An ancestor on one line, and its style: a pretrained model, or a stage with what differs from its own parent.

    A line of something that is gone begins with a mark.
    """
    if "model" in link and "stage" not in link:
        revision = f" at {link['revision']}" if link["revision"] else ""
        text = f"{link['model']}{revision} (pretrained {link['family']}, files {link['params_digest'][:12]})"
        gone = Path(link["model"]).is_absolute() and not Path(link["model"]).is_dir()
        return (f"[gone] {text}; it is no longer there", GONE) if gone else (text, "")
    differs = "".join(f", {each}" for each in changes(link)) if depth else ""
    run, note, gone = place(workdir, link, runs)
    ended = ended_early(link)
    text = (
        f"{run}/{link['stage']} step {link['step']}{ended} ({link['kind']}, "
        f"{count(link['cost']['tokens'])} tokens, parameters {link['params_digest'][:12]}{differs}){note}"
    )
    return (f"[gone] {text}", GONE) if gone else (text, EARLY if ended else "")


def ended_early(link: dict) -> str:
    """A note on a stage that stopped early, or that is not finished."""
    if ended := link.get("early_stopping"):
        note = f", the parameters of step {ended['result_step']}"
        early = ended["stopped_at"] < (link.get("steps") or 0)
        return f"{note} [stopped early: {ended['why']}]" if early else note
    if link.get("finished") is False and link["step"] < link.get("steps", 0):
        return f" [unfinished: of {link['steps']}]"
    return ""


def place(workdir: Path, link: dict, runs: Sequence[Path]) -> tuple[Path, str, bool]:
    """The run that holds an ancestor now, found by its digest if it was moved, a note if it was, and if it is gone.

    In the lineage of a checkpoint, "." is the run of the checkpoint.
    """
    recorded = (workdir_path(link["run"], "lineage") if "://" in link["run"] else workdir / link["run"]).resolve()
    for run in [recorded] if recorded == workdir.resolve() else _candidates(workdir, recorded, runs):
        if holds(run, link):
            return run, "" if run == recorded else f"; it was at {recorded}", False
    if (recorded / link["stage"] / CHECKPOINTS).is_dir():
        return recorded, "; this step is no longer there", True
    return recorded, "; it is no longer there: --runs=DIR looks for it in DIR", True


def _candidates(workdir: Path, recorded: Path, runs: Sequence[Path]) -> Iterator[Path]:
    """Where a run may be: a copied run before the one it was copied from, then runs side by side."""
    yield workdir.resolve()
    yield recorded
    for folder in (workdir.resolve().parent, *(each.resolve() for each in runs)):
        yield folder
        yield from (each for each in sorted(folder.iterdir()) if each.is_dir())
