"""docs/python.md runs as it stands, and `import llm3` loads nothing until it is used."""

import dataclasses
import importlib
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

import llm3
from llm3.checkpoints.stage_checkpoints import Checkpoints
from llm3.tree import flatten
from tests.helpers import tiny

ROOT = pathlib.Path(__file__).parents[2]
EXAMPLE = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(encoding="utf-8"), re.DOTALL)[1]


def test_the_example_of_the_library_trains_the_last_two_layers_of_a_checkpoint(tmp_path, monkeypatch, capsys):
    config = tiny.model_config(layers=4)
    before = tiny.make_params(config)
    with Checkpoints(tmp_path / "runs" / "quickstart" / "pretrain" / "checkpoints") as checkpoints:
        checkpoints.save(3, before, {}, {"model": dataclasses.asdict(config)})
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(EXAMPLE, "docs/python.md", "exec"), names)

    losses = [float(line.split()[1]) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 20 and losses[-1] < losses[0] - 0.1
    after = flatten(jax.device_get(names["params"]))
    assert after.keys() == flatten(before).keys()
    for path, leaf in flatten(before).items():
        if path.startswith("layers/"):
            kept = [np.array_equal(*each) for each in zip(leaf, after[path], strict=True)]
            assert kept == [True, True, False, False], path
        else:
            assert np.array_equal(leaf, after[path]) == path.startswith("embed/"), path


def test_the_example_of_the_library_has_at_most_25_lines():
    assert len(EXAMPLE.splitlines()) <= 25


def test_importing_llm3_does_not_import_jax():
    code = "import sys, llm3; sys.exit(any(name in sys.modules for name in ('jax', 'flax', 'optax', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("name", llm3.EXPORTS)
def test_an_exported_name_is_the_object_of_the_module_that_defines_it(name):
    module, _, attribute = llm3.EXPORTS[name].partition(":")
    assert getattr(llm3, name) is getattr(importlib.import_module(module), attribute or name)
    assert getattr(llm3, name).__module__ == module
    assert name in dir(llm3)


def test_a_name_that_is_not_exported_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'llm3' has no attribute 'trian'"):
        llm3.trian  # noqa: B018
