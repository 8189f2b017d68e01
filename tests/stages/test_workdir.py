"""The directory of a run records one config per stage."""

import pytest

from llm3.__main__ import main
from llm3.config import load as configfile
from llm3.config.schema import GuardConfig, ModelConfig, OptimizerConfig, RunConfig, StageConfig
from llm3.errors import UserError
from llm3.files import RECORD, write_json
from llm3.stages import workdir
from tests.helpers import tiny_run as tiny


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    directory = tmp_path_factory.mktemp("workdir")
    return str(tiny.write_config(directory / "config.py", directory))


@pytest.fixture
def begun(tmp_path, file):
    """The directory of a run whose pretrain stage has begun."""
    record = workdir.stage_record(configfile.load(file), "pretrain")
    write_json(tmp_path / "pretrain" / RECORD, record)
    return tmp_path


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("stages.pretrain.steps=11", "stage.steps: saved 10, now 11"),
        ("model.d_ff=64", "model.d_ff: saved 32, now 64"),
        ("seed=1", "seed: saved 0, now 1"),
        ("tokenizer.vocab_size=301", "tokenizer.vocab_size: saved 300, now 301"),
        ("sources.general.max_documents=3", "sources.general.max_documents: saved 0, now 3"),
    ],
)
def test_a_directory_with_another_config_is_rejected_and_unchanged(capsys, begun, file, override, line):
    before = tiny.files(begun)
    assert main(["run", f"--config={file}", f"--workdir={begun}", f"--config.{override}"]) == 2
    error = capsys.readouterr().err
    assert "holds 'pretrain' with another config" in error and line in error and "--workdir" in error
    assert str(begun / "pretrain" / RECORD) in error
    assert tiny.files(begun) == before


def test_the_untrained_model_and_the_tokenizer_belong_to_one_config_too(capsys, tmp_path, file):
    config = configfile.load(file)
    write_json(tmp_path / "init" / RECORD, workdir.stage_record(config, "init"))
    changed = "--config.tokenizer.vocab_size=301"
    assert main(["run", f"--config={file}", f"--workdir={tmp_path}", "--stages=pretrain", changed]) == 2
    assert "holds 'init' with another config" in capsys.readouterr().err


@pytest.mark.parametrize(
    "override",
    [
        "stages.pretrain.save_every=5",
        "stages.pretrain.log_every=1",
        "stages.pretrain.keep=9",
        "stages.pretrain.eval_every=5",
        "stages.pretrain.best=general_bits_per_byte",
        "stages.finetune.steps=99",
        "mesh.fsdp=2",
        "sources.task.max_documents=9",
        "sources.domain.max_documents=9",  # of an evaluation, which is run again
        "evaluations.general.max_documents=9",
        "evaluations={}",
        "stages.pretrain.best=domain_bits_per_byte",
        "stages.pretrain.micro_batches=2",
        "stages.pretrain.guard.stop_after=3",
        "model.remat=full",
        "model.scan_unroll=2",
        "model.vocab_block=64",
        "model.attention=plain",
    ],
)
def test_fields_that_do_not_affect_a_stage_may_change_when_it_resumes(begun, file, override):
    workdir.check_record(begun, configfile.load(file, [override]), "pretrain")


def test_every_field_with_a_class_is_a_field_of_its_section_and_has_one_class():
    for kind in (RunConfig, ModelConfig, OptimizerConfig, GuardConfig, StageConfig):
        free, amendable = getattr(kind, "FREE", frozenset()), getattr(kind, "AMENDABLE", frozenset())
        assert free | amendable <= kind.__dataclass_fields__.keys() and not free & amendable


def test_the_evaluation_that_chooses_a_step_belongs_to_the_stage(tmp_path, file):
    best = "stages.pretrain.best=domain_bits_per_byte"
    write_json(tmp_path / "pretrain" / RECORD, workdir.stage_record(configfile.load(file, [best]), "pretrain"))
    for allowed in ("evaluations.general.max_documents=9", "stages.pretrain.best=''"):
        workdir.check_record(tmp_path, configfile.load(file, [best, allowed]), "pretrain")
    for refused, line in (
        ("evaluations.domain.max_documents=9", "evaluations.domain.max_documents: saved 4, now 9"),
        ("sources.domain.max_documents=9", "sources.domain.max_documents: saved 0, now 9"),
    ):
        with pytest.raises(UserError, match=line):
            workdir.check_record(tmp_path, configfile.load(file, [best, refused]), "pretrain")


def test_what_decides_where_a_stage_stops_early_must_not_change(begun, file):
    stops = ["stages.pretrain.eval_every=5", "stages.pretrain.best=general_bits_per_byte", "stages.pretrain.patience=2"]
    with pytest.raises(UserError, match=r"stage\.patience: saved None, now 2"):
        workdir.check_record(begun, configfile.load(file, stops), "pretrain")
    write_json(begun / "pretrain" / RECORD, workdir.stage_record(configfile.load(file, stops), "pretrain"))
    for field in ("eval_every=6", "eval_documents=3", "best=domain_bits_per_byte", "eval_names=['general']"):
        with pytest.raises(UserError, match=rf"stage\.{field.split('=')[0]}: saved"):
            workdir.check_record(begun, configfile.load(file, [*stops, f"stages.pretrain.{field}"]), "pretrain")
    workdir.check_record(begun, configfile.load(file, [*stops, "stages.pretrain.save_every=5"]), "pretrain")


def test_differences_name_the_field():
    before, now = {"a": {"b": 1, "c": 2}, "d": [1]}, {"a": {"b": 1, "c": 3}, "d": [2], "e": None}
    assert workdir.differences(before, now) == ["  a.c: saved 2, now 3", "  d: saved [1], now [2]"]


def test_a_stage_that_has_saved_nothing_may_find_its_parent_elsewhere(tmp_path, file):
    """As a stage run of an ablation whose folder was moved, or is named by another path, before the first save."""

    def config(run):
        start = f"stages.posttrain.start={{'run': {run!r}, 'stage': 'pretrain'}}"
        return configfile.load(file, [start, "stages.posttrain.data={'domain': 1.0}"])

    write_json(tmp_path / "posttrain" / RECORD, workdir.stage_record(config("here/run"), "posttrain"))
    workdir.check_record(tmp_path, config("/there/run"), "posttrain")
    (tmp_path / "posttrain" / "checkpoints" / "4").mkdir(parents=True)
    with pytest.raises(UserError, match="saved 'here/run', now '/there/run'"):
        workdir.check_record(tmp_path, config("/there/run"), "posttrain")
