"""A saved checkpoint is restored bit for bit, or not at all with an error."""

import os
import shutil
import subprocess
import sys
import textwrap
from contextlib import nullcontext
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llm3.checkpoints import layout, orbax_store
from llm3.checkpoints.orbax_store import DamagedCheckpoint
from llm3.checkpoints.stage_checkpoints import Checkpoints, Wanted
from llm3.errors import NotWritten, UserError
from llm3.tree import flatten, leaf_digests, params_digest, unflatten
from tests.helpers.tiny_checkpoints import (
    OPT,
    PARAMS,
    abstract,
    newest,
    on_mesh,
    optimizer_state,
    parameters,
    same,
    save_two_steps,
    sharded,
)

# Orbax leaves coroutines behind when it fails on a damaged file
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory) -> Path:
    return save_two_steps(tmp_path_factory.mktemp("two") / "checkpoints")


@pytest.fixture
def copy(two_steps, tmp_path) -> Path:
    return Path(shutil.copytree(two_steps, tmp_path / "copy"))


def test_parameters_and_optimizer_state_come_back_bit_for_bit(two_steps):
    checkpoints = Checkpoints(two_steps, read_only=True)
    assert same(checkpoints.load_params(10, abstract(PARAMS)), PARAMS)
    assert same(checkpoints.load_opt(10, abstract(OPT)), OPT)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(checkpoints.load_opt(10, abstract(OPT))))
    host = checkpoints.load_params(10)
    assert same(host, jax.tree.map(np.asarray, PARAMS))
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(host))


def test_metadata_and_shapes_are_read_without_the_arrays(copy):
    shutil.rmtree(copy / "20" / "params")
    checkpoints = Checkpoints(copy, read_only=True)
    meta = checkpoints.meta(20)
    twice = jax.tree.map(lambda x: 2 * x, PARAMS)
    assert meta["tokens"] == 20
    assert meta["digests"] == leaf_digests(twice)
    assert meta["params_digest"] == params_digest(twice)
    assert set(meta["opt_digests"]) >= {"0/mu/norm/scale", "0/nu/norm/scale", "0/count"}
    assert checkpoints.leaves(20) == {path: (leaf.shape, leaf.dtype) for path, leaf in flatten(PARAMS).items()}


def test_a_state_without_arrays_comes_back(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, PARAMS, optax.EmptyState(), {})
        checkpoints.wait()
        assert checkpoints.load_opt(1, optax.EmptyState()) == optax.EmptyState()


def test_other_paths_and_shapes_are_an_error_that_names_them_and_no_damage(two_steps):
    checkpoints = Checkpoints(two_steps, read_only=True)
    other = unflatten(flatten(abstract(PARAMS)) | {"extra/kernel": jax.ShapeDtypeStruct((3,), jnp.float32)})
    other["norm"]["scale"] = jax.ShapeDtypeStruct((16,), jnp.float32)
    del other["head"]
    with pytest.raises(UserError) as error:
        checkpoints.load_newest(lambda _: Wanted(other, abstract(OPT)))
    assert not isinstance(error.value, DamagedCheckpoint)
    for part in (
        "extra/kernel: not in the checkpoint",
        "head/bias: only in the",
        "norm/scale: (32,)",
        "(16,) expected",
    ):
        assert part in str(error.value)
    with pytest.raises(UserError, match="no step 30; it has 10, 20"):
        checkpoints.load_params(30)


def test_the_latest_is_the_highest_step_not_the_newest_directory(tmp_path):
    with Checkpoints(tmp_path, keep=5) as checkpoints:
        for step in (9, 10, 100):
            checkpoints.save(step, PARAMS, OPT, {})
    os.utime(tmp_path / "9")
    assert Checkpoints(tmp_path, read_only=True).steps() == [9, 10, 100]
    assert Checkpoints(tmp_path, read_only=True).latest() == 100
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(UserError, match="already holds step 100"):
        checkpoints.save(11, PARAMS, OPT, {})


def test_the_latest_and_the_best_are_kept(tmp_path):
    with Checkpoints(tmp_path, keep=2, best="loss") as checkpoints:
        for step, loss in enumerate((3.0, 1.0, float("nan"), 2.0, 5.0), start=1):
            checkpoints.save(step, PARAMS, OPT, {}, {"loss": loss})
    with Checkpoints(tmp_path, keep=2, best="loss") as checkpoints:
        assert checkpoints.steps() == [2, 4, 5]
        with pytest.raises(UserError, match="did you mean 'losss'"):
            checkpoints.save(6, PARAMS, OPT, {}, {"losss": 1.0})
        checkpoints.save(7, PARAMS, OPT, {})
        checkpoints.wait()
        assert checkpoints.steps() == [2, 5, 7]


def test_multiples_of_a_number_of_steps_are_kept_for_good(tmp_path):
    with Checkpoints(tmp_path, keep=1, every=3) as checkpoints:
        for step in range(1, 8):
            checkpoints.save(step, PARAMS, OPT, {})
    assert Checkpoints(tmp_path, read_only=True).steps() == [3, 6, 7]


def test_there_is_nothing_to_load_only_where_there_is_no_checkpoint(tmp_path):
    checkpoints = Checkpoints(tmp_path / "none", read_only=True)
    assert newest(checkpoints) is None
    assert checkpoints.latest() is None
    assert not (tmp_path / "none").exists()
    with pytest.raises(RuntimeError, match="read-only"):
        checkpoints.save(1, PARAMS, OPT, {})


def test_a_leaf_that_is_not_finite_is_never_committed(tmp_path):
    bad = unflatten(flatten(PARAMS) | {"norm/scale": PARAMS["norm"]["scale"].at[3].set(jnp.nan)})
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, PARAMS, OPT, {})
        with pytest.raises(UserError, match=r"params has .* norm/scale"):
            checkpoints.save(2, bad, OPT, {})
        with pytest.raises(UserError, match=r"opt has .* 0/mu/norm/scale"):
            checkpoints.save(2, PARAMS, optimizer_state(bad), {})
    assert checkpoints.steps() == [1]


def test_a_save_that_failed_surfaces_at_the_next_one_and_deletes_nothing(tmp_path, monkeypatch):
    rename = os.rename

    def fail(source, target, **options):
        if "orbax-checkpoint-tmp" in str(source):
            raise OSError("no space left on this device")
        return rename(source, target, **options)

    with Checkpoints(tmp_path / "all", keep=1) as checkpoints:
        checkpoints.save(1, PARAMS, OPT, {})
        checkpoints.wait()
        with monkeypatch.context() as patch:
            patch.setattr(os, "rename", fail)
            patch.setattr(os, "replace", fail)
            checkpoints.save(2, PARAMS, OPT, {})
            with pytest.raises(NotWritten, match=r"step 2 was not written: .*no space left"):
                checkpoints.save(3, PARAMS, OPT, {})
        assert newest(Checkpoints(tmp_path / "all")).step == 1
        checkpoints.save(2, PARAMS, OPT, {})
    assert checkpoints.steps() == [2]


def test_wildcards_in_a_path_are_read_literally(tmp_path):
    (tmp_path / "lr1").mkdir()
    save_two_steps(tmp_path / "lr[1e-3] *?{a,b}%20#x" / "checkpoints")
    restored = newest(Checkpoints(tmp_path / "lr[1e-3] *?{a,b}%20#x" / "checkpoints", read_only=True))
    assert restored.step == 20 and not restored.skipped
    assert same(restored.params, jax.tree.map(lambda x: 2 * x, PARAMS)) and same(restored.opt, OPT)


def test_an_older_checkpoint_is_deleted_only_after_the_newest_was_found_complete(tmp_path, monkeypatch):
    seen = []

    def look(step, arrays):
        seen.append(Checkpoints(tmp_path, read_only=True).steps())
        return layout.missing_files(step, arrays)

    monkeypatch.setattr(orbax_store, "missing_files", look)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, PARAMS, OPT, {})
    assert seen == [[1], [1, 2], [2, 3]]
    assert [each.name for each in tmp_path.iterdir()] == ["3"]


def test_what_a_killed_process_left_of_a_deleted_checkpoint_is_removed_by_the_next_save(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        with Checkpoints(tmp_path, keep=1) as checkpoints:
            checkpoints.save(1, PARAMS, OPT, {})
            checkpoints.save(2, PARAMS, OPT, {})
    assert len(list(tmp_path.iterdir())) == 2 and checkpoints.steps() == [2]
    Checkpoints(tmp_path, keep=1).save(3, PARAMS, OPT, {})
    assert [each.name for each in tmp_path.iterdir()] == ["3"]


@pytest.mark.parametrize("background", [True, False])
def test_a_save_that_lacks_a_file_is_not_announced_and_does_not_count(tmp_path, monkeypatch, background):
    """As where Orbax merges the files of no process, logs a line and returns."""
    Checkpoints(tmp_path).save(1, PARAMS, OPT, {})
    checkpoints = Checkpoints(tmp_path, keep=1)
    with checkpoints if background else nullcontext(), monkeypatch.context() as patch:
        patch.setattr(layout.LiteralPath, "glob", lambda *_: iter(()))
        with pytest.raises(NotWritten, match=r"step 2 .* lacks params/manifest.ocdbt.* kept as 2\.damaged"):
            checkpoints.save(2, PARAMS, OPT, {})
            checkpoints.wait()
    assert Checkpoints(tmp_path, read_only=True).steps() == [1]
    assert newest(Checkpoints(tmp_path, read_only=True)).skipped == []


def test_the_arrays_may_be_donated_as_soon_as_save_returns(tmp_path):
    big = parameters(scale=64)
    expected = jax.tree.map(np.array, big)
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: 0 * x - 7, tree), donate_argnums=0)
    overwrite(jax.tree.map(jnp.copy, big))  # compiled beforehand
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, big, {"count": jnp.int32(3)}, {})
        for _ in range(3):
            big = jax.block_until_ready(overwrite(big))
    assert same(checkpoints.load_params(1), expected)


def test_a_host_array_may_be_changed_as_soon_as_save_returns(tmp_path):
    big = jax.tree.map(np.array, parameters(scale=64))
    expected = jax.tree.map(np.copy, big)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, big, {"count": jnp.int32(3)}, {})
        for leaf in jax.tree.leaves(big):
            leaf[...] = 0
    assert same(checkpoints.load_params(1), expected)


@pytest.mark.parametrize(
    "program",
    [
        "checkpoints.save(*SAVE)",
        "with checkpoints: checkpoints.save(*SAVE); raise SystemExit(3)",
        "with checkpoints: checkpoints.save(*SAVE); raise ValueError('a bug')",
    ],
)
def test_a_save_is_not_lost_however_the_process_ends(tmp_path, program):
    program = f"""
        import pathlib, jax.numpy as jnp
        from llm3.checkpoints.stage_checkpoints import Checkpoints
        SAVE = (7, {{"a": {{"kernel": jnp.arange(2_000_000, dtype=jnp.float32)}}}}, {{"count": jnp.int32(1)}}, {{}})
        checkpoints = Checkpoints(pathlib.Path({str(tmp_path)!r}))
        {program}
    """
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], env=environment, capture_output=True, text=True, check=False
    )
    assert Checkpoints(tmp_path, read_only=True).steps() == [7], done.stderr
    restored = Checkpoints(tmp_path, read_only=True).load_params(7)
    np.testing.assert_array_equal(restored["a"]["kernel"], np.arange(2_000_000, dtype=np.float32))


@pytest.mark.skipif(len(jax.devices()) < 8, reason="needs 8 devices")
def test_a_checkpoint_of_one_mesh_is_restored_on_other_meshes_and_on_one_device(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, on_mesh(PARAMS, 2, 2, 2), on_mesh(OPT, 2, 2, 2), {})
    assert checkpoints.meta(1)["digests"] == leaf_digests(PARAMS)
    for shape in ((1, 8, 1), (2, 1, 2), (1, 1, 1)):
        target = sharded(on_mesh(PARAMS, *shape)), sharded(on_mesh(OPT, *shape))
        restored = checkpoints.load_newest(lambda _, target=target: Wanted(*target))
        assert same(restored.params, PARAMS)
        assert same(restored.opt, OPT)
        assert jax.tree.map(lambda x: x.sharding, restored.params) == jax.tree.map(lambda x: x.sharding, target[0])
    assert same(checkpoints.load_params(1, abstract(PARAMS)), PARAMS)
    assert same(checkpoints.load_params(1), jax.tree.map(np.asarray, PARAMS))


def test_saves_of_other_sizes_follow_each_other_when_few_bytes_are_compressed_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("llm3.checkpoints.layout.FEW_BYTES", 0)
    saved = {1: PARAMS, 2: parameters(scale=8), 3: jax.tree.map(np.asarray, parameters(scale=16))}
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        for step, params in saved.items():
            checkpoints.save(step, params, {}, {})
    for step, params in saved.items():
        assert same(Checkpoints(tmp_path, read_only=True).load_params(step), jax.tree.map(np.asarray, params))
