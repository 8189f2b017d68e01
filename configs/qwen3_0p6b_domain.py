"""Qwen3 0.6B learns mathematics on one or eight GPUs. Planned, never trained.

    python -m llm3 plan --config=configs/qwen3_0p6b_domain.py:h100x8 --topology=h100x8
    python -m llm3 run  --config=configs/qwen3_0p6b_domain.py:h100x8 --workdir=runs/qwen3_0p6b_domain

`posttrain` starts from the published weights (Qwen Team 2025): 2G tokens of OpenWebMath with a tenth of general text.
`finetune` fits the top four layers to GSM8K's worked answers, in the model's own chat template. The data is that of
configs/scale/llama3_8b.py. The fields of the model are those of its config.json, against which a run checks them; they
are here so that a plan needs no model. `--config.stages.posttrain.start.model=DIR` starts from a folder.

| variant | stage | GiB per device | tokens per second |
|---|---|--:|--:|
| `h100x1` | `posttrain` | 23.2 of 80 | 44k to 83k |
| `h100x8` | `posttrain` | 23.2 of 80 | 348k to 653k |
| `h100x8` | `finetune` | 4.3 of 80 | 0.9M to 1.5M |

The table is the plan's estimate, between no overlap of matmuls, memory and collectives and full overlap.
"""

from ml_collections import ConfigDict

from configs.scale.llama3_8b import texts

MESHES = {"h100x1": dict(data=1), "h100x8": dict(data=8)}
MICRO_BATCHES = {"h100x1": 32, "h100x8": 4}
GENERAL, DOMAIN = 0.1, 0.9


def get_config(machine="h100x8"):
    """The experiment on one of the machines."""
    if machine not in MESHES:
        raise ValueError(f"{machine!r}: expected {', '.join(MESHES)}")
    c = ConfigDict()
    c.seed = 0
    c.model = dict(
        layers=28,
        d_model=1024,
        heads=16,
        kv_heads=8,
        head_dim=128,
        d_ff=3072,
        norm_epsilon=1e-6,
        qk_norm="head",
        rope_theta=1_000_000.0,
        tie_embeddings=True,
        remat="dots",
    )
    c.mesh = MESHES[machine]
    c.update(texts(vocab_size=151936))
    c.tokenizer = dict(vocab_size=151936)  # for a plan: a run takes the tokenizer of the model
    c.sources.task.update(prompt="question", answer="answer")  # the template writes the rest
    batch = dict(batch_size=128, micro_batches=MICRO_BATCHES[machine])
    adamw = dict(name="adamw", options=dict(b1=0.9, b2=0.95))
    c.stages = dict(
        posttrain=dict(
            kind="posttrain",
            start=dict(model="Qwen/Qwen3-0.6B"),
            data=dict(domain=DOMAIN, general=GENERAL),
            steps=2_000_000_000 // (128 * 4096),
            sequence_length=4096,
            save_every=500,
            guard=dict(deviations=6.0),
            optimizer=adamw | dict(learning_rate=5e-5, warmup_steps=100),
            **batch,
        ),
        finetune=dict(
            kind="finetune",
            start="posttrain",
            data=dict(task=1.0),
            objective="instruct",
            train="top(4)",
            steps=150,
            sequence_length=512,
            save_every=150,
            optimizer=adamw | dict(learning_rate=2e-5, warmup_steps=15),
            **batch,
        ),
    )
    return c
