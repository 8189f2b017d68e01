"""The verb `bench` on a stage with frozen parameters."""

import json
import re
from types import SimpleNamespace

import pytest

from llm3.cli.bench import COMPARED, table
from llm3.report.units import count, memory_text
from tests.helpers import tiny_run as tiny

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """The output of a few command lines, in one process."""
    base = tmp_path_factory.mktemp("bench")
    tiny.write_texts(base / "texts")
    part = "c.stages.finetune.train = 'top(1)'"
    unrolled = tiny.write_config(base / "unrolled.py", base, f"c.model.update(scan_unroll=2)\n{part}")
    lora = tiny.write_config(
        base / "lora.py", base, "c.stages.finetune.update(train='lora', adapters=dict(a=dict(rank=2)))"
    )
    commands = {
        "compared": (unrolled, "--stage=finetune", "--json"),
        "people": (unrolled, "--stage=finetune"),
        "alone": (unrolled, "--stage=finetune", "--alone", "--json", f"--profile={base}/trace"),
        "all": (unrolled, "--stage=scratch", "--json"),
        "lora": (lora, "--stage=finetune", "--json"),
        "decode": (unrolled, "--stage=pretrain", "--decode", "--json"),
    }
    lines = [("bench", f"--config={file}", f"--workdir={base}/run", *rest) for file, *rest in commands.values()]
    done = tiny.process(*lines)
    return SimpleNamespace(**dict(zip(commands, done.stdout.split(tiny.NEXT), strict=False)))


def test_a_stage_that_trains_a_part_is_timed_beside_full_training(answers):
    metrics = json.loads(answers.compared)
    full, ratios = metrics["full"], metrics["ratios"]
    for each in (metrics, full):
        assert 0 < each["step_seconds_min"] <= each["step_seconds"] <= each["step_seconds_max"]
    assert set(ratios) == set(COMPARED)
    assert all(ratios[key] == metrics[key] / full[key] for key in COMPARED)
    assert full["trainable_params"] == full["params"] == metrics["params"]
    smaller = ("flops_per_step", "compiler_flops", "temp_bytes", "opt_bytes", "gradient_bytes", "argument_bytes")
    assert all(ratios[key] < 1 for key in smaller)


def test_gradients_and_moments_are_of_what_trains(answers):
    metrics = json.loads(answers.compared)
    assert metrics["gradient_bytes"] == 4 * metrics["trainable_params"]
    assert metrics["full"]["gradient_bytes"] == 4 * metrics["params"]
    assert 2 * metrics["gradient_bytes"] <= metrics["opt_bytes"] < 2 * metrics["gradient_bytes"] + 100


def test_full_training_beside_a_stage_is_what_a_stage_that_trains_all_is(answers):
    full, stage = json.loads(answers.compared)["full"], json.loads(answers.all)
    for key in ("flops_per_step", "compiler_flops", "temp_bytes", "argument_bytes", "opt_bytes", "trainable_params"):
        assert full[key] == stage[key]


def test_a_stage_that_trains_all_or_is_asked_for_alone_is_timed_alone(answers):
    for metrics in (json.loads(answers.all), json.loads(answers.alone)):
        assert "full" not in metrics and "ratios" not in metrics
    assert json.loads(answers.alone)["flops_per_step"] == json.loads(answers.compared)["flops_per_step"]


def test_rates_are_shares_of_the_rate_of_a_large_matmul_on_a_chip_of_unknown_peak(answers):
    metrics = json.loads(answers.alone)
    assert metrics["matmul_peak_source"] == "measured"
    assert metrics["model_flops_per_second"] == metrics["flops_per_step"] / metrics["step_seconds"]
    assert metrics["mfu"] == metrics["model_flops_per_second"] / metrics["matmul_peak"]
    assert 0 < metrics["hfu"] < 1 and 0 <= metrics["data_wait_share"] < 1


def test_the_first_step_is_timed_from_the_command_and_a_later_command_finds_its_program(answers):
    first, later = json.loads(answers.compared), json.loads(answers.alone)
    assert first["first_step_seconds"] > first["compile_seconds"]
    assert first["compiled_programs"] + first["cached_programs"] > 1
    assert later["cached_programs"] > first["cached_programs"]


def test_a_profile_has_the_ten_costliest_operations_and_the_share_of_each_class(answers):
    profile = json.loads(answers.alone)["profile"]
    assert len(profile["operations"]) == 10 and profile["classes"]["matmul"]["share"] > 0
    assert sum(each["share"] for each in profile["classes"].values()) == pytest.approx(1)


def test_the_compilers_own_count_of_flops_has_the_element_wise_work_as_well(answers):
    metrics = json.loads(answers.compared)
    assert metrics["flops_per_step"] == metrics["hardware_flops_per_step"] < metrics["compiler_flops"]


def test_a_loop_over_layers_has_no_count_by_the_compiler(answers):
    assert json.loads(answers.lora)["compiler_flops"] is None


def test_adapters_are_compared_with_full_training_of_the_plain_model(answers):
    metrics = json.loads(answers.lora)
    assert metrics["full"]["params"] < metrics["params"]
    assert metrics["full"]["trainable_params"] == metrics["full"]["params"]


def test_decoding_is_compared_with_recomputation(answers):
    metrics = json.loads(answers.decode)
    tokens = 8 * (256 - 32)  # of 8 rows with prompts of 32
    for rate, name in (("batch_8", "decoding"), ("recomputation", "recomputation")):
        assert metrics[f"{rate}_tokens_per_second"] == pytest.approx(tokens / metrics[f"{name}_seconds"])
    for name in ("batch_32", "mixed"):
        assert metrics[f"{name}_speedup"] == metrics[f"{name}_tokens_per_second"] / metrics["batch_1_tokens_per_second"]
    assert metrics["speedup"] == metrics["recomputation_seconds"] / metrics["decoding_seconds"]
    assert "step_seconds" not in metrics


def test_people_see_both_side_by_side_with_units(answers):
    lines = {line[:26].strip(): re.split(r"\s{2,}", line[26:].strip()) for line in answers.people.splitlines() if line}
    assert lines[""] == ["finetune", "trains all", "ratio"]
    metrics = json.loads(answers.compared)
    params = [count(metrics["trainable_params"]), count(metrics["params"])]
    assert lines["trainable params"] == [*params, f"{metrics['ratios']['trainable_params']:.3f}"]
    assert len(lines["step time max"]) == 2 and len(lines["step time"]) == 3
    assert lines["memory of gradients"][0] == memory_text(metrics["gradient_bytes"])


def test_what_does_not_apply_is_a_dash_and_all_else_has_its_unit():
    shown = table({"stage": "pretrain", "mfu": None, "step_seconds": 0.25, "temp_bytes": 2**21, "flops_per_step": 2e9})
    lines = dict(re.split(r"\s{2,}", line) for line in shown.splitlines()[1:])
    assert lines == {"mfu": "-", "step time": "250 ms", "temporary memory": "2.00 MiB", "flops per step": "2.00GFLOP"}
