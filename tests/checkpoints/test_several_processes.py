"""What one of several processes cannot read of a checkpoint, none resumes from; a read that fails once is no damage."""

import errno
import threading

import numpy as np
import pytest

from llm3.checkpoints import damage, saved_step
from llm3.checkpoints.layout import LiteralPath
from llm3.checkpoints.load import stage_meta
from llm3.checkpoints.orbax_store import DamagedCheckpoint
from llm3.checkpoints.stage_checkpoints import Checkpoints, Wanted
from llm3.distributed import processes
from llm3.errors import Exit, Unreachable
from tests.helpers.several import together

PARAMS = {"layer": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}}


@pytest.fixture
def saved(tmp_path):
    with Checkpoints(tmp_path / "checkpoints", keep=3) as checkpoints:
        for step in (2, 4):
            checkpoints.save(step, PARAMS, {}, {"step": step})
    return Checkpoints(tmp_path / "checkpoints", read_only=True)


def resumed(checkpoints):
    found = checkpoints.load_newest(lambda step: Wanted(None, {}))
    return found.step, found.skipped


def failing(monkeypatch, errors):
    """Let reads of metadata raise one of `errors` after the other, then none."""
    read, left = LiteralPath.read_text, list(errors)

    def fail(path, *arguments, **options):
        if "meta" in str(path) and left:
            raise left.pop(0)
        return read(path, *arguments, **options)

    monkeypatch.setattr(LiteralPath, "read_text", fail)
    monkeypatch.setattr(damage.time, "sleep", lambda seconds: None)


def test_a_step_that_one_process_finds_damaged_is_skipped_by_all(saved, monkeypatch):
    read, at_once = saved_step.SavedStep._read, threading.Lock()  # Orbax's context is that of a process

    def torn(step, part, *rest):
        if processes.index() == 1 and step.meta["step"] == 4:
            raise DamagedCheckpoint("a file in it is cut short")
        with at_once:
            return read(step, part, *rest)

    monkeypatch.setattr(saved_step.SavedStep, "_read", torn)
    first, second = together(monkeypatch, lambda index: resumed(saved))
    why = "step 4 is damaged and was skipped: {}a file in it is cut short"
    assert first == (2, [why.format("process 1: ")]) and second == (2, [why.format("")])


def test_the_first_process_says_which_steps_there_are(saved, monkeypatch):
    def run(index):
        own = Checkpoints(saved.directory, read_only=True)
        if index == 0:
            own.steps = lambda: [2]  # an old listing
        return own.newest_meta()["step"]

    assert together(monkeypatch, run) == [2, 2]
    workdir, stage = saved.directory.parent.parent, saved.directory.parent.name
    monkeypatch.setattr(Checkpoints, "latest", lambda _: 2 if processes.is_first() else 4)
    assert together(monkeypatch, lambda index: stage_meta(workdir, stage)["step"]) == [2, 2]


def test_a_read_that_fails_once_is_tried_again_and_is_no_damage(saved, monkeypatch, capsys):
    failing(monkeypatch, [OSError(errno.EIO, "Input/output error"), TimeoutError("the server is busy")])
    assert resumed(saved) == (4, [])
    assert "could not be read, and is tried again" in capsys.readouterr().err


def test_a_disk_that_does_not_answer_is_not_called_damage(saved, monkeypatch):
    failing(monkeypatch, [OSError(errno.ESTALE, "Stale file handle")] * 4)
    with pytest.raises(Unreachable, match=r"cannot be read now: .*Stale file handle") as raised:
        resumed(saved)
    assert raised.value.exit == Exit.UNREACHABLE and not saved._steps.damaged


def test_damage_is_not_taken_for_a_disk_that_does_not_answer():
    torn = ValueError("OUT_OF_RANGE: size of 0 bytes, os_error_code='2'")
    assert not damage.passes(torn) and not damage.passes(FileNotFoundError(errno.ENOENT, "No such file"))
    late = RuntimeError("it failed")
    late.__cause__ = ValueError("UNKNOWN: read failed [os_error_code='116']")
    assert damage.passes(late)
