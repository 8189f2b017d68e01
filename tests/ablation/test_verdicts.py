"""What a table of comparisons says about its claims, and where that turns over a grid."""

import math

import numpy as np
import pytest

from llm3.ablation.power import found, power, seeds_needed
from llm3.ablation.statistics import Effect, effect
from llm3.ablation.variance import Variance
from llm3.ablation.verdicts import Claim, verdicts
from llm3.errors import UserError

SMALLEST = 0.02


def over(low: float, high: float, seeds: int = 5) -> Effect:
    """An effect over seeds with this 95 % interval."""
    base = effect({seed: float(seed) for seed in range(seeds)}, dict.fromkeys(range(seeds), 0.0))
    half = (base.high - base.low) / 2
    error = (high - low) / 2 / half * math.sqrt(base.variance.seed)
    return base._replace(value=(low + high) / 2, low=low, high=high, variance=Variance(error**2, seeds - 1))


def judge(low: float, high: float, expect: str, smallest: float = SMALLEST, **options):
    (verdict,) = verdicts([over(low, high)], [Claim(expect, smallest, "long", "short", "accuracy", **options)])
    return verdict


@pytest.mark.parametrize(
    ("low", "high", "expect", "word", "shown", "text"),
    [
        (
            0.03,
            0.05,
            "better",
            "confirmed",
            "better",
            "long is better than short in accuracy, by more than the 0.02 that counts (",
        ),
        (
            0.01,
            0.05,
            "better",
            "confirmed",
            "better",
            "better than short in accuracy; whether by the 0.02 that counts is not shown (",
        ),
        (0.005, 0.015, "better", "refuted", "better", "better than short in accuracy, but by less than the 0.02 that"),
        (-0.01, 0.015, "better", "refuted", "", "long is not better than short in accuracy by the 0.02 that counts ("),
        (-0.05, -0.01, "better", "refuted", "worse", "long is worse than short in accuracy ("),
        (-0.01, 0.05, "better", "undecided", "", "no difference between long and short in accuracy is shown ("),
        (
            -0.05,
            -0.03,
            "worse",
            "confirmed",
            "worse",
            "worse than short in accuracy, by more than the 0.02 that counts (",
        ),
        (-0.015, 0.01, "worse", "refuted", "", "long is not worse than short in accuracy by the 0.02 that counts ("),
        (0.01, 0.05, "worse", "refuted", "better", "long is better than short in accuracy ("),
        (
            -0.01,
            0.05,
            "no worse",
            "confirmed",
            "",
            "long is not worse than short in accuracy by the 0.02 that counts (",
        ),
        (0.01, 0.05, "no worse", "confirmed", "better", "long is better than short in accuracy ("),
        (-0.015, -0.005, "no worse", "confirmed", "worse", "but by less than the 0.02 that counts ("),
        (
            -0.05,
            -0.03,
            "no worse",
            "refuted",
            "worse",
            "worse than short in accuracy, by more than the 0.02 that counts (",
        ),
        (
            -0.05,
            -0.01,
            "no worse",
            "undecided",
            "worse",
            "worse than short in accuracy; whether by the 0.02 that counts is not shown (",
        ),
        (-0.03, 0.05, "no worse", "undecided", "", "no difference between long and short in accuracy is shown ("),
    ],
)
def test_a_claim_is_judged_by_where_its_interval_lies(low, high, expect, word, shown, text):
    verdict = judge(low, high, expect)
    assert (verdict.word, verdict.shown) == (word, shown)
    assert verdict.sentence.startswith(f"{word.capitalize()}: ") and text in verdict.sentence
    mirrored = judge(-high, -low, expect, lower_is_better=True)
    assert (mirrored.word, mirrored.shown, mirrored.p) == (word, shown, pytest.approx(verdict.p))


@pytest.mark.parametrize(
    ("low", "high", "word"), [(0.001, 0.01, "confirmed"), (-0.01, -0.001, "refuted"), (-1, 2, "undecided")]
)
def test_where_any_difference_counts_only_its_sign_is_judged(low, high, word):
    verdict = judge(low, high, "better", smallest=0)
    assert (verdict.word, verdict.p_size, verdict.power) == (word, None, None)
    assert (verdict.seeds_to_decide is None) == (word != "undecided")


def test_a_size_alone_calls_no_arms_different():
    """The size is tested at Holm's last step, where the sign is tested at the first."""
    equal, open_ = over(-0.001, 0.001), over(-0.078, -0.022)
    *_, last = verdicts([equal] * 9 + [open_], [Claim("no worse", SMALLEST)] * 10)
    assert last.p_size < 0.05 < last.p
    assert (last.word, last.shown) == ("undecided", "")


def test_a_sentence_has_the_numbers_it_rests_on():
    claim = Claim("better", 0.02, "long", "short", "accuracy", write=lambda value: f"{100 * value:+.1f} points")
    first, second = verdicts([over(0.03, 0.05), over(-0.02, 0.04)], [claim, claim])
    assert "(+4.0 points, 95 % interval +3.0 points to +5.0 points, p = " in first.sentence
    assert "5 seeds; p-values adjusted for 2 comparisons, the interval not)." in first.sentence
    assert f"About {second.seeds_to_decide} seeds would decide it with a power of 80 %." in second.sentence
    assert "The power for 2.0 points was" in second.sentence


def test_p_values_are_adjusted_for_all_comparisons_of_the_table():
    shown, claim = over(0.001, 0.03), Claim("better", SMALLEST)
    assert judge(0.001, 0.03, "better").word == "confirmed"
    table = verdicts([shown, over(-0.1, 0.1), over(-0.1, 0.12)], [claim] * 3)
    assert [each.word for each in table] == ["undecided"] * 3
    assert table[0].p == pytest.approx(3 * shown.p_value())


def test_the_seeds_to_decide_find_the_smallest_difference_with_the_power():
    effects, claims = [over(-0.03, 0.04), over(-0.1, 0.1)], [Claim("better", SMALLEST)] * 2
    first, _ = verdicts(effects, claims)
    assert first.seeds_to_decide == seeds_needed(SMALLEST, found(effects[0]), alpha=0.025)
    assert first.power == pytest.approx(power(SMALLEST, found(effects[0]), 5, alpha=0.025))


def test_an_undecided_claim_with_enough_seeds_for_the_smallest_difference_needs_those_for_half_of_it():
    open_ = over(-0.0001, 0.0201)
    assert seeds_needed(SMALLEST, found(open_)) <= 5 < seeds_needed(SMALLEST / 2, found(open_))
    (verdict,) = verdicts([open_], [Claim("better", SMALLEST)])
    assert verdict.seeds_to_decide == seeds_needed(SMALLEST / 2, found(open_))


def test_where_items_dominate_more_items_are_asked_for():
    wide = over(-0.03, 0.04)._replace(variance=Variance(1e-6, 4, 3e-4, 99, 0.0), items=100, documents=100)
    (verdict,) = verdicts([wide], [Claim("better", SMALLEST)])
    assert verdict.seeds_to_decide is None
    assert "More seeds would not decide it on these items; about " in verdict.sentence


def test_one_seed_decides_nothing_even_if_items_differ():
    items = np.random.default_rng(0).random(200)
    one = effect({0: items.mean() + 0.5}, {0: items.mean()}, {0: items + 0.5}, {0: items}, np.arange(200) // 2)
    (verdict,) = verdicts([one], [Claim("better", SMALLEST)])
    assert (verdict.word, verdict.shown, verdict.p) == ("undecided", "", 1.0)
    assert "One seed cannot tell arms from seeds" in verdict.sentence


def test_differences_that_are_all_equal_are_undecided_up_to_five_seeds():
    for seeds, word in ((5, "undecided"), (6, "confirmed")):
        equal = effect(dict.fromkeys(range(seeds), 0.7), dict.fromkeys(range(seeds), 0.6))
        (verdict,) = verdicts([equal], [Claim("better", SMALLEST)])
        assert verdict.word == word


@pytest.mark.parametrize(
    ("claim", "message"),
    [
        (Claim("beter", 0.1), "expect='beter': did you mean 'better'"),
        (Claim("better", -0.1), "smallest=-0.1: expected a difference of at least 0"),
        (Claim("better", math.nan), "smallest=nan"),
        (Claim("no worse", 0), "expected how much worse still counts as no worse"),
    ],
)
def test_a_claim_that_cannot_be_judged_is_refused(claim, message):
    with pytest.raises(UserError, match=message):
        verdicts([over(0, 1)], [claim])
