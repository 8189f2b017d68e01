"""What an ablation compares: pairs of variants, in every cell of its grid."""

from typing import NamedTuple

from llm3.ablation.arms import BASE
from llm3.ablation.schema import ComparisonConfig
from llm3.ablation.study import Planned, Study


class Pair(NamedTuple):
    """Two variants to compare. name: of the comparison. cell: the point of the grid, {axis: value}."""

    name: str
    cell: dict[str, str]
    ours: Planned
    theirs: Planned
    declared: ComparisonConfig

    @property
    def title(self) -> str:
        """The name of the comparison with its cell."""
        return ", ".join([self.name, *filter(None, [cell_text(self.cell)])])

    @property
    def stage(self) -> str:
        """The stage whose rows are compared; "" for that whose row counts."""
        return self.declared.stage

    @property
    def runs(self) -> tuple[tuple[tuple[str, ...], ...], ...]:
        """The stage runs that both results come from, by seed."""
        return tuple(
            tuple(runs_of(each, seed, self.stage) for seed in each.chains) for each in (self.ours, self.theirs)
        )

    @property
    def sides(self) -> tuple[str, str]:
        """The names of both: their arms, or, of a single arm, those of its points."""
        if self.ours.arm != self.theirs.arm:
            return self.ours.arm, self.theirs.arm
        return cell_text(self.ours.cell), cell_text(self.theirs.cell)


def runs_of(variant: Planned, seed: str, stage: str = "") -> tuple[str, ...]:
    """The stage runs of a variant at a seed, up to a stage; "" for all."""
    number = variant.stages.index(stage) + 1 if stage in variant.stages else len(variant.stages)
    return tuple(variant.chains[seed][:number])


def cell_text(cell: dict[str, str]) -> str:
    """A point of the grid in words; "" without a grid."""
    return ", ".join(f"{axis}={value}" for axis, value in cell.items())


def pairs(study: Study) -> list[Pair]:
    """The pairs of an ablation: each comparison in each cell; with one arm, its other points with the first one.

    Without declared comparisons, every other arm is compared with the reference.
    """
    if has_one_arm(study):
        first, *others = study.variants
        own = ComparisonConfig(ours=first.arm or BASE, theirs=first.arm or BASE)
        return [Pair(f"against {cell_text(first.cell)}", each.cell, each, first, own) for each in others]
    at = {(each.arm, tuple(each.cell.items())): each for each in study.variants}
    places = list(dict.fromkeys(tuple(each.cell.items()) for each in study.variants))
    return [
        Pair(name, dict(place), at[own.ours, place], at[own.theirs, place], own)
        for name, own in comparisons(study).items()
        for place in places
    ]


def has_one_arm(study: Study) -> bool:
    """Whether the variants are points of one arm."""
    return len({each.arm for each in study.variants}) == 1


def comparisons(study: Study) -> dict[str, ComparisonConfig]:
    """The declared comparisons, else every other arm with the reference."""
    if study.config.comparisons:
        return dict(study.config.comparisons)
    arms = dict.fromkeys(each.arm for each in study.variants)
    return {
        f"{arm} against {study.reference}": ComparisonConfig(ours=arm, theirs=study.reference)
        for arm in arms
        if arm != study.reference
    }


def cells(study: Study) -> dict[str, dict[str, Planned]]:
    """{cell in words: {name of the arm: variant}}; the points of a single arm are together, by their cells."""
    if has_one_arm(study):
        return {"": {cell_text(each.cell) or each.arm: each for each in study.variants}}
    found: dict[str, dict[str, Planned]] = {}
    for each in study.variants:
        found.setdefault(cell_text(each.cell), {})[each.arm] = each
    return found
