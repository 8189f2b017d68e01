"""The stages that are served, by name: what each can be asked, and how long a request to it may be."""

from collections.abc import Mapping
from typing import Any

from llm3.files import CHECKPOINTS
from llm3.predict import kinds
from llm3.registry import load_plugin
from llm3.serve.asking import longest
from llm3.serve.engine import Engine
from llm3.serve.errors import ApiError, unknown_model
from llm3.serve.stages import Served

TASKS_OF_KINDS = {"labels": "classify", "proposals": "fill", "spans": "spans", "embeddings": "embeddings"}


class Service:
    """The stages and the engine. max_length: tokens of a prompt with its answer; None: see `longest`."""

    def __init__(self, stages: Mapping[str, Served], engine: Engine, max_length: int | None = None):
        self.stages, self.engine, self._max_length = dict(stages), engine, max_length
        self.tasks = {name: tasks_of(stage) for name, stage in stages.items()}
        self._created = {name: _created(stage) for name, stage in stages.items()}

    def stage(self, name: str, task: str) -> Served:
        """The stage of this name. Raises ApiError if there is none, or if it cannot be asked for this."""
        if name not in self.stages:
            raise unknown_model(name, list(self.stages))
        if task not in self.tasks[name]:
            able = [each for each, tasks in self.tasks.items() if task in tasks]
            others = f"models for it: {', '.join(able[:20])}" if able else "no model here is"
            raise ApiError(f"model={name!r} is for {', '.join(self.tasks[name])}, not for {task}; {others}", "model")
        return self.stages[name]

    def length(self, stage: Served) -> int:
        """Max tokens of a prompt with its answer."""
        possible = longest(stage.trained)
        asked = self._max_length or possible
        return min(asked, possible) if stage.model.positions == "learned" else asked

    def models(self) -> list[dict[str, Any]]:
        """All stages as /v1/models lists them."""
        return [self._described(name, stage) for name, stage in self.stages.items()]

    def _described(self, name: str, stage: Served) -> dict[str, Any]:
        trained = stage.trained
        about = {
            "run": trained.workdir.resolve().name,
            "stage": trained.name,
            "step": trained.meta["step"],
            "parent": self._parent(name, stage),
            "kind": "causal" if stage.model.causal else "masked",
            "tasks": self.tasks[name],
            "labels": trained.labels if "classify" in self.tasks[name] else [],
            "sequence_length": trained.length,
            "max_length": self.length(stage),
            "params_digest": trained.meta["params_digest"],
        }
        return {"id": name, "object": "model", "created": self._created[name], "owned_by": "llm3", "llm3": about}

    def _parent(self, name: str, stage: Served) -> str | None:
        """The parent's own name here, if it is a stage of the same run; else what its metadata calls it."""
        link = (stage.trained.meta.get("lineage") or [{}])[-1]
        parent = link.get("stage")
        own = f"{name.removesuffix(stage.trained.name)}{parent}"
        return own if parent and own in self.stages else parent


def tasks_of(stage: Served) -> list[str]:
    """What a stage can be asked."""
    found = []
    if stage.generates:
        talks = any(stage.trained.sources[each].is_conversation for each in stage.trained.trained_on)
        found = ["completions", *(["chat"] if stage.trained.template or talks else []), "score"]
    possible = (kind for kind in TASKS_OF_KINDS if not load_plugin(kinds, kind).refusal(stage.trained))
    return found + [TASKS_OF_KINDS[kind] for kind in possible]


def _created(stage: Served) -> int:
    """When the checkpoint was written, in seconds since 1970."""
    trained = stage.trained
    return int((trained.workdir / trained.name / CHECKPOINTS / str(trained.meta["step"])).stat().st_mtime)
