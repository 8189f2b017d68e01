"""Low-rank adapters on Llama 3 8B, on one GPU with 80 GB or more: windows of 4,096 tokens. Never run.

    python -m llm3 plan  --config=configs/bench/gpu_8b_lora.py --topology=h100x1 --stages=lora
    python -m llm3 bench --config=configs/bench/gpu_8b_lora.py --stage=lora --alone
    python -m llm3 bench --config=configs/bench/gpu_8b_lora.py --stage=lora --peer=torch,torch.compile

Rank 16 on every projection (Hu et al. 2022), over frozen weights in bfloat16. Model and text are those of
configs/bench/gpu_8b.py. For a peer beside it, start with XLA_PYTHON_CLIENT_PREALLOCATE=false in the environment.
"""

from configs.bench.gpu_8b import LLAMA3_8B, experiment


def get_config():
    """The experiment; only its steps are timed."""
    lora = dict(
        start=dict(stage="full", fresh=[".*/lora/bench/.*"]),
        train="lora",
        adapters=dict(bench=dict(rank=16, alpha=32.0)),
        frozen="compute",
    )
    return experiment(LLAMA3_8B, rows=128256, batch_size=8, sequence_length=4096, micro_batches=8, lora=lora)
