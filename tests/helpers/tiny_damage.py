"""Ways to damage the checkpoints of a finished stage of `tiny_run`, whose latest step is 10.

Each of them is a function of the checkpoint directory.
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
    """Replace the leaves of step 10 and record valid digests, without the check for finite values."""

    def damage(directory: Path) -> None:
        with Checkpoints(directory) as checkpoints, pytest.MonkeyPatch.context() as patch:
            patch.setattr("llm3.checkpoints.orbax_store.not_finite", lambda leaves: [])
            meta, params = checkpoints.meta(10), flatten(checkpoints.load_params(10))
            shutil.rmtree(directory / "10")
            checkpoints.save(10, unflatten(change(params)), {}, meta)

    return damage


def in_file(pattern: str, change: Callable[[Path], None]) -> Callable[[Path], None]:
    """Change the largest file of step 10 that matches the pattern."""
    return lambda directory: change(max((directory / "10").glob(pattern), key=lambda path: path.stat().st_size))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 64
    path.write_bytes(content)


def edited(change: Callable[[dict], None], valid_digest: bool) -> Callable[[Path], None]:
    """Edit the metadata, and either keep the old digest or record a valid one."""

    def edit(path: Path) -> None:
        meta = json.loads(path.read_text())
        digest = meta.pop("meta_digest")
        change(meta)
        path.write_text(json.dumps(meta | {"meta_digest": json_digest(meta) if valid_digest else digest}))

    return in_file("meta/data.json", edit)


def only_half_written(directory: Path) -> None:
    for step in ("8", "10"):
        (directory / step).rename(directory / f"{step}.orbax-checkpoint-tmp")
