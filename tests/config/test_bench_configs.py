"""Configs to time on accelerators: their sizes match the publications, and their steps fit the machines they name."""

import pytest

from llm3.config.load import load
from llm3.distributed.machines import parse
from llm3.models.transformer import abstract
from llm3.planning.plan import plan_phases
from llm3.stages import rules
from llm3.stages.stage import plan_stage
from llm3.tree import size

PUBLISHED = {"gpu_1b": 1.236e9, "gpu_8b": 8.030e9, "smollm2": 134.5e6}  # parameters
MACHINES = {"gpu_1b": "h100x1", "gpu_8b": "h200x1", "gpu_8b_lora": "h100x1", "gpu_8b_top4": "h100x1"}


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_model_has_as_many_parameters_as_published(name):
    config = load(f"configs/bench/{name}.py")
    assert size(abstract(plan_stage(config, "full").model).shapes) == pytest.approx(PUBLISHED[name], rel=1e-3)


@pytest.mark.parametrize("name", [*MACHINES, "smollm2", "cpu_small"])
def test_a_config_is_lawful(name):
    config = load(f"configs/bench/{name}.py")
    assert rules.check(config) == list(config.stages)


@pytest.mark.slow
@pytest.mark.parametrize("name", MACHINES)
def test_the_steps_of_a_config_fit_its_machine(name):
    config, chips = load(f"configs/bench/{name}.py"), parse(MACHINES[name])
    for stage in list(config.stages)[name.startswith("gpu_8b_") :]:  # full training of 8B needs the larger machine
        planned = plan_stage(config, stage).computed_in("bfloat16")
        for each in plan_phases(planned, config.mesh, chips, (config.model.remat,)):
            assert each.fits(config.model.remat, chips), f"{stage}: {each.total(config.model.remat) / 2**30:.1f} GiB"
