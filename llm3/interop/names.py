"""Matching the names in the files of a model with the leaves of its family. Nothing is guessed, nothing is left out."""

import dataclasses
import re
from collections.abc import Iterator
from types import ModuleType

import numpy as np

from llm3.config.model_schema import ModelConfig
from llm3.errors import UserError, listed
from llm3.interop.shards import Shards, check_dtypes
from llm3.interop.table import Place, layered, place_of
from llm3.models.transformer import abstract
from llm3.segments import canonical
from llm3.tree import flatten

HEADS = ("lm_transform/", "lm_head/", "pooler/", "head/")  # each of them may be missing as a whole
OLD_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}  # of the first BERT files
ROWS = 4096  # rows of a tied LM head that are compared at a time
MOST = 20  # names listed in one message


@dataclasses.dataclass(frozen=True)
class Names:
    """found: {name in the table: name in the files}. ignored: names in the files that no leaf needs."""

    found: dict[str, str]
    ignored: tuple[str, ...]


def model_places(plugin: ModuleType, model: ModelConfig) -> dict[str, Place]:
    """{canonical path: place} of every leaf of a model but its adapters. Raises UserError for leaves without one."""
    places, lacking = {}, []
    model = dataclasses.replace(model, adapters=())
    for path, leaf in flatten(canonical(abstract(model).shapes)).items():
        place = place_of(plugin.TABLE, path, leaf.shape[1:] if layered(path) else leaf.shape, model)
        if place is None:
            lacking.append(path)
        else:
            places[path] = place
    if lacking:
        raise UserError(f"{plugin.LM} has no place for {listed(lacking)}")
    return places


def tensors_of(path: str, place: Place, model: ModelConfig) -> Iterator[tuple[int, str]]:
    """(layer, name of the tensor) of each layer of a leaf, (0, name) of a leaf outside of the layers."""
    for layer in range(model.layers) if layered(path) else (0,):
        if not (layer == 0 and model.skip_first_norm and path.startswith("layers/attention_norm/")):
            yield layer, place.named(layer)


def match_names(shards: Shards, plugin: ModuleType, model: ModelConfig, classes: int) -> tuple[Names, dict[str, Place]]:
    """The names in the files, and the places of the leaves that the files have.

    classes: the number of labels of the task head; 0: none. A head may be missing as a whole. Raises UserError that
    lists tensors too many, too few, twice, or of another shape.
    """
    pooler = "pooler" in plugin.TABLE  # which a model has only with a task head, but its files perhaps without one
    places = model_places(plugin, dataclasses.replace(model, pooler=pooler, classes=classes or int(pooler)))
    if not classes:
        places = {path: place for path, place in places.items() if not path.startswith("head/")}
    expected = {name: (path, place) for path, place in places.items() for _, name in tensors_of(path, place, model)}
    names, unknown, twice = _assign(shards, plugin, expected, _tied(plugin, model))
    present = {expected[name][0] for name in names.found}
    for head in HEADS:
        if not any(path.startswith(head) for path in present):
            places = {path: place for path, place in places.items() if not path.startswith(head)}
    missing = [name for name, (path, _) in expected.items() if path in places and name not in names.found]
    missing = [name for name in missing if name != "score.bias"]  # transformers' class has none
    shapes = []
    for name, actual in names.found.items():
        wanted, found = expected[name][1].view.tensor_shape, shards.tensors[actual][0]
        if wanted != found:
            shapes.append(f"{actual} {list(found)} (expected {list(wanted)})")
    problems = {"missing": missing, "unknown": unknown, "twice": twice, "of another shape": shapes}
    if any(problems.values()):
        family = plugin.__name__.rpartition(".")[2]
        text = "; ".join(f"{kind}: {listed(each, MOST)}" for kind, each in problems.items() if each)
        raise UserError(f"its tensors are not those of {family} as config.json has it: {text}")
    check_dtypes({name: shards.tensors[name] for name in names.found.values()}, shards.folder)
    return names, places


def _tied(plugin: ModuleType, model: ModelConfig) -> tuple[str, str]:
    """The tensor that older files have as a copy of the tied embedding, and the tensor of the embedding."""
    head = plugin.TABLE.get("lm_head") if model.tie_embeddings else None
    return f"{head}.weight", plugin.TABLE["embed/embedding"]


def _assign(
    shards: Shards, plugin: ModuleType, expected: dict[str, tuple[str, Place]], tied: tuple[str, str]
) -> tuple[Names, list[str], list[str]]:
    """The tensors of the files that are expected, those that are unknown, and those that are there twice."""
    found: dict[str, str] = {}
    ignored, unknown, twice = [], [], []
    for actual in shards.tensors:
        name = actual
        for old, new in OLD_NAMES.items():
            name = name.replace(old, new)
        spellings = (name, plugin.BASE + name)
        if expected_name := next((each for each in spellings if each in expected), None):
            if expected_name in found:
                twice.append(actual)
            found[expected_name] = actual
        elif any(re.fullmatch(pattern, each) for pattern in plugin.LEFT_OVER for each in spellings):
            ignored.append(actual)
        else:
            unknown.append(actual)
    copy, embedding = tied
    if copy in unknown and embedding in found and _equal(shards, copy, found[embedding]):
        unknown.remove(copy)
        ignored.append(copy)
    return Names(found, tuple(sorted(ignored))), unknown, twice


def _equal(shards: Shards, one: str, other: str) -> bool:
    """Whether two tensors are equal, compared some rows at a time."""
    if shards.tensors[one] != shards.tensors[other]:
        return False
    first, second = shards.slices(one), shards.slices(other)
    count = shards.tensors[one][0][0]
    rows = (slice(start, min(start + ROWS, count)) for start in range(0, count, ROWS))
    return all(np.array_equal(first((each,)), second((each,))) for each in rows)
