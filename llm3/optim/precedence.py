"""Lists of rules about leaves, in which the first rule that matches a leaf decides about it."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple


class Deciding(NamedTuple):
    """Which rule of a list decides about each leaf.

    matched: the leaves of each rule. first: {leaf: index of the first rule that matches it}, which decides.
    """

    matched: list[set[tuple[str, int | None]]]
    first: dict[tuple[str, int | None], int]

    def hidden_by(self, rule: int) -> list[int]:
        """The earlier rules that decide about every leaf of a rule; [] if it decides about some itself."""
        deciding = {self.first[leaf] for leaf in self.matched[rule]}
        return [] if rule in deciding else sorted(deciding)


def deciding_rules(
    matchers: Sequence[Callable[[str, int | None], bool]], leaves: Iterable[tuple[str, int | None]]
) -> Deciding:
    """Match rules, in order, to leaves given as (canonical path, layer or None)."""
    matched: list[set[tuple[str, int | None]]] = [set() for _ in matchers]
    first: dict[tuple[str, int | None], int] = {}
    for leaf in leaves:
        for i, match in enumerate(matchers):
            if match(*leaf):
                matched[i].add(leaf)
                first.setdefault(leaf, i)
    return Deciding(matched, first)


def shadowed(rule: str, earlier: list[str]) -> str:
    """The end of a message on a rule that decides about nothing, because `earlier` rules match all of its leaves."""
    names = " and ".join(repr(each) for each in earlier)
    matches = "matches" if len(earlier) == 1 else "match"
    return (
        f"rule {rule!r} decides nothing: {names} before it {matches} the same parameters, and the first match wins; "
        "move it to the front, or remove it"
    )
