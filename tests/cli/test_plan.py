"""The verb `plan`: what `run` would refuse, for all stages at once, and what the stages take in all."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from llm3.__main__ import main
from llm3.cli.plan_totals import Total, totals_table
from llm3.handoff.suggest import shortest_rules
from llm3.report import units
from tests.helpers import tiny_run as tiny

LORA = """
c.stages.plain = c.stages.finetune.to_dict() | dict(start="posttrain")
c.stages.lora = c.stages.plain.to_dict() | dict(train="lora", adapters=dict(x=dict(rank=2), y=dict(rank=2)))
"""
paths = st.sets(st.lists(st.sampled_from(["a", "b", "lora", "head", "k.n"]), min_size=1, max_size=4).map("/".join))


@settings(max_examples=40, deadline=None)
@given(paths, paths)
def test_rules_match_all_wanted_leaves_and_no_others(wanted, others):
    rules = shortest_rules(wanted, others)
    matched = {path for path in wanted | others if any(re.fullmatch(rule, path) for rule in rules)}
    assert matched == wanted and len(rules) <= len(wanted)


@pytest.fixture
def config(tmp_path):
    tiny.write_texts(tmp_path / "texts")
    return str(tiny.write_config(tmp_path / "config.py", tmp_path, LORA.strip()))


def test_a_plan_names_the_leaves_of_all_stages_in_lines_to_paste(config, tmp_path, capsys):
    line = ["plan", f"--config={config}", f"--workdir={tmp_path}/run", "--price=3"]
    assert main(line) == 2
    out, error = capsys.readouterr()
    assert "all" in out and "price" in out, "the plan itself is printed too"
    ready = dict(
        re.findall(r"stages\.(\w+)\.start: .*? fit this model:\n.*\n  if that is meant, .*: (fresh=.*)", error)
    )
    assert ready == {"plain": "fresh=['head/.*']", "lora": "fresh=['.*/lora/.*', 'head/.*']"}
    rules = {name: each.replace("=", "': ", 1) for name, each in ready.items()}
    pasted = [f"--config.stages.{name}.start={{'stage': 'posttrain', '{each}}}" for name, each in rules.items()]
    assert main([*line, *pasted]) == 0
    assert main([*line, "--topology=h100x8", "--stages=posttrain,lora"]) == 2, "without data as well"
    assert ready["lora"] in capsys.readouterr().err


def test_a_plan_says_which_parents_and_workdirs_run_would_refuse(config, tmp_path, capsys):
    (tmp_path / "run/pretrain").mkdir(parents=True)
    (tmp_path / "run/pretrain/config.json").write_text('{"seed": 7}')
    elsewhere = f"--config.stages.finetune.start={{'run': '{tmp_path}/other', 'stage': 'posttrain'}}"
    stages = "--stages=pretrain,finetune"
    assert main(["plan", f"--config={config}", f"--workdir={tmp_path}/run", stages, elsewhere]) == 2
    error = capsys.readouterr().err
    assert "holds 'pretrain' with another config" in error and "seed: saved 7, now 0" in error
    assert f"config.stages.finetune.start: the run {tmp_path}/other does not exist" in error


def test_a_plan_whose_data_is_refused_still_tells_what_it_has_not_checked(config, tmp_path, capsys):
    (tmp_path / "texts" / "task-train.jsonl").unlink()
    command = ["plan", f"--config={config}", f"--workdir={tmp_path}/run", "--stages=finetune"]
    assert main(command) == 2
    out, error = capsys.readouterr()
    assert "finetune: hand-off not checked: posttrain has to be trained first" in out
    assert "task-train.jsonl" in error


def test_device_hours_are_devices_times_hours_and_cost_their_price():
    totals = [Total("a", 10, 2e6, 3e15, (3600.0, 7200.0)), Total("b", 5, 1e6, 1e15, (1.0, 1.0))]
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(totals_table(totals, devices=8, price=2.5))
    rows = [re.split(r"\s{2,}", line.strip()) for line in console.export_text().splitlines()]
    assert rows[0] == ["stage", "steps", "tokens", "FLOPs", "time", "device-hours", "price"]
    assert rows[1] == ["a", "10", "2.00M", "3.00P", "1h 00m to 2h 00m", "8.00 to 16.0", "20.00 to 40.00"]
    assert rows[2] == ["b", "5", "1.00M", "1.00P", "1.00 s", "0.002", "0.01"]
    assert rows[3][:3] == ["all", "15", "3.00M"] and rows[3][-1] == "20.01 to 40.01"


@pytest.mark.parametrize(
    ("form", "value", "text"),
    [
        (units.seconds, 4.28e-7, "428 ns"),
        (units.seconds, 1.234e-5, "12.3 µs"),
        (units.seconds, 0.3456, "346 ms"),
        (units.seconds, 0.9999, "1.00 s"),
        (units.seconds, 125, "2m 05s"),
        (units.seconds, 0, "0 ns"),
        (units.bytes_text, 31_100, "31.1 kB"),
        (units.bytes_text, 12, "12 B"),
        (units.memory_text, 256, "256 B"),
        (units.memory_text, 3 * 2**29, "1.50 GiB"),
    ],
)  # fmt: skip
def test_figures_of_any_size_are_readable(form, value, text):
    assert form(value) == text
