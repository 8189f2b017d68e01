"""Two runs side by side: the metrics of their stages, and the fields in which their configs differ."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from llm3.report import statistics
from llm3.report.comparisons import SIGNIFICANT, compare, written_p
from llm3.report.entries import Entry, Measure, evaluations_of, measures, written
from llm3.report.material import Material
from llm3.report.statistics import Difference
from llm3.report.units import NOT_APPLICABLE, words

OTHER_DATA, UNKNOWN_DATA, UNTESTED = "other data", "data unknown", "no test"
HEADS = ["stage", "left", "right", "right - left [95 %]", "p (Holm)", "verdict"]
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
    """A metric of a stage in both runs. difference: right - left; None if it was not tested, for this reason."""

    stage: str
    measure: Measure
    name: str
    left: float
    right: float
    difference: Difference | None
    reason: str

    def cells(self, p: float) -> list[str]:
        """The cells of `HEADS`. p: of the difference, corrected."""
        cells = [self.stage, *(written(value, self.measure) for value in (self.left, self.right))]
        if self.reason:
            return [*cells, NOT_APPLICABLE, NOT_APPLICABLE, self.reason]
        change = written(self.right - self.left, self.measure, "+")
        if (found := self.difference) is None:
            return [*cells, change, NOT_APPLICABLE, UNTESTED]
        ends = f" [{written(found.low, self.measure, '+')}, {written(found.high, self.measure, '+')}]"
        if p >= SIGNIFICANT:
            verdict = "no difference"
        else:
            verdict = "right better" if (found.value < 0) == self.measure.lower_is_better else "left better"
        return [*cells, change + ends, written_p(p), verdict]


def tables(left: Material, right: Material) -> dict[str, list[list[str]]]:
    """{metric: the cells of `HEADS` for each stage that has it in both runs}; p-values are corrected for all."""
    found = [each for name in evaluations_of(left) if name in evaluations_of(right) for each in _all(left, right, name)]
    corrected = iter(statistics.holm([each.difference.p for each in found if each.difference]))
    made: dict[str, list[list[str]]] = {}
    for each in found:
        made.setdefault(each.name, []).append(each.cells(next(corrected) if each.difference else 1.0))
    return made


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
