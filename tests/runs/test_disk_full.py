"""A disk that fills up: the run ends with a status of its own and one line, what was saved before is whole, and the
same command goes on once there is space."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from llm3.checkpoints.stage_checkpoints import Checkpoints
from llm3.distributed.lock import lock
from llm3.errors import Exit, NotWritten
from llm3.files import read_json, write_json
from llm3.report.logs import MetricsWriter, read_metrics
from llm3.tree import params_digest
from tests.helpers import tiny_cluster as cluster
from tests.helpers import tiny_delta
from tests.helpers import tiny_run as tiny
from tests.helpers.tiny_checkpoints import OPT, PARAMS, newest, same

# Orbax leaves coroutines behind when it fails
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning", "ignore:coroutine:RuntimeWarning"
)

MIB, PAGE = 2**20, 4096
FULL = "No space left on device"


class Disk:
    """A small file system at `path`."""

    def __init__(self, path: Path):
        self.path, self._ballast = path, path / "ballast"

    def fill(self, leave: int) -> None:
        """Leave so many bytes of its free space."""
        with self._ballast.open("ab") as file:
            file.truncate(0)
            state = os.statvfs(self.path)
            os.posix_fallocate(file.fileno(), 0, state.f_bavail * state.f_bsize - leave)

    def allow(self, used: int) -> None:
        """Let all files besides the ballast take so many bytes."""
        self.fill(used - sum(taken(path) for path in self.path.iterdir() if path != self._ballast))

    def free(self) -> None:
        self._ballast.unlink()

    def remount(self, options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", self.path], check=True)


def taken(path: Path) -> int:
    """The bytes that a file, or all below a directory, takes on a disk of pages."""
    files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
    return sum(-(-each.stat().st_size // PAGE) * PAGE for each in files)


@pytest.fixture
def disk(tmp_path):
    path = tmp_path / "disk"
    path.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={4 * MIB}", "tmpfs", path], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"a file system cannot be mounted here: {done.stderr.strip()}")
    yield Disk(path)
    subprocess.run(["umount", "-l", path], check=True)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("left", [0, PAGE, 4 * PAGE, 8 * PAGE])
def test_a_save_on_a_full_disk_is_not_written_and_the_one_before_is_whole(disk, left):
    """Wherever in a save the space ends; the next save does not find what is left of it."""
    directory = disk.path / "checkpoints"
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(10, PARAMS, OPT, {"tokens": 10})
        checkpoints.wait()
        disk.fill(left)
        for _ in range(2):
            with pytest.raises(NotWritten, match=f"{directory}: the checkpoint of step 20 was not written: {FULL}$"):
                checkpoints.save(20, jax.tree.map(lambda x: 2 * x, PARAMS), OPT, {})
                checkpoints.wait()
        restored = newest(Checkpoints(directory, read_only=True))
        assert restored.step == 10 and not restored.skipped and same(restored.params, PARAMS)
        disk.free()
        checkpoints.save(20, PARAMS, OPT, {})
    assert names(directory) == ["10", "20"]


def test_a_base_on_a_full_disk_is_not_written_and_no_delta_checkpoint_is_saved(disk):
    with Checkpoints(disk.path / "checkpoints") as checkpoints:
        disk.fill(PAGE)
        with pytest.raises(NotWritten, match=f"{disk.path}/base: the checkpoint of step 0 was not written: {FULL}"):
            checkpoints.save_base(tiny_delta.START, {})
            tiny_delta.save(checkpoints, 10)
        assert checkpoints.steps() == []
        disk.free()
        checkpoints.save_base(tiny_delta.START, {})
        tiny_delta.save(checkpoints, 10)
    assert names(disk.path / "base") == ["0"]


SAVE = """
import pathlib, sys
from tests.helpers.tiny_checkpoints import OPT, PARAMS, Checkpoints
try:
    Checkpoints(pathlib.Path(sys.argv[1])).save(20, PARAMS, OPT, {})
except Exception as error:
    print(type(error).__name__, error)
"""


def test_a_disk_that_became_read_only_is_said_to_be_that_and_the_process_ends_at_once(disk):
    """Where a directory cannot be made, Orbax's threads could wait for it until long after the main one is done."""
    with Checkpoints(disk.path) as checkpoints:
        checkpoints.save(10, PARAMS, OPT, {})
    disk.remount("ro")
    environment = os.environ | {"PYTHONPATH": str(tiny.ROOT), "JAX_PLATFORMS": "cpu"}
    program = [sys.executable, "-c", SAVE, disk.path]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=600, check=True)
    reason = f"NotWritten {disk.path}: the checkpoint of step 20 was not written: Read-only file system\n"
    assert (done.stdout, done.stderr) == (reason, "")
    assert newest(Checkpoints(disk.path, read_only=True)).step == 10
    disk.remount("rw")
    with Checkpoints(disk.path) as checkpoints:
        checkpoints.save(20, PARAMS, OPT, {})
    assert names(disk.path) == ["10", "20"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO])
def test_what_the_disk_refuses_is_told_from_a_mistake_in_the_program(tmp_path, monkeypatch, number):
    def refuse(error: Exception):
        def rename(*_, **__):
            raise error

        monkeypatch.setattr(os, "rename", rename)

    with Checkpoints(tmp_path) as checkpoints:
        refuse(OSError(number, os.strerror(number)))
        checkpoints.save(1, PARAMS, OPT, {})
        with pytest.raises(NotWritten, match=os.strerror(number)) as refused:
            checkpoints.wait()
        assert refused.value.exit == Exit.NOT_WRITTEN
        refuse(TypeError("a mistake"))
        checkpoints.save(1, PARAMS, OPT, {})
        with pytest.raises(RuntimeError, match="step 1 was not written: TypeError: a mistake"):
            checkpoints.wait()


def test_a_json_file_stays_as_it_was(disk):
    path = disk.path / "row.json"
    write_json(path, {"x": 1})
    disk.fill(PAGE)
    with pytest.raises(NotWritten, match=f"{path} was not written: {FULL}"):
        write_json(path, {"x": "y" * 2 * PAGE})
    assert read_json(path) == {"x": 1}


def test_metrics_say_at_once_that_they_were_not_written_and_what_was_is_read(disk):
    """Of the two files, either may be the first to find no space."""
    disk.fill(4 * PAGE)
    line, written = {f"figure_{n}": n / 7 for n in range(20)}, 0
    with (
        pytest.raises(NotWritten, match=rf"metrics\.jsonl was not written: {FULL}"),
        MetricsWriter(disk.path) as writer,
    ):
        for written in range(1000):
            writer.write(written, line)
    steps = [each["step"] for each in read_metrics(disk.path)]
    assert steps in (list(range(written)), list(range(written + 1))) and written > 1
    disk.free()
    with MetricsWriter(disk.path, resume_step=1) as writer:
        writer.write(2, line)
    assert [each["step"] for each in read_metrics(disk.path)] == [0, 1, 2]


def test_a_workdir_on_a_full_disk_is_no_bad_input(disk):
    disk.fill(0)
    with pytest.raises(NotWritten, match=f"lock was not written: {FULL}"), lock(disk.path):
        pass


STAGES = ("pretrain", "posttrain")
EXTRA = """c.evaluations = dict(general=c.evaluations.general)
c.stages = dict(pretrain=c.stages.pretrain, posttrain=dict(c.stages.posttrain.to_dict(), train="top(1)"))
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """With the texts, and a run of two stages that was not disturbed; the second one rests on a base."""
    directory = tmp_path_factory.mktemp("full") / "base"
    tiny.write_texts(directory / "texts")
    tiny.process(command(directory, directory / "whole"))
    return directory


def command(base: Path, workdir: Path) -> tuple[str, ...]:
    config = tiny.write_config(base / "config.py", base, EXTRA)
    return ("run", f"--config={config}", f"--workdir={workdir}")


def assert_checkpoints_are_intact(workdir: Path) -> None:
    for stage in STAGES:
        checkpoints = Checkpoints(workdir / stage / "checkpoints", read_only=True)
        for step in checkpoints.steps():
            params = checkpoints.load_params(step)
            assert "base" in checkpoints.meta(step) or params_digest(params) == checkpoints.meta(step)["params_digest"]


@pytest.mark.slow
def test_a_run_on_a_disk_that_fills_up_says_what_is_whole_and_goes_on_once_there_is_space(base, disk):
    """Before the first checkpoint; with space for one; with space for the first stage and a half of the second."""
    whole, workdir = base / "whole", disk.path / "run"
    of_stage = {stage: taken(whole / stage / "checkpoints" / "8") for stage in STAGES}
    second = taken(whole / "pretrain") + taken(whole / "posttrain" / "base") + int(1.5 * of_stage["posttrain"])
    said = {
        int(0.5 * of_stage["pretrain"]): (1, "checkpoints: the checkpoint of step 4", "no earlier checkpoint"),
        int(1.5 * of_stage["pretrain"]): (1, "checkpoints: the checkpoint of step 8", "checkpoint 4 of pretrain"),
        second: (2, "checkpoints: the checkpoint of step 8", "checkpoint 4 of posttrain"),
    }
    for allowed, (count, lost, kept) in said.items():
        disk.allow(allowed)
        lost, names = f"{STAGES[count - 1]}/{lost}", ",".join(STAGES[:count])  # a start traces all that it is to train
        done = tiny.process((*command(base, workdir), f"--stages={names}"), status=Exit.NOT_WRITTEN)
        error = done.stderr
        assert error.startswith("llm3: ") and len(error.splitlines()) == 1, error
        assert f"{workdir}/{lost} was not written: {FULL}; " in error and kept in error and "rerun the command" in error
        assert_checkpoints_are_intact(workdir)
    disk.free()
    assert "posttrain: resumes at step 4" in tiny.process(command(base, workdir)).stdout
    assert tiny.digests(workdir) == tiny.digests(whole)
    assert not [path for path in workdir.rglob("*") if "-tmp" in path.name or "partial" in path.name]


@pytest.mark.slow
def test_a_report_that_has_no_space_is_named_and_written_by_the_same_command(base, disk):
    workdir = disk.path / "run"
    subprocess.run(["cp", "-r", base / "whole", workdir], check=True)
    for path in [*workdir.glob("figures/*"), *workdir.glob("report.*"), workdir / "matrix.json"]:
        path.unlink()
    disk.fill(4 * PAGE)
    error = tiny.process(command(base, workdir), plots=True, status=Exit.NOT_WRITTEN).stderr
    assert error.startswith(f"llm3: {workdir / 'report.html'} was not written: {FULL}; checkpoint 10 of posttr")
    disk.free()
    tiny.process(command(base, workdir))
    assert (workdir / "matrix.json").read_bytes() == (base / "whole" / "matrix.json").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.9, 2.7])
def test_of_two_processes_the_one_that_finds_no_space_says_so_and_the_other_ends_too(base, disk, share):
    """Orbax lets processes wait for one that has failed for many minutes."""
    workdir = disk.path / "run"
    disk.allow(int(share * taken(base / "whole" / "pretrain" / "checkpoints" / "8")))
    ended = cluster.run(*command(base, workdir), "--stages=pretrain", "--config.evaluations={}", devices=2)
    assert all(each.status for each in ended) and Exit.NOT_WRITTEN in [each.status for each in ended]
    told = next(each.stderr for each in ended if each.status == Exit.NOT_WRITTEN)
    assert f"was not written: {FULL}; " in told and "Traceback" not in told
    assert_checkpoints_are_intact(workdir)
