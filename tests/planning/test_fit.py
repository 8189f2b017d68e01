"""Steps that do not fit into memory: what is rejected before a run, and the one line of a run that it ends."""

import dataclasses

import jax
import pytest

from llm3.__main__ import main
from llm3.config.schema import EvaluationConfig
from llm3.distributed import memory
from llm3.errors import OutOfMemory
from llm3.planning import fit
from llm3.stages.cost import memory_fields
from tests.helpers import tiny_run as tiny
from tests.planning.test_roofline import T, abstract_mesh, config_of, stage_of

GIB = 2**30


@pytest.fixture
def linear(monkeypatch):
    """The bytes of a step are the tokens of a micro-batch; remat halves them."""

    def tokens(stage, mesh):
        full = stage.model.remat == "full"
        return stage.config.batch_size / stage.config.micro_batches * stage.config.sequence_length / (1 + full)

    monkeypatch.setattr(fit, "step_bytes", tokens)
    monkeypatch.setattr(fit, "lower_bound", lambda *_: 0)
    monkeypatch.setattr(jax, "device_count", lambda: 1)


@pytest.mark.parametrize(
    ("limit", "fields"),
    [
        (16 * T, None),
        (16 * T / fit.SLACK, None),
        (16 * T / fit.SLACK - 1, ["micro_batches=2", "model.remat='full'", "sequence_length=32"]),
        (16 * T / 3, ["micro_batches=4", "sequence_length=16"]),
        (16 * T / 9, ["micro_batches=16"]),
        (1, ["config.mesh.fsdp (more devices)", "config.stages.s.train (fewer parameters)", "config.model (a smaller"]),
    ],
)
def test_what_does_not_fit_is_rejected_with_the_nearest_fields_that_do(linear, limit, fields):
    if fields is None:
        fit.check_fits(config_of(), ["s"], limit)
        return
    with pytest.raises(OutOfMemory) as error:
        fit.check_fits(config_of(), ["s"], limit)
    said = str(error.value)
    places = [said.index(field) for field in fields]
    assert places == sorted(places) and said.count("config.") == len(fields) + 2
    assert "\n" not in said and "--config.check_memory=False" in said
    fit.check_fits(dataclasses.replace(config_of(), check_memory=False), ["s"], limit)


@pytest.mark.parametrize(
    ("stage", "model", "sizes"),
    [
        ({}, {}, {}),
        pytest.param(
            {"sequence_length": 1024, "batch_size": 2},
            {"remat": "full"},
            {"data": 2, "tensor": 2},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_estimate_lies_between_the_bounds(stage, model, sizes):
    found, mesh = stage_of(config_of(stage, **model)), abstract_mesh(**sizes)
    assert fit.lower_bound(found, mesh) < fit.step_bytes(found, mesh) < fit.upper_bound(found, mesh)


@pytest.mark.slow
def test_a_step_that_cannot_fit_leaves_no_files(tmp_path, capsys):
    config = tiny.write_config(tmp_path / "config.py", tmp_path)
    long = "--config.stages.finetune.sequence_length=999999"
    assert main(["run", f"--config={config}", f"--workdir={tmp_path}/run", long]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("llm3: config.stages.finetune: a step needs about") and "sequence_length=" in said
    assert not (tmp_path / "run").exists()


def test_an_evaluation_that_cannot_fit_is_rejected_too(linear):
    config = dataclasses.replace(
        config_of(), evaluations={"e": EvaluationConfig("perplexity", "a", sequence_length=10**6)}
    )
    with pytest.raises(
        OutOfMemory, match=r"^config\.evaluations\.e: out of memory for .*: config\.evaluations\.e\.batch"
    ):
        fit.check_fits(config, ["s"], 64 * GIB)
    fit.check_fits(config, [], 64 * GIB)  # nothing is left to train


@pytest.mark.parametrize("kind", ["choice", "generation", "classification", "span"])
def test_an_evaluation_that_computes_no_such_windows_is_not_rejected(linear, kind):
    """Prompts are computed at their own length; a task head that no stage trains is not evaluated."""
    evaluation = EvaluationConfig(kind, "a", sequence_length=10**6)
    fit.check_fits(dataclasses.replace(config_of(), evaluations={"e": evaluation}), ["s"], 64 * GIB)
    if kind in ("classification", "span"):
        config = config_of({"kind": "finetune", "objective": {"classification": "classify"}.get(kind, kind)})
        with pytest.raises(OutOfMemory, match=r"^config\.evaluations\.e: out of memory"):
            fit.check_fits(dataclasses.replace(config, evaluations={"e": evaluation}), ["s"], 64 * GIB)


def test_what_helps_depends_on_what_fills_the_memory():
    stage, mesh = stage_of(config_of()), abstract_mesh()
    state = stage.phases(mesh)[-1].abstract_state
    of = lambda limit: [each.split()[0].split("=")[0] for each in memory_fields(stage, state, mesh, limit)]  # noqa: E731
    where = "config.stages.s"
    assert of(64 * GIB) == [f"{where}.micro_batches", "config.model.remat", f"{where}.sequence_length"]
    assert of(2**20) == ["config.mesh.fsdp", f"{where}.train", "config.model"]
    stage = stage_of(config_of({"sequence_length": 10**6}))
    assert of(64 * GIB) == [f"{where}.sequence_length", "config.mesh.context", "config.mesh.tensor"]


@pytest.mark.parametrize(
    ("text", "asked"),  # as a CPU, a GPU and a TPU say it
    [
        ("RESOURCE_EXHAUSTED: Out of memory allocating 3221225472 bytes.", 3 * GIB),
        ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 12.50GiB.", 12.5 * GIB),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.00G of 15.48G hbm.", 20 * GIB),
        ("RESOURCE_EXHAUSTED: Failed to allocate request for 2.00GiB (2147483648B) on device ordinal 0", 2 * GIB),
        ("RESOURCE_EXHAUSTED: Out of memory", None),
    ],
)
def test_an_error_of_exhausted_memory_is_one_line_with_three_fields(monkeypatch, text, asked):
    monkeypatch.setattr(memory, "device_bytes", lambda: 8 * GIB)
    with pytest.raises(OutOfMemory) as error, memory.explained("config.stages.s", ["a", "b", "c"]):
        raise jax.errors.JaxRuntimeError(text + "\nmore lines")
    size = f" for {asked / GIB:.2f} GiB" if asked else ""
    line = f"config.stages.s: out of memory{size}; a device has 8.00 GiB. What helps, in this order: a, b, c"
    assert str(error.value) == line


def test_other_errors_are_not_about_memory():
    error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: received a message larger than the limit")
    assert not memory.is_exhausted(error) and not memory.is_exhausted(RuntimeError("Out of memory"))
    assert memory.is_exhausted(MemoryError("Unable to allocate 4 GiB"))


def test_the_memory_of_a_container_is_that_of_its_smallest_group(tmp_path):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal:       16777216 kB\nMemFree: 1 kB\n")
    assert memory.machine_bytes(tmp_path) == 16 * GIB
    (tmp_path / "proc/self/cgroup").write_text("0::/job/step\n")
    for group, limit in (("job/step", "max"), ("job", str(4 * GIB)), ("", str(8 * GIB))):
        (tmp_path / "sys/fs/cgroup" / group).mkdir(parents=True, exist_ok=True)
        (tmp_path / "sys/fs/cgroup" / group / "memory.max").write_text(limit + "\n")
    assert memory.machine_bytes(tmp_path) == 4 * GIB
