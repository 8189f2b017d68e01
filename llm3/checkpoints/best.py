"""The figure by which a stage's best checkpoint is chosen, as its metadata carries it."""

import math
from collections.abc import Mapping

from llm3.errors import UserError


def scored(name: str, signed: float | None) -> dict:
    """The field of a checkpoint's metadata for a figure, signed so that lower is better.

    It is empty without a figure, and for one that is not finite: that checkpoint cannot be the best.
    """
    known = signed is not None and math.isfinite(signed)
    return {"scored": {"name": name, "value": float(signed)} if known else None}


def best_step(metas: Mapping[int, dict], stage: str, where: str) -> int:
    """Of {step: metadata} of a stage, the step with the lowest figure, the later one of equals.

    Only figures of the name that the latest one has are compared. Raises UserError where none has a figure.
    """
    figures = {step: meta["scored"] for step, meta in metas.items() if meta.get("scored")}
    if not figures:
        raise UserError(
            f"{where}.step='best': no checkpoint of the parent has a figure to choose by: set stages.{stage}.best in "
            f"the parent's config, as in best='EVALUATION_bits_per_byte', or name a step "
            f"(there: {', '.join(map(str, metas))})"
        )
    name = figures[max(figures)]["name"]
    comparable = [step for step in figures if figures[step]["name"] == name]
    return min(comparable, key=lambda step: (figures[step]["value"], -step))
