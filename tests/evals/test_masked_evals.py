"""Masked accuracy and pseudo-perplexity against hand computations, however documents are batched and packed."""

import functools
import math

import jax
import numpy as np
import pytest

from llm3 import evals
from llm3.distributed.sharding import place_batch, tree_shardings
from llm3.errors import UserError
from llm3.evals import masked, pseudo_perplexity
from llm3.models.transformer import abstract
from llm3.registry import load_plugin, read_options
from llm3.segments import segmented
from tests.helpers import reference
from tests.helpers.meshes import mesh_of
from tests.helpers.tiny import make_params, make_row, model_config, stack
from tests.helpers.tiny_cache import BYTES, MemoryCache, make_context, plain, without_predictions

ENCODER = {"causal": False, "pool": "mean"}
WORDS = ["the", "cat", "naïve", "中文", "mat,", "and", "so", "👍"]


@functools.cache
def documents(count: int = 9) -> list:
    """Of 6 to 40 tokens, all different."""
    random = np.random.default_rng(1)
    texts = [" ".join(random.choice(WORDS, random.integers(1, 8))) + f" {i}" for i in range(count)]
    return [plain(BYTES.bos_id, *BYTES.encode(text), BYTES.eos_id) for text in texts]


def evaluated(plugin, order=None, options=None, **changes) -> dict:
    cache = MemoryCache([documents()[i] for i in (order or range(len(documents())))])
    if order:
        cache.rows = cache.rows[order]
    return plugin.evaluate(make_context(plugin, cache, options=options, **ENCODER | {"length": 32} | changes))


def metrics(*arguments, **changes) -> dict[str, float]:
    return without_predictions(evaluated(*arguments, **changes))


@functools.cache
def model():
    config = model_config(vocab_size=BYTES.vocab_size, **ENCODER)
    return config, make_params(config)


def logits_of(tokens: np.ndarray) -> np.ndarray:
    config, params = model()
    row = make_row(tokens, length=len(tokens))
    return reference.row_logits(config, params, reference.row_hidden(config, params, row))


def pieces(length: int = 32) -> list[np.ndarray]:
    """What a document's windows hold of it: all but its last token."""
    return [each.tokens[i:-1][:length] for each in documents() for i in range(0, len(each.tokens) - 1, length)]


def hidden_by_hand(options: masked.Options) -> dict[str, float]:
    """From each piece alone."""
    nats, right, targets = 0.0, 0, []
    for piece in pieces():
        row = masked.hide(stack(make_row(piece, length=len(piece))), options, BYTES)
        chosen = row.weights[0] > 0
        assert not np.any(piece[chosen] < 4)
        np.testing.assert_array_equal(row.tokens[0], np.where(chosen, BYTES.mask_id, piece))
        logits = logits_of(row.tokens[0])[chosen]
        nats += reference.nats(logits, piece[chosen]).sum()
        right += np.sum(logits.argmax(axis=-1) == piece[chosen])
        targets.extend(piece[chosen].tolist())
    most = max(map(targets.count, targets))
    return {
        "accuracy": right / len(targets),
        "nll": nats / len(targets),
        "majority_accuracy": most / len(targets),
        "items": len(targets),
    }


@pytest.mark.parametrize("options", [masked.Options(), masked.Options(0.4, True, seed=3)], ids=str)
def test_masked_metrics_are_those_of_each_piece_alone(options):
    found = evaluated(masked, options=options)
    columns = found.pop("predictions")
    assert found == pytest.approx(hidden_by_hand(options), rel=1e-5)
    tokens = columns["tokens"]
    assert found["items"] == tokens.sum() and found["nll"] == columns["nats"].sum() / tokens.sum()
    assert found["accuracy"] == pytest.approx(np.average(columns["score"], weights=tokens))


@pytest.mark.parametrize("options", [masked.Options(), masked.Options(0.4, True, seed=3)], ids=str)
def test_the_share_of_the_text_is_hidden_whatever_the_sizes_of_documents(options):
    texts = [document.tokens[1:] for document in documents(400)]
    counts = [masked.hide(stack(make_row(text, length=len(text))), options, BYTES).weights.sum() for text in texts]
    shares = np.array(counts) - options.share * np.array([len(text) - 1 for text in texts])
    assert abs(shares.mean()) < 4 * shares.std() / np.sqrt(len(shares))


@pytest.mark.parametrize("plugin", [masked, pseudo_perplexity], ids=lambda plugin: plugin.__name__.split(".")[-1])
def test_metrics_do_not_depend_on_batch_size_or_packing(plugin):
    shuffled = np.random.default_rng(0).permutation(len(documents())).tolist()
    found, expected = evaluated(plugin, order=shuffled, batch_size=3), evaluated(plugin)
    columns, others = found.pop("predictions"), expected.pop("predictions")
    assert found == pytest.approx(expected, rel=1e-5)
    assert columns.keys() == others.keys() and columns["item"].tolist() == sorted(columns["item"])
    for name, values in columns.items():
        np.testing.assert_allclose(values, others[name], rtol=1e-5)


@pytest.mark.parametrize("plugin", [masked, pseudo_perplexity], ids=lambda plugin: plugin.__name__.split(".")[-1])
def test_metrics_are_the_same_on_eight_devices(plugin):
    config, params = model()
    mesh, whole, cut = mesh_of(8, data=2, fsdp=2, tensor=2), abstract(config), segmented(params, ((0, 3),))
    with jax.set_mesh(mesh):
        placed = jax.tree.map(jax.device_put, cut, tree_shardings(mesh, whole.shapes, whole.axes))
        found = metrics(plugin, params=placed, place=lambda batch: place_batch(mesh, batch))
    assert found == pytest.approx(metrics(plugin), rel=1e-5)


def test_other_tokens_are_hidden_with_another_seed_and_the_same_with_the_same():
    one, same, other = (metrics(masked, options=masked.Options(seed=seed)) for seed in (1, 1, 2))
    assert one == same != other


def test_pseudo_perplexity_hides_each_token_in_turn():
    nats = count = size = 0.0
    for piece in pieces():
        for place in np.flatnonzero(piece >= 4):
            hidden = piece.copy()
            hidden[place] = BYTES.mask_id
            nats += reference.nats(logits_of(hidden)[place], piece[place])
            count, size = count + 1, size + BYTES.byte_lengths[piece[place]]
    found = evaluated(pseudo_perplexity)
    columns = found.pop("predictions")
    assert [columns[name].sum() for name in ("nats", "tokens", "bytes")] == pytest.approx([nats, count, size], rel=1e-5)
    assert found["pseudo_perplexity"] == math.exp(columns["nats"].sum() / count)
    assert found == {
        "pseudo_perplexity": pytest.approx(math.exp(nats / count), rel=1e-4),
        "pseudo_bits_per_byte": pytest.approx(nats / math.log(2) / size, rel=1e-5),
        "items": count,
    }


def test_a_uniform_model_has_the_vocabulary_as_its_pseudo_perplexity():
    _, params = model()
    uniform = params | {"embed": {"embedding": np.zeros_like(params["embed"]["embedding"])}}
    found = metrics(pseudo_perplexity, params=segmented(uniform, ((0, 3),)))
    assert found["pseudo_perplexity"] == pytest.approx(BYTES.vocab_size, rel=1e-4)
    assert found["pseudo_bits_per_byte"] == pytest.approx(math.log2(BYTES.vocab_size), rel=1e-5)


@pytest.mark.parametrize("plugin", [masked, pseudo_perplexity], ids=lambda plugin: plugin.__name__.split(".")[-1])
def test_a_source_without_text_is_an_error_not_a_division_by_zero(plugin):
    empty = MemoryCache([plain(BYTES.bos_id, BYTES.eos_id)])
    with pytest.raises(UserError, match="source"):
        plugin.evaluate(make_context(plugin, empty, length=32, **ENCODER))


def test_options_that_make_no_sense_are_refused():
    assert read_options(load_plugin(evals, "masked"), {"share": 0.3}, "evaluations.x") == masked.Options(share=0.3)
    with pytest.raises(UserError, match=r"evaluations\.x\.share=2"):
        read_options(load_plugin(evals, "masked"), {"share": 2}, "evaluations.x")
