"""Ablations made by hand: plans and rows without any training, some with results item by item on disk."""

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from llm3.ablation.schema import AblationConfig, ArmConfig, ComparisonConfig
from llm3.ablation.study import Outcome, Planned, Study
from llm3.files import METRICS
from llm3.report.predictions import write_predictions

STAGES = ("pretrain", "finetune")
ITEMS = 40
OLD = [0.50, 0.53, 0.49, 0.52, 0.51]
BETTER = [0.60, 0.64, 0.58, 0.63, 0.61]
EVIL = "<b>a|b</b>"
SHARES, LABELS = ["1%", "10%", "100%"], ["50", "all"]
Value = Callable[[str, Mapping[str, str], int], float | None]  # (arm, cell, seed) -> accuracy, None: not finished


def comparison(ours: str = "new", theirs: str = "old", **fields: Any) -> ComparisonConfig:
    """A declared comparison."""
    return ComparisonConfig(ours=ours, theirs=theirs, **fields)


def planned(values: Mapping[str, Sequence[float | None]]) -> Value:
    """The accuracy of an arm at each seed, in the order of the seeds."""
    return lambda arm, cell, seed: values[arm][seed]


def study(
    workdir: Path,
    value: Value | Mapping[str, Sequence[float | None]],
    arms: Sequence[str] = ("old", "new"),
    seeds: int = 5,
    grid: Mapping[str, Sequence[str]] | None = None,
    comparisons: Mapping[str, ComparisonConfig] | None = None,
    items: bool = False,
    history: bool = False,
    failed: Mapping[str, str] | None = None,
    **config: Any,
) -> Study:
    """An ablation of two stages, of which arms share the first one. items, history: written to disk."""
    of = planned(value) if isinstance(value, Mapping) else value
    own = AblationConfig(
        base={},
        metric=config.pop("metric", "task_accuracy"),
        arms=config.pop("arm_configs", {name: ArmConfig() for name in arms}),
        seeds=list(range(seeds)),
        comparisons=dict(comparisons or {}),
        **config,
    )
    variants, outcomes = [], []
    for arm, point in product(arms, product(*(grid or {}).values())):
        cell = dict(zip(grid or {}, point, strict=True))
        name = ", ".join([arm, *(f"{axis}={each}" for axis, each in cell.items())])
        number = len(variants)
        chains = {str(seed): [f"pretrain-{seed}", f"finetune-{number}-{seed}"] for seed in own.seeds}
        budget = {"tokens": 3000.0, "flops": 3e9 + 1e9 * list(arms).index(arm), "seconds": None}
        variants.append(Planned(name, arm, cell, list(STAGES), budget, 0.0 if own.match else None, None, [], chains))
        for seed in own.seeds:
            if (accuracy := of(arm, cell, seed)) is not None:
                outcomes.append(outcome(workdir, name, seed, chains[str(seed)], accuracy, items, history))
    after = dict.fromkeys(comparisons or {}, 0)
    return Study(
        workdir, own, "python -m llm3 ablate --config=a.py --workdir=DIR", variants, outcomes, failed or {}, after
    )


def outcome(
    workdir: Path, name: str, seed: int, chain: list[str], accuracy: float, items: bool, history: bool
) -> Outcome:
    """The rows of a variant at a seed, on disk as asked."""
    rows, folders = {}, {}
    spent = 0
    for stage, run in zip(STAGES, chain, strict=True):
        folders[stage] = workdir / "runs" / run / stage
        spent += 1000
        rows[stage] = row(stage, seed, accuracy, spent)
        if history and not folders[stage].exists():
            folders[stage].mkdir(parents=True)
            losses = [3 - 0.1 * step + 0.05 * seed + (stage == "finetune") * 0.5 for step in range(1, 11)]
            lines = [json.dumps({"step": step, "loss": loss}) for step, loss in enumerate(losses, 1)]
            (folders[stage] / METRICS).write_text("\n".join(lines) + "\n")
    if items:
        rows["finetune"]["task_accuracy"] = write_items(folders["finetune"], accuracy, seed)
    return Outcome(name, seed, rows, dict.fromkeys(rows), folders)


def row(stage: str, seed: int, accuracy: float, spent: int) -> dict[str, Any]:
    """The row of a stage; the task is only in that of the last one."""
    own = {"stage": stage, "seed": seed, "steps": 10, "tokens": 1000, "flops": 1e9, "seconds": 1.5, "params": 10}
    own |= {"chain": {"stages": [], "unknown": [], "tokens": spent, "flops": 1e6 * spent, "seconds": 1.5}}
    own |= {"trainable_params": 10, "peak_bytes": 2**30, "parent": None, "recipe": "r"}
    bits = 2.0 + 0.01 * seed + (0.2 if stage == "finetune" else 0)
    task = (
        {"task_accuracy": accuracy, "task_items": ITEMS, "task_majority_accuracy": 0.25} if stage == "finetune" else {}
    )
    return own | {"general_bits_per_byte": bits} | task


def write_items(folder: Path, accuracy: float, seed: int) -> float:
    """Write right and wrong answers of about this accuracy; returns the accuracy that they have."""
    right = np.random.default_rng(seed).permutation(ITEMS) < round(accuracy * ITEMS)
    classes = np.array(["a", "b"], object)
    truth = classes[np.arange(ITEMS) % 2]
    prediction = np.where(right, truth, classes[(np.arange(ITEMS) + 1) % 2])
    columns = {"item": np.arange(ITEMS), "truth": truth, "prediction": prediction, "score": right.astype(float)}
    columns |= {"confidence": np.full(ITEMS, 0.8), "classes": classes}
    write_predictions(folder, "task", columns)
    return float(right.mean())


def many(path):
    """Arms with everything that a report can show, one with a name that must not become markup."""
    own = study(
        path,
        {"old": OLD, EVIL: [*BETTER[:3], None, BETTER[4]]},
        ("old", EVIL),
        items=True,
        history=True,
        question="Is it better?",
        match="flops",
        comparisons={"main": comparison(EVIL, "old", expect="better", smallest=0.02, literature="Doe 2020: it helps")},
        failed={"finetune-1-3": f"exit 1: {path.resolve()}/runs/x: loss is not finite"},
        arm_configs={"old": ArmConfig(), EVIL: ArmConfig(note="has <i>no</i> note")},
    )
    own.variants[1] = own.variants[1]._replace(
        excess=0.04, adjusted=["pretrain", 100, 140], differs=["stages.pretrain.steps: 100 / 140"]
    )
    return own


def in_grid(path):
    """Two arms at six points of a grid, where one is worse at first and better at last."""

    def value(arm, cell, seed):
        return OLD[seed] + (arm == "new") * (0.1 * SHARES.index(cell["share"]) - 0.08 + 0.02 * BETTER[seed])

    declared = {"up": comparison(expect="better", literature="Doe 2020: it helps")}
    return study(path, value, grid={"share": SHARES, "labels": LABELS}, comparisons=declared)
