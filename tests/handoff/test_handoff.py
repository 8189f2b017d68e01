"""Handoffs account for every leaf, on any mesh, in any dtype, with a longer vocabulary, from the best step."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm3.checkpoints.metadata import best_step, scored
from llm3.checkpoints.stage_checkpoints import Checkpoints
from llm3.distributed.sharding import tree_shardings
from llm3.errors import UserError
from llm3.files import CHECKPOINTS
from llm3.handoff import parent as handoff
from llm3.handoff.account import account_for, changes, check_function
from llm3.handoff.checkpoint import Checkpoint, find_checkpoint
from llm3.handoff.start import Start, read_start
from llm3.handoff.vocabulary import VocabularyChange
from llm3.models.transformer import abstract
from llm3.segments import canonical
from llm3.tree import flatten, map_with_path, unflatten
from tests.helpers import tiny
from tests.helpers.meshes import mesh_of

ADDED = 3  # 61 + 3 tokens can be cut in two, 61 cannot
NEW = VocabularyChange(known=tiny.VOCAB, added=ADDED)
MODEL = tiny.model_config(tie_embeddings=False, d_model=16, heads=4, kv_heads=2)
PARAMS = tiny.make_params(MODEL)
MESHES = {"one device": {}, "eight devices": {"data": 2, "fsdp": 2, "tensor": 2}}


def write_parent(run, params=PARAMS, step=10, **meta):
    """A finished checkpoint RUN/parent/checkpoints/STEP."""
    known = {"finished": True, "steps": step, "kind": "pretrain", "lineage": [], "tokenizer_hash": "old"}
    with Checkpoints(run / "parent" / CHECKPOINTS, keep=9) as checkpoints:
        checkpoints.save(step, params, {}, known | meta)


def start_of(run, step="latest", **rules) -> Start:
    return read_start({"run": str(run), "stage": "parent", "step": step, **rules}, run, "start")


def find(run, step="latest", **rules) -> Checkpoint:
    return find_checkpoint(start_of(run, step, **rules), "start")


def on_mesh(config, sizes, dtype=jnp.float32):
    """The canonical shapes of a model with their shardings on a mesh of fake devices."""
    whole = abstract(config)
    shapes, axes = canonical(whole.shapes), canonical(whole.axes)
    mesh = mesh_of(int(np.prod([*sizes.values()])), **sizes)
    shardings = tree_shardings(mesh, shapes, axes)
    return map_with_path(lambda _, x, to: jax.ShapeDtypeStruct(x.shape, dtype, sharding=to), shapes, shardings)


def place(params, like):
    return map_with_path(lambda _, leaf, to: jax.device_put(jnp.asarray(leaf, to.dtype), to.sharding), params, like)


def assert_same(found, expected):
    assert flatten(found).keys() == flatten(expected).keys()
    for path, leaf in flatten(found).items():
        np.testing.assert_array_equal(leaf, flatten(expected)[path], err_msg=path)


def test_every_leaf_is_loaded_fresh_or_dropped(tmp_path):
    begin = Start(tmp_path, "parent", "latest", fresh=("head/.*",), drop=("lm_head/.*",))
    model = {"embed/embedding": (3, 2), "head/kernel": (2, 4), "head/bias": (4,)}
    before = {"embed/embedding": (3, 2), "lm_head/kernel": (2, 3), "head/kernel": (2, 9), "head/bias": (9,)}
    account = account_for(model, before, begin, "start")
    assert account.loaded == ("embed/embedding",)
    assert account.fresh == ("head/bias", "head/kernel")
    assert account.dropped == ("head/bias", "head/kernel", "lm_head/kernel")
    assert account.extended == ()


def test_a_rule_matches_whole_paths(tmp_path):
    begin = Start(tmp_path, "parent", "latest", fresh=("head",), drop=())
    with pytest.raises(UserError, match="'head' matches no leaf"):
        account_for({"head/kernel": (2, 2)}, {}, begin, "start")


@pytest.mark.parametrize(("written", "read"), [MESHES, [*MESHES][::-1]])
def test_a_parent_loads_onto_another_mesh_bit_for_bit(tmp_path, written, read):
    config = tiny.model_config(vocab_size=64, tie_embeddings=False)
    params = tiny.make_params(config)
    write_parent(tmp_path, place(params, on_mesh(config, MESHES[written])))
    like = on_mesh(config, MESHES[read])
    loaded, account = handoff.load(find(tmp_path), like, "start")
    assert_same(loaded, params)
    assert all(leaf.sharding == flatten(like)[path].sharding for path, leaf in flatten(loaded).items())
    assert account.cast == {} and account.describe() == f"{len(flatten(params))} leaves loaded"


@pytest.mark.parametrize(("written", "read"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_a_parent_of_another_dtype_is_cast_and_the_account_records_it(tmp_path, written, read):
    some = {"layers/mlp/up/kernel", "final_norm/scale", "embed/embedding"}
    params = map_with_path(lambda path, leaf: leaf.astype(jnp.dtype(written)) if path in some else leaf, PARAMS)
    write_parent(tmp_path, params)
    like = map_with_path(lambda _, leaf: jax.ShapeDtypeStruct(leaf.shape, read), PARAMS)
    loaded, account = handoff.load(find(tmp_path), like, "start")
    assert_same(loaded, map_with_path(lambda _, leaf: leaf.astype(read), params))
    if written == "bfloat16":
        assert account.cast == dict.fromkeys(sorted(some), "bfloat16") == account.provenance()["cast"]
        assert account.describe() == f"{len(flatten(PARAMS))} leaves loaded; 3 leaves cast from bfloat16"
    else:
        assert account.cast.keys() == flatten(PARAMS).keys()


def test_a_cast_that_overflows_is_rejected(tmp_path):
    write_parent(tmp_path, map_with_path(lambda path, leaf: leaf * (1e6 if "gate" in path else 1), PARAMS))
    like = map_with_path(lambda _, leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float16), PARAMS)
    with pytest.raises(UserError, match=r"start: .*10: layers/mlp/gate/kernel not finite"):
        handoff.load(find(tmp_path), like, "start")


def test_a_head_of_another_size_is_fresh_without_being_dropped_and_keeps_the_rest(tmp_path):
    params = tiny.make_params(tiny.model_config(classes=2))
    write_parent(tmp_path, params)
    like = canonical(abstract(tiny.model_config(classes=5)).shapes)
    loaded, account = handoff.load(find(tmp_path, fresh=["head/.*"]), like, "start")
    assert account.fresh == account.dropped == ("head/bias", "head/kernel")
    assert_same(loaded, {key: value for key, value in params.items() if key != "head"})


@pytest.mark.parametrize("sizes", MESHES.values(), ids=MESHES)
def test_new_tokens_start_at_the_mean_of_the_old_ones_and_all_else_is_the_parents(tmp_path, sizes):
    write_parent(tmp_path)
    like = on_mesh(tiny.model_config(tie_embeddings=False, vocab_size=tiny.VOCAB + ADDED), sizes)
    loaded, account = handoff.load(find(tmp_path), like, "start", NEW)
    assert account.extended == ("embed/embedding", "lm_head/kernel") and set(account.extended) < set(account.loaded)
    assert account.provenance()["extended"] == ["embed/embedding", "lm_head/kernel"]
    assert "extended by the mean of the old tokens: embed/embedding, lm_head/kernel" in account.describe()
    old = unflatten({path: leaf for path, leaf in flatten(loaded).items()})
    old["embed"]["embedding"] = loaded["embed"]["embedding"][: tiny.VOCAB]
    old["lm_head"]["kernel"] = loaded["lm_head"]["kernel"][:, : tiny.VOCAB]
    assert_same(old, PARAMS)
    means = PARAMS["embed"]["embedding"].astype(np.float64).mean(0), PARAMS["lm_head"]["kernel"].mean(1)
    np.testing.assert_allclose(loaded["embed"]["embedding"][tiny.VOCAB :], [means[0]] * ADDED, atol=1e-6)
    np.testing.assert_allclose(loaded["lm_head"]["kernel"][:, tiny.VOCAB :].T, [means[1]] * ADDED, atol=1e-6)
    for path, leaf in flatten(loaded).items():
        assert leaf.shape == flatten(like)[path].shape and leaf.sharding == flatten(like)[path].sharding


@pytest.mark.parametrize(("multiples", "added"), [((8, 4), 2), ((1, 8), 0), ((8, 1), 0), ((8, 8), 3)])
def test_the_padding_of_the_vocabulary_is_no_token_when_it_grows(tmp_path, multiples, added):
    """Neither does it enter the mean, nor stay where a new token comes."""
    options = {"tie_embeddings": False, "lm_head_bias": True}
    params = tiny.make_params(tiny.model_config(vocab_multiple=multiples[0], **options))
    write_parent(tmp_path, params)
    like = on_mesh(tiny.model_config(vocab_size=tiny.VOCAB + added, vocab_multiple=multiples[1], **options), {})
    change = VocabularyChange(known=tiny.VOCAB, added=added, rows=tiny.VOCAB, multiple=multiples[1])
    loaded, account = handoff.load(find(tmp_path), like, "start", change)
    axes = {"embed/embedding": 0, "lm_head/bias": 0, "lm_head/kernel": 1}
    assert set(account.extended if added else account.padded) == set(axes)
    for path, axis in axes.items():
        was, now = (np.moveaxis(np.asarray(flatten(each)[path]), axis, 0) for each in (params, loaded))
        np.testing.assert_array_equal(now[: tiny.VOCAB], was[: tiny.VOCAB])
        mean = was[: tiny.VOCAB].astype(np.float64).mean(0)
        for new in now[tiny.VOCAB : tiny.VOCAB + added]:
            np.testing.assert_allclose(new, mean, atol=1e-6)
        assert not now[tiny.VOCAB + added :].any() and len(now) % multiples[1] == 0


def test_a_number_of_the_model_may_differ_as_its_float32_value_does():
    now, account = tiny.model_config(norm_epsilon=1e-5), account_for({}, {}, Start("run", "p", "latest", (), ()), "")
    check_function(dataclasses.replace(now, norm_epsilon=9.999999747378752e-06), now, account, "start")
    with pytest.raises(UserError, match="norm_epsilon"):
        check_function(dataclasses.replace(now, norm_epsilon=1.1e-5), now, account, "start")


def test_only_the_vocabulary_may_grow_and_only_by_the_tokens_that_are_added():
    begin = Start("run", "parent", "latest", (), ())
    before = {"embed/embedding": (9, 4), "lm_head/kernel": (4, 9), "head/kernel": (4, 9)}
    grown = {"embed/embedding": (11, 4), "lm_head/kernel": (4, 11)}
    assert account_for(before | grown, before, begin, "start", VocabularyChange(9, 2)).extended == tuple(grown)
    wrong = [(path, shape, added) for path, shape in grown.items() for added in (0, 1, 3)]
    wrong += [("head/kernel", (4, 11), 2), ("embed/embedding", (11, 6), 2), ("lm_head/kernel", (6, 9), 2)]
    wrong += [("embed/embedding", (7, 4), 2), ("embed/embedding", (9, 6), 2)]
    for path, shape, added in wrong:
        with pytest.raises(UserError, match=f"{path}: .* in this model, .* in the parent"):
            account_for(before | {path: shape}, before, begin, "start", VocabularyChange(9, added))


def test_only_the_parent_whose_tokenizer_is_extended_lacks_the_new_tokens(tmp_path):
    write_parent(tmp_path)
    parent = find(tmp_path)
    assert parent.lacks_new_tokens("old", "start") is False
    assert parent.lacks_new_tokens("old", "start", extends="base") is False
    assert parent.lacks_new_tokens("new", "start", extends="old") is True
    with pytest.raises(UserError, match=r"tokenizer old, this run has new, which extends base: .*tokenizer\.json"):
        parent.lacks_new_tokens("new", "start", extends="base")
    with pytest.raises(UserError, match="tokenizer old, this run has new: in a new --workdir"):
        parent.lacks_new_tokens("new", "start")


def test_the_best_step_has_the_lowest_score_and_is_the_later_of_equals(tmp_path):
    for step, value in {2: 1.5, 4: 0.5, 6: 0.5, 8: None, 10: 0.9}.items():
        write_parent(tmp_path, step=step, **scored("domain_bits_per_byte", value))
    assert find(tmp_path, "best").step == 6
    assert find(tmp_path).step == 10 and find(tmp_path, 2).step == 2


def test_only_scores_of_one_metric_are_compared():
    scores = {2: scored("old_accuracy", -9.0), 4: scored("loss", 3.0), 6: scored("loss", 4.0), 8: scored("", None)}
    assert best_step(scores, "parent", "start") == 4


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, None])
def test_a_score_that_is_not_finite_is_never_the_best(value):
    assert scored("loss", value) == {"scored": None}
    assert best_step({2: scored("loss", 3.0), 4: scored("loss", value)}, "parent", "start") == 2


def test_the_best_of_a_parent_that_is_not_finished_is_not_known_yet(tmp_path):
    write_parent(tmp_path, step=4, steps=10, finished=False, **scored("loss", 1.0))
    with pytest.raises(UserError, match=r"stopped at step 4 of 10: finish it, or name the step"):
        find(tmp_path, "best")
    assert find(tmp_path, 4).step == 4


def test_a_parent_that_vanishes_or_changes_after_it_was_found_is_rejected_by_its_path(tmp_path):
    like = map_with_path(lambda _, leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), PARAMS)
    write_parent(tmp_path)
    parent = find(tmp_path)
    shutil.rmtree(tmp_path / "parent")
    write_parent(tmp_path, tiny.make_params(MODEL, seed=1))
    with pytest.raises(UserError, match=f"start: {tmp_path}/parent/checkpoints/10 has changed since it was found"):
        handoff.load(parent, like, "start")
    shutil.rmtree(tmp_path / "parent")
    for read in (lambda: handoff.load(parent, like, "start"), lambda: parent.verify("start")):
        with pytest.raises(UserError, match=f"start: {tmp_path}/parent/checkpoints has no step 10"):
            read()


def test_deleting_any_file_of_a_parent_is_found_or_changes_nothing(tmp_path):
    """Orbax does not read every file that it writes."""
    write_parent(tmp_path / "whole")
    whole = tmp_path / "whole" / "parent" / CHECKPOINTS / "10"
    files = [path.relative_to(whole) for path in sorted(whole.rglob("*")) if path.is_file()]
    needed = set()
    for place, file in enumerate(files):
        run = tmp_path / str(place)
        shutil.copytree(tmp_path / "whole", run)
        (run / "parent" / CHECKPOINTS / "10" / file).unlink()
        try:
            found = find(run)
            found.verify("start")
            assert_same(found.checkpoints.load_params(10), PARAMS)
        except UserError as error:
            needed.add(str(file))
            assert f"start: {run}/parent/checkpoints/10/{file.parts[0]}" in str(error)
            assert "restore it from a copy, or train the parent again" in str(error)
    assert {"meta/data.json", "params/_METADATA", "params/manifest.ocdbt"} < needed


def test_the_provenance_of_a_parent_is_part_of_the_lineage_of_its_children(tmp_path):
    provenance = {
        "fresh": ["head/bias"],
        "dropped": [],
        "extended": ["embed/embedding"],
        "cast": {"head/bias": "bfloat16"},
    }
    grandparent = {"run": "gone", "stage": "pretrain", "step": 3, "params_digest": "0"}
    write_parent(tmp_path, lineage=[grandparent], **provenance)
    first, second = find(tmp_path).lineage(tmp_path)
    assert (
        first == grandparent | {"run": str(tmp_path / "gone")} and second["stage"] == "parent" and second["step"] == 10
    )
    assert {key: second[key] for key in provenance} == provenance
    assert changes(second) == [
        "1 leaf cast from bfloat16",
        "extended by the mean of the old tokens: embed/embedding",
        "fresh: head/bias",
    ]
    assert changes(first) == []


def test_ancestors_of_the_same_run_have_no_place_and_others_an_absolute_one(tmp_path):
    run, child = tmp_path / "run", tmp_path / "child"
    known = {"stage": "pretrain", "step": 3, "params_digest": "0"}
    write_parent(run, lineage=[known | {"run": "."}, known | {"run": str(child)}, known | {"run": "/elsewhere"}])
    parent = find(run)
    assert parent.describe(run)["run"] == "." and parent.describe(child)["run"] == str(run)
    assert [link["run"] for link in parent.lineage(run)] == [".", str(child), "/elsewhere", "."]
    assert [link["run"] for link in parent.lineage(child)] == [str(run), ".", "/elsewhere", str(run)]


@pytest.mark.parametrize("sizes", MESHES.values(), ids=MESHES)
def test_a_delta_checkpoint_of_a_parent_loads_as_the_complete_model(tmp_path, sizes):
    """The parent trained only its embedding, head and last layer; the child drops the head and has more tokens."""
    config = tiny.model_config(tie_embeddings=False, classes=2)
    base, trained = tiny.make_params(config), tiny.make_params(config, seed=1)
    piece = {"mlp": {"up": {"kernel": trained["layers"]["mlp"]["up"]["kernel"][2:3]}}}
    pieces = {"layers": {"2:3": piece}, "embed": trained["embed"], "head": trained["head"]}
    meta = {"finished": True, "steps": 10, "kind": "finetune", "lineage": [], "tokenizer_hash": "old"}
    with Checkpoints(tmp_path / "parent" / CHECKPOINTS) as checkpoints:
        checkpoints.save_base(base, meta)
        checkpoints.save(10, pieces, {}, meta, delta=True)
    like = on_mesh(tiny.model_config(tie_embeddings=False, vocab_size=tiny.VOCAB + ADDED), sizes)
    parent = find(tmp_path, drop=["head/.*"])
    parent.verify("start")
    loaded, account = handoff.load(parent, like, "start", NEW)
    assert account.dropped == ("head/bias", "head/kernel")
    np.testing.assert_array_equal(loaded["embed"]["embedding"][: tiny.VOCAB], trained["embed"]["embedding"])
    up = np.concatenate([base["layers"]["mlp"]["up"]["kernel"][:2], trained["layers"]["mlp"]["up"]["kernel"][2:]])
    np.testing.assert_array_equal(loaded["layers"]["mlp"]["up"]["kernel"], up)
    np.testing.assert_array_equal(loaded["layers"]["mlp"]["gate"]["kernel"], base["layers"]["mlp"]["gate"]["kernel"])
