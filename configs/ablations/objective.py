"""Next tokens, hidden tokens, or a prefix: which objective of pretraining serves a task of classification?

    python -m llm3 ablate --config=configs/ablations/objective.py --workdir=runs/objective --jobs=2

The same parameters and the same tokens; only what the two stages on text predict, and with it the attention, differs.
"""

from ml_collections import ConfigDict


def get_config():
    """The ablation."""
    c = ConfigDict(convert_dict=False)
    c.question = "Which objective of the stages on text serves the task best, at equal parameters and tokens?"
    c.base = "../quickstart.py"
    c.metric = "task_accuracy"
    c.seeds = [0, 1, 2, 3, 4]
    c.match = "tokens"
    # next tokens cannot be measured on a bidirectional model
    c.change = {"evaluations": {"task": dict(kind="classification", source="task", split="test")}}
    masked = dict(name="masked", share=0.2)
    c.arms = {
        "causal": {},
        "prefix": dict(change={f"stages.{stage}.objective": "prefix" for stage in ("pretrain", "posttrain")}),
        "masked": dict(
            change={"model.causal": False}
            | {f"stages.{stage}.objective": masked for stage in ("pretrain", "posttrain")},
        ),
    }
    c.comparisons = {
        f"{name} against causal": dict(ours=name, theirs="causal", expect="different", smallest=0.02)
        for name in ("prefix", "masked")
    }
    return c
