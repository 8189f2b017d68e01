"""Several runs in one workdir: who is refused, who waits, and that none loses what another one has written."""

import os
import threading
import time
import types
from dataclasses import replace

import pytest

from llm3.cli import report, run
from llm3.cli.run import Work, take
from llm3.config import load as configfile
from llm3.distributed.lock import InUse, holder, lock
from llm3.errors import UserError
from llm3.files import ROW, SESSIONS, read_json, write_json
from llm3.stages import environment, first_rows
from llm3.stages.amendments import Amendment
from llm3.stages.environment import SessionLog
from llm3.stages.locks import StageLocks, check_parents
from tests.helpers import tiny_run as tiny


@pytest.fixture
def config(tmp_path):
    return configfile.load(str(tiny.write_config(tmp_path / "config.py", tmp_path)))


def test_each_stage_has_a_holder_until_it_is_released_and_another_run_may_hold_another(tmp_path):
    with StageLocks(tmp_path) as one, StageLocks(tmp_path) as other:
        one.take(["pretrain", "finetune"])
        other.take(["scratch"])
        with pytest.raises(InUse, match=f"pretrain is in use by process {os.getpid()} on "):
            other.take(["posttrain", "pretrain"])
        one.release("pretrain")
        other.take(["pretrain"])
        assert all(holder(tmp_path / name) for name in tiny.STAGES)
    assert not any(tmp_path.iterdir()), "what they have made is gone with them"


def test_a_stage_whose_parent_another_run_trains_is_refused_with_the_name_of_that_run(tmp_path, config):
    def check(workdir, names=("finetune",), **more):
        start = config.stages["finetune"].start | more
        stages = config.stages | {"finetune": replace(config.stages["finetune"], start=start)}
        check_parents(replace(config, stages=stages), workdir, [*names])

    refused = pytest.raises(UserError, match=f"posttrain is trained by process {os.getpid()} on ")
    with lock(tmp_path / "posttrain"):
        check(tmp_path, ["posttrain", "finetune"])  # this run trains both
        check(tmp_path, ["pretrain", "scratch"])
        with refused:
            check(tmp_path)
        check(tmp_path, step=4)
        with refused:
            check(tmp_path / "child", run=str(tmp_path))
        (tmp_path / "child" / "finetune" / "checkpoints" / "4").mkdir(parents=True)
        check(tmp_path / "child", run=str(tmp_path))  # it resumes
        write_json(tmp_path / "posttrain" / ROW, {})
        check(tmp_path)  # it is finished, and evaluated again
    (tmp_path / "posttrain" / ROW).unlink()
    check(tmp_path)


def test_sessions_that_are_written_at_once_are_all_kept(tmp_path, monkeypatch):
    def slow(path):
        found = read_json(path)
        time.sleep(0.1)
        return found

    monkeypatch.setattr(environment, "read_json", slow)
    monkeypatch.setattr(environment, "environment", dict)
    logs = [SessionLog(tmp_path, [name]) for name in tiny.STAGES[:3]]
    threads = [threading.Thread(target=each.write, args=({}, {})) for each in logs]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    logs[0].write({}, {})
    assert sorted(each["stages"] for each in read_json(tmp_path / SESSIONS)) == [
        ["finetune"],
        ["posttrain"],
        ["pretrain"],
    ]


def test_rows_are_gathered_for_a_report_while_no_other_run_writes_one(tmp_path, monkeypatch, config):
    def gather(_, workdir):
        assert holder(workdir)
        raise UserError("far enough")

    monkeypatch.setattr(report, "gather", gather)
    with pytest.raises(UserError, match="far enough"):
        report.write_report(config, tmp_path, report.new_console(quiet=True))


def test_a_row_that_another_run_measures_is_waited_for_and_not_measured_again(tmp_path, monkeypatch, config):
    measured = threading.Event()

    def other_run():
        with lock(tmp_path / "init"):
            held.set()
            time.sleep(0.3)
            measured.set()

    held, thread = threading.Event(), threading.Thread(target=other_run)
    thread.start()
    held.wait()
    monkeypatch.setattr(first_rows, "_is_measured", lambda *_: measured.is_set())
    monkeypatch.setattr(first_rows, "write_row", lambda *_: pytest.fail("measured twice"))
    watchdog = types.SimpleNamespace(rest=lambda: None, at=lambda *_: None)
    first_rows.evaluate_first_rows(types.SimpleNamespace(config=config, workdir=tmp_path, watchdog=watchdog))
    assert measured.is_set()
    thread.join()


def test_work_that_another_run_has_done_before_the_locks_were_taken_is_not_done_again(tmp_path, config):
    before = Work({}, ["pretrain", "posttrain"])
    with StageLocks(tmp_path) as locks, pytest.raises(UserError, match="another run has finished"):
        take(locks, config, tmp_path, before, lambda: Work({}, ["posttrain"]))
    amended = [Work({"pretrain": Amendment(4, "why", when, [])}, ["pretrain"]) for when in ("now", "a second later")]
    with StageLocks(tmp_path) as locks, pytest.raises(UserError, match="has no step 4"):  # it is amended
        take(locks, config, tmp_path, amended[0], lambda: amended[1])


def test_of_two_runs_that_begin_a_workdir_at_once_the_second_with_another_tokenizer_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "Tokenizer", types.SimpleNamespace(load=lambda _: types.SimpleNamespace(hash="one")))
    (tmp_path / "tokenizer.json").touch()
    experiment = types.SimpleNamespace(tokenizer=types.SimpleNamespace(hash="other"))
    with pytest.raises(UserError, match=r"another tokenizer \(one\) than this run's \(other\)"):
        run.write_run_files(types.SimpleNamespace(workdir=tmp_path, experiment=experiment), bare=True)
