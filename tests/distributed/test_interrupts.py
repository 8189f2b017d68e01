"""Ctrl-C is answered at once and ends a command within three seconds, wherever the main thread is.

What schedulers send does the same, and may come several times.
"""

import os
import signal
import subprocess
import sys
import time

import pytest

from llm3.distributed import interrupts
from llm3.distributed.preemption import StopRequest
from llm3.errors import Exit

START = """
import ctypes, gc, sys, time
from llm3.distributed.interrupts import OF_SCHEDULERS, Interrupts, unfinished_saves

def command(watched):
    print("ready", flush=True)
    {body}

def main():
    with Interrupts("stopped").watching(*OF_SCHEDULERS) as watched:
        try:
            command(watched)
        except KeyboardInterrupt:
            return watched.end()
    return 0

sys.exit(main())
"""
# a lock that the thread itself holds: it never looks for signals, and takes no time of a CPU
NATIVE = "mutex = ctypes.create_string_buffer(64); [ctypes.CDLL(None).pthread_mutex_lock(mutex) for _ in range(2)]"
CALLBACK = """
    gc.callbacks.append(lambda *_: time.sleep(0.01))  # Python ignores exceptions here
    while True: gc.collect()"""
LIBRARY = """
    namespace = dict(time=time)
    code = "def swallow():\\n while True:\\n  try:\\n   time.sleep(0.01)\\n  except BaseException: pass"
    from llm3.distributed import interrupts
    exec(compile(code, interrupts.LIBRARIES[0] + "/library.py", "exec"), namespace)
    namespace["swallow"]()"""
STEPS = """
    asked = []
    watched.stop, watched.trains = asked.append, True
    while not asked: time.sleep(0.01)
    time.sleep(2)  # the rest of the step, and its save
    print(f"saved {asked}", flush=True)
    sys.exit(7)"""
SAVE = f"""
    class Save:
        def wait(self): time.sleep(max(0, end - time.monotonic())); print("saved", flush=True)
    end = time.monotonic() + 2
    unfinished_saves.add(Save())
    {NATIVE}"""


def started(body):
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup, which is inherited
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", START.format(body=body)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    finally:
        signal.signal(signal.SIGHUP, before)
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.1)
    return process


def ended(process):
    """What a process has printed, and its status; it would go on for minutes if the signal were not heard."""
    return process.communicate(timeout=60)[0].splitlines(), process.returncode


AGAIN = "press Ctrl-C again to stop now"
ANSWER = f"llm3: Ctrl-C: stopping; {AGAIN}"


@pytest.mark.parametrize(
    "body", ["time.sleep(600)", NATIVE, CALLBACK, LIBRARY], ids=["code", "native", "gc", "library"]
)
def test_the_first_one_ends_a_command_wherever_it_is(body):
    process = started(body)
    process.send_signal(signal.SIGINT)
    assert ended(process) == ([ANSWER, "llm3: stopped"], 130)
    assert interrupts.GRACE_SECONDS < 2, "three seconds were promised"


def test_sigterm_ends_a_run_that_has_not_begun_to_train_with_the_status_that_restarts_it():
    process = started(NATIVE)
    process.send_signal(signal.SIGTERM)
    assert ended(process) == (["llm3: SIGTERM: stopping", "llm3: stopped"], Exit.PREEMPTED)


@pytest.mark.parametrize("first", ["SIGTERM", "SIGHUP", "SIGUSR1"])
def test_a_scheduler_may_send_its_signals_as_often_as_it_likes_without_losing_the_save(first):
    process = started(STEPS)
    for name, pause in ((first, 0.01), ("SIGTERM", 0.3), ("SIGTERM", 0)):
        process.send_signal(signal.Signals[name])
        time.sleep(pause)
    number = int(signal.Signals[first])
    output = [f"llm3: {first}: finishing the step under way, then saving", f"saved [{number}]"]
    assert ended(process) == (output, 7) and interrupts.exit_status(number) == Exit.PREEMPTED


def test_a_signal_that_nohup_lets_a_command_ignore_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interrupts.Interrupts().watching(*interrupts.OF_SCHEDULERS):
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN != signal.getsignal(signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_while_steps_run_the_first_one_waits_for_their_save():
    process = started(STEPS)
    process.send_signal(signal.SIGINT)
    answer = f"llm3: Ctrl-C: finishing the step under way, then saving; {AGAIN}"
    assert ended(process) == ([answer, "saved [2]"], 7)


def test_a_save_in_the_background_is_finished_before_the_end():
    process = started(SAVE)
    process.send_signal(signal.SIGINT)
    answer = f"llm3: Ctrl-C: finishing a save, then stopping; {AGAIN}"
    assert ended(process) == ([answer, "saved", "llm3: stopped"], 130)


@pytest.mark.parametrize("body", [SAVE, STEPS], ids=["save", "steps"])
def test_the_second_one_ends_at_once_and_two_within_a_moment_are_one(body):
    process = started(body)
    for pause in (0.05, 0.5, 0):
        process.send_signal(signal.SIGINT)
        time.sleep(pause)
    output, status = ended(process)
    assert len(output) == 1 and status == 130, "it ended before the save"


def test_a_signal_in_this_process_ends_the_command_and_leaves_its_handlers_as_they_were():
    before = signal.getsignal(signal.SIGINT)
    with interrupts.Interrupts().watching() as watched:
        assert interrupts.current() is watched
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        assert watched.end() == 130
    assert signal.getsignal(signal.SIGINT) is before and interrupts.current() is None


def test_the_answer_says_what_is_finished_and_what_is_not():
    request = StopRequest()
    with interrupts.Interrupts().watching() as watched:
        with interrupts.doing("tokenizing general"), interrupts.doing("evaluating task of finetune"):
            assert watched._answer(signal.SIGINT, False) == f"Ctrl-C: stopping while {watched.activity}; {AGAIN}"
        with request.listening(87):
            request.at_step()
            assert watched._answer(signal.SIGINT, True) == f"Ctrl-C: finishing step 89, then saving; {AGAIN}"
            with interrupts.doing("saving step 88"):
                both = "saving step 88, then finishing step 89 and saving it"
                assert watched._answer(signal.SIGTERM, True) == f"SIGTERM: {both}"
        assert watched.activity == "" and watched.stop is None
    with interrupts.doing("nothing that a signal reaches"):
        assert interrupts.current() is None


def test_only_the_first_process_answers(capsys):
    watched = interrupts.Interrupts()
    watched.silent = True
    watched._say("stopped")
    watched.silent = False
    watched._say("stopped too")
    assert capsys.readouterr().err == "llm3: stopped too\n"
