"""What the report of a run is written from: rows, metrics, predictions, samples and settings, as plain values."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from llm3.report.matrix import complete, parent_of
from llm3.report.replicates import Recipe, collapsed, recipes, unreplicated

Columns = Mapping[str, Any]  # of numpy arrays, as `llm3.report.predictions.read_predictions` returns them


def no_predictions(stage: str, evaluation: str) -> Columns | None:
    """The predictions of a run that kept none."""
    return None


@dataclass(frozen=True, eq=False)  # found again by identity, in caches
class Material:
    """Everything that the sections of a report show. Rows need not be complete.

    histories: {stage: lines of `read_metrics`}. details: {stage: evaluation results that are not single numbers}.
    predictions: (stage, evaluation) -> columns, or None. samples: {stage: lines of its samples.jsonl}. data_samples:
    {stage: windows, each a list of (text, whether its tokens are targets)}. command: one line for each. facts: {name:
    value}, e.g. devices, versions and seed. settings: lines "field = value" of the config's fields that are no
    defaults. wall_seconds: of the run by part, as in a row, without its stages. sessions: when each call of `run`
    started, and how many seconds it took.
    """

    given_rows: list[dict]
    given_baselines: list[dict] = field(default_factory=list)
    title: str = "Run"
    command: str = ""
    histories: Mapping[str, list[dict]] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    details: Mapping[str, dict | None] = field(default_factory=dict)
    predictions: Callable[[str, str], Columns | None] = no_predictions
    samples: Mapping[str, list[dict]] = field(default_factory=dict)
    data_samples: Mapping[str, list[list[tuple[str, bool]]]] = field(default_factory=dict)
    settings: list[str] = field(default_factory=list)
    wall_seconds: Mapping[str, float] = field(default_factory=dict)
    sessions: list[tuple[str, float]] = field(default_factory=list)

    @cached_property
    def _complete(self) -> tuple[list[dict], list[dict]]:
        return complete(self.given_rows, self.given_baselines)

    @property
    def rows(self) -> list[dict]:
        """The complete rows of the main chain. Raises ValueError for a value that is not finite."""
        return self._complete[0]

    @property
    def baselines(self) -> list[dict]:
        """The complete rows of the baselines."""
        return self._complete[1]

    @property
    def stages(self) -> list[dict]:
        """The complete rows of the main chain, then those of the baselines."""
        return [*self.rows, *self.baselines]

    @cached_property
    def recipes(self) -> list[Recipe]:
        """The stages that differ only in their seed."""
        return recipes(self.stages)

    @property
    def shown(self) -> list[dict]:
        """The rows of the main chain with one row of means for each recipe."""
        return collapsed(self.rows)

    @property
    def shown_baselines(self) -> list[dict]:
        """The baselines with one row of means for each recipe."""
        return collapsed(self.baselines)

    @property
    def single(self) -> list[dict]:
        """The rows of the main chain that are no replicates."""
        return unreplicated(self.rows)

    def parent(self, row: dict) -> dict | None:
        """The row of the parent of a row; None if it has none."""
        if any(row is each for each in self.rows):
            return parent_of(self.rows, row)
        return parent_of(self.stages, row) if row.get("parent") else None

    def ancestors(self, row: dict) -> list[dict]:
        """The rows of the parent of a row, of its parent, and so on; each stage once."""
        found: list[dict] = []
        seen, parent = {row["stage"]}, self.parent(row)
        while parent is not None and parent["stage"] not in seen:
            found.append(parent)
            seen.add(parent["stage"])
            parent = self.parent(parent)
        return found
