"""Arms, grids and seeds: pure functions of a config's fields."""

import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm3.ablation import arms
from llm3.ablation.schema import ArmConfig
from llm3.errors import UserError
from llm3.stages import rules
from tests.helpers.tiny_ablation import BASE, FIT, ablation


def found(**fields) -> dict[str, arms.Variant]:
    return {each.name: each for each in arms.variants(ablation(**fields))}


def starts(values) -> dict:
    return {name: stage.get("start") for name, stage in values["stages"].items()}


def test_without_a_stage_its_children_start_from_its_parent():
    values = found(arms={"no domain": {"without": ["posttrain"]}})["no domain"].values
    fresh = {"stage": "pretrain", "fresh": ["head/.*"]}
    assert starts(values) == {"pretrain": None, "finetune": fresh, "scratch": "init"}


def test_without_a_first_stage_text_becomes_pretraining_and_labels_a_baseline():
    values = found(arms={"domain only": {"without": ["pretrain"]}})["domain only"].values
    assert values["stages"]["posttrain"] == BASE["stages"]["posttrain"] | {
        "kind": "pretrain",
        "start": None,
        "replay": 0.0,
    }
    values = found(arms={"scratch": {"without": ["posttrain", "pretrain"]}})["scratch"].values
    assert values["stages"]["finetune"] == {**FIT, "start": "init", "baseline": True}
    rules.check(arms.chain_config(values, "finetune"))


@given(st.permutations(["pretrain", "posttrain"]))
def test_the_order_in_which_stages_are_left_out_does_not_matter(order):
    [one] = arms.variants(ablation(arms={"a": {"without": order}}))
    [other] = arms.variants(ablation(arms={"a": {"without": ["pretrain", "posttrain"]}}))
    assert one.values["stages"]["finetune"]["start"] == other.values["stages"]["finetune"]["start"] == "init"


def test_a_stage_left_out_hands_on_its_own_start_with_its_step():
    base = copy.deepcopy(BASE)
    base["stages"]["posttrain"]["start"] = {"run": "other", "stage": "general", "step": 40}
    del base["stages"]["pretrain"]
    arms.leave_out(base["stages"], "posttrain", "here")
    moved = {"run": "other", "stage": "general", "step": 40, "fresh": ["head/.*"]}
    assert base["stages"]["finetune"]["start"] == moved


def test_the_tokenizer_is_the_same_in_an_arm_without_pretraining():
    both = found(arms={"all": {}, "domain only": {"without": ["pretrain"]}})
    assert [each.values["tokenizer"]["sources"] for each in both.values()] == [["general"]] * 2


def test_the_last_stage_that_is_no_baseline_counts_unless_the_config_names_another():
    assert found(arms={"all": {}})["all"].stage == "finetune"
    assert found(arms={"all": {"stage": "scratch"}})["all"].stage == "scratch"
    assert found(arms={"all": {}}, stage="posttrain", metric="x")["all"].stage == "posttrain"
    only = {"stages": {"labels": {**FIT, "start": "init", "baseline": True}}}
    assert found(arms={"all": {}, "scratch": only})["scratch"].stage == "labels"


def test_a_chain_is_the_counted_stage_with_its_ancestors():
    values = found()["base"].values
    assert arms.chain(values, "finetune") == ["pretrain", "posttrain", "finetune"]
    assert arms.chain(values, "scratch") == ["scratch"]
    assert [*arms.chain_config(values, "posttrain").stages] == ["pretrain", "posttrain"]


def test_changes_apply_in_the_order_base_arm_grid():
    field = "stages.finetune.steps"
    all_of_them = found(change={field: 10}, arms={"a": {}, "b": {"change": {field: 20}}}, grid={field: [30, 40]})
    assert [*all_of_them] == ["a, steps=30", "a, steps=40", "b, steps=30", "b, steps=40"]
    assert [each.values["stages"]["finetune"]["steps"] for each in all_of_them.values()] == [30, 40, 30, 40]
    both = found(change={field: 10}, arms={"a": {}, "b": {"change": {field: 20}}})
    assert [each.values["stages"]["finetune"]["steps"] for each in both.values()] == [10, 20]


def test_a_point_of_the_grid_has_a_value_of_every_axis():
    grid = {"stages.finetune.steps": [5, 6], "labels": {"few": {"sources.task.max_documents": 9}, "all": {}}}
    points = found(grid=grid)
    assert [*points] == [f"base, steps={steps}, labels={labels}" for steps in (5, 6) for labels in ("few", "all")]
    assert points["base, steps=6, labels=few"].cell == {"steps": "6", "labels": "few"}


def test_axes_that_end_in_the_same_word_keep_their_whole_names():
    points = found(grid={"stages.finetune.steps": [5, 6], "stages.pretrain.steps": [5, 6]})
    assert len(points) == 4 and "base, stages.finetune.steps=5, stages.pretrain.steps=6" in points


def test_a_field_of_a_stage_that_an_arm_leaves_out_does_not_apply_to_it():
    arms_of = {"all": {}, "no domain": {"without": ["posttrain"]}}
    points = found(arms=arms_of, grid={"stages.posttrain.steps": [5, 6]})
    assert points["no domain, steps=5"].values == points["no domain, steps=6"].values
    assert points["all, steps=6"].values["stages"]["posttrain"]["steps"] == 6


@given(seed=st.integers(0, 99), vary=st.lists(st.sampled_from(["pretrain", "finetune.init", "finetune.order"])))
def test_a_seed_changes_only_what_varies(seed, vary):
    stages = arms.seeded(BASE, seed, vary)["stages"]
    assert stages["pretrain"]["seed"] == (seed if "pretrain" in vary else 7)
    assert (stages["posttrain"]["seed"], stages["posttrain"]["order_seed"]) == (7, None)
    init, order = stages["finetune"]["seed"], stages["finetune"]["order_seed"]
    assert init == (seed if "finetune.init" in vary else 7)
    assert (init if order is None else order) == (seed if "finetune.order" in vary else 7)
    assert arms.seeded(arms.seeded(BASE, seed, vary), seed, vary)["stages"] == stages


def test_seeds_of_the_config_stay_where_the_ablation_varies_nothing():
    base = copy.deepcopy(BASE)
    base["stages"]["finetune"] |= {"seed": 3, "order_seed": 4}
    stages = arms.seeded(base, 9, ["finetune.init"])["stages"]
    assert (stages["finetune"]["seed"], stages["finetune"]["order_seed"]) == (9, 4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"arms": {"a": {"without": ["postrain"]}}}, "arms.a.without: no stage 'postrain'; did you mean 'posttrain'"),
        ({"arms": {"a": {"chnage": {}}}}, "arms.a.chnage: no such field; did you mean 'change'"),
        ({"arms": {"a": {"change": {"stages.finetune.stepz": 1}}}}, "arms.a.change.stages.finetune.stepz"),
        ({"arms": {"a": {"stage": "finetun"}}}, "arms.a: no stage 'finetun', whose row counts; did you mean"),
        ({"arms": {"a": {}, "b": {"adjust": "finetun"}}, "match": "flops"}, "arms.b.adjust='finetun': no such stage"),
        ({"arms": {"a": {"adjust": "finetune"}}, "match": "flops"}, "it is the arm that the others are held against"),
        ({"arms": {"a": {}, "b": {"adjust": "finetune"}}}, "arms.b.adjust='finetune': needs `match`"),
        ({"arms": {"a, b": {}}}, "'a, b' cannot be the name of an arm"),
        ({"arms": {"a": {"stages": {"finetune": FIT}, "without": ["x"]}}}, "arms.a.without: has no effect"),
        ({"grid": {"stages.finetune.stepz": [1]}}, "config.grid.stages.finetune.stepz"),
        ({"grid": {"stages.finetune.steps": [5, 5]}}, "expected different values"),
        ({"grid": {"shared_by": [1, 3]}}, "needs `shared`"),
        ({"seeds": [1, 1]}, "config.seeds=[1, 1]: expected different numbers"),
        ({"vary": ["finetune.orde"]}, "did you mean 'finetune.order'"),
        ({"match": "flop"}, "did you mean 'flops'"),
        ({"reference": "b", "arms": {"a": {}}}, "config.reference='b': no such arm"),
        ({"comparisons": {"x": {"ours": "a", "theirs": "c"}}, "arms": {"a": {}}}, "comparisons.x.theirs='c': no such"),
    ],
)
def test_a_wrong_field_is_named_with_the_nearest_right_one(fields, message):
    with pytest.raises(UserError) as error:
        arms.variants(ablation(**fields))
    assert message in str(error.value)


def test_changing_a_variant_changes_neither_the_base_nor_the_others():
    config = ablation(arms={"a": {}, "b": {}})
    first, second = arms.variants(config)
    first.values["stages"]["finetune"]["data"]["task"] = 2.0
    assert second.values["stages"]["finetune"]["data"] == config.base["stages"]["finetune"]["data"] == {"task": 1.0}
    assert ArmConfig() == config.arms["a"]
