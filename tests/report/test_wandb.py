"""What the real wandb writes offline, read back from its files."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("wandb")

# In a process of its own: wandb starts a service, and registers what it does at the end of Python.
SCRIPT = """
import pathlib, sys
from llm3.report.logs import MetricsWriter
from llm3.report.trackers.wandb import Tracker

start, stop = eval(sys.argv[2]), int(sys.argv[3])
directory = pathlib.Path(sys.argv[1], "run", "pretrain")
with MetricsWriter(directory, start, {"optimizer": {"name": "adamw"}}, {"wandb": Tracker}, print) as writer:
    for step in range((start or 0) + 1, stop + 1):
        writer.write(step, {"loss": 1 / step})
        if step % 2 == 0:
            writer.write(step, {"domain_nll": 2.0}, group="eval")
            writer.samples(step, [("a prompt", "its text")])
    if stop == 6:
        writer.result(stop, {"stage": "pretrain", "task_accuracy": 0.5})
"""


def train(directory, start, stop, **variables):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment |= {"HOME": str(directory / "home"), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))} | variables
    (directory / "home").mkdir(exist_ok=True)
    command = [sys.executable, "-c", SCRIPT, str(directory), repr(start), str(stop)]
    done = subprocess.run(
        command, env=environment, cwd=directory, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL
    )
    return done.stdout


def records(path):
    """The records of a file of wandb, a log of LevelDB: blocks of 32 KiB with pieces of (checksum, length, kind)."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, piece = path.read_bytes(), 7, b""
    while at < len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        piece += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield Record.FromString(piece)
            piece = b""


def values(items):
    return {item.key or "/".join(item.nested_key): item.value_json for item in items}


def test_offline_a_resumed_stage_is_one_run_with_each_step_once(tmp_path):
    said = train(tmp_path, None, 5, WANDB_MODE="offline")
    assert "wandb: offline: `wandb sync " in said
    (before,) = tmp_path.glob("run/pretrain/wandb/offline-run-*/*.wandb")
    train(tmp_path, 3, 6, WANDB_MODE="offline")
    (after,) = tmp_path.glob("run/pretrain/wandb/offline-run-*/*.wandb")
    assert before.name == after.name, "the id"
    found = list(records(after))
    (run,) = (each.run for each in found if each.HasField("run"))
    assert (run.project, run.run_group, run.display_name) == ("llm3", "run", "run/pretrain")
    assert values(run.config.update)["optimizer"] == '{"name":"adamw"}'
    history = {each.history.step.num: values(each.history.item) for each in found if each.HasField("history")}
    assert list(history) == [1, 2, 3, 4, 5, 6] and len([each for each in found if each.HasField("history")]) == 6
    assert [float(history[step]["train/loss"]) for step in history] == [1 / step for step in history]
    # the texts of step 2 are not in samples.jsonl here, so the second session cannot send them again
    assert [step for step in history if "eval/domain_nll" in history[step]] == [2, 4, 6]
    assert [step for step in history if "samples/path" in history[step]] == [4, 6]
    summary = {}
    for each in found:
        summary |= values(each.summary.update) if each.HasField("summary") else {}
    assert summary["final/task_accuracy"] == "0.5"
    assert [each.exit.exit_code for each in found if each.HasField("exit")] == [0]


def test_without_a_key_the_run_is_kept_offline_and_nothing_is_asked(tmp_path):
    assert "wandb: no API key is known" in train(tmp_path, None, 6)
    (path,) = tmp_path.glob("run/pretrain/wandb/offline-run-*/*.wandb")
    assert [each.history.step.num for each in records(path) if each.HasField("history")] == [1, 2, 3, 4, 5, 6]
