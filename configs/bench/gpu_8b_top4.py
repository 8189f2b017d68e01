"""The top 4 of the 32 layers of Llama 3 8B, on one GPU with 80 GB or more: windows of 4,096 tokens. Never run.

    python -m llm3 plan  --config=configs/bench/gpu_8b_top4.py --topology=h100x1 --stages=top4
    python -m llm3 bench --config=configs/bench/gpu_8b_top4.py --stage=top4 --alone
    python -m llm3 bench --config=configs/bench/gpu_8b_top4.py --stage=top4 --peer=torch,torch.compile

The other layers and the embedding are frozen, in bfloat16; the final norm and the head are trained too. Model and text
are those of configs/bench/gpu_8b.py. For a peer beside it, start with XLA_PYTHON_CLIENT_PREALLOCATE=false in the
environment.
"""

from configs.bench.gpu_8b import LLAMA3_8B, experiment


def get_config():
    """The experiment; only its steps are timed."""
    top4 = dict(start=dict(stage="full"), train="top(4)", frozen="compute")
    return experiment(LLAMA3_8B, rows=128256, batch_size=8, sequence_length=4096, micro_batches=8, top4=top4)
