"""What every objective and every evaluation must hold to: the checks of `check-plugin` and of llm3's own tests."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from llm3.cli.plugin_batches import CLASSES, Packed, documents_for
from llm3.config.model_schema import ModelConfig
from llm3.data import formats, windows
from llm3.data.batch import Batch
from llm3.data.tokenizer import train
from llm3.models.transformer import abstract
from llm3.objectives import Sums, Task
from llm3.registry import is_path, plugin_names
from llm3.segments import canonical, segmented
from llm3.tree import map_with_path

Check = Callable[["Subject"], None]
COMPILE_FAST = {"xla_backend_optimization_level": 0}  # these programs run once: compiling is what costs


class Failed(Exception):
    """A plugin does not hold to a check; the text says how."""


class Subject(NamedTuple):
    """A plugin to check. options: an instance of its `Options`, or None."""

    plugin: Any
    options: Any = None


def expect(right: bool, message: str) -> None:
    """Raise Failed with the message unless something is right."""
    if not right:
        raise Failed(message)


def declares_its_contract(subject: Subject) -> None:
    """Its constants and `Options` are what the folder promises."""
    plugin = subject.plugin
    expect(bool(plugin.__doc__), "a docstring must say what it does")
    expect(bool(plugin.WINDOWS) or hasattr(plugin, "prepare"), "WINDOWS is empty: expected {row format: windows}")
    unknown = set(plugin.WINDOWS) - set(plugin_names(formats))
    expect(not unknown, f"WINDOWS: no such row format: {', '.join(unknown)}; there are {plugin_names(formats)}")
    kinds = {kind for kind in plugin.WINDOWS.values() if not is_path(kind)} - set(plugin_names(windows))
    expect(not kinds, f"WINDOWS: no such kind of windows: {', '.join(kinds)}; there are {plugin_names(windows)}")
    head = plugin.HEAD
    expect(
        head in ("", "labels") or (isinstance(head, tuple) and all(isinstance(each, str) for each in head)),
        f"HEAD={head!r}: expected '', 'labels', or a tuple with the names of its outputs",
    )
    expect(plugin.CAUSAL in (True, False, None), f"CAUSAL={plugin.CAUSAL!r}: expected True, False or None")
    if hasattr(plugin, "Options"):
        params = getattr(plugin.Options, "__dataclass_params__", None)
        frozen = params is not None and params.frozen
        expect(frozen, "Options: expected a frozen dataclass")
        try:
            hash(subject.options)
        except TypeError as error:
            raise Failed(f"Options: {error}; a field that is a list is better a tuple") from None


def is_an_objective(subject: Subject) -> None:
    """`loss` and `LABELLED` are as objectives have them."""
    _takes(subject.plugin.loss, ["model", "batch", "key", "task"], "loss")
    expect(isinstance(subject.plugin.LABELLED, bool), f"LABELLED={subject.plugin.LABELLED!r}: expected True or False")


def is_an_evaluation(subject: Subject) -> None:
    """`evaluate` and `BETTER` are as evaluations have them."""
    plugin = subject.plugin
    _takes(plugin.evaluate, ["context"], "evaluate")
    wrong = {name: value for name, value in plugin.BETTER.items() if value not in ("higher", "lower")}
    expect(not wrong, f"BETTER: {wrong}: expected 'higher' or 'lower'")
    if not plugin.BETTER:
        expect(hasattr(plugin, "better"), "BETTER is empty, and there is no function better(prepared)")
        _takes(plugin.better, ["prepared"], "better")


def _takes(function: Any, names: list[str], what: str) -> None:
    found = list(inspect.signature(function).parameters)
    expect(found == names, f"{what}({', '.join(found)}): expected {what}({', '.join(names)})")


@functools.cache
def tokenizer() -> Any:
    """A token for every byte."""
    return train([], 260)


class _Runs:
    """The sums and the gradient of an objective on a tiny model of random parameters."""

    def __init__(self, subject: Subject):
        plugin, vocab = subject.plugin, tokenizer().vocab_size
        heads = CLASSES if isinstance(plugin.HEAD, str) else len(plugin.HEAD)
        shape: dict[str, Any] = {"layers": 2, "d_model": 16, "heads": 4, "kv_heads": 2, "d_ff": 28}
        causal = plugin.CAUSAL is not False
        pool = "last" if causal else "mean"
        model = ModelConfig(**shape, vocab_size=vocab, classes=heads, causal=causal, pool=pool, compute_dtype="float32")
        graph = abstract(model).graph
        self.params = segmented(_params(model), ((0, model.layers),))
        task = Task(subject.options, tokenizer(), Packed.LENGTH)

        def loss(params: dict, batch: Batch) -> tuple[jax.Array, Sums]:
            result = plugin.loss(nnx.merge(graph, params), batch, jax.random.key(0), task)
            expect(isinstance(result, Sums), f"loss returned {type(result).__name__}: expected llm3.objectives.Sums")
            return result.loss, result

        jit = functools.partial(jax.jit, compiler_options=COMPILE_FAST)
        self._sums, self._gradient = jit(lambda *each: loss(*each)[1]), jit(jax.grad(loss, has_aux=True))

    def sums(self, batch: Batch) -> dict[str, np.ndarray]:
        """The loss, the weight and the metrics."""
        result = jax.device_get(self._sums(self.params, batch))
        return {"loss": result.loss, "weight": result.weight} | result.metrics

    def gradient(self, batch: Batch) -> list[np.ndarray]:
        """The leaves of the gradient of the loss."""
        return jax.device_get(jax.tree.leaves(self._gradient(self.params, batch)[0]))


def _params(model: ModelConfig) -> dict:
    """Random canonical parameters, none of them at its first value."""
    noise = np.random.default_rng(0)

    def leaf(path: str, like: Any) -> np.ndarray:
        values = 0.2 * noise.standard_normal(like.shape) + path.endswith("/scale")
        return values.astype(np.float32)

    return map_with_path(leaf, canonical(abstract(model).shapes))


@functools.lru_cache(maxsize=8)
def _runs(key: int, subject: Subject) -> _Runs:
    return _Runs(subject)


def runs(subject: Subject) -> _Runs:
    """The compiled objective, once for all checks."""
    return _runs(id(subject.plugin), subject)


def sums_are_float32_scalars(subject: Subject) -> None:
    """The loss, the weight and the metrics are scalars in float32, and not zero."""
    for key, value in runs(subject).sums(documents_for(subject.plugin).batch()).items():
        found = (str(value.dtype), value.shape)
        expect(found == ("float32", ()), f"{key}: {found[0]} of shape {found[1]}: expected a float32 scalar")
        expect(key not in ("loss", "weight") or value != 0, f"{key} is 0 for a batch with targets")


def sums_are_those_of_the_rows(subject: Subject) -> None:
    """A batch gives the sum of what its rows give: micro-batches and devices change nothing."""
    documents, run = documents_for(subject.plugin), runs(subject)
    _close(run.sums(documents.batch()), [run.sums(row) for row in documents.rows()], "a batch and its rows")


def packing_changes_nothing(subject: Subject) -> None:
    """Two documents in one window give the sum of what each gives alone."""
    documents, run = documents_for(subject.plugin), runs(subject)
    _close(run.sums(documents.batch()), [run.sums(each) for each in documents.alone()], "packed documents")


def padding_adds_zero(subject: Subject) -> None:
    """Rows without a target add zero, and never NaN."""
    documents, run = documents_for(subject.plugin), runs(subject)
    for what, batch in (("rows without weights", documents.unweighted()), ("empty rows", documents.empty())):
        for key, value in run.sums(batch).items():
            expect(bool(np.all(value == 0)), f"{key} of {what} is {value}: expected 0")


def weights_scale_their_targets(subject: Subject) -> None:
    """Three times the weights give three times the sums."""
    batch, run = documents_for(subject.plugin).batch(), runs(subject)
    three = {key: value / 3 for key, value in run.sums(batch._replace(weights=3 * batch.weights)).items()}
    _close(three, [run.sums(batch)], "three times the weights, divided by 3,")


def gradients_are_finite(subject: Subject) -> None:
    """The gradient is finite and not zero, and zero where there is no target."""
    documents, run = documents_for(subject.plugin), runs(subject)
    leaves = run.gradient(documents.batch())
    expect(all(np.isfinite(leaf).all() for leaf in leaves), "the gradient is not finite")
    expect(any(np.any(leaf) for leaf in leaves), "the gradient is zero: the loss does not depend on the parameters")
    none = run.gradient(documents.empty())
    expect(all(np.isfinite(leaf).all() for leaf in none), "the gradient of empty rows is not finite (a 0 / 0?)")


def _close(found: dict, parts: list[dict], what: str) -> None:
    for key, value in found.items():
        expected = sum(part[key] for part in parts)
        right = np.allclose(value, expected, rtol=2e-5, atol=1e-6)
        expect(right, f"{key} of {what}: {value:.7g}, expected {expected:.7g} (return sums, not means)")


CHECKS: dict[str, list[Check]] = {
    "objectives": [
        declares_its_contract,
        is_an_objective,
        sums_are_float32_scalars,
        sums_are_those_of_the_rows,
        packing_changes_nothing,
        padding_adds_zero,
        weights_scale_their_targets,
        gradients_are_finite,
    ],
    "evals": [declares_its_contract, is_an_evaluation],
}
