"""One train step: the parameters that it changes, and the settings that must not affect its gradients."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from llm3.config.schema import ModelConfig, OptimizerConfig, StageConfig
from llm3.data.batch import Batch
from llm3.distributed.sharding import place_batch
from llm3.errors import UserError
from llm3.models.transformer import abstract
from llm3.objectives import Sums, causal
from llm3.optim.optimizer import state_bytes
from llm3.optim.partition import make_partition
from llm3.segments import segmented
from llm3.training import guard
from llm3.training.phase import Phase, build
from llm3.training.step import STEP_METRICS, TrainState, make_train_step
from llm3.tree import flatten, leaf_digests
from tests.helpers.meshes import mesh_of
from tests.helpers.tiny import COMPILE_FAST, TASK, jit, make_batch, make_params, model_config

ROWS, STEPS = 16, 10
PLAIN = {"schedule": "constant", "weight_decay": 0.0, "clip_norm": 0.0}
OPTIMIZERS = {
    "gradient": OptimizerConfig("sgd", 1.0, **PLAIN),  # the gradients are old minus new parameters
    "clipped": OptimizerConfig("sgd", 0.5, "constant", weight_decay=0.1, clip_norm=0.25),
    "adamw": OptimizerConfig("adamw", 1e-2, "linear", weight_decay=0.1, clip_norm=1.0),
    "all at once": OptimizerConfig(
        "adamw", 1e-2, "linear", layer_decay=0.7, learning_rates=[["norms", 0.5]], l2_sp=0.3, ema=0.9
    ),
}


class Run(NamedTuple):
    config: ModelConfig
    phase: Phase
    mesh: jax.sharding.Mesh
    compiled: jax.stages.Compiled

    def state(self, params: dict) -> TrainState:
        with jax.set_mesh(self.mesh):
            return self.phase.state(
                jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), params, self.phase.abstract_params)
            )

    def step(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict]:
        """Host copies of the state (the compiled step donates its input) and of the metrics."""
        with jax.set_mesh(self.mesh):
            return jax.device_get(self.compiled(jax.device_put(state, self.shardings), place_batch(self.mesh, batch)))

    @property
    def shardings(self) -> TrainState:
        return jax.tree.map(lambda x: x.sharding, self.phase.abstract_state)

    def canonical(self, state: TrainState) -> dict:
        return flatten(jax.device_get(self.phase.params(state)))


@functools.cache
def make_run(rules=("all",), optimizer="gradient", devices=1, micro_batches=1, **changes) -> Run:
    config = model_config(vocab_size=64, **changes)
    stage = StageConfig(
        "posttrain",
        {"source": 1.0},
        STEPS,
        ROWS,
        16,
        start="pretrain",
        train=list(rules),
        optimizer=OPTIMIZERS[optimizer],
        micro_batches=micro_batches,
    )
    sizes = {1: {}, 8: {"data": 2, "fsdp": 2, "tensor": 2}, "data and fsdp": {"data": 4, "fsdp": 2}}[devices]
    mesh = mesh_of(8 if sizes else 1, **sizes)
    with jax.set_mesh(mesh):
        phase = build(stage, config, mesh, task=TASK, fresh=lambda path: False, seed=0, where="stage")[0]
        lowered = phase.train_step.lower(phase.abstract_state, place_batch(mesh, make_batch(ROWS)))
        return Run(config, phase, mesh, lowered.compile(compiler_options=COMPILE_FAST))


PARAMS = make_params(model_config(vocab_size=64))


@functools.cache
def full_gradients(remat: str = "none") -> tuple[float, dict[str, np.ndarray]]:
    """The mean loss and flat canonical gradients of all leaves, without a partition or a train step."""
    config = model_config(vocab_size=64)
    graph = abstract(config).graph

    def mean_loss(params, batch):
        model = nnx.merge(graph, segmented(params, ((0, config.layers),)))
        return jnp.sum(causal.token_losses(model, batch) * batch.weights) / jnp.sum(batch.weights)

    loss, gradients = jit(jax.value_and_grad(mean_loss))(PARAMS, make_batch(ROWS))
    return float(loss), flatten(jax.device_get(gradients))


def mask_of(partition) -> dict[str, np.ndarray]:
    """1 where a canonical leaf is trainable, 0 where it is frozen."""
    masks = {path: np.zeros(np.shape(leaf), np.float32) for path, leaf in flatten(PARAMS).items()}
    for path in partition.trainable:
        if path.startswith("layers/"):
            _, cut, name = path.split("/", 2)
            first, last = map(int, cut.split(":"))
            masks[f"layers/{name}"][first:last] = 1
        else:
            masks[path][...] = 1
    return masks


def assert_update_is_the_masked_one(run: Run) -> None:
    """One clipped and decayed SGD step equals the numpy update from the masked full gradients."""
    loss, gradients = full_gradients()
    masks, before, options = mask_of(run.phase.partition), flatten(PARAMS), OPTIMIZERS["clipped"]
    masked = {path: gradient * masks[path] for path, gradient in gradients.items()}
    norm = np.sqrt(sum(np.sum(np.square(each, dtype=np.float64)) for each in masked.values()))
    assert norm > options.clip_norm
    state, metrics = run.step(run.state(PARAMS), make_batch(ROWS))
    assert metrics.keys() == set(STEP_METRICS), "this objective has none of its own"
    assert metrics["loss"] == pytest.approx(loss, abs=1e-5)
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert metrics["skipped"] == 0
    for path, after in run.canonical(state).items():
        decay = options.weight_decay * before[path] * path.endswith(("kernel", "embedding"))
        change = options.learning_rate * (masked[path] * options.clip_norm / norm + decay * masks[path])
        np.testing.assert_allclose(after, before[path] - change, atol=1e-6, err_msg=path)
        np.testing.assert_array_equal(after[masks[path] == 0], before[path][masks[path] == 0], err_msg=path)


RULE = ("layers[1]/.*", "norms")
chosen_layers = st.sampled_from(["layers[0]", "layers[1]", "layers[1:]", "layers[0,2]", "layers"])
chosen_parts = st.sampled_from([".*", "mlp/.*", "attention/.*", "attention/value/kernel", "mlp_norm/scale"])
rule_lists = st.lists(st.builds("{}/{}".format, chosen_layers, chosen_parts), min_size=1, max_size=2)


def none_is_hidden(rules) -> bool:
    """Whether each rule decides something: one that an earlier rule hides is an error."""
    try:
        make_partition(PARAMS, rules, model_config().layers)
    except UserError:
        return False
    return True


rule_lists = rule_lists.filter(none_is_hidden).map(tuple)


@settings(max_examples=2, deadline=None, derandomize=True)
@given(rule_lists, st.booleans())
def test_an_update_equals_the_masked_full_update(rules, with_embeddings):
    rules += ("embeddings",) * with_embeddings
    assert_update_is_the_masked_one(make_run(rules, "clipped"))


def test_an_update_of_some_leaves_is_the_same_under_remat():
    assert_update_is_the_masked_one(make_run(RULE, "clipped", remat="full"))


def test_an_update_of_some_leaves_is_the_same_on_eight_devices():
    assert_update_is_the_masked_one(make_run(RULE, "clipped", devices=8, micro_batches=2))


@pytest.mark.parametrize(("micro_batches", "devices"), [(1, 1), (4, 1), (16, 1), (1, 8), (2, "data and fsdp")])
def test_gradients_do_not_depend_on_micro_batches_or_devices(micro_batches, devices):
    batch = make_batch(ROWS)
    counts = batch.weights.sum(axis=1)
    assert len(set(counts)) > 3 and 0 in counts, "an even batch would prove nothing"
    loss, gradients = full_gradients()
    run = make_run(micro_batches=micro_batches, devices=devices)
    state, metrics = run.step(run.state(PARAMS), batch)
    assert metrics["loss"] == pytest.approx(loss, abs=1e-5)
    assert metrics["weight"] == counts.sum()
    assert metrics["tokens"] == np.sum(batch.segments > 0)
    for path, after in run.canonical(state).items():
        np.testing.assert_allclose(flatten(PARAMS)[path] - after, gradients[path], atol=1e-5, err_msg=path)


def test_after_training_frozen_leaves_are_bit_identical_and_every_selected_leaf_has_changed():
    run = make_run(RULE, "adamw", micro_batches=4)
    state = start = run.state(PARAMS)
    before = run.canonical(start)
    for i in range(3):
        state, metrics = run.step(state, make_batch(ROWS, seed=i))
        assert metrics["skipped"] == 0
    assert leaf_digests(state.frozen) == leaf_digests(jax.device_get(run.state(PARAMS).frozen))
    masks = mask_of(run.phase.partition)
    assert {path for path, mask in masks.items() if not mask.any()} == {"embed/embedding"}
    for path, after in run.canonical(state).items():
        for old, new, mask in zip(before[path], after, masks[path], strict=True):
            assert np.array_equal(old, new) == (not mask.any()), path


def test_only_trainable_leaves_own_moments():
    phase = make_run(RULE, "adamw", micro_batches=4).phase
    trainable = state_bytes(phase.abstract_state.trainable)
    counts = 2 * 4  # int32 counts of Adam and the schedule
    assert state_bytes(phase.abstract_state.opt) == 2 * trainable + counts
    assert trainable < state_bytes(phase.abstract_params) / 2


def assert_nothing_but_the_step_changed(before: TrainState, after: TrainState) -> None:
    assert after.step == before.step + 1
    for old, new in zip(jax.tree.leaves(before[1:-1]), jax.tree.leaves(after[1:-1]), strict=True):
        np.testing.assert_array_equal(old, new)
    assert after.guard.taken == before.guard.taken


def trained_once() -> tuple[Run, TrainState]:
    run = make_run(RULE, "adamw", micro_batches=4)
    return run, run.step(run.state(PARAMS), make_batch(ROWS))[0]


def test_a_step_without_a_label_is_skipped_and_reports_zero():
    run, state = trained_once()
    batch = make_batch(ROWS)
    after, metrics = run.step(state, batch._replace(weights=np.zeros_like(batch.weights)))
    assert (metrics["skipped"], metrics["loss"], metrics["grad_norm"], metrics["weight"]) == (1, 0, 0, 0)
    assert metrics["non_finite_in_a_row"] == 0, "a step without labels does not count"
    assert_nothing_but_the_step_changed(state, after)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_non_finite_step_changes_neither_parameters_nor_moments_nor_the_schedule(poison):
    run, state = trained_once()
    embedding = state.frozen["embed"]["embedding"].copy()
    embedding[:, 0] = poison
    state = state._replace(frozen={**state.frozen, "embed": {"embedding": embedding}})
    after, metrics = run.step(state, make_batch(ROWS))
    assert metrics["skipped"] == 1
    assert not np.isfinite(metrics["loss"]) and metrics["non_finite_in_a_row"] == 1
    assert_nothing_but_the_step_changed(state, after)
    counts = [int(leaf) for leaf in jax.tree.leaves(after.opt) if np.ndim(leaf) == 0]
    assert counts == [1, 1], "the schedule has seen one update"


def test_a_step_that_is_skipped_leaves_no_trace_in_any_part_of_the_optimizer():
    """Layer and leaf rates, the pull toward the parent and the running mean continue as without the step."""
    run, good = make_run(optimizer="all at once"), [make_batch(ROWS, seed) for seed in (0, 1)]
    bad = good[0]._replace(weights=good[0].weights * np.inf)

    def after(*batches):
        state = run.state(PARAMS)
        for batch in batches:
            state, _ = run.step(state, batch)
        return state

    skipped, expected = after(good[0], bad, good[1]), after(*good)
    assert (skipped.step, expected.step) == (3, 2)
    jax.tree.map(np.testing.assert_array_equal, skipped[1:-1], expected[1:-1])


def test_bfloat16_computes_near_float32_and_keeps_float32_parameters():
    loss, gradients = full_gradients()
    run = make_run(compute_dtype="bfloat16", micro_batches=2)
    state, metrics = run.step(run.state(PARAMS), make_batch(ROWS))
    assert metrics["loss"] == pytest.approx(loss, rel=0.02)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.trainable)} == {np.dtype(np.float32)}
    before, after = flatten(PARAMS), run.canonical(state)
    change = np.concatenate([(before[path] - after[path]).ravel() for path in before])
    expected = np.concatenate([gradients[path].ravel() for path in before])
    assert np.linalg.norm(change - expected) < 0.05 * np.linalg.norm(expected)


class Scalar(nnx.Module):
    """A model of one number, for cases that a transformer cannot produce."""

    def __init__(self):
        self.number = nnx.Param(jnp.zeros(()))


def scalar_step(loss, seed: int = 0, micro_batches: int = 1):
    """number, step -> (new number, metrics) of SGD with a learning rate of 1 on two rows of weight 1."""
    transform = optax.sgd(1.0)
    graph = nnx.split(Scalar(), nnx.Param)[0]
    step = jit(make_train_step(graph, loss, transform, seed=seed, micro_batches=micro_batches))

    def run(number: float, at: int = 0):
        trainable = {"number": jnp.float32(number)}
        state = TrainState(jnp.int32(at), trainable, {}, transform.init(trainable), guard.new_guard(0.0, 2))
        after, metrics = step(state, Batch(*[np.ones((2, 3), np.float32)] * 5))
        return float(after.trainable["number"]), jax.device_get(metrics)

    return run


def test_a_finite_loss_with_a_non_finite_gradient_is_skipped():
    run = scalar_step(lambda model, batch, key: Sums(jnp.sqrt(model.number[...]), jnp.sum(batch.weights), {}))
    number, metrics = run(0.0)
    assert (number, metrics["loss"], metrics["skipped"]) == (0, 0, 1)
    assert run(4.0)[1]["skipped"] == 0


def test_random_keys_depend_on_seed_step_and_micro_batch_and_on_nothing_else():
    def noise(model, batch, key):
        x = jax.random.normal(key)
        return Sums(x * model.number[...], jnp.sum(batch.weights), {"noise": x, "square": x**2})

    run, halves = scalar_step(noise), scalar_step(noise, micro_batches=2)
    at = [float(run(1.0, step)[1]["noise"]) for step in (5, 5, 6)]
    at.append(float(scalar_step(noise, seed=1)(1.0, 5)[1]["noise"]))
    assert at[0] == at[1]
    assert len(set(at)) == 3
    sums = halves(1.0, 5)[1]
    # with two equal draws, the mean square would equal the squared mean
    assert 6 * sums["square"] / 2 > (6 * sums["noise"] / 2) ** 2 * 1.001


def test_metrics_of_the_objective_are_divided_by_the_global_weight():
    def loss(model, batch, key):
        return Sums(model.number[...] * 6, jnp.sum(batch.weights), {"figure": jnp.sum(batch.weights) * 3})

    for micro_batches in (1, 2):
        metrics = scalar_step(loss, micro_batches=micro_batches)(1.0)[1]
        assert metrics["figure"] == pytest.approx(3)
        assert metrics["weight"] == 6
        assert metrics["loss"] == pytest.approx(micro_batches)


def test_the_step_never_moves_a_leaf_between_trainable_and_frozen():
    run, state = trained_once()
    trainable, frozen = run.phase.partition.split(PARAMS)
    assert flatten(state.trainable).keys() == flatten(trainable).keys()
    assert flatten(state.frozen).keys() == flatten(frozen).keys()
