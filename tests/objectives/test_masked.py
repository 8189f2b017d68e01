"""Masked language modelling: what is hidden, and that an encoder is handed on to classification."""

import functools
import re

import jax
import numpy as np
import pytest
from flax import nnx

from llm3.checkpoints.stage_checkpoints import Checkpoints
from llm3.config.schema import OptimizerConfig, StageConfig
from llm3.data import tokenizer as tokenizers
from llm3.data.batch import Batch
from llm3.data.tokenizer import SPECIALS
from llm3.distributed.sharding import place_batch
from llm3.errors import UserError
from llm3.models.transformer import abstract
from llm3.objectives import Task, masked
from llm3.registry import read_options
from llm3.segments import canonical, segmented
from llm3.training.phase import build
from llm3.tree import flatten
from tests.helpers import tiny_run as tiny
from tests.helpers.meshes import mesh_of
from tests.helpers.tiny import jit, make_batch, make_documents, make_params, make_row, model_config, stack

BYTES = tokenizers.train([], 260)
VOCAB = BYTES.vocab_size
ENCODER = {"vocab_size": VOCAB, "causal": False, "pool": "mean"}


def task(length: int, tokenizer=BYTES, **options) -> Task:
    return Task(read_options(masked, options, "objective"), tokenizer, length)


def hide(window: Batch, seed: int = 0, tokenizer=BYTES, **options) -> Batch:
    return masked.corrupt(window, np.random.default_rng(seed), task(len(window.tokens), tokenizer, **options))


@functools.cache
def long_window() -> Batch:
    """40,000 tokens, the last fifth of them padding, with special tokens among the text."""
    window = make_row(np.random.default_rng(0).integers(0, VOCAB, 40_000), length=40_000)
    window.segments[32_000:] = 0
    return window


def text_of(window: Batch) -> np.ndarray:
    return (window.segments > 0) & (window.tokens >= len(SPECIALS))


def standard_error(share: float, count: int) -> float:
    return np.sqrt(share * (1 - share) / count)


def test_a_share_of_the_text_is_hidden_by_the_mask_a_random_token_or_itself():
    window, hidden = long_window(), hide(long_window())
    chosen, text = hidden.weights == 1, text_of(window)
    assert not np.any(chosen & ~text)
    assert abs(chosen.sum() - 0.15 * text.sum()) <= 1
    np.testing.assert_array_equal(hidden.targets[chosen], window.tokens[chosen])
    np.testing.assert_array_equal(hidden.tokens[~chosen], window.tokens[~chosen])
    count, found = chosen.sum(), hidden.tokens[chosen]
    is_mask, is_same = found == BYTES.mask_id, found == window.tokens[chosen]
    assert abs(is_mask.mean() - 0.8) < 4 * standard_error(0.8, count)
    kept = 0.1 + 0.1 / 256  # a random token is the right one in one of 256 cases
    assert abs(is_same.mean() - kept) < 4 * standard_error(kept, count)
    replaced = found[~is_mask & ~is_same]
    assert replaced.min() >= len(SPECIALS) and len(np.unique(replaced)) > 200


@pytest.mark.parametrize(("mask", "replace"), [(1.0, 0.0), (0.0, 1.0), (0.0, 0.0), (0.5, 0.2)])
def test_the_split_is_that_of_the_options(mask, replace):
    window, hidden = long_window(), hide(long_window(), share=0.4, mask=mask, replace=replace)
    chosen = hidden.weights == 1
    assert abs(chosen.sum() - 0.4 * text_of(window).sum()) <= 1
    is_mask = hidden.tokens[chosen] == BYTES.mask_id
    is_same = (hidden.tokens == window.tokens)[chosen]
    for found, share in ((is_mask.mean(), mask), (is_same.mean(), 1 - mask - replace * 255 / 256)):
        assert abs(found - share) <= 4 * standard_error(share, chosen.sum())


def test_what_is_hidden_follows_from_the_generator_alone():
    first, again, other = (hide(long_window(), seed) for seed in (1, 1, 2))
    for one, same in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, same)
    assert np.any(first.weights != other.weights) and np.any(first.tokens != other.tokens)


TEXTS = {
    "English": ("The cats' naïve friend, unbelievably, sat down (twice) at 10:30. " * 12, r" ?[^\W_]+"),
    "Chinese": ("我们今天学习自然语言处理。模型预测被隐藏的词。" * 12, r"[\u4e00-\u9fff]"),
    "emoji": ("good 👍🏽 and ❤️ or 👨‍👩‍👧 end " * 12, r"👍🏽|❤️|👨‍👩‍👧"),
}


@pytest.mark.parametrize("vocab_size", [260, 275])
@pytest.mark.parametrize("script", TEXTS)
def test_a_whole_word_is_hidden_or_none_of_it(script, vocab_size):
    text, words = TEXTS[script]
    tokenizer = tokenizers.train([text], vocab_size)
    tokens = np.array(tokenizer.encode(text))
    matches = [(len(text[: m.start()].encode()), len(text[: m.end()].encode())) for m in re.finditer(words, text)]
    cut = hidden = 0
    for seed in range(20):
        for whole_words in (True, False):
            window = hide(make_row(tokens, length=len(tokens)), seed, tokenizer, whole_words=whole_words)
            by_byte = np.repeat(window.weights, tokenizer.byte_lengths[tokens])
            shares = np.array([by_byte[start:stop].mean() for start, stop in matches])
            if whole_words:
                assert set(shares) == {0.0, 1.0}
                hidden += window.weights.mean() / 20
            else:
                cut += np.sum((shares > 0) & (shares < 1))
    assert cut > 20
    assert hidden == pytest.approx(0.15, abs=0.01)


@pytest.mark.parametrize("options", [{"share": 0.15}, {"share": 0.15, "whole_words": True}, {"share": 1.0}], ids=str)
@pytest.mark.parametrize("length", [3, 16, 47])
def test_the_average_share_is_exact_and_no_window_has_more_hidden_than_is_said(length, options):
    tokens = np.array(BYTES.encode(TEXTS["English"][0]))[:length]
    counts = [hide(make_row(tokens, length=length), seed, **options).weights.sum() for seed in range(1000)]
    spread = 4 * np.std(counts) / np.sqrt(len(counts))
    assert abs(np.mean(counts) - options["share"] * length) <= spread
    assert max(counts) <= masked.max_output_positions(task(length, **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 0.0}, "share=0.0: expected a share above 0"),
        ({"share": 1.5}, "share=1.5"),
        ({"mask": -0.1}, "mask=-0.1: expected a share from 0 to 1"),
        ({"mask": 0.9, "replace": 0.2}, "at most 1 together"),
        ({"sahre": 0.2}, "did you mean 'share'"),
    ],
    ids=str,
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(UserError, match=re.escape(message)):
        read_options(masked, options, "objective")


@functools.cache
def model(max_output_positions: int = 0):
    """(params, function of params and batch: logits, function: loss sums and gradients) of a tiny encoder."""
    config = model_config(**ENCODER, max_output_positions=max_output_positions)
    graph, cut = abstract(config).graph, ((0, config.layers),)

    def loss(params, batch):
        sums = masked.loss(nnx.merge(graph, params), batch, jax.random.key(0), task(batch.tokens.shape[1]))
        return sums.loss, sums

    def logits(params, batch):
        model = nnx.merge(graph, params)
        return model.logits(model(batch.tokens, batch.positions, batch.segments))

    return segmented(make_params(config), cut), jit(logits), jit(jax.value_and_grad(loss, has_aux=True))


def loss_of(*rows: Batch) -> tuple[float, float]:
    params, _, loss = model()
    (_, sums), _ = loss(params, stack(*rows))
    return float(sums.loss), float(sums.weight)


def test_packed_documents_have_the_losses_that_they_have_alone():
    rows = []
    for seed in range(4):
        pair = make_documents(2, seed, least=5)
        rows.append(hide(make_row(*pair), seed, share=0.4))
    alone = []
    for row in rows:
        for segment in (1, 2):
            place = row.segments == segment
            only = make_row()
            for field, values in zip(only, row, strict=True):
                field[: place.sum()] = values[place]
            alone.append(only)
    loss, weight = loss_of(*rows)
    halves = [loss_of(*alone[i : i + 4]) for i in (0, 4)]
    assert weight == sum(each[1] for each in halves) > 4
    assert loss == pytest.approx(sum(each[0] for each in halves), rel=1e-5)


def test_changing_one_document_changes_no_logit_of_its_neighbours():
    params, logits, _ = model()
    before = hide(make_row(*make_documents(3, most=5)), share=0.4)
    tokens = np.where(before.segments == 1, (before.tokens + 1) % VOCAB, before.tokens)
    old, new = (logits(params, stack(row, row)) for row in (before, before._replace(tokens=tokens)))
    others = before.segments != 1
    np.testing.assert_array_equal(old[:, others], new[:, others])
    assert np.abs(old - new).max() > 0.01


def test_reading_the_hidden_places_only_changes_neither_loss_nor_gradients():
    rows = [hide(make_row(*make_documents(2, seed, least=5)), seed, share=0.3) for seed in range(4)]
    most = masked.max_output_positions(task(16, share=0.3))
    assert max(row.weights.sum() for row in rows) <= most < 16
    (value, sums), gradients = model()[2](model()[0], stack(*rows))
    (found, others), gradient = model(most)[2](model(most)[0], stack(*rows))
    assert float(found) == pytest.approx(float(value), rel=1e-6) and others.weight == sums.weight
    expected = flatten(canonical(gradients))
    for path, leaf in flatten(canonical(gradient)).items():
        scale = max(1, np.abs(expected[path]).max())  # rounding is relative to the largest terms of a sum
        np.testing.assert_allclose(leaf, expected[path], atol=5e-5 * scale, err_msg=path)


@pytest.mark.slow
def test_a_step_does_not_depend_on_how_the_batch_is_cut():
    config = model_config(**ENCODER)
    plain = OptimizerConfig("sgd", 1.0, "constant", weight_decay=0.0, clip_norm=0.0)
    batch = make_batch(16)
    rows = [hide(Batch(*(field[row] for field in batch)), row) for row in range(16)]
    results = []
    for devices, micro_batches in ((1, 1), (1, 4), (8, 2)):
        mesh = mesh_of(1) if devices == 1 else mesh_of(8, data=2, fsdp=2, tensor=2)
        options = {"objective": "masked", "optimizer": plain, "micro_batches": micro_batches}
        stage = StageConfig("pretrain", {"a": 1.0}, 5, 16, 16, **options)
        with jax.set_mesh(mesh):
            phase = build(stage, config, mesh, task=task(16), fresh=lambda path: True, seed=0, where="stage")[0]
            params = jax.tree.map(
                lambda x, s: jax.device_put(x, s.sharding), make_params(config), phase.abstract_params
            )
            state, metrics = phase.train_step(phase.state(params), place_batch(mesh, stack(*rows)))
        results.append((jax.device_get(metrics), flatten(jax.device_get(phase.params(state)))))
    (expected, leaves), *others = results
    assert 0 < expected["weight"] < 16 * 16
    for metrics, found in others:
        assert metrics["weight"] == expected["weight"]
        np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-5)
        for path, leaf in leaves.items():
            np.testing.assert_allclose(found[path], leaf, atol=1e-5, err_msg=path)


@pytest.mark.slow
def test_an_encoder_is_pretrained_posttrained_and_fine_tuned_to_classify(tmp_path):
    tiny.write_texts(tmp_path / "texts")
    extra = """c.model.causal, c.model.pool = False, "mean"
c.stages.pretrain.objective = c.stages.posttrain.objective = "masked"
for stage in c.stages.values():
    stage.save_every = stage.steps
del c.stages["scratch"], c.evaluations["general"], c.evaluations["domain"]"""
    config, run = tiny.write_config(tmp_path / "config.py", tmp_path, extra), tmp_path / "run"
    tiny.process(("run", f"--config={config}", f"--workdir={run}"))
    losses = [line["loss"] for line in tiny.metrics(run / "pretrain")]
    assert losses[-1] < losses[0]
    meta = Checkpoints(run / "finetune" / "checkpoints", read_only=True).meta(10)
    assert meta["fresh"] == ["head/bias", "head/kernel"] and not meta["model"]["causal"]
    assert [link["stage"] for link in meta["lineage"]] == ["pretrain", "posttrain"]
    assert tiny.rows(run)["finetune"]["task_accuracy"] is not None
