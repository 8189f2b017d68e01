"""Llama 3 8B on one GPU with 141 GB, every parameter trained: packed documents in windows of 4,096 tokens. Never run.

    python -m llm3 plan  --config=configs/bench/gpu_8b.py --topology=h200x1 --stages=full
    python -m llm3 bench --config=configs/bench/gpu_8b.py --stage=full
    python -m llm3 bench --config=configs/bench/gpu_8b.py --stage=full --sweep

The shape is that of Grattafiori et al. 2024, table 3. Parameters, gradients and second moments in float32 and first
moments in bfloat16 take 105 GiB, so no micro-batches are added up, which would take 30 GiB more, and no peer fits
beside. The text is that of the Python installation, in a vocabulary of 8,192 tokens that is padded to 128,256 rows: a
step costs what it costs on other text, and nothing is downloaded.
"""

from ml_collections import ConfigDict

LLAMA3_8B = dict(
    layers=32,
    d_model=4096,
    heads=32,
    kv_heads=8,
    d_ff=14336,
    norm_epsilon=1e-5,
    rope_theta=500_000.0,
    tie_embeddings=False,
)


def get_config():
    """The experiment; only its steps are timed."""
    c = experiment(LLAMA3_8B, rows=128256, batch_size=2, sequence_length=4096, micro_batches=1)
    c.stages.full.optimizer.options.mu_dtype = "bfloat16"
    return c


def experiment(model, rows, batch_size, sequence_length, micro_batches, **stages):
    """Full training of a model, and further stages that start from it. rows: those of the vocabulary."""
    c = ConfigDict()
    c.model = dict(vocab_multiple=rows, remat="full", **model)
    c.tokenizer = dict(vocab_size=8192)
    c.sources = dict(general=dict(path="builtin:python"))
    shape = dict(
        data=dict(general=1.0),
        objective="causal",
        steps=100,
        batch_size=batch_size,
        sequence_length=sequence_length,
        micro_batches=micro_batches,
        optimizer=dict(name="adamw", learning_rate=1e-4, warmup_steps=10, options=dict(b1=0.9, b2=0.95)),
    )
    c.stages = dict(
        full=dict(kind="pretrain", **shape),
        **{name: dict(kind="posttrain", **shape) | own for name, own in stages.items()},
    )
    return c
