"""Delta checkpoints load as the complete model; frozen parameters are written once."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm3.checkpoints.orbax_store import DamagedCheckpoint
from llm3.checkpoints.stage_checkpoints import Checkpoints
from llm3.errors import UserError
from llm3.tree import combine_digests, flatten, leaf_digests, params_digest, unflatten
from tests.helpers.tiny_checkpoints import abstract, data_files, flip, largest, on_mesh, same, sharded
from tests.helpers.tiny_delta import AT, OPTS, START, contents, newest, reader, save, save_stage, trainable, whole

# Orbax leaves coroutines behind when it fails on a damaged file
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning", "ignore:coroutine:RuntimeWarning"
)


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    return save_stage(tmp_path_factory.mktemp("delta") / "stage")


@pytest.fixture
def stage(original, tmp_path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "stage"))


def test_a_delta_checkpoint_loads_as_the_complete_model(original):
    checkpoints = reader(original)
    for step, params in AT.items():
        assert same(checkpoints.load_params(step, abstract(START)), params)
        assert same(checkpoints.load_params(step), jax.tree.map(np.asarray, params))
        assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(checkpoints.load_params(step)))
        assert checkpoints.leaves(step) == {path: (leaf.shape, leaf.dtype) for path, leaf in flatten(START).items()}
    half = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), START)
    assert same(checkpoints.load_params(20, half), jax.tree.map(lambda x: x.astype(jnp.bfloat16), AT[20]))


def test_trained_parameters_and_the_base_can_be_read_separately(original, tmp_path):
    checkpoints = reader(original)
    assert same(checkpoints.load_trainable(10, abstract(trainable(START))), trainable(AT[10]))
    assert same(checkpoints.base(abstract(START)), START)
    with Checkpoints(tmp_path / "checkpoints") as complete:
        save(complete, 10, delta=False)
    with pytest.raises(UserError, match="10 is a full checkpoint"):
        complete.load_trainable(10)
    with pytest.raises(UserError, match="base has no step 0"):
        complete.base()


@pytest.mark.skipif(len(jax.devices()) < 8, reason="needs 8 devices")
def test_a_delta_checkpoint_loads_on_another_mesh(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    with checkpoints:
        checkpoints.save_base(on_mesh(START, 2, 2, 2), {})
        checkpoints.save(20, on_mesh(trainable(AT[20]), 2, 2, 2), {}, {}, delta=True)
    for shape in ((1, 8, 1), (2, 1, 2), (1, 1, 1)):
        target = sharded(on_mesh(START, *shape))
        params = checkpoints.load_params(20, target)
        assert same(params, AT[20])
        assert jax.tree.map(lambda x: x.sharding, params) == jax.tree.map(lambda x: x.sharding, target)


def test_the_digest_of_a_delta_checkpoint_covers_its_base(original, tmp_path):
    meta = reader(original).meta(20)
    own = leaf_digests(trainable(AT[20]))
    assert (
        meta["base"] == params_digest(START) == Checkpoints(original / "base", read_only=True).meta(0)["params_digest"]
    )
    assert meta["digests"] == own
    assert meta["params_digest"] == combine_digests(own | {"base": meta["base"]})
    with Checkpoints(tmp_path / "checkpoints") as other:
        other.save_base(whole(5), {})
        save(other, 20)
    assert other.meta(20)["digests"] == own
    assert other.meta(20)["params_digest"] != meta["params_digest"]


def test_frozen_parameters_are_written_once_and_never_touched(tmp_path):
    big = START | {
        "embed": {"embedding": jnp.asarray(np.random.default_rng(0).standard_normal((4096, 64)), jnp.float32)}
    }
    with Checkpoints(tmp_path / "checkpoints", keep=1) as checkpoints:
        checkpoints.save_base(big, {})
        checkpoints.wait()
        written = contents(tmp_path / "base")
        for step in (10, 20):
            save(checkpoints, step)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        restored = newest(checkpoints, big)
        checkpoints.save_base(restored.params, restored.meta, trainable(restored.params))
        checkpoints.save(30, trainable(restored.params), {}, restored.meta, delta=True)
        checkpoints.save(40, restored.params, {}, restored.meta)
    assert contents(tmp_path / "base") == written
    sizes = {
        step: sum(path.stat().st_size for path in data_files(tmp_path / "checkpoints" / step)) for step in ("30", "40")
    }
    assert sizes["30"] < 0.05 * sizes["40"]


def test_a_stage_resumes_with_the_leaves_that_were_trainable_at_that_step(stage):
    restored = newest(reader(stage))
    assert restored.step == 20
    assert restored.skipped == []
    assert same(restored.params, AT[20])
    assert same(restored.opt, OPTS[20])
    flip(largest(stage / "checkpoints" / "20" / "params"))
    restored = newest(reader(stage))
    assert restored.step == 10
    assert same(restored.params, AT[10])
    assert same(restored.opt, OPTS[10])


def test_the_last_checkpoint_of_a_resumed_stage_needs_no_base(stage):
    with Checkpoints(stage / "checkpoints") as checkpoints:
        restored = newest(checkpoints)
        checkpoints.save(30, restored.params, restored.opt, restored.meta | {"finished": True})
    shutil.rmtree(stage / "base")
    assert same(reader(stage).load_params(30, abstract(START)), AT[20])
    assert reader(stage).meta(30)["params_digest"] == params_digest(AT[20])


def test_leaves_that_do_not_fit_the_base_are_not_saved(tmp_path):
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        with pytest.raises(RuntimeError, match="call save_base before"):
            save(checkpoints, 10)
        checkpoints.save_base(START, {})
        wrong = {
            "head/kernel": jnp.ones((8, 4)),
            "head/bias": jnp.ones(3),
            "tail/bias": jnp.ones(3),
            "layers/3:5/norm/scale": jnp.ones((2, 8)),
            "layers/0:2/norm/scale": jnp.ones((1, 8)),
        }
        with pytest.raises(UserError) as error:
            checkpoints.save(10, unflatten(wrong), {}, {}, delta=True)
        assert all(path in str(error.value) for path in wrong)
        shutil.rmtree(tmp_path / "base")
        with pytest.raises(DamagedCheckpoint, match="the base of step 10, is missing"):
            save(checkpoints, 10)
    assert checkpoints.steps() == []
    with pytest.raises(RuntimeError, match="read-only"):
        reader(tmp_path).save_base(START, {})
