"""The sections that show single items: the most confident errors of a classifier, and samples of all stages."""

from typing import Any

import numpy as np

from llm3.report.details import text_table
from llm3.report.entries import classifiers, evaluations_of
from llm3.report.material import Material
from llm3.report.units import percent, words

ERRORS = 8  # shown of an evaluation
LONGEST_SAMPLE = 400  # characters


def errors_section(material: Material) -> list[str]:
    """The wrong answers with the highest confidence of the last classifier of each evaluation, one line each."""
    parts: list[str] = []
    for evaluation in evaluations_of(material):
        found = [each for each in classifiers(material, evaluation) if not each[0].baseline]
        if not found:
            continue
        entry, columns = found[-1]
        stage, first = entry.rows[0]["stage"], entry.columns[0] or columns
        wrong = np.flatnonzero(first["truth"] != first["prediction"])
        chosen = wrong[np.argsort(-first["confidence"][wrong], kind="stable")][:ERRORS]
        if not len(chosen):
            continue
        lines = [
            [int(first["item"][at]), first["truth"][at], first["prediction"][at], percent(first["confidence"][at])]
            for at in chosen
        ]
        parts.append(f"**{words(evaluation)}**, {stage}: {len(wrong):,} of {len(first['item']):,} are wrong.")
        parts.append(text_table(["item", "true class", "predicted", "confidence"], lines))
    where = "An item is the row of the document in its source, counted from 0."
    return ["## The most confident errors", where, *parts] if parts else []


def samples_section(material: Material) -> list[str]:
    """What each stage writes after each prompt, side by side, from the last step that has samples."""
    last: dict[str, dict[str, str]] = {}
    for stage, lines in material.samples.items():
        for line in (each for each in lines if each["step"] == max(other["step"] for other in lines)):
            last.setdefault(line["prompt"], {})[stage] = line["text"]
    stages = [stage for stage in material.samples if any(stage in texts for texts in last.values())]
    cells: list[list[Any]] = [[prompt, *(texts.get(stage) for stage in stages)] for prompt, texts in last.items()]
    return ["## Samples", text_table(["prompt", *stages], cells, LONGEST_SAMPLE)] if cells else []
