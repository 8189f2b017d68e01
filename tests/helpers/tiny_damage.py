"""What can befall the checkpoints of a finished stage of `tiny_run`, the latest of which is step 10.

Each damage is a function of the directory of the checkpoints.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from llm3.checkpoints.metadata import json_digest
from llm3.checkpoints.stage_checkpoints import Checkpoints
from llm3.tree import flatten, unflatten


def rewritten(change: Callable[[dict], dict]) -> Callable[[Path], None]:
    """Other leaves in the place of step 10, sealed as they are, by a program that does not look at them."""

    def damage(directory: Path) -> None:
        with Checkpoints(directory) as checkpoints, pytest.MonkeyPatch.context() as patch:
            patch.setattr("llm3.checkpoints.orbax_store.not_finite", lambda leaves: [])
            meta, params = checkpoints.meta(10), flatten(checkpoints.load_params(10))
            shutil.rmtree(directory / "10")
            checkpoints.save(10, unflatten(change(params)), {}, meta)

    return damage


def in_file(pattern: str, change: Callable[[Path], None]) -> Callable[[Path], None]:
    """A change of the largest file of step 10 that the pattern names."""
    return lambda directory: change(max((directory / "10").glob(pattern), key=lambda path: path.stat().st_size))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 64
    path.write_bytes(content)


def edited(change: Callable[[dict], None], sealed: bool) -> Callable[[Path], None]:
    """Other metadata, under the old seal or a right one."""

    def edit(path: Path) -> None:
        meta = json.loads(path.read_text())
        seal = meta.pop("meta_digest")
        change(meta)
        path.write_text(json.dumps(meta | {"meta_digest": json_digest(meta) if sealed else seal}))

    return in_file("meta/data.json", edit)


def only_half_written(directory: Path) -> None:
    for step in ("8", "10"):
        (directory / step).rename(directory / f"{step}.orbax-checkpoint-tmp")
