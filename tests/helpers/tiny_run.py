"""A whole experiment in seconds: its texts, its config file, and processes that run it and can be made to die.

`run([POINTS, COMMANDS])` does what `python -m llm3 ...` does for each of some command lines, in JSON, in one process
that ends itself at the last of POINTS, for example `SIGKILL@log:pretrain:6`: see `die_at`. At the points before it,
separated by commas, die processes that do the same before this one does.
"""

import functools
import gc
import itertools
import json
import os
import pathlib
import re
import signal
import sys
import time
import types
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, NoReturn

from tests.helpers import forks

ROOT = pathlib.Path(__file__).parents[2]
DATA = ROOT / "tests" / "data" / "fixtures"  # excerpts of real text, laid out as the configs read a `data_dir`
STAGES = ("pretrain", "posttrain", "finetune", "scratch")
NEXT = "-- the next command --"  # printed after each command
ENDS_WITHIN = 1800  # seconds, on however busy a machine
KILLED = "-- killed --"  # printed after each process that was to die
SPLITS = {"train": 0.7, "validation": 0.15, "test": 0.15}

CONFIG = '''"""A tiny experiment."""

from ml_collections import ConfigDict


def get_config():
    files = lambda name: {split: f"@texts/{name}-{split}.jsonl" for split in ("train", "validation", "test")}
    c = ConfigDict()
    c.cache_dir = "@cache"
    c.model = dict(layers=2, d_model=16, heads=2, d_ff=32)
    c.tokenizer = dict(vocab_size=300)
    c.sources = dict(
        general=dict(path="json", data_files=files("general")),
        domain=dict(path="json", data_files=files("domain")),
        task=dict(path="json", data_files=files("task"), label="label"),
    )
    shape = dict(steps=10, batch_size=8, sequence_length=32, log_every=2, save_every=4)
    fast = dict(learning_rate=1e-2, warmup_steps=2)
    fit = dict(kind="finetune", data=dict(task=1.0), objective="classify", optimizer=fast, **shape)
    c.stages = dict(
        pretrain=dict(kind="pretrain", data=dict(general=1.0), optimizer=fast, **shape),
        posttrain=dict(
            kind="posttrain", start="pretrain", data=dict(domain=0.9, general=0.1), optimizer=fast, **shape
        ),
        finetune=dict(start=dict(stage="posttrain", fresh=["head/.*"]), **fit),
        scratch=dict(start="init", baseline=True, **fit),
    )
    small = dict(sequence_length=32, batch_size=8)
    c.evaluations = dict(
        general=dict(kind="perplexity", source="general", max_documents=4, **small),
        domain=dict(kind="perplexity", source="domain", max_documents=4, **small),
        task=dict(kind="classification", source="task", split="test", **small),
    )
    return c
'''


def documents() -> list[str]:
    """240 paragraphs of English, 100 to 400 characters each."""
    lines = (line for split in ("train", "validation") for line in (DATA / "general" / f"{split}.jsonl").open("rb"))
    texts = [json.loads(line)["text"] for line in lines]
    pieces = (" ".join(piece.split()) for text in texts for piece in re.split(r"\n\s*\n", text))
    return list(dict.fromkeys(piece[:400] for piece in pieces if len(piece) > 100))[:240]


def write_texts(directory: pathlib.Path) -> None:
    """Two halves of the documents as general and domain text, and the task to tell which half a beginning is from."""
    directory.mkdir(parents=True)
    texts = documents()
    halves = {"general": texts[::2], "domain": texts[1::2]}
    rows = {name: [{"text": text} for text in half] for name, half in halves.items()}
    rows["task"] = [{"text": row["text"][:60], "label": name} for name in halves for row in rows[name]]
    for name, all_rows in rows.items():
        strided, first = [row for start in range(7) for row in all_rows[start::7]], 0
        for split, share in SPLITS.items():
            last = first + int(share * len(strided))
            lines = "".join(json.dumps(row) + "\n" for row in strided[first:last])
            (directory / f"{name}-{split}.jsonl").write_text(lines, encoding="utf-8")
            first = last


def write_config(file: pathlib.Path, base: pathlib.Path, extra: str = "") -> pathlib.Path:
    """A config file over the texts in `base`/texts; `extra` are lines that change the ConfigDict `c`."""
    body = CONFIG.replace("@", f"{base}/")
    lines = "".join(f"    {line}\n" for line in extra.splitlines())
    file.write_text(body.replace("    return c\n", f"{lines}    return c\n"), encoding="utf-8")
    return file


def files(directory: pathlib.Path) -> dict[str, tuple[int, bytes]]:
    """{path: (mtime in ns, content)} of every file below a directory, the lock left out."""
    found = (path for path in sorted(directory.rglob("*")) if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(directory)): (path.stat().st_mtime_ns, path.read_bytes()) for path in found}


def metrics(stage: pathlib.Path) -> list[dict]:
    """The lines of a stage's metrics.jsonl."""
    return [json.loads(line) for line in (stage / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def rows(workdir: pathlib.Path) -> dict[str, dict]:
    """The rows of matrix.json by stage, baselines included."""
    matrix = json.loads((workdir / "matrix.json").read_text(encoding="utf-8"))
    return {row["stage"]: row for row in matrix["rows"] + matrix["baselines"]}


def digests(workdir: pathlib.Path) -> dict[str, str]:
    """{stage: digest of the parameters} of a run."""
    return {name: row["params_digest"] for name, row in rows(workdir).items()}


class Done(NamedTuple):
    """What a process that has ended said."""

    stdout: str
    stderr: str


def process(
    *commands: Iterable[object], point: str = "", status: int = 0, deaths: Iterable[str] = (), plots: bool = False
) -> Done:
    """Run command lines one after another, up to the first that fails, in one process on one device.

    It dies at `point` (see `die_at`); plots are drawn where `plots` says so. Asserts that it ends with `status`, and
    that before it one process after another was killed at the points `deaths`.
    """
    arguments = json.dumps([[str(each) for each in command] for command in commands])
    fork = forks.Fork([",".join([*deaths, point]), arguments], {"LLM3_TEST_PLOTS": str(int(plots))})
    done = Done(*fork.communicate(ENDS_WITHIN))
    assert fork.returncode == status, done.stdout + done.stderr
    return done


def die_at(point: str) -> None:
    """Patch llm3 so that this process sends itself a signal at SIGNAL@WHAT[:STAGE:STEP] (HANG: hangs). WHAT is one of

    step: so many steps have been made, over all stages; computing: the devices are at this step; data: the batch of a
    step is read, in any stage; log: a line of metrics has been written; evaluating: a step is about to be evaluated;
    row: a stage is trained and its row is about to be written; tokenizer: it is about to be trained; tokens: the first
    text of a cache has been encoded;
    saving: a save has begun, in the background; part: its files are written, none of its parts is in place;
    commit: all are, and the checkpoint itself is not; committed: it is, and no older one is deleted; saved: all is done
    (saving_base, saved_base: of the base of a stage; the others: with step 0);
    reading: the parent of a stage has been read, but not judged; handed: what a stage begins with is on the devices.
    """
    name, _, rest = point.partition("@")
    what, stage, step = (*rest.split(":"), "", "")[:3]

    def die() -> None:
        if name == "HANG":
            hang()
        os.kill(os.getpid(), signal.Signals[name])
        if "LLM3_PROCESS" in os.environ:
            wait_until_all_have_heard()
            os.kill(os.getpid(), signal.Signals[name])  # once more, as some schedulers do

    if what == "computing":
        return die_while_computing(stage, int(step), die)
    owner, attribute, applies, before = places(stage, int(step or 0))[what]
    original = getattr(owner, attribute)

    @functools.wraps(original)
    def patched(*args, **kwargs):
        result = None if before else original(*args, **kwargs)
        if applies(*args):
            die()
        return original(*args, **kwargs) if before else result

    setattr(owner, attribute, patched)


def wait_until_all_have_heard() -> None:
    """Wait for all processes to know of this one's SIGTERM: they look for it now and then, a step is short."""
    from llm3.distributed import processes

    end = time.monotonic() + 60
    while len(processes.published("at")) < processes.count() and time.monotonic() < end:
        time.sleep(0.1)


def hang() -> None:
    """Do nothing until all others are further; then let the watchdog's clock run ahead of any limit."""
    from llm3.distributed import processes, watchdog

    own = next(each for each in gc.get_objects() if isinstance(each, watchdog.Watchdog))

    def others_wait() -> bool:  # what is published may be old: the others are there at least
        places = {process: watchdog.Place(*place) for process, place in processes.published("place").items()}
        places[processes.index()] = own.place()
        return len(places) == processes.count() and watchdog.late(places) == [processes.index()]

    while not others_wait():
        time.sleep(0.1)
    watchdog.time = types.SimpleNamespace(monotonic=lambda: time.monotonic() + 10**6, sleep=time.sleep)
    time.sleep(ENDS_WITHIN)


def places(stage: str, step: int) -> dict[str, tuple[object, str, Callable[..., bool], bool]]:
    """{WHAT: the function, as an owner and a name; whether a call of it is the one; whether to die before it}."""
    from llm3.checkpoints import stage_checkpoints
    from llm3.data import mixture, tokenizer
    from llm3.data.formats import text
    from llm3.distributed import preemption
    from llm3.handoff import parent as handoff
    from llm3.report import logs
    from llm3.stages import run_stage, stage_run, validation

    def of_step(checkpoints, at, *_) -> bool:
        return of_stage(checkpoints) and at == step

    def of_stage(checkpoints, *_) -> bool:
        return checkpoints.directory.parent.name == stage

    def once_done(applies: Callable[..., bool]) -> Callable[..., bool]:
        return lambda checkpoints, *args: applies(checkpoints, *args) and checkpoints.wait() is None

    def of_validation(validation, at, *_) -> bool:
        return validation._stage.name == stage and at == step

    def of_writer(writer, at, *_, **__) -> bool:
        return pathlib.Path(writer._path).parent.name == stage and at == step

    unfinished = f"{stage}/{'checkpoints' if step else stage_checkpoints.BASE}/{step}.orbax-checkpoint-tmp"
    checkpoints = stage_checkpoints.Checkpoints
    return {
        "step": (preemption.StopRequest, "at_step", lambda request: request.steps == step, False),
        "data": (mixture.Mixture, "batch", lambda _, at, *__: at == step, False),
        "log": (logs.MetricsWriter, "write", of_writer, False),
        "evaluating": (validation.Validation, "measure", of_validation, True),
        "saving": (checkpoints, "save", of_step, False),
        "part": (os, "rename", lambda source, _: f"{unfinished}/" in str(source), True),
        "commit": (os, "rename", lambda source, _: str(source).endswith(unfinished), True),
        "committed": (os, "rename", lambda source, _: str(source).endswith(unfinished), False),
        "saved": (checkpoints, "save", once_done(of_step), False),
        "saving_base": (checkpoints, "save_base", of_stage, False),
        "saved_base": (checkpoints, "save_base", once_done(of_stage), False),
        "reading": (handoff, "not_finite", lambda *_: True, True),
        "handed": (stage_run, "first_params", lambda _, of, *__: of.name == stage, False),
        "row": (run_stage, "write_row", lambda _, of, *__: of.name == stage, True),
        "tokenizer": (tokenizer, "train", lambda *_: True, True),
        "tokens": (text, "encode", lambda *_: True, False),
    }


def die_while_computing(stage: str, step: int, die: Callable[[], None]) -> None:
    """Call `die` when the devices have been given a step of a stage, before anything waits for them."""
    from llm3.stages import run_stage

    compile_step = run_stage.compile_step

    def patched(run, phase, done):
        compiled, steps = compile_step(run, phase, done), itertools.count(done + 1)

        def call(*args):
            result = compiled(*args)
            if next(steps) == step and run.stage.name == stage:
                die()
            return result

        return call

    run_stage.compile_step = patched


def without_plots() -> None:
    """Empty plots, which cost more than all else of a tiny run's report."""
    from matplotlib.figure import Figure

    Figure.savefig = lambda figure, file, **_: file.write('<svg width="1pt" height="1pt"></svg>')


def run(arguments: Sequence[str]) -> NoReturn:
    """What the module's docstring says, and the end of this process."""
    from llm3.__main__ import main

    points, commands = arguments
    *deaths, point = points.split(",")
    if os.environ.get("LLM3_TEST_PLOTS") != "1":
        without_plots()
    for death in deaths:
        if not (child := os.fork()):
            point = death
            break
        assert os.waitpid(child, 0)[1] == signal.SIGKILL, f"{death}: it was not killed there"
        print(KILLED, flush=True)
    if point:
        die_at(point)
    for command in json.loads(commands):
        if status := main(command):
            sys.exit(status)
        print(NEXT, flush=True)
    sys.exit()
