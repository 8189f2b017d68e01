"""The account of a handoff: what happens to every leaf, and whether the model computes the loaded ones as before."""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Collection
from typing import NamedTuple

from llm3.config.model_schema import ModelConfig
from llm3.errors import UserError, counted, listed, nearest
from llm3.handoff.start import AnyStart
from llm3.handoff.suggest import shortest_rules
from llm3.handoff.vocabulary import NO_CHANGE, VOCABULARY_AXES, VocabularyChange


class Account(NamedTuple):
    """What happens to every leaf, by path."""

    loaded: tuple[str, ...]
    fresh: tuple[str, ...]
    dropped: tuple[str, ...]
    extended: tuple[str, ...]  # the loaded leaves with rows or columns for new tokens
    padded: tuple[str, ...]  # the loaded leaves whose rows are only padded, or cut, to another multiple
    cast: dict[str, str]  # {path: dtype in the parent} of the loaded leaves whose dtype changes

    def provenance(self) -> dict:
        """The leaves that differ from the parent, for the metadata of the child."""
        found = {key: list(getattr(self, key)) for key in ("fresh", "dropped", "extended")} | {"cast": self.cast}
        return found | ({"padded": list(self.padded)} if self.padded else {})

    def describe(self) -> str:
        """The account on one line."""
        return "; ".join([f"{len(self.loaded)} leaves loaded", *changes(self.provenance())])


def changes(provenance: dict) -> list[str]:
    """Phrases for everything that differs from the parent, given the metadata of a child or a link of a lineage."""
    counts = Counter((provenance.get("cast") or {}).values())
    cast = [f"{n} {'leaf' if n == 1 else 'leaves'} cast from {dtype}" for dtype, n in sorted(counts.items())]
    cast += [f"frozen kernels rounded to {provenance['rounded']}"] if provenance.get("rounded") else []
    phrases = {"extended": "extended by the mean of the old tokens", "padded": "with another padding"}
    phrases |= {"fresh": "fresh", "dropped": "dropped"}
    return cast + [f"{phrase}: {listed(provenance[key])}" for key, phrase in phrases.items() if provenance.get(key)]


def account_for(
    model: dict[str, tuple[int, ...]],
    parent: dict[str, tuple[int, ...]],
    start: AnyStart,
    where: str,
    change: VocabularyChange = NO_CHANGE,
) -> Account:
    """Account for every leaf of the model and of the parent, each given as {path: shape}.

    A rule is a regular expression that must match the full path. change: of the vocabulary since the parent. Raises
    UserError if a rule matches nothing, or with all problems if any leaf is missing, left over or of another shape.
    """
    fresh = {path for path in model if any(re.fullmatch(rule, path) for rule in start.fresh)}
    dropped = {path for path in parent if any(re.fullmatch(rule, path) for rule in start.drop)}
    for name, rules, paths in (("fresh", start.fresh, model), ("drop", start.drop, parent)):
        for rule in rules:
            if not any(re.fullmatch(rule, path) for path in paths):
                raise UserError(f"{where}.{name}: {rule!r} matches no leaf; {nearest(rule, paths)}")
    kept = set(parent) - dropped
    loaded = sorted((set(model) - fresh) & kept)
    fitted = [path for path in loaded if tuple(model[path]) == change.shape(path, parent[path])]
    extended = [path for path in fitted if path in VOCABULARY_AXES and change.added]
    padded = [path for path in fitted if tuple(model[path]) != tuple(parent[path]) and path not in extended]
    new, left = set(model) - fresh - kept, kept - set(model)
    problems = [
        f"  {path}: {model[path]} in this model, {parent[path]} in the parent; use the parent's model config, or "
        f"name it in start.fresh to initialize it"
        for path in loaded
        if path not in fitted
    ]
    problems += _unnamed(new, model, "not in the parent") + _unnamed(left, parent, "not in this model")
    if ready := ready_rules(start, new, left, kept, model):
        problems.append(f"  if that is meant, add to start: {ready}")
    if problems:
        raise UserError(f"{where}: {start.title} does not fit this model:\n" + "\n".join(problems))
    return Account(
        loaded=tuple(loaded),
        fresh=tuple(sorted(fresh)),
        dropped=tuple(sorted(dropped | (kept & fresh))),
        extended=tuple(extended),
        padded=tuple(padded),
        cast={},
    )


def _unnamed(paths: set[str], shapes: dict[str, tuple[int, ...]], reason: str) -> list[str]:
    """The line of an error for leaves that no rule names."""
    if not paths:
        return []
    return [f"  {counted(len(paths), 'leaf', 'leaves')} {reason}: {listed(f'{p} {shapes[p]}' for p in sorted(paths))}"]


def ready_rules(start: AnyStart, new: set[str], left: set[str], kept: set[str], model: Collection[str]) -> str:
    """The rules of a start and those for leaves that it does not name yet, as a config writes them.

    new: leaves of the model alone. left: leaves of the parent alone. kept: leaves of the parent that are not dropped.
    """
    fresh = [*start.fresh, *shortest_rules(new, set(model) & kept)] if new else []
    drop = [*start.drop, *shortest_rules(left, set(model) & kept)] if left else []
    return ", ".join(f"{name}={rules!r}" for name, rules in (("fresh", fresh), ("drop", drop)) if rules)


# fields that change no result
SAME_FUNCTION = (*sorted(ModelConfig.FREE), "compute_dtype", "matmul", "vocab_multiple")
# these, and fields that change only results of leaves that `check_labels` and the account check
FREE_MODEL_FIELDS = (
    *SAME_FUNCTION,
    *("vocab_size", "classes", "pool", "pooler", "adapters", "max_output_positions"),
    *("lm_transform", "lm_transform_bias", "lm_head_bias"),
)


def agree(theirs: object, ours: object) -> bool:
    """Whether two values of a model's field are equal; floats may have gone through float32."""
    if isinstance(theirs, float) and isinstance(ours, int | float):
        return math.isclose(theirs, ours, rel_tol=1e-6)
    return theirs == ours


def check_function(before: ModelConfig, now: ModelConfig, account: Account, where: str) -> None:
    """Raise UserError if the child would compute something else than the parent from leaves of the same shape."""
    for field in dataclasses.fields(ModelConfig):
        theirs, ours = getattr(before, field.name), getattr(now, field.name)
        if field.name not in FREE_MODEL_FIELDS and not agree(theirs, ours):
            raise UserError(
                f"{where}: the parent has model.{field.name}={theirs!r}, this stage {ours!r}: use the parent's"
            )
    for name in ("pool", "pooler") if "head/kernel" in account.loaded else ():
        theirs, ours = getattr(before, name), getattr(now, name)
        if theirs != ours:
            raise UserError(
                f"{where}: the parent's task head reads model.{name}={theirs!r}, this stage's {ours!r}: "
                f"use the parent's, or name the head in start.fresh=['head/.*']"
            )
    theirs, ours = dict(before.adapters), dict(now.adapters)
    for name in theirs.keys() & ours.keys():
        if not any(f"/lora/{name}/" in path for path in account.loaded):
            continue
        for option in ("alpha", "rslora", "rank", "dora", "targets"):
            was, is_now = getattr(theirs[name], option), getattr(ours[name], option)
            if was != is_now and not (option == "targets" and set(was) == set(is_now)):
                raise UserError(
                    f"{where}: the parent's adapter {name!r} has {option}={was!r}, this stage's {is_now!r}: "
                    f"use the parent's, or give a new adapter another name"
                )
