"""A few steps of the configs that begin with a pretrained model, from tiny models of the same families."""

import json

import pytest

from llm3.__main__ import main
from tests.helpers import tiny_folder
from tests.helpers import tiny_run as tiny

pytestmark = pytest.mark.slow


def run(tmp_path, config: str, folder, stages: dict[str, int], evaluations: tuple[str, ...]) -> dict[str, dict]:
    """The rows of a run of some stages, for so many steps each, on the excerpts of real text."""
    short = [f"stages.{name}.steps={steps}" for name, steps in stages.items()]
    short += [f"stages.{name}.optimizer.warmup_steps=1" for name in stages]
    short += [f"evaluations.{name}.max_documents=4" for name in evaluations]
    command = ["run", f"--config=configs/{config}.py:{folder}", f"--workdir={tmp_path / 'run'}"]
    command += [f"--stages={','.join(stages)}", f"--config.data_dir={tiny.DATA}", "--config.mesh.data=1"]
    tiny.process([*command, *(f"--config.{each}" for each in short)])
    matrix = json.loads((tmp_path / "run" / "matrix.json").read_text())
    return {row["stage"]: row for row in matrix["rows"] + matrix["baselines"]}


def test_a_decoder_learns_a_domain_and_a_task_by_several_methods(tmp_path):
    folder = tiny_folder.write_folder(
        tmp_path / "model", tiny.documents(), num_hidden_layers=6, max_position_embeddings=512
    )
    stages = {"lora": 2, "top4": 2, "types_full": 1, "types_qlora": 1, "types_direct": 1}
    rows = run(tmp_path, "smollm2_medical", folder, stages, ("general", "domain", "task"))
    assert list(rows) == ["start", "top4", "types_full", "types_qlora", "lora", "types_direct"]
    parents = {name: row.get("parent") for name, row in rows.items()}
    assert parents == dict(start=None, top4="start", types_full="top4", types_qlora="top4") | dict.fromkeys(
        ("lora", "types_direct"), "start"
    )
    assert rows["lora"]["domain_bits_per_byte"] != rows["start"]["domain_bits_per_byte"]


def test_an_encoder_without_an_lm_head_gets_one_and_is_not_measured_by_it_before(tmp_path):
    folder = tiny_folder.write_bert(tmp_path / "model", tiny.documents())
    rows = run(
        tmp_path, "minilm_types", folder, {"posttrain": 2, "types_0": 1, "direct_0": 1}, ("domain", "types", "pubmedqa")
    )
    measured = {
        name: (row["domain_accuracy"] is not None, row["types_accuracy"] is not None) for name, row in rows.items()
    }
    assert measured == {
        "start": (False, False),
        "posttrain": (True, False),
        "types_0": (True, True),
        "direct_0": (False, True),
    }


def test_the_configs_for_gpus_are_planned_without_the_model(capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for config, stage in (("qwen3_0p6b_domain", "finetune"), ("llama3_8b_lora", "qlora")):
        command = ["plan", f"--config=configs/{config}.py:h100x8", "--topology=h100x8", f"--stages={stage}"]
        assert main(command) == 0
        assert f"{stage} on h100x8" in capsys.readouterr().out


def test_windows_longer_than_the_learned_positions_are_refused(capsys, tmp_path):
    folder = tiny_folder.write_bert(tmp_path / "model", tiny.documents())
    command = ["run", f"--config=configs/minilm_types.py:{folder}", f"--workdir={tmp_path / 'run'}"]
    assert main([*command, "--config.stages.posttrain.sequence_length=512", f"--config.data_dir={tiny.DATA}"]) == 2
    assert "config.stages.posttrain.sequence_length=512: the model has learned positions for at most 256" in (
        capsys.readouterr().err
    )
