"""Checks of the flags of `bench` and `bench-model`, before any data or device is touched."""

import importlib.util
from collections.abc import Mapping
from typing import Any

from llm3.config.schema import RunConfig
from llm3.errors import UserError, nearest

PEERS = ("torch", "torch.compile")
DTYPES = ("float32", "bfloat16", "float16")


def check_bench(config: RunConfig, options: Mapping[str, Any]) -> None:
    """Raise UserError for flags that do not fit together, and for a peer that is unknown or not installed."""
    stage, peers = options["stage"], options.get("peer") or []
    if options.get("sweep"):
        for flag in ("profile", "peer", "alone"):
            if options.get(flag):
                raise UserError(f"--sweep: expected no --{flag}: a sweep only times combinations of settings")
    if options.get("decode") and "torch.compile" in peers:
        raise UserError("--decode --peer=torch.compile: expected --peer=torch")
    if (folder := options.get("profile")) is not None and folder.exists() and not folder.is_dir():
        raise UserError(f"--profile={folder}: it is a file; expected a folder")
    for name in peers:
        if name not in PEERS:
            raise UserError(f"--peer={name}: no such peer; {nearest(name, PEERS)}")
    if peers:
        needed = ["torch", "transformers", *(["peft"] if config.stages[stage].adapters else [])]
        if missing := [each for each in needed if importlib.util.find_spec(each) is None]:
            verb = "is" if len(missing) == 1 else "are"
            raise UserError(
                f"--peer={','.join(peers)}: needs {' and '.join(missing)}, which {verb} not installed: "
                f"pip install {' '.join(missing)}"
            )


def check_bench_model(options: Mapping[str, Any]) -> None:
    """Raise UserError for flags of `bench-model` that are out of range."""
    if (dtype := options["dtype"]) not in DTYPES:
        raise UserError(f"--dtype={dtype}: {nearest(dtype, DTYPES)}")
    if not options["gigabytes"] > 0:
        raise UserError(f"--gigabytes={options['gigabytes']}: expected a number above 0")
    if options["fsdp"] < 1:
        raise UserError(f"--fsdp={options['fsdp']}: expected at least 1")
