"""What a stage run costs, and what makes two of them one: the config alone, over a library that reads nothing."""

import copy
import functools
import json
import types

import pytest

from llm3.ablation import arms, costs, graph
from llm3.ablation.costs import Cost, Priced, StageCost
from llm3.config import load
from llm3.errors import UserError
from tests.helpers.tiny_ablation import BASE, FIT, SHAPE, ablation

PRICES = {"pretrain": 100.0, "posttrain": 60.0, "finetune": 7.0, "scratch": 10.0}  # of a step
MATCHED = {"arms": {"all": {}, "no domain": {"without": ["posttrain"], "adjust": "pretrain"}}, "match": "flops"}


class NoLibrary:
    """The fingerprints that sources would have, and a tokenizer."""

    template = ""
    tokenizer = types.SimpleNamespace(hash="tokens")

    def __init__(self, **fingerprints):
        self._fingerprints = fingerprints

    def cache(self, source, split):
        return types.SimpleNamespace(fingerprint=self._fingerprints.get(source, source))


class Prices:
    """Prices by `PRICES`, whatever a stage computes."""

    def price(self, variant, shared=()):
        config, names = arms.chain_config(variant.values, variant.stage), arms.chain(variant.values, variant.stage)
        found = {}
        for name in names:
            step = Cost(256.0, PRICES[name], None)
            found[name] = StageCost(step.times(config.stages[name].steps), step, name)
        parts = (found[name].total.times(1 / variant.shared_by if name in shared else 1) for name in names)
        return Priced(variant, config, names, NoLibrary(), found, sum(parts, Cost()))


def priced(config):
    return {each.variant.name: each for each in costs.price_all(arms.variants(config), config, Prices())}


def built(monkeypatch, config):
    monkeypatch.setattr(graph, "read_evaluation_data", lambda *_: {})
    return graph.build(list(priced(config).values()), config)


def digest(name="finetune", library=None, parent="posttrain-x", **changes):
    """The digest of a stage of BASE with changed fields, {"stages__finetune__steps": 9}."""
    values = copy.deepcopy(BASE)
    for field, value in changes.items():
        load.assign(load.RunConfig, values, field.replace("__", "."), value, "config")
    return graph.node_digest(arms.chain_config(values, "finetune"), name, parent, library or NoLibrary())


def test_an_adjusted_arm_costs_as_much_as_the_reference():
    config = ablation(**MATCHED)
    both = priced(config)
    assert both["no domain"].adjusted == ("pretrain", 5, 8)  # 5 * 60 FLOPs are 3 steps of 100
    assert both["no domain"].budget.flops == both["all"].budget.flops == 835
    assert costs.difference(both["no domain"], both["all"], "flops") == 0
    assert costs.difference(both["all"], both["all"], "") is None


def test_an_arm_that_is_not_adjusted_says_how_much_it_differs():
    both = priced(ablation(arms={"all": {}, "no domain": {"without": ["posttrain"]}}, match="tokens"))
    assert costs.difference(both["no domain"], both["all"], "tokens") == pytest.approx(-1 / 3)


def test_arms_are_adjusted_to_the_reference_at_their_own_point_of_the_grid():
    found = priced(ablation(**MATCHED, grid={"stages.posttrain.steps": [5, 50]}))
    assert found["no domain, steps=5"].adjusted == ("pretrain", 5, 8)
    assert found["no domain, steps=50"].adjusted == ("pretrain", 5, 35)


def test_what_is_shared_counts_in_parts():
    """A pretraining that ten tasks share costs each a tenth; the arm that adjusts it buys ten times as many steps."""
    fields = MATCHED | {"shared": ["pretrain"], "grid": {"shared_by": [1, 10]}}
    found = priced(ablation(**fields))
    assert found["all, shared by=10"].budget.flops == 5 * 100 / 10 + 5 * 60 + 5 * 7
    assert found["no domain, shared by=10"].adjusted == ("pretrain", 5, 35)
    excess = costs.difference(found["no domain, shared by=10"], found["all, shared by=10"], "flops")
    assert abs(excess) < costs.EQUAL


def test_no_number_of_steps_makes_a_dearer_arm_equal():
    dear = {"change": {"stages.pretrain.steps": 50}, "adjust": "finetune"}
    with pytest.raises(UserError, match="dear: without finetune it uses more flops than all"):
        priced(ablation(arms={"all": {}, "dear": dear}, match="flops"))


def test_equal_stage_runs_are_one_node_and_parents_come_first(monkeypatch):
    arms_of = {
        "all": {},
        "no domain": {"without": ["posttrain"]},
        "top": {"change": {"stages.finetune.train": "top(1)"}},
    }
    found = built(monkeypatch, ablation(arms=arms_of, seeds=[0, 1]))
    assert [each.stage for each in found.nodes.values()] == 2 * [
        "pretrain", "posttrain", "finetune", "finetune", "finetune"
    ]  # fmt: skip
    for (variant, seed), chain in found.chains.items():
        assert chain[0] == found.chains["all", seed][0]
        assert [found.nodes[name].parent for name in chain] == ["", *chain[:-1]]
        assert all((variant, seed) in found.nodes[name].uses for name in chain)
    before = [*found.nodes]
    assert all(node.parent in ["", *before[: before.index(name)]] for name, node in found.nodes.items())


def test_what_no_seed_changes_is_trained_once(monkeypatch):
    found = built(monkeypatch, ablation(seeds=[0, 1, 2], vary=["finetune"]))
    assert [each.stage for each in found.nodes.values()] == ["pretrain", "posttrain"] + 3 * ["finetune"]


def test_an_arm_or_a_seed_that_is_added_leaves_all_others_as_they_are(monkeypatch):
    few = built(monkeypatch, ablation(arms={"all": {}}, seeds=[0]))
    more = built(monkeypatch, ablation(arms={"new": {"without": ["pretrain"]}, "all": {}}, seeds=[4, 0]))
    assert set(few.nodes) < set(more.nodes) and few.chains["all", 0] == more.chains["all", 0]


@pytest.mark.parametrize(
    "changes",
    [
        {"stages__finetune__steps": 6},
        {"stages__finetune__seed": 1},
        {"stages__finetune__order_seed": 1},
        {"stages__finetune__train": "top(1)"},
        {"stages__finetune__unfreeze": [[2, "all"]]},
        {"stages__finetune__start": {"stage": "posttrain", "fresh": ["head/.*", "embed/.*"]}},
        {"stages__finetune__start": {"stage": "posttrain", "fresh": ["head/.*"], "step": 4}},
        {"model__layers": 3},
        {"library": NoLibrary(task="other rows")},
        {"parent": "posttrain-0123456789"},
    ],
)
def test_whatever_decides_a_result_is_in_its_digest(changes):
    assert digest(**changes) != digest()


@pytest.mark.parametrize(
    "changes",
    [
        {"stages__finetune__save_every": 2},
        {"stages__finetune__keep": 3},
        {"stages__finetune__log_every": 1},
        {"stages__finetune__eval_every": 2},
        {"stages__pretrain__steps": 9},  # of the parent, whose digest is another one
        {"sources__task__path": "elsewhere"},  # as long as its content is the same
        {"sources__general__max_documents": 3},
        {"evaluations__task__max_documents": 3},
        {"hang_seconds": 5.0},
    ],
)
def test_what_decides_no_result_is_not(changes):
    assert digest(**changes) == digest()


@pytest.mark.parametrize(("step", "equal"), [("best", False), (2, False), ("latest", True)])
def test_which_steps_are_kept_counts_for_a_child_that_starts_from_one_of_them(step, equal):
    start = {"stages__finetune__start": {"stage": "posttrain", "fresh": ["head/.*"], "step": step}}
    of = functools.partial(digest, "posttrain", parent="pretrain-x")
    kept = {"stages__posttrain__eval_every": 2, "stages__posttrain__save_every": 2}
    assert (of(**start) == of(**start, **kept)) == equal


def test_a_start_of_another_run_counts_by_its_parameters_not_by_its_place(monkeypatch):
    values = copy.deepcopy(BASE)
    del values["stages"]["pretrain"]

    def of(run, params_digest):
        found = types.SimpleNamespace(meta={"params_digest": params_digest})
        monkeypatch.setattr(graph, "find_checkpoint", lambda *_: found)
        values["stages"]["posttrain"] |= {"start": {"run": run, "stage": "general"}, "replay": 0.0}
        return graph.node_digest(arms.chain_config(values, "posttrain"), "posttrain", "", NoLibrary())

    assert of("runs/a", "1") == of("/elsewhere/b", "1") != of("runs/a", "2")


def test_the_folder_of_a_stage_run_names_its_parents_folder_wherever_the_ablation_is(monkeypatch, tmp_path):
    saved = types.SimpleNamespace(tokenizer=types.SimpleNamespace(save=lambda path: path.touch()))
    found = built(monkeypatch, ablation(seeds=[0]))
    node = next(each for each in found.nodes.values() if each.stage == "finetune")
    for place in ("one", "moved"):
        folder = graph.write_node(tmp_path / place, node, saved)
        [stage] = json.loads((folder / "node.json").read_text())["stages"].values()
        assert stage["start"] == {
            "run": f"{tmp_path / place}/runs/{node.parent}",
            "stage": "posttrain",
            "fresh": ["head/.*"],
        }
        assert load.read(load.values(str(folder / "node.json"))).stages["finetune"].seed == 0


def test_a_stage_run_whose_evaluation_has_changed_is_not_finished(monkeypatch, tmp_path):
    before, after = (
        built(monkeypatch, ablation(seeds=[0], change={"evaluations.task.sequence_length": length})).nodes
        for length in (32, 64)
    )
    assert [*before] == [*after]
    name = next(each for each in before if each.startswith("finetune"))
    folder = graph.directory(tmp_path, name) / "finetune"
    assert graph.row_of(tmp_path, before[name]) is None
    folder.mkdir(parents=True)
    row = {
        "stage": "finetune",
        "evaluations": {key: {"digest": "", **own} for key, own in before[name].evaluations.items()},
    }
    (folder / "evaluation.json").write_text(json.dumps(row))
    assert graph.row_of(tmp_path, before[name]) == row
    assert graph.row_of(tmp_path, after[name]) is None


def test_stages_of_an_arm_of_its_own_are_nodes_too(monkeypatch):
    joint = {"joint": {"kind": "pretrain", "data": {"general": 0.5, "domain": 0.5}, **SHAPE}}
    labels = {"finetune": {"start": {"stage": "joint", "fresh": ["head/.*"]}, **FIT}}
    monkeypatch.setitem(PRICES, "joint", 100.0)
    found = built(monkeypatch, ablation(arms={"all": {}, "joint": {"stages": joint | labels}}, seeds=[0]))
    assert [name.rpartition("-")[0] for name in found.chains["joint", 0]] == ["joint", "finetune"]
    assert len(found.nodes) == 5
