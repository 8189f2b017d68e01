"""From a rule to what trains: the trainable tree, the frozen tree, and the segments of the layer stack.

A rule is a string, or a list of strings of which the first that matches a leaf decides ("not RULE" decides against).
A leaf that no rule matches is frozen. Rules match whole path components, never substrings:

    all                          everything
    top(2)                       the last two layers, the final norm and the heads
    layers(3, 5)                 these layers
    biases, norms, embeddings    leaves of that kind
    layers[-2:]/.*               a slice of the layers
    layers[3,5]/attention/.*     parts of some layers
    .*/bias                      ".*" stands for one or more components; any other component is a regular expression
"""

import re
from collections.abc import Callable
from typing import NamedTuple

from llm3.errors import UserError, nearest
from llm3.models.transformer import Segments, canonical, segmented
from llm3.tree import flatten, unflatten

SHORTHANDS: dict[str, tuple[str, ...]] = {
    "all": (".*",),
    "biases": (".*/bias",),
    "norms": ("final_norm/.*", "layers/[a-z]+_norm/.*", "layers/.*/[a-z]+_norm/.*"),
    "embeddings": ("embed/.*",),
}


class Partition(NamedTuple):
    """Which leaves train. `trainable` holds paths of the segmented tree (layers/<a:b>/...)."""

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
    """The segmented tree of all leaves."""
    return unflatten(flatten(trainable) | flatten(frozen))


def make(shapes: dict, rules: str | list[str], layers: int) -> Partition:
    """The partition of a canonical tree (of arrays or of shapes) by `rules`.

    Raises UserError for a rule that cannot be read or matches nothing, and when nothing trains.
    """
    rules = [rules] if isinstance(rules, str) else list(rules)
    paths = list(flatten(shapes))
    matchers = [_matcher(rule, layers) for rule in rules]
    used = [False] * len(rules)

    def trains(path: str, layer: int | None) -> bool:
        for i, (rule, match) in enumerate(zip(rules, matchers, strict=True)):
            if match(path, layer):
                used[i] = True
                return not rule.strip().startswith("not ")
        return False

    whole = frozenset(path for path in paths if not path.startswith("layers/") and trains(path, None))
    inner = [path for path in paths if path.startswith("layers/")]
    patterns = [frozenset(path for path in inner if trains(path, layer)) for layer in range(layers)]
    for i, (rule, match) in enumerate(zip(rules, matchers, strict=True)):
        if not used[i] and not any(match(path, layer) for path in paths for layer in _layers_of(path, layers)):
            tied = " (this model's LM head is tied to embed/embedding)" if _bare(rule).startswith("lm_head") else ""
            raise UserError(f"train rule {rule!r} matches nothing{tied}; {nearest(_bare(rule), _names(paths))}")
    if not whole and not any(patterns):
        first = _bare(rules[0]) if rules else ""
        raise UserError(f"train rules {rules} leave nothing to train; {nearest(first, _names(paths))}")
    segments = _runs(patterns)
    stacked = {
        path.replace("layers/", f"layers/{first}:{last}/", 1) for first, last in segments for path in patterns[first]
    }
    return Partition(segments, whole | stacked)


def _layers_of(path: str, layers: int) -> list[int | None]:
    return list(range(layers)) if path.startswith("layers/") else [None]


def _runs(patterns: list[frozenset[str]]) -> Segments:
    starts = [i for i, pattern in enumerate(patterns) if i == 0 or pattern != patterns[i - 1]]
    return tuple(zip(starts, [*starts[1:], len(patterns)], strict=True))


def _bare(rule: str) -> str:
    return rule.strip().removeprefix("not ").strip()


def _names(paths: list[str]) -> list[str]:
    return [*SHORTHANDS, "top(N)", "layers(I,...)", *paths]


def _matcher(rule: str, layers: int) -> Callable[[str, int | None], bool]:
    """A function (canonical path, layer index or None) -> bool for one rule."""
    bare = _bare(rule)
    if top := re.fullmatch(r"top\(\s*(\d+)\s*\)", bare):
        count = int(top[1])
        if not 1 <= count <= layers:
            raise UserError(f"train rule {rule!r}: the model has {layers} layers")
        patterns = (f"layers[{layers - count}:]/.*", "final_norm/.*", "lm_head/.*", "head/.*")
    elif chosen := re.fullmatch(r"layers\(([-\d,\s]+)\)", bare):
        patterns = (f"layers[{chosen[1]}]/.*",)
    else:
        patterns = SHORTHANDS.get(bare, (bare,))
    parsed = [_parse(pattern, layers, rule) for pattern in patterns]
    return lambda path, layer: any(
        (chosen is None or layer in chosen) and _match(parts, path.split("/")) for chosen, parts in parsed
    )


def _parse(pattern: str, layers: int, rule: str) -> tuple[frozenset[int] | None, list[re.Pattern | None]]:
    """A path pattern as (the layers it is limited to, one regular expression a component, None for ".*")."""
    chosen, head = None, re.match(r"layers\[([^\]]*)\]", pattern)
    if head:
        chosen, pattern = _indices(head[1], layers, rule), "layers" + pattern[head.end() :]
    try:
        return chosen, [None if part == ".*" else re.compile(part) for part in pattern.split("/")]
    except re.error as error:
        raise UserError(f"train rule {rule!r} is not a regular expression by components: {error}") from error


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
