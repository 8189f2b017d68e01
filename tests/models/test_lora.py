"""Adapters: what they add to the model, what they leave alone, and what merging them gives."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llm3.config.schema import AdapterConfig, OptimizerConfig, StageConfig
from llm3.distributed.sharding import make_mesh
from llm3.errors import UserError
from llm3.models.lora import column_norms, merged, scale_of, with_magnitudes
from llm3.models.transformer import abstract, init
from llm3.segments import canonical, segmented
from llm3.training.phase import build
from llm3.tree import flatten, unflatten
from tests.helpers.tiny import TASK, jit, make_batch, model_config

KINDS = {
    "lora": AdapterConfig(rank=3, alpha=6.0),
    "rslora": AdapterConfig(rank=4, alpha=6.0, rslora=True),
    "dora": AdapterConfig(rank=3, alpha=6.0, dora=True),
    "some": AdapterConfig(rank=2, targets=("query", "down")),
}
SOME_KINDS = ["lora", "dora", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("rslora", "some"))]
BATCH = make_batch(4)


def with_adapters(**adapters) -> dataclasses.dataclass:
    return model_config(attention_bias="all", qk_norm="head", adapters=tuple(adapters.items()))


@functools.cache
def new_params(config, seed=0) -> dict:
    """As a stage begins with them."""
    params = init(config, seed, make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1]))
    return with_magnitudes(params, flatten(params))


def trained(params: dict) -> dict:
    """Parameters whose adapters are not at their start any more."""
    flat, key = flatten(params), jax.random.key(5)
    for n, path in enumerate(flat):
        if path.endswith(("/b", "/magnitude")):
            flat[path] = flat[path] + 0.1 * jax.random.normal(jax.random.fold_in(key, n), flat[path].shape)
    return unflatten(flat)


@functools.cache
def forward(config, segments):
    """params, key -> logits, compiled once."""
    graph = abstract(config, segments).graph

    @jit
    def run(params, key):
        model = nnx.merge(graph, params)
        return model.logits(model(BATCH.tokens, BATCH.positions, BATCH.segments, key=key))

    return run


def logits(config, params, segments=None, key=None) -> np.ndarray:
    segments = segments or ((0, config.layers),)
    return np.asarray(forward(config, segments)(segmented(params, segments), key))


def base_of(config, params) -> tuple:
    plain = {path: leaf for path, leaf in flatten(params).items() if "/lora/" not in path}
    return dataclasses.replace(config, adapters=()), unflatten(plain)


@pytest.mark.parametrize("kind", SOME_KINDS)
def test_new_adapters_leave_the_logits_as_they_were(kind):
    config = with_adapters(x=KINDS[kind])
    params = new_params(config)
    new, base = logits(config, params), logits(*base_of(config, params))
    if KINDS[kind].dora:  # magnitude / norm is 1 up to rounding
        np.testing.assert_allclose(new, base, atol=2e-6)
    else:
        np.testing.assert_array_equal(new, base)


@pytest.mark.parametrize("kind", SOME_KINDS)
def test_merged_equals_unmerged(kind):
    config = with_adapters(x=KINDS[kind])
    params = trained(new_params(config))
    plain, whole = base_of(config, params)[0], merged(params, config.adapters)
    assert flatten(whole).keys() == flatten(base_of(config, params)[1]).keys()
    apart = logits(config, params)
    np.testing.assert_allclose(logits(plain, whole), apart, atol=1e-5)
    assert np.abs(apart - logits(*base_of(config, params))).max() > 0.003


def test_two_active_adapters_add_up():
    config = with_adapters(x=KINDS["lora"], y=KINDS["some"])
    params = trained(new_params(config))
    flat, whole = flatten(params), flatten(merged(params, config.adapters))
    expected = np.asarray(flat["layers/mlp/down/kernel"])
    for name, adapter in config.adapters:
        a, b = (np.asarray(flat[f"layers/mlp/down/lora/{name}/{leaf}"]) for leaf in "ab")
        expected = expected + scale_of(adapter) * (a @ b)
    np.testing.assert_allclose(whole["layers/mlp/down/kernel"], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(logits(base_of(config, params)[0], unflatten(whole)), logits(config, params), atol=1e-5)


def test_scales_are_those_of_the_papers():
    assert scale_of(AdapterConfig(rank=16, alpha=32.0)) == 2
    assert scale_of(AdapterConfig(rank=16, alpha=32.0, rslora=True)) == 8


def test_dora_begins_with_the_column_norms_of_the_kernel():
    flat = flatten(new_params(with_adapters(x=KINDS["dora"])))
    out, down = (np.asarray(flat[f"layers/{name}/kernel"]) for name in ("attention/out", "mlp/down"))
    magnitude = flat["layers/attention/out/lora/x/magnitude"]  # [L, D] of a kernel [L, H, h, D]
    np.testing.assert_allclose(magnitude, np.sqrt((out**2).sum(axis=(1, 2))), rtol=1e-6)
    np.testing.assert_allclose(flat["layers/mlp/down/lora/x/magnitude"], np.sqrt((down**2).sum(axis=1)), rtol=1e-6)


def test_the_norm_of_dora_is_a_constant_in_the_gradient():
    """Against the same function with the norm computed outside: DoRA, section 4.3."""
    config = with_adapters(x=AdapterConfig(rank=2, dora=True, targets=("up",)))
    params = trained(new_params(config))
    graph, whole = abstract(config).graph, segmented(params, ((0, config.layers),))

    def loss(params):
        model = nnx.merge(graph, params)
        return jnp.sum(model.logits(model(BATCH.tokens, BATCH.positions, BATCH.segments)) ** 2)

    def by_hand(ab, params):
        flat = dict(flatten(canonical(params)))
        a, b = ab
        kernel, m = flat["layers/mlp/up/kernel"], flat["layers/mlp/up/lora/x/magnitude"]
        product = scale_of(dict(config.adapters)["x"]) * jnp.einsum("lir,lro->lio", a, b)
        norm = jax.lax.stop_gradient(jax.vmap(lambda w: column_norms(w, 1))(kernel + product))
        plain = {path: leaf for path, leaf in flat.items() if "/lora/" not in path}
        plain["layers/mlp/up/kernel"] = (kernel + product) * (m / norm)[:, None]
        model = nnx.merge(
            abstract(base_of(config, params)[0]).graph, segmented(unflatten(plain), ((0, config.layers),))
        )
        return jnp.sum(model.logits(model(BATCH.tokens, BATCH.positions, BATCH.segments)) ** 2)

    path = f"layers/0:{config.layers}/mlp/up/lora/x"
    gradient = flatten(jit(jax.grad(loss))(whole))
    ab = tuple(flatten(whole)[f"{path}/{leaf}"] for leaf in "ab")
    for leaf, expected in zip("ab", jit(jax.grad(by_hand))(ab, whole), strict=True):
        np.testing.assert_allclose(gradient[f"{path}/{leaf}"], expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())


def test_the_rest_of_a_new_model_is_the_same_with_and_without_adapters():
    config = with_adapters(x=KINDS["some"])
    params = flatten(new_params(config))
    plain = flatten(new_params(dataclasses.replace(config, adapters=())))
    for path, leaf in plain.items():
        np.testing.assert_array_equal(params[path], leaf, err_msg=path)
    adapted = {path.split("/lora/")[0] for path in params if "/lora/" in path}
    assert adapted == {"layers/attention/query", "layers/mlp/down"}
    assert not np.any(params["layers/attention/query/lora/x/b"]) and np.any(params["layers/attention/query/lora/x/a"])


@pytest.mark.slow
def test_dropout_is_of_the_step_and_does_not_depend_on_how_the_stack_is_cut():
    config = with_adapters(x=AdapterConfig(rank=3, dropout=0.5))
    params = trained(new_params(config))
    first, again, other = (logits(config, params, key=jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3
    cut = logits(config, params, ((0, 1), (1, config.layers)), key=jax.random.key(1))
    np.testing.assert_allclose(cut, first, atol=1e-5)
    without = with_adapters(x=AdapterConfig(rank=3))
    np.testing.assert_array_equal(logits(config, params), logits(without, params))


def test_dropout_keeps_the_mean_and_drops_the_share():
    from llm3.models.lora import LoRA

    adapter = LoRA({"i": 64}, {"o": 1}, AdapterConfig(rank=1, alpha=1.0, dropout=0.25), nnx.Rngs(params=0, lora=1))
    adapter.a[...] = jnp.ones((64, 1))
    adapter.b[...] = jnp.ones((1, 1))
    sums = np.asarray(jax.vmap(lambda n: adapter(jnp.ones((1, 16, 64)), jax.random.key(n)))(jnp.arange(256)))
    assert abs(sums.mean() - 64) < 0.2  # standard error: sqrt(64 * 0.25 / 0.75) / sqrt(4096) = 0.07
    assert abs(sums.var() / (64 * 0.25 / 0.75) - 1) < 0.1


def stage(**changes) -> StageConfig:
    optimizer = OptimizerConfig(learning_rate=1e-2)
    return StageConfig("finetune", {"a": 1.0}, 5, 4, 16, start="x", optimizer=optimizer, **changes)


def built(config, new=False, **changes):
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    with jax.set_mesh(mesh):
        return build(stage(**changes), config, mesh, task=TASK, fresh=lambda path: new, seed=0, where="stage")[0]


def test_an_idle_adapter_never_trains_and_changes_nothing():
    config = with_adapters(x=KINDS["lora"], y=dataclasses.replace(KINDS["lora"], active=False))
    trainable = built(config, train="all").partition.trainable
    assert any("/lora/x/" in path for path in trainable) and not any("/lora/y/" in path for path in trainable)
    params = trained(new_params(config))
    moved = {path: leaf + 1 if "/lora/y/" in path else leaf for path, leaf in flatten(params).items()}
    np.testing.assert_array_equal(logits(config, params), logits(config, unflatten(moved)))
    with pytest.raises(UserError, match=r"'lora\(y\)' matches nothing"):
        built(config, train="lora(y)")


def test_lora_alone_trains_by_its_shorthand():
    config = with_adapters(x=KINDS["some"], y=KINDS["some"])
    every = built(config, train="lora").partition.trainable
    assert every and all("/lora/" in path for path in every)
    assert {path.split("/")[-2] for path in built(config, train="lora(y)").partition.trainable} == {"y"}


def test_a_new_adapter_that_nothing_trains_is_refused():
    config = with_adapters(x=KINDS["some"], y=KINDS["some"])
    with pytest.raises(UserError, match=r"stage\.adapters\.y: it is new, and no rule of train='lora\(x\)' trains it"):
        built(config, new=True, train="lora(x)")
    assert built(config, new=False, train="lora(x)").partition.trainable  # y comes from the parent, and stays as it is


def test_dora_cannot_share_a_kernel():
    with pytest.raises(UserError, match=r"'query'.*DoRA"):
        with_adapters(x=KINDS["dora"], y=KINDS["some"])
    with_adapters(x=KINDS["dora"], y=dataclasses.replace(KINDS["some"], active=False))
