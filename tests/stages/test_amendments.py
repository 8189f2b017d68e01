"""Amendments: what may change, from which step on, and what is set aside."""

import json
import types

import pytest

from llm3.__main__ import main
from llm3.config import load as configfile
from llm3.errors import UserError
from llm3.files import RECORD, ROW, write_json
from llm3.stages import amend, workdir
from llm3.stages.amendments import Amendment, history, with_amendments
from llm3.stages.mixture_schedule import schedule_of_history
from llm3.stages.records import read_amendments, read_record
from llm3.stages.stage import plan_stage
from tests.helpers import tiny_run as tiny

STEPS = "stages.pretrain.steps"
RATE = "stages.pretrain.optimizer.learning_rate"


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    directory = tmp_path_factory.mktemp("amendments")
    return str(tiny.write_config(directory / "config.py", directory))


@pytest.fixture
def begun(tmp_path, file):
    """The directory of a run whose pretrain stage has the checkpoints 4 and 8."""
    write_json(tmp_path / "pretrain" / RECORD, workdir.stage_record(configfile.load(file), "pretrain"))
    for step in (4, 8):
        (tmp_path / "pretrain" / "checkpoints" / str(step)).mkdir(parents=True)
    return tmp_path


def amended(begun, file, *overrides, why="why", from_step=None):
    """Plan an amendment and write it; returns the config and the amendment."""
    config = configfile.load(file, overrides)
    plan = amend.planned(begun, config, "pretrain", why, from_step)
    if plan:
        amend.apply(begun, config, {"pretrain": plan})
    return config, plan


@pytest.fixture(autouse=True)
def no_metadata(monkeypatch):
    """The checkpoints here are empty folders."""
    monkeypatch.setattr(amend, "_check_continues", lambda *_: None)


def test_a_change_without_a_reason_is_refused_and_names_the_values_and_the_flag(capsys, begun, file):
    before = tiny.files(begun)
    command = ["run", f"--config={file}", f"--workdir={begun}", f"--config.{STEPS}=20", f"--config.{RATE}=0.5"]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "stage.steps: saved 10, now 20" in error and "learning_rate: saved 0.01, now 0.5" in error
    assert "from step 8 on" in error and "--amend=" in error and tiny.files(begun) == before


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("model.d_ff=64", "model.d_ff"),
        ("seed=1", "seed"),
        ("stages.pretrain.objective=mlm", "stage.objective"),
        ("stages.pretrain.optimizer.name=lion", "stage.optimizer.name"),
        ("sources.general.max_documents=3", "sources.general.max_documents"),
    ],
)
def test_a_fixed_field_is_refused_with_the_way_to_branch(begun, file, override, field):
    with pytest.raises(UserError) as error:
        amended(begun, file, override, f"{STEPS}=20")
    said = str(error.value)
    assert f"{field} cannot change" in said and "4, 8" in said
    assert f"start=dict(run={str(begun)!r}, stage='pretrain', step=8)" in said
    assert ("start=dict(stage=" in said) == field.startswith("stage.")


def test_an_amendment_is_recorded_and_the_same_command_again_resumes(begun, file):
    config, plan = amended(begun, file, f"{STEPS}=20", f"{RATE}=0.5", why="more")
    assert (plan.step, plan.why) == (8, "more") and "steps 10 -> 20" in plan.line
    assert plan.changes == [
        {"field": "stage.optimizer.learning_rate", "saved": 0.01, "now": 0.5},
        {"field": "stage.steps", "saved": 10, "now": 20},
    ]
    assert read_amendments(begun, "pretrain") == [plan]
    for why in ("", "more"):
        assert amend.planned(begun, config, "pretrain", why) is None
    assert [own.steps for _, own in plan_stage(config, "pretrain", begun).history] == [10, 20]


def test_each_step_has_the_config_of_its_time(file):
    now = configfile.load(file, [f"{STEPS}=30", f"{RATE}=0.5"]).stages["pretrain"]
    rate = {"field": "stage.optimizer.learning_rate", "saved": 0.1, "now": 0.5}
    twice = [
        Amendment(4, "", "", [{"field": "stage.steps", "saved": 10, "now": 20}]),
        Amendment(8, "", "", [{"field": "stage.steps", "saved": 20, "now": 25}]),
        Amendment(8, "", "", [{"field": "stage.steps", "saved": 25, "now": 30}, rate]),
    ]
    found = history(now, twice, "config.stages.pretrain")
    assert [(step, own.steps, own.optimizer.learning_rate) for step, own in found] == [
        (0, 10, 0.1),
        (4, 20, 0.1),
        (8, 30, 0.5),
    ]
    assert history(now, [Amendment(0, "", "", [rate])], "") == [(0, now)]


def test_a_field_that_the_record_did_not_have_had_its_default(file):
    now = configfile.load(file, ["stages.pretrain.skip_steps=[[9, 10]]"]).stages["pretrain"]
    skipping = Amendment(8, "", "", [{"field": "stage.skip_steps", "saved": None, "now": [[9, 10]]}])
    assert [own.skip_steps for _, own in history(now, [skipping], "")] == [[], [[9, 10]]]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([f"{STEPS}=8"], "expected more steps"),
        (["stages.pretrain.skip_steps=[[8, 9]]"], "step 8 is trained already"),
        (["stages.pretrain.data={'general': 1.0, 'domain': 1.0}"], "the tokenizer is trained on these sources"),
    ],
)
def test_an_amendment_that_the_steps_before_it_contradict_is_refused(begun, file, overrides, message):
    before = tiny.files(begun)
    with pytest.raises(UserError, match=message):
        amended(begun, file, *overrides)
    assert tiny.files(begun) == before


def test_steps_to_skip_are_recorded_beside_those_skipped_before(begun, file):
    skips = "stages.pretrain.skip_steps"
    for overrides, line in (([f"{skips}=[[9, 10]]"], "skip_steps [] -> [[9, 10]]"), ([], "skip_steps [[9, 10]] -> []")):
        config, plan = amended(begun, file, *overrides)
        assert line in plan.line and amend.planned(begun, config, "pretrain") is None
        assert plan_stage(config, "pretrain", begun).history[0][1].skip_steps == []


def test_going_back_sets_aside_what_came_later_and_is_done_once(begun, file):
    amended(begun, file, f"{RATE}=0.5", why="first")
    (begun / "pretrain" / ROW).write_text("{}")
    (begun / "pretrain" / "metrics.jsonl").write_text("lines")
    config, plan = amended(begun, file, f"{RATE}=0.2", why="spike", from_step=4)
    assert (plan.step, plan.back_from) == (4, 8) and "back from step 8" in plan.line
    assert plan.changes == [{"field": "stage.optimizer.learning_rate", "saved": 0.01, "now": 0.2}]
    assert read_amendments(begun, "pretrain") == [plan], "the one after step 8 is set aside too"
    aside = begun / "pretrain" / "set_aside" / "1"
    assert (aside / "checkpoints" / "8").is_dir() and (aside / ROW).read_text() == "{}"
    assert (aside / "metrics.jsonl").read_text() == "lines"
    assert json.loads((aside / RECORD).read_text())["amendments"][0]["why"] == "first"
    assert [each.name for each in (begun / "pretrain" / "checkpoints").iterdir()] == ["4"]
    assert not (begun / "pretrain" / ROW).exists()
    (begun / "pretrain" / "checkpoints" / "8").mkdir()  # trained again
    assert amend.planned(begun, config, "pretrain", "spike", from_step=4) is None
    assert amend.planned(begun, config, "pretrain", "another spike", from_step=4).back_from == 8


def test_going_back_needs_a_kept_step_a_reason_and_one_stage(begun, file):
    for options, message in (
        ({"from_step": 6}, "holds the steps 4, 8"),
        ({"from_step": 4, "why": ""}, "expected --amend="),
    ):
        with pytest.raises(UserError, match=message):
            amended(begun, file, **options)
    (begun / "posttrain" / "checkpoints" / "4").mkdir(parents=True)
    with pytest.raises(UserError, match="pretrain, posttrain have checkpoints: expected --stages=NAME"):
        amend.stage_to_go_back(begun, ["pretrain", "posttrain"], 4)
    assert amend.stage_to_go_back(begun, ["pretrain"], 4) == "pretrain"


def test_a_stage_that_was_trained_from_what_would_change_is_named(begun, file):
    (begun / "posttrain" / "checkpoints" / "4").mkdir(parents=True)
    config = configfile.load(file)
    with pytest.raises(UserError, match="posttrain was trained from 'pretrain'"):
        amend.check_children(begun, config, ["pretrain"], ["pretrain", "posttrain"])
    amend.check_children(begun, config, ["pretrain"], ["pretrain"])


def test_the_mixture_changes_at_an_amendment_of_the_data_and_at_no_other(file):
    library = types.SimpleNamespace(
        configs={"general", "domain"}, cache=lambda source, _: types.SimpleNamespace(tokens=100)
    )
    later = ["stages.posttrain.data_schedule=[[3, {'domain': 1.0}], [6, {'general': 1.0}]]"]
    config = configfile.load(file, later)
    plain, other = configfile.load(file).stages["posttrain"], config.stages["posttrain"]
    both = {"domain": 0.9, "general": 0.1}
    assert schedule_of_history(config, "posttrain", library, [(0, other), (5, other)]) == [
        (0, both),
        (3, {"domain": 1.0}),
        (6, {"general": 1.0}),
    ]
    assert schedule_of_history(config, "posttrain", library, [(0, plain), (5, other)]) == [
        (0, both),
        (5, {"domain": 1.0}),
        (6, {"general": 1.0}),
    ]
    assert schedule_of_history(config, "posttrain", library, [(0, other), (5, plain)])[1:] == [
        (3, {"domain": 1.0}),
        (5, both),
    ]


def test_a_stage_replays_the_data_of_its_parent_as_it_was_when_it_began(file):
    library = types.SimpleNamespace(
        configs={"general", "domain"}, cache=lambda source, _: types.SimpleNamespace(tokens=100)
    )
    changed = configfile.load(file, ["stages.posttrain.replay=0.5", "stages.pretrain.data={'domain': 1.0}"])
    own, before = changed.stages["posttrain"], {"general": 1.0}
    (_, then), (_, now) = (
        schedule_of_history(changed, "posttrain", library, [(0, own)], replayed)[0] for replayed in (before, None)
    )
    assert then == pytest.approx({"domain": 0.45, "general": 0.55})
    assert now == pytest.approx({"domain": 0.95, "general": 0.05})


def test_an_amendment_keeps_what_the_record_knows_of_the_parents_data(begun, file):
    record = workdir.stage_record(configfile.load(file), "pretrain")
    write_json(begun / "pretrain" / RECORD, record | {"replayed": {"general": 1.0}, "evaluated": {"domain": "ab"}})
    amended(begun, file, f"{STEPS}=20")
    found = read_record(begun, "pretrain")
    assert (found["replayed"], found["evaluated"]) == ({"general": 1.0}, {"domain": "ab"})


def test_records_of_unamended_stages_are_as_they_were(file):
    record = workdir.stage_record(configfile.load(file), "pretrain")
    assert with_amendments(record, []) == record and "skip_steps" not in record["stage"]
