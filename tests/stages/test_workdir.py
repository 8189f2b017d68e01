"""A run's directory: one writer at a time, one config for each stage."""

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
from llm3.config import load as configfile
from llm3.errors import UserError
from llm3.stages import workdir as workdirs
from tests.helpers import tiny_run as tiny


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    directory = tmp_path_factory.mktemp("workdir")
    return str(tiny.write_config(directory / "config.py", directory))


@pytest.fixture
def begun(tmp_path, file):
    """The directory of a run whose pretrain stage has begun."""
    record = workdirs.stage_record(configfile.load(file), "pretrain")
    workdirs.write_json(tmp_path / "pretrain" / workdirs.RECORD, record)
    return tmp_path


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("stages.pretrain.steps=11", "stage.steps: 10 there, 11 now"),
        ("model.d_ff=64", "model.d_ff: 32 there, 64 now"),
        ("seed=1", "seed: 0 there, 1 now"),
        ("tokenizer.vocab_size=301", "tokenizer.vocab_size: 300 there, 301 now"),
        ("sources.general.max_documents=3", "sources.general.max_documents: 0 there, 3 now"),
    ],
)
def test_a_directory_of_another_config_is_refused_and_left_alone(capsys, begun, file, override, line):
    before = tiny.files(begun)
    assert main(["run", f"--config={file}", f"--workdir={begun}", f"--config.{override}"]) == 2
    error = capsys.readouterr().err
    assert "holds 'pretrain' of another config" in error and line in error and "--workdir" in error
    assert tiny.files(begun) == before


def test_the_untrained_model_and_the_tokenizer_belong_to_one_config_too(capsys, tmp_path, file):
    config = configfile.load(file)
    workdirs.write_json(tmp_path / "init" / workdirs.RECORD, workdirs.stage_record(config, "init"))
    changed = "--config.tokenizer.vocab_size=301"
    assert main(["run", f"--config={file}", f"--workdir={tmp_path}", "--stages=pretrain", changed]) == 2
    assert "holds 'init' of another config" in capsys.readouterr().err


@pytest.mark.parametrize(
    "override",
    [
        "stages.pretrain.save_every=5",
        "stages.pretrain.log_every=1",
        "stages.pretrain.keep=9",
        "stages.finetune.steps=99",
        "mesh.fsdp=2",
        "sources.task.max_documents=9",
    ],
)
def test_what_does_not_change_a_stage_may_change_between_two_starts(begun, file, override):
    config = configfile.load(file, [override])
    if override.startswith("sources.task"):
        config = configfile.load(file, [override, "evaluations={}"])
        record = workdirs.stage_record(configfile.load(file, ["evaluations={}"]), "pretrain")
        workdirs.write_json(begun / "pretrain" / workdirs.RECORD, record)
    workdirs.check_record(begun, config, "pretrain")


def test_a_directory_in_use_is_refused_with_the_name_of_its_holder(capsys, monkeypatch, tmp_path, file):
    monkeypatch.setattr("sys.argv", ["/somewhere/llm3/__main__.py", "run", "--workdir=here"])
    with workdirs.lock(tmp_path):
        assert main(["run", f"--config={file}", f"--workdir={tmp_path}"]) == 2
    error = capsys.readouterr().err
    holder = f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%dT')}"
    assert f"{tmp_path} is in use by {holder}" in error and "(python -m llm3 run --workdir=here)" in error


HOLD = "import pathlib, sys, llm3.stages.workdir as w\n"
HOLD += "with w.lock(pathlib.Path(sys.argv[1])): print(1, flush=True), input()"


def test_a_lock_of_a_process_that_was_killed_holds_nobody_up(tmp_path, caplog):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(tiny.ROOT)}
    holder = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with holder:
        assert holder.stdout.readline() == b"1\n"
        with pytest.raises(UserError, match=f"in use by process {holder.pid} on "), workdirs.lock(tmp_path):
            pass
        holder.kill()
    assert f'"process": {holder.pid}' in (tmp_path / ".lock").read_text()
    for _ in range(2):
        with workdirs.lock(tmp_path), open(tmp_path / ".lock") as handle, pytest.raises(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert not caplog.records


HERE, THERE = socket.gethostname(), "another-host"
LOCKS = {"of the kernel": None, "of no kind": errno.ENOLCK, "not even known": errno.EOPNOTSUPP}


@pytest.fixture
def file_system(monkeypatch, tmp_path):
    """A directory whose lock names some process; which locks there are; where hearts beat fast."""
    monkeypatch.setattr(workdirs, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(workdirs, "DEAD_SECONDS", 0.8)

    def make(locks: str, host: str, process: int):
        if LOCKS[locks]:

            def flock(*_):
                raise OSError(LOCKS[locks], os.strerror(LOCKS[locks]))

            monkeypatch.setattr(fcntl, "flock", flock)
        holder = workdirs.Holder(host, process, "yesterday", "python -m llm3 run")
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
        threads.append(threading.Thread(target=workdirs._touch, args=(workdir / ".lock", ended)))
        threads[-1].start()

    yield begin
    ended.set()
    for each in threads:
        each.join()


@pytest.mark.parametrize("locks", LOCKS)
def test_a_holder_on_another_host_is_alive_as_long_as_it_touches_the_lock(file_system, beating, locks):
    """Whatever the kernel says: a lock may be known to one host only."""
    workdir = file_system(locks, THERE, 1)
    beating(workdir)
    with pytest.raises(UserError, match="in use by process 1 on another-host since yesterday"), workdirs.lock(workdir):
        pass
    assert '"host": "another-host"' in (workdir / ".lock").read_text()


@pytest.mark.parametrize("locks", LOCKS)
def test_a_holder_on_another_host_that_is_silent_for_long_is_taken_for_dead_and_it_is_said(file_system, caplog, locks):
    workdir = file_system(locks, THERE, 1)
    with workdirs.lock(workdir):
        assert f'"process": {os.getpid()}' in (workdir / ".lock").read_text()
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert "process 1 on another-host" in caplog.text and "taken for dead" in caplog.text


@pytest.mark.parametrize("locks", LOCKS)
def test_a_holder_on_this_host_that_has_ended_is_not_waited_for(file_system, caplog, dead, locks):
    with workdirs.lock(file_system(locks, HERE, dead)):
        pass
    assert not caplog.records


@pytest.mark.parametrize("locks", list(LOCKS)[1:])
def test_without_locks_a_workdir_still_has_one_holder_at_a_time(file_system, caplog, dead, locks):
    workdir = file_system(locks, HERE, dead)
    with workdirs.lock(workdir):
        with pytest.raises(UserError, match=f"in use by process {os.getpid()} on "), workdirs.lock(workdir):
            pass
        assert "waiting" in caplog.text
        caplog.clear()
    with workdirs.lock(workdir):
        assert not caplog.records, "the last one gave it back"


def test_of_two_that_begin_at_once_without_locks_the_last_to_write_has_it(file_system, monkeypatch, dead):
    workdir = file_system("of no kind", HERE, dead)
    other = workdirs.Holder(THERE, 7, "now", "python -m llm3 run")
    monkeypatch.setattr(time, "sleep", lambda _: (workdir / ".lock").write_text(json.dumps(other._asdict())))
    with pytest.raises(UserError, match="in use by process 7 on another-host"), workdirs.lock(workdir):
        pass


def test_a_lock_that_names_nobody_is_free(tmp_path, caplog):
    for content in ("", "12345", "{", '{"host": "another-host"}'):
        (tmp_path / ".lock").write_text(content)
        with workdirs.lock(tmp_path):
            pass
    assert not caplog.records


def test_a_workdir_that_cannot_be_made_is_refused(capsys, tmp_path, file):
    (tmp_path / "file").write_text("")
    assert main(["run", f"--config={file}", f"--workdir={tmp_path / 'file'}"]) == 2
    assert f"--workdir={tmp_path / 'file'}" in capsys.readouterr().err


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a" / "b.json"
    workdirs.write_json(path, {"x": 1})
    with pytest.raises(TypeError):
        workdirs.write_json(path, {"x": object()})
    assert workdirs.read_json(path) == {"x": 1} and json.loads(path.read_text()) == {"x": 1}
    assert workdirs.read_json(tmp_path / "none.json") is None


def test_a_damaged_record_is_named(tmp_path):
    (tmp_path / "record.json").write_text("{")
    with pytest.raises(UserError, match=r"record\.json cannot be read"):
        workdirs.read_json(tmp_path / "record.json")


def test_differences_name_the_field():
    before, now = {"a": {"b": 1, "c": 2}, "d": [1]}, {"a": {"b": 1, "c": 3}, "d": [2], "e": None}
    assert workdirs.differences(before, now) == ["  a.c: 2 there, 3 now", "  d: [1] there, [2] now"]
