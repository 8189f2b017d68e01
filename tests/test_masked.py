"""Masked language modelling: what is hidden, and that an encoder is handed on to classification."""

import jax
import jax.numpy as jnp
import numpy as np
import tiny_run as tiny
from conftest import mesh_of
from tiny import make_batch, make_params, model_config

from llm3.checkpoint import Checkpoints
from llm3.config import OptimizerConfig, StageConfig
from llm3.data.batch import Batch
from llm3.data.tokenizer import SPECIALS, Tokenizer
from llm3.objectives import masked
from llm3.sharding import place_batch
from llm3.trainer import build
from llm3.tree import flatten

VOCAB = 64


def long_batch() -> Batch:
    """A row of 40,000 tokens, the last fifth of it padding, with special tokens among the text."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCAB, (1, 40_000)).astype(np.int32)
    segments = np.ones_like(tokens)
    segments[:, 32_000:] = 0
    return Batch(tokens, np.zeros_like(tokens), segments, np.zeros_like(tokens), np.ones(tokens.shape, np.float32))


def test_a_share_of_the_text_is_hidden_by_the_mask_a_random_token_or_itself():
    batch = long_batch()
    hidden = jax.device_get(masked.prepare(batch, jax.random.key(0), VOCAB))
    chosen = hidden.weights == 1
    text = (batch.segments > 0) & (batch.tokens >= len(SPECIALS))
    assert not np.any(chosen & ~text)
    assert abs(chosen.sum() / text.sum() - 0.15) < 0.01  # standard error: 0.002
    np.testing.assert_array_equal(hidden.targets[chosen], batch.tokens[chosen])
    np.testing.assert_array_equal(hidden.tokens[~chosen], batch.tokens[~chosen])
    is_mask, is_same = hidden.tokens[chosen] == Tokenizer.mask_id, (hidden.tokens == batch.tokens)[chosen]
    assert abs(is_mask.mean() - 0.8) < 0.025  # standard error: 0.006
    assert abs(is_same.mean() - (0.1 + 0.1 / 60)) < 0.02  # a random token is the right one in one of 60 cases
    assert hidden.tokens[chosen].min() >= Tokenizer.mask_id and hidden.tokens.max() < VOCAB


def test_what_is_hidden_follows_from_the_key_alone():
    first, again, other = (masked.prepare(long_batch(), jax.random.key(seed), VOCAB) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.tokens, again.tokens)
    assert np.any(np.asarray(first.weights) != np.asarray(other.weights))


def test_a_step_does_not_depend_on_how_the_batch_is_cut():
    config = model_config(vocab_size=VOCAB, causal=False, pool="mean")
    plain = OptimizerConfig("sgd", 1.0, "constant", weight_decay=0.0, clip_norm=0.0)
    results = []
    for devices, micro_batches in ((1, 1), (1, 4), (8, 2)):
        mesh = mesh_of(1) if devices == 1 else mesh_of(8, data=2, fsdp=2, tensor=2)
        options = {"objective": "masked", "optimizer": plain, "micro_batches": micro_batches}
        stage = StageConfig("pretrain", {"a": 1.0}, 5, 16, 16, **options)
        with jax.set_mesh(mesh):
            trainer = build(stage, config, mesh, fresh=lambda path: True, seed=0, where="stage")[0]
            params = jax.tree.map(
                lambda x, s: jax.device_put(jnp.array(x), s.sharding), make_params(config), trainer.abstract_params
            )
            state, metrics = trainer.train_step(trainer.state(params), place_batch(mesh, make_batch(16)))
        results.append((jax.device_get(metrics), flatten(jax.device_get(trainer.params(state)))))
    (expected, leaves), *others = results
    assert 0 < expected["weight"] < 16 * 16
    for metrics, found in others:
        assert metrics["weight"] == expected["weight"]
        np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-5)
        for path, leaf in leaves.items():
            np.testing.assert_allclose(found[path], leaf, atol=1e-5, err_msg=path)


def test_an_encoder_is_pretrained_posttrained_and_fine_tuned_to_classify(tmp_path):
    tiny.write_texts(tmp_path / "texts")
    extra = """c.model.causal, c.model.pool = False, "mean"
c.stages.pretrain.objective = c.stages.posttrain.objective = "masked"
del c.stages["scratch"], c.evaluations["general"], c.evaluations["domain"]"""
    config, run = tiny.write_config(tmp_path / "config.py", tmp_path, extra), tmp_path / "run"
    tiny.process(tmp_path, ("run", f"--config={config}", f"--workdir={run}"))
    losses = [line["loss"] for line in tiny.metrics(run / "pretrain")]
    assert losses[-1] < losses[0]
    meta = Checkpoints(run / "finetune" / "checkpoints", read_only=True).meta(10)
    assert meta["fresh"] == ["head/bias", "head/kernel"] and not meta["model"]["causal"]
    assert [link["stage"] for link in meta["lineage"]] == ["pretrain", "posttrain"]
    assert tiny.rows(run)["finetune"]["task_accuracy"] is not None
