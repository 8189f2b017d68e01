"""A stage has one writer at a time, and the files that all runs in a workdir share too."""

import errno
import fcntl
import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from llm3.__main__ import main
from llm3.distributed import lock as locking
from llm3.distributed.lock import Holder, lock
from llm3.errors import UserError
from tests.helpers import tiny_run as tiny


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    directory = tmp_path_factory.mktemp("lock")
    return str(tiny.write_config(directory / "config.py", directory))


def test_a_stage_in_use_is_rejected_with_the_name_of_its_holder(capsys, monkeypatch, tmp_path, file):
    monkeypatch.setattr("sys.argv", ["/somewhere/llm3/__main__.py", "run", "--workdir=here"])
    with lock(tmp_path / "posttrain"):
        assert main(["run", f"--config={file}", f"--workdir={tmp_path}"]) == 2
    error = capsys.readouterr().err
    holder = f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%dT')}"
    assert f"{tmp_path / 'posttrain'} is in use by {holder}" in error and "(python -m llm3 run --workdir=here)" in error


HOLD = "import pathlib, sys, llm3.distributed.lock as w\n"
HOLD += "with w.lock(pathlib.Path(sys.argv[1])): print(1, flush=True), input()"


def test_the_lock_of_a_killed_process_blocks_nobody(tmp_path, caplog):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(tiny.ROOT)}
    holder = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with holder:
        assert holder.stdout.readline() == b"1\n"
        with pytest.raises(UserError, match=f"in use by process {holder.pid} on "), lock(tmp_path):
            pass
        holder.kill()
    assert f'"process": {holder.pid}' in (tmp_path / ".lock").read_text()
    for _ in range(2):
        with lock(tmp_path), open(tmp_path / ".lock") as handle, pytest.raises(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert not caplog.records


HERE, THERE = socket.gethostname(), "another-host"
LOCKS = {
    "of the kernel": None,
    "of no kind": errno.ENOLCK,
    "not even known": errno.EOPNOTSUPP,
    "that a server keeps for another host": errno.EAGAIN,
}


@pytest.fixture
def file_system(monkeypatch, tmp_path):
    """Makes a directory whose lock names some process, with a choice of lock support and short heartbeats."""
    monkeypatch.setattr(locking, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(locking, "DEAD_SECONDS", 0.8)

    def make(locks: str, host: str, process: int):
        if LOCKS[locks]:

            def flock(*_):
                raise OSError(LOCKS[locks], os.strerror(LOCKS[locks]))

            monkeypatch.setattr(fcntl, "flock", flock)
        holder = Holder(host, process, "yesterday", "python -m llm3 run")
        (tmp_path / ".lock").write_text(json.dumps(holder._asdict()))
        return tmp_path

    return make


@pytest.fixture
def dead():
    """The number of a process that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


@pytest.fixture
def beating():
    """Touch a lock as its holder would, on another host."""
    ended, threads = threading.Event(), []

    def begin(workdir):
        threads.append(threading.Thread(target=locking._touch, args=(workdir / ".lock", ended)))
        threads[-1].start()

    yield begin
    ended.set()
    for each in threads:
        each.join()


@pytest.mark.parametrize("locks", LOCKS)
def test_a_holder_on_another_host_is_alive_as_long_as_it_touches_the_lock(file_system, beating, locks):
    """Even if the kernel grants the lock, because another host may not see it."""
    workdir = file_system(locks, THERE, 1)
    beating(workdir)
    with pytest.raises(UserError, match="in use by process 1 on another-host since yesterday"), lock(workdir):
        pass
    assert '"host": "another-host"' in (workdir / ".lock").read_text()


@pytest.mark.parametrize("locks", LOCKS)
def test_a_holder_on_another_host_that_is_silent_for_long_counts_as_dead_with_a_warning(file_system, caplog, locks):
    workdir = file_system(locks, THERE, 1)
    with lock(workdir):
        assert f'"process": {os.getpid()}' in (workdir / ".lock").read_text()
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert "process 1 on another-host" in caplog.text and "counts as dead" in caplog.text


@pytest.mark.parametrize("locks", list(LOCKS)[:-1])
def test_a_holder_on_this_host_that_has_ended_is_not_waited_for(file_system, caplog, dead, locks):
    with lock(file_system(locks, HERE, dead)):
        pass
    assert not caplog.records


@pytest.mark.parametrize("locks", list(LOCKS)[1:-1])
def test_without_locks_a_workdir_still_has_one_holder_at_a_time(file_system, caplog, dead, locks):
    workdir = file_system(locks, HERE, dead)
    with lock(workdir):
        with pytest.raises(UserError, match=f"in use by process {os.getpid()} on "), lock(workdir):
            pass
        assert "waiting" in caplog.text
        caplog.clear()
    with lock(workdir):
        assert not caplog.records, "the last holder released it"


def test_of_two_that_begin_at_once_without_locks_the_last_to_write_has_it(file_system, monkeypatch, dead):
    workdir = file_system("of no kind", HERE, dead)
    other = Holder(THERE, 7, "now", "python -m llm3 run")
    monkeypatch.setattr(time, "sleep", lambda _: (workdir / ".lock").write_text(json.dumps(other._asdict())))
    with pytest.raises(UserError, match="in use by process 7 on another-host"), lock(workdir):
        pass


def test_a_lock_that_names_nobody_is_free(tmp_path, caplog):
    for content in ("", "12345", "{", '{"host": "another-host"}'):
        (tmp_path / ".lock").write_text(content)
        with lock(tmp_path):
            pass
    assert not caplog.records


def test_a_workdir_that_cannot_be_made_is_rejected(capsys, tmp_path, file):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link"):
        assert main(["run", f"--config={file}", f"--workdir={tmp_path / name}"]) == 2
        assert str(tmp_path / name) in capsys.readouterr().err


def test_a_lock_that_is_a_symbolic_link_is_refused_and_its_target_kept(tmp_path):
    target = tmp_path / "thesis.txt"
    target.write_text("years of work")
    (tmp_path / ".lock").symlink_to(target)
    with pytest.raises(UserError, match=r"\.lock is a symbolic link.*remove the link"), lock(tmp_path):
        pass
    assert target.read_text() == "years of work"


def test_a_run_that_is_refused_leaves_no_new_directory_and_removes_none_that_was_there(tmp_path, file, capsys):
    """The texts of its sources are missing, which is found once the lock is held."""
    (tmp_path / "there").mkdir()
    for name in ("new", "there"):
        assert main(["run", f"--config={file}", f"--workdir={tmp_path / name}"]) == 2
        assert "does not exist" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_a_directory_with_anything_in_it_stays(tmp_path):
    with pytest.raises(UserError, match="refused"), lock(tmp_path / "new"):
        (tmp_path / "new" / "notes.txt").touch()
        raise UserError("refused")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [".lock", "notes.txt"]


@pytest.mark.parametrize("locks", list(LOCKS)[1:-1])
def test_without_locks_no_directory_is_removed(file_system, tmp_path, locks, dead):
    file_system(locks, HERE, dead)
    with lock(tmp_path / "new"):
        pass
    assert (tmp_path / "new" / ".lock").read_text() == ""


def removed_at(monkeypatch, workdir, name):
    """Let another holder remove its new directory just before this process calls `name` for the first time."""
    original, times = getattr(locking, name), []

    def late(*arguments):
        if not times:
            times.append(1)
            (workdir / ".lock").unlink()
            workdir.rmdir()
        return original(*arguments)

    monkeypatch.setattr(locking, name, late)


@pytest.mark.parametrize("name", ["_open_own", "_take", "command"])
def test_a_process_that_comes_while_the_directory_is_removed_has_the_lock_of_a_new_one(tmp_path, monkeypatch, name):
    """It has seen the directory, opened the old lock, or the kernel's lock on it."""
    workdir = tmp_path / "new"
    workdir.mkdir()
    (workdir / ".lock").touch()
    removed_at(monkeypatch, workdir, name)
    with lock(workdir):
        assert f'"process": {os.getpid()}' in (workdir / ".lock").read_text()
        with pytest.raises(UserError, match=f"in use by process {os.getpid()}"), lock(workdir):
            pass
    assert not workdir.exists(), "it has made it this time"


def test_a_process_that_waits_for_a_sign_of_life_has_a_new_lock_once_the_holder_has_removed_it(
    tmp_path, file_system, monkeypatch
):
    workdir = file_system("of the kernel", THERE, 1) / "new"
    workdir.mkdir()
    (tmp_path / ".lock").rename(workdir / ".lock")
    removed_at(monkeypatch, workdir, "_modified_at")
    with lock(workdir):
        assert f'"process": {os.getpid()}' in (workdir / ".lock").read_text()


CROWD = """
import pathlib, sys, time, llm3.distributed.lock as w
from llm3.errors import UserError
workdir, inside, end = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), time.monotonic() + 1.5
held, opened = 0, w._open
w._open = lambda path: (True, opened(path)[1])  # also one that has not made the directory removes it
while time.monotonic() < end or not held:
    try:
        with w.lock(workdir):
            inside.open("x").close()  # raises if another process is inside
            assert (workdir / ".lock").stat().st_size
            inside.unlink()
            held += 1
    except UserError as error:
        assert "in use" in str(error) or "others keep removing it" in str(error), error
print(held)
"""


@pytest.mark.slow
def test_of_many_that_make_and_remove_a_directory_only_one_is_ever_inside(tmp_path):
    command = [sys.executable, "-c", CROWD, str(tmp_path / "new"), str(tmp_path / "inside")]
    environment = os.environ | {"PYTHONPATH": str(tiny.ROOT)}
    crowd = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    held = [each.communicate()[0] for each in crowd]
    assert [each.returncode for each in crowd] == [0] * 4 and min(map(int, held)) > 0
    assert not any(tmp_path.iterdir())
