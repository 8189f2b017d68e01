"""Tiny ablations: plain fields, and files over the texts of `tiny_run`, with stage runs in forks of a server."""

import copy
import json
import pathlib
import subprocess
from collections.abc import Callable
from typing import Any

from llm3.ablation import local
from llm3.ablation.schema import AblationConfig
from llm3.config import load
from tests.helpers import forks
from tests.helpers import tiny_run as tiny

SHAPE = {"steps": 5, "batch_size": 8, "sequence_length": 32, "optimizer": {"warmup_steps": 1}}
FIT = {"kind": "finetune", "data": {"task": 1.0}, "objective": "classify", **SHAPE}
BASE = {
    "seed": 7,
    "model": {"layers": 2, "d_model": 16, "heads": 2, "d_ff": 32},
    "tokenizer": {"vocab_size": 300},
    "sources": {
        "general": {"path": "builtin:python"},
        "domain": {"path": "builtin:numerical"},
        "task": {"path": "builtin:numerical_task", "label": "label"},
    },
    "stages": {
        "pretrain": {"kind": "pretrain", "data": {"general": 1.0}, **SHAPE},
        "posttrain": {
            "kind": "posttrain",
            "start": "pretrain",
            "data": {"domain": 1.0},
            "replay": 0.25,
            **SHAPE,
        },
        "finetune": {"start": {"stage": "posttrain", "fresh": ["head/.*"]}, **FIT},
        "scratch": {"start": "init", "baseline": True, **FIT},
    },
    "evaluations": {"task": {"kind": "classification", "source": "task", "split": "test", "sequence_length": 32}},
}

CONFIG = '''"""A tiny ablation."""

from ml_collections import ConfigDict


def get_config():
    c = ConfigDict(convert_dict=False)
    c.base = "base.py"
    c.question = "Does a domain stage help?"
    c.metric = "task_accuracy"
    c.seeds = [0, 1]
    c.arms = {"all three": {}, "no domain": {"without": ["posttrain"]}}
    c.vary = ["posttrain", "finetune"]
    return c
'''
SMALL = """
del c.stages.scratch
for stage in c.stages.values():
    stage.update(steps=4, save_every=2, log_every=1)
    stage.optimizer.warmup_steps = 1
c.stages.pretrain.update(data=dict(general=0.5, domain=0.5), temperature=2.0)
c.stages.posttrain.update(data=dict(domain=1.0), replay=0.25)
c.evaluations.task.max_documents = 8
"""


def ablation(**fields: Any) -> AblationConfig:
    """The config of an ablation of `BASE`."""
    return load.read_as(AblationConfig, {"base": copy.deepcopy(BASE), "metric": "task_accuracy", **fields})


def write_ablation(base: pathlib.Path, extra: str = "", base_extra: str = "") -> pathlib.Path:
    """Texts, a base config and the file of an ablation in `base`; `extra` are lines that change its config `c`."""
    if not (base / "texts").is_dir():
        tiny.write_texts(base / "texts")
    tiny.write_config(base / "base.py", base, SMALL + base_extra)
    lines = "".join(f"    {line}\n" for line in extra.splitlines())
    file = base / "ablation.py"
    file.write_text(CONFIG.replace("    return c\n", f"{lines}    return c\n"), encoding="utf-8")
    return file


class Process:
    """A stage run in a fork, as `subprocess.Popen` has it; its log has what it printed once it has ended.

    point: where it dies, see `tiny_deaths`. polled: called with the process whenever it is polled.
    """

    def __init__(self, folder: pathlib.Path, point: str = "", polled: Callable[["Process"], None] = lambda _: None):
        self._folder, self._polled, self.returncode = folder, polled, None
        self._fork = forks.Fork([point, json.dumps([local.command(folder)])])

    def poll(self) -> int | None:
        self._polled(self)
        if self.returncode is None:
            try:
                said = self._fork.communicate(0)
            except subprocess.TimeoutExpired as error:
                said = error.output, error.stderr  # since the last time
            with (self._folder / local.LOG).open("a") as log:
                log.write("".join(said))
            self.returncode = self._fork.returncode
        return self.returncode

    def stopped(self) -> bool:
        """Whether SIGSTOP has stopped it."""
        state = pathlib.Path(f"/proc/{self._fork.pid}/status")
        return self.returncode is None and "(stopped)" in state.read_text()

    def send_signal(self, number: int) -> None:
        self._fork.send_signal(number)


def digests(workdir: pathlib.Path) -> dict[str, str]:
    """{stage run: digest of its parameters} of those that are finished."""
    rows = {path.parents[1].name: json.loads(path.read_text()) for path in workdir.glob("runs/*/*/evaluation.json")}
    return {name: row["params_digest"] for name, row in sorted(rows.items())}


def plan(workdir: pathlib.Path) -> dict[str, Any]:
    """The plan of an ablation, {variant: its fields}."""
    return {each["name"]: each for each in json.loads((workdir / "ablation.json").read_text())["variants"]}
