"""How many labels until the stages before the task stop to matter?

    python -m llm3 ablate --config=configs/ablations/labels.py --workdir=runs/labels --jobs=2

The quickstart with 50, 200, 1,000 and all of its about 2,250 labels, at equal compute. With 50 labels, one of the 12
classes has none, and its rows are left out of the test.
"""

from ml_collections import ConfigDict


def get_config():
    """The ablation."""
    c = ConfigDict(convert_dict=False)
    c.question = "With how many labels do pretraining and the domain stage still help the task?"
    c.base = "../quickstart.py"
    c.metric = "task_accuracy"
    c.seeds = [0, 1, 2, 3, 4]
    c.match = "flops"
    c.arms = {
        "all three": {},
        "longer pretraining": dict(without=["posttrain"], adjust="pretrain"),
        "domain only": dict(without=["pretrain"], adjust="posttrain"),
        "scratch": dict(without=["pretrain", "posttrain"], adjust="finetune"),
    }
    few = {"sources.task.bad_rows": 0.1}  # rows of the test whose class is not among the labels
    c.grid = {
        "labels": {label: {"sources.task.max_documents": n} | (few if n == 50 else {}) for label, n in LABELS.items()}
    }
    c.comparisons = {
        f"all three against {other}": dict(ours="all three", theirs=other, expect="better", smallest=0.02)
        for other in list(c.arms)[1:]
    }
    return c


LABELS = {"50": 50, "200": 200, "1,000": 1000, "all": 0}
