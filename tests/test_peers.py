"""Every objective and every evaluation, held to the contract of its folder."""

import functools
import inspect

import jax
import numpy as np
import pytest
from flax import nnx
from tiny import CLASSES, VOCAB, jit, make_batch, make_labelled, make_params, make_row, model_config, stack

from llm3 import evals, objectives
from llm3.data.batch import Batch
from llm3.errors import UserError
from llm3.models.transformer import abstract, segmented
from llm3.objectives import Sums

WINDOWS = {objectives: {"stream", "examples"}, evals: {"pieces", "examples"}}
PEERS = [(folder, name) for folder in WINDOWS for name in folder.names()]
each_peer = pytest.mark.parametrize(("folder", "name"), PEERS, ids=[f"{f.__name__}.{n}" for f, n in PEERS])
BYTE_LENGTHS = np.ones(VOCAB, np.int32)


@functools.cache
def flat_sums(folder, name: str):
    """batch -> the sums of a peer, as a flat dict of arrays; every model has a task head here."""
    peer, config = folder.load(name), model_config(classes=CLASSES)
    graph = abstract(config).graph
    params = segmented(make_params(config), ((0, config.layers),))

    @jit
    def run(params: dict, batch: Batch):
        model = nnx.merge(graph, params)
        if folder is evals:
            return peer.sums(model, batch, BYTE_LENGTHS)
        result = peer.loss(model, batch, jax.random.key(0))
        assert isinstance(result, Sums)
        return {"loss": result.loss, "weight": result.weight} | result.metrics

    return lambda batch: jax.device_get(run(params, batch))


def batch_for(peer, rows: int) -> Batch:
    return make_labelled(rows) if peer.WINDOWS == "examples" else make_batch(rows)


def test_the_peers_are_the_files_of_the_folder():
    assert set(objectives.names()) >= {"causal", "classify"}
    assert set(evals.names()) >= {"classification", "perplexity"}


@pytest.mark.parametrize("folder", WINDOWS, ids=lambda folder: folder.__name__)
def test_an_unknown_peer_is_an_error_with_the_nearest_name(folder):
    name = folder.names()[0]
    with pytest.raises(UserError, match=f"{name}x.*did you mean '{name}'"):
        folder.load(f"{name}x")


@each_peer
def test_a_peer_has_what_its_folder_promises(folder, name):
    peer = folder.load(name)
    assert peer.__doc__
    assert peer.WINDOWS in WINDOWS[folder]
    assert isinstance(peer.NEEDS_HEAD, bool)
    if folder is objectives:
        assert list(inspect.signature(peer.loss).parameters) == ["model", "batch", "key"]
    else:
        assert list(inspect.signature(peer.sums).parameters) == ["model", "batch", "byte_lengths"]
        assert list(inspect.signature(peer.figures).parameters) == ["totals"]
        assert peer.BETTER and set(peer.BETTER.values()) <= {"higher", "lower"}


@each_peer
def test_sums_over_a_batch_are_the_sums_over_its_rows(folder, name):
    run, batch = flat_sums(folder, name), batch_for(folder.load(name), 4)
    whole = run(batch)
    rows = [run(stack(row, *[make_row()] * 3)) for row in (Batch(*each) for each in zip(*batch, strict=True))]
    assert whole and all(np.any(value != 0) for value in whole.values())
    for key, value in whole.items():
        assert value.dtype in (np.float32, np.int32), key
        np.testing.assert_allclose(sum(row[key] for row in rows), value, rtol=1e-5, err_msg=key)


@each_peer
def test_rows_without_a_label_add_zero_and_never_nan(folder, name):
    run, batch = flat_sums(folder, name), batch_for(folder.load(name), 4)
    for empty in (batch._replace(weights=np.zeros_like(batch.weights)), stack(*[make_row()] * 4)):
        for key, value in run(empty).items():
            assert np.all(value == 0), key


@pytest.mark.parametrize("name", objectives.names())
def test_the_loss_and_the_weight_of_an_objective_are_scalars_in_float32(name):
    found = flat_sums(objectives, name)(batch_for(objectives.load(name), 4))
    assert all((value.dtype, value.shape) == (np.float32, ()) for value in found.values())


@pytest.mark.parametrize("name", objectives.names())
def test_a_weight_scales_what_a_target_adds(name):
    run, batch = flat_sums(objectives, name), batch_for(objectives.load(name), 4)
    one, three = run(batch), run(batch._replace(weights=3 * batch.weights))
    for key, value in one.items():
        assert three[key] == pytest.approx(3 * value, rel=1e-5), key


@pytest.mark.parametrize("name", evals.names())
def test_figures_are_plain_numbers_and_ratios_of_sums(name):
    peer = evals.load(name)
    totals = {key: np.asarray(value, np.float64) for key, value in flat_sums(evals, name)(batch_for(peer, 4)).items()}
    figures, doubled = peer.figures(totals), peer.figures({key: 2 * value for key, value in totals.items()})
    assert all(type(value) in (float, int) and np.isfinite(value) for value in figures.values())
    assert figures.keys() >= peer.BETTER.keys()
    ratios = {key: value for key, value in figures.items() if type(value) is float}
    assert ratios
    assert {key: doubled[key] for key in ratios} == pytest.approx(ratios)
