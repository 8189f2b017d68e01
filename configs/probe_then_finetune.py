"""A linear probe, then full fine-tuning from it (Kumar et al. 2022, "Fine-tuning can distort pretrained features").

    python -m llm3 run --config=configs/probe_then_finetune.py --workdir=runs/probe

While a new head is still random, its gradients distort the pretrained features. So `probe` trains the head alone, and
`finetune` starts from it, head included, and trains all parameters at a lower rate. `direct` is the baseline: full
fine-tuning with a new head for as many steps as both together, at the learning rate of configs/quickstart.py. Data,
task and parent are the same as in that config.

Expect, after about 5 minutes on 2 cores (one seed, 460 items, 10.4 % for the majority class): the probe reaches 56.7 %
and leaves the features unchanged; fine-tuning from it reaches 64.8 %, with general text 0.09 bits per byte worse than
before; `direct` reaches 74.3 %, with general text 0.95 worse.
"""

from ml_collections import ConfigDict


def get_config():
    """The experiment."""
    c = ConfigDict()
    c.seed = 0
    c.model = dict(layers=4, d_model=128, heads=4, kv_heads=2, d_ff=352, qk_norm="head", pool="mean", scan_unroll=4)
    c.tokenizer = dict(vocab_size=4096)
    c.sources = dict(
        general=dict(path="builtin:python"),
        domain=dict(path="builtin:numerical"),
        task=dict(path="builtin:numerical_task", label="label"),
    )
    shape = dict(batch_size=8, sequence_length=256, log_every=20)
    muon = dict(name="muon", learning_rate=0.02, options=dict(adam_learning_rate=5e-3))
    adamw = dict(name="adamw", warmup_steps=10)
    fit = dict(kind="finetune", data=dict(task=1.0), objective="classify", **shape)
    new_head = dict(stage="posttrain", fresh=["head/.*"])
    c.stages = dict(
        pretrain=dict(
            kind="pretrain", data=dict(general=1.0), steps=320, optimizer=muon | dict(warmup_steps=20), **shape
        ),
        posttrain=dict(
            kind="posttrain",
            start="pretrain",
            data=dict(domain=0.9, general=0.1),
            steps=400,
            optimizer=muon | dict(warmup_steps=10),
            **shape,
        ),
        probe=dict(start=new_head, train=["head/.*"], steps=100, optimizer=adamw | dict(learning_rate=2e-2), **fit),
        finetune=dict(start="probe", train="all", steps=100, optimizer=adamw | dict(learning_rate=1e-3), **fit),
        direct=dict(start=new_head, baseline=True, steps=200, optimizer=adamw | dict(learning_rate=2e-3), **fit),
    )
    c.evaluations = dict(
        general=dict(kind="perplexity", source="general"),
        domain=dict(kind="perplexity", source="domain", max_documents=40),
        task=dict(kind="classification", source="task", split="test"),
    )
    return c
