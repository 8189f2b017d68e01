"""Paths and digests of parameter trees."""

import hashlib

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm3 import tree

names = st.text(st.characters(exclude_characters="/"), min_size=1, max_size=4)
trees = st.recursive(
    st.dictionaries(names, st.integers(), min_size=1, max_size=3),
    lambda inner: st.dictionaries(names, st.one_of(st.integers(), inner), min_size=1, max_size=3),
    max_leaves=8,
)


@given(trees)
def test_flatten_and_unflatten_are_inverse(nested):
    flat = tree.flatten(nested)
    assert tree.unflatten(flat) == nested
    assert list(flat) == sorted(flat)


def test_paths_are_keys_joined_by_slashes():
    assert tree.flatten({"b": {"y": 1, "x": {"z": 2}}, "a": 3}) == {"a": 3, "b/x/z": 2, "b/y": 1}


def test_map_with_path_pairs_leaves_by_path_not_by_order():
    first, second = {"a": 1, "b": {"c": 2}}, {"b": {"c": 20}, "a": 10}
    assert tree.map_with_path(lambda path, x, y: (path, x + y), first, second) == {
        "a": ("a", 11),
        "b": {"c": ("b/c", 22)},
    }


def test_map_with_path_refuses_a_tree_that_lacks_a_leaf():
    with pytest.raises(KeyError):
        tree.map_with_path(lambda path, x, y: x, {"a": 1, "b": 2}, {"a": 1})


def test_size_counts_the_parameters_also_of_scalars():
    assert tree.size({"a": np.zeros((2, 3)), "b": {"c": np.zeros(()), "d": np.zeros(5)}}) == 12


def test_a_digest_is_sha256_over_dtype_shape_and_the_sha256_of_each_block():
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    expected = hashlib.sha256(b"float32(2, 3) in blocks of (2, 3)" + hashlib.sha256(array).digest()).hexdigest()
    assert tree.leaf_digests({"a": {"b": jnp.asarray(array)}}) == {"a/b": expected}
    large = np.arange(64 * 384, dtype=np.float32).reshape(64, 384)
    expected = hashlib.sha256(b"float32(64, 384) in blocks of (64, 96)")
    for start in range(0, 384, 96):
        expected.update(hashlib.sha256(large[:, start : start + 96].tobytes()).digest())
    assert tree.leaf_digests({"a": large}) == {"a": expected.hexdigest()}


@pytest.mark.parametrize(
    ("shape", "parts"),
    [
        ((80, 8192, 28672), (1, 64, 64)),
        ((128256, 8192), (64, 64)),
        ((50257, 768), (29, 64)),  # 29 x 1733
        ((80, 8192), (2, 64)),
        ((8192,), (2,)),  # at least 16 KiB each
        ((2, 3), (1, 1)),
        ((), ()),
    ],
)
def test_the_blocks_of_a_leaf_are_equal_and_at_most_64_along_an_axis_that_a_mesh_may_shard(shape, parts):
    block = tree.block_shape(shape, 4)
    assert tuple(size * part for size, part in zip(block, parts, strict=True)) == shape


def test_the_digests_of_old_checkpoints_are_sha256_over_dtype_shape_and_bytes():
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    expected = hashlib.sha256(b"float32(2, 3)" + array.tobytes()).hexdigest()
    assert tree.whole_leaf_digest(array) == expected


def test_digests_tell_values_shapes_dtypes_and_names_apart():
    base = np.arange(6, dtype=np.int32)
    changed = base.copy()
    changed[-1] += 1
    leaves = [base, changed, base.reshape(2, 3), base.reshape(3, 2), base.view(np.float32), base[:5]]
    digests = [tree.params_digest({"a": leaf}) for leaf in leaves] + [tree.params_digest({"b": base})]
    assert len(set(digests)) == len(digests)


def test_a_digest_depends_neither_on_memory_layout_nor_on_the_order_of_keys():
    array = np.arange(6.0).reshape(2, 3)
    assert tree.params_digest({"a": array, "b": array}) == tree.params_digest(
        {"b": np.asfortranarray(array), "a": array}
    )


def test_digests_cover_scalars_and_bfloat16():
    scalars = tree.leaf_digests({"a": np.float32(1), "b": jnp.ones((1,)), "c": jnp.ones((), jnp.bfloat16)})
    assert len(set(scalars.values())) == 3
