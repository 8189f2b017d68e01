"""The comparisons of an ablation: differences of arms in every cell of its grid, with tests and verdicts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from llm3.ablation.items import Items, items_of, paired
from llm3.ablation.metrics import claim_writer, evaluation_of, measure_of_key, measures_of, title_of
from llm3.ablation.pairs import Pair, pairs, runs_of
from llm3.ablation.schema import ComparisonConfig
from llm3.ablation.statistics import Effect, effect, over_documents
from llm3.ablation.study import Outcome, Planned, Study
from llm3.ablation.verdicts import Claim, Verdict, verdicts
from llm3.report.entries import Measure
from llm3.report.matrix import comparable
from llm3.report.statistics import Interval, holm


class Result(NamedTuple):
    """What the runs say about a pair in one metric.

    seeds: that both variants have finished, each pair of chains of stage runs once. missing: {variant: seeds that it
    lacks}. effect, verdict: None if the variants cannot be compared, for this reason. documents: of a ratio such as
    bits per byte, the interval over documents alone.
    """

    pair: Pair
    measure: Measure
    seeds: list[int]
    missing: dict[str, list[int]]
    effect: Effect | None = None
    reason: str = ""
    verdict: Verdict | None = None
    documents: Interval | None = None

    @property
    def metric(self) -> str:
        """The name of the metric, with the stage if it is not that whose row counts."""
        return title_of(self.measure) + (f" after {self.pair.stage}" if self.pair.stage else "")

    @property
    def word(self) -> str:
        """The verdict in a word."""
        return self.verdict.word if self.verdict else "not compared"

    @property
    def outcome(self) -> int:
        """1 if ours is shown to be better, -1 if it is shown to be worse, else 0."""
        return 0 if self.verdict is None else {"better": 1, "worse": -1}.get(self.verdict.shown, 0)


class Secondary(NamedTuple):
    """A difference in a metric that does not decide. p: adjusted by Holm for its table; None: not compared."""

    result: Result
    p: float | None


@dataclass(frozen=True, eq=False)
class Analysis:
    """The results of an ablation; each part is computed once, when it is asked for."""

    study: Study

    @cached_property
    def _items(self) -> dict[tuple[Path, str], Items | None]:
        """Read before: {(folder of a stage, metric): its items}; an arm is in more than one comparison."""
        return {}

    @cached_property
    def rows(self) -> list[dict]:
        """The rows that count, of all variants and seeds."""
        return [each.row for each in self.study.outcomes]

    @cached_property
    def measure(self) -> Measure:
        """The deciding metric of the ablation."""
        return self._measures[self.study.config.metric]

    @cached_property
    def _measures(self) -> dict[str, Measure]:
        """The deciding metrics by their keys."""
        rows = [row for each in self.study.outcomes for row in each.rows.values()]
        keys = {self.study.config.metric, *(self._deciding(each) for each in self.pairs)}
        return {key: measure_of_key(key, rows) for key in keys}

    def _deciding(self, pair: Pair) -> str:
        return pair.declared.metric or self.study.config.metric

    @cached_property
    def pairs(self) -> list[Pair]:
        """What is compared."""
        return pairs(self.study)

    @cached_property
    def results(self) -> list[Result]:
        """All comparisons in all cells, with verdicts; p-values are adjusted for all of them together.

        Cells whose arms are the same stage runs, as where only the sharing of their cost differs, are tested once.
        """
        found = [self._result(each, self._measures[self._deciding(each)]) for each in self.pairs]
        distinct_tests = {_test(each): (each.effect, claim(each)) for each in found if each.effect is not None}
        judged = verdicts(*([each[at] for each in distinct_tests.values()] for at in (0, 1)))  # type: ignore[arg-type]
        by_test = dict(zip(distinct_tests, judged, strict=True))
        return [each if each.effect is None else each._replace(verdict=by_test[_test(each)]) for each in found]

    @cached_property
    def tests(self) -> int:
        """How many tests the p-values of the comparisons are adjusted for."""
        return len({_test(each) for each in self.results if each.effect is not None})

    @cached_property
    def secondary(self) -> dict[Measure, list[Secondary]]:
        """Each two variants that are compared, in the metrics that do not decide; each metric is a table of its own."""
        tables = {}
        for measure in measures_of(self.rows):
            decided = {
                (each.ours.name, each.theirs.name)
                for each in self.pairs
                if self._deciding(each) == measure.key and not each.stage
            }
            sides = {(each.ours.name, each.theirs.name): each for each in self.pairs}
            plain = [_undeclared(each) for key, each in sides.items() if key not in decided]
            found = [self._result(each, measure, with_documents=True) for each in plain]
            effects = [each.effect for each in found if each.effect is not None]
            adjusted = iter(holm([each.p if each.variance.seed_df else 1.0 for each in effects]))
            if found:
                tables[measure] = [Secondary(each, None if each.effect is None else next(adjusted)) for each in found]
        return tables

    def values(self, variant: Planned, key: str) -> dict[int, float]:
        """{seed: value of a metric}; seeds with the same stage runs count once, as the first of them."""
        found = {each.seed: each.row[key] for each in self.study.of(variant.name) if each.row.get(key) is not None}
        return {seed: found[seed] for seed in distinct([variant], list(found))}

    def _result(self, pair: Pair, measure: Measure, with_documents: bool = False) -> Result:
        sides = (pair.ours, pair.theirs)
        own = [self._with_metric(each, pair.stage, measure) for each in sides]
        missing = {
            each.name: lacking
            for each, outcomes in zip(sides, own, strict=True)
            if (lacking := [seed for seed in self.study.config.seeds if seed not in outcomes])
        }
        seeds = distinct(sides, sorted(own[0].keys() & own[1].keys()), pair.stage)
        found = Result(pair, measure, seeds, missing)
        if not seeds:
            return found._replace(reason=self._why_not(pair, measure))
        ours, theirs = ({seed: outcomes[seed] for seed in seeds} for outcomes in own)
        rows = [each.rows[pair.stage or each.stage] for each in (*ours.values(), *theirs.values())]
        if not all(comparable(row, rows[0], evaluation_of(measure)) for row in rows):
            return found._replace(reason="they were evaluated on other data, or in another way")
        ours_by_seed, theirs_by_seed = (
            {seed: float(each.rows[pair.stage or each.stage][measure.key]) for seed, each in side.items()}
            for side in (ours, theirs)
        )
        our_items, their_items = (
            {seed: self._items_of(each, pair.stage or each.stage, measure) for seed, each in side.items()}
            for side in (ours, theirs)
        )
        items = paired(our_items, their_items)
        if items is None:
            return found._replace(effect=effect(ours_by_seed, theirs_by_seed))
        over = over_documents(*items) if with_documents and items.weights is not None else None
        return found._replace(effect=effect(ours_by_seed, theirs_by_seed, *items), documents=over)

    def _items_of(self, outcome: Outcome, stage: str, measure: Measure) -> Items | None:
        key = outcome.folders[stage], measure.key
        if key not in self._items:
            self._items[key] = items_of(outcome, stage, measure)
        return self._items[key]

    def _with_metric(self, variant: Planned, stage: str, measure: Measure) -> dict[int, Outcome]:
        """{seed: results} of a variant, with the metric in the row of the stage."""
        found = {each.seed: each for each in self.study.of(variant.name)}
        return {
            seed: each
            for seed, each in found.items()
            if each.rows.get(stage or each.stage, {}).get(measure.key) is not None
        }

    def _why_not(self, pair: Pair, measure: Measure) -> str:
        """Why two variants have no seed in common."""
        for each in (pair.ours, pair.theirs):
            if not self.study.of(each.name):
                return f"no seed of {each.name} is finished"
            if not self._with_metric(each, pair.stage, measure):
                return f"{each.name} has no {measure.key}" + (f" after {pair.stage}" if pair.stage else "")
        return "they have no finished seed in common"


def distinct(variants: Sequence[Planned], seeds: Sequence[int], stage: str = "") -> list[int]:
    """The seeds without those at which all variants have the same stage runs as at an earlier one, up to a stage."""
    first: dict[tuple, int] = {}
    for seed in seeds:
        first.setdefault(tuple(runs_of(each, str(seed), stage) for each in variants), seed)
    return list(first.values())


def _test(result: Result) -> tuple:
    """Equal for results that are one test: of the same stage runs, with the same claim."""
    pair = result.pair
    return pair.runs, pair.sides, result.metric, pair.declared.expect, pair.declared.smallest


def _undeclared(pair: Pair) -> Pair:
    """A pair without expectations, named by its sides."""
    own = ComparisonConfig(ours=pair.declared.ours, theirs=pair.declared.theirs)
    if pair.ours.arm == pair.theirs.arm:
        return pair._replace(declared=own)
    return pair._replace(name=" against ".join(pair.sides), declared=own)


def claim(result: Result) -> Claim:
    """What was expected of a pair, with names for the sentence."""
    own, measure = result.pair.declared, result.measure
    ours, theirs = result.pair.sides
    write = claim_writer(measure)
    return Claim(own.expect, own.smallest, ours, theirs, result.metric, measure.lower_is_better, write)


def by_name(results: Sequence[Result]) -> Iterator[tuple[str, list[Result]]]:
    """The results of each comparison, in all cells."""
    for name in dict.fromkeys(each.pair.name for each in results):
        yield name, [each for each in results if each.pair.name == name]
