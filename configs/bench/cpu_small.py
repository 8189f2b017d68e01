"""A step to time on a small machine: the savings of freezing, on real batches.

    python -m llm3 bench --config=configs/bench/cpu_small.py --stage=finetune
    python -m llm3 bench --config=configs/bench/cpu_small.py --stage=finetune "--config.stages.finetune.train=top(2)"

The second command also times full training, in alternating steps, and prints both with their ratios. It takes two
minutes on 2 cores and about 3 GiB. Expect of training the top 2 of 8 layers, compared with all: 0.43 of the FLOPs, 0.41
of the time, 0.17 of the temporary memory, 0.19 of moments and gradients. The task head reads a document's last token
(pool="last"), so both compute the last layer only there; with pool="mean" the ratio of FLOPs is 0.49. docs/bench.md has
the other flags: a profile, a sweep over settings, and torch's step beside this one.
"""

from ml_collections import ConfigDict


def get_config():
    """The experiment; only its steps are timed."""
    c = ConfigDict()
    c.model = dict(layers=8, d_model=256, heads=8, d_ff=704, pool="last", scan_unroll=8)
    c.tokenizer = dict(vocab_size=8192)
    c.sources = dict(
        general=dict(path="builtin:python"),
        task=dict(path="builtin:numerical_task", label="label"),
    )
    shape = dict(steps=100, batch_size=16, sequence_length=256)
    classifier = dict(kind="finetune", data=dict(task=1.0), objective="classify", **shape)
    c.stages = dict(
        pretrain=dict(kind="pretrain", data=dict(general=1.0), objective="causal", **shape),
        finetune=dict(start=dict(stage="pretrain", fresh=["head/.*"]), train="all", **classifier),
        lora=dict(
            start=dict(stage="pretrain", fresh=["head/.*", ".*/lora/bench/.*"]),
            train=["lora", "head/.*"],
            adapters=dict(bench=dict(rank=8, alpha=16.0)),
            **classifier,
        ),
    )
    return c
