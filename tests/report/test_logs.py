"""What TensorBoard shows of a stage, read back from the records of its event files."""

import json
import math
import time

import numpy as np
from tensorboardX.proto.api_pb2 import Status
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

from llm3.report.logs import MetricsWriter, read_metrics
from tests.helpers.tiny_events import events, scalars


def test_a_new_start_leaves_no_metrics_of_an_older_run(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(10, {"loss": 1.0})
    (file,) = tmp_path.glob("events.*")
    file.rename(tmp_path / "events.out.tfevents.1")  # files are named by the second
    with MetricsWriter(tmp_path) as writer:
        writer.write(10, {"loss": 2.0})
    assert read_metrics(tmp_path) == [{"step": 10, "loss": 2.0}]
    assert scalars(tmp_path) == [(10, "train/loss", 2.0)]


def test_a_stage_that_resumes_without_the_lines_up_to_its_step_says_so(tmp_path):
    said = []
    with MetricsWriter(tmp_path) as writer:
        writer.write(4, {"loss": 1.0})
    for resume_step in (4, 6):
        MetricsWriter(tmp_path, resume_step, say=said.append).close()
    assert said == [f"{tmp_path / 'metrics.jsonl'}: the lines after step 4, up to step 6, are lost"]


def test_scalars_have_grouped_tags_and_flat_names_in_the_file(tmp_path):
    line = {"loss": 2.5, "mfu": None, "learning_rate": 0.5, "step_seconds": 0.25, "accuracy": 0.75}
    with MetricsWriter(tmp_path) as writer:
        writer.write(10, line)
        writer.write(10, {"domain_bits_per_byte": 1.5, "loss": 1.25}, group="eval")
    assert scalars(tmp_path) == [
        (10, "train/loss", 2.5),
        (10, "optim/learning_rate", 0.5),
        (10, "speed/step_seconds", 0.25),
        (10, "train/accuracy", 0.75),
        (10, "eval/domain_bits_per_byte", 1.5),
        (10, "eval/loss", 1.25),
    ]
    assert read_metrics(tmp_path) == [{"step": 10, **line}, {"step": 10, "domain_bits_per_byte": 1.5, "loss": 1.25}]


def plugin_data(directory):
    """{tag: content} of the events of the HParams tab."""
    return {
        value.tag: HParamsPluginData.FromString(value.metadata.plugin_data.content)
        for _, value in events(directory)
        if value.metadata.plugin_data.plugin_name == "hparams"
    }


def test_texts_and_hyperparameters_are_there(tmp_path):
    config = {"steps": 10, "optimizer": {"name": "adamw", "ema": 0.5, "options": {}}, "seed": None, "train": ["lora"]}
    with MetricsWriter(tmp_path, config=config) as writer:
        writer.samples(10, [("Once", "*upon*"), ("a", "time")])
    texts = {
        (step, value.tag): value.tensor.string_val[0].decode()
        for step, value in events(tmp_path)
        if value.metadata.plugin_data.plugin_name == "text"
    }
    assert texts[10, "samples/text_summary"] == "**Once**\n\n*upon*\n\n---\n\n**a**\n\ntime"
    assert json.loads(texts[0, "config/text_summary"].removeprefix("```json").removesuffix("```")) == config
    plugin = plugin_data(tmp_path)
    found = plugin["_hparams_/session_start_info"].session_start_info.hparams
    assert set(found) == {"steps", "optimizer.name", "optimizer.ema", "train"}
    assert found["steps"].number_value == 10 and found["optimizer.name"].string_value == "adamw"
    assert found["train"].string_value == '["lora"]'
    assert len(plugin) == 1, "no experiment: that of one stage would hide the fields and metrics of the others"


def test_the_row_of_a_stage_ends_its_session_with_its_metrics_and_its_cost(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1e9)  # files are named by the second
    row = {"stage": "a", "task_accuracy": 0.75, "task_items": 8, "domain_bits_per_byte": np.float32(1.5), "tokens": 640}
    with MetricsWriter(tmp_path, config={"steps": 10}) as writer:
        writer.write(10, {"loss": 2.0})
    assert "_hparams_/session_end_info" not in plugin_data(tmp_path)
    with MetricsWriter(tmp_path, resume_step=10, config={"steps": 10}) as writer:
        writer.result(10, row | {"domain_nll": math.nan, "flops": None, "chain": {"tokens": 1}})
    found = {tag: (step, value) for step, tag, value in scalars(tmp_path)}
    assert found == {
        "train/loss": (10, 2.0),
        "final/task_accuracy": (10, 0.75),
        "final/domain_bits_per_byte": (10, 1.5),
        "final/tokens": (10, 640.0),
    }
    plugin = plugin_data(tmp_path)
    assert set(plugin) == {"_hparams_/session_start_info", "_hparams_/session_end_info"}
    assert plugin["_hparams_/session_end_info"].session_end_info.status == Status.Value("STATUS_SUCCESS")
    assert read_metrics(tmp_path) == [{"step": 10, "loss": 2.0}], "the row has a file of its own"
