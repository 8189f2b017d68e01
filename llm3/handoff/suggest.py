"""The rules for leaves that are not loaded, ready to be pasted into a config: few and short regular expressions."""

import re
from collections.abc import Collection, Iterable, Iterator


def shortest_rules(wanted: Collection[str], others: Iterable[str]) -> list[str]:
    """Few short regular expressions that match all `wanted` paths in full and none of `others`.

    They name runs of path components, such as "head/.*" or ".*/lora/types/.*".
    """
    left, kept, rules = set(wanted), set(others) - set(wanted), []
    found = {rule: {path for path in left if re.fullmatch(rule, path)} for path in left for rule in _rules_of(path)}
    valid = {rule: own for rule, own in found.items() if not any(re.fullmatch(rule, path) for path in kept)}
    while left:
        best = min(valid, key=lambda rule: (-len(valid[rule] & left), *_oddity(rule)))
        rules.append(best)
        left -= valid[best]
    return rules


def _oddity(rule: str) -> tuple[bool, bool, int, str]:
    """A sort key: first the rule of an adapter, then one that begins where paths begin, then the shorter one."""
    return not re.fullmatch(r"\.\*/lora/[^/]+/\.\*", rule), rule.startswith(".*/"), len(rule), rule


def _rules_of(path: str) -> Iterator[str]:
    """The rules that name some consecutive components of a path, the path itself among them."""
    parts = [re.escape(part) for part in path.split("/")]
    for first in range(len(parts)):
        for stop in range(first + 1, len(parts) + 1):
            yield ".*/" * (first > 0) + "/".join(parts[first:stop]) + "/.*" * (stop < len(parts))
