"""The layer stack, cut and joined: paths and trees."""

import numpy as np
import pytest

from llm3.segments import canonical, canonical_path, locate, runs, segment_path, segmented
from llm3.tree import leaf_digests
from tests.helpers.tiny import make_params, model_config


@pytest.mark.parametrize("segments", [((0, 3),), ((0, 1), (1, 3)), ((0, 1), (1, 2), (2, 3))])
def test_cutting_and_joining_the_stack_is_a_round_trip(segments):
    params = make_params(model_config())
    cut = segmented(params, segments)
    assert list(cut["layers"]) == [f"{a}:{b}" for a, b in segments]
    assert leaf_digests(canonical(cut)) == leaf_digests(params)


def test_segments_are_joined_in_the_order_of_numbers_not_of_text():
    stack_of_12 = {"layers": {"x": {"scale": np.arange(12.0)}}}
    cut = segmented(stack_of_12, ((0, 2), (2, 10), (10, 12)))
    shuffled = cut | {"layers": dict(sorted(cut["layers"].items()))}
    np.testing.assert_array_equal(canonical(shuffled)["layers"]["x"]["scale"], np.arange(12.0))


def test_a_segmented_path_names_the_canonical_leaf_and_its_layers():
    assert locate("layers/6:8/mlp/up/kernel") == ("layers/mlp/up/kernel", range(6, 8))
    assert locate("layers/attention/out/bias") == ("layers/attention/out/bias", None)
    assert locate("head/kernel") == ("head/kernel", None)
    assert canonical_path("layers/6:8/mlp/up/kernel") == "layers/mlp/up/kernel"


def test_a_path_in_a_segment_leads_back_to_the_canonical_one():
    assert segment_path("layers/mlp/up/kernel", 6, 8) == "layers/6:8/mlp/up/kernel"
    assert segment_path("head/kernel", 6, 8) == "head/kernel"
    assert locate(segment_path("layers/x/layers/y", 0, 1)) == ("layers/x/layers/y", range(1))


def test_layers_with_equal_patterns_make_one_run():
    assert runs("aabba") == ((0, 2), (2, 4), (4, 5))
    assert runs([0]) == ((0, 1),)
