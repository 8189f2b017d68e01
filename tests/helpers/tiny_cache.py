"""Documents in memory, as a token cache holds them, and a model to test on them."""

import collections
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np

from llm3 import evals
from llm3.config.schema import EvaluationConfig
from llm3.data.formats import Document
from llm3.data.tokenizer import SPECIALS, train
from llm3.segments import segmented
from tests.helpers.tiny import make_params, model_config

BYTES = train([], 260)  # a token for every byte
COMPILED: dict = {}  # what any test compiled
COUNTED: collections.Counter = collections.Counter()  # what evaluations showed as done, by unit, since it was cleared


@contextmanager
def counted(total: int, unit: str):
    """What shows the progress of an evaluation here: a count that ends, without an error, at its total."""
    done: list[int] = []
    yield done.append
    assert sum(done) == total and min(done, default=1) > 0
    COUNTED[unit] += total


class MemoryCache:
    """The part of a token cache that windows and evaluations use. labels: indices of classes or of `label_sets`."""

    starts, eos_id = 1, BYTES.eos_id

    def __init__(self, documents: list[Document], labels=None, label_names=(), label_sets=None):
        self._documents = documents
        self.offsets = np.cumsum([0, *(len(each.tokens) for each in documents)])
        self.labels = None if labels is None else np.array(labels, np.int32)
        self.label_names, self.label_sets = list(label_names), label_sets
        self.rows = 3 * np.arange(len(documents))[::-1]  # stored in another order than in the source
        self.document_bytes = np.array([each.text_bytes for each in documents], np.int64)

    @property
    def documents(self) -> int:
        return len(self._documents)

    @property
    def tokens(self) -> int:
        return int(self.offsets[-1])

    @property
    def text_bytes(self) -> int:
        return sum(each.text_bytes for each in self._documents)

    def document(self, index: int) -> np.ndarray:
        return self._documents[index].tokens

    def read_tokens(self, start: int, stop: int) -> np.ndarray:
        return np.concatenate([np.empty(0, np.int32), *(each.tokens for each in self._documents)])[start:stop]

    def note(self, index: int):
        return self._documents[index].note or {}

    def subset(self, indices) -> "MemoryCache":
        labels = None if self.labels is None else self.labels[indices]
        return MemoryCache([self._documents[i] for i in indices], labels, self.label_names, self.label_sets)


def plain(*tokens) -> Document:
    """A document of these tokens, a byte each but for the special ones, with nothing else to it."""
    return Document(np.array(tokens, np.int32), None, sum(token >= len(SPECIALS) for token in tokens))


def without_predictions(result: dict) -> dict:
    """The metrics and details of an evaluation."""
    return {name: value for name, value in result.items() if name != "predictions"}


def make_context(
    plugin, cache, *, options=None, tokenizer=BYTES, length=16, batch_size=4, place=None, params=None, **model
):
    """A test of a tiny model on the documents of a cache. params: default: random ones."""
    config = model_config(**{"vocab_size": tokenizer.vocab_size} | model)
    params = params or make_params(config)
    return evals.EvalContext(
        params=params if ":" in next(iter(params["layers"])) else segmented(params, ((0, config.layers),)),
        model=config,
        config=EvaluationConfig(
            plugin.__name__.split(".")[-1], "source", sequence_length=length, batch_size=batch_size
        ),
        options=options or (plugin.Options() if hasattr(plugin, "Options") else None),
        kind=next(iter(plugin.WINDOWS.values()), ""),
        cache=cache,
        tokenizer=tokenizer,
        place=place or (lambda batch: jax.tree.map(jnp.asarray, batch)),
        compiled=COMPILED,
        counting=counted,
    )
