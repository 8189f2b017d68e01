"""Read-only access to a finished or running run: which stages have checkpoints, and the parameters of one stage."""

from functools import partial
from pathlib import Path

from jax.sharding import Mesh

from llm3.checkpoints.orbax_store import DamagedCheckpoint
from llm3.checkpoints.stage_checkpoints import Checkpoints
from llm3.config.model_schema import ModelConfig, read_model
from llm3.data.tokenizer import Tokenizer
from llm3.distributed import agreement, processes
from llm3.errors import UserError, nearest
from llm3.files import CHECKPOINTS, TOKENIZER
from llm3.models.transformer import abstract_params


def trained_stages(workdir: Path) -> list[str]:
    """The stages of a run that have a checkpoint: parents first, baselines last. Raises UserError if there is none."""
    ranks = {}
    for directory in workdir.glob(f"*/{CHECKPOINTS}"):
        checkpoints = Checkpoints(directory, read_only=True)
        if (step := checkpoints.latest()) is not None:
            meta = checkpoints.meta(step)
            ranks[meta["stage"]] = (meta["config"]["stage"]["baseline"], len(meta["lineage"]), meta["stage"])
    if not ranks:
        raise UserError(f"{workdir} holds no trained stage yet")
    return sorted(ranks, key=ranks.__getitem__)


def stage_meta(workdir: Path, name: str, step: str = "latest") -> dict:
    """The metadata of a checkpoint of a stage, with its "step". Raises UserError."""
    return _found(workdir, name, step)[1]


def load_stage(
    workdir: Path, name: str, step: str = "latest", mesh: Mesh | None = None
) -> tuple[dict, ModelConfig, dict]:
    """The canonical parameters, model config and checkpoint metadata of a stage. Raises UserError.

    mesh: the mesh to place the parameters on; None: return numpy arrays.
    """
    checkpoints, meta = _found(workdir, name, step)
    model = read_model(meta["model"])
    try:
        params = checkpoints.load_params(meta["step"], None if mesh is None else abstract_params(model, mesh))
    except DamagedCheckpoint as error:
        raise DamagedCheckpoint(f"{error}: {remedy(checkpoints, meta['step'])}") from error
    return params, model, meta


def load_tokenizer(workdir: Path, name: str, meta: dict) -> Tokenizer:
    """The tokenizer in a run. Raises UserError if it is not the one that a stage was trained with.

    meta: of a checkpoint of the stage.
    """
    tokenizer = Tokenizer.load(workdir / TOKENIZER)
    if tokenizer.hash != meta["tokenizer_hash"]:
        raise UserError(f"{workdir / TOKENIZER} is not the tokenizer of {workdir / name}")
    return tokenizer


def _found(workdir: Path, name: str, step: str) -> tuple[Checkpoints, dict]:
    """The checkpoints of a stage, and the metadata of the step that the first process finds there."""
    number = processes.broadcast_from_first(partial(_number, workdir, name, step))
    checkpoints = Checkpoints(workdir / name / CHECKPOINTS, read_only=True)
    try:
        meta = agreement.all_or_none(partial(checkpoints.meta, number), DamagedCheckpoint)
    except DamagedCheckpoint as error:
        raise DamagedCheckpoint(f"{error}: {remedy(checkpoints, number)}") from error
    return checkpoints, meta | {"step": number}


def _number(workdir: Path, name: str, step: str) -> int:
    found = [each.parent.name for each in workdir.glob(f"*/{CHECKPOINTS}")]
    if name not in found:
        raise UserError(f"{workdir} holds no stage {name!r}; {nearest(name, found)}")
    if (latest := Checkpoints(workdir / name / CHECKPOINTS, read_only=True).latest()) is None:
        raise UserError(f"{workdir / name} has no complete checkpoint yet")
    if step != "latest" and not step.isdecimal():
        raise UserError(f"--step={step}: expected a step number or 'latest'")
    return latest if step == "latest" else int(step)


def remedy(checkpoints: Checkpoints, damaged: int) -> str:
    """What to do about a damaged step."""
    others = ", ".join(str(step) for step in checkpoints.steps() if step != damaged)
    again = f"`run` again with its config, which resumes from step {others}" if others else "train the stage again"
    return f"restore it from a copy, or {again}"
