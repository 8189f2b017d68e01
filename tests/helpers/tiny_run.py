"""A whole experiment in seconds: its texts, its config file, and processes that run it and can be made to die.

`run([POINTS, COMMANDS])` does what `python -m llm3 ...` does for each of some command lines, in JSON, in one process
that ends itself at the last of POINTS, for example `SIGKILL@log:pretrain:6`: see `tiny_deaths`. At the points before
it, separated by commas, die processes that do the same before this one does.
"""

import json
import os
import pathlib
import re
import signal
import sys
from collections.abc import Iterable, Sequence
from typing import NamedTuple, NoReturn

from tests.helpers import forks
from tests.helpers.tiny_deaths import die_at

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

    It dies at `point` (see `tiny_deaths`); plots are drawn where `plots` says so. Asserts that it ends with `status`,
    and that before it one process after another was killed at the points `deaths`.
    """
    arguments = json.dumps([[str(each) for each in command] for command in commands])
    fork = forks.Fork([",".join([*deaths, point]), arguments], {"LLM3_TEST_PLOTS": str(int(plots))})
    done = Done(*fork.communicate(ENDS_WITHIN))
    assert fork.returncode == status, done.stdout + done.stderr
    return done


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
