"""Each file of the latest checkpoint of a real run, and of its base, is flipped, truncated and deleted.

The run then uses the values that were saved, falls back to the previous step with a message, or stops with an error. It
never uses other values and never starts again from nothing.
"""

import shutil
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from llm3.checkpoints.metadata import by_path, saved_shapes
from llm3.checkpoints.stage_checkpoints import Checkpoints, Restored, Wanted
from llm3.distributed.lock import LOCK
from llm3.errors import UserError
from tests.helpers import tiny_run as tiny
from tests.helpers.tiny_checkpoints import HARMS, data_files, flip, halve, largest

# Orbax leaves coroutines behind when it fails on a damaged file
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(
        "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning", "ignore:coroutine:RuntimeWarning"
    ),
]

EXTRA = """c.evaluations = {}
c.stages = dict(pretrain=c.stages.pretrain, posttrain=dict(c.stages.posttrain.to_dict(), train="top(1)"))
"""
STAGES = {"pretrain": (8, 10), "posttrain": (4, 8)}  # the previous and the latest step


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A complete run, and one killed two steps before its end; the second stage saves delta checkpoints."""
    base = tmp_path_factory.mktemp("harm") / "base"
    tiny.write_texts(base / "texts")
    config = tiny.write_config(base / "config.py", base, EXTRA)
    whole, killed = base / "whole", base / "killed"
    command = lambda workdir: ("run", f"--config={config}", f"--workdir={workdir}")  # noqa: E731
    tiny.process((*command(whole), "--stages=pretrain"))
    shutil.copytree(whole, killed)
    tiny.process(command(whole))
    tiny.process(command(killed), point="SIGKILL@saved:posttrain:8", status=-9)
    return types.SimpleNamespace(base=base, whole=whole, killed=killed, command=command)


def newest(stage: Path) -> Restored | None:
    """The checkpoint that the stage would resume from, as numpy arrays."""
    checkpoints = Checkpoints(stage / "checkpoints", read_only=True)

    def wanted(step: int) -> Wanted:
        abstract = {
            path: jax.ShapeDtypeStruct(shape, dtype)
            for path, (shape, dtype) in saved_shapes(checkpoints.meta(step), "opt").items()
        }
        return Wanted(None, abstract)

    return checkpoints.load_newest(wanted)


def everything(restored: Restored) -> dict[str, object]:
    leaves = by_path({"params": restored.params, "opt": restored.opt})
    return {path: np.asarray(leaf).tobytes() for path, leaf in leaves.items()} | {"meta": restored.meta}


def comes_of_harm(path: Path, stage: Path, part: str, intact: dict[int, dict]) -> int | None:
    """The step that the stage would resume from after damage to `path`; None if it is rejected."""
    previous, latest = STAGES[stage.name]
    try:
        restored = newest(stage)
    except UserError as error:
        assert "none of its checkpoints can be read" in str(error) and str(stage / part) in str(error), path
        return None
    assert everything(restored) == intact[restored.step], path
    if restored.step == previous:
        assert f"step {latest} is damaged" in restored.skipped[0] and str(stage / part) in restored.skipped[0], path
    return restored.step


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize(
    ("name", "part"), [("pretrain", "checkpoints/10"), ("posttrain", "checkpoints/8"), ("posttrain", "base/0")]
)
def test_harm_to_any_file_is_harmless_or_found_and_named(runs, tmp_path, name, part, harm):
    stage, (previous, latest) = Path(shutil.copytree(runs.killed / name, tmp_path / name)), STAGES[name]
    intact = {latest: everything(newest(stage))}
    (stage / "checkpoints" / str(latest)).rename(tmp_path / "aside")
    intact[previous] = everything(newest(stage))
    (tmp_path / "aside").rename(stage / "checkpoints" / str(latest))
    came = {}
    for path in data_files(stage / part):
        content = path.read_bytes()
        HARMS[harm](path)
        came[path] = comes_of_harm(path, stage, part, intact)
        path.write_bytes(content)
    assert len(came) > 5 and set(came.values()) == {latest, None if part == "base/0" else previous}
    assert latest not in (came[stage / part / "meta" / "data.json"], came[largest(stage / part / "params")])


def test_a_run_falls_back_to_the_step_before_says_so_and_ends_as_one_that_was_not_harmed(runs):
    workdir = Path(shutil.copytree(runs.killed, runs.base / "fallen back"))
    latest = workdir / "posttrain" / "checkpoints" / "8"
    halve(largest(latest / "params"))
    output = tiny.process(runs.command(workdir)).stdout
    assert f"posttrain: step 8 is damaged and was skipped: {latest / 'params'}" in output
    assert "posttrain: resumes at step 4" in output
    assert tiny.digests(workdir) == tiny.digests(runs.whole)


@pytest.mark.parametrize("part", ["base/0/params", "base/0/meta"])
def test_a_run_without_an_intact_base_is_rejected_and_nothing_is_changed(runs, part):
    workdir = Path(shutil.copytree(runs.killed, runs.base / f"without {part.replace('/', ' ')}"))
    stage = workdir / "posttrain"
    flip(max(data_files(stage / part), key=lambda path: path.stat().st_size))
    unlocked = lambda: {path: path.read_bytes() for path in data_files(stage) if path.name != LOCK}  # noqa: E731
    before = unlocked()
    error = tiny.process(runs.command(workdir), status=2).stderr
    assert f"{stage / 'checkpoints'}: none of its checkpoints can be read" in error and str(stage / part) in error
    assert "Traceback" not in error
    assert unlocked() == before
