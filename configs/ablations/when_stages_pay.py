"""The map: where does staged training pay? By the amount of domain text, the number of labels, and who pays.

    python -m llm3 ablate --config=configs/ablations/when_stages_pay.py --workdir=runs/when_stages_pay --jobs=2

1 to 100 % of the domain text (20 to 1,996 documents), 50 to all labels, and four ways to use the same compute: all
three stages; no domain stage, but longer pretraining; the domain alone; the task alone. One pretraining may serve
several domains or tasks, which then share its cost: with 3 or 10 of them, the arms without pretraining have less
compute, as much as each user of the shared model would pay. `no domain` shares its pretraining too: from two users on,
it costs each less than `all three`, which the table says. With 50 labels, one of the 12 classes has none, and its rows
are left out of the test.
"""

from ml_collections import ConfigDict

LM_STEPS = {"pretrain": 120, "posttrain": 150}
DOMAIN = {"1 %": 20, "3 %": 60, "10 %": 200, "30 %": 600, "100 %": 0}  # documents; 0: all of 1,996
LABELS = {"50": 50, "500": 500, "all": 0}
FEW = {"sources.task.bad_rows": 0.1}  # rows of the test whose class is not among the labels


def get_config():
    """The ablation."""
    c = ConfigDict(convert_dict=False)
    c.question = "Where does staged training pay, by the amount of domain text and labels, at equal compute?"
    c.base = "../quickstart.py"
    c.stage = "finetune"
    c.metric = "task_accuracy"
    c.seeds = [0, 1, 2, 3, 4]
    c.match = "flops"
    c.shared = ["pretrain"]
    c.change = {
        "model.d_model": 96,
        "model.d_ff": 264,
        "stages.finetune.steps": 75,
        "stages.finetune.save_every": 1000,
        "evaluations.general.max_documents": 20,
        "evaluations.domain.max_documents": 20,
        **{f"stages.{stage}.steps": steps for stage, steps in LM_STEPS.items()},
        **{f"stages.{stage}.sequence_length": 128 for stage in LM_STEPS},
        **{f"stages.{stage}.save_every": 1000 for stage in LM_STEPS},
    }
    c.arms = {
        "all three": {},
        "no domain": dict(without=["posttrain"], change={"stages.pretrain.steps": sum(LM_STEPS.values())}),
        "domain only": dict(without=["pretrain"], adjust="posttrain"),
        "scratch": dict(without=["pretrain", "posttrain"], adjust="finetune"),
    }
    c.grid = {
        "domain text": {label: {"sources.domain.max_documents": n} for label, n in DOMAIN.items()},
        "labels": {label: {"sources.task.max_documents": n} | (FEW if n == 50 else {}) for label, n in LABELS.items()},
        "shared_by": [1, 3, 10],
    }
    c.comparisons = {
        f"all three against {other}": dict(ours="all three", theirs=other, expect="better", smallest=0.02)
        for other in list(c.arms)[1:]
    }
    return c
