"""The estimate of a step compared with the real TPU compiler, without a TPU."""

import importlib.util
import os
import re
import subprocess
import sys

import pytest

from llm3.__main__ import main
from llm3.distributed.machines import parse
from llm3.errors import UserError
from llm3.planning import aot
from tests.helpers import tiny_run

CONFIG = """
from ml_collections import ConfigDict


def get_config():
    c = ConfigDict()
    c.model = dict(layers=4, d_model=512, heads=4, kv_heads=2, d_ff=1024, remat="full")
    c.mesh = dict(fsdp=-1, data=1)
    c.tokenizer = dict(vocab_size=16384)
    c.sources = dict(a=dict(path="a"))
    c.stages = dict(pretrain=dict(kind="pretrain", data=dict(a=1.0), steps=9, batch_size=8, sequence_length=2048))
    return c
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs llm3[aot]")
def test_the_estimate_and_the_compiler_agree(tmp_path):
    (tmp_path / "config.py").write_text(CONFIG)
    command = [sys.executable, "-m", "llm3", "plan", f"--config={tmp_path}/config.py", "--topology=v5p:2x2x1", "--aot"]
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    path = os.pathsep.join([str(tiny_run.ROOT), environment.get("PYTHONPATH", "")])
    done = subprocess.run(command, env=environment | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr
    of = {
        row: float(share) for row, share in re.findall(r"^ ([\w, ]+?) +[\d.]+ +[\d.]+ +([\d.]+) *$", done.stdout, re.M)
    }
    assert of["arguments"] == pytest.approx(1, abs=0.01), done.stdout
    assert of["temporary, peak in use"] == pytest.approx(1, abs=0.15), done.stdout
    assert of["temporary, by memory_analysis"] == pytest.approx(1, abs=0.3), done.stdout


def test_without_the_compiler_it_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'llm3\[aot\]'"):
        aot.check(parse("v5p:2x2x1"))


def test_gpus_cannot_be_compiled_for():
    with pytest.raises(UserError, match="only TPUs"):
        aot.check(parse("h100x8"))


def test_there_is_nothing_to_compile_for_without_a_topology(capsys):
    assert main(["plan", "--config=configs/quickstart.py", "--aot"]) == 2
    assert "--aot: expected --topology=NAME" in capsys.readouterr().err
