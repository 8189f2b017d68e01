"""Trackers besides the files: they cannot fail or delay a run, and are checked before any device work."""

import importlib.machinery
import importlib.util
import sys
import threading
import types

import pytest

from llm3.__main__ import main
from llm3.config.load import load
from llm3.errors import UserError
from llm3.report import background
from llm3.report.logs import MetricsWriter, read_metrics
from llm3.report.trackers import wandb as weights_and_biases
from llm3.stages.trackers import check_trackers, open_writer
from tests.helpers import tiny_run as tiny


class Recording:
    """Keeps what it is given; fails in a method, or waits there for an event."""

    def __init__(self, fails="", waits=""):
        self.calls, self.stage = [], None
        self._fails, self._waits, self.go = fails, waits, threading.Event()

    def __call__(self, stage):
        self.stage = stage
        self._called("init")
        return self

    def _called(self, name, *arguments):
        self.calls.append((name, *arguments))
        if name == self._waits:
            self.go.wait(60)
        if name == self._fails:
            raise ConnectionError("no network")

    def __getattr__(self, name):
        return lambda *arguments: self._called(name, *arguments)


def write(directory, tracker, said):
    with MetricsWriter(directory, None, {"steps": 9}, {"recording": tracker}, said.append) as writer:
        writer.write(2, {"loss": 2.0})
        writer.write(2, {"domain_nll": float("nan")}, group="eval")
        writer.samples(2, [("a", "b")])
        writer.result(2, {"stage": "s", "task_accuracy": 0.5})


def test_a_tracker_gets_everything_in_order(tmp_path):
    tracker, said = Recording(), []
    write(tmp_path, tracker, said)
    assert tracker.stage.directory == tmp_path and tracker.stage.config == {"steps": 9}
    assert tracker.calls == [
        ("init",),
        ("metrics", 2, {"loss": 2.0}, ""),
        ("metrics", 2, {"domain_nll": None}, "eval"),
        ("samples", 2, [("a", "b")]),
        ("result", 2, {"stage": "s", "task_accuracy": 0.5}),
        ("close",),
    ]
    assert said == []


@pytest.mark.parametrize("method", ["init", "metrics", "samples", "result", "close"])
def test_an_error_of_a_tracker_is_one_line_and_the_files_are_whole(tmp_path, method):
    tracker, said = Recording(fails=method), []
    write(tmp_path, tracker, said)
    (line,) = said
    assert line.startswith("recording: ConnectionError: no network") and "the run goes on" in line
    assert tracker.calls[-1][0] == method, "it gets nothing more"
    assert [line["step"] for line in read_metrics(tmp_path)] == [2, 2]


def test_a_tracker_that_hangs_delays_neither_the_steps_nor_for_long_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(background, "CLOSE_SECONDS", 0.01)
    tracker, said = Recording(waits="metrics"), []
    write(tmp_path, tracker, said)
    assert said == ["recording: not done after 0.01 s; the run goes on without it"]
    assert [call[0] for call in tracker.calls] == ["init", "metrics"]
    tracker.go.set()


def test_a_stage_that_resumes_tells_a_tracker_what_is_kept_of_its_history(tmp_path):
    (tmp_path / "samples.jsonl").write_text('{"step": 2, "prompt": "a", "text": "b"}\n')
    with MetricsWriter(tmp_path) as writer:
        for step in (2, 4, 6):
            writer.write(step, {"loss": 1.0 / step})
    tracker = Recording()
    with MetricsWriter(tmp_path, 4, trackers={"recording": tracker}):
        pass
    assert tracker.stage.lines == [{"step": 2, "loss": 0.5}, {"step": 4, "loss": 0.25}]
    assert tracker.stage.samples == [{"step": 2, "prompt": "a", "text": "b"}] and tracker.stage.resume_step == 4


@pytest.fixture
def config(tmp_path):
    return str(tiny.write_config(tmp_path / "config.py", tmp_path))


def test_a_tracker_that_is_not_installed_is_named_before_any_work(tmp_path, config, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else find(name))
    command = ["run", f"--config={config}", f"--workdir={tmp_path / 'run'}", "--config.trackers=['wandb']"]
    assert main(command) == 2
    assert "config.trackers: needs wandb, which is not installed: pip install 'llm3[wandb]'" in capsys.readouterr().err
    # a folder of that name beside the run, as wandb makes it, is no package
    monkeypatch.setattr(importlib.util, "find_spec", find)
    monkeypatch.setitem(sys.modules, "wandb", types.ModuleType("wandb"))
    sys.modules["wandb"].__spec__ = importlib.machinery.ModuleSpec("wandb", None, is_package=True)
    assert main(command) == 2 and not (tmp_path / "run").exists()


def test_an_unknown_tracker_is_an_error_with_the_nearest_name(tmp_path, config, capsys):
    assert main(["run", f"--config={config}", f"--workdir={tmp_path / 'run'}", "--config.trackers=['wandbx']"]) == 2
    assert "config.trackers='wandbx': did you mean 'wandb'?" in capsys.readouterr().err


OWN = """
class Mine:
    def __init__(self, stage):
        self.file = stage.directory / "own"

    def metrics(self, step, line, group):
        self.file.write_text(f"{step} {line}")

    def samples(self, step, samples): ...
    def result(self, step, row): ...
    def close(self): ...

class Half:
    def metrics(self, step, line, group): ...
"""


def test_a_tracker_of_ones_own_is_found_beside_the_config(tmp_path, config):
    (tmp_path / "my_own_trackers.py").write_text(OWN)
    read = load(config, ["trackers=['my_own_trackers:Mine', 'tensorboard']"])
    check_trackers(read)
    with open_writer(read, tmp_path / "run", "pretrain", None, print) as writer:
        writer.write(1, {"loss": 2.0})
    assert (tmp_path / "run" / "pretrain" / "own").read_text() == "1 {'loss': 2.0}"
    with pytest.raises(UserError, match=r"config\.trackers: .*'my_own_trackers:Half': lacks samples, result, close"):
        check_trackers(load(config, ["trackers=['my_own_trackers:Half']"]))


class StubRun:
    """What the tracker needs of a run of wandb."""

    url = ""

    def __init__(self, library, arguments):
        self.library, self.arguments, self.summary = library, arguments, {}
        self.logged, self.exit_code = {}, None
        self.settings = types.SimpleNamespace(mode=arguments["mode"], sync_dir="synced")

    def log(self, values, step):
        if self.library.fails == "log":
            raise OSError("the service is gone")
        assert step >= max(self.logged, default=0), "wandb drops steps below the newest"
        self.logged.setdefault(step, {}).update(values)

    def finish(self, exit_code):
        if self.library.fails == "finish":
            raise TimeoutError
        self.exit_code = exit_code


class StubLibrary(types.ModuleType):
    """A `wandb` that keeps its runs."""

    def __init__(self, mode="offline", fails=""):
        super().__init__("wandb")
        self.mode, self.fails, self.runs = mode, fails, []

    def setup(self, settings):
        return types.SimpleNamespace(settings=types.SimpleNamespace(mode=self.mode))

    def login(self, prompt, verify):
        assert not prompt, "a question would wait for an answer"
        return self.fails != "login"

    def init(self, **arguments):
        if self.fails == "init" and arguments["mode"] == "online":
            raise ConnectionError("no route")
        self.runs.append(StubRun(self, arguments))
        return self.runs[-1]

    def teardown(self):
        pass

    def Settings(self, **values):
        return values

    def Table(self, columns, data):
        return columns, data


@pytest.fixture
def stub(monkeypatch):
    def made(**options):
        library = StubLibrary(**options)
        monkeypatch.setitem(sys.modules, "wandb", library)
        return library

    for name in ("WANDB_DIR", "WANDB_PROJECT", "WANDB_RUN_GROUP", "WANDB_NAME", "WANDB_JOB_TYPE"):
        monkeypatch.delenv(name, raising=False)
    return made


def train(directory, start, stop, said, row=None):
    tracker = {"wandb": weights_and_biases.Tracker}
    with MetricsWriter(directory / "run" / "pretrain", start, {"steps": 9}, tracker, said.append) as writer:
        for step in range((start or 0) + 1, stop + 1):
            writer.write(step, {"loss": 1.0 / step})
            if step % 2 == 0:
                writer.write(step, {"domain_nll": 2.0}, group="eval")
        if row:
            writer.result(stop, row)


def test_a_stage_is_one_run_of_wandb_in_the_group_of_its_run_directory_also_after_a_resume(tmp_path, stub):
    library, said = stub(), []
    train(tmp_path, None, 5, said)
    train(tmp_path, 3, 6, said, {"stage": "pretrain", "task_accuracy": 0.5, "steps": 6, "chain": {}})
    first, second = library.runs
    assert first.arguments["id"] == second.arguments["id"] and second.arguments["resume"] == "allow"
    for each in library.runs:
        assert each.arguments["group"] == "run" and each.arguments["name"] == "run/pretrain"
        assert each.arguments["config"] == {"steps": 9}
    assert list(second.logged) == [1, 2, 3, 4, 5, 6]
    assert second.logged[2] == {"train/loss": 0.5, "eval/domain_nll": 2.0}
    assert {step: second.logged[step] for step in (1, 2, 3)} == {step: first.logged[step] for step in (1, 2, 3)}
    assert second.summary == {"final/task_accuracy": 0.5, "final/steps": 6}
    assert (first.exit_code, second.exit_code) == (1, 0)
    train(tmp_path, None, 1, said)
    assert library.runs[2].arguments["id"] != first.arguments["id"], "a stage that starts anew is another run"


@pytest.mark.parametrize(
    ("fails", "message"),
    [
        ("init", "wandb: the server cannot be used, so it works offline: no route"),
        ("login", "wandb: no API key is known"),
        ("log", "wandb: OSError: the service is gone. It gets no more metrics"),
        ("finish", "wandb: not all is uploaded: `wandb sync synced` does the rest"),
    ],
)
def test_whatever_fails_in_wandb_is_a_line_and_the_run_goes_on(tmp_path, stub, fails, message):
    library, said = stub(mode="online", fails=fails), []
    train(tmp_path, None, 4, said)
    assert any(line.startswith(message) for line in said), said
    assert len(read_metrics(tmp_path / "run" / "pretrain")) == 6
    if fails in ("init", "login"):
        (run,) = library.runs
        assert run.arguments["mode"] == "offline" and list(run.logged) == [1, 2, 3, 4]
