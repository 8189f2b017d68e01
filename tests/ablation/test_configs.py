"""The ablations in configs/ablations hold to all rules that need no data."""

import pytest

from llm3.ablation.arms import variants
from llm3.ablation.load import load_ablation
from llm3.cli.checks import check
from tests.helpers import tiny_run as tiny

FILES = sorted((tiny.ROOT / "configs" / "ablations").glob("*.py"))
NAMES = [*(str(file) for file in FILES), f"{tiny.ROOT / 'configs' / 'ablations' / 'three_stages.py'}:medical"]


@pytest.mark.parametrize("name", NAMES, ids=lambda name: name.rpartition("/")[2])
def test_every_arm_of_a_shipped_ablation_is_a_config_that_can_run(name):
    config = load_ablation(name)
    check("ablate", {"config": config, "jobs": 1, "launcher": "local"})
    assert len({each.name for each in variants(config)}) == len(variants(config)) > 1
    assert all(each.smallest > 0 for each in config.comparisons.values())
