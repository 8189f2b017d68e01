"""Whether the parent of a stage still is what the stage was trained from."""

from contextlib import suppress
from pathlib import Path

from llm3.checkpoints.commit import saved_steps
from llm3.checkpoints.orbax_store import DamagedCheckpoint
from llm3.checkpoints.stage_checkpoints import Checkpoints
from llm3.config.schema import RunConfig
from llm3.distributed import processes
from llm3.errors import UserError
from llm3.files import CHECKPOINTS, ROW, read_json
from llm3.stages.amendments import before_amendments
from llm3.stages.parents import parent_labels
from llm3.stages.records import newest_meta


def check_ancestry(config: RunConfig, workdir: Path, names: list[str]) -> None:
    """Raise UserError, on all processes, if a stage was trained from other parameters than its parent now has."""

    def check() -> None:
        for name in names:
            if changed := changed_parent(config, workdir, name):
                raise UserError(f"{changed}: move {workdir / name} away to train it again, or use another --workdir")

    processes.broadcast_from_first(check)  # others may see an old row


def changed_parent(config: RunConfig, workdir: Path, name: str) -> str:
    """A sentence on a stage that was trained from other parameters than its parent has; "" as far as that is known.

    Of a parent in another run, the row in this run counts, with which the stage is compared.
    """
    meta = newest_meta(workdir, name)
    if meta is None or not meta["parent"] or "stage" not in meta["parent"]:
        return ""
    label = parent_labels(config, workdir)[name]
    then, now = _then_and_now(meta, workdir / label, label in config.stages)
    if then == now:
        return ""
    stage = workdir / name
    return f"{stage} was trained from other parameters of {label!r} than its current ones ({then} then, {now} now)"


def _then_and_now(meta: dict, directory: Path, own: bool) -> tuple[str, str]:
    """What tells the parameters that a stage began with, and those that its parent has; equal where nothing is known.

    meta: of a checkpoint of the stage. directory: of the parent's row. own: whether the parent is a stage of this run.
    """
    parent, start = meta["parent"], meta["config"]["stage"]["start"]
    step, then = parent["step"], parent["params_digest"][:12]
    row = read_json(directory / ROW) or {}
    if not own:  # the row may have another vocabulary or dtype, and knows what it was made of
        return then, row.get("origin", parent)["params_digest"][:12]
    is_result = not isinstance(start, dict) or start.get("step", "latest") == "latest"
    if row and (is_result or step == row["steps"]):
        return then, row["params_digest"][:12]
    if step in saved_steps(directory / CHECKPOINTS):
        with suppress(DamagedCheckpoint):
            return then, Checkpoints(directory / CHECKPOINTS, read_only=True).meta(step)["params_digest"][:12]
    elif newest := newest_meta(directory.parent, directory.name):  # that step is not kept: do as many steps follow it?
        now = before_amendments(newest["config"], step)["stage"]["steps"]
        return f"step {step} of {meta['lineage'][-1]['steps']}", f"step {step} of {now}"
    return then, then
