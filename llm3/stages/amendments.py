"""Amendments: changes of a stage's config at a step where it resumed, and the config that each step is trained with.

The record of a stage (`config.json`) and the metadata of its later checkpoints list them, oldest first. What a step
computes depends on them alone, not on where the stage was killed: steps before an amendment are trained with the config
of then, should its checkpoint be damaged.
"""

import copy
import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from llm3.config import load
from llm3.config.changes import Change
from llm3.config.schema import StageConfig, as_dict

KEY = "amendments"  # of the record, of metadata and of rows
# of the record, but no part of the config
REPLAYED = "replayed"  # the weights of the parent's data, as they were when the stage began
EVALUATED = "evaluated"  # {evaluation: a digest of its documents}, as they are while the stage trains
DERIVED = (REPLAYED, EVALUATED)


class Amendment(NamedTuple):
    """Fields that change after a step. when: UTC, as ISO 8601. changes: {"field", "saved", "now"} of each field.

    back_from: the step that the stage had reached, if it went back; None: it did not.
    """

    step: int
    why: str
    when: str
    changes: list[dict[str, Any]]
    back_from: int | None = None

    @property
    def line(self) -> str:
        """The amendment on one line."""
        fields = [
            f"{each['field'].removeprefix('stage.')} {each['saved']!r} -> {each['now']!r}" for each in self.changes
        ]
        fields += [f"back from step {self.back_from}"] * (self.back_from is not None)
        return f"amended after step {self.step}: {', '.join(fields)} ({self.why}; {self.when[:10]})"


def changed(found: Iterable[Change]) -> list[dict[str, Any]]:
    """Changes as an amendment keeps them."""
    return [{"field": each.field, "saved": each.saved, "now": each.now} for each in found]


def amendments_in(values: dict | None) -> list[Amendment]:
    """The amendments in a record, the metadata of a checkpoint, a link of a lineage or a row."""
    return [Amendment(**each) for each in (values or {}).get(KEY) or ()]


def with_amendments(values: dict, amendments: Sequence[Amendment]) -> dict:
    """A record, metadata or a row with the amendments, if there are any."""
    return values | ({KEY: [each._asdict() for each in amendments]} if amendments else {})


def without_reasons(record: dict) -> dict:
    """A record with what its amendments change, but not why and when, and without what is no part of the config."""
    own = {key: value for key, value in record.items() if key not in DERIVED}
    amended = [{"step": each["step"], "changes": each["changes"]} for each in record.get(KEY, ())]
    return own | ({KEY: amended} if amended else {})


def history(config: StageConfig, amendments: Sequence[Amendment], where: str) -> list[tuple[int, StageConfig]]:
    """[(first step, the config of the steps from there on), ...], ascending from step 0; the last one is `config`.

    Of several amendments after one step, the last one counts. Raises UserError where an earlier config cannot be read.
    """
    found: dict[int, dict] = {}
    fields = json.loads(json.dumps(as_dict(config)))
    for each in reversed(amendments):
        found.setdefault(each.step, fields)
        fields = _before(fields, each.changes)
    found.setdefault(0, fields)
    now = {step: _read(own, where) for step, own in sorted(found.items())}
    return list((now | {max(now): config}).items())


def before_amendments(record: dict, step: int | None) -> dict:
    """A record without its list of amendments, and with the values before those after a step. None: keep all."""
    own = {key: value for key, value in record.items() if key not in (KEY, *DERIVED)}
    for each in reversed(amendments_in(record)):
        if step is not None and each.step > step:
            own["stage"] = _before(own["stage"], each.changes)
    return own


def _before(fields: dict, changes: list[dict[str, Any]]) -> dict:
    """The fields of a stage before changes of a record with the section "stage"."""
    result = {"stage": copy.deepcopy(fields)}
    for each in changes:
        *sections, name = each["field"].split(".")
        inner = result
        for section in sections:
            inner = inner[section]
        if each["saved"] is None:  # the record did not have it: it had its default, or no part in the result
            inner.pop(name, None)
        else:
            inner[name] = each["saved"]
    return result["stage"]


def _read(fields: dict, where: str) -> StageConfig:
    if fields["batch_size"] % fields["micro_batches"]:  # micro_batches is free, and fits the batches of now
        fields = fields | {"micro_batches": 1}
    return load.read_as(StageConfig, fields)
