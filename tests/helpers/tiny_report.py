"""A small run for the report, made by hand: rows and predictions of a chain, of three seeds, and of a baseline."""

import numpy as np
from sklearn.metrics import f1_score, log_loss

from llm3.report.material import Material

CLASSES = ["cause", "cure", "sign"]
ITEMS, TEXTS = 120, 30
SHARES = {"full_0": 0.9, "full_1": 0.88, "full_2": 0.91, "top_0": 0.89, "top_1": 0.9, "top_2": 0.88, "scratch": 0.5}
BITS = {"init": 8.0, "pretrain": 2.0, **{name: 2.3 if name.startswith("full") else 2.1 for name in SHARES}}


def task(stage):
    """The predictions of a stage in the classification; None if it has no head."""
    if stage not in SHARES:
        return None
    random = np.random.default_rng(sum(map(ord, stage)))
    truth = np.array(CLASSES, object)[np.arange(ITEMS) % 3]
    wrong = np.array(CLASSES, object)[(np.arange(ITEMS) + 1) % 3]
    right = random.random(ITEMS) < SHARES[stage]
    prediction = np.where(right, truth, wrong)
    confidence = random.uniform(0.5, 1, ITEMS)
    probabilities = np.repeat((1 - confidence)[:, None] / 2, 3, axis=1)
    probabilities[np.arange(ITEMS), [CLASSES.index(each) for each in prediction]] = confidence
    own = probabilities[np.arange(ITEMS), np.arange(ITEMS) % 3]
    columns = {"item": np.arange(ITEMS) * 2, "truth": truth, "prediction": prediction, "score": right.astype(float)}
    columns |= {"nats": -np.log(own), "confidence": confidence, "probabilities": probabilities}
    return columns | {"classes": np.array(CLASSES, object)}


def text(stage):
    """The predictions of a stage in the perplexity: nats and bytes."""
    count = np.random.default_rng(1).integers(50, 500, TEXTS)
    noise = np.random.default_rng(sum(map(ord, stage))).normal(0, 0.01, TEXTS)
    return {"item": np.arange(TEXTS), "nats": count * (BITS[stage] + noise) * np.log(2), "bytes": count}


def predictions(stage, evaluation):
    """As `Material.predictions`."""
    return task(stage) if evaluation == "task" else text(stage)


def row(stage, parent, **more):
    """A row whose metrics are those of the predictions."""
    bits = text(stage)
    found = {
        "stage": stage,
        "parent": parent,
        "general_bits_per_byte": bits["nats"].sum() / np.log(2) / bits["bytes"].sum(),
    }
    if (columns := task(stage)) is not None:
        truth, prediction = columns["truth"].tolist(), columns["prediction"].tolist()
        found |= {
            "task_accuracy": columns["score"].mean(),
            "task_macro_f1": f1_score(truth, prediction, average="macro"),
            "task_nll": log_loss(truth, columns["probabilities"], labels=CLASSES),
            "task_items": ITEMS,
            "task_majority_accuracy": 1 / 3,
        }
    return found | {"params": 1000, "trainable_params": 1000, "tokens": 10, "flops": 1e9, "seconds": 2.0} | more


def rows():
    """The chain, and two recipes of three seeds each."""
    seeds = [
        row(f"{name}_{seed}", "pretrain", recipe=name, seed=seed, trainable_params=1000 if name == "full" else 100)
        for name in ("full", "top")
        for seed in range(3)
    ]
    return [row("init", None), row("pretrain", "init"), *seeds]


def single(predictions=predictions, **changes):
    """A run without replicates. changes: keys of the row of the fine-tuned stage."""
    chain = [row("init", None), row("pretrain", "init"), row("full_0", "pretrain", **changes)]
    return Material(chain, [row("scratch", "init")], predictions=predictions)


def material(**options):
    """The whole run."""
    return Material(rows(), [row("scratch", "init")], predictions=predictions, **options)


def confusion(stage):
    """The details of a stage with its confusion."""
    columns = task(stage)
    counts = np.zeros((3, 3), int)
    for truth, prediction in zip(columns["truth"], columns["prediction"], strict=True):
        counts[CLASSES.index(truth), CLASSES.index(prediction)] += 1
    return {"task_confusion": {"classes": CLASSES, "counts": counts.tolist()}}


def everything():
    """The whole run with all that a report shows."""
    stages = ("pretrain", *SHARES)
    curve = [{"step": step, "loss": 1 + 3 / step, "tokens": step} for step in range(1, 200)]
    between = [{"step": step, "general_bits_per_byte": 2 + 3 / step} for step in (50, 100, 150)]
    prompts = ("Once upon a time", "<script>alert(1)</script>")
    return material(
        title="Run everything",
        command="python -m llm3 run --config=configs/tiny.py --workdir=runs/a/long/path/to/everything " + "--x=1 " * 30,
        histories={name: curve + between for name in stages},
        details={name: confusion(name) for name in SHARES},
        samples={name: [{"step": 9, "prompt": each, "text": "there was " * 20} for each in prompts] for name in stages},
        data_samples={name: [[("the prompt ", False), ("and the answer " * 20, True)]] * 2 for name in stages},
        facts={"devices": "1 x cpu", "versions": "llm3"},
        settings=["model.layers = 6", f"stages.{stages[0]}.steps = 100"],
        wall_seconds={"tokenize": 5.0},
        sessions=[("2026-01-01", 100.0)],
    )
