"""A model with the shape of Llama 3.2 1B on one GPU with 80 GB: all of it, its top 4 layers, or adapters. Never run.

    python -m llm3 plan  --config=configs/bench/gpu_1b.py --topology=h100x1
    python -m llm3 bench --config=configs/bench/gpu_1b.py --stage=full --profile=trace
    python -m llm3 bench --config=configs/bench/gpu_1b.py --stage=full --peer=torch,torch.compile

Small enough for llm3 and a peer beside each other: start with XLA_PYTHON_CLIENT_PREALLOCATE=false in the environment.
The text is that of configs/bench/gpu_8b.py.
"""

from configs.bench.gpu_8b import experiment


def get_config():
    """The experiment; only its steps are timed."""
    # the published configuration of Llama-3.2-1B
    model = dict(
        layers=16,
        d_model=2048,
        heads=32,
        kv_heads=8,
        d_ff=8192,
        norm_epsilon=1e-5,
        rope_theta=500_000.0,
        tie_embeddings=True,
    )
    adapters = dict(bench=dict(rank=16, alpha=32.0))
    return experiment(
        model,
        rows=128256,
        batch_size=16,
        sequence_length=4096,
        micro_batches=8,
        top4=dict(start=dict(stage="full"), train="top(4)", frozen="compute"),
        lora=dict(
            start=dict(stage="full", fresh=[".*/lora/bench/.*"]), train="lora", adapters=adapters, frozen="compute"
        ),
    )
