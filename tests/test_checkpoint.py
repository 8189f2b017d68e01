"""What was saved comes back bit for bit, or not at all, and never in silence."""

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from llm3 import checkpoint
from llm3.checkpoint import Checkpoints, DamagedCheckpoint
from llm3.errors import UserError
from llm3.tree import flatten, leaf_digests, map_with_path, params_digest, unflatten

# Orbax leaves coroutines behind when it fails on a damaged file
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")


def parameters(seed: int = 0, scale: int = 1) -> dict:
    random = np.random.default_rng(seed)
    shapes = {"embed/embedding": (64 * scale, 32), "layers/0:2/mlp/up/kernel": (2, 32, 64 * scale), "norm/scale": (32,)}
    flat = {path: jnp.asarray(random.standard_normal(shape), jnp.float32) for path, shape in shapes.items()}
    return unflatten(flat | {"head/bias": jnp.asarray(random.standard_normal(5), jnp.bfloat16)})


def optimizer_state(params: dict) -> object:
    transform = optax.adamw(1e-3, mask=map_with_path(lambda path, _: path.endswith("kernel"), params))
    return transform.update(params, transform.init(params), params)[1]


def same(tree: object, other: object) -> bool:
    """Equal structure, dtypes and bytes."""
    if jax.tree.structure(tree) != jax.tree.structure(other):
        return False
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True)
    return all(a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


def abstract(tree: object) -> object:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


PARAMS = parameters()
OPT = optimizer_state(PARAMS)


def newest(checkpoints: Checkpoints) -> checkpoint.Restored | None:
    return checkpoints.load_newest(abstract(PARAMS), abstract(OPT))


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory) -> Path:
    """Steps 10 (PARAMS) and 20 (twice PARAMS)."""
    directory = tmp_path_factory.mktemp("two")
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(10, PARAMS, OPT, {"tokens": 10})
        checkpoints.save(20, jax.tree.map(lambda x: 2 * x, PARAMS), OPT, {"tokens": 20})
    return directory


@pytest.fixture
def copy(two_steps, tmp_path) -> Path:
    return Path(shutil.copytree(two_steps, tmp_path / "copy"))


def data_files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def largest(directory: Path) -> Path:
    """The file that holds the arrays of a part: not what is left of the writing process."""
    return max((directory / "d").iterdir(), key=lambda path: path.stat().st_size)


def flip(path: Path, position: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(position * (len(content) - 1))] ^= 0x10
    path.write_bytes(content)


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


def test_digests_are_checked_before_a_cast(copy):
    checkpoints = Checkpoints(copy, read_only=True)
    half = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), PARAMS)
    assert same(checkpoints.load_params(10, half), jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS))
    flip(largest(copy / "10" / "params"))
    with pytest.raises(DamagedCheckpoint):
        checkpoints.load_params(10, half)


def test_other_paths_and_shapes_are_an_error_that_names_them_and_no_damage(two_steps):
    checkpoints = Checkpoints(two_steps, read_only=True)
    other = unflatten(flatten(abstract(PARAMS)) | {"extra/kernel": jax.ShapeDtypeStruct((3,), jnp.float32)})
    other["norm"]["scale"] = jax.ShapeDtypeStruct((16,), jnp.float32)
    del other["head"]
    with pytest.raises(UserError) as error:
        checkpoints.load_newest(other, abstract(OPT))
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


@pytest.mark.parametrize("part", ["params", "opt"])
def test_a_flipped_byte_is_found_and_named_and_the_previous_step_is_taken(copy, part):
    flip(largest(copy / "20" / part))
    restored = newest(Checkpoints(copy))
    assert restored.step == 10
    assert same(restored.params, PARAMS)
    assert same(restored.opt, OPT)
    assert restored.meta["tokens"] == 10
    assert len(restored.skipped) == 1
    assert "step 20" in restored.skipped[0]
    assert f"20/{part}" in restored.skipped[0]


def test_overwritten_values_that_orbax_does_not_notice_are_found_by_leaf(copy):
    from orbax.checkpoint import v1 as ocp

    changed = jax.tree.map(np.array, PARAMS)
    changed["norm"]["scale"][7] += 1
    shutil.rmtree(copy / "20" / "params")
    ocp.save_checkpointables(copy / "other", {"params": changed})
    shutil.copytree(copy / "other" / "params", copy / "20" / "params")
    other = Checkpoints(copy, read_only=True)
    with pytest.raises(DamagedCheckpoint, match="norm/scale"):
        other.load_params(20)


def test_a_byte_flipped_in_any_file_is_harmless_or_found(copy):
    twice = jax.tree.map(lambda x: 2 * x, PARAMS)
    found = []
    for path in data_files(copy / "20"):
        content = path.read_bytes()
        flip(path)
        restored = newest(Checkpoints(copy))
        assert same(restored.params, twice if restored.step == 20 else PARAMS), path
        assert restored.meta["tokens"] == restored.step, path
        assert (restored.step == 10) == bool(restored.skipped), path
        found += [path] * (restored.step == 10)
        path.write_bytes(content)
    assert {path.relative_to(copy / "20").parts[0] for path in found} >= {"params", "opt", "meta"}


def test_changed_metadata_is_found(copy):
    for path in data_files(copy / "20" / "meta"):
        path.write_bytes(path.read_bytes().replace(b'"tokens": 20', b'"tokens": 21'))
    with pytest.raises(DamagedCheckpoint, match="20/meta"):
        Checkpoints(copy, read_only=True).meta(20)
    assert newest(Checkpoints(copy)).step == 10


def test_a_truncated_file_and_missing_parts_fall_back_with_the_cause(copy):
    path = largest(copy / "20" / "params")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert "Error" in newest(Checkpoints(copy)).skipped[0]
    for part in ("params", "opt", "meta"):
        shutil.rmtree(copy / "20" / part)
        restored = newest(Checkpoints(copy))
        assert restored.step == 10
        assert restored.skipped


def test_a_half_written_directory_is_no_checkpoint(copy):
    shutil.copytree(copy / "20", copy / "30.orbax-checkpoint-tmp")
    shutil.rmtree(copy / "20")
    assert Checkpoints(copy, read_only=True).steps() == [10]
    restored = newest(Checkpoints(copy))
    assert restored.step == 10
    assert restored.skipped == []


def test_where_every_checkpoint_is_damaged_nothing_starts_anew(copy):
    flip(largest(copy / "10" / "params"))
    shutil.rmtree(copy / "20" / "meta")
    with pytest.raises(UserError) as error:
        newest(Checkpoints(copy))
    for part in (str(copy), "step 10", "step 20"):
        assert part in str(error.value)
    assert Checkpoints(copy).steps() == [10, 20]


def test_there_is_nothing_to_load_only_where_there_is_no_checkpoint(tmp_path):
    checkpoints = Checkpoints(tmp_path / "none", read_only=True)
    assert newest(checkpoints) is None
    assert checkpoints.latest() is None
    assert not (tmp_path / "none").exists()
    with pytest.raises(RuntimeError, match="read-only"):
        checkpoints.save(1, PARAMS, OPT, {})


def test_a_damaged_checkpoint_is_set_aside_never_deleted_and_never_pushes_out_an_intact_one(copy):
    flip(largest(copy / "20" / "params"))
    damaged = largest(copy / "20" / "params").read_bytes()
    with Checkpoints(copy, keep=2) as checkpoints:
        assert newest(checkpoints).step == 10
        assert checkpoints.steps() == [10, 20]
        checkpoints.save(20, PARAMS, OPT, {"tokens": 21})
    assert Checkpoints(copy).steps() == [10, 20]
    assert newest(Checkpoints(copy)).meta["tokens"] == 21
    assert largest(copy / "20.damaged" / "params").read_bytes() == damaged


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
    checkpoints = Checkpoints(tmp_path / "all", keep=1)
    checkpoints.save(1, PARAMS, OPT, {})
    checkpoints.wait()
    rename = os.rename

    def fail(source, target, **options):
        if "orbax-checkpoint-tmp" in str(source):
            raise OSError("no space left on this device")
        return rename(source, target, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", fail)
        patch.setattr(os, "replace", fail)
        checkpoints.save(2, PARAMS, OPT, {})
        with pytest.raises(RuntimeError, match=r"step 2 was not written: .*no space left"):
            checkpoints.save(3, PARAMS, OPT, {})
    assert newest(Checkpoints(tmp_path / "all")).step == 1
    checkpoints.save(2, PARAMS, OPT, {})
    checkpoints.close()
    assert checkpoints.steps() == [2]


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


@pytest.mark.parametrize("ending", ["", "raise SystemExit(3)", "raise ValueError('a bug')"])
def test_a_save_is_not_lost_when_the_process_ends_without_waiting(tmp_path, ending):
    program = f"""
        import pathlib, jax.numpy as jnp
        from llm3.checkpoint import Checkpoints
        params = {{"a": {{"kernel": jnp.arange(2_000_000, dtype=jnp.float32)}}}}
        Checkpoints(pathlib.Path({str(tmp_path)!r})).save(7, params, {{"count": jnp.int32(1)}}, {{}})
        {ending}
    """
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], env=environment, capture_output=True, text=True, check=False
    )
    assert Checkpoints(tmp_path, read_only=True).steps() == [7], done.stderr
    restored = Checkpoints(tmp_path, read_only=True).load_params(7)
    np.testing.assert_array_equal(restored["a"]["kernel"], np.arange(2_000_000, dtype=np.float32))


def on_mesh(tree: object, *shape: int) -> object:
    """The last axis of every leaf over fsdp and tensor where it divides, on a mesh data x fsdp x tensor."""
    devices = jax.devices()[: int(np.prod(shape))]
    mesh = jax.make_mesh(shape, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3, devices=devices)

    def place(leaf: jax.Array) -> jax.Array:
        divides = leaf.ndim and leaf.shape[-1] % (shape[1] * shape[2]) == 0
        spec = PartitionSpec(*[None] * (leaf.ndim - 1), ("fsdp", "tensor")) if divides else PartitionSpec()
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    return jax.tree.map(place, tree)


def sharded(tree: object) -> object:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


@pytest.mark.skipif(len(jax.devices()) < 8, reason="needs 8 devices")
def test_what_one_mesh_saved_another_one_and_a_single_device_restore(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, on_mesh(PARAMS, 2, 2, 2), on_mesh(OPT, 2, 2, 2), {})
    assert checkpoints.meta(1)["digests"] == leaf_digests(PARAMS)
    for shape in ((1, 8, 1), (2, 1, 2), (1, 1, 1)):
        target = sharded(on_mesh(PARAMS, *shape)), sharded(on_mesh(OPT, *shape))
        restored = checkpoints.load_newest(*target)
        assert same(restored.params, PARAMS)
        assert same(restored.opt, OPT)
        assert jax.tree.map(lambda x: x.sharding, restored.params) == jax.tree.map(lambda x: x.sharding, target[0])
    assert same(checkpoints.load_params(1, abstract(PARAMS)), PARAMS)
    assert same(checkpoints.load_params(1), jax.tree.map(np.asarray, PARAMS))
