"""Every objective, evaluation, form of row and kind of window, held to the contract of its folder."""

import dataclasses
import functools
import inspect
import types

import jax
import numpy as np
import pytest
from flax import nnx

from llm3 import evals, objectives
from llm3.cli.verbs import VERBS
from llm3.config.checks import OPTIMIZERS, SCHEDULES
from llm3.config.data_schema import SourceConfig
from llm3.data import formats, windows
from llm3.data.batch import Batch
from llm3.data.windows.spans import CHOICE, END, START
from llm3.errors import UserError
from llm3.models.transformer import abstract
from llm3.objectives import Sums
from llm3.optim.learning_rates import SHAPES
from llm3.optim.update_rules import RULES
from llm3.predict import kinds
from llm3.predict.fields import FLAGS
from llm3.registry import DECLARED, declared, load_plugin, plugin_names, read_options
from llm3.segments import segmented
from tests.helpers.tiny import CLASSES, TASK, jit, make_batch, make_labelled, make_params, make_row, model_config, stack

FOLDERS = (objectives, evals)
PEERS = [(folder, name) for folder in FOLDERS for name in plugin_names(folder)]
each_plugin = pytest.mark.parametrize(("folder", "name"), PEERS, ids=[f"{f.__name__}.{n}" for f, n in PEERS])
each_objective = pytest.mark.parametrize("name", plugin_names(objectives))


@functools.cache
def flat_sums(name: str):
    """batch -> the sums of an objective, as a flat dict of arrays; every model has a task head here."""
    plugin = load_plugin(objectives, name)
    heads = CLASSES if isinstance(plugin.HEAD, str) else len(plugin.HEAD)
    config = model_config(classes=heads)
    graph, params = abstract(config).graph, segmented(make_params(config), ((0, config.layers),))

    @jit
    def run(params: dict, batch: Batch):
        result = plugin.loss(nnx.merge(graph, params), batch, jax.random.key(0), TASK)
        assert isinstance(result, Sums)
        return {"loss": result.loss, "weight": result.weight} | result.metrics

    return lambda batch: jax.device_get(run(params, batch))


def batch_for(name: str, rows: int) -> Batch:
    """Two documents a row, labelled as the objective has them."""
    kinds = set(load_plugin(objectives, name).WINDOWS.values())
    if "examples" in kinds:
        return make_labelled(rows)
    return with_spans(make_batch(rows)) if "spans" in kinds else make_batch(rows)


def with_spans(batch: Batch) -> Batch:
    """The answer of each document is its second token; every token may be chosen."""
    first = (batch.positions == 0) & (batch.segments > 0)
    second = np.roll(first, 1, axis=1)
    targets = CHOICE * (batch.segments > 0) + (START | END) * second
    return batch._replace(targets=targets.astype(np.int32), weights=first.astype(np.float32))


def test_the_peers_are_the_files_of_the_folder():
    assert set(plugin_names(objectives)) >= {"causal", "classify", "instruct", "masked", "prefix", "span"}
    assert set(plugin_names(evals)) >= {"choice", "classification", "generation", "masked", "perplexity", "span"}
    assert set(plugin_names(formats)) == {"choice", "dialogue", "span", "text"}
    assert set(plugin_names(windows)) == {"dialogue", "examples", "pieces", "spans", "stream"}


@pytest.mark.parametrize("folder", [*FOLDERS, formats, windows], ids=lambda folder: folder.__name__)
def test_an_unknown_peer_is_an_error_with_the_nearest_name(folder):
    name = plugin_names(folder)[0]
    with pytest.raises(UserError, match=f"{name}x.*did you mean '{name}'"):
        load_plugin(folder, f"{name}x")


@each_plugin
def test_a_peer_has_what_its_folder_promises(folder, name):
    plugin = load_plugin(folder, name)
    assert plugin.__doc__
    assert plugin.WINDOWS or hasattr(plugin, "prepare")
    assert set(plugin.WINDOWS) <= set(plugin_names(formats))
    assert set(plugin.WINDOWS.values()) <= set(plugin_names(windows))
    assert plugin.HEAD in ("", "labels") or all(isinstance(output, str) for output in plugin.HEAD)
    assert plugin.CAUSAL in (True, False, None)
    if hasattr(plugin, "Options"):
        assert dataclasses.is_dataclass(plugin.Options) and plugin.Options.__dataclass_params__.frozen
        hash(plugin.Options())
    if folder is objectives:
        assert list(inspect.signature(plugin.loss).parameters) == ["model", "batch", "key", "task"]
        assert isinstance(plugin.LABELLED, bool)
    else:
        assert list(inspect.signature(plugin.evaluate).parameters) == ["context"]
        assert set(plugin.BETTER.values()) <= {"higher", "lower"}
        assert plugin.BETTER or list(inspect.signature(plugin.better).parameters) == ["prepared"]


@each_plugin
def test_what_a_plugin_declares_is_known_without_its_imports(folder, name):
    plugin, found = load_plugin(folder, name), declared(folder.__name__.rpartition(".")[2], name)
    assert isinstance(found, types.SimpleNamespace), "its declarations needed the whole file"
    for constant in set(DECLARED) - {"Options"}:
        assert getattr(found, constant, None) == getattr(plugin, constant, None)
    assert hasattr(found, "Options") == hasattr(plugin, "Options")
    if hasattr(plugin, "Options"):
        assert dataclasses.asdict(found.Options()) == dataclasses.asdict(plugin.Options())


def test_names_that_a_config_is_checked_against_are_those_of_the_code():
    assert set(OPTIMIZERS) == set(RULES) and set(SCHEDULES) == set(SHAPES)


@pytest.mark.parametrize("name", plugin_names(formats))
def test_a_row_format_reads_encodes_and_names_its_texts(name):
    plugin = load_plugin(formats, name)
    assert list(inspect.signature(plugin.read_row).parameters) == ["row", "source"]
    assert list(inspect.signature(plugin.encode).parameters) == ["record", "tokenizer", "template"]
    assert list(inspect.signature(plugin.texts).parameters) == ["record"]
    assert list(inspect.signature(plugin.read_input).parameters) == ["row", "source"]
    assert list(inspect.signature(plugin.columns).parameters) == ["source"]
    assert set(FLAGS[name]) <= {field.name for field in dataclasses.fields(SourceConfig)}


@pytest.mark.parametrize("name", plugin_names(kinds))
def test_a_kind_of_predictions_has_what_its_folder_promises(name):
    plugin = load_plugin(kinds, name)
    assert plugin.__doc__ and plugin.ROWS >= 1 and set(plugin.FORMATS) <= set(plugin_names(formats))
    signatures = {
        "least_length": ["options"],
        "refusal": ["trained"],
        "read": ["row", "fields"],
        "encode": ["record", "fields", "trained", "tokenizer", "options"],
        "columns": ["trained", "options"],
        "predict": ["session", "items"],
    }
    for function, parameters in signatures.items():
        assert list(inspect.signature(getattr(plugin, function)).parameters) == parameters
    if hasattr(plugin, "Options"):
        flags = {flag.removeprefix("--") for flag, _ in VERBS["predict"].flags}
        assert {field.name for field in dataclasses.fields(plugin.Options)} <= flags


@pytest.mark.parametrize(
    ("fields", "row_format"),
    [
        ({}, "text"),
        ({"label": "kind", "pair": "other"}, "text"),
        ({"prompt": "q", "answer": "a"}, "dialogue"),
        ({"messages": "turns"}, "dialogue"),
        ({"prompt": "q", "answer": "a", "choices": ["yes", "no"]}, "choice"),
        ({"prompt": "q", "answers": "spans"}, "span"),
    ],
)
def test_the_named_fields_decide_the_row_format(fields, row_format):
    assert SourceConfig("hub/name", **fields).row_format == row_format


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.__name__)
def test_an_unknown_option_is_an_error_with_the_nearest_name(folder):
    plugin = load_plugin(folder, "masked")
    with pytest.raises(UserError, match=r"where\.shar: no such option; did you mean 'share'"):
        read_options(plugin, {"shar": 0.1}, "where")


@each_objective
def test_sums_over_a_batch_are_the_sums_over_its_rows(name):
    run, batch = flat_sums(name), batch_for(name, 4)
    whole = run(batch)
    rows = [run(stack(row, *[make_row()] * 3)) for row in (Batch(*each) for each in zip(*batch, strict=True))]
    assert whole["loss"] != 0 and whole["weight"] != 0
    for key, value in whole.items():
        np.testing.assert_allclose(sum(row[key] for row in rows), value, rtol=1e-5, err_msg=key)


@each_objective
def test_rows_without_a_label_add_zero_and_never_nan(name):
    run, batch = flat_sums(name), batch_for(name, 4)
    for empty in (batch._replace(weights=np.zeros_like(batch.weights)), stack(*[make_row()] * 4)):
        for key, value in run(empty).items():
            assert np.all(value == 0), key


@each_objective
def test_the_loss_and_the_weight_of_an_objective_are_scalars_in_float32(name):
    found = flat_sums(name)(batch_for(name, 4))
    assert all((value.dtype, value.shape) == (np.float32, ()) for value in found.values())


@each_objective
def test_a_weight_scales_what_a_target_adds(name):
    run, batch = flat_sums(name), batch_for(name, 4)
    one, three = run(batch), run(batch._replace(weights=3 * batch.weights))
    for key, value in one.items():
        assert three[key] == pytest.approx(3 * value, rel=1e-5), key
