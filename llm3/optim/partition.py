"""From rules to a partition: the trainable tree, the frozen tree, and the segments of the layer stack.

A rule is a string. In a list of rules, the first that matches a leaf decides: the leaf is trainable, or frozen if the
rule is "not RULE". A leaf that no rule matches is frozen. A rule that decides about no leaf is an error. Rules match
complete path components, never substrings:

    all                          everything
    top(2)                       the last two layers, the final norm and the heads with what they read through
    layers(3, 5)                 these layers
    biases, norms, embeddings    all leaves of this kind
    lora, lora(medical)          all adapters, or the adapter of this name
    layers[-2:]/.*               a slice of the layers
    layers[3,5]/attention/.*     parts of some layers
    .*/bias                      ".*" stands for one or more components; any other component is a regular expression
"""

import re
from collections.abc import Callable, Collection
from typing import NamedTuple

from llm3.errors import UserError, counted, nearest
from llm3.optim.precedence import deciding_rules, shadowed
from llm3.segments import Segments, canonical, in_stack, runs, segment_path, segmented
from llm3.tree import flatten, unflatten

SHORTHANDS: dict[str, tuple[str, ...]] = {
    "all": (".*",),
    "biases": (".*/bias",),
    "norms": ("final_norm/.*", "layers/[a-z_]+_norm/.*", "layers/.*/[a-z]+_norm/.*", "(embed|lm_transform)/norm/.*"),
    "embeddings": ("embed/.*",),
    "lora": (".*/lora/.*",),
}
TOP = ("final_norm", "lm_transform", "lm_head", "pooler", "head")  # the leaves above the layers


class Partition(NamedTuple):
    """Which leaves are trainable. `trainable` holds paths of the segmented tree (layers/<a:b>/...)."""

    segments: Segments
    trainable: frozenset[str]

    def split(self, params: dict) -> tuple[dict, dict]:
        """Canonical parameters as (trainable, frozen) trees, both cut into segments."""
        return self.divide(segmented(params, self.segments))

    def divide(self, tree: dict) -> tuple[dict, dict]:
        """A segmented tree (of arrays, shapes, shardings) as its (trainable, frozen) parts."""
        flat = flatten(tree)
        return (
            unflatten({path: leaf for path, leaf in flat.items() if path in self.trainable}),
            unflatten({path: leaf for path, leaf in flat.items() if path not in self.trainable}),
        )

    def join(self, trainable: dict, frozen: dict) -> dict:
        """The canonical parameters: the inverse of `split`."""
        return canonical(merge(trainable, frozen))


def merge(trainable: dict, frozen: dict) -> dict:
    """The segmented tree of all leaves: the inverse of `divide`."""
    return unflatten(flatten(trainable) | flatten(frozen))


def make_partition(shapes: dict, rules: str | list[str], layers: int) -> Partition:
    """The partition of a canonical tree (of arrays or of shapes) by `rules`.

    Raises UserError for a malformed rule, for a rule that decides about no leaf, and if no leaf is trainable.
    """
    return make_partitions(shapes, rules, [], layers)[0]


def make_partitions(
    shapes: dict, rules: str | list[str], unfreeze: list[tuple[int, str | list[str]]], layers: int
) -> dict[int, Partition]:
    """{first step: partition}: at step 0 by `rules`, and at each step of `unfreeze` with the leaves of its rules added.

    All partitions have the same segments, so a leaf keeps its path and its moments. Gradual unfreezing: Howard and
    Ruder 2018, ULMFiT, section 3.3. Raises UserError as `make_partition`, and for a step that adds nothing.
    """
    paths = list(flatten(shapes))
    chosen = {0: _selected(paths, rules, layers)}
    for step, more in unfreeze:
        before = list(chosen.values())[-1]
        added = _selected(paths, more, layers, f"unfreeze at step {step}: ", before)
        if added <= before:
            raise UserError(f"unfreeze at step {step}: {more!r} adds nothing to the trainable parameters")
        chosen[step] = before | added
    segments = runs([[_of_layer(each, layer) for each in chosen.values()] for layer in range(layers)])
    return {
        step: Partition(segments, frozenset(_segmented_path(path, layer, segments) for path, layer in each))
        for step, each in chosen.items()
    }


def _selected(
    paths: list[str],
    rules: str | list[str],
    layers: int,
    where: str = "",
    before: Collection[tuple[str, int | None]] = (),
) -> set[tuple[str, int | None]]:
    """The trainable (canonical path, layer or None) by `rules`.

    where: the beginning of messages. before: leaves that train already, about which no rule decides. Raises UserError.
    """
    rules = [rules] if isinstance(rules, str) else list(rules)
    leaves = [(path, layer) for path in paths for layer in _layers_of(path, layers)]
    deciding = deciding_rules([matcher(rule, layers) for rule in rules], leaves)
    chosen = {leaf for leaf, i in deciding.first.items() if not rules[i].strip().startswith("not ")}
    for i, rule in enumerate(rules):
        if not deciding.matched[i]:
            tied = " (this model's LM head is tied to embed/embedding)" if _bare(rule).startswith("lm_head") else ""
            valid = nearest(_bare(rule), rule_names(paths))
            raise UserError(f"{where}train rule {rule!r} matches nothing{tied}; {valid}")
        if hidden := deciding.hidden_by(i):
            raise UserError(f"{where}train {shadowed(rule, [rules[each] for each in hidden])}")
        if len(rules) > 1 and all(leaf in before for leaf, first in deciding.first.items() if first == i):
            raise UserError(f"{where}rule {rule!r} changes nothing: all that it decides about trains already")
    if not chosen:
        first = _bare(rules[0]) if rules else ""
        raise UserError(f"train rules {rules} leave nothing to train; {nearest(first, rule_names(paths))}")
    return chosen


def _of_layer(chosen: set[tuple[str, int | None]], layer: int) -> frozenset[str]:
    return frozenset(path for path, each in chosen if each == layer)


def _segmented_path(path: str, layer: int | None, segments: Segments) -> str:
    return path if layer is None else segment_path(path, *next((a, b) for a, b in segments if a <= layer < b))


def _layers_of(path: str, layers: int) -> list[int | None]:
    return list(range(layers)) if in_stack(path) else [None]


def _bare(rule: str) -> str:
    return rule.strip().removeprefix("not ").strip()


def rule_names(paths: list[str]) -> list[str]:
    """Valid rules for leaves at these canonical paths, for error messages."""
    shorthands = [name for name in SHORTHANDS if any(matcher(name, 1)(path, 0) for path in paths)]
    adapters = sorted({f"lora({path.split('/lora/')[1].split('/')[0]})" for path in paths if "/lora/" in path})
    return [*shorthands, "top(N)", "layers(I,...)", *adapters, *paths]


def matcher(rule: str, layers: int) -> Callable[[str, int | None], bool]:
    """A function (canonical path, layer or None) -> whether the rule matches. Raises UserError for a malformed rule."""
    bare = _bare(rule)
    patterns: tuple[str, ...]
    if top := re.fullmatch(r"top\(\s*(\d+)\s*\)", bare):
        count = int(top[1])
        if not 1 <= count <= layers:
            raise UserError(f"train rule {rule!r}: the model has {counted(layers, 'layer')}")
        patterns = (f"layers[{layers - count}:]/.*", *(f"{name}/.*" for name in TOP))
    elif chosen := re.fullmatch(r"layers\(([-\d,\s]+)\)", bare):
        patterns = (f"layers[{chosen[1]}]/.*",)
    elif adapter := re.fullmatch(r"lora\(\s*([\w-]+)\s*\)", bare):
        patterns = (f".*/lora/{adapter[1]}/.*",)
    else:
        patterns = SHORTHANDS.get(bare, (bare,))
    parsed = [_parse(pattern, layers, rule) for pattern in patterns]
    return lambda path, layer: any(
        (chosen is None or layer in chosen) and _match(parts, path.split("/")) for chosen, parts in parsed
    )


def _parse(pattern: str, layers: int, rule: str) -> tuple[frozenset[int] | None, list[re.Pattern | None]]:
    """A path pattern as (its layers or None, a regular expression for each component, with None for ".*")."""
    chosen, head = None, re.match(r"layers\[([^\]]*)\]", pattern)
    if head:
        chosen, pattern = _indices(head[1], layers, rule), "layers" + pattern[head.end() :]
    try:
        return chosen, [None if part == ".*" else re.compile(part) for part in pattern.split("/")]
    except re.error as error:
        raise UserError(f"train rule {rule!r} has a component that is no regular expression: {error}") from error


def _indices(text: str, layers: int, rule: str) -> frozenset[int]:
    """Layer numbers from "3", "3,5", "-1" or a slice "-2:"."""
    try:
        if ":" in text:
            return frozenset(range(layers)[slice(*(int(part) if part.strip() else None for part in text.split(":")))])
        return frozenset(range(layers)[int(part)] for part in text.split(","))
    except (ValueError, IndexError) as error:
        raise UserError(
            f"train rule {rule!r}: [{text}] picks no layers; the model has layers 0 to {layers - 1}"
        ) from error


def _match(pattern: list[re.Pattern | None], parts: list[str]) -> bool:
    if not pattern or not parts:
        return not pattern and not parts
    if pattern[0] is None:
        return any(_match(pattern[1:], parts[n:]) for n in range(1, len(parts) + 1))
    return pattern[0].fullmatch(parts[0]) is not None and _match(pattern[1:], parts[1:])
