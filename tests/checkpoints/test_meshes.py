"""A checkpoint saved on one mesh loads on every other mesh, to resume its stage or to start another one from it."""

import functools
import itertools
from typing import NamedTuple

import jax
import numpy as np
import pytest

from llm3.checkpoints.metadata import by_path
from llm3.checkpoints.stage_checkpoints import Checkpoints, Wanted
from llm3.config.schema import GuardConfig, OptimizerConfig, StageConfig
from llm3.distributed.sharding import place_batch
from llm3.files import CHECKPOINTS
from llm3.handoff import parent as handoff
from llm3.handoff.checkpoint import find_checkpoint
from llm3.handoff.start import read_start
from llm3.training.phase import Phase, build
from llm3.training.step import TrainState
from llm3.tree import map_with_path
from tests.helpers.meshes import mesh_of
from tests.helpers.tiny import COMPILE_FAST, LENGTH, TASK, make_batch, make_params, model_config

pytestmark = [pytest.mark.slow, pytest.mark.skipif(len(jax.devices()) < 8, reason="needs 8 devices")]

MESHES = {
    "one device": {},
    "data 8": {"data": 8},
    "fsdp 4 x tensor 2": {"fsdp": 4, "tensor": 2},
    "data 2 x fsdp 2 x tensor 2": {"data": 2, "fsdp": 2, "tensor": 2},
}
TRAIN = {"all": "all", "a part": ["layers[1:]/mlp/.*", "norms", "embeddings"]}
PAIRS = list(itertools.pairwise([*MESHES, next(iter(MESHES))]))  # each is saved on once, and read on once
ROWS, SAVED_AT = 8, 2
MODEL = model_config(vocab_size=64)
PARAMS = make_params(MODEL)


class Run(NamedTuple):
    """A stage on a mesh."""

    mesh: jax.sharding.Mesh
    phase: Phase
    compiled: jax.stages.Compiled

    def placed(self, params: dict) -> dict:
        return map_with_path(lambda _, x, like: jax.device_put(x, like.sharding), params, self.phase.abstract_params)

    def losses(self, state: TrainState, first: int) -> tuple[TrainState, list[float]]:
        """The losses of two steps; the second one depends on the optimizer state too."""
        losses = []
        with jax.set_mesh(self.mesh):
            for step in range(first, first + 2):
                state, metrics = self.compiled(state, place_batch(self.mesh, make_batch(ROWS, seed=step)))
                losses.append(float(metrics["loss"]))
                assert metrics["skipped"] == 0
        return state, losses


@functools.cache
def run_on(mesh: str, trains: str) -> Run:
    sizes = MESHES[mesh]
    found = mesh_of(int(np.prod([*sizes.values()])), **sizes)
    plugins = {"optimizer": OptimizerConfig("adamw", 1e-2, "linear"), "guard": GuardConfig(deviations=99.0, window=4)}
    stage = StageConfig(
        "posttrain", {"source": 1.0}, 10, ROWS, LENGTH, start="pretrain", train=TRAIN[trains], **plugins
    )
    with jax.set_mesh(found):
        phase = build(stage, MODEL, found, task=TASK, fresh=lambda path: False, seed=0, where="stage")[0]
        lowered = phase.train_step.lower(phase.abstract_state, place_batch(found, make_batch(ROWS)))
        return Run(found, phase, lowered.compile(compiler_options=COMPILE_FAST))


class Saved(NamedTuple):
    """A run directory with a checkpoint of step 2, its content on the host, and losses on the same mesh.

    next: of the stage itself. first: of a stage that starts from the checkpoint and trains all.
    """

    directory: object
    params: dict
    opt: dict
    next: list[float]
    first: list[float]


@pytest.fixture(scope="module")
def saved_on(tmp_path_factory):
    @functools.cache
    def save(mesh: str, trains: str) -> Saved:
        run, delta = run_on(mesh, trains), trains != "all"
        directory = tmp_path_factory.mktemp("saved")
        meta = {"finished": True, "steps": SAVED_AT, "kind": "posttrain", "lineage": [], "tokenizer_hash": "same"}
        with jax.set_mesh(run.mesh), Checkpoints(directory / "parent" / CHECKPOINTS) as checkpoints:
            params = run.placed(PARAMS)
            if delta:
                checkpoints.save_base(params, meta)
            state, _ = run.losses(run.phase.state(params), 0)
            whole, opt = run.phase.params(state), run.phase.saved_opt(state)
            held = jax.device_get(whole), jax.device_get(by_path(opt))
            checkpoints.save(SAVED_AT, run.phase.trained(state) if delta else whole, opt, meta, delta=delta)
            checkpoints.wait()
            following, child = run.losses(state, SAVED_AT)[1], run_on(mesh, "all")
            first = child.losses(child.phase.state(child.placed(held[0])), 0)[1]
            return Saved(directory, *held, following, first)

    return save


def assert_same(found: object, expected: dict, like: object) -> None:
    """Every leaf has the expected bytes and sharding."""
    found, like = by_path(found), by_path(like)
    assert found.keys() == by_path(expected).keys()
    for path, leaf in by_path(expected).items():
        assert np.asarray(found[path]).tobytes() == np.asarray(leaf).tobytes(), path
        assert found[path].sharding.is_equivalent_to(like[path].sharding, found[path].ndim), path


@pytest.mark.parametrize("trains", TRAIN)
@pytest.mark.parametrize(("saved", "read"), PAIRS)
def test_a_stage_resumes_on_another_mesh_bit_for_bit_with_the_same_next_losses(saved_on, saved, read, trains):
    """Its parameters, optimizer state and guard state."""
    before, run = saved_on(saved, trains), run_on(read, trains)
    like = Wanted(run.phase.abstract_params, run.phase.saved_opt(run.phase.abstract_state))
    checkpoints = Checkpoints(before.directory / "parent" / CHECKPOINTS, read_only=True)
    with jax.set_mesh(run.mesh):
        found = checkpoints.load_newest(lambda step: like)
        assert found.step == SAVED_AT and not found.skipped
        assert_same(found.params, before.params, like.params)
        assert_same(found.opt, before.opt, like.opt)
        assert int(found.opt["guard"].taken) == SAVED_AT
        losses = run.losses(run.phase.state(found.params, found.opt, found.step), SAVED_AT)[1]
    np.testing.assert_allclose(losses, before.next, rtol=0, atol=1e-5)


@pytest.mark.parametrize("trains", TRAIN)
@pytest.mark.parametrize(("saved", "read"), PAIRS)
def test_a_stage_starts_from_a_parent_of_another_mesh_bit_for_bit_with_the_same_first_losses(
    saved_on, saved, read, trains
):
    """From a full checkpoint, and from a delta checkpoint."""
    before, child = saved_on(saved, trains), run_on(read, "all")
    start = read_start({"run": str(before.directory), "stage": "parent"}, before.directory, "start")
    parent = find_checkpoint(start, "start")
    with jax.set_mesh(child.mesh):
        params, account = handoff.load(parent, child.phase.abstract_params, "start")
        assert_same(params, before.params, child.phase.abstract_params)
        assert not (account.fresh or account.dropped or account.cast)
        losses = child.losses(child.phase.state(params), 0)[1]
    np.testing.assert_allclose(losses, before.first, rtol=0, atol=1e-5)
