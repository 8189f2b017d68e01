"""The stages of other configs in a workdir, beside those of the config at hand."""

import shutil
from dataclasses import replace

from llm3.config import load as configfile
from llm3.files import ROW, write_json
from llm3.stages.beside import with_stages_beside
from llm3.stages.workdir import stage_record
from tests.helpers import tiny_run as tiny


def test_a_report_has_the_finished_stages_of_other_configs_too(tmp_path):
    config = configfile.load(str(tiny.write_config(tmp_path / "config.py", tmp_path)))
    more = replace(config, stages=config.stages | {"other": config.stages["finetune"]})
    for name in ("pretrain", "other"):
        write_json(tmp_path / name / "config.json", stage_record(more, name))
        write_json(tmp_path / name / ROW, {"stage": name})
    shutil.copytree(tmp_path / "other", tmp_path / "other.old")
    assert [*with_stages_beside(config, tmp_path).stages] == [*tiny.STAGES, "other"]
    write_json(tmp_path / "other" / "config.json", stage_record(more, "finetune") | {"stage": {"start": "gone"}})
    assert [*with_stages_beside(config, tmp_path).stages] == [*tiny.STAGES]
