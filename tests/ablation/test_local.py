"""The local launcher over processes that do nothing: what is started when, and what waits for whom."""

import io
import signal
import types

import pytest
from rich.console import Console

from llm3.ablation import local
from llm3.ablation.costs import Cost
from llm3.ablation.graph import Node
from llm3.distributed.lock import Holder
from llm3.errors import Exit
from llm3.files import read_json

OTHER = Holder("here", 1, "now", "python -m llm3 run")


def node(name, parent=""):
    return Node(f"{name}-0", name, parent and f"{parent}-0", {}, Cost(), name, [], {})


class World:
    """Stage runs that end with a status, each after some polls, and leave a result if that is 0."""

    def __init__(self, tmp_path, monkeypatch, status=None, jobs=1, held=None):
        self.status, self.held, self.events, self.finished, self.most = status or {}, held or {}, [], set(), 0
        self.alive, self.output = 0, io.StringIO()
        monkeypatch.setattr(local, "POLL_SECONDS", 0)
        monkeypatch.setattr(local, "start_process", self.start)
        monkeypatch.setattr(local, "holder", self.holder)
        self.trainer = local.Trainer(
            tmp_path, jobs, Console(file=self.output, width=200), self.prepare, lambda each: self.result(each.name)
        )

    def prepare(self, node):
        folder = local.directory(self.trainer._workdir, node.name)
        folder.mkdir(parents=True)
        return folder

    def result(self, name):
        return "fine" if name in self.finished else None

    def holder(self, stage):
        name = stage.parent.name
        left = self.held.get(name, 0)
        if left:
            self.held[name] = left - 1
            if left == 1:
                self.finished.add(name)
        return OTHER if left else None

    def start(self, folder, slot):
        self.events.append(folder.name)
        self.alive += 1
        self.most = max(self.most, self.alive)
        process = types.SimpleNamespace(returncode=None, left=3, signals=[])

        def poll():
            process.left -= 1
            if process.left == 0:
                self.alive -= 1
                process.returncode = self.status.get(folder.name, 0)
                if process.returncode == 0:
                    self.finished.add(folder.name)
            return process.returncode

        process.poll, process.send_signal = poll, process.signals.append
        self.last = process
        return process


NODES = [node("a"), node("b", "a"), node("c", "b"), node("d", "a"), node("e")]


@pytest.mark.parametrize("jobs", [1, 2, 9])
def test_parents_are_finished_before_children_start_and_no_more_run_at_once_than_asked(tmp_path, monkeypatch, jobs):
    world = World(tmp_path, monkeypatch, jobs=jobs)
    assert world.trainer.train(NODES) == 0
    order = world.events
    assert sorted(order) == ["a-0", "b-0", "c-0", "d-0", "e-0"] and world.most == min(jobs, 2)
    assert order.index("a-0") < order.index("b-0") < order.index("c-0") and order.index("a-0") < order.index("d-0")


def test_a_failure_stops_its_children_alone(tmp_path, monkeypatch):
    world = World(tmp_path, monkeypatch, {"b-0": 3})
    assert world.trainer.train(NODES) == Exit.PARTIAL
    assert "c-0" not in world.events and {"d-0", "e-0"} < set(world.events)
    assert read_json(tmp_path / local.FAILED) == {"b-0": "exit 3: it printed nothing", "c-0": "its parent b-0 failed"}


def test_what_another_process_trains_is_waited_for(tmp_path, monkeypatch):
    """Such as a stage run that outlived the `ablate` that started it."""
    world = World(tmp_path, monkeypatch, held={"a-0": 5})
    assert world.trainer.train(NODES) == 0
    assert "a-0" not in world.events and world.output.getvalue().count("is waited for") == 1
    assert "[5/5]" in world.output.getvalue()


def test_a_stage_run_that_another_process_took_first_is_waited_for_too(tmp_path, monkeypatch):
    world = World(tmp_path, monkeypatch, {"a-0": Exit.BAD_INPUT})
    start = world.start

    def late(folder, slot):
        world.held[folder.name] = 3 if folder.name == "a-0" else 0
        return start(folder, slot)

    monkeypatch.setattr(local, "start_process", late)
    assert world.trainer.train(NODES) == 0
    assert world.events.count("a-0") == 1 and "failed" not in world.output.getvalue()


def test_running_stage_runs_are_told_when_the_launcher_breaks_down(tmp_path, monkeypatch):
    world = World(tmp_path, monkeypatch, jobs=2)

    def broken(node):
        if node.name == "e-0":
            raise OSError("no space")
        return World.prepare(world, node)

    world.trainer._prepare = broken
    with pytest.raises(OSError, match="no space"):
        world.trainer.train(NODES)
    assert world.last.signals == [signal.SIGTERM]


def test_stage_runs_under_way_have_different_shares_of_the_machine(tmp_path, monkeypatch):
    world = World(tmp_path, monkeypatch, jobs=2)
    started, shares = world.start, []

    def start(folder, slot):
        shares.append((slot, [each.slot for each in world.trainer._running]))
        return started(folder, slot)

    monkeypatch.setattr(local, "start_process", start)
    assert world.trainer.train(NODES) == 0
    assert any(others for _, others in shares) and all(slot not in others for slot, others in shares)
