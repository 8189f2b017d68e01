"""What the evaluations of a row were, so that rows can be compared, or brought up to date: definitions and data.

A row (`evaluation.json`) has `evaluations`: {name: {"config", "data", "digest"}} for each evaluation of the config,
also those that do not apply to the model. Rows without that key are of an older version: there the record of the stage
has the configs, and the data is unknown.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from llm3.config.data_schema import SourceConfig
from llm3.config.older import with_new_fields
from llm3.config.schema import EvaluationConfig, RunConfig, as_dict
from llm3.files import RECORD, read_json
from llm3.stages.workdir import differences

NOT_IN_RESULT = frozenset({"batch_size"})
Entries = dict[str, dict[str, Any]]


def definition(config: RunConfig, name: str) -> dict[str, Any]:
    """The part of the config that decides the result of an evaluation, as JSON values."""
    record = as_dict(config)
    return _definition(record["evaluations"][name], record["sources"])


def _definition(own: Mapping[str, Any], sources: Mapping[str, Any]) -> dict[str, Any]:
    fields = {key: value for key, value in own.items() if key not in NOT_IN_RESULT}
    return json.loads(json.dumps({"evaluation": fields, "source": sources.get(own["source"])}))


def entry(defined: dict[str, Any], data: str, better: Mapping[str, str]) -> dict[str, Any]:
    """What a row keeps of an evaluation. data: the fingerprint of its documents, "" if it has no source.

    better: {metric: "higher" or "lower"}

    Equal digests: the same measurement of the same data, in whatever run, wherever its files are.
    """
    own = defined["evaluation"]
    decides = [own["kind"], own["sequence_length"], own["options"], data]
    digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:12]
    return {"config": defined, "data": data, "digest": digest, "better": dict(better)}


def entries(directory: Path, row: Mapping[str, Any]) -> Entries:
    """The entries of a row in its folder; those of an older version have no data and no digest."""
    if "evaluations" in row:
        return row["evaluations"]
    record = read_json(directory / RECORD) or {}
    return {
        name: {"config": _definition(own, record["sources"]), "data": None, "digest": None}
        for name, own in record.get("evaluations", {}).items()
    }


def changes(saved: Mapping[str, Any] | None, now: Mapping[str, Any]) -> list[str] | None:
    """Why an evaluation has to be run again, as lines "field: saved X, now Y"; None: it does not.

    saved: the entry of a row, None if it has none. now: the entry of this config, without "data" where that is not
    known. [] means that the row lacks the evaluation.
    """
    if saved is None:
        return []
    before = with_new_fields(saved["config"], now["config"], {"evaluation": EvaluationConfig, "source": SourceConfig})
    lines = [line.strip() for line in differences(before, now["config"])]
    old, new = saved["data"], now.get("data")
    if not lines and old is not None and new is not None and old != new:
        lines = [f"data: saved {old[:12]}, now {new[:12]}"]
    return lines or None


def owner(key: str, names: Iterable[str]) -> str | None:
    """The evaluation that a key of a row or of its details belongs to; None: no evaluation."""
    return max((name for name in names if key.startswith(f"{name}_")), key=len, default=None)


def without(values: Mapping[str, Any], names: Iterable[str], known: Iterable[str]) -> dict[str, Any]:
    """A row, or its details, without the keys of the evaluations `names`. known: the names of all evaluations."""
    dropped, known = set(names), [*known]
    return {key: value for key, value in values.items() if owner(key, known) not in dropped}


def majority(metrics: Mapping[str, Any]) -> float | None:
    """The accuracy of always giving the most frequent answer, if a single one of the evaluations has it."""
    constant = [value for key, value in metrics.items() if key.endswith("_majority_accuracy")]
    return constant[0] if len(constant) == 1 else None


def current(
    directory: Path, row: dict[str, Any], details: dict[str, Any] | None, now: Entries
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """A row and its details with the evaluations of this config alone, as they are now, in its order.

    What was measured by another definition or on other data is left out: it cannot be compared. The row gets
    `evaluation_digests`: {name: digest, None if it is of an older version} in place of `evaluations`, and `better`:
    {key of a metric: "higher" or "lower"}.
    """
    saved = entries(directory, row)
    known = [*saved, *now]
    shown = [name for name in now if name in saved and changes(saved[name], now[name]) is None]
    hidden = {name for name in known if name not in shown}
    kept = {key: value for key, value in without(row, hidden, known).items() if key != "evaluations"}
    metrics = {key: value for name in shown for key, value in kept.items() if owner(key, known) == name}
    if hidden:
        kept["majority_accuracy"] = majority(metrics)
    digests = {name: saved[name]["digest"] for name in shown}
    better = {f"{name}_{key}": each for name in shown for key, each in saved[name].get("better", {}).items()}
    ordered = {"stage": row["stage"]} | metrics | kept | {"evaluation_digests": digests, "better": better}
    return ordered, None if details is None else without(details, hidden, known)
