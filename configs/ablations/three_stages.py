r"""Why three stages? Every stage left out, replaced, or done otherwise, with equal compute where that is the question.

    python -m llm3 ablate --config=configs/ablations/three_stages.py --workdir=runs/three_stages --jobs=2
    python -m llm3 ablate --config=configs/ablations/three_stages.py:medical --workdir=runs/three_stages_medical \
        --jobs=2 --config.base.data_dir=data

The first is on the text of the installation, with the model and the stages of configs/quickstart.py at three quarters
of the width, half of the context and half of the steps. The second goes from general text to medical answers (MedQuAD)
to their question types, with 2,000 and with 200 labels. `--plan` shows what is to be trained. Most arms use as many
FLOPs as `all three`; `no domain` and the arms of the last stage use less, which the table says.

The learning rates are those of the base, and for a part of the parameters those that were chosen for
configs/medical.py; none was tuned for an arm here.
"""

from ml_collections import ConfigDict

GURURANGAN = (
    "Gururangan et al. 2020: a second stage of pretraining on the domain of the task helps, more so where the domain "
    "is far from the general text"
)
IRRELEVANT = "Gururangan et al. 2020: a domain that has nothing to do with the task does not help"
IBRAHIM = "Ibrahim et al. 2024: a little replay of earlier data prevents most forgetting, at little cost on new data"
LEE = "Lee et al. 2023: tuning one block of layers can match or exceed tuning all"
BIDERMAN = "Biderman et al. 2024: LoRA learns less and forgets less than full fine-tuning"


def get_config(corpus="installation"):
    """The ablation. corpus: "installation" or "medical"."""
    c = ConfigDict(convert_dict=False)
    c.question = "Does training in three stages help the task, compared with fewer or other stages at equal compute?"
    c.metric = "task_accuracy"
    c.seeds = [0, 1, 2, 3, 4]
    c.match = "flops"
    medical = corpus == "medical"
    c.base = "../medical.py" if medical else "../quickstart.py"
    last, domain = ("full_0", "medquad") if medical else ("finetune", "domain")
    c.stage = last
    c.change = small(last) | {f"stages.{last}.optimizer.learning_rate": 1e-3 if medical else 2e-3}
    other = dict(path="builtin:numerical" if medical else "builtin:tools")
    c.arms = {
        "all three": {},
        "no domain": dict(without=["posttrain"]),
        "longer pretraining": dict(without=["posttrain"], adjust="pretrain"),
        "domain only": dict(without=["pretrain"], adjust="posttrain"),
        "scratch": dict(without=["pretrain", "posttrain"], adjust=last),
        "joint": dict(
            without=["posttrain"], adjust="pretrain", change={"stages.pretrain.data": {"general": 0.5, domain: 0.5}}
        ),
        "other domain": dict(
            change={"sources.other": other, "stages.posttrain.data": {"other": 0.9, "general": 0.1}},
        ),
        **{
            f"replay {share} %": dict(
                change={"stages.posttrain.data": {domain: 1.0}, "stages.posttrain.replay": share / 100}
            )
            for share in (0, 5, 25)
        },
        "top 2": dict(change=part(last, "top(2)", 4e-3)),
        "middle 2": dict(change=part(last, ["layers(1,2)", "head/.*"], 4e-3)),
        "LoRA": dict(
            change=part(last, ["lora", "head/.*"], 5e-3)
            | {
                f"stages.{last}.adapters": {"task": {"rank": 8}},
                f"stages.{last}.start": {"stage": "posttrain", "fresh": ["head/.*", ".*/lora/task/.*"]},
            }
        ),
    }
    if medical:
        c.grid = {"labels": {str(n): {"sources.task.max_documents": n} for n in (200, 2000)}}
    c.comparisons = comparisons()
    return c


def small(last):
    """The model and the stages at a small scale: on 2 cores, the first corpus took 37 minutes with all seeds."""
    lm = {"sequence_length": 128, "save_every": 1000, "log_every": 40}
    return {
        "model.layers": 4,
        "model.scan_unroll": 4,
        "model.d_model": 96,
        "model.d_ff": 264,
        "stages.pretrain.steps": 160,
        "stages.posttrain.steps": 200,
        f"stages.{last}.steps": 75,
        f"stages.{last}.save_every": 1000,
        "evaluations.general.max_documents": 20,
        "evaluations.domain.max_documents": 20,
        **{f"stages.{stage}.{field}": value for stage in ("pretrain", "posttrain") for field, value in lm.items()},
    }


def part(last, rule, learning_rate):
    """The last stage trains a part of the parameters."""
    return {f"stages.{last}.train": rule, f"stages.{last}.optimizer.learning_rate": learning_rate}


def comparisons():
    """What is expected, and the smallest effect that counts: 2 points of accuracy, 0.02 bits per byte."""

    def accuracy(ours, theirs, expect, literature=""):
        return dict(ours=ours, theirs=theirs, expect=expect, smallest=0.02, literature=literature)

    def bits(ours, theirs, expect, literature, metric="general_bits_per_byte", stage="posttrain"):
        return dict(
            ours=ours, theirs=theirs, expect=expect, smallest=0.02, literature=literature, metric=metric, stage=stage
        )

    return {
        "a domain stage": accuracy("all three", "no domain", "better", GURURANGAN),
        "more general text instead": accuracy("all three", "longer pretraining", "better", GURURANGAN),
        "the domain alone": accuracy("all three", "domain only", "better"),
        "the task alone": accuracy("all three", "scratch", "better"),
        "all text at once": accuracy("all three", "joint", "better"),
        "another domain": accuracy("other domain", "longer pretraining", "worse", IRRELEVANT),
        "replay against forgetting": bits("replay 5 %", "replay 0 %", "better", IBRAHIM),
        "cost of replay": bits("replay 5 %", "replay 0 %", "no worse", IBRAHIM, "domain_bits_per_byte"),
        "the top layers": accuracy("top 2", "all three", "no worse", LEE),
        "the middle layers": accuracy("middle 2", "all three", "no worse", LEE),
        "LoRA learns": accuracy("LoRA", "all three", "worse", BIDERMAN),
        "LoRA forgets": bits("LoRA", "all three", "better", BIDERMAN, stage=""),
    }
