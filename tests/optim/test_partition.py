"""From rules to what trains."""

import functools

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from llm3.errors import UserError
from llm3.models.transformer import abstract
from llm3.optim.partition import make_partition, make_partitions
from llm3.segments import canonical
from llm3.tree import flatten, leaf_digests
from tests.helpers.tiny import CLASSES, make_params, model_config

LAYERS = 14
WHOLE = {"embed/embedding", "final_norm/scale", "head/bias", "head/kernel", "lm_head/kernel"}


@functools.cache
def shapes(layers: int = LAYERS):
    config = model_config(layers=layers, classes=CLASSES, tie_embeddings=False, attention_bias="all", qk_norm="head")
    return canonical(abstract(config).shapes)


def stacked(layers: int = LAYERS) -> set[str]:
    return {path for path in flatten(shapes(layers)) if path.startswith("layers/")}


def trained(rules, layers: int = LAYERS) -> set[tuple[str, int | None]]:
    """What trains, as (canonical path, layer or None)."""
    found = make_partition(shapes(layers), rules, layers)
    leaves = set()
    for path in found.trainable:
        head, _, rest = path.partition("/")
        if head != "layers":
            leaves.add((path, None))
            continue
        cut, _, name = rest.partition("/")
        first, last = map(int, cut.split(":"))
        assert (first, last) in found.segments
        leaves |= {(f"layers/{name}", layer) for layer in range(first, last)}
    return leaves


def in_layers(*layers: int, ending: str = "", containing: str = "") -> set[tuple[str, int]]:
    return {(path, i) for path in stacked() for i in layers if path.endswith(ending) and containing in path}


def whole(*paths: str) -> set[tuple[str, None]]:
    return {(path, None) for path in paths}


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("all", in_layers(*range(14)) | whole(*WHOLE)),
        ("layers(3)", in_layers(3)),
        ("layers(3, 5)", in_layers(3, 5)),
        ("layers(-1)", in_layers(13)),
        ("layers[3]/.*", in_layers(3)),
        ("layers[-2:]/.*", in_layers(12, 13)),
        ("layers[:2]/.*", in_layers(0, 1)),
        ("layers[1:8:3]/.*", in_layers(1, 4, 7)),
        ("layers[3,-1]/attention/.*", in_layers(3, 13, containing="/attention/")),
        ("layers[3]/attention/query/kernel", {("layers/attention/query/kernel", 3)}),
        (
            "layers/mlp/(gate|up)/kernel",
            {(f"layers/mlp/{name}/kernel", i) for name in ("gate", "up") for i in range(14)},
        ),
        ("top(1)", in_layers(13) | whole(*WHOLE - {"embed/embedding"})),
        ("top( 2 )", in_layers(12, 13) | whole(*WHOLE - {"embed/embedding"})),
        ("biases", in_layers(*range(14), ending="/bias") | whole("head/bias")),
        (".*/bias", in_layers(*range(14), ending="/bias") | whole("head/bias")),
        ("norms", in_layers(*range(14), ending="norm/scale") | whole("final_norm/scale")),
        ("embeddings", whole("embed/embedding")),
        ("head/.*", whole("head/bias", "head/kernel")),
        (["not layers(3)", "all"], in_layers(*(i for i in range(14) if i != 3)) | whole(*WHOLE)),
        (["layers[3]/mlp/.*", "not layers/.*", ".*"], in_layers(3, containing="/mlp/") | whole(*WHOLE)),
        (["not biases", "layers(3)"], in_layers(3) - in_layers(3, ending="/bias")),
    ],
    ids=lambda value: None if isinstance(value, set) else str(value),
)
def test_a_rule_picks_by_component_and_the_first_that_matches_decides(rule, expected):
    assert trained(rule) == expected


def test_a_regular_expression_matches_a_whole_component_and_never_a_part():
    for part in ("layers/mlp/gat/kernel", "layers/attention/que.?/kernel", "ead/.*", "layers/ml/.*", "head"):
        with pytest.raises(UserError, match="matches nothing"):
            trained(part)


def test_dots_stand_for_one_or_more_components_and_never_for_none():
    assert trained("embed/.*") == whole("embed/embedding")
    with pytest.raises(UserError, match="matches nothing"):
        trained("embed/embedding/.*")


def test_a_rule_that_matches_nothing_names_the_nearest_leaf():
    with pytest.raises(
        UserError, match=r"'layers/mlp/gatte/kernel' matches nothing; did you mean 'layers/mlp/gate/kernel'"
    ):
        trained("layers/mlp/gatte/kernel")
    with pytest.raises(UserError, match=r"'embedings' matches nothing; did you mean 'embeddings'.*top\(N\)"):
        trained(["all", "embedings"])


@pytest.mark.parametrize(
    ("rules", "complaint"),
    [
        (["all", "not embeddings"], "'not embeddings' decides nothing: 'all' before it matches the same parameters"),
        (["layers(3)", "layers(3)"], r"'layers\(3\)' decides nothing: 'layers\(3\)' before"),
        (["top(2)", "head/.*", "norms"], r"'head/\.\*' decides nothing: 'top\(2\)' before it"),
        (
            ["layers[:7]/.*", "layers[7:]/.*", "not layers(6,7)"],
            r"'not .*' decides .*: 'layers\[:7\]/\.\*' and .* match ",
        ),
        (["not head/bias", "norms", "head/bias"], "'head/bias' decides nothing: 'not head/bias' before it"),
        (["not layers/.*", "layers/.*"], "decides nothing: 'not layers"),
    ],
)
def test_a_rule_that_earlier_ones_hide_is_an_error_that_names_them(rules, complaint):
    with pytest.raises(UserError, match=complaint):
        trained(rules)


def test_a_rule_that_earlier_ones_hide_in_part_decides_about_the_rest():
    assert trained(["layers(3)", "not layers(3,4)", "biases"]) == in_layers(3) | {
        leaf for leaf in trained("biases") if leaf[1] not in (3, 4)
    }


@pytest.mark.parametrize("rules", ["not all", ["not layers/.*", "not head/.*"], []], ids=str)
def test_nothing_to_train_is_an_error(rules):
    with pytest.raises(UserError, match="nothing to train"):
        trained(rules)


@pytest.mark.parametrize(
    ("rule", "complaint"),
    [
        ("layers(14)", "picks no layers; the model has layers 0 to 13"),
        ("layers[-15]/.*", "picks no layers"),
        ("layers[x]/.*", "picks no layers"),
        ("layers[::0]/.*", "picks no layers"),
        ("top(0)", "the model has 14 layers"),
        ("top(15)", "the model has 14 layers"),
        ("layers/(/kernel", "no regular expression"),
        ("layers[20:]/.*", "matches nothing"),
    ],
)
def test_a_rule_that_cannot_be_meant_is_an_error(rule, complaint):
    with pytest.raises(UserError, match=complaint):
        trained(rule)


@pytest.mark.parametrize(
    ("rules", "segments"),
    [
        ("all", ((0, 14),)),
        ("head/.*", ((0, 14),)),
        ("biases", ((0, 14),)),
        ("top(2)", ((0, 12), (12, 14))),
        ("layers(3)", ((0, 3), (3, 4), (4, 14))),
        ("layers(3, 4, 6)", ((0, 3), (3, 5), (5, 6), (6, 7), (7, 14))),
        (["layers[3]/mlp/.*", "layers[4]/attention/.*"], ((0, 3), (3, 4), (4, 5), (5, 14))),
    ],
    ids=str,
)
def test_layers_of_one_pattern_share_a_segment(rules, segments):
    assert make_partition(shapes(), rules, LAYERS).segments == segments


rule_lists = st.lists(
    st.builds(
        "{}layers[{}]/{}".format,
        st.sampled_from(["", "not "]),
        st.sampled_from(["0", "-1", "1,3", "1:", ":-1"]),
        st.sampled_from([".*", "mlp/.*", "attention/query/kernel"]),
    ),
    max_size=3,
).map(lambda rules: [*rules, "biases"])


@settings(max_examples=12, deadline=None, derandomize=True)
@given(rule_lists)
def test_splitting_and_joining_is_a_round_trip_with_minimal_segments(rules):
    config = model_config(layers=5, attention_bias="all")
    params = make_params(config)
    try:
        found = make_partition(params, rules, config.layers)
    except UserError as error:  # a rule that the others hide
        assert "decides nothing" in str(error)
        assume(False)
    trainable, frozen = found.split(params)
    assert set(flatten(trainable)) == found.trainable
    assert not set(flatten(trainable)) & set(flatten(frozen))
    assert leaf_digests(found.join(trainable, frozen)) == leaf_digests(params)
    assert [a for a, _ in found.segments] == [0, *(b for _, b in found.segments[:-1])]
    assert found.segments[-1][1] == config.layers

    def pattern(segment) -> set[str]:
        prefix = f"layers/{segment[0]}:{segment[1]}/"
        return {path.removeprefix(prefix) for path in found.trainable if path.startswith(prefix)}

    for left, right in zip(found.segments, found.segments[1:], strict=False):
        assert pattern(left) != pattern(right)


def test_the_trainable_tree_holds_the_numbers_of_the_chosen_layers():
    params = make_params(model_config(layers=5))
    trainable, frozen = make_partition(params, "layers[1:3]/mlp/up/kernel", 5).split(params)
    kernel = params["layers"]["mlp"]["up"]["kernel"]
    assert list(flatten(trainable)) == ["layers/1:3/mlp/up/kernel"]
    np.testing.assert_array_equal(trainable["layers"]["1:3"]["mlp"]["up"]["kernel"], kernel[1:3])
    np.testing.assert_array_equal(frozen["layers"]["3:5"]["mlp"]["up"]["kernel"], kernel[3:])


def phases_of(rules, *unfreeze):
    return make_partitions(shapes(), rules, list(unfreeze), LAYERS)


def test_unfreezing_adds_to_what_trains_and_keeps_the_path_of_every_leaf():
    phases = phases_of("head/.*", (10, "top(1)"), (30, ["layers(3)", "top(2)"]))
    assert list(phases) == [0, 10, 30]
    first, second, third = phases.values()
    assert first.trainable < second.trainable < third.trainable
    assert first.segments == second.segments == third.segments
    assert first.trainable == {"head/bias", "head/kernel"}
    # the runs of layers that begin to train together: 3, 12 and 13 are each a segment of their own
    assert third.segments == ((0, 3), (3, 4), (4, 12), (12, 13), (13, 14))
    assert "layers/13:14/mlp/up/kernel" in second.trainable and "layers/12:13/mlp/up/kernel" not in second.trainable
    assert {"layers/3:4/mlp/up/kernel", "layers/12:13/mlp/up/kernel"} <= third.trainable


def test_without_unfreezing_there_is_one_phase():
    assert phases_of("top(2)") == {0: make_partition(shapes(), "top(2)", LAYERS)}


def test_unfreezing_what_trains_already_is_refused():
    with pytest.raises(UserError, match=r"unfreeze at step 5: 'layers\(13\)' adds nothing"):
        phases_of("top(1)", (5, "layers(13)"))
    for idle in ("layers(13)", "not head/.*"):
        with pytest.raises(UserError, match=r"unfreeze at step 5: rule '.*' changes nothing: all .* trains already"):
            phases_of("top(1)", (5, [idle, "layers(12)"]))
    with pytest.raises(UserError, match=r"unfreeze at step 5: train rule 'norms' decides nothing: 'all' before it"):
        phases_of("top(1)", (5, ["all", "norms"]))
