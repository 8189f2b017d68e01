"""The shape of SmolLM2-135M (Ben Allal et al. 2025): all of it, its top 4 of 30 layers, or adapters of rank 8.

    python -m llm3 bench --config=configs/bench/smollm2.py --stage=full
    python -m llm3 bench --config=configs/bench/smollm2.py --stage=top4 --peer=torch
    python -m llm3 bench --config=configs/bench/smollm2.py --stage=lora --peer=torch

Windows of 1,024 tokens, 4 in a batch, so that it also runs on a CPU with 8 GiB. The text is that of
configs/bench/gpu_8b.py. Not timed yet.
"""

from configs.bench.gpu_8b import experiment


def get_config():
    """The experiment; only its steps are timed."""
    # the published configuration of SmolLM2-135M
    model = dict(
        layers=30,
        d_model=576,
        heads=9,
        kv_heads=3,
        d_ff=1536,
        norm_epsilon=1e-5,
        rope_theta=100_000.0,
        tie_embeddings=True,
    )
    adapters = dict(bench=dict(rank=8, alpha=16.0))
    return experiment(
        model,
        rows=49152,
        batch_size=4,
        sequence_length=1024,
        micro_batches=4,
        top4=dict(start=dict(stage="full"), train="top(4)"),
        lora=dict(start=dict(stage="full", fresh=[".*/lora/bench/.*"]), train="lora", adapters=adapters),
    )
