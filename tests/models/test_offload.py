"""What waits in the host's memory: the products that remat keeps, and frozen layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llm3.config.model_schema import AdapterConfig
from llm3.config.schema import StageConfig
from llm3.distributed import memory
from llm3.distributed.sharding import place_batch, tree_shardings
from llm3.errors import UserError
from llm3.models.transformer import abstract
from llm3.objectives import causal
from llm3.optim.optimizer import state_bytes
from llm3.planning.trace import device_bytes
from llm3.segments import in_stack, segmented
from llm3.training.phase import build
from llm3.tree import flatten
from tests.helpers.meshes import mesh_of
from tests.helpers.tiny import TASK, jit, make_batch, make_params, model_config
from tests.helpers.tiny_jaxpr import programs

DEVICE, HOST = jax.memory.Space.Device, jax.memory.Space.Host


def make_step(mesh, **changes):
    """(the loss and the gradients of a step as a function of the parameters, the parameters on the mesh)."""
    config, batch = model_config(vocab_size=64, **changes), make_batch(8)
    graph, shapes, axes = abstract(config)
    params = segmented(make_params(config), ((0, config.layers),))

    def loss(params):
        return jnp.sum(causal.token_losses(nnx.merge(graph, params), batch) * batch.weights)

    return jax.value_and_grad(loss), jax.device_put(params, tree_shardings(mesh, shapes, axes))


def kept(remat: str, matmul: str) -> dict:
    """{memory: number of activations of all layers that the loop over the layers leaves there}."""
    with jax.set_mesh(mesh := mesh_of(1)):
        step, params = make_step(mesh, remat=remat, matmul=matmul)
        program = jax.make_jaxpr(step)(params).jaxpr
    loops = [eqn for each in programs(program) for eqn in each.eqns if eqn.primitive.name == "scan"]
    found = [out.aval for eqn in loops for out in eqn.outvars if out.aval.shape[:3] == (3, 8, 16)]
    return {space: sum(aval.memory_space == space for aval in found) for space in (DEVICE, HOST)}


@pytest.mark.parametrize("matmul", ["compute", "int8"])
def test_the_products_that_dots_keeps_wait_in_the_host_and_the_inputs_of_the_layers_do_not(matmul):
    if matmul == "int8":
        pytest.importorskip("qwix", reason="needs pip install 'llm3[qwix]'")
    assert kept("dots", matmul) == {DEVICE: 1 + 6, HOST: 0}  # all but `down`, which nothing in the layer reads
    assert kept("offload", matmul) == {DEVICE: 1, HOST: 6}


@pytest.mark.slow
def test_offload_computes_what_dots_computes_also_on_a_mesh():
    def run(mesh, remat):
        with jax.set_mesh(mesh):
            step, params = make_step(mesh, remat=remat)
            loss, gradients = jax.device_get(jit(step)(params))
        return loss, flatten(gradients)

    loss, gradients = run(mesh_of(1), "dots")
    found, theirs = run(mesh_of(8, data=2, fsdp=2, tensor=2), "offload")
    np.testing.assert_allclose(found, loss, rtol=1e-5)
    for path, gradient in gradients.items():
        np.testing.assert_allclose(theirs[path], gradient, rtol=1e-3, atol=1e-3, err_msg=path)


def test_frozen_layers_in_the_host_take_nothing_of_the_device_and_need_remat():
    stage = StageConfig("finetune", {"a": 1.0}, 5, 4, 16, start="x", train="top(1)", frozen_memory="host")

    def built(remat):
        config, fresh = model_config(remat=remat), lambda _: True
        return build(stage, config, mesh_of(1), task=TASK, fresh=fresh, seed=0, where="stage")[0]

    frozen = built("full").abstract_state.frozen
    assert device_bytes(frozen) == state_bytes({**frozen, "layers": {}}) > 0
    with pytest.raises(UserError, match=r"stage\.frozen_memory='host': needs model\.remat"):
        built("none")


def test_a_backend_without_such_memory_is_refused(monkeypatch):
    monkeypatch.setattr(memory, "HOST", "attic")
    stage = StageConfig("pretrain", {"a": 1.0}, 5, 4, 16)
    with pytest.raises(UserError, match=r"config\.model\.remat='offload': this backend has no memory 'attic'; it has"):
        build(stage, model_config(remat="offload"), mesh_of(1), task=TASK, fresh=lambda _: True, seed=0, where="stage")


@pytest.mark.slow
def test_frozen_layers_in_the_host_train_the_others_as_those_on_the_device():
    """LoRA over quantised kernels, and a layer that trains: the frozen parts of two segments, with and without it."""
    adapter = (("x", AdapterConfig(rank=2, targets=("query", "down"))),)
    config = model_config(remat="dots", attention_bias="qkv", adapters=adapter, vocab_size=64)
    mesh, found = mesh_of(8, data=2, fsdp=2, tensor=2), {}
    for where in ("device", "host"):
        stage = StageConfig(
            *("finetune", {"a": 1.0}, 5, 8, 16),
            start="x",
            train=["lora", "layers(2)"],
            frozen="int8",
            frozen_memory=where,
        )
        with jax.set_mesh(mesh):
            phase = build(stage, config, mesh, task=TASK, fresh=lambda _: True, seed=0, where="stage")[0]
            params = jax.tree.map(
                lambda x, s: jax.device_put(x, s.sharding), make_params(config), phase.abstract_params
            )
            state, metrics = phase.train_step(phase.state(params), place_batch(mesh, make_batch(8)))
            found[where] = jax.device_get((phase.params(state), metrics))
        kinds = {
            path: {part.sharding.memory_kind for part in jax.tree.leaves(leaf)}
            for path, leaf in flatten(state.frozen).items()
        }
        expected = {path: {memory.HOST if where == "host" and in_stack(path) else "device"} for path in kinds}
        assert kinds == expected
    jax.tree.map(np.testing.assert_array_equal, found["host"], found["device"])


def test_a_last_layer_at_some_positions_only_is_read_from_the_host_too():
    config, batch, mesh = model_config(), make_batch(2), mesh_of(1)
    graph, shapes, axes = abstract(config)
    params = segmented(make_params(config), ((0, config.layers),))
    there = jax.tree.map(lambda x: x.with_memory_kind(memory.HOST), tree_shardings(mesh, shapes, axes)["layers"])
    positions = jnp.asarray([[1, 3], [0, 5]])

    @jit
    def hidden(params):
        return nnx.merge(graph, params)(batch.tokens, batch.positions, batch.segments, output_positions=positions)[0]

    with jax.set_mesh(mesh):
        expected = hidden(params)
        found = hidden({**params, "layers": jax.device_put(params["layers"], there)})
    np.testing.assert_array_equal(found, expected)
