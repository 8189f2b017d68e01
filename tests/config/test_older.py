"""Configs of older versions, which lack the fields that have come since, and have some that are gone."""

import json

import pytest

from llm3.config import load as configfile
from llm3.config.older import with_new_fields
from llm3.config.schema import EvaluationConfig, RunConfig, as_dict
from llm3.errors import UserError
from llm3.files import RECORD, write_json
from llm3.stages import workdir
from llm3.stages.evaluated import changes, definition
from tests.helpers import tiny_run as tiny

FIELDS = [  # of each kind of section: plain, with a list, in a section of a section, a whole section, that may be None
    *("model.rope_scaling", "model.rope_theta", "tokenizer.sources", "sources.general.delimiter"),
    *("stage.optimizer.ema", "stage.optimizer.options", "stage.optimizer.learning_rates", "stage.seed", "stage.start"),
    *("stage.guard", "stage.adapters", "evaluations.domain.options"),
]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    directory = tmp_path_factory.mktemp("older")
    return str(tiny.write_config(directory / "config.py", directory))


def without(record, path):
    """A copy of a record that lacks a field."""
    copy = json.loads(json.dumps(record))
    *sections, name = path.split(".")
    inner = copy
    for each in sections:
        inner = inner[each]
    del inner[name]
    return copy


@pytest.mark.parametrize("field", FIELDS)
def test_a_stage_resumes_though_its_record_lacks_a_field_that_has_its_default(tmp_path, file, field):
    config = configfile.load(file, ["stages.pretrain.best=domain_bits_per_byte"])
    write_json(tmp_path / "pretrain" / RECORD, without(workdir.stage_record(config, "pretrain"), field))
    workdir.check_record(tmp_path, config, "pretrain")


def test_a_stage_resumes_though_its_record_has_a_field_that_is_gone_and_changed_no_result(tmp_path, file):
    config = configfile.load(file)
    record = json.loads(json.dumps(workdir.stage_record(config, "pretrain")))
    record["model"]["logit_chunk"] = 256
    write_json(tmp_path / "pretrain" / RECORD, record)
    workdir.check_record(tmp_path, config, "pretrain")


@pytest.mark.parametrize(
    ("field", "override", "line"),
    [
        ("model.rope_theta", "model.rope_theta=5.0", "model.rope_theta: saved None, now 5.0"),
        ("stage.optimizer.ema", "stages.pretrain.optimizer.ema=0.5", "stage.optimizer.ema: saved None, now 0.5"),
        ("stage.guard", "stages.pretrain.guard.window=9", "stage.guard: saved None, now"),
        ("stage.steps", "seed=0", "stage.steps: saved None, now 10"),  # it has no default
    ],
)
def test_a_field_that_the_record_lacks_is_a_difference_if_it_is_set(tmp_path, file, field, override, line):
    config = configfile.load(file, [override])
    write_json(tmp_path / "pretrain" / RECORD, without(workdir.stage_record(config, "pretrain"), field))
    with pytest.raises(UserError, match=line):
        workdir.check_record(tmp_path, config, "pretrain")


def test_an_evaluation_is_not_run_again_for_a_field_that_has_come_since(file):
    now = {"config": definition(configfile.load(file), "general")}
    saved = {"config": without(without(now["config"], "evaluation.options"), "source.delimiter"), "data": None}
    assert changes(saved, now) is None
    now["config"]["evaluation"]["options"] = {"x": 1}
    assert changes(saved, now) == ["evaluation.options: saved None, now {'x': 1}"]


def test_every_field_of_a_run_with_a_default_may_be_lacking(file):
    now = json.loads(json.dumps(as_dict(configfile.load(file))))
    bare = {"evaluations": {"general": {}}, "stages": {}}
    filled = with_new_fields(bare, now, RunConfig)
    assert {"seed", "trackers", "mesh", "samples"} <= filled.keys() and "model" not in filled
    defaults = json.loads(json.dumps(as_dict(EvaluationConfig(kind="perplexity"))))
    lacking = {key for key, value in now["evaluations"]["general"].items() if value != defaults[key]} | {"kind"}
    assert filled["evaluations"]["general"].keys() == defaults.keys() - lacking
