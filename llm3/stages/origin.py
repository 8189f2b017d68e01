"""What a run takes over from the model or the run that its first stage starts from: the model's fields, its tokenizer.

A config may leave these out. Once the run has begun, its directory has both, and the origin is not needed any more.
"""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llm3.config import load
from llm3.config.model_schema import ModelConfig, RopeScaling
from llm3.config.schema import RunConfig
from llm3.errors import UserError
from llm3.files import INIT, RECORD, START, read_json
from llm3.handoff.start import AnyStart, ModelStart
from llm3.stages.parents import model_starts, origin, other_runs
from llm3.stages.rules import check_stages

NEEDED = tuple(each.name for each in dataclasses.fields(ModelConfig) if each.default is dataclasses.MISSING)
SET_BY_THE_STAGE = ("classes", "adapters", "max_output_positions")
STAND_IN = dict(zip(NEEDED, (1, 2, 1, 1), strict=True))  # a model, for the rules that need none


def load_config(
    file: str, overrides: Iterable[str] = (), workdir: Path = Path(), *, only_planned: bool = False
) -> RunConfig:
    """The config of a file, as `config.load.load`, with the model that its stages start from. Raises UserError.

    Reads the description of a pretrained model, or the metadata of a parent, only if the config names one; before
    that, it checks everything else. only_planned: do not look on the hub for a model whose fields the config gives.
    """
    return complete(load.values(file, overrides), workdir, only_planned=only_planned)


def complete(given: dict, workdir: Path = Path(), *, only_planned: bool = False) -> RunConfig:
    """The config of the fields that `config.load.values` returned, as `load_config`. Raises UserError."""
    model = given.get("model", {})
    load.check_section(ModelConfig, model, "config.model")
    _check_unset(model)
    has_shape = all(name in model for name in NEEDED)
    if not _starts_with(given, "model", *(() if has_shape else ("run",))):
        return load.read(given)
    given = {"tokenizer": {}} | given
    config = load.read(given | {"model": STAND_IN})
    check_stages(config, causal=None)
    fields = None
    if not (has_shape and only_planned and not _is_local(config)):
        fields = _known_fields(config, model, workdir)
    return load.read(given | {"model": model if fields is None else fields | model})


def _check_unset(model: dict) -> None:
    for name in ("vocab_size", *SET_BY_THE_STAGE):
        if model.get(name):
            raise UserError(
                f"config.model.{name}: expected it unset; it follows from the tokenizer, the labels and the stage"
            )


def _starts_with(given: dict, *names: str) -> bool:
    """Whether the `start` of a stage is a dict with one of these fields."""
    stages = given.get("stages")
    values = stages.values() if isinstance(stages, dict) else ()
    starts = [each.get("start") for each in values if isinstance(each, dict)]
    return any(isinstance(each, dict) and name in each for each in starts for name in names)


def _is_local(config: RunConfig) -> bool:
    """Whether the model to start from is in a folder."""
    return any(Path(start.model).expanduser().is_dir() for start in model_starts(config).values())


def _known_fields(config: RunConfig, given: dict, workdir: Path) -> dict[str, Any] | None:
    """The fields of the model that the run began with, or will begin with; None: of none.

    Raises UserError for a given field that is another one in a pretrained model.
    """
    found = origin(config, workdir)
    if found is None:
        return None
    from llm3.handoff.account import FREE_MODEL_FIELDS, SAME_FUNCTION, agree  # imports jax, which takes seconds

    name, start = found
    where = f"config.stages.{name}.start"
    # runs of an older version kept what they took over from another run beside the untrained model
    rows = [START] if isinstance(start, ModelStart) else [*other_runs(config, workdir), INIT]
    record = next((found for row in rows if (found := read_json(workdir / row / RECORD))), None)
    try:
        fields = record["model"] if record else _fields_of(start, workdir, where)
    except UserError:
        if all(name in given for name in NEEDED):  # enough to plan; a run needs the model itself
            return None
        raise
    fields = {key: value for key, value in fields.items() if key not in (*SET_BY_THE_STAGE, *SAME_FUNCTION)}
    if isinstance(start, ModelStart):
        theirs = ModelConfig(**fields)
        for name in (name for name in given if name not in FREE_MODEL_FIELDS):
            if not agree(expected := getattr(theirs, name), _read(given[name])):
                raise UserError(
                    f"config.model.{name}={given[name]!r}: {start.model} has {expected!r}; leave it out: it follows "
                    f"from {where}.model"
                )
    return fields


def _read(value: Any) -> Any:
    """The value of a field in a config, in the type that the field has in a `ModelConfig`."""
    if isinstance(value, dict):
        return RopeScaling(**value)
    return tuple(value) if isinstance(value, list) else value


def _fields_of(start: AnyStart, workdir: Path, where: str) -> dict[str, Any]:
    if isinstance(start, ModelStart):
        from llm3.interop.folder import open_folder

        return open_folder(start.model, start.revision, f"{where}.model").config
    from llm3.handoff.checkpoint import find_checkpoint

    return find_checkpoint(start, where).meta["model"]
