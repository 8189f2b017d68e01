"""What all processes of a run have in common before it begins, and before each of its stages."""

import functools
import hashlib
import importlib.metadata
from pathlib import Path
from typing import Any

import llm3
from llm3.checkpoints.stage_checkpoints import Checkpoints
from llm3.config.schema import RunConfig, as_dict
from llm3.data.chat_templates import template_hash
from llm3.distributed import agreement, processes
from llm3.errors import Unreachable
from llm3.files import CHECKPOINTS
from llm3.handoff.start import Start, read_start
from llm3.stages.environment import PACKAGES
from llm3.stages.experiment import Experiment


def compare_runs(config: RunConfig, flags: dict[str, Any]) -> None:
    """Raise UserError, on all processes, unless they have the same config, flags and code."""
    if processes.count() == 1:
        return
    code = {"llm3": code_digest()} | {name: importlib.metadata.version(name) for name in PACKAGES}
    agreement.compare({"code": code, "config": as_dict(config), "flags": flags})


def compare_data(experiment: Experiment) -> None:
    """Raise UserError, on all processes, unless they have read the same documents and the same tokenizer."""
    facts: dict[str, Any] = {
        f"data of {stage.name}": {source: digest[:12] for source, digest in stage.data.fingerprints.items()}
        for stage in experiment.stages.values()
    }
    evaluations = {name: str(each["data"])[:12] for name, each in experiment.evaluation_entries.items()}
    tokenizer, template = experiment.tokenizer.hash[:12], template_hash(experiment.library.template)[:12]
    agreement.compare(facts | {"evaluations": evaluations, "tokenizer": tokenizer, "chat template": template})


def see_checkpoints(config: RunConfig, workdir: Path, names: list[str]) -> None:
    """Return once all processes see those checkpoints that the first one sees, of some stages and of their parents.

    Raises Unreachable, on all processes, if one of them does not come to see them.
    """
    if processes.count() == 1:
        return
    folders: list[Path] = []
    for name in names:
        start = read_start(config.stages[name].start, workdir, f"config.stages.{name}.start")
        folders += [workdir / name, *([start.run / start.stage] if isinstance(start, Start) else [])]
    stages = [Checkpoints(each / CHECKPOINTS, read_only=True) for each in folders]
    listed = processes.broadcast_from_first(lambda: [each.steps() for each in stages])
    agreement.until_seen(lambda: [each.steps() for each in stages] == listed)
    for process, own in enumerate(processes.exchange([each.steps() for each in stages])):
        for folder, steps, expected in zip(folders, own, listed, strict=True):
            if steps != expected:
                agreement.refuse(
                    f"process {process} sees the checkpoints {steps} in {folder}, and process 0 sees {expected}: "
                    f"a listing may be old, or --workdir is not the same directory on all hosts",
                    Unreachable,
                )


@functools.cache
def code_digest() -> str:
    """A digest of the source files of llm3, by their names in its folder."""
    folder, digest = Path(llm3.__file__).parent, hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder)}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()[:12]
