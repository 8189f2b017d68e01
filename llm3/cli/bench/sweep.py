"""`bench --sweep`: the step time of combinations of settings that change no result, and the fastest that fits."""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import jax

from llm3.cli.bench.matmul import matmul_peak
from llm3.cli.bench.step import WARM_UP, BenchStep, Fed, fed
from llm3.config.model_schema import CHOICES
from llm3.distributed import memory
from llm3.distributed.sharding import axis_size
from llm3.models.attention.choice import IMPLEMENTATIONS, platform, why_not
from llm3.models.attention.of_layers import attentions
from llm3.stages.session import Session
from llm3.stages.stage import Stage

TIMED = 5  # steps of each combination
MOST_MICRO_BATCHES = 5  # numbers of micro-batches that are tried, at most
UNROLLED = 4  # layers in an iteration of the scan, besides one and all


class Combination(NamedTuple):
    """Settings of a step; the fields are those of a config."""

    remat: str
    micro_batches: int
    scan_unroll: int
    attention: str

    def of(self, stage: Stage) -> Stage:
        """The stage with these settings."""
        model = replace(stage.model, remat=self.remat, scan_unroll=self.scan_unroll, attention=self.attention)
        return replace(stage, model=model, config=replace(stage.config, micro_batches=self.micro_batches))


def configured(stage: Stage) -> Combination:
    """The settings of the config."""
    return Combination(stage.model.remat, stage.config.micro_batches, stage.model.scan_unroll, stage.model.attention)


def combinations(stage: Stage, pieces: int, attentions: list[str]) -> list[Combination]:
    """Those to try, and first the config's own. Of each kind, those that need less memory come first.

    pieces: the number of devices that share the rows of a batch. attentions: implementations besides the config's own.
    """
    rows, own, layers = stage.config.batch_size // pieces, configured(stage), stage.model.layers
    micro = [n for n in _powers_down(rows) if rows % n == 0]
    near = sorted(micro, key=lambda n: abs(n.bit_length() - own.micro_batches.bit_length()))[:MOST_MICRO_BATCHES]
    unrolls = sorted({1, min(UNROLLED, layers), layers})
    remats = [each for each in ("full", "dots", "none") if each in CHOICES["remat"]]
    every = itertools.product([own.attention, *attentions], unrolls, remats, sorted(near, reverse=True))
    return list(dict.fromkeys([own, *(Combination(remat, n, unroll, name) for name, unroll, remat, n in every)]))


def other_attentions(session: Session, stage: Stage) -> list[str]:
    """The implementations that "auto" may choose and that serve the stage here, besides those of the config."""
    calls, asked = stage.attention_calls(session.mesh, platform()), stage.model.attention
    chosen = attentions(calls, asked)
    automatic = [name for name, each in IMPLEMENTATIONS.items() if each.automatic]
    able = [name for name in automatic if not any(why_not(name, each) for each in calls.values())]
    return [name for name in able if {name} != chosen]


def _powers_down(rows: int) -> Iterator[int]:
    yield from (2**power for power in range(rows.bit_length() - 1, -1, -1))


def swept(session: Session, stage: Stage) -> list[dict[str, Any]]:
    """A row for each combination: its settings and metrics, or `error` if it does not fit.

    One after another, since two may not fit together; a combination that needs more memory than one that did not fit
    is not tried.
    """
    peak, batch = matmul_peak(session).flops_per_second, fed(session, stage, 0)
    rows: list[dict[str, Any]] = []
    failed: set[Combination] = set()
    for each in combinations(stage, axis_size(session.mesh, "batch"), other_attentions(session, stage)):
        row = each._asdict() | {"configured": each == configured(stage)}
        if any(_needs_more(each, other) for other in failed):
            row |= {"error": "not tried: one that needs less memory does not fit"}
        else:
            row |= _timed(session, each.of(stage), batch, peak)
            failed |= {each} if "error" in row else set()
        session.console.print(
            f"remat {each.remat}, micro-batches {each.micro_batches}, unroll {each.scan_unroll}, "
            f"attention {each.attention}: " + str(row.get("error") or f"{row['step_seconds']:.3f} s")
        )
        rows.append(row)
    return rows


def _needs_more(one: Combination, other: Combination) -> bool:
    return other._replace(micro_batches=one.micro_batches) == one and one.micro_batches < other.micro_batches


def _timed(session: Session, stage: Stage, batch: Fed, peak: float) -> dict[str, Any]:
    """The metrics of a combination, which the compiler or the device may find too large."""
    limit, found = memory.device_bytes(), {}
    try:
        step = BenchStep(session, stage, stage.phases(session.mesh)[0])
        found["device_bytes"] = step.device_bytes
        # the compiler of a TPU rejects what does not fit, and may count more than a step uses
        if limit is not None and step.device_bytes > limit and jax.default_backend() != "tpu":
            return found | {"error": f"does not fit: a device has {memory.gibibytes(limit)}"}
        for _ in range(WARM_UP + TIMED):
            step.run(batch)
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if not memory.is_exhausted(error):
            raise
        asked = memory.asked_bytes(error)
        return found | {"error": "does not fit" + (f": {memory.gibibytes(asked)} asked for" if asked else "")}
    return found | step.metrics(peak)


def best_of(rows: list[dict[str, Any]], stage: Stage) -> str:
    """A sentence on the fastest combination, with the flags that choose it."""
    timed = [row for row in rows if "error" not in row]
    if not timed:
        return "none of them fits"
    best = min(timed, key=lambda row: row["step_seconds"])
    flags = f"--config.model.remat={best['remat']} --config.model.scan_unroll={best['scan_unroll']}"
    flags += f" --config.model.attention={best['attention']}"
    flags += f" --config.stages.{stage.name}.micro_batches={best['micro_batches']}"
    own = next((row["step_seconds"] for row in timed if row["configured"]), None)
    if best["configured"]:
        return f"the fastest that fits is the config's own: {flags}"
    gain = f", {own / best['step_seconds']:.2f} times as fast as configured" if own else ""
    return f"the fastest that fits{gain}: {flags}"
