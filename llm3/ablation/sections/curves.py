"""Loss and metrics over all stages of the arms, by the tokens and by the FLOPs since the first model."""

from collections.abc import Callable, Mapping
from functools import partial

from llm3.ablation.materials import Group, StageRun, finished, groups
from llm3.ablation.metrics import direction, scale_of, title_of
from llm3.ablation.study import Planned, Study
from llm3.report.entries import Measure
from llm3.report.logs import read_metrics
from llm3.report.plots.curves import Curve, Panel, thinned
from llm3.report.plots.svg import look
from llm3.report.progress import means, points, smoothed

Points = list[tuple[float, float]]
AXES = {"tokens": "tokens since the first model", "flops": "FLOPs since the first model"}
THIN = 50  # points of a single seed at most


class Curves:
    """The curves of arms, each with a look of its own for its own stages. arms: {name: variant}."""

    def __init__(self, study: Study, arms: Mapping[str, Planned]):
        self._done = finished(study)
        self._looks = {name: look(index) for index, name in enumerate(arms)}
        self._runs: list[tuple[Group, list[StageRun]]] = [
            (group, [self._done[name] for name in group.runs.values() if name in self._done]) for group in groups(arms)
        ]
        self._histories = {run.folder: read_metrics(run.folder) for _, runs in self._runs for run in runs}

    def panels(self, measures: list[Measure]) -> list[Panel]:
        """The loss, then each metric; each by tokens and by FLOPs. Empty if nothing was trained."""
        found = []
        for unit, axis in AXES.items():
            curves = self._curves(partial(self._loss, unit=unit), marked=False)
            found.append(Panel("training loss", axis, "nats per target", curves, self._handoffs(unit)))
        for measure in measures:
            title = f"{title_of(measure)} ({direction(measure)})"
            for unit, axis in AXES.items():
                curves = self._curves(partial(self._metric, measure=measure, unit=unit), marked=True)
                name = "%" if measure.shares else measure.title
                found.append(Panel(title, axis, name, curves, self._handoffs(unit)))
        return [each for each in found if each.curves]

    def _handoffs(self, unit: str) -> list[tuple[float, str]]:
        places = {(self._start(run, unit), group.stage) for group, runs in self._runs for run in runs if group.parent}
        return sorted(places)

    def _curves(self, line_of: Callable[[StageRun], Points], marked: bool) -> list[Curve]:
        """Every seed of every stage thin, and their mean thick; the first thick line of an arm has its name."""
        found: list[Curve] = []
        named: set[str] = set()
        for group, runs in self._runs:
            arm, lines = group.arms[0], [line for line in map(line_of, runs) if line]
            for line in lines if len(lines) > 1 else []:
                found.append(Curve("", thinned(line, THIN), self._looks[arm], thin=True))
            if lines:
                found.append(Curve("" if arm in named else arm, mean(lines), self._looks[arm], marked=marked))
                named.add(arm)
        return found

    def _end(self, run: StageRun, unit: str) -> float:
        """What a stage has used with all its ancestors."""
        if chain := run.row.get("chain"):
            return chain[unit] or 0.0
        before = self._done.get(run.parent)
        return (run.row.get(unit) or 0.0) + (self._end(before, unit) if before else 0.0)

    def _start(self, run: StageRun, unit: str) -> float:
        if (before := self._done.get(run.parent)) is not None:
            return self._end(before, unit)
        return max(0.0, self._end(run, unit) - (run.row.get(unit) or 0.0))

    def _placed(self, run: StageRun, found: Points, unit: str) -> Points:
        """Points (step, value) on the axis; each step of a stage uses equally much."""
        start, steps = self._start(run, unit), run.row.get("steps") or max((x for x, _ in found), default=1)
        each = (run.row.get(unit) or 0.0) / steps
        return [(start + step * each, value) for step, value in found]

    def _loss(self, run: StageRun, unit: str) -> Points:
        return self._placed(run, smoothed(means(points(self._histories[run.folder], "loss"))), unit)

    def _metric(self, run: StageRun, measure: Measure, unit: str) -> Points:
        """From the value of the parent, by evaluations between steps, to the value of the stage."""
        if (value := run.row.get(measure.key)) is None:
            return []
        last = run.row.get("steps") or 0
        lines = [line for line in self._histories[run.folder] if "loss" not in line and line["step"] < last]
        found = [*self._placed(run, means(points(lines, measure.key)), unit), (self._end(run, unit), value)]
        before = self._done.get(run.parent)
        if before is not None and (start := before.row.get(measure.key)) is not None:
            found.insert(0, (self._start(run, unit), start))
        return [(x, scale_of(measure) * y) for x, y in found]


def mean(lines: list[Points]) -> Points:
    """The mean of lines with equally many points, point by point, else of their values at each place."""
    if len({len(line) for line in lines}) > 1:
        return means([point for line in lines for point in line])
    return [(sum(x for x, _ in at) / len(at), sum(y for _, y in at) / len(at)) for at in zip(*lines, strict=True)]
