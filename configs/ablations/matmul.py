"""Does pretraining with matmuls in int8 or fp8 learn what it learns in bfloat16?

    python -m llm3 ablate --config=configs/ablations/matmul.py --workdir=runs/matmul --jobs=2

The quickstart's first stage, three times with the same seeds. A CPU computes all three, to compare losses; only an
accelerator gets faster. `python -m llm3 report RUN RUN --out=DIR` draws the losses of several of the runs, step by
step. Needs `pip install 'llm3[qwix]'`.
"""

from ml_collections import ConfigDict


def get_config():
    """The ablation."""
    c = ConfigDict(convert_dict=False)
    c.question = "Does pretraining with matmuls in 8 bits reach the loss of bfloat16?"
    c.base = "../quickstart.py"
    c.stage = "pretrain"
    c.metric = "general_bits_per_byte"
    c.seeds = [0, 1, 2, 3, 4]
    c.change = {
        "model.compute_dtype": "bfloat16",
        "stages.pretrain.log_every": 5,
        "evaluations": {"general": dict(kind="perplexity", source="general")},
    }
    c.arms = {
        "bfloat16": {},
        "int8": dict(change={"model.matmul": "int8"}),
        "fp8": dict(change={"model.matmul": "fp8"}),
    }
    c.comparisons = {
        f"{name} against bfloat16": dict(ours=name, theirs="bfloat16", expect="no worse", smallest=0.02)
        for name in ("int8", "fp8")
    }
    return c
