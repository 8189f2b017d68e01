"""The account of a hand-off: what becomes of every leaf, and whether the loaded ones keep their function."""

import dataclasses
import re
from collections import Counter
from typing import NamedTuple

from llm3.config.schema import ModelConfig
from llm3.errors import UserError, listed, nearest
from llm3.handoff import vocabulary
from llm3.handoff.start import Start


class Account(NamedTuple):
    """What becomes of every leaf, by path."""

    loaded: tuple[str, ...]
    fresh: tuple[str, ...]
    dropped: tuple[str, ...]
    extended: tuple[str, ...]  # of the loaded ones, those that new tokens were added to
    cast: dict[str, str]  # of the loaded ones, those that had another dtype, and which

    def said(self) -> dict:
        """For the metadata of the child: what is not simply the parent's."""
        return {key: list(getattr(self, key)) for key in ("fresh", "dropped", "extended")} | {"cast": self.cast}

    def describe(self) -> str:
        """In a line."""
        return "; ".join([f"{len(self.loaded)} leaves loaded", *changes(self.said())])


def changes(said: dict) -> list[str]:
    """What is not simply the parent's, in words; `said` as a child's metadata and its lineage have it."""
    number = Counter((said.get("cast") or {}).values())
    cast = [f"{n} {'leaf' if n == 1 else 'leaves'} cast from {dtype}" for dtype, n in sorted(number.items())]
    cast += [f"frozen kernels rounded to {said['rounded']}"] if said.get("rounded") else []
    words = {"extended": "extended by the mean of the old tokens", "fresh": "fresh", "dropped": "dropped"}
    return cast + [f"{text}: {listed(said[key])}" for key, text in words.items() if said.get(key)]


def account_for(
    model: dict[str, tuple[int, ...]], parent: dict[str, tuple[int, ...]], start: Start, where: str, added: int = 0
) -> Account:
    """Account for every leaf of the model and of the parent, given {path: shape} of each.

    A rule is a regular expression over a whole path. added: the new tokens behind the parent's vocabulary. Raises
    UserError with the whole difference where a leaf is missing, left over, or of another shape, and where a rule
    matches nothing.
    """
    fresh = {path for path in model if any(re.fullmatch(rule, path) for rule in start.fresh)}
    dropped = {path for path in parent if any(re.fullmatch(rule, path) for rule in start.drop)}
    for name, rules, paths in (("fresh", start.fresh, model), ("drop", start.drop, parent)):
        for rule in rules:
            if not any(re.fullmatch(rule, path) for path in paths):
                raise UserError(f"{where}.{name}: {rule!r} matches no leaf; {nearest(rule, paths)}")
    kept = set(parent) - dropped
    problems = [
        f"  {path} {model[path]}: not in the parent; name it in start.fresh if it is to be new"
        for path in sorted(set(model) - fresh - kept)
    ]
    problems += [
        f"  {path} {parent[path]}: not in this model; name it in start.drop if it is not needed"
        for path in sorted(kept - set(model))
    ]
    loaded = sorted((set(model) - fresh) & kept)
    extended = [path for path in loaded if vocabulary.grows(path, parent[path], model[path], added)]
    problems += [
        f"  {path}: {model[path]} in this model, {parent[path]} in the parent; take the parent's model, or name it in "
        f"start.fresh if it is to be new"
        for path in loaded
        if tuple(model[path]) != tuple(parent[path]) and path not in extended
    ]
    if problems:
        raise UserError(f"{where}: {start.run}/{start.stage} does not fit this model:\n" + "\n".join(problems))
    return Account(
        tuple(loaded), tuple(sorted(fresh)), tuple(sorted(dropped | (kept & fresh))), tuple(extended), cast={}
    )


# What changes no result, or only that of leaves which `check_labels` and the account look after.
FREE_MODEL_FIELDS = (
    *("remat", "logit_chunk", "scan_unroll", "compute_dtype"),
    *("vocab_size", "classes", "pool", "adapters", "max_output_positions"),
)


def check_function(before: ModelConfig, now: ModelConfig, account: Account, where: str) -> None:
    """Raise UserError where leaves of the same shapes would be used in another way than the parent used them."""
    for field in dataclasses.fields(ModelConfig):
        theirs, ours = getattr(before, field.name), getattr(now, field.name)
        if field.name not in FREE_MODEL_FIELDS and theirs != ours:
            raise UserError(
                f"{where}: the parent has model.{field.name}={theirs!r}, this stage {ours!r}: use the parent's"
            )
    if "head/kernel" in account.loaded and before.pool != now.pool:
        raise UserError(
            f"{where}: the parent's task head reads model.pool={before.pool!r}, this stage's {now.pool!r}: "
            f"use the parent's, or name the head in start.fresh=['head/.*']"
        )
    theirs, ours = dict(before.adapters), dict(now.adapters)
    for name in theirs.keys() & ours.keys():
        if not any(f"/lora/{name}/" in path for path in account.loaded):
            continue
        for field in ("alpha", "rslora", "rank", "dora", "targets"):
            was, is_now = getattr(theirs[name], field), getattr(ours[name], field)
            if was != is_now and not (field == "targets" and set(was) == set(is_now)):
                raise UserError(
                    f"{where}: the parent's adapter {name!r} has {field}={was!r}, this stage's {is_now!r}: "
                    f"use the parent's, or give a new adapter another name"
                )
