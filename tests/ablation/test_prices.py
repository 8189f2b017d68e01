"""Prices of real stages over real, tiny data: FLOPs as executed, and one timing for each program."""

import pytest

from llm3.ablation import arms, costs
from llm3.ablation.load import load_ablation
from tests.helpers import tiny_ablation as tiny_ab

ARMS = """
c.arms = {
    "all three": {},
    "longer": {"without": ["posttrain"], "adjust": "pretrain"},
    "top": {"change": {"stages.finetune.train": "top(1)"}},
}
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return str(tiny_ab.write_ablation(tmp_path_factory.mktemp("prices"), ARMS, "c.stages.posttrain.steps = 12\n"))


def priced(file, tmp_path, unit, timed=costs.not_timed):
    config = load_ablation(file, [f"match={unit!r}"])
    found = costs.price_all(arms.variants(config), config, costs.Prices(tmp_path, timed))
    return {each.variant.name: each for each in found}


def test_an_adjusted_arm_uses_as_many_flops_within_half_a_step(file, tmp_path):
    found = priced(file, tmp_path, "flops")
    step = found["longer"].costs["pretrain"].step.flops
    assert abs(found["longer"].budget.flops - found["all three"].budget.flops) <= step / 2
    assert found["longer"].adjusted == ("pretrain", 4, 16)


def test_frozen_layers_have_no_backward_pass_and_all_tokens(file, tmp_path):
    found = priced(file, tmp_path, "tokens")
    top, full = found["top"].budget, found["all three"].budget
    assert top.flops < full.flops and top.tokens == full.tokens == 20 * 8 * 32


def test_each_program_is_timed_once_whatever_its_steps_and_its_parent(file, tmp_path):
    timed, seconds = {}, {"pretrain": 1.0, "posttrain": 2.0, "finetune": 0.5}

    def time(config, name, key):
        timed.setdefault(key, []).append(name)
        return seconds[name] * (0.5 if config.stages[name].train != "all" else 1)

    found = priced(file, tmp_path, "seconds", time)
    assert found["longer"].adjusted == ("pretrain", 4, 28)
    assert found["longer"].budget.seconds == found["all three"].budget.seconds == 4 + 24 + 2
    assert sorted(names[0] for names in timed.values()) == ["finetune", "finetune", "posttrain", "pretrain"]
