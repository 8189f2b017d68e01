"""Reads the config of an ablation: the base experiment, arms, grid, seeds and comparisons."""

from collections.abc import Iterable
from pathlib import Path

from llm3.ablation.schema import AblationConfig
from llm3.config import load
from llm3.errors import UserError


def load_ablation(file: str, overrides: Iterable[str] = ()) -> AblationConfig:
    """The ablation of `file` ("path.py" or "path.py:argument"), with overrides such as "base.stages.pretrain.steps=20".

    Raises UserError as `llm3.config.load.load`. The base itself is checked with each arm; see `llm3.ablation.arms`.
    """
    given = load.values(file, (), AblationConfig)
    if "base" not in given and "stages" in given:
        raise UserError(f"--config={file}: the config of a run, which `run` trains; an ablation names it as its `base`")
    if isinstance(base := given.get("base"), str):
        folder = Path(file.partition(":")[0]).expanduser().parent
        name, colon, argument = base.partition(":")
        given["base"] = load.values(f"{folder / name}{colon}{argument}")
    load.override(AblationConfig, given, overrides)
    return load.read_as(AblationConfig, given)
