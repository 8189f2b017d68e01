"""Every slice of a leaf is read from its place in a tensor, and a leaf is written there."""

import itertools

import numpy as np
import pytest

from llm3.interop.views import Dim, View

H, K, N, D = 4, 2, 3, 5  # heads, kv heads, head_dim, d_model


def whole(*axes: int, size: int) -> Dim:
    return Dim(axes, 0, 0, size)


# the view of a leaf, and the same leaf by numpy
CASES = {
    "transposed": (View((D, H, N), (whole(1, 2, size=H * N), whole(0, size=D))), lambda t: t.T.reshape(D, H, N)),
    "as it is": (View((D, H, N), (whole(0, size=D), whole(1, 2, size=H * N))), lambda t: t.reshape(D, H, N)),
    "inputs flattened": (View((H, N, D), (whole(2, size=D), whole(0, 1, size=H * N))), lambda t: t.T.reshape(H, N, D)),
    "second of three blocks": (
        View((D, K, N), (Dim((1, 2), 0, H * N, (H + 2 * K) * N), whole(0, size=D))),
        lambda t: t[H * N : (H + K) * N].T.reshape(D, K, N),
    ),
    "interleaved by head": (
        View((D, H, N), (Dim((1, 2), 1, N, 3 * N), whole(0, size=D))),
        lambda t: t.reshape(H, 3, N, D)[:, 1].transpose(2, 0, 1),
    ),
    "one axis": (View((H, N), (whole(0, 1, size=H * N),)), lambda t: t.reshape(H, N)),
    "interleaved bias": (View((H, N), (Dim((0, 1), 1, 2 * N, 3 * N),)), lambda t: t.reshape(H, 3, N)[:, 2]),
}


def tensor_of(view: View) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(view.tensor_shape).astype(np.float32)


@pytest.mark.parametrize("case", CASES)
def test_every_slice_is_read_and_nothing_else(case):
    view, expected = CASES[case]
    tensor = tensor_of(view)
    pieces = [[range(0, size), range(0, size // 2 or 1), range(size // 2, size)] for size in view.shape]
    for ranges in itertools.product(*pieces):
        asked = []

        def at(index, asked=asked):
            asked.append(tensor[index].size)
            return tensor[index]

        found = view.read(at, ranges)
        wanted = expected(tensor)[tuple(slice(each.start, each.stop) for each in ranges)]
        np.testing.assert_array_equal(found, wanted)
        assert sum(asked) == wanted.size


@pytest.mark.parametrize("case", CASES)
def test_a_written_leaf_is_read_again_and_the_rest_is_left(case):
    view, expected = CASES[case]
    tensor = np.zeros(view.tensor_shape, np.float32)
    leaf = expected(tensor_of(view)) + 0.5
    view.write(tensor, leaf)
    np.testing.assert_array_equal(expected(tensor), leaf)
    assert np.count_nonzero(tensor) == leaf.size
