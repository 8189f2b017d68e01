"""Which evaluations of a row are those of the config: their definitions, their data, and what is shown of them."""

import json

import pytest

from llm3.config import load as configfile
from llm3.config.schema import as_dict
from llm3.files import RECORD, ROW, write_json
from llm3.stages import evaluated, workdir
from llm3.stages.later import outdated
from tests.helpers import tiny_run as tiny


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    """read(*overrides): the config of a tiny run."""
    directory = tmp_path_factory.mktemp("evaluated")
    file = str(tiny.write_config(directory / "config.py", directory))
    return lambda *overrides: configfile.load(file, list(overrides))


def entries_of(config, **data: str) -> evaluated.Entries:
    return {
        name: evaluated.entry(evaluated.definition(config, name), data.get(name, "old data"), {"nll": "lower"})
        for name in config.evaluations
    }


ROW_OF = {"stage": "pretrain", "general_bits_per_byte": 2.0, "domain_bits_per_byte": 3.0, "task_accuracy": None}


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("evaluations.general.max_documents=8", "evaluation.max_documents: saved 4, now 8"),
        ("evaluations.general.sequence_length=16", "evaluation.sequence_length: saved 32, now 16"),
        ("sources.general.text='body'", "source.text: saved 'text', now 'body'"),
        ("sources.general.validation_share=0.5", "source.validation_share: saved 0.0, now 0.5"),
    ],
)
def test_a_changed_definition_is_named_field_by_field(read, override, line):
    saved, now = entries_of(read())["general"], entries_of(read(override))["general"]
    assert evaluated.changes(saved, now) == [line]


def test_the_batch_size_and_other_evaluations_do_not_matter(read):
    saved = entries_of(read())["general"]
    now = entries_of(read("evaluations.general.batch_size=2", "evaluations.domain.max_documents=1"))["general"]
    assert evaluated.changes(saved, now) is None and saved["digest"] == now["digest"]


def test_changed_data_is_named_where_both_are_known(read):
    saved, now = entries_of(read())["general"], entries_of(read(), general="new data")["general"]
    assert evaluated.changes(saved, now) == ["data: saved old data, now new data"]
    assert saved["digest"] != now["digest"]
    assert evaluated.changes(saved | {"data": None}, now) is None
    assert evaluated.changes(saved, {"config": now["config"]}) is None
    assert evaluated.changes(None, now) == []


def test_equal_digests_are_of_equal_data_wherever_its_files_are(read):
    here = entries_of(read())["general"]
    moved = entries_of(read("sources.general.data_files='moved/*.jsonl'"))["general"]
    assert here["digest"] == moved["digest"]
    assert entries_of(read("evaluations.general.sequence_length=16"))["general"]["digest"] != here["digest"]


def test_rows_of_an_older_version_are_accepted_where_the_record_has_the_same_definition(read, tmp_path):
    config = read()
    record = workdir.stage_record(config, "pretrain")
    write_json(tmp_path / "pretrain" / RECORD, record | _old(config))
    write_json(tmp_path / "pretrain" / ROW, ROW_OF)
    workdir.check_record(tmp_path, config, "pretrain")
    assert outdated(tmp_path, ["pretrain", "posttrain"], entries_of(config)) == {}
    changed = read("evaluations.general.max_documents=8", "evaluations.task.max_documents=2")
    workdir.check_record(tmp_path, changed, "pretrain")
    assert outdated(tmp_path, ["pretrain"], entries_of(changed)) == {
        "pretrain": {
            "general": ["evaluation.max_documents: saved 4, now 8"],
            "task": ["evaluation.max_documents: saved 0, now 2"],
        }
    }


def _old(config) -> dict:
    """The part of a record of an older version that later versions leave out."""
    return json.loads(json.dumps({key: as_dict(config)[key] for key in ("evaluations", "sources")}))


def test_only_what_was_measured_as_the_config_says_is_shown_and_the_rest_is_kept(read, tmp_path):
    row = ROW_OF | {"task_accuracy": 0.75, "task_majority_accuracy": 0.5, "domain_majority_accuracy": 0.25, "tokens": 9}
    row |= {"majority_accuracy": None, "evaluations": entries_of(read())}
    details = {"task_per_class": {}, "domain_by_tag": {}}
    config = read("evaluations.domain.max_documents=8")
    shown, own = evaluated.current(tmp_path, row, details, entries_of(config))
    assert "domain_bits_per_byte" not in shown and own == {"task_per_class": {}}
    assert shown["general_bits_per_byte"] == 2.0 and shown["tokens"] == 9 and shown["majority_accuracy"] == 0.5
    assert shown["evaluation_digests"].keys() == {"general", "task"} and "evaluations" not in shown
    alone = {"general": entries_of(config)["general"]}
    assert "task_accuracy" not in evaluated.current(tmp_path, row, None, alone)[0]


def test_a_key_belongs_to_the_evaluation_with_the_longest_name():
    names = ["task", "task_hard"]
    assert evaluated.owner("task_hard_accuracy", names) == "task_hard" and evaluated.owner("task_f1", names) == "task"
    assert evaluated.owner("tokens", names) is None
    assert evaluated.without({"task_f1": 1, "task_hard_f1": 2, "tokens": 3}, ["task"], names) == {
        "task_hard_f1": 2, "tokens": 3,
    }  # fmt: skip
