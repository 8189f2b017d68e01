"""What the command line and the config alone can tell is told before jax is imported."""

import gc
import json
import os
import re
import subprocess
import sys

import pytest

from llm3.__main__ import function_of
from llm3.cli import checks
from llm3.cli.output import ReaderGone, watched_output
from llm3.cli.verbs import VERBS
from llm3.errors import NotWritten, UserError
from tests.helpers import tiny_run as tiny

REFUSED = {
    "run --config=FILE --workdir=W --config.stages.finetun.steps=5": "did you mean 'finetune'",
    "run --config=FILE --workdir=W --stages=finetun": "did you mean 'finetune'",
    "run --config=FILE --workdir=W --config.stages.finetune.objective=clasify": "did you mean 'classify'",
    "run --config=FILE --workdir=W --config.stages.posttrain.objective=masked": "bidirectional",
    "run --config=FILE --workdir=W --config.stages.posttrain.optimizer.name=adam": (
        "config.stages.posttrain.optimizer.name='adam': did you mean 'adamw'"
    ),
    "run --config=FILE --workdir=W --config.stages.finetune.optimizer.warmup_steps=50": "at most the 10 steps",
    "run --config=FILE --workdir=W --config.stages.finetune.start={'stage':'posttrain','step':-1}": ".start.step=-1",
    "run --config=FILE --workdir=W --config.stages.finetune.micro_batches=3": (
        "config.stages.finetune.batch_size=8: expected a multiple of micro_batches=3"
    ),
    "run --config=FILE --workdir=W --config.tokenizer.chat_template={%if": "tokenizer.chat_template: line 1",
    "run --config=FILE --workdir=W --config.stages.finetune.best=task_acuracy": "did you mean 'task_accuracy'",
    "run --config=FILE --workdir=W --config.stages.finetune.patience=3": "finetune.patience=3: needs eval_every",
    "run --config=FILE --workdir=W --config.stages.finetune.patience=3 --config.stages.finetune.eval_every=5": (
        "config.stages.finetune.patience=3: needs best, the metric that should improve"
    ),
    "run --config=FILE --workdir=W --config.stages.finetune.min_delta=0.1": "finetune.min_delta=0.1: needs patience",
    "run --config=FILE --workdir=W --config.stages.finetune.eval_documents=9": "eval_documents=9: needs eval_every",
    "run --config=FILE --workdir=W --config.stages.finetune.eval_every=-1": "finetune.eval_every=-1: expected at least",
    "run --config=FILE --workdir=W --config.stages.finetune.eval_every=5 "
    "--config.stages.finetune.eval_names=['tsk']": "no evaluation 'tsk' of this stage; did you mean 'task'",
    "run --config=FILE --workdir=W --config.stages.pretrain.eval_every=5 "
    "--config.stages.pretrain.eval_names=['task']": "no evaluation 'task' of this stage; valid: domain, general",
    "run --config=FILE --workdir=W --config.stages.finetune.eval_every=5 --config.stages.finetune.best=task_accuracy "
    "--config.stages.finetune.eval_names=['domain']": "its evaluation is not in eval_names=['domain']",
    "run --config=FILE --workdir=W --config.stages.pretrain.eval_every=5 --config.evaluations={}": (
        "config.stages.pretrain.eval_every=5: no evaluation of this config fits the stage"
    ),
    "run --config=FILE --workdir=W --config.stages.pretrain.data_schedule=[[99,{'domain':1}]]": "10 steps",
    "run --config=FILE --workdir=W --config.evaluations.domain.options={'x':1}": "domain.options.x: no such option",
    "run --config=FILE --workdir=W --config.mesh.rules={'lenght':'context'}": "did you mean 'length'",
    "run --config=FILE --workdir=W --config.sources.general.filters=['is_long']": "expected 'module:function'",
    "data --config=FILE --config.sources.general.data_files=texts/*.jsonl": "data_files=dict(train=['texts/",
    "cache prune": "expected --older_than=30d, --max_gb=100 or --all",
    "cache prun": "did you mean 'prune'",
    "cache ls --all": "--all is a flag of `cache prune`",
    "cache prune --older_than=30": "--older_than=30: expected a number and m, h, d or w",
    "cache prune --max_gb=-1": "--max_gb=-1.0: expected a number of at least 0",
    "eval --config=FILE --workdir=NONE": "no such directory",
    "bench --config=FILE --stage=finetun": "did you mean 'finetune'",
    "data --config=FILE --shard=3/2": "expected I/N",
    "plan --config=FILE --topology=h10x8": "no such chip; did you mean 'h100'",
    "plan --config=FILE --aot": "--topology=NAME",
    "plan --config=FILE --price=-1": "--price=-1.0: expected the price of a device-hour",
    "serve --workdir=W --host=0.0.0.0": "--host=0.0.0.0: others could use the server",
    "generate --workdir=NONE --prompt=x --temperature=-1": "--temperature=-1.0: expected at least 0",
    "generate --workdir=NONE --prompt=x": "--workdir=NONE: no such directory",
    "export --workdir=NONE --stage=a --to=b --format=merge": "did you mean 'merged'",
    "bench-model --dtype=float23": "did you mean 'float32'",
    "bench-model --gigabytes=0": "--gigabytes=0.0: expected a number above 0",
    "ablate --config=ABLATION --workdir=W --config.arms.all.chnage={}": "arms.all.chnage: no such field; did you mean",
    "ablate --config=ABLATION --workdir=W --config.arms.all.without=['posttrian']": (
        "config.arms.all.without: no stage 'posttrian'; did you mean 'posttrain'"
    ),
    "ablate --config=ABLATION --workdir=W --config.metric=task_acuracy": "config.metric='task_acuracy'",
    "ablate --config=ABLATION --workdir=W --config.reference=al": "reference='al': no such arm; did you mean 'all'",
    "ablate --config=ABLATION --workdir=W --config.comparisons={'x':{'ours':'all','theirs':'alll'}}": (
        "config.comparisons.x.theirs='alll': no such arm; did you mean 'all'"
    ),
    "ablate --config=ABLATION --workdir=W "
    "--config.comparisons={'x':{'ours':'all','theirs':'no','metric':'task_acuracy'}}": (
        "config.comparisons.x.metric='task_acuracy': no such metric of this stage; did you mean 'task_accuracy'"
    ),
    "ablate --config=ABLATION --workdir=W --config.base.stages.finetune.stepz=3": "base.stages.finetune.stepz",
    "ablate --config=ABLATION --workdir=W --config.grid={'stages.finetune.stepz':[1]}": "grid.stages.finetune.stepz",
    "ablate --config=ABLATION --workdir=W --jobs=0": "--jobs=0: expected at least 1",
    "ablate --config=ABLATION --workdir=W --launcher=slrum": "--launcher=slrum: did you mean 'slurm'",
    "ablate --config=ABLATION --workdir=W --sbatch=--nodes=1": "--sbatch=--nodes=1: needs --launcher=slurm",
    "ablate --config=ABLATION --workdir=W --launcher=slurm": "--launcher=slurm: no ",
    "lineage --workdir=NONE": "--workdir=NONE: no such directory",
    "report NONE": "NONE: no such directory",
    "report W NONE": "W: no such directory",
    "compare NONE NONE": "NONE: no such directory",
}
ABLATION = """
from ml_collections import ConfigDict

def get_config():
    fields = dict(base="config.py", metric="task_accuracy", arms={"all": {}, "no": {"without": ["posttrain"]}})
    return ConfigDict(fields, convert_dict=False)
"""
CALLS = """
import contextlib, io, json, sys
from llm3.__main__ import main
for line in json.load(sys.stdin):
    with contextlib.redirect_stderr(io.StringIO()) as error:
        status = main(line)
    print(json.dumps([status, error.getvalue(), "jax" in sys.modules or "optax" in sys.modules]))
"""


def test_every_refusal_comes_before_jax_and_says_its_place_once(tmp_path):
    file = str(tiny.write_config(tmp_path / "config.py", tmp_path))
    (tmp_path / "texts").mkdir()
    for name in ("domain-train", "domain-test", "more"):
        (tmp_path / "texts" / f"{name}.jsonl").touch()
    ablation = tmp_path / "ablation.py"
    ablation.write_text(ABLATION)
    names = {"FILE": file, "ABLATION": str(ablation)}
    lines = [
        [re.sub("FILE|ABLATION", lambda found: names[found[0]], part) for part in line.split(" ")] for line in REFUSED
    ]
    done = subprocess.run(
        [sys.executable, "-c", CALLS], input=json.dumps(lines), capture_output=True, text=True, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tiny.ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for (line, part), result in zip(REFUSED.items(), map(json.loads, done.stdout.splitlines()), strict=True):
        status, error, slow = result
        assert status == 2 and part in error, (line, error)
        assert error.count("config: ") == 0 and error.count("config.") <= 1, error
        assert not slow, f"{line} imports jax"


@pytest.mark.parametrize("goes_on", [True, False])
def test_output_without_a_reader_ends_a_command_quietly_unless_it_trains(capfd, monkeypatch, goes_on):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as broken:
        monkeypatch.setattr(sys, "stdout", broken)
        written = []
        try:
            with watched_output(goes_on):
                for line in range(3):
                    print(line, flush=True)
                    written.append(line)
        except ReaderGone:
            assert not goes_on
        assert written == ([0, 1, 2] if goes_on else [])
    assert capfd.readouterr().err == ""


def test_output_that_a_full_disk_refuses_says_so_unless_a_run_goes_on(monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(NotWritten, match="output was not written: No space left"), watched_output(goes_on=False):
            print("a line")
        with watched_output(goes_on=True):
            print("a line", flush=True)


def test_a_command_whose_output_is_closed_from_the_start_runs(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    with watched_output(goes_on=False):
        print("nobody reads this", flush=True)
    assert sys.stdout is None


@pytest.mark.parametrize("verb", ["report", "compare"])
def test_a_verb_that_reads_files_of_a_run_needs_no_devices(verb):
    script = f"import sys, llm3.cli.{verb}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert not {"jax", "flax", "orbax", "matplotlib"} & set(loaded)


def test_the_report_of_several_runs_needs_a_folder_of_its_own(tmp_path):
    one, two, other = (tmp_path / name for name in ("one", "two", "other"))
    for run in (one, two):
        (run / "pretrain" / "checkpoints").mkdir(parents=True)
        (run / "sessions.json").touch()
    given = {"dirs": [one, two], "out": other, "config": None}
    checks.check_report(given)
    checks.check_report(given | {"dirs": [one], "out": None})
    for change, part in (
        ({"out": None}, "expected --out=DIR"),
        ({"out": two}, "it is a run, whose report would be lost"),
        ({"out": one / "sessions.json"}, "it is a file"),
        ({"dirs": [one]}, "expected several runs"),
        ({"config": object()}, "expected one run"),
        ({"dirs": [one, other]}, "no such directory"),
    ):
        with pytest.raises(UserError, match=part):
            checks.check_report(given | change)


def test_a_command_keeps_searches_for_garbage_off_what_it_has_imported():
    """And a caller within another program keeps its own settings."""
    gc.collect()
    threshold, frozen = gc.get_threshold(), gc.get_freeze_count()
    function_of(VERBS["report"])
    assert gc.get_threshold() == threshold and gc.get_freeze_count() <= frozen
    try:
        gc.disable()  # as `python -m llm3` begins
        function_of(VERBS["report"])
        assert gc.isenabled() and gc.get_freeze_count() > frozen
    finally:
        gc.set_threshold(*threshold)
        gc.enable()
