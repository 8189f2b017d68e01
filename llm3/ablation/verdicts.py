"""Verdicts on the comparisons of one table: confirmed, refuted or undecided.

A claim names the expected direction and the smallest difference that counts, before the runs. Two families of tests
judge all claims of a table, each at a family-wise error of 5 % by Holm 1979, which holds for comparisons that share an
arm:
- sign: is the difference 0? Only this test calls two arms different.
- size: is the difference the smallest one that counts, in the expected direction ("no worse": in the other one)?

| expected | confirmed | refuted |
|---|---|---|
| "better" | shown to be better, and not refuted | shown to be worse, or better by less than the smallest difference |
| "worse" | shown to be worse, and not refuted | shown to be better, or worse by less than the smallest difference |
| "no worse" | shown not to be worse by the smallest difference | shown to be worse, and by more than that |
| "different" | shown to be better or worse, and not refuted | shown to differ by less than the smallest difference |

"Shown to be better by less" is one half of an equivalence test (Schuirmann 1987): the claim fails whether the true
difference is 0, of the other sign, or too small. Alone in its table, a claim can be judged by eye: the 95 % interval
lies on one side of 0 or of the smallest difference. The intervals in the sentences are not adjusted for the others.

With one seed nothing is decided: the arms may differ by their seed.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from llm3.ablation import power
from llm3.ablation.statistics import Effect
from llm3.errors import UserError, counted, nearest
from llm3.report.statistics import holm

EXPECTATIONS = ("better", "worse", "no worse", "different")
CONFIRMED, REFUTED, UNDECIDED = "confirmed", "refuted", "undecided"


def _signed(value: float) -> str:
    return f"{value:+.3g}"


class Claim(NamedTuple):
    """What was expected of a comparison, ours - theirs."""

    expect: str  # one of EXPECTATIONS
    smallest: float  # smallest difference that counts, in the metric's unit; 0: any
    ours: str = "ours"  # names for the sentence
    theirs: str = "theirs"
    metric: str = "the metric"
    lower_is_better: bool = False
    write: Callable[[float], str] = _signed  # writes a difference with its sign and unit


class Verdict(NamedTuple):
    """What the runs say about a claim."""

    word: str  # "confirmed", "refuted" or "undecided"
    sentence: str  # the verdict with its numbers, in plain English
    seeds_to_decide: int | None  # of an undecided claim; None if unknown, or no number up to power.MOST_SEEDS does
    shown: str  # "better", "worse", or "" if no difference is shown
    p: float  # of no difference, adjusted by Holm for the table
    p_size: float | None  # of the smallest difference, adjusted by Holm; None if any difference counts
    power: float | None  # for the smallest difference, at the level of Holm's first step; None if unknown


class Finding(NamedTuple):
    """The outcome of the tests of a claim, without words for it."""

    word: str
    shown: str  # as in Verdict
    enough: bool  # the difference is shown to be larger than the smallest one ("no worse": worse by more than it)
    p: float
    p_size: float | None


def check_claim(claim: Claim) -> None:
    """Raise a UserError if a claim cannot be judged."""
    if claim.expect not in EXPECTATIONS:
        raise UserError(f"expect={claim.expect!r}: {nearest(claim.expect, EXPECTATIONS)}")
    if not (math.isfinite(claim.smallest) and claim.smallest >= 0):
        raise UserError(f"smallest={claim.smallest!r}: expected a difference of at least 0, without sign")
    if claim.expect == "no worse" and not claim.smallest:
        raise UserError("smallest=0 with expect='no worse': expected how much worse still counts as no worse, above 0")


def findings(effects: Sequence[Effect], claims: Sequence[Claim], alpha: float = power.ALPHA) -> list[Finding]:
    """The outcomes of all comparisons of one table, in order. alpha: the family-wise error of each of both families.

    Raises ValueError if the numbers of effects and claims differ, UserError for a claim that cannot be judged.
    """
    for claim in claims:
        check_claim(claim)
    pairs = list(zip(effects, claims, strict=True))
    signs = holm([_p(effect, 0.0) for effect, _ in pairs])
    sized = [index for index, claim in enumerate(claims) if claim.smallest]
    sizes = dict(zip(sized, holm([_p_of_size(*pairs[index]) for index in sized]), strict=True))
    return [
        _finding(*pair, sign, sizes.get(index), alpha)
        for index, (pair, sign) in enumerate(zip(pairs, signs, strict=True))
    ]


def _p(effect: Effect, null: float) -> float:
    """The p-value of a difference; 1 with one seed, whose p-value says nothing about the arms."""
    return effect.p_value(null) if effect.variance.seed_df else 1.0


def _p_of_size(effect: Effect, claim: Claim) -> float:
    """The p-value of the smallest difference; if no direction is expected, of both of its signs (Schuirmann 1987)."""
    if claim.expect != "different":
        return _p(effect, _bound(claim))
    inside = abs(effect.value) < claim.smallest
    return max(_p(effect, -claim.smallest), _p(effect, claim.smallest)) if inside else 1.0


def _upward(claim: Claim) -> float:
    """1 if a positive difference is in the direction of "better" (for "worse": of "worse"), else -1."""
    return -1.0 if claim.lower_is_better != (claim.expect == "worse") else 1.0


def _bound(claim: Claim) -> float:
    """The difference that the test of size is about."""
    return _upward(claim) * (-claim.smallest if claim.expect == "no worse" else claim.smallest)


def _finding(effect: Effect, claim: Claim, p: float, p_size: float | None, alpha: float) -> Finding:
    ahead = _upward(claim) * effect.value  # how far the difference is in the expected direction
    sign = (1 if ahead > 0 else -1) * (p <= alpha)
    size = (1 if ahead > _upward(claim) * _bound(claim) else -1) * (p_size is not None and p_size <= alpha)
    if claim.expect == "different":
        size = -int(p_size is not None and p_size <= alpha)
        word = REFUTED if size else CONFIRMED if sign else UNDECIDED
    elif claim.expect == "no worse":
        word = CONFIRMED if size > 0 else REFUTED if size < 0 and sign < 0 else UNDECIDED
    else:
        word = REFUTED if size < 0 or sign < 0 else CONFIRMED if sign > 0 else UNDECIDED
    better = (sign > 0) == (claim.expect != "worse")
    enough = sign == size == (-1 if claim.expect == "no worse" else 1)
    return Finding(word, "" if not sign else "better" if better else "worse", enough, p, p_size)


def verdicts(effects: Sequence[Effect], claims: Sequence[Claim], alpha: float = power.ALPHA) -> list[Verdict]:
    """The verdicts on all comparisons of one table, in order; arguments and errors as in `findings`."""
    found = findings(effects, claims, alpha)
    return [_verdict(*each, len(found), alpha) for each in zip(effects, claims, found, strict=True)]


def _verdict(effect: Effect, claim: Claim, found: Finding, comparisons: int, alpha: float) -> Verdict:
    components, level = power.found(effect), alpha / comparisons
    at_hand = power.power(claim.smallest, components, effect.seeds, alpha=level) if claim.smallest else None
    need = _need(effect, claim, components, level) if found.word == UNDECIDED else power.Need(None, None)
    end = _outlook(effect, claim, components, need, at_hand) if found.word == UNDECIDED else ""
    sentence = (
        f"{found.word.capitalize()}: {_outcome(claim, found)} ({_numbers(effect, claim, found, comparisons)}).{end}"
    )
    return Verdict(found.word, sentence, need.seeds, found.shown, found.p, found.p_size, at_hand)


def _outcome(claim: Claim, found: Finding) -> str:
    """What is shown about the difference."""
    counts = f"the {_size(claim)} that counts"

    def arms(relation: str) -> str:
        return f"{claim.ours} is {relation} than {claim.theirs} in {claim.metric}"

    if not found.shown:
        if found.word == UNDECIDED:
            return f"no difference between {claim.ours} and {claim.theirs} in {claim.metric} is shown"
        if claim.expect == "different":
            return f"{claim.ours} and {claim.theirs} differ in {claim.metric} by less than {counts}"
        return f"{arms('not ' + claim.expect.removeprefix('no '))} by {counts}"
    text = arms(found.shown)
    if claim.expect == "different" and found.word == REFUTED:
        return f"{text}, but by less than {counts}"
    if found.shown != "worse" if claim.expect == "no worse" else found.shown != claim.expect or not claim.smallest:
        return text
    if found.enough:
        return f"{text}, by more than {counts}"
    less = found.word == (CONFIRMED if claim.expect == "no worse" else REFUTED)
    return f"{text}, but by less than {counts}" if less else f"{text}; whether by {counts} is not shown"


def _numbers(effect: Effect, claim: Claim, found: Finding, comparisons: int) -> str:
    """The difference, its interval, the p-values and what they rest on."""
    finite = math.isfinite(effect.low)
    parts = [
        claim.write(effect.value),
        f"95 % interval {claim.write(effect.low)} to {claim.write(effect.high)}" if finite else "no interval",
        f"p = {found.p:.2g}",
    ]
    if found.p_size is not None:
        size = f"±{_size(claim)}" if claim.expect == "different" else claim.write(_bound(claim))
        parts.append(f"p = {found.p_size:.2g} for a difference of {size}")
    parts.append(counted(effect.seeds, "seed"))
    if effect.items:
        parts.append(counted(effect.items, "item"))
    adjusted = f"p-values adjusted for {comparisons} comparisons, the interval not"
    return ", ".join(parts) + (f"; {adjusted}" if comparisons > 1 else "")


def _need(effect: Effect, claim: Claim, components: power.Components | None, level: float) -> power.Need:
    """What would tell a true difference of the smallest size from none; if that is at hand, one of half that size.

    As long as it is undecided with enough seeds for that, the true difference is likely between the two, at least half
    the smallest one away from 0 or from the smallest one. If any difference counts: what would find the observed one.
    """
    if components is None or not (distance := claim.smallest or abs(effect.value)):
        return power.Need(None, None)
    need = power.needed(distance, components, effect.seeds, level)
    if need.seeds is not None and need.seeds <= effect.seeds:
        need = power.needed(distance / 2, components, effect.seeds, level)
    return need._replace(seeds=max(need.seeds, effect.seeds + 1)) if need.seeds is not None else need


def _outlook(
    effect: Effect, claim: Claim, components: power.Components | None, need: power.Need, at_hand: float | None
) -> str:
    """What an undecided comparison would need."""
    if not effect.variance.seed_df:
        return " One seed cannot tell arms from seeds: run at least 2, better 5."
    text = f" The power for {_size(claim)} was {_percent(at_hand)}." if at_hand is not None else ""
    if need.seeds is not None:
        return f"{text} About {need.seeds:,} seeds would decide it with a power of {_percent(power.POWER)}."
    if need.items is not None:
        return f"{text} More seeds would not decide it on these items; about {need.items:,} items would."
    if components is None:
        return f"{text} What would decide it is not known: all differences are equal."
    return f"{text} It would take more than {power.MOST_SEEDS:,} seeds{' and more items' * bool(effect.items)}."


def _size(claim: Claim) -> str:
    """The smallest difference that counts, without a sign."""
    return claim.write(claim.smallest).lstrip("+")


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
