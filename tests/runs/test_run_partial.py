"""Partial tuning in whole runs: what trains, what stays as it was, what is saved, and that no death changes it."""

import re
import shutil
import types

import jax
import numpy as np
import pytest
from flax import nnx

from llm3.__main__ import main
from llm3.checkpoints.load import load_stage
from llm3.checkpoints.stage_checkpoints import BASE, Checkpoints
from llm3.models.quantized import NF4
from llm3.models.transformer import abstract
from llm3.segments import canonical_path, segmented
from llm3.tree import flatten, leaf_digests, params_digest
from tests.helpers import tiny_run as tiny

pytestmark = pytest.mark.slow

STAGES = """c.model.compute_dtype = "bfloat16"
c.evaluations = dict(general=c.evaluations.general)
fit = dict(c.stages.finetune.to_dict(), seed=0, steps=8, save_every=3)
start = lambda stage, *fresh, **more: dict(stage=stage, fresh=["head/.*", *fresh], **more)
rates = dict(ema=0.5, l2_sp=0.1, layer_decay=0.8, learning_rates=[["head/.*", 3.0]])
x, y = dict(rank=2, dora=True, dropout=0.1), dict(rank=3, targets=["query", "down"])
slow = dict(learning_rate=0.05, warmup_steps=8)
some = dict(
    fit, start=start("nf4", drop=[".*/lora/.*"]), steps=50, save_every=20, frozen="float32",
    train=["layers[1]/attention/.*", "norms", "head/.*"],
)
c.stages = dict(
    pretrain=dict(c.stages.pretrain.to_dict(), steps=4),
    gradual=dict(
        fit, start=start("pretrain"), frozen="int8", train="head/.*", unfreeze=[[4, "top(1)"]],
        optimizer=dict(fit["optimizer"], **rates),
    ),
    nf4=dict(
        fit, start=start("pretrain", ".*/lora/x/.*"), frozen="nf4", adapters=dict(x=x), train=["lora", "head/.*"],
        optimizer=slow, best="general_bits_per_byte",
    ),
    again=dict(
        fit, start=dict(stage="nf4", step="best"), frozen="nf4", adapters=dict(x=x), train=["lora", "head/.*"],
        optimizer=slow,
    ),
    second=dict(
        fit, start=start("nf4", ".*/lora/y/.*"), adapters=dict(x=dict(x, active=False), y=y),
        train=["lora(y)", "head/.*"],
    ),
    float32=some,
    compute=dict(some, frozen="compute"),
)
"""

POINTS = (("saving_base", ""), ("saved", ":4"), ("saving", ":8"), ("row", ""))


def checkpoints(workdir, stage) -> Checkpoints:
    return Checkpoints(workdir / stage / "checkpoints", read_only=True)


def leaves(workdir, stage, step=None) -> dict[str, np.ndarray]:
    """{canonical path: array} of a step, by default the last one."""
    found = checkpoints(workdir, stage)
    return flatten(found.load_params(found.latest() if step is None else step))


def first_leaves(workdir, stage) -> dict[str, np.ndarray]:
    """{canonical path: array} of what a stage began with."""
    return flatten(checkpoints(workdir, stage).base())


def equal(some: dict, others: dict, paths) -> bool:
    return all(some[path].tobytes() == others[path].tobytes() for path in paths)


def kernels(paths) -> list[str]:
    """The kernels of the layers among some paths."""
    return [path for path in paths if path.startswith("layers/") and path.endswith("/kernel")]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    directory = tmp_path_factory.mktemp("partial")
    tiny.write_texts(directory / "texts")
    return directory


@pytest.fixture(scope="module")
def whole(base):
    """An uninterrupted run; once "nf4" and what starts from a partial checkpoint of it are trained, without its base.

    From then on it is evaluated, sampled from and handed over without that base.
    """
    config, workdir = tiny.write_config(base / "config.py", base, STAGES), base / "whole"
    common = (f"--config={config}", f"--workdir={workdir}")
    tiny.process(("run", *common, "--stages=pretrain,gradual,nf4,again"))
    hidden = base / "hidden"
    (workdir / "nf4" / "base").rename(hidden)
    done = tiny.process(
        ("run", *common),
        ("eval", *common, "--stages=nf4"),
        ("generate", common[1], "--stage=nf4", "--prompt=The president", "--max_tokens=1"),
        ("plan", *common, "--stages=gradual,nf4"),
    )
    _, evaluated, generated, plan, _ = done.stdout.split(tiny.NEXT)
    hidden.rename(workdir / "nf4" / "base")
    said = {"evaluated": evaluated, "generated": generated, "plan": plan}
    return types.SimpleNamespace(base=base, config=config, workdir=workdir, common=common, **said)


@pytest.fixture(scope="module")
def killed(whole):
    """The same run, killed at every kind of point of "gradual", and started again each time."""
    workdir = whole.base / "killed"
    for name in ("init", "pretrain"):  # trained in one go: it is not what is killed
        shutil.copytree(whole.workdir / name, workdir / name)
    command = ("run", whole.common[0], f"--workdir={workdir}", "--config.stages.gradual.keep=9")
    deaths = [f"SIGKILL@{point}:gradual{step}" for point, step in POINTS]
    tiny.process((*command, "--stages=pretrain,gradual"), deaths=deaths)
    return workdir


def test_a_stage_that_is_killed_at_any_point_ends_bit_for_bit_as_if_it_had_not_been(whole, killed):
    """While a base is saved, after a partial save, between two phases, in the second, in the last save, at the row.

    Of 4-bit kernels and adapters with dropout: test_validation.py.
    """
    measured = {"seconds", "step_seconds", "full_step_seconds", "peak_bytes", "evaluation_seconds"}
    measured |= {"wall_seconds", "chain", "first_step_seconds"}
    for stage, row in tiny.rows(killed).items():
        expected = tiny.rows(whole.workdir)[stage]
        assert {key for key in row if row[key] != expected[key]} <= measured, stage
    found, expected = (checkpoints(each, "gradual").meta(8) for each in (killed, whole.workdir))
    assert found["opt_digests"] == expected["opt_digests"] and found["cost"]["tokens"] == expected["cost"]["tokens"]
    lines = [[line["step"] for line in tiny.metrics(each / "gradual")] for each in (killed, whole.workdir)]
    assert lines[0] == lines[1]


def test_no_save_and_no_resuming_touches_the_base(killed):
    base = [changed for changed, _ in tiny.files(killed / "gradual" / "base").values()]
    for step in (3, 4, 6, 8):
        saved = tiny.files(killed / "gradual" / "checkpoints" / str(step)).values()
        assert max(base) < min(changed for changed, _ in saved)


def test_checkpoints_on_the_way_hold_only_what_trains_and_the_last_one_is_complete(whole):
    for stage in ("gradual", "nf4", "float32"):
        found = checkpoints(whole.workdir, stage)
        *partial, last = found.steps()
        every = set(leaves(whole.workdir, "pretrain")) | {"head/bias", "head/kernel"}
        every |= {path for path in leaves(whole.workdir, stage) if "/lora/x/" in path}
        for step in partial:
            meta = found.meta(step)
            saved = set(meta["shapes"]["params"])
            assert meta[BASE] == params_digest(checkpoints(whole.workdir, stage).base()) and not meta["finished"]
            if stage == "nf4":
                trains = {path for path in every if "/lora/x/" in path or path.startswith("head/")}
                assert {canonical_path(path) for path in saved} == trains
            else:  # a part of the stack, and in the second phase
                assert {"head/bias", "head/kernel", "layers/1:2/attention/out/kernel"} <= saved
                assert not any(
                    path.startswith(("embed/", "layers/0:1/mlp/", "layers/0:1/attention/")) for path in saved
                )
            assert set(flatten(found.load_params(step))) == every
        assert set(found.meta(last)["shapes"]["params"]) == every and BASE not in found.meta(last)


def test_frozen_leaves_are_bit_identical_after_50_steps_with_weight_decay_and_every_chosen_one_has_changed(whole):
    parent, last = (checkpoints(whole.workdir, stage).meta(step) for stage, step in (("nf4", 8), ("float32", 50)))
    for path in ("embed/embedding", *(f"layers/mlp/{name}/kernel" for name in ("gate", "up", "down"))):
        assert last["digests"][path] == parent["digests"][path]
    before, after = first_leaves(whole.workdir, "float32"), leaves(whole.workdir, "float32")
    for path in ("query", "key", "value", "out"):
        path = f"layers/attention/{path}/kernel"
        assert before[path][0].tobytes() == after[path][0].tobytes()
        assert last["digests"][path] != parent["digests"][path] and np.all(before[path][1] != after[path][1])
    trained = ("head/bias", "head/kernel", "final_norm/scale", "layers/attention_norm/scale", "layers/mlp_norm/scale")
    for path in trained:
        assert np.any(before[path] != after[path], axis=-1).all()


def test_storing_frozen_leaves_in_the_compute_dtype_changes_no_result(whole):
    rows = tiny.rows(whole.workdir)
    assert rows["compute"]["params_digest"] == rows["float32"]["params_digest"]
    assert rows["compute"]["general_bits_per_byte"] == rows["float32"]["general_bits_per_byte"]
    # what is frozen of it but the norms, all of which train
    frozen = rows["float32"]["params"] - rows["float32"]["trainable_params"]
    assert rows["float32"]["param_bytes"] - rows["compute"]["param_bytes"] == 2 * frozen


def test_the_last_checkpoint_needs_no_base_for_eval_generate_and_a_child(whole):
    """And eval gives the figures of the row: what was computed with 4-bit kernels is what was saved."""
    row = tiny.rows(whole.workdir)["nf4"]
    line = next(line for line in whole.evaluated.splitlines() if line.startswith("nf4 "))
    assert f"{row['general_bits_per_byte']:.3f}" in line
    assert "The president" in whole.generated
    assert checkpoints(whole.workdir, "second").meta(8)["parent"]["params_digest"] == row["params_digest"]


def test_a_child_starts_from_the_best_step_also_where_that_is_a_partial_checkpoint(whole):
    found = checkpoints(whole.workdir, "nf4")
    figures = {step: found.meta(step)["scored"]["value"] for step in found.steps()}
    best = min(figures, key=figures.get)
    assert best < found.latest() and BASE in found.meta(best)
    assert checkpoints(whole.workdir, "again").meta(8)["parent"]["step"] == best
    start, theirs = first_leaves(whole.workdir, "again"), leaves(whole.workdir, "nf4", best)
    assert start.keys() == theirs.keys() and equal(start, theirs, start)
    assert not equal(start, leaves(whole.workdir, "nf4"), [path for path in start if "/lora/" in path])


def test_kernels_that_were_computed_in_4_bits_are_saved_as_just_that(whole):
    after, parent = leaves(whole.workdir, "nf4"), leaves(whole.workdir, "pretrain")
    chosen = kernels(after)
    assert len(chosen) == 7
    for path in chosen:
        inputs = 2 if path.endswith("/out/kernel") else 1  # one block, for no axis here is longer than 64
        scales = np.abs(after[path]).max(axis=inputs, keepdims=True)
        assert np.isin(after[path][..., None], NF4 * scales[..., None]).all()
        columns = np.moveaxis(after[path], inputs, -1).reshape(-1, after[path].shape[inputs])
        assert all(np.isin(column, NF4 * np.abs(column).max()).all() for column in columns)
        np.testing.assert_array_equal(scales, np.abs(parent[path]).max(axis=inputs, keepdims=True))
        assert not np.array_equal(after[path], parent[path])
    assert equal(after, parent, ["embed/embedding", "final_norm/scale"])
    assert equal(leaves(whole.workdir, "again"), after, chosen)


def test_magnitudes_begin_as_the_norms_of_the_kernels_that_are_computed_with(whole):
    start = first_leaves(whole.workdir, "nf4")
    for path in kernels(start):
        inputs = (1, 2) if path.endswith("/out/kernel") else (1,)
        norms = np.sqrt(np.square(start[path].astype(np.float64)).sum(axis=inputs))
        np.testing.assert_allclose(start[path.replace("kernel", "lora/x/magnitude")], norms, rtol=1e-6)


def test_leaves_begin_to_train_when_they_are_unfrozen_from_the_values_they_were_computed_with(whole):
    before, after = first_leaves(whole.workdir, "gradual"), leaves(whole.workdir, "gradual")
    parent = leaves(whole.workdir, "pretrain")
    for path in kernels(before):
        assert before[path][0].tobytes() == after[path][0].tobytes() and np.any(before[path][1] != after[path][1])
        step = np.abs(parent[path]).max() / 127
        assert 0 < np.abs(before[path] - parent[path]).max() <= 0.51 * step
    steps = checkpoints(whole.workdir, "gradual")
    assert set(steps.meta(6)["shapes"]["params"]) > {"head/bias", "head/kernel", "final_norm/scale"}
    assert steps.meta(8)["opt_digests"].keys() == steps.meta(6)["opt_digests"].keys()


def test_the_result_of_a_stage_with_a_running_mean_is_the_mean_and_the_raw_weights_are_kept_to_go_on(whole):
    def held(meta: dict, part: str) -> dict[str, str]:
        """{segmented path: digest} of a part of the optimizer's state."""
        found = {path.partition(part)[2]: digest for path, digest in meta["opt_digests"].items() if part in path}
        return {path: digest for path, digest in found.items() if path}

    steps = checkpoints(whole.workdir, "gradual")
    means, raw = held(steps.meta(6), "average/"), held(steps.meta(6), "trainable/")
    saved = steps.meta(6)["digests"]
    assert means == saved and raw.keys() == saved.keys()
    assert all(raw[path] != saved[path] for path in saved)
    means, last = held(steps.meta(8), "average/"), leaves(whole.workdir, "gradual")
    pieces = {f"layers/1:2{path[6:]}": leaf[1:2] for path, leaf in last.items() if path.startswith("layers/")}
    assert {path: leaf_digests({path: leaf})[path] for path, leaf in (last | pieces).items() if path in means} == means


def test_a_second_adapter_trains_beside_a_first_one_that_stays_as_it_was(whole):
    parent, child = (checkpoints(whole.workdir, stage).meta(8)["digests"] for stage in ("nf4", "second"))
    assert set(parent) == {path for path in child if "/lora/y/" not in path}
    changed = {path for path in parent if child[path] != parent[path]}
    assert changed == {"head/bias", "head/kernel"}
    y = {path: leaf for path, leaf in leaves(whole.workdir, "second").items() if "/lora/y/" in path}
    assert {path.split("/")[2] for path in y} == {"query", "down"} and all(np.any(leaf) for leaf in y.values())


def test_a_model_does_not_depend_on_an_adapter_that_is_not_active(whole):
    params, model, _ = load_stage(whole.workdir, "second")
    graph, tokens = abstract(model).graph, np.arange(8, dtype=np.int32)[None]

    @jax.jit
    def hidden(params):
        return nnx.merge(graph, segmented(params, ((0, model.layers),)))(tokens, tokens, np.ones_like(tokens))[0]

    def without(name: str) -> np.ndarray:
        return np.asarray(
            hidden(jax.tree_util.tree_map_with_path(lambda at, x: 0 * x if name in str(at) else x, params))
        )

    np.testing.assert_array_equal(without("'x'"), hidden(params))
    assert not np.array_equal(without("'y'"), hidden(params))


def test_plan_shows_each_phase_and_what_a_step_of_it_takes_beside_full_training(whole):
    gradual, nf4 = whole.plan.split("\nnf4: ")
    first, then = gradual.split("\ngradual: ")[1:]
    assert first.startswith("train='head/.*'\n") and then.startswith("train='head/.*', and ['top(1)'] from step 4\n")
    assert "layers 1" not in first and then.count("layers 1") == 9
    assert all(" 4 steps" in phase and "of full training's" in phase for phase in (first, then))
    lines = {line.split()[0]: line.split() for line in nf4.splitlines() if line.strip()}
    assert lines["layers/mlp/up/kernel"][-5] == "no" and lines["layers/mlp/up/lora/x/magnitude"][-5] == "yes"
    assert nf4.count("of full training's") == 4 and "FLOPs per token: forward" in nf4


def test_the_matrix_says_what_a_step_takes_beside_full_training(whole):
    rows = tiny.rows(whole.workdir)
    for stage, row in rows.items():
        if stage == "init":
            continue
        trainable = row["trainable_params"]
        assert row["gradient_bytes"] == 4 * trainable and row["step_seconds"] > 0 and row["temp_bytes"] > 0
        # two moments, and counters of Adam, schedule and ema; ema holds a copy, and l2_sp one of all but the head
        moments = (lambda size: 4 * size - 4 * 34) if stage == "gradual" else lambda size: 2 * size
        assert 0 <= row["moment_bytes"] - moments(row["gradient_bytes"]) <= 24
        assert 0 <= row["full_moment_bytes"] - moments(row["full_gradient_bytes"]) <= 24
        assert row["forward_flops_per_token"] > 0
        share = (row["forward_flops_per_token"] + row["backward_flops_per_token"]) / row["full_flops_per_token"]
        assert share == 1 if stage == "pretrain" else share < 1
    assert rows["nf4"]["param_bytes"] < rows["compute"]["param_bytes"] < rows["float32"]["param_bytes"]


ADAPTED = dict(adapters=dict(x=dict(rank=2)), start=dict(stage="pretrain", fresh=["head/.*", ".*/lora/x/.*"]))
KEPT = dict(rank=2, dora=True)
OVER = dict(stage="nf4", fresh=["head/.*"])
REFUSED = {
    "a rule for an adapter that is not active": (
        dict(start=OVER, adapters=dict(x=dict(KEPT, active=False)), train="lora(x)"),
        "train rule 'lora(x)' matches nothing",
    ),
    "steps out of order": (dict(unfreeze=[[3, "top(1)"], [2, "all"]]), "unfreeze: step 2: expected ascending steps"),
    "a step beyond the last": (dict(unfreeze=[[8, "top(1)"]]), "before the 8 steps"),
    "a step that adds nothing": (dict(unfreeze=[[3, "head/bias"]]), "unfreeze at step 3: 'head/bias' adds nothing"),
    "a rate for nothing": (dict(optimizer=dict(learning_rates=[["haed/.*", 2.0]])), "'haed/.*' matches nothing"),
    "a misspelt target": (dict(ADAPTED, adapters=dict(x=dict(targets=["quary"]))), "did you mean 'query'"),
    "rank 0": (dict(ADAPTED, adapters=dict(x=dict(rank=0))), "rank=0: expected at least 1"),
    "DoRA beside another": (
        dict(ADAPTED, adapters=dict(x=dict(dora=True), z=dict(targets=["query"]))),
        "2 are active on 'query'; expected only one with DoRA",
    ),
    "adapters of a pretraining": (
        dict(kind="pretrain", start=None, objective="causal", train="all", adapters=dict(x=dict(rank=2))),
        "a pretrain stage trains 'all' of the plain model",
    ),
    "another alpha": (
        dict(start=OVER, adapters=dict(x=dict(KEPT, alpha=3.0)), train="lora"),
        "the parent's adapter 'x' has alpha=16.0, this stage's 3.0",
    ),
    "a lost adapter": (
        dict(start=OVER),
        "drop=['.*/lora/x/.*']",
    ),
    "a step that rests on a lost base": (
        dict(start=dict(OVER, step=6), adapters=dict(x=KEPT), train="lora"),
        "nf4/base/0, the base of step 6, is missing",
    ),
}


@pytest.fixture(scope="module")
def run_without_a_base(whole):
    """A copy of the stages to start from, without the base of "nf4"."""
    workdir = whole.base / "baseless"
    workdir.mkdir()
    for stage in ("pretrain", "nf4"):
        shutil.copytree(whole.workdir / stage, workdir / stage)
    shutil.rmtree(workdir / "nf4" / "base")
    return workdir


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_trained_is_refused_before_anything_is_written(
    case, whole, run_without_a_base, tmp_path, capsys
):
    changes, message = REFUSED[case]
    own = dict(start=dict(stage="pretrain", fresh=["head/.*"]), train="head/.*", steps=8) | changes
    if own["start"]:
        own["start"] = dict(own["start"], run=str(run_without_a_base))
    extra = f"""c.model.compute_dtype = "bfloat16"
c.tokenizer = dict(path="{whole.workdir / "tokenizer.json"}")
c.stages = dict(child=dict(c.stages.finetune.to_dict(), **{own!r}))"""
    config = tiny.write_config(tmp_path / "config.py", whole.base, extra)
    assert main(["run", f"--config={config}", f"--workdir={tmp_path / 'child'}"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "child").exists() or not tiny.files(tmp_path / "child")


def test_4_bit_kernels_need_an_even_number_of_inputs(whole, tmp_path, capsys):
    extra = """c.model.d_ff = 33
c.stages = dict(
    pretrain=c.stages.pretrain.to_dict(), child=dict(c.stages.posttrain.to_dict(), frozen="nf4", train="norms")
)"""
    config = tiny.write_config(tmp_path / "config.py", whole.base, extra)
    assert main(["run", f"--config={config}", f"--workdir={tmp_path / 'child'}"]) == 2
    assert "config.stages.child.frozen='nf4' packs two inputs a byte" in capsys.readouterr().err
    assert not tiny.files(tmp_path / "child")


def test_a_stage_begins_with_its_parents_leaves_and_what_is_frozen_of_them_ends_so(whole):
    """Layer 0 of the attention is frozen inside of a leaf that trains: no digest of the parent says so."""
    parent = leaves(whole.workdir, "nf4")
    for stage in ("float32", "compute"):
        begun, ended = first_leaves(whole.workdir, stage), leaves(whole.workdir, stage)
        loaded = {path for path in begun if not path.startswith("head/")}
        assert loaded == {path for path in parent if "/lora/" not in path and not path.startswith("head/")}
        for path in loaded:
            assert begun[path].tobytes() == parent[path].tobytes(), path
            if "/attention/" in path:
                assert ended[path][0].tobytes() == parent[path][0].tobytes(), path
            elif "norm" not in path:
                assert ended[path].tobytes() == parent[path].tobytes(), path


def test_adapters_over_a_quantised_base_train_in_float32_also_where_all_is_computed_in_bfloat16(whole):
    meta = checkpoints(whole.workdir, "nf4").meta(6)
    assert meta["model"]["compute_dtype"] == "bfloat16" and BASE in meta
    adapters = {path: dtype for path, (_, dtype) in meta["shapes"]["params"].items() if "/lora/" in path}
    moments = {path: dtype for path, (_, dtype) in meta["shapes"]["opt"].items() if "/lora/" in path}
    assert len(adapters) == 7 * 3 and set(adapters.values()) == {"float32"}
    assert len(moments) == 2 * len(adapters) and set(moments.values()) == {"float32"}
    # and their values are not those of bfloat16
    for path, leaf in leaves(whole.workdir, "nf4").items():
        if "/lora/" in path:
            assert np.any(leaf.view(np.uint32) & 0xFFFF), path


def test_lineage_reads_metadata_alone(whole, tmp_path, capsys):
    def chains(workdir) -> list[tuple[str, ...]]:
        assert main(["lineage", f"--workdir={workdir}"]) == 0
        return re.findall(r"/(\w+) step (\d+) \(.*parameters (\w{12})(.*)\)", capsys.readouterr().out)

    for meta in whole.workdir.glob("*/checkpoints/*/meta"):
        shutil.copytree(meta, tmp_path / meta.relative_to(whole.workdir))
    found = chains(tmp_path)
    assert found == chains(whole.workdir)
    assert [stage for stage, *_ in found].count("pretrain") == 7, "the first stage begins the chain of each"
