"""Two runs side by side: the metrics of their stages, and the fields in which their configs differ."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from llm3.report import statistics
from llm3.report.comparisons import SIGNIFICANT, compare, written_p
from llm3.report.entries import Entry, Measure, evaluations_of, measures, written
from llm3.report.material import Material
from llm3.report.statistics import Difference
from llm3.report.units import NOT_APPLICABLE, words

OTHER_DATA, UNKNOWN_DATA, UNTESTED = "other data", "data unknown", "no test"
LEGEND = {
    OTHER_DATA: "the runs measured it on other documents, or in another way: it cannot be compared",
    UNKNOWN_DATA: "a run has not recorded the documents: it cannot be compared",
    UNTESTED: "the predictions of a run were not kept",
}


def field_differences(left: Any, right: Any, where: str = "") -> Iterator[str]:
    """Lines "field: left / right" for the values in which two JSON values differ."""
    if isinstance(left, dict) and isinstance(right, dict):
        for key in dict.fromkeys([*left, *right]):
            path = f"{where}.{key}" if where else key
            yield from field_differences(left.get(key, ABSENT), right.get(key, ABSENT), path)
    elif left != right:
        yield f"{where}: {_shown(left)} / {_shown(right)}"


class _Absent:
    """The value of a field that one side does not have."""


ABSENT = _Absent()


def _shown(value: Any) -> str:
    return "(none)" if value is ABSENT else "(section)" if isinstance(value, dict) else repr(value)


class Compared(NamedTuple):
    """A metric of a stage in both runs. difference: right - left; None if it was not tested, for this reason.

    p: of the difference, corrected for all differences of these runs (Holm).
    """

    stage: str
    measure: Measure
    name: str
    left: float
    right: float
    difference: Difference | None
    reason: str
    p: float = 1.0

    @property
    def outcome(self) -> int:
        """1 if the right run is better beyond chance, -1 if it is worse, else 0."""
        if self.difference is None or self.p >= SIGNIFICANT:
            return 0
        return 1 if (self.difference.value < 0) == self.measure.lower_is_better else -1

    def cells(self, names: Sequence[str] = ("left", "right")) -> list[str]:
        """The cells of `heads`. names: of the two runs."""
        cells = [self.stage, *(written(value, self.measure) for value in (self.left, self.right))]
        if self.reason:
            return [*cells, NOT_APPLICABLE, NOT_APPLICABLE, self.reason]
        change = written(self.right - self.left, self.measure, "+")
        if (found := self.difference) is None:
            return [*cells, change, NOT_APPLICABLE, UNTESTED]
        ends = f" [{written(found.low, self.measure, '+')}, {written(found.high, self.measure, '+')}]"
        verdict = {0: "no difference", 1: f"{names[1]} better", -1: f"{names[0]} better"}[self.outcome]
        return [*cells, change + ends, written_p(self.p), verdict]


def heads(left: str = "left", right: str = "right") -> list[str]:
    """The heads of a table of `Compared`."""
    return ["stage", left, right, f"{right} - {left} [95 %]", "p (Holm)", "verdict"]


def compared(left: Material, right: Material) -> list[Compared]:
    """The metrics of all stages that have them in both runs, with p-values corrected for all."""
    found = [each for name in evaluations_of(left) if name in evaluations_of(right) for each in _all(left, right, name)]
    corrected = iter(statistics.holm([each.difference.p for each in found if each.difference]))
    return [each._replace(p=next(corrected)) if each.difference else each for each in found]


def tables(found: Sequence[Compared], names: Sequence[str] = ("left", "right")) -> dict[str, list[list[str]]]:
    """{metric: the cells of `heads` for each stage}"""
    made: dict[str, list[list[str]]] = {}
    for each in found:
        made.setdefault(each.name, []).append(each.cells(names))
    return made


def alone(left: Material, right: Material) -> list[str]:
    """The stages of the left run that the right one does not have."""
    others = {row["stage"] for row in right.stages}
    return [row["stage"] for row in left.stages if row["stage"] not in others]


def _all(left: Material, right: Material, evaluation: str) -> Iterator[Compared]:
    """The metrics of an evaluation, stage by stage."""
    theirs = {row["stage"]: row for row in right.stages}
    for first in (row for row in left.stages if row["stage"] in theirs):
        stage, second = first["stage"], theirs[first["stage"]]
        reason = not_comparable(first, second, evaluation)
        one, other = (
            Entry(stage, [row], [run.predictions(stage, evaluation)], False)
            for row, run in ((first, left), (second, right))
        )
        for measure in measures(left, evaluation):
            before, after = first.get(measure.key), second.get(measure.key)
            if before is not None and after is not None:
                difference = None if reason else compare(other, one, measure)
                name = f"{words(evaluation)} {measure.title}" + ", %" * measure.shares
                yield Compared(stage, measure, name, before, after, difference, reason)


def not_comparable(left: dict, right: dict, evaluation: str) -> str:
    """Why the metrics of two rows cannot be compared; "" if both were measured on the same data."""
    first, second = ((row.get("evaluation_digests") or {}).get(evaluation) for row in (left, right))
    if first is None or second is None:
        return UNKNOWN_DATA
    return "" if first == second else OTHER_DATA
