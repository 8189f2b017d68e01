"""A damaged checkpoint is found, named and never silently loaded."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from llm3.checkpoints.metadata import json_digest
from llm3.checkpoints.orbax_store import DamagedCheckpoint
from llm3.checkpoints.stage_checkpoints import Checkpoints
from llm3.errors import UserError
from llm3.tree import flatten, unflatten
from tests.helpers.tiny_checkpoints import (
    HARMS,
    OPT,
    PARAMS,
    abstract,
    data_files,
    flip,
    largest,
    newest,
    same,
    save_two_steps,
)

# Orbax leaves coroutines behind when it fails on a damaged file
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning", "ignore:coroutine:RuntimeWarning"
)


RAW = re.compile("OCDBT|zarr|tensorstore|driver|Error|checkpointable|process_0")  # words of libraries


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory) -> Path:
    return save_two_steps(tmp_path_factory.mktemp("two") / "checkpoints")


@pytest.fixture
def copy(two_steps, tmp_path) -> Path:
    return Path(shutil.copytree(two_steps, tmp_path / "copy"))


def test_digests_are_checked_before_a_cast(copy):
    checkpoints = Checkpoints(copy, read_only=True)
    half = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), PARAMS)
    assert same(checkpoints.load_params(10, half), jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS))
    flip(largest(copy / "10" / "params"))
    with pytest.raises(DamagedCheckpoint):
        checkpoints.load_params(10, half)


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


def overwrite_params(step: Path, params: dict) -> None:
    """Replace the arrays of a finished checkpoint in a way that Orbax does not notice."""
    shutil.rmtree(step / "params")
    ocp.save_checkpointables(step.parent / "other", {"params": params})
    (step.parent / "other" / "params").rename(step / "params")


def test_overwritten_values_that_orbax_does_not_notice_are_found_by_leaf(copy):
    changed = jax.tree.map(np.array, PARAMS)
    changed["norm"]["scale"][7] += 1
    overwrite_params(copy / "20", changed)
    with pytest.raises(DamagedCheckpoint, match="norm/scale does not match"):
        Checkpoints(copy, read_only=True).load_params(20)


@pytest.mark.parametrize(
    "path, change", [("head/bias", lambda x: x.astype(jnp.float32)), ("norm/scale", lambda x: x[:, None])]
)
def test_an_array_of_another_dtype_or_shape_than_was_saved_is_found_by_leaf(copy, path, change):
    flat = {path: 2 * leaf for path, leaf in flatten(PARAMS).items()}
    overwrite_params(copy / "20", unflatten(flat | {path: change(flat[path])}))
    for like in (None, abstract(PARAMS)):
        with pytest.raises(DamagedCheckpoint, match=rf"20/params: {path} is float32 .* was saved"):
            Checkpoints(copy, read_only=True).load_params(20, like)


def rewrite_meta(step: Path, change: dict) -> None:
    meta = json.loads((step / "meta" / "data.json").read_text())
    meta = {key: value for key, value in (meta | change).items() if key != "meta_digest" and value is not None}
    (step / "meta" / "data.json").write_text(json.dumps(meta | {"meta_digest": json_digest(meta)}))


def test_a_checkpoint_with_digests_of_whole_leaves_is_read_and_verified(copy):
    twice = {path: np.asarray(2 * leaf) for path, leaf in flatten(PARAMS).items()}
    own = lambda leaf: hashlib.sha256(f"{leaf.dtype.name}{leaf.shape}".encode() + leaf.tobytes()).hexdigest()  # noqa: E731
    old = {path: own(leaf) for path, leaf in twice.items()}
    rewrite_meta(copy / "20", {"digest_format": None, "digests": old})
    for like in (None, abstract(PARAMS)):
        found = flatten(Checkpoints(copy, read_only=True).load_params(20, like))
        assert same(jax.tree.map(np.asarray, found), twice)
    rewrite_meta(copy / "20", {"digests": old | {"norm/scale": "0"}})
    with pytest.raises(DamagedCheckpoint, match="norm/scale does not match"):
        list(Checkpoints(copy, read_only=True).verified_params(20))


def test_digests_of_a_later_format_are_no_damage(copy):
    rewrite_meta(copy / "20", {"digest_format": 3})
    with pytest.raises(UserError, match="20 was saved by a newer llm3") as error:
        newest(Checkpoints(copy))
    assert not isinstance(error.value, DamagedCheckpoint)


def test_changed_metadata_is_found(copy):
    for path in data_files(copy / "20" / "meta"):
        path.write_bytes(path.read_bytes().replace(b'"tokens": 20', b'"tokens": 21'))
    with pytest.raises(DamagedCheckpoint, match="20/meta"):
        Checkpoints(copy, read_only=True).meta(20)
    assert newest(Checkpoints(copy)).step == 10


def test_a_truncated_file_and_missing_parts_fall_back_with_the_cause(copy):
    path = largest(copy / "20" / "params")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert "20/params cannot be read: a file in it is cut short" in newest(Checkpoints(copy)).skipped[0]
    for part in ("params", "opt", "meta"):
        shutil.rmtree(copy / "20" / part)
        restored = newest(Checkpoints(copy))
        assert restored.step == 10
        assert restored.skipped
    assert "20/meta cannot be read: it is missing" in restored.skipped[0]


def test_a_half_written_directory_is_no_checkpoint(copy):
    shutil.copytree(copy / "20", copy / "30.orbax-checkpoint-tmp")
    shutil.rmtree(copy / "20")
    assert Checkpoints(copy, read_only=True).steps() == [10]
    restored = newest(Checkpoints(copy))
    assert restored.step == 10
    assert restored.skipped == []


def test_a_stage_does_not_start_again_if_every_checkpoint_is_damaged(copy):
    flip(largest(copy / "10" / "params"))
    shutil.rmtree(copy / "20" / "meta")
    with pytest.raises(UserError) as error:
        newest(Checkpoints(copy))
    for part in (str(copy), "step 10", "step 20"):
        assert part in str(error.value)
    assert Checkpoints(copy).steps() == [10, 20]


def test_a_damaged_checkpoint_is_renamed_never_deleted_and_never_displaces_an_intact_one(copy):
    flip(largest(copy / "20" / "params"))
    damaged = largest(copy / "20" / "params").read_bytes()
    with Checkpoints(copy, keep=2) as checkpoints:
        assert newest(checkpoints).step == 10
        assert checkpoints.steps() == [10, 20]
        checkpoints.save(20, PARAMS, OPT, {"tokens": 21})
    assert Checkpoints(copy).steps() == [10, 20]
    assert newest(Checkpoints(copy)).meta["tokens"] == 21
    assert largest(copy / "20.damaged" / "params").read_bytes() == damaged


@pytest.mark.parametrize("harm", HARMS)
def test_harm_to_any_file_is_harmless_or_found(copy, harm):
    twice, found = jax.tree.map(lambda x: 2 * x, PARAMS), []
    checkpoints = Checkpoints(copy, read_only=True)
    for path in data_files(copy / "20"):
        content = path.read_bytes()
        HARMS[harm](path)
        try:
            params, opt = checkpoints.load_params(20, abstract(PARAMS)), checkpoints.load_opt(20, abstract(OPT))
            assert same(params, twice) and same(opt, OPT) and checkpoints.meta(20)["tokens"] == 20, path
        except DamagedCheckpoint as error:
            assert not RAW.search(str(error)), f"{path}: {error}"
            found.append(path.relative_to(copy / "20").parts[0])
        path.write_bytes(content)
    assert set(found) == {"params", "opt", "meta"}


def test_a_checkpoint_that_vanishes_while_it_is_read_is_said_to_be_gone(copy, monkeypatch):
    checkpoints, load = Checkpoints(copy), ocp.load_checkpointables

    def vanish(path, *arguments):
        if path.name == "20":
            shutil.rmtree(path, ignore_errors=True)
        return load(path, *arguments)

    monkeypatch.setattr(ocp, "load_checkpointables", vanish)
    with pytest.raises(UserError, match=r"20 is gone"):
        Checkpoints(copy, read_only=True).load_params(20)
    shutil.copytree(copy / "10", copy / "20")
    restored = newest(checkpoints)
    assert restored.step == 10
    assert "20 is gone" in restored.skipped[0]
    with checkpoints:
        checkpoints.save(20, PARAMS, OPT, {})
    assert sorted(each.name for each in copy.iterdir()) == ["10", "20"]


def test_a_directory_that_vanishes_holds_no_steps(copy):
    checkpoints = Checkpoints(copy, read_only=True)
    shutil.rmtree(copy)
    assert checkpoints.steps() == []
    with pytest.raises(UserError, match="has no step 20; it has none"):
        checkpoints.meta(20)
