"""Which layers should learn a shift? It depends on where the shift is (Lee et al. 2023, "surgical fine-tuning").

    python -m llm3 ablate --config=configs/ablations/which_layers.py --workdir=runs/which_layers --jobs=2

After the quickstart's three stages, a fourth one adapts the classifier to a shifted task with 300 labels: other letters
(the input: texts in capitals), other contents (the features: texts without their first line), or other answers (the
output: every class has the name of the next one). It trains the first, the middle or the last layers, or all. Run it
from the root of the repository, where the functions below are found.
"""

from ml_collections import ConfigDict

LEE = "Lee et al. 2023: tuning the block that fits the shift matches or exceeds tuning all"
HERE = "configs.ablations.which_layers"
SHIFTS = {"input": "capitals", "features": "without_first_line", "output": "next_class"}
CLASSES = ["flax.linen", "flax.nnx", "jax.lax", "jax.numpy", "jax.scipy", "numpy.lib", "optax", "orbax.checkpoint"]
CLASSES += ["scipy.optimize", "scipy.signal", "scipy.sparse", "scipy.stats"]


def capitals(row):
    """The text in capitals, which the tokenizer cuts quite differently."""
    return row | {"text": row["text"].upper()}


def without_first_line(row):
    """The text without its first line, which says what the rest is about."""
    first, _, rest = row["text"].partition("\n")
    return row | {"text": rest.strip() or first}


def next_class(row):
    """The same text with the name of the next class."""
    return row | {"label": CLASSES[(CLASSES.index(row["label"]) + 1) % len(CLASSES)]}


def get_config():
    """The ablation."""
    c = ConfigDict(convert_dict=False)
    c.question = "Which layers should learn a shift of the input, of the features, or of the output?"
    c.base = "../quickstart.py"
    c.stage = "shifted"
    c.metric = "shifted_accuracy"
    c.seeds = [0, 1, 2, 3, 4]
    c.change = {
        "sources.shifted": dict(path="builtin:numerical_task", label="label", max_documents=300),
        "stages.shifted": dict(
            kind="finetune",
            start="finetune",
            data=dict(shifted=1.0),
            objective="classify",
            steps=75,
            batch_size=8,
            sequence_length=256,
            optimizer=dict(name="adamw", learning_rate=2e-3, warmup_steps=10),
        ),
        "evaluations": {
            "task": dict(kind="classification", source="task", split="test"),
            "shifted": dict(kind="classification", source="shifted", split="test"),
        },
    }
    rules = {
        "all": "all",
        "first": ["embeddings", "layers(0)"],
        "middle": "layers(1,2)",
        "last": ["layers(3)", "head/.*"],
    }
    c.arms = {name: dict(change={"stages.shifted.train": rule}) for name, rule in rules.items()}
    c.grid = {"shift": {name: {"sources.shifted.transforms": [f"{HERE}:{f}"]} for name, f in SHIFTS.items()}}
    c.comparisons = {
        f"{name} layers": dict(ours=name, theirs="all", expect="no worse", smallest=0.02, literature=LEE)
        for name in ("first", "middle", "last")
    }
    return c
