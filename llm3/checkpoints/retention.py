"""Which checkpoints of a stage are kept.

llm3 deletes the others itself, once the newest save was found complete: Orbax would delete them before that look.
"""

import math
from collections.abc import Mapping, Sequence


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
