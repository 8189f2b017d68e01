"""A peer of `bench`: what it needs, what has no counterpart, and how its times are compared."""

import importlib.util
from types import SimpleNamespace

import pytest

from llm3.cli.bench import compared
from llm3.cli.bench_checks import check_bench
from llm3.config.load import load
from llm3.errors import UserError

OPTIONS = dict(stage="lora", peer=["torch"], sweep=False, profile=None, alone=False)


def test_a_peer_that_is_not_installed_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    config = load("configs/bench/smollm2.py")
    with pytest.raises(UserError, match="needs torch and transformers and peft, which are not installed: pip install "):
        check_bench(config, OPTIONS)
    with pytest.raises(UserError, match=r"pip install torch transformers$"):
        check_bench(config, OPTIONS | {"stage": "full"})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    check_bench(config, OPTIONS)


def test_an_unknown_peer_and_flags_that_exclude_each_other_are_refused():
    config = load("configs/bench/smollm2.py")
    with pytest.raises(UserError, match="--peer=torhc: no such peer; did you mean 'torch'"):
        check_bench(config, OPTIONS | {"peer": ["torhc"]})
    with pytest.raises(UserError, match="--sweep: expected no --peer"):
        check_bench(config, OPTIONS | {"sweep": True})


def test_times_are_compared_turn_by_turn():
    peer = SimpleNamespace(seconds=[2.0, 6.0, 3.0], facts=lambda: {"about": "x"})
    found = compared(peer, [1.0, 2.0, 3.0])
    assert (found["ratio"], found["ratio_min"], found["ratio_max"], found["pairs"]) == (2.0, 1.0, 3.0, 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pretrain", "posttrain", "finetune"])
def test_the_peer_has_and_trains_as_many_parameters_as_the_stage(tmp_path, name):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from llm3.cli.bench.torch_peer import TorchStep
    from llm3.stages.experiment import prepare
    from llm3.tree import size
    from tests.helpers import tiny_run as tiny
    from tests.helpers.meshes import mesh_of

    tiny.write_texts(tmp_path / "texts")
    file = tiny.write_config(tmp_path / "config.py", tmp_path, "c.stages.posttrain.train = 'top(1)'")
    stage = prepare(load(str(file)), tmp_path / "run", [name]).stages[name]
    phase = stage.phases(mesh_of(1))[0]
    facts = TorchStep(stage, phase).facts()
    assert facts["trainable_params"] == size(phase.abstract_state.trainable)
    assert facts["params"] == size(phase.abstract_params)
