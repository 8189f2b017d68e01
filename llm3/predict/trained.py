"""What a checkpoint says of a trained stage: its model, its sources, its tokenizer. Nothing here uses a device."""

from pathlib import Path
from typing import Any, NamedTuple

from llm3 import objectives
from llm3.checkpoints.load import load_tokenizer, stage_meta
from llm3.config.data_schema import SourceConfig
from llm3.config.model_schema import ModelConfig, read_model
from llm3.data.chat_templates import trained_template
from llm3.data.tokenizer import Tokenizer
from llm3.registry import load_plugin


class Trained(NamedTuple):
    """A trained stage, without its parameters. template: the chat template that it was trained with; "": none."""

    workdir: Path
    name: str
    meta: dict[str, Any]
    model: ModelConfig
    tokenizer: Tokenizer
    template: str

    @property
    def where(self) -> str:
        """The stage in messages."""
        return str(self.workdir / self.name)

    @property
    def head(self) -> str | tuple[str, ...]:
        """The task head: "" (none), "labels", or the names of its outputs, as `HEAD` of the objective."""
        objective = self.meta["config"]["stage"]["objective"]
        return load_plugin(objectives, objective["name"] if isinstance(objective, dict) else objective).HEAD

    @property
    def labels(self) -> list[str]:
        """The names of the classes, in the order of the outputs of the task head."""
        return list(self.meta.get("labels", ()))

    @property
    def several_labels(self) -> bool:
        """Whether a document can have several labels, or none."""
        return bool(self.meta.get("label_sets"))

    @property
    def lm_head(self) -> bool:
        """Whether the model has a trained LM head."""
        return bool(self.meta.get("lm_head", True))

    @property
    def length(self) -> int:
        """The tokens of a window that the stage was trained on."""
        return self.meta["config"]["stage"]["sequence_length"]

    @property
    def trained_on(self) -> list[str]:
        """The names of the sources that the stage was trained on."""
        stage = self.meta["config"]["stage"]
        later = (name for _, weights in stage.get("data_schedule", ()) for name in weights)
        return [name for name in dict.fromkeys([*stage.get("data", ()), *later]) if name in self.sources]

    @property
    def sources(self) -> dict[str, SourceConfig]:
        """The sources that the stage or its evaluations read, by name."""
        known = self.meta["config"].get("sources", {})
        return {name: SourceConfig(**fields) for name, fields in known.items() if fields}


def open_trained(workdir: Path, name: str, step: str = "latest") -> Trained:
    """A stage of a run by a checkpoint of it. Raises UserError if the run lacks a part that it was trained with."""
    meta = stage_meta(workdir, name, step)
    tokenizer = load_tokenizer(workdir, name, meta)
    template = trained_template(workdir, name, meta.get("chat_template"))
    return Trained(workdir, name, meta, read_model(meta["model"]), tokenizer, template)
