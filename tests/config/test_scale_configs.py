"""The configs of published sizes: their sizes match the publications, and their plans fit the machines."""

import pytest
from jax.sharding import AbstractMesh

from llm3.__main__ import main
from llm3.config.load import load
from llm3.config.schema import RunConfig
from llm3.distributed.machines import parse
from llm3.distributed.mesh_axes import MESH_AXES
from llm3.distributed.sharding import check_batch
from llm3.errors import UserError
from llm3.models.transformer import abstract
from llm3.planning.plan import on_abstract_mesh, plan_phases, stage_on
from llm3.stages import rules
from llm3.stages.experiment import prepare
from llm3.stages.stage import plan_stage
from llm3.tree import size
from tests.helpers import tiny_run

TOPOLOGIES = {"h100x8": "h100x8", "h100x64": "h100x64", "v5p-512": "v5p:8x8x4"}
PUBLISHED = {"llama3_8b": 8.03e9, "llama3_70b": 70.55e9, "qwen3_0p6b": 0.596e9}  # parameters
VARIANTS = [(name, machine) for name in PUBLISHED for machine in TOPOLOGIES]


def config_of(name: str, machine: str) -> RunConfig:
    return load(f"configs/scale/{name}.py:{machine}")


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_model_has_as_many_parameters_as_published(name):
    config = config_of(name, "h100x64")
    assert size(abstract(plan_stage(config, "pretrain").model).shapes) == pytest.approx(PUBLISHED[name], rel=1e-3)


@pytest.mark.parametrize(("name", "machine"), VARIANTS)
def test_a_variant_is_lawful_and_its_mesh_divides_every_batch(name, machine):
    config = config_of(name, machine)
    order = rules.check(config)
    # training 70B does not fit on 8 GPUs
    assert order == ["pretrain", "posttrain", "finetune"][(name, machine) == ("llama3_70b", "h100x8") :]
    with on_abstract_mesh(config.mesh, parse(TOPOLOGIES[machine]).devices) as mesh:
        for stage in config.stages.values():
            check_batch(mesh, stage.batch_size, stage.sequence_length, stage.micro_batches, "stage")
        for evaluation in config.evaluations.values():
            check_batch(mesh, evaluation.batch_size, evaluation.sequence_length, 1, "evaluation")


@pytest.mark.parametrize(("name", "machine"), [pytest.param(*each, marks=pytest.mark.slow) for each in VARIANTS])
def test_every_stage_of_a_variant_fits_as_it_is_configured(name, machine):
    config, chips = config_of(name, machine), parse(TOPOLOGIES[machine])
    for stage in config.stages:
        planned = plan_stage(config, stage).computed_in("bfloat16")
        for each in plan_phases(planned, config.mesh, chips, (config.model.remat,)):
            assert each.fits(config.model.remat, chips), f"{stage}: {each.total(config.model.remat) / 2**30:.1f} GiB"


def test_a_machine_that_a_config_does_not_know_is_refused_with_those_it_knows():
    with pytest.raises(UserError, match=r"'h200x8': expected h100x8, h100x64, v5p-512"):
        config_of("llama3_8b", "h200x8")


def test_70_billion_parameters_on_64_devices_are_planned_without_texts_or_devices(tmp_path, capsys):
    workdir = tmp_path / "run"
    command = ["plan", "--config=configs/scale/llama3_70b.py:h100x64", "--topology=h100x64", "--stages=pretrain"]
    assert main([*command, f"--workdir={workdir}"]) == 0
    printed = capsys.readouterr().out
    rows = {line[:44].strip(): line[44:].split() for line in printed.splitlines()}
    # 4 bytes of parameters and 8 of moments, sharded over 64 devices
    assert rows["parameters"] == [f"{4 * 70.5537e9 / 64 / 2**30:.2f}"] * 3
    assert rows["moments"] == [f"{8 * 70.5537e9 / 64 / 2**30:.2f}"] * 3
    assert rows["fits into 90% of 80.00"] == ["no", "no", "yes"]
    kept = 80 * 8192 * 8192 * 2 / 2**30  # the input of each layer, for one window
    assert kept < float(rows["activations kept for the backward pass"][2]) < 1.2 * kept
    assert "fsdp 64: 70.6G of 70.6G parameters trainable" in printed and "the fastest that fits: remat full" in printed
    assert "8 in a host at 450 GB/s, 8 hosts at 8 x 50 GB/s" in printed
    assert max(map(len, printed.splitlines())) <= 120
    assert not workdir.exists()


def test_a_machine_of_another_size_than_the_mesh_is_refused(capsys):
    assert main(["plan", "--config=configs/scale/llama3_8b.py:v5p-512", "--topology=h100x8"]) == 2
    assert "does not fit 8 devices" in capsys.readouterr().err


@pytest.mark.slow
def test_the_cpu_of_this_machine_is_a_topology_too(tmp_path, capsys):
    """The plan reads documents for the classes of a task, and reports if it cannot."""
    config = tiny_run.write_config(tmp_path / "config.py", tmp_path)
    line = ["plan", f"--config={config}", f"--workdir={tmp_path}/run", "--topology=cpu", "--stages=finetune"]
    assert main(line) == 0
    printed = capsys.readouterr().out
    assert "finetune on cpu, one device" in printed and "assumed 1 class" in printed
    tiny_run.write_texts(tmp_path / "texts")
    assert main(line) == 0
    assert "assumed 1 class" not in capsys.readouterr().out


def test_a_plan_for_a_machine_is_of_the_same_stages_as_one_with_the_data(tmp_path):
    """A classifier is read at one position per document, and only the data has the number of documents per window."""
    tiny_run.write_texts(tmp_path / "texts")
    file = tiny_run.write_config(tmp_path / "config.py", tmp_path, "c.model.pool = 'last'")
    config, one = load(str(file)), AbstractMesh((1,) * len(MESH_AXES), MESH_AXES)
    for stage in prepare(config, tmp_path / "run", list(config.stages)).stages.values():
        planned, notes = stage_on(config, stage.name, tmp_path / "run", parse("cpu"))
        assert (planned.model, planned.labels, notes) == (stage.model, stage.labels, [])
        assert planned.phases(one)[0].flops == stage.phases(one)[0].flops
