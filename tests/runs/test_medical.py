"""The configs on partial fine-tuning: fair comparisons, rules that train what they say, and runs on real text."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from llm3.config import load as configfile
from llm3.data.sources import split as sources
from llm3.errors import UserError
from llm3.handoff.account import account_for
from llm3.handoff.start import read_start
from llm3.models.transformer import abstract
from llm3.optim.partition import make_partition
from llm3.segments import canonical
from llm3.stages import rules
from llm3.tree import flatten
from tests.helpers import tiny_run

ROOT = Path(__file__).parents[2]
MEDICAL, PROBE = (str(ROOT / "configs" / f"{name}.py") for name in ("medical", "probe_then_finetune"))
METHODS = ("biases", "full", "lora", "middle2", "qlora", "top2")


def small(config, stage):
    """The model of a stage, made small; one that fine-tunes has a head of 5 classes."""
    return dataclasses.replace(
        config.model,
        d_model=16,
        head_dim=4,
        d_ff=8,
        vocab_size=64,
        classes=5 if stage.kind == "finetune" else 0,
        adapters=tuple(stage.adapters.items()),
        compute_dtype="float32",
    )


def leaves_of(config, name):
    """{canonical path: shape} of the model of a stage."""
    shapes = canonical(abstract(small(config, config.stages[name])).shapes)
    return {path: leaf.shape for path, leaf in flatten(shapes).items()}


def handed_over(config, name):
    """(the leaves of a stage's model that its parent has not, what the hand-off makes of every leaf)."""
    start = read_start(config.stages[name].start, Path("run"), name)
    model, before = leaves_of(config, name), leaves_of(config, start.stage)
    return model.keys() - before.keys(), account_for(model, before, start, name)


def trained(stage):
    """{path: (how many of its parameters train, how many it has)} of a stage of the medical config, made small."""
    model = small(configfile.load(MEDICAL), stage)
    shapes = canonical(abstract(model).shapes)
    part = make_partition(shapes, stage.train, model.layers)
    chosen = dict.fromkeys(flatten(shapes), 0)
    for path, leaf in flatten(abstract(model, part.segments).shapes).items():
        if path in part.trainable:
            whole = "/".join(each for each in path.split("/") if ":" not in each)
            chosen[whole] += int(np.prod(leaf.shape))
    return {path: (chosen[path], int(np.prod(leaf.shape))) for path, leaf in flatten(shapes).items()}


@pytest.fixture(scope="module")
def medical():
    return configfile.load(MEDICAL)


def test_each_method_is_fitted_with_three_seeds_from_the_same_parent(medical):
    order = rules.check(medical)
    assert order[:2] == ["pretrain", "posttrain"]
    assert sorted(order[2:]) == [f"{method}_{seed}" for method in METHODS for seed in range(3)]
    for method in METHODS:
        first, *others = (medical.stages[f"{method}_{seed}"] for seed in range(3))
        assert (first.seed, first.start["stage"]) == (0, "posttrain")
        assert [dataclasses.replace(each, seed=0) for each in others] == [first, first]
        assert [each.seed for each in others] == [1, 2]


def test_the_methods_differ_only_in_what_trains_how_it_is_stored_and_the_rate(medical):
    full = medical.stages["full_0"]
    for method in METHODS:
        stage = medical.stages[f"{method}_0"]
        same = dataclasses.replace(
            stage,
            train=full.train,
            adapters=full.adapters,
            frozen=full.frozen,
            start=full.start,
            optimizer=dataclasses.replace(stage.optimizer, learning_rate=full.optimizer.learning_rate),
        )
        assert same == full, method


def test_the_rules_train_what_the_methods_are_named_after(medical):
    parts = {method: trained(medical.stages[f"{method}_0"]) for method in METHODS}
    shares = {method: {path: some / whole for path, (some, whole) in part.items()} for method, part in parts.items()}
    assert set(shares["full"].values()) == {1.0}
    for method, share in shares.items():
        assert (share["head/kernel"], share["head/bias"]) == (1.0, 1.0), method
    for method in ("top2", "middle2"):
        inside = {share for path, share in shares[method].items() if path.startswith("layers/")}
        assert inside == {2 / 6}, method
        assert shares[method]["embed/embedding"] == 0
    biases = {path for path, share in shares["biases"].items() if share and not path.startswith("head/")}
    assert biases
    assert all(path.endswith("/bias") for path in biases)
    for method in ("lora", "qlora"):
        found = {path for path, share in shares[method].items() if share and not path.startswith("head/")}
        assert found
        assert all("/lora/types/" in path for path in found)
    sizes = {method: sum(some for some, _ in part.values()) for method, part in parts.items()}
    assert sizes["lora"] == sizes["qlora"]
    assert sizes["top2"] > sizes["middle2"], "the final norm trains with the top"


@pytest.mark.parametrize("method", METHODS)
def test_new_leaves_are_the_head_and_the_adapters_and_all_others_are_the_parents(medical, method):
    new, account = handed_over(medical, f"{method}_0")
    assert set(account.fresh) == new and not account.dropped
    assert set(account.loaded) == leaves_of(medical, "posttrain").keys()
    assert {"head/bias", "head/kernel"} <= new
    assert (len(new) > 2) == ("lora" in method) and all("/lora/types/" in path for path in new if "head" not in path)


def test_only_the_last_figures_see_the_test_split(medical, tmp_path):
    """No text of it is trained on, is in another evaluation, or chooses a step."""

    def texts(name, split):
        source = sources.use_local_copy(medical.sources[name], str(tiny_run.DATA))
        return set(sources.open_split(source, split, cache_dir=tmp_path).texts())

    trained_on = {name for stage in medical.stages.values() for name in stage.data}
    assert trained_on == {"general", "medquad", "task"}
    seen = set().union(*(texts(name, "train") for name in trained_on))
    seen |= set().union(*(texts(e.source, e.split) for name, e in medical.evaluations.items() if name != "task"))
    judged = texts(medical.evaluations["task"].source, medical.evaluations["task"].split)
    assert len(judged) == 34 and len(seen) > 140 and not judged & seen
    assert not any(stage.best for stage in medical.stages.values())


def test_a_probe_comes_before_full_fine_tuning_which_keeps_its_head():
    config = configfile.load(PROBE)
    assert rules.check(config) == ["pretrain", "posttrain", "probe", "finetune", "direct"]
    probe, tuned, direct = (config.stages[name] for name in ("probe", "finetune", "direct"))
    assert (probe.train, tuned.train) == (["head/.*"], "all")
    head = {"head/bias", "head/kernel"}
    for name in ("probe", "direct"):
        new, account = handed_over(config, name)
        assert set(account.fresh) == new == head
    new, account = handed_over(config, "finetune")
    assert (new, account.fresh, account.dropped) == (set(), (), ()) and head < set(account.loaded)
    assert tuned.optimizer.learning_rate < probe.optimizer.learning_rate
    assert tuned.optimizer.learning_rate < direct.optimizer.learning_rate
    assert direct.steps == probe.steps + tuned.steps
    quickstart = configfile.load(str(ROOT / "configs" / "quickstart.py"))
    for name in ("pretrain", "posttrain"):
        assert dataclasses.replace(config.stages[name], save_every=100) == quickstart.stages[name]


def test_the_medical_texts_are_named_where_they_are_missing(medical, tmp_path):
    with pytest.raises(UserError, match=r"config\.data_dir=.*medical/medquad/train\.jsonl does not exist"):
        sources.use_local_copy(medical.sources["task"], str(tmp_path))


@pytest.mark.slow
def test_a_few_steps_on_the_real_texts_say_what_an_adapter_saves(tmp_path):
    names = ("pretrain", "lora_0")
    small = {
        "data_dir": tiny_run.DATA,
        "tokenizer.vocab_size": 300,
        "model.layers": 2,
        "model.scan_unroll": 1,
        "model.d_model": 16,
        "model.d_ff": 16,
        **{f"sources.{name}.max_documents": 150 for name in ("general", "medquad")},
        **{
            f"evaluations.{name}.{field}": 4
            for name in ("general", "domain")
            for field in ("max_documents", "batch_size")
        },
        **{f"stages.{name}.batch_size": 4 for name in names},
        **{f"stages.{name}.steps": 2 for name in names},
        **{f"stages.{name}.optimizer.warmup_steps": 1 for name in names},
        "stages.lora_0.start.stage": "pretrain",
    }
    overrides = [f"--config.{field}={value}" for field, value in small.items()]
    run = ["run", f"--config={MEDICAL}", f"--workdir={tmp_path / 'run'}", f"--stages={','.join(names)}"]
    tiny_run.process([*run, *overrides])
    row = tiny_run.rows(tmp_path / "run")["lora_0"]
    assert (row["parent"], row["seed"], row["task_items"]) == ("pretrain", 0, 34)
    assert row["gradient_bytes"] < row["full_gradient_bytes"]
    assert "## Cost of a step" in (tmp_path / "run" / "report.md").read_text(encoding="utf-8")
