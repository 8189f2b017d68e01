"""Validation while a stage trains: evaluations between its steps, the best of them, and when to stop early."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llm3.distributed import processes
from llm3.errors import UserError, counted, nearest
from llm3.report.units import words
from llm3.stages.evaluate import Measured, best_metric, measure
from llm3.stages.evaluation import Evaluation, subject_of
from llm3.stages.session import Session
from llm3.stages.stage import Stage
from llm3.training.loop import Verdict

SHORT_NAMES = {"bits_per_byte": "bpb", "pseudo_bits_per_byte": "pseudo bpb"}  # of metrics, in the progress line


@dataclass
class Best:
    """The best evaluation of a stage so far; saved in its checkpoints. Values are signed so that lower is better.

    step: of the best value, the later of equal ones; 0: there is none yet. reference: the value that the next
    improvement is measured from. waited: evaluations since the last improvement.
    """

    metric: str
    step: int = 0
    value: float | None = None
    reference: float | None = None
    waited: int = 0

    def add(self, step: int, value: float, min_delta: float = 0.0) -> None:
        """Count the value of an evaluation; one that is not finite is no improvement."""
        improved = math.isfinite(value) and (self.reference is None or value < self.reference - min_delta)
        self.reference, self.waited = (value, 0) if improved else (self.reference, self.waited + 1)
        if math.isfinite(value) and (self.value is None or value <= self.value):
            self.step, self.value = step, value


class Validation:
    """The evaluations of a stage between its steps, and its `best` metric.

    saved: `state` in the checkpoint that the stage resumes from. Raises UserError for evaluations or a metric that do
    not apply to the stage.
    """

    def __init__(self, session: Session, stage: Stage, saved: dict | None = None):
        self._session, self._stage, self._config = session, stage, stage.config
        self._evaluations = validating(session.experiment.evaluations, stage)
        self._judge: tuple[int, Evaluation] | None = None
        if self._config.best:
            self._judge = best_metric(self._evaluations or session.experiment.evaluations, stage)
        self.best = Best(**saved) if saved and saved["metric"] == self._config.best else Best(self._config.best)
        self._step, self._value = 0, math.inf  # of the last evaluation
        self._on_all: dict[str, Measured] = {}  # its results by evaluation, of those on all of their documents
        self.shown: dict[str, float] = {}  # its metrics for the progress line

    @property
    def state(self) -> dict[str, Any]:
        """What a checkpoint needs for the stage to stop where it would have stopped: a key of its metadata."""
        return {"validation": dict(vars(self.best))} if self._judge and self._evaluations else {}

    @property
    def names(self) -> set[str]:
        """The evaluations between steps."""
        return {each.name for each in self._evaluations}

    @property
    def labels(self) -> dict[str, str]:
        """{metric: its short name in the progress line}: one of each evaluation, `best` before others."""
        found = {}
        for each in self._evaluations:
            keys = {f"{each.name}_{metric}": metric for metric in each.better}
            chosen = self._config.best if self._config.best in keys else next(iter(keys), None)
            if chosen is not None:
                found[chosen] = f"{words(each.name)} {SHORT_NAMES.get(keys[chosen], words(keys[chosen]))}"
        return found

    def due(self, step: int) -> bool:
        """Whether to evaluate after a step: every `eval_every` steps, and after the last one."""
        every = self._config.eval_every
        return bool(every) and (step % every == 0 or step == self._config.steps)

    def measure(self, step: int, params: dict, alive: Callable[[], None]) -> dict[str, float | None]:
        """The metrics of canonical parameters after a step. alive: called after each batch."""
        subject, metrics = subject_of(self._stage), dict[str, float | None]()
        self._step, self._on_all = step, {}
        for each in self._evaluations:
            found = measure(self._session, subject, params, each, alive)
            metrics |= found.metrics
            if any(each is other for other in self._session.experiment.evaluations):  # not a sample
                self._on_all[each.name] = found
        self.shown = {key: value for key in self.labels if (value := metrics.get(key)) is not None}
        if self._judge:
            self._value = self._signed(metrics)
            self.best.add(step, self._value, self._config.min_delta)
        return metrics

    def results(self, step: int) -> dict[str, Measured]:
        """{evaluation: its results} after a step, of the evaluations that measured all of their documents then."""
        return self._on_all if self._step == step else {}

    def verdict(self, step: int) -> Verdict:
        """What the evaluation of this step decides."""
        return Verdict(save=self.best.step == step, stop=self.stops)

    @property
    def stops(self) -> bool:
        """Whether the stage has waited for an improvement long enough."""
        return 0 < self._config.patience <= self.best.waited

    def score(self, step: int, params: Callable[[], dict], alive: Callable[[], None]) -> float | None:
        """The value of `best` for the checkpoint of a step, signed, inf if it is not finite; None: there is none.

        Without `eval_every`, it is measured for each checkpoint, on all documents.
        """
        if self._judge is None or (self._evaluations and self._step != step):
            return None
        if self._evaluations:
            return self._value
        return self._signed(measure(self._session, subject_of(self._stage), params(), self._judge[1], alive)[0])

    def result(self, step: int) -> dict[str, Any]:
        """Which step a stage that ends at `step` takes its result from, and why: a key of its metadata and its row.

        Without patience, that is the last step, and there is no such key.
        """
        if not self._config.patience:
            return {}
        why = f"the best {self._config.best} of {counted(step, 'step')}"
        if self.stops:
            why = f"{self._config.best} has not improved in {counted(self._config.patience, 'evaluation')}"
        taken = self.best.step or step
        return {"early_stopping": {"stopped_at": step, "result_step": taken, "why": why}}

    def sentence(self, step: int) -> str:
        """What the evaluation of this step has found, for the log."""
        names = {**dict.fromkeys([self._config.best] * bool(self._config.best)), **self.labels}
        parts = [f"{key} {self.shown[key]:.4g}" for key in names if key in self.shown]
        if self._judge and self.best.step == step:
            parts[:1] = [f"{part}, the best so far" for part in parts[:1]]
        return f"{self._stage.name}: step {step}: {'; '.join(parts) or 'no finite metric'}"

    def _signed(self, metrics: dict[str, float | None]) -> float:
        assert self._judge is not None
        (sign, evaluation), best = self._judge, self._config.best
        if best not in metrics:
            where = f"{self._stage.where}.best={best!r}"
            raise UserError(f"{where}: evaluation {evaluation.name!r} has not measured it; {nearest(best, metrics)}")
        value = metrics[best]
        # from the first process, so that all of them save and stop at the same steps
        return processes.broadcast_from_first(lambda: math.inf if value is None else sign * value)


def validating(evaluations: list[Evaluation], stage: Stage) -> list[Evaluation]:
    """The evaluations that run while a stage trains, on a sample of their documents. Raises UserError."""
    own, subject = stage.config, subject_of(stage)
    if not own.eval_every:
        return []
    applying = {each.name: each for each in evaluations if each.applies(subject)}
    if not applying:
        raise UserError(f"{stage.where}.eval_every={own.eval_every}: no evaluation of this config applies to the stage")
    for name in own.eval_names:
        if name not in applying:
            raise UserError(
                f"{stage.where}.eval_names: {name!r} does not apply to the stage; {nearest(name, applying)}"
            )
    where = f"{stage.where}.eval_documents={own.eval_documents}"
    return [applying[name].sampled(own.eval_documents, where) for name in own.eval_names or applying]
