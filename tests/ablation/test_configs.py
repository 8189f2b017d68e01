"""The ablations in configs/ablations hold to all rules that need no data."""

import pytest

from llm3.__main__ import main
from llm3.ablation.arms import variants
from llm3.ablation.load import load_ablation
from llm3.cli.checks import check
from tests.helpers import tiny_folder
from tests.helpers import tiny_run as tiny

FOLDER = tiny.ROOT / "configs" / "ablations"
NAMES = [*sorted(file.name for file in FOLDER.glob("*.py")), "three_stages.py:medical"]


@pytest.mark.parametrize("name", NAMES)
def test_every_arm_of_a_shipped_ablation_is_a_config_that_can_run(name, tmp_path):
    if name == "imported_model.py":
        name += f":{tiny_folder.write_folder(tmp_path / 'model', tiny.documents(), num_hidden_layers=5)}"
    config = load_ablation(f"{FOLDER / name}")
    check("ablate", {"config": config, "jobs": 1, "launcher": "local", "sbatch": ""})
    assert len({each.name for each in variants(config)}) == len(variants(config)) > 1
    assert all(each.smallest > 0 for each in config.comparisons.values())


@pytest.mark.parametrize(
    ("verb", "file", "message"),
    [
        ("ablate", "configs/quickstart.py", "the config of a run, which `run` trains"),
        ("run", "configs/ablations/replay.py", "the config of an ablation, which `ablate` trains"),
    ],
)
def test_the_config_of_a_run_and_that_of_an_ablation_are_told_apart(verb, file, message, capsys, tmp_path):
    assert main([verb, f"--config={tiny.ROOT / file}", f"--workdir={tmp_path / 'work'}"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "work").exists()
