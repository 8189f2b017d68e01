"""Qwen3 0.6B in three stages, on 8 or 64 H100 or on a TPU v5p-512. Planned, never trained: all figures are estimates.

    python -m llm3 plan --config=configs/scale/qwen3_0p6b.py:h100x8 --topology=h100x8
    python -m llm3 run  --config=configs/scale/qwen3_0p6b.py:h100x8 --workdir=runs/qwen3_0p6b

The model has the published shape; stages and data are the same as in configs/scale/llama3_8b.py, in windows of 4,096
tokens, but `finetune` trains the top four layers. The model fits on a single device, so the mesh only has `data`.

| variant | `--topology` | GiB per device | tokens per second | 100G tokens |
|---|---|--:|--:|--:|
| `h100x8` | `h100x8` | 23.2 of 80 | 350k to 657k | 1.8 to 3.3 days |
| `h100x64` | `h100x64` | 21.0 of 80 | 2.7M to 5.1M | 5.5 to 10 hours |
| `v5p-512` | `v5p:8x8x4` | 12.1 of 95 | 5.9M to 11.2M | 2.5 to 4.7 hours |
"""

from ml_collections import ConfigDict

from configs.scale.llama3_8b import stages, texts

MESHES = {"h100x8": dict(data=8), "h100x64": dict(data=64), "v5p-512": dict(data=256)}
MICRO_BATCHES = {"h100x8": 8, "h100x64": 1, "v5p-512": 1}


def get_config(machine="h100x8"):
    """The experiment on one of the machines."""
    if machine not in MESHES:
        raise ValueError(f"{machine!r}: expected {', '.join(MESHES)}")
    c = ConfigDict()
    c.seed = 0
    # Qwen Team 2025, "Qwen3 technical report", table 1, and the published configuration of Qwen3-0.6B
    c.model = dict(
        layers=28,
        d_model=1024,
        heads=16,
        kv_heads=8,
        head_dim=128,
        d_ff=3072,
        qk_norm="head",
        rope_theta=1_000_000.0,
        tie_embeddings=True,
        remat="dots",
    )
    c.mesh = MESHES[machine]
    c.update(texts(vocab_size=151936))
    scaled = stages(256, 4096, MICRO_BATCHES[machine], learning_rate=6e-4)
    scaled["finetune"] |= dict(start="posttrain", train="top(4)", adapters={})
    c.stages = scaled
    return c
