"""Several processes end with one status: that of the first one that has a reason."""

import threading

import pytest

from llm3.distributed import ending, interrupts, processes
from llm3.errors import Exit, NotWritten, UserError


@pytest.fixture
def two(monkeypatch):
    """This process is the first of two; what is published, and the statuses with which it ends."""
    published, statuses = {}, []

    def leave(status):
        statuses.append(status)
        raise SystemExit(status)

    monkeypatch.setattr(processes, "count", lambda: 2)
    monkeypatch.setattr(processes, "start", lambda *_: "process 0 of 2")
    monkeypatch.setattr(processes, "publish_once", lambda name, value: published.setdefault(name, value))
    monkeypatch.setattr(processes, "published_once", published.get)
    monkeypatch.setattr(ending, "leave_together", lambda seconds: None)
    monkeypatch.setattr(ending.os, "_exit", leave)
    monkeypatch.setattr(ending, "POLL_SECONDS", 0.01)
    return published, statuses


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (NotWritten("the disk is full"), Exit.NOT_WRITTEN, "llm3: process 0 of 2: the disk is full"),
        (ZeroDivisionError("by zero"), 1, "ZeroDivisionError: by zero"),
        (RuntimeError("UNKNOWN: Gloo AllGather failed: Connection closed by peer"), Exit.UNREACHABLE, "been killed"),
        (ValueError("UNKNOWN: Gloo AllGather failed: Connection reset by peer"), Exit.UNREACHABLE, "been killed"),
        (ValueError("of the program itself"), 1, "ValueError: of the program itself"),
        (processes.RemoteError("said by the other", 2), Exit.BAD_INPUT, ""),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_an_error_is_published_with_its_status_before_the_process_ends(two, capsys, error, status, said):
    published, statuses = two
    with pytest.raises(SystemExit), ending.joined():
        raise error
    assert statuses == [status] and published["ended"][:2] == [0, status]
    error = capsys.readouterr().err
    assert said in error and bool(said) == bool(error)


def test_a_process_that_ends_after_another_one_has_the_status_of_that_one(two):
    published, statuses = two
    published["ended"] = [1, 5, "the disk is full"]
    with pytest.raises(SystemExit), ending.joined():
        raise UserError("a consequence")
    assert statuses == [5]


def test_a_process_that_waits_where_no_exception_reaches_it_is_ended_by_a_thread(two, capsys, monkeypatch):
    published, statuses = two
    monkeypatch.setattr(ending, "OWN_SECONDS", 0.0)
    ended = threading.Event()
    monkeypatch.setattr(ending.os, "_exit", lambda status: (statuses.append(status), ended.set()))
    with ending.joined():
        assert not ended.wait(0.05), "no process has ended"
        published["ended"] = [1, 2, "no such file"]
        assert ended.wait(60)
    assert statuses == [2] and "llm3: process 1 has ended: no such file" in capsys.readouterr().err


def test_a_signal_ends_a_process_with_its_status(two):
    _, statuses = two
    with interrupts.Interrupts().watching(*interrupts.OF_SCHEDULERS) as watched, pytest.raises(SystemExit):
        watched.silent = True
        watched.first = interrupts.OF_SCHEDULERS[0]
        watched._answered.set()
        with ending.joined():
            raise KeyboardInterrupt
    assert statuses == [Exit.PREEMPTED]
