"""llm3 trains language models in three stages and shows why there are three.

The names in EXPORTS can be imported from here. They load on first use, so that `import llm3` does not import jax.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

# name -> the module that defines it, followed by its name there if that differs
EXPORTS = {
    "Batch": "llm3.data.batch",
    "ModelConfig": "llm3.config.model_schema",
    "Sums": "llm3.objectives",
    "Tokenizer": "llm3.data.tokenizer",
    "TrainState": "llm3.training.step",
    "abstract": "llm3.models.transformer",
    "init": "llm3.models.transformer",
    "load_config": "llm3.stages.origin",
    "load_stage": "llm3.checkpoints.load",
    "make_mesh": "llm3.distributed.sharding",
    "make_partition": "llm3.optim.partition",
    "make_train_step": "llm3.training.step",
    "new_guard": "llm3.training.guard",
    "sample": "llm3.models.batching",
}


def __getattr__(name: str) -> Any:
    if name not in EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = EXPORTS[name].partition(":")
    return getattr(importlib.import_module(module), attribute or name)


def __dir__() -> list[str]:
    return sorted([*globals(), *EXPORTS])
