"""Llama 3 8B in three stages, on 8 or 64 H100 or on a TPU v5p-512. Planned, never trained: all figures are estimates.

    python -m llm3 plan --config=configs/scale/llama3_8b.py:h100x64 --topology=h100x64
    python -m llm3 run  --config=configs/scale/llama3_8b.py:h100x64 --workdir=runs/llama3_8b

The model has the published shape; its vocabulary, of the published size, is trained on a sample of the data. `pretrain`
learns 100G tokens of FineWeb-Edu, `posttrain` 15G of OpenWebMath with a tenth of FineWeb-Edu, `finetune` fits an
adapter to GSM8K. The batch is 2.1M tokens on every machine; the mesh and the number of micro-batches differ.

| variant | `--topology` | GiB per device | tokens per second | 100G tokens |
|---|---|--:|--:|--:|
| `h100x8` | `h100x8` | 42.4 of 80 | 55k to 84k | 14 to 21 days |
| `h100x64` | `h100x64` | 42.4 of 80 | 425k to 673k | 1.7 to 2.7 days |
| `v5p-512` | `v5p:8x8x4` | 26.3 of 95 | 0.96M to 1.25M | 22 to 29 hours |

In a range, the first number assumes that matmuls, memory traffic and collectives run one after another, the second
that all overlap. Attention holds blocks of scores only, so the v5p has room for `remat="none"` (83.1 GiB), or for
windows of 32,768 tokens with `remat="full"`. `plan --aot` compared this with the TPU's compiler: see docs/results.md.
"""

from ml_collections import ConfigDict

# a v5p is named by its cores, two per chip: 512 cores are 256 chips in a torus of 8 x 8 x 4, and 256 jax devices
MESHES = {
    "h100x8": dict(data=1, fsdp=8),
    "h100x64": dict(data=8, fsdp=8, across_hosts="data"),  # a copy of the model on each host
    "v5p-512": dict(data=8, fsdp=32),  # 4096 / 32 is a tile of 128: the TPU gathers narrower pieces as sums
}
MICRO_BATCHES = {"h100x8": 32, "h100x64": 4, "v5p-512": 1}  # each micro-batch is one window per device


def get_config(machine="h100x8"):
    """The experiment on one of the machines."""
    if machine not in MESHES:
        raise ValueError(f"{machine!r}: expected {', '.join(MESHES)}")
    c = ConfigDict()
    c.seed = 0
    # Grattafiori et al. 2024, "The Llama 3 herd of models", table 3
    c.model = dict(
        layers=32,
        d_model=4096,
        heads=32,
        kv_heads=8,
        d_ff=14336,
        norm_epsilon=1e-5,
        rope_theta=500_000.0,
        tie_embeddings=False,
        remat="dots",
    )
    c.mesh = MESHES[machine]
    c.update(texts(vocab_size=128256))
    c.stages = stages(256, 8192, MICRO_BATCHES[machine], learning_rate=3e-4)
    return c


def texts(vocab_size):
    """General text, a domain and a task, and a vocabulary of the published size, trained on a sample."""
    general = dict(path="HuggingFaceFW/fineweb-edu", name="sample-100BT", validation="", validation_share=1e-4)
    sources = dict(
        general=general | dict(streaming=True),
        sample=general | dict(name="sample-10BT", max_documents=200_000),
        domain=dict(path="open-web-math/open-web-math", validation="", validation_share=1e-4, streaming=True),
        task=dict(
            path="openai/gsm8k",
            name="main",
            prompt="Question: {question}\nAnswer:",
            answer=" {answer}",
            validation="",
            validation_share=0.05,
        ),
    )
    evaluations = dict(
        general=dict(kind="perplexity", source="general", max_documents=1000, sequence_length=2048, batch_size=256),
        domain=dict(kind="perplexity", source="domain", max_documents=1000, sequence_length=2048, batch_size=256),
        task=dict(
            kind="generation",
            source="task",
            split="test",
            sequence_length=512,
            batch_size=256,
            options=dict(max_tokens=256),
        ),
    )
    return dict(tokenizer=dict(vocab_size=vocab_size, sources=["sample"]), sources=sources, evaluations=evaluations)


def stages(batch_size, sequence_length, micro_batches, learning_rate):
    """100G tokens of general text, 15G of mathematics with some general text, and an adapter for word problems."""
    tokens = batch_size * sequence_length
    shape = dict(batch_size=batch_size, sequence_length=sequence_length, micro_batches=micro_batches, save_every=500)
    adamw = dict(name="adamw", options=dict(b1=0.9, b2=0.95))
    return dict(
        pretrain=dict(
            kind="pretrain",
            data=dict(general=1.0),
            steps=100_000_000_000 // tokens,
            guard=dict(deviations=6.0),
            optimizer=adamw | dict(learning_rate=learning_rate, warmup_steps=2000),
            **shape,
        ),
        posttrain=dict(
            kind="posttrain",
            start="pretrain",
            data=dict(domain=1.0),
            replay=0.1,
            steps=15_000_000_000 // tokens,
            guard=dict(deviations=6.0),
            optimizer=adamw | dict(learning_rate=learning_rate / 5, warmup_steps=200),
            **shape,
        ),
        finetune=dict(
            kind="finetune",
            start=dict(stage="posttrain", fresh=[".*/lora/task/.*"]),
            data=dict(task=1.0),
            objective="instruct",
            train="lora",
            adapters=dict(task=dict(rank=16, alpha=32.0)),
            frozen="compute",
            steps=90,
            batch_size=256,
            sequence_length=512,
            micro_batches=max(1, micro_batches // 8),
            save_every=90,
            optimizer=adamw | dict(learning_rate=2e-4, warmup_steps=10, weight_decay=0.0),
        ),
    )
