"""How much replay, and is the learning rate to be warmed up again? In the domain stage, after it and after the task.

    python -m llm3 ablate --config=configs/ablations/replay.py --workdir=runs/replay --jobs=2

Ibrahim et al. 2024 continue pretraining on new data: warming the learning rate up again forgets the earlier data and
learns the new data better, and a few percent of replay mend most of the forgetting. Each share of replay is combined
with a learning rate that is warmed up to the peak again, or that stays where pretraining ended, at a tenth of it.
"""

from ml_collections import ConfigDict

SHARES = (0, 1, 5, 25, 50)
IBRAHIM = "Ibrahim et al. 2024: "


def get_config():
    """The ablation."""
    c = ConfigDict(convert_dict=False)
    c.question = "How much replay does the domain stage need, and should its learning rate be warmed up again?"
    c.base = "../quickstart.py"
    c.stage = "posttrain"
    c.metric = "domain_bits_per_byte"
    c.seeds = [0, 1, 2, 3, 4]
    c.change = {"stages.posttrain.data": {"domain": 1.0}}
    c.arms = {
        f"{how} replay {share} %": dict(
            change={"stages.posttrain.replay": share / 100, "stages.posttrain.optimizer.learning_rate": rate}
        )
        for how, rate in (("warmed up", 0.02), ("kept low", 0.002))
        for share in SHARES
    }
    c.comparisons = {
        "replay against forgetting": compared(
            "warmed up replay 5 %", "warmed up replay 0 %", "better", "replay prevents most forgetting", "general"
        ),
        "cost of replay": compared(
            "warmed up replay 5 %", "warmed up replay 0 %", "no worse", "a little replay costs little on new data"
        ),
        "warming up learns": compared(
            "warmed up replay 0 %", "kept low replay 0 %", "better", "warming up adapts better to new data"
        ),
        "warming up forgets": compared(
            "warmed up replay 0 %", "kept low replay 0 %", "worse", "warming up forgets earlier data", "general"
        ),
    }
    return c


def compared(ours, theirs, expect, finding, evaluation="domain"):
    """A comparison of bits per byte, of which 0.02 count."""
    metric = f"{evaluation}_bits_per_byte"
    return dict(ours=ours, theirs=theirs, expect=expect, metric=metric, smallest=0.02, literature=IBRAHIM + finding)
