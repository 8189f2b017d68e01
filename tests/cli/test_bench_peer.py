"""A peer of `bench`: what it needs, what has no counterpart, and how its times are compared."""

import importlib.util
from types import SimpleNamespace

import numpy as np
import pytest

from llm3.cli.bench import compared, decoding
from llm3.cli.bench_checks import check_bench
from llm3.config.load import load
from llm3.errors import UserError
from tests.helpers.meshes import mesh_of
from tests.helpers.tiny import make_params, model_config

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


def test_the_answers_of_a_load_have_its_numbers_of_tokens():
    config, limits = model_config(layers=1), (3, 1, 2)
    text = np.ones((5, decoding.LENGTH), np.int32)
    session = SimpleNamespace(mesh=mesh_of(1))
    answers = decoding._decoding(session, make_params(config), config, text, decoding.Load(2, limits))()
    assert sorted((number, len(tokens)) for number, tokens in answers) == list(enumerate(limits))
    assert len(decoding.LOADS["mixed"].limits) == 32 and sum(decoding.LOADS["mixed"].limits) == 32 * (7 + 224) // 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pretrain", "posttrain", "finetune"])
def test_the_peer_has_and_trains_as_many_parameters_as_the_stage(tmp_path, name):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from llm3.cli.bench.torch_peer import TorchStep
    from llm3.stages.experiment import prepare
    from llm3.tree import size
    from tests.helpers import tiny_run as tiny

    tiny.write_texts(tmp_path / "texts")
    file = tiny.write_config(tmp_path / "config.py", tmp_path, "c.stages.posttrain.train = 'top(1)'")
    stage = prepare(load(str(file)), tmp_path / "run", [name]).stages[name]
    phase = stage.phases(mesh_of(1))[0]
    facts = TorchStep(stage, phase).facts()
    assert facts["trainable_params"] == size(phase.abstract_state.trainable)
    assert facts["params"] == size(phase.abstract_params)
    if name == "pretrain":
        from llm3.cli.bench.torch_decoding import TorchDecoding

        limits = (3, 1, 2)
        made = TorchDecoding(stage, phase).answering(np.zeros((5, 4), np.int32), limits, rows=2)()
        assert [tuple(each.shape) for each in made] == [(2, 4 + 3), (1, 4 + 2)], "up to the longest of each batch"
