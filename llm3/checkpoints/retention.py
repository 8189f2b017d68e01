"""Which checkpoints of a stage are kept, and how the others are deleted.

llm3 deletes them itself, once the newest save was found complete: Orbax would delete the older ones before that look.
"""

import math
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from llm3.errors import writing


def kept(
    steps: Sequence[int], keep: int, metrics: Mapping[int, Mapping[str, float]], best: str | None, every: int = 0
) -> set[int]:
    """The steps to keep: the latest `keep`, and the one where the metric `best` is lowest, the later of equal ones.

    steps: ascending. metrics: {step: its metrics}; a step without metrics is never the best one. every: also keep its
    multiples; 0: none.
    """
    ranked = [step for step in steps if step in metrics] if best else []
    lowest = sorted(ranked, key=lambda step: (_rank(metrics[step], best or ""), -step))[:1]
    return {*steps[-keep:], *lowest, *(step for step in steps if every and step % every == 0)}


def _rank(metrics: Mapping[str, float], best: str) -> float:
    value = metrics.get(best, math.inf)
    return math.inf if math.isnan(value) else value


def delete(step: Path) -> None:
    """Delete a checkpoint: first its name, so that no part of it counts. Raises NotWritten where the disk refuses."""
    unnamed = step.with_name(f"{step.name}.orbax-checkpoint-tmp-deleted")  # Orbax removes one that is left behind
    with writing(step), suppress(FileNotFoundError):  # someone else may delete it at the same time
        step.rename(unnamed)
    shutil.rmtree(unnamed, ignore_errors=True)
